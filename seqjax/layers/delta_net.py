"""DeltaNet: a matrix memory written by the delta rule, without forgetting (arXiv 2406.06484)."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from seqjax import ops
from seqjax.layers.convolution import ShortConvolution
from seqjax.layers.flops import delta_rule_flops
from seqjax.layers.linear import Linear
from seqjax.layers.mixer import mask_padding
from seqjax.layers.norm import RMSNorm, l2_normalize


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig:
    """Hyperparameters of :class:`DeltaNet`; the defaults are the paper's."""

    num_heads: int = 4
    """Heads H."""
    expand_key: float = 1.0
    """Size of all queries (keys) together relative to the model width."""
    expand_value: float = 1.0
    """Size of all values together relative to the model width."""
    conv_width: int = 4
    """Taps of the short convolutions of query, key and value."""
    output_gate: bool = False
    """Multiply the normalised read-out by SiLU(x W_g)."""
    negative_eigenvalues: bool = False
    """Let beta reach 2 instead of 1, so that a write may flip the sign of a memory (arXiv 2411.12537)."""
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
        projections = dim * (2 * key + (3 if self.output_gate else 2) * value + self.num_heads)
        return projections + self.conv_width * (2 * key + value) + value // self.num_heads

    def mixing_flops(self, dim: int, time: int) -> float:
        """Operations of the recurrence (`seqjax.layers.flops`)."""
        key, value = self.features(dim)
        return delta_rule_flops(self.num_heads, key / self.num_heads, value / self.num_heads)


class DeltaNetState(NamedTuple):
    """State of :class:`DeltaNet`, all float32."""

    query_conv: Float[Array, "B W-1 HK"]
    """Last inputs of the query convolution."""
    key_conv: Float[Array, "B W-1 HK"]
    """Last inputs of the key convolution."""
    value_conv: Float[Array, "B W-1 HV"]
    """Last inputs of the value convolution."""
    memory: Float[Array, "B H K V"]
    """The memory S, read as S^T q."""


class DeltaNet(nnx.Module):
    """S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T,  o_t = S_t^T q_t / sqrt(K).

    q, k, v = SiLU(conv(x W)), q and k L2-normalised per head; beta = sigmoid(x W_b); y = RMSNorm(o) W_o with the norm per head.

    Args:
        dim: model width D.
        config: hyperparameters.
        rngs: source of the initial values.
        dtype: type of the projections; beta, norms and the memory are float32.
        param_dtype: storage type.

    Raises:
        ValueError: the heads do not divide the key or value features.
    """

    def __init__(
        self,
        dim: int,
        config: DeltaNetConfig = DeltaNetConfig(),
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        key_features, value_features = config.features(dim)
        if key_features % config.num_heads or value_features % config.num_heads:
            raise ValueError(
                f"DeltaNet: `num_heads`={config.num_heads} does not divide {key_features} key and {value_features} value features"
            )
        self.config = config
        types: dict[str, Any] = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.query = Linear(dim, key_features, axes=("embed", "heads"), **types)
        self.key = Linear(dim, key_features, axes=("embed", "heads"), **types)
        self.value = Linear(dim, value_features, axes=("embed", "heads"), **types)
        self.gate = Linear(dim, value_features, axes=("embed", "heads"), **types) if config.output_gate else None
        self.beta = Linear(dim, config.num_heads, axes=("embed", "heads"), **types)
        self.output = Linear(value_features, dim, axes=("heads", "embed"), **types)
        convolution: dict[str, Any] = {"axis": "heads", "rngs": rngs, "param_dtype": param_dtype}
        self.query_conv = ShortConvolution(key_features, config.conv_width, **convolution)
        self.key_conv = ShortConvolution(key_features, config.conv_width, **convolution)
        self.value_conv = ShortConvolution(value_features, config.conv_width, **convolution)
        self.head_sizes = (key_features // config.num_heads, value_features // config.num_heads)
        self.norm = RMSNorm(
            self.head_sizes[1], axis="head_dim", epsilon=config.norm_epsilon, dtype=dtype, param_dtype=param_dtype
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: DeltaNetState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], DeltaNetState]:
        """Mix along time; see :mod:`seqjax.layers.mixer`."""
        heads = (*x.shape[:2], self.config.num_heads, -1)
        query_conv, key_conv, value_conv, memory = (None,) * 4 if state is None else state
        x = mask_padding(x, segment_ids)
        query, query_conv = self.query_conv(self.query(x), query_conv, segment_ids=segment_ids)
        key, key_conv = self.key_conv(self.key(x), key_conv, segment_ids=segment_ids)
        value, value_conv = self.value_conv(self.value(x), value_conv, segment_ids=segment_ids)
        beta = jax.nn.sigmoid(self.beta(x, output_dtype=jnp.float32)) * (2 if self.config.negative_eigenvalues else 1)
        read, memory = ops.delta_rule(
            l2_normalize(query.reshape(heads)),
            l2_normalize(key.reshape(heads)),
            value.reshape(heads),
            beta,
            initial_state=memory,
            segment_ids=segment_ids,
            chunk_size=self.config.chunk_size,
        )
        y = self.norm(read, None if self.gate is None else self.gate(x).reshape(heads))
        return self.output(y.reshape(*x.shape[:2], -1)), DeltaNetState(query_conv, key_conv, value_conv, memory)

    def initial_state(self, batch_size: int) -> DeltaNetState:
        """Zeros: an empty memory."""
        return DeltaNetState(
            self.query_conv.initial_state(batch_size),
            self.key_conv.initial_state(batch_size),
            self.value_conv.initial_state(batch_size),
            jnp.zeros((batch_size, self.config.num_heads, *self.head_sizes), jnp.float32),
        )
