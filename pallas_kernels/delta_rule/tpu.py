"""The chunked delta rule on TPU (Mosaic): an inverse per chunk, then one pass over time with the states in VMEM.

With S the state before a chunk, G_i the sum of its log decays up to and including token i, E_j that of those after token j:

    L_ri = <k_r, exp(G_r - G_i) k_i> for i < r,    P_ri = <q_r, exp(G_r - G_i) k_i> for i <= r,    M = (I + L diag(beta))^-1
    Z = M (V - (exp(G) K) S),    W = beta * Z,    O = (exp(G) Q) S + P W,    S <- exp(G_C) S + (exp(E) K)^T W

M does not depend on S: a kernel of its own makes it, for all chunks side by side. (In one kernel with the walk it would save M's way
through HBM, but the compiler takes minutes.) It has a unit diagonal, so that bfloat16 loses nothing there. P is made there as well if decays are
per channel, which takes several products (``_tpu_decays``). The forward pass of a gradient also writes the state before every chunk.
The backward one walks the other way with the cotangent X of the state after the chunk:

    dW = P^T dO + (exp(E) K) X,    dR = M^T (beta * dW) = dV,    dP = tril(dO W^T),    dL = -tril(dR W^T, -1)
    dQ = {of P} + exp(G) (dO S^T),    dK = {of L as it reads} - exp(G) (dR S^T)  +  {of L and P as it is read} + exp(E) (W X^T)
    X <- exp(G_C) X + (exp(G) Q)^T dO - (exp(G) K)^T dR
    dbeta_r = <Z_r, dR_r> / beta_r

so that no gradient passes through the inverse as such. For the identity of dbeta, a beta of 0 is a tiny one in M and in the backward pass.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _tpu
from pallas_kernels._tokens import nonzero
from pallas_kernels._tpu import Config, Shape, column, dot, row, store, take, times
from pallas_kernels._tpu_decays import scaled, step_of
from pallas_kernels._tpu_inverse import unit_lower_inverse

__all__ = ["Config", "backward", "default_config", "forward"]


def default_config(
    time: int, heads: int, groups: int, key_dim: int, value_dim: int, itemsize: int, *, channels: bool = False
) -> Config | None:
    """As ``_tpu.default_config``, with 8 heads in lockstep, 2 for float32 products, which are six of bfloat16. Chunks are at most 4 K tokens:
    beyond that, products inside of a chunk outgrow those with the state.
    """
    wide = itemsize > 2
    sizes = (time, heads, groups, key_dim, value_dim, itemsize)
    chunk = min(64 if wide else 128, max(16, 1 << (4 * key_dim).bit_length() - 1))
    return _tpu.default_config("delta_rule", *sizes, chunk=chunk, lockstep=2 if wide else 8, channels=channels)


def forward(
    query,
    key,
    value,
    gates,
    rows,
    state,
    *,
    groups: int,
    scale,
    padded: bool,
    save: bool,
    config: Config,
    interpret: bool,
):
    """Outputs, the final state and, with ``save``, what ``backward`` needs.

    Args:
        query: [B, T, G * K].
        key: [B, T, G * K].
        value: [B, T, H * V].
        gates: log decays per channel [B, T, H * K], or None.
        rows: [B, H, N, n, C] float32. Without ``gates``, n = 4: sums up to and after each token, resets so far (-1: padding), and beta.
            With them, n = 2: beta, and the kinds of the tokens.
        state: [B, H, K, V] float32.
        groups: G.
        scale: factor on the reads.
        padded: some tokens may be padding, whose arrays may hold anything.
        save: return what ``backward`` needs.
        config: sizes of a step.
        interpret: run as plain XLA, on any device.

    Returns:
        ([B, T, H * V] in value's dtype, [B, H, K, V] float32, None or a tuple: the states before the chunks [B, H, N, K, V] float32, M and,
        with ``gates``, P [B, H, N, C, C] in value's dtype).
    """
    squares = _squares(query, key, value, gates, rows, groups, padded=padded, config=config, interpret=interpret)
    shape = Shape(query, value, config, groups, state.shape[1])
    decays, decay_specs = shape.decay_inputs(gates, rows)
    outputs = shape.call(
        functools.partial(
            _forward_body, shape=shape, scale=scale, padded=padded, channels=gates is not None, save=save
        ),
        f"delta_rule_forward{'_states' if save else ''}",
        [query, key, value, state, *squares, *decays],
        [
            shape.queries(),
            shape.queries(),
            shape.values(),
            shape.state(),
            *(shape.of_chunk(config.chunk, config.chunk) for _ in squares),
            *decay_specs,
        ],
        [
            jax.ShapeDtypeStruct(value.shape, value.dtype),
            shape.state_shape(),
            *([shape.chunk_shape(shape.key_dim, shape.value_dim)] if save else []),
        ],
        [shape.values(), shape.state(), *([shape.states()] if save else [])],
        square=2,
        flat=3,
        interpret=interpret,
    )
    return outputs[0], outputs[1], (outputs[2], *squares) if save else None


def backward(
    query,
    key,
    value,
    gates,
    rows,
    saved,
    dout,
    dfinal,
    *,
    groups: int,
    scale,
    padded: bool,
    config: Config,
    interpret: bool,
):
    """Cotangents of query, key, value (in their dtypes), of the state, of beta [B, H, N, 1, C], and of the log decays: as ``gates`` in
    float32 if they are given, else [B, H, N, 1, C].

    Args:
        query, key, value, gates, rows, groups, scale, padded, config, interpret: as in ``forward``.
        saved: what it saved.
        dout: cotangent of the output; 0 at padding.
        dfinal: of the final state.
    """
    shape = Shape(query, value, config, groups, dfinal.shape[1], reverse=True)
    size, keys, channels = config.chunk, shape.key_parts(query), gates is not None
    decays, decay_specs = shape.decay_inputs(gates, rows)
    states, *squares = saved
    outputs = shape.call(
        functools.partial(_backward_body, shape=shape, scale=scale, padded=padded, channels=channels),
        "delta_rule_backward",
        [query, key, value, states, dout, dfinal, *squares, *decays],
        [
            shape.queries(),
            shape.queries(),
            shape.values(),
            shape.states(),
            shape.values(),
            shape.state(),
            *(shape.of_chunk(size, size) for _ in squares),
            *decay_specs,
        ],
        [
            keys,
            keys,
            jax.ShapeDtypeStruct(value.shape, value.dtype),
            shape.state_shape(),
            shape.chunk_shape(1, size),
            shape.gates_shape() if channels else shape.chunk_shape(1, size),
        ],
        [
            shape.partial_queries(),
            shape.partial_queries(),
            shape.values(),
            shape.state(),
            shape.of_chunk(1, size),
            shape.gates() if channels else shape.of_chunk(1, size),
        ],
        square=5,
        flat=7,
        interpret=interpret,
    )
    dquery, dkey = (shape.join_parts(parts, query) for parts in outputs[:2])
    return dquery, dkey, *outputs[2:]


def _squares(query, key, value, gates, rows, groups: int, *, padded: bool, config: Config, interpret: bool) -> list:
    """M of every chunk and, with ``gates``, P, [B, H, N, C, C] in value's dtype."""
    heads, size, channels = rows.shape[1], config.chunk, gates is not None
    sizes = (key.shape[1], heads, groups, key.shape[2] // groups, value.shape[2] // heads, value.dtype.itemsize)
    lockstep = 8 if channels else 16
    most = _tpu.default_config("delta_rule_inverse", *sizes, chunk=size, lockstep=lockstep, channels=channels)
    assert most is not None, "the walk has a configuration"
    # What limits it is latency: chunks of the heads fill each other's gaps as well.
    together = max(1, min(lockstep // most.heads, rows.shape[2]))
    shape = Shape(key, value, dataclasses.replace(config, heads=most.heads), groups, heads, together=together)
    decays, decay_specs = shape.decay_inputs(gates, rows)
    results = 2 if channels else 1
    return shape.call(
        functools.partial(_squares_body, shape=shape, padded=padded, channels=channels),
        "delta_rule_inverse",
        [*([query] if channels else []), key, *decays],
        [*([shape.queries()] if channels else []), shape.queries(), *decay_specs],
        [shape.chunk_shape(size, size, dtype=value.dtype)] * results,
        [shape.of_chunk(size, size)] * results,
        square=results,
        flat=0,
        interpret=interpret,
        walk=False,
    )


def _betas(rows_ref, heads, channels: bool) -> list:
    """[1, C] per head."""
    at = 0 if channels else 3
    return [rows_ref[h][at : at + 1] for h in heads]


def _nonzero_betas(rows_ref, heads, channels: bool) -> list:
    return [nonzero(beta) for beta in _betas(rows_ref, heads, channels)]


def _squares_body(*references, shape: Shape, padded: bool, channels: bool):
    q_ref, k_ref, gates_ref, rows_ref, inverse_ref, weights_ref = take(
        list(references), (channels, True, channels, True, True, channels)
    )
    size, overlaps, places = shape.config.chunk, [], []
    for n in range(shape.together or 1):
        tokens = slice(n * size, (n + 1) * size)
        rows = rows_ref.at[:, n]
        step = step_of(shape, gates_ref.at[tokens] if channels else None, rows, padded)
        k = step.keys(k_ref.at[tokens])
        if channels:
            for h, weights in enumerate(step.weights(step.keys(q_ref.at[tokens]), k)):
                weights_ref[h, n] = weights.astype(weights_ref.dtype)
        betas = _nonzero_betas(rows, step.heads, channels)
        overlaps += [beta * overlap for beta, overlap in zip(betas, step.strictly(step.weights(k, k)))]
        places += [(h, n) for h in step.heads]
    inverses = unit_lower_inverse(overlaps, full=k_ref.dtype == jnp.float32)
    for place, inverse in zip(places, inverses):
        inverse_ref[place] = inverse.astype(inverse_ref.dtype)


def _rows_product(a: list, b, axis: int) -> list:
    """Products of arrays with one right operand: one matmul with the rows of all."""
    joined, parts, start = dot(jnp.concatenate(a, 0), b, 1, axis), [], 0
    for x in a:
        parts.append(joined[start : start + x.shape[0]])
        start += x.shape[0]
    return parts


def _forward_body(*references, shape: Shape, scale, padded: bool, channels: bool, save: bool):
    refs = list(references)
    q_ref, k_ref, v_ref, state_ref, inverse_ref, weights_ref = take(refs, (True,) * 5 + (channels,))
    gates_ref, rows_ref = take(refs, (channels, True))
    o_ref, final_ref, states_ref, carried = take(refs, (True, True, save, True))

    @pl.when(pl.program_id(2) == 0)
    def _():
        carried[...] = state_ref[...]

    step = step_of(shape, gates_ref, rows_ref, padded)
    dtype, heads = v_ref.dtype, step.heads
    q, k, v = step.keys(q_ref), step.keys(k_ref), step.values(v_ref)
    s = [carried[h] for h in heads]
    for h in heads if save else ():
        states_ref[h] = s[h]
    weights = [weights_ref[h] for h in heads] if channels else [x.astype(dtype) for x in step.weights(q, k)]
    reads = [[scaled(step.from_start[h], x[h]) for x in (q, k)] for h in heads]
    old = [_rows_product(reads[h], s[h].astype(dtype), 0) for h in heads]
    errors = [(v[h].astype(jnp.float32) - old[h][1]).astype(dtype) for h in heads]
    errors = [dot(inverse_ref[h], errors[h], 1, 0) for h in heads]
    betas = [column(beta) for beta in _betas(rows_ref, heads, channels)]
    written = [(betas[h] * errors[h]).astype(dtype) for h in heads]
    added = [dot(scaled(step.to_end[h], k[h]), written[h], 0, 0) for h in heads]
    new = [dot(weights[h], written[h], 1, 0) for h in heads]
    for h in heads:
        carried[h] = times(step.across[h], s[h]) + added[h]
    store(o_ref, [scale * (new[h] + old[h][0]) for h in heads])

    @pl.when(pl.program_id(2) == shape.steps - 1)
    def _():
        final_ref[...] = carried[...]


def _backward_body(*references, shape: Shape, scale, padded: bool, channels: bool):
    refs = list(references)
    q_ref, k_ref, v_ref, states_ref, do_ref, dfinal_ref, inverse_ref, weights_ref = take(
        refs, (True,) * 7 + (channels,)
    )
    gates_ref, rows_ref = take(refs, (channels, True))
    dq_ref, dk_ref, dv_ref, dstate_ref, dbeta_ref, dgates_ref, carried = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        carried[...] = dfinal_ref[...]

    step = step_of(shape, gates_ref, rows_ref, padded)
    dtype, heads = v_ref.dtype, step.heads
    q, k, v = step.keys(q_ref), step.keys(k_ref), step.values(v_ref)
    do = [(scale * tile.astype(jnp.float32)).astype(dtype) for tile in step.values(do_ref)]
    s, d, inverse = ([ref[h] for h in heads] for ref in (states_ref, carried, inverse_ref))
    small_s, small_d = ([x.astype(dtype) for x in tiles] for tiles in (s, d))
    betas = [column(beta) for beta in _nonzero_betas(rows_ref, heads, channels)]
    q_reads, k_reads = ([scaled(step.from_start[h], x[h]) for h in heads] for x in (q, k))
    k_written = [scaled(step.to_end[h], k[h]) for h in heads]

    # What the forward pass wrote, again.
    old = [dot(k_reads[h], small_s[h], 1, 0) for h in heads]
    errors = [(v[h].astype(jnp.float32) - old[h]).astype(dtype) for h in heads]
    errors = [dot(inverse[h], errors[h], 1, 0) for h in heads]
    written = [(betas[h] * errors[h]).astype(dtype) for h in heads]
    weights = [weights_ref[h] for h in heads] if channels else [x.astype(dtype) for x in step.weights(q, k)]

    # Cotangents of that, and of the state.
    kept = [dot(k_written[h], small_d[h], 1, 0) for h in heads]
    dwritten = [dot(weights[h], do[h], 0, 0) + kept[h] for h in heads]
    dv = [dot(inverse[h], (betas[h] * dwritten[h]).astype(dtype), 0, 0) for h in heads]
    small_dv = [x.astype(dtype) for x in dv]
    added = [dot(q_reads[h], do[h], 0, 0) - dot(k_reads[h], small_dv[h], 0, 0) for h in heads]
    for h in heads:
        carried[h] = times(step.across[h], d[h]) + added[h]

    # Of what is local to the chunk.
    both = [_rows_product([do[h], small_dv[h]], written[h], 1) for h in heads]
    into = [_rows_product([do[h], small_dv[h]], small_s[h], 1) for h in heads]
    dq, dk_weights = step.gradient([x[0] for x in both], q, k)
    reading, dk_overlaps = step.gradient(step.strictly([-x[1] for x in both]), k, k)
    ending = [times(step.to_end[h], dot(written[h], small_d[h], 1, 1)) for h in heads]
    dq = [dq[h] + times(step.from_start[h], into[h][0]) for h in heads]
    reading = [reading[h] - times(step.from_start[h], into[h][1]) for h in heads]
    writing = [dk_weights[h] + dk_overlaps[h] + ending[h] for h in heads]

    qf, kf = ([x.astype(jnp.float32) for x in tiles] for tiles in (q, k))
    dgates = step.through(
        [qf[h] * dq[h] + kf[h] * (reading[h] - writing[h]) for h in heads],
        [kf[h] * ending[h] for h in heads],
        [s[h] * d[h] for h in heads],
    )
    step.store_gates(dgates_ref, dgates)
    for h in heads:
        dbeta_ref[h] = row(jnp.sum(errors[h] * dv[h], 1, keepdims=True) / betas[h])
    store(dv_ref, dv)
    store(dq_ref, step.sum_heads(dq))
    store(dk_ref, step.sum_heads([reading[h] + writing[h] for h in heads]))

    @pl.when(pl.program_id(2) == shape.steps - 1)
    def _():
        dstate_ref[...] = carried[...]
