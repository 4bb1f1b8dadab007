"""The delta rule against its identities, at real chunk sizes; the laws (tests/laws) cover the rest."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.ops import delta_rule, linear_attention
from tests.laws import harness
from tests.laws.harness import TOLERANCE, assert_close_rms
from tests.laws.specs_matrix import SPECS
from tests.ops.test_linear_attention import equations

NONE, SCALAR, CHANNEL = (spec for spec in SPECS if spec.name.startswith("delta_rule"))
call = jax.jit(delta_rule, static_argnames=("scale", "chunk_size", "implementation"))


def without_decay(time=70):
    inputs = NONE.make(jax.random.key(time), 2, time, jnp.float32)
    return inputs, [inputs[name] for name in ("query", "key", "value", "beta")]


@pytest.mark.parametrize("shape", [(2, 70, 2), (2, 70, 2, 4)], ids=["scalar", "channel"])
def test_a_log_decay_of_zero_is_no_decay(shape):
    _, arrays = without_decay()
    assert_close_rms(call(*arrays, jnp.zeros(shape)), call(*arrays), TOLERANCE["float32"])


def test_a_decay_equal_in_all_channels_is_a_scalar_decay():
    _, arrays = without_decay()
    log_decay = jax.nn.log_sigmoid(jax.random.normal(jax.random.key(1), (2, 70, 2)))
    channels = jnp.broadcast_to(log_decay[..., None], (2, 70, 2, 4))
    assert_close_rms(call(*arrays, channels), call(*arrays, log_decay), TOLERANCE["float32"])


def test_beta_zero_leaves_the_state_and_reads_it():
    inputs, (query, key, value, beta) = without_decay()
    state = inputs["initial_state"]
    output, final = call(query, key, value, 0 * beta, initial_state=state)
    np.testing.assert_array_equal(final, state)
    assert_close_rms(output, np.einsum("bthk,bhkv->bthv", query, state) / 2, TOLERANCE["float32"])


def test_orthonormal_keys_with_beta_one_store_their_values_exactly():
    """64 keys of 64 channels fill the state: reading with a key returns its value, in the same chunk and afterwards."""
    generator = np.random.default_rng(0)
    keys = jnp.asarray(np.linalg.qr(generator.standard_normal((64, 64)))[0], jnp.float32)[None, :, None]
    values = jnp.asarray(generator.standard_normal((1, 64, 1, 8)), jnp.float32)
    queries, keys_ = jnp.concatenate([keys, keys], axis=1), jnp.concatenate([keys, keys], axis=1)
    beta = jnp.concatenate([jnp.ones((1, 64, 1)), jnp.zeros((1, 64, 1))], axis=1)
    output, _ = call(queries, keys_, jnp.concatenate([values, values], axis=1), beta, scale=1.0)
    assert_close_rms(output, jnp.concatenate([values, values], axis=1), TOLERANCE["float32"])


def test_writing_twice_to_a_key_with_beta_one_overwrites():
    key = jnp.full((1, 2, 1, 4), 0.5)
    output, _ = call(key, key, jnp.array([[[[7.0]], [[-2.0]]]]), jnp.ones((1, 2, 1)), scale=1.0)
    np.testing.assert_allclose(output[0, :, 0, 0], [7.0, -2.0], rtol=1e-6)


def test_orthogonal_keys_never_correct_each_other_so_it_is_linear_attention():
    keys = jnp.tile(jnp.eye(8), (1, 1, 1)).reshape(1, 8, 1, 8)
    query, value = jax.random.normal(jax.random.key(0), (2, 1, 8, 1, 8))
    beta = jax.random.uniform(jax.random.key(1), (1, 8, 1))
    log_decay = -jax.random.uniform(jax.random.key(2), (1, 8, 1))
    expected = linear_attention(query, keys, beta[..., None] * value, log_decay)
    assert_close_rms(call(query, keys, value, beta, log_decay), expected, TOLERANCE["float32"])


@pytest.mark.parametrize("chunk_size", [1, 2, 16, 64, 67, 1000])
def test_the_chunk_size_does_not_change_the_result(chunk_size):
    inputs = SCALAR.make(jax.random.key(3), 2, 67, jnp.float32)
    actual = harness.compiled(SCALAR, "xla", chunk_size)(inputs, None)
    assert_close_rms(actual, harness.oracle(SCALAR, inputs), TOLERANCE["float32"])


@pytest.mark.parametrize("time", [1, 3, 63, 65, 127])
def test_any_length_will_do(time):
    inputs = NONE.make(jax.random.key(time), 2, time, jnp.float32)
    assert_close_rms(harness.compiled(NONE, None)(inputs, None), harness.oracle(NONE, inputs), TOLERANCE["float32"])


@pytest.mark.parametrize("spec", [SCALAR, CHANNEL], ids=repr)
def test_values_and_gradients_are_exact_for_any_mixture_of_decays(spec):
    """64 tokens per chunk, so that every level of blocks occurs; resets as numbers, not as documents."""
    inputs = spec.make(jax.random.key(4), 2, 150, jnp.float32)
    kinds = jnp.array([0.0, -1e-7, -1e-3, -5.0, -40.0, -1e4, -jnp.inf])
    chances = jnp.log(jnp.array([0.3, 0.2, 0.3, 0.1, 0.04, 0.03, 0.03]))
    inputs["log_decay"] = kinds[jax.random.categorical(jax.random.key(5), chances, shape=inputs["log_decay"].shape)]
    weights = harness.random_weights(harness.compiled(spec, "reference")(inputs, None))
    actual = harness.compiled_gradients(spec, "xla", 64)(inputs, None, weights)
    assert_close_rms(actual, harness.oracle_gradients(spec, inputs, weights), TOLERANCE["float32"])


def test_a_training_step_holds_no_state_per_token():
    spec = CHANNEL
    wide = dataclasses.replace(spec, make=functools.partial(spec.make, k=32, v=32))
    inputs = jax.eval_shape(lambda: wide.make(jax.random.key(0), 1, 8192, jnp.float32))

    def loss(inputs):
        output, state = spec.call(inputs, implementation="xla")
        return jnp.sum(output) + jnp.sum(state)

    jaxpr = jax.make_jaxpr(jax.grad(loss))(inputs)
    largest = max(v.aval.size for e in equations(jaxpr.jaxpr) for v in e.outvars if hasattr(v.aval, "size"))
    assert largest <= 8192 * inputs["value"].shape[2] * 32


def test_a_single_token_takes_one_step_without_a_loop():
    inputs = CHANNEL.make(jax.random.key(0), 2, 1, jnp.float32)
    primitives = {e.primitive.name for e in equations(jax.make_jaxpr(CHANNEL.call)(inputs).jaxpr)}
    assert not primitives & {"scan", "while", "pad"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": (2, 8, 4)}, "`beta` has shape .*H=4.*`value` has H=2"),
        ({"beta": (2, 8)}, r"`beta` has shape \(2, 8\); expected \[B, T, H\]"),
        ({"value": (2, 8, 3, 3), "beta": (2, 8, 3)}, "expected G to divide H"),
        ({"log_decay": (2, 8, 2, 5)}, "`log_decay` has shape .*K=5"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"query": (2, 8, 2, 4), "key": (2, 8, 2, 4), "value": (2, 8, 2, 3), "beta": (2, 8, 2)} | change
    arrays: dict[str, Any] = {n: jnp.zeros(a) for n, a in arguments.items()}
    with pytest.raises(ValueError, match="delta_rule: .*" + message):
        delta_rule(**arrays)
