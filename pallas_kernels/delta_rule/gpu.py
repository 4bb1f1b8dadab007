r"""The chunked delta rule on Hopper GPUs, no decay or one per head, forward and backward, for Pallas' Mosaic GPU lowering.

.. math:: S' = e^{g_t} S_{t-1}, \qquad S_t = S' + \beta_t k_t (v_t - S'^T k_t)^T, \qquad o_t = scale \cdot S_t^T q_t

per batch row and value head, with a float32 state :math:`S` [K, V] and operands in bfloat16, or in float32 as pairs of it. Tokens are cut
into chunks of C = 64. With S the state before a chunk, :math:`G_i` the sum of its log decays up to and including token i,
:math:`D_{ri} = e^{G_r - G_i}`, :math:`L_{ri} = k_r k_i D_{ri}` for i < r and :math:`P_{ri} = scale \cdot q_r k_i D_{ri}` for i <= r,

.. math::
    Z = M (V - (e^G K) S), \quad M = (I + L \, diag(\beta))^{-1}, \quad W = diag(\beta) Z, \qquad
    O = scale (e^G Q) S + P W, \quad S \leftarrow e^{G_C} S + (e^{G_C - G} K)^T W.

Documents, padding and the precision of the decays are those of ``_gpu``.

**Forward.** ``_prepare`` makes M and P, which no state is needed for, one thread block per chunk and head. :math:`\beta` scales columns
inside of M, so its diagonal is 1 and loses nothing in bfloat16. ``_read`` walks a row as in ``linear_attention``: the grid is (batch,
heads, blocks of 64 value columns, or 32), the K x 64 part of the state is in registers, HBM sees query, key, value, M, P and output once. A
pass that will be differentiated also stores the state before every chunk as the operand it is, and keeps M and P: to read P takes
less time than to read the query and key it is made of.

**Backward.** With dO and the cotangent D of the state after a chunk,

    dW = P^T dO + (e^{G_C - G} K) D,    dR = M^T (beta dW),    dV = dR,    D <- e^{G_C} D + scale (e^G Q)^T dO - (e^G K)^T dR.

This is separable in columns of V. ``_unwind`` walks it from the last chunk to the first, on the grid of the forward pass, and stores
dV and D as operands. ``_differentiate`` makes the rest, all chunks at once: it repeats Z and W, and with
dP = scale D_ri (dO W^T) for i <= r and dL = -D_ri (dR W^T) for i < r,

    dQ = dP K + scale e^G dO S^T,    dK = [dL K - e^G dR S^T] + [dL^T K + dP^T Q + e^{G_C - G} W D^T].

Fused with the walk it would read D and M from shared memory, but only as many SMs as rows and heads would do all the work.

``_differentiate`` has two warpgroups if K and V are 128, else one. Each owns an equal part of the columns of V for Z and W, and of those
of K for dQ and dK. W, dP and dL (one made by each warpgroup) meet in shared memory, in the places of V and M.

**Gradient of the log decays.** With k.dk of the first bracket (k as a reader of what came before) and of the second (as a writer),
:math:`dG_i = q_i dq_i + (k_i dk_i)_{reader} - (k_i dk_i)_{writer}`, and what leaves the chunk depends on all its decays, in sum by
:math:`\langle e^{G_C} S, D \rangle + \sum_i k_i (e^{G_C - G} W D^T)_i`. What tokens do to one another by L cancels in sums over the chunk,
and is large where keys are alike: it is summed as dL_ri L_ri from float32, along rows and, made once more in transposed form, along
columns. From dL in bfloat16 the gradient would be off by 3% in bad cases, in place of 1%. The kernel writes sums along rows, XLA
does the rest.

**Gradient of beta.** :math:`d\beta_r = \langle Z_r, dR_r \rangle / \beta_r`, an identity that needs neither dZ nor another product. To have no
division by 0, a :math:`\beta` of 0 counts as a tiny one (``_tokens.nonzero``) in all kernels: then token r writes
next to nothing, and dR_r, proportional to it, still has all the bits of bfloat16.

**Shared memory** in KiB with its vectors and rules (2, as references are aligned), and how many thread blocks of an SM it and the
registers leave room for. Stages are two for keys, and values or dO. A walk needs the other tiles for a part of a step only and has them
refilled at its end, so they have one slot, as do all in ``_prepare`` and ``_differentiate``:

    K, V       _prepare    _read and _unwind                                   _differentiate
    64, 64     42; 3       2 x 16 + Q 8 + M, P 16 + S 8 + W 8 + 2 = 74; 3      5 x 8 + M 8 + S, D 16 + dL 8 + 2 = 74; 3
    64, 128    42; 3       the same                                            16 + 48 + M 8 + S, D 32 + dL 8 + 2 = 114; 1
    128, 64    42; 3       2 x 24 + Q 16 + M, P 16 + S 16 + W 8 + 2 = 106; 2   32 + 24 + M 8 + S, D 32 + dL 8 + 2 = 106; 2
    128, 128   42; 3       the same                                            5 x 16 + M 8 + S, D 64 + dL 8 + 2 = 162; 1
    256, 64    74; 3       2 x 40 + Q 32 + M, P 16 + S 32 + W 8 + 2 = 170; 1   64 + 24 + M 8 + S, D 64 + dL 8 + 2 = 170; 1

``_prepare``: Q and K, which make room for the inverse, 32 at least; P 8 and 2. K = 256 and float32, which takes twice as much, come with V = 64
only; ``_blocks`` cuts larger ones. In float32 there is one thread block: 146 (K = 64) and 210 in the walks and in ``_differentiate``; ``_prepare``
takes 50 and 82, with room for 3 and 2. Float32 with K = 256 is for checks and small models: walks have one stage and take 32 value columns,
K 64 + V 8 + Q 64 + M, P 32 + S 32 + W 8 + 2 = 210; ``_differentiate`` takes Q, S and D in turns of 64 key channels, and S in turns for Z before,
Q 16 + K 64 + 48 + M 16 + S, D 32 + dL 16 + 2 = 194; ``_prepare`` takes 146.

**Registers** per thread: up to 154 in ``_prepare``; for K = 64, 128 and 256 up to 153, 206 and 216 in ``_read`` and up to 168, 227 and 240 in
``_unwind``, 168 in ``_differentiate``, without spills (more than 168 leave room for 2 thread blocks only); in float32 up to 181, 221 and 179,
203, 240 and 167, 186, 250 and 233. For that, sums along rows are stored at once.

**Barriers.** Pallas would put two of a warpgroup around every store, which walks would spend a tenth of their time in. The kernels have their
own (``own_barriers`` of ``_gpu.Walk.call``): a comment says for whom where it is not for the wgmma or TMA that follows.

**Parallelism.** Walks are serial: SMs idle with fewer than 132 batch rows times heads times blocks of columns.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _configs, _gpu
from pallas_kernels._blocks import block_size
from pallas_kernels._gpu import HEADS, TILE, Config, plgpu
from pallas_kernels._gpu_inverse import unit_lower_inverse
from pallas_kernels._tokens import nonzero

_FAMILY = "delta_rule"


def block_sizes(key_dim: int, value_dim: int, dtype: jnp.dtype) -> tuple[int, int] | None:
    """Sizes of the one block of K and of the blocks of V in which heads are taken; None if shared memory holds no state of so many keys."""
    values = HEADS if dtype == jnp.bfloat16 else HEADS[:1]
    if key_dim <= HEADS[-1]:
        return block_size(key_dim, HEADS), block_size(value_dim, values)
    widest = 2 * HEADS[-1]
    return (widest, HEADS[0]) if key_dim <= widest else None


def default_config(key_dim: int, value_dim: int) -> Config:
    """That of ``_configs``, if there is one."""
    return Config(**_configs.tuned(_FAMILY, key=key_dim, value=value_dim))


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None,
    state: jax.Array,
    document: jax.Array | None,
    boundary: jax.Array | None,
    *,
    scale: float,
    save: bool,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, tuple[_gpu.Operand, ...] | None]:
    """Reads of all tokens and the state after the last.

    A length that is not a multiple of ``chunk`` costs copies of the token arrays, filled up with padding.

    Args:
        query: [B, T, G, K], float32 or bfloat16; G divides H, query/key head g serves value heads g*H/G .. (g+1)*H/G - 1.
        key: [B, T, G, K], of its dtype.
        value: [B, T, H, V], of its dtype.
        beta: [B, T, H] float32; finite at padding.
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
        ``(output, final, residuals)``: output [B, T, H, V] in the dtype of ``value``, unspecified at padding; final state
        [B, H, K, V] float32; residuals, or None: states before the chunks [B, H, N, K, V], M and P [B, H, N, C, C].
    """
    walk = _gpu.Walk.over(_FAMILY, query, value, interpret)
    config = config or default_config(walk.key_dim, walk.value_dim)
    query, key, value = walk.operands(query, key, value)
    small = _small(walk, beta, log_decay, document, boundary)
    inverse, weights = _prepare(walk, query, key, *small, scale=scale)
    output, final, states = _read(
        walk, query, key, value, inverse, weights, state, *small, scale=scale, save=save, config=config
    )
    return output.array()[:, : walk.time], final, (states, inverse, weights) if save else None


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None,
    document: jax.Array | None,
    boundary: jax.Array | None,
    residuals: tuple[_gpu.Operand, ...],
    dout: jax.Array,
    dfinal: jax.Array,
    *,
    scale: float,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """Gradients of all arrays. Those of heads that share a query and key are summed in float32, from their dtype.

    Args:
        query: as for ``forward``, and so are key, value, beta, log_decay, document, boundary, scale, config and interpret.
        key: see there.
        value: see there.
        beta: see there.
        log_decay: see there.
        document: see there.
        boundary: see there.
        residuals: third result of ``forward``.
        dout: [B, T, H, V], cotangent of the output: 0 at padding.
        dfinal: [B, H, K, V], cotangent of the final state.
        scale: see there.
        config: see there.
        interpret: see there.

    Returns:
        ``(dquery, dkey, dvalue, dbeta, dlog_decay, dstate)``: the first three as the arrays, dbeta and dlog_decay [B, T, H] float32
        (the latter None without decay), dstate [B, H, K, V] float32. Those of padding are 0.
    """
    walk = _gpu.Walk.over(_FAMILY, query, value, interpret)
    config = config or default_config(walk.key_dim, walk.value_dim)
    query, key, value, dout = walk.operands(query, key, value, dout.astype(value.dtype))
    states, inverse, weights = residuals
    small = _small(walk, beta, log_decay, document, boundary)
    dvalue, dstates, dstate = _unwind(
        walk, query, key, dout, inverse, weights, dfinal, *small, scale=scale, config=config
    )
    dquery, dkey, sums = _differentiate(
        walk, query, key, value, dout, dvalue, inverse, states, dstates, *small, scale=scale
    )
    dquery, dkey = (walk.sum_heads(x.array()).astype(query.dtype)[:, : walk.time] for x in (dquery, dkey))
    steps, leaving, inside, lower = (sums[..., part.start : part.stop, :] for part in _sums(walk))
    dbeta = walk.per_token(steps.sum(3)) / nonzero(beta)
    if document is not None:
        dbeta = jnp.where(document[..., None] >= 0, dbeta, 0.0)
    dlog_decay = None
    if log_decay is not None:
        inside = inside.sum(3) + lower[..., 0, :] - lower[..., 1, :]
        dlog_decay = walk.log_decay_gradient(inside, leaving.sum((3, 4)), log_decay, document)
    return dquery, dkey, dvalue.array()[:, : walk.time], dbeta, dlog_decay, dstate


def _small(walk: _gpu.Walk, beta, log_decay, document, boundary) -> tuple[jax.Array | None, jax.Array | None]:
    """Vectors [B, H, N, ., C], namely sums of gates, if there are any, and step sizes; and rules."""
    vectors = walk.vectors(walk.gates(log_decay, document), walk.per_head(walk.fill(nonzero(beta))))
    return vectors, walk.rules(document, boundary)


def _decays(walk: _gpu.Walk, vectors_g, rules_g, small, slot) -> tuple[_gpu.Decays, Any]:
    """Of a chunk, and a reference to its step sizes."""
    count = vectors_g.shape[3]
    return walk.decays(count > 1, rules_g, small, slot), small["vectors"].at[slot, count - 1]


def _prepare(walk: _gpu.Walk, query, key, vectors, rules, *, scale) -> tuple[_gpu.Operand, _gpu.Operand]:
    """M, see ``_gpu_inverse``, and P [B, H, N, C, C]; P is 0 for what padding reads and writes."""
    chunk, width, terms = walk.chunk, TILE, walk.terms
    blocks = range(walk.key_dim // width)

    def body(query_g, key_g, vectors_g, rules_g, inverse_g, weights_g, *, tiles, small):
        weights, full = tiles["weights"], small["full"]
        row, head, n = walk.place()
        for block in blocks:
            for name, source in (("query", query_g), ("key", key_g)):
                columns = pl.ds(block * width, width)
                source = source.at[row, pl.ds(n * chunk, chunk), head // walk.repeats, columns]
                _gpu.fetch(source, tiles[name].at[block], full.at[0])
        walk.load_small(vectors_g, rules_g, row, head, n, small, 0)
        walk.number(rules_g, small)
        q, k = ([tiles[name].at[block] for block in blocks] for name in ("query", "key"))
        plgpu.commit_smem()
        plgpu.barrier_wait(full.at[0])
        decays, beta = _decays(walk, vectors_g, rules_g, small, 0)
        decays.clear_padding(*q, *k)

        def overlaps(x):
            total = None
            for mine, other in zip(x, k):
                total = walk.matmul(mine, other.T, total)
            return total

        weights[...] = decays.pairs(overlaps(q), scale)
        plgpu.commit_smem()
        _gpu.send(weights, weights_g.at[row, head, n])
        tile = decays.pairs(overlaps(k), strict=True)
        tile *= _gpu.columns(_gpu.vector(beta, 0), tile.shape)
        # No warp needs queries and keys any more.
        plgpu.commit_smem()
        free = [ref for block in (*q, *k) for ref in block.terms]
        free += [] if tiles["spare"] is None else [tiles["spare"].at[0], tiles["spare"].at[1]]
        inverse = _gpu.Operand(tuple(free[2 : 2 + terms]))
        tile = unit_lower_inverse(walk, tile, (free[0], free[1]), (free[2], free[3]))
        plgpu.commit_smem()  # the last product has read its operand
        inverse[...] = tile
        plgpu.commit_smem()
        _gpu.send(inverse, inverse_g.at[row, head, n])
        # Shared memory lasts only as long as the thread block, so it has to outlive the stores that read it.
        plgpu.wait_smem_to_gmem(0)

    square = walk.template(*walk.state_shape(walk.count)[:3], chunk, chunk)
    return walk.call(
        body,
        "prepare",
        (query, key, vectors, rules),
        (square, square),
        {
            "query": walk.tiles(len(blocks), chunk, width),
            "key": walk.tiles(len(blocks), chunk, width),
            "weights": walk.tiles(chunk, chunk),
            "spare": _gpu.tiles(2, chunk, chunk) if 2 * len(blocks) * terms < 4 else None,
        },
        walk.small_scratch(1, vectors, rules, arrays=2 * len(blocks)),
        flops=4 * chunk * walk.key_dim + 36 * chunk * chunk,
        exponentials=0 if vectors.shape[3] == 1 else 2 * chunk,
        blocks=walk.count,
        own_barriers=True,
    )


def _tight(walk: _gpu.Walk) -> bool:
    """Shared memory is: walks take 32 value columns and have one stage, ``_differentiate`` takes key channels in turns of 64."""
    return walk.terms > 1 and walk.key_dim > HEADS[-1]


def _walk_sizes(walk: _gpu.Walk, stages: int) -> tuple[int, int]:
    """Value columns of a thread block of a walk, and stages."""
    return (TILE // 2, 1) if _tight(walk) else (TILE, min(stages, walk.count))


def _walk_scratch(walk: _gpu.Walk, stages: int, vectors, rules) -> dict[str, Any]:
    """Scratch memory for vectors and rules, and barriers: of what has slots for the stages, and of what is needed first and last."""
    return walk.small_scratch(stages, vectors, rules, arrays=2) | {
        "first": plgpu.Barrier(num_arrivals=walk.terms),
        "ready": plgpu.Barrier(num_arrivals=2 * walk.terms),
    }


def _read(walk: _gpu.Walk, query, key, value, inverse, weights, state, vectors, rules, *, scale, save, config):
    """Output, final state, and states before the chunks if ``save``."""
    chunk, (width, stages) = walk.chunk, _walk_sizes(walk, config.stages)
    make = functools.partial(walk.tiles, swizzle=2 * width)

    def body(
        query_g, key_g, value_g, inverse_g, weights_g, state_g, vectors_g, rules_g, out_g, final_g, states_g,
        *, tiles, small,
    ):  # fmt: skip
        key_s, value_s = tiles["key"], tiles["value"]
        full, first, ready = small["full"], small["first"], small["ready"]
        row, head, block = walk.place()
        group, columns = head // walk.repeats, pl.ds(block * width, width)

        def fetch(n, slot):
            tokens = pl.ds(n * chunk, chunk)
            walk.load(key_g.at[row, tokens, group], key_s, slot, full)
            walk.load(value_g.at[row, tokens, head, columns], value_s, slot, full)
            walk.load_small(vectors_g, rules_g, row, head, n, small, slot)

        # What is needed for a part of a step only: one slot will do, and leaves room for another thread block.
        def fetch_first(n):
            _gpu.fetch(inverse_g.at[row, head, n], tiles["inverse"].at[0], first)

        def fetch_last(n):
            _gpu.fetch(query_g.at[row, pl.ds(n * chunk, chunk), group], tiles["query"].at[0], ready)
            _gpu.fetch(weights_g.at[row, head, n], tiles["weights"].at[0], ready)

        def step(n, state):
            slot = lax.rem(n, stages)
            plgpu.barrier_wait(full.at[slot])
            decays, beta = _decays(walk, vectors_g, rules_g, small, slot)
            slot += walk.zero(decays) if stages == 1 else 0
            k, v = key_s.at[slot], value_s.at[slot]

            def fixed():
                zero = walk.zero(decays)
                return [tiles[name].at[zero] for name in ("query", "inverse", "weights", "carried", "written")]

            _, inverse, _, carried, written = fixed()
            decays.clear_padding(k, v)
            if save:
                # The store of the last copy has left shared memory; the output's may still be under way.
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            carried[...] = state
            # wgmma and TMA read through another proxy than the threads write.
            plgpu.commit_smem()
            if save:
                _gpu.send(carried, states_g.at[row, head, n, :, columns])
            read = _gpu.scaled(decays.from_start(), walk.matmul(k, carried))
            v[...] = _gpu.load(v).astype(jnp.float32) - read
            plgpu.commit_smem()
            plgpu.barrier_wait(first)
            w = _gpu.scaled(_gpu.vector(beta, 1), walk.matmul(inverse, v))
            # The store of the last output, the newest but for this step's copy of the state. All warps wait, so M has read what W replaces.
            plgpu.wait_smem_to_gmem(int(save), wait_read_only=True)
            v[...] = w
            written[...] = _gpu.scaled(decays.to_end(), w)
            # All threads have read what TMA refills, too.
            plgpu.commit_smem()
            pl.when(n + 1 < walk.count)(lambda: fetch_first(n + 1))
            state = walk.matmul(k.T, written, _gpu.scaled(decays.across(), state))
            plgpu.barrier_wait(ready)
            q, _, weights, carried, written = fixed()
            o = walk.matmul(weights, v, _gpu.scaled(decays.from_start(scale), walk.matmul(q, carried)))
            plgpu.commit_smem()  # all warps have read W for the state
            written[...] = o
            plgpu.commit_smem()
            _gpu.send(written, out_g.at[row, pl.ds(n * chunk, chunk), head, columns])
            pl.when(n + 1 < walk.count)(lambda: fetch_last(n + 1))
            pl.when(n + stages < walk.count)(lambda: fetch(n + stages, slot))
            return state

        lax.fori_loop(0, stages, lambda n, _: fetch(n, n), None)
        fetch_first(0)
        fetch_last(0)
        walk.number(rules_g, small)
        plgpu.commit_smem()
        state = _gpu.load(state_g.at[row, head, :, columns], optimized=False)
        state = lax.fori_loop(0, walk.count, step, state)
        _gpu.store(final_g.at[row, head, :, columns], state)
        # Shared memory lasts only as long as the thread block, so it has to outlive the stores that read it.
        plgpu.wait_smem_to_gmem(0)

    states = walk.template(*walk.state_shape(walk.count)) if save else None
    return walk.call(
        body,
        "read",
        (query, key, value, inverse, weights, state.astype(jnp.float32), vectors, rules),
        (walk.template(*value.shape), jax.ShapeDtypeStruct(walk.state_shape(), jnp.float32), states),
        {
            "query": make(1, chunk, walk.key_dim),
            "key": make(stages, chunk, walk.key_dim),
            "value": make(stages, chunk, width),
            "inverse": make(1, chunk, chunk),
            "weights": make(1, chunk, chunk),
            "carried": make(1, walk.key_dim, width),
            "written": make(1, chunk, width),
        },
        _walk_scratch(walk, stages, vectors, rules),
        flops=4 * chunk * walk.value_dim + 6 * walk.key_dim * walk.value_dim,
        exponentials=0,
        blocks=walk.value_dim // width,
        own_barriers=True,
    )


def _unwind(walk: _gpu.Walk, query, key, dout, inverse, weights, dfinal, vectors, rules, *, scale, config):
    """dV, cotangents of the states after the chunks, and that of the initial state."""
    chunk, last, (width, stages) = walk.chunk, walk.count - 1, _walk_sizes(walk, config.backward_stages)
    make = functools.partial(walk.tiles, swizzle=2 * width)

    def body(
        query_g, key_g, dout_g, inverse_g, weights_g, dfinal_g, vectors_g, rules_g, dvalue_g, dstates_g, dstate_g,
        *, tiles, small,
    ):  # fmt: skip
        key_s, dout_s = tiles["key"], tiles["dout"]
        full, first, ready = small["full"], small["first"], small["ready"]
        row, head, block = walk.place()
        group, columns = head // walk.repeats, pl.ds(block * width, width)

        def fetch(i, slot):
            tokens = pl.ds((last - i) * chunk, chunk)
            walk.load(key_g.at[row, tokens, group], key_s, slot, full)
            walk.load(dout_g.at[row, tokens, head, columns], dout_s, slot, full)
            walk.load_small(vectors_g, rules_g, row, head, last - i, small, slot)

        # What is needed for a part of a step only: one slot will do, and leaves room for another thread block.
        def fetch_first(i):
            _gpu.fetch(weights_g.at[row, head, last - i], tiles["weights"].at[0], first)

        def fetch_last(i):
            _gpu.fetch(query_g.at[row, pl.ds((last - i) * chunk, chunk), group], tiles["query"].at[0], ready)
            _gpu.fetch(inverse_g.at[row, head, last - i], tiles["inverse"].at[0], ready)

        def step(i, dstate):
            n, slot = last - i, lax.rem(i, stages)
            plgpu.barrier_wait(full.at[slot])
            decays, beta = _decays(walk, vectors_g, rules_g, small, slot)
            zero = walk.zero(decays)
            slot += zero if stages == 1 else 0
            k, do = key_s.at[slot], dout_s.at[slot]
            names = "query", "inverse", "weights", "carried", "error"
            q, inverse, weights, carried, error = (tiles[name].at[zero] for name in names)
            # The stores of the last step have left shared memory.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            carried[...] = dstate
            decays.clear_padding(k, do)
            plgpu.commit_smem()
            _gpu.send(carried, dstates_g.at[row, head, n, :, columns])
            dw = _gpu.scaled(decays.to_end(), walk.matmul(k, carried))
            plgpu.barrier_wait(first)
            dw = walk.matmul(weights.T, do, dw)
            plgpu.commit_smem()  # all warps have read dO as it was
            _gpu.scale_rows(do, decays.from_start(scale))
            error[...] = _gpu.scaled(_gpu.vector(beta, 1), dw)
            # All threads have read what TMA refills, too.
            plgpu.commit_smem()
            pl.when(i < last)(lambda: fetch_first(i + 1))
            plgpu.barrier_wait(ready)
            decays.clear_padding(q)
            dr = walk.matmul(inverse.T, error)
            dstate = walk.matmul(q.T, do, _gpu.scaled(decays.across(), dstate))
            # All warps have done both products; this is also what TMA waits for before it refills their operands.
            plgpu.commit_smem()
            pl.when(i < last)(lambda: fetch_last(i + 1))
            error[...] = dr
            do[...] = _gpu.scaled(decays.from_start(-1.0), dr)  # dO is not needed any more
            plgpu.commit_smem()
            _gpu.send(error, dvalue_g.at[row, pl.ds(n * chunk, chunk), head, columns])
            dstate = walk.matmul(k.T, do, dstate)
            plgpu.commit_smem()
            pl.when(i + stages < walk.count)(lambda: fetch(i + stages, slot))
            return dstate

        lax.fori_loop(0, stages, lambda i, _: fetch(i, i), None)
        fetch_first(0)
        fetch_last(0)
        walk.number(rules_g, small)
        plgpu.commit_smem()
        dstate = _gpu.load(dfinal_g.at[row, head, :, columns], optimized=False)
        dstate = lax.fori_loop(0, walk.count, step, dstate)
        _gpu.store(dstate_g.at[row, head, :, columns], dstate)
        # Shared memory lasts only as long as the thread block, so it has to outlive the stores that read it.
        plgpu.wait_smem_to_gmem(0)

    return walk.call(
        body,
        "unwind",
        (query, key, dout, inverse, weights, dfinal.astype(jnp.float32), vectors, rules),
        (
            walk.template(*dout.shape),
            walk.template(*walk.state_shape(walk.count)),
            jax.ShapeDtypeStruct(walk.state_shape(), jnp.float32),
        ),
        {
            "query": make(1, chunk, walk.key_dim),
            "key": make(stages, chunk, walk.key_dim),
            "dout": make(stages, chunk, width),
            "inverse": make(1, chunk, chunk),
            "weights": make(1, chunk, chunk),
            "carried": make(1, walk.key_dim, width),
            "error": make(1, chunk, width),
        },
        _walk_scratch(walk, stages, vectors, rules),
        flops=4 * chunk * walk.value_dim + 6 * walk.key_dim * walk.value_dim,
        exponentials=0,
        blocks=walk.value_dim // width,
        own_barriers=True,
    )


def _sums(walk: _gpu.Walk) -> tuple[range, range, range, range]:
    """Which sums of a chunk are what.

    - Z.dR of the tokens, one of each block of value columns.
    - What leaves the chunk: one of each square of S, of its rows, and of each block of key columns one of the tokens. Only with decay,
      as the rest.
    - Cotangents of the sums of gates, three of each block of key columns, but for what tokens do to one another by L.
    - This, of the tokens as readers and as writers.
    """
    keys, values = walk.key_dim // TILE, walk.value_dim // TILE
    sizes = (values, keys * (values + 1), 3 * keys, 2)
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    steps, leaving, inside, lower = (range(stop - size, stop) for size, stop in zip(sizes, stops))
    return steps, leaving, inside, lower


def _differentiate(
    walk: _gpu.Walk, query, key, value, dout, dvalue, inverse, states, dstates, vectors, rules, *, scale
):
    """dQ and dK per value head, and sums [B, H, N, ., C], see ``_sums``."""
    chunk, warpgroups = walk.chunk, walk.warpgroups
    value_blocks, key_blocks = (dim // warpgroups // TILE for dim in (walk.value_dim, walk.key_dim))
    value_parts, tight = walk.value_dim // TILE, _tight(walk)
    steps, leaving, inside, lower = _sums(walk)
    decaying = vectors.shape[3] > 1

    def body(
        query_g, key_g, value_g, dout_g, dvalue_g, inverse_g, states_g, dstates_g, vectors_g, rules_g,
        dquery_g, dkey_g, sums_g, *, tiles, small,
    ):  # fmt: skip
        names = ("query", "key", "value", "dout", "dvalue", "inverse", "before", "after", "dlower")
        full = small["full"]
        (row, head, n), me = walk.place(), walk.warpgroup()
        tokens = pl.ds(n * chunk, chunk)

        def meet():
            # What this warpgroup wrote is visible to wgmma and TMA, and it has read all it had to; then the same of the other.
            plgpu.commit_smem()
            if warpgroups > 1:
                plgpu.barrier_arrive(small["together"])
                plgpu.barrier_wait(small["together"])

        def sum_rows(ref, tile):
            return (_gpu.load(ref).astype(jnp.float32) * tile).sum(1)

        def store_sums(sort, i, sums):
            # At once: what waits for others would be spilled.
            i += sort.start + (0 if sort is lower else me * (len(sort) // warpgroups))
            _gpu.store(sums_g.at[row, head, n, i], sums)

        # Of these, turns take a block of channels each, and the first ones no more than a state.
        def fetch_before(block):
            source = states_g.at[row, head, n, pl.ds(block * TILE, TILE), :]
            _gpu.fetch(source, tiles["before"].at[0], small["held"])

        def fetch_turn(block):
            channels = pl.ds(block * TILE, TILE)
            for name, source in (
                ("query", query_g.at[row, tokens, head // walk.repeats, channels]),
                ("before", states_g.at[row, head, n, channels, :]),
                ("after", dstates_g.at[row, head, n, channels, :]),
            ):
                _gpu.fetch(source, tiles[name].at[0], small["turn"])

        @pl.when(me == 0)
        def _start():
            for name, source in (
                ("key", key_g.at[row, tokens, head // walk.repeats]),
                ("before", states_g.at[row, head, n]),
                ("value", value_g.at[row, tokens, head]),
                ("inverse", inverse_g.at[row, head, n]),
                ("dvalue", dvalue_g.at[row, tokens, head]),
                ("dout", dout_g.at[row, tokens, head]),
                ("query", query_g.at[row, tokens, head // walk.repeats]),
                ("after", dstates_g.at[row, head, n]),
            ):
                if not (tight and name in ("query", "before", "after")):
                    walk.load(source, tiles[name], 0, full)
            walk.load_small(vectors_g, rules_g, row, head, n, small, 0)
            walk.number(rules_g, small)
            if tight:
                fetch_before(0)

        meet()
        plgpu.barrier_wait(full.at[0])
        decays, beta = _decays(walk, vectors_g, rules_g, small, 0)
        q, k, v, do, dr, inverse, before, after, dlower = (tiles[name].at[0] for name in names)
        dscores = inverse  # M is not needed any more when dP is made
        if rules_g is not None:
            pl.when(me == 0)(lambda: decays.clear_padding(k, v))
            pl.when(me == warpgroups - 1)(lambda: decays.clear_padding(*(() if tight else (q,)), do))
            meet()

        def reads(columns):
            if not tight:
                return walk.matmul(k, before.at[:, columns])
            total = None
            for block in range(key_blocks):
                plgpu.barrier_wait(small["held"])
                total = walk.matmul(k.at[:, pl.ds(block * TILE, TILE)], before, total)
                plgpu.commit_smem()  # all warps have done the product with what is refilled
                fetch_before(block + 1) if block + 1 < key_blocks else fetch_turn(0)
            return total

        for block in range(value_blocks):
            columns = pl.ds((me * value_blocks + block) * TILE, TILE)
            mine = v.at[:, columns]
            read = _gpu.scaled(decays.from_start(), reads(columns))
            mine[...] = _gpu.load(mine).astype(jnp.float32) - read
            plgpu.commit_smem()
            z = walk.matmul(inverse, mine)
            store_sums(steps, block, sum_rows(dr.at[:, columns], z))
            plgpu.commit_smem()  # all warps have done the product with what Z replaces
            mine[...] = _gpu.scaled(_gpu.vector(beta, 1), z)
        meet()

        # One warpgroup makes dP and another dL.
        @pl.when(me == 0)
        def _dscores():
            dscores[...] = decays.pairs(walk.matmul(do, v.T), scale)
            if decaying:
                tile = decays.pairs(walk.matmul(v, dr.T), -1.0, strict=True, transposed=True)
                store_sums(lower, 1, (tile * walk.matmul(k, k.T)).sum(1))

        @pl.when(me == warpgroups - 1)
        def _dlower():
            tile = decays.pairs(walk.matmul(dr, v.T), -1.0, strict=True)
            dlower[...] = tile
            if decaying:
                store_sums(lower, 0, (tile * walk.matmul(k, k.T)).sum(1))

        meet()
        for block in range(key_blocks):
            columns = pl.ds((me * key_blocks + block) * TILE, TILE)
            zero = walk.zero(decays)
            q, k, v, do, dr, dscores, before, after, dlower = (tiles[name].at[zero] for name in names)
            my_q, my_k = q if tight else q.at[:, columns], k.at[:, columns]
            my_before, my_after = (before, after) if tight else (before.at[columns, :], after.at[columns, :])
            if tight:
                plgpu.barrier_wait(small["turn"])
                decays.clear_padding(my_q)

            if decaying:
                pairs = zip(_gpu.parts(my_before), _gpu.parts(my_after))
                for i, (mine, other) in enumerate(pairs, block * (value_parts + 1)):
                    held = sum_rows(mine, _gpu.load(other).astype(jnp.float32))
                    store_sums(leaving, i, _gpu.scaled(decays.across(), held))
            dk = _gpu.scaled(decays.to_end(), walk.matmul(v, my_after.T))
            if decaying:
                store_sums(leaving, block * (value_parts + 1) + value_parts, sum_rows(my_k, dk))
            dk = walk.matmul(dscores.T, my_q, dk)
            if decaying:
                store_sums(inside, 3 * block, -sum_rows(my_k, dk))
            read = _gpu.scaled(decays.from_start(-1.0), walk.matmul(dr, my_before.T))
            if decaying:
                store_sums(inside, 3 * block + 1, sum_rows(my_k, read))
            dk = walk.matmul(dlower, my_k, walk.matmul(dlower.T, my_k, dk + read))
            dq = _gpu.scaled(decays.from_start(scale), walk.matmul(do, my_before.T))
            dq = walk.matmul(dscores, my_k, dq)
            if decaying:
                store_sums(inside, 3 * block + 2, sum_rows(my_q, dq))
            # No product will read these columns again, in this warp or another.
            plgpu.commit_smem()
            my_q[...] = dq
            my_k[...] = dk
            plgpu.commit_smem()
            if tight:
                _gpu.send(my_q, dquery_g.at[row, tokens, head, columns])
                if block + 1 < key_blocks:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    fetch_turn(block + 1)
        meet()
        if not tight:
            pl.when(me == 0)(lambda: _gpu.send(q, dquery_g.at[row, tokens, head]))
        pl.when(me == warpgroups - 1)(lambda: _gpu.send(k, dkey_g.at[row, tokens, head]))
        # Shared memory lasts only as long as the thread block, so it has to outlive the stores that read it.
        plgpu.wait_smem_to_gmem(0)

    per_head = walk.template(*value.shape[:3], walk.key_dim)
    channels = TILE if tight else walk.key_dim
    small = walk.small_scratch(1, vectors, rules, arrays=5 if tight else 8)
    small["together"] = plgpu.Barrier(num_arrivals=warpgroups)
    if tight:
        small["held"], small["turn"] = (plgpu.Barrier(num_arrivals=arrays * walk.terms) for arrays in (1, 3))
    sums = (*walk.state_shape(walk.count)[:3], lower.stop if decaying else steps.stop, chunk)
    return walk.call(
        body,
        "differentiate",
        (query, key, value, dout, dvalue, inverse, states, dstates, vectors, rules),
        (per_head, per_head, jax.ShapeDtypeStruct(sums, jnp.float32)),
        {
            "query": walk.tiles(1, chunk, channels),
            "key": walk.tiles(1, chunk, walk.key_dim),
            "value": walk.tiles(1, chunk, walk.value_dim),
            "dout": walk.tiles(1, chunk, walk.value_dim),
            "dvalue": walk.tiles(1, chunk, walk.value_dim),
            "inverse": walk.tiles(1, chunk, chunk),
            "before": walk.tiles(1, channels, walk.value_dim),
            "after": walk.tiles(1, channels, walk.value_dim),
            "dlower": walk.tiles(1, chunk, chunk),
        },
        small,
        flops=2 * chunk * ((6 if decaying else 4) * walk.key_dim + 4 * walk.value_dim)
        + 8 * walk.key_dim * walk.value_dim,
        exponentials=2 * chunk if decaying else 0,
        blocks=walk.count,
        warpgroups=warpgroups,
        own_barriers=True,
    )
