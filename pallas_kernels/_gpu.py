"""What the chunked kernels for Hopper GPUs share: chunks and decays of a row, tiles in shared memory, and the call.

**Documents.** Tokens carry running document numbers, chunks those of the states before and after them. They act as masks of the
decays, whose exponents are masked before ``exp2``; a start needs no gate. Padding (document -1) is in no state. What it holds,
NaN included, is selected away in shared memory, in the chunks that have any; other chunks pay one branch.

**Precision of the decays.** Gates enter as cumulative sums over a chunk, in float32 and in units of log 2, of log decays of at
least ``MIN_LOG_DECAY``; those below it count as it, and their gradient, below e^-60, as 0. An exponent is the difference of
two sums of up to M in size, so it is off by less than 2^-24 M for every token between. M is 92 for decays of 1/e on average, and
5540 if the whole chunk is at the limit: then a weight is off by less than 2.3e-4 of itself per token; bfloat16 resolves 3.9e-3.

**Float32** query, key and value are pairs of bfloat16 (``Operand``), x = h + l with h the nearest to x and l to x - h, because wgmma in
float32 has 11 bits and reads no transposed operands. A product is h h' + h l' + l h', summed in float32: what a pair loses is 2^-17 of x at
most, and what the product leaves out is 2^-18 of it. So results are right to 1e-5, for 3 times the products and twice the shared memory.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

plgpu: Any = mosaic_gpu  # some signatures differ between versions

MIN_LOG_DECAY = -60.0
"""Log decays below this count as this: exp(-60) is nothing in float32, and sums of 64 of them still resolve small ones."""

TILE = 64
"""Tokens of a chunk, rows of a wgmma, and columns of bfloat16 in a row of swizzled shared memory."""

HEADS = (64, 128)
"""Sizes of K and V that all kernels take in bfloat16; in float32 only the first. ``block_sizes`` of each says what else it takes."""

_TAKES_COST_ESTIMATE = "cost_estimate" in inspect.signature(plgpu.kernel).parameters
_RULES = 32  # numbers per chunk after those of its tokens (3 are used): a copy is a multiple of 128 bytes
_LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the pipelines: tokens per chunk, slots of shared memory for chunks in the walks forward and backward.

    Two stages are the heuristic: more would mean fewer thread blocks on an SM, and these hide each other's latencies.
    """

    chunk: int = TILE
    stages: int = 2
    backward_stages: int = 2

    def __post_init__(self):
        if self.chunk != TILE:
            raise ValueError(f"chunk must be {TILE} (128 would spill), got {self.chunk}")
        if min(self.stages, self.backward_stages) < 2:
            raise ValueError(f"stages must be at least 2, got {self.stages} and {self.backward_stages}")


def refusal(query_shape: tuple[int, ...], value_shape: tuple[int, ...], dtypes: tuple[Any, ...]) -> str | None:
    """Why there is no kernel for these arrays, or None.

    Args:
        query_shape: [B, T, G, K].
        value_shape: [B, T, H, V].
        dtypes: of query, key and value.
    """
    if len(set(map(jnp.dtype, dtypes))) > 1 or dtypes[0] not in (jnp.float32, jnp.bfloat16):
        names = ", ".join(str(jnp.dtype(dtype)) for dtype in dtypes)
        return f"for GPUs takes query, key and value of one dtype, float32 or bfloat16; got {names}"
    if 0 in query_shape + value_shape:
        return f"takes no empty arrays; got query {query_shape}, value {value_shape}"
    if max(value_shape[0], value_shape[2]) > 65535:
        return f"for GPUs takes at most 65535 rows and heads; got value {value_shape}"
    return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operand:
    """An array or reference as wgmma takes it: in bfloat16, or the two terms of a float32 one."""

    terms: tuple[Any, ...]

    @classmethod
    def of(cls, x: jax.Array) -> "Operand":
        """Outside of kernels."""
        if x.dtype == jnp.bfloat16:
            return cls((x,))
        # A cast to bfloat16 and back is one that XLA may leave out.
        high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        return cls((high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)))

    def array(self) -> jax.Array:
        """Undoes ``of``."""
        return self.terms[0] if len(self.terms) == 1 else sum(x.astype(jnp.float32) for x in self.terms)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.terms[0].shape

    @property
    def dtype(self) -> Any:
        return self.terms[0].dtype if len(self.terms) == 1 else jnp.float32

    @property
    def T(self) -> "Operand":
        return Operand(tuple(x.T for x in self.terms))

    @property
    def at(self) -> "_At":
        return _At(self)

    def __setitem__(self, index, tile):
        for ref, term in zip(self.terms, split(tile, len(self.terms))):
            ref[index] = term


