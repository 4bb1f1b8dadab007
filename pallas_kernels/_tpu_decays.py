"""Decays inside of a TPU kernel: between the tokens of a chunk, and from and to the states around it; one per head or one per channel.

For log decays g and pairs of tokens j <= i of a chunk both kinds of steps give

    weights(x, y)_ij = sum_c x_ic y_jc exp(g_{j+1,c} + .. + g_ic),

``from_start`` = exp(sum up to i), ``to_end`` = exp(sum after j) and ``across`` = exp(sum of all), as factors on rows of keys and queries.
Decays are 0 between documents. All lists have an entry per head of the grid step.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._tokens import PADDING, START
from pallas_kernels._tpu import Shape, column, dot, row, store, times, total

_SUBLANES = 8


def step_of(shape: Shape, gates_ref, rows_ref, padded: bool) -> "HeadStep | ChannelStep":
    """The step of a kernel with decays per channel (``gates_ref``) or not."""
    if gates_ref is None:
        return HeadStep(shape, rows_ref, padded)
    return ChannelStep(shape, gates_ref, rows_ref if padded else None)


def scaled(decay, x):
    """Rows of x times a decay, in x's dtype; None is 1."""
    return x if decay is None else (decay * x.astype(jnp.float32)).astype(x.dtype)


class _Step:
    """Tiles of a grid step's heads."""

    real: Any = None
    """Tokens that are not padding, [C, 1]; None if all are."""

    def __init__(self, shape: Shape):
        self.shape, self.heads = shape, range(shape.config.heads)
        size = shape.config.chunk
        self.i, self.j = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))

    def key_head(self, h: int) -> int:
        return h // self.shape.repeats if self.shape.shared == 1 else 0

    def tiles(self, ref, width: int, count: int) -> list:
        tiles = [ref[:, h * width : (h + 1) * width] for h in range(count)]
        # A select, so that what padding holds cannot pass, not even as 0 * NaN.
        return tiles if self.real is None else [jnp.where(self.real, tile, jnp.zeros_like(tile)) for tile in tiles]

    def keys(self, ref) -> list:
        """Query or key tiles; heads that share one get the same array."""
        tiles = self.tiles(ref, self.shape.key_dim, self.shape.keys)
        return [tiles[self.key_head(h)] for h in self.heads]

    def values(self, ref) -> list:
        return self.tiles(ref, self.shape.value_dim, self.shape.config.heads)

    def strictly(self, scores: list) -> list:
        """Without the tokens' own."""
        return [jnp.where(self.i > self.j, x, 0.0) for x in scores]

    def sum_heads(self, tiles: list) -> list:
        """Cotangents of what heads share."""
        return [sum(tiles[h] for h in self.heads if self.key_head(h) == g) for g in range(self.shape.keys)]


