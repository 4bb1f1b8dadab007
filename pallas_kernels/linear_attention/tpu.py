"""Chunked linear attention on TPU (Mosaic): one pass over time with the states in VMEM.

With S the state before a chunk, G_i the sum of its log decays up to and including token i, and E_j that of those after token j:

    O = mask(<q_i, exp(G_i - G_j) k_j>) V + (exp(G) Q) S,      S <- exp(G_C) S + (exp(E) K)^T V

How decays of a head and of channels get there is in ``_tpu_decays``. The forward pass of a gradient writes the state before
every chunk; the backward one walks the other way with the cotangent of the state.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _tpu
from pallas_kernels._tpu import Config, Shape, dot, store, take, times
from pallas_kernels._tpu_decays import scaled, step_of

__all__ = ["Config", "backward", "default_config", "forward"]


def default_config(
    time: int, heads: int, groups: int, key_dim: int, value_dim: int, itemsize: int, *, channels: bool = False
) -> Config | None:
    """As ``_tpu.default_config``, with 8 to 16 heads in lockstep, fewer for decays per channel (``channels``)."""
    lockstep = 4 if channels else max(8, 1024 // max(key_dim, value_dim))
    sizes = (time, heads, groups, key_dim, value_dim, itemsize)
    return _tpu.default_config("linear_attention", *sizes, chunk=128, lockstep=lockstep, channels=channels)


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
    """Outputs, the final state and, with ``save``, the state before every chunk.

    Args:
        query: [B, T, G * K].
        key: [B, T, G * K].
        value: [B, T, H * V].
        gates: log decays per channel [B, T, H * K], or None.
        rows: [B, H, N, n, C] float32. Without ``gates``, n = 3: sums up to and after each token, and resets so far (-1: padding);
            None without decay and documents. With them, n = 1: the kinds of the tokens; None if all are ordinary.
        state: [B, H, K, V] float32.
        groups: G.
        scale: factor on the reads.
        padded: some tokens may be padding, whose arrays may hold anything.
        save: write the states.
        config: sizes of a step.
        interpret: run as plain XLA, on any device.

    Returns:
        ([B, T, H * V] in value's dtype, [B, H, K, V] float32, [B, H, N, K, V] float32 or None).
    """
    shape = Shape(query, value, config, groups, state.shape[1])
    decays, decay_specs = shape.decay_inputs(gates, rows)
    outputs = shape.call(
        functools.partial(
            _forward_body,
            shape=shape,
            scale=scale,
            padded=padded,
            given=(gates is not None, rows is not None),
            save=save,
        ),
        f"linear_attention_forward{'_states' if save else ''}",
        [query, key, value, state, *decays],
        [shape.queries(), shape.queries(), shape.values(), shape.state(), *decay_specs],
        [
            jax.ShapeDtypeStruct(value.shape, value.dtype),
            shape.state_shape(),
            *([shape.chunk_shape(shape.key_dim, shape.value_dim)] if save else []),
        ],
        [shape.values(), shape.state(), *([shape.states()] if save else [])],
        square=2,
        flat=2,
        interpret=interpret,
    )
    return outputs[0], outputs[1], outputs[2] if save else None


def backward(
    query,
    key,
    value,
    gates,
    rows,
    states,
    dout,
    dfinal,
    *,
    groups: int,
    scale,
    padded: bool,
    config: Config,
    interpret: bool,
):
    """Cotangents of query, key, value (in their dtypes), of the state, and of the log decays: as ``gates`` in float32 if they are given,
    [B, H, N, 1, C] if only ``rows`` are, else None.

    Args:
        query, key, value, gates, rows, groups, scale, padded, config, interpret: as in ``forward``.
        states: those that it saved.
        dout: cotangent of the output; 0 at padding.
        dfinal: of the final state.
    """
    shape = Shape(query, value, config, groups, dfinal.shape[1], reverse=True)
    keys = shape.key_parts(query)
    decays, decay_specs = shape.decay_inputs(gates, rows)
    dgates = [] if not decays else [shape.gates_shape() if gates is not None else shape.chunk_shape(1, config.chunk)]
    dgates_specs = [] if not decays else [shape.gates() if gates is not None else shape.of_chunk(1, config.chunk)]
    outputs = shape.call(
        functools.partial(
            _backward_body, shape=shape, scale=scale, padded=padded, given=(gates is not None, rows is not None)
        ),
        "linear_attention_backward",
        [query, key, value, states, dout, dfinal, *decays],
        [
            shape.queries(),
            shape.queries(),
            shape.values(),
            shape.states(),
            shape.values(),
            shape.state(),
            *decay_specs,
        ],
        [keys, keys, jax.ShapeDtypeStruct(value.shape, value.dtype), shape.state_shape(), *dgates],
        [shape.partial_queries(), shape.partial_queries(), shape.values(), shape.state(), *dgates_specs],
        square=5,
        flat=4,
        interpret=interpret,
    )
    dquery, dkey = (shape.join_parts(parts, query) for parts in outputs[:2])
    return dquery, dkey, outputs[2], outputs[3], outputs[4] if decays else None


def _forward_body(*references, shape: Shape, scale, padded: bool, given: tuple[bool, bool], save: bool):
    refs = list(references)
    q_ref, k_ref, v_ref, state_ref = take(refs, (True,) * 4)
    gates_ref, rows_ref = take(refs, given)
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
    weights = step.weights(q, k)
    old = [dot(scaled(step.from_start[h], q[h]), s[h].astype(dtype), 1, 0) for h in heads]
    added = [dot(scaled(step.to_end[h], k[h]), v[h], 0, 0) for h in heads]
    new = [dot(weights[h].astype(dtype), v[h], 1, 0) for h in heads]
    for h in heads:
        carried[h] = times(step.across[h], s[h]) + added[h]
    store(o_ref, [scale * (new[h] + old[h]) for h in heads])

    @pl.when(pl.program_id(2) == shape.steps - 1)
    def _():
        final_ref[...] = carried[...]


def _backward_body(*references, shape: Shape, scale, padded: bool, given: tuple[bool, bool]):
    refs = list(references)
    q_ref, k_ref, v_ref, states_ref, do_ref, dfinal_ref = take(refs, (True,) * 6)
    gates_ref, rows_ref = take(refs, given)
    dq_ref, dk_ref, dv_ref, dstate_ref, dgates_ref, carried = take(refs, (True,) * 4 + (any(given), True))

    @pl.when(pl.program_id(2) == 0)
    def _():
        carried[...] = dfinal_ref[...]

    step = step_of(shape, gates_ref, rows_ref, padded)
    dtype, heads = v_ref.dtype, step.heads
    q, k, v = step.keys(q_ref), step.keys(k_ref), step.values(v_ref)
    do = [(scale * tile.astype(jnp.float32)).astype(dtype) for tile in step.values(do_ref)]
    s, d = [states_ref[h] for h in heads], [carried[h] for h in heads]
    small_s, small_d = ([x.astype(dtype) for x in tiles] for tiles in (s, d))

    dweights = [dot(do[h], v[h], 1, 1) for h in heads]
    read = [times(step.from_start[h], dot(do[h], small_s[h], 1, 1)) for h in heads]
    kept = [times(step.to_end[h], dot(v[h], small_d[h], 1, 1)) for h in heads]
    weights = [x.astype(dtype) for x in step.weights(q, k)]
    dq, dk = step.gradient(dweights, q, k)
    dq, dk = [dq[h] + read[h] for h in heads], [dk[h] + kept[h] for h in heads]
    written = [scaled(step.to_end[h], k[h]) for h in heads]
    dv = [dot(weights[h], do[h], 0, 0) + dot(written[h], small_d[h], 1, 0) for h in heads]
    added = [dot(scaled(step.from_start[h], q[h]), do[h], 0, 0) for h in heads]
    for h in heads:
        carried[h] = times(step.across[h], d[h]) + added[h]

    if dgates_ref is not None:
        qf, kf = ([x.astype(jnp.float32) for x in tiles] for tiles in (q, k))
        dgates = step.through(
            [qf[h] * dq[h] - kf[h] * dk[h] for h in heads],
            [kf[h] * kept[h] for h in heads],
            [s[h] * d[h] for h in heads],
        )
        step.store_gates(dgates_ref, dgates)
    store(dv_ref, dv)
    store(dq_ref, step.sum_heads(dq))
    store(dk_ref, step.sum_heads(dk))

    @pl.when(pl.program_id(2) == shape.steps - 1)
    def _():
        dstate_ref[...] = carried[...]
