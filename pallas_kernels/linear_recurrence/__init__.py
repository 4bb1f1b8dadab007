"""h_t = a_t h_{t-1} + x_t, elementwise: one pass over the data, forward and backward, on GPU and TPU.

The op is bound by memory bandwidth everywhere: the forward kernel reads a and x and writes h, the backward one reads a, h and dh and writes
da and dx, and no array of size T exists besides these. States, products and exponentials are float32.

Rows that leave a GPU idle are cut in parts (``_split``). Over a part h_end = A h_before + U; a kernel that only reads a and x makes A and U, and
the same kernel backwards in time, with dh for x, makes those of the cotangents. Then all parts are walked side by side, from the right states
and cotangents: two thirds more traffic forward, two fifths backward.
"""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

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
    here, (batch, time, channels) = _target.target(), x.shape
    # The summaries of parts take two thirds of the time of the parts.
    cut = _split.parts(time, _PART, batch * -(-channels // _BLOCK), parts, fewest=3)
    extra = -channels % _GPU_CHANNELS if here.platform == "gpu" else 0
    if extra:
        gate, x, initial_state = (jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, extra)]) for a in (gate, x, initial_state))
    h, final = _recurrence(_planes(gate), _planes(x), _planes(initial_state), kind, log, cut, here)
    return _join(h, x.dtype)[..., :channels], _join(final, initial_state.dtype)[..., :channels]


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


def _call(here: Target, name: str, *arguments: Any, **options: Any) -> Any:
    """``forward``, ``backward`` or ``summary`` of the device's module."""
    # Imported here: Pallas' device modules take a second that those who compute on a CPU should not pay.
    if here.platform == "tpu":
        from pallas_kernels.linear_recurrence import tpu

        return getattr(tpu, name)(*arguments, **options, interpret=here.interpret)
    from pallas_kernels.linear_recurrence import gpu

    with _target.gpu_interpreter() if here.interpret else contextlib.nullcontext():
        return getattr(gpu, name)(*arguments, **options)


def _planes(array: jax.Array) -> Planes:
    return (array.real, array.imag) if jnp.iscomplexobj(array) else (array,)


def _join(planes: Planes, dtype: DTypeLike) -> jax.Array:
    return planes[0].astype(dtype) if len(planes) == 1 else jax.lax.complex(*planes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _recurrence(
    gate: Planes, x: Planes, state: Planes, kind, log: bool, cut: _split.Parts | None, here: Target
) -> tuple[Planes, Planes]:
    return _forward(gate, x, state, kind, log, cut, here)[0]


def _forward(gate, x, state, kind, log, cut, here):
    if cut is None:
        h, final = keep(_call(here, "forward", gate, x, state, kind, log=log))
        return (h, final), (gate, h, state, kind)
    kinds = cut.kinds(kind, state[0].shape[0])
    rows = (*_rows(cut, gate, x), None if kinds is None else _split.merge(kinds))
    states = _between(cut, here, rows, state, log=log)
    h, final = keep(_call(here, "forward", *rows[:2], states, rows[2], log=log))
    return (tuple(map(cut.join, h)), tuple(map(cut.last, final))), (gate, h, keep(states), kind)


def _backward(log, cut, here, residuals, cotangents):
    gate, h, state, kind = residuals
    dh, dfinal = cotangents
    # Cotangents of the planes, dL/dRe and dL/dIm, make the cotangent of the number as JAX has it, dL/dRe - i dL/dIm: with that,
    # products transpose without conjugation.
    dh, dfinal = _conjugate(dh), _conjugate(dfinal)
    if cut is None:
        dgate, dx, dstate = _call(here, "backward", gate, h, state, dh, dfinal, kind, log=log)
    else:
        kinds = cut.kinds(kind, dfinal[0].shape[0])
        gate_rows, dh_rows = _rows(cut, gate, dh)
        rows = (gate_rows, dh_rows, None if kinds is None else _split.merge(kinds))
        dfinals = _between(cut, here, rows, dfinal, log=log, reverse=True)
        dgate, dx, dstate = _call(here, "backward", gate_rows, h, state, dh_rows, dfinals, rows[2], log=log)
        dgate, dx = (tuple(map(cut.join, planes)) for planes in (dgate, dx))
        dstate = tuple(map(cut.first, dstate))
    return _conjugate(dgate), _conjugate(dx), _conjugate(dstate), None


def _rows(cut: _split.Parts, *arrays: Planes) -> tuple[Planes, ...]:
    return tuple(tuple(map(cut.rows, planes)) for planes in arrays)


def _between(cut: _split.Parts, here: Target, rows, edge: Planes, *, log: bool, reverse: bool = False) -> Planes:
    """States before all parts or, in reverse, cotangents of those after them: planes [B P, D] from that of the whole rows [B, D].

    ``rows`` are gates, inputs (cotangents) and kinds of all parts. That the last part is summed up, too, costs less than a copy without it.
    """

    def parts(planes: Planes) -> jax.Array:
        whole = _join(planes, jnp.float32).reshape(-1, cut.count, planes[0].shape[-1])
        return whole[:, 1:] if reverse else whole[:, :-1]

    across, written = _call(here, "summary", *rows, log=log, reverse=reverse)
    states = _split.states_before(parts(across), parts(written), _join(edge, jnp.float32), reverse=reverse)
    return _planes(_split.merge(states))


def _conjugate(planes: Planes) -> Planes:
    return planes if len(planes) == 1 else (planes[0], -planes[1])


_recurrence.defvjp(_forward, _backward)
