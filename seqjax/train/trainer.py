"""The training loop."""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from seqjax._signals import StopRequest
from seqjax.data import Corpus, make_evaluation_batches, make_loader
from seqjax.models import LanguageModel, parameter_count
from seqjax.tasks import Task
from seqjax.train.checkpoint import CheckpointError, Checkpoints, quiet_failures
from seqjax.train.config import TrainConfig, save_config
from seqjax.train.console import Display
from seqjax.train.meter import Meter
from seqjax.train.metrics import MetricsLog, draw_losses
from seqjax.train.program import Program
from seqjax.train.runs import check_same_run, keep_tokenizer
from seqjax.train.sharding import unsharded
from seqjax.train.step import TrainState

# Steps in flight: the host reads the metrics of step n after it has sent step n + LAG, so the device never waits for it.
LAG = 2


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says at which step, why, and where the last good checkpoint is."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended."""

    step: int  # steps done
    metrics: dict[str, float]  # the last record, with the last evaluation
    state: TrainState
    signal: int | None = None  # that ended the run early, after saving


class Trainer:
    """Trains a model by a task; knows neither language nor layers.

    With a config alone it trains ``config.model`` on next tokens of ``config.data``. Everything else is replaceable:

    Args:
        config: the run.
        run: its folder; created if missing.
        resume: ``"never"`` (refuse a folder that holds checkpoints), ``"auto"`` (go on from the newest one, if any) or a step.
        task: instead of ``config.task``.
        build: makes the module; instead of ``LanguageModel(config.model)``.
        batches: iterator of this process's part of each batch, with ``get_state()`` and ``set_state()``.
        validation: called before each evaluation for its batches.
        hooks: called as ``hook(step, module, folder)`` after each evaluation.
        profile: (first, last) step to record with `jax.profiler` into ``profile/``.
        quiet: print nothing.

    Raises:
        ValueError: for a configuration that cannot run; the message says what is possible.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: str | Path,
        *,
        resume: str | int = "never",
        task: Task | None = None,
        build: Callable[[], nnx.Module] | None = None,
        batches: Any = None,
        validation: Callable[[], Iterable[dict[str, np.ndarray]]] | None = None,
        hooks: Sequence[Callable[[int, nnx.Module, Path], None]] = (),
        profile: tuple[int, int] | None = None,
        quiet: bool = False,
    ):
        self.folder = Path(run)
        self._task: Task = config.task if task is None else task
        self._hooks, self._profile, self._quiet = hooks, profile, quiet
        self._resume = resume
        self._bytes_per_token: float | None = None
        self._notes: list[str] = []
        self._corpus: Corpus | None = None
        if batches is None:
            config = self._open_corpus(config)
        self.config = config
        self._batches = (
            make_loader(config.data, jax.process_index(), jax.process_count()) if batches is None else batches
        )
        self._validation = validation
        if validation is None and batches is None and self._bytes_per_token is not None:
            self._validation = self._validation_batches
        self._build = build or (lambda: LanguageModel(config.model, rngs=nnx.Rngs(config.seed)))
        self._first = next(self._batches)
        processes = jax.process_count()
        spec = {
            name: jax.ShapeDtypeStruct((x.shape[0] * processes, *x.shape[1:]), x.dtype)
            for name, x in self._first.items()
        }
        self.program = Program(config, self._build, self._task, spec)
        if build is None and self.program.structure.size != parameter_count(config.model):
            raise RuntimeError(
                f"the model has {self.program.structure.size:,} parameters but its formula says "
                f"{parameter_count(config.model):,}"
            )

    def _open_corpus(self, config: TrainConfig) -> TrainConfig:
        data = config.data
        if not data.path:
            raise ValueError("data.path is empty; name a corpus folder (`--data PATH`, made by `seqjax prepare`)")
        self._corpus = corpus = Corpus.open(data.path, data.split)
        if corpus.vocab_size > config.model.vocab_size:
            raise ValueError(
                f"corpus {data.path} has {corpus.vocab_size} token ids ({corpus.manifest['tokenizer']['name']}), but "
                f"model.vocab_size is {config.model.vocab_size}; set it to at least {corpus.vocab_size}"
            )
        if getattr(config.task, "carry", False) and data.kind != "stream":
            raise ValueError(f"task.carry needs rows that continue: set data.kind to 'stream' (it is {data.kind!r})")
        if config.evaluation.split in corpus.manifest["splits"]:
            counts = Corpus.open(data.path, config.evaluation.split).counts
            self._bytes_per_token = counts["bytes"] / max(counts["tokens"], 1)
        elif config.evaluation.every:
            self._notes.append(f"no evaluation: corpus {data.path} has no split {config.evaluation.split!r}")
        fingerprint = data.tokenizer_fingerprint or corpus.fingerprint
        return dataclasses.replace(config, data=dataclasses.replace(data, tokenizer_fingerprint=fingerprint))

    def _validation_batches(self) -> Iterator[dict[str, np.ndarray]]:
        data = self.config.data
        return make_evaluation_batches(
            data.path,
            self.config.evaluation.split,
            data.window,
            data.batch_size,
            data.kind,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def run(self) -> Result:
        """Train to ``config.steps`` or to a signal.

        Raises:
            TrainingStopped: if the loss stays non-finite.
            CheckpointError: if a checkpoint cannot be written and the config says to stop, or if it is the last one.
            ValueError: if the run folder holds another run.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with quiet_failures():
            checkpoints = Checkpoints(self.folder / "checkpoints", self.config.checkpoint)
            try:
                return self._run(checkpoints)
            finally:
                checkpoints.close()

    def _resume_step(self, checkpoints: Checkpoints) -> int | None:
        steps = checkpoints.steps()
        if self._resume == "never" and steps:
            raise ValueError(
                f"{self.folder} already holds a run (checkpoint of step {steps[-1]}); go on with it (`--resume auto`) "
                "or name another folder"
            )
        if isinstance(self._resume, int):
            if self._resume not in steps:
                raise ValueError(f"{self.folder} has no checkpoint of step {self._resume}; it has {steps or 'none'}")
            return self._resume
        if self._resume not in ("never", "auto"):
            raise ValueError(f"`resume` is {self._resume!r}, expected 'never', 'auto' or a step")
        return steps[-1] if steps else None

    def _run(self, checkpoints: Checkpoints) -> Result:
        config, program = self.config, self.program
        start = self._resume_step(checkpoints)
        if start is not None:
            self._notes += check_same_run(config, self.folder)
        display = Display(config.steps, start or 0, quiet=self._quiet or jax.process_index() > 0)
        display.say(f"{program.structure.size:,} parameters")
        for name, reason in unsharded(program.structure, program.mesh).items():
            display.say(f"note: {name} is not cut: {reason}")
        program.compile()
        display.say(program.describe())
        for note in self._notes:
            display.say(f"note: {note}")
        if start is None:
            state, batch = program.init(), self._first
        else:
            state, data_state = checkpoints.restore(start, program.state_spec)
            self._batches.set_state(data_state)
            batch = None
            display.say(f"resumed from the checkpoint of step {start}")
        # Only now: a checkpoint that does not fit leaves the folder alone.
        if jax.process_index() == 0:
            save_config(config, self.folder / "config.json")
            if self._corpus is not None:
                keep_tokenizer(self._corpus, self.folder)
        log = MetricsLog(self.folder, tensorboard=config.logging.tensorboard, start=start or 0, report=display.say)
        loop = _Loop(self, checkpoints, display, log, state, start or 0, batch)
        try:
            with display, StopRequest() as stop:
                return loop.run(stop)
        finally:
            log.close()
            try:
                draw_losses(self.folder)
            except OSError as error:
                display.say(f"loss.png could not be written: {error}")


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps (0: never) is done after this one."""
    return every > 0 and step % every == 0


class _Loop:
    """The mutable part of one call of `Trainer.run`."""

    def __init__(
        self,
        trainer: Trainer,
        checkpoints: Checkpoints,
        display: Display,
        log: MetricsLog,
        state: TrainState,
        step: int,
        batch: dict[str, np.ndarray] | None,
    ):
        self.trainer, self.config, self.program = trainer, trainer.config, trainer.program
        self.checkpoints, self.display, self.log = checkpoints, display, log
        self.state, self.step = state, step
        self.pending: collections.deque[tuple[int, dict[str, Array]]] = collections.deque()
        self.meter = Meter(self.program, trainer._task.weight)
        self.last: dict[str, float] = {}
        self.batches = trainer._batches
        self.next = None if batch is None else (self.program.put(batch), self.batches.get_state())
        self.data_state: Any = None

    def fetch(self) -> tuple[dict[str, Array], Any] | None:
        """The next batch on its way to the devices, with the iterator's state after it; None at the end of the data."""
        batch = next(self.batches, None)
        return None if batch is None else (self.program.put(batch), self.batches.get_state())

    def run(self, stop: StopRequest) -> Result:
        config = self.config
        if self.next is None and self.step < config.steps:
            self.next = self.fetch()
        self.meter.restart()
        saved = None
        while self.step < config.steps and self.next is not None and stop.signal is None:
            self.profile()
            batch, self.data_state = self.next
            self.state, metrics = self.program.step(self.state, batch)
            self.step += 1
            self.pending.append((self.step, metrics))
            # The device works on the step just sent while the host prepares the next batch.
            self.next = self.fetch() if self.step < config.steps else None
            self.drain(LAG)
            if due(self.step, config.checkpoint.every):
                saved = self.step
                self.save(final=False)
            else:
                self.check_writes()
            if due(self.step, config.evaluation.every) and self.step < config.steps:
                self.evaluate(stop)
        self.drain(0)
        if self.next is None and self.step < config.steps and stop.signal is None:
            self.display.say(f"the data ended after {self.step} steps")
        if stop.signal is None and config.evaluation.every:
            self.evaluate(stop)
        if self.data_state is not None and saved != self.step:
            self.save(final=True)
        self.check_writes(wait=True, final=saved == self.step)
        if stop.signal is not None:
            self.display.say(f"stopped by signal {stop.signal} after step {self.step}; saved, `--resume auto` goes on")
        return Result(self.step, self.last, self.state, stop.signal)

    def drain(self, lag: int) -> None:
        """Read finished steps' metrics until at most ``lag`` steps are in flight."""
        while len(self.pending) > lag:
            step, metrics = self.pending.popleft()
            values = {name: value.item() for name, value in jax.device_get(metrics).items()}
            self.meter.add(values)
            if values["consecutive_skips"] >= self.config.patience:
                self.give_up(step, values)
            if due(step, self.config.logging.every) or step == self.config.steps:
                record = self.meter.record()
                self.last |= record
                if jax.process_index() == 0:
                    self.log.write(step, record)
                self.display.update(step, record)

    def give_up(self, step: int, values: dict[str, float]) -> None:
        first = step - int(values["consecutive_skips"]) + 1
        bad = ", ".join(
            f"{name}={values[name]}" for name in ("objective", "gradient_norm") if not math.isfinite(values[name])
        )
        self.check_writes(wait=True)
        latest = self.checkpoints.latest()
        where = f"step {latest} in {self.checkpoints.folder}" if latest is not None else "none"
        raise TrainingStopped(
            f"not finite from step {first} to step {step} ({bad}): every one of these updates was left out and "
            f"patience={self.config.patience} is used up. Last good checkpoint: {where}. "
            "Try a lower optimizer.learning_rate, a longer schedule.warmup, or optimizer.clip_norm"
        )

    def save(self, *, final: bool) -> None:
        with self.meter.paused():
            self.check_writes(wait=True)
            try:
                self.checkpoints.save(self.step, self.state, self.data_state)
                if final:
                    self.checkpoints.wait()
            except CheckpointError as error:
                self.failed(error, final)

    def check_writes(self, *, wait: bool = False, final: bool = False) -> None:
        """Report a background write that failed."""
        try:
            self.checkpoints.wait() if wait else self.checkpoints.poll()
        except CheckpointError as error:
            self.failed(error, final)

    def failed(self, error: CheckpointError, final: bool) -> None:
        self.display.say(f"WARNING: {error}")
        if final or self.config.checkpoint.on_failure == "stop":
            raise error

    def evaluate(self, stop: StopRequest) -> None:
        """Loss over held-out batches, as a record of its own."""
        trainer = self.trainer
        if trainer._validation is None:
            return
        self.drain(0)
        with self.meter.paused():
            params = self.state.params if self.state.average is None else self.state.average
            carry = self.program.initial_carry(params)
            sums: dict[str, float] = collections.defaultdict(float)
            weight = trainer._task.weight
            limit = self.config.evaluation.batches
            results = []
            for index, batch in enumerate(trainer._validation()):
                if index == limit or stop.signal is not None:
                    break
                metrics, carry = self.program.evaluate(params, self.program.put(batch), carry)
                results.append(metrics)
            for metrics in jax.device_get(results):
                for name, value in metrics.items():
                    sums[name] += float(value) * (1.0 if name == weight else float(metrics[weight]))
            if stop.signal is not None or not sums[weight]:
                return
            record = {f"validation_{name}": value / sums[weight] for name, value in sums.items() if name != weight}
            loss = record["validation_loss"]
            text = f"validation loss {loss:.4f}"
            if trainer._bytes_per_token is not None:
                record["validation_perplexity"] = math.exp(min(loss, 700.0))
                record["validation_bits_per_byte"] = loss / math.log(2) / trainer._bytes_per_token
                text += f"  perplexity {record['validation_perplexity']:.2f}"
                text += f"  bits/byte {record['validation_bits_per_byte']:.4f}"
            self.last |= record
            if jax.process_index() == 0:
                self.log.write(self.step, record)
            self.display.say(f"step {self.step}  {text}")
            for hook in trainer._hooks:
                hook(self.step, self.program.structure.merge(params), trainer.folder)

    def profile(self) -> None:
        """Start or stop the profiler at the steps asked for."""
        span = self.trainer._profile
        if span is not None and self.step in span:
            self.drain(0)
            if self.step == span[0]:
                jax.profiler.start_trace(str(self.trainer.folder / "profile"))
            else:
                jax.profiler.stop_trace()
                self.display.say(f"profile of steps {span[0]} to {span[1]} in {self.trainer.folder / 'profile'}")
