"""Means and rates between two reports."""

import contextlib
import math
import time
from collections.abc import Generator

from seqjax.train.console import peak_flops
from seqjax.train.program import Program

# Reported as they are now rather than as a mean.
LATEST = ("learning_rate", "skipped", "consecutive_skips")


class Meter:
    """Accumulates the metrics of steps; pauses (evaluation, checkpoints) do not count as training time.

    Args:
        program: for FLOPs per token and the devices' peak.
        weight: name of the metric that counts items.
    """

    def __init__(self, program: Program, weight: str):
        self._weight = weight
        self._flops = program.flops_per_token
        peak = peak_flops(program.mesh.devices.flat[0].device_kind)
        self._peak = None if peak is None else peak * program.mesh.size
        self._steps: list[dict[str, float]] = []
        self.restart()

    def restart(self) -> None:
        """Begin a new interval now."""
        self._steps.clear()
        self._begin = time.monotonic()
        self._pause = 0.0

    def add(self, values: dict[str, float]) -> None:
        """Count a step."""
        self._steps.append(values)

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        """Leave the time inside out of the rates."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._pause += time.monotonic() - begin

    def record(self) -> dict[str, float]:
        """Weighted means of the finite values since the last record, and rates; begins a new interval."""
        seconds = max(time.monotonic() - self._begin - self._pause, 1e-9)
        items = sum(values[self._weight] for values in self._steps)
        result: dict[str, float] = {}
        for name in self._steps[-1]:
            if name in LATEST:
                result[name] = self._steps[-1][name]
            elif name != self._weight:
                pairs = [(v[name], v[self._weight]) for v in self._steps if math.isfinite(v[name])]
                total = sum(weight for _, weight in pairs)
                result[name] = _mean(pairs, total)
        rate = items / seconds
        result |= {
            self._weight: items,
            f"{self._weight}_per_second": rate,
            "seconds_per_step": seconds / len(self._steps),
        }
        if self._peak is not None:
            result["mfu"] = rate * self._flops / self._peak
        self.restart()
        return result


def _mean(pairs: list[tuple[float, float]], total: float) -> float:
    if not pairs or not total:
        return math.nan
    if len(pairs) == 1:
        return pairs[0][0]  # exactly: weights must not round it
    return sum(value * weight for value, weight in pairs) / total
