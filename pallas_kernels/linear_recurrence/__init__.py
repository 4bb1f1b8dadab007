"""h_t = a_t h_{t-1} + x_t, elementwise: one pass over the data, forward and backward, on GPU and TPU.

The op is bound by memory bandwidth everywhere: the forward kernel reads a and x and writes h, the backward one reads a, h and dh and writes
da and dx, and no array of size T exists besides these. States, products and exponentials are float32.
"""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _split, _target
from pallas_kernels._remat import keep
from pallas_kernels._target import Target
from pallas_kernels._tokens import ORDINARY, PADDING, START

__all__ = ["MEASURED", "ORDINARY", "PADDING", "START", "is_preferred", "linear_recurrence", "refusal"]

Planes = tuple[jax.Array, ...]
MEASURED: frozenset[str] = frozenset()
"""Platforms on which a device has confirmed the kernel's results and found it faster than the XLA form."""

_GPU_CHANNELS = 8  # rows of a multiple of 16 bytes, which TMA needs; others are padded by a copy
_BLOCK = 128  # channels of a thread block
_PART = 32  # parts are multiples of so many tokens
_ROWS = 65535  # blocks along an axis of a CUDA grid


def linear_recurrence(
    gate: jax.Array,
    x: jax.Array,
    initial_state: jax.Array,
    kind: jax.Array | None = None,
    *,
    log: bool = True,
    parts: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """h_t = a_t h_{t-1} + x_t with a_t = exp(gate_t) (``log``) or gate_t.

    Args:
        gate: [B, T, D], float32 or bfloat16; complex64 if not ``log``.
        x: [B, T, D], float32, bfloat16 or complex64; complex where the gate is.
        initial_state: [B, D], float32 or complex64.
        kind: [B, T] int32 of START, ORDINARY, PADDING; None is all ORDINARY. Padding may hold anything, NaN included; h is
            the unchanged state there, and its cotangent is not read: mask h if you use it.
        log: the gate is the logarithm of the decay; -inf is a decay of 0.
        parts: cut rows into at most as many parts, which are walked side by side; None cuts those that do not fill a GPU.

    Returns:
        (h [B, T, D] in x's dtype, final state [B, D], float32 or complex64). Differentiable in gate, x and the initial state,
        through both results.

    Raises:
        NotImplementedError: ``refusal`` has something to say.
        ValueError: ``parts`` is not positive.
    """
    if (reason := refusal(x, gate)) is not None:
        raise NotImplementedError(f"linear_recurrence: the kernel {reason}")
    batch, time, channels = x.shape
    cut = _split.parts(time, _PART, batch * -(-channels // _BLOCK), parts)
    whole_rows, between = functools.partial(_whole_rows, log=log), functools.partial(_states_before, log=log)
    return _split.walked(cut, whole_rows, between, (gate, x), initial_state, kind)


def _whole_rows(gate, x, state, kind, *, log: bool) -> tuple[jax.Array, jax.Array]:
    """As ``linear_recurrence``."""
    here, channels = _target.target(), x.shape[-1]
    extra = -channels % _GPU_CHANNELS if here.platform == "gpu" else 0
    if extra:
        gate, x, state = (jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, extra)]) for a in (gate, x, state))
    h, final = _recurrence(_planes(gate), _planes(x), _planes(state), kind, log, here)
    return _join(h, x.dtype)[..., :channels], _join(final, state.dtype)[..., :channels]


def _states_before(cut: _split.Parts, gate, x, state, kinds, *, log: bool) -> jax.Array:
    """States before all parts [B, P, D]. A part writes the sum of its x, each times the decays from there to the part's end."""
    kinds = None if kinds is None else kinds[:, :-1]
    x = _split.real(cut.cut(x)[:, :-1], kinds).astype(state.dtype)
    gate = cut.cut(gate)[:, :-1]
    if log:
        decays, across = _split.decays_of(_split.gates_of(gate, kinds))
    else:
        decays, across = _split.products_of(gate.astype(state.dtype), kinds)
    return _split.states_before(across.astype(state.dtype), (decays * x).sum(2), state)


def refusal(x: jax.Array, gate: jax.Array) -> str | None:
    """Why there is no kernel for this call where it is traced, or None."""
    if (reason := _target.refusal()) is not None:
        return reason
    for array in (x, gate):
        if array.dtype not in (jnp.float32, jnp.bfloat16, jnp.complex64):
            return f"takes float32, bfloat16 and complex64; got {array.dtype}"
    if x.size == 0:
        return f"takes no empty arrays; got {x.shape}"
    if x.shape[0] > _ROWS and _target.target().platform == "gpu":
        return f"takes at most {_ROWS} rows on a GPU; got {x.shape[0]}"
    return None


def is_preferred() -> bool:
    """Whether the kernel is the one to take where it runs, as far as that was measured."""
    return _target.target().platform in MEASURED


def _call(here: Target, name: str, *arguments: Any, log: bool) -> Any:
    """``forward`` or ``backward`` of the device's module."""
    # Imported here: Pallas' device modules take a second that those who compute on a CPU should not pay.
    if here.platform == "tpu":
        from pallas_kernels.linear_recurrence import tpu

        return getattr(tpu, name)(*arguments, log=log, interpret=here.interpret)
    from pallas_kernels.linear_recurrence import gpu

    with _target.gpu_interpreter() if here.interpret else contextlib.nullcontext():
        return getattr(gpu, name)(*arguments, log=log)


def _planes(array: jax.Array) -> Planes:
    return (array.real, array.imag) if jnp.iscomplexobj(array) else (array,)


def _join(planes: Planes, dtype: jnp.dtype) -> jax.Array:
    return planes[0].astype(dtype) if len(planes) == 1 else jax.lax.complex(*planes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _recurrence(gate: Planes, x: Planes, state: Planes, kind, log: bool, here: Target) -> tuple[Planes, Planes]:
    return _call(here, "forward", gate, x, state, kind, log=log)


def _forward(gate, x, state, kind, log, here):
    h, final = keep(_call(here, "forward", gate, x, state, kind, log=log))
    return (h, final), (gate, h, state, kind)


def _backward(log, here, residuals, cotangents):
    gate, h, state, kind = residuals
    dh, dfinal = cotangents
    # Cotangents of the planes, dL/dRe and dL/dIm, make the cotangent of the number as JAX has it, dL/dRe - i dL/dIm: with that,
    # products transpose without conjugation.
    dgate, dx, dstate = _call(here, "backward", gate, h, state, _conjugate(dh), _conjugate(dfinal), kind, log=log)
    return _conjugate(dgate), _conjugate(dx), _conjugate(dstate), None


def _conjugate(planes: Planes) -> Planes:
    return planes if len(planes) == 1 else (planes[0], -planes[1])


_recurrence.defvjp(_forward, _backward)
