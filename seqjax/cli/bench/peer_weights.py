"""Copy the weights of the transformers networks of `peer` into ours, name by name.

torch keeps a projection as [out, in]; here it is [in, out]. Layers of equal kind are stacked along a leading axis.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from seqjax.models import LanguageModel


def _transposed(weight: np.ndarray) -> np.ndarray:
    return weight.T


def _same(weight: np.ndarray) -> np.ndarray:
    return weight


def _rows(start: int, stop: int, then: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Rows start..stop of the weight, then transformed."""
    return lambda weight: then(weight[start:stop])


def _taps(weight: np.ndarray) -> np.ndarray:
    """Depthwise convolution [D, 1, W] -> [W, D]."""
    return weight[:, 0].T


Rule = tuple[str, Callable[[np.ndarray], np.ndarray]]


def attention_rules() -> dict[str, Rule]:
    """Our name inside a block -> (name inside a Qwen3 layer, transformation)."""
    linear = {
        "mixer.query": "self_attn.q_proj",
        "mixer.key": "self_attn.k_proj",
        "mixer.value": "self_attn.v_proj",
        "mixer.output": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.output": "mlp.down_proj",
    }
    norms = {
        "mixer.query_norm": "self_attn.q_norm",
        "mixer.key_norm": "self_attn.k_norm",
        "mixer_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    }
    rules: dict[str, Rule] = {f"{ours}.kernel": (f"{theirs}.weight", _transposed) for ours, theirs in linear.items()}
    rules |= {f"{ours}.weight": (f"{theirs}.weight", _same) for ours, theirs in norms.items()}
    return rules


def mamba2_rules(inner: int, select: int) -> dict[str, Rule]:
    """Our name inside a block -> (name inside a Mamba-2 layer, transformation).

    Args:
        inner: channels of x and z.
        select: channels of B and C together.
    """
    end = 2 * inner + select
    return {
        "mixer_norm.weight": ("norm.weight", _same),
        # The peer's one projection holds z, x, B and C, dt; its one convolution x, B and C.
        "mixer.gate.kernel": ("mixer.in_proj.weight", _rows(0, inner, _transposed)),
        "mixer.input.kernel": ("mixer.in_proj.weight", _rows(inner, 2 * inner, _transposed)),
        "mixer.select.kernel": ("mixer.in_proj.weight", _rows(2 * inner, end, _transposed)),
        "mixer.step.kernel": ("mixer.in_proj.weight", lambda weight: weight[end:].T),
        "mixer.conv.weight": ("mixer.conv1d.weight", _rows(0, inner, _taps)),
        "mixer.conv.bias": ("mixer.conv1d.bias", _rows(0, inner, _same)),
        "mixer.select_conv.weight": ("mixer.conv1d.weight", _rows(inner, inner + select, _taps)),
        "mixer.select_conv.bias": ("mixer.conv1d.bias", _rows(inner, inner + select, _same)),
        "mixer.A_log": ("mixer.A_log", _same),
        "mixer.dt_bias": ("mixer.dt_bias", _same),
        "mixer.D": ("mixer.D", _same),
        "mixer.norm.weight": ("mixer.norm.weight", _same),
        "mixer.output.kernel": ("mixer.out_proj.weight", _transposed),
    }


def copy_weights(peer: Any, model: LanguageModel) -> None:
    """Overwrite every parameter of the model by the peer's.

    Args:
        peer: `Mamba2ForCausalLM` or `Qwen3ForCausalLM` of transformers with tied embeddings.
        model: a model of one kind of block and the same sizes.

    Raises:
        ValueError: a parameter has no counterpart, or another shape.
    """
    weights: Mapping[str, np.ndarray] = {
        name: value.detach().cpu().numpy() for name, value in peer.state_dict().items()
    }
    config, layers = model.config, model.config.num_layers
    if peer.config.model_type == "mamba2":
        mixer = config.pattern[0]
        rules = mamba2_rules(mixer.inner_dim(config.dim), 2 * mixer.num_groups * mixer.state_size)
        body, table, norm = "backbone.layers", "backbone.embeddings.weight", "backbone.norm_f.weight"
    else:
        rules, body = attention_rules(), "model.layers"
        table, norm = "model.embed_tokens.weight", "model.norm.weight"
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = ".".join(map(str, path))
        inside = name.removeprefix("groups.blocks.0.")
        if name == "embedding.table":
            value = weights[table]
        elif name == "norm.weight":
            value = weights[norm]
        elif inside != name and inside in rules:
            source, transform = rules[inside]
            value = np.stack([transform(weights[f"{body}.{layer}.{source}"]) for layer in range(layers)])
        else:
            raise ValueError(f"copy_weights: parameter {name} has no counterpart in {type(peer).__name__}")
        if value.shape != parameter.shape:
            raise ValueError(f"copy_weights: {name} has shape {parameter.shape}, its counterpart gives {value.shape}")
        parameter[...] = value.astype(parameter.dtype)
