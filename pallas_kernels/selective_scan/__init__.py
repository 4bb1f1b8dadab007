"""h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t, y_t = h_t C_t per channel, N states each: Mamba's scan, forward and backward, on GPU and TPU.

Decays and writes are made in the kernel, so no array of size B T D N exists: the forward pass reads x and delta and writes y, the
backward one reads x, delta and dy and writes dx and ddelta, besides B and C, which are small, and the states before chunks. States,
products and exponentials are float32; only on a GPU dB and dC of bfloat16 B and C are sums, in float32, of products rounded to bfloat16.

Rows that do not fill a GPU are cut into parts. A part multiplies the state by exp(A s), s the sum of its delta, or by 0 if a document starts in
it; so with what it adds to a state of 0 the states before all parts follow, and then the parts are walked side by side. Backward the same holds for
the cotangents of the states after the parts, from what the parts add to a cotangent of 0.
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

__all__ = ["MEASURED", "ORDINARY", "PADDING", "START", "is_preferred", "refusal", "selective_scan"]

MEASURED: frozenset[str] = frozenset()
"""Platforms on which a device has confirmed the kernel's results and found it faster than the XLA form."""

_STATES = {"tpu": 64, "gpu": 16}  # on a GPU they lie in the registers of a thread
_GPU_CHANNELS = 8  # rows of a multiple of 16 bytes, which TMA needs; others are padded by a copy
_BLOCK = 128  # channels of a thread block of a GPU
_RESIDENT = 2  # blocks that a multiprocessor runs at once
_PART = 32  # parts are multiples of so many tokens, the chunks of a GPU
_FEWEST = 3  # parts: they are walked twice, the first time for their states only
_ROWS = 65535  # blocks along an axis of a CUDA grid


