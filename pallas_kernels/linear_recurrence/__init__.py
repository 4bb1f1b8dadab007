"""h_t = a_t h_{t-1} + x_t, elementwise: one pass over the data, forward and backward, on GPU and TPU.

The op is bound by memory bandwidth everywhere: the forward kernel reads a and x and writes h, the backward one reads a, h and dh and writes
da and dx, and no array of size T exists besides these. States, products and exponentials are float32.
"""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp

from pallas_kernels._target import Target, target

Planes = tuple[jax.Array, ...]
START, ORDINARY, PADDING = 2, 1, 0
"""Kinds of tokens: the first of a document (the state before it does not count), any other, none (the state stays as it is)."""


def linear_recurrence(
    gate: jax.Array,
    x: jax.Array,
    initial_state: jax.Array,
    kind: jax.Array | None = None,
    *,
    log: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """h_t = a_t h_{t-1} + x_t with a_t = exp(gate_t) (``log``) or gate_t.

    Args:
        gate: [B, T, D], float32 or bfloat16; complex64 if not ``log``.
        x: [B, T, D], float32, bfloat16 or complex64; complex where the gate is.
        initial_state: [B, D], float32 or complex64.
        kind: [B, T] int32 of START, ORDINARY, PADDING; None is all ORDINARY. Padding may hold anything, NaN included; h is
            the unchanged state there, and its cotangent is not read: mask h if you use it.
        log: the gate is the logarithm of the decay; -inf is a decay of 0.

    Returns:
        (h [B, T, D] in x's dtype, final state [B, D], float32 or complex64). Differentiable in gate, x and the initial state,
        through both results.

    Raises:
        NotImplementedError: ``refusal`` has something to say.
    """
    here = target()
    if (reason := refusal(x, gate)) is not None:
        raise NotImplementedError(f"linear_recurrence: the kernel {reason}")
    h, final = _recurrence(_planes(gate), _planes(x), _planes(initial_state), kind, log, here)
    return _join(h, x.dtype), _join(final, initial_state.dtype)


def refusal(x: jax.Array, gate: jax.Array) -> str | None:
    """Why there is no kernel for this call here, or None."""
    here = target()
    if here.platform not in ("tpu", "gpu"):
        return f"runs on TPU and GPU, and this is a {here.platform}"
    supported = (jnp.float32, jnp.bfloat16, jnp.complex64)
    for array in (x, gate):
        if array.dtype not in supported:
            return f"takes float32, bfloat16 and complex64; got {array.dtype}"
    return getattr(_kernels(here), "refusal", lambda x, gate: None)(x, gate)


def _kernels(here: Target) -> ModuleType:
    # Imported here: Pallas' device modules take a second that those who compute on a CPU should not pay.
    if here.platform == "tpu":
        from pallas_kernels.linear_recurrence import tpu

        return tpu
    from pallas_kernels.linear_recurrence import gpu

    return gpu


def _planes(array: jax.Array) -> Planes:
    return (array.real, array.imag) if jnp.iscomplexobj(array) else (array,)


def _join(planes: Planes, dtype: jnp.dtype) -> jax.Array:
    return planes[0].astype(dtype) if len(planes) == 1 else jax.lax.complex(*planes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _recurrence(gate: Planes, x: Planes, state: Planes, kind, log: bool, here: Target) -> tuple[Planes, Planes]:
    return _kernels(here).forward(gate, x, state, kind, log=log, interpret=here.interpret)


def _forward(gate, x, state, kind, log, here):
    h, final = _recurrence(gate, x, state, kind, log, here)
    return (h, final), (gate, h, state, kind)


def _backward(log, here, residuals, cotangents):
    gate, h, state, kind = residuals
    dh, dfinal = cotangents
    # The cotangent of a complex number in JAX transposes without conjugation: dL = Re(ct dz), so that its imaginary plane is -ct.imag.
    dgate, dx, dstate = _kernels(here).backward(
        gate, h, state, _conjugate(dh), _conjugate(dfinal), kind, log=log, interpret=here.interpret
    )
    return _conjugate(dgate), _conjugate(dx), _conjugate(dstate), None


def _conjugate(planes: Planes) -> Planes:
    return planes if len(planes) == 1 else (planes[0], -planes[1])


_recurrence.defvjp(_forward, _backward)