class HeadStep(_Step):
    """No decay, or one per head.

    Args:
        shape: of the call.
        rows_ref: those of ``_tokens.chunk_rules`` (and more), [heads, >= 3, C]; None without decay and documents.
        padded: there may be padding.
    """

    def __init__(self, shape: Shape, rows_ref, padded: bool):
        super().__init__(shape)
        none = [None] * len(self.heads)
        self.from_start, self.to_end, self.across = list(none), list(none), list(none)
        self._pairs, self._decays = [self.i >= self.j] * len(self.heads), none
        if rows_ref is None:
            return
        self._decays = list(none)
        for h in self.heads:
            rows = rows_ref[h]
            upto, after, resets = rows[0:1], rows[1:2], rows[2:3]
            number, upto_column = column(resets), column(upto)
            end = jnp.maximum(jnp.max(resets, 1, keepdims=True), 0.0)
            if padded and h == 0:
                self.real = number >= 0
            self._pairs[h] = (self.i >= self.j) & (number == resets) & (number >= 0)
            self._decays[h] = jnp.exp(jnp.where(self._pairs[h], upto_column - upto, -jnp.inf))
            self.from_start[h] = jnp.exp(jnp.where(number == 0, upto_column, -jnp.inf))
            self.to_end[h] = jnp.exp(jnp.where(number == end, column(after), -jnp.inf))
            self.across[h] = jnp.exp(jnp.where(end == 0, upto[:, upto.shape[1] - 1 :], -jnp.inf))

    def _rule(self, h: int, x):
        return jnp.where(self._pairs[h], times(self._decays[h], x), 0.0)

    def weights(self, x: list, y: list) -> list:
        products: dict[tuple[int, int], Any] = {}  # heads that share keys share products
        for h in self.heads:
            at = (id(x[h]), id(y[h]))
            products[at] = products[at] if at in products else dot(x[h], y[h], 1, 1)
        return [self._rule(h, products[id(x[h]), id(y[h])]) for h in self.heads]

    def gradient(self, dweights: list, x: list, y: list) -> tuple[list, list]:
        """Cotangents of x and y for those of ``weights(x, y)``."""
        scores = [self._rule(h, dweights[h]).astype(x[h].dtype) for h in self.heads]
        return [dot(scores[h], y[h], 1, 0) for h in self.heads], [dot(scores[h], x[h], 0, 0) for h in self.heads]

    def through(self, reading: list, written: list, state: list) -> list:
        """Cotangents of the log decays, [1, C] per head.

        Args:
            reading: x dx of all x that read, minus y dy of all y that are read, [C, K].
            written: y dy for the part of dy through the state after the chunk, [C, K].
            state: the state before the chunk times the cotangent of the one after it, [K, V].
        """
        gates = []
        for h in self.heads:
            # exp(G_i) is in all that token i reads, exp(-G_j) in all that is read of j, and exp(G_C) in what leaves the chunk.
            inside = jnp.sum(reading[h], 1, keepdims=True)
            leaving = total(written[h]) + times(self.across[h], total(state[h]))
            gates.append(jnp.sum(jnp.where(self.i >= self.j, inside, 0.0), 0, keepdims=True) + leaving)
        return gates

    def store_gates(self, ref, gates: list) -> None:
        """Into the first row of a block [heads, n, C]."""
        for h in self.heads:
            ref[h, 0:1] = gates[h]


