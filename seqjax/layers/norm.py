"""Root-mean-square normalisation, plain or gated, and the L2 normalisation of queries and keys."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from seqjax.layers.linear import parameter


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + epsilon) * w over the last axis, computed in float32 (arXiv 1910.07467).

    Normalises a whole vector [.., D] or, given [.., H, V], each head by itself with one weight shared by the heads. With a
    ``gate`` the result is multiplied by SiLU(gate) before it is rounded to ``dtype``.

    Args:
        dim: size of the last axis.
        axis: logical name of that axis.
        epsilon: added to the mean square.
        num_groups: the vector is cut into this many equal parts and each is normalised by itself.
        dtype: type of the output.
        param_dtype: storage type of w, initialised to 1.

    Raises:
        ValueError: the groups do not divide the features.
    """

    def __init__(
        self,
        dim: int,
        *,
        axis: str | None = None,
        epsilon: float = 1e-5,
        num_groups: int = 1,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        if dim % num_groups:
            raise ValueError(f"RMSNorm: `num_groups`={num_groups} does not divide {dim} features")
        self.epsilon = epsilon
        self.num_groups = num_groups
        self.dtype = jnp.dtype(dtype)
        self.weight = parameter(jnp.ones(dim), (axis,), dtype=param_dtype, decay=False)

    def __call__(
        self, x: Float[Array, "*batch D"], gate: Float[Array, "*batch D"] | None = None
    ) -> Float[Array, "*batch D"]:
        """Normalise the last axis."""
        parts = x.astype(jnp.float32)
        if self.num_groups > 1:
            parts = parts.reshape(*x.shape[:-1], self.num_groups, -1)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(parts), axis=-1, keepdims=True) + self.epsilon)
        y = (parts * scale).reshape(x.shape) * self.weight[...].astype(jnp.float32)
        if gate is not None:
            y = y * jax.nn.silu(gate.astype(jnp.float32))
        return y.astype(self.dtype)


def l2_normalize(x: Float[Array, "*batch K"], epsilon: float = 1e-6) -> Float[Array, "*batch K"]:
    """x / sqrt(sum(x^2) + epsilon) over the last axis, computed in float32, in the type of ``x``."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.sum(jnp.square(y), axis=-1, keepdims=True) + epsilon)).astype(x.dtype)
