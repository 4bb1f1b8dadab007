r"""Selective scan on TPU (Mosaic): an in-order walk over time with the states [N, D] in VMEM, channels in lanes.

Grid (rows, channel groups, chunks, channel blocks of a group), the last two in order. A step holds a chunk of one channel block of x and
delta; A and the states of the whole group stay in VMEM. States lie in sublanes, so 16 states of 128 channels fill two registers and a
token is one product and one sum per register, without shifts. B_t and C_t have to be columns that are the same in every lane; that costs
the cross-lane unit, which is slow, so it is done once per chunk and shared by the blocks of the group. delta_t and delta_t x_t are rows
that are the same in every sublane, which a load does for free. Sums over states collect registers in VMEM, where loads with a stride
of 8 turn sublanes into tokens.

Cost: 12 vector operations per token and 128 channels of 16 states forward and about 36 backward, 4 at a time: 3 and 9 cycles at
least, against less than one for the bytes. The vector unit bounds the op, not HBM. Backward, a chunk's decays and states are computed anew from the state before it; the
lane sums of dB and dC are taken once per chunk and group.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _configs
from pallas_kernels._split import Parts, merge, real
from pallas_kernels._tokens import PADDING, START

LANES, SUBLANES = 128, 8
_TILE = 8  # tokens per loop iteration
_REGISTERS = (
    8  # of state in lockstep: enough independent chains, few enough for A, gradients and operands to stay in registers
)
_BLOCKS = 16
_TOGETHER = 4
_VMEM = 32 << 20
_RESET, _FREE = -1e30, 3e38  # upper bounds of the exponent: decay 0, and none


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a step."""

    tokens: int  # per chunk: 128, or a multiple of 16 that covers a shorter row
    width: int  # channels per block, a multiple of 128
    blocks: int  # channel blocks per group, a divisor of their number


