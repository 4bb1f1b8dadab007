"""The benchmark tells the truth: it refuses wrong results, judges goals correctly and writes what it measured."""

import json
import math
import time

import jax.numpy as jnp
import pytest

from seqjax import ops
from seqjax.cli import main
from seqjax.cli.bench import measure
from seqjax.cli.bench.ops import worst
from seqjax.cli.bench.report import Goal, Report, columns, plain

TINY_OPS = ["--lengths", "32", "64", "--reference-length", "48", "--heads", "2", "--dim", "4", "--repeats", "1"]


def bench(tmp_path, *arguments):
    out = tmp_path / "folder" / "result.json"
    code = main(["bench", *arguments, "--out", str(out)])
    return code, json.loads(out.read_text()) if out.exists() else None


def check_envelope(result, suite):
    assert result["suite"] == suite
    assert {"date", "commit", "command", "machine", "versions", "options", "rows", "goals", "load_average"} <= set(
        result
    )
    assert result["versions"]["jax"] and result["machine"]["cores"] >= 1
    assert result["rows"]
    for goal in result["goals"]:
        assert set(goal) == {"name", "measured", "goal", "passed"}


def test_exponent_recovers_the_power():
    lengths = [1000, 2000, 4000]
    assert measure.exponent(lengths, [3e-6 * n for n in lengths]) == pytest.approx(1.0)
    assert measure.exponent(lengths, [1e-9 * n**2 for n in lengths]) == pytest.approx(2.0)


def test_interleaved_times_what_it_is_given():
    def sleeping(seconds):
        def call():
            time.sleep(seconds)
            return jnp.zeros(())

        return call

    samples = measure.interleaved({"short": sleeping(0.002), "long": sleeping(0.02)}, 3)
    assert [len(entry) for entry in samples.values()] == [3, 3]
    assert measure.median(samples["short"]) >= 0.002
    assert 0.02 <= measure.median(samples["long"]) < 0.2
    assert 1.5 < measure.median_ratio(samples["long"], samples["short"]) < 15


def test_relative_error_sees_wrong_values_shapes_and_nan():
    x = jnp.arange(1.0, 5.0)
    assert measure.relative_error((x, x), (x, x)) == 0
    assert measure.relative_error((x, 1.1 * x), (x, x)) == pytest.approx(0.1, rel=1e-5)
    assert measure.relative_error(x.at[1].set(jnp.nan), x) == math.inf
    assert measure.relative_error(x[:3], x) == math.inf
    assert measure.relative_error(1j * x, x.astype(jnp.complex64)) == pytest.approx(2**0.5)


def test_goals_are_judged_in_their_direction():
    assert Goal("fast", 12.0, 10.0, at_least=True).passed and not Goal("fast", 8.0, 10.0, at_least=True).passed
    assert Goal("flat", 1.0, 1.1).passed and not Goal("flat", 1.2, 1.1).passed
    # Not a number is a failure whichever way the goal points.
    assert not Goal("flat", math.nan, 1.1).passed and not Goal("fast", math.nan, 1.1, at_least=True).passed


def test_the_worst_op_speaks_for_its_kind():
    kinds = worst(
        [
            ("a", Goal("speed-up", 30.0, 10.0, at_least=True)),
            ("b", Goal("speed-up", 4.0, 10.0, at_least=True)),
            ("a", Goal("exponent", 1.3, 1.1)),
            ("b", Goal("exponent", 0.9, 1.1)),
        ]
    )
    assert [(goal.measured, goal.passed) for goal in kinds] == [(4.0, False), (1.3, False)]
    assert "b" in kinds[0].name and "1 pass" in kinds[0].name


def test_rows_hold_plain_values_and_tables_hide_mappings():
    rows = [{"op": "a", "ms by T": {1: 2.0}, "empty": None}, {"op": "b", "extra": 1.23456789}]
    assert columns(rows) == ["op", "extra"]
    assert plain(rows)[0]["ms by T"] == {"1": 2.0}
    assert plain({"x": (jnp.float32(1.5), 1)})["x"][1] == 1
    json.dumps(plain(rows))
    assert Report("s", "t", rows, []).rows is rows


def test_an_unknown_suite_is_named_with_the_known_ones(capsys):
    assert main(["bench", "opps"]) == 2
    assert "opps" in capsys.readouterr().err
    assert main(["bench", "--help"]) == 0
    assert "transformers" in capsys.readouterr().out


def test_ops_writes_times_memory_and_goals(tmp_path, capsys):
    code, result = bench(tmp_path, "ops", *TINY_OPS, "--filter", "linear_attention scalar")
    assert code == 0 and result is not None
    check_envelope(result, "ops")
    (row,) = result["rows"]
    assert row["op"] == "linear_attention scalar"
    assert row["error"] < 2e-4
    assert set(row["f+b ms by T"]) == {"32", "64"} and all(value > 0 for value in row["f+b ms by T"].values())
    assert row["state bytes"] == 4 * 2 * 4 * 4
    assert row["scratch bytes by T"]["64"] > 0
    assert len(result["goals"]) == 4
    assert row["verdict"].startswith("PASS" if all(goal["passed"] for goal in result["goals"]) else "FAIL")
    assert "speed-up" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["output", "state", "gradient"])
def test_ops_refuses_to_publish_a_wrong_op(tmp_path, monkeypatch, capsys, fault):
    right = ops.linear_recurrence

    def wrong(x, log_decay=None, *, implementation=None, **more):
        if implementation == "xla" and fault == "gradient":
            # The right values with a gradient that ignores the decay.
            frozen = jnp.asarray(log_decay)
            return right(x, jax_stop(frozen), implementation=implementation, **more)
        output, state = right(x, log_decay, implementation=implementation, **more)
        if implementation == "xla" and fault == "output":
            output = output.at[0, -1].multiply(1.5)
        if implementation == "xla" and fault == "state":
            state = 1.01 * state
        return output, state

    from jax.lax import stop_gradient as jax_stop

    monkeypatch.setattr(ops, "linear_recurrence", wrong)
    code, result = bench(tmp_path, "ops", *TINY_OPS, "--filter", "linear_recurrence real")
    assert code == 1 and result is None
    error = capsys.readouterr().err
    assert "refused to publish" in error and "linear_recurrence real" in error


def test_ops_needs_a_matching_filter_and_sane_sizes(capsys):
    assert main(["bench", "ops", "--filter", "no such op"]) == 2
    assert "delta_rule channel" in capsys.readouterr().err
    assert main(["bench", "ops", "--repeats", "0"]) == 2
    assert "--repeats" in capsys.readouterr().err
