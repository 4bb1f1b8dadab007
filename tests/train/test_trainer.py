"""The trainer as a library: any module, any task, any iterator."""

import dataclasses
import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqjax.train import CheckpointError, Checkpoints, Trainer, TrainingStopped, load_run
from seqjax.train.checkpoint import describe_differences
from tests.train.conftest import replaced
from tests.train.test_step import Regression, SquaredError


class Rows:
    """Batches that are a function of their index; from ``bad`` on their targets are infinite."""

    def __init__(self, bad=10**9):
        self.index, self.bad = 0, bad

    def get_state(self):
        return {"index": self.index}

    def set_state(self, state):
        self.index = state["index"]

    def __next__(self):
        generator = np.random.default_rng(self.index)
        x = generator.normal(size=(8, 4)).astype(np.float32)
        self.index += 1
        y = x @ np.ones((4, 3), np.float32) * (np.inf if self.index > self.bad else 1.0)
        return {"x": x, "y": y.astype(np.float32), "mask": np.ones(8, np.float32)}


@pytest.fixture
def config(tiny_config):
    changes = {
        "steps": 30,
        "patience": 3,
        "evaluation.every": 10,
        "optimizer.learning_rate": 0.1,
        "checkpoint.every": 10,
    }
    return replaced(tiny_config, **changes, **{"logging.tensorboard": False})


def trainer(config, run, rows, **options):
    defaults: dict[str, Any] = {"task": SquaredError(), "build": lambda: Regression(rngs=nnx.Rngs(0)), "quiet": True}
    return Trainer(config, run, batches=rows, **defaults | options)


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_foreign_module_and_task_train_with_evaluation_and_hooks(config, tmp_path):
    called = []

    def validation():
        rows = Rows()
        rows.index = 1000
        return (next(rows) for _ in range(2))

    options = {"validation": validation, "hooks": [lambda step, module, folder: called.append((step, type(module)))]}
    result = trainer(config, tmp_path / "run", Rows(), **options).run()
    assert result.step == 30 and result.signal is None
    assert called == [(10, Regression), (20, Regression), (30, Regression)]
    written = records(tmp_path / "run")
    assert [r["step"] for r in written if "loss" in r] == list(range(1, 31))
    assert written[-1]["validation_loss"] == result.metrics["validation_loss"] < written[0]["loss"] / 2
    assert (tmp_path / "run" / "loss.png").exists()
    assert Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps() == [10, 20, 30]


def test_a_loss_that_stays_infinite_stops_the_run_and_says_where(config, tmp_path, capsys):
    with pytest.raises(TrainingStopped) as stopped:
        trainer(config, tmp_path / "run", Rows(bad=13)).run()
    message = str(stopped.value)
    assert "from step 14 to step 16" in message and "objective=inf" in message
    assert "Last good checkpoint: step 10" in message and "learning_rate" in message
    steps = [r for r in records(tmp_path / "run") if r["step"] >= 13]
    assert steps[0]["skipped"] == 0 and [r["loss"] for r in steps[1:]] == [None] * len(steps[1:])


def test_the_run_ends_with_the_data(config, tmp_path):
    class Finite(Rows):
        def __next__(self):
            if self.index == 7:
                raise StopIteration
            return super().__next__()

    assert trainer(config, tmp_path / "run", Finite()).run().step == 7
    assert Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps() == [7]


def test_a_folder_with_a_run_is_not_overwritten(config, tmp_path):
    short = replaced(config, steps=10)
    trainer(short, tmp_path / "run", Rows()).run()
    with pytest.raises(ValueError, match=r"already holds a run \(checkpoint of step 10\)"):
        trainer(short, tmp_path / "run", Rows()).run()
    with pytest.raises(ValueError, match=r"no checkpoint of step 3; it has \[10\]"):
        trainer(short, tmp_path / "run", Rows(), resume=3).run()
    with pytest.raises(ValueError, match="'never', 'auto' or a step"):
        trainer(short, tmp_path / "run", Rows(), resume="yes").run()
    assert trainer(config, tmp_path / "run", Rows(), resume=10).run().step == 30


class Wider(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((4, 5)), axes=("embed", "mlp"))
        self.bias = nnx.Param(jnp.zeros(3))
        self.gain = nnx.Param(jnp.ones(3))


