"""S' = diag(exp(g_t)) S_{t-1}, S_t = S' + beta_t k_t (v_t - S'^T k_t)^T, o_t = scale * S_t^T q_t.

Per chunk a triangular matrix of the overlaps of its keys is inverted, independently of the state; what is left is a walk like that of
linear attention. A forward pass that will be differentiated also writes the state before every chunk and that inverse.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import _matrix, _target
from pallas_kernels._matrix import GpuDecays, Static, TpuDecays, flat
from pallas_kernels._tokens import ORDINARY, PADDING, START, of_tokens

__all__ = ["MEASURED", "ORDINARY", "PADDING", "START", "delta_rule", "is_preferred", "refusal"]

MEASURED: frozenset[str] = frozenset()
"""Platforms on which a device has confirmed the kernel's results and found it faster than the XLA form."""


def delta_rule(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None,
    initial_state: jax.Array,
    kind: jax.Array | None = None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """The chunked delta rule.

    Args:
        query: [B, T, G, K]; G divides H, query/key head g serves value heads g*H/G .. (g+1)*H/G - 1.
        key: [B, T, G, K].
        value: [B, T, H, V], of the dtype of query and key: float32 or bfloat16.
        beta: [B, T, H].
        log_decay: [B, T, H] or, per key channel, [B, T, H, K], at most 0 (-inf included); None is 0.
        initial_state: [B, H, K, V] float32.
        kind: [B, T] int32 of START, ORDINARY, PADDING; None is all ORDINARY. Padding may hold anything, NaN included; the output
            there is unspecified and its cotangent is taken to be 0: mask it.
        scale: factor on the reads.

    Returns:
        (output [B, T, H, V] in value's dtype, final state [B, H, K, V] float32). Differentiable in every array, through both results.

    Raises:
        NotImplementedError: ``refusal`` has something to say.
    """
    if (reason := refusal(query, key, value, log_decay)) is not None:
        raise NotImplementedError(f"delta_rule: the kernel {reason}")
    call = _matrix.static(query, value, scale)
    steps = beta.astype(jnp.float32)
    output, final = _delta(flat(query), flat(key), flat(value), steps, log_decay, initial_state, kind, call)
    return output.reshape(value.shape), final


def refusal(query: jax.Array, key: jax.Array, value: jax.Array, log_decay: jax.Array | None) -> str | None:
    """Why there is no kernel for this call where it is traced, or None."""
    return _matrix.refusal("delta_rule", query, key, value, log_decay, gpu_channels=False)


def is_preferred() -> bool:
    """Whether the kernel is the one to take where it runs, as far as that was measured."""
    return _target.target().platform in MEASURED


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _delta(query, key, value, beta, log_decay, state, kind, call: Static):
    return _run(query, key, value, beta, log_decay, state, kind, call, save=False)[:2]


def _real_steps(beta: jax.Array, kind: jax.Array | None) -> jax.Array:
    """beta without what padding holds."""
    return beta if kind is None else jnp.where(kind[..., None] == PADDING, 1.0, beta)


def _run(query, key, value, beta, log_decay, state, kind, call: Static, *, save: bool):
    state, steps = state.astype(jnp.float32), _real_steps(beta, kind)
    if call.target.platform == "gpu":
        from pallas_kernels.delta_rule import gpu

        decays = GpuDecays(call, log_decay, kind)
        tokens = decays.heads(query, key, value)
        with decays.interpreter():
            output, final, saved = gpu.forward(
                *tokens, steps, decays.log_decay, state, *decays.documents, save=save, **decays.options
            )
        return flat(output), final, saved
    from pallas_kernels.delta_rule import tpu

    decays = TpuDecays("delta_rule", call, log_decay, kind, steps)
    return tpu.forward(query, key, value, decays.gates, decays.rows, state, save=save, **decays.options)


def _forward(query, key, value, beta, log_decay, state, kind, call):
    output, final, saved = _run(query, key, value, beta, log_decay, state, kind, call, save=True)
    return (output, final), (query, key, value, beta, log_decay, kind, saved)


def _backward(call, residuals, cotangents):
    query, key, value, beta, log_decay, kind, saved = residuals
    dout, dfinal = cotangents
    steps = _real_steps(beta, kind)
    if call.target.platform == "gpu":
        from pallas_kernels.delta_rule import gpu

        decays = GpuDecays(call, log_decay, kind)
        tokens = decays.heads(query, key, value)
        with decays.interpreter():
            *gradients, dbeta, dlog_decay, dstate = gpu.backward(
                *tokens,
                steps,
                decays.log_decay,
                *decays.documents,
                saved,
                dout.reshape(call.value_shape),
                dfinal,
                **decays.options,
            )
        return *map(flat, gradients), dbeta, decays.gradient(dlog_decay), dstate, None
    from pallas_kernels.delta_rule import tpu

    decays = TpuDecays("delta_rule", call, log_decay, kind, steps)
    *gradients, dstate, dbeta, dgates = tpu.backward(
        query, key, value, decays.gates, decays.rows, saved, dout, dfinal, **decays.options
    )
    return *gradients, of_tokens(dbeta, query.shape[1]), decays.gradient(dgates), dstate, None


_delta.defvjp(_forward, _backward)
