"""RG-LRU, the recurrent block of Griffin: a gated diagonal recurrence beside a GELU branch (arXiv 2402.19427)."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from seqjax import ops
from seqjax.layers.convolution import ShortConvolution
from seqjax.layers.gates import capped_sqrt
from seqjax.layers.linear import BlockDiagonalLinear, Linear, parameter
from seqjax.layers.mixer import mask_padding
from seqjax.ops._segments import segment_info


@dataclasses.dataclass(frozen=True)
class RGLRUConfig:
    """Hyperparameters of :class:`RGLRU`; the defaults are the paper's."""

    width: int | None = None
    """Number of recurrent channels (default: the model width)."""
    num_heads: int = 8
    """Blocks of the block-diagonal gate matrices."""
    conv_width: int = 4
    """Taps of the short convolution."""
    exponent: float = 8.0
    """c: how much faster than its slowest a channel can forget."""
    radius_minimum: float = 0.9
    """Smallest initial |rho|, the decay of a gate at 1/c."""
    radius_maximum: float = 0.999
    """Largest initial |rho|."""
    chunk_size: int | None = None
    """Tokens per chunk; None lets the op choose."""

    def channels(self, dim: int) -> int:
        """Number of recurrent channels in a model of width ``dim``."""
        return self.width or dim

    def parameter_count(self, dim: int) -> int:
        """Number of parameters of the mixer at width ``dim``."""
        width = self.channels(dim)
        gates = 2 * (width * width // self.num_heads + width)
        return 3 * dim * width + width * (self.conv_width + 1) + gates + width

    def mixing_flops(self, dim: int, time: int) -> float:
        """None: the state is updated and read element by element."""
        return 0.0


class RGLRUState(NamedTuple):
    """State of :class:`RGLRU`."""

    conv: Float[Array, "B W-1 E"]
    """Last inputs of the convolution; float32."""
    hidden: Float[Array, "B E"]
    """State of the recurrence; float32."""
    started: Bool[Array, "B"]
    """Whether a token has been seen: the first token of a document enters with weight 1."""


class RGLRU(nnx.Module):
    """h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t * x_t),  y = (GELU(u W_y) * h) W_o.

    x = conv(u W_x); r_t, i_t = sigmoid of block-diagonal maps of x_t; log a_t = -c r_t softplus(Lambda), c = 8. Lambda is such that
    rho = exp(-softplus(Lambda)) has rho^2 uniform in [0.9^2, 0.999^2]. At the first token of a document the factor
    sqrt(1 - a^2) is 1. The derivative of the root is capped at 1000.

    Args:
        dim: model width D.
        config: hyperparameters.
        rngs: source of the initial values.
        dtype: type of the projections; gates and the state are float32.
        param_dtype: storage type (``Lambda`` is always float32).

    Raises:
        ValueError: the heads do not divide the recurrent channels.
    """

    def __init__(
        self,
        dim: int,
        config: RGLRUConfig = RGLRUConfig(),
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        width = config.channels(dim)
        if width % config.num_heads:
            raise ValueError(f"RGLRU: `num_heads`={config.num_heads} does not divide {width} recurrent channels")
        self.config = config
        types: dict[str, Any] = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.input = Linear(dim, width, axes=("embed", "heads"), **types)
        self.gate = Linear(dim, width, axes=("embed", "heads"), **types)
        self.output = Linear(width, dim, axes=("heads", "embed"), **types)
        self.conv = ShortConvolution(
            width, config.conv_width, axis="heads", bias=True, activation=None, rngs=rngs, param_dtype=param_dtype
        )
        self.recurrence_gate = BlockDiagonalLinear(width, config.num_heads, **types)
        self.input_gate = BlockDiagonalLinear(width, config.num_heads, **types)
        squares = jax.random.uniform(
            rngs.params(), (width,), minval=config.radius_minimum**2, maxval=config.radius_maximum**2
        )
        # softplus(Lambda) = -log(rho), so exp(Lambda) = 1 / rho - 1.
        self.Lambda = parameter(jnp.log(jnp.expm1(-0.5 * jnp.log(squares))), ("heads",), decay=False)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: RGLRUState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], RGLRUState]:
        """Mix along time; see :mod:`seqjax.layers.mixer`."""
        conv, hidden, started = (None, None, jnp.zeros(x.shape[0], bool)) if state is None else state
        x = mask_padding(x, segment_ids)
        inner, conv = self.conv(self.input(x), conv, segment_ids=segment_ids)
        first, started = _document_starts(x.shape[:2], started, segment_ids)
        recurrence = jax.nn.sigmoid(self.recurrence_gate(inner))
        log_decay = -self.config.exponent * recurrence * jax.nn.softplus(self.Lambda[...])
        scale = jnp.where(first[..., None], 1.0, capped_sqrt(-jnp.expm1(2 * log_decay)))
        h, hidden = ops.linear_recurrence(
            scale * jax.nn.sigmoid(self.input_gate(inner)) * inner.astype(jnp.float32),
            log_decay,
            initial_state=hidden,
            segment_ids=segment_ids,
            chunk_size=self.config.chunk_size,
        )
        y = jax.nn.gelu(self.gate(x).astype(jnp.float32)) * h
        return self.output(y), RGLRUState(conv, hidden, started)

    def initial_state(self, batch_size: int) -> RGLRUState:
        """Zeros, and no token seen."""
        return RGLRUState(
            self.conv.initial_state(batch_size),
            jnp.zeros((batch_size, self.Lambda.shape[0]), jnp.float32),
            jnp.zeros((batch_size,), bool),
        )


def _document_starts(shape, started, segment_ids):
    """Whether each token [B, T] is the first of its document, and whether each row has seen a token afterwards [B]."""
    if segment_ids is None:
        first = (jnp.arange(shape[1]) == 0) & ~started[:, None]
        return first, jnp.ones_like(started)
    real, start, _ = segment_info(segment_ids)
    first_real = real & (jnp.cumsum(real, axis=1) == 1)
    return start | (first_real & ~started[:, None]), started | jnp.any(real, axis=1)
