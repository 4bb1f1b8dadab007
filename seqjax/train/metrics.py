"""What a run writes down: metrics.jsonl, TensorBoard events and the loss curve.

Losing a line of metrics must never end a run, so a full disk is reported once and lines are kept in memory until they fit.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np


class MetricsLog:
    """Appends records to ``metrics.jsonl`` and TensorBoard.

    Args:
        folder: run folder.
        tensorboard: also write event files to ``tensorboard/``.
        start: step the run (re)starts from; records after it, which a killed run left, are dropped.
        report: called with one sentence when writing fails.
    """

    def __init__(self, folder: Path, *, tensorboard: bool, start: int, report: Callable[[str], None]):
        self._path = folder / "metrics.jsonl"
        self._report = report
        self._failed = False
        self._waiting = b""
        self._writer: Any = None
        drop_after(self._path, start)
        if tensorboard:
            from tensorboardX import SummaryWriter

            # Without purging, TensorBoard draws both the killed run's steps and the resumed run's.
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1, flush_secs=30)

    def write(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Append one record; numbers that are not finite become null, which JSON can hold."""
        record = {"step": step} | {name: _json_number(value) for name, value in values.items()}
        self._waiting += json.dumps(record).encode() + b"\n"
        try:
            self._flush()
            if self._writer is not None:
                for name, value in values.items():
                    if not isinstance(value, str) and math.isfinite(value):
                        self._writer.add_scalar(name, value, step)
        except OSError as error:
            if not self._failed:
                self._report(f"metrics cannot be written ({error}); they are kept in memory and written when possible")
            self._failed = True

    def _flush(self) -> None:
        with self._path.open("ab") as file:
            length = file.seek(0, os.SEEK_END)
            try:
                file.write(self._waiting)
                file.flush()
            except OSError:
                os.truncate(self._path, length)  # a torn line would make the file unreadable
                raise
        self._waiting, self._failed = b"", False

    def close(self) -> None:
        """Flush and close."""
        try:
            if self._waiting:
                self._flush()
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            self._report(f"the last metrics could not be written: {error}")


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a metrics.jsonl; a last line that a killed run left unfinished is left out."""
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                yield json.loads(line)


def drop_after(path: Path, step: int) -> None:
    """Remove records of later steps than ``step``, and an unfinished last line."""
    if not path.exists():
        return
    kept = b"".join(json.dumps(record).encode() + b"\n" for record in read_metrics(path) if record["step"] <= step)
    if kept != path.read_bytes():
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(kept)
        temporary.replace(path)


def draw_losses(folder: Path) -> Path | None:
    """Draw training and validation loss over steps to ``loss.png``; None if nothing is recorded."""
    records = list(read_metrics(folder / "metrics.jsonl"))
    curves = {
        label: [(record["step"], record[key]) for record in records if record.get(key) is not None]
        for label, key in (("training", "loss"), ("validation", "validation_loss"))
    }
    if not any(curves.values()):
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for label, points in curves.items():
        if points:
            steps, losses = np.array(points).T
            axes.plot(steps, losses, "-" if label == "training" else "o-", label=label, linewidth=0.8, markersize=3)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=150)
    return folder / "loss.png"


def _json_number(value: float | int | str) -> float | int | str | None:
    if isinstance(value, (int, str)):
        return value
    return float(value) if math.isfinite(value) else None
