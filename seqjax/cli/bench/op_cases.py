"""The ops as the benchmark sees them: random inputs of a given size, the call, and the size of the state."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from seqjax import ops

Inputs = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Problem size shared by all ops; elementwise ops have ``heads * dim`` channels."""

    batch: int
    heads: int
    dim: int
    dtype: str


@dataclasses.dataclass(frozen=True)
class Case:
    """One op in one setting."""

    name: str
    make: Callable[[jax.Array, Sizes, int], Inputs]
    """(key, sizes, T) -> inputs by argument name."""
    call: Callable[..., tuple[jax.Array, jax.Array | None]]
    """(inputs, implementation) -> (output, final state or None)."""
    state_bytes: Callable[[Sizes], int] | None = None
    """Bytes of the float32 state of all batch rows; None for ops whose state is no larger than a token."""
    recurrent: bool = True
    """Has a step-by-step scan to beat and a cost linear in T."""
    longest: int | None = None
    """Lengths beyond this are skipped: the cost is quadratic."""


SELECTIVE_STATE = 16
CONVOLUTION_WIDTH = 4
ATTENTION_WINDOW = 256


def _normal(key: jax.Array, *shape: int, dtype: str = "float32") -> jax.Array:
    return jax.random.normal(key, shape).astype(dtype)


def _log_decay(key: jax.Array, *shape: int) -> jax.Array:
    """Log decays from about -0.7 to -0.001: memories of one to a thousand tokens."""
    return -jnp.exp(jax.random.uniform(key, shape, minval=-7.0, maxval=-0.4))


def _unit(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide / jnp.linalg.norm(wide, axis=-1, keepdims=True)).astype(x.dtype)


def _recurrence_real(key: jax.Array, sizes: Sizes, time: int) -> Inputs:
    keys = jax.random.split(key)
    shape = (sizes.batch, time, sizes.heads * sizes.dim)
    return {"x": _normal(keys[0], *shape, dtype=sizes.dtype), "log_decay": _log_decay(keys[1], *shape)}


def _recurrence_complex(key: jax.Array, sizes: Sizes, time: int) -> Inputs:
    keys = jax.random.split(key, 4)
    shape = (sizes.batch, time, sizes.heads * sizes.dim)
    turn = jax.random.uniform(keys[2], shape, maxval=6.28)
    return {
        "x": jax.lax.complex(_normal(keys[0], *shape), _normal(keys[1], *shape)),
        "decay": jnp.exp(jax.lax.complex(_log_decay(keys[3], *shape), turn)),
    }


def _selective_scan(key: jax.Array, sizes: Sizes, time: int) -> Inputs:
    keys = jax.random.split(key, 4)
    channels = sizes.heads * sizes.dim
    return {
        "x": _normal(keys[0], sizes.batch, time, channels, dtype=sizes.dtype),
        "delta": jax.nn.softplus(_normal(keys[1], sizes.batch, time, channels) - 3.0).astype(sizes.dtype),
        "A": -jnp.broadcast_to(jnp.arange(1.0, SELECTIVE_STATE + 1), (channels, SELECTIVE_STATE)),
        "B": _normal(keys[2], sizes.batch, time, SELECTIVE_STATE, dtype=sizes.dtype),
        "C": _normal(keys[3], sizes.batch, time, SELECTIVE_STATE, dtype=sizes.dtype),
    }


def _matrix_memory(gate: str | None, *, delta: bool) -> Callable[[jax.Array, Sizes, int], Inputs]:
    """Inputs of ``linear_attention`` and ``delta_rule`` with no, a scalar or a per-channel log decay."""

    def make(key: jax.Array, sizes: Sizes, time: int) -> Inputs:
        keys = jax.random.split(key, 5)
        rows = (sizes.batch, time, sizes.heads)
        inputs = {
            name: _normal(k, *rows, sizes.dim, dtype=sizes.dtype) for name, k in zip(("query", "key", "value"), keys)
        }
        if delta:
            # The rule is a contraction only for keys of unit length.
            inputs["key"] = _unit(inputs["key"])
            inputs["beta"] = jax.nn.sigmoid(_normal(keys[3], *rows)).astype(sizes.dtype)
        if gate == "scalar":
            inputs["log_decay"] = _log_decay(keys[4], *rows)
        elif gate == "channel":
            inputs["log_decay"] = _log_decay(keys[4], *rows, sizes.dim)
        return inputs

    return make


def _convolution(key: jax.Array, sizes: Sizes, time: int) -> Inputs:
    keys = jax.random.split(key, 3)
    channels = sizes.heads * sizes.dim
    return {
        "x": _normal(keys[0], sizes.batch, time, channels, dtype=sizes.dtype),
        "weight": _normal(keys[1], CONVOLUTION_WIDTH, channels, dtype=sizes.dtype),
        "bias": _normal(keys[2], channels, dtype=sizes.dtype),
    }


def _attention(window: int | None) -> Callable[..., tuple[jax.Array, None]]:
    def call(inputs: Inputs, implementation: str) -> tuple[jax.Array, None]:
        query, key, value = (inputs[name] for name in ("query", "key", "value"))
        return ops.attention(query, key, value, window=window, implementation=implementation), None

    return call


def _matrix_state(sizes: Sizes) -> int:
    return 4 * sizes.batch * sizes.heads * sizes.dim * sizes.dim


def _call(name: str, **fixed: object) -> Callable[..., tuple[jax.Array, jax.Array | None]]:
    # Looked up at call time, so that the measured function is the one the package exports now.
    return lambda inputs, implementation: getattr(ops, name)(**inputs, **fixed, implementation=implementation)


CASES: tuple[Case, ...] = (
    Case("linear_recurrence real", _recurrence_real, _call("linear_recurrence")),
    Case("linear_recurrence complex", _recurrence_complex, _call("linear_recurrence")),
    Case(
        "selective_scan",
        _selective_scan,
        _call("selective_scan"),
        lambda sizes: 4 * sizes.batch * sizes.heads * sizes.dim * SELECTIVE_STATE,
    ),
    *(
        Case(f"{name} {gate or 'none'}", _matrix_memory(gate, delta=name == "delta_rule"), _call(name), _matrix_state)
        for name in ("linear_attention", "delta_rule")
        for gate in (None, "scalar", "channel")
    ),
    Case("causal_convolution", _convolution, _call("causal_convolution", activation="silu"), recurrent=False),
    Case("attention full", _matrix_memory(None, delta=False), _attention(None), recurrent=False, longest=4096),
    Case(
        f"attention window {ATTENTION_WINDOW}",
        _matrix_memory(None, delta=False),
        _attention(ATTENTION_WINDOW),
        recurrent=False,
    ),
)
