"""Timing, memory and fits: the few things every suite measures with."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], repeats: int, *, min_seconds: float = 0.005
) -> dict[str, list[float]]:
    """Seconds per call of each candidate, ``repeats`` samples each, taken in rounds A B C, A B C, ...

    A sample repeats a short call until ``min_seconds`` have passed, so that clock and dispatch noise stay small. Each candidate
    is called once before each sample (compilation, caches, page faults) and must return arrays, which are waited for.

    Args:
        candidates: name -> function without arguments.
        repeats: samples per candidate.
        min_seconds: least duration of a sample, seconds.
    """
    calls = {}
    for name, call in candidates.items():
        jax.block_until_ready(call())
        start = time.perf_counter()
        jax.block_until_ready(call())
        calls[name] = max(1, math.ceil(min_seconds / max(time.perf_counter() - start, 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, call in candidates.items():
            # Untimed: what the candidate before has left of caches and allocator (after gigabytes were freed, every page of the next
            # call is new) is not this one's cost.
            jax.block_until_ready(call())
            start = time.perf_counter()
            for _ in range(calls[name]):
                result = call()
            jax.block_until_ready(result)
            samples[name].append((time.perf_counter() - start) / calls[name])
    return samples


def median(samples: Sequence[float]) -> float:
    """The middle sample."""
    return float(np.median(samples))


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over rounds of numerator / denominator: drift of the machine between rounds cancels."""
    return float(np.median(np.asarray(numerator) / np.asarray(denominator)))


def exponent(lengths: Sequence[int], values: Sequence[float]) -> float:
    """Least-squares slope of log(value) over log(length): 1 is linear cost, 2 quadratic."""
    return float(np.polyfit(np.log(np.asarray(lengths, float)), np.log(np.asarray(values, float)), 1)[0])


def temporary_bytes(function: Any, *arguments: Any) -> int:
    """Bytes of scratch memory the jitted function, compiled for these arguments, holds beyond its arguments and results, as the compiler reports."""
    analysis = function.lower(*arguments).compile().memory_analysis()
    return int(analysis.temp_size_in_bytes)


def relative_error(actual: Any, expected: Any) -> float:
    """Largest RMS(actual - expected) / RMS(expected) over the leaves of two trees; inf if anything is not finite."""
    worst = 0.0
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        got, want = (np.asarray(leaf).astype(np.complex128) for leaf in (got, want))
        if got.shape != want.shape or not np.isfinite(got).all():
            return math.inf
        scale = np.sqrt(np.mean(np.abs(want) ** 2)) if want.size else 1.0
        worst = max(worst, float(np.sqrt(np.mean(np.abs(got - want) ** 2)) / (scale or 1.0)) if want.size else 0.0)
    return worst


def first_line(error: BaseException) -> str:
    """Of the message, shortened: the reason why a candidate is missing from a table."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
