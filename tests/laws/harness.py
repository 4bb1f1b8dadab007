"""What the laws are written in: tolerances, the float64 oracle, and the description of an op.

An `OpSpec` says how to make inputs for an op and how to call it; `tests/laws/test_ops.py` holds the laws.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCE: dict[str, float] = {
    # Largest allowed RMS(actual - expected) / RMS(expected), expected in float64.
    "float32": 1e-5,
    # 8 bits of mantissa: rounding the inputs and outputs alone costs 2e-3 to 4e-3; gradients sum several such roundings.
    "bfloat16": 1e-2,
    "float64": 1e-11,
}

Inputs = dict[str, jax.Array]


def relative_rms(actual: Any, expected: Any) -> float:
    """RMS(actual - expected) / RMS(expected), computed in float64; absolute where everything expected is 0."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    wide = np.complex128 if np.iscomplexobj(expected) else np.float64
    actual, expected = actual.astype(wide), expected.astype(wide)
    if expected.size == 0:
        return 0.0
    error, size = (np.sqrt(np.mean(np.abs(a) ** 2)) for a in (actual - expected, expected))
    return float(error / size) if size > 0 else float(error)


def assert_close_rms(actual: Any, expected: Any, ratio: float, name: str = "value") -> None:
    """Fail, naming leaf and worst position, unless every leaf of `actual` is within `ratio` of `expected` by relative RMS."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(expected)
    actual_leaves, actual_tree = jax.tree_util.tree_flatten(actual)
    assert jax.tree_util.tree_structure(expected) == actual_tree, f"{name}: {actual_tree} is not {tree}"
    lines, failed = [], False
    for (path, want), got in zip(leaves, actual_leaves):
        label = name + jax.tree_util.keystr(path)
        want, got = np.asarray(want), np.asarray(got)
        assert got.shape == want.shape, f"{label}: shape {got.shape}, expected {want.shape}"
        bad = ~np.isfinite(got.astype(np.complex128))
        if bad.any():
            lines.append(f"  {label}: {int(bad.sum())} of {bad.size} not finite, first at {tuple(np.argwhere(bad)[0])}")
            failed = True
            continue
        error = relative_rms(got, want)
        wrong = error > ratio
        failed |= wrong
        where = ""
        if wrong:
            gap = np.abs(got.astype(np.complex128) - want.astype(np.complex128))
            at = np.unravel_index(int(gap.argmax()), gap.shape)
            where = f", worst at {tuple(map(int, at))}: {got[at]} for {want[at]}"
        lines.append(f"  {label}: {error:.2e}{' > ' + str(ratio) if wrong else ''}{where}")
    assert not failed, "relative RMS error:\n" + "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class OpSpec:
    """How to test one op (or one setting of it).

    `make(key, batch, time, dtype)` returns all array inputs by name, "initial_state" (float32) among them;
    `call(inputs, segment_ids=None, implementation=None, chunk_size=None)` runs the op and returns (output, state).
    """

    name: str
    make: Callable[..., Inputs]
    call: Callable[..., tuple[jax.Array, Any]]
    time_inputs: tuple[str, ...]
    """Inputs with batch on axis 0 and time on axis 1."""
    shared_inputs: tuple[str, ...] = ()
    """Inputs without a batch axis (weights)."""
    log_decay: str | None = None
    """The input that is a log decay, for the stability law."""
    extremes: Callable[[Inputs], dict[str, Inputs]] | None = None
    """Further inputs for the stability law, by name, made from ordinary ones."""
    bfloat16_ratio: float = TOLERANCE["bfloat16"]
    chunk_size: int = 8
    """A small chunk, so that short sequences cross several boundaries."""

    def __repr__(self) -> str:
        return self.name


def slice_time(spec: OpSpec, inputs: Inputs, start: int, stop: int) -> Inputs:
    """The same inputs, tokens start..stop only."""
    return {name: array[:, start:stop] if name in spec.time_inputs else array for name, array in inputs.items()}


def slice_batch(spec: OpSpec, inputs: Inputs, rows: slice) -> Inputs:
    """The same inputs, some batch rows only."""
    return {name: array if name in spec.shared_inputs else array[rows] for name, array in inputs.items()}


def widen(tree: Any) -> Any:
    """Every floating leaf in float64 (complex in complex128); call inside `jax.enable_x64(True)`."""

    def leaf(array):
        array = np.asarray(array)
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            return jnp.asarray(array.astype(np.complex128))
        return (
            jnp.asarray(array.astype(np.float64)) if jnp.issubdtype(array.dtype, jnp.floating) else jnp.asarray(array)
        )

    return jax.tree.map(leaf, tree)


@functools.cache
def compiled(spec: OpSpec, implementation: str | None, chunk_size: int | None = None) -> Callable[..., Any]:
    """Jitted `f(inputs, segment_ids) -> (output, state)`."""
    return jax.jit(
        lambda inputs, segment_ids: spec.call(
            inputs, segment_ids=segment_ids, implementation=implementation, chunk_size=chunk_size
        )
    )


def weighted_sum(tree: Any, weights: Any) -> jax.Array:
    """Real part of sum(leaf * weight) over all leaves: a loss whose cotangents are the weights."""
    terms = jax.tree.map(lambda a, w: jnp.sum(jnp.real(a.astype(w.dtype) * w)), tree, weights)
    return sum(jax.tree.leaves(terms))


@functools.cache
def compiled_gradients(spec: OpSpec, implementation: str | None, chunk_size: int | None = None) -> Callable[..., Any]:
    """Jitted `f(inputs, segment_ids, weights) -> ((output, state), gradients by input name)`."""

    def loss(inputs, segment_ids, weights):
        result = spec.call(inputs, segment_ids=segment_ids, implementation=implementation, chunk_size=chunk_size)
        return weighted_sum(result, weights), result

    def run(inputs, segment_ids, weights):
        (_, result), gradients = jax.value_and_grad(loss, has_aux=True)(inputs, segment_ids, weights)
        return result, gradients

    return jax.jit(run)


def random_weights(result: Any, seed: int = 7, *, output: float = 1.0, state: float = 1.0) -> tuple[Any, Any]:
    """Random cotangents for (output, state), each scaled; `output=0` makes a loss of the final state only."""
    generator = np.random.default_rng(seed)

    def leaf(scale, array):
        values = generator.standard_normal(array.shape)
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            return jnp.asarray(scale * (values + 1j * generator.standard_normal(array.shape)), jnp.complex64)
        return jnp.asarray(scale * values, jnp.float32)

    return tuple(jax.tree.map(functools.partial(leaf, s), part) for s, part in zip((output, state), result))


def oracle(spec: OpSpec, inputs: Inputs, segment_ids: jax.Array | None = None) -> Any:
    """(output, state) of the reference form in float64."""
    with jax.enable_x64(True):
        return jax.device_get(compiled(spec, "reference")(widen(inputs), segment_ids))


def oracle_gradients(spec: OpSpec, inputs: Inputs, weights: Any, segment_ids: jax.Array | None = None) -> Any:
    """((output, state), gradients) of the reference form in float64."""
    with jax.enable_x64(True):
        return jax.device_get(compiled_gradients(spec, "reference")(widen(inputs), segment_ids, widen(weights)))


def assert_finite(tree: Mapping[str, Any] | Any, name: str) -> None:
    """Every leaf is finite."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        bad = ~np.isfinite(np.asarray(leaf).astype(np.complex128))
        assert not bad.any(), f"{name}{jax.tree_util.keystr(path)}: {int(bad.sum())} of {bad.size} entries not finite"
