r"""The chunked delta rule with one decay per key channel on Hopper GPUs, forward and backward, for Pallas' Mosaic GPU lowering.

.. math:: S' = diag(e^{g_t}) S_{t-1}, \qquad S_t = S' + \beta_t k_t (v_t - S'^T k_t)^T, \qquad o_t = scale \cdot S_t^T q_t

per batch row and value head, with a float32 state :math:`S` [K, V] and bfloat16 operands. Tokens are cut into chunks of
C = 64. With S the state before a chunk, :math:`G_{ic}` the sum of the log decays of channel c up to and including token i,
:math:`L_{ri} = \sum_c k_{rc} k_{ic} e^{G_{rc} - G_{ic}}` for i < r and :math:`P_{ri} = scale \sum_c q_{rc} k_{ic} e^{G_{rc} - G_{ic}}` for i <= r,

.. math::
    Z = M (V - A S), \quad M = (I + L \, diag(\beta))^{-1}, \quad W = diag(\beta) Z, \qquad O = R S + P W, \quad
    S \leftarrow e^{G_C} S + E^T W, \qquad R = scale \cdot e^G Q, \quad A = e^G K, \quad E = e^{G_C - G} K.

L and P are taken by levels of pairs of tokens and decays from products with the log decays, see ``_gpu_channels``; so documents, too, are
a matter of the gates. What padding holds is selected away.

**Forward.** ``_prepare`` makes M, P, R, A and E, one thread block per chunk and head. ``_read`` walks a row without looking at decays but
for those of whole chunks; the grid is (batch, heads, blocks of 64 value columns), the K x 64 part of the state is in registers. A pass that
will be differentiated also stores the bfloat16 copy of the state before every chunk, and keeps M; the rest is made again in the backward pass.

**Backward.** With dO and the cotangent D of the state after a chunk,

    dW = P^T dO + E D,    dR = M^T (beta dW),    dV = dR,    D <- e^{G_C} D + R^T dO - A^T dR:

``_unwind`` walks this from the last chunk to the first. The rest is made for all chunks at once. ``_recover`` repeats Z and W, and makes the
gradient of beta, :math:`\langle Z_r, dR_r \rangle / \beta_r` (see ``gpu``), and symmetric matrices X and Y of cotangents of pairs,
:math:`X_{ri} = X_{ir} = scale \cdot dO_r W_i` for i <= r and :math:`Y_{ri} = Y_{ir} = -dR_r W_i` for i < r. ``_differentiate`` has one thread block per
chunk, head and block of 64 key channels. With the decays F [C, K] of a level's tokens to the middles of its blocks, and X and Y
cut down to the level's pairs,

    dQ = scale e^G (dO S^T) + X_ii K + F X (F K) (second halves),
    dK = e^{G_C - G} (W D^T) - e^G (dR S^T) + X_ii Q + F X (F Q) (first halves) + F Y (F K).

**Gradient of the log decays.** That of an exponent is Q dQ + K dK of its part of the sums above, and sums of gates have the transposed sums
of these as gradients: products with the transposed matrices of 0 and 1. Nothing is subtracted, so that what tokens do to one another
loses nothing to what they do to others. What crosses the chunk adds :math:`\sum_V S D` times e^{G_C} to all tokens.

``_differentiate`` makes dQ and then dK, with the decays of every level once more, because both at a time spill. If V is 128, where shared memory
has room for one thread block only, each has a warpgroup of its own.

**Shared memory** in KiB with its vectors and rules (2, as references are aligned), and how many thread blocks of an SM it and the
registers leave room for. Stages are two for A, V and M, or E, dO and P; one for the rest:

    K, V       _prepare                   _read and _unwind                               _recover
    64, 64     6 x 8 + P 8 + 10 = 66; 2   2 x 24 + 3 x 8 + S 8 + O 8 + 2 = 90; 2          4 x 8 + M 8 + S 8 + 2 = 50; 4
    64, 128    the same                   the same                                        8 + 3 x 16 + M 8 + S 16 + 2 = 82; 2
    128, 64    6 x 16 + P 8 + 2 = 106; 2  2 x 32 + 2 x 16 + 8 + S 16 + O 8 + 2 = 131; 1   16 + 3 x 8 + M 8 + S 16 + 2 = 66; 3
    128, 128   the same                   the same                                        4 x 16 + M 8 + S 32 + 2 = 106; 2

``_differentiate``: Q, K and the log decays 32 + dO, dR, W 24 + S, D 16 + X, Y 16 + sums 16 + 3 = 107; 2 if V is 64, 147; 1 if it is 128.

**Registers** per thread: 175 (K = 64; more than 168 leave room for 2 thread blocks only) and 254 in ``_prepare``, 177 without M; up to 150 and 208
in ``_read``, 126 and 190 in ``_unwind``, 134 in ``_recover``, 251 in ``_differentiate``, without spills.

**Parallelism.** Walks are serial: SMs idle with fewer than 132 batch rows times heads times blocks of columns.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _gpu
from pallas_kernels._gpu import TILE, Config, plgpu
from pallas_kernels._gpu_channels import LEVELS, Pairs, as_float, split_gates
from pallas_kernels._gpu_inverse import unit_lower_inverse
from pallas_kernels._tokens import nonzero

_FAMILY = "delta_rule_channels"


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    document: jax.Array | None,
    boundary: jax.Array | None,
    *,
    scale: float,
    save: bool,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
    """As ``gpu.forward``, with log_decay [B, T, H, K]."""
    walk = _gpu.Walk.over(_FAMILY, query, value, interpret)
    config = config or Config()
    query, key, value = (walk.fill(x) for x in (query, key, value))
    gates, vectors = _small(walk, beta, log_decay, document)
    rules = walk.rules(document, boundary)
    chunks, inverse = _prepare(walk, query, key, gates, vectors, rules, scale=scale, invert=True)
    output, final, states = _read(walk, chunks, value, inverse, state, vectors, rules, save=save, stages=config.stages)
    return output[:, : walk.time], final, (states, inverse) if save else None


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array,
    document: jax.Array | None,
    boundary: jax.Array | None,
    residuals: tuple[jax.Array, jax.Array],
    dout: jax.Array,
    dfinal: jax.Array,
    *,
    scale: float,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """As ``gpu.backward``, with log_decay and its gradient [B, T, H, K]."""
    walk = _gpu.Walk.over(_FAMILY, query, value, interpret)
    config = config or Config()
    query, key, value, dout = (walk.fill(x) for x in (query, key, value, dout.astype(value.dtype)))
    states, inverse = residuals
    gates, vectors = _small(walk, beta, log_decay, document)
    rules = walk.rules(document, boundary)
    chunks, _ = _prepare(walk, query, key, gates, None, rules, scale=scale, invert=False)
    dvalue, dstates, dstate = _unwind(
        walk, chunks, dout, inverse, dfinal, vectors, rules, stages=config.backward_stages
    )
    written, pairs, steps = _recover(walk, chunks, value, dout, dvalue, inverse, states, vectors, rules, scale=scale)
    dquery, dkey, dlog_decay = _differentiate(
        walk, query, key, written, dout, dvalue, gates, *pairs, vectors, rules, states, dstates, scale=scale
    )
    dquery, dkey = (walk.sum_heads(x).astype(query.dtype)[:, : walk.time] for x in (dquery, dkey))
    dbeta, dlog_decay = walk.per_token(steps) / nonzero(beta), dlog_decay[:, : walk.time]
    if document is not None:
        real = document[..., None] >= 0
        dbeta, dlog_decay = jnp.where(real, dbeta, 0.0), jnp.where(real[..., None], dlog_decay, 0.0)
    return dquery, dkey, dvalue[:, : walk.time], dbeta, dlog_decay, dstate


def _small(walk: _gpu.Walk, beta, log_decay, document) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Gates as of ``split_gates``; step sizes and, after them, decays of whole chunks [B, H, N, 1, C + K]."""
    steps = nonzero(beta)
    gates, across = split_gates(walk, log_decay, document)
    return gates, jnp.concatenate([walk.per_head(walk.fill(steps))[:, :, :, None], across], -1)


