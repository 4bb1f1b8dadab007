"""``seqjax bench models``: the training step of whole models with and without Pallas kernels, beside flash-linear-attention and attention.

Every recurrent preset is trained at every length T, on the same number of tokens per step, in turns with its rivals: with the kernels
(``kernels="pallas"``), without (``"xla"``), flash-linear-attention's model of the same size in torch, and our Transformer of the same size
(cuDNN attention on a GPU, splash attention on a TPU). All compute in bfloat16 on float32 parameters and update them by AdamW. The forms of one
preset must agree in their first loss before any of them is timed.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from seqjax import models, train
from seqjax.cli import UserError
from seqjax.cli.bench.measure import first_line, interleaved, median, median_ratio
from seqjax.cli.bench.report import CheckFailed, Common, Goal, Report, progress
from seqjax.layers import AttentionConfig
from seqjax.train.console import peak_flops

# Relative difference of first losses: of sums in another order, and of operands in another type.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-3}
# The least ratio of tokens/s to the Transformer's by T: near parity at short lengths, an advantage at long ones.
AGAINST_ATTENTION = {2048: 0.8, 8192: 1.2, 32768: 1.2}


@dataclasses.dataclass(frozen=True)
class Options(Common):
    """Training steps of whole models with and without kernels, beside flash-linear-attention and attention."""

    presets: tuple[str, ...] = ("gated-deltanet-300m", "mamba2-300m")
    """Models (see `seqjax list`)."""
    baseline: str = "transformer-300m"
    """The model with attention."""
    lengths: tuple[int, ...] = (8192, 2048, 32768)
    """Sequence lengths T, tokens, in the order they are measured."""
    tokens: int = 32768
    """Tokens of a step; rows are tokens / T."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of matrix products."""
    remat: Literal["none", "full", "dots"] = models.LanguageModelConfig.remat
    """What our models recompute in the backward pass (`LanguageModelConfig.remat`)."""
    repeats: int = 5
    """Samples per figure, in turns; medians are shown."""
    budget_s: float = 0.0
    """Seconds after which no further comparison is begun; 0 is no limit."""

    def __post_init__(self) -> None:
        for name in (*self.presets, self.baseline):
            if name not in models.PRESETS:
                raise UserError(f"no preset {name!r}; there are: {', '.join(models.PRESETS)}")
        if not self.lengths or min(self.lengths) < 2 or len(set(self.lengths)) < len(self.lengths):
            raise UserError(f"--lengths {self.lengths}: expected distinct numbers of at least 2")
        if self.tokens < max(self.lengths):
            raise UserError(f"--tokens {self.tokens}: expected at least the longest T, {max(self.lengths)}")
        if self.repeats < 1:
            raise UserError(f"--repeats {self.repeats}: expected at least 1")


# --- Our side ---


def model_config(name: str, time: int, options: Options) -> models.LanguageModelConfig:
    """The preset, for rows of this length."""
    config = models.preset(name, dtype=options.dtype, remat=options.remat)
    pattern = tuple(
        dataclasses.replace(mixer, max_length=max(mixer.max_length, time))
        if isinstance(mixer, AttentionConfig)
        else mixer
        for mixer in config.pattern
    )
    return dataclasses.replace(config, pattern=pattern)


def build(config: models.LanguageModelConfig) -> models.LanguageModel:
    """The model with its initial parameters."""
    return models.LanguageModel(config, rngs=nnx.Rngs(0))