@dataclasses.dataclass(frozen=True)
class _At:
    operand: Operand

    def __getitem__(self, index) -> Operand:
        return Operand(tuple(ref.at[index] for ref in self.operand.terms))


@dataclasses.dataclass(frozen=True)
class Walk:
    """Sizes of a call. Methods from ``load`` on are for use in a kernel."""

    family: str
    """Part of the names of kernels and of their grid axes; a mesh or vmap axis around a kernel must not have the same name."""
    batch: int
    time: int
    groups: int
    heads: int
    key_dim: int
    value_dim: int
    interpret: bool
    terms: int = 1
    """Of an ``Operand``."""

    @classmethod
    def over(cls, family: str, query: jax.Array, value: jax.Array, interpret: bool) -> "Walk":
        (batch, time, groups, key_dim), (heads, value_dim) = query.shape, value.shape[2:]
        terms = 1 if value.dtype == jnp.bfloat16 else 2
        return cls(family, batch, time, groups, heads, key_dim, value_dim, interpret, terms)

    @property
    def _scarce(self) -> bool:
        """Registers are: the kernels would spill."""
        return self.terms > 1 or self.key_dim > min(HEADS[-1], self.value_dim)

    @property
    def chunk(self) -> int:
        return TILE

    @property
    def count(self) -> int:
        """Chunks of a row."""
        return pl.cdiv(self.time, self.chunk)

    @property
    def repeats(self) -> int:
        """Value heads per query and key head."""
        return self.heads // self.groups

    @property
    def warpgroups(self) -> int:
        """Of a thread block that shares out K and V in blocks of 64 columns."""
        return min(self.key_dim, self.value_dim) // TILE

    def state_shape(self, *chunks: int) -> tuple[int, ...]:
        return (self.batch, self.heads, *chunks, self.key_dim, self.value_dim)

    def fill(self, x: jax.Array, value: float = 0) -> jax.Array:
        """[B, T, ...] up to a whole number of chunks."""
        more = self.count * self.chunk - self.time
        return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2), constant_values=value) if more else x

    def per_head(self, x: jax.Array) -> jax.Array:
        """[B, T, H], filled up -> [B, H, N, C]."""
        return x.reshape(self.batch, self.count, self.chunk, self.heads).transpose(0, 3, 1, 2)

    def gates(self, log_decay: jax.Array | None, document: jax.Array | None) -> jax.Array | None:
        """Sums of log decays [B, H, N, C] over the chunk up to and including a token, in units of log 2."""
        if log_decay is None:
            return None
        gates = _LOG2E * jnp.maximum(log_decay.astype(jnp.float32), MIN_LOG_DECAY)
        if document is not None:
            gates = jnp.where(document[..., None] < 0, 0.0, gates)
        gates = jnp.cumsum(self.fill(gates).reshape(self.batch, self.count, self.chunk, self.heads), 2)
        return gates.transpose(0, 3, 1, 2)

    def vectors(self, *arrays: jax.Array | None) -> jax.Array | None:
        """Those [B, H, N, C] that there are as one array [B, H, N, ., C]."""
        present = [x for x in arrays if x is not None]
        return jnp.stack(present, 3) if present else None

    def rules(self, document: jax.Array | None, boundary: jax.Array | None) -> jax.Array | None:
        """Numbers of the tokens [B, N, C + _RULES]: C * document + position in the chunk.

        After them come C times the documents of the states before and after the chunk, and whether it has padding.
        """
        if document is None or boundary is None:
            return None
        document = self.fill(document, -1).reshape(self.batch, self.count, self.chunk)
        numbers = self.chunk * document + jnp.arange(self.chunk)
        padded = jnp.any(document < 0, -1, keepdims=True)
        rules = [numbers, self.chunk * boundary[:, :-1, None], self.chunk * boundary[:, 1:, None], padded]
        return jnp.pad(jnp.concatenate(rules, -1, dtype=jnp.int32), ((0, 0), (0, 0), (0, _RULES - 3)))

    def sum_heads(self, x: jax.Array) -> jax.Array:
        """[B, T, H, K] -> [B, T, G, K]: sums over the heads of a group."""
        if self.repeats == 1:
            return x
        return x.reshape(*x.shape[:2], self.groups, self.repeats, -1).sum(3, dtype=jnp.float32)

    def per_token(self, x: jax.Array) -> jax.Array:
        """[B, H, N, C] -> [B, T, H]."""
        return x.reshape(self.batch, self.heads, -1)[..., : self.time].swapaxes(1, 2)

    def log_decay_gradient(self, tokens: jax.Array, leaving: jax.Array, log_decay: jax.Array, document) -> jax.Array:
        """[B, T, H] from the cotangents of the sums of gates [B, H, N, C] and of what leaves the chunk [B, H, N]."""
        gradient = self.per_token(lax.cumsum(tokens, 3, reverse=True) + leaving[..., None])
        acts = log_decay > MIN_LOG_DECAY
        if document is not None:
            acts &= document[..., None] >= 0
        return jnp.where(acts, gradient, 0.0)

    def operands(self, *arrays: jax.Array) -> list[Any]:
        """Arrays [B, T, ...], filled up, as ``Operand`` for a kernel."""
        return [Operand.of(self.fill(x)) for x in arrays]

    def template(self, *shape: int) -> Operand:
        """Of a result of the kernel."""
        return Operand((jax.ShapeDtypeStruct(shape, jnp.bfloat16),) * self.terms)

    def tiles(self, *shape: int, swizzle: int = 128) -> Operand:
        """Scratch memory for an operand. wgmma takes both of its operands swizzled alike: as the shorter rows of the two allow."""
        return Operand((tiles(*shape, swizzle=swizzle),) * self.terms)

    def small_scratch(self, stages: int, vectors, rules, arrays: int, others: int = 0) -> dict[str, Any]:
        """Scratch memory for vectors [B, H, N, ., C] and rules, and the barriers on which they arrive with chunks.

        These are of that many operands and other arrays.

        Few references, because each takes up a multiple of 1 KiB.
        """
        return {
            "vectors": None if vectors is None else plgpu.SMEM((stages, *vectors.shape[3:]), vectors.dtype),
            "rules": plgpu.SMEM((1, self.chunk) if rules is None else (stages, self.chunk + _RULES), jnp.int32),
            "full": plgpu.Barrier(
                num_arrivals=arrays * self.terms + others + (vectors is not None) + (rules is not None),
                num_barriers=stages,
            ),
        }

    def call(
        self,
        body: Callable,
        name: str,
        inputs: tuple[Any, ...],
        outputs: Any,
        tiles: dict[str, Any],
        small: dict[str, Any],
        *,
        flops: int,
        exponentials: int,
        blocks: int = 1,
        warpgroups: int = 1,
        own_barriers: bool = False,
    ):
        """Launch ``body(*inputs, *outputs, tiles=, small=)`` over rows, heads and blocks.

        Args:
            body: the kernel.
            name: part of its name.
            inputs: arrays, or None.
            outputs: templates of shape and dtype, or None.
            tiles: scratch memory.
            small: scratch memory, see ``small_scratch``.
            flops: per token and head.
            exponentials: per token and head.
            blocks: thread blocks per row and head.
            warpgroups: per thread block.
            own_barriers: Pallas puts no barrier of the warpgroup around every store to shared memory and before every copy to it; the body has
                those that it needs. A thread may overwrite what only its own warp reads and writes, such as a tile that it has loaded with
                ``load``. A product is finished for the own warp only: between it and a store to its operands, or a copy, there is a
                ``commit_smem``, a ``wait_smem_to_gmem`` (which ends with a barrier, too) or a meeting of warpgroups, and between a store and
                what wgmma, TMA or other warps read there is a ``commit_smem``. The interpreter knows no warps and does not see the former.
        """
        outputs = jax.tree.map(lambda out: jax.ShapeDtypeStruct(out.shape, out.dtype), outputs)
        tokens = self.batch * self.heads * self.count * self.chunk
        cost = pl.CostEstimate(
            flops=tokens * flops * (1, 3)[self.terms - 1],
            transcendentals=tokens * exponentials,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((inputs, outputs))),
        )
        return plgpu.kernel(
            body,
            out_type=outputs,
            grid=(self.batch, self.heads, blocks),
            grid_names=tuple(f"{self.family}_{axis}" for axis in ("row", "head", "block")),
            num_threads=warpgroups,
            thread_name=f"{self.family}_warpgroup",
            scratch_types={"tiles": tiles, "small": small},
            compiler_params=plgpu.CompilerParams(
                approx_math=True,
                lowering_semantics=plgpu.LoweringSemantics.Lane,
                reduction_scratch_bytes=0,  # sums along rows need none, and warpgroups would share it without a barrier
                unsafe_no_auto_barriers=own_barriers,
            ),
            kernel_name=f"{self.family}_{name}_k{self.key_dim}_v{self.value_dim}" + "_f32" * (self.terms - 1),
            **costs(cost),
        )(*inputs)

    def place(self) -> tuple[jax.Array, ...]:
        """Row, head and block of this thread block."""
        return tuple(lax.axis_index(f"{self.family}_{axis}") for axis in ("row", "head", "block"))

    def warpgroup(self) -> jax.Array:
        return lax.axis_index(f"{self.family}_warpgroup")

    def load(self, source, slots, slot, full):
        """Start the copy of a chunk, which arrives on ``full.at[slot]``."""
        fetch(source, slots.at[slot], full.at[slot])

    def load_small(self, vectors_g, rules_g, row, head, n, small, slot):
        """Start the copies of the vectors and rules of a chunk, if there are any."""
        if vectors_g is not None:
            self.load(vectors_g.at[row, head, n], small["vectors"], slot, small["full"])
        if rules_g is not None:
            self.load(rules_g.at[row, n], small["rules"], slot, small["full"])

    def number(self, rules_g, small):
        """Write the numbers of the tokens, the same in every chunk, if there are no documents."""
        if rules_g is None:
            layout = plgpu.Layout.WGMMA.reduce(1)
            small["rules"][0] = plgpu.broadcasted_iota(jnp.int32, (self.chunk,), 0, layout=layout)
            plgpu.commit_smem()

    def decays(self, decaying: bool, rules_g, small, slot) -> "Decays":
        """Those of a chunk; gates, if there are any, are the first of the vectors."""
        gates = small["vectors"].at[slot, 0] if decaying else None
        rules = small["rules"].at[0 if rules_g is None else slot]
        return Decays(gates, rules, rules_g is not None, self.chunk)

    def zero(self, decays: "Decays"):
        """0, but where registers are scarce the compiler does not know.

        It would take addresses in shared memory out of the loop over the chunks, and keep more of them in registers than there are.
        With this number in an index, they are computed where they are used.
        """
        return decays.zero() if self._scarce else 0

    def matmul(self, a, b, total=None):
        """a @ b, added to ``total``; ``a`` in shared memory or registers, ``b`` in shared memory.

        A float32 tile in registers becomes an operand here; of terms, the product of the second ones is left out.
        """
        tile = isinstance(a, jax.Array)
        left = split(a, self.terms if a.dtype == jnp.float32 else 1) if tile else references(a)
        right, in_registers = references(b), isinstance(left[0], jax.Array)
        products = [(x, y) for i, x in enumerate(left) for j, y in enumerate(right) if i + j < 2]
        if self.interpret and in_registers:
            product = sum(jnp.dot(x.astype(jnp.float32), y[...].astype(jnp.float32)) for x, y in products)
            return product if total is None else total + product

        def add(sums):
            for x, y in products:
                plgpu.wgmma(sums, x, y)

        def accumulate(sums):
            add(sums)
            return sums[...]  # waits for the wgmma

        if total is None or self.interpret:
            product = pl.run_scoped(accumulate, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))
            return product if total is None else total + product
        return pl.run_state(add)(plgpu.ACC.init(total))


