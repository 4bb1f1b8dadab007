"""Inverses of unit lower triangular matrices inside of a TPU kernel."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._tpu import dot

_BLOCK = 16  # rows of the diagonal blocks that are solved row by row


def unit_lower_inverse(matrices: Sequence[jax.Array], *, full: bool) -> list[jax.Array]:
    """(I + A)^-1 of strictly lower triangular matrices A [C, C] in float32, C a power of two from 16 on, in lockstep.

    Diagonal blocks of 16 rows are solved row by row: they are laid side by side, a [16, C] array whose lanes are the columns of all blocks,
    and step i takes row i times column i of each block from the rows below. Blocks are then doubled,

        (I + [[A, 0], [B, D]])^-1 = [[X, 0], [-Y B X, Y]]   for X, Y the inverses of I + A, I + D,

    with the lower halves of all pairs, in two matrices, in one product. There are no powers of A, which would lose everything on correlated keys.

    Args:
        matrices: the A's.
        full: float32 products; otherwise three products of operands split into two bfloat16 parts, an error of some 1e-5.
    """
    size = matrices[0].shape[0]

    def product(a, b):
        if full:
            return dot(a, b, 1, 0)
        (a, a_rest), (b, b_rest) = _parts(a), _parts(b)
        return dot(a, b, 1, 0) + dot(a, b_rest, 1, 0) + dot(a_rest, b, 1, 0)

    row_, lane = (lax.broadcasted_iota(jnp.int32, (_BLOCK, size), axis) for axis in (0, 1))
    blocks = range(size // _BLOCK)
    packed = [
        sum(jnp.where(lane // _BLOCK == b, a[b * _BLOCK : (b + 1) * _BLOCK], 0.0) for b in blocks) for a in matrices
    ]
    # Column i of every block in all lanes of the block: lanes that are not of column i are cleared, and each block is summed. Rows above i are
    # not needed, in whole registers.
    steps = range(_BLOCK - 1)
    starts = [i // 8 * 8 for i in steps]
    same = lax.broadcasted_iota(jnp.int32, (size, size), 0) // _BLOCK
    same = (same == lax.broadcasted_iota(jnp.int32, (size, size), 1) // _BLOCK).astype(jnp.float32)
    columns = [jnp.concatenate([jnp.where(lane % _BLOCK == i, p, 0.0)[starts[i] :] for i in steps], 0) for p in packed]
    if full:
        columns = [dot(c, same, 1, 0) for c in columns]
    else:
        exact = same.astype(jnp.bfloat16)
        columns = [dot(c, exact, 1, 0) + dot(rest, exact, 1, 0) for c, rest in map(_parts, columns)]
    inverses = [jnp.where(lane % _BLOCK == row_, 1.0, 0.0) for _ in matrices]
    offset = 0
    for i, start in zip(steps, starts):
        end = offset + _BLOCK - start
        below = [x[start:] - c[offset:end] * x[i : i + 1] for x, c in zip(inverses, columns)]
        inverses = [jnp.concatenate([x[:start], b], 0) if start else b for x, b in zip(inverses, below)]
        offset = end
    inverses = [jnp.concatenate([jnp.where(lane // _BLOCK == b, x, 0.0) for b in blocks], 0) for x in inverses]

    half = _BLOCK
    while half < size:
        inverses = _doubled(matrices, inverses, half, product)
        half *= 2
    return inverses


def _doubled(matrices: Sequence[jax.Array], inverses: list[jax.Array], half: int, product: Callable) -> list[jax.Array]:
    """The inverses of blocks of twice the size.

    The factors B and X of a pair fill only its left columns, Y only its right ones, and both products of two matrices fit into one: the second
    matrix is moved to the other half of the columns.
    """
    size = matrices[0].shape[0]
    pairs = range(0, size, 2 * half)
    row_, lane = (lax.broadcasted_iota(jnp.int32, (size // 2, size), axis) for axis in (0, 1))
    left, own = lane // half % 2 == 0, lane // half == row_ // half * 2  # of all pairs, and of a row's own pair

    def upper(x):
        return jnp.concatenate([x[p : p + half] for p in pairs], 0)

    def lower(x):
        return jnp.concatenate([x[p + half : p + 2 * half] for p in pairs], 0)

    def interleave(uppers, lowers):
        parts = ((uppers[p : p + half], lowers[p : p + half]) for p in range(0, size // 2, half))
        return jnp.concatenate([part for pair in parts for part in pair], 0)

    def to_right(x):
        return pltpu.roll(x, half, 1)

    def to_left(x):
        return pltpu.roll(x, size - half, 1)

    firsts, seconds = list(zip(matrices[::2], inverses[::2])), list(zip(matrices[1::2], inverses[1::2]))
    alone = len(firsts) > len(seconds)
    seconds += [firsts[-1]] * alone
    products = [
        product(
            jnp.where(own, lower(a), 0.0) + to_right(jnp.where(own, lower(b), 0.0)),
            interleave(upper(x), to_right(upper(y))),
        )
        for (a, x), (b, y) in zip(firsts, seconds)
    ]
    products = [
        product(lower(x) + to_left(lower(y)), interleave(jnp.where(left, 0.0, p), jnp.where(left, p, 0.0)))
        for (_, x), (_, y), p in zip(firsts, seconds, products)
    ]
    doubled = []
    for (_, x), (_, y), p in zip(firsts, seconds, products):
        doubled.append(interleave(upper(x), lower(x) - jnp.where(left, p, 0.0)))
        doubled.append(interleave(upper(y), lower(y) - to_left(jnp.where(left, 0.0, p))))
    return doubled[: len(matrices)]


def _parts(x):
    """The bfloat16 part of a float32 array, and that of the rest."""
    part = x.astype(jnp.bfloat16)
    return part, (x - part.astype(jnp.float32)).astype(jnp.bfloat16)