def program(name: str, kernels: Literal["auto", "pallas", "xla"], time: int, options: Options) -> train.Program:
    """The compiled training step of a preset."""
    config = train.TrainConfig(
        model_config(name, time, options),
        optimizer=train.OptimizerConfig(learning_rate=1e-4, weight_decay=0.1, clip_norm=None),
        schedule=train.ScheduleConfig(kind="constant", warmup=0),
        kernels=kernels,
    )
    rows = jax.ShapeDtypeStruct((options.tokens // time, time), np.int32)
    return train.Program(
        config,
        functools.partial(build, config.model),
        config.task,
        {"tokens": rows, "targets": rows},
        devices=jax.devices()[:1],
    )


def kernels_in(compiled: Any) -> int:
    """Calls of Pallas kernels in the program (attention's included)."""
    text = compiled.as_text()
    return sum(text.count(f'custom_call_target="{target}') for target in ("mosaic_gpu", "tpu_custom_call"))


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A training step that goes on from its own last state."""

    step: Callable[[], Any]
    loss: float
    """Of its first step."""
    parameters: int
    memory: float | None = None
    """Bytes on the device that the compiler reports, or None."""


def ours(made: train.Program, tokens: np.ndarray) -> Candidate:
    """Our step on tokens [B, T + 1].

    Raises:
        Exception: whatever keeps it from compiling or running, memory most of all.
    """
    batch = made.put({"tokens": tokens[:, :-1].astype(np.int32), "targets": tokens[:, 1:].astype(np.int32)})
    current = {"state": made.init()}

    def step() -> Any:
        current["state"], metrics = made.step(current["state"], batch)
        return metrics["loss"]

    memory = made.compile().memory_analysis()
    count = sum(int(np.prod(shape.shape)) for shape in made.structure.shapes.values())
    held = None if memory is None else float(memory.argument_size_in_bytes + memory.temp_size_in_bytes)
    return Candidate(step, float(step()), count, held)


# --- Measuring ---


def attempt(make: Callable[[], Candidate]) -> Candidate | str:
    """A candidate, or why there is none."""
    try:
        return make()
    except Exception as error:  # whatever stops one candidate, the others are still worth their numbers
        return first_line(error)


def compare(name: str, time: int, baseline: Candidate | str, options: Options) -> list[dict[str, Any]]:
    """Rows of a preset in all its forms at one length, and of the baseline beside them.

    Raises:
        CheckFailed: two forms of the preset have other first losses.
    """
    tokens = batch_of(name, time, options)
    candidates: dict[str, Candidate] = {}
    reasons: dict[str, str] = {}

    def add(form: str, made: Candidate | str) -> None:
        if isinstance(made, str):
            reasons[form] = made
        else:
            candidates[form] = made

    def with_kernels(kernels: Literal["pallas", "xla"]) -> Candidate:
        made = program(name, kernels, time, options)
        if kernels == "pallas" and not kernels_in(made.compile()):
            raise NotImplementedError(f"no kernel runs on {jax.devices()[0].device_kind}")
        return ours(made, tokens)

    add("pallas", attempt(lambda: with_kernels("pallas")))
    add("xla", attempt(lambda: with_kernels("xla")))
    losses = [candidates[name].loss for name in ("pallas", "xla") if name in candidates]
    if losses and not max(losses) - min(losses) <= TOLERANCE[options.dtype] * abs(losses[0]):
        raise CheckFailed(
            f"{name}, T={time}: the first losses with and without kernels are {losses[0]} and {losses[1]}"
        )
    add("fla", attempt(lambda: fla(name, time, options, tokens)))
    add("attention", baseline)

    times = interleaved({form: candidate.step for form, candidate in candidates.items()}, options.repeats)
    peak = peak_flops(jax.devices()[0].device_kind)
    rows = []
    for form in ("pallas", "xla", "fla", "attention"):
        row: dict[str, Any] = {"T": time, "model": options.baseline if form == "attention" else name, "form": form}
        if form in candidates:
            candidate, seconds = candidates[form], median(times[form])
            flops = models.flops_per_token(model_config(row["model"], time, options), time)
            rate = options.tokens // time * time / seconds
            row |= {
                "parameters": candidate.parameters,
                "ms": 1e3 * seconds,
                "tokens/s": rate,
                "MFU %": 100 * rate * flops / peak if peak else None,
                "GB": candidate.memory / 1e9 if candidate.memory else None,
                "first loss": candidate.loss,
            }
            for rival in ("xla", "fla", "attention"):
                if rival in times and rival != form and form in ("pallas", "xla"):
                    row[f"tokens/s over {rival}"] = median_ratio(times[rival], times[form])
        rows.append(row | {"not timed": reasons.get(form)})
    return rows


def batch_of(name: str, time: int, options: Options) -> np.ndarray:
    """Random tokens [B, T + 1]."""
    return np.random.default_rng(0).integers(0, models.PRESETS[name].vocab_size, (options.tokens // time, time + 1))


def transformer(time: int, options: Options) -> Candidate:
    """The step of the model with attention."""
    tokens = batch_of(options.baseline, time, options)
    return ours(program(options.baseline, "auto", time, options), tokens)


def fla(name: str, time: int, options: Options, tokens: np.ndarray) -> Candidate:
    """The peer's step.

    Raises:
        ImportError: torch, flash-linear-attention or a GPU that torch sees is missing.
        NotImplementedError: the peer has no such model.
    """
    if jax.default_backend() != "gpu":
        raise ImportError("is for GPUs")
    from seqjax.cli.bench import fla_models

    model = fla_models.build(model_config(name, time, options))
    step = fla_models.training_step(model, tokens, options.dtype)
    return Candidate(step, float(step().loss), sum(p.numel() for p in model.parameters()))


def goals_of(rows: list[dict[str, Any]]) -> list[Goal]:
    """Kernels that do not slow the model down, not slower than the peer, and ahead of attention where T is long."""
    goals = []
    for row in rows:
        place = f"{row['model']}, T={row['T']}, {row['form']}"
        if row["form"] == "pallas" and "ms" in row:
            for rival in ("xla", "fla"):
                if (ratio := row.get(f"tokens/s over {rival}")) is not None:
                    goals.append(Goal(f"{place}: tokens/s over {rival}'s", ratio, 1.0, at_least=True))
            ratio, limit = row.get("tokens/s over attention"), AGAINST_ATTENTION.get(row["T"])
            if ratio is not None and limit is not None:
                goals.append(Goal(f"{place}: tokens/s over attention's", ratio, limit, at_least=True))
    return goals


def run(options: Options, console: Console) -> Report:
    """Compare every preset at every length, until the budget ends.

    Raises:
        CheckFailed: two forms of a preset have other first losses.
    """
    start = time.monotonic()
    # Torch shares the device's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    todo = [(length, name) for length in options.lengths for name in options.presets]
    rows: list[dict[str, Any]] = []
    done, baseline, baseline_length = 0, None, 0
    with progress(console) as bar:
        task = bar.add_task("models", total=len(todo))
        for length, name in todo:
            if options.budget_s and time.monotonic() - start > options.budget_s:
                break
            bar.update(task, description=f"{name} T={length}")
            if baseline is None or baseline_length != length:
                baseline = attempt(functools.partial(transformer, length, options))
                baseline_length = length
            rows += compare(name, length, baseline, options)
            done += 1
            bar.advance(task)
    device = jax.devices()[0].device_kind
    peak = peak_flops(device)
    notes = [
        "Steps take turns in one process, each from its own last state: forward, backward, AdamW on float32 parameters, products in "
        f"{options.dtype}; remat {options.remat}. pallas, xla: our model with and without kernels; fla: flash-linear-attention's model with "
        "torch autocast, its fused loss and fused AdamW.",
        "MFU counts 6 operations per token and parameter, and products of scores and states (attention: visible keys only), "
        + (f"against {peak / 1e12:.0f} TFLOP/s (data sheet)." if peak else f"where the peak is known ({device}: not)."),
        *([f"Budget of {options.budget_s:.0f} s: {done} of {len(todo)} comparisons made."] if done < len(todo) else []),
        *dict.fromkeys(
            f"not timed: {row['model']} {row['form']}: {row['not timed']}" for row in rows if row["not timed"]
        ),
    ]
    title = f"models on {device}: training steps of {options.tokens} tokens, {options.dtype}"
    return Report("models", title, rows, goals_of(rows), notes)
