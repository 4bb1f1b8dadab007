"""Softmax attention with rotary positions, grouped key/value heads, an optional window and a ring cache."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from seqjax import ops
from seqjax.layers.linear import Linear
from seqjax.layers.mixer import mask_padding
from seqjax.layers.norm import RMSNorm
from seqjax.ops._segments import segment_info


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Hyperparameters of :class:`Attention`."""

    num_heads: int = 8
    """Query heads H."""
    num_kv_heads: int | None = None
    """Key/value heads G (default: H); each serves H/G query heads."""
    head_dim: int | None = None
    """Size of a head K (default: dim / H); H*K need not equal the model width."""
    window: int | None = None
    """A token sees itself and the ``window - 1`` tokens before it; None is full attention, that is a window of ``max_length``."""
    max_length: int = 4096
    """Longest context of full attention, in tokens; it sizes the cache."""
    qk_norm: bool = False
    """RMSNorm on each query and key head before the rotation (Qwen3)."""
    rope_base: float = 10000.0
    """Base of the rotary frequencies."""
    rope_fraction: float = 1.0
    """Fraction of a head's features that is rotated; 0 means no position information."""
    norm_epsilon: float = 1e-6
    """Of the query and key norms."""

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def context(self) -> int:
        """Number of tokens a token can see, itself included: the size of the cache."""
        return self.max_length if self.window is None else self.window

    def head_size(self, dim: int) -> int:
        """Size of a head in a model of width ``dim``."""
        return self.head_dim or dim // self.num_heads

    def parameter_count(self, dim: int) -> int:
        """Number of parameters of the mixer at width ``dim``."""
        size = self.head_size(dim)
        return 2 * dim * size * (self.num_heads + self.kv_heads) + (2 * size if self.qk_norm else 0)

    def mixing_flops(self, dim: int, time: int) -> float:
        """4 K per query head and visible key: scores and weighted values, averaged over a row of ``time`` tokens."""
        window = min(self.context, time)
        visible = window - window * (window - 1) / (2 * time)
        return 4 * self.num_heads * self.head_size(dim) * visible


class AttentionState(NamedTuple):
    """Ring of the last S tokens of the current document; token p of the document lies in slot p mod S."""

    key: Float[Array, "B S G K"]
    """Rotated keys, in the layer's compute type."""
    value: Float[Array, "B S G K"]
    """Values, in the layer's compute type."""
    key_position: Int[Array, "B S"]
    """Position within the document, -1 for an empty slot."""
    position: Int[Array, "B"]
    """Position of the next token within the current document."""


