"""``seqjax bench train``: what the trainer adds to a bare jitted step, and how compile time grows with depth.

Three loops take turns on the same model and batch size:

- bare: a hand-written `jax.jit` step (gradient of the task's loss, clipping, AdamW) with donated buffers on one batch that is
  already on the device;
- compiled: the trainer's compiled step on such a batch: the above plus the checks for non-finite values and the metrics;
- trainer: `Trainer.run` with everything it does per step: loading, transfer, metrics to file, console. Checkpoints and
  evaluation are left out; they are periodic and have their own settings.
"""

import dataclasses
import functools
import math
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console

from seqjax import models, train
from seqjax.cli import UserError
from seqjax.cli.bench.corpus import corpus_or_default
from seqjax.cli.bench.measure import median, median_ratio
from seqjax.cli.bench.report import CheckFailed, Common, Goal, Report, progress
from seqjax.data import Corpus, LoaderConfig, make_loader

# Steps at the start of a trainer's run that are not counted: the pipeline of loader and steps in flight fills.
FILLING = 3
# The first losses of the loops may differ by rounding only.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Options(Common):
    """The trainer's step against a bare jitted step, and compile time against depth, per preset."""

    presets: tuple[str, ...] = ("transformer-tiny", "mamba2-tiny", "gated-deltanet-tiny", "griffin-tiny", "hybrid-tiny")
    """Models (see `seqjax list`)."""
    data: pathlib.Path | None = None
    """Corpus folder; default: the embedded corpus, prepared as bytes in a temporary folder."""
    batch_size: int = LoaderConfig.batch_size
    """Rows of a batch; the trainer's default."""
    window: int = LoaderConfig.window
    """Tokens per row; the trainer's default."""
    steps: int = 12
    """Steps per sample."""
    repeats: int = 5
    """Samples per figure, the loops in turns; medians are shown."""
    depths: tuple[int, int] = (4, 24)
    """Layers of the shallow and the deep model whose compile times are compared."""
    compile_repeats: int = 3
    """Compilations of each depth; 0 leaves the comparison out."""

    def __post_init__(self) -> None:
        for name in ("steps", "repeats", "batch_size", "window"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")


class Clocked:
    """A loader that notes when each batch is asked for: once per step, right after the step was sent to the device."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.times: list[float] = []

    def __iter__(self) -> "Clocked":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self.batches)
        self.times.append(time.perf_counter())
        return batch

    def get_state(self) -> Any:
        """As the loader."""
        return self.batches.get_state()

    def set_state(self, state: Any) -> None:
        """As the loader."""
        self.batches.set_state(state)


def build(config: train.TrainConfig) -> models.LanguageModel:
    """The model of a run."""
    return models.LanguageModel(config.model, rngs=nnx.Rngs(config.seed))


def bare_step(config: train.TrainConfig, batch: dict[str, jax.Array]) -> Callable[[], jax.Array]:
    """A step as one writes it by hand; each call advances its own parameters and returns the loss."""
    graphdef, params = nnx.split(build(config), nnx.Param)
    settings = config.optimizer
    schedule = optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, 100, 10_000)
    optimizer = optax.chain(
        optax.clip_by_global_norm(math.inf if settings.clip_norm is None else settings.clip_norm),
        optax.adamw(
            schedule,
            settings.beta1,
            settings.beta2,
            settings.epsilon,
            weight_decay=settings.weight_decay,
            mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim >= 2, tree),
        ),
    )

    def loss(params: Any, batch: Any) -> jax.Array:
        return config.task.loss(nnx.merge(graphdef, params), batch, jax.random.key(0), None)[0]

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    jitted = jax.jit(step, donate_argnums=(0, 1))
    current = {"params": params, "state": optimizer.init(params)}

    def advance() -> jax.Array:
        current["params"], current["state"], value = jitted(current["params"], current["state"], batch)
        return value

    return advance


def compiled_step(program: train.Program, batch: dict[str, jax.Array]) -> Callable[[], jax.Array]:
    """The trainer's compiled step; each call advances its own state and returns the loss."""
    current = {"state": program.init()}

    def advance() -> jax.Array:
        current["state"], metrics = program.step(current["state"], batch)
        return metrics["loss"]

    return advance


def seconds_per_step(advance: Callable[[], jax.Array], steps: int) -> float:
    """Mean over a block of steps that are sent without waiting in between."""
    jax.block_until_ready(advance())
    start = time.perf_counter()
    for _ in range(steps):
        value = advance()
    jax.block_until_ready(value)
    return (time.perf_counter() - start) / steps


def trainer_seconds_per_step(config: train.TrainConfig, program: train.Program, steps: int) -> float:
    """Mean time between the steps of a `Trainer.run` in a fresh folder; the program is shared so that nothing compiles."""
    config = dataclasses.replace(config, steps=steps + FILLING + 2)
    batches = Clocked(make_loader(config.data))
    with tempfile.TemporaryDirectory(prefix="seqjax-bench-") as folder:
        trainer = train.Trainer(config, folder, batches=batches, quiet=True)
        trainer.program = program
        trainer.run()
    # The first batch is asked for by the constructor.
    counted = batches.times[FILLING + 1 :]
    return (counted[-1] - counted[0]) / (len(counted) - 1)


def step_times(config: train.TrainConfig, options: Options) -> tuple[int, dict[str, list[float]]]:
    """(parameters, seconds per step of each loop).

    Raises:
        CheckFailed: the loops do not train the same model.
    """
    source = make_loader(config.data)
    first = next(source)
    spec = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in first.items()}
    program = train.Program(config, functools.partial(build, config), config.task, spec)
    batch = program.put(first)
    loops = {"bare": bare_step(config, batch), "compiled": compiled_step(program, batch)}
    losses = {name: float(jnp.asarray(advance())) for name, advance in loops.items()}
    if not abs(losses["bare"] - losses["compiled"]) <= TOLERANCE * abs(losses["bare"]):
        raise CheckFailed(f"the first loss of the bare step is {losses['bare']}, of the trainer's {losses['compiled']}")
    times: dict[str, list[float]] = {"bare": [], "compiled": [], "trainer": []}
    for _ in range(options.repeats):
        for name, advance in loops.items():
            times[name].append(seconds_per_step(advance, options.steps))
        times["trainer"].append(trainer_seconds_per_step(config, program, options.steps))
    return models.parameter_count(config.model), times