def selective_scan(
    x: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    initial_state: jax.Array,
    kind: jax.Array | None = None,
    *,
    parts: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """h_t[d, n] = exp(delta_t[d] A[d, n]) h_{t-1}[d, n] + delta_t[d] x_t[d] B_t[n], y_t[d] = sum_n h_t[d, n] C_t[n].

    Args:
        x, delta: [B, T, D], float32 or bfloat16.
        A: [D, N], float32.
        B, C: [B, T, N], float32 or bfloat16.
        initial_state: [B, D, N], float32.
        kind: [B, T] int32 of START, ORDINARY, PADDING; None is all ORDINARY. Padding may hold anything, NaN included; y is 0
            there, and its cotangent is not read.
        parts: cut rows into at most as many parts, which are walked side by side; None cuts those that do not fill a GPU.

    Returns:
        (y [B, T, D] in x's dtype, final state [B, D, N] in float32). Differentiable in all arrays but the kinds, through both.

    Raises:
        NotImplementedError: ``refusal`` has something to say.
        ValueError: ``parts`` is not positive.
    """
    if (reason := refusal(x, delta, A, B, C)) is not None:
        raise NotImplementedError(f"selective_scan: the kernel {reason}")
    blocks = -(-x.shape[0] * -(-x.shape[2] // _BLOCK) // _RESIDENT)
    cut = _split.parts(x.shape[1], _PART, blocks, parts, fewest=_FEWEST)
    states, most = A.shape[1], _STATES[_target.target().platform]
    if states <= most:
        return _some_states(x, delta, A, B, C, initial_state, kind, cut)
    # States are independent, and y is a sum over them: blocks of nearly equal size, one after the other, each reading x and delta anew.
    count = -(-states // most)
    edges = [states * i // count for i in range(count + 1)]
    blocks = [slice(*edge) for edge in zip(edges, edges[1:])]
    results = [_some_states(x, delta, A[:, n], B[..., n], C[..., n], initial_state[..., n], kind, cut) for n in blocks]
    y = sum(y.astype(jnp.float32) for y, _ in results)
    return jnp.asarray(y, x.dtype), jnp.concatenate([final for _, final in results], -1)


def _some_states(x, delta, A, B, C, initial_state, kind, cut: _split.Parts | None) -> tuple[jax.Array, jax.Array]:
    """As ``selective_scan``, for as many states as a kernel takes."""
    here, channels = _target.target(), x.shape[-1]
    extra = -channels % _GPU_CHANNELS if here.platform == "gpu" else 0
    if extra:
        x, delta = (jnp.pad(a, ((0, 0), (0, 0), (0, extra))) for a in (x, delta))
        A, initial_state = jnp.pad(A, ((0, extra), (0, 0))), jnp.pad(initial_state, ((0, 0), (0, extra), (0, 0)))
    y, final = _scan(x, delta, A, B, C, initial_state, kind, here, cut)
    return y[..., :channels], final[:, :channels]


def refusal(x: jax.Array, delta: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array) -> str | None:
    """Why there is no kernel for this call where it is traced, or None."""
    if (reason := _target.refusal()) is not None:
        return reason
    for array in (x, delta, A, B, C):
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            return f"takes float32 and bfloat16; got {array.dtype}"
    if x.size == 0 or A.size == 0:
        return f"takes no empty arrays; got {x.shape} and {A.shape}"
    if x.shape[0] > _ROWS and _target.target().platform == "gpu":
        return f"takes at most {_ROWS} rows on a GPU; got {x.shape[0]}"
    return None


def is_preferred() -> bool:
    """Whether the kernel is the one to take where it runs, as far as that was measured."""
    return _target.target().platform in MEASURED


def _call(here: Target, name: str, *arguments: Any, **options: Any) -> Any:
    """``forward``, ``backward`` or ``carried`` of the device's module."""
    # Imported here: Pallas' device modules take a second that those who compute on a CPU should not pay.
    if here.platform == "tpu":
        from pallas_kernels.selective_scan import tpu

        return getattr(tpu, name)(*arguments, **options, interpret=here.interpret)
    from pallas_kernels.selective_scan import gpu

    with _target.gpu_interpreter() if here.interpret else contextlib.nullcontext():
        return getattr(gpu, name)(*arguments, **options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _scan(x, delta, A, B, C, state, kind, here: Target, cut: _split.Parts | None) -> tuple[jax.Array, jax.Array]:
    return _walked(x, delta, A, B, C, state, kind, here, cut, emit=False)[:2]


def _walked(x, delta, A, B, C, state, kind, here, cut, *, emit: bool):
    """Outputs, final state and the states before chunks."""
    if cut is None:
        return _call(here, "forward", x, delta, A, B, C, state, kind, emit=emit)
    states = _through_parts(here, cut, x, delta, A, B, kind, state, reverse=False)
    y, after, starts = _call(here, "forward", x, delta, A, B, C, states, kind, emit=emit, cut=cut)
    return y, cut.last(after), starts


def _through_parts(here, cut, values, delta, A, columns, kind, state, *, reverse: bool) -> jax.Array:
    """The states before all parts from that before the first, or, in reverse, their cotangents after all parts from that after the last.

    Args:
        here, cut: device and parts.
        values, columns: x and B, or dy and C in reverse.
        delta, A, kind: as in ``selective_scan``.
        state: [B, D, N].
        reverse: cotangents.

    Returns:
        [B P, D, N].
    """
    written, steps = _call(here, "carried", values, delta, A, columns, kind, cut=cut, reverse=reverse)
    written, steps = (a.reshape(-1, cut.count - 1, *a.shape[1:]) for a in (written, steps))
    across = jnp.exp(steps[..., None] * A)
    if kind is not None:
        starts = jnp.any(cut.cut(kind, PADDING) == START, 2)
        starts = starts[:, 1:] if reverse else starts[:, :-1]
        across = jnp.where(starts[..., None, None], 0.0, across)
    return _split.merge(_split.states_before(across, written, state, reverse=reverse))


def _forward(x, delta, A, B, C, state, kind, here, cut):
    y, final, starts = keep(_walked(x, delta, A, B, C, state, kind, here, cut, emit=True))
    return (y, final), (x, delta, A, B, C, starts, kind)


def _backward(here, cut, residuals, cotangents):
    x, delta, A, B, C, starts, kind = residuals
    dy, dfinal = cotangents
    if cut is None:
        gradients = _call(here, "backward", *residuals, dy, dfinal)
    else:
        after = _through_parts(here, cut, dy, delta, A, C, kind, dfinal, reverse=True)
        gradients = _call(here, "backward", *residuals, dy, after, cut=cut)
    dx, ddelta, dA, dB, dC, dstate = gradients
    dstate = dstate if cut is None else cut.first(dstate)
    return dx, ddelta, dA.astype(A.dtype), dB.astype(B.dtype), dC.astype(C.dtype), dstate, None


_scan.defvjp(_forward, _backward)
