r"""Selective scan: the diagonal state-space recurrence of Mamba.

.. math::
    h_t = e^{\Delta_t A} \circ h_{t-1} + (\Delta_t x_t)\, B_t^\top, \qquad y_t = h_t C_t

per channel d and state n: :math:`h_{dn}`, with :math:`A` fixed and :math:`\Delta, B, C` functions of the token (arXiv:2312.00752,
algorithm 2, with the Euler rule for B that its code uses). The skip ``D x`` and the gate belong to the layer.

Forms: ``"reference"`` is one step per token, differentiated by JAX. ``"xla"`` keeps the inputs and the state before each chunk; its
backward recomputes one chunk at a time, so no state per token ever exists for more than a chunk. Inside a chunk decays and writes
are computed at once (the exponential does not vectorise inside the loop) and the steps, a product and a sum each, are
sequential: on CPU, associative and two-pass chunked scans were slower; on a GPU they are compiled as one. ``"pallas"`` (``pallas_kernels.selective_scan``) walks over
time once with the states on chip and makes decays and writes there.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import selective_scan as kernel
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
from seqjax.ops._segments import clear_padding, segment_info, token_kinds

OP = "selective_scan"
CHUNK = 32
CHUNK_ON_GPU = 16
"""There all steps of a chunk are one kernel, with the states in registers between them: by bytes and launches, 32 takes half the time forward and
nearly as much backward, but more than twice the time to compile."""


def selective_scan(
    x: Float[Array, "B T D"],
    delta: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    *,
    initial_state: Float[Array, "B D N"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    r"""Run the recurrence over every token.

    Args:
        x: inputs ``[B, T, D]``.
        delta: step sizes :math:`\Delta \ge 0`, after softplus ``[B, T, D]``.
        A: continuous-time decay rates, negative ``[D, N]``.
        B: write vectors ``[B, T, N]``.
        C: read vectors ``[B, T, N]``.
        initial_state: state before the first token ``[B, D, N]``; zeros by default.
        segment_ids: documents of a packed row ``[B, T]``: a change of id resets the state, 0 is padding.
        chunk_size: tokens per chunk of the ``"xla"`` form; memory grows with it, the number of chunk states falls.
        implementation: ``"reference"``, ``"xla"``, ``"pallas"`` (GPU and TPU) or None (the best here).

    Returns:
        ``(y, state)``: outputs ``[B, T, D]`` in the dtype of ``x``, 0 at padding, and the last state ``[B, D, N]`` in float32.

    Raises:
        ValueError: shapes or dtypes do not fit.
        NotImplementedError: ``implementation="pallas"`` where there is no kernel (the message says why).

    Example:
        >>> one = jnp.ones((1, 3, 1))
        >>> y, state = selective_scan(one, one, jnp.log(jnp.full((1, 1), 0.5)), one, one)
        >>> y[0, :, 0].tolist()
        [1.0, 1.5, 1.75]
    """
    sizes = check_shapes(
        OP,
        {
            "x": (x, "B T D"),
            "delta": (delta, "B T D"),
            "A": (A, "D N"),
            "B": (B, "B T N"),
            "C": (C, "B T N"),
            "initial_state": (initial_state, "B D N"),
            "segment_ids": (segment_ids, "B T"),
        },
    )
    check_floating(OP, {"x": x, "delta": delta, "A": A, "B": B, "C": C, "initial_state": initial_state})
    check_segment_ids(OP, segment_ids)
    check_chunk_size(OP, chunk_size)
    dtype = state_dtype(x, delta, A, B, C, initial_state)
    if initial_state is None:
        initial_state = jnp.zeros((sizes["B"], sizes["D"], sizes["N"]), dtype)
    initial_state = initial_state.astype(dtype)
    refusal = kernel.refusal(x, delta, A, B, C) if sizes["T"] > 1 else "is for more than one token"
    form = resolve_implementation(OP, implementation, refusal, preferred=kernel.is_preferred())
    if sizes["T"] == 0:
        return x, initial_state
    output_dtype, A = x.dtype, A.astype(dtype)
    segments = None if segment_ids is None else segment_info(segment_ids)
    if form == "pallas":
        return per_device(
            kernel.selective_scan,
            (x, delta, A, B, C, initial_state, token_kinds(segments)),
            ("B T D", "B T D", "D N", "B T N", "B T N", "B D N", "B T"),
            ("B T D", "B D N"),
        )
    start = None
    if segments is not None:
        # A step of size 0 neither decays nor writes, so cleared padding needs no further care.
        real, start = segments.real, segments.start
        x, delta, B, C = (clear_padding(real, array) for array in (x, delta, B, C))
    if form == "reference":
        y, state = _reference(x, delta, A, B, C, initial_state, start)
    else:
        chunk = CHUNK_ON_GPU if _loops.platform() == "gpu" else CHUNK
        y, state = _chunked(x, delta, A, B, C, initial_state, start, chunk_size or chunk)
    if segments is not None:
        y = clear_padding(segments.real, y)
    return y.astype(output_dtype), state


def _reference(x, delta, A, B, C, initial_state, start) -> tuple[Array, Array]:
    """One step per token, as the equation reads."""
    if start is None:
        start = jnp.zeros(x.shape[:2], bool)

    def step(h, token):
        x_t, delta_t, B_t, C_t, start_t = token
        x_t, delta_t, B_t, C_t = (array.astype(h.dtype) for array in (x_t, delta_t, B_t, C_t))
        h = jnp.where(start_t[:, None, None], 0, h)
        h = jnp.exp(delta_t[..., None] * A) * h + (delta_t * x_t)[..., None] * B_t[:, None]
        return h, jnp.sum(h * C_t[:, None], axis=-1)

    time_major = jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), (x, delta, B, C, start))
    state, y = jax.lax.scan(step, initial_state, time_major)
    return jnp.swapaxes(y, 0, 1), state


class _Residuals(NamedTuple):
    inputs: tuple[Array, Array, Array, Array, Array, Array | None]
    chunk_start: Array  # [T/C, B, N, D], the state before each chunk


def _chunked(x, delta, A, B, C, initial_state, start, chunk_size) -> tuple[Array, Array]:
    """Pad to whole chunks and run; the tokens added at the end have step size 0."""
    time = x.shape[1]
    chunk = min(chunk_size, time)
    extra = -time % chunk
    if extra:
        pad = lambda array: jnp.pad(array, ((0, 0), (0, extra)) + ((0, 0),) * (array.ndim - 2))  # noqa: E731
        x, delta, B, C = (pad(array) for array in (x, delta, B, C))
        start = None if start is None else pad(start)
    # States are [N, D] inside: the last axis then fills vector registers, D being several times larger than N.
    y, state = _scan(chunk, x, delta, A.T, B, C, start, jnp.swapaxes(initial_state, 1, 2))
    return y[:, :time], jnp.swapaxes(state, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(chunk, x, delta, rates, B, C, start, state):
    """Outputs [B, T, D] in the state's dtype and the last state [B, N, D]."""
    return _scan_forward(chunk, x, delta, rates, B, C, start, state)[0]


