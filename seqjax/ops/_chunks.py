"""What the chunked matrix-state ops share: chunk layout, padding, document masks and numerically safe decays.

Both ops have a state S [K, V] per head, and inside one chunk of C tokens (S the state before it, G_i the sum of log decays of its
tokens up to and including i) both need exactly four decays, each zero where a document boundary lies between the two ends:

    pair       exp(G_i - G_j)     from the write of token j to token i >= j
    from_start exp(G_i)           from S to token i
    to_end     exp(G_C - G_j)     from the write of token j to the state after the chunk
    across     exp(G_C)           from S to the state after the chunk

All are <= 1 but must not be computed as quotients or as differences of one cumulative sum: exp(-G_j) overflows, and after a decay
of -1e4 float32 differences of sums have lost the small ones. Here every exponent is a sum of log decays between two tokens,
all of one sign, so nothing cancels, and a log decay of -inf is as good as any other.

Layout inside a chunked form: [N, M, B, G, R, C, .] with N groups of M chunks of C tokens and heads split as [G, R], H = G*R
(query/key head ``g`` serves value heads ``g*R .. g*R+R-1``): queries and keys have R = 1 and broadcast, they are never repeated.
Those of the axes B, G and R that have size 1 in every array are left out: beside one, XLA's CPU backend (jaxlib 0.10) is up to 25
times slower at the sums of the backward pass. (Merging B with the heads instead would undo their sharding.)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels._remat import keep
from seqjax.ops import _loops
from seqjax.ops._dispatch import check_segment_ids, check_shapes
from seqjax.ops._segments import Segments, segment_info

CHUNK_SIZE = 64
"""Tokens per chunk. Costs per token grow as C (scores) + K*V/C (states): for heads of 64, 32 and 64 are alike for linear attention on a
CPU, where the inverse of the delta rule is a fifth faster at 32 (``delta_rule`` takes that there); 128 is slower by half."""

GROUP_TOKENS = 256
"""Tokens whose intermediates live at once (see ``scan_chunks``): on a CPU, 1024 took up to twice the memory and a third more time."""

GROUP_CHUNKS_ON_GPU = 4096
"""There at least as many chunks, counted over all rows and heads: their products fill the device, and launches are few."""

_TILE = 16  # tokens between which a decay per channel goes through dyadic levels
# exp(-1000) is 0 in float32 and float64: it stands in for -inf, which times a 0 of a mask would be NaN.
_FLOOR = -1000.0


def state_dtype(*arrays: Array) -> jnp.dtype:
    """float64 if the inputs are float64 (tests against the exact value), float32 otherwise."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def split_heads(x: Array, groups: int, axis: int = 2) -> Array:
    """[..., H, ...] -> [..., G, R, ...]; a query or key, which has G heads, gets R = 1."""
    return x.reshape(x.shape[:axis] + (groups, x.shape[axis] // groups) + x.shape[axis + 1 :])


def decay_shape(log_decay: Array | None) -> str:
    """Symbolic shape for ``check_shapes``: scalar or per channel, by rank."""
    return "B T H K" if log_decay is not None and log_decay.ndim == 4 else "B T H"


class Call(NamedTuple):
    """Checked arguments of a matrix-state op: what every form of it runs on."""

    tokens: tuple[Any, ...]
    """Query, key and value as given; gates in the state's dtype (None where there is none); padding cleared."""
    state: Float[Array, "B H K V"]
    segments: Segments | None
    scale: Array | float
    chunk_size: int

    @property
    def starts(self) -> Array | None:
        """Where a document starts, [B, T]."""
        return None if self.segments is None else self.segments.start

    @property
    def documents(self) -> Int[Array, "B T"] | None:
        """Running document numbers."""
        return None if self.segments is None else self.segments.document


def check_call(
    op: str,
    query: Float[Array, "B T G K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T H V"],
    gates: dict[str, tuple[Any, str]],
    *,
    scale: float | None,
    initial_state: Array | None,
    segment_ids: Array | None,
    chunk_size: int | None,
    default_chunk_size: int = CHUNK_SIZE,
) -> Call:
    """Check the arguments of a matrix-state op and fill in defaults.

    Args:
        op: name used in messages.
        query, key, value: as given.
        gates: name -> (array or None, symbolic shape), in the order in which the op's forms take them.
        scale, initial_state, segment_ids, chunk_size: as given.
        default_chunk_size: used for ``chunk_size=None``.

    Raises:
        ValueError: shapes disagree, T is 0, G does not divide H, ``segment_ids`` are not integers, or a bad ``chunk_size``.
    """
    shapes = {"query": (query, "B T G K"), "key": (key, "B T G K"), "value": (value, "B T H V"), **gates}
    more = {"initial_state": (initial_state, "B H K V"), "segment_ids": (segment_ids, "B T")}
    sizes = check_shapes(op, {**shapes, **more})
    check_segment_ids(op, segment_ids)
    if sizes["T"] == 0:
        raise ValueError(f"{op}: `query` has length T=0; expected at least one token")
    if sizes["H"] % sizes["G"]:
        raise ValueError(
            f"{op}: `value` has H={sizes['H']} heads and `query` G={sizes['G']}; expected G to divide H"
            " (each query/key head serves H/G value heads)"
        )
    dtype = state_dtype(query, key, value)
    tokens = (query, key, value, *(None if gate is None else gate.astype(dtype) for gate, _ in gates.values()))
    segments = None if segment_ids is None else segment_info(segment_ids)
    if segments is not None:
        tokens = clear_padding(segments.real, *tokens)
    return Call(
        tokens,
        jnp.zeros([sizes[s] for s in "BHKV"], dtype) if initial_state is None else initial_state.astype(dtype),
        segments,
        sizes["K"] ** -0.5 if scale is None else scale,
        chunk_length(op, chunk_size, sizes["T"], default_chunk_size),
    )


def clear_padding(real: Array, *arrays: Array | None) -> tuple[Any, ...]:
    """Zero the tokens [B, T, ...] that are padding, so that nothing in them (NaN included) reaches a value or a gradient.

    A token whose query, key, value, beta and log decay are 0 leaves the state as it was and reads 0: it is absent.
    """
    return tuple(
        None if x is None else jnp.where(real.reshape(real.shape + (1,) * (x.ndim - 2)), x, jnp.zeros((), x.dtype))
        for x in arrays
    )


def product(subscripts: str, a: Array, b: Array, dtype: jnp.dtype) -> Array:
    """einsum of operands rounded to ``dtype``, accumulated in the state's dtype; batch axes of size 1 broadcast without copies.

    float32 asks for full float32 products: TPUs and GPUs would otherwise round the operands to bfloat16 or TF32. Transposed
    operands are written as subscripts, never as ``swapaxes``, which XLA's CPU backend would carry out as a copy.
    """
    precision = jax.lax.Precision.DEFAULT if dtype in (jnp.bfloat16, jnp.float16) else jax.lax.Precision.HIGHEST
    accumulate = jnp.promote_types(dtype, jnp.float32)
    return jnp.einsum(
        subscripts, a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=accumulate
    )


def transpose(x: Array) -> Array:
    """Matrix transpose of the last two axes."""
    return jnp.swapaxes(x, -1, -2)


# --------------------------------------------------------------------------------------------------------------- decays


class Decays(NamedTuple):
    """Decays between the tokens of a chunk and the states around it; ``c`` is K for a decay per channel, else 1."""

    from_start: Float[Array, "... C c"]
    to_end: Float[Array, "... C c"]
    across: Float[Array, "... c 1"]


class Documents(NamedTuple):
    """Running document numbers (``_segments.Segments.document``) of the tokens of a chunk and of the state before it."""

    token: Int[Array, "... C"]
    carried: Int[Array, "..."]


def decayed_scores(
    rows: tuple[Float[Array, "... C K"], ...],
    columns: Float[Array, "... C K"],
    log_decay: Float[Array, "... C"] | Float[Array, "... C K"] | None,
    documents: Documents | None,
    dtype: jnp.dtype,
) -> tuple[list[Float[Array, "... C C"]], Decays]:
    """For each array of rows r, sum_c r_ic exp(G_ic - G_jc) columns_jc for j <= i in one document (else 0); and the decays.

    Args:
        rows, columns: queries and keys of a chunk.
        log_decay: none, scalar or per channel.
        documents: of the tokens and of the state before the chunk; None if there is only one.
        dtype: of the operands of the matmuls.
    """
    size = columns.shape[-2]
    pair = jnp.tril(jnp.ones((size, size), bool))
    from_start = to_end = across = jnp.ones((1, 1), bool)
    if documents is not None:
        token, carried = documents
        pair &= token[..., :, None] == token[..., None, :]
        from_start = (token == carried[..., None])[..., None]
        to_end = (token == token[..., -1:])[..., None]
        across = (token[..., -1] == carried)[..., None, None]
    if log_decay is not None and log_decay.ndim == columns.ndim:
        products, sums = _channel_products(rows, columns, jnp.maximum(log_decay, _FLOOR), dtype)
        scores = [jnp.where(pair, p, 0) for p in products]
    else:
        scores = [product("...ik,...jk->...ij", r, columns, dtype) for r in rows]
        if log_decay is None:
            scores = [jnp.where(pair, s, 0) for s in scores]
            sums = (jnp.zeros((1, 1), scores[0].dtype),) * 3
        else:
            between, sums = _scalar_sums(jnp.maximum(log_decay, _FLOOR))
            decay = _masked_exp(between, pair)
            scores = [s * decay for s in scores]
    return scores, Decays(*(_masked_exp(x, mask) for x, mask in zip(sums, (from_start, to_end, across))))


def _masked_exp(exponent, mask):
    """exp where the mask holds, else 0. The exponent is masked, not the result, whose gradient could be 0 * inf."""
    return jnp.exp(jnp.where(mask, exponent, -jnp.inf))


def _inside(start, stop, size):
    """[*P, size]: start <= s < stop, for integer arrays start and stop of shape [*P]. Sums over intervals are products with it:
    no differences of cumulative sums, so nothing cancels.
    """
    index = np.arange(size)
    return jnp.asarray((index >= np.asarray(start)[..., None]) & (index < np.asarray(stop)[..., None]))


def _scalar_sums(log_decay):
    """Scalar decay [..., C]: the sums G_i - G_j [..., C, C] (0 where j >= i), and the exponents of ``Decays``."""
    size = log_decay.shape[-1]
    edges = np.arange(size + 1)
    inside = _inside(edges[None, :], edges[:, None], size)
    sums = product("...s,ijs->...ij", log_decay, inside, log_decay.dtype)  # g_j + .. + g_{i-1}
    return sums[..., 1:, 1:], (sums[..., 1:, :1], sums[..., -1, 1:, None], sums[..., -1:, :1])


def _channel_products(rows, columns, log_decay, dtype):
    """Decay per channel [..., C, K]: the scores for j <= i (0 above the diagonal), and the exponents of ``Decays``.

    Dyadic levels. Cut the chunk in blocks of 2b, b = 1, 2, 4 .. C/2. Every pair j < i is at exactly one level in the upper (i) and
    lower (j) half of a block, and its exponent splits at the middle of that block into a part of i and a part of j, both <= 0.
    So a level needs one decay per token, *outward from the middle*, and one matmul, of which the pairs of the level are kept.
    """
    size, channels = log_decay.shape[-2:]
    tile = min(_TILE, size)
    index = np.arange(size)

    def cut(x, n):  # [..., C, K] -> [..., C/n, n, K]
        return x.reshape(x.shape[:-2] + (size // n, n, channels))

    def interval_sums(start, stop, n):  # [..., C/n, n, K]: sum over start_i <= s < stop_i for the i of a block of n
        x = cut(log_decay, n)
        # Broadcast, because a product with one shared matrix would put its axis before the batch: a transposition of everything.
        inside = jnp.broadcast_to(_inside(start[:n], stop[:n], n), x.shape[:-1] + (n,))
        return product("...is,...sk->...ik", inside, x, x.dtype).reshape(log_decay.shape)

    # Level 0: i = j, no decay. Levels of blocks that fit in a tile of 16 multiply tiles only.
    tiles = [jnp.sum(r.astype(log_decay.dtype) * columns, -1) for r in rows]
    tiles = [d.reshape(d.shape[:-1] + (size // tile, tile, 1)) * np.eye(tile, dtype=d.dtype) for d in tiles]
    whole: list[Any] = [0.0 for _ in rows]
    block = 1
    while block < size:
        half = index // block
        upper = half % 2 == 1
        start, stop = np.where(upper, half * block, index + 1), np.where(upper, index + 1, (half + 1) * block)
        pairs = upper[:, None] & (half[:, None] == half + 1)
        n = tile if 2 * block <= tile else size
        outward = jnp.exp(interval_sums(start, stop, n))
        low = cut(columns * outward, n)
        for r, row in enumerate(rows):
            level = product("...ik,...jk->...ij", cut(row * outward, n), low, dtype)
            level = jnp.where(pairs[:n, :n], level, 0)
            if n == tile:
                tiles[r] += level
            else:
                whole[r] += level[..., 0, :, :]
        block *= 2
    if tile == size:
        scores = [t[..., 0, :, :] for t in tiles]
    else:
        same = np.eye(size // tile, dtype=bool)[:, None, :, None]
        tiles = [jnp.where(same, t[..., :, :, None, :], 0) for t in tiles]  # [..., i's tile, i, j's tile, j]
        scores = [w + t.reshape(w.shape) for w, t in zip(whole, tiles)]
    from_start = interval_sums(np.zeros_like(index), index + 1, size)
    to_end = interval_sums(index + 1, np.full_like(index, size), size)
    return scores, (from_start, to_end, from_start[..., -1, :, None])


def read(rows: Array, decay: Array, state: Array, dtype: jnp.dtype) -> Array:
    """(decay * rows) state; a scalar decay multiplies the product, so that queries shared by R heads are not repeated."""
    if decay.shape[-1] == 1:
        return decay * product("...ck,...kv->...cv", rows, state, dtype)
    return product("...ck,...kv->...cv", decay * rows, state, dtype)


def write(columns: Array, decay: Array, values: Array, dtype: jnp.dtype) -> Array:
    """(decay * columns)^T values; a scalar decay multiplies the values, for the same reason."""
    if decay.shape[-1] == 1:
        return product("...ck,...cv->...kv", columns, decay * values, dtype)
    return product("...ck,...cv->...kv", decay * columns, values, dtype)


# ---------------------------------------------------------------------------------------------------------------- loops


def read_token(state: Float[Array, "B G R K V"], vector: Float[Array, "B G 1 K"]) -> Float[Array, "B G R V"]:
    """S^T q of one token, as one small product per head: a sum over K of the products would be several passes over the state."""
    vector = jnp.broadcast_to(vector, state.shape[:-1])
    return jnp.einsum("bgrk,bgrkv->bgrv", vector, state, precision=jax.lax.Precision.HIGHEST)


def scan_tokens(
    step: Callable[..., tuple[Array, Array]],
    state: Float[Array, "B H K V"],
    tokens: tuple[Any, ...],
    starts: Array | None,
    groups: int,
    scale: Array | float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Run ``step(state, (*token, start)) -> (state, read)`` over single tokens; a single token (decoding) without a loop."""
    value, log_decay = tokens[2], tokens[-1]
    inputs: list[Any] = [None if x is None else split_heads(x, groups).astype(state.dtype) for x in tokens]
    if log_decay is not None and log_decay.ndim == 3:
        inputs[-1] = inputs[-1][..., None]
    state, shape = split_heads(state, groups, axis=1), state.shape
    if value.shape[1] == 1:
        state, output = step(state, jax.tree.map(lambda x: x[:, 0], (*inputs, starts)))
        output = output[:, None]
    else:
        state, output = jax.lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (*inputs, starts)))
        output = jnp.moveaxis(output, 0, 1)
    return (scale * output).reshape(value.shape).astype(jnp.result_type(*tokens[:3])), state.reshape(shape)


class Chunks(NamedTuple):
    """Token arrays of M chunks, [M, B, G, R, C, .] (None where the op was given none), and their documents, [M, B, 1, 1, C]; without the
    axes that have size 1 throughout.
    """

    tokens: tuple[Any, ...]
    documents: Documents | None


def scan_chunks(
    body: Callable[[Array, Chunks], tuple[Array, Array]],
    state: Float[Array, "B H K V"],
    tokens: tuple[Any, ...],
    documents: Int[Array, "B T"] | None,
    groups: int,
    chunk_size: int,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Run ``body(state, chunks) -> (state, output)`` over groups of chunks, in order, and undo the layout.

    A group (about GROUP_TOKENS tokens; on a GPU, GROUP_CHUNKS_ON_GPU chunks if that is more) is large enough that all that does
    not depend on the state is a few batched matmuls, and small enough to stay in cache. ``jax.checkpoint`` makes it the unit of recomputation: what the backward pass keeps from
    the forward one are the inputs and the state at the start of each group, whatever the body computes; no state per token.
    """
    batch, length, heads = tokens[2].shape[:3]
    chunks = -(-length // chunk_size)
    per_group = max(1, GROUP_TOKENS // chunk_size)
    if _loops.platform() == "gpu":
        per_group = max(per_group, GROUP_CHUNKS_ON_GPU // (batch * heads))
    count = -(-chunks // per_group)
    per_group = -(-chunks // count)
    padding = count * per_group * chunk_size - length

    unit = [axis for axis, size in enumerate((batch, groups, heads // groups)) if size == 1]  # among B, G, R

    def layout(x):  # [B, T, H or G, ...] -> [N, M, B, G, R, C, ...]
        x = jnp.pad(split_heads(x, groups), [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 1))
        x = x.reshape((x.shape[0], count, per_group, chunk_size) + x.shape[2:])
        return jnp.squeeze(jnp.moveaxis(x, (1, 2, 0, 4, 5, 3), range(6)), [2 + axis for axis in unit])

    numbers = None
    if documents is not None:
        token = jnp.pad(documents, [(0, 0), (0, padding)], mode="edge").reshape(-1, count * per_group, chunk_size)
        token = jnp.moveaxis(token, 0, 1)  # [N*M, B, C]
        carried = jnp.pad(token[:-1, :, -1], [(1, 0), (0, 0)])  # number 0 continues the initial state
        lead = (count, per_group, *(size for axis, size in enumerate((batch, 1, 1)) if axis not in unit))
        numbers = Documents(token.reshape(lead + (chunk_size,)), carried.reshape(lead))
    inputs = Chunks(tuple(None if x is None else layout(x) for x in tokens), numbers)
    start = jnp.squeeze(split_heads(state, groups, axis=1), unit)
    again = jax.checkpoint(body, prevent_cse=False)
    final, output = jax.lax.scan(lambda state, chunks: keep(again(keep(state), chunks)), start, inputs)
    output = jnp.moveaxis(
        jnp.expand_dims(output, [2 + axis for axis in unit]), range(6), (1, 2, 0, 4, 5, 3)
    )  # [B, N, M, C, G, R, V]
    output = output.reshape(output.shape[0], length + padding, -1, output.shape[-1])
    return output[:, :length], final.reshape(state.shape)


def chunk_length(op: str, chunk_size: int | None, length: int, default: int = CHUNK_SIZE) -> int:
    """Tokens per chunk (None: ``default``): a power of two (halves of blocks must be blocks), not much longer than the sequence.

    Raises:
        ValueError: ``chunk_size`` is not a positive integer.
    """
    if chunk_size is None:
        chunk_size = default
    elif not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"{op}: `chunk_size` is {chunk_size!r}; expected None or a positive number of tokens")
    return 1 << (min(chunk_size, length) - 1).bit_length()
