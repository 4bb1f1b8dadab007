r"""Cross-entropy over a large vocabulary without the logits ``[B, T, V]``.

For every token with hidden state h, unembedding W and target y:

    u = softcap * tanh(h W / softcap)    (u = h W without a softcap)
    l = log sum_v exp(u_v)
    loss = sum over unmasked tokens of  (l - u_y) + z_loss * l^2

The tokens are processed in chunks along time under ``jax.lax.scan``; a chunk's logits live only inside its iteration.
Under differentiation the same pass also forms the gradients, because the loss is a scalar and its cotangent merely
scales them: three matrix products per chunk and no recomputation, at the memory of one chunk of logits, the gradient
of ``hidden`` and a float32 gradient of ``unembedding``.

The z-loss is that of PaLM (arXiv:2204.02311, section 5); soft-capping that of Gemma 2 (arXiv:2408.00118, section 2).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


class _Options(NamedTuple):
    z_loss: float
    softcap: float | None
    dtype: Any


def chunked_cross_entropy(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    mask: Shaped[Array, "B T"] | None = None,
    *,
    chunk_size: int = 4096,
    z_loss: float = 0.0,
    softcap: float | None = None,
    dtype: Any = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Summed cross-entropy (natural log) of ``targets``, in chunks of about ``chunk_size`` tokens.

    Args:
        hidden: last hidden states, any float dtype.
        unembedding: output weights.
        targets: class of every token, in [0, V).
        mask: weight of every token (bool or float), None for all ones.
        chunk_size: tokens whose logits exist at one time; rounded to whole time steps of the batch.
        z_loss: weight of the squared log-normaliser.
        softcap: bound of the logits through tanh, None for none.
        dtype: of the matrix products' inputs (default: that of ``hidden``); they accumulate in float32 and everything
            after them is float32.

    Returns:
        The sum of the losses over the unmasked tokens (differentiable in ``hidden`` and ``unembedding``), and sums
        without gradient: ``nll`` (the loss without z-loss), ``z_loss`` (its weighted term), ``correct`` (tokens whose
        target has the largest logit) and ``tokens`` (the mask's sum).

    Raises:
        ValueError: if the shapes disagree or ``chunk_size`` is not positive.
    """
    batch, time, dim = hidden.shape
    if unembedding.ndim != 2 or unembedding.shape[0] != dim:
        raise ValueError(f"`unembedding` has shape {unembedding.shape}; `hidden` {hidden.shape} needs ({dim}, V)")
    if targets.shape != (batch, time):
        raise ValueError(f"`targets` has shape {targets.shape}, expected {(batch, time)} like `hidden`")
    if mask is not None and mask.shape != (batch, time):
        raise ValueError(f"`mask` has shape {mask.shape}, expected {(batch, time)} like `hidden`")
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` is {chunk_size}, expected at least 1")
    weights = jnp.ones((batch, time), jnp.float32) if mask is None else mask.astype(jnp.float32)
    steps = min(time, max(1, chunk_size // batch))
    options = _Options(float(z_loss), None if softcap is None else float(softcap), jnp.dtype(dtype or hidden.dtype))
    total, aux = _summed_loss(
        _chunks(hidden, steps), unembedding, _chunks(targets, steps), _chunks(weights, steps), options
    )
    return total, jax.lax.stop_gradient(aux)


def _chunks(x: Array, steps: int) -> Array:
    """[B, T, ...] -> [N, B, steps, ...], zero-padded. Chunk n takes times n, n + N, n + 2N, ...

    The stride leaves every device of a mesh that shards time with a part of every chunk.
    """
    count = -(-x.shape[1] // steps)
    padded = jnp.pad(x, [(0, 0), (0, count * steps - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(padded.reshape(x.shape[0], steps, count, *x.shape[2:]), 2, 0)


def _chunk_terms(logits: Array, targets: Array, weights: Array, options: _Options) -> tuple[Array, Array, Array, Array]:
    """Capped logits, their log-normaliser, a bool one-hot of the target, and the sums (nll, z, correct, tokens)."""
    capped = logits if options.softcap is None else options.softcap * jnp.tanh(logits / options.softcap)
    largest = jnp.max(capped, axis=-1)
    log_normaliser = largest + jnp.log(jnp.sum(jnp.exp(capped - largest[..., None]), axis=-1))
    # A comparison instead of a gather: it stays local when the vocabulary is sharded.
    one_hot = jax.lax.broadcasted_iota(targets.dtype, capped.shape, capped.ndim - 1) == targets[..., None]
    picked = jnp.sum(jnp.where(one_hot, capped, 0.0), axis=-1)
    sums = jnp.stack(
        [
            jnp.sum(weights * (log_normaliser - picked)),
            options.z_loss * jnp.sum(weights * log_normaliser**2),
            jnp.sum(weights * (picked >= largest)),
            jnp.sum(weights),
        ]
    )
    return capped, log_normaliser, one_hot, sums


def _counted(hidden: Array, weights: Array, options: _Options) -> Array:
    """Hidden states of the tokens that count, 0 elsewhere: garbage in masked tokens (inf, NaN) must not leak."""
    return jnp.where((weights > 0)[..., None], hidden, 0).astype(options.dtype)


def _logits(hidden: Array, unembedding: Array) -> Array:
    return jnp.einsum("btd,dv->btv", hidden, unembedding, preferred_element_type=jnp.float32)


def _pack(sums: Array) -> tuple[Array, dict[str, Array]]:
    return sums[0] + sums[1], {"nll": sums[0], "z_loss": sums[1], "correct": sums[2], "tokens": sums[3]}


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _summed_loss(hidden: Array, unembedding: Array, targets: Array, weights: Array, options: _Options) -> Any:
    kernel = unembedding.astype(options.dtype)

    def step(sums: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
        h, y, w = chunk
        return sums + _chunk_terms(_logits(_counted(h, w, options), kernel), y, w, options)[3], None

    return _pack(jax.lax.scan(step, jnp.zeros(4), (hidden, targets, weights))[0])


def _summed_loss_forward(hidden: Array, unembedding: Array, targets: Array, weights: Array, options: _Options) -> Any:
    kernel = unembedding.astype(options.dtype)

    def step(carry: tuple[Array, Array], chunk: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        sums, kernel_gradient = carry
        h, y, w = chunk
        h_low = _counted(h, w, options)
        capped, log_normaliser, one_hot, terms = _chunk_terms(_logits(h_low, kernel), y, w, options)
        probability = jnp.exp(capped - log_normaliser[..., None])
        gradient = probability * (1 + 2 * options.z_loss * log_normaliser[..., None]) - one_hot
        if options.softcap is not None:
            gradient = gradient * (1 - (capped / options.softcap) ** 2)
        gradient = (gradient * w[..., None]).astype(options.dtype)
        kernel_gradient += jnp.einsum("btd,btv->dv", h_low, gradient, preferred_element_type=jnp.float32)
        hidden_gradient = jnp.einsum("btv,dv->btd", gradient, kernel, preferred_element_type=jnp.float32)
        return (sums + terms, kernel_gradient), hidden_gradient.astype(h.dtype)

    start = (jnp.zeros(4), jnp.zeros(unembedding.shape, jnp.float32))
    (sums, kernel_gradient), hidden_gradient = jax.lax.scan(step, start, (hidden, targets, weights))
    # The empty array carries the dtype of the weights: residuals are arrays.
    return _pack(sums), (hidden_gradient, kernel_gradient, jnp.zeros(0, unembedding.dtype))


def _summed_loss_backward(options: _Options, residuals: tuple[Array, Array, Array], cotangents: Any) -> Any:
    hidden_gradient, kernel_gradient, like = residuals
    scale = cotangents[0]
    return (
        hidden_gradient * scale.astype(hidden_gradient.dtype),
        (kernel_gradient * scale).astype(like.dtype),
        None,
        None,
    )


_summed_loss.defvjp(_summed_loss_forward, _summed_loss_backward)
