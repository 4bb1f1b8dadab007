"""The benchmark tells the truth: it refuses wrong results, judges goals correctly and writes what it measured."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.lax import stop_gradient

from seqjax import models, ops
from seqjax.cli import main
from seqjax.cli.bench import decode, kernel_cases, kernels, measure
from seqjax.cli.bench import models as model_suite
from seqjax.cli.bench import train as train_suite
from seqjax.cli.bench.ops import worst
from seqjax.cli.bench.report import Goal, Report, columns, plain
from seqjax.data import PrepareConfig, prepare

TINY_OPS = ["--lengths", "32", "64", "--reference-length", "48", "--heads", "2", "--dim", "4", "--repeats", "1"]


def bench(tmp_path, *arguments):
    out = tmp_path / "folder" / "result.json"
    code = main(["bench", *arguments, "--out", str(out)])
    return code, json.loads(out.read_text()) if out.exists() else None


def check_envelope(result, suite):
    assert result["suite"] == suite
    assert {"date", "commit", "command", "machine", "versions", "options", "rows", "goals", "load_before"} <= set(
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
            return right(x, stop_gradient(log_decay), implementation=implementation, **more)
        output, state = right(x, log_decay, implementation=implementation, **more)
        if implementation == "xla" and fault == "output":
            output = output.at[0, -1].multiply(1.5)
        if implementation == "xla" and fault == "state":
            state = 1.01 * state
        return output, state

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


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    text = folder / "text.txt"
    text.write_text("\n".join(f"line {number} of a small corpus" for number in range(2000)))
    prepare(PrepareConfig("text", (str(text),), out=str(folder / "corpus"), document="line", workers=1))
    return str(folder / "corpus")


def test_decode_times_fixed_and_growing_states(tmp_path):
    code, result = bench(
        tmp_path,
        *("decode", "--presets", "gla-tiny", "transformer-tiny", "--contexts", "8", "24"),
        *("--new-tokens", "6", "--block", "2", "--repeats", "1"),
    )
    assert code == 0 and result is not None
    check_envelope(result, "decode")
    fixed, grows = result["rows"]
    assert (fixed["state"], grows["state"]) == ("fixed", "grows")
    assert fixed["state bytes by context"]["8"] == fixed["state bytes by context"]["24"]
    assert grows["state bytes by context"]["8"] < grows["state bytes by context"]["24"]
    assert all(value > 0 for row in result["rows"] for value in row["ms by context"].values())
    (goal,) = result["goals"]
    assert goal["name"].startswith("gla-tiny") and goal["measured"] == pytest.approx(fixed["ratio"], rel=1e-4)


def test_a_read_state_is_the_state_after_the_context():
    options = decode.Options(contexts=(3, 10), batch=2)
    config = models.preset("gla-tiny", num_layers=1, dim=16, mlp_dim=8)
    model = models.LanguageModel(config, rngs=nnx.Rngs(0))
    states = decode.states_by_reading(model, options)
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, (2, 10))
    for context in (3, 10):
        expected = model(jnp.asarray(tokens[:, :context]))[1]
        assert measure.relative_error(states[context], expected) < 1e-4


def test_a_filled_cache_is_attended_to():
    config = decode.with_context(models.preset("transformer-tiny", num_layers=1, dim=16, mlp_dim=8), 12)
    model = models.LanguageModel(config, rngs=nnx.Rngs(0))
    state = decode.filled(model.initial_state(1), 9)
    token = jnp.ones((1, 1), jnp.int32)
    output, after = model(token, state)
    assert measure.relative_error(output, model(token)[0]) > 1e-3
    (attention,) = after.groups
    assert attention.position.tolist() == [[10]]
    assert attention.key_position[0, 0].tolist() == [*range(10), -1, -1]


def test_loader_compares_with_the_model(tmp_path, corpus):
    code, result = bench(
        tmp_path,
        *("loader", "--data", corpus, "--preset", "transformer-tiny", "--vocab-size", "320"),
        *("--batch-size", "8", "--window", "16", "--batches", "5", "--steps", "1", "--repeats", "1"),
    )
    assert code == 0 and result is not None
    check_envelope(result, "loader")
    assert [row["loader"] for row in result["rows"]] == ["packed", "stream"]
    for row in result["rows"]:
        assert row["ratio"] == pytest.approx(row["loader tokens/s"] / row["model tokens/s"], rel=1e-3)


def test_train_times_the_three_loops_and_compilation(tmp_path, corpus):
    code, result = bench(
        tmp_path,
        *("train", "--data", corpus, "--presets", "transformer-tiny", "--batch-size", "8", "--window", "16"),
        *("--steps", "2", "--repeats", "1", "--depths", "1", "2", "--compile-repeats", "1"),
    )
    assert code == 0 and result is not None
    check_envelope(result, "train")
    (row,) = result["rows"]
    assert row["parameters"] == models.parameter_count(models.preset("transformer-tiny"))
    assert row["trainer / bare"] == pytest.approx(row["trainer ms"] / row["bare ms"], rel=1e-3)
    assert row["compile ratio"] == pytest.approx(row["compile 2 layers s"] / row["compile 1 layers s"], rel=1e-3)
    assert [goal["goal"] for goal in result["goals"]] == ["<= 1.03", "<= 1.5"]


def test_train_refuses_loops_that_differ(tmp_path, corpus, monkeypatch, capsys):
    right = train_suite.compiled_step
    monkeypatch.setattr(train_suite, "compiled_step", lambda *arguments: lambda: right(*arguments)() + 1.0)
    code, result = bench(
        tmp_path,
        *("train", "--data", corpus, "--presets", "transformer-tiny", "--batch-size", "8", "--window", "16"),
        *("--steps", "2", "--repeats", "1", "--compile-repeats", "0"),
    )
    assert code == 1 and result is None
    assert "first loss" in capsys.readouterr().err


def test_strict_turns_a_missed_goal_into_an_exit_code(tmp_path, monkeypatch):
    report = Report("ops", "title", [{"op": "a"}], [Goal("speed-up", 1.0, 10.0, at_least=True)])
    monkeypatch.setattr("seqjax.cli.bench.ops.run", lambda options, console: report)
    assert bench(tmp_path, "ops")[0] == 0
    code, result = bench(tmp_path, "ops", "--strict")
    assert code == 1 and result is not None and not result["goals"][0]["passed"]


def test_an_unknown_preset_is_named_with_the_known_ones(capsys):
    for suite, flag in (("decode", "--presets"), ("train", "--presets"), ("loader", "--preset")):
        assert main(["bench", suite, flag, "gla-huge"]) == 2
        error = capsys.readouterr().err
        assert "gla-huge" in error and "gla-tiny" in error


def test_transformers_without_torch_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "seqjax.cli.bench.peer", raising=False)
    assert main(["bench", "transformers"]) == 2
    error = capsys.readouterr().err
    assert "torch is not installed" in error and "pip install 'seqjax[parity]'" in error


def test_the_readme_of_the_benchmarks_is_made_from_the_files(tmp_path):
    root = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "benchmarks"
    spec = importlib.util.spec_from_file_location("benchmarks_table", root / "table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (root / "README.md").read_text() == module.readme(root), "run python experiments/benchmarks/table.py"

    code, _ = bench(tmp_path, "ops", *TINY_OPS, "--filter", "causal_convolution")
    assert code == 0
    text = module.readme(tmp_path)
    assert "## folder" in text and "| causal_convolution |" in text and "commit" in text


TINY_KERNELS = ("--tokens", "128", "--lengths", "32", "64", "--heads", "2", "--dims", "16", "--repeats", "1")


def test_kernels_times_the_xla_form_and_says_why_there_is_no_kernel(tmp_path):
    code, result = bench(tmp_path, "kernels", *TINY_KERNELS, "--filter", "linear_attention scalar")
    assert code == 0 and result is not None
    check_envelope(result, "kernels")
    assert [(row["T"], row["pass"]) for row in result["rows"]] == [(64, "f"), (64, "f+b"), (32, "f"), (32, "f+b")]
    for row in result["rows"]:
        assert row["xla ms"] > 0 and row["pallas ms"] is None and row["best"] == row["None picks"] == "xla"
        assert row["rows"] * row["T"] == 128 and row["% of roofline"] > 0
        assert "this is a cpu" in row["not timed"]["pallas"]
    assert {goal["name"].split(":")[0] for goal in result["goals"]} >= {"results", "what None picks / the best form"}
    assert "GB/s" in result["notes"][0] and "TFLOP/s" in result["notes"][0]


def test_the_budget_of_kernels_cuts_the_grid_behind_its_centre(tmp_path):
    code, result = bench(tmp_path, "kernels", *TINY_KERNELS, "--filter", "linear_recurrence real", "--budget-s", "1e-9")
    assert code == 0 and result is not None and not result["rows"]
    assert any("0 of 2 cells" in note for note in result["notes"])


def test_the_grid_of_kernels_begins_with_the_centre_of_every_kernel():
    def grid(**options):
        return [(c.case.name, c.time, c.heads, c.dim) for c in kernels.cells(kernels.Options(**options))]

    full = grid(grid="full", filter="linear_attention")
    assert len(full) == len(set(full)) == 27 * 3
    assert [cell[1:] for cell in full[:4]] == [(8192, 16, 128)] * 3 + [(2048, 16, 128)]
    small = grid(filter="linear_attention none")
    assert len(small) == 7 and small == [cell for cell in full if cell in small]


def test_a_wrong_kernel_is_not_timed_and_misses_a_goal(tmp_path, monkeypatch):
    # The XLA form in the kernel's place, right and wrong.
    def form(factor):
        def call(inputs, implementation):
            output, state = ops.linear_attention(**inputs)
            return (factor * output if implementation == "pallas" else output), state

        return dataclasses.replace(case, op=dataclasses.replace(case.op, call=call))

    case = kernel_cases.chosen("linear_attention none")[0]
    for factor, passed in ((1.0, True), (1.5, False)):
        monkeypatch.setattr(kernel_cases, "CASES", (form(factor),))
        code, result = bench(tmp_path, "kernels", *TINY_KERNELS, "--strict")
        assert result is not None and all((row["pallas ms"] is not None) is passed for row in result["rows"])
        assert next(goal for goal in result["goals"] if goal["name"].startswith("results"))["passed"] is passed
        if passed:
            assert any(goal["name"].startswith("packed rows") for goal in result["goals"])
            assert any(goal["name"].startswith("exponent") for goal in result["goals"])
        else:
            assert code == 1 and "wrong" in result["rows"][0]["not timed"]["pallas"]


TINY_MODELS = (
    *("models", "--presets", "gated-deltanet-tiny", "--baseline", "transformer-tiny", "--dtype", "float32"),
    *("--tokens", "64", "--lengths", "32", "--repeats", "1"),
)


def test_models_times_training_steps_and_says_what_is_missing(tmp_path):
    code, result = bench(tmp_path, *TINY_MODELS)
    assert code == 0 and result is not None
    check_envelope(result, "models")
    rows = {row["form"]: row for row in result["rows"]}
    assert list(rows) == ["pallas", "xla", "fla", "attention"]
    assert "no kernel runs" in rows["pallas"]["not timed"] and "for GPUs" in rows["fla"]["not timed"]
    assert rows["xla"]["parameters"] == models.parameter_count(models.preset("gated-deltanet-tiny"))
    assert rows["xla"]["tokens/s"] == pytest.approx(64 / rows["xla"]["ms"] * 1e3, rel=1e-3)
    assert rows["xla"]["tokens/s over attention"] == pytest.approx(
        rows["attention"]["ms"] / rows["xla"]["ms"], rel=1e-3
    )


def test_models_refuses_forms_that_train_something_else(tmp_path, monkeypatch, capsys):
    right = model_suite.ours

    def wrong(made, tokens):
        candidate = right(made, tokens)
        calls.append(candidate)
        return dataclasses.replace(candidate, loss=candidate.loss + 0.1 * (len(calls) == 2))

    calls = []
    monkeypatch.setattr(model_suite, "ours", wrong)
    monkeypatch.setattr(model_suite, "kernels_in", lambda compiled: 1)
    code, result = bench(tmp_path, *TINY_MODELS)
    assert code == 1 and result is None
    assert "first losses" in capsys.readouterr().err
