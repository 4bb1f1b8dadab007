"""Layers: parameters around one op each, as Flax NNX modules with explicit state.

`MIXERS` names every sequence mixer; :mod:`seqjax.layers.mixer` is the contract they share. Adding a mixer is one file and one
entry here, after which the laws in ``tests/laws/test_mixers.py`` test it.
"""

from typing import Any

from seqjax.layers.attention import Attention, AttentionConfig, AttentionState
from seqjax.layers.block import Block, block_parameter_count
from seqjax.layers.convolution import ShortConvolution
from seqjax.layers.delta_net import DeltaNet, DeltaNetConfig, DeltaNetState
from seqjax.layers.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig, GatedDeltaNetState
from seqjax.layers.gated_linear_attention import (
    GatedLinearAttention,
    GatedLinearAttentionConfig,
    GatedLinearAttentionState,
)
from seqjax.layers.linear import BlockDiagonalLinear, Embedding, Linear, parameter
from seqjax.layers.mamba import Mamba, MambaConfig, MambaState
from seqjax.layers.mamba2 import Mamba2, Mamba2Config, Mamba2State
from seqjax.layers.mixer import Mixer, MixerConfig
from seqjax.layers.mlp import MLP
from seqjax.layers.norm import RMSNorm, l2_normalize
from seqjax.layers.rg_lru import RGLRU, RGLRUConfig, RGLRUState

MIXERS: dict[str, tuple[Any, Any]] = {
    "attention": (Attention, AttentionConfig),
    "mamba": (Mamba, MambaConfig),
    "mamba2": (Mamba2, Mamba2Config),
    "gated_linear_attention": (GatedLinearAttention, GatedLinearAttentionConfig),
    "delta_net": (DeltaNet, DeltaNetConfig),
    "gated_delta_net": (GatedDeltaNet, GatedDeltaNetConfig),
    "rg_lru": (RGLRU, RGLRUConfig),
}
"""Name -> (mixer class, config class)."""

__all__ = [
    "MIXERS",
    "MLP",
    "RGLRU",
    "Attention",
    "AttentionConfig",
    "AttentionState",
    "Block",
    "BlockDiagonalLinear",
    "DeltaNet",
    "DeltaNetConfig",
    "DeltaNetState",
    "Embedding",
    "GatedDeltaNet",
    "GatedDeltaNetConfig",
    "GatedDeltaNetState",
    "GatedLinearAttention",
    "GatedLinearAttentionConfig",
    "GatedLinearAttentionState",
    "Linear",
    "Mamba",
    "Mamba2",
    "Mamba2Config",
    "Mamba2State",
    "MambaConfig",
    "MambaState",
    "Mixer",
    "MixerConfig",
    "RGLRUConfig",
    "RGLRUState",
    "RMSNorm",
    "ShortConvolution",
    "block_parameter_count",
    "l2_normalize",
    "parameter",
]
