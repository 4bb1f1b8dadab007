"""What tokens are to a kernel, and what the chunks of a row have in common."""

import jax
import jax.numpy as jnp

START, ORDINARY, PADDING = 2, 1, 0
"""Kinds of tokens: the first of a document (the state before it does not count), any other, none (the state stays as it is)."""

HARD = -40.0
"""Log decays below this are resets: exp(-40) is below float32's resolution of anything it could be added to."""

_SMALLEST = 1e-12


def nonzero(beta: jax.Array) -> jax.Array:
    """Step sizes of the delta rule for its backward pass, which divides by them something that is proportional to them."""
    return jnp.where(jnp.abs(beta) < _SMALLEST, jnp.where(beta < 0, -_SMALLEST, _SMALLEST), beta)


def chunks_of(rows: jax.Array, chunk: int, fill: float) -> jax.Array:
    """[B, T, ...] -> [B, N, chunk, ...], the last chunk filled up."""
    batch, time = rows.shape[:2]
    count = -(-time // chunk)
    rows = jnp.pad(rows, [(0, 0), (0, count * chunk - time)] + [(0, 0)] * (rows.ndim - 2), constant_values=fill)
    return rows.reshape(batch, count, chunk, *rows.shape[2:])


def chunk_rules(log_decay: jax.Array, kind: jax.Array | None, chunk: int) -> tuple[jax.Array, jax.Array]:
    """What the tokens of a chunk do to one another.

    A token is a reset if it starts a document or its log decay is below ``HARD``. Tokens of a chunk with different numbers of resets
    before them have nothing to do with one another, and those with number 0 continue the state before the chunk. All sums leave
    out resets, so they stay within ``chunk * HARD`` and no difference of two of them loses what matters.

    Args:
        log_decay: [B, T, H], float32.
        kind: [B, T] or None; what is past T is padding.
        chunk: tokens per chunk.

    Returns:
        rows [B, H, N, 3, C]: sums of log decays up to and including a token, sums of those after it, and resets up to and including it
        (-1 for padding); and whether the log decay of a token acts, [B, T, H].
    """
    ones = jnp.ones(log_decay.shape[:2], jnp.int32)
    kind = (ones if kind is None else kind)[..., None]
    reset = (kind == START) | ((kind != PADDING) & (log_decay < HARD))
    acts = (kind != PADDING) & ~reset
    decays = chunks_of(jnp.where(acts, log_decay, 0.0), chunk, 0.0)
    upto = jnp.cumsum(decays, 2)
    after = jnp.flip(jnp.cumsum(jnp.flip(decays, 2), 2), 2) - decays
    numbers = jnp.cumsum(chunks_of(reset.astype(jnp.float32), chunk, 0.0), 2)
    real = chunks_of(kind != PADDING, chunk, False)
    rows = jnp.stack([upto, after, jnp.where(real, numbers, -1.0)], 0)  # [3, B, N, C, H]
    return rows.transpose(1, 4, 2, 0, 3), acts


def of_tokens(rows: jax.Array, time: int) -> jax.Array:
    """[B, H, N, 1, C] -> [B, T, H]."""
    batch, heads = rows.shape[:2]
    return rows.reshape(batch, heads, -1)[..., :time].transpose(0, 2, 1)


def decay_gradient(gates: jax.Array | None, log_decay: jax.Array | None, acts: jax.Array | None) -> jax.Array | None:
    """Cotangent of ``log_decay`` [B, T, H] or [B, T, H, K] from what a kernel has made of it, [B, H, N, 1, C] or [B, T, H * K]; 0 where it
    does not act (``acts``).
    """
    if gates is None or log_decay is None or acts is None:
        return None
    gradient = of_tokens(gates, log_decay.shape[1]) if log_decay.ndim == 3 else gates.reshape(log_decay.shape)
    return jnp.where(acts, gradient, 0.0).astype(log_decay.dtype)


def kind_rows(kind: jax.Array, heads: int, chunk: int) -> jax.Array:
    """[B, T] -> [B, H, N, 1, C] float32; what is past T is padding."""
    rows = chunks_of(kind.astype(jnp.float32), chunk, float(PADDING))[:, None, :, None]
    return jnp.broadcast_to(rows, (rows.shape[0], heads, *rows.shape[2:]))


def document_numbers(kind: jax.Array | None, chunk: int) -> tuple[jax.Array | None, jax.Array | None]:
    """The running document number of each token [B, T], -1 for padding, and those of the documents which the states before and after
    every chunk belong to [B, N + 1]; None for one document.
    """
    if kind is None:
        return None, None
    time = kind.shape[1]
    numbers = jnp.cumsum(kind == START, 1, dtype=jnp.int32)
    ends = jnp.minimum(jnp.arange(chunk, time + chunk, chunk), time) - 1
    return jnp.where(kind == PADDING, -1, numbers), jnp.pad(numbers[:, ends], ((0, 0), (1, 0)))
