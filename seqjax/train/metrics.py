"""What a run writes down: metrics.jsonl, TensorBoard events and the loss curve.

Losing a line of metrics must never end a run, so a full disk is reported once and lines are kept in memory until they fit.
"""

import json
import math
import os
import socket
import struct
import time
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
        self._report = report
        self._failed = False
        drop_after(folder / "metrics.jsonl", start)
        self._lines = _Appender(folder / "metrics.jsonl")
        self._events: _Appender | None = None
        if tensorboard:
            (folder / "tensorboard").mkdir(exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
            self._events = _Appender(folder / "tensorboard" / name)
            self._events.add(_event(file_version="brain.Event:2"))
            # Tells TensorBoard to forget the later steps of a run that was killed.
            self._events.add(_event(step=start + 1, session_log={"status": 1}))

    def write(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Append one record; numbers that are not finite become null, which JSON can hold."""
        record = {"step": step} | {name: _json_number(value) for name, value in values.items()}
        self._lines.add(json.dumps(record).encode() + b"\n")
        if self._events is not None:
            scalars = [{"tag": n, "simple_value": v} for n, v in values.items() if not isinstance(v, str)]
            self._events.add(_event(step=step, summary={"value": scalars}))
        self._flush("metrics cannot be written ({}); they are kept in memory and written when possible")

    def _flush(self, message: str) -> None:
        try:
            self._lines.flush()
            if self._events is not None:
                self._events.flush()
            self._failed = False
        except OSError as error:
            if not self._failed:
                self._report(message.format(error))
            self._failed = True

    def close(self) -> None:
        """Write what is still in memory."""
        self._failed = False
        self._flush("the last metrics could not be written: {}")


class _Appender:
    """A file that grows by whole records: what does not fit waits in memory, and nothing is torn."""

    def __init__(self, path: Path):
        self._path = path
        self._waiting = b""

    def add(self, record: bytes) -> None:
        self._waiting += record

    def flush(self) -> None:
        if not self._waiting:
            return
        with self._path.open("ab", buffering=0) as file:
            length = file.seek(0, os.SEEK_END)
            written = 0
            try:
                while written < len(self._waiting):
                    written += file.write(self._waiting[written:])
            except OSError:
                os.truncate(self._path, length)
                raise
        self._waiting = b""


def _event(**fields: Any) -> bytes:
    """A TensorBoard event as a TFRecord: length, its checksum, the message, its checksum."""
    # tensorboardX's own writer thread dies on a full disk, after which the next calls block for ever.
    from tensorboardX.proto.event_pb2 import Event  # ty: ignore[missing-module-member]
    from tensorboardX.record_writer import masked_crc32c

    message = Event(wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack("<Q", len(message))
    return b"".join(
        (length, struct.pack("<I", masked_crc32c(length)), message, struct.pack("<I", masked_crc32c(message)))
    )


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