def _split(array: Array, chunk: int) -> Array:
    """[B, T, ...] -> [T/C, C, B, ...]."""
    shape = (array.shape[0], -1, chunk, *array.shape[2:])
    return jnp.moveaxis(array.reshape(shape), 0, 2)


def _merge(array: Array, dtype: jnp.dtype) -> Array:
    """[T/C, C, B, ...] -> [B, T, ...]."""
    array = jnp.moveaxis(array, 2, 0)
    return array.reshape(array.shape[0], -1, *array.shape[3:]).astype(dtype)


def _widen(tokens: Any, dtype: jnp.dtype) -> Any:
    """One chunk's inputs in the state's dtype, so that half-precision rows are never widened as a whole."""
    return jax.tree.map(lambda array: array if array.dtype == bool else array.astype(dtype), tokens)


def _decay(delta: Array, rates: Array, start: Array | None) -> Array:
    """exp(delta A) of some tokens, 0 at resets: [..., D] -> [..., N, D]."""
    decay = jnp.exp(delta[..., None, :] * rates)
    return decay if start is None else jnp.where(start[..., None, None], 0, decay)


def _decays_and_writes(tokens, rates: Array) -> tuple[Array, Array]:
    """exp(delta A) and (delta x) B of a chunk [C, B, N, D]: outside the loop over tokens, where they vectorise."""
    x, delta, B, _, start = tokens
    return _decay(delta, rates, start), (delta * x)[:, :, None, :] * B[..., None]


