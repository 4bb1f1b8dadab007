r"""Chunked linear attention with one decay per key channel on Hopper GPUs, forward and backward, for Pallas' Mosaic GPU lowering.

.. math:: S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T, \qquad o_t = scale \cdot S_t^T q_t

per batch row and value head, with a float32 state :math:`S` [K, V] and operands in bfloat16, or in float32 as pairs of it. Tokens are cut
into chunks of C = 64. With S the state before a chunk, :math:`G_{ic}` the sum of the log decays of channel c up to and including token i,

.. math::
    O = P V + R S, \quad S \leftarrow e^{G_C} S + W^T V, \qquad
    P_{ij} = scale \sum_c q_{ic} k_{jc} e^{G_{ic} - G_{jc}} \; (j \le i), \quad R = scale \cdot e^G Q, \quad W = e^{G_C - G} K.

**Levels.** :math:`e^{G_i - G_j}` cannot be split into :math:`e^{G_i}` and :math:`e^{-G_j}`, which overflows. So pairs of tokens are taken by levels
l = 0 .. 5: j is in the first and i in the second half of a block of :math:`2^{l+1}` tokens. The decay is exp of the sum from the middle up to i
times exp of the sum after j up to the middle, both at most 1. Let :math:`E` [C, K] have the one or the other, whichever half a token is
in, and :math:`Z` be E times queries in second halves and keys in first ones. Then :math:`Z Z^T` has the weights of all pairs of the level.

**Sums of gates** are products too, with matrices of 0 and 1 that are made in registers where they are used: of log decays in units of
log 2, in two parts of bfloat16 each. Nothing is subtracted, so an exponent is off by at most 2^-17 of itself, and a large one stands for a
decay of 0: ``RESET`` at the start of a document, and for log decays below it. The gate of padding is 0, its keys, values and
queries are selected away, and no other masks are needed for documents.

**Forward.** ``_prepare`` makes P, R and W, one thread block per chunk and head, from up to 128 key channels at a time. ``_carry`` walks a row;
the grid is (batch, heads, blocks of 64 value columns), the K x 64 part of the state is in registers. A pass that will be differentiated
also stores the state before every chunk as the operand it is; P, R and W are made again in the backward pass.

**Backward.** With dO and the cotangent D of the state after a chunk,

    dV = P^T dO + W D,    D <- e^{G_C} D + R^T dO,

which is the forward pass from the last chunk to the first, with R and W exchanged: ``_carry`` again. ``_differentiate`` makes the rest, one
thread block per chunk, head and block of 64 key channels, from 128 value columns at a time. With the symmetric matrix X of cotangents of pairs,
:math:`X_{ij} = X_{ji} = scale \cdot dO_i V_j` for j <= i, and :math:`dZ = X Z` for the pairs of a level,

    dQ = scale e^G (dO S^T) + X_ii K + E dZ (second halves),    dK = e^{G_C - G} (V D^T) + X_ii Q + E dZ (first halves).

**Gradient of the log decays.** That of an exponent is Z dZ, and sums of gates have the transposed sums of these as gradients: products with
the transposed matrices of 0 and 1, without a subtraction here either. What crosses the chunk adds :math:`\sum_V S D` times e^{G_C} to all tokens.

**Shared memory** in KiB with its vectors and rules (2, as references are aligned), and how many thread blocks of an SM it and the
registers leave room for:

    K, V       _prepare                  _carry                                        _differentiate
    64, 64     4 x 8 + 16 + 2 = 50; 3    2 x 24 + R 8 + S 8 + O 8 + 2 = 74; 3          32 + 4 x 8 + X 8 + 3 = 75; 2
    64, 128    the same                  the same                                      32 + 4 x 16 + X 8 + 3 = 107; 2
    128, 64    4 x 16 + 24 + 2 = 90; 2   2 x 32 + R 16 + S 16 + O 8 + 2 = 106; 2       as 64, 64
    128, 128   the same                  the same                                      as 64, 128
    256, any   as 128, any               2 x 48 + R 32 + S 32 + O 8 + 3 = 171; 1       as 64, 64, or 64, 128 if V is more

V = 256 goes with K = 256 only. Float32 takes twice as much but for gates, so K = V = 64 only: 82; 2, 146; 1 and 131; 1. ``_blocks`` cuts larger ones.

**Registers** per thread: for K = 64, 128 and 256 up to 140, 177 and 252 in ``_prepare``, 109, 156 and 200 in ``_carry``; up to 248 in
``_differentiate`` (three sums of 32, a tile of decays and its like), 255 if V is 256, without spills. In float32 they are 224, 146 and 255.

**Parallelism.** Walks are serial: SMs idle with fewer than 132 batch rows times heads times blocks of columns.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _gpu
from pallas_kernels._blocks import block_size
from pallas_kernels._gpu import HEADS, TILE, Config, plgpu
from pallas_kernels._gpu_channels import LEVELS, Pairs, as_float, split_gates

_FAMILY = "linear_attention_channels"
_WIDEST = 2 * HEADS[-1]  # in bfloat16


def block_sizes(key_dim: int, value_dim: int, dtype: jnp.dtype) -> tuple[int, int]:
    """Sizes of the blocks of K and V in which heads are taken. V of 256 goes with K of as many only: with fewer it would spill."""
    if dtype != jnp.bfloat16:
        return HEADS[0], HEADS[0]
    keys = block_size(key_dim, (*HEADS, _WIDEST))
    return keys, block_size(value_dim, (*HEADS, _WIDEST) if keys == _WIDEST else HEADS)


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    document: jax.Array | None,
    boundary: jax.Array | None,
    *,
    scale: float,
    save: bool,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, _gpu.Operand | None]:
    """As ``gpu.forward``, with log_decay [B, T, H, K]."""
    walk = _gpu.Walk.over(_FAMILY, query, value, interpret)
    config = config or Config()
    query, key, value = walk.operands(query, key, value)
    gates, across = split_gates(walk, log_decay, document)
    rules = walk.rules(document, boundary)
    weights, reading, writing = _prepare(walk, query, key, gates, rules, scale=scale)
    output, final, states = _carry(
        walk, reading, writing, value, weights, across, rules, state, save=save, reverse=False, stages=config.stages
    )
    return output[:, : walk.time], final, states


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    document: jax.Array | None,
    boundary: jax.Array | None,
    states: _gpu.Operand,
    dout: jax.Array,
    dfinal: jax.Array,
    *,
    scale: float,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """As ``gpu.backward``, with log_decay and its gradient [B, T, H, K]."""
    walk = _gpu.Walk.over(_FAMILY, query, value, interpret)
    config = config or Config()
    query, key, value, dout = walk.operands(query, key, value, dout.astype(value.dtype))
    gates, across = split_gates(walk, log_decay, document)
    rules = walk.rules(document, boundary)
    weights, reading, writing = _prepare(walk, query, key, gates, rules, scale=scale)
    dvalue, dstate, dstates = _carry(
        walk, writing, reading, dout, weights, across, None, dfinal, save=True, reverse=True, stages=config.backward_stages
    )  # fmt: skip
    dquery, dkey, dlog_decay = _differentiate(
        walk, query, key, value, dout, gates, across, rules, states, dstates, scale=scale
    )
    dquery, dkey = (walk.sum_heads(x.array()).astype(query.dtype)[:, : walk.time] for x in (dquery, dkey))
    dlog_decay = dlog_decay[:, : walk.time]
    if document is not None:
        dlog_decay = jnp.where(document[..., None, None] >= 0, dlog_decay, 0.0)
    return dquery, dkey, dvalue[:, : walk.time], dlog_decay, dstate


def _zero(walk: _gpu.Walk, rules: _gpu.Decays):
    """As ``Walk.zero``, for K of 256: float32, with 64, does better without."""
    return rules.zero() if walk.key_dim == _WIDEST else 0


def _prepare(walk: _gpu.Walk, query, key, gates, rules, *, scale) -> tuple[_gpu.Operand, _gpu.Operand, _gpu.Operand]:
    """P [B, H, N, C, C], R and W [B, T, H, K]; 0 for what padding reads and writes.

    Sums over channels are those over blocks of 128, which come in turns: so registers and memory do not grow further with K.
    """
    chunk, width = walk.chunk, min(walk.key_dim, HEADS[-1])
    turns = walk.key_dim // width

    def body(query_g, key_g, high_g, low_g, rules_g, weights_g, reading_g, writing_g, *, tiles, small):
        z, weights, full = tiles["z"], tiles["weights"], small["full"]
        row, head, n = walk.place()
        tokens = pl.ds(n * chunk, chunk)
        pairs = Pairs(walk)

        def columns(turn):
            return pl.ds(turn * width, width)

        def fetch(turn):
            for name, source in (
                ("query", query_g.at[row, tokens, head // walk.repeats, columns(turn)]),
                ("key", key_g.at[row, tokens, head // walk.repeats, columns(turn)]),
                ("high", high_g.at[row, tokens, head, columns(turn)]),
                ("low", low_g.at[row, tokens, head, columns(turn)]),
            ):
                walk.load(source, tiles[name], 0, full)
            walk.load_small(None, rules_g, row, head, n, small, 0)

        def add(mask, product, total):
            return jnp.where(mask, product if turns == 1 else product + total, total)

        def add_turn(turn, total):
            plgpu.barrier_wait(full.at[0])
            q, k, high, low = (tiles[name].at[0] for name in ("query", "key", "high", "low"))
            walk.decays(False, rules_g, small, 0).clear_padding(q, k)
            blocks = list(zip(*map(_gpu.parts, (q, k, z, high, low))))

            def add_level(level, total):
                for my_q, my_k, my_z, *my_gates in blocks:
                    decays = pairs.decays(pairs.level(level), my_gates)
                    x = jnp.where(pairs.second(level), as_float(my_q), as_float(my_k))
                    my_z[...] = decays * x
                # wgmma reads through another proxy than the threads write.
                plgpu.commit_smem()
                return add(pairs.of(level), walk.matmul(z, z.T), total)

            total = lax.fori_loop(0, LEVELS, add_level, add(pairs.same, walk.matmul(q, k.T), total))
            for my_q, my_k, _, *my_gates in blocks:
                my_q[...] = scale * pairs.decays(pairs.upto(), my_gates) * as_float(my_q)
                my_k[...] = pairs.decays(pairs.after(), my_gates) * as_float(my_k)
            plgpu.commit_smem()
            _gpu.send(q, reading_g.at[row, tokens, head, columns(turn)])
            _gpu.send(k, writing_g.at[row, tokens, head, columns(turn)])

            @pl.when(turn + 1 < turns)
            def _next():
                # The stores have left shared memory.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                fetch(turn + 1)

            return total

        fetch(0)
        nothing = plgpu.layout_cast(jnp.zeros((chunk, chunk), jnp.float32), plgpu.Layout.WGMMA)
        total = add_turn(0, nothing) if turns == 1 else lax.fori_loop(0, turns, add_turn, nothing)
        weights[...] = jnp.where(pairs.lower, scale * total, 0.0)
        plgpu.commit_smem()
        _gpu.send(weights, weights_g.at[row, head, n])
        # Shared memory lasts only as long as the thread block, so it has to outlive the stores that read it.
        plgpu.wait_smem_to_gmem(0)

    per_head = walk.template(*gates[0].shape)
    return walk.call(
        body,
        "prepare",
        (query, key, *gates, rules),
        (
            walk.template(*walk.state_shape(walk.count)[:3], chunk, chunk),
            per_head,
            per_head,
        ),
        {
            "query": walk.tiles(1, chunk, width),
            "key": walk.tiles(1, chunk, width),
            "high": _gpu.tiles(1, chunk, width),
            "low": _gpu.tiles(1, chunk, width),
            "z": walk.tiles(chunk, width),
            "weights": walk.tiles(chunk, chunk),
        },
        walk.small_scratch(1, None, rules, arrays=2, others=2),
        flops=2 * chunk * walk.key_dim * (3 * LEVELS + 5),
        exponentials=walk.key_dim * (LEVELS + 2),
        blocks=walk.count,
    )


def _carry(
    walk: _gpu.Walk, reading, writing, value, weights, across, rules, state, *, save: bool, reverse: bool, stages: int
):  # fmt: skip
    """O = P V + R S and S <- exp(G_C) S + W^T V, chunk after chunk; if ``reverse``, from the last to the first and with P^T.

    Args:
        walk: sizes.
        reading: R [B, T, H, K].
        writing: W [B, T, H, K].
        value: V [B, T, H, V].
        weights: P [B, H, N, C, C].
        across: exp(G_C) [B, H, N, 1, K].
        rules: of the tokens, if V may hold anything at padding; else None.
        state: S [B, H, K, V].
        save: whether to return the states that the chunks read.
        reverse: see above.
        stages: slots of shared memory for chunks.

    Returns:
        O [B, T, H, V], the last state [B, H, K, V] float32, and the states that the chunks read [B, H, N, K, V], or None.
    """
    chunk, width, stages = walk.chunk, TILE, min(stages, walk.count)

    def body(
        reading_g, writing_g, value_g, weights_g, across_g, rules_g, state_g, out_g, final_g, states_g, *, tiles, small
    ):
        writing_s, value_s, weights_s = (tiles[x] for x in ("writing", "value", "weights"))
        full, ready = small["full"], small["ready"]
        row, head, block = walk.place()
        columns = pl.ds(block * width, width)

        def place(i):
            return walk.count - 1 - i if reverse else i

        def fetch(i, slot):
            tokens = pl.ds(place(i) * chunk, chunk)
            walk.load(writing_g.at[row, tokens, head], writing_s, slot, full)
            walk.load(value_g.at[row, tokens, head, columns], value_s, slot, full)
            walk.load(weights_g.at[row, head, place(i)], weights_s, slot, full)
            walk.load_small(across_g, rules_g, row, head, place(i), small, slot)

        def fetch_reading(i):
            # Not needed to the end: one slot will do, and leaves room for another thread block.
            _gpu.fetch(reading_g.at[row, pl.ds(place(i) * chunk, chunk), head], tiles["reading"].at[0], ready)

        def step(i, state):
            n, slot = place(i), lax.rem(i, stages)
            plgpu.barrier_wait(full.at[slot])
            w, v, weights = writing_s.at[slot], value_s.at[slot], weights_s.at[slot]
            rules = walk.decays(False, rules_g, small, slot)
            zero = _zero(walk, rules)
            asked, carried, out = (tiles[name].at[zero] for name in ("reading", "carried", "out"))
            rules.clear_padding(v)
            if save:
                # The store of the last copy has left shared memory; the output's may still be under way.
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            carried[...] = state
            # wgmma and TMA read through another proxy than the threads write.
            plgpu.commit_smem()
            if save:
                _gpu.send(carried, states_g.at[row, head, n, :, columns])
            plgpu.barrier_wait(ready)
            o = walk.matmul(weights.T if reverse else weights, v, walk.matmul(asked, carried))
            # The store of the last output, the newest but for this step's copy of the state.
            plgpu.wait_smem_to_gmem(int(save), wait_read_only=True)
            out[...] = o.astype(out.dtype)
            # All threads have read what TMA refills, too.
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, out_g.at[row, pl.ds(n * chunk, chunk), head, columns])
            pl.when(i + 1 < walk.count)(lambda: fetch_reading(i + 1))
            state = walk.matmul(w.T, v, _gpu.scaled(_gpu.vector(small["vectors"].at[slot, 0], 1), state))
            plgpu.commit_smem()
            pl.when(i + stages < walk.count)(lambda: fetch(i + stages, slot))
            return state

        lax.fori_loop(0, stages, lambda i, _: fetch(i, i), None)
        fetch_reading(0)
        walk.number(rules_g, small)
        state = _gpu.load(state_g.at[row, head, :, columns], optimized=False)
        state = lax.fori_loop(0, walk.count, step, state)
        _gpu.store(final_g.at[row, head, :, columns], state)
        # Shared memory lasts only as long as the thread block, so it has to outlive the stores that read it.
        plgpu.wait_smem_to_gmem(0)

    return walk.call(
        body,
        "unwind" if reverse else "read",
        (reading, writing, value, weights, across, rules, state.astype(jnp.float32)),
        (
            jax.ShapeDtypeStruct(value.shape, value.dtype),
            jax.ShapeDtypeStruct(walk.state_shape(), jnp.float32),
            walk.template(*walk.state_shape(walk.count)) if save else None,
        ),
        {
            "reading": walk.tiles(1, chunk, walk.key_dim),
            "writing": walk.tiles(stages, chunk, walk.key_dim),
            "value": walk.tiles(stages, chunk, width),
            "weights": walk.tiles(stages, chunk, chunk),
            "carried": walk.tiles(1, walk.key_dim, width),
            "out": _gpu.tiles(1, chunk, width, dtype=value.dtype),
        },
        walk.small_scratch(stages, across, rules, arrays=3) | {"ready": plgpu.Barrier(num_arrivals=walk.terms)},
        flops=2 * chunk * walk.value_dim + 4 * walk.key_dim * walk.value_dim,
        exponentials=0,
        blocks=walk.value_dim // width,
        own_barriers=True,
    )


def _differentiate(
    walk: _gpu.Walk, query, key, value, dout, gates, across, rules, states, dstates, *, scale
) -> tuple[_gpu.Operand, _gpu.Operand, jax.Array]:
    """dQ and dK [B, T, H, K] and the gradient of the log decays [B, T, H, K] in float32, all per value head."""
    chunk, width = walk.chunk, TILE
    key_blocks, some_values = walk.key_dim // width, min(walk.value_dim, HEADS[-1])
    turns = walk.value_dim // some_values

    def body(
        query_g, key_g, value_g, dout_g, high_g, low_g, across_g, rules_g, states_g, dstates_g,
        dquery_g, dkey_g, dgates_g, *, tiles, small,
    ):  # fmt: skip
        crossing, full = small["crossing"], small["full"]
        row, head, block = walk.place()
        n, block = block // key_blocks, lax.rem(block, key_blocks)
        tokens, columns = pl.ds(n * chunk, chunk), pl.ds(block * width, width)

        def fetch(turn, barrier):
            values = pl.ds(turn * some_values, some_values)
            for name, source in (
                ("value", value_g.at[row, tokens, head, values]),
                ("dout", dout_g.at[row, tokens, head, values]),
                ("before", states_g.at[row, head, n, columns, values]),
                ("after", dstates_g.at[row, head, n, columns, values]),
            ):
                _gpu.fetch(source, tiles[name].at[0], barrier)

        fetch(0, full.at[0])
        for name, source in (
            ("high", high_g.at[row, tokens, head, columns]),
            ("low", low_g.at[row, tokens, head, columns]),
            ("query", query_g.at[row, tokens, head // walk.repeats, columns]),
            ("key", key_g.at[row, tokens, head // walk.repeats, columns]),
        ):
            walk.load(source, tiles[name], 0, full)
        walk.load_small(across_g, rules_g, row, head, n, small, 0)
        walk.number(rules_g, small)
        plgpu.barrier_wait(full.at[0])
        rules = walk.decays(False, rules_g, small, 0)
        pairs = Pairs(walk)

        def of_keys():
            zero = _zero(walk, rules)
            return [tiles[name].at[zero] for name in ("query", "key", "high", "low")]

        def of_values():
            zero = _zero(walk, rules)
            return [tiles[name].at[zero] for name in ("value", "dout", "before", "after")]

        q, k, high, low = of_keys()
        v, do, before, after = of_values()
        rules.clear_padding(q, k, v)

        def place():
            # The state before the chunk is not needed any more: Z and its like take its place.
            return of_values()[2].at[:, pl.ds(0, width)]

        def add_sums(sums, gradients, total):
            # Through shared memory, as the right factor of a product.
            z = place()
            z[...] = gradients
            plgpu.commit_smem()
            return walk.matmul(sums, z, total)

        def some(mask):
            terms = map(_gpu.load, tiles["cotangents"].at[_zero(walk, rules)].terms)
            return _gpu.Operand(tuple(jnp.where(mask, x, jnp.zeros_like(x)) for x in terms))

        # Sums over value columns.
        x, dq, dk = None, None, None
        for turn in range(turns):
            if turn > 0:
                plgpu.commit_smem()  # all warps have done what reads the last ones
                fetch(turn, small["turn"])
                plgpu.barrier_wait(small["turn"])
                v, do, before, after = of_values()
                rules.clear_padding(v)
            held = sum((as_float(x) * as_float(y)).sum(1) for x, y in zip(_gpu.parts(before), _gpu.parts(after)))
            # Through shared memory, for want of registers.
            crossing[...] = held if turn == 0 else _gpu.vector(crossing, 1) + held
            if turns > 1:
                dq, dk = walk.matmul(do, before.T, dq), walk.matmul(v, after.T, dk)
            x = jnp.where(pairs.lower, walk.matmul(do, v.T, x), walk.matmul(v, do.T, x))
        crossing[...] = _gpu.vector(small["vectors"].at[0, 0, columns], 1) * _gpu.vector(crossing, 1)
        tiles["cotangents"].at[0][...] = scale * x
        plgpu.commit_smem()
        q, k, high, low = of_keys()
        dq = walk.matmul(do, before.T) if dq is None else dq
        dq = scale * pairs.decays(pairs.upto(), (high, low)) * dq
        dgates = _gpu.columns(_gpu.vector(crossing, 0), (chunk, width))
        dgates = add_sums(pairs.upto(transposed=True), dq * as_float(q), dgates)
        dk = walk.matmul(v, after.T) if dk is None else dk
        dk = pairs.decays(pairs.after(), (high, low)) * dk
        dgates = add_sums(pairs.after(transposed=True), dk * as_float(k), dgates)
        dq = walk.matmul(some(pairs.same), k, dq)
        dk = walk.matmul(some(pairs.same), q, dk)

        def add_level(level, gradients):
            dq, dk, dgates = gradients
            q, k, high, low = of_keys()
            z = place()
            second = pairs.second(level)

            def either():
                return jnp.where(second, as_float(q), as_float(k))

            decays = pairs.decays(pairs.level(level), (high, low))
            z[...] = decays * either()
            plgpu.commit_smem()
            dx = walk.matmul(some(pairs.of(level)), z)
            if walk.terms > 1:
                # For want of registers: Z dZ goes to its place at once, and the decays are made again.
                z[...] = as_float(z) * dx
                plgpu.commit_smem()
                decays = pairs.decays(pairs.level(level), (high, low))
            dx = decays * dx
            dq, dk = dq + jnp.where(second, dx, 0.0), dk + jnp.where(second, 0.0, dx)
            sums = pairs.level(level, transposed=True)
            if walk.terms > 1:
                return dq, dk, walk.matmul(sums, z, dgates)
            return dq, dk, add_sums(sums, dx * either(), dgates)

        dq, dk, dgates = lax.fori_loop(0, LEVELS, add_level, (dq, dk, dgates))
        _gpu.store(dgates_g.at[row, tokens, head, columns], dgates)
        q[...] = dq
        k[...] = dk
        plgpu.commit_smem()
        _gpu.send(q, dquery_g.at[row, tokens, head, columns])
        _gpu.send(k, dkey_g.at[row, tokens, head, columns])
        # Shared memory lasts only as long as the thread block, so it has to outlive the stores that read it.
        plgpu.wait_smem_to_gmem(0)

    per_head = walk.template(*gates[0].shape)
    return walk.call(
        body,
        "differentiate",
        (query, key, value, dout, *gates, across, rules, states, dstates),
        (per_head, per_head, jax.ShapeDtypeStruct(per_head.shape, jnp.float32)),
        {
            "query": walk.tiles(1, chunk, width),
            "key": walk.tiles(1, chunk, width),
            "value": walk.tiles(1, chunk, some_values),
            "dout": walk.tiles(1, chunk, some_values),
            "high": _gpu.tiles(1, chunk, width),
            "low": _gpu.tiles(1, chunk, width),
            "before": walk.tiles(1, width, some_values),
            "after": walk.tiles(1, width, some_values),
            "cotangents": walk.tiles(1, chunk, chunk),
        },
        walk.small_scratch(1, across, rules, arrays=6, others=2)
        | {"crossing": plgpu.SMEM((width,), jnp.float32), "turn": plgpu.Barrier(num_arrivals=4 * walk.terms)},
        flops=2 * chunk * (walk.key_dim * (4 * LEVELS + 8) + 2 * walk.value_dim * key_blocks)
        + 4 * walk.key_dim * walk.value_dim,
        exponentials=walk.key_dim * (LEVELS + 2),
        blocks=walk.count * key_blocks,
    )
