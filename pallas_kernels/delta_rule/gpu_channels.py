r"""The chunked delta rule with one decay per key channel on Hopper GPUs, forward and backward, for Pallas' Mosaic GPU lowering.

.. math:: S' = diag(e^{g_t}) S_{t-1}, \qquad S_t = S' + \beta_t k_t (v_t - S'^T k_t)^T, \qquad o_t = scale \cdot S_t^T q_t

per batch row and value head, with a float32 state :math:`S` [K, V] and operands in bfloat16, or in float32 as pairs of it. Tokens are cut
into chunks of C = 64. With S the state before a chunk, :math:`G_{ic}` the sum of the log decays of channel c up to and including token i,
:math:`L_{ri} = \sum_c k_{rc} k_{ic} e^{G_{rc} - G_{ic}}` for i < r and :math:`P_{ri} = scale \sum_c q_{rc} k_{ic} e^{G_{rc} - G_{ic}}` for i <= r,

.. math::
    Z = M (V - A S), \quad M = (I + L \, diag(\beta))^{-1}, \quad W = diag(\beta) Z, \qquad O = R S + P W, \quad
    S \leftarrow e^{G_C} S + E^T W, \qquad R = scale \cdot e^G Q, \quad A = e^G K, \quad E = e^{G_C - G} K.

L and P are taken by levels of pairs of tokens and decays from products with the log decays, see ``_gpu_channels``; so documents, too, are
a matter of the gates. What padding holds is selected away.

**Forward.** ``_prepare`` makes M, P, R, A and E, one thread block per chunk and head, from one block of 64 key channels after another. The
sums over channels in L and P are sums over these blocks. ``_read`` walks a row without looking at decays but for those of whole chunks; the
grid is (batch, heads, blocks of 64 value columns), the K x 64 part of the state is in registers; in float32 with K = 256 blocks have 32 columns.
A pass that will be differentiated also stores the state before every chunk as the operand it is, and keeps M; the rest is made again in the
backward pass.

**Backward.** With dO and the cotangent D of the state after a chunk,

    dW = P^T dO + E D,    dR = M^T (beta dW),    dV = dR,    D <- e^{G_C} D + R^T dO - A^T dR:

``_unwind`` walks this from the last chunk to the first. The rest is made for all chunks at once. ``_recover`` repeats Z and W, and makes the
gradient of beta, :math:`\langle Z_r, dR_r \rangle / \beta_r` (see ``gpu``), and symmetric matrices X and Y of cotangents of pairs,
:math:`X_{ri} = X_{ir} = scale \cdot dO_r W_i` for i <= r and :math:`Y_{ri} = Y_{ir} = -dR_r W_i` for i < r; the other halves are products of the
transposed ones and the unit matrix. ``_differentiate`` has one thread block per chunk, head and block of 64 key channels. All that is a sum over V
in these two is one over its blocks of 64 columns, which come in turns; so what belongs to the keys of a head is made once, and not for each block.
With the decays F [C, K] of a level's tokens to the middles of its blocks, and X and Y cut down to the level's pairs,

    dQ = scale e^G (dO S^T) + X_ii K + F X (F K) (second halves),
    dK = e^{G_C - G} (W D^T) - e^G (dR S^T) + X_ii Q + F X (F Q) (first halves) + F Y (F K).

**Gradient of the log decays.** That of an exponent is Q dQ + K dK of its part of the sums above, and sums of gates have the transposed sums
of these as gradients: products with the transposed matrices of 0 and 1. Nothing is subtracted, so that what tokens do to one another
loses nothing to what they do to others. What crosses the chunk adds :math:`\sum_V S D` times e^{G_C} to all tokens.

``_differentiate`` makes dQ and then dK, with the decays of every level once more, because both at a time spill. If V is more than 64, where shared
memory has room for one thread block only, each has a warpgroup of its own.

**Shared memory** in KiB with its vectors, decays across chunks and rules (2 or more, as references are aligned), and how many thread blocks of
an SM it and the registers leave room for; none of it depends on V but for ``_differentiate``. ``_prepare`` has two slots for query, key and gates if
blocks of channels come in several turns of one. In the walks, stages are two for A, V and M, or E, dO and P; one for the rest. A walk needs A and
M, or E and P, before the rest, and has them refilled as soon as it has read them; so in float32, where two slots do not fit, they have one. With
K = 256 not even A, R and E fit: the last that a walk needs, E or A, takes the place of the first:

    K        _prepare                       _read and _unwind                                   _recover
    64       6 x 8 + P 8 + 10 = 66; 2       2 x 24 + 3 x 8 + S 8 + O 8 + 3 = 91; 2              4 x 8 + M 8 + S 8 + 2 = 50; 3 (2)
    128      6 x 16 + P 8 + 2 = 106; 2      2 x 32 + 2 x 16 + 8 + S 16 + O 8 + 3 = 131; 1       16 + 3 x 8 + M 8 + S 16 + 2 = 66; 3 (2)
    256      the same                       2 x 48 + 2 x 32 + 8 + S 32 + O 8 + 4 = 212; 1       32 + 3 x 8 + M 8 + S 32 + 2 = 98; 2
    64 f32   48 + 32 + P 16 + 2 = 98; 2     32 + V 32 + 3 x 16 + S 16 + O 16 + 3 = 147; 1       4 x 16 + M 16 + S 16 + 2 = 98; 2
    128 f32  2 x 48 + 32 + P 16 + 2 = 146; 1  48 + V 32 + 2 x 32 + 16 + S 32 + O 16 + 3 = 211; 1  32 + 3 x 16 + M 16 + S 32 + 2 = 130; 1
    256 f32  the same                       2 x 64 + V 16 + 2 x 16 + S 32 + O 8 + 4 = 220; 1    64 + 3 x 16 + M 16 + S 64 + 2 = 194; 1

``_differentiate``: Q, K and the log decays 32 + dO, dR, W 24 + S, D 16 + X, Y 16 + sums 16 + 3 = 107; 2 if V is 64, with two slots for the blocks of
V 147; 1 if it is more, and 179; 1 in float32, which comes with V = 64 only; ``_blocks`` cuts larger ones, as it cuts V of more than 256. A state of
K > 256 has no room.

**Registers** per thread, for K = 64, 128 and 256: up to 177 (more than 168 leave room for 2 thread blocks only), 250 and 236 in ``_prepare``, 140,
183 and 193 without M; 150, 210 and 226 in ``_read``; 126, 190 and 201 in ``_unwind``; 179, 197 and 160 in ``_recover``, where a loop over blocks of
V leaves room for fewer thread blocks (in brackets); 250 in ``_differentiate``, without spills. In float32 at most 251, 230 without M, 186, 224,
246 and 252; for the last, the sum of the gradients of the log decays waits in shared memory between products.

**Parallelism.** Walks are serial: SMs idle with fewer than 132 batch rows times heads times blocks of columns.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _gpu
from pallas_kernels._blocks import block_size
from pallas_kernels._gpu import HEADS, TILE, Config, plgpu
from pallas_kernels._gpu_channels import LEVELS, Pairs, as_float, split_gates
from pallas_kernels._gpu_inverse import unit_lower_inverse
from pallas_kernels._tokens import nonzero

_FAMILY = "delta_rule_channels"
_WIDEST = 256  # for K, and for V in bfloat16


def block_sizes(key_dim: int, value_dim: int, dtype: jnp.dtype) -> tuple[int, int] | None:
    """Sizes of the one block of K and of the blocks of V in which heads are taken; None if shared memory holds no state of so many keys."""
    if key_dim > _WIDEST:
        return None
    keys = block_size(key_dim, HEADS) if key_dim <= HEADS[-1] else _WIDEST
    return keys, block_size(value_dim, (*HEADS, _WIDEST) if dtype == jnp.bfloat16 else HEADS[:1])


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
) -> tuple[jax.Array, jax.Array, tuple[_gpu.Operand, _gpu.Operand] | None]:
    """As ``gpu.forward``, with log_decay [B, T, H, K]."""
    walk = _gpu.Walk.over(_FAMILY, query, value, interpret)
    config = config or Config()
    query, key, value = walk.operands(query, key, value)
    gates, steps, across = _small(walk, beta, log_decay, document)
    rules = walk.rules(document, boundary)
    chunks, inverse = _prepare(walk, query, key, gates, steps, rules, scale=scale)
    output, final, states = _read(
        walk, chunks, value, inverse, state, steps, across, rules, save=save, stages=config.stages
    )
    return output[:, : walk.time], final, (states, inverse) if save else None


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array,
    document: jax.Array | None,
    boundary: jax.Array | None,
    residuals: tuple[_gpu.Operand, _gpu.Operand],
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
    query, key, value, dout = walk.operands(query, key, value, dout.astype(value.dtype))
    states, inverse = residuals
    gates, steps, across = _small(walk, beta, log_decay, document)
    rules = walk.rules(document, boundary)
    chunks, _ = _prepare(walk, query, key, gates, None, rules, scale=scale)
    dvalue, dstates, dstate = _unwind(
        walk, chunks, dout, inverse, dfinal, steps, across, rules, stages=config.backward_stages
    )
    written, pairs, dsteps = _recover(walk, chunks, value, dout, dvalue, inverse, states, steps, rules, scale=scale)
    dquery, dkey, dlog_decay = _differentiate(
        walk, query, key, written, dout, dvalue, gates, *pairs, across, rules, states, dstates, scale=scale
    )
    dquery, dkey = (walk.sum_heads(x.array()).astype(query.dtype)[:, : walk.time] for x in (dquery, dkey))
    dbeta, dlog_decay = walk.per_token(dsteps) / nonzero(beta), dlog_decay[:, : walk.time]
    if document is not None:
        real = document[..., None] >= 0
        dbeta, dlog_decay = jnp.where(real, dbeta, 0.0), jnp.where(real[..., None], dlog_decay, 0.0)
    return dquery, dkey, dvalue.array()[:, : walk.time], dbeta, dlog_decay, dstate


def _small(walk: _gpu.Walk, beta, log_decay, document) -> tuple[tuple[jax.Array, jax.Array], jax.Array, jax.Array]:
    """Gates and decays of whole chunks as of ``split_gates``; between them, step sizes [B, H, N, 1, C]."""
    gates, across = split_gates(walk, log_decay, document)
    return gates, walk.per_head(walk.fill(nonzero(beta)))[:, :, :, None], across


def _prepare(walk: _gpu.Walk, query, key, gates, steps, rules, *, scale):
    """(P [B, H, N, C, C], R, A and E [B, T, H, K]) and, if there are ``steps``, M [B, H, N, C, C]; 0 for what padding reads and writes.

    Sums over channels are those over blocks of 64, which come in turns: so registers and memory do not grow with K. Two of a turn share its fences
    where memory suffices; then one slot will do, as the other thread block of the SM works while this one waits.
    """
    chunk, width, invert = walk.chunk, TILE, steps is not None
    blocks, factors = walk.key_dim // width, ("z", "zk") if invert else ("z",)
    together = 2 if blocks % 2 == 0 and walk.terms == 1 else 1
    turns = blocks // together
    slots = 1 if together > 1 else min(2, turns)

    def body(
        query_g, key_g, high_g, low_g, steps_g, rules_g, weights_g, asked_g, reading_g, writing_g, inverse_g,
        *, tiles, small,
    ):  # fmt: skip
        weights, full = tiles["weights"], small["full"]
        row, head, n = walk.place()
        tokens = pl.ds(n * chunk, chunk)
        pairs = Pairs(walk)

        def columns(turn, i):
            return pl.ds((turn * together + i) * width, width)

        def places(slot, i, zero=0):
            return (tiles[name].at[slot * together + i + zero] for name in ("query", "key", "high", "low"))

        def fetch(turn, slot):
            for i in range(together):
                mine = (row, tokens, head // walk.repeats, columns(turn, i)), (row, tokens, head, columns(turn, i))
                sources = query_g.at[mine[0]], key_g.at[mine[0]], high_g.at[mine[1]], low_g.at[mine[1]]
                for source, target in zip(sources, places(slot, i)):
                    _gpu.fetch(source, target, full.at[slot])
            walk.load_small(steps_g, rules_g, row, head, n, small, slot)

        def add_turn(turn, totals):
            slot = 0 if slots == 1 else lax.rem(turn, slots)
            plgpu.barrier_wait(full.at[slot])
            rules = walk.decays(False, rules_g, small, slot)
            zero = walk.zero(rules)
            for i in range(together):
                q, k, _, _ = places(slot, i, zero)
                rules.clear_padding(q, k)

            def product(pairs_of_tiles, mask, total):
                added = None
                for x, y in pairs_of_tiles:
                    added = walk.matmul(x, y.T, added)
                return jnp.where(mask, added + total, total)

            def add_level(level, totals):
                zero = walk.zero(rules)
                factored = [[tiles[name].at[i + zero] for i in range(together)] for name in factors]
                for i in range(together):
                    q, k, high, low = places(slot, i, zero)
                    z, *zk = (tile[i] for tile in factored)
                    decays = pairs.decays(pairs.level(level), (high, low))
                    # Queries where they read and keys where they are read: its products with itself are all that P needs.
                    z[...] = decays * jnp.where(pairs.second(level), as_float(q), as_float(k))
                    for place in zk:
                        place[...] = decays * as_float(k)
                # wgmma reads through another proxy than the threads write.
                plgpu.commit_smem()
                mask = pairs.of(level)
                return tuple(product(zip(tile, tile), mask, total) for tile, total in zip(factored, totals))

            scores, *overlaps = totals
            scores = product([list(places(slot, i, zero))[:2] for i in range(together)], pairs.same, scores)
            totals = lax.fori_loop(0, LEVELS, add_level, (scores, *overlaps))

            @pl.when(turn + 1 == turns)
            def _last():
                weights[...] = jnp.where(pairs.lower, scale * totals[0], 0.0)

            zero = walk.zero(rules)
            for i in range(together):
                q, k, high, low = places(slot, i, zero)
                decays = pairs.decays(pairs.upto(), (high, low))
                # R, A and E take the places of what they are made of, but for those of the gates.
                q[...] = scale * decays * as_float(q)
                tiles[factors[-1]].at[i + zero][...] = decays * as_float(k)
                k[...] = pairs.decays(pairs.after(), (high, low)) * as_float(k)
            plgpu.commit_smem()
            for i in range(together):
                q, k, _, _ = places(slot, i)
                for source, target in ((q, asked_g), (tiles[factors[-1]].at[i], reading_g), (k, writing_g)):
                    _gpu.send(source, target.at[row, tokens, head, columns(turn, i)])

            @pl.when(turn + 1 < turns)
            def _next():
                # The stores have left shared memory.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                pl.when(turn + slots < turns)(lambda: fetch(turn + slots, slot))

            return totals

        walk.number(rules_g, small)
        for slot in range(slots):
            fetch(slot, slot)
        nothing = plgpu.layout_cast(jnp.zeros((chunk, chunk), jnp.float32), plgpu.Layout.WGMMA)
        totals = (nothing, nothing) if invert else (nothing,)
        _, *overlaps = lax.fori_loop(0, turns, add_turn, totals) if turns > 1 else add_turn(0, totals)
        _gpu.send(weights, weights_g.at[row, head, n])
        if invert:
            # The gates and z are not needed any more.
            free = [tiles[name].at[slot] for name in ("high", "low") for slot in range(slots * together)]
            free += [*tiles["z"].at[0].terms] + ([] if tiles["spare"] is None else [tiles["spare"]])
            lower = jnp.where(pairs.lower, overlaps[0], 0.0)
            lower *= _gpu.columns(_gpu.vector(small["vectors"].at[0, 0], 0), lower.shape)
            inverse = unit_lower_inverse(walk, lower, tuple(free[:2]), tuple(free[2:4]))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            weights[...] = inverse
            plgpu.commit_smem()
            _gpu.send(weights, inverse_g.at[row, head, n])
        # Shared memory lasts only as long as the thread block, so it has to outlive the stores that read it.
        plgpu.wait_smem_to_gmem(0)

    per_head = walk.template(*gates[0].shape)
    square = walk.template(*walk.state_shape(walk.count)[:3], chunk, chunk)
    *chunks, inverse = walk.call(
        body,
        "prepare" if invert else "prepare_again",
        (query, key, *gates, steps, rules),
        (square, per_head, per_head, per_head, square if invert else None),
        {
            "query": walk.tiles(slots * together, chunk, width),
            "key": walk.tiles(slots * together, chunk, width),
            "high": _gpu.tiles(slots * together, chunk, width),
            "low": _gpu.tiles(slots * together, chunk, width),
            "z": walk.tiles(together, chunk, width),
            "zk": walk.tiles(together, chunk, width) if invert else None,
            "weights": walk.tiles(chunk, chunk),
            "spare": _gpu.tiles(chunk, chunk) if invert and slots * together == walk.terms == 1 else None,
        },
        walk.small_scratch(slots, steps, rules, arrays=2 * together, others=2 * together),
        flops=2 * chunk * walk.key_dim * ((4 if invert else 3) * LEVELS + 5) + (36 * chunk * chunk if invert else 0),
        exponentials=walk.key_dim * (LEVELS + 2),
        blocks=walk.count,
    )
    return tuple(chunks), inverse


def _tight(walk: _gpu.Walk) -> bool:
    """Memory is: a walk takes 32 value columns, and the last of A, R and E in the place of the first."""
    return walk.terms > 1 and walk.key_dim > HEADS[-1]


def _slots(walk: _gpu.Walk, stages: int) -> int:
    """For the tiles that a walk needs first, and then has refilled: one for each stage, or one, as float32 leaves no memory for more."""
    return stages if walk.terms == 1 else 1


def _walk_scratch(walk: _gpu.Walk, stages: int, slots: int, steps, across, rules) -> dict[str, Any]:
    """Scratch memory for vectors and rules, and barriers: of what is needed all the time, first, then, and last if that is apart."""
    return walk.small_scratch(stages, steps, rules, arrays=1, others=1) | {
        "across": plgpu.SMEM((stages, *across.shape[3:]), jnp.float32),
        "first": plgpu.Barrier(num_arrivals=2 * walk.terms, num_barriers=slots),
        "ready": plgpu.Barrier(num_arrivals=(2 if _tight(walk) else 3) * walk.terms),
        "last": plgpu.Barrier(num_arrivals=walk.terms),
    }


def _read(walk: _gpu.Walk, chunks, value, inverse, state, steps, across, rules, *, save: bool, stages: int):
    """Output, final state, and states before the chunks if ``save``."""
    weights, asked, reading, writing = chunks
    chunk, tight, stages = walk.chunk, _tight(walk), min(stages, walk.count)
    slots, width = _slots(walk, stages), TILE // 2 if tight else TILE
    make = functools.partial(walk.tiles, swizzle=2 * width)

    def body(
        weights_g, asked_g, reading_g, writing_g, value_g, inverse_g, state_g, steps_g, across_g, rules_g,
        out_g, final_g, states_g, *, tiles, small,
    ):  # fmt: skip
        full, first, ready = small["full"], small["first"], small["ready"]
        row, head, block = walk.place()
        columns = pl.ds(block * width, width)

        def fetch(n, slot):
            walk.load(value_g.at[row, pl.ds(n * chunk, chunk), head, columns], tiles["value"], slot, full)
            walk.load(across_g.at[row, head, n], small["across"], slot, full)
            walk.load_small(steps_g, rules_g, row, head, n, small, slot)

        def fetch_first(n, slot):
            walk.load(reading_g.at[row, pl.ds(n * chunk, chunk), head], tiles["reading"], slot, first)
            walk.load(inverse_g.at[row, head, n], tiles["inverse"], slot, first)

        def fetch_writing(n, name, barrier):
            _gpu.fetch(writing_g.at[row, pl.ds(n * chunk, chunk), head], tiles[name].at[0], barrier)

        def fetch_last(n):
            # One slot will do.
            tokens = pl.ds(n * chunk, chunk)
            if not tight:
                fetch_writing(n, "writing", ready)
            _gpu.fetch(asked_g.at[row, tokens, head], tiles["asked"].at[0], ready)
            _gpu.fetch(weights_g.at[row, head, n], tiles["weights"].at[0], ready)

        def step(n, state):
            slot, early = lax.rem(n, stages), lax.rem(n, slots)
            plgpu.barrier_wait(full.at[slot])
            plgpu.barrier_wait(first.at[early])
            rules = walk.decays(False, rules_g, small, slot)
            zero = walk.zero(rules)
            reading, inverse = tiles["reading"].at[early + zero], tiles["inverse"].at[early + zero]
            v, carried = tiles["value"].at[slot + zero], tiles["carried"].at[zero]
            rules.clear_padding(v)
            if save:
                # The store of the last copy has left shared memory; the output's may still be under way.
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            carried[...] = state
            # wgmma and TMA read through another proxy than the threads write.
            plgpu.commit_smem()
            if save:
                _gpu.send(carried, states_g.at[row, head, n, :, columns])
            v[...] = as_float(v) - walk.matmul(reading, carried)
            plgpu.commit_smem()
            v[...] = _gpu.scaled(_gpu.vector(small["vectors"].at[slot, 0], 1), walk.matmul(inverse, v))
            # All threads have read what TMA refills, too.
            plgpu.commit_smem()
            if tight:
                fetch_writing(n, "reading", small["last"])
            else:
                pl.when(n + slots < walk.count)(lambda: fetch_first(n + slots, early))
            plgpu.barrier_wait(ready)
            zero = walk.zero(rules)
            weights, asked = (tiles[name].at[zero] for name in ("weights", "asked"))
            writing = tiles["reading" if tight else "writing"].at[zero]
            carried, out = tiles["carried"].at[zero], tiles["out"].at[zero]
            o = walk.matmul(weights, v, walk.matmul(asked, carried))
            # The store of the last output, the newest but for this step's copy of the state.
            plgpu.wait_smem_to_gmem(int(save), wait_read_only=True)
            out[...] = o.astype(out.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, out_g.at[row, pl.ds(n * chunk, chunk), head, columns])
            decays = _gpu.vector(small["across"].at[slot, 0], 1)
            if tight:
                plgpu.barrier_wait(small["last"])
            state = walk.matmul(writing.T, v, _gpu.scaled(decays, state))
            plgpu.commit_smem()
            if tight:
                pl.when(n + 1 < walk.count)(lambda: fetch_first(n + 1, 0))
            pl.when(n + 1 < walk.count)(lambda: fetch_last(n + 1))
            pl.when(n + stages < walk.count)(lambda: fetch(n + stages, slot))
            return state

        lax.fori_loop(0, stages, lambda n, _: fetch(n, n), None)
        lax.fori_loop(0, slots, lambda n, _: fetch_first(n, n), None)
        fetch_last(0)
        walk.number(rules_g, small)
        state = _gpu.load(state_g.at[row, head, :, columns], optimized=False)
        state = lax.fori_loop(0, walk.count, step, state)
        _gpu.store(final_g.at[row, head, :, columns], state)
        # Shared memory lasts only as long as the thread block, so it has to outlive the stores that read it.
        plgpu.wait_smem_to_gmem(0)

    return walk.call(
        body,
        "read",
        (weights, asked, reading, writing, value, inverse, state.astype(jnp.float32), steps, across, rules),
        (
            jax.ShapeDtypeStruct(value.shape, value.dtype),
            jax.ShapeDtypeStruct(walk.state_shape(), jnp.float32),
            walk.template(*walk.state_shape(walk.count)) if save else None,
        ),
        {
            "value": make(stages, chunk, width),
            "reading": make(slots, chunk, walk.key_dim),
            "inverse": make(slots, chunk, chunk),
            "writing": None if tight else make(1, chunk, walk.key_dim),
            "asked": make(1, chunk, walk.key_dim),
            "weights": make(1, chunk, chunk),
            "carried": make(1, walk.key_dim, width),
            "out": _gpu.tiles(1, chunk, width, dtype=value.dtype),
        },
        _walk_scratch(walk, stages, slots, steps, across, rules),
        flops=4 * chunk * walk.value_dim + 6 * walk.key_dim * walk.value_dim,
        exponentials=0,
        blocks=walk.value_dim // width,
    )


def _unwind(walk: _gpu.Walk, chunks, dout, inverse, dfinal, steps, across, rules, *, stages: int):
    """dV, cotangents of the states after the chunks, and that of the initial state."""
    weights, asked, reading, writing = chunks
    chunk, tight, last, stages = walk.chunk, _tight(walk), walk.count - 1, min(stages, walk.count)
    slots, width = _slots(walk, stages), TILE // 2 if tight else TILE
    make = functools.partial(walk.tiles, swizzle=2 * width)

    def body(
        weights_g, asked_g, reading_g, writing_g, dout_g, inverse_g, dfinal_g, steps_g, across_g, rules_g,
        dvalue_g, dstates_g, dstate_g, *, tiles, small,
    ):  # fmt: skip
        full, first, ready = small["full"], small["first"], small["ready"]
        row, head, block = walk.place()
        columns = pl.ds(block * width, width)

        def fetch(i, slot):
            n = last - i
            walk.load(dout_g.at[row, pl.ds(n * chunk, chunk), head, columns], tiles["dout"], slot, full)
            walk.load(across_g.at[row, head, n], small["across"], slot, full)
            walk.load_small(steps_g, rules_g, row, head, n, small, slot)

        def fetch_first(i, slot):
            n = last - i
            walk.load(writing_g.at[row, pl.ds(n * chunk, chunk), head], tiles["writing"], slot, first)
            walk.load(weights_g.at[row, head, n], tiles["weights"], slot, first)

        def fetch_reading(i, name, barrier):
            _gpu.fetch(reading_g.at[row, pl.ds((last - i) * chunk, chunk), head], tiles[name].at[0], barrier)

        def fetch_last(i):
            # One slot will do.
            tokens = pl.ds((last - i) * chunk, chunk)
            _gpu.fetch(inverse_g.at[row, head, last - i], tiles["inverse"].at[0], ready)
            _gpu.fetch(asked_g.at[row, tokens, head], tiles["asked"].at[0], ready)
            if not tight:
                fetch_reading(i, "reading", ready)

        def step(i, dstate):
            n, slot, early = last - i, lax.rem(i, stages), lax.rem(i, slots)
            plgpu.barrier_wait(full.at[slot])
            plgpu.barrier_wait(first.at[early])
            rules = walk.decays(False, rules_g, small, slot)
            zero = walk.zero(rules)
            writing, weights = tiles["writing"].at[early + zero], tiles["weights"].at[early + zero]
            do, carried, error = tiles["dout"].at[slot + zero], tiles["carried"].at[zero], tiles["error"].at[zero]
            rules.clear_padding(do)
            # The stores of the last step have left shared memory.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            carried[...] = dstate
            # wgmma and TMA read through another proxy than the threads write.
            plgpu.commit_smem()
            _gpu.send(carried, dstates_g.at[row, head, n, :, columns])
            dw = walk.matmul(weights.T, do, walk.matmul(writing, carried))
            error[...] = _gpu.scaled(_gpu.vector(small["vectors"].at[slot, 0], 1), dw)
            # All threads have read what TMA refills, too.
            plgpu.commit_smem()
            if tight:
                fetch_reading(i, "writing", small["last"])
            else:
                pl.when(i + slots < walk.count)(lambda: fetch_first(i + slots, early))
            plgpu.barrier_wait(ready)
            zero = walk.zero(rules)
            inverse, asked, error = (tiles[name].at[zero] for name in ("inverse", "asked", "error"))
            reading = tiles["writing" if tight else "reading"].at[zero]
            decays = _gpu.vector(small["across"].at[slot, 0], 1)
            dstate = walk.matmul(asked.T, do, _gpu.scaled(decays, dstate))
            dr = walk.matmul(inverse.T, error)
            error[...] = dr
            do[...] = -dr
            plgpu.commit_smem()
            _gpu.send(error, dvalue_g.at[row, pl.ds(n * chunk, chunk), head, columns])
            if tight:
                plgpu.barrier_wait(small["last"])
            dstate = walk.matmul(reading.T, do, dstate)
            plgpu.commit_smem()
            if tight:
                pl.when(i < last)(lambda: fetch_first(i + 1, 0))
            pl.when(i < last)(lambda: fetch_last(i + 1))
            pl.when(i + stages < walk.count)(lambda: fetch(i + stages, slot))
            return dstate

        lax.fori_loop(0, stages, lambda i, _: fetch(i, i), None)
        lax.fori_loop(0, slots, lambda i, _: fetch_first(i, i), None)
        fetch_last(0)
        walk.number(rules_g, small)
        dstate = _gpu.load(dfinal_g.at[row, head, :, columns], optimized=False)
        dstate = lax.fori_loop(0, walk.count, step, dstate)
        _gpu.store(dstate_g.at[row, head, :, columns], dstate)
        # Shared memory lasts only as long as the thread block, so it has to outlive the stores that read it.
        plgpu.wait_smem_to_gmem(0)

    return walk.call(
        body,
        "unwind",
        (weights, asked, reading, writing, dout, inverse, dfinal.astype(jnp.float32), steps, across, rules),
        (
            walk.template(*dout.shape),
            walk.template(*walk.state_shape(walk.count)),
            jax.ShapeDtypeStruct(walk.state_shape(), jnp.float32),
        ),
        {
            "dout": make(stages, chunk, width),
            "writing": make(slots, chunk, walk.key_dim),
            "weights": make(slots, chunk, chunk),
            "inverse": make(1, chunk, chunk),
            "asked": make(1, chunk, walk.key_dim),
            "reading": None if tight else make(1, chunk, walk.key_dim),
            "carried": make(1, walk.key_dim, width),
            "error": make(1, chunk, width),
        },
        _walk_scratch(walk, stages, slots, steps, across, rules),
        flops=4 * chunk * walk.value_dim + 6 * walk.key_dim * walk.value_dim,
        exponentials=0,
        blocks=walk.value_dim // width,
    )


def _recover(walk: _gpu.Walk, chunks, value, dout, dvalue, inverse, states, steps, rules, *, scale):
    """W [B, T, H, V], X and Y [B, H, N, C, C], and Z.dR of the tokens [B, H, N, C] in float32.

    All but W are sums over blocks of 64 value columns, which come in turns through one place: other thread blocks work while this one waits.
    """
    reading, chunk, width = chunks[2], walk.chunk, TILE
    turns = walk.value_dim // width

    def body(
        reading_g, value_g, dout_g, dvalue_g, inverse_g, states_g, steps_g, rules_g,
        written_g, scores_g, overlaps_g, dsteps_g, *, tiles, small,
    ):  # fmt: skip
        row, head, n = walk.place()
        tokens, pairs = pl.ds(n * chunk, chunk), Pairs(walk)

        def fetch(turn):
            columns = pl.ds(turn * width, width)
            for name, source in (
                ("before", states_g.at[row, head, n, :, columns]),
                ("value", value_g.at[row, tokens, head, columns]),
                ("dvalue", dvalue_g.at[row, tokens, head, columns]),
                ("dout", dout_g.at[row, tokens, head, columns]),
            ):
                _gpu.fetch(source, tiles[name].at[0], small["turn"])

        def again(*names):
            # See ``Walk.zero``.
            zero = walk.zero(rules)
            return (tiles[name].at[zero] for name in names)

        def add_turn(turn, totals):
            dsteps, scores, overlaps = totals
            plgpu.barrier_wait(small["turn"])
            v, do, reading, before = again("value", "dout", "reading", "before")
            rules.clear_padding(v, do)
            v[...] = as_float(v) - walk.matmul(reading, before)
            plgpu.commit_smem()
            v, dr, inverse = again("value", "dvalue", "inverse")
            z = walk.matmul(inverse, v)
            dsteps += (as_float(dr) * z).sum(1)
            v[...] = _gpu.scaled(_gpu.vector(small["vectors"].at[0, 0], 1), z)
            plgpu.commit_smem()
            _gpu.send(v, written_g.at[row, tokens, head, pl.ds(turn * width, width)])
            v, do, dr = again("value", "dout", "dvalue")
            scores, overlaps = walk.matmul(do, v.T, scores), walk.matmul(dr, v.T, overlaps)

            @pl.when(turn + 1 < turns)
            def _next():
                # The store has left shared memory.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                fetch(turn + 1)

            return dsteps, scores, overlaps

        walk.load(reading_g.at[row, tokens, head], tiles["reading"], 0, small["full"])
        fetch(0)
        walk.load(inverse_g.at[row, head, n], tiles["inverse"], 0, small["full"])
        walk.load_small(steps_g, rules_g, row, head, n, small, 0)
        walk.number(rules_g, small)
        plgpu.barrier_wait(small["full"].at[0])
        rules = walk.decays(False, rules_g, small, 0)
        nothing = plgpu.layout_cast(jnp.zeros((chunk, chunk), jnp.float32), plgpu.Layout.WGMMA)
        none = plgpu.layout_cast(jnp.zeros((chunk,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
        totals = none, nothing, nothing
        dsteps, *totals = lax.fori_loop(0, turns, add_turn, totals) if turns > 1 else add_turn(0, totals)
        _gpu.store(dsteps_g.at[row, head, n], dsteps)
        # M and W are not needed any more.
        place, unit = again("inverse", "value")
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        unit[...] = jnp.where(pairs.same, 1.0, 0.0)
        for factor, total, target in zip((scale, -1.0), totals, (scores_g, overlaps_g)):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            place[...] = factor * total
            plgpu.commit_smem()
            place[...] = jnp.where(pairs.lower, factor * total, walk.matmul(place.T, unit))
            plgpu.commit_smem()
            _gpu.send(place, target.at[row, head, n])
        # Shared memory lasts only as long as the thread block, so it has to outlive the stores that read it.
        plgpu.wait_smem_to_gmem(0)

    written, *pairs, dsteps = walk.call(
        body,
        "recover",
        (reading, value, dout, dvalue, inverse, states, steps, rules),
        (value, inverse, inverse, jax.ShapeDtypeStruct(inverse.shape[:-1], jnp.float32)),
        {
            "reading": walk.tiles(1, chunk, walk.key_dim),
            "value": walk.tiles(1, chunk, width),
            "dout": walk.tiles(1, chunk, width),
            "dvalue": walk.tiles(1, chunk, width),
            "inverse": walk.tiles(1, chunk, chunk),
            "before": walk.tiles(1, walk.key_dim, width),
        },
        walk.small_scratch(1, steps, rules, arrays=2) | {"turn": plgpu.Barrier(num_arrivals=4 * walk.terms)},
        flops=10 * chunk * walk.value_dim + 2 * walk.key_dim * walk.value_dim,
        exponentials=0,
        blocks=walk.count,
    )
    return written, pairs, dsteps


def _differentiate(
    walk: _gpu.Walk, query, key, written, dout, dvalue, gates, scores, overlaps, across, rules, states, dstates, *, scale
) -> tuple[_gpu.Operand, _gpu.Operand, jax.Array]:  # fmt: skip
    """dQ and dK [B, T, H, K] and the gradient of the log decays [B, T, H, K] in float32, all per value head."""
    chunk, width = walk.chunk, TILE
    key_blocks, value_blocks = walk.key_dim // width, walk.value_dim // width
    warpgroups = slots = min(2, value_blocks)

    def body(
        query_g, key_g, written_g, dout_g, dvalue_g, high_g, low_g, scores_g, overlaps_g, across_g, rules_g,
        states_g, dstates_g, dquery_g, dkey_g, dgates_g, *, tiles, small,
    ):  # fmt: skip
        q, k, high, low = (tiles[name].at[0] for name in ("query", "key", "high", "low"))
        scores, overlaps = (tiles[name].at[0] for name in ("scores", "overlaps"))
        # Places of factors and results, when the blocks of V are not needed any more.
        do, w, dr = (tiles[name].at[0] for name in ("dout", "written", "dvalue"))
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

        def fetch_values(i, slot):
            mine = pl.ds(i * width, width)
            for name, source in (
                ("written", written_g.at[row, tokens, head, mine]),
                ("after", dstates_g.at[row, head, n, columns, mine]),
                ("dout", dout_g.at[row, tokens, head, mine]),
                ("before", states_g.at[row, head, n, columns, mine]),
                ("dvalue", dvalue_g.at[row, tokens, head, mine]),
            ):
                walk.load(source, tiles[name], slot, small["values"])

        def over_values(add, totals, *names):
            # Sums over the blocks of V, of products with the tiles of these names.
            def add_block(slot, totals):
                if value_blocks > 1:
                    plgpu.barrier_wait(small["values"].at[slot])
                return add(*(tiles[name].at[slot] for name in names), *totals)

            def add_turn(i, totals):
                slot = lax.rem(i, slots)
                totals = add_block(slot, totals)
                meet()
                pl.when((me == 0) & (i + slots < value_blocks))(lambda: fetch_values(i + slots, slot))
                return totals

            if value_blocks > slots:
                return lax.fori_loop(0, value_blocks, add_turn, totals)
            for slot in range(slots):
                totals = add_block(slot, totals)
            return totals

        @pl.when(me == 0)
        def _start():
            for name, source in (
                ("high", high_g.at[row, tokens, head, columns]),
                ("low", low_g.at[row, tokens, head, columns]),
                ("query", query_g.at[row, tokens, head // walk.repeats, columns]),
                ("key", key_g.at[row, tokens, head // walk.repeats, columns]),
                ("scores", scores_g.at[row, head, n]),
                ("overlaps", overlaps_g.at[row, head, n]),
            ):
                walk.load(source, tiles[name], 0, full)
            walk.load_small(across_g, rules_g, row, head, n, small, 0)
            for i in range(slots):
                fetch_values(i, i)
            walk.number(rules_g, small)

        plgpu.barrier_wait(full.at[0])
        if value_blocks == 1:
            # Here, as one warpgroup sums twice.
            plgpu.barrier_wait(small["values"].at[0])
        rules = walk.decays(False, rules_g, small, 0)
        if rules_g is not None:
            pl.when(me == 0)(lambda: rules.clear_padding(q))
            pl.when(me == warpgroups - 1)(lambda: rules.clear_padding(k))
        meet()
        pairs = Pairs(walk)

        def again(*names):
            # See ``Walk.zero``.
            zero = walk.zero(rules)
            return (tiles[name].at[zero] for name in names)

        def some(ref, mask):
            terms = map(_gpu.load, ref.terms)
            return _gpu.Operand(tuple(jnp.where(mask, x, jnp.zeros_like(x)) for x in terms))

        def add_sums(rule, gradients, place, total=None):
            # Through shared memory, as the right factor of a product.
            place[...] = gradients
            plgpu.commit_smem()
            if walk.terms == 1:
                return walk.matmul(rule, place, total)
            # For want of registers, the total stays in its place.
            sums[...] = walk.matmul(rule, place, _gpu.load(sums))
            return None

        @pl.when(me == 0)
        def _dquery():
            def add(do, before, after, dq, held):
                rules.clear_padding(do)
                held += (as_float(before) * as_float(after)).sum(1)
                return walk.matmul(do, before.T, dq), held

            nothing = plgpu.layout_cast(jnp.zeros((chunk, width), jnp.float32), plgpu.Layout.WGMMA)
            none = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
            dq, held = over_values(add, (nothing, none), "dout", "before", "after")
            crossing[...] = _gpu.vector(small["vectors"].at[0, 0, columns], 1) * held
            plgpu.commit_smem()
            dgates = _gpu.columns(_gpu.vector(crossing, 0), (chunk, width))
            if walk.terms > 1:
                sums[...], dgates = dgates, None
            dq *= scale * pairs.decays(pairs.upto(), (high, low))
            dgates = add_sums(pairs.upto(transposed=True), dq * as_float(q), do, dgates)
            dq = walk.matmul(some(scores, pairs.same), k, dq)

            def add_level(level, gradients):
                dq, dgates = gradients
                q, k, z, high, low, scores = again("query", "key", "dout", "high", "low", "scores")
                decays = pairs.decays(pairs.level(level), (high, low))
                z[...] = decays * as_float(k)
                plgpu.commit_smem()
                dx = decays * walk.matmul(some(scores, pairs.reading(level)), z)
                return dq + dx, add_sums(pairs.level(level, transposed=True), dx * as_float(q), z, dgates)

            dq, dgates = lax.fori_loop(0, LEVELS, add_level, (dq, dgates))
            if dgates is not None:
                sums[...] = dgates
            # Not in the place of the queries, which the other warpgroup may still read.
            do[...] = dq
            plgpu.commit_smem()
            plgpu.barrier_arrive(small["done"])

        @pl.when(me == warpgroups - 1)
        def _dkey():
            q, k, zq, zk, high, low, scores = again("query", "key", "written", "dvalue", "high", "low", "scores")

            def add(w, after, dr, before, dk, dx):
                return walk.matmul(w, after.T, dk), walk.matmul(dr, before.T, dx)

            nothing = plgpu.layout_cast(jnp.zeros((chunk, width), jnp.float32), plgpu.Layout.WGMMA)
            dk, dx = over_values(add, (nothing, nothing), "written", "after", "dvalue", "before")
            dk *= pairs.decays(pairs.after(), (high, low))
            dgates = add_sums(pairs.after(transposed=True), dk * as_float(k), zq)
            # At once: the compiler would put off the product of two factors until it meets the next sum.
            dk = walk.matmul(some(scores, pairs.same), q, dk)
            dx *= -pairs.decays(pairs.upto(), (high, low))
            dk += dx
            dgates = add_sums(pairs.upto(transposed=True), dx * as_float(k), zk, dgates)

            def add_level(level, gradients):
                dk, dgates = gradients
                q, k, zq, zk, high, low = again("query", "key", "written", "dvalue", "high", "low")
                scores, overlaps = again("scores", "overlaps")
                decays = pairs.decays(pairs.level(level), (high, low))
                zq[...] = decays * as_float(q)
                zk[...] = decays * as_float(k)
                plgpu.commit_smem()
                dx = walk.matmul(some(scores, pairs.written(level)), zq)
                dx = decays * walk.matmul(some(overlaps, pairs.of(level)), zk, dx)
                return dk + dx, add_sums(pairs.level(level, transposed=True), dx * as_float(k), zk, dgates)

            dk, dgates = lax.fori_loop(0, LEVELS, add_level, (dk, dgates))
            plgpu.barrier_wait(small["done"])
            if dgates is not None:
                sums[...] = dgates + _gpu.load(sums)
            q[...] = _gpu.load(do)
            k[...] = dk
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(sums, dgates_g.at[row, tokens, head, columns])
            _gpu.send(q, dquery_g.at[row, tokens, head, columns])
            _gpu.send(k, dkey_g.at[row, tokens, head, columns])

        # Shared memory lasts only as long as the thread block, so it has to outlive the stores that read it.
        plgpu.wait_smem_to_gmem(0)

    per_head = walk.template(*gates[0].shape)
    return walk.call(
        body,
        "differentiate",
        (query, key, written, dout, dvalue, *gates, scores, overlaps, across, rules, states, dstates),
        (per_head, per_head, jax.ShapeDtypeStruct(per_head.shape, jnp.float32)),
        {
            "query": walk.tiles(1, chunk, width),
            "key": walk.tiles(1, chunk, width),
            "high": _gpu.tiles(1, chunk, width),
            "low": _gpu.tiles(1, chunk, width),
            "written": walk.tiles(slots, chunk, width),
            "dout": walk.tiles(slots, chunk, width),
            "dvalue": walk.tiles(slots, chunk, width),
            "before": walk.tiles(slots, width, width),
            "after": walk.tiles(slots, width, width),
            "scores": walk.tiles(1, chunk, chunk),
            "overlaps": walk.tiles(1, chunk, chunk),
            "sums": _gpu.tiles(chunk, width, dtype=jnp.float32),
        },
        walk.small_scratch(1, across, rules, arrays=4, others=2)
        | {
            "values": plgpu.Barrier(num_arrivals=5 * walk.terms, num_barriers=slots),
            "crossing": plgpu.SMEM((width,), jnp.float32),
            "together": plgpu.Barrier(num_arrivals=warpgroups),
            "done": plgpu.Barrier(),
        },
        flops=2 * chunk * walk.key_dim * (9 * LEVELS + 11) + 6 * walk.key_dim * walk.value_dim,
        exponentials=walk.key_dim * (2 * LEVELS + 3),
        blocks=walk.count * key_blocks,
        warpgroups=warpgroups,
    )
