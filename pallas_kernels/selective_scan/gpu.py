r"""Selective scan on Hopper GPUs, forward and backward, for Pallas' Mosaic GPU lowering.

.. math:: h_t = e^{\Delta_t A} \circ h_{t-1} + (\Delta_t x_t)\, B_t^\top, \qquad y_t = h_t C_t

**Bounds.** An SM has 16 exponentials per clock and a channel needs N = 16 per token: one clock per token and channel, against 0.3
clocks for the 6 bytes of x, delta and y in bfloat16 (4.8 TB/s, 132 SMs, 1.75 GHz). So the forward pass is bound by the special function
unit, and the products, five per state, are close behind. The backward pass takes nearly every exponential twice.

**Dataflow.** The grid is (rows and their parts, channel blocks). One warpgroup walks a part of a row; a thread owns one channel, or two in the
forward pass, and keeps their N states in registers, so threads exchange nothing but the sums over channels. B_t and C_t are read from shared
memory by all threads. Time is cut into chunks, which TMA brings into slots of shared memory; y takes the place of x there, dx, ddelta, dB
and dC that of x, delta, B and C.

**Latency.** A token depends on the one before it, so a warp alone leaves its scheduler idle most of the time. Several blocks per SM fill it: two
of the backward kernel, which therefore has one slot only and what is left of 227 KiB and 64k registers. Rows are cut into parts where there
are too few of them; ``carried`` gives what is needed to walk the parts side by side.

**Backward.** The forward pass leaves the states before chunks. A chunk is walked forward once for the states before groups of tokens, which
fit in shared memory, then backward by groups; a group's states and decays are made again in registers. dB and dC are sums over
channels, products with ones on the tensor cores: threads write their summands to shared memory in bfloat16, those of float32 B and C in two
terms. Sums are float32. Each channel block writes its own ones; XLA adds them.

**Kinds.** At padding delta and delta x are selected to 0; at the first token of a document the exponent gets a summand that makes the decay 0.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _configs, _gpu
from pallas_kernels._split import Parts
from pallas_kernels._tokens import PADDING, START

# Axes of the grid; a mesh or vmap axis around the kernel must not have the same name.
_GRID = ("selective_scan_row", "selective_scan_channels")
_WARPGROUP = 128
_SMS = 132
_CHUNK = 32  # tokens
_STAGES = 2
_GROUP = 4  # tokens whose work is interleaved, and between kept states backward
_DEPTH = 16  # states, with those that are not there
_LINE = _GROUP * _DEPTH  # B or C of a group: 64 numbers, and as many rows of a wgmma
_LINES = _CHUNK // _GROUP  # of a chunk
_RESET = -1e30  # summand of the exponent: decay 0
# [channels, states]: a thread has all states of a channel. It reads and writes 16 bytes, four states in float32 or eight in bfloat16, at a
# time, which with rows of shared memory swizzled as in `_tiles` makes no bank conflicts.
_TILE, _HALVES = plgpu.Layout.TCGEN05_TMEM_NATIVE(4), plgpu.Layout.TCGEN05_TMEM_NATIVE(8)
_CHANNELS, _STATES = _TILE.reduce(1), _TILE.reduce(0)

_load: Any = plgpu.load


def default_width(batch: int, channels: int, states: int) -> int:
    """Channels per thread block forward: that of ``_configs``, else two per thread, which share the reads of B and C, if enough blocks are left."""
    if better := _configs.tuned("selective_scan", states=states):
        return better["width"]
    return 2 * _WARPGROUP if batch * pl.cdiv(channels, 2 * _WARPGROUP) >= _SMS else _WARPGROUP


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
    width: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Outputs, final states and, with ``emit``, the states before the chunks, which ``backward`` needs.

    Args:
        x, delta: [B, T, D], D a multiple of 8.
        A: [D, N].
        B, C: [B, T, N].
        state: [B P, D, N], those before all parts.
        kind: [B, T] int32 or None.
        cut: rows in P parts, which are walked side by side; None leaves them whole, P = 1.
        emit: return the states before the chunks.
        width: channels per thread block, 128 or 256; None for ``default_width``.

    Returns:
        (y [B, T, D] in x's dtype, the states after all parts [B P, D, N] float32, states before the chunks or None).
    """
    width = width or default_width(state.shape[0], x.shape[2], A.shape[1])
    walk = _Walk.of(x, A, kind, cut, width)

    def body(
        x_g,
        delta_g,
        b_g,
        c_g,
        kind_g,
        rates_g,
        state_g,
        y_g,
        final_g,
        starts_g,
        *,
        x_s,
        delta_s,
        b_s,
        c_s,
        kind_s,
        rates_s,
        rows_s,
        full,
        ready,
    ):
        def fetch(chunk, slot):
            walk.load_chunk([x_g, delta_g], [x_s, delta_s], chunk, slot, full)
            walk.load_columns([b_g, c_g], [b_s, c_s], chunk, slot, full)
            walk.load_kinds(kind_g, kind_s, chunk, slot, full)

        def group(chunk, slot, j, h):
            for i in range(_GROUP):
                t = j * _GROUP + i
                step, write, bias = walk.token(x_s, delta_s, kind_s, chunk, slot, t)
                h = _decay(step, rates, bias) * h + walk.of_channels(write) * walk.of_states(b_s, slot, j, i)
                x_s[slot, t] = jnp.sum(h * walk.of_states(c_s, slot, j, i), 1).astype(x_s.dtype)
            return h

        def step(i, h):
            chunk, slot = walk.first + i, lax.rem(i, walk.stages)
            plgpu.barrier_wait(full.at[slot])
            if emit:
                walk.store_states(h, rows_s, starts_g.at[walk.row, chunk])
            h = lax.fori_loop(0, walk.groups, lambda j, h: group(chunk, slot, j, h), h)
            plgpu.commit_smem()
            walk.store_chunk(x_s, y_g, chunk, slot)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(i + walk.stages < trips)
            def _refill():
                fetch(chunk + walk.stages, slot)

            return h

        trips = walk.trips
        lax.fori_loop(0, walk.stages, lambda i, _: fetch(walk.first + i, i), None)
        walk.load_states([rates_g, state_g.at[walk.place]], [rates_s, rows_s], ready)
        rates = _load(rates_s, layout=_TILE)
        h = lax.fori_loop(0, trips, step, _load(rows_s, layout=_TILE))
        walk.store_states(h, rows_s, final_g.at[walk.place])
        plgpu.wait_smem_to_gmem(0)

    y, final, starts = walk.call(
        body,
        "forward",
        inputs=(
            x,
            delta,
            walk.column(B, kind),
            walk.column(C, kind),
            walk.kinds(kind),
            walk.rates(A),
            walk.state(state),
        ),
        outputs=(walk.tokens_type(x.dtype), walk.states_type(), walk.starts_type() if emit else None),
        scratch={
            "x_s": walk.slots(x.dtype),
            "delta_s": walk.slots(delta.dtype),
            "b_s": walk.column_slots(),
            "c_s": walk.column_slots(),
            "kind_s": walk.kind_slots(),
            "rates_s": walk.states_scratch(),
            "rows_s": walk.states_scratch(),
            "full": plgpu.Barrier(num_arrivals=4 + walk.typed, num_barriers=walk.stages),
            "ready": plgpu.Barrier(num_arrivals=2),
        },
        operations=7,
        exponentials=1,
    )
    return walk.cut(y), walk.unstate(final), starts


