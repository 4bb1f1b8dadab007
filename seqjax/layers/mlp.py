"""Gated feed-forward layer: SwiGLU and GeGLU."""

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from seqjax.layers.linear import Linear

MLPKind: TypeAlias = Literal["swiglu", "geglu"]
_ACTIVATIONS = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu}


class MLP(nnx.Module):
    """y = (act(x W_g) * x W_u) W_o with act = SiLU ("swiglu") or tanh-GELU ("geglu"); arXiv 2002.05202.

    Args:
        dim: size of input and output.
        hidden_dim: size of the gated hidden vector.
        kind: which activation gates.
        rngs: source of the initial values.
        dtype: type of the computation.
        param_dtype: storage type.

    Raises:
        ValueError: ``kind`` is neither "swiglu" nor "geglu".
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        kind: MLPKind = "swiglu",
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        if kind not in _ACTIVATIONS:
            raise ValueError(f"MLP: `kind` is {kind!r}; expected 'swiglu' or 'geglu'")
        self.kind = kind
        types: dict[str, Any] = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.gate = Linear(dim, hidden_dim, axes=("embed", "mlp"), **types)
        self.up = Linear(dim, hidden_dim, axes=("embed", "mlp"), **types)
        self.output = Linear(hidden_dim, dim, axes=("mlp", "embed"), **types)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Transform each vector of the last axis."""
        return self.output(_ACTIVATIONS[self.kind](self.gate(x)) * self.up(x))


def mlp_parameter_count(dim: int, hidden_dim: int) -> int:
    """Number of parameters of :class:`MLP`."""
    return 3 * dim * hidden_dim
