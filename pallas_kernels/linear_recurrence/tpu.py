"""Elementwise linear recurrence on TPU (Mosaic): an in-order walk over time with the state in VMEM.

Grid (batch groups, channel blocks, time blocks), time last and in order; a step holds blocks [rows, T_b, D_b] of every array, the state
stays in a VMEM scratch of [rows, D_b]. Inside a block the walk goes by tiles of 8 tokens, one per sublane. A token at a time would use
one sublane of eight; instead the tile is scanned by doubling: after steps of 1, 2 and 4 sublanes row r holds the product of the decays
and the sum of the writes of rows 0..r, and only `h = sums + products * (state before the tile)` is serial. Lanes and batch rows
are independent; rows are written in lockstep, tile by tile, because the scheduler does not interleave chains that follow one another.

Bytes: one read of every input, one write of every output; the backward pass reads h (the forward output) and a tile of the block
before it. Nothing else is kept.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _configs
from pallas_kernels._tokens import PADDING, START

LANES = 128
Planes = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a block."""

    rows: int  # batch rows in lockstep
    tokens: int  # multiple of 128; or of 16, if less
    channels: int  # multiple of 128, or all of them


def default_config(batch: int, time: int, channels: int, bytes_per_token: int) -> Config:
    """At most 2048 lanes of independent chains per step, and the longest block of time whose double-buffered blocks take 10 MiB, unless
    ``_configs`` knows better ``channels`` or ``tokens``.

    Args:
        batch: rows.
        time: T.
        channels: D.
        bytes_per_token: of one channel, over all arrays of size T that a step holds.
    """
    better = _configs.tuned("linear_recurrence", bytes=bytes_per_token)
    width = min(-(-channels // LANES) * LANES, better.get("channels", 2048))
    rows = max(n for n in (1, 2, 4, 8) if n == 1 or (n <= batch and n * width <= 2048))
    tokens = better.get("tokens", (10 << 20) // (2 * bytes_per_token * rows * width))
    longest = max(LANES, tokens // LANES * LANES)
    if time <= LANES:
        return Config(rows, -(-time // 16) * 16, min(width, channels))
    # A divisor of T, if there is one that is not much shorter: a last block that is not full costs the masks of all blocks.
    divisors = [n for n in range(longest, max(longest // 2, LANES) - 1, -LANES) if time % n == 0]
    return Config(rows, divisors[0] if divisors else longest, min(width, channels))


def forward(
    gate: Planes,
    x: Planes,
    state: Planes,
    kind: jax.Array | None,
    *,
    log: bool,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[Planes, Planes]:
    """h_t = a_t h_{t-1} + x_t; see ``pallas_kernels.linear_recurrence``.

    Args:
        gate: planes [B, T, D]: log a (``log``) or a.
        x: planes [B, T, D].
        state: planes [B, D], float32.
        kind: [B, T] int32: 1 ordinary, 2 first of a document (a = 0), 0 padding (a = 1, x = 0); None is all 1.
        log: whether gates are logarithms (real only).
        config: block sizes; None for ``default_config``.
        interpret: run as plain XLA, on any device.

    Returns:
        (h planes [B, T, D] in x's dtype; final state planes [B, D] float32).
    """
    batch, time, channels = x[0].shape
    moved = [*gate, *x, *x]
    config = config or default_config(batch, time, channels, sum(a.dtype.itemsize for a in moved))
    kind = _complete(kind, batch, time, config)
    grid = _Grid(batch, time, channels, config, reverse=False)
    block = grid.tokens()
    count = len(x)
    outputs = grid.call(
        functools.partial(_forward_body, grid=grid, planes=count, log=log, typed=kind is not None),
        [*grid.kinds(kind), *gate, *x, *grid.states(state)],
        [*grid.kind_specs(kind), *[block] * (2 * count), *[grid.state()] * count],
        [*[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in x], *[grid.state_shape()] * count],
        [*[block] * count, *[grid.state()] * count],
        moved=moved,
        scratch=count,
        typed=kind is not None,
        name="linear_recurrence_forward",
        transcendentals=log,
        interpret=interpret,
    )
    return tuple(outputs[:count]), tuple(map(grid.unstate, outputs[count:]))


def backward(
    gate: Planes,
    h: Planes,
    state: Planes,
    dh: Planes,
    dfinal: Planes,
    kind: jax.Array | None,
    *,
    log: bool,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[Planes, Planes, Planes]:
    r"""The recurrence reversed: \lambda_t = dh_t + a_{t+1} \lambda_{t+1}, dx_t = \lambda_t, da_t = h_{t-1} \lambda_t.

    Args:
        gate, state, kind, log, config, interpret: as in ``forward``.
        h: its result.
        dh: cotangents of h.
        dfinal: cotangents of the final state, [B, D] float32.

    Returns:
        cotangents of gate and x (planes [B, T, D] in the dtypes of gate and dh) and of the state ([B, D] float32).
    """
    batch, time, channels = dh[0].shape
    count = len(dh)
    moved = [*gate, *gate, *h, *dh, *dh]
    config = config or default_config(batch, time, channels, sum(a.dtype.itemsize for a in moved))
    kind = _complete(kind, batch, time, config)
    grid = _Grid(batch, time, channels, config, reverse=True)
    block, before = grid.tokens(), grid.before()
    outputs = grid.call(
        functools.partial(_backward_body, grid=grid, planes=count, log=log, typed=kind is not None),
        [*grid.kinds(kind), *gate, *h, *h, *dh, *grid.states(state), *grid.states(dfinal)],
        [
            *grid.kind_specs(kind),
            *[block] * (2 * count),
            *[before] * count,
            *[block] * count,
            *[grid.state()] * (2 * count),
        ],
        [
            *(jax.ShapeDtypeStruct(g.shape, g.dtype) for g in gate),
            *(jax.ShapeDtypeStruct(d.shape, d.dtype) for d in dh),
            *[grid.state_shape()] * count,
        ],
        [*[block] * (2 * count), *[grid.state()] * count],
        moved=moved,
        scratch=count,
        typed=kind is not None,
        name="linear_recurrence_backward",
        transcendentals=log,
        interpret=interpret,
    )
    return (
        tuple(outputs[:count]),
        tuple(outputs[count : 2 * count]),
        tuple(map(grid.unstate, outputs[2 * count :])),
    )


def summary(
    gate: Planes, x: Planes, kind: jax.Array | None, *, log: bool, reverse: bool, interpret: bool = False
) -> tuple[Planes, Planes]:
    """A and U with h_T = A h_0 + U or, with ``reverse``, mu_0 = A mu_T + U for the cotangents of the states, ``x`` being dh.

    By whole passes from a state of 0, and of inputs of 0 from a state of 1: a core has nothing to walk beside, so on TPUs only those who ask
    for parts come here.
    """
    zeros = tuple(jnp.zeros((a.shape[0], a.shape[2]), jnp.float32) for a in x)
    ones = (jnp.ones_like(zeros[0]), *zeros[1:])

    def last(x, state):
        if reverse:
            return backward(gate, x, zeros, x, state, kind, log=log, interpret=interpret)[2]
        return forward(gate, x, state, kind, log=log, interpret=interpret)[1]

    return last(tuple(map(jnp.zeros_like, x)), ones), last(x, zeros)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Index maps and shapes of one walk over time."""

    batch: int
    time: int
    channels: int
    config: Config
    reverse: bool

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.time, self.config.tokens)

    def at(self, n):
        """Time block of grid step n."""
        return self.blocks - 1 - n if self.reverse else n

    def tokens(self) -> pl.BlockSpec:
        c = self.config
        return pl.BlockSpec((c.rows, c.tokens, c.channels), lambda b, d, n: (b, self.at(n), d))

    def before(self) -> pl.BlockSpec:
        """The 16 tokens before the block; the first block, which has none, gets any."""
        c = self.config
        tiles = c.tokens // 16
        return pl.BlockSpec((c.rows, 16, c.channels), lambda b, d, n: (b, jnp.maximum(self.at(n) * tiles - 1, 0), d))

    def state(self) -> pl.BlockSpec:
        # [B, 1, D] and not [B, D]: a block of a few rows would break the rule of multiples of 8 in the last two axes.
        return pl.BlockSpec((self.config.rows, 1, self.config.channels), lambda b, d, n: (b, 0, d))

    def states(self, planes: Planes) -> list[jax.Array]:
        return [s.astype(jnp.float32)[:, None] for s in planes]

    def state_shape(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch, 1, self.channels), jnp.float32)

    def unstate(self, s: jax.Array) -> jax.Array:
        return s[:, 0]

    def kinds(self, kind: jax.Array | None) -> list[jax.Array]:
        """Rows [1, T_b], filled up with padding: [B, blocks, 1, T_b]."""
        if kind is None:
            return []
        tokens = self.config.tokens
        kind = jnp.pad(kind.astype(jnp.float32), ((0, 0), (0, self.blocks * tokens - self.time)))
        return [kind.reshape(self.batch, self.blocks, 1, tokens)]

    def kind_specs(self, kind: jax.Array | None) -> list[pl.BlockSpec]:
        if kind is None:
            return []
        c = self.config
        return [pl.BlockSpec((c.rows, None, 1, c.tokens), lambda b, d, n: (b, self.at(n), 0, 0))]

    def call(
        self, body, inputs, in_specs, out_shape, out_specs, *, moved, scratch, typed, name, transcendentals, interpret
    ):
        c = self.config
        kinds = [pltpu.VMEM((c.rows, c.tokens, LANES), jnp.float32)] * typed
        size = self.batch * self.time * self.channels
        kind = "bf16" if any(a.dtype.itemsize == 2 for a in moved) else "f32"
        return pl.pallas_call(
            body,
            grid=(pl.cdiv(self.batch, c.rows), pl.cdiv(self.channels, c.channels), self.blocks),
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            scratch_shapes=[*kinds, *[pltpu.VMEM((c.rows, 1, c.channels), jnp.float32)] * scratch],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=32
                << 20,  # complex arrays take more than v5e's and v5p's default of 16 MiB; both have 64 or more
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * size * len(moved),
                transcendentals=size * transcendentals,
                bytes_accessed=size * sum(a.dtype.itemsize for a in moved),
            ),
            name=f"{name}_{kind}{'_kinds' * typed}_r{c.rows}_t{c.tokens}_d{c.channels}",
            interpret=interpret,
        )(*inputs)


def _complete(kind: jax.Array | None, batch: int, time: int, config: Config) -> jax.Array | None:
    """The last block is filled up with padding: what lies past T is garbage."""
    return jnp.ones((batch, time), jnp.float32) if kind is None and time % config.tokens else kind


def _split(refs, *counts):
    refs = iter(refs)
    return [[next(refs) for _ in range(count)] for count in counts]


def _product(p: list, q: list) -> list:
    """p q of numbers given as planes."""
    if len(p) == 1:
        return [p[0] * q[0]]
    return [p[0] * q[0] - p[1] * q[1], p[0] * q[1] + p[1] * q[0]]


def _sum(p: list, q: list) -> list:
    return [u + v for u, v in zip(p, q)]


def _where(flag, values, planes: list) -> list:
    """Planes with the values (one per plane) where the flag is set: a select, so that garbage cannot pass."""
    return planes if flag is None else [jnp.where(flag, value, p) for value, p in zip(values, planes)]


_ZERO, _ONE = (0.0, 0.0), (1.0, 0.0)
_SUBLANES = 8


def _shift(planes: list, step: int, edge) -> list:
    """Rows moved by ``step`` sublanes (down if positive), the gap filled with the edge (one value or row per plane)."""
    row = lax.broadcasted_iota(jnp.int32, planes[0].shape, 0)
    gap = row < step if step > 0 else row >= _SUBLANES + step
    return _where(gap, edge, [pltpu.roll(p, step % _SUBLANES, 0) for p in planes])


def _scan_tile(a: list, b: list, direction: int) -> tuple[list, list]:
    """Per row, the product of the decays and the sum of the writes of all rows up to it (from it on, if the direction is -1)."""
    for step in (1, 2, 4):
        b = _sum(_product(a, _shift(b, direction * step, _ZERO)), b)
        a = _product(a, _shift(a, direction * step, _ONE))
    return a, b


class _Tiles:
    """The tokens of a block in pieces whose loads and stores need no shuffling, each a list of tiles of 8 rows in float32."""

    def __init__(self, grid: _Grid, arrays, kinds: list, spread: list, log: bool):
        self.log = log
        self.height = 16 if any(ref.dtype.itemsize == 2 for ref in arrays) else _SUBLANES
        self.pieces, self.parts = grid.config.tokens // self.height, range(0, self.height, _SUBLANES)
        self.kinds = spread[0] if spread else None
        if kinds:
            self._spread(kinds[0], spread[0])

    @staticmethod
    def _spread(kinds, spread) -> None:
        """Turn rows of kinds into columns, the same in every lane, by a masked sum: tokens lie in sublanes."""
        rows, tokens = spread.shape[:2]
        width = min(LANES, tokens)
        on = lax.broadcasted_iota(jnp.int32, (width, width), 0) == lax.broadcasted_iota(jnp.int32, (width, width), 1)
        for b in range(rows):
            for start in range(0, tokens, width):
                column = jnp.sum(jnp.where(on, kinds[b, :, start : start + width], 0.0), 1, keepdims=True)
                spread[b, start : start + width, :] = jnp.broadcast_to(column, (width, LANES))

    def rows(self, i) -> Any:
        return pl.ds(pl.multiple_of(i * self.height, self.height), self.height)

    def load(self, refs, i, b: int) -> list[list]:
        planes = [ref[b, self.rows(i), :].astype(jnp.float32) for ref in refs]
        return [[p[r : r + _SUBLANES] for p in planes] for r in self.parts]

    def store(self, refs, i, b: int, tiles: list[list]) -> None:
        for p, ref in enumerate(refs):
            ref[b, self.rows(i), :] = jnp.concatenate([tile[p] for tile in tiles], 0).astype(ref.dtype)

    def flags(self, i, b: int, width: int) -> list[tuple]:
        """Per tile, which tokens start a document and which are padding; None: no token here is."""
        if self.kinds is None:
            return [(None, None) for _ in self.parts]
        columns = self.kinds[b, self.rows(i), :]
        tiles = [columns[r : r + _SUBLANES, :1] for r in self.parts]
        tiles = [jnp.broadcast_to(tile, (_SUBLANES, width)) for tile in tiles]
        return [(tile == START, tile == PADDING) for tile in tiles]

    def decays(self, refs, i, b: int, flags: list[tuple]) -> list[list]:
        tiles = self.load(refs, i, b)
        if self.log:
            tiles = [[jnp.exp(p) for p in tile] for tile in tiles]
        return [_where(pad, _ONE, _where(start, _ZERO, tile)) for tile, (start, pad) in zip(tiles, flags)]


def _forward_body(*refs, grid: _Grid, planes: int, log: bool, typed: bool):
    kinds, gate, x, state, h_all, final, spread, carried = _split(refs, typed, *[planes] * 5, typed, planes)
    tiles = _Tiles(grid, [*gate, *x, *h_all], kinds, spread, log)
    lanes, width = range(grid.config.rows), grid.config.channels

    @pl.when(pl.program_id(2) == 0)
    def _():
        for source, target in zip(state, carried):
            target[...] = source[...]

    def walk(i, h):
        flags = [tiles.flags(i, b, width) for b in lanes]
        a = [tiles.decays(gate, i, b, flags[b]) for b in lanes]
        added = [tiles.load(x, i, b) for b in lanes]
        written: list[list] = [[] for _ in lanes]
        for part in range(len(tiles.parts)):
            for b in lanes:
                added_b = _where(flags[b][part][1], _ZERO, added[b][part])
                products, sums = _scan_tile(a[b][part], added_b, 1)
                states = _sum(_product(products, h[b]), sums)
                h[b] = [p[_SUBLANES - 1 :] for p in states]
                written[b].append(states)
        for b in lanes:
            tiles.store(h_all, i, b, written[b])
        return h

    h = lax.fori_loop(0, tiles.pieces, walk, [[ref[b] for ref in carried] for b in lanes])
    for b in lanes:
        for value, target in zip(h[b], carried):
            target[b] = value

    @pl.when(pl.program_id(2) == grid.blocks - 1)
    def _():
        for source, target in zip(carried, final):
            target[...] = source[...]


def _backward_body(*refs, grid: _Grid, planes: int, log: bool, typed: bool):
    kinds, gate, h, before, dh, state, dfinal, dgate, dx, dstate, spread, carried = _split(
        refs, typed, *[planes] * 9, typed, planes
    )
    tiles = _Tiles(grid, [*gate, *h, *dh], kinds, spread, log)
    lanes, width = range(grid.config.rows), grid.config.channels

    @pl.when(pl.program_id(2) == 0)
    def _():
        for source, target in zip(dfinal, carried):
            target[...] = source[...]

    first = grid.at(pl.program_id(2)) == 0
    entry = [[jnp.where(first, s[b], p[b, 15:16, :].astype(jnp.float32)) for s, p in zip(state, before)] for b in lanes]

    def walk(j, mu):
        i = tiles.pieces - 1 - j
        flags = [tiles.flags(i, b, width) for b in lanes]
        a = [tiles.decays(gate, i, b, flags[b]) for b in lanes]
        dy, inside = [tiles.load(dh, i, b) for b in lanes], [tiles.load(h, i, b) for b in lanes]
        earlier = [tiles.load(h, jnp.maximum(i - 1, 0), b)[-1] for b in lanes]
        d_gate: list[list] = [[] for _ in lanes]
        d_x: list[list] = [[] for _ in lanes]
        for part in reversed(range(len(tiles.parts))):
            for b in lanes:
                start, padding = flags[b][part]
                dy_b = _where(padding, _ZERO, dy[b][part])
                # m_t = a_t (dh_t + m_{t+1}), and lambda_t = dh_t + m_{t+1}
                products, sums = _scan_tile(a[b][part], _product(a[b][part], dy_b), -1)
                m = _sum(_product(products, mu[b]), sums)
                lam = _sum(dy_b, _shift(m, -1, mu[b]))
                mu[b] = [p[:1] for p in m]
                if part:
                    last = [p[_SUBLANES - 1 :] for p in inside[b][part - 1]]
                else:
                    last = [jnp.where(i == 0, e, p[_SUBLANES - 1 :]) for e, p in zip(entry[b], earlier[b])]
                d_a = _product(_shift(inside[b][part], 1, last), m if log else lam)
                d_gate[b].append(_where(padding, _ZERO, _where(start, _ZERO, d_a)))
                d_x[b].append(_where(padding, _ZERO, lam))
        for b in lanes:
            tiles.store(dgate, i, b, d_gate[b][::-1])
            tiles.store(dx, i, b, d_x[b][::-1])
        return mu

    mu = lax.fori_loop(0, tiles.pieces, walk, [[ref[b] for ref in carried] for b in lanes])
    for b in lanes:
        for value, target in zip(mu[b], carried):
            target[b] = value

    @pl.when(pl.program_id(2) == grid.blocks - 1)
    def _():
        for source, target in zip(carried, dstate):
            target[...] = source[...]