class Attention(nnx.Module):
    """o_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s over t - S < s <= t of the same document; y = concat_heads(o) W_o.

    Positions count the real tokens of a document from 0, so packing and padding change nothing. "Full" attention is attention over
    the last ``max_length`` tokens in training, prefill and decoding alike. One new token is written into the ring in place; a
    longer piece attends to ring and piece side by side and then overwrites only the slots of its own tokens.

    Args:
        dim: model width D.
        config: hyperparameters.
        rngs: source of the initial values.
        dtype: type of the projections and of the cache; the softmax is float32.
        param_dtype: storage type.

    Raises:
        ValueError: heads and key/value heads, or width and heads, do not divide; or the window is not positive.
    """

    def __init__(
        self,
        dim: int,
        config: AttentionConfig = AttentionConfig(),
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        if config.num_heads % config.kv_heads:
            raise ValueError(
                f"Attention: `num_kv_heads`={config.kv_heads} does not divide `num_heads`={config.num_heads}"
            )
        if config.head_dim is None and dim % config.num_heads:
            raise ValueError(f"Attention: `num_heads`={config.num_heads} does not divide `dim`={dim}; set `head_dim`")
        if config.context < 1:
            raise ValueError(f"Attention: the window is {config.context} tokens; expected at least 1")
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.head_size = size = config.head_size(dim)
        types: dict[str, Any] = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.query = Linear(dim, config.num_heads * size, axes=("embed", "heads"), **types)
        self.key = Linear(dim, config.kv_heads * size, axes=("embed", "heads"), **types)
        self.value = Linear(dim, config.kv_heads * size, axes=("embed", "heads"), **types)
        self.output = Linear(config.num_heads * size, dim, axes=("heads", "embed"), **types)
        norm: dict[str, Any] = {
            "axis": "head_dim",
            "epsilon": config.norm_epsilon,
            "dtype": dtype,
            "param_dtype": param_dtype,
        }
        self.query_norm = RMSNorm(size, **norm) if config.qk_norm else None
        self.key_norm = RMSNorm(size, **norm) if config.qk_norm else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: AttentionState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], AttentionState]:
        """Mix along time; see :mod:`seqjax.layers.mixer`."""
        batch, time, _ = x.shape
        x = mask_padding(x, segment_ids)
        query = self.query(x).reshape(batch, time, -1, self.head_size)
        key = self.key(x).reshape(batch, time, -1, self.head_size)
        value = self.value(x).reshape(batch, time, -1, self.head_size)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        positions, segments, next_position = _positions(x.shape[:2], state, segment_ids)
        if self.config.rope_fraction:
            rotation: dict[str, Any] = {"base": self.config.rope_base, "fraction": self.config.rope_fraction}
            query, key = (ops.rotary_embedding(a, positions, **rotation) for a in (query, key))

        ring = self.initial_state(batch) if state is None else state
        new_ring = _write(ring, key, value, positions, segments, next_position)
        if state is None:
            read = self._attend_without_cache(query, key, value, positions, segments, segment_ids)
        elif time == 1:
            # The slot that the new token overwrites held the one token that has just left the window.
            keys = None if segment_ids is None else jnp.ones_like(new_ring.key_position)
            read = self._attend(
                query,
                new_ring.key,
                new_ring.value,
                positions,
                new_ring.key_position,
                None if segment_ids is None else segments,
                keys,
            )
        else:
            read = self._attend(
                query,
                jnp.concatenate([ring.key, key], axis=1),
                jnp.concatenate([ring.value, value], axis=1),
                positions,
                jnp.concatenate([ring.key_position, positions], axis=1),
                segments,
                # The ring belongs to the document that the piece continues.
                jnp.concatenate([jnp.ones_like(ring.key_position), segments], axis=1),
            )
        return self.output(read.reshape(batch, time, -1)), new_ring

    def _attend_without_cache(self, query, key, value, positions, segments, segment_ids):
        if query.shape[1] <= self.config.context:
            # Nothing can leave the window, and the order of indices is the order of positions within each document.
            segments = None if segment_ids is None else segments
            return ops.attention(query, key, value, query_segment_ids=segments, key_segment_ids=segments)
        if segment_ids is None:
            return ops.attention(query, key, value, window=self.config.context)
        return self._attend(query, key, value, positions, positions, segments, segments)

    def _attend(self, query, key, value, positions, key_positions, segments, key_segments):
        return ops.attention(
            query,
            key,
            value,
            window=self.config.context,
            query_positions=positions,
            key_positions=key_positions,
            query_segment_ids=segments,
            key_segment_ids=key_segments,
        )

    def initial_state(self, batch_size: int) -> AttentionState:
        """An empty ring."""
        slots, shape = self.config.context, (batch_size, self.config.context, self.config.kv_heads, self.head_size)
        return AttentionState(
            jnp.zeros(shape, self.dtype),
            jnp.zeros(shape, self.dtype),
            jnp.full((batch_size, slots), -1, jnp.int32),
            jnp.zeros((batch_size,), jnp.int32),
        )


def _positions(shape, state, segment_ids):
    """Position of each token in its document [B, T], document number (1 continues the state, 0 is padding) and next position [B]."""
    batch, time = shape
    offset = jnp.zeros((batch,), jnp.int32) if state is None else state.position
    if segment_ids is None:
        positions = offset[:, None] + jnp.arange(time, dtype=jnp.int32)
        return positions, jnp.ones(shape, jnp.int32), offset + time
    real, start, document = segment_info(segment_ids)
    count = jnp.cumsum(real, axis=1, dtype=jnp.int32)
    # Number of real tokens of the row before the token's document; minus the offset while the state's document goes on.
    before = jax.lax.cummax(jnp.where(start, count - 1, -offset[:, None]), axis=1)
    return count - 1 - before, jnp.where(real, document + 1, 0).astype(jnp.int32), (count - before)[:, -1]


def _write(ring, key, value, positions, segments, next_position):
    """Put the new tokens that stay visible into the ring and forget documents that have ended."""
    batch, time = positions.shape
    slots = ring.key_position.shape[1]
    last_segment = jnp.max(segments, axis=1, keepdims=True)
    keep = (segments == last_segment) & (segments > 0) & (positions >= next_position[:, None] - slots)
    # A slot beyond the end is dropped by the scatter, so exactly the kept tokens are copied.
    slot = jnp.where(keep, positions % slots, slots + jnp.arange(time, dtype=jnp.int32))
    row = jnp.arange(batch)[:, None]
    put: dict[str, Any] = {"mode": "drop", "unique_indices": True}
    key_position = jnp.where(last_segment <= 1, ring.key_position, -1)
    return AttentionState(
        ring.key.at[row, slot].set(key.astype(ring.key.dtype), **put),
        ring.value.at[row, slot].set(value.astype(ring.value.dtype), **put),
        key_position.at[row, slot].set(positions, **put),
        next_position,
    )