class Decays(NamedTuple):
    """Decays of a chunk, 0 where documents part the two ends; read from shared memory where they are used, to save registers.

    Tokens are known by their numbers: those of document d are C d .. C d + C - 1, those of padding are negative. A vector lies
    along the rows of a tile or along its columns, in different threads.
    """

    gates: Any
    rules: Any
    documents: bool
    chunk: int

    def pairs(self, tile, scale: float = 1.0, *, strict: bool = False, transposed: bool = False):
        """scale * exp(G_i - G_j) tile_ij for tokens j <= i of one document, else 0.

        Args:
            tile: [C, C].
            scale: a factor.
            strict: for j < i only.
            transposed: the tile is that of tile_ji, and so is the result.
        """
        later, earlier = (0, 1) if transposed else (1, 0)
        later_number, earlier_number = self._numbers(later), _spread(self._numbers(earlier), tile.shape, earlier)
        spread = _spread(later_number, tile.shape, later)
        real = earlier_number < spread if strict else earlier_number <= spread
        if self.documents:
            real &= earlier_number >= _spread(later_number & -self.chunk, tile.shape, later)
        if self.gates is None:
            return jnp.where(real, tile if scale == 1.0 else scale * tile, 0.0)
        exponent = _spread(self._gates(later), tile.shape, later) - _spread(self._gates(earlier), tile.shape, earlier)
        return jnp.exp2(jnp.where(real, exponent, -jnp.inf)) * (tile if scale == 1.0 else scale * tile)

    def from_start(self, scale: float = 1.0):
        """scale * exp(G_i): from the state before the chunk to a read. A number, or None for 1, if it is the same for all."""
        gates = None if self.gates is None else self._gates(1)
        decay = self._decay(gates, lambda: self._documents() == self.rules[self.chunk])
        if scale == 1.0:
            return decay
        return scale if decay is None else scale * decay

    def to_end(self):
        """exp(G_C - G_j): from a write to the state after the chunk."""
        gates = None if self.gates is None else self._total() - self._gates(1)
        return self._decay(gates, lambda: self._documents() == self.rules[self.chunk + 1])

    def across(self):
        """exp(G_C): from the state before the chunk to the state after it."""
        gates = None if self.gates is None else self._total()
        return self._decay(gates, lambda: self.rules[self.chunk] == self.rules[self.chunk + 1])

    def clear_padding(self, *tiles):
        """Zeros for the rows of padding."""
        if not self.documents:
            return

        @pl.when(self.rules[self.chunk + 2] != 0)
        def _clear():
            for part in (part for tile in tiles for ref in references(tile) for part in parts(ref)):
                values = load(part)
                part[...] = jnp.where(rows(self._numbers(1), values.shape) >= 0, values, jnp.zeros_like(values))
            plgpu.commit_smem()

    def zero(self):
        """0 from shared memory."""
        return self.rules[self.chunk + 3 if self.documents else 0]

    def _decay(self, exponent, real):
        """exp2(exponent) where ``real`` holds, else 0; None for 1 everywhere."""
        if not self.documents:
            return None if exponent is None else jnp.exp2(exponent)
        if exponent is None:
            return real().astype(jnp.float32)
        return jnp.exp2(jnp.where(real(), exponent, -jnp.inf))

    def _gates(self, reduced: int):
        return vector(self.gates, reduced)

    def _total(self):
        return self.gates[self.chunk - 1]

    def _numbers(self, reduced: int):
        return vector(self.rules.at[pl.ds(0, self.chunk)], reduced)

    def _documents(self):
        """As in the rules: times ``chunk``."""
        return self._numbers(1) & -self.chunk


