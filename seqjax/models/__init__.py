"""Networks and presets."""

from seqjax.models.config import LanguageModelConfig, flops_per_token, from_json, parameter_count, to_json
from seqjax.models.language_model import LanguageModel, LanguageModelState
from seqjax.models.presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "LanguageModel",
    "LanguageModelConfig",
    "LanguageModelState",
    "from_json",
    "flops_per_token",
    "parameter_count",
    "preset",
    "to_json",
]