def default_config(time: int, channels: int, states: int) -> Config:
    """Blocks of 64 KiB of state or of the ``width`` in ``_configs``, cut so that they divide the channels if a cut not much narrower does.

    Args:
        time: T.
        channels: D.
        states: N.
    """
    widest = max(1, _REGISTERS * SUBLANES // _padded(states)) * LANES
    widest = _configs.tuned("selective_scan", states=states).get("width", widest)
    width = min(widest, LANES * pl.cdiv(channels, LANES))
    even = [w for w in range(width, width // 2, -LANES) if channels % w == 0]
    width = even[0] if even else width
    count = pl.cdiv(channels, width)
    blocks = max(n for n in range(1, _BLOCKS + 1) if count % n == 0)
    return Config(LANES if time > LANES else 16 * pl.cdiv(time, 16), width, blocks)


def _padded(states: int) -> int:
    return SUBLANES * pl.cdiv(states, SUBLANES)


def forward(
    x: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    state: jax.Array,
    kind: jax.Array | None,
    *,
    cut: Parts | None = None,
    emit: bool,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t, y_t = h_t C_t; see ``pallas_kernels.selective_scan``.

    Args:
        x, delta: [B, T, D].
        A: [D, N].
        B, C: [B, T, N].
        state: [B P, D, N], those before all parts.
        kind: [B, T] int32 or None: START (decay 0), ORDINARY, PADDING (decay 1, nothing written, y = 0).
        cut: rows in P parts, walked as rows of a larger batch; None leaves them whole, P = 1.
        emit: return the states before the chunks, which ``backward`` needs.
        config: sizes of a step; None for ``default_config``.
        interpret: run as plain XLA, on any device.

    Returns:
        (y [B, T, D] in x's dtype, the states after all parts [B P, D, N] in float32, states before the chunks or None).
    """
    if cut is not None:
        (x, delta, B, C), kind = _rows(cut, [x, delta, B, C], kind)
        y, final, starts = forward(x, delta, A, B, C, state, kind, emit=emit, config=config, interpret=interpret)
        return cut.join(y), final, starts
    grid = _Grid.over(x, A, kind, config, reverse=False)
    tokens, columns, states = grid.tokens(), grid.columns(), grid.states()
    starts = ([grid.starts_shape()], [grid.starts()]) if emit else ([], [])
    outputs = grid.call(
        functools.partial(_forward_body, grid=grid),
        [*grid.kinds(kind), x, delta, grid.rates(A), grid.column(B, kind), grid.column(C, kind), grid.state(state)],
        [*grid.kind_specs(), tokens, tokens, grid.rates_spec(), columns, columns, states],
        [jax.ShapeDtypeStruct(x.shape, x.dtype), grid.states_shape(), *starts[0]],
        [tokens, states, *starts[1]],
        [grid.wide()] * 3 + [grid.square()] + [grid.tall()] * 2,
        name="forward",
        interpret=interpret,
    )
    return outputs[0], grid.unstate(outputs[1]), outputs[2] if emit else None


def backward(
    x: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    starts: jax.Array,
    kind: jax.Array | None,
    dy: jax.Array,
    dfinal: jax.Array,
    *,
    cut: Parts | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    r"""Chunks from the last to the first: states again, then \lambda_t = C_t dy_t + \mu_t, \mu_{t-1} = a_t \lambda_t.

    With g_t = \mu_{t-1} h_{t-1}: ddelta = \sum_n (g A + \lambda B x), dx = delta \sum_n \lambda B, dA = \sum_t delta g,
    dB = \sum_d \lambda delta x, dC = \sum_d h dy.

    Args:
        x, delta, A, B, C, kind, cut, config, interpret: as in ``forward``.
        starts: its states before the chunks.
        dy: cotangent of y, not read at padding.
        dfinal: cotangents of the states after all parts.

    Returns:
        cotangents of x, delta (in their dtypes), A, B, C and the states before all parts (float32).
    """
    if cut is not None:
        (x, delta, B, C, dy), kind = _rows(cut, [x, delta, B, C, dy], kind)
        results = backward(x, delta, A, B, C, starts, kind, dy, dfinal, config=config, interpret=interpret)
        dx, ddelta, dA, dB, dC, dstate = results
        return cut.join(dx), cut.join(ddelta), dA, cut.join(dB), cut.join(dC), dstate
    grid = _Grid.over(x, A, kind, config, reverse=True)
    tokens, columns, states = grid.tokens(), grid.columns(), grid.states()
    sums = grid.sums()
    dx, ddelta, dA, dB, dC, dstate = grid.call(
        functools.partial(_backward_body, grid=grid),
        [
            *[*grid.kinds(kind), x, delta, grid.rates(A), grid.column(B, kind), grid.column(C, kind)],
            *[starts, dy, grid.state(dfinal)],
        ],
        [*grid.kind_specs(), tokens, tokens, grid.rates_spec(), columns, columns, grid.starts(), tokens, states],
        [
            *[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, delta)],
            grid.states_shape(),
            *[grid.sums_shape()] * 2,
            grid.states_shape(),
        ],
        [tokens, tokens, states, sums, sums, states],
        [grid.wide()] * 5 + [grid.square()] * 2 + [grid.tall()] * 4 + [grid.stash()] * 2,
        name="backward",
        interpret=interpret,
    )
    return dx, ddelta, jnp.sum(grid.unstate(dA), 0), grid.uncolumn(dB), grid.uncolumn(dC), grid.unstate(dstate)


def carried(
    values: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    columns: jax.Array,
    kind: jax.Array | None,
    *,
    cut: Parts,
    reverse: bool,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """As in ``gpu``. Parts fill idle GPUs; here they are for tests, and the kernels compute more than is used."""
    steps = real(cut.cut(delta), cut.kinds(kind, delta.shape[0]))
    total = jnp.sum(steps.astype(jnp.float32), 2)
    (values, delta, columns), kind = _rows(cut, [values, delta, columns], kind)
    none = jnp.zeros((delta.shape[0], *A.shape), jnp.float32)
    if reverse:
        starts = jnp.zeros(_Grid.over(delta, A, kind, None, reverse=True).starts_shape().shape, jnp.float32)
        tokens = (jnp.zeros_like(delta), delta, A, jnp.zeros_like(columns), columns)
        state = backward(*tokens, starts, kind, values, none, interpret=interpret)[-1]
    else:
        tokens = (values, delta, A, columns, jnp.zeros_like(columns))
        state = forward(*tokens, none, kind, emit=False, interpret=interpret)[1]
    some = slice(1, None) if reverse else slice(-1)
    state = state.reshape(-1, cut.count, *A.shape)
    return merge(state[:, some]), merge(total[:, some])


def _rows(cut: Parts, tokens: list[jax.Array], kind: jax.Array | None) -> tuple[list[jax.Array], jax.Array | None]:
    """Parts as rows."""
    kinds = cut.kinds(kind, tokens[0].shape[0])
    return [cut.rows(array) for array in tokens], None if kinds is None else merge(kinds)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Index maps and shapes of one walk over time."""

    batch: int
    time: int
    channels: int
    states_: int
    config: Config
    typed: bool
    reverse: bool

    @classmethod
    def over(cls, x: jax.Array, A: jax.Array, kind: jax.Array | None, config: Config | None, *, reverse: bool):
        config = config or default_config(*x.shape[1:], A.shape[1])
        return cls(*x.shape, A.shape[1], config, kind is not None, reverse)

    @property
    def depth(self) -> int:
        """States in whole registers."""
        return _padded(self.states_)

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.time, self.config.tokens)

    @property
    def count(self) -> int:
        """Channel blocks."""
        return pl.cdiv(self.channels, self.config.width)

    @property
    def pieces(self) -> int:
        """Registers side by side in a block."""
        return self.config.width // LANES

    def at(self, n):
        """Chunk of grid step n."""
        return self.chunks - 1 - n if self.reverse else n

    # What the arrays [B, T, D] and [B, T, N] are cut into.

    def tokens(self) -> pl.BlockSpec:
        c = self.config
        return pl.BlockSpec((None, c.tokens, c.width), lambda b, g, n, d: (b, self.at(n), g * c.blocks + d))

    @property
    def lines(self) -> int:
        """Rows of 128 numbers that hold the [T_b, N] numbers of a chunk."""
        return self.config.tokens * self.depth // LANES

    def columns(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, self.lines, LANES), lambda b, g, n, d: (b, self.at(n), 0, 0))

    def column(self, a: jax.Array, kind: jax.Array | None) -> jax.Array:
        """[B, T, N] -> [B, chunks, lines, 128] in float32, 0 at padding."""
        a = a.astype(jnp.float32)
        if kind is not None:
            a = jnp.where((kind != PADDING)[..., None], a, 0.0)
        tokens = self.config.tokens
        a = jnp.pad(a, ((0, 0), (0, self.chunks * tokens - self.time), (0, self.depth - self.states_)))
        return a.reshape(self.batch, self.chunks, self.lines, LANES)

    def sums(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, self.lines, LANES), lambda b, g, n, d: (b, g, self.at(n), 0, 0))

    def sums_shape(self) -> jax.ShapeDtypeStruct:
        groups = self.count // self.config.blocks
        return jax.ShapeDtypeStruct((self.batch, groups, self.chunks, self.lines, LANES), jnp.float32)

    def uncolumn(self, a: jax.Array) -> jax.Array:
        """Sums per channel group [B, groups, chunks, lines, 128] -> [B, T, N]."""
        return jnp.sum(a, 1).reshape(self.batch, -1, self.depth)[:, : self.time, : self.states_]

    # Arrays [..., D, N], as [..., blocks, N, width] with zeros for channels and states that are not there.

    def state(self, s: jax.Array) -> jax.Array:
        s = s.astype(jnp.float32)
        width, lead = self.config.width, [(0, 0)] * (s.ndim - 2)
        s = jnp.pad(s, [*lead, (0, self.count * width - self.channels), (0, self.depth - self.states_)])
        return s.reshape(*s.shape[:-2], self.count, width, self.depth).swapaxes(-1, -2)

    def unstate(self, s: jax.Array) -> jax.Array:
        s = s.swapaxes(-1, -2)
        return s.reshape(*s.shape[:-3], -1, self.depth)[..., : self.channels, : self.states_]

    def rates(self, A: jax.Array) -> jax.Array:
        """A in base 2."""
        return self.state(A.astype(jnp.float32) * math.log2(math.e))

    def rates_spec(self) -> pl.BlockSpec:
        return pl.BlockSpec((self.config.blocks, self.depth, self.config.width), lambda b, g, n, d: (g, 0, 0))

    def states(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.config.blocks, self.depth, self.config.width), lambda b, g, n, d: (b, g, 0, 0))

    def states_shape(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch, self.count, self.depth, self.config.width), jnp.float32)

    def starts(self) -> pl.BlockSpec:
        blocks = self.config.blocks
        return pl.BlockSpec(
            (None, None, None, self.depth, self.config.width),
            lambda b, g, n, d: (b, self.at(n), g * blocks + d, 0, 0),
        )

    def starts_shape(self) -> jax.ShapeDtypeStruct:
        shape = (self.batch, self.chunks, self.count, self.depth, self.config.width)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    # Kinds: rows [1, T_b], filled up with padding.

    def kinds(self, kind: jax.Array | None) -> list[jax.Array]:
        if kind is None:
            return []
        tokens = self.config.tokens
        kind = jnp.pad(
            kind.astype(jnp.float32), ((0, 0), (0, self.chunks * tokens - self.time)), constant_values=PADDING
        )
        return [kind.reshape(self.batch, self.chunks, 1, tokens)]

    def kind_specs(self) -> list[pl.BlockSpec]:
        spec = pl.BlockSpec((None, None, 1, self.config.tokens), lambda b, g, n, d: (b, self.at(n), 0, 0))
        return [spec] * self.typed

    # Scratch memory, in pieces of 128 lanes.

    def wide(self):
        """A value per token and channel."""
        return pltpu.VMEM((self.pieces, self.config.tokens, LANES), jnp.float32)

    def square(self):
        """Eight registers of states per piece, to be summed."""
        return pltpu.VMEM((self.pieces, _TILE * SUBLANES, LANES), jnp.float32)

    def tall(self):
        """A value per token and state, in every lane or to be summed over lanes."""
        return pltpu.VMEM((self.config.tokens * self.depth, LANES), jnp.float32)

    def stash(self):
        """A value per token, channel and state."""
        return pltpu.VMEM((self.config.tokens, self.pieces, self.depth, LANES), jnp.float32)

    def call(self, body, inputs, in_specs, out_shape, out_specs, scratch, *, name, interpret):
        c = self.config
        size = self.batch * self.time * self.channels
        ways = 1 if name == "forward" else 3
        moved = sum(math.prod(a.shape) * a.dtype.itemsize for a in [*inputs, *out_shape])
        spread = [pltpu.VMEM((c.tokens, LANES), jnp.float32)] * self.typed
        return pl.pallas_call(
            body,
            grid=(self.batch, self.count // c.blocks, self.chunks, c.blocks),
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            scratch_shapes=[*spread, *scratch],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM
            ),
            cost_estimate=pl.CostEstimate(
                flops=7 * ways * size * self.states_, transcendentals=size * self.states_, bytes_accessed=moved
            ),
            name=f"selective_scan_{name}{'_kinds' * self.typed}_t{c.tokens}_d{c.width}x{c.blocks}_n{self.states_}",
            interpret=interpret,
        )(*inputs)