def carried(
    values: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    columns: jax.Array,
    kind: jax.Array | None,
    *,
    cut: Parts,
    reverse: bool,
) -> tuple[jax.Array, jax.Array]:
    r"""What parts add to the state that is carried through them, and by how much delta it decays on the way.

    Forward: the state after a part, from 0 before it, for all parts but the last, :math:`h_t = a_t h_{t-1} + \Delta_t x_t B_t`. In ``reverse``: the
    cotangent of the state before a part, from 0 after it, for all parts but the first, :math:`\mu_{t-1} = a_t (\mu_t + dy_t C_t)`. The same
    operations in another order.

    Args:
        values: [B, T, D], x or dy.
        delta: [B, T, D].
        A: [D, N].
        columns: [B, T, N], B or C.
        kind: [B, T] int32 or None.
        cut: of rows in P parts.
        reverse: from the end to the beginning.

    Returns:
        (states [B (P - 1), D, N], sums of delta [B (P - 1), D]), float32.
    """
    walk = dataclasses.replace(
        _Walk.of(delta, A, kind, cut, _WARPGROUP), walked=cut.count - 1, skipped=1 if reverse else 0
    )

    def body(
        x_g, delta_g, b_g, kind_g, rates_g, state_g, total_g, *, x_s, delta_s, b_s, kind_s, rows_s, total_s, full, ready
    ):
        def chunk_of(i):
            return walk.first + (trips - 1 - i if reverse else i)

        def fetch(i, slot):
            chunk = chunk_of(i)
            walk.load_chunk([x_g, delta_g], [x_s, delta_s], chunk, slot, full)
            walk.load_columns([b_g], [b_s], chunk, slot, full)
            walk.load_kinds(kind_g, kind_s, chunk, slot, full)

        def group(chunk, slot, j, carry):
            h, total = carry
            for i in reversed(range(_GROUP)) if reverse else range(_GROUP):
                t = j * _GROUP + i
                step, write, bias = walk.token(x_s, delta_s, kind_s, chunk, slot, t)
                total = total + step
                if reverse:
                    write = _where(walk.real(kind_s, chunk, slot, t), _vector(x_s, slot, t))
                decay = _decay(step, rates, bias)
                more = walk.of_channels(write) * walk.of_states(b_s, slot, j, i)
                h = decay * (h + more) if reverse else decay * h + more
            return h, total

        def step(i, carry):
            slot = lax.rem(i, walk.stages)
            plgpu.barrier_wait(full.at[slot])

            def some(j, carry):
                return group(chunk_of(i), slot, walk.groups - 1 - j if reverse else j, carry)

            carry = lax.fori_loop(0, walk.groups, some, carry)
            plgpu.commit_smem()

            @pl.when(i + walk.stages < trips)
            def _refill():
                fetch(i + walk.stages, slot)

            return carry

        trips = walk.trips
        lax.fori_loop(0, walk.stages, lambda i, _: fetch(i, i), None)
        walk.load_states([rates_g], [rows_s], ready)
        rates = _load(rows_s, layout=_TILE)
        none = plgpu.layout_cast(jnp.zeros((walk.width,), jnp.float32), _CHANNELS)
        h, total = lax.fori_loop(0, trips, step, (walk.zero(), none))
        total_s[...] = total
        walk.store_states(h, rows_s, state_g.at[walk.place])
        plgpu.copy_smem_to_gmem(total_s, total_g.at[walk.place, walk.columns])
        plgpu.wait_smem_to_gmem(0)

    state, total = walk.call(
        body,
        "backward_carried" if reverse else "forward_carried",
        inputs=(values, delta, walk.column(columns, kind), walk.kinds(kind), walk.rates(A)),
        outputs=(walk.states_type(), walk.totals_type()),
        scratch={
            "x_s": walk.slots(values.dtype),
            "delta_s": walk.slots(delta.dtype),
            "b_s": walk.column_slots(),
            "kind_s": walk.kind_slots(),
            "rows_s": walk.states_scratch(),
            "total_s": plgpu.SMEM((walk.width,), jnp.float32),
            "full": plgpu.Barrier(num_arrivals=3 + walk.typed, num_barriers=walk.stages),
            "ready": plgpu.Barrier(),
        },
        operations=4,
        exponentials=1,
    )
    return walk.unstate(state), total[:, : walk.channels]


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
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    r"""Cotangents of x, delta, A, B, C and the states before all parts from those of y and the states after them.

    With :math:`\lambda_t = C_t dy_t + \mu_t`, :math:`\mu_{t-1} = a_t \lambda_t` and :math:`g_t = \mu_{t-1} h_{t-1}`:
    ddelta = :math:`\sum_n (g A + \lambda B x)`, dx = delta :math:`\sum_n \lambda B`, dA = :math:`\sum_t` delta g, dB = :math:`\sum_d \lambda` delta x,
    dC = :math:`\sum_d` h dy.

    Args:
        x, delta, A, B, C, kind, cut: as for ``forward``.
        starts: its states before the chunks.
        dy: [B, T, D], not read at padding.
        dfinal: [B P, D, N].

    Returns:
        in the dtypes of x and delta, else float32.
    """
    # One block hides the copies of another one: a second slot would leave no room for it.
    walk = dataclasses.replace(_Walk.of(x, A, kind, cut, _WARPGROUP), most=1)
    terms = 2 if jnp.float32 in (B.dtype, C.dtype) else 1

    def body(
        x_g,
        delta_g,
        dy_g,
        b_g,
        c_g,
        kind_g,
        starts_g,
        rates_g,
        dfinal_g,
        ones_g,
        dx_g,
        ddelta_g,
        db_g,
        dc_g,
        drates_g,
        dstate_g,
        *,
        x_s,
        delta_s,
        dy_s,
        b_s,
        c_s,
        kind_s,
        groups_s,
        rates_s,
        products_s,
        ones_s,
        full,
        ready,
    ):
        def rates():
            return held if rates_s is None else _load(rates_s, layout=_TILE)

        def fetch(chunk):
            walk.load_chunk([x_g, delta_g, dy_g], [x_s, delta_s, dy_s], chunk, 0, full)
            walk.load_columns([b_g, c_g], [b_s, c_s], chunk, 0, full)
            walk.load_kinds(kind_g, kind_s, chunk, 0, full)
            plgpu.copy_gmem_to_smem(starts_g.at[walk.row, chunk, walk.columns], groups_s.at[0], full.at[0])

        def cotangent(chunk, t):
            return _where(walk.real(kind_s, chunk, 0, t), _vector(dy_s, 0, t))

        def forth(chunk, j, h):
            """States before and after the tokens of a group, and their decays."""
            before, decays = [h], []
            for i in range(_GROUP):
                step, write, bias = walk.token(x_s, delta_s, kind_s, chunk, 0, j * _GROUP + i)
                decays.append(_decay(step, rates(), bias))
                before.append(decays[-1] * before[-1] + walk.of_channels(write) * walk.of_states(b_s, 0, j, i))
            return before, decays

        def keep(chunk, j, h):
            h = forth(chunk, j, h)[0][-1]
            groups_s[j + 1] = h
            return h

        def add_up(i, product):
            """Leave the products of a token for their sum over channels, in terms of bfloat16."""
            for term in range(terms):
                # The upper half of a float32 is a bfloat16.
                part = product if term == terms - 1 else _upper(product)
                products_s[term, :, pl.ds(i * _DEPTH, _DEPTH)] = plgpu.layout_cast(part.astype(jnp.bfloat16), _HALVES)
                product = product - part

        def sums():
            """Of the products of a group."""
            plgpu.commit_smem()
            found = _sums(products_s, ones_s)
            plgpu.commit_smem()  # every warp has read all products
            return found

        def back(chunk, j, carry):
            mu, d_rates = carry
            first = j * _GROUP
            h, decays = forth(chunk, j, _load(groups_s.at[j], layout=_TILE))
            for i in range(_GROUP):
                add_up(i, h[i + 1] * walk.of_channels(cotangent(chunk, first + i)))
            from_read = sums()
            for i in reversed(range(_GROUP)):
                t = first + i
                step, write, _ = walk.token(x_s, delta_s, kind_s, chunk, 0, t)
                lam = mu + walk.of_channels(cotangent(chunk, t)) * walk.of_states(c_s, 0, j, i)
                add_up(i, lam * walk.of_channels(write))
                mu = decays[i] * lam
                # The first state is read again: registers are short.
                g = mu * (h[i] if i else _load(groups_s.at[j], layout=_TILE))
                d_rates = d_rates + walk.of_channels(step) * g
                from_write = jnp.sum(lam * walk.of_states(b_s, 0, j, i), 1)
                from_decay = jnp.sum(g * rates(), 1)
                # Exponents and A are in base 2 here.
                ddelta = math.log(2) * from_decay + _vector(x_s, 0, t) * from_write
                delta_s[0, t] = _where(walk.real(kind_s, chunk, 0, t), ddelta).astype(delta_s.dtype)
                x_s[0, t] = (step * from_write).astype(x_s.dtype)
            c_s[0, j], b_s[0, j] = from_read, sums()
            return mu, d_rates

        def step(i, carry):
            chunk = walk.first + trips - 1 - i
            fetch(chunk)
            plgpu.barrier_wait(full.at[0])
            lax.fori_loop(0, walk.groups - 1, lambda j, h: keep(chunk, j, h), _load(groups_s.at[0], layout=_TILE))
            carry = lax.fori_loop(0, walk.groups, lambda j, carry: back(chunk, walk.groups - 1 - j, carry), carry)
            plgpu.commit_smem()
            walk.store_chunk(x_s, dx_g, chunk, 0)
            walk.store_chunk(delta_s, ddelta_g, chunk, 0)
            for source, target in ((b_s, db_g), (c_s, dc_g)):
                target = target.at[walk.row, lax.axis_index(_GRID[1])]
                plgpu.copy_smem_to_gmem(source.at[0], target.at[pl.ds(chunk * _LINES, _LINES)])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            return carry

        trips = walk.trips
        plgpu.copy_gmem_to_smem(ones_g, ones_s, ready)
        walk.load_states([rates_g, dfinal_g.at[walk.place]], [groups_s.at[0], groups_s.at[1]], ready)
        held, mu = (_load(groups_s.at[i], layout=_TILE) for i in range(2))
        if rates_s is not None:
            rates_s[...] = held
        plgpu.commit_smem()
        mu, d_rates = lax.fori_loop(0, trips, step, (mu, walk.zero()))
        walk.store_states(mu, groups_s.at[0], dstate_g.at[walk.place])
        walk.store_states(d_rates, groups_s.at[1], drates_g.at[walk.place])
        plgpu.wait_smem_to_gmem(0)

    dx, ddelta, dB, dC, drates, dstate = walk.call(
        body,
        "backward",
        inputs=(
            *(x, delta, dy, walk.column(B, kind), walk.column(C, kind), walk.kinds(kind), starts, walk.rates(A)),
            *(walk.state(dfinal), jnp.ones((8, _WARPGROUP), jnp.bfloat16)),
        ),
        outputs=(
            *(walk.tokens_type(x.dtype), walk.tokens_type(delta.dtype), walk.sums_type(), walk.sums_type()),
            *(walk.states_type(), walk.states_type()),
        ),
        scratch={
            "x_s": walk.slots(x.dtype),
            "delta_s": walk.slots(delta.dtype),
            "dy_s": walk.slots(dy.dtype),
            "b_s": walk.column_slots(),
            "c_s": walk.column_slots(),
            "kind_s": walk.kind_slots(),
            # Before and after the walk, A and the states' cotangents pass through the first two.
            "groups_s": _tiles(max(2, walk.groups), walk.width, _DEPTH, dtype=jnp.float32),
            # Two terms need the registers that A would lie in.
            "rates_s": walk.states_scratch() if terms == 2 else None,
            "products_s": _tiles(terms, walk.width, _LINE, dtype=jnp.bfloat16),
            "ones_s": _tiles(8, walk.width, dtype=jnp.bfloat16),
            "full": plgpu.Barrier(num_arrivals=6 + walk.typed, num_barriers=1),
            "ready": plgpu.Barrier(num_arrivals=3),
        },
        operations=22,
        exponentials=2,
    )
    return (
        *(walk.cut(dx), walk.cut(ddelta), jnp.sum(walk.unstate(drates), 0), walk.uncolumn(dB), walk.uncolumn(dC)),
        walk.unstate(dstate),
    )


