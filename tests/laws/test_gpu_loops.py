"""The XLA forms loop otherwise where they are made for a GPU; the laws of results and gradients hold there, too.

No GPU and no kernel is involved: traced for a GPU, the XLA forms run on whatever is here.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from seqjax.ops import _chunks, linear_recurrence
from tests.laws import harness
from tests.laws.harness import TOLERANCE, assert_close_rms
from tests.laws.test_ops import OPS

TIME = 23  # no multiple of a chunk; of no other test, so that nothing traced there is used here
IDS = np.array([[1] * 9 + [2] * 10 + [0] * 4, [0] * 2 + [5] * 3 + [0] * 2 + [5] + [6] * 15])
LOOPING = [spec for spec in OPS if spec.name != "causal_convolution"]


def gradients_for_a_gpu(spec, inputs, weights, ids):
    def loss(inputs):
        result = spec.call(inputs, segment_ids=ids, implementation="xla", chunk_size=spec.chunk_size)
        return harness.weighted_sum(result, weights), result

    with pallas_kernels.interpreted("gpu"):
        (_, result), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)
    return result, gradients


def compare(spec, dtype, ids, ratio):
    inputs = spec.make(jax.random.key(1), len(IDS), TIME, jnp.dtype(dtype))
    weights = harness.random_weights(jax.eval_shape(spec.call, inputs))
    actual = gradients_for_a_gpu(spec, inputs, weights, ids)
    assert_close_rms(actual, harness.oracle_gradients(spec, inputs, weights, ids), ratio)


@pytest.mark.parametrize("spec", LOOPING, ids=repr)
def test_the_form_for_gpus_and_all_its_gradients_equal_the_definition(spec, monkeypatch):
    """Of packed rows, in several groups of chunks."""
    monkeypatch.setattr(_chunks, "GROUP_TOKENS", 1)
    monkeypatch.setattr(_chunks, "GROUP_CHUNKS_ON_GPU", 16)
    compare(spec, "float32", jnp.asarray(IDS), TOLERANCE["float32"])


@pytest.mark.slow
@pytest.mark.parametrize("spec", LOOPING, ids=repr)
def test_the_form_for_gpus_in_bfloat16(spec):
    compare(spec, "bfloat16", None, 1.5 * spec.bfloat16_ratio)  # errors of so few numbers scatter


def test_groups_of_chunks_fill_a_gpu():
    """What a loop runs over, by platform: one step of an outer loop per group."""
    x = jax.ShapeDtypeStruct((4, 1024, 16, 8), jnp.float32)

    def outer_steps() -> int:
        from seqjax.ops import linear_attention

        jaxpr = jax.make_jaxpr(lambda x: linear_attention(x, x, x, implementation="xla", chunk_size=16))(x)
        lengths = [eqn.params["length"] for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "scan"]
        return lengths[0]

    assert outer_steps() == 1024 // _chunks.GROUP_TOKENS
    with pallas_kernels.interpreted("gpu"):
        assert outer_steps() == 1  # 64 chunks of 64 heads


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_a_real_decay_of_complex_inputs_has_a_real_gradient():
    """As elsewhere: the decay is widened before the loops, which would otherwise drop the imaginary part of its cotangent on their way."""
    x = jax.lax.complex(*jax.random.normal(jax.random.key(0), (2, 2, TIME, 3)))
    decay = jax.nn.sigmoid(jax.random.normal(jax.random.key(1), (2, TIME, 3)))

    def gradient(decay):
        return jax.grad(lambda decay: jnp.sum(jnp.abs(linear_recurrence(x, decay=decay, implementation="xla")[0])))(
            decay
        )

    with pallas_kernels.interpreted("gpu"), warnings.catch_warnings():
        warnings.simplefilter("error")  # JAX warns of complex numbers cast to real ones
        actual = gradient(decay)
    np.testing.assert_allclose(actual, gradient(decay), rtol=1e-5)
