r"""Chunked linear attention on Hopper GPUs, no decay or one per head, forward and backward, for Pallas' Mosaic GPU lowering.

.. math:: S_t = e^{g_t} S_{t-1} + k_t v_t^T, \qquad o_t = scale \cdot S_t^T q_t

per batch row and value head, with a float32 state :math:`S` [K, V] and bfloat16 operands. Tokens are cut into chunks of
C = 64. With S the state before a chunk and :math:`G_i` the sum of its log decays up to and including token i,

.. math::
    O = A V + (e^G Q) S, \quad A_{ij} = q_i k_j e^{G_i - G_j} \; (j \le i), \qquad S \leftarrow e^{G_C} S + (e^{G_C - G} K)^T V.

**Documents.** Tokens carry running document numbers, chunks those of the states before and after them. They act as masks of
the four decays above, whose exponents are masked before ``exp2``; a start needs no gate. Padding (document -1) is in no state.
What it holds, NaN included, is selected away in shared memory, in the chunks that have any; other chunks pay one branch.

**Forward.** The grid is (batch, heads, blocks of 64 value columns). One warpgroup walks a whole row with its K x 64 part of the
state in registers, so HBM sees query, key, value and output once (blocks of one head run side by side, and read its queries
and keys through L2). A pass that will be differentiated also stores the state before every chunk: its bfloat16 copy,
which has to be in shared memory as an operand anyway, and which is how the backward pass uses it. That is 2 K V / C bytes
per head and token, and it costs no registers.

**Backward.** The grid is (batch, heads). The thread block walks from the last chunk to the first with the cotangent D of the state
in registers, and makes all gradients of a chunk at once. With P the cotangent of A under the same decays and masks,

    dQ = P K + e^G dO S^T,    dK = P^T Q + e^{G_C - G} V D^T,    dV = A^T dO + e^{G_C - G} K D,    D <- e^{G_C} D + (e^G Q)^T dO.

It has one warpgroup if K or V is 64 and two if both are 128. Each owns an equal part of D's columns (and so of dV) and of the
columns of dQ and dK. D in bfloat16, A and P (one made by each warpgroup) meet in shared memory, where wgmma reads them as they are
or transposed. Two barriers per chunk keep the warpgroups together: after these are written, and after all have been read.

**Gradient of the log decays.** :math:`dG_i = q_i \cdot dq_i - k_i \cdot dk_i` in float32, and what leaves the chunk depends on
all its decays, in sum by :math:`\langle S', D \rangle`, S' the state after it. Both are summed inside chunks only; over the whole
row the sums would cancel. The kernel writes the row sums, XLA does the rest.

**Precision of the decays.** Gates enter as cumulative sums over a chunk, in float32 and in units of log 2, of log decays of at
least ``MIN_LOG_DECAY``; those below it count as it, and their gradient, below e^-60, as 0. An exponent is the difference of
two sums of up to M in size, so it is off by less than 2^-24 M for every token between. M is 92 for decays of 1/e on average, and
5540 if the whole chunk is at the limit: then a weight is off by less than 2.3e-4 of itself per token; bfloat16 resolves 3.9e-3.

**Shared memory** in KiB, and how many thread blocks of an SM it and the registers leave room for:

    K, V       forward                                   backward
    64, 64     2 stages x 24 + S 8 + output 8 = 64; 3    2 stages x 32 + S 8 + D 8 + A, P 16 + output 8 = 104; 2
    128, 128   2 stages x 40 + S 16 + output 8 = 104; 2  2 stages x 64 + S 32 + D 32 + A, P 16 + outputs 16 = 224; 1

plus at most 3 for gates, documents and barriers. **Registers** per thread: S takes K/2 forward, D takes 32 (K = V = 64) or 64
backward, and a 64 x 64 tile 32 as a sum and 16 as an operand. In all that is up to 166 (K = 64) and 212 forward, 174 (K = V = 64)
and 255 backward, without spills. 128 value columns per warpgroup would spill forward.

**Parallelism.** Walks are serial: SMs idle with fewer than 132 batch rows times heads.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

plgpu: Any = mosaic_gpu  # as in jax 0.12; in older versions signatures differ, and `refusal` says so

MIN_LOG_DECAY = -60.0
"""Log decays below this count as this: exp(-60) is nothing in float32, and sums of 64 of them still resolve small ones."""

# Axes of the grid and of the warpgroups; a mesh or vmap axis around the kernel must not have the same name.
_ROW, _HEAD, _BLOCK = "linear_attention_row", "linear_attention_head", "linear_attention_columns"
_WARPGROUP = "linear_attention_warpgroup"

_TILE = 64  # rows of a wgmma, and columns of bfloat16 in a row of swizzled shared memory
_RULES = 32  # numbers per chunk after those of its tokens (3 are used): a copy is a multiple of 128 bytes
_LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the pipelines: tokens per chunk, slots of shared memory for chunks in the forward and in the backward pass."""

    chunk: int = _TILE
    stages: int = 2
    backward_stages: int = 2

    def __post_init__(self):
        if self.chunk != _TILE:
            raise ValueError(f"chunk must be {_TILE} (128 would spill), got {self.chunk}")
        if min(self.stages, self.backward_stages) < 2:
            raise ValueError(f"stages must be at least 2, got {self.stages} and {self.backward_stages}")


