"""JAX's own TPU kernel for self-attention (splash attention): what it can run, and the call."""

import jax
import jax.numpy as jnp

LANES = 128


def refusal(query: jax.Array, key: jax.Array, value: jax.Array, plain: bool) -> str | None:
    """Why the kernel cannot run here, or None. ``plain``: self-attention without explicit positions or prefix."""
    if jax.default_backend() != "tpu":
        return f"is JAX's TPU kernel and the backend is {jax.default_backend()!r}"
    if not plain:
        return "takes self-attention without positions, prefix or cache"
    return unsupported_shape(query, key, value)


def unsupported_shape(query: jax.Array, key: jax.Array, value: jax.Array) -> str | None:
    """Why the kernel's tiles do not fit the shapes, or None."""
    time, width = query.shape[1], query.shape[3]
    if time % LANES or width % LANES or value.shape[3] != width or key.shape[1] != time:
        return f"needs T and K == V divisible by {LANES}; got T={time}, K={width}, V={value.shape[3]}"
    return None


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: float,
    window: int | None,
    segment_ids: jax.Array | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Causal or sliding-window attention [B, T, H, K] by the splash kernel, grouped heads included."""
    # Imported here: Pallas' TPU modules cost a second that no CPU or GPU user should pay.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    batch, time, heads, width = query.shape
    groups = key.shape[2]
    one = masks.CausalMask((time, time)) if window is None else masks.LocalMask((time, time), (window - 1, 0), 0)
    block = next(size for size in (512, 384, 256, 128) if time % size == 0)
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    run = kernel.make_splash_mqa_single_device(
        masks.MultiHeadMask([one] * (heads // groups)), block_sizes=sizes, interpret=interpret
    )
    grouped = (query * jnp.asarray(scale, query.dtype)).reshape(batch, time, groups, heads // groups, width)
    arrays = (grouped.transpose(0, 2, 3, 1, 4), key.swapaxes(1, 2), value.swapaxes(1, 2))
    if segment_ids is None:
        output = jax.vmap(jax.vmap(run))(*arrays)
    else:
        ids = kernel.SegmentIds(segment_ids, segment_ids)
        output = jax.vmap(jax.vmap(run, in_axes=(0, 0, 0, None)))(*arrays, ids)
    output = output.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, width)
    if segment_ids is not None:
        # Padding is a document of its own to the kernel.
        output = jnp.where((segment_ids != 0)[..., None, None], output, 0)
    return output.astype(query.dtype)
