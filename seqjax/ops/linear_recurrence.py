r"""Elementwise linear recurrence, real or complex.

.. math:: h_t = a_t \circ h_{t-1} + x_t

The recurrence of RG-LRU (arXiv:2402.19427, eq. 4), HGRN (arXiv:2311.04823), minGRU (arXiv:2410.01201), the LRU
(arXiv:2303.06349), S4D and S5 after diagonalisation, and of exponential averages.

Forms: ``"reference"`` is one step per token. ``"xla"`` cuts time into chunks and runs all chunks side by side: once for what
each chunk adds and by how much it decays, then one short scan over the chunks, then once more from the right states. It
multiplies decays and never divides by them, so any decay is safe, 0 included. Its backward is the same three passes reversed.
``"pallas"`` (``pallas_kernels.linear_recurrence``) walks over time once with the state on chip.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int

from pallas_kernels import linear_recurrence as kernel
from pallas_kernels._remat import keep
from seqjax.ops import _loops
from seqjax.ops._dispatch import (
    check_chunk_size,
    check_floating,
    check_segment_ids,
    check_shapes,
    resolve_implementation,
    state_dtype,
)
from seqjax.ops._mesh import per_device
from seqjax.ops._segments import Segments, clear_padding, segment_info, token_kinds

OP = "linear_recurrence"


def linear_recurrence(
    x: Inexact[Array, "B T D"],
    log_decay: Float[Array, "B T D"] | None = None,
    *,
    decay: Inexact[Array, "B T D"] | None = None,
    initial_state: Inexact[Array, "B D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Inexact[Array, "B T D"], Inexact[Array, "B D"]]:
    r"""Compute :math:`h_t = a_t \circ h_{t-1} + x_t` for every token.

    Args:
        x: inputs ``[B, T, D]``, real or complex.
        log_decay: logarithm of the decay, :math:`a = e^{g}`; ``-inf`` is a reset. Its gradient is
            :math:`a_t h_{t-1} \lambda_t`, finite for every value up to and including ``-inf``.
        decay: the decay itself, real or complex. Exactly one of ``log_decay`` and ``decay`` is given.
        initial_state: state before the first token ``[B, D]``; zeros by default.
        segment_ids: documents of a packed row ``[B, T]``: a change of id resets the state, 0 is padding.
        chunk_size: tokens per chunk of the ``"xla"`` form; by default near the value that minimises the number of
            sequential steps, ``2 C + T / C``.
        implementation: ``"reference"``, ``"xla"``, ``"pallas"`` (GPU and TPU) or None (the best here).

    Returns:
        ``(h, state)``: all states ``[B, T, D]`` in the dtype of ``x`` (complex if the state is) and the last one ``[B, D]``
        in float32 (complex64; wider for wider inputs). ``h`` is 0 at padding.

    Raises:
        ValueError: shapes or dtypes do not fit, or not exactly one of ``log_decay`` and ``decay`` was given.
        NotImplementedError: ``implementation="pallas"`` where there is no kernel (the message says why).

    Example:
        >>> x = jnp.ones((1, 4, 1))
        >>> h, state = linear_recurrence(x, decay=jnp.full_like(x, 0.5))
        >>> h[0, :, 0].tolist()
        [1.0, 1.5, 1.75, 1.875]
    """
    if (log_decay is None) == (decay is None):
        given = "neither" if decay is None else "both"
        raise ValueError(f"{OP}: give exactly one of `log_decay` and `decay`; got {given}")
    sizes = check_shapes(
        OP,
        {
            "x": (x, "B T D"),
            "log_decay": (log_decay, "B T D"),
            "decay": (decay, "B T D"),
            "initial_state": (initial_state, "B D"),
            "segment_ids": (segment_ids, "B T"),
        },
    )
    check_floating(OP, {"x": x, "decay": decay, "initial_state": initial_state}, allow_complex=True)
    check_floating(OP, {"log_decay": log_decay})
    check_segment_ids(OP, segment_ids)
    check_chunk_size(OP, chunk_size)
    dtype = state_dtype(x, log_decay, decay, initial_state)
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    output_dtype = dtype if is_complex else x.dtype
    x = x.astype(output_dtype)
    if initial_state is None:
        initial_state = jnp.zeros((sizes["B"], sizes["D"]), dtype)
    initial_state = initial_state.astype(dtype)
    segments = None if segment_ids is None else segment_info(segment_ids)
    if log_decay is not None and is_complex:
        log_decay = log_decay if segments is None else clear_padding(segments.real, log_decay)
        log_decay, decay = None, jnp.exp(log_decay).astype(dtype)
    gate = cast(Array, decay if log_decay is None else log_decay)
    refusal = kernel.refusal(x, gate) if sizes["T"] > 1 else "is for more than one token"
    form = resolve_implementation(OP, implementation, refusal, preferred=kernel.is_preferred())
    if form == "pallas":
        return _pallas(gate, x, initial_state, segments, log=decay is None)
    if segments is not None:
        x, gate = clear_padding(segments.real, x), clear_padding(segments.real, gate, 0.0 if decay is None else 1.0)
    if sizes["T"] == 0:
        return x, initial_state
    log = decay is None
    if form == "reference" or is_complex or _loops.platform() != "gpu":
        # The loops over tokens find arrays of the state's dtype. On a GPU they widen what they read, for fewer bytes, if it is real.
        gate = (jnp.exp(gate.astype(dtype)) if log else gate).astype(dtype)
        x, log = x.astype(dtype), False
    if form == "reference":
        h, state = _reference(gate, x, initial_state, segments)
    else:
        if segments is not None:
            gate = jnp.where(segments.start[..., None], -jnp.inf if log else 0, gate)
        h, state = chunked_recurrence(gate, x, initial_state, chunk_size, log=log)
    if segments is not None:
        h = clear_padding(segments.real, h)
    return h.astype(output_dtype), state


def _pallas(
    gate: Array, x: Array, initial_state: Array, segments: Segments | None, *, log: bool
) -> tuple[Array, Array]:
    """The kernel, which looks at the kind of a token instead of at cleared arrays: a pass over the data less."""
    h, state = per_device(
        functools.partial(kernel.linear_recurrence, log=log),
        (gate, x, initial_state, token_kinds(segments)),
        ("B T D", "B T D", "B D", "B T"),
        ("B T D", "B D"),
    )
    return h if segments is None else clear_padding(segments.real, h), state


def _reference(a: Array, x: Array, initial_state: Array, segments: Segments | None) -> tuple[Array, Array]:
    """One step per token, as the equation reads."""
    if segments is None:
        real, start = jnp.ones(x.shape[:2], bool), jnp.zeros(x.shape[:2], bool)
    else:
        real, start = segments.real, segments.start

    def step(h, token):
        a_t, x_t, real_t, start_t = token
        carried = jnp.where(start_t[:, None], 0, a_t * h)
        h = jnp.where(real_t[:, None], carried + x_t, h)
        return h, h

    time_major = jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), (a, x, real, start))
    state, h = jax.lax.scan(step, initial_state, time_major)
    return jnp.swapaxes(h, 0, 1), state


def default_chunk_size(time: int) -> int:
    """Power of two near ``sqrt(T / 2)``, where ``2 C + T / C`` sequential steps are fewest; short rows are one chunk."""
    return time if time <= 16 else 2 ** round(math.log2(time / 2) / 2)


def chunked_recurrence(
    gate: Inexact[Array, "B T D"],
    x: Inexact[Array, "B T D"],
    initial_state: Inexact[Array, "B D"],
    chunk_size: int | None = None,
    *,
    log: bool,
) -> tuple[Inexact[Array, "B T D"], Inexact[Array, "B D"]]:
    """The chunked form for any ``T >= 1``, with ``gate`` the decays or their logarithms; states in the dtype of ``x``, the last in its own."""
    batch, time, dim = x.shape
    chunk = min(time, chunk_size or default_chunk_size(time))
    extra = -time % chunk
    if extra:
        # Tokens that neither decay nor write: the final state is still that of the last real token.
        gate = jnp.pad(gate, ((0, 0), (0, extra), (0, 0)), constant_values=0 if log else 1)
        x = jnp.pad(x, ((0, 0), (0, extra), (0, 0)))
    shape = (batch, (time + extra) // chunk, chunk, dim)
    h, state = _chunks(gate.reshape(shape), x.reshape(shape), initial_state, log)
    return h.reshape(batch, time + extra, dim)[:, :time], state


class _Residuals(NamedTuple):
    gate: Array  # [B, n, C, D]
    h: Array  # [B, n, C, D]
    chunk_start: Array  # [B, n, D], the state before each chunk
    chunk_decay: Array | None  # [B, n, D], product of a chunk's decays


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chunks(gate: Array, x: Array, initial_state: Array, log: bool) -> tuple[Array, Array]:
    """States [B, n, C, D] and the last one [B, D]."""
    return _chunks_forward(gate, x, initial_state, log)[0]


def _tokens(array: Array, dtype: jnp.dtype, *, log: bool = False) -> Callable[[Array | int], Array]:
    """i -> token i of every chunk in that dtype, exp of it if ``log``: [B, n, C, D] -> [B, n, D]. Slices in place: moving time to the front
    copies the array.
    """

    def token(i: Array | int) -> Array:
        found = jax.lax.dynamic_index_in_dim(array, i, axis=2, keepdims=False).astype(dtype)
        return jnp.exp(found) if log else found

    return token


def _put(array: Array, token: Array, i: Array | int) -> Array:
    """With that token in the place of token i of every chunk."""
    return jax.lax.dynamic_update_index_in_dim(array, token.astype(array.dtype), i, axis=2)


def _chunks_forward(gate, x, initial_state, log):
    chunks, chunk = gate.shape[1:3]
    dtype = initial_state.dtype
    a_token, x_token = _tokens(gate, dtype, log=log), _tokens(x, dtype)
    if chunks == 1:
        chunk_start, chunk_decay = initial_state[:, None], None
    else:

        def summarise(i, carry):
            product, h = carry
            a = a_token(i)
            return product * a, a * h + x_token(i)

        first = a_token(0), x_token(0)
        chunk_decay, added = jax.lax.fori_loop(1, chunk, summarise, first, unroll=_loops.unroll())
        chunk_start = _scan_chunks(chunk_decay, added, initial_state)

    def step(i, carry):
        h, output = carry
        h = a_token(i) * h + x_token(i)
        return h, _put(output, h, i)

    last, h = jax.lax.fori_loop(0, chunk, step, (chunk_start, jnp.zeros_like(x)), unroll=_loops.unroll())
    h, final, chunk_start, chunk_decay = keep((h, last[:, -1], chunk_start, chunk_decay))
    return (h, final), _Residuals(gate, h, chunk_start, chunk_decay)


def _scan_chunks(decay: Array, added: Array, initial: Array, *, reverse: bool = False) -> Array:
    """State before each chunk [B, n, D] (after it, in reverse) from what each chunk decays and adds."""

    def step(h, chunk):
        return chunk[0] * h + chunk[1], h

    steps = jnp.swapaxes(decay, 0, 1), jnp.swapaxes(added, 0, 1)
    _, before = jax.lax.scan(step, initial, steps, reverse=reverse, unroll=_loops.unroll())
    return jnp.swapaxes(before, 0, 1)


def _chunks_backward(log, residuals, cotangents):
    r"""Same recurrence reversed, :math:`\lambda_t = dh_t + \mu_t`, :math:`\mu_{t-1} = a_t \lambda_t`, :math:`da_t = h_{t-1}\lambda_t`, that
    of its logarithm times :math:`a_t`.

    JAX's complex cotangents transpose without conjugation, so real and complex read the same.
    """
    gate, h, chunk_start, chunk_decay = residuals
    d_h, d_state = cotangents
    chunks, chunk = gate.shape[1:3]
    dtype = d_state.dtype
    a_token, h_token, d_h_token = _tokens(gate, dtype, log=log), _tokens(h, dtype), _tokens(d_h, dtype)
    if chunks == 1:
        mu = d_state[:, None]
    else:

        def summarise(j, mu):
            i = chunk - 1 - j
            return a_token(i) * (d_h_token(i) + mu)

        last = a_token(chunk - 1) * d_h_token(chunk - 1)
        added = jax.lax.fori_loop(1, chunk, summarise, last, unroll=_loops.unroll())
        mu = _scan_chunks(chunk_decay, added, d_state, reverse=True)

    def step(j, carry):
        mu, d_gate, d_x = carry
        i = chunk - 1 - j
        lam = d_h_token(i) + mu
        previous = jnp.where(i > 0, h_token(jnp.maximum(i - 1, 0)), chunk_start)
        before = a_token(i) * lam
        return before, _put(d_gate, previous * (before if log else lam), i), _put(d_x, lam, i)

    carry = mu, jnp.zeros_like(gate), jnp.zeros_like(h)
    mu, d_gate, d_x = jax.lax.fori_loop(0, chunk, step, carry, unroll=_loops.unroll())
    return d_gate, d_x, mu[:, 0]


_chunks.defvjp(_chunks_forward, _chunks_backward)
