"""Gated linear attention: a matrix memory that forgets each key channel at its own rate (arXiv 2312.06635)."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from seqjax import ops
from seqjax.layers.flops import linear_attention_flops
from seqjax.layers.linear import Linear
from seqjax.layers.mixer import mask_padding
from seqjax.layers.norm import RMSNorm


@dataclasses.dataclass(frozen=True)
class GatedLinearAttentionConfig:
    """Hyperparameters of :class:`GatedLinearAttention`; the defaults are the paper's."""

    num_heads: int = 4
    """Heads H."""
    expand_key: float = 0.5
    """Size of all queries (keys) together relative to the model width."""
    expand_value: float = 1.0
    """Size of all values together relative to the model width."""
    gate_rank: int = 16
    """Rank of the map from x to the forget gates."""
    gate_temperature: float = 16.0
    """The log of the forget gates is divided by this: slow forgetting at the start."""
    norm_epsilon: float = 1e-5
    """Of the output norm."""
    chunk_size: int | None = None
    """Tokens per chunk; None lets the op choose."""

    def features(self, dim: int) -> tuple[int, int]:
        """Sizes of all keys and of all values together in a model of width ``dim``."""
        return int(dim * self.expand_key), int(dim * self.expand_value)

    def parameter_count(self, dim: int) -> int:
        """Number of parameters of the mixer at width ``dim``."""
        key, value = self.features(dim)
        forget = self.gate_rank * (dim + key) + key
        return dim * (2 * key + 3 * value) + forget + value // self.num_heads

    def mixing_flops(self, dim: int, time: int) -> float:
        """Operations of the recurrence (`seqjax.layers.flops`)."""
        key, value = self.features(dim)
        return linear_attention_flops(self.num_heads, key / self.num_heads, value / self.num_heads)


class GatedLinearAttentionState(NamedTuple):
    """State of :class:`GatedLinearAttention`."""

    memory: Float[Array, "B H K V"]
    """The memory S, read as S^T q; float32."""


class GatedLinearAttention(nnx.Module):
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t / sqrt(K).

    log a = log sigmoid(x W_1 W_2 + b) / 16 per key channel; y = (RMSNorm(o) * SiLU(x W_g)) W_o with the norm per head.

    Args:
        dim: model width D.
        config: hyperparameters.
        rngs: source of the initial values.
        dtype: type of the projections; gates, norms and the memory are float32.
        param_dtype: storage type.

    Raises:
        ValueError: the heads do not divide the key or value features.
    """

    def __init__(
        self,
        dim: int,
        config: GatedLinearAttentionConfig = GatedLinearAttentionConfig(),
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        key_features, value_features = config.features(dim)
        if key_features % config.num_heads or value_features % config.num_heads:
            raise ValueError(
                f"GatedLinearAttention: `num_heads`={config.num_heads} does not divide {key_features} key and "
                f"{value_features} value features"
            )
        self.config = config
        types: dict[str, Any] = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.query = Linear(dim, key_features, axes=("embed", "heads"), **types)
        self.key = Linear(dim, key_features, axes=("embed", "heads"), **types)
        self.value = Linear(dim, value_features, axes=("embed", "heads"), **types)
        self.gate = Linear(dim, value_features, axes=("embed", "heads"), **types)
        self.forget_down = Linear(dim, config.gate_rank, axes=("embed", None), **types)
        self.forget_up = Linear(config.gate_rank, key_features, axes=(None, "heads"), bias=True, **types)
        self.output = Linear(value_features, dim, axes=("heads", "embed"), **types)
        self.head_sizes = (key_features // config.num_heads, value_features // config.num_heads)
        self.norm = RMSNorm(
            self.head_sizes[1], axis="head_dim", epsilon=config.norm_epsilon, dtype=dtype, param_dtype=param_dtype
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: GatedLinearAttentionState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], GatedLinearAttentionState]:
        """Mix along time; see :mod:`seqjax.layers.mixer`."""
        heads = (*x.shape[:2], self.config.num_heads, -1)
        x = mask_padding(x, segment_ids)
        forget = self.forget_up(self.forget_down(x), output_dtype=jnp.float32)
        read, memory = ops.linear_attention(
            self.query(x).reshape(heads),
            self.key(x).reshape(heads),
            self.value(x).reshape(heads),
            jax.nn.log_sigmoid(forget).reshape(heads) / self.config.gate_temperature,
            initial_state=None if state is None else state.memory,
            segment_ids=segment_ids,
            chunk_size=self.config.chunk_size,
        )
        y = self.norm(read, self.gate(x).reshape(heads))
        return self.output(y.reshape(*x.shape[:2], -1)), GatedLinearAttentionState(memory)

    def initial_state(self, batch_size: int) -> GatedLinearAttentionState:
        """Zeros: an empty memory."""
        return GatedLinearAttentionState(jnp.zeros((batch_size, self.config.num_heads, *self.head_sizes), jnp.float32))
