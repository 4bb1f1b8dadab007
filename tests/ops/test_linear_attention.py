"""Linear attention against closed forms, at real chunk sizes; the laws (tests/laws) cover the rest."""

import dataclasses
import functools
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.ops import linear_attention
from tests.laws import harness
from tests.laws.harness import TOLERANCE, assert_close_rms
from tests.laws.specs_matrix import SPECS

NONE, SCALAR, CHANNEL = (spec for spec in SPECS if spec.name.startswith("linear_attention"))
call = jax.jit(linear_attention, static_argnames=("scale", "chunk_size", "implementation"))


def tokens(time, groups=2, heads=2, k=4, v=3, seed=0):
    generator = np.random.default_rng(seed)
    shapes = [(2, time, groups, k), (2, time, groups, k), (2, time, heads, v)]
    return [jnp.asarray(generator.standard_normal(s), jnp.float32) for s in shapes]


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_a_constant_decay_is_the_masked_product_of_retnet(decay):
    query, key, value = tokens(70)
    distance = np.arange(70)[:, None] - np.arange(70)
    mask = np.where(distance >= 0, decay ** np.maximum(distance, 0), 0)
    scores = np.einsum("bihk,bjhk->bhij", *(np.asarray(x, np.float64) for x in (query, key))) * mask / 2
    expected = np.einsum("bhij,bjhv->bihv", scores, np.asarray(value, np.float64))
    log_decay = None if decay == 1 else jnp.full((2, 70, 2), np.log(decay), jnp.float32)
    assert_close_rms(call(query, key, value, log_decay)[0], expected, TOLERANCE["float32"])


def test_a_decay_equal_in_all_channels_is_a_scalar_decay():
    query, key, value = tokens(70)
    log_decay = -jnp.abs(tokens(70, seed=1)[2][..., 0])
    channels = jnp.broadcast_to(log_decay[..., None], (2, 70, 2, 4))
    assert_close_rms(call(query, key, value, channels), call(query, key, value, log_decay), TOLERANCE["float32"])


@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_grouped_heads_are_repeated_heads(decay):
    query, key, value = tokens(40, heads=4)
    log_decay = -jnp.abs(tokens(40, heads=4, v=4, seed=1)[2])
    log_decay = log_decay[..., 0] if decay == "scalar" else log_decay
    repeated = call(jnp.repeat(query, 2, axis=2), jnp.repeat(key, 2, axis=2), value, log_decay)
    assert_close_rms(call(query, key, value, log_decay), repeated, TOLERANCE["float32"])


@pytest.mark.parametrize(
    ("spec", "chunk_size"),
    [*((SCALAR, size) for size in (1, 2, 16, 64, 67, 1000)), (CHANNEL, 1), (CHANNEL, 128)],
    ids=repr,
)
def test_the_chunk_size_does_not_change_the_result(spec, chunk_size):
    inputs = spec.make(jax.random.key(3), 2, 67, jnp.float32)
    actual = harness.compiled(spec, "xla", chunk_size)(inputs, None)
    assert_close_rms(actual, harness.oracle(spec, inputs), TOLERANCE["float32"])


@pytest.mark.parametrize("time", [1, 3, 63, 64, 65, 127])
def test_any_length_will_do(time):
    inputs = SCALAR.make(jax.random.key(time), 2, time, jnp.float32)
    assert_close_rms(harness.compiled(SCALAR, None)(inputs, None), harness.oracle(SCALAR, inputs), TOLERANCE["float32"])


@pytest.mark.parametrize("spec", [NONE, SCALAR, CHANNEL], ids=repr)
def test_values_and_gradients_are_exact_for_any_mixture_of_decays(spec):
    """64 tokens per chunk, so that every level of blocks occurs; resets as numbers, not as documents."""
    inputs = spec.make(jax.random.key(4), 2, 150, jnp.float32)
    if spec.log_decay:
        kinds = jnp.array([0.0, -1e-7, -1e-3, -5.0, -40.0, -1e4, -jnp.inf])
        chances = jnp.log(jnp.array([0.3, 0.2, 0.3, 0.1, 0.04, 0.03, 0.03]))
        choice = jax.random.categorical(jax.random.key(5), chances, shape=inputs["log_decay"].shape)
        inputs["log_decay"] = kinds[choice]
    weights = harness.random_weights(harness.compiled(spec, "reference")(inputs, None))
    actual = harness.compiled_gradients(spec, "xla", 64)(inputs, None, weights)
    assert_close_rms(actual, harness.oracle_gradients(spec, inputs, weights), TOLERANCE["float32"])


