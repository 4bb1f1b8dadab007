"""Inverses of unit lower triangular matrices inside of a kernel for Hopper GPUs."""

from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels import _gpu
from pallas_kernels._gpu import plgpu

_REFINEMENTS = {1: 2, 2: 3}  # by the terms of the operands


def unit_lower_inverse(walk: _gpu.Walk, tile, lower: tuple[Any, Any], parts: tuple[Any, Any]):
    """(I + A)^-1 of a strictly lower triangular matrix A [C, C] in float32.

    With X the inverse of the diagonal blocks of some size and F what I + A has in the lower left quarters of blocks of twice that size, the
    inverse of these is X - X F X. No powers appear, which would grow without bound if keys are alike; but errors of bfloat16 add up, to
    8% at worst (nearly equal keys, beta = 2). Newton's X <- X + X (I - (I + A) X) squares them, if operands of the bracket are split
    into two parts: to 0.25% and to 0.02%, which bfloat16 does not resolve. That takes 18 products; to split the operands of all
    doublings would take 30 and be no better. For float32, a third step leaves what the bracket has lost.

    Args:
        walk: sizes.
        tile: A.
        lower: references to shared memory [C, C] for its two parts in bfloat16, which no warp reads any more.
        parts: as many, for those of other operands. The last product may still read the first one.
    """

    def store(tile, parts):
        for part, term in zip(parts, _gpu.split(tile, 2)):
            part[...] = term

    def times(x, tile, part):
        # All warps have done the last product with this part: since then there was a barrier.
        part[...] = tile.astype(jnp.bfloat16)
        plgpu.commit_smem()
        return walk.matmul(x.astype(jnp.bfloat16), part)

    line, column = (plgpu.broadcasted_iota(jnp.int32, tile.shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))

    def double(i, x):
        below = jnp.where(((line >> i) ^ (column >> i)) == 1, _gpu.load(lower[0]).astype(jnp.float32), 0.0)
        return x - times(times(x, below, parts[0]), x, parts[1])

    def refine(_, x):
        plgpu.commit_smem()  # the last product has read its operand
        store(x, parts)
        plgpu.commit_smem()
        total = walk.matmul(lower[0], parts[0])
        total = walk.matmul(lower[0], parts[1], total)
        total = walk.matmul(lower[1], parts[0], total)
        error = jnp.where(line == column, 1.0, 0.0) - x - total
        plgpu.commit_smem()
        return x + times(x, error, parts[0])

    store(tile, lower)
    plgpu.commit_smem()
    start = jnp.where(line == column, 1.0, jnp.where((line ^ column) == 1, -tile, 0.0))
    inverse = lax.fori_loop(1, (walk.chunk - 1).bit_length(), double, start)
    return lax.fori_loop(0, _REFINEMENTS[walk.terms], refine, inverse)
