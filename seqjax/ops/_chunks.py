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
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqjax.ops._dispatch import check_segment_ids, check_shapes

CHUNK_SIZE = 64
"""Tokens per chunk. Costs per token grow as C (scores) + K*V/C (states); 64 is best on CPU and GPU, 128 fills a TPU's matrix unit."""

GROUP_TOKENS = 1024
"""Tokens whose intermediates live at once (see ``scan_chunks``)."""

_TILE = 16  # smallest block worth a matmul of its own
_FLOOR = (
    -1000.0
)  # exp() of it is 0 in float32 and float64; it stands in for -inf, which times a 0 of a mask would be NaN


def state_dtype(*arrays: Array) -> jnp.dtype:
    """float64 if the inputs are float64 (tests against the exact value), float32 otherwise."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def split_heads(x: Array, groups: int, axis: int = 2) -> Array:
    """[..., H, ...] -> [..., G, R, ...]; a query or key, which has G heads, gets R = 1."""
    return x.reshape(x.shape[:axis] + (groups, x.shape[axis] // groups) + x.shape[axis + 1 :])


def decay_shape(log_decay: Array | None) -> str:
    """Symbolic shape for ``check_shapes``: scalar or per channel, by rank."""
    return "B T H K" if log_decay is not None and log_decay.ndim == 4 else "B T H"


def check_inputs(
    op: str, shapes: dict[str, tuple[Array | None, str]], initial_state: Array | None, segment_ids: Array | None
) -> dict[str, int]:
    """Sizes of B, T, G, H, K, V.

    Raises:
        ValueError: shapes disagree, T is 0, G does not divide H, or ``segment_ids`` are not integers.
    """
    sizes = check_shapes(
        op, {**shapes, "initial_state": (initial_state, "B H K V"), "segment_ids": (segment_ids, "B T")}
    )
    check_segment_ids(op, segment_ids)
    if sizes["T"] == 0:
        raise ValueError(f"{op}: `query` has length T=0; expected at least one token")
    if sizes["H"] % sizes["G"]:
        raise ValueError(
            f"{op}: `value` has H={sizes['H']} heads and `query` G={sizes['G']}; expected G to divide H"
            " (each query/key head serves H/G value heads)"
        )
    return sizes


def clear_padding(real: Array, *arrays: Array | None) -> tuple[Array | None, ...]:
    """Zero the tokens [B, T, ...] that are padding, so that nothing in them (NaN included) reaches a value or a gradient.

    A token whose query, key, value, beta and log decay are 0 leaves the state as it was and reads 0: it is absent.
    """
    return tuple(
        None if x is None else jnp.where(real.reshape(real.shape + (1,) * (x.ndim - 2)), x, jnp.zeros((), x.dtype))
        for x in arrays
    )


def matmul(a: Array, b: Array, dtype: jnp.dtype) -> Array:
    """Product of matrices rounded to ``dtype``, accumulated in the state's dtype; batch axes broadcast without copies.

    float32 asks for full float32 products: TPUs and GPUs would otherwise round the operands to bfloat16 or TF32.
    """
    precision = jax.lax.Precision.DEFAULT if dtype in (jnp.bfloat16, jnp.float16) else jax.lax.Precision.HIGHEST
    accumulate = jnp.promote_types(dtype, jnp.float32)
    return jnp.matmul(a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=accumulate)


def transpose(x: Array) -> Array:
    """Matrix transpose of the last two axes."""
    return jnp.swapaxes(x, -1, -2)


# --------------------------------------------------------------------------------------------------------------- decays


class Decays(NamedTuple):
    """Decays between the tokens of a chunk and the states around it; ``c`` is K for a decay per channel, else 1."""

    from_start: Float[Array, "... C c"]
    to_end: Float[Array, "... C c"]
    across: Float[Array, "... c 1"]


def decayed_scores(
    rows: tuple[Float[Array, "... C K"], ...],
    columns: Float[Array, "... C K"],
    log_decay: Float[Array, "... C"] | Float[Array, "... C K"] | None,
    documents: Int[Array, "... C"] | None,
    carried: Int[Array, "..."] | None,
    dtype: jnp.dtype,
) -> tuple[list[Float[Array, "... C C"]], Decays]:
    """For each array of rows r, sum_c r_ic exp(G_ic - G_jc) columns_jc for j <= i in one document (else 0); and the decays.

    Args:
        rows, columns: queries and keys of a chunk.
        log_decay: none, scalar or per channel.
        documents: running document number of each token; None if there is one document.
        carried: document number that the state before the chunk belongs to.
        dtype: of the operands of the matmuls.
    """
    size = columns.shape[-2]
    pair = jnp.tril(jnp.ones((size, size), bool))
    from_start = to_end = across = jnp.ones((1, 1), bool)
    if documents is not None:
        pair &= documents[..., :, None] == documents[..., None, :]
        from_start = (documents == carried[..., None])[..., None]
        to_end = (documents == documents[..., -1:])[..., None]
        across = (documents[..., -1] == carried)[..., None, None]
    if log_decay is not None and log_decay.ndim == columns.ndim:
        products, sums = _channel_products(rows, columns, jnp.maximum(log_decay, _FLOOR), dtype)
        scores = [jnp.where(pair, p, 0) for p in products]
    else:
        scores = [matmul(r, transpose(columns), dtype) for r in rows]
        if log_decay is None:
            scores = [jnp.where(pair, s, 0) for s in scores]
            sums = (jnp.zeros((1, 1), scores[0].dtype),) * 3
        else:
            between, sums = _segment_sums(jnp.maximum(log_decay, _FLOOR))
            decay = _masked_exp(between, pair)
            scores = [s * decay for s in scores]
    return scores, Decays(*(_masked_exp(x, mask) for x, mask in zip(sums, (from_start, to_end, across))))


def _masked_exp(exponent, mask):
    """exp where the mask holds, else 0. The exponent is masked, not the result, whose gradient could be 0 * inf."""
    return jnp.exp(jnp.where(mask, exponent, -jnp.inf))


def _segment_sums(log_decay):
    """Scalar decay [..., C]: the sums G_i - G_j [..., C, C], and the exponents of ``Decays``.

    sum_{j < s <= i} g_s for j = -1 .. C-1 is one product of masked log decays with a 0/1 matrix: no differences of sums.
    """
    size = log_decay.shape[-1]
    until = jnp.tril(jnp.broadcast_to(log_decay[..., None, :], log_decay.shape + (size,)))  # [i, s]: g_s if s <= i
    after = jnp.arange(size)[:, None] > jnp.arange(-1, size)[None, :]  # [s, j]: s > j
    between = matmul(until, after, log_decay.dtype)
    return between[..., 1:], (between[..., :1], between[..., -1, 1:, None], between[..., -1:, :1])


def _channel_products(rows, columns, log_decay, dtype):
    """Decay per channel [..., C, K]: the scores for j <= i (above the diagonal undefined but finite), and the exponents of ``Decays``.

    Dyadic levels. Cut the chunk in blocks of 2b, b = 1, 2, 4 .. C/2. Every pair j < i is at exactly one level in the upper (i) and
    lower (j) half of a block, and its exponent splits at the middle of that block into a part of i and a part of j, both <= 0:
    a level is a matmul of rows and columns decayed *outward from the middle*. The sums grow by doubling, from single tokens.
    """
    size, channels = log_decay.shape[-2:]
    tile = min(_TILE, size)
    index = jnp.arange(tile)

    def cut(x, n):  # [..., C, K] -> [..., C/n, n, K]
        return x.reshape(x.shape[:-2] + (size // n, n, channels))

    # Level 0: i = j, no decay.
    products = [jnp.sum(cut((r * columns).astype(log_decay.dtype), tile), -1)[..., None] * jnp.eye(tile) for r in rows]
    # Inside blocks of b tokens: sum from the start to token i inclusive, and from after token i to the end.
    prefix, suffix = cut(log_decay, 1), jnp.zeros_like(cut(log_decay, 1))
    block = 1
    while block < size:
        prefix_low, prefix_high = prefix[..., 0::2, :, :], prefix[..., 1::2, :, :]
        suffix_low, suffix_high = suffix[..., 0::2, :, :], suffix[..., 1::2, :, :]
        decay_low, decay_high = jnp.exp(suffix_low), jnp.exp(prefix_high)
        if block < tile:  # too small for matmuls of its own: multiply whole tiles, keep the pairs of this level
            outward = jnp.stack([decay_low, decay_high], axis=-3).reshape(log_decay.shape)
            half = index // block
            level = (half[:, None] // 2 == half // 2) & (half[:, None] > half)
            low = transpose(cut(columns * outward, tile))
            new = [jnp.where(level, matmul(cut(r * outward, tile), low, dtype), 0) for r in rows]
            products = [p + n for p, n in zip(products, new)]
        else:
            low = transpose(cut(columns, block)[..., 0::2, :, :] * decay_low)
            corners = [matmul(cut(r, block)[..., 1::2, :, :] * decay_high, low, dtype) for r in rows]
            products = [
                jnp.concatenate(
                    [
                        jnp.concatenate([p[..., 0::2, :, :], jnp.zeros_like(corner)], axis=-1),
                        jnp.concatenate([corner, p[..., 1::2, :, :]], axis=-1),
                    ],
                    axis=-2,
                )
                for p, corner in zip(products, corners)
            ]
        prefix = jnp.concatenate([prefix_low, prefix_high + prefix_low[..., -1:, :]], axis=-2)
        suffix = jnp.concatenate([suffix_low + prefix_high[..., -1:, :], suffix_high], axis=-2)
        block *= 2
    prefix, suffix = prefix[..., 0, :, :], suffix[..., 0, :, :]
    return [p[..., 0, :, :] for p in products], (prefix, suffix, prefix[..., -1, :, None])


def read(rows: Array, decay: Array, state: Array, dtype: jnp.dtype) -> Array:
    """(decay * rows) state; a scalar decay multiplies the product, so that queries shared by R heads are not repeated."""
    if decay.shape[-1] == 1:
        return decay * matmul(rows, state, dtype)
    return matmul(decay * rows, state, dtype)


def write(columns: Array, decay: Array, values: Array, dtype: jnp.dtype) -> Array:
    """(decay * columns)^T values; a scalar decay multiplies the values, for the same reason."""
    if decay.shape[-1] == 1:
        return matmul(transpose(columns), decay * values, dtype)
    return matmul(transpose(decay * columns), values, dtype)


# ---------------------------------------------------------------------------------------------------------------- loops


def scan_tokens(
    step: Callable[..., tuple[Array, Array]],
    state: Float[Array, "B H K V"],
    tokens: tuple[Array | None, ...],
    starts: Array | None,
    groups: int,
    scale: Array | float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Run ``step(state, (*token, start)) -> (state, read)`` over single tokens; a single token (decoding) without a loop."""
    value, log_decay = tokens[2], tokens[-1]
    inputs = [None if x is None else split_heads(x, groups).astype(state.dtype) for x in tokens]
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
    """Token arrays of M chunks, [M, B, G, R, C, .], with their documents [M, B, 1, 1, C] and that of the state before each."""

    tokens: tuple[Array | None, ...]
    documents: Array | None
    carried: Array | None


