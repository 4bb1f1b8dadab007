r"""Short causal depthwise convolution with a state.

.. math:: y_t = f\Bigl(\sum_{j<W} w_j \circ x_{t-W+1+j} + bias\Bigr)

The width-4 convolution in front of Mamba (arXiv:2312.00752), RG-LRU (arXiv:2402.19427) and the delta-rule layers. The state
is the last ``W - 1`` inputs, so a sequence may be cut anywhere, into pieces shorter than ``W - 1`` too. Taps that would cross
the start of a document are 0. Padding counts as absent: taps reach over it to the tokens before.

Forms: ``"reference"`` is one step per token; ``"xla"`` adds ``W`` shifted copies, which the compiler fuses into one pass; its
gradient keeps the inputs only and recomputes the sums.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqjax.ops._dispatch import check_floating, check_segment_ids, check_shapes, resolve_implementation, state_dtype
from seqjax.ops._segments import Segments, clear_padding, segment_info

OP = "causal_convolution"


def causal_convolution(
    x: Float[Array, "B T D"],
    weight: Float[Array, "W D"],
    bias: Float[Array, " D"] | None = None,
    *,
    activation: str | None = None,
    initial_state: Float[Array, "B W-1 D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """Convolve each channel with its own ``W`` taps; ``weight[W-1]`` meets the current token.

    Args:
        x: inputs ``[B, T, D]``.
        weight: taps ``[W, D]``, oldest first.
        bias: added before the activation ``[D]``.
        activation: None or ``"silu"``.
        initial_state: the ``W - 1`` inputs before the first token, oldest first ``[B, W-1, D]``; zeros by default.
        segment_ids: documents of a packed row ``[B, T]``: a change of id cuts the taps, 0 is padding (output 0).
        implementation: ``"reference"``, ``"xla"`` or None (the best here).

    Returns:
        ``(y, state)``: outputs ``[B, T, D]`` in the dtype of ``x``; the last ``W - 1`` inputs of the last document in float32
        (zeros where it is shorter). Sums are float32.

    Raises:
        ValueError: shapes or dtypes do not fit, or the activation is unknown.
        NotImplementedError: ``implementation="pallas"`` where there is no kernel.

    Example:
        >>> x = jnp.arange(1.0, 5.0).reshape(1, 4, 1)
        >>> y, state = causal_convolution(x, jnp.ones((3, 1)))
        >>> y[0, :, 0].tolist(), state[0, :, 0].tolist()
        ([1.0, 3.0, 6.0, 9.0], [3.0, 4.0])
    """
    form = resolve_implementation(OP, implementation)
    sizes = check_shapes(
        OP, {"x": (x, "B T D"), "weight": (weight, "W D"), "bias": (bias, "D"), "segment_ids": (segment_ids, "B T")}
    )
    width = sizes["W"]
    if width < 1:
        raise ValueError(f"{OP}: `weight` has shape {weight.shape}; expected at least one tap")
    if activation not in (None, "silu"):
        raise ValueError(f"{OP}: `activation` is {activation!r}; expected None or 'silu'")
    state_shape = (sizes["B"], width - 1, sizes["D"])
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(
            f"{OP}: `initial_state` has shape {initial_state.shape}; expected [B, W-1, D] = {state_shape}, "
            f"the {width - 1} inputs before the first token"
        )
    check_floating(OP, {"x": x, "weight": weight, "bias": bias, "initial_state": initial_state})
    check_segment_ids(OP, segment_ids)
    dtype = state_dtype(x, weight, bias, initial_state)
    if initial_state is None:
        initial_state = jnp.zeros(state_shape, dtype)
    initial_state = initial_state.astype(dtype)
    if sizes["T"] == 0:
        return x, initial_state
    segments = None
    inputs = x
    if segment_ids is not None:
        segments = segment_info(segment_ids)
        inputs = clear_padding(segments.real, inputs)
    bias = jnp.zeros(sizes["D"], dtype) if bias is None else bias.astype(dtype)
    inputs, taps = inputs.astype(dtype), weight.astype(dtype)
    if form == "reference":
        y, state = _reference(inputs, taps, initial_state, segments)
        y = y + bias if activation is None else jax.nn.silu(y + bias)
    elif segments is None:
        extended = jnp.concatenate([initial_state, inputs], axis=1)
        y, state = _convolve(activation, extended, taps, bias, None), extended[:, sizes["T"] :]
    else:
        y, state = _packed(activation, inputs, taps, bias, initial_state, segments)
    if segments is not None:
        y = clear_padding(segments.real, y)
    return y.astype(x.dtype), state


def _reference(x: Array, weight: Array, initial_state: Array, segments: Segments | None) -> tuple[Array, Array]:
    """One step per token: append to the window, drop its oldest input."""
    if segments is None:
        real, start = jnp.ones(x.shape[:2], bool), jnp.zeros(x.shape[:2], bool)
    else:
        real, start = segments.real, segments.start

    def step(state, token):
        x_t, real_t, start_t = token
        past = jnp.where(start_t[:, None, None], 0, state)
        window = jnp.concatenate([past, x_t[:, None]], axis=1)  # [B, W, D]
        return jnp.where(real_t[:, None, None], window[:, 1:], state), jnp.sum(window * weight, axis=1)

    time_major = jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), (x, real, start))
    state, y = jax.lax.scan(step, initial_state, time_major)
    return jnp.swapaxes(y, 0, 1), state


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(activation: str | None, extended: Array, weight: Array, bias: Array, document: Array | None) -> Array:
    """f(shifted copies of ``extended`` [B, W-1+T, D], weighted, + bias); taps of another ``document`` [B, W-1+T] are left out.

    The gradient is written out: it saves the inputs alone, and the reductions of the transposed program keep an axis of size B,
    which XLA's CPU backend runs without vector instructions when B = 1 (30 times slower at T = 4096).
    """
    total = _weighted(extended, weight, document) + bias
    return total if activation is None else jax.nn.silu(total)


def _weighted(extended, weight, document):
    return sum(tap * weight[j] for j, tap in enumerate(_taps(extended, weight.shape[0], document)))


def _taps(extended: Array, width: int, document: Array | None) -> list[Array]:
    """The ``width`` shifted copies [B, T, D], oldest first, 0 where they come from another document."""
    time = extended.shape[1] - width + 1
    taps = [extended[:, j : j + time] for j in range(width)]
    if document is None:
        return taps
    return [jnp.where(_same(document, j, width)[..., None], tap, 0) for j, tap in enumerate(taps)]


def _same(document: Array, j: int, width: int) -> Array:
    """Whether tap ``j`` of each token lies in the token's own document [B, T]."""
    time = document.shape[1] - width + 1
    return document[:, j : j + time] == document[:, width - 1 :]


