"""Optimiser and learning-rate schedule from optax, assembled from a configuration."""

import dataclasses
from typing import Any, Literal

import optax
import optax.contrib

from seqjax.train.parameters import Structure

THINNEST_MATRIX = 8  # below this an axis is a filter length or a handful of groups, not a feature space


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """What turns gradients into updates.

    Weight decay applies to matrices, embeddings included, and not to vectors (norm scales, biases, gates); a parameter
    can say otherwise with the metadata ``decay=False``. Muon (Jordan 2024; arXiv:2502.16982) orthogonalises the momentum
    of hidden matrices and scales it by 0.2 sqrt(max(fan_in, fan_out)), so that its steps have the size of AdamW's: the
    same learning rate serves the embeddings, unembeddings and vectors, which AdamW updates.
    """

    name: Literal["adamw", "lion", "muon"] = "adamw"
    learning_rate: float = 3e-4  # peak
    weight_decay: float = 0.1  # multiplied by the learning rate
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    momentum: float = 0.95  # Muon's
    clip_norm: float | None = 1.0  # global gradient norm above which gradients are scaled down; None for no clipping
    ema_decay: float | None = None  # of an exponential moving average of the parameters; None for none


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over steps, as a factor of the peak: warm-up, then the kind."""

    kind: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup: int | float = 0.02  # steps if an integer, else a fraction of all steps
    decay: float = 0.2  # "wsd": fraction of all steps for the final linear decay
    final: float = 0.1  # factor of the peak at the end ("constant" ignores it)


def make_schedule(config: ScheduleConfig, peak: float, steps: int) -> optax.Schedule:
    """Learning rate as a function of the update count.

    Raises:
        ValueError: if the phases do not fit into ``steps``.
    """
    warmup = config.warmup if isinstance(config.warmup, int) else round(config.warmup * steps)
    if not 0 <= warmup < max(steps, 1):
        raise ValueError(f"schedule.warmup is {warmup} steps, expected 0 <= warmup < steps={steps}")
    rest = steps - warmup
    if config.kind == "cosine":
        main = optax.cosine_decay_schedule(peak, rest, config.final)
    elif config.kind == "linear":
        main = optax.linear_schedule(peak, peak * config.final, rest)
    elif config.kind == "wsd":
        decay = round(config.decay * steps)
        if not 0 < decay <= rest:
            raise ValueError(f"schedule.decay is {decay} steps, expected 0 < decay <= steps - warmup = {rest}")
        main = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, peak * config.final, decay)], [rest - decay]
        )
    elif config.kind == "constant":
        main = optax.constant_schedule(peak)
    else:
        raise ValueError(f"schedule.kind is {config.kind!r}, expected cosine, wsd, linear or constant")
    if warmup == 0:
        return main
    # The first update already moves: the ramp ends, not starts, at a multiple of peak / warmup.
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, main], [warmup])


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, structure: Structure
) -> optax.GradientTransformation:
    """The optax transformation for flat parameter dictionaries.

    Raises:
        ValueError: for an unknown name.
    """
    if config.name == "adamw":
        main = optax.adamw(
            schedule, config.beta1, config.beta2, config.epsilon, weight_decay=config.weight_decay, mask=structure.decay
        )
    elif config.name == "lion":
        main = optax.lion(schedule, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=structure.decay)
    elif config.name == "muon":
        main = _muon(config, schedule, structure)
    else:
        raise ValueError(f"optimizer.name is {config.name!r}, expected adamw, lion or muon")
    if config.clip_norm is None:
        return main
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), main)


def muon_dimensions(structure: Structure) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
    """The axes that form the matrix Muon orthogonalises, or None where AdamW is used.

    A matrix is the last two axes of a hidden weight; axes before them (stacked layers, blocks) are separate matrices.
    Vocabulary tables, vectors, gates (``decay=False``) and thin kernels (short convolutions) are not matrices of a
    linear map between hidden states.
    """
    matrix = optax.contrib.MuonDimensionNumbers(-2, -1)
    return {
        name: matrix
        if structure.decay[name]
        and "vocab" not in structure.axes[name]
        and len(structure.axes[name]) - ("layers" in structure.axes[name]) >= 2
        and min(structure.shapes[name].shape[-2:]) >= THINNEST_MATRIX
        else None
        for name in structure.names
    }


def _muon(config: OptimizerConfig, schedule: optax.Schedule, structure: Structure) -> optax.GradientTransformation:
    # `optax.contrib.muon` runs its own AdamW half, but cannot keep weight decay off that half's vectors; so the halves
    # are separated here and optax's muon sees matrices only.
    dimensions = muon_dimensions(structure)

    def matrices(params: Any) -> Any:
        return {name: leaf if isinstance(leaf, optax.MaskedNode) else dimensions[name] for name, leaf in params.items()}

    def decay(params: Any) -> Any:
        return {
            name: leaf if isinstance(leaf, optax.MaskedNode) else structure.decay[name] for name, leaf in params.items()
        }

    halves: dict[Any, optax.GradientTransformation] = {
        "muon": optax.contrib.muon(
            schedule,
            beta=config.momentum,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=0.2,
        ),
        "adamw": optax.adamw(
            schedule, config.beta1, config.beta2, config.epsilon, weight_decay=config.weight_decay, mask=decay
        ),
    }
    return optax.partition(halves, {name: "adamw" if spec is None else "muon" for name, spec in dimensions.items()})