def _steps(small, slot) -> Any:
    """Reference to the step sizes of a chunk."""
    return small["vectors"].at[slot, 0, pl.ds(0, TILE)]


def _across(small, slot, channels) -> jax.Array:
    """Decays of a whole chunk."""
    start, size = channels
    return _gpu.vector(small["vectors"].at[slot, 0, pl.ds(TILE + start, size)], 1)


def _prepare(walk: _gpu.Walk, query, key, gates, vectors, rules, *, scale, invert: bool):
    """(P [B, H, N, C, C], R, A and E [B, T, H, K]) and, if ``invert``, M [B, H, N, C, C]; in bfloat16, 0 for what padding reads and writes."""
    chunk = walk.chunk

    def body(
        query_g, key_g, high_g, low_g, vectors_g, rules_g, weights_g, asked_g, reading_g, writing_g, inverse_g,
        *, tiles, small,
    ):  # fmt: skip
        q, k, high, low = (tiles[name].at[0] for name in ("query", "key", "high", "low"))
        z, weights, full = tiles["z"], tiles["weights"], small["full"]
        reading = zk = tiles["zk"] if invert else z
        row, head, n = walk.place()
        tokens = pl.ds(n * chunk, chunk)
        for name, source in (
            ("query", query_g.at[row, tokens, head // walk.repeats]),
            ("key", key_g.at[row, tokens, head // walk.repeats]),
            ("high", high_g.at[row, tokens, head]),
            ("low", low_g.at[row, tokens, head]),
        ):
            walk.load(source, tiles[name], 0, full)
        walk.load_small(vectors_g, rules_g, row, head, n, small, 0)
        plgpu.barrier_wait(full.at[0])
        walk.decays(False, rules_g, small, 0).clear_padding(q, k)
        pairs = Pairs(walk)
        blocks = list(zip(*map(_gpu.parts, (q, k, z, zk, high, low))))

        def add_level(level, totals):
            for my_q, my_k, my_z, my_zk, *my_gates in blocks:
                decays = pairs.decays(pairs.level(level), my_gates)
                # Queries where they read and keys where they are read: its products with itself are all that P needs.
                my_z[...] = (decays * jnp.where(pairs.second(level), as_float(my_q), as_float(my_k))).astype(z.dtype)
                if invert:
                    my_zk[...] = (decays * as_float(my_k)).astype(z.dtype)
            # wgmma reads through another proxy than the threads write.
            plgpu.commit_smem()
            return tuple(jnp.where(pairs.of(level), walk.matmul(x, x.T), total) for x, total in zip((z, zk), totals))

        own = jnp.where(pairs.same, walk.matmul(q, k.T), 0.0)
        start = (own, jnp.where(pairs.same, 0.0, own)) if invert else (own,)
        scores, *overlaps = lax.fori_loop(0, LEVELS, add_level, start)
        weights[...] = jnp.where(pairs.lower, scale * scores, 0.0).astype(weights.dtype)
        for my_q, my_k, _, my_reading, *my_gates in blocks:
            decays = pairs.decays(pairs.upto(), my_gates)
            my_q[...] = (scale * decays * as_float(my_q)).astype(q.dtype)
            my_reading[...] = (decays * as_float(my_k)).astype(k.dtype)
            my_k[...] = (pairs.decays(pairs.after(), my_gates) * as_float(my_k)).astype(k.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(weights, weights_g.at[row, head, n])
        plgpu.copy_smem_to_gmem(q, asked_g.at[row, tokens, head])
        plgpu.copy_smem_to_gmem(reading, reading_g.at[row, tokens, head])
        plgpu.copy_smem_to_gmem(k, writing_g.at[row, tokens, head])
        if invert:
            # The gates and z are not needed any more.
            free = [part for tile in (high, low, z) for part in _gpu.parts(tile)]
            free += [] if tiles["spare"] is None else [tiles["spare"]]
            lower = jnp.where(pairs.lower, overlaps[0], 0.0)
            lower *= _gpu.columns(_gpu.vector(_steps(small, 0), 0), lower.shape)
            inverse = unit_lower_inverse(walk, lower, tuple(free[:2]), tuple(free[2:4]))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            weights[...] = inverse.astype(weights.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(weights, inverse_g.at[row, head, n])
        # Shared memory lasts only as long as the thread block, so it has to outlive the stores that read it.
        plgpu.wait_smem_to_gmem(0)

    per_head, square = gates[0], jax.ShapeDtypeStruct((*walk.state_shape(walk.count)[:3], chunk, chunk), query.dtype)
    *chunks, inverse = walk.call(
        body,
        "prepare" if invert else "prepare_again",
        (query, key, *gates, vectors, rules),
        (square, per_head, per_head, per_head, square if invert else None),
        {
            "query": _gpu.tiles(1, chunk, walk.key_dim),
            "key": _gpu.tiles(1, chunk, walk.key_dim),
            "high": _gpu.tiles(1, chunk, walk.key_dim),
            "low": _gpu.tiles(1, chunk, walk.key_dim),
            "z": _gpu.tiles(chunk, walk.key_dim),
            "zk": _gpu.tiles(chunk, walk.key_dim) if invert else None,
            "weights": _gpu.tiles(chunk, chunk),
            "spare": _gpu.tiles(chunk, chunk) if invert and walk.key_dim == TILE else None,
        },
        walk.small_scratch(1, vectors, rules, arrays=4),
        flops=2 * chunk * walk.key_dim * ((4 if invert else 3) * LEVELS + 5) + (36 * chunk * chunk if invert else 0),
        exponentials=walk.key_dim * (LEVELS + 2),
        blocks=walk.count,
    )
    return tuple(chunks), inverse


def _read(walk: _gpu.Walk, chunks, value, inverse, state, vectors, rules, *, save: bool, stages: int):
    """Output, final state, and states before the chunks if ``save``."""
    weights, asked, reading, writing = chunks
    chunk, width, stages = walk.chunk, TILE, min(stages, walk.count)

    def body(
        weights_g, asked_g, reading_g, writing_g, value_g, inverse_g, state_g, vectors_g, rules_g,
        out_g, final_g, states_g, *, tiles, small,
    ):  # fmt: skip
        weights_s, asked_s, writing_s = (tiles[name] for name in ("weights", "asked", "writing"))
        carried, out = tiles["carried"], tiles["out"]
        full, ready = small["full"], small["ready"]
        row, head, block = walk.place()
        columns = pl.ds(block * width, width)

        def fetch(n, slot):
            tokens = pl.ds(n * chunk, chunk)
            walk.load(reading_g.at[row, tokens, head], tiles["reading"], slot, full)
            walk.load(value_g.at[row, tokens, head, columns], tiles["value"], slot, full)
            walk.load(inverse_g.at[row, head, n], tiles["inverse"], slot, full)
            walk.load_small(vectors_g, rules_g, row, head, n, small, slot)

        def fetch_rest(n):
            # Needed last: one slot will do.
            tokens = pl.ds(n * chunk, chunk)
            plgpu.copy_gmem_to_smem(writing_g.at[row, tokens, head], writing_s, ready)
            plgpu.copy_gmem_to_smem(asked_g.at[row, tokens, head], asked_s, ready)
            plgpu.copy_gmem_to_smem(weights_g.at[row, head, n], weights_s, ready)

        def step(n, state):
            slot = lax.rem(n, stages)
            plgpu.barrier_wait(full.at[slot])
            reading, v, inverse = (tiles[name].at[slot] for name in ("reading", "value", "inverse"))
            walk.decays(False, rules_g, small, slot).clear_padding(v)
            if save:
                # The store of the last copy has left shared memory; the output's may still be under way.
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            carried[...] = state.astype(carried.dtype)
            # wgmma and TMA read through another proxy than the threads write.
            plgpu.commit_smem()
            if save:
                plgpu.copy_smem_to_gmem(carried, states_g.at[row, head, n, :, columns])
            v[...] = (as_float(v) - walk.matmul(reading, carried)).astype(v.dtype)
            plgpu.commit_smem()
            v[...] = _gpu.scaled(_gpu.vector(_steps(small, slot), 1), walk.matmul(inverse, v)).astype(v.dtype)
            plgpu.commit_smem()
            plgpu.barrier_wait(ready)
            o = walk.matmul(weights_s, v, walk.matmul(asked_s, carried))
            # The store of the last output, the newest but for this step's copy of the state.
            plgpu.wait_smem_to_gmem(int(save), wait_read_only=True)
            out[...] = o.astype(out.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, out_g.at[row, pl.ds(n * chunk, chunk), head, columns])
            state = walk.matmul(writing_s.T, v, _gpu.scaled(_across(small, slot, (0, walk.key_dim)), state))
            # All threads have read the slots before TMA refills them, too.
            plgpu.commit_smem()
            pl.when(n + 1 < walk.count)(lambda: fetch_rest(n + 1))
            pl.when(n + stages < walk.count)(lambda: fetch(n + stages, slot))
            return state

        lax.fori_loop(0, stages, lambda n, _: fetch(n, n), None)
        fetch_rest(0)
        state = _gpu.load(state_g.at[row, head, :, columns], optimized=False)
        state = lax.fori_loop(0, walk.count, step, state)
        _gpu.store(final_g.at[row, head, :, columns], state)
        # Shared memory lasts only as long as the thread block, so it has to outlive the stores that read it.
        plgpu.wait_smem_to_gmem(0)

    return walk.call(
        body,
        "read",
        (weights, asked, reading, writing, value, inverse, state.astype(jnp.float32), vectors, rules),
        (
            value,
            jax.ShapeDtypeStruct(walk.state_shape(), jnp.float32),
            jax.ShapeDtypeStruct(walk.state_shape(walk.count), jnp.bfloat16) if save else None,
        ),
        {
            "reading": _gpu.tiles(stages, chunk, walk.key_dim),
            "value": _gpu.tiles(stages, chunk, width),
            "inverse": _gpu.tiles(stages, chunk, chunk),
            "writing": _gpu.tiles(chunk, walk.key_dim),
            "asked": _gpu.tiles(chunk, walk.key_dim),
            "weights": _gpu.tiles(chunk, chunk),
            "carried": _gpu.tiles(walk.key_dim, width),
            "out": _gpu.tiles(chunk, width),
        },
        walk.small_scratch(stages, vectors, rules, arrays=3) | {"ready": plgpu.Barrier(num_arrivals=3)},
        flops=4 * chunk * walk.value_dim + 6 * walk.key_dim * walk.value_dim,
        exponentials=0,
        blocks=walk.value_dim // width,
    )


def _unwind(walk: _gpu.Walk, chunks, dout, inverse, dfinal, vectors, rules, *, stages: int):
    """dV, cotangents of the states after the chunks in bfloat16, and that of the initial state."""
    weights, asked, reading, writing = chunks
    chunk, width, last, stages = walk.chunk, TILE, walk.count - 1, min(stages, walk.count)

    def body(
        weights_g, asked_g, reading_g, writing_g, dout_g, inverse_g, dfinal_g, vectors_g, rules_g,
        dvalue_g, dstates_g, dstate_g, *, tiles, small,
    ):  # fmt: skip
        inverse_s, asked_s, reading_s = (tiles[name] for name in ("inverse", "asked", "reading"))
        carried, error = tiles["carried"], tiles["error"]
        full, ready = small["full"], small["ready"]
        row, head, block = walk.place()
        columns = pl.ds(block * width, width)

        def fetch(i, slot):
            tokens = pl.ds((last - i) * chunk, chunk)
            walk.load(writing_g.at[row, tokens, head], tiles["writing"], slot, full)
            walk.load(dout_g.at[row, tokens, head, columns], tiles["dout"], slot, full)
            walk.load(weights_g.at[row, head, last - i], tiles["weights"], slot, full)
            walk.load_small(vectors_g, rules_g, row, head, last - i, small, slot)

        def fetch_rest(i):
            # Needed last: one slot will do.
            tokens = pl.ds((last - i) * chunk, chunk)
            plgpu.copy_gmem_to_smem(inverse_g.at[row, head, last - i], inverse_s, ready)
            plgpu.copy_gmem_to_smem(asked_g.at[row, tokens, head], asked_s, ready)
            plgpu.copy_gmem_to_smem(reading_g.at[row, tokens, head], reading_s, ready)

        def step(i, dstate):
            n, slot = last - i, lax.rem(i, stages)
            plgpu.barrier_wait(full.at[slot])
            writing, do, weights = (tiles[name].at[slot] for name in ("writing", "dout", "weights"))
            walk.decays(False, rules_g, small, slot).clear_padding(do)
            # The stores of the last step have left shared memory.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            carried[...] = dstate.astype(carried.dtype)
            # wgmma and TMA read through another proxy than the threads write.
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(carried, dstates_g.at[row, head, n, :, columns])
            dw = walk.matmul(weights.T, do, walk.matmul(writing, carried))
            error[...] = _gpu.scaled(_gpu.vector(_steps(small, slot), 1), dw).astype(error.dtype)
            plgpu.commit_smem()
            plgpu.barrier_wait(ready)
            dstate = walk.matmul(asked_s.T, do, _gpu.scaled(_across(small, slot, (0, walk.key_dim)), dstate))
            dr = walk.matmul(inverse_s.T, error)
            error[...] = dr.astype(error.dtype)
            do[...] = (-dr).astype(do.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(error, dvalue_g.at[row, pl.ds(n * chunk, chunk), head, columns])
            dstate = walk.matmul(reading_s.T, do, dstate)
            # All threads have read the slots before TMA refills them, too.
            plgpu.commit_smem()
            pl.when(i < last)(lambda: fetch_rest(i + 1))
            pl.when(i + stages < walk.count)(lambda: fetch(i + stages, slot))
            return dstate

        lax.fori_loop(0, stages, lambda i, _: fetch(i, i), None)
        fetch_rest(0)
        dstate = _gpu.load(dfinal_g.at[row, head, :, columns], optimized=False)
        dstate = lax.fori_loop(0, walk.count, step, dstate)
        _gpu.store(dstate_g.at[row, head, :, columns], dstate)
        # Shared memory lasts only as long as the thread block, so it has to outlive the stores that read it.
        plgpu.wait_smem_to_gmem(0)

    return walk.call(
        body,
        "unwind",
        (weights, asked, reading, writing, dout, inverse, dfinal.astype(jnp.float32), vectors, rules),
        (
            dout,
            jax.ShapeDtypeStruct(walk.state_shape(walk.count), jnp.bfloat16),
            jax.ShapeDtypeStruct(walk.state_shape(), jnp.float32),
        ),
        {
            "writing": _gpu.tiles(stages, chunk, walk.key_dim),
            "dout": _gpu.tiles(stages, chunk, width),
            "weights": _gpu.tiles(stages, chunk, chunk),
            "inverse": _gpu.tiles(chunk, chunk),
            "asked": _gpu.tiles(chunk, walk.key_dim),
            "reading": _gpu.tiles(chunk, walk.key_dim),
            "carried": _gpu.tiles(walk.key_dim, width),
            "error": _gpu.tiles(chunk, width),
        },
        walk.small_scratch(stages, vectors, rules, arrays=3) | {"ready": plgpu.Barrier(num_arrivals=3)},
        flops=4 * chunk * walk.value_dim + 6 * walk.key_dim * walk.value_dim,
        exponentials=0,
        blocks=walk.value_dim // width,
    )


def _recover(walk: _gpu.Walk, chunks, value, dout, dvalue, inverse, states, vectors, rules, *, scale):
    """W [B, T, H, V], X and Y [B, H, N, C, C], in bfloat16, and Z.dR of the tokens [B, H, N, C] in float32."""
    reading, chunk = chunks[2], walk.chunk

    def body(
        reading_g, value_g, dout_g, dvalue_g, inverse_g, states_g, vectors_g, rules_g,
        written_g, scores_g, overlaps_g, steps_g, *, tiles, small,
    ):  # fmt: skip
        reading, v, do, dr = (tiles[name].at[0] for name in ("reading", "value", "dout", "dvalue"))
        inverse, before, full = tiles["inverse"].at[0], tiles["before"].at[0], small["full"]
        row, head, n = walk.place()
        tokens = pl.ds(n * chunk, chunk)
        for name, source in (
            ("reading", reading_g.at[row, tokens, head]),
            ("before", states_g.at[row, head, n]),
            ("value", value_g.at[row, tokens, head]),
            ("inverse", inverse_g.at[row, head, n]),
            ("dvalue", dvalue_g.at[row, tokens, head]),
            ("dout", dout_g.at[row, tokens, head]),
        ):
            walk.load(source, tiles[name], 0, full)
        walk.load_small(vectors_g, rules_g, row, head, n, small, 0)
        plgpu.barrier_wait(full.at[0])
        walk.decays(False, rules_g, small, 0).clear_padding(v, do)
        steps = None
        for my_v, my_dr, my_before in zip(*map(_gpu.parts, (v, dr, before))):
            my_v[...] = (as_float(my_v) - walk.matmul(reading, my_before)).astype(v.dtype)
            plgpu.commit_smem()
            z = walk.matmul(inverse, my_v)
            part = (as_float(my_dr) * z).sum(1)
            steps = part if steps is None else steps + part
            my_v[...] = _gpu.scaled(_gpu.vector(_steps(small, 0), 1), z).astype(v.dtype)
        _gpu.store(steps_g.at[row, head, n], steps)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(v, written_g.at[row, tokens, head])
        lower = Pairs(walk).lower
        # M is not needed any more.
        inverse[...] = (scale * jnp.where(lower, walk.matmul(do, v.T), walk.matmul(v, do.T))).astype(v.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(inverse, scores_g.at[row, head, n])
        overlaps = jnp.where(lower, walk.matmul(dr, v.T), walk.matmul(v, dr.T))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        inverse[...] = (-overlaps).astype(v.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(inverse, overlaps_g.at[row, head, n])
        # Shared memory lasts only as long as the thread block, so it has to outlive the stores that read it.
        plgpu.wait_smem_to_gmem(0)

    written, *pairs, steps = walk.call(
        body,
        "recover",
        (reading, value, dout, dvalue, inverse, states, vectors, rules),
        (value, inverse, inverse, jax.ShapeDtypeStruct(inverse.shape[:-1], jnp.float32)),
        {
            "reading": _gpu.tiles(1, chunk, walk.key_dim),
            "value": _gpu.tiles(1, chunk, walk.value_dim),
            "dout": _gpu.tiles(1, chunk, walk.value_dim),
            "dvalue": _gpu.tiles(1, chunk, walk.value_dim),
            "inverse": _gpu.tiles(1, chunk, chunk),
            "before": _gpu.tiles(1, walk.key_dim, walk.value_dim),
        },
        walk.small_scratch(1, vectors, rules, arrays=6),
        flops=10 * chunk * walk.value_dim + 2 * walk.key_dim * walk.value_dim,
        exponentials=0,
        blocks=walk.count,
    )
    return written, pairs, steps


def _differentiate(
    walk: _gpu.Walk, query, key, written, dout, dvalue, gates, scores, overlaps, vectors, rules, states, dstates, *, scale
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """dQ and dK [B, T, H, K] in bfloat16 and the gradient of the log decays [B, T, H, K] in float32, all per value head."""
    chunk, width = walk.chunk, TILE
    key_blocks, warpgroups = walk.key_dim // width, walk.value_dim // width

    def body(
        query_g, key_g, written_g, dout_g, dvalue_g, high_g, low_g, scores_g, overlaps_g, vectors_g, rules_g,
        states_g, dstates_g, dquery_g, dkey_g, dgates_g, *, tiles, small,
    ):  # fmt: skip
        q, k, w, do, dr = (tiles[name].at[0] for name in ("query", "key", "written", "dout", "dvalue"))
        before, after, high, low = (tiles[name].at[0] for name in ("before", "after", "high", "low"))
        scores, overlaps = (tiles[name].at[0] for name in ("scores", "overlaps"))
        sums, crossing, full = tiles["sums"], small["crossing"], small["full"]
        (row, head, block), me = walk.place(), walk.warpgroup()
        n, block = block // key_blocks, lax.rem(block, key_blocks)
        tokens, columns = pl.ds(n * chunk, chunk), pl.ds(block * width, width)

        def meet():
            # What this warpgroup wrote is visible to wgmma and TMA, and it has read all it had to; then the same of the other.
            plgpu.commit_smem()
            if warpgroups > 1:
                plgpu.barrier_arrive(small["together"])
                plgpu.barrier_wait(small["together"])

        @pl.when(me == 0)
        def _start():
            for name, source in (
                ("high", high_g.at[row, tokens, head, columns]),
                ("low", low_g.at[row, tokens, head, columns]),
                ("written", written_g.at[row, tokens, head]),
                ("after", dstates_g.at[row, head, n, columns]),
                ("dout", dout_g.at[row, tokens, head]),
                ("before", states_g.at[row, head, n, columns]),
                ("query", query_g.at[row, tokens, head // walk.repeats, columns]),
                ("key", key_g.at[row, tokens, head // walk.repeats, columns]),
                ("dvalue", dvalue_g.at[row, tokens, head]),
                ("scores", scores_g.at[row, head, n]),
                ("overlaps", overlaps_g.at[row, head, n]),
            ):
                walk.load(source, tiles[name], 0, full)
            walk.load_small(vectors_g, rules_g, row, head, n, small, 0)

        plgpu.barrier_wait(full.at[0])
        if rules_g is not None:
            rules = walk.decays(False, rules_g, small, 0)
            pl.when(me == 0)(lambda: rules.clear_padding(q, do))
            pl.when(me == warpgroups - 1)(lambda: rules.clear_padding(k))
            meet()
        pairs = Pairs(walk)

        def some(ref, mask):
            x = _gpu.load(ref)
            return jnp.where(mask, x, jnp.zeros_like(x))

        def add_sums(rule, gradients, place, total=None):
            # Through shared memory, as the right factor of a product.
            place[...] = gradients.astype(place.dtype)
            plgpu.commit_smem()
            return walk.matmul(rule, place, total)

        @pl.when(me == 0)
        def _dquery():
            held = sum((as_float(x) * as_float(y)).sum(1) for x, y in zip(_gpu.parts(before), _gpu.parts(after)))
            crossing[...] = _across(small, 0, (block * width, width)) * held
            plgpu.commit_smem()
            dgates = _gpu.columns(_gpu.vector(crossing, 0), (chunk, width))
            dq = pairs.decays(pairs.upto(), (high, low)) * (scale * walk.matmul(do, before.T))
            z = do.at[:, pl.ds(0, width)]  # dO is not needed any more
            dgates = add_sums(pairs.upto(transposed=True), dq * as_float(q), z, dgates)
            dq = walk.matmul(some(scores, pairs.same), k, dq)

            def add_level(level, gradients):
                dq, dgates = gradients
                decays = pairs.decays(pairs.level(level), (high, low))
                z[...] = (decays * as_float(k)).astype(z.dtype)
                plgpu.commit_smem()
                dx = decays * walk.matmul(some(scores, pairs.reading(level)), z)
                return dq + dx, add_sums(pairs.level(level, transposed=True), dx * as_float(q), z, dgates)

            dq, dgates = lax.fori_loop(0, LEVELS, add_level, (dq, dgates))
            # Not in the place of the queries, which the other warpgroup may still read.
            sums[...] = dgates
            z[...] = dq.astype(z.dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(small["done"])

        @pl.when(me == warpgroups - 1)
        def _dkey():
            # W and dR are not needed any more when their places are.
            zq, zk = (tile.at[:, pl.ds(0, width)] for tile in (w, dr))
            dk = pairs.decays(pairs.after(), (high, low)) * walk.matmul(w, after.T)
            dgates = add_sums(pairs.after(transposed=True), dk * as_float(k), zq)
            # At once: the compiler would put off the product of two factors until it meets the next sum.
            dk = walk.matmul(some(scores, pairs.same), q, dk)
            dx = pairs.decays(pairs.upto(), (high, low)) * -walk.matmul(dr, before.T)
            dk += dx
            dgates = add_sums(pairs.upto(transposed=True), dx * as_float(k), zk, dgates)

            def add_level(level, gradients):
                dk, dgates = gradients
                decays = pairs.decays(pairs.level(level), (high, low))
                zq[...] = (decays * as_float(q)).astype(zq.dtype)
                zk[...] = (decays * as_float(k)).astype(zk.dtype)
                plgpu.commit_smem()
                dx = walk.matmul(some(scores, pairs.written(level)), zq)
                dx = decays * walk.matmul(some(overlaps, pairs.of(level)), zk, dx)
                return dk + dx, add_sums(pairs.level(level, transposed=True), dx * as_float(k), zk, dgates)

            dk, dgates = lax.fori_loop(0, LEVELS, add_level, (dk, dgates))
            plgpu.barrier_wait(small["done"])
            sums[...] = dgates + _gpu.load(sums)
            q[...] = _gpu.load(do.at[:, pl.ds(0, width)])
            k[...] = dk.astype(k.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(sums, dgates_g.at[row, tokens, head, columns])
            plgpu.copy_smem_to_gmem(q, dquery_g.at[row, tokens, head, columns])
            plgpu.copy_smem_to_gmem(k, dkey_g.at[row, tokens, head, columns])

        # Shared memory lasts only as long as the thread block, so it has to outlive the stores that read it.
        plgpu.wait_smem_to_gmem(0)

    per_head = gates[0]
    return walk.call(
        body,
        "differentiate",
        (query, key, written, dout, dvalue, *gates, scores, overlaps, vectors, rules, states, dstates),
        (per_head, per_head, jax.ShapeDtypeStruct(per_head.shape, jnp.float32)),
        {
            "query": _gpu.tiles(1, chunk, width),
            "key": _gpu.tiles(1, chunk, width),
            "written": _gpu.tiles(1, chunk, walk.value_dim),
            "dout": _gpu.tiles(1, chunk, walk.value_dim),
            "dvalue": _gpu.tiles(1, chunk, walk.value_dim),
            "high": _gpu.tiles(1, chunk, width),
            "low": _gpu.tiles(1, chunk, width),
            "before": _gpu.tiles(1, width, walk.value_dim),
            "after": _gpu.tiles(1, width, walk.value_dim),
            "scores": _gpu.tiles(1, chunk, chunk),
            "overlaps": _gpu.tiles(1, chunk, chunk),
            "sums": plgpu.SMEM(
                (chunk, width), jnp.float32, transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
            ),
        },
        walk.small_scratch(1, vectors, rules, arrays=11)
        | {
            "crossing": plgpu.SMEM((width,), jnp.float32),
            "together": plgpu.Barrier(num_arrivals=warpgroups),
            "done": plgpu.Barrier(),
        },
        flops=2 * chunk * walk.key_dim * (9 * LEVELS + 11) + 6 * walk.key_dim * walk.value_dim,
        exponentials=walk.key_dim * (2 * LEVELS + 3),
        blocks=walk.count * key_blocks,
        warpgroups=warpgroups,
    )
