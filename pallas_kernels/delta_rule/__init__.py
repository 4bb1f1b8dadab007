"""S' = diag(exp(g_t)) S_{t-1}, S_t = S' + beta_t k_t (v_t - S'^T k_t)^T, o_t = scale * S_t^T q_t.

Per chunk a triangular matrix of the overlaps of its keys is inverted, independently of the state; what is left is a walk like that of
linear attention. A forward pass that will be differentiated also writes the state before every chunk and that inverse.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _matrix, _split, _target
from pallas_kernels._matrix import GpuDecays, Static, TpuDecays, flat
from pallas_kernels._remat import keep
from pallas_kernels._tokens import ORDINARY, PADDING, START, of_tokens

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
    parts: int | None = None,
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
        parts: cut rows into at most as many parts, which are walked side by side; None cuts those that do not fill a GPU.

    Returns:
        (output [B, T, H, V] in value's dtype, final state [B, H, K, V] float32). Differentiable in every array, through both results.

    Raises:
        NotImplementedError: ``refusal`` has something to say.
        ValueError: ``parts`` is not positive.
    """
    if (reason := refusal(query, key, value, log_decay)) is not None:
        raise NotImplementedError(f"delta_rule: the kernel {reason}")
    beta = beta.astype(jnp.float32)
    cut = _matrix.parts("delta_rule", query, value, log_decay, parts, fewest=4)
    whole_rows = functools.partial(_whole_rows, scale=scale)
    tokens = query, key, value, beta, log_decay
    return _split.walked(cut, whole_rows, _states_before, tokens, initial_state, kind)


def _whole_rows(query, key, value, beta, log_decay, state, kind, *, scale: float) -> tuple[jax.Array, jax.Array]:
    """As ``delta_rule``."""
    heads = _matrix.blocks("delta_rule", query, value, log_decay)
    assert heads is not None  # `refusal` has let the call pass
    query, key, value, state = heads.of_keys(query), heads.of_keys(key), heads.of_values(value), heads.of_states(state)
    beta = heads.of_heads(beta)
    if log_decay is not None:
        log_decay = heads.of_channels(log_decay) if _matrix.per_channel(log_decay) else heads.of_heads(log_decay)
    call = _matrix.static(query, value, scale)
    output, final = _delta(flat(query), flat(key), flat(value), beta, log_decay, state, kind, call)
    return heads.output(output.reshape(value.shape)), heads.state(final)


def _states_before(cut: _split.Parts, query, key, value, beta, log_decay, state, kinds) -> jax.Array:
    """States before all parts [B, P, H, K, V], by two more walks of all parts but the last: from an empty state with these values, and from
    the unit matrix with values of 0.
    """
    batch, heads, key_dim, value_dim = state.shape
    size = cut.count - 1

    def walk(value, state):
        tokens = (key, key, value, beta, log_decay)
        rows = [None if x is None else _split.merge(cut.cut(x)[:, :-1]) for x in tokens]
        kind = None if kinds is None else _split.merge(kinds[:, :-1])
        state = jnp.broadcast_to(state, (batch * size, *state.shape))
        _, final = _whole_rows(*rows, state, kind, scale=1.0)
        return final.reshape(batch, size, *final.shape[1:])

    across = walk(
        jnp.zeros((*value.shape[:3], key_dim), value.dtype),
        jnp.broadcast_to(jnp.eye(key_dim), (heads, key_dim, key_dim)),
    )
    written = walk(value, jnp.zeros((heads, key_dim, value_dim)))
    times = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    return _split.states_before(across, written, state.astype(jnp.float32), times)


def refusal(query: jax.Array, key: jax.Array, value: jax.Array, log_decay: jax.Array | None) -> str | None:
    """Why there is no kernel for this call where it is traced, or None."""
    return _matrix.refusal("delta_rule", query, key, value, log_decay)


def is_preferred() -> bool:
    """Whether the kernel is the one to take where it runs, as far as that was measured."""
    return _target.target().platform in MEASURED


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _delta(query, key, value, beta, log_decay, state, kind, call: Static):
    return _run(query, key, value, beta, log_decay, state, kind, call, save=False)[:2]


def _real_steps(beta: jax.Array, kind: jax.Array | None) -> jax.Array:
    """beta without what padding holds."""
    return beta if kind is None else jnp.where(kind[..., None] == PADDING, 1.0, beta)


def _run(query, key, value, beta, log_decay, state, kind, call: Static, *, save: bool):
    state, steps = state.astype(jnp.float32), _real_steps(beta, kind)
    if call.target.platform == "gpu":
        decays, module = GpuDecays(call, log_decay, kind), _matrix.gpu_module("delta_rule", log_decay)
        tokens = decays.heads(query, key, value)
        with decays.interpreter():
            output, final, saved = module.forward(
                *tokens, steps, decays.log_decay, state, *decays.documents, save=save, **decays.options
            )
        return flat(output), final, saved
    from pallas_kernels.delta_rule import tpu

    decays = TpuDecays("delta_rule", call, log_decay, kind, steps)
    return tpu.forward(query, key, value, decays.gates, decays.rows, state, save=save, **decays.options)


def _forward(query, key, value, beta, log_decay, state, kind, call):
    output, final, saved = keep(_run(query, key, value, beta, log_decay, state, kind, call, save=True))
    return (output, final), (query, key, value, beta, log_decay, kind, saved)


def _backward(call, residuals, cotangents):
    query, key, value, beta, log_decay, kind, saved = residuals
    dout, dfinal = cotangents
    steps = _real_steps(beta, kind)
    if call.target.platform == "gpu":
        decays, module = GpuDecays(call, log_decay, kind), _matrix.gpu_module("delta_rule", log_decay)
        tokens = decays.heads(query, key, value)
        with decays.interpreter():
            *gradients, dbeta, dlog_decay, dstate = module.backward(
                *tokens,
                steps,
                decays.log_decay,
                *decays.documents,
                saved,
                dout.reshape(call.value_shape),
                dfinal,
                **decays.options,
            )
        return *map(flat, gradients), dbeta, decays.gradient(dlog_decay), dstate, None
    from pallas_kernels.delta_rule import tpu

    decays = TpuDecays("delta_rule", call, log_decay, kind, steps)
    *gradients, dstate, dbeta, dgates = tpu.backward(
        query, key, value, decays.gates, decays.rows, saved, dout, dfinal, **decays.options
    )
    return *gradients, of_tokens(dbeta, query.shape[1]), decays.gradient(dgates), dstate, None


_delta.defvjp(_forward, _backward)
