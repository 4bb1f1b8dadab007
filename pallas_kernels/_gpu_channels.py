r"""Decays per key channel in the chunked kernels for Hopper GPUs: sums of gates as products, and pairs of tokens by levels.

**Levels.** :math:`e^{G_i - G_j}` cannot be split into :math:`e^{G_i}` and :math:`e^{-G_j}`, which overflows. So pairs of tokens are taken by levels
l = 0 .. 5: j is in the first and i in the second half of a block of :math:`2^{l+1}` tokens. The decay is exp of the sum from the middle up to i
times exp of the sum after j up to the middle, both at most 1.

**Sums of gates** are products with matrices of 0 and 1 that are made in registers where they are used: of log decays in units of
log 2, in two parts of bfloat16 each. Nothing is subtracted, so an exponent is off by at most 2^-17 of itself, and a large one stands for a
decay of 0: ``RESET`` at the start of a document, and for log decays below it.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _gpu
from pallas_kernels._gpu import TILE, plgpu

LEVELS = 6
"""Levels of pairs of tokens in a chunk."""

RESET = -1024.0  # in units of log 2: exp2 of it is 0, and so it is of a sum that has it; bfloat16 has it exactly
_LOG2E = math.log2(math.e)


def split_gates(walk: _gpu.Walk, log_decay, document) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Log decays in units of log 2, in two parts of bfloat16 [B, T, H, K], and decays of whole chunks [B, H, N, 1, K] in float32."""
    gates = jnp.maximum(_LOG2E * log_decay.astype(jnp.float32), RESET)
    if document is not None:
        latest = jnp.maximum(lax.cummax(document, axis=1), 0)
        starts = latest > jnp.pad(latest[:, :-1], ((0, 0), (1, 0)))
        gates = jnp.where(starts[..., None, None], RESET, gates)
        gates = jnp.where(document[..., None, None] < 0, 0.0, gates)
    gates = walk.fill(gates)
    totals = gates.reshape(walk.batch, walk.count, walk.chunk, walk.heads, walk.key_dim).sum(2)
    # A cast to bfloat16 and back is one that XLA may leave out.
    high = lax.reduce_precision(gates, exponent_bits=8, mantissa_bits=7)
    parts = high.astype(jnp.bfloat16), (gates - high).astype(jnp.bfloat16)
    return parts, jnp.exp2(totals).transpose(0, 2, 1, 3)[:, :, :, None]


class Pairs:
    """Tokens of a chunk along the rows and columns of a tile, for use in a kernel.

    Matrices of 0 and 1 say which gates, along columns, are in the sum of a token; ``transposed`` ones which sums a gate is in. What depends
    on a level is computed for rows, of which a thread has two. The rest is one comparison per element, since the compiler would keep what
    is the same for all levels in registers.
    """

    def __init__(self, walk: _gpu.Walk):
        self.walk = walk
        layouts = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
        self.row, column = (plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=layout) for layout in layouts)
        self.column = _gpu.columns(column, (TILE, TILE))
        self.same = self._rows(self.row) == self.column
        self.lower = self.column <= self._rows(self.row)

    def upto(self, *, transposed: bool = False):
        """From the start of the chunk up to a token and with it."""
        return _ones(self._rows(self.row) <= self.column if transposed else self.lower)

    def after(self, *, transposed: bool = False):
        """After a token up to the end of the chunk."""
        return _ones(self._rows(self.row) > self.column if transposed else self.column > self._rows(self.row))

    def level(self, level, *, transposed: bool = False):
        """Sums of a level: in second halves those up to a token, in first halves those after it, each within its half."""
        start, end = self._half(level)
        if transposed:
            return _ones(self._between((self.row, end), (start, self.row - 1), level))
        return _ones(self._between((start, self.row), (self.row + 1, end), level))

    def of(self, level):
        """Pairs of a level, in either order."""
        start, end = self._half(level)
        other = 1 << level
        return self._between((start - other, end - other), (start + other, end + other), level)

    def reading(self, level):
        """Pairs of a level whose row is the later token."""
        start, end = self._half(level)
        other = 1 << level
        return self._between((start - other, end - other), (start, start - 1), level)

    def written(self, level):
        """Pairs of a level whose row is the earlier token."""
        start, end = self._half(level)
        other = 1 << level
        return self._between((start, start - 1), (start + other, end + other), level)

    def second(self, level):
        """Rows of tokens in second halves."""
        return self._rows(self._second(level)) == 1

    def _second(self, level):
        return (self.row >> level) & 1

    def _half(self, level):
        """First and last token of the half."""
        start = self.row >> level << level
        return start, start + (1 << level) - 1

    def _between(self, in_second, in_first, level):
        """Columns from .. to .."""
        second = self._second(level) == 1
        first, last = (self._rows(jnp.where(second, x, y)) for x, y in zip(in_second, in_first))
        return (first <= self.column) & (self.column <= last)

    def _rows(self, vector):
        return _gpu.rows(vector, (TILE, TILE))

    def decays(self, sums, gates):
        """exp of sums of gates, both parts of them."""
        high, low = gates
        return jnp.exp2(self.walk.matmul(sums, low, self.walk.matmul(sums, high)))


def _ones(mask):
    return jnp.where(mask, 1.0, 0.0).astype(jnp.bfloat16)


def as_float(ref):
    """A tile in float32."""
    return _gpu.load(ref).astype(jnp.float32)
