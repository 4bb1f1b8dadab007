"""Mamba-1: a selective diagonal state-space model per channel (arXiv 2312.00752)."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from seqjax import ops
from seqjax.layers.convolution import ShortConvolution
from seqjax.layers.gates import softplus_step_bias
from seqjax.layers.linear import Linear, parameter
from seqjax.layers.mixer import mask_padding


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """Hyperparameters of :class:`Mamba`; the defaults are the paper's."""

    expand: float = 2.0
    """Inner width relative to the model width."""
    state_size: int = 16
    """State elements per inner channel N."""
    conv_width: int = 4
    """Taps of the short convolution."""
    step_rank: int | None = None
    """Rank R of the map to the step sizes (default: dim / 16, rounded up)."""
    step_minimum: float = 1e-3
    """Smallest initial step size."""
    step_maximum: float = 0.1
    """Largest initial step size."""
    chunk_size: int | None = None
    """Tokens per chunk; None lets the op choose."""

    def inner_dim(self, dim: int) -> int:
        """Number of inner channels in a model of width ``dim``."""
        return int(dim * self.expand)

    def rank(self, dim: int) -> int:
        """Rank of the map to the step sizes in a model of width ``dim``."""
        return self.step_rank or -(-dim // 16)

    def parameter_count(self, dim: int) -> int:
        """Number of parameters of the mixer at width ``dim``."""
        inner, rank = self.inner_dim(dim), self.rank(dim)
        convolution = inner * (self.conv_width + 1)
        selection = inner * (rank + 2 * self.state_size) + rank * inner + inner
        return 3 * dim * inner + convolution + selection + inner * self.state_size + inner

    def mixing_flops(self, dim: int, time: int) -> float:
        """None: the states are updated and read element by element."""
        return 0.0


class MambaState(NamedTuple):
    """State of :class:`Mamba`, all float32."""

    conv: Float[Array, "B W-1 E"]
    """Last inputs of the convolution."""
    hidden: Float[Array, "B E N"]
    """State of the recurrence."""


class Mamba(nnx.Module):
    """h_t = exp(D_t A) h_{t-1} + (D_t x_t) B_t,  y_t = h_t C_t + D x_t,  out = (y * SiLU(z)) W_out.

    x, z = u W_x, u W_z with E = 2 D channels each; x = SiLU(conv(x)); step D_t = softplus(x W_r W_d + dt_bias) per channel;
    B_t, C_t = x W_B, x W_C of size N, shared by the channels; A = -exp(A_log), initially -1 .. -N in every channel.

    Args:
        dim: model width D.
        config: hyperparameters.
        rngs: source of the initial values.
        dtype: type of the projections; step sizes, decays and the state are float32.
        param_dtype: storage type (``A_log``, ``dt_bias`` and ``D`` are always float32).
    """

    def __init__(
        self,
        dim: int,
        config: MambaConfig = MambaConfig(),
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.config = config
        inner, rank, size = config.inner_dim(dim), config.rank(dim), config.state_size
        types: dict[str, Any] = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        # Input and gate are two matrices, as are step and B, C: a matrix that is cut after the product does not shard.
        self.input = Linear(dim, inner, axes=("embed", "mlp"), **types)
        self.gate = Linear(dim, inner, axes=("embed", "mlp"), **types)
        self.conv = ShortConvolution(
            inner, config.conv_width, axis="mlp", bias=True, rngs=rngs, param_dtype=param_dtype
        )
        self.step_down = Linear(inner, rank, axes=("mlp", None), **types)
        self.step_up = Linear(rank, inner, axes=(None, "mlp"), initializer=_uniform_rank, **types)
        self.select = Linear(inner, 2 * size, axes=("mlp", None), **types)
        self.output = Linear(inner, dim, axes=("mlp", "embed"), **types)
        bias = softplus_step_bias(rngs.params(), (inner,), config.step_minimum, config.step_maximum)
        self.dt_bias = parameter(bias, ("mlp",), decay=False)
        rate = jnp.broadcast_to(jnp.log(jnp.arange(1, size + 1, dtype=jnp.float32)), (inner, size))
        self.A_log = parameter(rate, ("mlp", "state"), decay=False)
        self.D = parameter(jnp.ones(inner), ("mlp",), decay=False)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: MambaState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], MambaState]:
        """Mix along time; see :mod:`seqjax.layers.mixer`."""
        conv, hidden = (None, None) if state is None else state
        x = mask_padding(x, segment_ids)
        inner, conv = self.conv(self.input(x), conv, segment_ids=segment_ids)
        step = jax.nn.softplus(self.step_up(self.step_down(inner), output_dtype=jnp.float32) + self.dt_bias[...])
        write, read = jnp.split(self.select(inner), 2, axis=-1)
        y, hidden = ops.selective_scan(
            inner,
            step,
            -jnp.exp(self.A_log[...]),
            write,
            read,
            initial_state=hidden,
            segment_ids=segment_ids,
            chunk_size=self.config.chunk_size,
        )
        y = y.astype(jnp.float32) + self.D[...] * inner.astype(jnp.float32)
        y = y * jax.nn.silu(self.gate(x).astype(jnp.float32))
        return self.output(y), MambaState(conv, hidden)

    def initial_state(self, batch_size: int) -> MambaState:
        """Zeros."""
        return MambaState(self.conv.initial_state(batch_size), jnp.zeros((batch_size, *self.A_log.shape), jnp.float32))


def _uniform_rank(key, shape):
    """Uniform in +-R^(-1/2), R being the fan-in."""
    limit = shape[0] ** -0.5
    return jax.random.uniform(key, shape, minval=-limit, maxval=limit)
