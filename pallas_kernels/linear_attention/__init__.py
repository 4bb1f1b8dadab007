"""S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T, o_t = scale * S_t^T q_t: one pass with the states on chip.

The forward kernel reads query, key and value once and writes the output; a forward pass that will be differentiated also writes the
state before every chunk of tokens, the only array besides inputs and outputs that grows with T. (On GPUs, decays per channel take a kernel
before this one, which turns query, key and decays into what it reads; it runs again in the backward pass.)
"""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _target
from pallas_kernels._tokens import ORDINARY, PADDING, START, chunk_rules, decay_gradient, document_numbers, kind_rows

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
        raise NotImplementedError(f"linear_attention: the kernel {reason}")
    static = _Static(query.shape, value.shape, value.dtype.itemsize, float(scale), _target.target())
    output, final = _attention(_flat(query), _flat(key), _flat(value), log_decay, initial_state, kind, static)
    return output.reshape(value.shape), final


def refusal(query: jax.Array, key: jax.Array, value: jax.Array, log_decay: jax.Array | None) -> str | None:
    """Why there is no kernel for this call where it is traced, or None."""
    if (reason := _target.refusal()) is not None:
        return reason
    if _target.target().platform == "gpu":
        from pallas_kernels.linear_attention import gpu

        return gpu.refusal(query.shape, value.shape, (query.dtype, key.dtype, value.dtype))
    if not query.dtype == key.dtype == value.dtype or value.dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes query, key and value of one dtype, float32 or bfloat16; got {query.dtype}, {key.dtype}, {value.dtype}"
    if query.size == 0 or value.size == 0:
        return f"takes no empty arrays; got query {query.shape}, value {value.shape}"
    from pallas_kernels.linear_attention import tpu

    (_, time, groups, key_dim), (heads, value_dim) = query.shape, value.shape[2:]
    channels = log_decay is not None and log_decay.ndim == 4
    if tpu.default_config(time, heads, groups, key_dim, value_dim, value.dtype.itemsize, channels=channels) is None:
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


def _flat(x: jax.Array) -> jax.Array:
    """[B, T, H, K] -> [B, T, H * K], which is what projections make and what a chunk of some heads is a rectangle of."""
    return x.reshape(*x.shape[:2], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(query, key, value, log_decay, state, kind, static: _Static):
    return _run(query, key, value, log_decay, state, kind, static, save=False)[:2]


def _run(query, key, value, log_decay, state, kind, static: _Static, *, save: bool):
    device = _Gpu if static.target.platform == "gpu" else _Tpu
    return device(static, log_decay, kind).forward(query, key, value, state.astype(jnp.float32), save=save)


def _forward(query, key, value, log_decay, state, kind, static):
    output, final, states = _run(query, key, value, log_decay, state, kind, static, save=True)
    return (output, final), (query, key, value, log_decay, kind, states)


def _backward(static, residuals, cotangents):
    query, key, value, log_decay, kind, states = residuals
    device = _Gpu if static.target.platform == "gpu" else _Tpu
    dquery, dkey, dvalue, dlog_decay, dstate = device(static, log_decay, kind).backward(
        query, key, value, states, *cotangents
    )
    return dquery, dkey, dvalue, dlog_decay, dstate, None


_attention.defvjp(_forward, _backward)


class _Tpu:
    """The calls on TPU: gates, document starts and padding are rows of numbers per head, or gates are an array like the keys."""

    def __init__(self, static: _Static, log_decay: jax.Array | None, kind: jax.Array | None):
        from pallas_kernels.linear_attention import tpu

        (batch, time, groups, key_dim), (heads, value_dim) = static.query_shape, static.value_shape[2:]
        self.channels = log_decay is not None and log_decay.ndim == 4
        sizes = (time, heads, groups, key_dim, value_dim, static.itemsize)
        config = tpu.default_config(*sizes, channels=self.channels)
        assert config is not None, "`refusal` has checked it"
        padded = kind is not None or time % config.chunk != 0
        self.log_decay, self.gates, self.rows, self.acts = log_decay, None, None, None
        if log_decay is not None and self.channels:
            kinds = jnp.full((batch, time), ORDINARY) if kind is None else kind
            self.gates, self.acts = _flat(log_decay), (kinds == ORDINARY)[..., None, None] & (log_decay > -jnp.inf)
            self.rows = kind_rows(kinds, heads, config.chunk) if padded else None
        elif log_decay is not None or padded:
            gates = jnp.zeros((batch, time, heads)) if log_decay is None else log_decay
            self.rows, self.acts = chunk_rules(gates.astype(jnp.float32), kind, config.chunk)
        self.module = tpu
        self.options: dict[str, Any] = {
            "groups": groups,
            "scale": static.scale,
            "padded": padded,
            "config": config,
            "interpret": static.target.interpret,
        }

    def forward(self, query, key, value, state, *, save: bool):
        return self.module.forward(query, key, value, self.gates, self.rows, state, save=save, **self.options)

    def backward(self, query, key, value, states, dout, dfinal):
        *gradients, dstate, dgates = self.module.backward(
            query, key, value, self.gates, self.rows, states, dout, dfinal, **self.options
        )
        return *gradients, decay_gradient(dgates, self.log_decay, self.acts), dstate


class _Gpu:
    """The calls on GPU: heads are an axis, documents are numbers, and the chunks know those around them."""

    def __init__(self, static: _Static, log_decay: jax.Array | None, kind: jax.Array | None):
        from pallas_kernels.linear_attention import gpu, gpu_channels

        channels = log_decay is not None and log_decay.ndim == 4
        self.module: Any = gpu_channels if channels else gpu
        self.static = static
        self.log_decay = None if log_decay is None else log_decay.astype(jnp.float32)
        self.dtype = None if log_decay is None else log_decay.dtype
        self.document, self.boundary = document_numbers(kind, gpu.Config().chunk)
        self.options: dict[str, Any] = {"scale": static.scale, "interpret": static.target.interpret}

    def _heads(self, query, key, value):
        shape = self.static.query_shape
        return query.reshape(shape), key.reshape(shape), value.reshape(self.static.value_shape)

    def _interpreter(self):
        return _target.gpu_interpreter() if self.static.target.interpret else contextlib.nullcontext()

    def forward(self, query, key, value, state, *, save: bool):
        with self._interpreter():
            output, final, states = self.module.forward(
                *self._heads(query, key, value),
                self.log_decay,
                state,
                self.document,
                self.boundary,
                save=save,
                **self.options,
            )
        return _flat(output), final, states

    def backward(self, query, key, value, states, dout, dfinal):
        with self._interpreter():
            dquery, dkey, dvalue, dlog_decay, dstate = self.module.backward(
                *self._heads(query, key, value),
                self.log_decay,
                self.document,
                self.boundary,
                states,
                dout.reshape(self.static.value_shape),
                dfinal,
                **self.options,
            )
        dlog_decay = None if dlog_decay is None else dlog_decay.astype(self.dtype)
        return _flat(dquery), _flat(dkey), _flat(dvalue), dlog_decay, dstate