class _Step:
    """A grid step in a kernel: what the forward and the backward walk have in common."""

    def __init__(self, grid: _Grid, kinds, spread, rates, b_columns, c_columns, b_wide, c_wide):
        self.grid, self.spread = grid, spread
        self.block = pl.program_id(3)
        self.chunk = grid.at(pl.program_id(2))
        self.lanes = [slice(LANES * i, LANES * (i + 1)) for i in range(grid.pieces)]
        self.rates = [rates[self.block, :, lanes] for lanes in self.lanes]

        @pl.when(self.block == 0)
        def _():
            self._broadcast([b_columns, c_columns], [b_wide, c_wide])
            if spread is not None:
                self._spread(kinds, spread)

    @staticmethod
    def _broadcast(sources, targets) -> None:
        """Lines to a number per sublane, the same in every lane: a line in every sublane, transposed."""

        def line(i):
            for source, target in zip(sources, targets):
                square = jnp.broadcast_to(source[pl.ds(i, 1), :], (LANES, LANES))
                target[_square(i), :] = square.T

        _lines(sources[0].shape[0], line)

    @staticmethod
    def _spread(kinds, spread) -> None:
        """A row of kinds as a column, the same in every lane, by a masked sum: tokens lie in sublanes."""
        tokens = spread.shape[0]
        row, column = (lax.broadcasted_iota(jnp.int32, (tokens, tokens), axis) for axis in (0, 1))
        sums = jnp.sum(jnp.where(row == column, kinds[...], 0.0), 1, keepdims=True)
        spread[...] = jnp.broadcast_to(sums, spread.shape)

    def valid(self, i: int):
        """Which tokens and channels of piece i count, [T_b, 128]; None: all."""
        grid, c = self.grid, self.grid.config
        shape, flags = (c.tokens, LANES), []
        if self.spread is not None:
            flags.append(self.spread[...] != PADDING)
        elif grid.time % c.tokens:
            flags.append(lax.broadcasted_iota(jnp.int32, shape, 0) < grid.time - self.chunk * c.tokens)
        if grid.channels % c.width:
            first = (pl.program_id(1) * c.blocks + self.block) * c.width + LANES * i
            flags.append(lax.broadcasted_iota(jnp.int32, shape, 1) < grid.channels - first)
        return functools.reduce(jnp.logical_and, flags) if flags else None

    def rows(self, sources, targets, finish) -> None:
        """Float32 rows of the block: ``finish`` of the sources' pieces, which are 0 where nothing counts."""
        for i, lanes in enumerate(self.lanes):
            valid = self.valid(i)
            pieces = [source[:, lanes].astype(jnp.float32) for source in sources]
            pieces = [piece if valid is None else jnp.where(valid, piece, 0.0) for piece in pieces]
            for target, piece in zip(targets, finish(*pieces)):
                target[i] = piece

    def token(self, rows, t) -> list:
        """Rows of token t in every sublane."""
        return [jnp.broadcast_to(rows[i, pl.ds(t, 1), :], (self.grid.depth, LANES)) for i in range(self.grid.pieces)]

    def at(self, t):
        """Where the states of token t are."""
        return pl.ds(pl.multiple_of(t * self.grid.depth, SUBLANES), self.grid.depth)

    def states(self, wide, t):
        return wide[self.at(t), :]

    def decays(self, steps: list, t) -> list:
        """exp(delta_t A), 0 at the first token of a document."""
        exponents = [step * rate for step, rate in zip(steps, self.rates)]
        if self.spread is not None:
            kind = jnp.broadcast_to(self.spread[pl.ds(t, 1), :], exponents[0].shape)
            bound = jnp.where(kind == START, _RESET, _FREE)
            exponents = [jnp.minimum(exponent, bound) for exponent in exponents]
        return [jnp.exp2(exponent) for exponent in exponents]

    def tiles(self, body, carry, *, reverse: bool = False):
        """``body(first token, carry)`` for tiles of tokens."""
        count = self.grid.config.tokens // _TILE

        def tile(i, carry):
            return body(pl.multiple_of((count - 1 - i if reverse else i) * _TILE, _TILE), carry)

        return lax.fori_loop(0, count, tile, carry)