def scan_chunks(
    body: Callable[[Array, Chunks], tuple[Array, Array]],
    state: Float[Array, "B H K V"],
    tokens: tuple[Array | None, ...],
    documents: Int[Array, "B T"] | None,
    groups: int,
    chunk_size: int,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Run ``body(state, chunks) -> (state, output)`` over groups of chunks, in order, and undo the layout.

    A group (about GROUP_TOKENS tokens) is large enough that all that does not depend on the state is a few batched matmuls, and
    small enough to stay in cache. ``jax.checkpoint`` makes it the unit of recomputation: what the backward pass keeps from
    the forward one are the inputs and the state at the start of each group, whatever the body computes; no state per token.
    """
    length = tokens[0].shape[1]
    chunks = -(-length // chunk_size)
    count = -(-chunks // max(1, GROUP_TOKENS // chunk_size))
    per_group = -(-chunks // count)
    padding = count * per_group * chunk_size - length

    def layout(x):  # [B, T, H or G, ...] -> [N, M, B, G, R, C, ...]
        x = jnp.pad(split_heads(x, groups), [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 1))
        x = x.reshape((x.shape[0], count, per_group, chunk_size) + x.shape[2:])
        return jnp.moveaxis(x, (1, 2, 0, 4, 5, 3), range(6))

    carried = None
    if documents is not None:
        documents = jnp.pad(documents, [(0, 0), (0, padding)], mode="edge")
        documents = jnp.moveaxis(documents.reshape(-1, count * per_group, chunk_size), 0, 1)
        carried = jnp.concatenate(
            [jnp.zeros_like(documents[:1, :, -1]), documents[:-1, :, -1]]
        )  # the first real token continues
        documents = documents.reshape(count, per_group, -1, 1, 1, chunk_size)
        carried = carried.reshape(count, per_group, -1, 1, 1)
    inputs = Chunks(tuple(None if x is None else layout(x) for x in tokens), documents, carried)
    final, output = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), split_heads(state, groups, axis=1), inputs)
    output = jnp.moveaxis(output, range(6), (1, 2, 0, 4, 5, 3))  # [B, N, M, C, G, R, V]
    output = output.reshape(output.shape[0], length + padding, -1, output.shape[-1])
    return output[:, :length], final.reshape(state.shape)


def chunk_length(op: str, chunk_size: int | None, length: int) -> int:
    """Tokens per chunk: a power of two (halves of blocks must be blocks), not much longer than the sequence.

    Raises:
        ValueError: ``chunk_size`` is not a positive integer.
    """
    if chunk_size is None:
        chunk_size = CHUNK_SIZE
    elif not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"{op}: `chunk_size` is {chunk_size!r}; expected None or a positive number of tokens")
    return 1 << (min(chunk_size, length) - 1).bit_length()