def equations(jaxpr):
    """All equations of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for sub in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(getattr(sub, "jaxpr", sub))


@pytest.mark.parametrize("spec", [NONE, SCALAR, CHANNEL], ids=repr)
def test_a_training_step_holds_no_state_per_token(spec):
    """States of 32 x 32 over 8192 tokens: the largest array of the step is 8192 x 32, or a state per chunk."""
    wide = dataclasses.replace(spec, make=functools.partial(spec.make, k=32, v=32))
    inputs = jax.eval_shape(lambda: wide.make(jax.random.key(0), 1, 8192, jnp.float32))

    def loss(inputs, implementation):
        output, state = spec.call(inputs, implementation=implementation)
        return jnp.sum(output) + jnp.sum(state)

    def largest(implementation):
        jaxpr = jax.make_jaxpr(jax.grad(functools.partial(loss, implementation=implementation)))(inputs)
        return max(v.aval.size for e in equations(jaxpr.jaxpr) for v in e.outvars if hasattr(v.aval, "size"))

    heads = inputs["value"].shape[2]
    assert largest("reference") >= 8192 * heads * 32 * 32
    assert largest("xla") <= 8192 * heads * 32


def test_a_single_token_takes_one_step_without_a_loop():
    inputs = CHANNEL.make(jax.random.key(0), 2, 1, jnp.float32)
    primitives = {e.primitive.name for e in equations(jax.make_jaxpr(CHANNEL.call)(inputs).jaxpr)}
    assert not primitives & {"scan", "while", "pad"}


def test_bfloat16_matmuls_accumulate_in_float32():
    inputs = SCALAR.make(jax.random.key(0), 2, 64, jnp.bfloat16)
    dots = [e for e in equations(jax.make_jaxpr(SCALAR.call)(inputs).jaxpr) if e.primitive.name == "dot_general"]
    assert {e.outvars[0].aval.dtype for e in dots} == {jnp.dtype("float32")}
    wide = [e for e in dots if any(v.aval.dtype == jnp.float32 for v in e.invars)]
    assert len(wide) == 1, "the sums of log decays, and they alone, multiply float32"
    assert len(dots) > 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": (2, 9, 2, 4)}, "`key` has shape .*T=9.*`query` has T=8"),
        ({"value": (2, 8, 3, 3)}, "`value` has H=3 heads and `query` G=2; expected G to divide H"),
        ({"log_decay": (2, 8, 2, 5)}, "`log_decay` has shape .*K=5"),
        ({"log_decay": (2, 8)}, r"`log_decay` has shape \(2, 8\); expected \[B, T, H\]"),
        ({"initial_state": (2, 2, 3, 4)}, "`initial_state` has shape"),
        ({"query": (2, 8, 4)}, r"`query` has shape \(2, 8, 4\); expected \[B, T, G, K\]"),
        ({"chunk_size": 0}, "`chunk_size` is 0; expected None or a positive"),
        ({"implementation": "fast"}, "`implementation` is 'fast'"),
        ({"segment_ids": (2, 8)}, "`segment_ids` has dtype float32; expected integers"),
        ({"query": (2, 0, 2, 4), "key": (2, 0, 2, 4), "value": (2, 0, 2, 3)}, "T=0"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"query": (2, 8, 2, 4), "key": (2, 8, 2, 4), "value": (2, 8, 2, 3)} | change
    arrays: dict[str, Any] = {n: jnp.zeros(a) if isinstance(a, tuple) else a for n, a in arguments.items()}
    with pytest.raises(ValueError, match="linear_attention: " + message if message != "T=0" else message):
        linear_attention(**arrays)
