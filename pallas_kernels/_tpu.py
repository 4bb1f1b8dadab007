"""What the chunked matrix-state kernels for TPU share: a grid of rows, heads and chunks, and operations on tiles.

Grid (batch, blocks of heads, chunks), chunks last and in order. Arrays stay as layers make them, [B, T, heads * width]: a block is a
chunk of tokens by the lanes of some heads, so nothing is transposed, and heads of 64 share a register of 128 lanes. The heads of a step
advance in lockstep, operation by operation, because the scheduler does not interleave chains that follow one another (8 heads
of a step take a third of the cycles of 8 steps): tiles come in lists, one per head.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _configs

LANES = 128
_VMEM = 48 << 20  # bytes a kernel may take: v5p has 64 MiB per core, v5e and v6e have 128


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a grid step."""

    chunk: int  # tokens: a power of two from 16 on
    heads: int  # value heads in lockstep


def default_config(
    kernel: str,
    time: int,
    heads: int,
    groups: int,
    key_dim: int,
    value_dim: int,
    itemsize: int,
    *,
    chunk: int,
    lockstep: int,
    channels: bool,
) -> Config | None:
    """Chunks of ``chunk`` tokens, and some heads whose lanes make whole registers; None if no number of heads does.

    Args:
        kernel: folder of the kernel, under which ``_configs`` may know a better ``lockstep`` or ``chunk``.
        time: T.
        heads: H, value heads.
        groups: G, query and key heads.
        key_dim: K.
        value_dim: V.
        itemsize: bytes of an element of query, key and value.
        chunk: tokens, a power of two from 16 on; fewer if T is.
        lockstep: at most so many heads, if they make whole registers.
        channels: there is an array [B, T, H * K] as well.
    """
    better = _configs.tuned(kernel, key=key_dim, value=value_dim, itemsize=itemsize, channels=int(channels))
    lockstep, chunk = better.get("lockstep", lockstep), better.get("chunk", chunk)
    repeats = heads // groups
    fitting = []
    for n in range(1, heads + 1):
        if heads % n or (n % repeats and repeats % n):
            continue
        keys = max(1, n // repeats)
        whole = keys == groups or keys * key_dim % LANES == 0
        lanes = (value_dim, key_dim) if channels else (value_dim,)
        if whole and (n == heads or not any(n * dim % LANES for dim in lanes)):
            fitting.append(n)
    if not fitting:
        return None
    # The states, what the backward pass makes of them and the blocks are to stay below 16 MiB of VMEM.
    small = [n for n in fitting if n <= lockstep and n * key_dim * value_dim * 2 * itemsize <= 1 << 19] or fitting[:1]
    return Config(min(chunk, max(16, 1 << (time - 1).bit_length())), small[-1])


class Shape:
    """Sizes of a call, its index maps and the call itself.

    Args:
        query: [B, T, G * K].
        value: [B, T, H * V].
        config: sizes of a step.
        groups: G.
        heads: H.
        reverse: walk from the last chunk to the first.
        together: chunks of a step, for kernels that do not walk.
    """

    def __init__(
        self,
        query,
        value,
        config: Config,
        groups: int,
        heads: int,
        *,
        reverse: bool = False,
        together: int | None = None,
    ):
        self.batch, self.time = query.shape[:2]
        self.groups, self.heads, self.config = groups, heads, config
        self.key_dim, self.value_dim = query.shape[2] // groups, value.shape[2] // heads
        self.repeats = heads // groups
        self.keys = max(1, config.heads // self.repeats)  # query and key heads of a step
        self.shared = max(1, self.repeats // config.heads)  # steps that share a key head
        self.together = together
        self.tokens = (together or 1) * config.chunk  # of a step
        self.steps = pl.cdiv(self.time, self.tokens)
        self.reverse = reverse
        self.narrow = query.dtype.itemsize == 2

    def at(self, n):
        return self.steps - 1 - n if self.reverse else n

    def queries(self) -> pl.BlockSpec:
        shape = (None, self.tokens, self.keys * self.key_dim)
        return pl.BlockSpec(shape, lambda b, h, n: (b, self.at(n), h // self.shared))

    def partial_queries(self) -> pl.BlockSpec:
        """One part for each step that shares a key head."""
        shape = (None, self.tokens, self.keys * self.key_dim)
        return pl.BlockSpec(shape, lambda b, h, n: (b, self.at(n), h))

    def gates(self) -> pl.BlockSpec:
        """Of an array [B, T, H * K]."""
        shape = (None, self.tokens, self.config.heads * self.key_dim)
        return pl.BlockSpec(shape, lambda b, h, n: (b, self.at(n), h))

    def values(self) -> pl.BlockSpec:
        shape = (None, self.tokens, self.config.heads * self.value_dim)
        return pl.BlockSpec(shape, lambda b, h, n: (b, self.at(n), h))

    def of_chunk(self, *dims: int) -> pl.BlockSpec:
        """What an array [B, H, N, *dims] has for the chunk of a step, or for its chunks."""
        shape = (None, self.config.heads, self.together, *dims)
        return pl.BlockSpec(shape, lambda b, h, n: (b, h, self.at(n), 0, 0))

    def state(self) -> pl.BlockSpec:
        shape = (None, self.config.heads, self.key_dim, self.value_dim)
        return pl.BlockSpec(shape, lambda b, h, n: (b, h, 0, 0))

    def states(self) -> pl.BlockSpec:
        return self.of_chunk(self.key_dim, self.value_dim)

    def state_shape(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch, self.heads, self.key_dim, self.value_dim), jnp.float32)

    def chunk_shape(self, *dims: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        """[B, H, N, *dims]."""
        return jax.ShapeDtypeStruct((self.batch, self.heads, pl.cdiv(self.time, self.config.chunk), *dims), dtype)

    def gates_shape(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch, self.time, self.heads * self.key_dim), jnp.float32)

    def decay_inputs(self, gates, rows) -> tuple[list, list]:
        """Those of ``gates`` [B, T, H * K] and ``rows`` [B, H, N, n, C] that are not None, and their blocks."""
        arrays, specs = [], []
        if gates is not None:
            arrays.append(gates)
            specs.append(self.gates())
        if rows is not None:
            arrays.append(rows)
            specs.append(self.of_chunk(*rows.shape[3:]))
        return arrays, specs

    def key_parts(self, query) -> jax.ShapeDtypeStruct:
        """Cotangent of a query or key array: steps that share a key head write a part each, to be added in float32."""
        dtype = jnp.float32 if self.shared > 1 else query.dtype
        return jax.ShapeDtypeStruct((*query.shape[:2], query.shape[2] * self.shared), dtype)

    def join_parts(self, parts, query):
        if self.shared == 1:
            return parts
        parts = parts.reshape(*query.shape[:2], self.groups, self.shared, self.key_dim)
        return parts.sum(3).reshape(query.shape).astype(query.dtype)

    def call(
        self,
        body,
        name: str,
        inputs,
        in_specs,
        out_shape,
        out_specs,
        *,
        square: float,
        flat: float,
        interpret: bool,
        walk: bool = True,
    ):
        """Run ``body`` over the grid.

        Args:
            body: the kernel.
            name: its name, to which the sizes are added.
            inputs: arrays.
            in_specs: their blocks.
            out_shape: shapes of the results.
            out_specs: their blocks.
            square: products of C x C with C x K or C x V in a chunk, in units of a pair of them (K and V alike).
            flat: products of C x K with K x V.
            interpret: run as plain XLA, on any device.
            walk: chunks follow one another, and ``body`` has scratch memory for the states of its heads.
        """
        c = self.config
        tokens = self.batch * self.time * self.heads
        inside = square * c.chunk * (self.key_dim + self.value_dim)
        return pl.pallas_call(
            body,
            grid=(self.batch, self.heads // c.heads, self.steps),
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            scratch_shapes=[pltpu.VMEM((c.heads, self.key_dim, self.value_dim), jnp.float32)] if walk else [],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary" if walk else "parallel"),
                vmem_limit_bytes=_VMEM,
            ),
            cost_estimate=pl.CostEstimate(
                flops=int(tokens * (inside + flat * 2 * self.key_dim * self.value_dim)),
                transcendentals=tokens * c.chunk,
                bytes_accessed=sum(a.size * a.dtype.itemsize for a in (*inputs, *out_shape)),
            ),
            name=f"{name}_{'bf16' if self.narrow else 'f32'}_c{c.chunk}_h{c.heads}_k{self.key_dim}_v{self.value_dim}",
            interpret=interpret,
        )(*inputs)


def take(references: list, given: tuple[bool, ...]) -> list:
    """Removes the first references of a kernel from a list: one for each array that is given, else None."""
    return [references.pop(0) if there else None for there in given]


def dot(a, b, axis_a: int, axis_b: int):
    """Contract an axis of each; operands of bfloat16 are exact, float32 ones ask for full products."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _diagonal(size: int):
    i, j = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return i == j


def column(row):
    """[1, C] -> [C, 1]: a masked sum over lanes."""
    return jnp.sum(jnp.where(_diagonal(row.shape[1]), row, 0.0), 1, keepdims=True)


def row(column):
    """[C, 1] -> [1, C]."""
    return jnp.sum(jnp.where(_diagonal(column.shape[0]), column, 0.0), 0, keepdims=True)


def total(x):
    """Sum of a tile, [1, 1]."""
    return jnp.sum(jnp.sum(x, 1, keepdims=True), 0, keepdims=True)


def times(decay, x):
    """Rows of x times a decay; None is 1."""
    return x if decay is None else decay * x


def store(ref, tiles: list) -> None:
    """Tiles of heads side by side."""
    ref[...] = jnp.concatenate(tiles, 1).astype(ref.dtype)