def compile_times(config: train.TrainConfig, options: Options) -> dict[int, list[float]]:
    """Seconds to lower and compile the train step at each depth, every time from scratch, depths in turns."""
    first = next(make_loader(config.data))
    spec = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in first.items()}
    times: dict[int, list[float]] = {depth: [] for depth in options.depths}
    cached = bool(jax.config.values["jax_enable_compilation_cache"])
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        for _ in range(options.compile_repeats):
            for depth in options.depths:
                deep = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=depth))
                program = train.Program(deep, functools.partial(build, deep), deep.task, spec)
                # What an earlier compilation left traced would make this one look faster.
                jax.clear_caches()
                program.compile()
                times[depth].append(program.compile_seconds)
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    return times


def measure(name: str, path: pathlib.Path, options: Options) -> tuple[dict[str, Any], list[Goal]]:
    """Row and goals of one preset.

    Raises:
        CheckFailed: the loops do not train the same model.
    """
    vocabulary = max(models.PRESETS[name].vocab_size, Corpus.open(path).vocab_size)
    config = train.TrainConfig(
        models.preset(name, vocab_size=vocabulary),
        data=LoaderConfig(str(path), batch_size=options.batch_size, window=options.window),
        checkpoint=train.CheckpointConfig(every=0),
        evaluation=train.EvaluationConfig(every=0),
    )
    row: dict[str, Any] = {"preset": name}
    goals = []
    if options.compile_repeats:
        shallow, deep = options.depths
        compiling = compile_times(config, options)
        ratio = median_ratio(compiling[deep], compiling[shallow])
        row |= {f"compile {depth} layers s": median(compiling[depth]) for depth in options.depths}
        row["compile ratio"] = ratio
        goals.append(Goal(f"{name}: compile time of {deep} layers / of {shallow}", ratio, 1.5))
    parameters, times = step_times(config, options)
    row["parameters"] = parameters
    row |= {f"{loop} ms": 1e3 * median(samples) for loop, samples in times.items()}
    row["compiled / bare"] = median_ratio(times["compiled"], times["bare"])
    row["trainer / bare"] = median_ratio(times["trainer"], times["bare"])
    row["tokens/s"] = options.batch_size * options.window / median(times["trainer"])
    goals.insert(0, Goal(f"{name}: trainer's step / bare jitted step", row["trainer / bare"], 1.03))
    return row, goals


def run(options: Options, console: Console) -> Report:
    """Measure each preset.

    Raises:
        UserError: no such preset.
        CheckFailed: the loops do not train the same model.
        ValueError: the corpus cannot be read with these sizes.
    """
    unknown = [name for name in options.presets if name not in models.PRESETS]
    if unknown:
        raise UserError(f"--presets: no preset {unknown[0]!r}; there are: {', '.join(models.PRESETS)}")
    rows, goals = [], []
    with corpus_or_default(options.data, console) as path, progress(console) as bar:
        task = bar.add_task("train", total=len(options.presets))
        for name in options.presets:
            bar.update(task, description=name)
            row, more = measure(name, path, options)
            rows.append(row)
            goals += more
            bar.advance(task)
    title = f"train: batch {options.batch_size} x {options.window} tokens, {jax.device_count()} x {jax.devices()[0].device_kind}"
    notes = [
        "bare: a hand-written jitted step on one batch on the device; compiled: the trainer's step on such a batch; trainer: "
        "Trainer.run with loading, transfer and metrics, without checkpoints and evaluation. The loops take turns.",
        "compile: lowering and compilation of the trainer's step from scratch, without the compilation cache.",
    ]
    return Report("train", title, rows, goals, notes)
