r"""Selective scan: the diagonal state-space recurrence of Mamba.

.. math::
    h_t = e^{\Delta_t A} \circ h_{t-1} + (\Delta_t x_t)\, B_t^\top, \qquad y_t = h_t C_t

per channel d and state n: :math:`h_{dn}`, with :math:`A` fixed and :math:`\Delta, B, C` functions of the token (arXiv:2312.00752,
algorithm 2, with the Euler rule for B that its code uses). The skip ``D x`` and the gate belong to the layer.

Forms: ``"reference"`` is one step per token. ``"xla"`` scans over chunks; a chunk's decays and states, ``[B, C, D, N]``, exist
only while it runs, forward and backward. What is kept for the backward is the inputs and the state before each chunk.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqjax.ops._dispatch import (
    check_chunk_size,
    check_floating,
    check_segment_ids,
    check_shapes,
    resolve_implementation,
    state_dtype,
)
from seqjax.ops._segments import clear_padding, segment_info
from seqjax.ops.linear_recurrence import chunked_recurrence

OP = "selective_scan"
CHUNK = 64


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
        implementation: ``"reference"``, ``"xla"`` or None (the best here).

    Returns:
        ``(y, state)``: outputs ``[B, T, D]`` in the dtype of ``x``, 0 at padding, and the last state ``[B, D, N]`` in float32.

    Raises:
        ValueError: shapes or dtypes do not fit.
        NotImplementedError: ``implementation="pallas"`` where there is no kernel.

    Example:
        >>> one = jnp.ones((1, 3, 1))
        >>> y, state = selective_scan(one, one, jnp.log(jnp.full((1, 1), 0.5)), one, one)
        >>> y[0, :, 0].tolist()
        [1.0, 1.5, 1.75]
    """
    form = resolve_implementation(OP, implementation)
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
    if sizes["T"] == 0:
        return x, initial_state
    output_dtype, A = x.dtype, A.astype(dtype)
    start = None
    if segment_ids is not None:
        # A step of size 0 neither decays nor writes, so cleared padding needs no further care.
        real, start, _ = segment_info(segment_ids)
        x, delta, B, C = (clear_padding(real, array) for array in (x, delta, B, C))
    if form == "reference":
        y, state = _reference(x, delta, A, B, C, initial_state, start)
    else:
        y, state = _chunked(x, delta, A, B, C, initial_state, start, chunk_size or CHUNK)
    if segment_ids is not None:
        y = clear_padding(real, y)
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


def _chunked(x, delta, A, B, C, initial_state, start, chunk_size) -> tuple[Array, Array]:
    """Outer scan over chunks, recomputed in the backward; inside a chunk, the elementwise recurrence over N * D channels."""
    batch, time, dim = x.shape
    states = A.shape[1]
    dtype = initial_state.dtype
    chunk = min(chunk_size, time)
    extra = -time % chunk

    def split(array):
        """[B, T, ...] -> [T/C, B, C, ...]; the tokens added at the end have step size 0."""
        array = jnp.pad(array, ((0, 0), (0, extra)) + ((0, 0),) * (array.ndim - 2))
        return jnp.swapaxes(array.reshape(batch, -1, chunk, *array.shape[2:]), 0, 1)

    # N before D: reductions over N then run along whole vector registers, D being several times larger.
    rates = A.T

    def body(h, tokens):
        x_c, delta_c, B_c, C_c = (array.astype(dtype) for array in tokens[:4])
        decay = jnp.exp(delta_c[:, :, None, :] * rates)  # [B, C, N, D]
        if len(tokens) == 5:
            decay = jnp.where(tokens[4][:, :, None, None], 0, decay)
        write = (delta_c * x_c)[:, :, None, :] * B_c[..., None]
        flat = (batch, chunk, states * dim)
        h_c, h = chunked_recurrence(decay.reshape(flat), write.reshape(flat), h)
        return h, jnp.einsum("btnd,btn->btd", h_c.reshape(decay.shape), C_c)

    tokens = tuple(split(array) for array in (x, delta, B, C) + (() if start is None else (start,)))
    flat_state = jnp.swapaxes(initial_state, 1, 2).reshape(batch, states * dim)
    state, y = jax.lax.scan(jax.checkpoint(body), flat_state, tokens)
    y = jnp.swapaxes(y, 0, 1).reshape(batch, time + extra, dim)[:, :time]
    return y, jnp.swapaxes(state.reshape(batch, states, dim), 1, 2)
