"""The delta rule with no, scalar or per-channel decay: DeltaNet, Gated DeltaNet and Kimi Delta Attention are one recurrence."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import delta_rule as kernel
from seqjax.ops import _loops
from seqjax.ops._chunks import (
    CHUNK_SIZE,
    Call,
    Chunks,
    check_call,
    clear_padding,
    decay_shape,
    decayed_scores,
    product,
    read,
    read_token,
    scan_chunks,
    scan_tokens,
    transpose,
    write,
)
from seqjax.ops._dispatch import Implementation, resolve_implementation
from seqjax.ops._mesh import per_device
from seqjax.ops._segments import token_kinds
from seqjax.ops._triangular import unit_lower_inverse


def delta_rule(
    query: Float[Array, "B T G K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """S' = diag(exp(g_t)) S_{t-1},   S_t = S' + beta_t k_t (v_t - S'^T k_t)^T,   o_t = scale * S_t^T q_t.

    The value stored under k_t moves by beta_t towards v_t. Token t reads its own write. No decay is DeltaNet, a scalar one
    Gated DeltaNet, one per channel Kimi Delta Attention. Keys are used as given: it contracts for 0 <= beta_t |k_t|^2 <= 2.

    Args:
        query: H a multiple of G; query/key head ``g`` serves value heads ``g*H/G .. (g+1)*H/G - 1``.
        key: as query.
        value: its dtype and those of query and key decide the dtype of the output.
        beta: step size.
        log_decay: g <= 0, per head or per key channel (-inf included); None is 0.
        scale: factor on the reads; None is ``K ** -0.5``.
        initial_state: state before the first token, continued by the first document of a row; None is zeros.
        segment_ids: documents numbered from 1; a change resets the state, 0 is padding (absent, its output is 0).
        chunk_size: tokens per chunk of the fast form, rounded up to a power of two; None is 64, on a CPU 32. No effect on
            the result.
        implementation: None picks; "reference" is one step per token, "xla" the chunked form, "pallas" a kernel. A single token is always one step.

    Returns:
        (output [B, T, H, V] in the inputs' dtype, final state [B, H, K, V] in float32; float64 for float64 inputs).
        Operands of matmuls have the inputs' dtype, sums float32; decays, states and the triangular inverse are float32, and float32 inputs
        ask accelerators for full float32 products. Differentiable in both modes, in every array, through both results; the
        backward pass recomputes inside groups of chunks and keeps only the state at the start of each group.

    Raises:
        ValueError: shapes disagree, G does not divide H, T is 0, a bad ``chunk_size``, ``implementation`` or segment dtype.
        NotImplementedError: ``implementation="pallas"`` and there is no kernel (the message says why).

    Example:
        >>> import jax.numpy as jnp
        >>> key, beta = jnp.eye(2).reshape(1, 2, 1, 2), jnp.ones((1, 2, 1))
        >>> output, state = delta_rule(key, key, jnp.array([[[[3.0]], [[5.0]]]]), beta, scale=1.0)
        >>> output[0, :, 0, 0].tolist(), state[0, 0, :, 0].tolist()
        ([3.0, 5.0], [3.0, 5.0])

    Reference: DeltaNet (arXiv 2406.06484, section 3); Gated DeltaNet (2412.06464, eq. 10); KDA (2510.26692).
    """
    op = "delta_rule"
    call = check_call(
        op,
        query,
        key,
        value,
        {"beta": (beta, "B T H"), "log_decay": (log_decay, decay_shape(log_decay))},
        scale=scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        default_chunk_size=32 if _loops.platform() == "cpu" else CHUNK_SIZE,
    )
    refusal = kernel.refusal(query, key, value, log_decay) if query.shape[1] > 1 else "is for more than one token"
    form = resolve_implementation(op, implementation, refusal, preferred=kernel.is_preferred())
    if form == "pallas":
        return _pallas(query, key, value, beta, log_decay, call)
    if form == "reference" or query.shape[1] == 1:
        return _reference(*call.tokens, call.state, call.starts, call.scale)
    return _chunked(*call.tokens, call.state, call.documents, call.scale, chunk_size=call.chunk_size)


def _pallas(query, key, value, beta, log_decay, call: Call):
    """The kernel, which looks at the kind of a token instead of at cleared arrays: a pass over the data less."""
    scale = call.scale
    if not isinstance(scale, int | float):
        query, scale = (scale * query).astype(query.dtype), 1.0
    output, state = per_device(
        functools.partial(kernel.delta_rule, scale=scale),
        (query, key, value, beta, log_decay, call.state, token_kinds(call.segments)),
        ("B T G K", "B T G K", "B T H V", "B T H", decay_shape(log_decay), "B H K V", "B T"),
        ("B T H V", "B H K V"),
    )
    return output if call.segments is None else clear_padding(call.segments.real, output)[0], state


def _step(state, token):
    """One token: state [B, G, R, K, V], query and key [B, G, 1, K], value [B, G, R, V], beta [B, G, R], log decay [B, G, R, 1 or K]."""
    q, k, v, b, g, start = token
    if start is not None:
        state = jnp.where(start[:, None, None, None, None], 0, state)
    if g is not None:
        state = jnp.exp(g)[..., None] * state
    error = v - read_token(state, k)
    state = state + k[..., None] * (b[..., None] * error)[..., None, :]
    return state, read_token(state, q)


@jax.jit
def _reference(query, key, value, beta, log_decay, initial_state, starts, scale):
    """The definition: one token after another in the state's dtype."""
    return scan_tokens(_step, initial_state, (query, key, value, beta, log_decay), starts, query.shape[2], scale)


@functools.partial(jax.jit, static_argnames="chunk_size")
def _chunked(query, key, value, beta, log_decay, initial_state, documents, scale, *, chunk_size):
    """The WY / UT form. Write the update as S_r = e^{g_r} S_{r-1} + k_r w_r^T, w_r = beta_r (v_r - (e^{g_r} S_{r-1})^T k_r).

    Unrolled from the state S before a chunk, with G_r = g_1 + .. + g_r:

        S_r = e^{G_r} S + sum_{i<=r} e^{G_r - G_i} k_i w_i^T
        w_r = beta_r (v_r - S^T (e^{G_r} k_r) - sum_{i<r} <k_r, e^{G_r - G_i} k_i> w_i)

    so with A_ri = beta_r <k_r, e^{G_r - G_i} k_i> for i < r and T = (I + A)^-1 diag(beta):

        W = T V - T (e^G K) S,    O = (e^G Q) S + tril(<q_r, e^{G_r - G_i} k_i>) W,    S <- e^{G_C} S + (e^{G_C - G} K)^T W

    Only the two products with S are sequential.
    """
    dtype = jnp.result_type(query, key, value)

    def body(state, chunks: Chunks):
        q, k, v, b, g = chunks.tokens
        (reads, overlaps), decays = decayed_scores((q, k), k, g, chunks.documents, dtype)
        solve = unit_lower_inverse(b[..., :, None] * overlaps) * b[..., None, :]  # T
        fresh = product("...ij,...jv->...iv", solve, v, dtype)  # T V
        if decays.from_start.shape[-1] == 1:
            stale = product("...ij,...jk->...ik", solve * transpose(decays.from_start), k, dtype)  # T (e^G K)
        else:
            stale = product("...ij,...jk->...ik", solve, decays.from_start * k, dtype)
        lead = fresh.shape[:-2]
        decays = decays._replace(
            to_end=jnp.broadcast_to(decays.to_end, lead + decays.to_end.shape[-2:]),
            across=jnp.broadcast_to(decays.across, lead + decays.across.shape[-2:]),
        )

        def advance(state, chunk):
            k, fresh, stale, to_end, across = chunk
            written = fresh - product("...ck,...kv->...cv", stale, state, dtype)  # W
            return across * state + write(k, to_end, written, dtype), (state.astype(dtype), written.astype(dtype))

        state, (states, written) = jax.lax.scan(
            advance, state, (k, fresh, stale, decays.to_end, decays.across), unroll=_loops.unroll()
        )
        return state, (
            scale * (read(q, decays.from_start, states, dtype) + product("...ij,...jv->...iv", reads, written, dtype))
        ).astype(dtype)

    return scan_chunks(body, initial_state, (query, key, value, beta, log_decay), documents, query.shape[2], chunk_size)
