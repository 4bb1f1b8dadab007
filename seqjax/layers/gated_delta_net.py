"""Gated DeltaNet: a matrix memory that forgets by a scalar gate and writes by the delta rule (arXiv 2412.06464)."""

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
from seqjax.layers.gates import log_uniform_rate, softplus_step_bias
from seqjax.layers.linear import Linear, parameter
from seqjax.layers.mixer import mask_padding
from seqjax.layers.norm import RMSNorm, l2_normalize


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig:
    """Hyperparameters of :class:`GatedDeltaNet`; the defaults are the paper's."""

    num_heads: int = 6
    """Query and key heads."""
    head_dim: int = 256
    """Size of a query or key."""
    expand_value: float = 2.0
    """Size of a value relative to a key."""
    num_value_heads: int | None = None
    """Heads of values, gates and state, a multiple of ``num_heads`` (default: equal); several share one query and key."""
    conv_width: int = 4
    """Taps of the short convolutions of query, key and value."""
    negative_eigenvalues: bool = False
    """Let beta reach 2 instead of 1, so that a write may flip the sign of a memory (arXiv 2411.12537)."""
    norm_epsilon: float = 1e-5
    """Of the output norm."""
    chunk_size: int | None = None
    """Tokens per chunk; None lets the op choose."""

    @property
    def value_heads(self) -> int:
        """Number of heads of the state."""
        return self.num_value_heads or self.num_heads

    @property
    def value_dim(self) -> int:
        """Size of a value of one head."""
        return int(self.head_dim * self.expand_value)

    def parameter_count(self, dim: int) -> int:
        """Number of parameters of the mixer at width ``dim``."""
        key, value, heads = self.num_heads * self.head_dim, self.value_heads * self.value_dim, self.value_heads
        convolutions = self.conv_width * (2 * key + value)
        return dim * (2 * key + 3 * value + 2 * heads) + convolutions + 2 * heads + self.value_dim

    def mixing_flops(self, dim: int, time: int) -> float:
        """Operations of the recurrence (`seqjax.layers.flops`)."""
        return delta_rule_flops(self.value_heads, self.head_dim, self.value_dim)


class GatedDeltaNetState(NamedTuple):
    """State of :class:`GatedDeltaNet`, all float32."""

    query_conv: Float[Array, "B W-1 GK"]
    """Last inputs of the query convolution."""
    key_conv: Float[Array, "B W-1 GK"]
    """Last inputs of the key convolution."""
    value_conv: Float[Array, "B W-1 HV"]
    """Last inputs of the value convolution."""
    memory: Float[Array, "B H K V"]
    """The memory S, read as S^T q."""


class GatedDeltaNet(nnx.Module):
    """S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T,  o_t = S_t^T q_t / sqrt(K).

    q, k, v = SiLU(conv(x W)), q and k L2-normalised per head; beta = sigmoid(x W_b); log a = -exp(A_log) softplus(x W_a + dt_bias);
    y = (RMSNorm(o) * SiLU(x W_g)) W_o with the norm per head.

    Args:
        dim: model width D.
        config: hyperparameters.
        rngs: source of the initial values.
        dtype: type of the projections; gates, norms and the memory are float32.
        param_dtype: storage type.

    Raises:
        ValueError: ``num_value_heads`` is not a multiple of ``num_heads``.
    """

    def __init__(
        self,
        dim: int,
        config: GatedDeltaNetConfig = GatedDeltaNetConfig(),
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        if config.value_heads % config.num_heads:
            raise ValueError(
                f"GatedDeltaNet: `num_value_heads`={config.value_heads} is not a multiple of `num_heads`={config.num_heads}"
            )
        self.config = config
        types: dict[str, Any] = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        key_features, value_features = config.num_heads * config.head_dim, config.value_heads * config.value_dim
        self.query = Linear(dim, key_features, axes=("embed", "heads"), **types)
        self.key = Linear(dim, key_features, axes=("embed", "heads"), **types)
        self.value = Linear(dim, value_features, axes=("embed", "heads"), **types)
        self.gate = Linear(dim, value_features, axes=("embed", "heads"), **types)
        self.beta = Linear(dim, config.value_heads, axes=("embed", "heads"), **types)
        self.decay = Linear(dim, config.value_heads, axes=("embed", "heads"), **types)
        self.output = Linear(value_features, dim, axes=("heads", "embed"), **types)
        convolution: dict[str, Any] = {"axis": "heads", "rngs": rngs, "param_dtype": param_dtype}
        self.query_conv = ShortConvolution(key_features, config.conv_width, **convolution)
        self.key_conv = ShortConvolution(key_features, config.conv_width, **convolution)
        self.value_conv = ShortConvolution(value_features, config.conv_width, **convolution)
        # log U(0, 16) in the paper; the lower end is lifted because log 0 is -inf.
        rate = log_uniform_rate(rngs.params(), (config.value_heads,), 1e-4, 16.0)
        self.A_log = parameter(rate, ("heads",), decay=False)
        self.dt_bias = parameter(softplus_step_bias(rngs.params(), (config.value_heads,)), ("heads",), decay=False)
        self.norm = RMSNorm(
            config.value_dim, axis="head_dim", epsilon=config.norm_epsilon, dtype=dtype, param_dtype=param_dtype
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: GatedDeltaNetState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], GatedDeltaNetState]:
        """Mix along time; see :mod:`seqjax.layers.mixer`."""
        config, (batch, time, _) = self.config, x.shape
        query_conv, key_conv, value_conv, memory = (None,) * 4 if state is None else state
        x = mask_padding(x, segment_ids)
        query, query_conv = self.query_conv(self.query(x), query_conv, segment_ids=segment_ids)
        key, key_conv = self.key_conv(self.key(x), key_conv, segment_ids=segment_ids)
        value, value_conv = self.value_conv(self.value(x), value_conv, segment_ids=segment_ids)
        query, key = (l2_normalize(a.reshape(batch, time, config.num_heads, config.head_dim)) for a in (query, key))
        value = value.reshape(batch, time, config.value_heads, config.value_dim)
        beta = jax.nn.sigmoid(self.beta(x, output_dtype=jnp.float32)) * (2 if config.negative_eigenvalues else 1)
        step = jax.nn.softplus(self.decay(x, output_dtype=jnp.float32) + self.dt_bias[...])
        read, memory = ops.delta_rule(
            query,
            key,
            value,
            beta,
            -jnp.exp(self.A_log[...]) * step,
            initial_state=memory,
            segment_ids=segment_ids,
            chunk_size=config.chunk_size,
        )
        y = self.norm(read, self.gate(x).reshape(value.shape))
        state = GatedDeltaNetState(query_conv, key_conv, value_conv, memory)
        return self.output(y.reshape(batch, time, -1)), state

    def initial_state(self, batch_size: int) -> GatedDeltaNetState:
        """Zeros: an empty memory."""
        config = self.config
        return GatedDeltaNetState(
            self.query_conv.initial_state(batch_size),
            self.key_conv.initial_state(batch_size),
            self.value_conv.initial_state(batch_size),
            jnp.zeros((batch_size, config.value_heads, config.head_dim, config.value_dim), jnp.float32),
        )
