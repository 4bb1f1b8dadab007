"""Chunked linear attention on TPU (Mosaic), no decay or one per head: one pass over time with the states in VMEM.

Grid (batch, blocks of heads, chunks), chunks last and in order. Arrays stay as layers make them, [B, T, heads * width]: a block is a
chunk of tokens by the lanes of some heads, so nothing is transposed, and heads of 64 share a register of 128 lanes. The heads of a step
advance in lockstep, operation by operation, because the scheduler does not interleave chains that follow one another (8 heads
of a step take a third of the cycles of 8 steps).

With S the state before a chunk, G_i the sum of its log decays up to and including token i, and E_j that of those after token j:

    O = mask(Q K^T * exp(G_i - G_j)) V + exp(G) * (Q S),      S <- exp(G_C) S + (exp(E) * K)^T V

The exponents come in rows made outside (they are small), together with the number of resets so far in the chunk; tokens with different
numbers have nothing to do with one another, and only number 0 knows S. Document starts are resets, and so is a decay
of less than exp(-40): the sums then stay small enough that differences of them lose nothing, and no decay is a reset by its size.

The forward pass of a gradient writes the state before every chunk; the backward one walks the other way with the cotangent of the state.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a grid step."""

    chunk: int  # tokens; a multiple of 16
    heads: int  # value heads in lockstep


