r"""Softmax attention over visible keys: causal, sliding window, prefix, packed documents, grouped queries.

.. math:: o_t = \sum_{s \in V(t)} \frac{e^{c\, q_t \cdot k_s}}{\sum_{r \in V(t)} e^{c\, q_t \cdot k_r}} v_s

Who sees whom is said by positions and segment ids only, so the same call serves training, prefill and decoding from a ring
cache in any order. The arithmetic is ``jax.nn.dot_product_attention`` (XLA, or cuDNN on GPUs) and JAX's own splash attention
on TPUs; this file decides masks and keeps memory linear in time by attending a block of queries at a time.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqjax.ops import _splash
from seqjax.ops._dispatch import check_floating, check_segment_ids, check_shapes
from seqjax.ops._segments import clear_padding

OP = "attention"
QUERY_BLOCK = 256
"""Queries attended at a time once a row is longer than two blocks; a block's logits are the peak memory."""


@dataclasses.dataclass(frozen=True)
class _Visibility:
    """Positions and segments of queries [B or 1, T] and keys [B or 1, S], and the rules."""

    query_positions: Array
    key_positions: Array
    query_segments: Array | None
    key_segments: Array | None
    prefix_length: Array | None
    window: int | None

    def mask(self) -> Array:
        """Whether query t sees key s, [B or 1, T, S]."""
        query, key = self.query_positions[:, :, None], self.key_positions[:, None, :]
        visible = key <= query
        if self.window is not None:
            visible &= query - key < self.window
        if self.prefix_length is not None:
            visible |= key < self.prefix_length[:, None, None]
        visible &= key >= 0
        if self.query_segments is not None and self.key_segments is not None:
            same = self.query_segments[:, :, None] == self.key_segments[:, None, :]
            visible &= same & (self.key_segments[:, None, :] != 0)
        return visible


jax.tree_util.register_dataclass(
    _Visibility,
    data_fields=["query_positions", "key_positions", "query_segments", "key_segments", "prefix_length"],
    meta_fields=["window"],
)


def attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G V"],
    *,
    scale: float | None = None,
    window: int | None = None,
    prefix_length: Int[Array, " B"] | None = None,
    query_positions: Int[Array, "B T"] | None = None,
    key_positions: Int[Array, "B S"] | None = None,
    query_segment_ids: Int[Array, "B T"] | None = None,
    key_segment_ids: Int[Array, "B S"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H V"]:
    """Attend from every query to the keys visible to it.

    A key is visible when it is present, in the query's document, and either not later than the query and fewer than
    ``window`` positions before it, or inside the prefix. A query that sees nothing gives exactly 0, with zero gradients.

    Args:
        query: ``[B, T, H, K]``.
        key: ``[B, S, G, K]``; ``G`` divides ``H`` and key head g serves query heads ``g * H/G ...``.
        value: ``[B, S, G, V]``.
        scale: factor on the logits; default ``K**-0.5``.
        window: number of positions a query sees, itself included; None for all.
        prefix_length: keys at positions below it are visible to every query of their document ``[B]`` (prefix-LM).
        query_positions: position of each query in tokens ``[B, T]``; default ``0 .. T-1``.
        key_positions: position of each key ``[B, S]``, in any order; negative means absent (an unused cache slot, whose
            contents must be finite; a copy of the cache per token is the price of more). Default ``0 .. S-1``. Omit both where possible: it lets long rows skip keys that no mask would let through. With a
            window the same holds at run time for positions that advance with the index (right or left padding only).
        query_segment_ids: document of each query ``[B, T]``, 0 is padding.
        key_segment_ids: document of each key ``[B, S]``; default: those of the queries, if ``T == S``.
        implementation: ``"reference"`` (one float32 softmax over all keys), ``"xla"``, ``"pallas"`` (JAX's TPU splash kernel;
            TPU only, self-attention without positions or prefix) or None: the best here, cuDNN and splash included.

    Returns:
        ``[B, T, H, V]`` in the dtype of ``query``.

    Raises:
        ValueError: shapes or dtypes do not fit, or positions or segment ids are missing where ``T != S``.
        NotImplementedError: ``"pallas"`` was asked for and cannot run here; the message says why.
    """
    if implementation not in (None, "reference", "xla", "pallas"):
        raise ValueError(f"{OP}: `implementation` is {implementation!r}; expected None, 'reference', 'xla' or 'pallas'")
    sizes = check_shapes(
        OP,
        {
            "query": (query, "B T H K"),
            "key": (key, "B S G K"),
            "value": (value, "B S G V"),
            "prefix_length": (prefix_length, "B"),
            "query_positions": (query_positions, "B T"),
            "key_positions": (key_positions, "B S"),
            "query_segment_ids": (query_segment_ids, "B T"),
            "key_segment_ids": (key_segment_ids, "B S"),
        },
    )
    _check(query, key, value, window, query_positions, query_segment_ids, key_segment_ids, sizes)
    time, length, width = sizes["T"], sizes["S"], sizes["K"]
    if scale is None:
        scale = width**-0.5
    if query_segment_ids is not None and key_segment_ids is None:
        key_segment_ids = query_segment_ids
    plain = query_positions is None and key_positions is None and prefix_length is None and time == length

    if key_segment_ids is not None:
        key, value = clear_padding(key_segment_ids != 0, key), clear_padding(key_segment_ids != 0, value)
    if query_segment_ids is not None:
        query = clear_padding(query_segment_ids != 0, query)

    refusal = _splash.refusal(query, key, value, plain)
    if implementation == "pallas" and refusal is not None:
        raise NotImplementedError(f"{OP}: implementation='pallas' {refusal}; use implementation=None or 'xla'")
    if implementation == "pallas" or (implementation is None and refusal is None):
        return _splash.splash_attention(query, key, value, scale, window, query_segment_ids)
    if implementation is None and plain and query_segment_ids is None and _cudnn_runs(query, value):
        left = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            query, key, value, scale=scale, is_causal=True, local_window_size=left, implementation="cudnn"
        )

    visibility = _Visibility(
        query_positions=jnp.arange(time)[None] if query_positions is None else query_positions,
        key_positions=jnp.arange(length)[None] if key_positions is None else key_positions,
        query_segments=query_segment_ids,
        key_segments=key_segment_ids,
        prefix_length=prefix_length,
        window=window,
    )
    if implementation == "reference":
        return _reference(query, key, value, visibility, scale)
    # dot_product_attention wants K == V: features of zeros change neither logits nor the values that are kept.
    widest = max(width, sizes["V"])
    query, key, value = (_pad_features(array, widest) for array in (query, key, value))
    return _xla(query, key, value, visibility, scale, plain)[..., : sizes["V"]]