def default_config(key_dim: int, value_dim: int) -> Config:
    """Config with two stages, or three in the backward pass where only one thread block fits an SM in any case.

    Otherwise more stages would mean fewer thread blocks on an SM, and these hide each other's latencies.
    """
    return Config(backward_stages=2 if key_dim == value_dim else 3)


def refusal(
    query_shape: tuple[int, ...], value_shape: tuple[int, ...], dtypes: tuple[Any, ...], log_decay_ndim: int = 3
) -> str | None:
    """Why there is no kernel for these arrays, or None.

    Args:
        query_shape: [B, T, G, K].
        value_shape: [B, T, H, V].
        dtypes: of query, key and value.
        log_decay_ndim: 4 for a decay per channel.
    """
    if not hasattr(plgpu, "store"):
        return f"for GPUs needs jax >= 0.12; this is jax {jax.__version__}"
    if any(dtype != jnp.bfloat16 for dtype in dtypes):
        return f"for GPUs takes bfloat16 query, key and value; got {', '.join(str(jnp.dtype(d)) for d in dtypes)}"
    if log_decay_ndim == 4:
        return "takes no decay or one per head, not one per channel"
    if not {query_shape[3], value_shape[3]} <= {64, 128}:
        return f"for GPUs takes heads of 64 and 128; got K={query_shape[3]}, V={value_shape[3]}"
    if 0 in query_shape + value_shape:
        return f"takes no empty arrays; got query {query_shape}, value {value_shape}"
    if max(value_shape[0], value_shape[2]) > 65535:
        return f"for GPUs takes at most 65535 rows and heads; got value {value_shape}"
    return None


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array | None,
    state: jax.Array,
    document: jax.Array | None,
    boundary: jax.Array | None,
    *,
    scale: float,
    save: bool,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Reads of all tokens and the state after the last.

    A length that is not a multiple of ``chunk`` costs copies of the token arrays, filled up with padding.

    Args:
        query: [B, T, G, K] bfloat16; G divides H, query/key head g serves value heads g*H/G .. (g+1)*H/G - 1.
        key: [B, T, G, K] bfloat16.
        value: [B, T, H, V] bfloat16.
        log_decay: [B, T, H], at most 0 (-inf included), or None.
        state: [B, H, K, V], the state before the first token.
        document: [B, T] int32, the running document number of each token, -1 for padding; None if all is one document.
        boundary: [B, N + 1] int32 for N chunks, numbers >= 0: those of the documents which the states before chunk n and after
            chunk n-1 belong to. None with ``document``.
        scale: factor on the reads.
        save: whether to return what ``backward`` needs.
        config: sizes of the pipelines; by default ``default_config``.
        interpret: the call is under ``force_gpu_interpret_mode``, which lacks some forms of wgmma: replace them.

    Returns:
        ``(output, final, states)``: output [B, T, H, V] in the dtype of ``value``, unspecified at padding; final state
        [B, H, K, V] float32; states before the chunks [B, H, N, K, V] in bfloat16, or None.
    """
    walk = _Walk.over(query, value, scale, config, interpret)
    (query, key, value), gates, rules = walk.chunks((query, key, value), log_decay, document, boundary)
    chunk, width, stages = walk.chunk, _TILE, min(walk.config.stages, walk.count)

    def body(query_g, key_g, value_g, gates_g, rules_g, state_g, out_g, final_g, states_g, *, tiles, small):
        query_s, key_s, value_s, carried, out = (tiles[name] for name in ("query", "key", "value", "carried", "out"))
        full = small["full"]
        row, head = lax.axis_index(_ROW), lax.axis_index(_HEAD)
        columns = pl.ds(lax.axis_index(_BLOCK) * width, width)

        def fetch(n, slot):
            tokens = pl.ds(n * chunk, chunk)
            group = head // walk.repeats
            walk.load(query_g.at[row, tokens, group], query_s, slot, full)
            walk.load(key_g.at[row, tokens, group], key_s, slot, full)
            walk.load(value_g.at[row, tokens, head, columns], value_s, slot, full)
            walk.load_rules(gates_g, rules_g, row, head, n, small, slot)

        def step(n, state):
            slot = lax.rem(n, stages)
            plgpu.barrier_wait(full.at[slot])
            q, k, v = query_s.at[slot], key_s.at[slot], value_s.at[slot]
            decays = walk.decays(rules_g, small, slot)
            decays.clear_padding(k, v)
            if save:
                # The store of the last copy has left shared memory; the output's may still be under way.
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            carried[...] = state.astype(jnp.bfloat16)
            # wgmma and TMA read through another proxy than the threads write.
            plgpu.commit_smem()
            if save:
                plgpu.copy_smem_to_gmem(carried, states_g.at[row, head, n, :, columns])
            scores = decays.pairs(walk.matmul(q, k.T)).astype(jnp.bfloat16)
            o = walk.matmul(scores, v, _scaled(decays.from_start(), walk.matmul(q, carried)))
            # The store of the last output, the newest but for this step's copy of the state.
            plgpu.wait_smem_to_gmem(int(save), wait_read_only=True)
            out[...] = o.astype(out.dtype)
            _scale_rows(v, decays.to_end())
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, out_g.at[row, pl.ds(n * chunk, chunk), head, columns])
            state = walk.matmul(k.T, v, _scaled(decays.across(), state))
            # All threads have read the slot before TMA refills it.
            plgpu.commit_smem()
            pl.when(n + stages < walk.count)(lambda: fetch(n + stages, slot))
            return state

        lax.fori_loop(0, stages, lambda n, _: fetch(n, n), None)
        walk.number(rules_g, small)
        state = _load(state_g.at[row, head, :, columns], optimized=False)
        state = lax.fori_loop(0, walk.count, step, state)
        plgpu.store(final_g.at[row, head, :, columns], state, optimized=False)
        # Shared memory lasts only as long as the thread block, so it has to outlive the stores that read it.
        plgpu.wait_smem_to_gmem(0)

    states = jax.ShapeDtypeStruct(walk.state_shape(walk.count), jnp.bfloat16) if save else None
    output, final, states = walk.call(
        body,
        "forward",
        (query, key, value, gates, rules, state.astype(jnp.float32)),
        (value, jax.ShapeDtypeStruct(walk.state_shape(), jnp.float32), states),
        {
            "query": _tiles(stages, chunk, walk.key_dim),
            "key": _tiles(stages, chunk, walk.key_dim),
            "value": _tiles(stages, chunk, width),
            "carried": _tiles(walk.key_dim, width),
            "out": _tiles(chunk, width),
        },
        walk.small_scratch(stages, gates, rules, arrays=3),
        columns=walk.value_dim // width,
        products=(2, 2),
    )
    return output[:, : walk.time], final, states


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array | None,
    document: jax.Array | None,
    boundary: jax.Array | None,
    states: jax.Array,
    dout: jax.Array,
    dfinal: jax.Array,
    *,
    scale: float,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """Gradients of all arrays. Those of heads that share a query and key are summed in float32, from bfloat16.

    Args:
        query: as for ``forward``, and so are key, value, log_decay, document, boundary, scale, config and interpret.
        key: see there.
        value: see there.
        log_decay: see there.
        document: see there.
        boundary: see there.
        states: third result of ``forward``.
        dout: [B, T, H, V], cotangent of the output: 0 at padding.
        dfinal: [B, H, K, V], cotangent of the final state.
        scale: see there.
        config: see there.
        interpret: see there.

    Returns:
        ``(dquery, dkey, dvalue, dlog_decay, dstate)``: the first three as the arrays, dlog_decay [B, T, H] float32 (None without
        decay), dstate [B, H, K, V] float32. Those of padding are 0.
    """
    walk = _Walk.over(query, value, scale, config, interpret)
    tokens = (query, key, value, dout.astype(value.dtype))
    (query, key, value, dout), gates, rules = walk.chunks(tokens, log_decay, document, boundary)
    chunk, last, stages = walk.chunk, walk.count - 1, min(walk.config.backward_stages, walk.count)
    warpgroups = _warpgroups(walk.key_dim, walk.value_dim)
    value_blocks, key_blocks = (dim // warpgroups // _TILE for dim in (walk.value_dim, walk.key_dim))

    def body(
        query_g, key_g, value_g, dout_g, gates_g, rules_g, states_g, dfinal_g, dquery_g, dkey_g, dvalue_g, sums_g, dstate_g,
        *, tiles, small,
    ):  # fmt: skip
        query_s, key_s, value_s, dout_s = (tiles[name] for name in ("query", "key", "value", "dout"))
        before, carried, scores, out = (tiles[name] for name in ("before", "carried", "scores", "out"))
        full, ready = small["full"], small["ready"]
        row, head, me = lax.axis_index(_ROW), lax.axis_index(_HEAD), lax.axis_index(_WARPGROUP)
        mine = pl.ds(me * value_blocks * _TILE, value_blocks * _TILE)
        my_values = [pl.ds((me * value_blocks + i) * _TILE, _TILE) for i in range(value_blocks)]
        my_keys = [pl.ds((me * key_blocks + i) * _TILE, _TILE) for i in range(key_blocks)]

        def fetch(i, slot):
            tokens = pl.ds((last - i) * chunk, chunk)
            group = head // walk.repeats
            walk.load(query_g.at[row, tokens, group], query_s, slot, full)
            walk.load(key_g.at[row, tokens, group], key_s, slot, full)
            walk.load(value_g.at[row, tokens, head], value_s, slot, full)
            walk.load(dout_g.at[row, tokens, head], dout_s, slot, full)
            walk.load_rules(gates_g, rules_g, row, head, last - i, small, slot)

        def fetch_state(i):
            plgpu.copy_gmem_to_smem(states_g.at[row, head, last - i], before, ready)

        def meet():
            # What this warpgroup wrote is visible to wgmma and TMA, and it has read all it had to; then the same of the other.
            plgpu.commit_smem()
            if warpgroups > 1:
                plgpu.barrier_arrive(small["together"])
                plgpu.barrier_wait(small["together"])

        def step(i, dstate):
            n, slot = last - i, lax.rem(i, stages)
            tokens = pl.ds(n * chunk, chunk)

            def store(tile, target):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last store has left the buffer
                out[me] = tile.astype(out.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out.at[me], target)

            place = 0

            def row_sums(ref, tile, factor=None):
                # Stored at once: what waits for others would be spilled.
                nonlocal place
                sums = _scaled(factor, (_load(ref).astype(jnp.float32) * tile).sum(1))
                target = sums_g.at[row, head, n, me, pl.ds(place, sums.size)]
                plgpu.store(target, sums, optimized=False)
                place += sums.size

            plgpu.barrier_wait(full.at[slot])
            q, k, v, do = query_s.at[slot], key_s.at[slot], value_s.at[slot], dout_s.at[slot]
            decays = walk.decays(rules_g, small, slot)

            # One warpgroup makes A and another P, from what it has cleared itself.
            @pl.when(me == 0)
            def _scores():
                decays.clear_padding(q, k)
                scores[0] = decays.pairs(walk.matmul(q, k.T)).astype(scores.dtype)

            @pl.when(me == warpgroups - 1)
            def _dscores():
                decays.clear_padding(v)
                scores[1] = decays.pairs(walk.matmul(do, v.T)).astype(scores.dtype)

            carried[:, mine] = dstate.astype(carried.dtype)
            meet()

            # All have left the chunk before this one, so its slot can be refilled.
            @pl.when((me == 0) & (i > 0) & (i - 1 + stages < walk.count))
            def _refill():
                fetch(i - 1 + stages, lax.rem(i - 1, stages))

            for columns in my_values:
                dv = _scaled(decays.to_end(), walk.matmul(k, carried.at[:, columns]))
                if gates_g is not None:
                    row_sums(v.at[:, columns], dv)
                dv = walk.matmul(scores.at[0].T, do.at[:, columns], dv)
                store(dv, dvalue_g.at[row, tokens, head, columns])

            plgpu.barrier_wait(ready)
            for columns in my_keys:
                dq = _scaled(decays.from_start(), walk.matmul(do, before.at[columns, :].T))
                dq = walk.matmul(scores.at[1], k.at[:, columns], dq)
                if gates_g is not None:
                    row_sums(q.at[:, columns], dq)
                store(dq, dquery_g.at[row, tokens, head, columns])

                dk = _scaled(decays.to_end(), walk.matmul(v, carried.at[columns, :].T))
                dk = walk.matmul(scores.at[1].T, q.at[:, columns], dk)
                if gates_g is not None:
                    row_sums(k.at[:, columns], dk, -1.0)
                store(dk, dkey_g.at[row, tokens, head, columns])

            if gates_g is not None:
                row_sums(before.at[:, mine], dstate, decays.across())
            meet()

            # None needs the state before this chunk any more, nor `do` as it was.
            @pl.when((me == 0) & (i < last))
            def _next():
                fetch_state(i + 1)

            _scale_rows(do.at[:, mine], decays.from_start())
            plgpu.commit_smem()
            return walk.matmul(q.T, do.at[:, mine], _scaled(decays.across(), dstate))

        @pl.when(me == 0)
        def _start():
            lax.fori_loop(0, stages, lambda i, _: fetch(i, i), None)
            fetch_state(0)
            walk.number(rules_g, small)

        meet()
        dstate = _load(dfinal_g.at[row, head, :, mine], optimized=False)
        dstate = lax.fori_loop(0, walk.count, step, dstate)
        plgpu.store(dstate_g.at[row, head, :, mine], dstate, optimized=False)
        # Shared memory lasts only as long as the thread block, so it has to outlive the stores that read it.
        plgpu.wait_smem_to_gmem(0)

    per_head = jax.ShapeDtypeStruct((*value.shape[:3], walk.key_dim), query.dtype)
    # Of a chunk and warpgroup: v.dv from the state, column block by column block; q.dq and -k.dk of each of its blocks; S.D.
    inside = slice(chunk * value_blocks, chunk * (value_blocks + 2 * key_blocks))
    sums_shape = (*walk.state_shape(walk.count)[:3], warpgroups, inside.stop + walk.key_dim)
    sums = None if gates is None else jax.ShapeDtypeStruct(sums_shape, jnp.float32)
    dquery, dkey, dvalue, sums, dstate = walk.call(
        body,
        "backward",
        (query, key, value, dout, gates, rules, states, dfinal.astype(jnp.float32)),
        (per_head, per_head, value, sums, jax.ShapeDtypeStruct(walk.state_shape(), jnp.float32)),
        {
            "query": _tiles(stages, chunk, walk.key_dim),
            "key": _tiles(stages, chunk, walk.key_dim),
            "value": _tiles(stages, chunk, walk.value_dim),
            "dout": _tiles(stages, chunk, walk.value_dim),
            "before": _tiles(walk.key_dim, walk.value_dim),
            "carried": _tiles(walk.key_dim, walk.value_dim),
            "scores": _tiles(2, chunk, chunk),
            "out": _tiles(warpgroups, chunk, _TILE),
        },
        walk.small_scratch(stages, gates, rules, arrays=4)
        | {"ready": plgpu.Barrier(), "together": plgpu.Barrier(num_arrivals=warpgroups)},
        warpgroups=warpgroups,
        products=(5, 4),
    )
    dquery, dkey = (walk.sum_heads(x).astype(query.dtype)[:, : walk.time] for x in (dquery, dkey))
    dlog_decay = None if log_decay is None else walk.log_decay_gradient(sums, inside, log_decay, document)
    return dquery, dkey, dvalue[:, : walk.time], dlog_decay, dstate


@dataclasses.dataclass(frozen=True)
class _Walk:
    """Sizes of a call, and what the two kernels have in common."""

    batch: int
    time: int
    groups: int
    heads: int
    key_dim: int
    value_dim: int
    scale: float
    config: Config
    interpret: bool

    @classmethod
    def over(cls, query: jax.Array, value: jax.Array, scale: float, config: Config | None, interpret: bool) -> "_Walk":
        (batch, time, groups, key_dim), (heads, value_dim) = query.shape, value.shape[2:]
        config = config or default_config(key_dim, value_dim)
        return cls(batch, time, groups, heads, key_dim, value_dim, float(scale), config, interpret)

    @property
    def chunk(self) -> int:
        return self.config.chunk

    @property
    def count(self) -> int:
        """Chunks of a row."""
        return pl.cdiv(self.time, self.chunk)

    @property
    def repeats(self) -> int:
        """Value heads per query and key head."""
        return self.heads // self.groups

    def state_shape(self, *chunks: int) -> tuple[int, ...]:
        return (self.batch, self.heads, *chunks, self.key_dim, self.value_dim)

    # Outside of the kernels.

    def chunks(self, tokens: tuple[jax.Array, ...], log_decay, document, boundary):
        """Token arrays, filled up with zeros; sums of gates [B, H, N, C] in units of log 2; rules [B, N, C + _RULES].

        Rules number the tokens: C * document + position in the chunk. After them come C times the documents of the states before
        and after the chunk, and whether it has padding.
        """
        tokens = tuple(self._fill(x) for x in tokens)
        gates = rules = None
        if log_decay is not None:
            gates = _LOG2E * jnp.maximum(log_decay.astype(jnp.float32), MIN_LOG_DECAY)
            if document is not None:
                gates = jnp.where(document[..., None] < 0, 0.0, gates)
            gates = jnp.cumsum(self._fill(gates).reshape(self.batch, self.count, self.chunk, self.heads), 2)
            gates = gates.transpose(0, 3, 1, 2)
        if document is not None:
            document = self._fill(document, -1).reshape(self.batch, self.count, self.chunk)
            numbers = self.chunk * document + jnp.arange(self.chunk)
            padded = jnp.any(document < 0, -1, keepdims=True)
            rules = [numbers, self.chunk * boundary[:, :-1, None], self.chunk * boundary[:, 1:, None], padded]
            rules = jnp.pad(jnp.concatenate(rules, -1, dtype=jnp.int32), ((0, 0), (0, 0), (0, _RULES - 3)))
        return tokens, gates, rules

    def _fill(self, x: jax.Array, value: float = 0) -> jax.Array:
        """[B, T, ...] up to a whole number of chunks."""
        more = self.count * self.chunk - self.time
        return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2), constant_values=value) if more else x

    def sum_heads(self, x: jax.Array) -> jax.Array:
        """[B, T, H, K] -> [B, T, G, K]: sums over the heads of a group."""
        if self.repeats == 1:
            return x
        return x.reshape(*x.shape[:2], self.groups, self.repeats, -1).sum(3, dtype=jnp.float32)

    def log_decay_gradient(self, sums: jax.Array, inside: slice, log_decay, document) -> jax.Array:
        """[B, T, H] from the sums [B, H, N, warpgroups, .] of ``backward``, of which ``inside`` are one for each token."""
        tokens = sums[..., inside].reshape(*sums.shape[:3], -1, self.chunk).sum(3)
        leaving = (sums[..., : inside.start].sum((3, 4)) + sums[..., inside.stop :].sum((3, 4)))[..., None]
        gradient = lax.cumsum(tokens, 3, reverse=True) + leaving
        gradient = gradient.reshape(self.batch, self.heads, -1)[..., : self.time].swapaxes(1, 2)
        acts = log_decay > MIN_LOG_DECAY
        if document is not None:
            acts &= document[..., None] >= 0
        return jnp.where(acts, gradient, 0.0)

    def small_scratch(self, stages: int, gates, rules, arrays: int) -> dict[str, Any]:
        """Scratch memory for gates and rules, and the barriers on which they arrive with the chunks of that many arrays."""
        return {
            "gates": None if gates is None else plgpu.SMEM((stages, self.chunk), jnp.float32),
            "rules": plgpu.SMEM((1, self.chunk) if rules is None else (stages, self.chunk + _RULES), jnp.int32),
            "full": plgpu.Barrier(num_arrivals=arrays + (gates is not None) + (rules is not None), num_barriers=stages),
        }

    def call(
        self,
        body: Callable,
        name: str,
        inputs: tuple[Any, ...],
        outputs: tuple[Any, ...],
        tiles: dict[str, Any],
        small: dict[str, Any],
        *,
        products: tuple[int, int],
        columns: int = 1,
        warpgroups: int = 1,
    ):
        """Launch ``body(*inputs, *outputs, tiles=, small=)``.

        Args:
            body: the kernel.
            name: part of its name.
            inputs: arrays, or None.
            outputs: templates of shape and dtype, or None.
            tiles: scratch memory.
            small: scratch memory, see ``small_scratch``.
            products: matmuls per chunk: those of the size of A V (K and V alike), and those of the size of Q S.
            columns: thread blocks per row and head.
            warpgroups: per thread block.
        """
        outputs = jax.tree.map(lambda out: jax.ShapeDtypeStruct(out.shape, out.dtype), outputs)
        tokens = self.batch * self.heads * self.count * self.chunk
        inside = products[0] * self.chunk * (self.key_dim + self.value_dim)
        outside = products[1] * 2 * self.key_dim * self.value_dim
        cost = pl.CostEstimate(
            flops=tokens * (inside + outside),
            transcendentals=0 if small["gates"] is None else tokens * self.chunk * products[0] // 2,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((inputs, outputs))),
        )
        return plgpu.kernel(
            body,
            out_type=outputs,
            grid=(self.batch, self.heads, columns),
            grid_names=(_ROW, _HEAD, _BLOCK),
            num_threads=warpgroups,
            thread_name=_WARPGROUP,
            scratch_types={"tiles": tiles, "small": small},
            compiler_params=plgpu.CompilerParams(
                approx_math=True,
                lowering_semantics=plgpu.LoweringSemantics.Lane,
                reduction_scratch_bytes=0,  # sums along rows need none, and shared memory is full
            ),
            cost_estimate=cost,
            kernel_name=f"linear_attention_{name}_k{self.key_dim}_v{self.value_dim}",
        )(*inputs)

    # Inside of the kernels.

    def load(self, source, slots, slot, full):
        """Start the copy of a chunk, which arrives on ``full.at[slot]``."""
        plgpu.copy_gmem_to_smem(source, slots.at[slot], full.at[slot])

    def load_rules(self, gates_g, rules_g, row, head, n, small, slot):
        """Start the copies of the gates and rules of a chunk, if there are any."""
        if gates_g is not None:
            self.load(gates_g.at[row, head, n], small["gates"], slot, small["full"])
        if rules_g is not None:
            self.load(rules_g.at[row, n], small["rules"], slot, small["full"])

    def number(self, rules_g, small):
        """Write the numbers of the tokens, the same in every chunk, if there are no documents."""
        if rules_g is None:
            layout = plgpu.Layout.WGMMA.reduce(1)
            small["rules"][0] = plgpu.broadcasted_iota(jnp.int32, (self.chunk,), 0, layout=layout)

    def decays(self, rules_g, small, slot) -> "_Decays":
        gates = None if small["gates"] is None else small["gates"].at[slot]
        rules = small["rules"].at[0 if rules_g is None else slot]
        return _Decays(gates, rules, rules_g is not None, self.chunk, self.scale)

    def matmul(self, a, b, total=None):
        """a @ b, added to ``total``; ``a`` in shared memory or registers, ``b`` in shared memory."""
        if self.interpret and isinstance(a, jax.Array):
            product = jnp.dot(a.astype(jnp.float32), b[...].astype(jnp.float32))
            return product if total is None else total + product

        def accumulate(sums):
            plgpu.wgmma(sums, a, b)
            return sums[...]  # waits for the wgmma

        if total is None or self.interpret:
            product = pl.run_scoped(accumulate, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))
            return product if total is None else total + product
        return pl.run_state(lambda sums: plgpu.wgmma(sums, a, b))(plgpu.ACC.init(total))


class _Decays(NamedTuple):
    """Decays of a chunk, 0 where documents part the two ends; read from shared memory where they are used, to save registers.

    Tokens are known by their numbers: those of document d are C d .. C d + C - 1, those of padding are negative. A vector lies
    along the rows of a tile or along its columns, in different threads.
    """

    gates: Any
    rules: Any
    documents: bool
    chunk: int
    scale: float

    def pairs(self, tile):
        """scale * exp(G_i - G_j) tile_ij for tokens j <= i of one document, else 0."""
        row, column = self._numbers(1), _columns(self._numbers(0), tile.shape)
        real = column <= _rows(row, tile.shape)
        if self.documents:
            real &= column >= _rows(row & -self.chunk, tile.shape)
        if self.gates is None:
            return jnp.where(real, self.scale * tile, 0.0)
        exponent = _rows(self._gates(1), tile.shape) - _columns(self._gates(0), tile.shape)
        return jnp.exp2(jnp.where(real, exponent, -jnp.inf)) * (self.scale * tile)

    def from_start(self):
        """scale * exp(G_i): from the state before the chunk to a read."""
        gates = None if self.gates is None else self._gates(1)
        decay = self._decay(gates, lambda: self._documents() == self.rules[self.chunk])
        return self.scale if decay is None else self.scale * decay

    def to_end(self):
        """exp(G_C - G_j): from a write to the state after the chunk."""
        gates = None if self.gates is None else self._total() - self._gates(1)
        return self._decay(gates, lambda: self._documents() == self.rules[self.chunk + 1])

    def across(self):
        """exp(G_C): from the state before the chunk to the state after it."""
        gates = None if self.gates is None else self._total()
        return self._decay(gates, lambda: self.rules[self.chunk] == self.rules[self.chunk + 1])

    def clear_padding(self, *tiles):
        """Zeros for the rows of padding."""
        if not self.documents:
            return

        @pl.when(self.rules[self.chunk + 2] != 0)
        def _clear():
            for tile in tiles:
                rows = _load(tile)
                tile[...] = jnp.where(_rows(self._numbers(1), rows.shape) >= 0, rows, jnp.zeros_like(rows))
            plgpu.commit_smem()

    def _decay(self, exponent, real):
        """exp2(exponent) where ``real`` holds, else 0; None for 1 everywhere."""
        if not self.documents:
            return None if exponent is None else jnp.exp2(exponent)
        if exponent is None:
            return real().astype(jnp.float32)
        return jnp.exp2(jnp.where(real(), exponent, -jnp.inf))

    def _gates(self, reduced: int):
        return _vector(self.gates, reduced)

    def _total(self):
        return self.gates[self.chunk - 1]

    def _numbers(self, reduced: int):
        return _vector(self.rules.at[pl.ds(0, self.chunk)], reduced)

    def _documents(self):
        """As in the rules: times ``chunk``."""
        return self._numbers(1) & -self.chunk


def _warpgroups(key_dim: int, value_dim: int) -> int:
    """Of a thread block of the backward pass."""
    return min(key_dim, value_dim) // _TILE


def _tiles(*shape: int):
    """Scratch memory for operands of wgmma in bfloat16."""
    transforms = (plgpu.TilingTransform((8, _TILE)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def _load(ref, *, optimized: bool = True):
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=optimized)


def _vector(ref, reduced: int):
    """What a sum over axis ``reduced`` of a tile would be: 1 for a vector along the rows, 0 for one along the columns."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(reduced), optimized=False)


def _rows(vector, shape):
    return lax.broadcast_in_dim(vector, shape, (0,))


def _columns(vector, shape):
    return lax.broadcast_in_dim(vector, shape, (1,))


def _scaled(factor, tile):
    """Rows of a tile times a vector, or the tile times a scalar; None is 1."""
    if factor is None:
        return tile
    return tile * (_rows(factor, tile.shape) if jnp.ndim(factor) else factor)


def _scale_rows(ref, factor):
    """``_scaled`` in shared memory. A store begins and ends with a barrier of the warpgroup, so wgmma has read what was there."""
    if factor is not None and not (isinstance(factor, float) and factor == 1.0):
        ref[...] = _scaled(factor, _load(ref).astype(jnp.float32)).astype(ref.dtype)