def default_config(time: int, heads: int, groups: int, key_dim: int, value_dim: int, itemsize: int) -> Config | None:
    """Chunks of 128 tokens, and up to 8 heads whose lanes make whole registers; None if no number of heads does.

    Args:
        time: T.
        heads: H, value heads.
        groups: G, query and key heads.
        key_dim: K.
        value_dim: V.
        itemsize: bytes of an element of query, key and value.
    """
    repeats = heads // groups
    fitting = []
    for n in range(1, heads + 1):
        if heads % n or (n % repeats and repeats % n) or (n > 8 and n * max(key_dim, value_dim) > 1024):
            continue
        keys = max(1, n // repeats)
        whole = keys == groups or keys * key_dim % LANES == 0
        if whole and (n == heads or n * value_dim % LANES == 0):
            fitting.append(n)
    if not fitting:
        return None
    # The states, what the backward pass makes of them and the blocks are to stay below 16 MiB of VMEM.
    small = [n for n in fitting if n * key_dim * value_dim * 2 * itemsize <= 1 << 19] or fitting[:1]
    return Config(min(128, -(-time // 16) * 16), small[-1])


class _Shape:
    """Sizes, index maps and the call."""

    def __init__(self, query, value, config: Config, groups: int, heads: int, *, reverse: bool):
        self.batch, self.time = query.shape[:2]
        self.groups, self.heads, self.config = groups, heads, config
        self.key_dim, self.value_dim = query.shape[2] // groups, value.shape[2] // heads
        self.repeats = heads // groups
        self.keys = max(1, config.heads // self.repeats)  # query and key heads of a step
        self.shared = max(1, self.repeats // config.heads)  # steps that share a key head
        self.chunks = pl.cdiv(self.time, config.chunk)
        self.reverse = reverse
        self.narrow = query.dtype.itemsize == 2

    def at(self, n):
        return self.chunks - 1 - n if self.reverse else n

    def queries(self) -> pl.BlockSpec:
        shape = (None, self.config.chunk, self.keys * self.key_dim)
        return pl.BlockSpec(shape, lambda b, h, n: (b, self.at(n), h // self.shared))

    def partial_queries(self) -> pl.BlockSpec:
        """One part for each step that shares a key head."""
        shape = (None, self.config.chunk, self.keys * self.key_dim)
        return pl.BlockSpec(shape, lambda b, h, n: (b, self.at(n), h))

    def values(self) -> pl.BlockSpec:
        shape = (None, self.config.chunk, self.config.heads * self.value_dim)
        return pl.BlockSpec(shape, lambda b, h, n: (b, self.at(n), h))

    def rows(self, count: int) -> pl.BlockSpec:
        shape = (None, self.config.heads, None, count, self.config.chunk)
        return pl.BlockSpec(shape, lambda b, h, n: (b, h, self.at(n), 0, 0))

    def state(self) -> pl.BlockSpec:
        shape = (None, self.config.heads, self.key_dim, self.value_dim)
        return pl.BlockSpec(shape, lambda b, h, n: (b, h, 0, 0))

    def states(self) -> pl.BlockSpec:
        shape = (None, self.config.heads, None, self.key_dim, self.value_dim)
        return pl.BlockSpec(shape, lambda b, h, n: (b, h, self.at(n), 0, 0))

    def state_shape(self, *, every_chunk: bool = False) -> jax.ShapeDtypeStruct:
        chunks = (self.chunks,) if every_chunk else ()
        return jax.ShapeDtypeStruct((self.batch, self.heads, *chunks, self.key_dim, self.value_dim), jnp.float32)

    def call(self, body, name, inputs, in_specs, out_shape, out_specs, *, products: int, interpret: bool):
        c = self.config
        tokens = self.batch * self.time * self.heads
        return pl.pallas_call(
            body,
            grid=(self.batch, self.heads // c.heads, self.chunks),
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            scratch_shapes=[pltpu.VMEM((c.heads, self.key_dim, self.value_dim), jnp.float32)],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(
                flops=products
                * tokens
                * (c.chunk * (self.key_dim + self.value_dim) + 2 * self.key_dim * self.value_dim),
                transcendentals=tokens * c.chunk,
                bytes_accessed=sum(a.size * a.dtype.itemsize for a in (*inputs, *out_shape)),
            ),
            name=f"linear_attention_{name}_{'bf16' if self.narrow else 'f32'}_c{c.chunk}_h{c.heads}_k{self.key_dim}_v{self.value_dim}",
            interpret=interpret,
        )(*inputs)


def forward(
    query, key, value, rows, state, *, groups: int, scale, padded: bool, save: bool, config: Config, interpret: bool
):
    """Outputs, the final state and, with ``save``, the state before every chunk.

    Args:
        query: [B, T, G * K].
        key: [B, T, G * K].
        value: [B, T, H * V].
        rows: [B, H, N, 3, C] float32: sums up to and after each token, and resets so far (-1: padding); None without decay and documents.
        state: [B, H, K, V] float32.
        groups: G.
        scale: factor on the reads.
        padded: some tokens may be padding, whose query, key and value may be anything.
        save: write the states.
        config: sizes of a step.
        interpret: run as plain XLA, on any device.

    Returns:
        ([B, T, H * V] in value's dtype, [B, H, K, V] float32, [B, H, N, K, V] float32 or None).
    """
    shape = _Shape(query, value, config, groups, state.shape[1], reverse=False)
    outputs = shape.call(
        functools.partial(_forward_body, shape=shape, scale=scale, padded=padded, ruled=rows is not None, save=save),
        "forward_states" if save else "forward",
        [query, key, value, *([] if rows is None else [rows]), state],
        [
            shape.queries(),
            shape.queries(),
            shape.values(),
            *([] if rows is None else [shape.rows(3)]),
            shape.state(),
        ],
        [
            jax.ShapeDtypeStruct(value.shape, value.dtype),
            shape.state_shape(),
            *([shape.state_shape(every_chunk=True)] if save else []),
        ],
        [shape.values(), shape.state(), *([shape.states()] if save else [])],
        products=2,
        interpret=interpret,
    )
    return outputs[0], outputs[1], outputs[2] if save else None


def backward(
    query, key, value, rows, states, dout, dfinal, *, groups: int, scale, padded: bool, config: Config, interpret: bool
):
    """Cotangents of query, key, value (in their dtypes), of the log decays [B, H, N, 1, C] (None without rows) and of the state.

    Args:
        query, key, value, rows, groups, scale, padded, config, interpret: as in ``forward``.
        states: those that it saved.
        dout: cotangent of the output; 0 at padding.
        dfinal: of the final state.
    """
    shape = _Shape(query, value, config, groups, dfinal.shape[1], reverse=True)
    # Steps that share a key head write a part each; the parts are added in float32.
    part = jnp.float32 if shape.shared > 1 else query.dtype
    keys = jax.ShapeDtypeStruct((*query.shape[:2], query.shape[2] * shape.shared), part)
    ruled = rows is not None
    outputs = shape.call(
        functools.partial(_backward_body, shape=shape, scale=scale, padded=padded, ruled=ruled),
        "backward",
        [query, key, value, *([rows] if ruled else []), states, dout, dfinal],
        [
            shape.queries(),
            shape.queries(),
            shape.values(),
            *([shape.rows(3)] if ruled else []),
            shape.states(),
            shape.values(),
            shape.state(),
        ],
        [
            keys,
            keys,
            jax.ShapeDtypeStruct(value.shape, value.dtype),
            shape.state_shape(),
            *([jax.ShapeDtypeStruct((*rows.shape[:3], 1, rows.shape[4]), jnp.float32)] if ruled else []),
        ],
        [
            shape.partial_queries(),
            shape.partial_queries(),
            shape.values(),
            shape.state(),
            *([shape.rows(1)] if ruled else []),
        ],
        products=5,
        interpret=interpret,
    )
    dquery, dkey = outputs[:2]
    if shape.shared > 1:
        parts = (*query.shape[:2], groups, shape.shared, shape.key_dim)
        dquery, dkey = (d.reshape(parts).sum(3).reshape(query.shape).astype(query.dtype) for d in (dquery, dkey))
    return dquery, dkey, outputs[2], outputs[4] if ruled else None, outputs[3]


def _dot(a, b, axis_a: int, axis_b: int):
    """Contract an axis of each; operands of bfloat16 are exact, float32 ones ask for full products."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


class _Rules:
    """Decays and masks of one head in one chunk; everything is 1 without rows."""

    def __init__(self, rows_ref, h: int, size: int):
        i, j = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
        self.lower = i >= j
        self.pair: Any = self.lower
        if rows_ref is None:
            return
        rows = rows_ref[h]
        upto, after, resets = rows[0:1], rows[1:2], rows[2:3]

        def column(row):  # a masked sum over lanes turns a row into a column
            return jnp.sum(jnp.where(i == j, row, 0.0), 1, keepdims=True)

        number = column(resets)
        end = jnp.maximum(jnp.max(resets, 1, keepdims=True), 0.0)
        total = upto[:, size - 1 :]
        upto_column = column(upto)
        self.real = number >= 0
        self.pair = self.lower & (number == resets) & self.real
        self.decay = jnp.exp(jnp.where(self.pair, upto_column - upto, -jnp.inf))
        self.from_start = jnp.exp(jnp.where(number == 0, upto_column, -jnp.inf))
        self.to_end = jnp.exp(jnp.where(number == end, column(after), -jnp.inf))
        self.across = jnp.exp(jnp.where(end == 0, total, -jnp.inf))

    def scores(self, x, ruled: bool):
        """x with the decay of each pair, 0 where there is none."""
        return jnp.where(self.pair, x * self.decay if ruled else x, 0.0)


def _times(decay, x):
    return x if decay is None else decay * x


class _Step:
    """The heads of one grid step: their tiles and their rules, as lists."""

    def __init__(self, shape: _Shape, rows_ref, padded: bool):
        self.shape, self.ruled = shape, rows_ref is not None
        self.heads = range(shape.config.heads)
        self.rules = [_Rules(rows_ref, h, shape.config.chunk) for h in self.heads]
        self.real = self.rules[0].real if padded else None

    def key_head(self, h: int) -> int:
        return h // self.shape.repeats if self.shape.shared == 1 else 0

    def tiles(self, ref, width: int, count: int) -> list:
        tiles = [ref[:, h * width : (h + 1) * width] for h in range(count)]
        # A select, so that what padding holds cannot pass, not even as 0 * NaN.
        return tiles if self.real is None else [jnp.where(self.real, tile, jnp.zeros_like(tile)) for tile in tiles]

    def keys(self, ref) -> list:
        return self.tiles(ref, self.shape.key_dim, self.shape.keys)

    def values(self, ref) -> list:
        return self.tiles(ref, self.shape.value_dim, self.shape.config.heads)

    def decays(self, name: str) -> list:
        return [getattr(rule, name) if self.ruled else None for rule in self.rules]


def _store(ref, tiles: list) -> None:
    ref[...] = jnp.concatenate(tiles, 1).astype(ref.dtype)


def _forward_body(*refs, shape: _Shape, scale, padded: bool, ruled: bool, save: bool):
    refs = list(refs)
    q_ref, k_ref, v_ref = refs[:3]
    rows_ref = refs.pop(3) if ruled else None
    state_ref, o_ref, final_ref = refs[3:6]
    states_ref: Any = refs.pop(6) if save else None
    carried = refs[6]

    @pl.when(pl.program_id(2) == 0)
    def _():
        carried[...] = state_ref[...]

    step = _Step(shape, rows_ref, padded)
    dtype = v_ref.dtype
    q, k, v = step.keys(q_ref), step.keys(k_ref), step.values(v_ref)
    s = [carried[h] for h in step.heads]
    for h in step.heads if save else ():
        states_ref[h] = s[h]
    group = [step.key_head(h) for h in step.heads]
    scores = [_dot(q[g], k[g], 1, 1) for g in range(shape.keys)]
    old = [_dot(q[group[h]], s[h].astype(dtype), 1, 0) for h in step.heads]
    to_end, across, from_start = (step.decays(name) for name in ("to_end", "across", "from_start"))
    written = [_times(to_end[h], k[group[h]].astype(jnp.float32)).astype(dtype) for h in step.heads]
    added = [_dot(written[h], v[h], 0, 0) for h in step.heads]
    weights = [step.rules[h].scores(scores[group[h]], ruled).astype(dtype) for h in step.heads]
    new = [_dot(weights[h], v[h], 1, 0) for h in step.heads]
    for h in step.heads:
        carried[h] = _times(across[h], s[h]) + added[h]
    _store(o_ref, [scale * (new[h] + _times(from_start[h], old[h])) for h in step.heads])

    @pl.when(pl.program_id(2) == shape.chunks - 1)
    def _():
        final_ref[...] = carried[...]


def _backward_body(*refs, shape: _Shape, scale, padded: bool, ruled: bool):
    refs = list(refs)
    q_ref, k_ref, v_ref = refs[:3]
    rows_ref = refs.pop(3) if ruled else None
    states_ref, do_ref, dfinal_ref, dq_ref, dk_ref, dv_ref, dstate_ref = refs[3:10]
    drows_ref: Any = refs.pop(10) if ruled else None
    carried = refs[10]

    @pl.when(pl.program_id(2) == 0)
    def _():
        carried[...] = dfinal_ref[...]

    step = _Step(shape, rows_ref, padded)
    dtype, heads = v_ref.dtype, step.heads
    q, k, v = step.keys(q_ref), step.keys(k_ref), step.values(v_ref)
    do = [(scale * tile.astype(jnp.float32)).astype(dtype) for tile in step.values(do_ref)]
    s, d = [states_ref[h] for h in heads], [carried[h] for h in heads]
    group = [step.key_head(h) for h in heads]
    q, k = [q[group[h]] for h in heads], [k[group[h]] for h in heads]
    to_end, across, from_start = (step.decays(name) for name in ("to_end", "across", "from_start"))
    qf, kf = [x.astype(jnp.float32) for x in q], [x.astype(jnp.float32) for x in k]
    small_s, small_d = [x.astype(dtype) for x in s], [x.astype(dtype) for x in d]

    scores = [_dot(q[h], k[h], 1, 1) for h in heads]
    dscores = [_dot(do[h], v[h], 1, 1) for h in heads]
    read = [_dot(do[h], small_s[h], 1, 1) for h in heads]
    kept = [_dot(v[h], small_d[h], 1, 1) for h in heads]
    weights = [step.rules[h].scores(scores[h], ruled).astype(dtype) for h in heads]
    dweights = [step.rules[h].scores(dscores[h], ruled).astype(dtype) for h in heads]
    written = [_times(to_end[h], kf[h]).astype(dtype) for h in heads]
    reads = [_times(from_start[h], qf[h]).astype(dtype) for h in heads]
    kept = [_times(to_end[h], kept[h]) for h in heads]
    dq = [_dot(dweights[h], k[h], 1, 0) + _times(from_start[h], read[h]) for h in heads]
    dk = [_dot(dweights[h], q[h], 0, 0) + kept[h] for h in heads]
    dv = [_dot(weights[h], do[h], 0, 0) + _dot(written[h], small_d[h], 1, 0) for h in heads]
    added = [_dot(reads[h], do[h], 0, 0) for h in heads]
    for h in heads:
        carried[h] = _times(across[h], d[h]) + added[h]

    if ruled:
        for h in heads:
            # exp(G_i) is in all that q_i meets, exp(-G_j) in all that k_j meets, and exp(G_C) in what leaves the chunk.
            through = jnp.sum(qf[h] * dq[h] - kf[h] * dk[h], 1, keepdims=True)
            leaving = _total(kf[h] * kept[h]) + across[h] * _total(s[h] * d[h])
            drows_ref[h] = jnp.sum(jnp.where(step.rules[h].lower, through, 0.0), 0, keepdims=True) + leaving

    _store(dv_ref, dv)
    for ref, tiles in ((dq_ref, dq), (dk_ref, dk)):
        _store(ref, [sum(tiles[h] for h in heads if group[h] == g) for g in range(shape.keys)])

    @pl.when(pl.program_id(2) == shape.chunks - 1)
    def _():
        dstate_ref[...] = carried[...]


def _total(x):
    return jnp.sum(jnp.sum(x, 1, keepdims=True), 0, keepdims=True)