# Sums over states or channels are full float32 products, also where matmuls round their operands by default.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def _sum(x: Array, axis: int) -> Array:
    """Sum over an axis in halves, as elementwise additions. As a product with batch d it would lay ``x`` out anew, and XLA's CPU backend
    (jaxlib 0.10) reduces beside an axis of size 1 without vector instructions.
    """
    while x.shape[axis] > 1 and x.shape[axis] % 2 == 0:
        first, second = jnp.split(x, 2, axis=axis)
        x = first + second
    return jnp.squeeze(x, axis) if x.shape[axis] == 1 else jnp.sum(x, axis=axis)


def _scan_tokens(step: Callable, carry: Array, tokens: Any, *, reverse: bool = False) -> tuple[Array, Any]:
    """Over the tokens of a chunk."""
    unroll = CHUNK_ON_GPU if _loops.platform() == "gpu" else 1
    return jax.lax.scan(step, carry, tokens, reverse=reverse, unroll=unroll)


def _scan_forward(chunk, x, delta, rates, B, C, start, state):
    def one_chunk(h, tokens):
        def step(h, token):
            decay, write = token
            h = decay * h + write
            return h, h

        tokens = _widen(tokens, h.dtype)
        last, states = _scan_tokens(step, h, _decays_and_writes(tokens, rates))
        return last, (h, _einsum("cbnd,cbn->cbd", states, tokens[3]))

    tokens = jax.tree.map(lambda array: _split(array, chunk), (x, delta, B, C, start))
    last, (chunk_start, y) = keep(jax.lax.scan(one_chunk, state, tokens))
    return (_merge(y, state.dtype), last), _Residuals((x, delta, rates, B, C, start), chunk_start)


def _scan_backward(chunk, residuals, cotangents):
    r"""Chunks in reverse: recompute a chunk's states, then :math:`\lambda_t = C_t\, dy_t + a_{t+1} \lambda_{t+1}`.

    With :math:`g = \lambda \circ a \circ h_{t-1}`, the gradient of the log decay: :math:`d\Delta = \sum_n (g A + \lambda B x)`,
    :math:`dA = \sum_t \Delta g`, :math:`dx = \Delta \sum_n \lambda B`, :math:`dB = \sum_d \lambda \Delta x`, :math:`dC = \sum_d h\, dy`.
    """
    (x, delta, rates, B, C, start), chunk_start = residuals
    d_y, d_state = cotangents

    def one_chunk(carry, inputs):
        mu, d_rates = carry
        h, tokens = inputs
        *tokens, d_y_c = _widen(tokens, h.dtype)
        x_c, delta_c, B_c, C_c, _ = tokens
        decay, write = _decays_and_writes(tokens, rates)

        def forward(h, token):
            decay_t, write_t = token
            return decay_t * h + write_t, h

        last, before = _scan_tokens(forward, h, (decay, write))  # before: [C, B, N, D]
        after = jnp.concatenate([before[1:], last[None]])

        def backward(mu, token):
            decay_t, read_t = token
            lam = mu + read_t
            return decay_t * lam, lam

        mu, lam = _scan_tokens(backward, mu, (decay, C_c[..., None] * d_y_c[:, :, None, :]), reverse=True)
        d_log_decay = lam * decay * before
        written = _einsum("cbnd,cbn->cbd", lam, B_c)
        d_tokens = (
            delta_c * written,
            _sum(d_log_decay * rates, axis=2) + x_c * written,
            _einsum("cbnd,cbd->cbn", lam, delta_c * x_c),
            _einsum("cbnd,cbd->cbn", after, d_y_c),
        )
        return (mu, d_rates + _sum(_sum(delta_c[:, :, None] * d_log_decay, axis=0), axis=0)), d_tokens

    tokens = jax.tree.map(lambda array: _split(array, chunk), (x, delta, B, C, start, d_y))
    carry = (d_state, jnp.zeros_like(rates))
    (mu, d_rates), d_tokens = jax.lax.scan(one_chunk, carry, (chunk_start, tokens), reverse=True)
    d_x, d_delta, d_B, d_C = (_merge(d, a.dtype) for d, a in zip(d_tokens, (x, delta, B, C)))
    return d_x, d_delta, d_rates, d_B, d_C, None, mu


_scan.defvjp(_scan_forward, _scan_backward)
