r"""Elementwise linear recurrence on Hopper GPUs, forward, backward and summaries of parts, for Pallas' Mosaic GPU lowering.

.. math:: h_t = a_t h_{t-1} + x_t

per channel and in float32, whatever the arrays hold; :math:`a_t = e^{gate_t}` with ``log=True`` and :math:`gate_t` without.

**Planes.** Operands are tuples: one real array, or two for the real and imaginary parts (``log=False`` only). Products in the
backward pass are ordinary complex products, because JAX's cotangents transpose without conjugation.

**Kinds.** ``kind [B, T]`` (int32) says what each token is: 1 is ordinary; 2 starts a document, so :math:`a_t = 0`; 0 is padding,
where :math:`a_t = 1` and :math:`x_t = 0`. They act by selection, never by multiplication: what padding holds, NaN included,
reaches nothing, nor does one document reach the next.

**Dataflow.** The grid is (batch, channel blocks). One warpgroup walks a whole row for ``Config.channels`` channels; each thread
owns one or two of them and keeps their state in registers, so threads never exchange numbers. Time is cut into blocks of
``Config.tokens``. TMA brings each into one of ``Config.stages`` slots of shared memory. A result has the dtype of an input
that is not needed after it (``h`` of ``x``, ``dgate`` of ``gate``, ``dx`` of ``dh``) and takes its place in the slot, from
where TMA stores it. So there are no output buffers; in exchange a slot is refilled one block late, once its store has been
read out.

**Shapes.** Rows are a multiple of 16 bytes (TMA): D is a multiple of 4 in float32, of 8 in bfloat16. T and B are any.

**Memory in flight.** The operation is bound by HBM, and an H200 needs some 4.8 TB/s x 0.8 us / 132 = 29 KB of loads under way
in every SM. A thread block keeps ``stages - 2`` to ``stages - 1`` slots of loads under way. At B=8, T=8192, D=4096 in bfloat16,
``default_config`` makes 256 blocks with 96 KiB of slots each, so two fit the 227 KiB of an SM (registers, 26 to 51 a thread,
would admit nine). Forward that is 6 slots of 16 KiB and 128 to 160 KiB under way per SM, backward 4 of 24 KiB and 96 to 144.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _configs, _gpu
from pallas_kernels._tokens import ORDINARY, PADDING, START

Planes = tuple[jax.Array, ...]

# Axes of the grid; a mesh or vmap axis around the kernel must not have the same name.
_GRID = ("linear_recurrence_row", "linear_recurrence_channels")

_WARPGROUP = 128
# Tokens read from shared memory together, ahead of the dependent chain through the state, to cover the latency of the reads.
_GROUP = 8
# What `default_config` plans for, on H100 and H200 alike: 4 blocks are 16 warps, enough to hide each other's latency.
_SMS = 132
_MAX_BLOCKS_PER_SM = 4
_SLOT_BYTES_PER_SM = 192 * 1024


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the pipeline: channels per thread block, tokens per stage, stages (slots of shared memory)."""

    channels: int
    tokens: int
    stages: int

    def __post_init__(self):
        if self.channels not in (_WARPGROUP, 2 * _WARPGROUP):
            raise ValueError(f"channels must be 128 or 256 (a TMA box spans at most 256), got {self.channels}")
        if self.tokens not in range(_GROUP, 257, _GROUP):
            raise ValueError(f"tokens must be a multiple of {_GROUP} and at most 256, got {self.tokens}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2 (slots are refilled one block late), got {self.stages}")


