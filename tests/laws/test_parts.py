"""Rows in parts on GPUs (interpreted): what a kernel sums up of the parts, forward and in reverse, against the float64 oracle of whole rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import linear_attention as kernel
from seqjax.ops import linear_attention
from seqjax.ops._segments import segment_info, token_kinds
from tests.laws import harness, specs_matrix
from tests.laws.harness import TOLERANCE, assert_close_rms

pytestmark = pytest.mark.skipif(
    jax.version.__version_info__ < (0, 11, 1), reason="the GPU interpreter came with jax 0.11.1 (Python 3.12)"
)
TIME = 260
# Products of pairs of bfloat16 are right to 1e-5.
RATIO = {"float32": 1e-4, "bfloat16": TOLERANCE["bfloat16"]}


def inputs_of(decay, dtype, width):
    """Two heads that share a key."""
    normal = functools.partial(jax.random.normal, dtype=jnp.float32)
    keys = jax.random.split(jax.random.key(5), 5)
    inputs = {
        "query": normal(keys[0], (1, TIME, 1, width)),
        "key": normal(keys[1], (1, TIME, 1, width)),
        "value": normal(keys[2], (1, TIME, 2, width)),
    }
    if decay is not None:
        # So slow that what a part leaves is felt in the next ones.
        shape = (1, TIME, 2) if decay == "scalar" else (1, TIME, 2, width)
        inputs["log_decay"] = -0.02 * jax.nn.softplus(normal(keys[3], shape))
    inputs = {name: array.astype(dtype) for name, array in inputs.items()}
    return inputs | {"initial_state": normal(keys[4], (1, 2, width, width))}


@pytest.mark.parametrize(
    ("decay", "dtype", "packed", "width", "parts"),
    [
        (None, "bfloat16", False, 64, 3),
        ("scalar", "bfloat16", True, 64, 3),
        pytest.param(None, "bfloat16", True, 64, 3, marks=pytest.mark.slow),
        pytest.param("scalar", "float32", False, 64, 3, marks=pytest.mark.slow),
        pytest.param("scalar", "float32", True, 64, 3, marks=pytest.mark.slow),
        pytest.param("channel", "float32", True, 64, 3, marks=pytest.mark.slow),
        pytest.param("scalar", "bfloat16", True, 256, 2, marks=pytest.mark.slow),  # two warpgroups share a chunk
        pytest.param(None, "bfloat16", False, 256, 1, marks=pytest.mark.slow),
    ],
)
def test_linear_attention_in_parts_on_gpu(decay, dtype, packed, width, parts):
    """Parts of whole chunks, the last of them shorter; documents begin, end and pause inside of parts and between them."""
    inputs = inputs_of(decay, dtype, width)
    spec = specs_matrix.spec(linear_attention, specs_matrix.LINEAR, decay, 1, 2)
    padding, kinds, ids = np.zeros((1, TIME), bool), None, None
    poisoned = inputs
    if packed:
        numbers = np.ones((1, TIME), np.int32)
        numbers[0, 100:], numbers[0, 120:133], numbers[0, 250:255] = 2, 0, 0
        ids, padding = jnp.asarray(numbers), numbers == 0
        kinds = token_kinds(segment_info(ids))
        for name in spec.time_inputs:
            hidden = padding.reshape(1, TIME, *[1] * (inputs[name].ndim - 2))
            poisoned |= {name: jnp.where(hidden, jnp.nan, inputs[name]).astype(inputs[name].dtype)}
    weights = harness.random_weights(jax.eval_shape(spec.call, inputs))

    def loss(inputs):
        tokens = [inputs.get(name) for name in ("query", "key", "value", "log_decay")]
        output, state = kernel.linear_attention(*tokens, inputs["initial_state"], kinds, scale=width**-0.5, parts=parts)
        output = jnp.where(padding[..., None, None], 0, output)
        return harness.weighted_sum((output, state), weights), (output, state)

    with pallas_kernels.interpreted("gpu"):
        (_, result), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(poisoned)
    assert_close_rms((result, gradients), harness.oracle_gradients(spec, inputs, weights, ids), RATIO[dtype])
    for name in spec.time_inputs:
        assert not np.any(np.asarray(gradients[name])[padding]), f"{name}: padding has a gradient"


def test_few_heads_are_walked_in_parts_that_fill_a_gpu():
    def kernels(heads, width, dtype=jnp.bfloat16, time=32768):
        tokens = jax.ShapeDtypeStruct((1, time, heads, width), dtype)
        state = jax.ShapeDtypeStruct((1, heads, width, width), jnp.float32)
        decays = jax.ShapeDtypeStruct((1, time, heads), jnp.float32)
        call = functools.partial(kernel.linear_attention, scale=1.0)
        return str(jax.make_jaxpr(call)(tokens, tokens, tokens, decays, state))

    with pallas_kernels.interpreted("gpu"):
        # The states before all parts.
        assert "f32[8,16,128,128]" in kernels(16, 128)
        assert "f32[16,16,64,64]" in kernels(16, 64), "two of these walks have room in a multiprocessor"
        assert "f32[8,16,64,64]" in kernels(16, 64, jnp.float32)
        assert "f32[4,16,256,256]" in kernels(16, 256), "a walk forward is two thread blocks"
        assert "summary" in kernels(16, 128)
        assert "summary" not in kernels(64, 128) + kernels(16, 128, time=1024), "too many heads, or too short rows"
