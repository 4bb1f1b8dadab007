"""A run that was interrupted, in any way, continues to the bytes of the run that was not."""

import shlex
import shutil
import signal
import subprocess

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.train.conftest import STEPS, losses


def contents(run, step):
    """Every array and the iterator state of a checkpoint, read without the trainer."""
    manager = ocp.CheckpointManager(
        run / "checkpoints",
        item_handlers={"state": ocp.PyTreeCheckpointHandler(), "data": ocp.JsonCheckpointHandler()},
    )
    restored = manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(), data=ocp.args.JsonRestore())
    )
    arrays = {
        jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(restored["state"])
    }
    return arrays, restored["data"]


def assert_same_run(run, reference):
    assert losses(run) == losses(reference)
    assert [step for step, *_ in losses(run)] == list(range(1, STEPS + 1))
    (arrays, data), (expected, expected_data) = contents(run, STEPS), contents(reference, STEPS)
    assert arrays.keys() == expected.keys()
    assert any("carry" in name for name in arrays) and any("optimizer" in name for name in arrays)
    for name, value in expected.items():
        assert arrays[name].tobytes() == value.tobytes(), name
    assert data == expected_data


def checkpoints(run):
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


def finish(train_process, config, run):
    result = train_process(config, "--run", run, "--resume", "auto")
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_after_sigterm(tmp_path, uninterrupted, train_process):
    reference, config = uninterrupted
    result = train_process(config, "--run", tmp_path / "run", events="term@8")
    assert result.returncode == 128 + signal.SIGTERM, result.stdout + result.stderr
    assert checkpoints(tmp_path / "run") == [5, 8]
    assert "saved" in result.stdout
    assert "resumed from the checkpoint of step 8" in finish(train_process, config, tmp_path / "run")
    assert_same_run(tmp_path / "run", reference)


def test_after_kill_in_a_step(tmp_path, uninterrupted, train_process):
    reference, config = uninterrupted
    result = train_process(config, "--run", tmp_path / "run", events="kill@13")
    assert result.returncode == -signal.SIGKILL
    assert checkpoints(tmp_path / "run")[-1] in (5, 10)  # the write of step 10 may still have been under way
    finish(train_process, config, tmp_path / "run")
    assert_same_run(tmp_path / "run", reference)


def test_after_kill_in_a_checkpoint_write(tmp_path, uninterrupted, train_process):
    reference, config = uninterrupted
    run = tmp_path / "run"
    result = train_process(config, "--run", run, events="kill-write@10")
    assert result.returncode == -signal.SIGKILL
    assert checkpoints(run) == [5]
    assert list((run / "checkpoints").glob("10*orbax-checkpoint-tmp*")), "the kill must leave a half-written checkpoint"
    assert "resumed from the checkpoint of step 5" in finish(train_process, config, run)
    assert not list((run / "checkpoints").glob("*orbax-checkpoint-tmp*"))
    assert_same_run(run, reference)


def small_disk(mount):
    """A command prefix under which ``mount`` is a disk of 4 MB that lives as long as the command, or None."""
    inside = f"mount -t tmpfs -o size=4m tmpfs {shlex.quote(str(mount))}"
    for unshare in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        if (
            shutil.which("unshare")
            and subprocess.run([*unshare, "sh", "-c", inside], capture_output=True).returncode == 0
        ):
            copy = f"rm -f {mount}/filler; cp -r {mount}/. {mount}-after"
            script = f'{inside} || exit 99; "$@"; code=$?; {copy}; exit $code'
            return [*unshare, "sh", "-c", script, "sh"]
    return None


def test_after_a_full_disk(tmp_path, uninterrupted, train_process):
    reference, config = uninterrupted
    disk, after = tmp_path / "disk", tmp_path / "disk-after"
    disk.mkdir()
    prefix = small_disk(disk)
    if prefix is None:
        pytest.skip("needs the right to mount a small disk (root or user namespaces)")
    after.mkdir()
    filler = disk / "filler"
    # Full at the checkpoint of step 10, free again at 15, full from 17 to the end.
    result = train_process(
        config, "--run", disk / "run", events=f"fill@7:{filler},free@12:{filler},fill@17:{filler}", prefix=prefix
    )
    output = result.stdout + result.stderr
    assert result.returncode == 1, output
    assert "checkpoint of step 10 could not be written: the disk is full" in result.stdout, output
    assert "Checkpoints kept: 5" in result.stdout
    assert f"checkpoint of step {STEPS} could not be written: the disk is full" in result.stderr, output
    assert "Checkpoints kept: 5, 15" in result.stderr
    assert "Traceback" not in output, output
    run = tmp_path / "disk-after" / "run"
    assert checkpoints(run) == [5, 15]
    assert not list((run / "checkpoints").glob("*orbax-checkpoint-tmp*")), "failed writes must not keep the disk full"
    finish(train_process, config, run)
    assert_same_run(run, reference)
