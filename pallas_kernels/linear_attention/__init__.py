"""S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale * S_t^T q_t, no decay or one per head: one pass with the states on chip.

The forward kernel reads query, key and value once and writes the output; a forward pass that will be differentiated also writes the
state before every chunk of tokens, the only array besides inputs and outputs that grows with T.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _target
from pallas_kernels._tokens import ORDINARY, PADDING, START, chunk_gradient, chunk_rules

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
) -> tuple[jax.Array, jax.Array]:
    """Chunked linear attention.

    Args:
        query: [B, T, G, K]; G divides H, query/key head g serves value heads g*H/G .. (g+1)*H/G - 1.
        key: [B, T, G, K].
        value: [B, T, H, V], of the dtype of query and key: float32 or bfloat16.
        log_decay: [B, T, H], at most 0 (-inf included); None is 0.
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
        raise NotImplementedError(f"linear_attention: the kernel {reason}")
    static = _Static(query.shape, value.shape, value.dtype.itemsize, float(scale), _target.target())
    gates = None if log_decay is None else log_decay.astype(jnp.float32)
    output, final = _attention(_flat(query), _flat(key), _flat(value), gates, initial_state, kind, static)
    return output.reshape(value.shape), final


def refusal(query: jax.Array, key: jax.Array, value: jax.Array, log_decay: jax.Array | None) -> str | None:
    """Why there is no kernel for this call where it is traced, or None."""
    if (reason := _target.refusal()) is not None:
        return reason
    if _target.target().platform == "gpu":
        return "is for TPU only so far"
    if not query.dtype == key.dtype == value.dtype or value.dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes query, key and value of one dtype, float32 or bfloat16; got {query.dtype}, {key.dtype}, {value.dtype}"
    if log_decay is not None and log_decay.ndim == 4:
        return "takes no decay or one per head, not one per channel"
    if query.size == 0 or value.size == 0:
        return f"takes no empty arrays; got query {query.shape}, value {value.shape}"
    from pallas_kernels.linear_attention import tpu

    (_, time, groups, key_dim), (heads, value_dim) = query.shape, value.shape[2:]
    if tpu.default_config(time, heads, groups, key_dim, value_dim, value.dtype.itemsize) is None:
        return f"needs heads whose lanes make multiples of 128; got H={heads}, G={groups}, K={key_dim}, V={value_dim}"
    return None


def is_preferred() -> bool:
    """Whether the kernel is the one to take where it runs, as far as that was measured."""
    return _target.target().platform in MEASURED


class _Static(NamedTuple):
    query_shape: tuple[int, ...]
    value_shape: tuple[int, ...]
    itemsize: int
    scale: float
    target: _target.Target

    def options(self) -> dict[str, Any]:
        from pallas_kernels.linear_attention import tpu

        (_, time, groups, key_dim), (heads, value_dim) = self.query_shape, self.value_shape[2:]
        config = tpu.default_config(time, heads, groups, key_dim, value_dim, self.itemsize)
        return {"groups": groups, "scale": self.scale, "config": config, "interpret": self.target.interpret}


def _flat(x: jax.Array) -> jax.Array:
    """[B, T, H, K] -> [B, T, H * K], which is what projections make and what a chunk of some heads is a rectangle of."""
    return x.reshape(*x.shape[:2], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(query, key, value, log_decay, state, kind, static: _Static):
    return _run(query, key, value, log_decay, state, kind, static, save=False)[:2]


def _rules(log_decay, kind, static: _Static, chunk: int):
    """(rows, which decays act, whether some tokens are padding); no rows if nothing decays and nothing is padding."""
    batch, time, heads = static.value_shape[:3]
    padded = kind is not None or time % chunk != 0
    if log_decay is None and not padded:
        return None, None, False
    gates = jnp.zeros((batch, time, heads), jnp.float32) if log_decay is None else log_decay
    return *chunk_rules(gates, kind, chunk), padded


def _run(query, key, value, log_decay, state, kind, static: _Static, *, save: bool):
    from pallas_kernels.linear_attention import tpu

    options = static.options()
    rows, _, padded = _rules(log_decay, kind, static, options["config"].chunk)
    return tpu.forward(query, key, value, rows, state.astype(jnp.float32), padded=padded, save=save, **options)


def _forward(query, key, value, log_decay, state, kind, static):
    output, final, states = _run(query, key, value, log_decay, state, kind, static, save=True)
    return (output, final), (query, key, value, log_decay, kind, states)


def _backward(static, residuals, cotangents):
    from pallas_kernels.linear_attention import tpu

    query, key, value, log_decay, kind, states = residuals
    options = static.options()
    rows, acts, padded = _rules(log_decay, kind, static, options["config"].chunk)
    dquery, dkey, dvalue, drows, dstate = tpu.backward(
        query, key, value, rows, states, *cotangents, padded=padded, **options
    )
    return dquery, dkey, dvalue, None if log_decay is None else chunk_gradient(drows, acts), dstate, None


_attention.defvjp(_forward, _backward)