def tiles(*shape: int, dtype: Any = jnp.bfloat16, swizzle: int = 128):
    """Scratch memory for operands of wgmma in bfloat16, and results; ``swizzle`` [bytes] where rows are shorter than 128."""
    transforms = (plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def references(x) -> tuple[Any, ...]:
    """Those of an operand, or the reference itself."""
    return x.terms if isinstance(x, Operand) else (x,)


def split(tile, count: int) -> tuple[jax.Array, ...]:
    """A tile as ``count`` terms in bfloat16."""
    high = tile.astype(jnp.bfloat16)
    return (high,) if count == 1 else (high, (tile - high.astype(jnp.float32)).astype(jnp.bfloat16))


def fetch(source, target, barrier):
    """Start the copies of an operand or reference from HBM."""
    for x, y in zip(references(source), references(target), strict=True):
        plgpu.copy_gmem_to_smem(x, y, barrier)


def send(source, target):
    """Start the copies of an operand or reference to HBM, which are waited for as one."""
    sources = references(source)
    for i, (x, y) in enumerate(zip(sources, references(target), strict=True), 1):
        plgpu.copy_smem_to_gmem(x, y, commit_group=i == len(sources))


def load(ref, *, optimized: bool = True):
    """A tile as wgmma lays it out over the threads; not ``optimized`` where no access without bank conflicts exists."""
    terms = [plgpu.load(term, layout=plgpu.Layout.WGMMA, optimized=optimized) for term in references(ref)]
    return terms[0] if len(terms) == 1 else terms[0].astype(jnp.float32) + terms[1].astype(jnp.float32)


def store(ref, tile):
    """To HBM, from the layout of wgmma."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, tile, optimized=False)
    else:  # jax 0.11
        ref[...] = tile


def costs(estimate: pl.CostEstimate) -> dict[str, pl.CostEstimate]:
    """The option of ``plgpu.kernel``, which jax 0.11 does not have."""
    return {"cost_estimate": estimate} if _TAKES_COST_ESTIMATE else {}


def vector(ref, reduced: int):
    """What a sum over axis ``reduced`` of a tile would be: 1 for a vector along the rows, 0 for one along the columns."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(reduced), optimized=False)


def rows(vector, shape):
    """A tile with the same number all along each row."""
    return lax.broadcast_in_dim(vector, shape, (0,))


def columns(vector, shape):
    """A tile with the same number all along each column."""
    return lax.broadcast_in_dim(vector, shape, (1,))


def _spread(vector, shape, reduced: int):
    """``rows`` or ``columns``, of a vector that was loaded for it."""
    return lax.broadcast_in_dim(vector, shape, (1 - reduced,))


def scaled(factor, tile):
    """Rows of a tile times a vector, or the tile times a scalar; None is 1."""
    if factor is None:
        return tile
    return tile * (rows(factor, tile.shape) if jnp.ndim(factor) else factor)


def scale_rows(ref, factor):
    """``scaled`` in shared memory; wgmma has to have read what was there, see ``own_barriers`` in ``Walk.call``."""
    if factor is not None and not (isinstance(factor, float) and factor == 1.0):
        for part in parts(ref):
            part[...] = scaled(factor, load(part).astype(jnp.float32)).astype(ref.dtype)


def parts(ref):
    """Blocks of columns that few registers hold."""
    width = min(TILE, ref.shape[1])
    return [ref.at[:, pl.ds(start, width)] for start in range(0, ref.shape[1], width)]
