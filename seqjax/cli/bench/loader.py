"""``seqjax bench loader``: tokens per second of the data loader against what the quickstart model consumes.

Both are measured alone and in turns. Before each sample of the loader its read-ahead buffer is emptied, so that batches built
during the model's turn do not count.
"""

import dataclasses
import pathlib
import time
from typing import Any, Literal, TypeAlias

import jax
from flax import nnx
from rich.console import Console

from seqjax import models, train
from seqjax.cli import UserError
from seqjax.cli.bench.corpus import corpus_or_default
from seqjax.cli.bench.measure import median, median_ratio
from seqjax.cli.bench.report import Common, Goal, Report, progress
from seqjax.data import LoaderConfig, make_loader

Kind: TypeAlias = Literal["packed", "stream"]


@dataclasses.dataclass(frozen=True)
class Options(Common):
    """Tokens per second of the data loader against what a model consumes."""

    preset: str = "hybrid-tiny"
    """The model; the quickstart's by default."""
    vocab_size: int = 4096
    """Its vocabulary; the quickstart's by default."""
    data: pathlib.Path | None = None
    """Corpus folder; default: the embedded corpus, prepared as bytes in a temporary folder."""
    batch_size: int = LoaderConfig.batch_size
    """Rows of a batch; the trainer's default."""
    window: int = LoaderConfig.window
    """Tokens per row; the trainer's default."""
    batches: int = 300
    """Batches per sample of the loader."""
    steps: int = 4
    """Steps per sample of the model."""
    repeats: int = 5
    """Samples; medians are shown."""

    def __post_init__(self) -> None:
        for name in ("batches", "steps", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: expected at least 1")


def compiled_model(options: Options, config: train.TrainConfig) -> tuple[train.Program, dict[str, Any]]:
    """The trainer's program for the model, and its initial state beside a batch of the loader on the device."""
    first = next(make_loader(config.data))
    spec = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in first.items()}
    program = train.Program(config, lambda: models.LanguageModel(config.model, rngs=nnx.Rngs(0)), config.task, spec)
    return program, {"state": program.init(), "batch": program.put(first)}


def run(options: Options, console: Console) -> Report:
    """Measure packed windows and contiguous streams.

    Raises:
        UserError: no such preset.
        ValueError: the corpus cannot be read with these sizes.
    """
    if options.preset not in models.PRESETS:
        raise UserError(f"--preset: no preset {options.preset!r}; there are: {', '.join(models.PRESETS)}")
    tokens = options.batch_size * options.window
    kinds: tuple[Kind, ...] = ("packed", "stream")
    with corpus_or_default(options.data, console) as path, progress(console) as bar:
        task = bar.add_task("loader", total=options.repeats)
        sources = {
            kind: LoaderConfig(str(path), kind=kind, batch_size=options.batch_size, window=options.window)
            for kind in kinds
        }
        model = models.preset(options.preset, vocab_size=options.vocab_size)
        program, current = compiled_model(options, train.TrainConfig(model, data=sources["packed"]))
        loaders = {kind: make_loader(source) for kind, source in sources.items()}
        buffered = 2 * sources["packed"].read_ahead

        def model_rate() -> float:
            start = time.perf_counter()
            for _ in range(options.steps):
                current["state"], metrics = program.step(current["state"], current["batch"])
            jax.block_until_ready(metrics)
            return options.steps * tokens / (time.perf_counter() - start)

        def loader_rate(kind: Kind) -> float:
            for _ in range(buffered):
                next(loaders[kind])
            start = time.perf_counter()
            for _ in range(options.batches):
                next(loaders[kind])
            return options.batches * tokens / (time.perf_counter() - start)

        model_rate()
        rates: dict[str, list[float]] = {"model": [], **{kind: [] for kind in kinds}}
        for _ in range(options.repeats):
            rates["model"].append(model_rate())
            for kind in kinds:
                rates[kind].append(loader_rate(kind))
            bar.advance(task)
    rows, goals = [], []
    for kind in kinds:
        ratio = median_ratio(rates[kind], rates["model"])
        rows.append(
            {
                "loader": kind,
                "loader tokens/s": median(rates[kind]),
                "model": options.preset,
                "model tokens/s": median(rates["model"]),
                "ratio": ratio,
            }
        )
        goals.append(Goal(f"{kind}: loader tokens/s over the model's", ratio, 20.0, at_least=True))
    title = f"loader: batch {options.batch_size} x {options.window} tokens, one process"
    return Report("loader", title, rows, goals)
