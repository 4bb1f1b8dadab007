"""Mamba-2: a matrix state per head with one scalar decay, the state-space dual of linear attention (arXiv 2405.21060)."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from seqjax import ops
from seqjax.layers.convolution import ShortConvolution
from seqjax.layers.flops import linear_attention_flops
from seqjax.layers.gates import log_uniform_rate, softplus_step_bias
from seqjax.layers.linear import Linear, parameter
from seqjax.layers.mixer import mask_padding
from seqjax.layers.norm import RMSNorm


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    """Hyperparameters of :class:`Mamba2`; the defaults are the paper's."""

    expand: float = 2.0
    """Inner width relative to the model width."""
    head_dim: int = 64
    """Inner channels per head P."""
    state_size: int = 128
    """State elements per inner channel N."""
    num_groups: int = 1
    """Groups of heads that share B and C."""
    conv_width: int = 4
    """Taps of the short convolution."""
    rate_minimum: float = 1.0
    """Smallest initial decay rate -A."""
    rate_maximum: float = 16.0
    """Largest initial decay rate -A."""
    step_minimum: float = 1e-3
    """Smallest initial step size."""
    step_maximum: float = 0.1
    """Largest initial step size."""
    norm_epsilon: float = 1e-5
    """Of the output norm."""
    chunk_size: int | None = None
    """Tokens per chunk; None lets the op choose."""

    def inner_dim(self, dim: int) -> int:
        """Number of inner channels in a model of width ``dim``."""
        return int(dim * self.expand)

    def parameter_count(self, dim: int) -> int:
        """Number of parameters of the mixer at width ``dim``."""
        inner, select = self.inner_dim(dim), 2 * self.num_groups * self.state_size
        heads = inner // self.head_dim
        return dim * (3 * inner + select + heads) + (inner + select) * (self.conv_width + 1) + 3 * heads + inner

    def mixing_flops(self, dim: int, time: int) -> float:
        """Operations of the recurrence (`seqjax.layers.flops`)."""
        return linear_attention_flops(self.inner_dim(dim) // self.head_dim, self.state_size, self.head_dim)


class Mamba2State(NamedTuple):
    """State of :class:`Mamba2`, all float32."""

    conv: Float[Array, "B W-1 E"]
    """Last inputs of the convolution of x."""
    select_conv: Float[Array, "B W-1 2GN"]
    """Last inputs of the convolution of B and C."""
    memory: Float[Array, "B H N P"]
    """The state, read as S^T C."""


class Mamba2(nnx.Module):
    """S_t = exp(D_t a) S_{t-1} + B_t (D_t x_t)^T,  y_t = S_t^T C_t + D x_t,  out = RMSNorm(y * SiLU(z)) W_out.

    x, z = u W_x, u W_z with E = 2 D channels each, H = E / P heads; B, C = u W_BC of size N per group; x, B, C go through a
    depthwise convolution and SiLU; step D_t = softplus(u W_dt + dt_bias) and rate a = -exp(A_log) are scalars per head. With
    several groups the norm is taken within each group.

    Args:
        dim: model width D.
        config: hyperparameters.
        rngs: source of the initial values.
        dtype: type of the projections; step sizes, decays, norm and state are float32.
        param_dtype: storage type (``A_log``, ``dt_bias`` and ``D`` are always float32).

    Raises:
        ValueError: the head size does not divide the inner width, or the groups do not divide the heads.
    """

    def __init__(
        self,
        dim: int,
        config: Mamba2Config = Mamba2Config(),
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        inner = config.inner_dim(dim)
        if inner % config.head_dim:
            raise ValueError(
                f"Mamba2: `head_dim`={config.head_dim} does not divide the {inner} inner channels of dim={dim}"
            )
        heads, select = inner // config.head_dim, 2 * config.num_groups * config.state_size
        if heads % config.num_groups:
            raise ValueError(f"Mamba2: `num_groups`={config.num_groups} does not divide the {heads} heads of dim={dim}")
        self.config = config
        types: dict[str, Any] = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        # One matrix and one convolution per part instead of one that is cut afterwards: heads shard, B and C are replicated.
        self.input = Linear(dim, inner, axes=("embed", "heads"), **types)
        self.gate = Linear(dim, inner, axes=("embed", "heads"), **types)
        self.select = Linear(dim, select, axes=("embed", None), **types)
        self.step = Linear(dim, heads, axes=("embed", "heads"), **types)
        self.output = Linear(inner, dim, axes=("heads", "embed"), **types)
        convolution: dict[str, Any] = {"bias": True, "rngs": rngs, "param_dtype": param_dtype}
        self.conv = ShortConvolution(inner, config.conv_width, axis="heads", **convolution)
        self.select_conv = ShortConvolution(select, config.conv_width, axis=None, **convolution)
        rate = log_uniform_rate(rngs.params(), (heads,), config.rate_minimum, config.rate_maximum)
        self.A_log = parameter(rate, ("heads",), decay=False)
        bias = softplus_step_bias(rngs.params(), (heads,), config.step_minimum, config.step_maximum)
        self.dt_bias = parameter(bias, ("heads",), decay=False)
        self.D = parameter(jnp.ones(heads), ("heads",), decay=False)
        norm: dict[str, Any] = {"epsilon": config.norm_epsilon, "num_groups": config.num_groups}
        self.norm = RMSNorm(inner, axis="heads", **norm, dtype=dtype, param_dtype=param_dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: Mamba2State | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Mamba2State]:
        """Mix along time; see :mod:`seqjax.layers.mixer`."""
        config, (batch, time, _) = self.config, x.shape
        conv, select_conv, memory = (None,) * 3 if state is None else state
        x = mask_padding(x, segment_ids)
        inner, conv = self.conv(self.input(x), conv, segment_ids=segment_ids)
        select, select_conv = self.select_conv(self.select(x), select_conv, segment_ids=segment_ids)
        write, read = jnp.split(select, 2, axis=-1)
        write, read = (a.reshape(batch, time, config.num_groups, config.state_size) for a in (write, read))
        step = jax.nn.softplus(self.step(x, output_dtype=jnp.float32) + self.dt_bias[...])
        value = inner.reshape(batch, time, -1, config.head_dim).astype(jnp.float32)
        y, memory = ops.linear_attention(
            read,
            write,
            (value * step[..., None]).astype(inner.dtype),
            -jnp.exp(self.A_log[...]) * step,
            scale=1.0,
            initial_state=memory,
            segment_ids=segment_ids,
            chunk_size=config.chunk_size,
        )
        y = y.astype(jnp.float32) + self.D[...][:, None] * value
        y = self.norm(y.reshape(batch, time, -1) * jax.nn.silu(self.gate(x).astype(jnp.float32)))
        return self.output(y), Mamba2State(conv, select_conv, memory)

    def initial_state(self, batch_size: int) -> Mamba2State:
        """Zeros: an empty memory."""
        shape = (batch_size, self.D.shape[0], self.config.state_size, self.config.head_dim)
        return Mamba2State(
            self.conv.initial_state(batch_size),
            self.select_conv.initial_state(batch_size),
            jnp.zeros(shape, jnp.float32),
        )