def _convolve_forward(activation, extended, weight, bias, document):
    return _convolve(activation, extended, weight, bias, document), (extended, weight, bias, document)


def _convolve_backward(activation, residuals, gradient):
    """With g = f'(sum) * gradient: dx_s = sum_j w_j g_{s+W-1-j}, dw_j = sum_t g_t x_{t-W+1+j}, dbias = sum_t g_t."""
    extended, weight, bias, document = residuals
    width = weight.shape[0]
    if activation is not None:
        total = _weighted(extended, weight, document) + bias
        gate = jax.nn.sigmoid(total)
        gradient = gradient * gate * (1 + total * (1 - gate))
    shares = []
    for j in range(width):
        share = gradient * weight[j]
        if document is not None:
            share = jnp.where(_same(document, j, width)[..., None], share, 0)
        shares.append(jnp.pad(share, ((0, 0), (j, width - 1 - j), (0, 0))))
    d_weight = jnp.stack([jnp.sum(gradient * tap, axis=(0, 1)) for tap in _taps(extended, width, document)])
    return sum(shares), d_weight, jnp.sum(gradient, axis=(0, 1)), None


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _packed(
    activation: str | None, x: Array, weight: Array, bias: Array, initial_state: Array, segments: Segments
) -> tuple[Array, Array]:
    """The packed form: real tokens are moved together, so that taps reach over padding, and outputs moved back."""
    width, real = weight.shape[0], segments.real
    count = jnp.sum(real, axis=1)

    def together(x, document):
        extended = jnp.concatenate([initial_state, x], axis=1)
        document = jnp.pad(document, ((0, 0), (width - 1, 0)))  # the initial state belongs to document 0
        # The last W-1 real inputs: `count` of them follow the W-1 of the initial state.
        last = count[:, None] + jnp.arange(width - 1)
        state = jnp.take_along_axis(extended, last[..., None], axis=1)
        same = jnp.take_along_axis(document, last, axis=1) == document[:, -1:]
        return _convolve(activation, extended, weight, bias, document), jnp.where(same[..., None], state, 0)

    def gathered(x):
        order = jnp.argsort(~real, axis=1, stable=True)
        rank = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
        y, state = together(
            jnp.take_along_axis(x, order[..., None], axis=1),
            # Padding at the end takes the last document's number, as in `segments.document`.
            jnp.where(
                jnp.arange(x.shape[1]) < count[:, None],
                jnp.take_along_axis(segments.document, order, axis=1),
                segments.document[:, -1:],
            ),
        )
        return jnp.take_along_axis(y, rank[..., None], axis=1), state

    # Padding only at the end of rows is the common case and needs no gather, whose transpose is a slow scatter.
    only_right = jnp.all(real[:, :-1] | ~real[:, 1:])
    return jax.lax.cond(only_right, lambda x: together(x, segments.document), gathered, x)
