"""Named language models: eight architectures at four sizes, matched in total number of parameters.

At each size the Transformer sets the number of parameters. The other architectures keep its width (and, with an MLP, its depth);
the hidden size of their MLP, or without one their number of layers, is chosen so that the totals agree within 5%.

Embeddings are multiplied by sqrt(dim) in all of them, so that the residual stream starts at the size of what the blocks add to it.
Unscaled, at N(0, 0.02), they drown in it (Griffin, arXiv 2402.19427, and Gemma scale them for the same reason; compare with
`seqjax train hybrid-tiny --model.no-embedding-scale ...`).
"""

import dataclasses
import difflib
from typing import Any

from seqjax.layers import (
    AttentionConfig,
    DeltaNetConfig,
    GatedDeltaNetConfig,
    GatedLinearAttentionConfig,
    Mamba2Config,
    MambaConfig,
    RGLRUConfig,
)
from seqjax.models.config import LanguageModelConfig, parameter_count


@dataclasses.dataclass(frozen=True)
class _Size:
    """Sizes of the Transformer that sets the number of parameters."""

    vocab_size: int
    dim: int
    num_layers: int
    mlp_dim: int
    head_dim: int
    max_length: int
    window: int


_SIZES = {
    # Byte-level; the trainer sets vocab_size to the tokenizer's.
    "tiny": _Size(320, 128, 4, 344, 32, 2048, 256),
    # 50304: the GPT-2 vocabulary of 50257, padded to a multiple of 128.
    "150m": _Size(50304, 768, 16, 2048, 64, 4096, 2048),
    "300m": _Size(50304, 1024, 20, 2736, 64, 4096, 2048),
    "1.3b": _Size(50304, 2048, 24, 5464, 128, 4096, 2048),
}


def _transformer(size):
    return LanguageModelConfig(
        vocab_size=size.vocab_size,
        dim=size.dim,
        num_layers=size.num_layers,
        pattern=(AttentionConfig(num_heads=size.dim // size.head_dim, max_length=size.max_length),),
        mlp_dim=size.mlp_dim,
        embedding_scale=True,
    )


def _match_mlp(size, pattern: tuple[Any, ...], **fields) -> LanguageModelConfig:
    """Model with the pattern and the Transformer's depth, its MLP chosen to match the Transformer in parameters."""
    reference = _transformer(size)
    bare = dataclasses.replace(reference, pattern=pattern, **fields)
    surplus = parameter_count(reference) - parameter_count(bare)
    # Hidden sizes are multiples of 8 for tiny and of 64 otherwise, for the sake of matrix units.
    unit = 8 if size.dim < 256 else 64
    change = surplus / (3 * size.dim * size.num_layers * unit)
    return dataclasses.replace(bare, mlp_dim=size.mlp_dim // unit * unit + unit * round(change))


def _match_layers(size, mixer: Any) -> LanguageModelConfig:
    """Model of mixers only, its number of layers chosen to match the Transformer in parameters."""
    reference = _transformer(size)
    one = dataclasses.replace(reference, pattern=(mixer,), mlp_dim=None, num_layers=1)
    per_layer = parameter_count(dataclasses.replace(one, num_layers=2)) - parameter_count(one)
    layers = 1 + round((parameter_count(reference) - parameter_count(one)) / per_layer)
    return dataclasses.replace(one, num_layers=layers)


def _gated_delta_net(size):
    # Near the paper's keys of 0.75 D and values of 1.5 D in all, with head sizes that fill matrix units.
    num_heads, head_dim = {128: (2, 32), 768: (8, 64), 1024: (6, 128), 2048: (6, 256)}[size.dim]
    return GatedDeltaNetConfig(num_heads=num_heads, head_dim=head_dim)


def _sliding_attention(size, **fields):
    return AttentionConfig(num_heads=size.dim // size.head_dim, window=size.window, **fields)


_ARCHITECTURES = {
    "transformer": _transformer,
    "mamba": lambda size: _match_layers(size, MambaConfig()),
    "mamba2": lambda size: _match_layers(size, Mamba2Config(head_dim=min(64, size.dim // 4))),
    "gla": lambda size: _match_mlp(size, (GatedLinearAttentionConfig(num_heads=4),)),
    "deltanet": lambda size: _match_mlp(size, (DeltaNetConfig(num_heads=max(size.dim // 128, 2)),)),
    "gated-deltanet": lambda size: _match_mlp(size, (_gated_delta_net(size),)),
    # Two recurrent blocks, then local multi-query attention.
    "griffin": lambda size: _match_mlp(
        size,
        (RGLRUConfig(num_heads=8), RGLRUConfig(num_heads=8), _sliding_attention(size, num_kv_heads=1)),
        mlp="geglu",
        logit_softcap=30.0,
    ),
    "hybrid": lambda size: _match_mlp(size, (_gated_delta_net(size),) * 3 + (_sliding_attention(size),)),
}

PRESETS: dict[str, LanguageModelConfig] = {
    f"{architecture}-{name}": build(size)
    for architecture, build in _ARCHITECTURES.items()
    for name, size in _SIZES.items()
}
"""Name ``"{architecture}-{size}"`` -> config."""


def preset(name: str, **overrides: Any) -> LanguageModelConfig:
    """A named config with some fields replaced.

    Raises:
        ValueError: there is no such preset or field; the message names the nearest valid one.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(PRESETS)}"
        raise ValueError(f"preset: there is no preset {name!r}{hint}")
    fields = [field.name for field in dataclasses.fields(LanguageModelConfig)]
    for field in overrides:
        if field not in fields:
            close = difflib.get_close_matches(field, fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(fields)}"
            raise ValueError(f"preset: there is no field {field!r}{hint}")
    return dataclasses.replace(PRESETS[name], **overrides)