def _check(query, key, value, window, query_positions, query_segment_ids, key_segment_ids, sizes) -> None:
    check_floating(OP, {"query": query, "key": key, "value": value})
    check_segment_ids(OP, query_segment_ids)
    check_segment_ids(OP, key_segment_ids)
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"{OP}: `query`, `key` and `value` have dtypes {query.dtype}, {key.dtype} and {value.dtype}; expected one dtype"
        )
    if sizes["H"] % sizes["G"]:
        raise ValueError(
            f"{OP}: `key` has {sizes['G']} heads and `query` {sizes['H']}; the first must divide the second"
        )
    if window is not None and window < 1:
        raise ValueError(f"{OP}: `window` is {window}; expected at least 1 (a query sees itself) or None")
    if sizes["T"] != sizes["S"]:
        if query_positions is None:
            raise ValueError(
                f"{OP}: {sizes['T']} queries and {sizes['S']} keys need `query_positions`, or nobody knows which keys are past"
            )
        if query_segment_ids is not None and key_segment_ids is None:
            raise ValueError(
                f"{OP}: `query_segment_ids` for T={sizes['T']} != S={sizes['S']} needs `key_segment_ids` too"
            )
    if key_segment_ids is not None and query_segment_ids is None:
        raise ValueError(f"{OP}: `key_segment_ids` needs `query_segment_ids` too")


def _cudnn_runs(query: Array, value: Array) -> bool:
    """What cuDNN's fused attention takes: a GPU, 16-bit floats, and heads of equal width up to 128, a multiple of 8."""
    width = query.shape[-1]
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    return jax.default_backend() == "gpu" and half and width % 8 == 0 and width <= 128 and value.shape[-1] == width


def _pad_features(array: Array, width: int) -> Array:
    extra = width - array.shape[-1]
    return jnp.pad(array, ((0, 0), (0, 0), (0, 0), (0, extra))) if extra else array


