"""What a run shows while it trains: one live line on a terminal, one printed line per report elsewhere."""

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Matrix-unit peak of one chip in bfloat16 with float32 accumulation, dense, in FLOP/s (vendors' data sheets).
PEAK_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of a device by its JAX ``device_kind``, or None if unknown (CPUs)."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name.lower() in device_kind.lower()), None)


class Display:
    """Progress of a run; use as a context manager."""

    def __init__(self, steps: int, start: int, *, quiet: bool = False, interval: float = 2.0):
        self._console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._steps = steps
        self._start = start
        self._interval = interval
        self._begin = self._last = time.monotonic()
        self._progress: Progress | None = None
        self._line = ""
        if self._console.is_terminal and not quiet:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(20),
                TimeRemainingColumn(),
                TextColumn("{task.fields[line]}"),
                console=self._console,
            )
            self._task = self._progress.add_task("train", total=steps, completed=start, line="")

    def __enter__(self) -> "Display":
        self._begin = time.monotonic()
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line above the progress."""
        self._console.print(text, markup=False)

    def update(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Show the newest means; printed lines are at least ``interval`` seconds apart."""
        line = self._format(values)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, line=line)
            return
        now = time.monotonic()
        if now - self._last >= self._interval or step == self._steps:
            self._last = now
            rate = (step - self._start) / max(now - self._begin, 1e-9)
            left = (self._steps - step) / max(rate, 1e-9)
            self.say(f"step {step}/{self._steps}  {line}  {_duration(left)} left")

    @staticmethod
    def _format(values: Mapping[str, float | int | str]) -> str:
        parts = []
        for name, label, pattern in (
            ("loss", "loss", ".4f"),
            ("accuracy", "accuracy", ".3f"),
            ("gradient_norm", "grad", ".2f"),
            ("learning_rate", "lr", ".2e"),
            ("tokens_per_second", "tokens/s", ",.0f"),
            ("mfu", "mfu", ".1%"),
            ("seconds_per_step", "s/step", ".3f"),
        ):
            if name in values:
                parts.append(f"{label} {values[name]:{pattern}}")
        if values.get("skipped"):
            parts.append(f"skipped {values['skipped']}")
        return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
