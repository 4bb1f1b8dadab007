"""S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T, o_t = scale * S_t^T q_t: one pass with the states on chip.

The forward kernel reads query, key and value once and writes the output; a forward pass that will be differentiated also writes the
state before every chunk of tokens, the only array besides inputs and outputs that grows with T. (On GPUs, decays per channel take a kernel
before this one, which turns query, key and decays into what it reads; it runs again in the backward pass.)
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _matrix, _split, _target
from pallas_kernels._matrix import GpuDecays, Static, TpuDecays, flat
from pallas_kernels._remat import keep
from pallas_kernels._tokens import ORDINARY, PADDING, START

__all__ = ["MEASURED", "ORDINARY", "PADDING", "START", "is_preferred", "linear_attention", "refusal"]

MEASURED: frozenset[str] = frozenset()
"""Platforms on which a device has confirmed the kernel's results and found it faster than the XLA form."""


def linear_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array | None,
    initial_state: jax.Array,
    kind: jax.Array | None = None,
    *,
    scale: float,
    parts: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Chunked linear attention.

    Args:
        query: [B, T, G, K]; G divides H, query/key head g serves value heads g*H/G .. (g+1)*H/G - 1.
        key: [B, T, G, K].
        value: [B, T, H, V], of the dtype of query and key: float32 or bfloat16.
        log_decay: [B, T, H] or, per key channel, [B, T, H, K], at most 0 (-inf included); None is 0.
        initial_state: [B, H, K, V] float32.
        kind: [B, T] int32 of START, ORDINARY, PADDING; None is all ORDINARY. Padding may hold anything, NaN included; the output
            there is unspecified and its cotangent is taken to be 0: mask it.
        scale: factor on the reads.
        parts: cut rows into at most as many parts, which are walked side by side; None cuts those that do not fill a GPU.

    Returns:
        (output [B, T, H, V] in value's dtype, final state [B, H, K, V] float32). Differentiable in every array, through both results.

    Raises:
        NotImplementedError: ``refusal`` has something to say.
        ValueError: ``parts`` is not positive.
    """
    if (reason := refusal(query, key, value, log_decay)) is not None:
        raise NotImplementedError(f"linear_attention: the kernel {reason}")
    cut = _matrix.parts("linear_attention", query, value, log_decay, parts, fewest=3)
    whole_rows = functools.partial(_whole_rows, scale=scale)
    return _split.walked(cut, whole_rows, _states_before, (query, key, value, log_decay), initial_state, kind)


def _whole_rows(query, key, value, log_decay, state, kind, *, scale: float) -> tuple[jax.Array, jax.Array]:
    """As ``linear_attention``."""
    heads = _matrix.blocks("linear_attention", query, value, log_decay)
    assert heads is not None  # `refusal` has let the call pass
    query, key, value, state = heads.of_keys(query), heads.of_keys(key), heads.of_values(value), heads.of_states(state)
    if log_decay is not None:
        log_decay = heads.of_channels(log_decay) if _matrix.per_channel(log_decay) else heads.of_heads(log_decay)
    call = _matrix.static(query, value, scale)
    output, final = _attention(flat(query), flat(key), flat(value), log_decay, state, kind, call)
    return heads.output(output.reshape(value.shape)), heads.state(final)


def _states_before(cut: _split.Parts, query, key, value, log_decay, state, kinds) -> jax.Array:
    """States before all parts [B, P, H, K, V]. A part writes the sum of its k v^T, each with the decay from there to the part's end."""
    kinds = None if kinds is None else kinds[:, :-1]
    k, v = (_split.real(cut.cut(x)[:, :-1], kinds) for x in (key, value))
    v = v.reshape(*k.shape[:4], -1, v.shape[-1])  # [B, P - 1, L, G, H / G, V]
    across, letters = jnp.ones((1, 1, 1, 1, 1)), "bplgk"
    if log_decay is None and kinds is not None:
        log_decay = jnp.zeros((*key.shape[:2], value.shape[2]))
    if log_decay is not None:
        decays, across = _split.decays_of(_split.gates_of(cut.cut(log_decay)[:, :-1], kinds))
        across = across.reshape(*across.shape[:3], -1, 1)
        if log_decay.ndim == 4:
            k, letters = k[:, :, :, :, None] * decays.reshape(*v.shape[:-1], -1), "bplgrk"
        else:
            v = v * decays.reshape(*v.shape[:-1], 1)
    precision = lax.Precision.HIGHEST if key.dtype == jnp.float32 else None
    written = jnp.einsum(
        f"{letters},bplgrv->bpgrkv", k.astype(key.dtype), v.astype(key.dtype),
        preferred_element_type=jnp.float32, precision=precision,
    )  # fmt: skip
    written = written.reshape(*written.shape[:2], -1, *written.shape[4:])
    return _split.states_before(
        jnp.broadcast_to(across, (*written.shape[:2], *across.shape[2:])), written, state.astype(jnp.float32)
    )


def refusal(query: jax.Array, key: jax.Array, value: jax.Array, log_decay: jax.Array | None) -> str | None:
    """Why there is no kernel for this call where it is traced, or None."""
    return _matrix.refusal("linear_attention", query, key, value, log_decay)


def is_preferred() -> bool:
    """Whether the kernel is the one to take where it runs, as far as that was measured."""
    return _target.target().platform in MEASURED


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(query, key, value, log_decay, state, kind, call: Static):
    return _run(query, key, value, log_decay, state, kind, call, save=False)[:2]


def _run(query, key, value, log_decay, state, kind, call: Static, *, save: bool):
    state = state.astype(jnp.float32)
    if call.target.platform == "gpu":
        decays, module = GpuDecays(call, log_decay, kind), _matrix.gpu_module("linear_attention", log_decay)
        tokens = decays.heads(query, key, value)
        with decays.interpreter():
            output, final, states = module.forward(
                *tokens, decays.log_decay, state, *decays.documents, save=save, **decays.options
            )
        return flat(output), final, states
    from pallas_kernels.linear_attention import tpu

    decays = TpuDecays("linear_attention", call, log_decay, kind)
    return tpu.forward(query, key, value, decays.gates, decays.rows, state, save=save, **decays.options)


def _forward(query, key, value, log_decay, state, kind, call):
    output, final, states = keep(_run(query, key, value, log_decay, state, kind, call, save=True))
    return (output, final), (query, key, value, log_decay, kind, states)


def _backward(call, residuals, cotangents):
    query, key, value, log_decay, kind, states = residuals
    dout, dfinal = cotangents
    if call.target.platform == "gpu":
        decays, module = GpuDecays(call, log_decay, kind), _matrix.gpu_module("linear_attention", log_decay)
        tokens = decays.heads(query, key, value)
        with decays.interpreter():
            *gradients, dlog_decay, dstate = module.backward(
                *tokens,
                decays.log_decay,
                *decays.documents,
                states,
                dout.reshape(call.value_shape),
                dfinal,
                **decays.options,
            )
        return *map(flat, gradients), decays.gradient(dlog_decay), dstate, None
    from pallas_kernels.linear_attention import tpu

    decays = TpuDecays("linear_attention", call, log_decay, kind)
    *gradients, dstate, dgates = tpu.backward(
        query, key, value, decays.gates, decays.rows, states, dout, dfinal, **decays.options
    )
    return *gradients, decays.gradient(dgates), dstate, None


_attention.defvjp(_forward, _backward)
