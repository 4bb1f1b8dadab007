"""The configuration of a training run: nested frozen dataclasses, JSON in and out."""

import dataclasses
import difflib
import importlib.util
import json
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from seqjax.data import LoaderConfig
from seqjax.models import PRESETS, LanguageModelConfig, from_json, to_json
from seqjax.tasks import NextToken
from seqjax.train.optimizer import OptimizerConfig, ScheduleConfig
from seqjax.train.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept. The last step is always saved."""

    every: int = 500  # steps between checkpoints; 0 saves only at the end and on SIGTERM
    max_to_keep: int = 3  # most recent ones
    keep_period: int | None = None  # checkpoints at multiples of this many steps are kept for ever
    on_failure: Literal["continue", "stop"] = "continue"  # when one cannot be written, e.g. because the disk is full


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Loss on held-out text during training."""

    every: int = 500  # steps between evaluations; 0 for none. The end of training is evaluated too
    split: str = "validation"
    batches: int | None = 50  # of the training batch size; None for the whole split
    samples: int = 2  # texts that `seqjax train` generates into samples/ after each evaluation


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """What is written while training."""

    every: int = 10  # steps between lines of metrics.jsonl; each holds means over these steps
    tensorboard: bool = True


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a training run."""

    model: LanguageModelConfig
    task: NextToken = NextToken()
    data: LoaderConfig = LoaderConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    steps: int = 1000
    """Optimiser steps in the whole run."""
    seed: int = 0
    """Of initial parameters and everything random in training (``data.seed`` shuffles)."""
    gradient_accumulation: int = 1
    """Microbatches per step; with the mesh's data x fsdp it must divide the batch size."""
    kernels: Literal["auto", "pallas", "xla"] = "auto"
    """Pallas kernels where they were measured to be faster, wherever there is one, or nowhere (``seqjax.ops.prefer``)."""
    patience: int = 10
    """Consecutive steps with a non-finite loss or gradient before training stops."""


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """JSON-serialisable form of a configuration."""
    result = {
        field.name: dataclasses.asdict(value)
        if dataclasses.is_dataclass(value := getattr(config, field.name))
        else value
        for field in dataclasses.fields(config)
    }
    return result | {"model": to_json(config.model)}


def from_dict(data: Mapping[str, Any]) -> TrainConfig:
    """Inverse of :func:`to_dict`; missing fields take their defaults.

    Raises:
        ValueError: for an unknown field, naming the nearest valid one, or a value of the wrong type.
    """
    if "model" not in data:
        raise ValueError("the config has no `model`; it is the one field without a default")
    rest = {name: value for name, value in data.items() if name != "model"}
    return _build(TrainConfig, rest, "", {"model": from_json(data["model"])})


def _build(cls: Any, data: Mapping[str, Any], prefix: str, given: Mapping[str, Any] | None = None) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = dict(given or {})
    for name, value in data.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"did you mean `{prefix}{near[0]}`?" if near else f"its fields are {', '.join(fields)}"
            raise ValueError(f"unknown field `{prefix}{name}` in the config; {hint}")
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                raise ValueError(f"config field `{prefix}{name}` is {value!r}, expected an object")
            values[name] = _build(kind, value, f"{prefix}{name}.")
        else:
            values[name] = _checked(value, kind, prefix + name)
    return cls(**values)


def _checked(value: Any, kind: Any, name: str) -> Any:
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    for option in options:
        if typing.get_origin(option) is Literal:
            if value in typing.get_args(option):
                return value
        elif option is float and isinstance(value, int) and not isinstance(value, bool) and int not in options:
            return float(value)
        elif isinstance(option, type) and isinstance(value, option) and (option is bool) == isinstance(value, bool):
            return value
    expected = getattr(kind, "__name__", str(kind)) if not typing.get_args(kind) else str(kind).replace("typing.", "")
    raise ValueError(f"config field `{name}` is {value!r}, expected {expected}")


def save_config(config: TrainConfig, path: Path) -> None:
    """Write a config as JSON, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(to_dict(config), indent=2) + "\n")
    temporary.replace(path)


def load_config(path: str | Path) -> TrainConfig:
    """Read a config from JSON, or from a run folder's config.json.

    Raises:
        ValueError: if it is not JSON or not a valid config; the message names the file.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        return from_dict(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def find_config(name: str) -> TrainConfig:
    """The config that a command line means: a preset's name, a config.json, a run folder or an experiment.py.

    An experiment offers ``CONFIGS`` (dict of name -> TrainConfig) or ``config()``; ``path/experiment.py:small`` picks an
    entry of the first, which may be left out if there is only one.

    Raises:
        ValueError: if there is no such thing, with the nearest preset.
    """
    if name in PRESETS:
        return TrainConfig(PRESETS[name])
    file, _, entry = name.partition(":")
    path = Path(file)
    if path.suffix == ".py" and path.is_file():
        return _from_experiment(path, entry)
    if path.suffix == ".json" and path.is_file() or (path / "config.json").is_file():
        return load_config(path)
    near = difflib.get_close_matches(name, PRESETS, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"{name!r} is neither a preset, nor a config.json, a run folder or an experiment.py that exists{hint} "
        f"Presets: {', '.join(PRESETS)}"
    )


def _from_experiment(path: Path, entry: str) -> TrainConfig:
    module_name = f"seqjax_experiment_{path.parent.name or path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    if hasattr(module, "CONFIGS"):
        names = list(module.CONFIGS)
        if not entry and len(names) == 1:
            entry = names[0]
        if entry not in names:
            raise ValueError(f"{path} has the configs {', '.join(names)}; write one of them as {path}:{names[0]}")
        return module.CONFIGS[entry]
    if hasattr(module, "config"):
        return module.config()
    raise ValueError(f"{path} defines neither CONFIGS (a dict of TrainConfig) nor config()")
