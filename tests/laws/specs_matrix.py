"""Linear attention and the delta rule, described for the laws: every kind of decay, equal and grouped heads."""

import functools

import jax
import jax.numpy as jnp

from seqjax.ops import delta_rule, linear_attention
from tests.laws.harness import OpSpec

K, V = 4, 3
LINEAR = ("query", "key", "value")
DELTA = ("query", "key", "value", "beta")


def make(key, batch, time, dtype, *, names, decay, groups, heads, k=K, v=V):
    """Inputs as layers make them: log decays -softplus(x), and for the delta rule unit keys and beta in (0, 2)."""
    keys = iter(jax.random.split(key, 7))

    def normal(*shape):
        return jax.random.normal(next(keys), shape, jnp.float32)

    query, keys_, value = (
        normal(batch, time, groups, k),
        normal(batch, time, groups, k),
        normal(batch, time, heads, v),
    )
    inputs = {"query": query, "key": keys_, "value": value}
    if "beta" in names:
        inputs["key"] = keys_ / jnp.linalg.norm(keys_, axis=-1, keepdims=True)
        inputs["beta"] = 2 * jax.nn.sigmoid(2 * normal(batch, time, heads))
    if decay is not None:
        shape = (batch, time, heads) + ((k,) if decay == "channel" else ())
        inputs["log_decay"] = -jax.nn.softplus(2 * normal(*shape) - 1)
    return {name: array.astype(dtype) for name, array in inputs.items()} | {"initial_state": normal(batch, heads, k, v)}


def call(inputs, segment_ids=None, implementation=None, chunk_size=None, *, op, names):
    return op(
        *(inputs[name] for name in names),
        inputs.get("log_decay"),
        initial_state=inputs["initial_state"],
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
    )


def extremes(inputs):
    cases = {
        "huge values": {**inputs, "value": inputs["value"] * 1e30},
        "tiny inputs": {**inputs, "value": inputs["value"] * 1e-30, "initial_state": inputs["initial_state"] * 1e-30},
    }
    if "beta" in inputs:
        for beta in (0.0, 1.0, 1.99):
            cases[f"beta {beta}"] = {**inputs, "beta": jnp.full_like(inputs["beta"], beta)}
        one_key = inputs["key"][:, :1]
        cases["one key throughout"] = {**inputs, "key": jnp.broadcast_to(one_key, inputs["key"].shape)}
    return cases


def spec(op, names, decay, groups, heads):
    time_inputs = names if decay is None else (*names, "log_decay")
    return OpSpec(
        f"{op.__name__}_{decay or 'no'}_decay{'' if groups == heads else '_grouped'}",
        functools.partial(make, names=names, decay=decay, groups=groups, heads=heads),
        functools.partial(call, op=op, names=names),
        time_inputs,
        log_decay=None if decay is None else "log_decay",
        extremes=extremes,
    )


SPECS = [
    spec(linear_attention, LINEAR, None, 2, 2),
    spec(linear_attention, LINEAR, "scalar", 1, 2),
    spec(linear_attention, LINEAR, "channel", 2, 2),
    spec(delta_rule, DELTA, None, 2, 2),
    spec(delta_rule, DELTA, "scalar", 1, 2),
    spec(delta_rule, DELTA, "channel", 2, 2),
]
