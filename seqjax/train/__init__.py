"""Training: configuration, sharding, the train step, checkpoints and the loop."""

from seqjax.train.checkpoint import CheckpointError, Checkpoints
from seqjax.train.config import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    TrainConfig,
    find_config,
    load_config,
    save_config,
)
from seqjax.train.optimizer import OptimizerConfig, ScheduleConfig
from seqjax.train.program import Program
from seqjax.train.runs import load_run
from seqjax.train.sharding import MeshConfig
from seqjax.train.trainer import Result, Trainer, TrainingStopped

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "Checkpoints",
    "EvaluationConfig",
    "LoggingConfig",
    "MeshConfig",
    "OptimizerConfig",
    "Program",
    "Result",
    "ScheduleConfig",
    "TrainConfig",
    "Trainer",
    "TrainingStopped",
    "find_config",
    "load_config",
    "load_run",
    "save_config",
]