def _reference(query: Array, key: Array, value: Array, visibility: _Visibility, scale: float) -> Array:
    """Softmax over all keys at once, as the equation reads."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    batch, time, heads, width = query.shape
    groups = key.shape[2]
    grouped = query.astype(wide).reshape(batch, time, groups, heads // groups, width)
    logits = scale * jnp.einsum("btgrk,bsgk->bgrts", grouped, key.astype(wide))
    visible = visibility.mask()[:, None, None]
    largest = jnp.max(logits, axis=-1, keepdims=True, where=visible, initial=jnp.finfo(wide).min)
    # Hidden logits may exceed every visible one, so they leave before the exponential.
    weight = jnp.where(visible, jnp.exp(jnp.where(visible, logits - jax.lax.stop_gradient(largest), 0)), 0)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    weight = weight / jnp.where(total > 0, total, 1)
    output = jnp.einsum("bgrts,bsgv->btgrv", weight, value.astype(wide))
    return output.reshape(batch, time, heads, -1).astype(query.dtype)


def _attend(query: Array, key: Array, value: Array, visibility: _Visibility, scale: float) -> Array:
    """One block of queries against some keys."""
    mask = visibility.mask()
    output = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], scale=scale, implementation="xla")
    # A softmax over nothing is the mean of everything; those rows are 0 by definition.
    return jnp.where(jnp.any(mask, axis=-1)[..., None, None], output, 0)


def _xla(query: Array, key: Array, value: Array, visibility: _Visibility, scale: float, plain: bool) -> Array:
    """Choose how to cut a long row."""
    time, length = query.shape[1], key.shape[1]
    window = visibility.window
    if window is not None and visibility.prefix_length is None and time == length:
        block = max(128, 128 * math.ceil((window - 1) / 128))
        if time > 2 * block:
            if plain:
                return _windowed(query, key, value, visibility, scale, block)
            return jax.lax.cond(
                _advance_with_index(visibility),
                lambda q, k, v, m: _windowed(q, k, v, m, scale, block),
                lambda q, k, v, m: _query_blocks(q, k, v, m, scale),
                query,
                key,
                value,
                visibility,
            )
    if time <= 2 * QUERY_BLOCK:
        return _attend(query, key, value, visibility, scale)
    if plain:
        return _causal(query, key, value, visibility, scale)
    return _query_blocks(query, key, value, visibility, scale)


def _advance_with_index(visibility: _Visibility) -> Array:
    """Whether positions differ between any two present tokens by exactly as much as their indices do."""
    query, key = jnp.broadcast_arrays(visibility.query_positions, visibility.key_positions)
    present = key >= 0
    if visibility.key_segments is not None:
        # A padded query sees nothing wherever it is, and a padded key is seen by nobody.
        query, key, segments = jnp.broadcast_arrays(query, key, visibility.key_segments)
        present = (key >= 0) & (segments != 0) & (visibility.query_segments != 0)
    offset = key - jnp.arange(key.shape[1])
    first = jnp.take_along_axis(offset, jnp.argmax(present, axis=1)[:, None], axis=1)
    return jnp.all(~present | ((offset == first) & (query == key)))


def _blocks(array: Array, block: int, fill: int = 0) -> Array:
    """[B, T, ...] -> [T/b, B, b, ...], the end filled up."""
    extra = -array.shape[1] % block
    array = jnp.pad(array, ((0, 0), (0, extra)) + ((0, 0),) * (array.ndim - 2), constant_values=fill)
    return jnp.swapaxes(array.reshape(array.shape[0], -1, block, *array.shape[2:]), 0, 1)


def _join(blocks: Array, time: int) -> Array:
    """[n, B, b, ...] -> [B, T, ...]."""
    joined = jnp.swapaxes(blocks, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :time]


def _query_blocks(query: Array, key: Array, value: Array, visibility: _Visibility, scale: float) -> Array:
    """Blocks of queries in turn against all keys, recomputed in the backward: one block's logits exist at a time."""

    @jax.checkpoint
    def body(block):
        q, positions, segments = block
        m = dataclasses.replace(visibility, query_positions=positions, query_segments=segments)
        return _attend(q, key, value, m, scale)

    block = min(QUERY_BLOCK, query.shape[1])
    arrays = (query, visibility.query_positions, visibility.query_segments)
    return _join(jax.lax.map(body, jax.tree.map(lambda a: _blocks(a, block), arrays)), query.shape[1])


def _causal(query: Array, key: Array, value: Array, visibility: _Visibility, scale: float) -> Array:
    """Self-attention in index order: up to eight stretches of queries, each against the keys up to its own end.

    Skips nearly half of the products, which masks alone do not.
    """
    time = query.shape[1]
    stretch = QUERY_BLOCK * math.ceil(time / (8 * QUERY_BLOCK))
    outputs = []
    for start in range(0, time, stretch):
        end = min(start + stretch, time)
        m = visibility
        m = dataclasses.replace(
            m,
            query_positions=m.query_positions[:, start:end],
            key_positions=m.key_positions[:, :end],
            query_segments=None if m.query_segments is None else m.query_segments[:, start:end],
            key_segments=None if m.key_segments is None else m.key_segments[:, :end],
        )
        outputs.append(_query_blocks(query[:, start:end], key[:, :end], value[:, :end], m, scale))
    return jnp.concatenate(outputs, axis=1)


def _windowed(query: Array, key: Array, value: Array, visibility: _Visibility, scale: float, block: int) -> Array:
    """Sliding window in index order: each block of queries against its own and the previous block of keys."""

    def with_previous(array, fill=0):
        own = _blocks(array, block, fill)
        before = jnp.concatenate([jnp.full_like(own[:1], fill), own[:-1]])
        return jnp.concatenate([before, own], axis=2)

    @jax.checkpoint
    def body(block):
        q, query_positions, query_segments, k, v, key_positions, key_segments = block
        m = _Visibility(query_positions, key_positions, query_segments, key_segments, None, visibility.window)
        return _attend(q, k, v, m, scale)

    own = (query, visibility.query_positions, visibility.query_segments)
    wide = (key, value, visibility.key_segments)
    q, query_positions, query_segments = jax.tree.map(lambda array: _blocks(array, block), own)
    k, v, key_segments = jax.tree.map(with_previous, wide)
    key_positions = with_previous(visibility.key_positions, -1)
    blocks = (q, query_positions, query_segments, k, v, key_positions, key_segments)
    return _join(jax.lax.map(body, blocks), query.shape[1])
