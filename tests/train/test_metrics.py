import json
import math
import os
import struct

from tensorboardX.proto.event_pb2 import Event  # ty: ignore[missing-module-member]
from tensorboardX.record_writer import masked_crc32c

from seqjax.train.metrics import MetricsLog, draw_losses, read_metrics


def log(folder, start=0, report=print):
    return MetricsLog(folder, tensorboard=False, start=start, report=report)


def test_records_after_the_restart_and_a_torn_line_are_dropped(tmp_path):
    first = log(tmp_path)
    for step in range(1, 6):
        first.write(step, {"loss": 1 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    log(tmp_path, start=3).write(4, {"loss": 0.5})
    records = list(read_metrics(tmp_path / "metrics.jsonl"))
    assert [(record["step"], record["loss"]) for record in records] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.5)]


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    log(tmp_path).write(1, {"loss": math.nan, "norm": math.inf, "tokens": 3})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda name: 1 / 0) == {"step": 1, "loss": None, "norm": None, "tokens": 3}


def test_a_full_disk_is_reported_once_and_nothing_is_lost(tmp_path, monkeypatch):
    said = []
    metrics = log(tmp_path, report=said.append)
    metrics.write(1, {"loss": 1.0})
    os.rename(tmp_path / "metrics.jsonl", tmp_path / "aside")
    os.symlink("/dev/full", tmp_path / "metrics.jsonl")  # every write fails with ENOSPC
    monkeypatch.setattr(os, "truncate", lambda path, length: None)  # a device has no length
    metrics.write(2, {"loss": 2.0})
    metrics.write(3, {"loss": 3.0})
    assert len(said) == 1 and "No space left" in said[0]
    os.replace(tmp_path / "aside", tmp_path / "metrics.jsonl")
    metrics.write(4, {"loss": 4.0})
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_the_loss_curve_is_a_picture(tmp_path):
    assert draw_losses(tmp_path) is None
    metrics = log(tmp_path)
    metrics.write(1, {"loss": 2.0})
    metrics.write(2, {"loss": math.nan})
    metrics.write(2, {"validation_loss": 1.5})
    assert draw_losses(tmp_path) == tmp_path / "loss.png"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_reads_the_events(tmp_path):
    metrics = MetricsLog(tmp_path, tensorboard=True, start=7, report=print)
    metrics.write(8, {"loss": 0.25, "note": "text", "norm": math.nan})
    metrics.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, messages = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        for start, stop in ((0, 8), (12, 12 + length)):
            assert struct.unpack("<I", data[stop : stop + 4])[0] == masked_crc32c(data[start:stop])
        messages.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    version, restart, scalars = messages
    assert version.file_version == "brain.Event:2"
    assert (restart.step, restart.session_log.status) == (8, 1)
    assert [(v.tag, v.simple_value) for v in scalars.summary.value][0] == ("loss", 0.25)
