"""Short convolution: what is its own beyond the laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.ops import causal_convolution
from tests.laws.harness import TOLERANCE, assert_close_rms

X = jax.random.normal(jax.random.key(0), (2, 9, 3))
WEIGHT = jax.random.normal(jax.random.key(1), (4, 3))
BIAS = jax.random.normal(jax.random.key(2), (3,))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_it_is_numpy_convolve_per_channel(implementation, width):
    actual = causal_convolution(X, WEIGHT[:width], BIAS, implementation=implementation)[0]
    expected = [[np.convolve(X[b, :, d], WEIGHT[:width][::-1, d])[:9] + BIAS[d] for d in range(3)] for b in range(2)]
    assert_close_rms(actual, np.swapaxes(np.array(expected), 1, 2), TOLERANCE["float32"])


def test_silu_comes_after_the_bias():
    plain = causal_convolution(X, WEIGHT, BIAS)[0]
    assert_close_rms(causal_convolution(X, WEIGHT, BIAS, activation="silu")[0], np.asarray(jax.nn.silu(plain)), 1e-6)


def test_the_state_is_the_last_inputs_also_when_pieces_are_shorter_than_the_taps():
    state = None
    for t in range(9):
        _, state = causal_convolution(X[:, t : t + 1], WEIGHT, initial_state=state)
    np.testing.assert_array_equal(state, X[:, -3:])
    assert state.dtype == jnp.float32


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_taps_reach_over_padding_and_stop_at_documents(implementation):
    ids = jnp.array([[1, 0, 1, 0, 0, 1, 2, 0, 2]] * 2)
    y, state = causal_convolution(X, WEIGHT, segment_ids=ids, implementation=implementation)
    first = causal_convolution(X[:, jnp.array([0, 2, 5])], WEIGHT)[0]
    second, last = causal_convolution(X[:, jnp.array([6, 8])], WEIGHT)
    assert_close_rms(y[:, jnp.array([0, 2, 5])], np.asarray(first), TOLERANCE["float32"])
    assert_close_rms(y[:, jnp.array([6, 8])], np.asarray(second), TOLERANCE["float32"])
    assert not np.any(y[:, jnp.array([1, 3, 4, 7])])
    np.testing.assert_array_equal(state, last)


def test_an_empty_row_returns_the_state_it_was_given():
    given = jnp.ones((2, 3, 3))
    y, state = causal_convolution(X[:, :0], WEIGHT, initial_state=given)
    assert y.shape == (2, 0, 3)
    np.testing.assert_array_equal(state, given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": WEIGHT[:, :2]}, "`weight` .* D=2, but `x` has D=3"),
        ({"weight": WEIGHT[:0]}, "at least one tap"),
        ({"bias": BIAS[:2]}, "`bias` has shape"),
        ({"activation": "gelu"}, "`activation` is 'gelu'"),
        ({"initial_state": jnp.ones((2, 4, 3))}, r"`initial_state` has shape .*\(2, 3, 3\)"),
        ({"x": X.astype(jnp.int32)}, "`x` has dtype int32"),
        ({"segment_ids": jnp.ones((2, 9))}, "`segment_ids` has dtype float32"),
        ({"segment_ids": jnp.ones((2, 8), jnp.int32)}, "`segment_ids` has shape"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        causal_convolution(**({"x": X, "weight": WEIGHT, "bias": BIAS} | change))
