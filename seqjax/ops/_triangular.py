"""Inverse of unit lower-triangular matrices, by blocks: the (I + A)^-1 of the delta rule's chunk form."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_BLOCK = 8


@jax.custom_jvp
def unit_lower_inverse(strict: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """(I + A)^-1 for A strictly lower triangular; entries of ``strict`` on and above the diagonal are ignored.

    Diagonal blocks of 8 are inverted by forward substitution (over the whole batch at once) and merged two by two:
    [[L1, 0], [M, L2]]^-1 = [[T1, 0], [-T2 M T1, T2]]. Both are backward stable for any A; the Neumann product
    (I-A)(I+A^2)(I+A^4).. is not: its powers grow to 1e6 and cancel when the entries of A come near 2.

    Args:
        strict: any leading shape, any C >= 1, float32 or float64.

    Returns:
        Array of the same shape and dtype, unit lower triangular. Derivatives use d(T) = -T dA T, not the substitution.
    """
    size = strict.shape[-1]
    padded = min(_BLOCK, 1 << (size - 1).bit_length())
    while padded < size:
        padded *= 2
    widths = [(0, 0)] * (strict.ndim - 2) + [(0, padded - size)] * 2
    strict = jnp.pad(jnp.tril(strict, -1), widths)  # padding with A = 0 inverts to the identity
    block = min(_BLOCK, padded)
    inverse = _substitute(_diagonal_blocks(strict, block))  # [..., n, block, block]
    while block < padded:
        lower = _diagonal_blocks(strict, 2 * block)[..., block:, :block]  # M of every pair of neighbours
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = -_matmul(second, _matmul(lower, first))
        inverse = jnp.concatenate(
            [
                jnp.concatenate([first, jnp.zeros_like(corner)], axis=-1),
                jnp.concatenate([corner, second], axis=-1),
            ],
            axis=-2,
        )
        block *= 2
    return inverse[..., 0, :size, :size]


@unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals, tangents):
    """T (I + A) = I, so dT = -T dA T; transposed by JAX this is dA = -tril(T^T dT T^T, -1)."""
    inverse = unit_lower_inverse(*primals)
    change = jnp.tril(tangents[0], -1)
    return inverse, -_matmul(inverse, _matmul(change, inverse))


def _matmul(a, b):
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _diagonal_blocks(x, block):
    """[..., C, C] -> its C/block diagonal blocks, [..., C/block, block, block]."""
    count = x.shape[-1] // block
    tiles = x.reshape(x.shape[:-2] + (count, block, count, block))
    return jnp.stack([tiles[..., i, :, i, :] for i in range(count)], axis=-3)


def _substitute(strict):
    """Row i of (I + A)^-1 is e_i - sum_{j<i} A_ij row_j. The batch is the innermost axis, where it fills vector lanes."""
    size = strict.shape[-1]
    matrix = jnp.moveaxis(strict.reshape(-1, size, size), 0, -1)  # [row, column, batch]
    rows = []
    for i in range(size):
        row = jnp.broadcast_to((jnp.arange(size) == i).astype(strict.dtype)[:, None], matrix.shape[1:])
        for j in range(i):
            row = row - matrix[i, j] * rows[j]
        rows.append(row)
    return jnp.moveaxis(jnp.stack(rows), -1, 0).reshape(strict.shape)
