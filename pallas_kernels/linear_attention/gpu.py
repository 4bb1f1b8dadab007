r"""Chunked linear attention on Hopper GPUs, no decay or one per head, forward and backward, for Pallas' Mosaic GPU lowering.

.. math:: S_t = e^{g_t} S_{t-1} + k_t v_t^T, \qquad o_t = scale \cdot S_t^T q_t

per batch row and value head, with a float32 state :math:`S` [K, V] and operands in bfloat16, or in float32 as pairs of it. Tokens are cut
into chunks of C = 64. With S the state before a chunk and :math:`G_i` the sum of its log decays up to and including token i,

.. math::
    O = A V + (e^G Q) S, \quad A_{ij} = q_i k_j e^{G_i - G_j} \; (j \le i), \qquad S \leftarrow e^{G_C} S + (e^{G_C - G} K)^T V.

Documents, padding and the precision of the decays are those of ``_gpu``.

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

**Shared memory** in KiB, and how many thread blocks of an SM it and the registers leave room for:

    K, V       forward                                   backward
    64, 64     2 stages x 24 + S 8 + output 8 = 64; 3    2 stages x 32 + S 8 + D 8 + A, P 16 + output 8 = 104; 2
    128, 128   2 stages x 40 + S 16 + output 8 = 104; 2  2 stages x 64 + S 32 + D 32 + A, P 16 + outputs 16 = 224; 1

plus at most 3 for gates, documents and barriers. Float32 takes twice as much, so K = V = 64 only (``_blocks`` cuts larger ones): 128 forward and
208 backward, one thread block. **Registers** per thread: S takes K/2 forward, D takes 32 (K = V = 64) or 64
backward, and a 64 x 64 tile 32 as a sum and 16 as an operand. In all that is up to 166 (K = 64) and 212 forward, 174 (K = V = 64)
and 255 backward, without spills; in float32 up to 232 and 203. 128 value columns per warpgroup would spill forward.

**Parallelism.** Walks are serial: SMs idle with fewer than 132 batch rows times heads.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _configs, _gpu
from pallas_kernels._blocks import block_size
from pallas_kernels._gpu import HEADS, TILE, Config, plgpu

_FAMILY = "linear_attention"


def block_sizes(key_dim: int, value_dim: int, dtype: jnp.dtype) -> tuple[int, int]:
    """Sizes of blocks in which K and V are taken: in float32, a tile takes up twice the memory."""
    sizes = HEADS if dtype == jnp.bfloat16 else HEADS[:1]
    return block_size(key_dim, sizes), block_size(value_dim, sizes)


def default_config(key_dim: int, value_dim: int) -> Config:
    """That of ``_configs``, else two stages, or three in the backward pass where only one thread block fits an SM in any case."""
    backward_stages = 2 if key_dim == value_dim else 3
    return Config(
        **({"backward_stages": backward_stages} | dict(_configs.tuned(_FAMILY, key=key_dim, value=value_dim)))
    )


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
    chunk, width, stages = walk.chunk, TILE, min(config.stages, walk.count)

    def body(query_g, key_g, value_g, gates_g, rules_g, state_g, out_g, final_g, states_g, *, tiles, small):
        query_s, key_s, value_s, carried, out = (tiles[name] for name in ("query", "key", "value", "carried", "out"))
        full = small["full"]
        row, head, block = walk.place()
        columns = pl.ds(block * width, width)

        def fetch(n, slot):
            tokens = pl.ds(n * chunk, chunk)
            group = head // walk.repeats
            walk.load(query_g.at[row, tokens, group], query_s, slot, full)
            walk.load(key_g.at[row, tokens, group], key_s, slot, full)
            walk.load(value_g.at[row, tokens, head, columns], value_s, slot, full)
            walk.load_small(gates_g, rules_g, row, head, n, small, slot)

        def step(n, state):
            slot = lax.rem(n, stages)
            plgpu.barrier_wait(full.at[slot])
            q, k, v = query_s.at[slot], key_s.at[slot], value_s.at[slot]
            decays = walk.decays(gates_g is not None, rules_g, small, slot)
            decays.clear_padding(k, v)
            if save:
                # The store of the last copy has left shared memory; the output's may still be under way.
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            carried[...] = state
            # wgmma and TMA read through another proxy than the threads write.
            plgpu.commit_smem()
            if save:
                _gpu.send(carried, states_g.at[row, head, n, :, columns])
            scores = decays.pairs(walk.matmul(q, k.T), scale)
            o = walk.matmul(scores, v, _gpu.scaled(decays.from_start(scale), walk.matmul(q, carried)))
            # The store of the last output, the newest but for this step's copy of the state. All warps wait, so all have read the values.
            plgpu.wait_smem_to_gmem(int(save), wait_read_only=True)
            out[...] = o.astype(out.dtype)
            _gpu.scale_rows(v, decays.to_end())
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, out_g.at[row, pl.ds(n * chunk, chunk), head, columns])
            state = walk.matmul(k.T, v, _gpu.scaled(decays.across(), state))
            # All threads have read the slot before TMA refills it.
            plgpu.commit_smem()
            pl.when(n + stages < walk.count)(lambda: fetch(n + stages, slot))
            return state

        lax.fori_loop(0, stages, lambda n, _: fetch(n, n), None)
        walk.number(rules_g, small)
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
            "carried": walk.tiles(walk.key_dim, width),
            "out": _gpu.tiles(chunk, width, dtype=value.dtype),
        },
        walk.small_scratch(stages, gates, rules, arrays=3),
        flops=2 * chunk * (walk.key_dim + walk.value_dim) + 4 * walk.key_dim * walk.value_dim,
        exponentials=0 if gates is None else chunk,
        blocks=walk.value_dim // width,
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
    warpgroups = walk.warpgroups
    value_blocks, key_blocks = (dim // warpgroups // TILE for dim in (walk.value_dim, walk.key_dim))

    def body(
        query_g, key_g, value_g, dout_g, gates_g, rules_g, states_g, dfinal_g, dquery_g, dkey_g, dvalue_g, sums_g, dstate_g,
        *, tiles, small,
    ):  # fmt: skip
        query_s, key_s, value_s, dout_s = (tiles[name] for name in ("query", "key", "value", "dout"))
        full, ready = small["full"], small["ready"]
        (row, head, _), me = walk.place(), walk.warpgroup()
        mine = pl.ds(me * value_blocks * TILE, value_blocks * TILE)
        my_values = [pl.ds((me * value_blocks + i) * TILE, TILE) for i in range(value_blocks)]
        my_keys = [pl.ds((me * key_blocks + i) * TILE, TILE) for i in range(key_blocks)]

        def fetch(i, slot):
            tokens = pl.ds((last - i) * chunk, chunk)
            group = head // walk.repeats
            walk.load(query_g.at[row, tokens, group], query_s, slot, full)
            walk.load(key_g.at[row, tokens, group], key_s, slot, full)
            walk.load(value_g.at[row, tokens, head], value_s, slot, full)
            walk.load(dout_g.at[row, tokens, head], dout_s, slot, full)
            walk.load_small(gates_g, rules_g, row, head, last - i, small, slot)

        def fetch_state(i):
            _gpu.fetch(states_g.at[row, head, last - i], tiles["before"].at[0], ready)

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
            zero = walk.zero(decays)
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
                target = sums_g.at[row, head, n, me, pl.ds(place, sums.size)]
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
                store(dv, dvalue_g.at[row, tokens, head, columns])

            plgpu.barrier_wait(ready)
            for columns in my_keys:
                dq = _gpu.scaled(decays.from_start(scale), walk.matmul(do, before.at[columns, :].T))
                dq = walk.matmul(scores.at[1], k.at[:, columns], dq)
                if gates_g is not None:
                    row_sums(q.at[:, columns], dq)
                store(dq, dquery_g.at[row, tokens, head, columns])

                dk = _gpu.scaled(decays.to_end(), walk.matmul(v, carried.at[columns, :].T))
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

            _gpu.scale_rows(do.at[:, mine], decays.from_start(scale))
            plgpu.commit_smem()
            return walk.matmul(q.T, do.at[:, mine], _gpu.scaled(decays.across(), dstate))

        @pl.when(me == 0)
        def _start():
            lax.fori_loop(0, stages, lambda i, _: fetch(i, i), None)
            fetch_state(0)
            walk.number(rules_g, small)

        meet()
        dstate = _gpu.load(dfinal_g.at[row, head, :, mine], optimized=False)
        dstate = lax.fori_loop(0, walk.count, step, dstate)
        _gpu.store(dstate_g.at[row, head, :, mine], dstate)
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
        (
            per_head,
            per_head,
            jax.ShapeDtypeStruct(value.shape, value.dtype),
            sums,
            jax.ShapeDtypeStruct(walk.state_shape(), jnp.float32),
        ),
        {
            "query": walk.tiles(stages, chunk, walk.key_dim),
            "key": walk.tiles(stages, chunk, walk.key_dim),
            "value": walk.tiles(stages, chunk, walk.value_dim),
            "dout": walk.tiles(stages, chunk, walk.value_dim),
            "before": walk.tiles(1, walk.key_dim, walk.value_dim),
            "carried": walk.tiles(1, walk.key_dim, walk.value_dim),
            "scores": walk.tiles(1, 2, chunk, chunk),
            "out": _gpu.tiles(warpgroups, chunk, TILE, dtype=value.dtype),
        },
        walk.small_scratch(stages, gates, rules, arrays=4)
        | {"ready": plgpu.Barrier(num_arrivals=walk.terms), "together": plgpu.Barrier(num_arrivals=warpgroups)},
        flops=5 * chunk * (walk.key_dim + walk.value_dim) + 8 * walk.key_dim * walk.value_dim,
        exponentials=0 if gates is None else 5 * chunk // 2,
        warpgroups=warpgroups,
        own_barriers=True,
    )
    dquery, dkey = (walk.sum_heads(x).astype(query.dtype)[:, : walk.time] for x in (dquery, dkey))
    dlog_decay = None
    if log_decay is not None:
        tokens = sums[..., inside].reshape(*sums.shape[:3], -1, chunk).sum(3)
        leaving = sums[..., : inside.start].sum((3, 4)) + sums[..., inside.stop :].sum((3, 4))
        dlog_decay = walk.log_decay_gradient(tokens, leaving, log_decay, document)
    return dquery, dkey, dvalue[:, : walk.time], dlog_decay, dstate
