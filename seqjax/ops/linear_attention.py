"""Linear attention with no, scalar or per-channel decay: one matrix state per head, written by outer products."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import linear_attention as kernel
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
    write,
)
from seqjax.ops._dispatch import Implementation, resolve_implementation
from seqjax.ops._mesh import per_device
from seqjax.ops._segments import token_kinds


def linear_attention(
    query: Float[Array, "B T G K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,   o_t = scale * S_t^T q_t.

    Token t reads its own write. No decay is linear attention, a constant one RetNet, a scalar one Mamba-2, one per channel GLA.

    Args:
        query: H a multiple of G; query/key head ``g`` serves value heads ``g*H/G .. (g+1)*H/G - 1``.
        key: as query.
        value: its dtype and those of query and key decide the dtype of the output.
        log_decay: g <= 0, per head or per key channel (-inf included); None is 0.
        scale: factor on the reads; None is ``K ** -0.5``.
        initial_state: state before the first token, continued by the first document of a row; None is zeros.
        segment_ids: documents numbered from 1; a change resets the state, 0 is padding (absent, its output is 0).
        chunk_size: tokens per chunk of the fast form, rounded up to a power of two; None is 64, on a CPU 32 for decays per
            channel. No effect on the result.
        implementation: None picks; "reference" is one step per token, "xla" the chunked form, "pallas" a kernel. A single token is always one step.

    Returns:
        (output [B, T, H, V] in the inputs' dtype, final state [B, H, K, V] in float32; float64 for float64 inputs).
        Operands of matmuls have the inputs' dtype, sums float32; decays, states are float32, and float32 inputs
        ask accelerators for full float32 products. Differentiable in both modes, in every array, through both results; the
        backward pass recomputes inside groups of chunks and keeps only the state at the start of each group.

    Raises:
        ValueError: shapes disagree, G does not divide H, T is 0, a bad ``chunk_size``, ``implementation`` or segment dtype.
        NotImplementedError: ``implementation="pallas"`` and there is no kernel (the message says why).

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 3, 1, 1))
        >>> output, state = linear_attention(x, x, x, jnp.log(jnp.full((1, 3, 1), 0.5)))
        >>> output[0, :, 0, 0].tolist(), state.item()
        ([1.0, 1.5, 1.75], 1.75)

    Reference: Katharopoulos et al. (arXiv 2006.16236); RetNet (2307.08621); Mamba-2 (2405.21060, section 6); GLA (2312.06635,
    section 4).
    """
    op = "linear_attention"
    per_channel = decay_shape(log_decay) == "B T H K"
    call = check_call(
        op,
        query,
        key,
        value,
        {"log_decay": (log_decay, decay_shape(log_decay))},
        scale=scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        default_chunk_size=32 if per_channel and _loops.platform() == "cpu" else CHUNK_SIZE,
    )
    refusal = kernel.refusal(query, key, value, log_decay) if query.shape[1] > 1 else "is for more than one token"
    form = resolve_implementation(op, implementation, refusal, preferred=kernel.is_preferred())
    if form == "pallas":
        return _pallas(query, key, value, log_decay, call)
    if form == "reference" or query.shape[1] == 1:
        return _reference(*call.tokens, call.state, call.starts, call.scale)
    return _chunked(*call.tokens, call.state, call.documents, call.scale, chunk_size=call.chunk_size)


def _pallas(query, key, value, log_decay, call: Call):
    """The kernel, which looks at the kind of a token instead of at cleared arrays: a pass over the data less."""
    scale = call.scale
    if not isinstance(scale, int | float):
        query, scale = (scale * query).astype(query.dtype), 1.0
    output, state = per_device(
        functools.partial(kernel.linear_attention, scale=scale),
        (query, key, value, log_decay, call.state, token_kinds(call.segments)),
        ("B T G K", "B T G K", "B T H V", decay_shape(log_decay), "B H K V", "B T"),
        ("B T H V", "B H K V"),
    )
    return output if call.segments is None else clear_padding(call.segments.real, output)[0], state


def _step(state, token):
    """One token: state [B, G, R, K, V], query and key [B, G, 1, K], value [B, G, R, V], log decay [B, G, R, 1 or K]."""
    q, k, v, g, start = token
    if start is not None:
        state = jnp.where(start[:, None, None, None, None], 0, state)
    if g is not None:
        state = jnp.exp(g)[..., None] * state
    state = state + k[..., None] * v[..., None, :]
    return state, read_token(state, q)


@jax.jit
def _reference(query, key, value, log_decay, initial_state, starts, scale):
    """The definition: one token after another in the state's dtype."""
    return scan_tokens(_step, initial_state, (query, key, value, log_decay), starts, query.shape[2], scale)


@functools.partial(jax.jit, static_argnames="chunk_size")
def _chunked(query, key, value, log_decay, initial_state, documents, scale, *, chunk_size):
    """Unrolled from the state S before a chunk, with G_i = g_1 + .. + g_i:

    S_i = e^{G_i} S + sum_{j<=i} e^{G_i - G_j} k_j v_j^T
    o_i = e^{G_i} q_i S + sum_{j<=i} A_ij v_j,    A_ij = sum_c q_ic k_jc e^{G_ic - G_jc}
    """
    dtype = jnp.result_type(query, key, value)

    def body(state, chunks: Chunks):
        q, k, v, g = chunks.tokens
        (scores,), decays = decayed_scores((q,), k, g, chunks.documents, dtype)
        writes = write(k, decays.to_end, v, dtype)
        across = jnp.broadcast_to(decays.across, writes.shape[:-2] + decays.across.shape[-2:])

        def advance(state, chunk):
            across, writes = chunk
            return across * state + writes, state.astype(dtype)

        state, states = jax.lax.scan(advance, state, (across, writes), unroll=_loops.unroll())
        return state, (
            scale * (read(q, decays.from_start, states, dtype) + product("...ij,...jv->...iv", scores, v, dtype))
        ).astype(dtype)

    return scan_chunks(body, initial_state, (query, key, value, log_decay), documents, query.shape[2], chunk_size)