def default_config(batch: int, time: int, channels: int, itemsize: int, planes: int) -> Config:
    """Config that shares the memory of an SM among the thread blocks that run on it together.

    Blocks are narrow, because more of them then run at once. A stage costs a few barriers and the issue of its copies
    whatever its length, so stages are as long as leaves room for four, up to 32 tokens; the rest of the room makes more of
    them. ``_configs`` may know better.

    Args:
        batch: rows of the batch.
        time: tokens per row.
        channels: channels per token.
        itemsize: bytes per element of the widest array.
        planes: how many ``[B, T, D]`` planes are read: 2 forward and 3 backward, twice as many for complex numbers.
    """
    blocks = batch * pl.cdiv(channels, _WARPGROUP)
    resident = min(_MAX_BLOCKS_PER_SM, pl.cdiv(blocks, _SMS))
    room = _SLOT_BYTES_PER_SM // (resident * planes * _WARPGROUP * itemsize)  # in tokens
    better = _configs.tuned("linear_recurrence", planes=planes, itemsize=itemsize)
    tokens = better.get("tokens", next((n for n in (32, 16) if 4 * n <= room and n < 2 * time), _GROUP))
    return Config(_WARPGROUP, tokens, better.get("stages", max(3, min(8, room // tokens))))


def forward(
    gate: Planes,
    x: Planes,
    state: Planes,
    kind: jax.Array | None,
    *,
    log: bool,
    config: Config | None = None,
) -> tuple[Planes, Planes]:
    """States of all tokens.

    Args:
        gate: planes ``[B, T, D]`` of the decay or, with ``log``, the one plane of its logarithm (``-inf``: decay 0).
        x: planes ``[B, T, D]`` of the input.
        state: planes ``[B, D]`` of the state before the first token.
        kind: kinds of the tokens ``[B, T]``; None where all are ordinary.
        log: whether ``gate`` is a logarithm.
        config: sizes of the pipeline; by default ``default_config``.

    Returns:
        ``(h, final)``: planes ``[B, T, D]`` in the dtype of ``x`` and ``[B, D]`` in float32. At padding ``h`` is the state
        carried past it.
    """
    n = len(x)
    walk = _Walk.over((*gate, *x), config)

    def body(gate_g, x_g, state_g, kind_g, out_g, final_g, *, slots, rows, kinds, full, ready):
        gate_s, x_s = slots[:n], slots[n:]

        def fetch(block, slot):
            walk.load_block(gate_g + x_g, kind_g, block, slots, kinds, slot, full)

        def group(block, slot, first, h):
            tokens = [first + i for i in range(_GROUP)]
            decays = [_decay(_read(gate_s, slot, t), log) for t in tokens]
            inputs = [_read(x_s, slot, t) for t in tokens]
            states = []
            for t, a_t, x_t in zip(tokens, decays, inputs):
                kind_t = walk.kind(kinds, block, slot, t)
                h = _by_kind(kind_t, _add(_multiply(a_t, h), x_t), start=x_t, padding=h)
                states.append(h)
            for t, h_t in zip(tokens, states):
                _write(x_s, slot, t, h_t)
            return h

        def store(block, slot):
            for source, target in zip(x_s, out_g):
                walk.store(source.at[slot], target, block)

        h = walk.load_rows(state_g, rows, ready)
        h = walk.run(fetch, group, h, full, store, stores=n)
        walk.store_rows(h, rows, final_g)

    return walk.call(
        body,
        "forward",
        loads=(gate, x),
        rows=(state,),
        kind=kind,
        outputs=(x, walk.row_types(n)),
        log=log,
    )


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
) -> tuple[Planes, Planes, Planes]:
    r"""Cotangents of ``gate``, ``x`` and ``state`` from those of ``h`` and ``final``.

    Backwards in time, :math:`\lambda_t = dh_t + \mu_t`, :math:`dx_t = \lambda_t`, :math:`da_t = h_{t-1} \lambda_t` and
    :math:`\mu_{t-1} = a_t \lambda_t`. At padding ``dgate`` and ``dx`` are 0 while ``dh`` is passed on as it is.

    Args:
        gate: as for ``forward``.
        h: planes ``[B, T, D]`` of the states ``forward`` returned, those at padding included.
        state: as for ``forward``.
        dh: planes ``[B, T, D]`` of the cotangent of ``h``.
        dfinal: planes ``[B, D]`` of the cotangent of the final state.
        kind: as for ``forward``.
        log: as for ``forward``.
        config: sizes of the pipeline; by default ``default_config``.

    Returns:
        ``(dgate, dx, dstate)``: planes ``[B, T, D]`` in the dtypes of ``gate`` and ``dh``, and ``[B, D]`` in float32.
    """
    n = len(dh)
    walk = _Walk.over((*gate, *h, *dh), config)

    def body(gate_g, h_g, dh_g, state_g, dfinal_g, kind_g, dgate_g, dx_g, dstate_g, *, slots, rows, kinds, full, ready):
        gate_s, previous_s, dh_s = slots[:n], slots[n : 2 * n], slots[2 * n :]

        def fetch(block, slot):
            start = block * walk.tokens
            for source, target in zip(gate_g + dh_g, gate_s + dh_s):
                walk.load(source, start, target.at[slot], full.at[slot])

            # Row t of the slot is h_{t-1}, so the copy starts one token earlier; what precedes token 0 is `state`.
            @pl.when(block > 0)
            def _earlier():
                for source, target in zip(h_g, previous_s):
                    walk.load(source, start - 1, target.at[slot], full.at[slot])

            @pl.when(block == 0)
            def _first():
                for source, target in zip(h_g, previous_s):
                    walk.load(source, start, target.at[slot, pl.ds(1, walk.tokens - 1)], full.at[slot])

            walk.load_kinds(kind_g, block, kinds, slot, full)

        def group(block, slot, first, mu):
            tokens = [first + i for i in reversed(range(_GROUP))]
            decays = [_decay(_read(gate_s, slot, t), log) for t in tokens]
            previous = [_read(previous_s, slot, t) for t in tokens]
            cotangents = [_read(dh_s, slot, t) for t in tokens]
            row_start = block * walk.tokens + first == 0
            previous[-1] = tuple(jnp.where(row_start, s, p) for s, p in zip(state, previous[-1]))
            results = []
            for t, a_t, previous_t, dh_t in zip(tokens, decays, previous, cotangents):
                kind_t = walk.kind(kinds, block, slot, t)
                lam = _add(dh_t, mu)
                passed = _multiply(a_t, lam)
                dgate_t = _multiply(previous_t, passed if log else lam)
                zeros = _zeros(lam)
                mu = _by_kind(kind_t, passed, start=zeros, padding=lam)
                results.append(
                    (
                        _by_kind(kind_t, dgate_t, start=zeros, padding=zeros),
                        _by_kind(kind_t, lam, start=lam, padding=zeros),
                    )
                )
            for t, (dgate_t, dx_t) in zip(tokens, results):
                _write(gate_s, slot, t, dgate_t)
                _write(dh_s, slot, t, dx_t)
            return mu

        def store(block, slot):
            for source, target in zip(gate_s + dh_s, dgate_g + dx_g):
                walk.store(source.at[slot], target, block)

        edges = walk.load_rows(state_g + dfinal_g, rows, ready)
        state = edges[:n]
        mu = walk.run(fetch, group, edges[n:], full, store, stores=2 * n, reverse=True)
        walk.store_rows(mu, rows, dstate_g)

    return walk.call(
        body,
        "backward",
        loads=(gate, h, dh),
        rows=(state, dfinal),
        kind=kind,
        outputs=(gate, dh, walk.row_types(n)),
        log=log,
    )


def summary(
    gate: Planes,
    x: Planes,
    kind: jax.Array | None,
    *,
    log: bool,
    reverse: bool,
    config: Config | None = None,
) -> tuple[Planes, Planes]:
    r"""What rows make of any state before them: A and U with :math:`h_T = A h_0 + U`, for rows that are parts of longer ones.

    With ``reverse`` what the backward pass makes of any cotangent after them: :math:`\mu_0 = A \mu_T + U`, ``x`` being dh. Reads the rows once
    and writes none.

    Args:
        gate: as for ``forward``.
        x: planes ``[B, T, D]`` of the input or, with ``reverse``, of the cotangent of ``h``.
        kind: as for ``forward``.
        log: as for ``forward``.
        reverse: from the last token to the first.
        config: sizes of the pipeline; by default ``default_config``.

    Returns:
        ``(A, U)``: planes ``[B, D]`` in float32.
    """
    n = len(x)
    walk = _Walk.over((*gate, *x), config)

    def body(gate_g, x_g, product_g, state_g, kind_g, across_g, written_g, *, slots, rows, kinds, full, ready):
        gate_s, x_s = slots[:n], slots[n:]

        def fetch(block, slot):
            walk.load_block(gate_g + x_g, kind_g, block, slots, kinds, slot, full)

        def group(block, slot, first, carry):
            product, h = carry[:n], carry[n:]
            tokens = [first + i for i in range(_GROUP)]
            tokens = tokens[::-1] if reverse else tokens
            decays = [_decay(_read(gate_s, slot, t), log) for t in tokens]
            inputs = [_read(x_s, slot, t) for t in tokens]
            for t, a_t, x_t in zip(tokens, decays, inputs):
                kind_t = walk.kind(kinds, block, slot, t)
                zeros = _zeros(x_t)
                product = _by_kind(kind_t, _multiply(a_t, product), start=zeros, padding=product)
                if reverse:
                    lam = _add(x_t, h)
                    h = _by_kind(kind_t, _multiply(a_t, lam), start=zeros, padding=lam)
                else:
                    h = _by_kind(kind_t, _add(_multiply(a_t, h), x_t), start=x_t, padding=h)
            return (*product, *h)

        carry = walk.load_rows(product_g + state_g, rows, ready)
        carry = walk.run(fetch, group, carry, full, reverse=reverse)
        walk.store_rows(carry, rows, across_g + written_g)

    zeros = (jnp.zeros((walk.batch, walk.channels), jnp.float32),) * n
    return walk.call(
        body,
        "summary_reverse" if reverse else "summary",
        loads=(gate, x),
        rows=((jnp.ones_like(zeros[0]), *zeros[1:]), zeros),
        kind=kind,
        outputs=(walk.row_types(n), walk.row_types(n)),
        log=log,
    )


@dataclasses.dataclass(frozen=True)
class _Walk:
    """A thread block's way through time: its copies and its pipeline. Methods from ``load`` on are for use in a kernel."""

    batch: int
    time: int
    channels: int
    config: Config

    @classmethod
    def over(cls, loads: Planes, config: Config | None) -> "_Walk":
        """The walk over planes ``[B, T, D]``, which are all of one shape."""
        shape = loads[0].shape
        itemsize = max(array.dtype.itemsize for array in loads)
        return cls(*shape, config or default_config(*shape, itemsize, len(loads)))

    @property
    def width(self) -> int:
        return self.config.channels

    @property
    def tokens(self) -> int:
        return self.config.tokens

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.time, self.tokens)

    @property
    def stages(self) -> int:
        return min(self.config.stages, self.blocks)

    @property
    def kinds(self) -> int:
        """How many kinds are loaded for a block: a copy is a multiple of 128 bytes, even if the block is shorter."""
        return 32 * pl.cdiv(self.tokens, 32)

    def row_types(self, count: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Types of that many planes ``[B, D]`` in float32."""
        return (jax.ShapeDtypeStruct((self.batch, self.channels), jnp.float32),) * count

    def call(
        self,
        body: Callable,
        name: str,
        *,
        loads: tuple[Planes, ...],
        rows: tuple[Planes, ...],
        kind: jax.Array | None,
        outputs: tuple[Any, ...],
        log: bool,
    ):
        """Launch ``body(*loads, *rows, kind, *outputs, **scratch)``: every plane of ``loads`` has slots in the scratch memory.

        ``outputs`` are templates of shape and dtype.
        """
        arrays = jax.tree.leaves(loads)
        rows = jax.tree.map(lambda row: row.astype(jnp.float32), rows)
        if kind is not None:
            # Past the end all is padding, as far as the copy of the last block reaches.
            reach = (self.blocks - 1) * self.tokens + self.kinds
            kind = jnp.pad(kind.astype(jnp.int32), ((0, 0), (0, reach - self.time)), constant_values=PADDING)
        outputs = jax.tree.map(lambda out: jax.ShapeDtypeStruct(out.shape, out.dtype), outputs)
        size = self.batch * self.time * self.channels
        moved = jax.tree.leaves((loads, rows, kind, outputs))
        cost = pl.CostEstimate(
            flops=len(arrays) * size,
            transcendentals=size if log else 0,
            bytes_accessed=sum(array.size * array.dtype.itemsize for array in moved),
        )
        options: dict[str, Any] = {
            "out_type": outputs,
            "grid": (self.batch, pl.cdiv(self.channels, self.width)),
            "grid_names": _GRID,
            "scratch_types": {
                "slots": tuple(plgpu.SMEM((self.stages, self.tokens, self.width), array.dtype) for array in arrays),
                # For two operands or two results [B, D] at a time.
                "rows": plgpu.SMEM((2 * len(outputs[-1]), self.width), jnp.float32),
                "kinds": None if kind is None else plgpu.SMEM((self.stages, self.kinds), jnp.int32),
                "full": plgpu.Barrier(num_arrivals=len(arrays) + (kind is not None), num_barriers=self.stages),
                "ready": plgpu.Barrier(num_arrivals=len(jax.tree.leaves(rows))),
            },
            # Pallas puts a barrier before and after every store to shared memory. A thread meets only its own channels there, and before TMA
            # reads or refills there is a `commit_smem`. Exponentials are those of the hardware, off by 2^-22 of themselves: the others take
            # four times the instructions.
            "compiler_params": plgpu.CompilerParams(
                approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
            ),
            "kernel_name": f"linear_recurrence_{name}_bd{self.width}_bt{self.tokens}",
            **_gpu.costs(cost),
        }
        return plgpu.kernel(body, **options)(*loads, *rows, kind)

    def load(self, source, start, target, barrier):
        """Start the copy of the tokens from ``start`` on. TMA fills with zeros what lies past the end, where all is padding."""
        tokens = pl.ds(start, target.shape[0])
        plgpu.copy_gmem_to_smem(source.at[self._row(), tokens, self._columns()], target, barrier)

    def load_block(self, sources, kind, block, slots, kinds, slot, full):
        """Start the copies of a block of planes, and of its kinds."""
        for source, target in zip(sources, slots):
            self.load(source, block * self.tokens, target.at[slot], full.at[slot])
        self.load_kinds(kind, block, kinds, slot, full)

    def load_kinds(self, source, block, kinds, slot, full):
        """Start the copy of a block's kinds, if there are any."""
        if source is not None:
            tokens = pl.ds(block * self.tokens, self.kinds)
            plgpu.copy_gmem_to_smem(source.at[self._row(), tokens], kinds.at[slot], full.at[slot])

    def kind(self, kinds, block, slot, token):
        """Kind of a block's token, a scalar; None where the sizes say that all are ordinary."""
        if kinds is not None:
            return kinds[slot, token]
        if self.time % self.tokens:
            return jnp.where(block * self.tokens + token < self.time, ORDINARY, PADDING)
        return None

    def load_rows(self, sources, rows, ready) -> Planes:
        """Rows of planes ``[B, D]``, in registers."""
        for i, source in enumerate(sources):
            plgpu.copy_gmem_to_smem(source.at[self._row(), self._columns()], rows.at[i], ready)
        plgpu.barrier_wait(ready)
        return tuple(rows[i] for i in range(len(sources)))

    def store_rows(self, values, rows, targets):
        """Store rows of planes ``[B, D]`` and wait for these and all earlier stores."""
        for i, value in enumerate(values):
            rows[i] = value
        # TMA reads through another proxy than the threads write: without this it might see the rows as they were.
        plgpu.commit_smem()
        for i, target in enumerate(targets):
            self._store_row(rows.at[i], target.at[self._row()])
        # Shared memory lasts only as long as the thread block, so it has to outlive the stores that read it.
        plgpu.wait_smem_to_gmem(0)

    def store(self, source, target, block):
        """Start the copy of a slot to a block of tokens, of which the last block may have fewer."""
        tail = self.time % self.tokens

        def whole():
            plgpu.copy_smem_to_gmem(
                source, target.at[self._row(), pl.ds(block * self.tokens, self.tokens), self._columns()]
            )

        def part():
            if tail == 1:
                self._store_row(source.at[0], target.at[self._row(), self.time - 1])
            else:
                tokens = pl.ds(self.time - tail, tail)
                plgpu.copy_smem_to_gmem(source.at[pl.ds(0, tail)], target.at[self._row(), tokens, self._columns()])

        if tail:
            pl.when(block < self.blocks - 1)(whole)
            pl.when(block == self.blocks - 1)(part)
        else:
            whole()

    def _store_row(self, source, target):
        """Start the copy of ``[width]`` to these channels of ``[D]``.

        A contiguous copy may be lowered to a bulk copy, which is not clipped: it would run on into the next row. So the last
        channel block copies exactly what is left. Copies of several tokens are contiguous only if ``width`` is ``D``, and
        then nothing is to be clipped.
        """
        last, left = divmod(self.channels, self.width)

        def whole():
            plgpu.copy_smem_to_gmem(source, target.at[self._columns()])

        def part():
            plgpu.copy_smem_to_gmem(source.at[pl.ds(0, left)], target.at[pl.ds(last * self.width, left)])

        if left:
            pl.when(lax.axis_index(_GRID[1]) < last)(whole)
            pl.when(lax.axis_index(_GRID[1]) == last)(part)
        else:
            whole()

    def _row(self):
        return lax.axis_index(_GRID[0])

    def _columns(self):
        return pl.ds(lax.axis_index(_GRID[1]) * self.width, self.width)

    def run(self, fetch, group, carry, full, store=None, *, stores=0, reverse=False) -> Planes:
        """Take ``carry`` through all blocks.

        Args:
            fetch: ``fetch(block, slot)`` starts the loads of a block, which arrive on ``full.at[slot]``.
            group: ``group(block, slot, first, carry)`` handles the ``_GROUP`` tokens from ``first`` on.
            carry: planes ``[width]``.
            full: a barrier for each slot.
            store: ``store(block, slot)`` starts the stores of a block.
            stores: how many it starts.
            reverse: from the last token to the first.
        """

        def order(i, count):
            return count - 1 - i if reverse else i

        # A slot that is stored from is refilled one step late: waiting for its own stores at once would expose their latency.
        delay = 0 if store is None else 1
        groups = self.tokens // _GROUP

        def step(i, carry):
            slot = lax.rem(i, self.stages)
            block = order(i, self.blocks)
            plgpu.barrier_wait(full.at[slot])
            carry = lax.fori_loop(
                0, groups, lambda j, carry: group(block, slot, order(j, groups) * _GROUP, carry), carry
            )
            # No thread still reads the slot when TMA refills it, and TMA sees the results that all threads wrote to it.
            plgpu.commit_smem()
            if store is not None:
                store(block, slot)
                # Only these stores may still be reading; those of the step before have left the slot that is refilled next.
                plgpu.wait_smem_to_gmem(stores, wait_read_only=True)
            upcoming = i - delay + self.stages

            @pl.when((i >= delay) & (upcoming < self.blocks))
            def _refill():
                fetch(order(upcoming, self.blocks), lax.rem(upcoming, self.stages))

            return carry

        lax.fori_loop(0, self.stages, lambda i, _: fetch(order(i, self.blocks), i), None)
        return lax.fori_loop(0, self.blocks, step, carry)


def _read(slots, slot, token) -> Planes:
    return tuple(plane[slot, token].astype(jnp.float32) for plane in slots)


def _write(slots, slot, token, values: Planes):
    for plane, value in zip(slots, values):
        plane[slot, token] = value.astype(plane.dtype)


def _decay(gate: Planes, log: bool) -> Planes:
    return tuple(jnp.exp(plane) for plane in gate) if log else gate


def _add(a: Planes, b: Planes) -> Planes:
    return tuple(p + q for p, q in zip(a, b))


def _multiply(a: Planes, b: Planes) -> Planes:
    if len(a) == 1:
        return (a[0] * b[0],)
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def _zeros(like: Planes) -> Planes:
    return tuple(jnp.zeros_like(plane) for plane in like)


def _by_kind(kind, ordinary: Planes, *, start: Planes, padding: Planes) -> Planes:
    if kind is None:
        return ordinary
    return tuple(
        jnp.where(kind == PADDING, p, jnp.where(kind == START, s, o)) for o, s, p in zip(ordinary, start, padding)
    )
