"""S' = diag(exp(g_t)) S_{t-1}, S_t = S' + beta_t k_t (v_t - S'^T k_t)^T, o_t = scale * S_t^T q_t.

Per chunk a triangular matrix of the overlaps of its keys is inverted, independently of the state; what is left is a walk like that of
linear attention. A forward pass that will be differentiated also writes the state before every chunk and that inverse.
"""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _target
from pallas_kernels._tokens import (
    ORDINARY,
    PADDING,
    START,
    chunk_rules,
    chunks_of,
    decay_gradient,
    document_numbers,
    kind_rows,
    of_tokens,
)

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
    static = _Static(query.shape, value.shape, value.dtype.itemsize, float(scale), _target.target())
    gates = None if log_decay is None else log_decay.astype(jnp.float32)
    output, final = _delta(
        _flat(query), _flat(key), _flat(value), beta.astype(jnp.float32), gates, initial_state, kind, static
    )
    return output.reshape(value.shape), final


def refusal(query: jax.Array, key: jax.Array, value: jax.Array, log_decay: jax.Array | None) -> str | None:
    """Why there is no kernel for this call where it is traced, or None."""
    if (reason := _target.refusal()) is not None:
        return reason
    if _target.target().platform == "gpu":
        from pallas_kernels.delta_rule import gpu

        gates = 3 if log_decay is None else log_decay.ndim
        return gpu.refusal(query.shape, value.shape, (query.dtype, key.dtype, value.dtype), gates)
    if not query.dtype == key.dtype == value.dtype or value.dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes query, key and value of one dtype, float32 or bfloat16; got {query.dtype}, {key.dtype}, {value.dtype}"
    if query.size == 0 or value.size == 0:
        return f"takes no empty arrays; got query {query.shape}, value {value.shape}"
    from pallas_kernels.delta_rule import tpu

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _delta(query, key, value, beta, log_decay, state, kind, static: _Static):
    return _device(beta, log_decay, kind, static).forward(query, key, value, state, save=False)[:2]


def _forward(query, key, value, beta, log_decay, state, kind, static):
    output, final, saved = _device(beta, log_decay, kind, static).forward(query, key, value, state, save=True)
    return (output, final), (query, key, value, beta, log_decay, kind, saved)


def _backward(static, residuals, cotangents):
    query, key, value, beta, log_decay, kind, saved = residuals
    return *_device(beta, log_decay, kind, static).backward(query, key, value, saved, *cotangents), None


_delta.defvjp(_forward, _backward)


def _device(beta, log_decay, kind, static: _Static) -> Any:
    steps = beta if kind is None else jnp.where(kind[..., None] == PADDING, 1.0, beta)
    return (_Gpu if static.target.platform == "gpu" else _Tpu)(steps, log_decay, kind, static)


class _Tpu:
    """The calls on TPU: beta, gates, document starts and padding are rows of numbers per head; gates per channel are an array like the keys."""

    def __init__(self, beta: jax.Array, log_decay: jax.Array | None, kind: jax.Array | None, static: _Static):
        from pallas_kernels.delta_rule import tpu

        (batch, time, groups, key_dim), (heads, value_dim) = static.query_shape, static.value_shape[2:]
        channels = log_decay is not None and log_decay.ndim == 4
        sizes = (time, heads, groups, key_dim, value_dim, static.itemsize)
        config = tpu.default_config(*sizes, channels=channels)
        assert config is not None, "`refusal` has checked it"
        self.module, self.log_decay, self.gates = tpu, log_decay, None
        steps = chunks_of(beta, config.chunk, 1.0).transpose(0, 3, 1, 2)[:, :, :, None]
        if log_decay is not None and channels:
            kinds = jnp.full((batch, time), ORDINARY) if kind is None else kind
            self.gates, self.acts = _flat(log_decay), (kinds == ORDINARY)[..., None, None] & (log_decay > -jnp.inf)
            self.rows = jnp.concatenate([steps, kind_rows(kinds, heads, config.chunk)], 3)
        else:
            gates = jnp.zeros((batch, time, heads)) if log_decay is None else log_decay
            rows, self.acts = chunk_rules(gates.astype(jnp.float32), kind, config.chunk)
            self.rows = jnp.concatenate([rows, steps], 3)
        self.options: dict[str, Any] = {
            "groups": groups,
            "scale": static.scale,
            "padded": kind is not None or time % config.chunk != 0,
            "config": config,
            "interpret": static.target.interpret,
        }

    def forward(self, query, key, value, state, *, save: bool):
        state = state.astype(jnp.float32)
        return self.module.forward(query, key, value, self.gates, self.rows, state, save=save, **self.options)

    def backward(self, query, key, value, saved, dout, dfinal):
        *gradients, dstate, dbeta, dgates = self.module.backward(
            query, key, value, self.gates, self.rows, saved, dout, dfinal, **self.options
        )
        dbeta = of_tokens(dbeta, query.shape[1])
        return *gradients, dbeta, decay_gradient(dgates, self.log_decay, self.acts), dstate


class _Gpu:
    """The calls on GPU: heads are an axis, documents are numbers, and the chunks know those around them."""

    def __init__(self, beta: jax.Array, log_decay: jax.Array | None, kind: jax.Array | None, static: _Static):
        from pallas_kernels.delta_rule import gpu

        self.module, self.static = gpu, static
        self.rules = (beta, None if log_decay is None else log_decay.astype(jnp.float32))
        self.dtype = None if log_decay is None else log_decay.dtype
        self.documents = document_numbers(kind, gpu.Config().chunk)
        self.options: dict[str, Any] = {"scale": static.scale, "interpret": static.target.interpret}

    def _heads(self, query, key, value):
        shape = self.static.query_shape
        return query.reshape(shape), key.reshape(shape), value.reshape(self.static.value_shape)

    def _interpreter(self):
        return _target.gpu_interpreter() if self.static.target.interpret else contextlib.nullcontext()

    def forward(self, query, key, value, state, *, save: bool):
        tokens = self._heads(query, key, value)
        with self._interpreter():
            output, final, saved = self.module.forward(
                *tokens, *self.rules, state, *self.documents, save=save, **self.options
            )
        return _flat(output), final, saved

    def backward(self, query, key, value, saved, dout, dfinal):
        tokens = self._heads(query, key, value)
        dout = dout.reshape(self.static.value_shape)
        with self._interpreter():
            *gradients, dbeta, dlog_decay, dstate = self.module.backward(
                *tokens, *self.rules, *self.documents, saved, dout, dfinal, **self.options
            )
        dlog_decay = None if dlog_decay is None else dlog_decay.astype(self.dtype)
        return *map(_flat, gradients), dbeta, dlog_decay, dstate
