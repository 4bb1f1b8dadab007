"""Inverse of unit lower-triangular matrices, by blocks: the (I + A)^-1 of the delta rule's chunk form."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_TILE = 16  # below this size, blocks are merged by masked products of whole tiles rather than by products of their own


@jax.custom_jvp
def unit_lower_inverse(strict: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """(I + A)^-1 for A strictly lower triangular; entries of ``strict`` on and above the diagonal are ignored.

    Inverses of diagonal blocks of b rows are merged two by two, b = 1, 2, 4 .. C/2:
    [[L1, 0], [M, L2]]^-1 = [[T1, 0], [-T2 M T1, T2]]. Every factor is a block of A or of the result, so nothing grows that is
    not in the result; the Neumann product (I-A)(I+A^2)(I+A^4).. has as few matmuls, but its powers reach 1e6 and cancel when
    the entries of A come near 2.

    Args:
        strict: any leading shape, any C >= 1, float32 or float64.

    Returns:
        Array of the same shape and dtype, unit lower triangular. Derivatives use dT = -T dA T.
    """
    size = strict.shape[-1]
    padded = 1 << (size - 1).bit_length()
    # Padding with A = 0 inverts to the identity.
    strict = jnp.pad(jnp.tril(strict, -1), [(0, 0)] * (strict.ndim - 2) + [(0, padded - size)] * 2)
    block = min(_TILE, padded)
    inverse = _invert_tiles(_diagonal_blocks(strict, block))
    while block < padded:
        middle = _diagonal_blocks(strict, 2 * block)[..., block:, :block]  # M of every pair of neighbours
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = -_matmul(_matmul(second, middle), first)
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
    return inverse, -_matmul(_matmul(inverse, change), inverse)


def _matmul(a, b):
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _diagonal_blocks(x, block):
    """[..., C, C] -> its C/block diagonal blocks, [..., C/block, block, block]."""
    return jnp.stack([x[..., i : i + block, i : i + block] for i in range(0, x.shape[-1], block)], axis=-3)


def _invert_tiles(strict):
    """The merges of ``unit_lower_inverse`` in place: with T holding the inverses of blocks of b, T - T M T those of 2b."""
    index = jnp.arange(strict.shape[-1])
    inverse, block = jnp.eye(strict.shape[-1], dtype=strict.dtype), 1
    while block < strict.shape[-1]:
        half = index // block
        middle = jnp.where((half[:, None] // 2 == half // 2) & (half[:, None] > half), strict, 0)
        inverse = inverse - (middle if block == 1 else _matmul(_matmul(inverse, middle), inverse))
        block *= 2
    return jnp.broadcast_to(inverse, strict.shape)
