"""Checkpoints: everything a run needs to go on exactly where it was, written atomically in the background by orbax.

A checkpoint is a folder named by the step. Orbax writes into a temporary folder and renames it when everything is on
disk, so a checkpoint exists either completely or not at all; remains of interrupted writes are removed at the next start.
"""

import contextlib
import difflib
import gc
import logging
import shutil
import sys
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from seqjax.train.config import CheckpointConfig
from seqjax.train.step import TrainState

# What tensorstore, orbax and the operating system raise when a write fails.
_WRITE_ERRORS = (OSError, ValueError, RuntimeError)
_FILES_AT_ONCE = 16
_DELETIONS = 40


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; earlier ones are untouched."""


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, folder: str | Path, config: CheckpointConfig | None = None, *, read_only: bool = False):
        self.folder = Path(folder).absolute()
        config = config or CheckpointConfig()
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else config.max_to_keep,
            keep_period=config.keep_period,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
        )
        self._manager = self._open()
        self._pending: int | None = None

    def _open(self) -> ocp.CheckpointManager:
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        return ocp.CheckpointManager(self.folder, options=self._options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data_state: Any) -> None:
        """Start writing a checkpoint; returns as soon as the arrays are copied.

        Args:
            step: its name.
            state: all arrays; they may be donated right after.
            data_state: JSON-serialisable state of the data iterator after the last batch that ``state`` has seen.

        Raises:
            CheckpointError: if this one, or the one still being written, failed.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(_as_tree(state)), data=ocp.args.JsonSave({"iterator": data_state})
        )
        self._pending = step
        self._attempt(lambda: self._manager.save(step, args=arguments, force=True))

    def wait(self) -> None:
        """Block until the pending write has ended.

        Raises:
            CheckpointError: if it failed.
        """
        if self._pending is None:
            return
        self._attempt(self._manager.wait_until_finished)
        self._pending = None

    def poll(self) -> None:
        """Notice a failed write without blocking.

        Raises:
            CheckpointError: if the pending write has failed.
        """
        if self._pending is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, Any]:
        """Read a checkpoint onto the shardings of ``like``, whatever mesh it was written from.

        Args:
            step: which one.
            like: `jax.ShapeDtypeStruct` leaves with shardings.

        Returns:
            The state and the data iterator's state.

        Raises:
            ValueError: if it is that of another model or optimiser, naming what differs.
        """
        abstract = _as_tree(like)
        self._check_compatible(step, abstract)
        arguments = ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))
        restored = self._manager.restore(step, args=ocp.args.Composite(state=arguments, data=ocp.args.JsonRestore()))
        return _from_tree(restored["state"], like), restored["data"]["iterator"]

    def restore_parameters(
        self, step: int, shapes: Mapping[str, jax.ShapeDtypeStruct], *, average: bool, device: jax.Device
    ) -> dict[str, jax.Array]:
        """Read only the parameters (or their average) of a checkpoint, whole, onto one device.

        Raises:
            ValueError: if the checkpoint is that of another model, naming what differs.
        """
        place = jax.sharding.SingleDeviceSharding(device)
        abstract = {
            name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place) for name, shape in shapes.items()
        }
        part = {"average" if average else "params": abstract}
        self._check_compatible(step, part)
        arguments = ocp.args.PyTreeRestore(
            part, restore_args=ocp.checkpoint_utils.construct_restore_args(part), partial_restore=True
        )
        restored = self._manager.restore(step, args=ocp.args.Composite(state=arguments))
        return dict(next(iter(restored["state"].values())))

    def close(self) -> None:
        """Wait for pending writes and release the background threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _attempt(self, action: Callable[[], Any]) -> None:
        problem = None
        try:
            action()
        except _WRITE_ERRORS as error:
            problem = str(error).strip() or type(error).__name__
        # Raised out here, without the cause: its frames would keep the failed write's futures alive until Python exits.
        if problem is not None:
            raise self._failed(problem)

    def _failed(self, problem: str) -> CheckpointError:
        step, self._pending = self._pending, None
        # A manager with several failed files raises their errors one by one, some of them for ever: a new one takes over.
        for _ in range(_FILES_AT_ONCE):
            with contextlib.suppress(*_WRITE_ERRORS):
                self._manager.close()
                break
        self._remove_remains()
        self._manager = self._open()
        logging.getLogger("asyncio").addFilter(_is_news)
        gc.collect()  # ends what the failed write left suspended while its modules are still loaded
        reason = problem.splitlines()[-1][-300:]
        if "No space left" in problem:
            reason = f"the disk is full (No space left on device: {self.folder})"
        kept = ", ".join(map(str, self.steps())) or "none"
        return CheckpointError(f"checkpoint of step {step} could not be written: {reason}. Checkpoints kept: {kept}")

    def _remove_remains(self) -> None:
        """Delete half-written checkpoints, which would keep a full disk full."""
        for _ in range(_DELETIONS):
            remains = list(self.folder.glob("*.orbax-checkpoint-tmp*"))
            if not remains:
                break
            for folder in remains:
                shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.05)  # threads of the failed write may still be creating files

    def _check_compatible(self, step: int, abstract: Mapping[str, Any]) -> None:
        metadata = self._manager.item_metadata(step)["state"]
        stored = {
            path: tuple(leaf.shape) for path, leaf in _leaves({part: metadata.tree.get(part) for part in abstract})
        }
        wanted = {path: tuple(leaf.shape) for path, leaf in _leaves(abstract)}
        problems = describe_differences(stored, wanted)
        if problems:
            raise ValueError(
                f"checkpoint {self.folder / str(step)} does not fit this configuration: {'; '.join(problems)}. "
                "Train with the configuration it was made with (config.json of its run), or start a new run folder"
            )


@contextlib.contextmanager
def quiet_failures() -> Generator[None]:
    """Leave reporting a failed write to :class:`CheckpointError`.

    Orbax logs a traceback of its own, and tensorstore prints one for every array whose write ends after that of the
    first failure has closed their event loop.
    """
    logger = logging.getLogger("absl")
    level, hook = logger.level, sys.unraisablehook

    def show(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
            hook(unraisable)

    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = show
    try:
        yield
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook


def _is_news(record: logging.LogRecord) -> bool:
    """False for the other files of a failed write, which asyncio reports when it collects their futures."""
    error = record.exc_info[1] if record.exc_info else None
    # Only write failures: the same words about another error are worth reading.
    written = isinstance(error, OSError) or (isinstance(error, ValueError) and "Error writing" in str(error))
    return not (written and "exception was never retrieved" in record.getMessage())


def describe_differences(
    stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], most: int = 6
) -> list[str]:
    """Sentences about keys and shapes in which a checkpoint and a model differ."""
    problems = []
    for name in wanted:
        if name not in stored:
            near = difflib.get_close_matches(name, stored.keys() - wanted.keys(), 1, 0.8)
            problems.append(f"{name} {wanted[name]} is not in it" + (f" (it has {near[0]})" if near else ""))
        elif stored[name] != wanted[name]:
            problems.append(f"{name} has shape {stored[name]} in it, here {wanted[name]}")
    problems += [f"{name} {shape} is in it only" for name, shape in stored.items() if name not in wanted]
    return problems[:most] + ([f"and {len(problems) - most} more"] if len(problems) > most else [])


def _as_tree(state: TrainState) -> dict[str, Any]:
    # Orbax needs plain containers with string keys to be readable without this code; optax states are flattened by path.
    return {
        "params": state.params,
        "optimizer": _flat(state.optimizer),
        "average": {} if state.average is None else state.average,
        "carry": _flat(state.carry),
        "counters": {"step": state.step, "skipped": state.skipped, "consecutive": state.consecutive},
    }


def _from_tree(tree: Mapping[str, Any], like: TrainState) -> TrainState:
    def unflatten(values: Mapping[str, Any], structure: PyTree) -> PyTree:
        return jax.tree.unflatten(jax.tree.structure(structure), [values[name] for name in _flat(structure)])

    return TrainState(
        dict(tree["params"]),
        unflatten(tree["optimizer"], like.optimizer),
        None if like.average is None else dict(tree["average"]),
        unflatten(tree["carry"], like.carry),
        **tree["counters"],
    )


def _flat(tree: PyTree) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _leaves(tree: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(f"{part}.{name}", leaf) for part, leaves in tree.items() for name, leaf in (leaves or {}).items()]
