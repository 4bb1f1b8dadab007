"""`seqjax train` with events: ``child.py "kill@13" train-arguments...``, run as a process of its own.

Events, separated by commas, happen to the real process while the given step is being computed:
term@N: SIGTERM; kill@N: SIGKILL; kill-write@N: SIGKILL once the checkpoint of step N is partly on disk;
fill@N:FILE fills the disk that FILE is on until it is full; free@N:FILE removes FILE; nan@N makes the batch's loss NaN.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path


def kill_during_write(folder: Path) -> None:
    # A checkpoint becomes one by renaming its folder: without that the kill always finds it half-written.
    rename = os.rename

    def never(source, target, **options):
        if "orbax-checkpoint-tmp" in str(source):
            time.sleep(3600)
        rename(source, target, **options)

    setattr(os, "rename", never)  # noqa: B010
    setattr(Path, "rename", never)  # noqa: B010

    def watch() -> None:
        while not any(path.is_file() for path in folder.glob("*orbax-checkpoint-tmp*/*/**/d/*")):
            time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def wait_for_write(folder: Path) -> None:
    """Let the checkpoint before the event finish, so that the event hits the next one."""
    while list(folder.glob("*orbax-checkpoint-tmp*")):
        time.sleep(0.01)


def fill(file: Path) -> None:
    with file.open("wb", buffering=0) as handle:
        size = 1 << 16
        while size:
            try:
                handle.write(b"x" * size)
            except OSError:
                size //= 2


def main(events: str, arguments: list[str]) -> int:
    import jax.numpy as jnp

    import seqjax.cli
    from seqjax.train import program

    plan = {}
    for event in filter(None, events.split(",")):
        what, _, when = event.partition("@")
        number, _, file = when.partition(":")
        plan.setdefault(int(number), []).append((what, Path(file)))
    run = Path(arguments[arguments.index("--run") + 1])
    original = program.Program.step
    steps = 0

    def step(self, state, batch):
        nonlocal steps
        number = steps + 1
        steps = number
        happening = plan.get(number, [])
        for what, file in happening:
            wait_for_write(run / "checkpoints")
            if what == "kill-write":
                kill_during_write(run / "checkpoints")
            elif what == "fill":
                fill(file)
            elif what == "free":
                file.unlink()
            elif what == "nan":
                batch = batch | {"loss_mask": batch["loss_mask"] * jnp.nan}
        result = original(self, state, batch)
        for what, _ in happening:
            if what in ("term", "kill"):
                os.kill(os.getpid(), signal.SIGTERM if what == "term" else signal.SIGKILL)
        return result

    program.Program.step = step
    return seqjax.cli.main(["train", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