class ChannelStep(_Step):
    """One decay per key channel.

    Sums of log decays run over whole chunks, and exp(G_i - G_j) cannot be split into exp(G_i) and exp(-G_j), which overflows. So pairs are
    taken by levels: at level s, j is in the first half and i in the second half of a block of 2 s tokens, and the decay is exp(sum from the
    middle up to i) times exp(sum after j up to the middle), both at most 1. The sums of a level are those of the level before plus a
    total of a half: nothing is subtracted anywhere, so that they are exact to rounding, and -inf stands for a start of a document.

    Args:
        shape: of the call.
        gates_ref: log decays, [C, heads * K].
        rows_ref: kinds of the tokens in the last row, [heads, n, C]; None if all are ordinary.
    """

    def __init__(self, shape: Shape, gates_ref, rows_ref):
        super().__init__(shape)
        starts = None
        if rows_ref is not None:
            kinds = rows_ref[0]
            kinds = column(kinds[kinds.shape[0] - 1 :])
            self.real, starts = kinds != PADDING, kinds == START
        gates = [gate.astype(jnp.float32) for gate in self.tiles(gates_ref, shape.key_dim, len(self.heads))]
        if starts is not None:
            gates = [jnp.where(starts, -jnp.inf, gate) for gate in gates]
        token = lax.broadcasted_iota(jnp.int32, (shape.config.chunk, 1), 0)
        upto, after = gates, [jnp.zeros_like(gate) for gate in gates]
        self._levels: list[tuple[int, list]] = []
        half = 1
        while half < shape.config.chunk:
            second = token // half % 2 == 1
            self._levels.append((half, [jnp.exp(jnp.where(second, u, a)) for u, a in zip(upto, after)]))
            # A total of a half is what comes up to its last token, and what comes after its first one and with it.
            ends = [_of_first_half(u, half, token) for u in upto]
            whole = [_of_second_half(u, half, token) for u in upto]
            upto = [jnp.where(second, u + e, u) for u, e in zip(upto, ends)]
            after = [jnp.where(second, a, a + w) for a, w in zip(after, whole)]
            half *= 2
        self._token = token
        self.from_start, self.to_end = [jnp.exp(u) for u in upto], [jnp.exp(a) for a in after]
        self.across = [column(jnp.exp(u[u.shape[0] - 1 :])) for u in upto]

    def _level(self, half: int):
        """Pairs of a level."""
        return (self.i // half % 2 == 1) & (self.j // half == self.i // half - 1)

    def weights(self, x: list, y: list) -> list:
        same = self.i == self.j
        weights = [
            jnp.where(same, jnp.sum(x[h].astype(jnp.float32) * y[h].astype(jnp.float32), 1, keepdims=True), 0.0)
            for h in self.heads
        ]
        for half, decays in self._levels:
            scaled = [[(decays[h] * z[h]).astype(z[h].dtype) for h in self.heads] for z in (x, y)]
            products = [dot(scaled[0][h], scaled[1][h], 1, 1) for h in self.heads]
            weights = [weights[h] + jnp.where(self._level(half), products[h], 0.0) for h in self.heads]
        return weights

    def gradient(self, dweights: list, x: list, y: list) -> tuple[list, list]:
        """Cotangents of x and y for those of ``weights(x, y)``."""
        own = [jnp.sum(jnp.where(self.i == self.j, d, 0.0), 1, keepdims=True) for d in dweights]
        dx, dy = (
            [own[h] * y[h].astype(jnp.float32) for h in self.heads],
            [own[h] * x[h].astype(jnp.float32) for h in self.heads],
        )
        for half, decays in self._levels:
            scaled = [[(decays[h] * z[h]).astype(z[h].dtype) for h in self.heads] for z in (x, y)]
            scores = [jnp.where(self._level(half), d, 0.0).astype(z.dtype) for d, z in zip(dweights, x)]
            left = [dot(scores[h], scaled[1][h], 1, 0) for h in self.heads]
            right = [dot(scores[h], scaled[0][h], 0, 0) for h in self.heads]
            dx = [dx[h] + decays[h] * left[h] for h in self.heads]
            dy = [dy[h] + decays[h] * right[h] for h in self.heads]
        return dx, dy

    def through(self, reading: list, written: list, state: list) -> list:
        """Cotangents of the log decays, [C, K] per head; arguments as for ``HeadStep``."""
        gates = []
        for h in self.heads:
            leaving = jnp.sum(written[h], 0, keepdims=True) + row(self.across[h] * jnp.sum(state[h], 1, keepdims=True))
            gates.append(reading[h] + jnp.where(self._token == self.shape.config.chunk - 1, leaving, 0.0))
        half = 1
        while half < self.shape.config.chunk:  # sums from each token to the end of its block
            second = self._token // half % 2 == 1
            gates = [jnp.where(second, g, g + _of_second_start(g, half, self._token)) for g in gates]
            half *= 2
        return gates

    def store_gates(self, ref, gates: list) -> None:
        """Into a block [C, heads * K]."""
        store(ref, gates)


def _spread(x, half: int, token, source: int, target: int):
    """x at token ``source`` of each block of 2 * half tokens, in the tokens of its first (``target`` 0) or second (1) half; elsewhere anything."""
    size = x.shape[0]
    if half >= _SUBLANES:
        parts = []
        for start in range(0, size, 2 * half):
            parts.append(jnp.broadcast_to(x[start + source : start + source + 1], (2 * half, x.shape[1])))
        return jnp.concatenate(parts, 0)
    place, result = token % (2 * half), x
    for at in range(target * half, (target + 1) * half):
        if at != source:
            result = jnp.where(place == at, pltpu.roll(x, (at - source) % size, 0), result)
    return result


def _of_first_half(upto, half: int, token):
    """Totals of the first halves, in the second halves."""
    return _spread(upto, half, token, half - 1, 1)


def _of_second_half(upto, half: int, token):
    """Totals of the second halves, in the first halves."""
    return _spread(upto, half, token, 2 * half - 1, 0)


def _of_second_start(after, half: int, token):
    """Sums that begin with the second halves, in the first halves."""
    return _spread(after, half, token, half, 0)
