"""What the chunked matrix-state ops share: layout, padding, document masks and decays of one chunk.

Inside an op, heads are split as [G, R] (H = G*R; query/key head ``g`` serves value heads ``g*R .. g*R+R-1``), so grouped heads
broadcast along R and are never repeated in memory.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def state_dtype(*arrays: Array) -> jnp.dtype:
    """float64 if the inputs are float64 (tests against the exact value), float32 otherwise."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def clear_padding(real: Array, *arrays: Array | None) -> tuple[Array | None, ...]:
    """Zero the tokens [B, T, ...] that are padding, so that nothing in them (NaN included) reaches a value or a gradient.

    A token whose query, key, value, beta and log decay are 0 leaves the state as it was and reads 0: it is absent.
    """
    return tuple(
        None if x is None else jnp.where(real.reshape(real.shape + (1,) * (x.ndim - 2)), x, jnp.zeros((), x.dtype))
        for x in arrays
    )


def split_heads(x: Array, groups: int, axis: int = 2) -> Array:
    """[..., H, ...] -> [..., G, R, ...]; a query or key, which has G heads, gets R = 1."""
    return x.reshape(x.shape[:axis] + (groups, x.shape[axis] // groups) + x.shape[axis + 1 :])