def _collapse(register):
    """[N, 128] -> [8, 128]."""
    return sum(register[k : k + SUBLANES] for k in range(0, register.shape[0], SUBLANES))


def _sublane_sums(square, target, i: int, t0) -> None:
    """Eight tokens' registers in ``square`` to eight rows of sums in ``target``."""
    piece = square.at[i]
    target[i, pl.ds(t0, _TILE), :] = sum(piece[pl.ds(k, _TILE, stride=SUBLANES), :] for k in range(SUBLANES))


def _split(refs, *counts):
    refs = iter(refs)
    return [[next(refs) for _ in range(count)] for count in counts]


def _forward_body(*refs, grid: _Grid):
    kinds, (x, delta, rates, b, c, state, y, final), starts, spread, scratch = _split(
        refs, grid.typed, 8, len(refs) - 14 - 2 * grid.typed, grid.typed, 6
    )
    steps, writes, reads, square, b_wide, c_wide = scratch
    step = _Step(grid, *(kinds or [None]), *(spread or [None]), rates, b, c, b_wide, c_wide)
    block, pieces = step.block, range(grid.pieces)

    @pl.when(pl.program_id(2) == 0)
    def _():
        final[block] = state[block]

    for target in starts:
        target[...] = final[block]
    step.rows([delta, x], [steps, writes], lambda d, u: (d, d * u))

    def tile(t0, h):
        for r in range(_TILE):
            t = t0 + r
            decay, write = step.decays(step.token(steps, t), t), step.token(writes, t)
            b_t, c_t = step.states(b_wide, t), step.states(c_wide, t)
            h = [decay[i] * h[i] + write[i] * b_t for i in pieces]
            for i in pieces:
                square[i, pl.ds(SUBLANES * r, SUBLANES), :] = _collapse(h[i] * c_t)
        for i in pieces:
            _sublane_sums(square, reads, i, t0)
        return h

    h = step.tiles(tile, [final[block, :, lanes] for lanes in step.lanes])
    for i, lanes in enumerate(step.lanes):
        final[block, :, lanes] = h[i]
        y[:, lanes] = reads[i].astype(y.dtype)


