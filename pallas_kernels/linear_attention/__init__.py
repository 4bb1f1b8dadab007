"""S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T, o_t = scale * S_t^T q_t: one pass with the states on chip.

The forward kernel reads query, key and value once and writes the output; a forward pass that will be differentiated also writes the
state before every chunk of tokens, the only array besides inputs and outputs that grows with T. (On GPUs, decays per channel take a kernel
before this one, which turns query, key and decays into what it reads; it runs again in the backward pass.)

Rows that do not fill a GPU are cut into parts. A part multiplies the state by its decay and adds the sum of its k v^T, each with the decay from
there to its end, so from these the states before all parts follow, and then the parts are walked side by side. Backward the same holds for the
cotangents of the states after the parts, with sums of q do^T. On GPUs a kernel makes the sums, which reads half of what a walk does, or, for decays
per channel, XLA.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _blocks, _matrix, _split, _target
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
    heads = _matrix.blocks("linear_attention", query, value, log_decay)
    assert heads is not None  # `refusal` has let the call pass
    cut = _parts(heads, query, value, log_decay, parts)
    query, key, value = heads.of_keys(cut.rows(query)), heads.of_keys(cut.rows(key)), heads.of_values(cut.rows(value))
    if log_decay is not None:
        log_decay = cut.rows(log_decay)
        log_decay = heads.of_channels(log_decay) if _matrix.per_channel(log_decay) else heads.of_heads(log_decay)
    kinds = cut.kinds(kind, len(query) // cut.count)
    kinds = None if kinds is None else _split.merge(kinds)
    call = _matrix.static(query, value, scale)
    state = heads.of_states(initial_state.astype(jnp.float32))
    output, final = _attention(flat(query), flat(key), flat(value), log_decay, state, kinds, call, cut)
    return cut.join(heads.output(output.reshape(value.shape))), heads.state(final)


def _parts(heads: _blocks.Blocks, query, value, log_decay, count: int | None) -> _split.Parts:
    """How rows are cut; one part if they are left whole."""
    time = value.shape[1]
    if _target.target().platform == "tpu" or _matrix.per_channel(log_decay):
        cut = _matrix.parts("linear_attention", query, value, log_decay, count, fewest=3)
    else:
        from pallas_kernels.linear_attention import gpu

        busy = gpu.multiprocessors(len(value) * heads.count, heads.key_block, heads.value_block, value.dtype)
        # Sums cost as much as half a walk that HBM bounds: with two parts only, they would cost what is won.
        cut = _split.parts(time, gpu.TILE, busy, count, fewest=3)
    return cut or _split.Parts(time, 1, time)


def refusal(query: jax.Array, key: jax.Array, value: jax.Array, log_decay: jax.Array | None) -> str | None:
    """Why there is no kernel for this call where it is traced, or None."""
    return _matrix.refusal("linear_attention", query, key, value, log_decay)


def is_preferred() -> bool:
    """Whether the kernel is the one to take where it runs, as far as that was measured."""
    return _target.target().platform in MEASURED


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(query, key, value, log_decay, state, kind, call: Static, cut: _split.Parts):
    """Of all parts as rows, from the states before the first ones; the final states are those after the last ones."""
    return _run(query, key, value, log_decay, state, kind, call, cut, save=False)[:2]


def _run(query, key, value, log_decay, state, kind, call: Static, cut: _split.Parts, *, save: bool):
    states = _between(key, value, log_decay, state, kind, call, cut)
    if call.target.platform == "gpu":
        decays, module = GpuDecays(call, log_decay, kind), _matrix.gpu_module("linear_attention", log_decay)
        tokens = decays.heads(query, key, value)
        with decays.interpreter():
            output, final, saved = module.forward(
                *tokens, decays.log_decay, states, *decays.documents, save=save, **decays.options
            )
        return flat(output), cut.last(final), saved
    from pallas_kernels.linear_attention import tpu

    decays = TpuDecays("linear_attention", call, log_decay, kind)
    output, final, saved = tpu.forward(
        query, key, value, decays.gates, decays.rows, states, save=save, **decays.options
    )
    return output, cut.last(final), saved


def _forward(query, key, value, log_decay, state, kind, call, cut):
    output, final, saved = keep(_run(query, key, value, log_decay, state, kind, call, cut, save=True))
    return (output, final), (query, key, value, log_decay, kind, saved)


def _backward(call, cut, residuals, cotangents):
    query, key, value, log_decay, kind, saved = residuals
    dout, dfinal = cotangents
    dfinals = _between(query, dout, log_decay, dfinal, kind, call, cut, reverse=True)
    if call.target.platform == "gpu":
        decays, module = GpuDecays(call, log_decay, kind), _matrix.gpu_module("linear_attention", log_decay)
        tokens = decays.heads(query, key, value)
        with decays.interpreter():
            *gradients, dlog_decay, dstates = module.backward(
                *tokens,
                decays.log_decay,
                *decays.documents,
                saved,
                dout.reshape(call.value_shape),
                dfinals,
                **decays.options,
            )
        return *map(flat, gradients), decays.gradient(dlog_decay), cut.first(dstates), None
    from pallas_kernels.linear_attention import tpu

    decays = TpuDecays("linear_attention", call, log_decay, kind)
    *gradients, dstates, dgates = tpu.backward(
        query, key, value, decays.gates, decays.rows, saved, dout, dfinals, **decays.options
    )
    return *gradients, decays.gradient(dgates), cut.first(dstates), None


def _between(keys, values, log_decay, edge, kind, call: Static, cut: _split.Parts, *, reverse: bool = False):
    """States before all parts [B P, H, K, V] from those before the first ones [B, H, K, V].

    In ``reverse`` from queries and the cotangent of the output: the cotangents of the states after all parts from those after the last ones.
    """
    if cut.count == 1:
        return edge
    summary = _summary if call.target.platform == "tpu" or _matrix.per_channel(log_decay) else _gpu_summary
    across, written = summary(keys, values, log_decay, kind, call, cut, reverse)
    return _split.merge(_split.states_before(across, written, edge, reverse=reverse))


def _gpu_summary(keys, values, log_decay, kind, call: Static, cut: _split.Parts, reverse: bool):
    """As ``_summary``, by a kernel."""
    from pallas_kernels.linear_attention import gpu

    decays, some = GpuDecays(call, log_decay, kind), cut.others(reverse)
    with decays.interpreter():
        written = gpu.summary(
            keys.reshape(call.query_shape),
            values.reshape(call.value_shape),
            decays.log_decay,
            *decays.documents,
            parts=cut.count,
            reverse=reverse,
            scale=call.scale if reverse else 1.0,
            interpret=call.target.interpret,
        )
    written = written.reshape(-1, cut.count - 1, *written.shape[1:])
    across = jnp.ones((1, 1, 1))
    if log_decay is not None or kind is not None:
        gates = jnp.zeros((*call.value_shape[:3],)) if log_decay is None else log_decay
        across = jnp.exp(_split.gates_of(some(gates), None if kind is None else some(kind)).sum(2))
    return jnp.broadcast_to(across[..., None, None], (*written.shape[:3], 1, 1)), written


def _summary(keys, values, log_decay, kind, call: Static, cut: _split.Parts, reverse: bool):
    """Decays across all parts but the last and what they write, or across those but the first and what they read: [B, P - 1, H, ., .].

    The latter is the sum of k v^T, each with the decay from there to the part's end; or of q do^T, each with that from the part's start.
    """
    some = cut.others(reverse)
    kinds = None if kind is None else some(kind)
    k, v = (_split.real(some(x), kinds) for x in (keys.reshape(call.query_shape), values.reshape(call.value_shape)))
    v = v.reshape(*k.shape[:4], -1, v.shape[-1])  # [B, P - 1, L, G, H / G, V]
    across, letters = jnp.ones((1, 1, 1, 1)), "bplgk"
    if log_decay is None and kinds is not None:
        log_decay = jnp.zeros(call.value_shape[:3])
    if log_decay is not None:
        decays, across = _split.decays_of(_split.gates_of(some(log_decay), kinds), reverse=reverse)
        across = across.reshape(*across.shape[:3], -1)
        if log_decay.ndim == 4:
            k, letters = k[:, :, :, :, None] * decays.reshape(*v.shape[:-1], -1), "bplgrk"
        else:
            v = v * decays.reshape(*v.shape[:-1], 1)
    precision = lax.Precision.HIGHEST if keys.dtype == jnp.float32 else None
    written = jnp.einsum(
        f"{letters},bplgrv->bpgrkv", k.astype(keys.dtype), v.astype(keys.dtype),
        preferred_element_type=jnp.float32, precision=precision,
    )  # fmt: skip
    written = written.reshape(*written.shape[:2], -1, *written.shape[4:])
    if reverse:
        written = call.scale * written
    return jnp.broadcast_to(across[..., None], (*written.shape[:3], across.shape[3], 1)), written


_attention.defvjp(_forward, _backward)
