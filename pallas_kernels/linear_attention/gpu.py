r"""Chunked linear attention on Hopper GPUs, no decay or one per head, forward and backward, for Pallas' Mosaic GPU lowering.

.. math:: S_t = e^{g_t} S_{t-1} + k_t v_t^T, \qquad o_t = scale \cdot S_t^T q_t

per batch row and value head, with a float32 state :math:`S` [K, V] and operands in bfloat16, or in float32 as pairs of it. Tokens are cut
into chunks of C = 64. With S the state before a chunk and :math:`G_i` the sum of its log decays up to and including token i,

.. math::
    O = A V + (e^G Q) S, \quad A_{ij} = q_i k_j e^{G_i - G_j} \; (j \le i), \qquad S \leftarrow e^{G_C} S + (e^{G_C - G} K)^T V.

Documents, padding and the precision of the decays are those of ``_gpu``.

**Forward.** The grid is (batch, heads, blocks of 64 value columns). One warpgroup walks a whole row with its K x 64 part of the
state in registers, so HBM sees query, key, value and output once (blocks of one head run side by side, and read its queries
and keys through L2). With K = 256 two warpgroups, with 64 columns each, share the queries and keys of a chunk, for which shared
memory has no room twice; one barrier per chunk keeps them together. A pass that will be differentiated also stores the state before
every chunk: its bfloat16 copy, which has to be in shared memory as an operand anyway, and which is how the backward pass uses it. That
is 2 K V / C bytes per head and token, and it costs no registers.

**Backward.** The grid is (batch, heads). The thread block walks from the last chunk to the first with the cotangent D of the state
in registers, and makes all gradients of a chunk at once. With P the cotangent of A under the same decays and masks,

    dQ = P K + e^G dO S^T,    dK = P^T Q + e^{G_C - G} V D^T,    dV = A^T dO + e^{G_C - G} K D,    D <- e^{G_C} D + (e^G Q)^T dO.

It has one warpgroup if K or V is 64 and two if both are 128. Each owns an equal part of D's columns (and so of dV) and of the
columns of dQ and dK. D in bfloat16, A and P (one made by each warpgroup) meet in shared memory, where wgmma reads them as they are
or transposed. Two barriers per chunk keep the warpgroups together: after these are written, and after all have been read.

Where K or V is 256, there is a thread block for every block of 128 x 128 of D, which has no room in the registers of one: all of the above
is a sum over blocks of channels, of K for dV and A, of V for dQ, dK and P. Each writes its part, and XLA sums them.

**Parts.** ``summary`` is what is left of the forward walk without reads, S from nothing, or, in reverse, of the backward walk, D from nothing:
what ``_split`` needs to walk parts of a row side by side. It reads two of the arrays once, which bounds it.

**Gradient of the log decays.** :math:`dG_i = q_i \cdot dq_i - k_i \cdot dk_i` in float32, and what leaves the chunk depends on
all its decays, in sum by :math:`\langle S', D \rangle`, S' the state after it. Both are summed inside chunks only; over the whole
row the sums would cancel. The kernel writes the row sums, XLA does the rest.

**Shared memory** in KiB, and how many thread blocks of an SM it and the registers leave room for:

    K, V       forward                                   backward
    64, 64     2 stages x 24 + S 8 + output 8 = 64; 3    2 stages x 32 + S 8 + D 8 + A, P 16 + output 8 = 104; 2
    128, 128   2 stages x 40 + S 16 + output 8 = 104; 2  2 stages x 64 + S 32 + D 32 + A, P 16 + outputs 16 = 224; 1
    256, 256   2 stages x 80 + S 64 = 224; 1             as for 128, 128

plus at most 3 for gates, documents and barriers. ``summary`` has 4 stages of 16 or 24 KiB, or 2 of 40 for K = 256: room for two or three blocks.
Float32 takes twice as much, so K = V = 64 only (``_blocks`` cuts larger ones): 128 forward, 208 backward and 128 for ``summary``, one thread
block. **Registers** per thread: S takes K/2 forward, D takes 32 (K = V = 64) or 64 backward, and a 64 x 64 tile 32 as a sum and 16 as an
operand. In all that is up to 166 (K = 64), 212 (K = 128) and 255 (K = 256, which spills with V = 64, so keys are cut there) forward, 174
(K = V = 64) and 255 backward, without spills; in float32 up to 232 and 203; 128 for ``summary``, 202 with K = 256. 128 value columns per
warpgroup would spill forward.

**Parallelism.** Walks are serial: SMs idle with fewer than 132 batch rows, parts of them, and heads, all multiplied.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _configs, _gpu
from pallas_kernels._blocks import block_size
from pallas_kernels._gpu import HEADS, TILE, Config, plgpu

_FAMILY = "linear_attention"
_WIDEST = 2 * HEADS[-1]  # K and V that are taken whole, but for the backward pass: in blocks of half that
# Before 0.12 the compiler would spill a few bytes of the walk over keys of 256 that saves states.
_KEYS = (*HEADS, _WIDEST) if jax.version.__version_info__ >= (0, 12) else HEADS
# By K: there is little to hide latency behind, and two blocks have room in a multiprocessor.
_SUMMARY_STAGES = {64: 4, 128: 4, 256: 2}


def block_sizes(key_dim: int, value_dim: int, dtype: jnp.dtype) -> tuple[int, int]:
    """Sizes of blocks in which K and V are taken: in float32, a tile takes up twice the memory."""
    if dtype != jnp.bfloat16:
        return block_size(key_dim, HEADS[:1]), block_size(value_dim, HEADS[:1])
    values = block_size(value_dim, (*HEADS, _WIDEST))
    # With 64 values, a walk over keys of 256 would spill.
    return block_size(key_dim, HEADS if values < HEADS[-1] else _KEYS), values


def default_config(key_dim: int, value_dim: int) -> Config:
    """That of ``_configs``, else two stages, or three in the backward pass where only one thread block fits an SM in any case."""
    backward_stages = 2 if min(key_dim, HEADS[-1]) == min(value_dim, HEADS[-1]) else 3
    return Config(
        **({"backward_stages": backward_stages} | dict(_configs.tuned(_FAMILY, key=key_dim, value=value_dim)))
    )


def multiprocessors(heads: int, key_dim: int, value_dim: int, dtype: jnp.dtype) -> int:
    """That walks of so many heads, of all rows, keep busy in either direction; K and V are ``block_sizes``."""
    if dtype == jnp.bfloat16 and key_dim == value_dim == TILE:
        return pl.cdiv(heads, 2)  # as many thread blocks of the backward pass have room in one
    return heads * max(value_dim // HEADS[-1], 1)


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
) -> tuple[jax.Array, jax.Array, _gpu.Operand | None]:
    """Reads of all tokens and the state after the last.

    A length that is not a multiple of ``chunk`` costs copies of the token arrays, filled up with padding.

    Args:
        query: [B, T, G, K], float32 or bfloat16; G divides H, query/key head g serves value heads g*H/G .. (g+1)*H/G - 1.
        key: [B, T, G, K], of its dtype.
        value: [B, T, H, V], of its dtype.
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
        [B, H, K, V] float32; states before the chunks [B, H, N, K, V], or None.
    """
    walk = _gpu.Walk.over(_FAMILY, query, value, interpret)
    config = config or default_config(walk.key_dim, walk.value_dim)
    query, key, value = walk.operands(query, key, value)
    gates, rules = walk.vectors(walk.gates(log_decay, document)), walk.rules(document, boundary)
    chunk, stages = walk.chunk, min(config.stages, walk.count)
    # Where the operands take up all of the shared memory, two warpgroups share those of the keys.
    warpgroups = 2 if walk.key_dim > HEADS[-1] else 1
    width = warpgroups * TILE

    def body(query_g, key_g, value_g, gates_g, rules_g, state_g, out_g, final_g, states_g, *, tiles, small):
        query_s, key_s, value_s = (tiles[name] for name in ("query", "key", "value"))
        full = small["full"]
        row, head, block = walk.place()

        def fetch(n, slot):
            tokens = pl.ds(n * chunk, chunk)
            group = head // walk.repeats
            walk.load(query_g.at[row, tokens, group], query_s, slot, full)
            walk.load(key_g.at[row, tokens, group], key_s, slot, full)
            walk.load(value_g.at[row, tokens, head, pl.ds(block * width, width)], value_s, slot, full)
            walk.load_small(gates_g, rules_g, row, head, n, small, slot)

        def meet():
            # What this warpgroup wrote is visible to wgmma and TMA, and it has read all it had to; then the same of the other.
            plgpu.commit_smem()
            if warpgroups > 1:
                plgpu.barrier_arrive(small["together"])
                plgpu.barrier_wait(small["together"])

        def refill(n):
            pl.when((walk.warpgroup() == 0) & (n + stages < walk.count))(lambda: fetch(n + stages, lax.rem(n, stages)))

        def place(zero=0):
            # The warpgroup, its part of the values, and that in HBM.
            me = walk.warpgroup() + zero
            return me, pl.ds(me * TILE, TILE), pl.ds(block * width + me * TILE, TILE)

        def step(n, state):
            slot = lax.rem(n, stages)
            plgpu.barrier_wait(full.at[slot])
            decays = walk.decays(gates_g is not None, rules_g, small, slot)
            me, mine, columns = place(walk.zero(decays) if warpgroups > 1 else 0)
            q, k, v, carried = query_s.at[slot], key_s.at[slot], value_s.at[slot, :, mine], tiles["carried"].at[me]
            # With two warpgroups the output lies in place of the state's copy, which has been read by then.
            out = tiles["out"] if warpgroups == 1 else carried.terms[0].at[pl.ds(0, chunk)]
            keys = walk.key_dim // warpgroups
            decays.clear_padding(k.at[:, pl.ds(me * keys, keys)], v)
            if warpgroups > 1:
                # The store of the last output has left its place.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            elif save:
                # The store of the last copy has left shared memory; the output's may still be under way.
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            carried[...] = state
            # wgmma and TMA read through another proxy than the threads write.
            meet()
            if warpgroups > 1:
                # Both have left the chunk before this one.
                pl.when(n > 0)(lambda: refill(n - 1))
            if save:
                _gpu.send(carried, states_g.at[row, head, n, :, columns])
            scores = decays.pairs(walk.matmul(q, k.T), scale)
            o = walk.matmul(scores, v, _gpu.scaled(decays.from_start(scale), walk.matmul(q, carried)))
            # The store of the last output, the newest but for this step's copy of the state, or that of the copy, if the output takes its
            # place. All warps wait, so all have read the values and the copy.
            plgpu.wait_smem_to_gmem(int(save and warpgroups == 1), wait_read_only=True)
            out[...] = o.astype(out.dtype)
            _gpu.scale_rows(v, decays.to_end())
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, out_g.at[row, pl.ds(n * chunk, chunk), head, columns])
            state = walk.matmul(k.T, v, _gpu.scaled(decays.across(), state))
            if warpgroups == 1:
                # All threads have read the slot before TMA refills it.
                plgpu.commit_smem()
                refill(n)
            return state

        @pl.when(walk.warpgroup() == 0)
        def _start():
            lax.fori_loop(0, stages, lambda n, _: fetch(n, n), None)
            walk.number(rules_g, small)

        if warpgroups > 1:
            meet()
        _, _, columns = place()
        state = _gpu.load(state_g.at[row, head, :, columns], optimized=False)
        state = lax.fori_loop(0, walk.count, step, state)
        _gpu.store(final_g.at[row, head, :, columns], state)
        # Shared memory lasts only as long as the thread block, so it has to outlive the stores that read it.
        plgpu.wait_smem_to_gmem(0)

    states = walk.template(*walk.state_shape(walk.count)) if save else None
    output, final, states = walk.call(
        body,
        "forward",
        (query, key, value, gates, rules, state.astype(jnp.float32)),
        (
            jax.ShapeDtypeStruct(value.shape, value.dtype),
            jax.ShapeDtypeStruct(walk.state_shape(), jnp.float32),
            states,
        ),
        {
            "query": walk.tiles(stages, chunk, walk.key_dim),
            "key": walk.tiles(stages, chunk, walk.key_dim),
            "value": walk.tiles(stages, chunk, width),
            "carried": walk.tiles(warpgroups, walk.key_dim, TILE),
            "out": None if warpgroups > 1 else _gpu.tiles(chunk, TILE, dtype=value.dtype),
        },
        walk.small_scratch(stages, gates, rules, arrays=3) | {"together": plgpu.Barrier(num_arrivals=warpgroups)},
        flops=2 * chunk * (walk.key_dim + walk.value_dim) + 4 * walk.key_dim * walk.value_dim,
        exponentials=0 if gates is None else chunk,
        blocks=walk.value_dim // width,
        warpgroups=warpgroups,
        own_barriers=True,
    )
    return output[:, : walk.time], final, states


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array | None,
    document: jax.Array | None,
    boundary: jax.Array | None,
    states: _gpu.Operand,
    dout: jax.Array,
    dfinal: jax.Array,
    *,
    scale: float,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """Gradients of all arrays. Those of heads that share a query and key are summed in float32, from their dtype.

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
    walk = _gpu.Walk.over(_FAMILY, query, value, interpret)
    config = config or default_config(walk.key_dim, walk.value_dim)
    query, key, value, dout = walk.operands(query, key, value, dout.astype(value.dtype))
    gates, rules = walk.vectors(walk.gates(log_decay, document)), walk.rules(document, boundary)
    chunk, last, stages = walk.chunk, walk.count - 1, min(config.backward_stages, walk.count)
    part = dataclasses.replace(walk, key_dim=min(walk.key_dim, HEADS[-1]), value_dim=min(walk.value_dim, HEADS[-1]))
    # Blocks of K and V, and then blocks of 64 columns of each warpgroup in these.
    key_parts, value_parts = walk.key_dim // part.key_dim, walk.value_dim // part.value_dim
    warpgroups = part.warpgroups
    value_blocks, key_blocks = (dim // warpgroups // TILE for dim in (part.value_dim, part.key_dim))

    def body(
        query_g, key_g, value_g, dout_g, gates_g, rules_g, states_g, dfinal_g, dquery_g, dkey_g, dvalue_g, sums_g, dstate_g,
        *, tiles, small,
    ):  # fmt: skip
        query_s, key_s, value_s, dout_s = (tiles[name] for name in ("query", "key", "value", "dout"))
        full, ready = small["full"], small["ready"]
        (row, head, block), me = walk.place(), walk.warpgroup()
        key_part, value_part = block // value_parts, lax.rem(block, value_parts)
        first_key, first_value = key_part * part.key_dim, value_part * part.value_dim
        keys, values = pl.ds(first_key, part.key_dim), pl.ds(first_value, part.value_dim)
        mine = pl.ds(me * value_blocks * TILE, value_blocks * TILE)
        my_values = [pl.ds((me * value_blocks + i) * TILE, TILE) for i in range(value_blocks)]
        my_keys = [pl.ds((me * key_blocks + i) * TILE, TILE) for i in range(key_blocks)]

        def fetch(i, slot):
            tokens = pl.ds((last - i) * chunk, chunk)
            group = head // walk.repeats
            walk.load(query_g.at[row, tokens, group, keys], query_s, slot, full)
            walk.load(key_g.at[row, tokens, group, keys], key_s, slot, full)
            walk.load(value_g.at[row, tokens, head, values], value_s, slot, full)
            walk.load(dout_g.at[row, tokens, head, values], dout_s, slot, full)
            walk.load_small(gates_g, rules_g, row, head, last - i, small, slot)

        def fetch_state(i):
            _gpu.fetch(states_g.at[row, head, last - i, keys, values], tiles["before"].at[0], ready)

        def meet():
            # What this warpgroup wrote is visible to wgmma and TMA, and it has read all it had to; then the same of the other.
            plgpu.commit_smem()
            if warpgroups > 1:
                plgpu.barrier_arrive(small["together"])
                plgpu.barrier_wait(small["together"])

        def step(i, dstate):
            n, slot = last - i, lax.rem(i, stages)
            tokens = pl.ds(n * chunk, chunk)
            plgpu.barrier_wait(full.at[slot])
            q, k, v, do = query_s.at[slot], key_s.at[slot], value_s.at[slot], dout_s.at[slot]
            decays = walk.decays(gates_g is not None, rules_g, small, slot)
            zero = part.zero(decays)
            before, carried, scores = (tiles[name].at[zero] for name in ("before", "carried", "scores"))
            out = tiles["out"].at[me + zero]

            def store(tile, target):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last store has left the buffer
                out[...] = tile.astype(out.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out, target)

            place = 0

            def row_sums(ref, tile, factor=None):
                # Stored at once: what waits for others would be spilled.
                nonlocal place
                sums = _gpu.scaled(factor, (_gpu.load(ref).astype(jnp.float32) * tile).sum(1))
                target = sums_g.at[row, head, n, block * warpgroups + me, pl.ds(place, sums.size)]
                _gpu.store(target, sums)
                place += sums.size

            # One warpgroup makes A and another P, from what it has cleared itself.
            @pl.when(me == 0)
            def _scores():
                decays.clear_padding(q, k)
                scores[0] = decays.pairs(walk.matmul(q, k.T), scale)

            @pl.when(me == warpgroups - 1)
            def _dscores():
                decays.clear_padding(v)
                scores[1] = decays.pairs(walk.matmul(do, v.T), scale)

            carried[:, mine] = dstate
            meet()

            # All have left the chunk before this one, so its slot can be refilled.
            @pl.when((me == 0) & (i > 0) & (i - 1 + stages < walk.count))
            def _refill():
                fetch(i - 1 + stages, lax.rem(i - 1, stages))

            for columns in my_values:
                dv = _gpu.scaled(decays.to_end(), walk.matmul(k, carried.at[:, columns]))
                if gates_g is not None:
                    row_sums(v.at[:, columns], dv)
                dv = walk.matmul(scores.at[0].T, do.at[:, columns], dv)
                store(dv, dvalue_g.at[key_part, row, tokens, head, _after(first_value, columns)])

            plgpu.barrier_wait(ready)
            for columns in my_keys:
                dq = _gpu.scaled(decays.from_start(scale), walk.matmul(do, before.at[columns, :].T))
                dq = walk.matmul(scores.at[1], k.at[:, columns], dq)
                if gates_g is not None:
                    row_sums(q.at[:, columns], dq)
                store(dq, dquery_g.at[value_part, row, tokens, head, _after(first_key, columns)])

                dk = _gpu.scaled(decays.to_end(), walk.matmul(v, carried.at[columns, :].T))
                dk = walk.matmul(scores.at[1].T, q.at[:, columns], dk)
                if gates_g is not None:
                    row_sums(k.at[:, columns], dk, -1.0)
                store(dk, dkey_g.at[value_part, row, tokens, head, _after(first_key, columns)])

            if gates_g is not None:
                row_sums(before.at[:, mine], dstate, decays.across())
            meet()

            # None needs the state before this chunk any more, nor `do` as it was.
            @pl.when((me == 0) & (i < last))
            def _next():
                fetch_state(i + 1)

            _gpu.scale_rows(do.at[:, mine], decays.from_start(scale))
            plgpu.commit_smem()
            return walk.matmul(q.T, do.at[:, mine], _gpu.scaled(decays.across(), dstate))

        @pl.when(me == 0)
        def _start():
            lax.fori_loop(0, stages, lambda i, _: fetch(i, i), None)
            fetch_state(0)
            walk.number(rules_g, small)

        meet()
        dstate = _gpu.load(dfinal_g.at[row, head, keys, _after(first_value, mine)], optimized=False)
        dstate = lax.fori_loop(0, walk.count, step, dstate)
        _gpu.store(dstate_g.at[row, head, keys, _after(first_value, mine)], dstate)
        # Shared memory lasts only as long as the thread block, so it has to outlive the stores that read it.
        plgpu.wait_smem_to_gmem(0)

    def partial(count, dim):
        return jax.ShapeDtypeStruct((count, *value.shape[:3], dim), value.dtype)

    def total(x):
        return x[0] if len(x) == 1 else x.sum(0, dtype=jnp.float32)

    # Of a chunk and warpgroup: v.dv from the state, column block by column block; q.dq and -k.dk of each of its blocks; S.D.
    inside = slice(chunk * value_blocks, chunk * (value_blocks + 2 * key_blocks))
    blocks = key_parts * value_parts
    sums_shape = (*walk.state_shape(walk.count)[:3], blocks * warpgroups, inside.stop + part.key_dim)
    sums = None if gates is None else jax.ShapeDtypeStruct(sums_shape, jnp.float32)
    dquery, dkey, dvalue, sums, dstate = walk.call(
        body,
        "backward",
        (query, key, value, dout, gates, rules, states, dfinal.astype(jnp.float32)),
        (
            partial(value_parts, walk.key_dim),
            partial(value_parts, walk.key_dim),
            partial(key_parts, walk.value_dim),
            sums,
            jax.ShapeDtypeStruct(walk.state_shape(), jnp.float32),
        ),
        {
            "query": walk.tiles(stages, chunk, part.key_dim),
            "key": walk.tiles(stages, chunk, part.key_dim),
            "value": walk.tiles(stages, chunk, part.value_dim),
            "dout": walk.tiles(stages, chunk, part.value_dim),
            "before": walk.tiles(1, part.key_dim, part.value_dim),
            "carried": walk.tiles(1, part.key_dim, part.value_dim),
            "scores": walk.tiles(1, 2, chunk, chunk),
            "out": _gpu.tiles(warpgroups, chunk, TILE, dtype=value.dtype),
        },
        walk.small_scratch(stages, gates, rules, arrays=4)
        | {"ready": plgpu.Barrier(num_arrivals=walk.terms), "together": plgpu.Barrier(num_arrivals=warpgroups)},
        flops=5 * chunk * (walk.key_dim * value_parts + walk.value_dim * key_parts) + 8 * walk.key_dim * walk.value_dim,
        exponentials=0 if gates is None else 5 * chunk // 2 * blocks,
        blocks=blocks,
        warpgroups=warpgroups,
        own_barriers=True,
    )
    dquery, dkey = (walk.sum_heads(total(x)).astype(query.dtype)[:, : walk.time] for x in (dquery, dkey))
    dvalue = total(dvalue).astype(value.dtype)
    dlog_decay = None
    if log_decay is not None:
        tokens = sums[..., inside].reshape(*sums.shape[:3], -1, chunk).sum(3)
        leaving = sums[..., : inside.start].sum((3, 4)) + sums[..., inside.stop :].sum((3, 4))
        dlog_decay = walk.log_decay_gradient(tokens, leaving, log_decay, document)
    return dquery, dkey, dvalue[:, : walk.time], dlog_decay, dstate


def summary(
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array | None,
    document: jax.Array | None,
    boundary: jax.Array | None,
    *,
    parts: int,
    reverse: bool = False,
    scale: float = 1.0,
    interpret: bool = False,
) -> jax.Array:
    """The states that parts of rows leave if they begin with none, or the cotangents of the states before them if that after them is none.

    Args:
        key: [B P, L, G, K] for P parts, as for ``forward``, and so are value, log_decay, document, boundary and interpret; the queries in reverse.
        value: see there; the cotangent of the output in reverse.
        log_decay: see there.
        document: see there.
        boundary: see there.
        parts: P. The last one is left out, or the first one in reverse: nothing depends on it.
        reverse: sum up the cotangents.
        scale: a factor.
        interpret: see there.

    Returns:
        [B (P - 1), H, K, V] float32.
    """
    walk = _gpu.Walk.over(_FAMILY, key, value, interpret)
    key, value = walk.operands(key, value)
    gates, rules = walk.vectors(walk.gates(log_decay, document)), walk.rules(document, boundary)
    chunk, width, stages = walk.chunk, TILE, min(_SUMMARY_STAGES[walk.key_dim], walk.count)

    def body(key_g, value_g, gates_g, rules_g, sum_g, *, tiles, small):
        full = small["full"]
        target, head, block = walk.place()
        row = target // (parts - 1) * parts + lax.rem(target, parts - 1) + int(reverse)
        columns = pl.ds(block * width, width)

        def fetch(i, slot):
            n = walk.count - 1 - i if reverse else i
            tokens = pl.ds(n * chunk, chunk)
            walk.load(key_g.at[row, tokens, head // walk.repeats], tiles["key"], slot, full)
            walk.load(value_g.at[row, tokens, head, columns], tiles["value"], slot, full)
            walk.load_small(gates_g, rules_g, row, head, n, small, slot)

        def step(i, total):
            slot = lax.rem(i, stages)
            plgpu.barrier_wait(full.at[slot])
            k, v = tiles["key"].at[slot], tiles["value"].at[slot]
            decays = walk.decays(gates_g is not None, rules_g, small, slot)
            decays.clear_padding(k, v)
            if (weights := decays.from_start() if reverse else decays.to_end()) is not None:
                _gpu.scale_rows(v, weights)
                plgpu.commit_smem()
            total = walk.matmul(k.T, v, _gpu.scaled(decays.across(), total))
            # All threads have read the slot before TMA refills it.
            plgpu.commit_smem()
            pl.when(i + stages < walk.count)(lambda: fetch(i + stages, slot))
            return total

        lax.fori_loop(0, stages, lambda i, _: fetch(i, i), None)
        walk.number(rules_g, small)
        nothing = plgpu.layout_cast(jnp.zeros((walk.key_dim, width), jnp.float32), plgpu.Layout.WGMMA)
        total = lax.fori_loop(0, walk.count, step, nothing)
        _gpu.store(sum_g.at[target, head, :, columns], _gpu.scaled(None if scale == 1.0 else scale, total))

    summed_up = dataclasses.replace(walk, batch=walk.batch // parts * (parts - 1))
    return summed_up.call(
        body,
        "summary",
        (key, value, gates, rules),
        jax.ShapeDtypeStruct(summed_up.state_shape(), jnp.float32),
        {"key": walk.tiles(stages, chunk, walk.key_dim), "value": walk.tiles(stages, chunk, width)},
        walk.small_scratch(stages, gates, rules, arrays=2),
        flops=2 * walk.key_dim * walk.value_dim,
        exponentials=0 if gates is None else 1,
        blocks=walk.value_dim // width,
        own_barriers=True,
    )


def _after(start, columns):
    """The columns of a block that starts there."""
    return pl.ds(start + columns.start, columns.size)
