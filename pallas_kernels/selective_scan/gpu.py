r"""Selective scan on Hopper GPUs, forward and backward, for Pallas' Mosaic GPU lowering.

.. math:: h_t = e^{\Delta_t A} \circ h_{t-1} + (\Delta_t x_t)\, B_t^\top, \qquad y_t = h_t C_t

**Bounds.** An SM has 16 exponentials per clock and a channel needs N = 16 per token: one clock per token and channel, against 0.3
clocks for the 6 bytes of x, delta and y in bfloat16 (4.8 TB/s, 132 SMs, 1.75 GHz). So the forward pass is bound by the special function
unit, and the products, five per state, are close behind. The backward pass takes every exponential twice.

**Dataflow.** The grid is (batch, channel blocks). One warpgroup walks a whole row; a thread owns one channel, or two in the forward pass,
and keeps their N states in registers, so threads exchange nothing but the sums over channels. B_t and C_t are scalars from shared memory.
Time is cut into chunks, which TMA brings into slots of shared memory; y takes the place of x there, dx and ddelta that of x and delta.

**Backward.** The forward pass leaves the states before chunks. A chunk is walked forward once for the states before groups of tokens, which
fit in shared memory, then backward by groups; a group's states and decays are made again in registers. dB and dC are sums over
channels: threads write their products to shared memory, where another layout, with rows over threads, sums the rows. Each channel block
writes its own sums; XLA adds them.

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
from pallas_kernels._tokens import PADDING, START

# Axes of the grid; a mesh or vmap axis around the kernel must not have the same name.
_GRID = ("selective_scan_row", "selective_scan_channels")
_WARPGROUP = 128
_SMS = 132
_CHUNK = 32  # tokens
_STAGES = 2
_GROUP = 4  # tokens whose work is interleaved, and between kept states backward
_RESET = -1e30  # summand of the exponent: decay 0
_ROWS, _PAD = 64, 132  # products summed at a time, and their channels with a pad that spreads rows over banks
_PIECE = 8

_load: Any = plgpu.load  # jax 0.10, for which there is no kernel, wants an index


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
    emit: bool,
    width: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Outputs, final state and, with ``emit``, the states before the chunks, which ``backward`` needs.

    Args:
        x, delta: [B, T, D], D a multiple of 8.
        A: [D, N].
        B, C: [B, T, N].
        state: [B, D, N].
        kind: [B, T] int32 or None.
        emit: return the states before the chunks.
        width: channels per thread block, 128 or 256; None for ``default_width``.

    Returns:
        (y [B, T, D] in x's dtype, final state [B, D, N] float32, states before the chunks or None).
    """
    walk = _Walk(*x.shape, A.shape[1], width or default_width(x.shape[0], x.shape[2], A.shape[1]), kind is not None)
    states = range(walk.depth)

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

        def group(chunk, slot, first, h):
            h = list(h)
            for t in [first + i for i in range(_GROUP)]:
                step, write, bias = walk.token(x_s, delta_s, kind_s, chunk, slot, t)
                y: Any = None
                for n in states:
                    h[n] = _decay(step, rates[n], bias) * h[n] + write * b_s[slot, t, n]
                    read = h[n] * c_s[slot, t, n]
                    y = read if y is None else y + read
                x_s[slot, t] = y.astype(x_s.dtype)
            return tuple(h)

        def step(i, h):
            slot = lax.rem(i, walk.stages)
            plgpu.barrier_wait(full.at[slot])
            if emit:
                walk.store_states(h, rows_s, starts_g.at[walk.row, i])
            h = lax.fori_loop(0, walk.groups, lambda j, h: group(i, slot, j * _GROUP, h), h)
            plgpu.commit_smem()
            walk.store_chunk(x_s, y_g, i, slot)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(i + walk.stages < walk.chunks)
            def _refill():
                fetch(i + walk.stages, slot)

            return h

        lax.fori_loop(0, walk.stages, lambda i, _: fetch(i, i), None)
        walk.load_states([rates_g, state_g.at[walk.row]], [rates_s, rows_s], ready)
        rates = [rates_s[n] for n in states]
        h = lax.fori_loop(0, walk.chunks, step, tuple(rows_s[n] for n in states))
        walk.store_states(h, rows_s, final_g.at[walk.row])
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
        exponentials=1,
    )
    return walk.cut(y), walk.unstate(final), starts


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
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    r"""Cotangents of x, delta, A, B, C and the state from those of y and the final state.

    With :math:`\lambda_t = C_t dy_t + \mu_t`, :math:`\mu_{t-1} = a_t \lambda_t` and :math:`g_t = \mu_{t-1} h_{t-1}`:
    ddelta = :math:`\sum_n (g A + \lambda B x)`, dx = delta :math:`\sum_n \lambda B`, dA = :math:`\sum_t` delta g, dB = :math:`\sum_d \lambda` delta x,
    dC = :math:`\sum_d` h dy.

    Args:
        x, delta, A, B, C, kind: as for ``forward``.
        starts: its states before the chunks.
        dy: [B, T, D], not read at padding.
        dfinal: [B, D, N].

    Returns:
        in the dtypes of x and delta, else float32.
    """
    walk = _Walk(*x.shape, A.shape[1], _WARPGROUP, kind is not None)
    states, depth = range(walk.depth), walk.depth
    together = _ROWS // (2 * depth)  # tokens whose products are summed at a time

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
        dx_g,
        ddelta_g,
        sums_g,
        drates_g,
        dstate_g,
        *,
        x_s,
        delta_s,
        dy_s,
        b_s,
        c_s,
        kind_s,
        starts_s,
        groups_s,
        products_s,
        sums_s,
        full,
        ready,
    ):
        def fetch(chunk, slot):
            walk.load_chunk([x_g, delta_g, dy_g], [x_s, delta_s, dy_s], chunk, slot, full)
            walk.load_columns([b_g, c_g], [b_s, c_s], chunk, slot, full)
            walk.load_kinds(kind_g, kind_s, chunk, slot, full)
            plgpu.copy_gmem_to_smem(starts_g.at[walk.row, chunk, :, walk.columns], starts_s.at[slot], full.at[slot])

        def forth(chunk, slot, first, h):
            """States before and after the tokens of a group, and their decays."""
            before, decays = [tuple(h)], []
            for t in [first + i for i in range(_GROUP)]:
                step, write, bias = walk.token(x_s, delta_s, kind_s, chunk, slot, t)
                decays.append([_decay(step, rates[n], bias) for n in states])
                before.append(tuple(decays[-1][n] * before[-1][n] + write * b_s[slot, t, n] for n in states))
            return before, decays

        def keep(chunk, slot, j, h):
            for n in states:
                groups_s[j, n] = h[n]
            return forth(chunk, slot, j * _GROUP, h)[0][-1]

        def back(chunk, slot, j, carry):
            mu, d_rates = list(carry[:depth]), list(carry[depth:])
            first = j * _GROUP
            h, decays = forth(chunk, slot, first, [groups_s[j, n] for n in states])
            for i in reversed(range(_GROUP)):
                t, line = first + i, (i % together) * 2 * depth
                step, write, _ = walk.token(x_s, delta_s, kind_s, chunk, slot, t)
                real = walk.real(kind_s, chunk, slot, t)
                dy = _where(real, dy_s[slot, t].astype(jnp.float32))
                from_decay: Any = None
                from_write: Any = None
                for n in states:
                    lam = mu[n] + dy * c_s[slot, t, n]
                    products_s[line + n, pl.ds(0, walk.width)] = lam * write
                    products_s[line + depth + n, pl.ds(0, walk.width)] = h[i + 1][n] * dy
                    mu[n] = decays[i][n] * lam
                    g = mu[n] * h[i][n]
                    d_rates[n] = d_rates[n] + step * g
                    g, lam = g * rates[n], lam * b_s[slot, t, n]
                    from_decay = g if from_decay is None else from_decay + g
                    from_write = lam if from_write is None else from_write + lam
                value = x_s[slot, t].astype(jnp.float32)
                # Exponents and A are in base 2 here.
                delta_s[slot, t] = _where(real, math.log(2) * from_decay + value * from_write).astype(delta_s.dtype)
                x_s[slot, t] = (step * from_write).astype(x_s.dtype)
                if i % together == 0:
                    plgpu.commit_smem()
                    sums_s[t // together] = _row_sums(products_s)
                    plgpu.commit_smem()
            return (*mu, *d_rates)

        def step(i, carry):
            chunk, slot = walk.chunks - 1 - i, lax.rem(i, walk.stages)
            plgpu.barrier_wait(full.at[slot])
            h = tuple(starts_s[slot, n] for n in states)
            lax.fori_loop(0, walk.groups, lambda j, h: keep(chunk, slot, j, h), h)
            carry = lax.fori_loop(0, walk.groups, lambda j, carry: back(chunk, slot, walk.groups - 1 - j, carry), carry)
            plgpu.commit_smem()
            walk.store_chunk(x_s, dx_g, chunk, slot)
            walk.store_chunk(delta_s, ddelta_g, chunk, slot)
            lines = pl.ds(chunk * (_CHUNK // together), _CHUNK // together)
            plgpu.copy_smem_to_gmem(sums_s, sums_g.at[walk.row, lax.axis_index(_GRID[1]), lines])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(i + walk.stages < walk.chunks)
            def _refill():
                fetch(chunk - walk.stages, slot)

            return carry

        lax.fori_loop(0, walk.stages, lambda i, _: fetch(walk.chunks - 1 - i, i), None)
        walk.load_states([rates_g, dfinal_g.at[walk.row]], [groups_s.at[0], groups_s.at[1]], ready)
        rates, mu = ([groups_s[i, n] for n in states] for i in range(2))
        carry = lax.fori_loop(0, walk.chunks, step, (*mu, *[walk.zero()] * depth))
        walk.store_states(carry[:depth], groups_s.at[0], dstate_g.at[walk.row])
        walk.store_states(carry[depth:], groups_s.at[1], drates_g.at[walk.row])
        plgpu.wait_smem_to_gmem(0)

    dx, ddelta, sums, drates, dstate = walk.call(
        body,
        "backward",
        inputs=(
            *(x, delta, dy, walk.column(B, kind), walk.column(C, kind), walk.kinds(kind), starts, walk.rates(A)),
            walk.state(dfinal),
        ),
        outputs=(
            *(walk.tokens_type(x.dtype), walk.tokens_type(delta.dtype), walk.sums_type(), walk.states_type()),
            walk.states_type(),
        ),
        scratch={
            "x_s": walk.slots(x.dtype),
            "delta_s": walk.slots(delta.dtype),
            "dy_s": walk.slots(dy.dtype),
            "b_s": walk.column_slots(),
            "c_s": walk.column_slots(),
            "kind_s": walk.kind_slots(),
            "starts_s": plgpu.SMEM((walk.stages, depth, walk.width), jnp.float32),
            # Before and after the walk, A and the states' cotangents pass through the first two.
            "groups_s": plgpu.SMEM((max(2, walk.groups), depth, walk.width), jnp.float32),
            "products_s": plgpu.SMEM((_ROWS, _PAD), jnp.float32),
            "sums_s": plgpu.SMEM((_CHUNK // together, _ROWS), jnp.float32),
            "full": plgpu.Barrier(num_arrivals=6 + walk.typed, num_barriers=walk.stages),
            "ready": plgpu.Barrier(num_arrivals=2),
        },
        exponentials=2,
    )
    sums = jnp.sum(sums, 1).reshape(walk.batch, -1, 2, depth)[:, : walk.time, :, : walk.states]
    return (
        *(walk.cut(dx), walk.cut(ddelta), jnp.sum(walk.unstate(drates), 0), sums[:, :, 0], sums[:, :, 1]),
        walk.unstate(dstate),
    )


@dataclasses.dataclass(frozen=True)
class _Walk:
    """A thread block's way through time: shapes outside the kernel, copies within it."""

    batch: int
    time: int
    channels: int
    states: int
    width: int
    typed: bool

    @property
    def depth(self) -> int:
        """States, with those that fill up the rows TMA copies."""
        return max(8, 1 << (self.states - 1).bit_length())

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.time, _CHUNK)

    @property
    def groups(self) -> int:
        """Groups of tokens walked per chunk: a row that is shorter than a chunk leaves out the rest."""
        return pl.cdiv(min(self.time, _CHUNK), _GROUP)

    @property
    def stages(self) -> int:
        return min(_STAGES, self.chunks)

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.channels, self.width)

    def column(self, a: jax.Array, kind: jax.Array | None) -> jax.Array:
        """[B, T, N] -> [B, whole chunks, N] in float32, 0 at padding."""
        a = a.astype(jnp.float32)
        if kind is not None:
            a = jnp.where((kind != PADDING)[..., None], a, 0.0)
        return jnp.pad(a, ((0, 0), (0, self.chunks * _CHUNK - self.time), (0, self.depth - self.states)))

    def kinds(self, kind: jax.Array | None) -> jax.Array | None:
        if kind is None:
            return None
        extra = self.chunks * _CHUNK - self.time
        return jnp.pad(kind.astype(jnp.int32), ((0, 0), (0, extra)), constant_values=PADDING)

    def state(self, s: jax.Array) -> jax.Array:
        """[..., D, N] -> [..., N, D] in float32, with zeros for channels and states that are not there."""
        s = s.astype(jnp.float32).swapaxes(-1, -2)
        lead = [(0, 0)] * (s.ndim - 2)
        return jnp.pad(s, [*lead, (0, self.depth - self.states), (0, self.blocks * self.width - self.channels)])

    def unstate(self, s: jax.Array) -> jax.Array:
        return s.swapaxes(-1, -2)[..., : self.channels, : self.states]

    def rates(self, A: jax.Array) -> jax.Array:
        """A in base 2."""
        return self.state(A.astype(jnp.float32) * math.log2(math.e))

    def cut(self, tokens: jax.Array) -> jax.Array:
        return tokens[:, : self.time, : self.channels]

    def tokens_type(self, dtype) -> jax.ShapeDtypeStruct:
        """Whole chunks and blocks, so that no store has to be clipped."""
        return jax.ShapeDtypeStruct((self.batch, self.chunks * _CHUNK, self.blocks * self.width), dtype)

    def states_type(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch, self.depth, self.blocks * self.width), jnp.float32)

    def starts_type(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch, self.chunks, self.depth, self.blocks * self.width), jnp.float32)

    def sums_type(self) -> jax.ShapeDtypeStruct:
        """Sums over the channels of a block, [dB, dC] of a token one after the other, in lines of 64."""
        lines = self.chunks * _CHUNK * 2 * self.depth // _ROWS
        return jax.ShapeDtypeStruct((self.batch, self.blocks, lines, _ROWS), jnp.float32)

    def slots(self, dtype):
        return plgpu.SMEM((self.stages, _CHUNK, self.width), dtype)

    def column_slots(self):
        return plgpu.SMEM((self.stages, _CHUNK, self.depth), jnp.float32)

    def kind_slots(self):
        return plgpu.SMEM((self.stages, _CHUNK), jnp.int32) if self.typed else None

    def states_scratch(self):
        return plgpu.SMEM((self.depth, self.width), jnp.float32)

    def call(self, body: Callable, name: str, *, inputs, outputs, scratch, exponentials: int):
        size = self.batch * self.time * self.channels * self.states
        moved = jax.tree.leaves((inputs, outputs))
        cost = pl.CostEstimate(
            flops=(7 if exponentials == 1 else 22) * size,
            transcendentals=exponentials * size,
            bytes_accessed=sum(math.prod(a.shape) * a.dtype.itemsize for a in moved),
        )
        options: dict[str, Any] = {
            "out_type": outputs,
            "grid": (self.batch, self.blocks),
            "grid_names": _GRID,
            "scratch_types": scratch,
            # Pallas puts a barrier before and after every store to shared memory. Here a thread meets only its own channels there;
            # where threads do exchange numbers, and before TMA reads or refills, there is a `commit_smem`.
            "compiler_params": plgpu.CompilerParams(
                approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
            ),
            "kernel_name": f"selective_scan_{name}_n{self.depth}_d{self.width}",
            **_gpu.costs(cost),
        }
        return plgpu.kernel(body, **options)(*inputs)

    @property
    def row(self):
        return lax.axis_index(_GRID[0])

    @property
    def columns(self):
        return pl.ds(lax.axis_index(_GRID[1]) * self.width, self.width)

    def load_chunk(self, sources, targets, chunk, slot, full):
        """Start copies of [chunk, width]; what is read past the end is not used."""
        tokens = pl.ds(chunk * _CHUNK, _CHUNK)
        for source, target in zip(sources, targets):
            plgpu.copy_gmem_to_smem(source.at[self.row, tokens, self.columns], target.at[slot], full.at[slot])

    def load_columns(self, sources, targets, chunk, slot, full):
        tokens = pl.ds(chunk * _CHUNK, _CHUNK)
        for source, target in zip(sources, targets):
            plgpu.copy_gmem_to_smem(source.at[self.row, tokens], target.at[slot], full.at[slot])

    def load_kinds(self, source, target, chunk, slot, full):
        if self.typed:
            tokens = pl.ds(chunk * _CHUNK, _CHUNK)
            plgpu.copy_gmem_to_smem(source.at[self.row, tokens], target.at[slot], full.at[slot])

    def load_states(self, sources, targets, ready):
        """Copy [N, width] of arrays [N, D] and wait."""
        for source, target in zip(sources, targets):
            plgpu.copy_gmem_to_smem(source.at[:, self.columns], target, ready)
        plgpu.barrier_wait(ready)

    def store_chunk(self, source, target, chunk, slot):
        tokens = pl.ds(chunk * _CHUNK, _CHUNK)
        plgpu.copy_smem_to_gmem(source.at[slot], target.at[self.row, tokens, self.columns])

    def store_states(self, values, scratch, target):
        """Start a copy to [N, width] of an array [N, D]; earlier stores have read ``scratch``."""
        for n, value in enumerate(values):
            scratch[n] = value
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch, target.at[:, self.columns])

    def zero(self):
        """Laid out over the threads as what is read from shared memory."""
        layout = plgpu.Layout.WG_STRIDED((self.width,), vec_size=self.width // _WARPGROUP)
        return plgpu.layout_cast(jnp.zeros((self.width,), jnp.float32), layout)

    def real(self, kinds, chunk, slot, t):
        """Whether a token is not padding; None where the sizes say so of all."""
        if self.typed:
            return kinds[slot, t] != PADDING
        return chunk * _CHUNK + t < self.time if self.time % _CHUNK else None

    def token(self, x, delta, kinds, chunk, slot, t):
        """delta and delta x, both 0 at padding, and the summand of the exponents."""
        real = self.real(kinds, chunk, slot, t)
        step = _where(real, delta[slot, t].astype(jnp.float32))
        write = _where(real, step * x[slot, t].astype(jnp.float32))
        bias = jnp.where(kinds[slot, t] == START, _RESET, 0.0) if self.typed else None
        return step, write, bias


def _where(flag, value):
    return value if flag is None else jnp.where(flag, value, 0.0)


def _decay(step, rate, bias):
    exponent = step * rate
    return jnp.exp2(exponent if bias is None else exponent + bias)


def _row_sums(products) -> jax.Array:
    """[64, 128] in shared memory to 64 sums: rows lie over threads here, a few columns at a time."""
    total = None
    for start in range(0, _WARPGROUP, _PIECE):
        piece = _load(products.at[:, pl.ds(start, _PIECE)], layout=plgpu.Layout.WGMMA, optimized=False)
        total = piece if total is None else total + piece
    return jnp.sum(total, 1)