@dataclasses.dataclass(frozen=True)
class _Walk:
    """A thread block's way through a part of a row: shapes outside the kernel, copies within it."""

    batch: int
    time: int
    channels: int
    states: int
    width: int
    typed: bool
    parts: int = 1
    length: int = 0
    """Chunks of a part but the last, which has the rest; not read of whole rows."""
    walked: int = 1
    """Parts of a row that are walked, from ``skipped`` on."""
    skipped: int = 0
    most: int = _STAGES
    """Slots at most."""

    @classmethod
    def of(cls, x: jax.Array, A: jax.Array, kind: jax.Array | None, cut: Parts | None, width: int) -> "_Walk":
        """Through all parts of ``cut`` rows."""
        whole = cls(*x.shape, A.shape[1], width, typed=kind is not None)
        if cut is None:
            return whole
        return dataclasses.replace(whole, parts=cut.count, length=cut.length // _CHUNK, walked=cut.count)

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.time, _CHUNK)

    @property
    def groups(self) -> int:
        """Groups of tokens walked per chunk: a row that is shorter than a chunk leaves out the rest."""
        return pl.cdiv(min(self.time, _CHUNK), _GROUP)

    @property
    def rest(self) -> int:
        """Chunks of the last part."""
        return self.chunks - (self.parts - 1) * self.length

    @property
    def stages(self) -> int:
        return min(self.most, self.rest)

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.channels, self.width)

    def column(self, a: jax.Array, kind: jax.Array | None) -> jax.Array:
        """[B, T, N] -> [B, lines of the groups of whole chunks, 64] in float32, 0 at padding."""
        a = a.astype(jnp.float32)
        if kind is not None:
            a = jnp.where((kind != PADDING)[..., None], a, 0.0)
        a = jnp.pad(a, ((0, 0), (0, self.chunks * _CHUNK - self.time), (0, _DEPTH - self.states)))
        return a.reshape(self.batch, -1, _LINE)

    def uncolumn(self, sums: jax.Array) -> jax.Array:
        """From those of blocks of channels [B, blocks, lines, 64]."""
        return jnp.sum(sums, 1).reshape(self.batch, -1, _DEPTH)[:, : self.time, : self.states]

    def kinds(self, kind: jax.Array | None) -> jax.Array | None:
        if kind is None:
            return None
        extra = self.chunks * _CHUNK - self.time
        return jnp.pad(kind.astype(jnp.int32), ((0, 0), (0, extra)), constant_values=PADDING)

    def state(self, s: jax.Array) -> jax.Array:
        """[..., D, N] in float32, with zeros for channels and states that are not there."""
        lead = [(0, 0)] * (s.ndim - 2)
        more = [(0, self.blocks * self.width - self.channels), (0, _DEPTH - self.states)]
        return jnp.pad(s.astype(jnp.float32), [*lead, *more])

    def unstate(self, s: jax.Array) -> jax.Array:
        return s[..., : self.channels, : self.states]

    def rates(self, A: jax.Array) -> jax.Array:
        """A in base 2."""
        return self.state(A.astype(jnp.float32) * math.log2(math.e))

    def cut(self, tokens: jax.Array) -> jax.Array:
        return tokens[:, : self.time, : self.channels]

    def tokens_type(self, dtype) -> jax.ShapeDtypeStruct:
        """Whole chunks and blocks, so that no store has to be clipped."""
        return jax.ShapeDtypeStruct((self.batch, self.chunks * _CHUNK, self.blocks * self.width), dtype)

    def states_type(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch * self.walked, self.blocks * self.width, _DEPTH), jnp.float32)

    def totals_type(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch * self.walked, self.blocks * self.width), jnp.float32)

    def starts_type(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch, self.chunks, self.blocks * self.width, _DEPTH), jnp.float32)

    def sums_type(self) -> jax.ShapeDtypeStruct:
        """Sums over the channels of a block."""
        return jax.ShapeDtypeStruct((self.batch, self.blocks, self.chunks * _LINES, _LINE), jnp.float32)

    def slots(self, dtype):
        return plgpu.SMEM((self.stages, _CHUNK, self.width), dtype)

    def column_slots(self):
        return plgpu.SMEM((self.stages, _LINES, _LINE), jnp.float32)

    def kind_slots(self):
        return plgpu.SMEM((self.stages, _CHUNK), jnp.int32) if self.typed else None

    def states_scratch(self):
        return _tiles(self.width, _DEPTH, dtype=jnp.float32)

    def call(self, body: Callable, name: str, *, inputs, outputs, scratch, operations: int, exponentials: int):
        size = self.batch * self.time * self.channels * self.states * self.walked // self.parts
        moved = jax.tree.leaves((inputs, outputs))
        cost = pl.CostEstimate(
            flops=operations * size,
            transcendentals=exponentials * size,
            bytes_accessed=sum(math.prod(a.shape) * a.dtype.itemsize for a in moved),
        )
        options: dict[str, Any] = {
            "out_type": outputs,
            "grid": (self.batch * self.walked, self.blocks),
            "grid_names": _GRID,
            "scratch_types": scratch,
            # Pallas puts a barrier before and after every store to shared memory. Here a thread meets only its own channels there;
            # where threads do exchange numbers, and before TMA reads or refills, there is a `commit_smem`.
            "compiler_params": plgpu.CompilerParams(
                approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
            ),
            "kernel_name": f"selective_scan_{name}_n{_DEPTH}_d{self.width}",
            **_gpu.costs(cost),
        }
        return plgpu.kernel(body, **options)(*inputs)

    @property
    def place(self):
        """Of a part among all of all rows."""
        return lax.axis_index(_GRID[0])

    @property
    def row(self):
        return self.place // self.walked

    @property
    def part(self):
        return self.skipped + self.place % self.walked

    @property
    def first(self):
        """Chunk with which the part begins."""
        return self.part * self.length

    @property
    def trips(self):
        """Chunks of the part."""
        if self.rest == self.length or self.parts == 1:
            return self.rest
        return jnp.where(self.part == self.parts - 1, self.rest, self.length)

    @property
    def columns(self):
        return pl.ds(lax.axis_index(_GRID[1]) * self.width, self.width)

    def load_chunk(self, sources, targets, chunk, slot, full):
        """Start copies of [chunk, width]; what is read past the end is not used."""
        tokens = pl.ds(chunk * _CHUNK, _CHUNK)
        for source, target in zip(sources, targets):
            plgpu.copy_gmem_to_smem(source.at[self.row, tokens, self.columns], target.at[slot], full.at[slot])

    def load_columns(self, sources, targets, chunk, slot, full):
        for source, target in zip(sources, targets):
            plgpu.copy_gmem_to_smem(source.at[self.row, pl.ds(chunk * _LINES, _LINES)], target.at[slot], full.at[slot])

    def load_kinds(self, source, target, chunk, slot, full):
        if self.typed:
            tokens = pl.ds(chunk * _CHUNK, _CHUNK)
            plgpu.copy_gmem_to_smem(source.at[self.row, tokens], target.at[slot], full.at[slot])

    def load_states(self, sources, targets, ready):
        """Copy [width, N] of arrays [D, N] and wait."""
        for source, target in zip(sources, targets):
            plgpu.copy_gmem_to_smem(source.at[self.columns], target, ready)
        plgpu.barrier_wait(ready)

    def store_chunk(self, source, target, chunk, slot):
        tokens = pl.ds(chunk * _CHUNK, _CHUNK)
        plgpu.copy_smem_to_gmem(source.at[slot], target.at[self.row, tokens, self.columns])

    def store_states(self, values, scratch, target):
        """Start a copy to [width, N] of an array [D, N]; earlier stores have read ``scratch``."""
        scratch[...] = values
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch, target.at[self.columns])

    def zero(self):
        """[width, N] of zeros."""
        return plgpu.layout_cast(jnp.zeros((self.width, _DEPTH), jnp.float32), _TILE)

    def of_channels(self, vector):
        """[width] -> [width, N]."""
        return plgpu.layout_cast(lax.broadcast_in_dim(vector, (self.width, _DEPTH), (0,)), _TILE)

    def of_states(self, columns, slot, group, i):
        """B or C of token i of a group -> [width, N]."""
        vector = _load(columns.at[slot, group, pl.ds(i * _DEPTH, _DEPTH)], layout=_STATES, optimized=False)
        return plgpu.layout_cast(lax.broadcast_in_dim(vector, (self.width, _DEPTH), (1,)), _TILE)

    def real(self, kinds, chunk, slot, t):
        """Whether a token is not padding; None where the sizes say so of all."""
        if self.typed:
            return kinds[slot, t] != PADDING
        return chunk * _CHUNK + t < self.time if self.time % _CHUNK else None

    def token(self, x, delta, kinds, chunk, slot, t):
        """delta and delta x, both 0 at padding, and the summand of the exponents."""
        real = self.real(kinds, chunk, slot, t)
        step = _where(real, _vector(delta, slot, t))
        write = _where(real, step * _vector(x, slot, t))
        bias = jnp.where(kinds[slot, t] == START, _RESET, 0.0) if self.typed else None
        return step, write, bias


def _tiles(*shape: int, dtype):
    """Shared memory for rows of all states, swizzled."""
    return _gpu.tiles(*shape, dtype=dtype, swizzle=_DEPTH * jnp.dtype(dtype).itemsize)


def _vector(tokens, slot, t):
    """A number of every channel."""
    return _load(tokens.at[slot, t], layout=_CHANNELS, optimized=False).astype(jnp.float32)


def _upper(x):
    """With zeros for the lower half of its bits."""
    bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _where(flag, value):
    return value if flag is None else jnp.where(flag, value, 0.0)


def _decay(step, rates, bias):
    exponent = plgpu.layout_cast(lax.broadcast_in_dim(step, rates.shape, (0,)), _TILE) * rates
    return jnp.exp2(exponent if bias is None else exponent + bias)


def _sums(products, ones) -> jax.Array:
    """Of [terms, 128, 64] over terms and channels [64], which eight equal columns of a product are."""

    def multiply(sums):
        for term in range(products.shape[0]):
            plgpu.wgmma(sums, products.at[term].T, ones.T)
        return sums[...]

    return jnp.max(pl.run_scoped(multiply, plgpu.ACC((_LINE, ones.shape[0]), jnp.float32)), 1)