def test_a_checkpoint_of_another_module_names_keys_and_shapes(config, tmp_path):
    trainer(replaced(config, steps=10), tmp_path / "run", Rows()).run()
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(ValueError, match="does not fit") as error:

        @dataclasses.dataclass(frozen=True)
        class Task(SquaredError):
            def loss(self, model, batch, rng, carry):
                loss = jnp.sum(model.kernel[...]) + jnp.sum(model.gain[...] * model.bias[...])
                return loss, {"loss": loss, "rows": jnp.ones(())}, carry

        trainer(config, tmp_path / "run", Rows(), resume="auto", build=Wider, task=Task()).run()
    assert "params.kernel has shape (4, 3) in it, here (4, 5)" in str(error.value)
    assert "params.gain (3,) is not in it" in str(error.value)
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_differences_suggest_renamed_keys_and_are_cut_short():
    assert describe_differences({"params.blocks.kernel": (2,)}, {"params.block.kernel": (2,)}) == [
        "params.block.kernel (2,) is not in it (it has params.blocks.kernel)",
        "params.blocks.kernel (2,) is in it only",
    ]
    assert describe_differences({}, {str(i): () for i in range(9)})[-1] == "and 3 more"


@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_checkpoint_that_cannot_be_written_is_survived_or_stops_the_run(config, tmp_path, policy, monkeypatch):
    import orbax.checkpoint as ocp

    original = ocp.CheckpointManager.save

    def save(self, step, *arguments, **options):
        if step == 20:
            raise OSError(28, "No space left on device")
        return original(self, step, *arguments, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    config = replaced(config, **{"checkpoint.on_failure": policy})
    run = trainer(config, tmp_path / "run", Rows())
    if policy == "stop":
        with pytest.raises(CheckpointError, match=r"step 20 could not be written: the disk is full.*kept: 10"):
            run.run()
    else:
        assert run.run().step == 30
        assert Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps() == [10, 30]


def test_checkpoints_are_kept_by_policy(config, tmp_path):
    config = replaced(config, **{"checkpoint.every": 3, "checkpoint.max_to_keep": 2, "checkpoint.keep_period": 9})
    trainer(config, tmp_path / "run", Rows()).run()
    assert Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps() == [9, 18, 27, 30]


def test_a_checkpoint_holds_the_state_at_its_step_while_training_goes_on(config, tmp_path):
    """The step donates its buffers: a write that still reads them would save later values."""
    run = trainer(replaced(config, steps=1), tmp_path / "run", Rows())
    state = run.program.init()
    batch = run.program.put(next(Rows()))
    checkpoints = Checkpoints(tmp_path / "direct")
    expected = jax.tree.map(np.array, jax.device_get(state))
    checkpoints.save(0, state, {})
    for _ in range(20):
        state, _ = run.program.step(state, batch)
    checkpoints.wait()
    restored, _ = checkpoints.restore(0, run.program.state_spec)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), expected)


def test_a_run_is_read_back(uninterrupted, tiny_config):
    run, _ = uninterrupted
    config, model, tokenizer = load_run(run)
    assert config.model == tiny_config.model and config.data.tokenizer_fingerprint == tokenizer.fingerprint
    logits, _ = jax.jit(lambda m, t: m(t))(model, jnp.array([tokenizer.encode("the river")]))
    assert logits.shape == (1, 9, 320)
    _, early, _ = load_run(run, 5)
    assert not np.array_equal(early.embedding.table[...], model.embedding.table[...])
    with pytest.raises(ValueError, match=r"no checkpoint of step 6; it has \[5, 10, 15, 20\]"):
        load_run(run, 6)
    with pytest.raises(ValueError, match="not a run folder"):
        load_run(run.parent)


def test_a_run_is_read_back_without_its_corpus(uninterrupted, tmp_path):
    run = shutil.copytree(uninterrupted[0], tmp_path / "moved")
    config = json.loads((run / "config.json").read_text())
    config["data"]["path"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(config))
    tokenizer = load_run(run)[2]
    assert tokenizer.decode(tokenizer.encode("the river")) == "the river"
    assert tokenizer.fingerprint == config["data"]["tokenizer_fingerprint"]
