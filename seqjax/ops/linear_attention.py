"""Linear attention with no, scalar or per-channel decay: one matrix state per head, written by outer products."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqjax.ops._chunks import clear_padding, split_heads, state_dtype
from seqjax.ops._dispatch import Implementation, check_segment_ids, check_shapes, resolve_implementation
from seqjax.ops._segments import segment_info


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
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,   o_t = scale * S_t^T q_t   (token t reads its own write)."""
    groups, documents, initial_state, scale = _check(
        query, key, value, log_decay, scale, initial_state, segment_ids, chunk_size
    )
    if segment_ids is not None:
        query, key, value, log_decay = clear_padding(segment_ids != 0, query, key, value, log_decay)
    resolve_implementation("linear_attention", implementation)
    return _reference(query, key, value, log_decay, initial_state, documents, scale)


def _check(query, key, value, log_decay, scale, initial_state, segment_ids, chunk_size):
    op = "linear_attention"
    sizes = check_shapes(
        op,
        {
            "query": (query, "B T G K"),
            "key": (key, "B T G K"),
            "value": (value, "B T H V"),
            "log_decay": (log_decay, "B T H" if log_decay is None or log_decay.ndim == 3 else "B T H K"),
            "initial_state": (initial_state, "B H K V"),
            "segment_ids": (segment_ids, "B T"),
        },
    )
    check_segment_ids(op, segment_ids)
    if initial_state is None:
        initial_state = jnp.zeros([sizes[s] for s in "BHKV"], state_dtype(query, key, value))
    if segment_ids is None:
        starts = None
    else:
        starts = segment_info(segment_ids).start
    return sizes["G"], starts, initial_state, sizes["K"] ** -0.5 if scale is None else scale


@jax.jit
def _reference(query, key, value, log_decay, initial_state, starts, scale):
    """The definition: one token after another, every state in float32."""
    dtype = state_dtype(query, key, value)
    groups = query.shape[2]
    q, k, v = (split_heads(x, groups).astype(dtype) for x in (query, key, value))
    g = jnp.zeros(value.shape[:3], dtype) if log_decay is None else log_decay.astype(dtype)
    g = split_heads(g, groups)
    g = g[..., None] if g.ndim == 4 else g  # [B, T, G, R, 1 or K]
    starts = jnp.zeros(value.shape[:2], bool) if starts is None else starts

    def step(state, token):
        q, k, v, g, start = token
        state = jnp.where(start[:, None, None, None, None], 0, state)
        state = jnp.exp(g)[..., None] * state + k[..., None] * v[..., None, :]
        return state, scale * jnp.sum(q[..., None] * state, axis=-2)

    tokens = jax.tree.map(functools.partial(jnp.moveaxis, source=1, destination=0), (q, k, v, g, starts))
    state, output = jax.lax.scan(step, split_heads(initial_state.astype(dtype), groups, axis=1), tokens)
    output = jnp.moveaxis(output, 0, 1).reshape(value.shape)
    return output.astype(jnp.result_type(query, key, value)), state.reshape(initial_state.shape)