def _backward_body(*refs, grid: _Grid):
    kinds, inputs, outputs, spread, scratch = _split(refs, grid.typed, 8, 6, grid.typed, 13)
    x, delta, rates, b, c, start, dy, dfinal = inputs
    dx, ddelta, drates, db, dc, dstate = outputs
    (
        steps,
        writes,
        cotangents,
        from_decay,
        from_write,
        square,
        other,
        b_wide,
        c_wide,
        db_wide,
        dc_wide,
        h_stash,
        a_stash,
    ) = scratch
    step = _Step(grid, *(kinds or [None]), *(spread or [None]), rates, b, c, b_wide, c_wide)
    block, pieces = step.block, range(grid.pieces)

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate[block] = dfinal[block]
        drates[block] = jnp.zeros_like(drates[block])

    @pl.when(block == 0)
    def _():
        db_wide[...] = jnp.zeros_like(db_wide)
        dc_wide[...] = jnp.zeros_like(dc_wide)

    step.rows([delta, x, dy], [steps, writes, cotangents], lambda d, u, v: (d, d * u, v))

    def again(t0, h):
        for r in range(_TILE):
            t = t0 + r
            decay, write, dy_t = step.decays(step.token(steps, t), t), step.token(writes, t), step.token(cotangents, t)
            b_t = step.states(b_wide, t)
            for i in pieces:
                h_stash[t, i], a_stash[t, i] = h[i], decay[i]
            h = [decay[i] * h[i] + write[i] * b_t for i in pieces]
            dc_wide[step.at(t), :] += sum(h[i] * dy_t[i] for i in pieces)
        return h

    step.tiles(again, [start[:, lanes] for lanes in step.lanes])

    def back(t0, carry):
        mu, d_rates = carry
        for r in reversed(range(_TILE)):
            t = t0 + r
            delta_t, write, dy_t = step.token(steps, t), step.token(writes, t), step.token(cotangents, t)
            b_t, c_t = step.states(b_wide, t), step.states(c_wide, t)
            lam = [mu[i] + c_t * dy_t[i] for i in pieces]
            mu = [a_stash[t, i] * lam[i] for i in pieces]
            g = [mu[i] * h_stash[t, i] for i in pieces]
            d_rates = [d_rates[i] + delta_t[i] * g[i] for i in pieces]
            db_wide[step.at(t), :] += sum(lam[i] * write[i] for i in pieces)
            for i in pieces:
                square[i, pl.ds(SUBLANES * r, SUBLANES), :] = _collapse(g[i] * step.rates[i])
                other[i, pl.ds(SUBLANES * r, SUBLANES), :] = _collapse(lam[i] * b_t)
        for i in pieces:
            _sublane_sums(square, from_decay, i, t0)
            _sublane_sums(other, from_write, i, t0)
        return mu, d_rates

    carried = [dstate[block, :, lanes] for lanes in step.lanes], [drates[block, :, lanes] for lanes in step.lanes]
    mu, d_rates = step.tiles(back, carried, reverse=True)
    for i, lanes in enumerate(step.lanes):
        dstate[block, :, lanes], drates[block, :, lanes] = mu[i], d_rates[i]
        valid = step.valid(i)
        # Exponents are in base 2, and so is A here: ln 2 of the one meets log2 e of the other in dA.
        d_delta = math.log(2) * from_decay[i] + x[:, lanes].astype(jnp.float32) * from_write[i]
        ddelta[:, lanes] = (d_delta if valid is None else jnp.where(valid, d_delta, 0.0)).astype(ddelta.dtype)
        dx[:, lanes] = (steps[i] * from_write[i]).astype(dx.dtype)

    @pl.when(block == grid.config.blocks - 1)
    def _():
        _lane_sums([db_wide, dc_wide], [db, dc])


def _lane_sums(sources, targets) -> None:
    """A number per sublane and lane to lines of sums over lanes."""

    def line(i):
        for source, target in zip(sources, targets):
            target[pl.ds(i, 1), :] = jnp.sum(source[_square(i), :].T, 0, keepdims=True)

    _lines(targets[0].shape[0], line)


def _square(i):
    return pl.ds(pl.multiple_of(i * LANES, LANES), LANES)


def _lines(count: int, body) -> None:
    """``body(line)`` for all lines, several at a time: transpositions have a long latency."""
    together = math.gcd(count, _TOGETHER)

    def some(i, _):
        for k in range(together):
            body(i * together + k)
        return 0

    lax.fori_loop(0, count // together, some, 0)
