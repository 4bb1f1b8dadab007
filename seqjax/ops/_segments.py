"""Document boundaries: what ``segment_ids`` mean, computed in one place.

Documents are numbered from 1; a change of id resets the state before that token; 0 is padding, which behaves as if the token
were absent: it neither decays nor writes the state and its output is 0. The first real token of a row continues
``initial_state``. Two runs of the same id with only padding between them are one document.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels._tokens import ORDINARY, PADDING, START


class Segments(NamedTuple):
    """Per-token facts derived from ``segment_ids`` [B, T]."""

    real: Bool[Array, "B T"]
    """The token is not padding."""
    start: Bool[Array, "B T"]
    """The state is reset before this token (never true for the first real token of a row)."""
    document: Int[Array, "B T"]
    """0 for tokens that continue ``initial_state``, then 1, 2, ... per reset; padding carries its predecessor's number."""


def segment_info(segment_ids: Int[Array, "B T"]) -> Segments:
    """Real tokens, resets and running document number of each row."""
    real = segment_ids != 0
    index = jnp.arange(segment_ids.shape[1])
    # Index of the latest real token before t (exclusive): padding between two tokens must not hide or fake a change of id.
    last_real = jax.lax.cummax(jnp.where(real, index, -1), axis=1)
    previous = jnp.pad(last_real[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous_id = jnp.take_along_axis(segment_ids, jnp.maximum(previous, 0), axis=1)
    start = real & (previous >= 0) & (segment_ids != previous_id)
    return Segments(real, start, jnp.cumsum(start, axis=1))


def clear_padding(real: Bool[Array, "B T"], array: Array, fill: float = 0.0) -> Array:
    """``array`` [B, T, ...] with ``fill`` at padding tokens.

    Done before any arithmetic, so that neither values nor gradients see what padding holds, be it NaN.
    """
    return jnp.where(real.reshape(real.shape + (1,) * (array.ndim - 2)), array, jnp.asarray(fill, array.dtype))


def token_kinds(segments: Segments | None) -> Int[Array, "B T"] | None:
    """Tokens as the kernels know them: start of a document, ordinary, padding."""
    if segments is None:
        return None
    return jnp.where(segments.real, jnp.where(segments.start, START, ORDINARY), PADDING)
