"""Elementwise recurrence: what is its own beyond the laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.ops import linear_recurrence
from tests.laws.harness import TOLERANCE, assert_close_rms

X = jax.random.normal(jax.random.key(0), (2, 40, 3))
DECAY = jax.nn.sigmoid(jax.random.normal(jax.random.key(1), (2, 40, 3)))


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 40, 100])
def test_any_chunk_size_gives_the_plain_loop(chunk_size):
    h, expected = np.zeros((2, 3)), []
    for t in range(40):
        h = np.asarray(DECAY[:, t], np.float64) * h + np.asarray(X[:, t], np.float64)
        expected.append(h)
    output, state = linear_recurrence(X, decay=DECAY, chunk_size=chunk_size)
    assert_close_rms((output, state), (np.stack(expected, 1), h), TOLERANCE["float32"])


def test_log_decay_and_decay_are_the_same_recurrence():
    by_log = linear_recurrence(X, jnp.log(DECAY))
    assert_close_rms(by_log, jax.device_get(linear_recurrence(X, decay=DECAY)), TOLERANCE["float32"])


def test_a_complex_decay_of_constant_angle_is_a_rotation():
    decay = jnp.full(X.shape, jnp.exp(1j * 0.3))
    impulse = jnp.zeros_like(X).at[:, 0].set(1.0)
    output, state = linear_recurrence(impulse, decay=decay)
    assert output.dtype == state.dtype == jnp.complex64
    assert_close_rms(output[0, :, 0], np.exp(0.3j * np.arange(40)), TOLERANCE["float32"])


def test_decay_zero_forgets_exactly_and_decay_one_sums_exactly():
    assert np.array_equal(linear_recurrence(X, decay=jnp.zeros_like(X))[0], X)
    ones = jnp.ones_like(X)
    np.testing.assert_array_equal(linear_recurrence(ones, ones * 0)[0][0, :, 0], np.arange(1, 41))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_the_gradient_of_a_log_decay_of_minus_infinity_is_zero_not_nan(implementation):
    log_decay = jnp.log(DECAY).at[:, 7].set(-jnp.inf)
    loss = lambda g: jnp.sum(linear_recurrence(X, g, implementation=implementation)[0] ** 2)  # noqa: E731
    gradient = jax.grad(loss)(log_decay)
    assert np.all(np.isfinite(gradient)) and not np.any(gradient[:, 7]) and np.all(gradient[:, 8] != 0)


def test_dtypes_of_output_and_state():
    half = X.astype(jnp.bfloat16)
    output, state = linear_recurrence(half, decay=DECAY.astype(jnp.bfloat16))
    assert (output.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (X, DECAY)]
        output, state = linear_recurrence(wide[0], decay=wide[1])
        assert (output.dtype, state.dtype) == (jnp.float64, jnp.float64)


def test_an_empty_row_returns_the_state_it_was_given():
    state = jnp.ones((2, 3))
    output, after = linear_recurrence(X[:, :0], decay=DECAY[:, :0], initial_state=state)
    assert output.shape == (2, 0, 3)
    np.testing.assert_array_equal(after, state)


def test_training_memory_is_linear_in_time():
    def temporary(time):
        loss = lambda x, g: jnp.sum(linear_recurrence(x, g)[0] ** 2)  # noqa: E731
        shape = jax.ShapeDtypeStruct((1, time, 64), jnp.float32)
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes / time

    assert temporary(16384) < 1.2 * temporary(1024)


MISTAKES = [
    ({"decay": None}, "exactly one of `log_decay` and `decay`; got neither"),
    ({"log_decay": DECAY}, "got both"),
    ({"decay": DECAY[:, :, :2]}, r"`decay` has shape .*D=2, but `x` has D=3"),
    ({"x": X[0]}, r"`x` has shape \(40, 3\); expected \[B, T, D\]"),
    ({"x": X.astype(jnp.int32)}, "`x` has dtype int32"),
    ({"decay": None, "log_decay": DECAY.astype(jnp.complex64)}, "`log_decay` has dtype complex64"),
    ({"initial_state": jnp.ones((1, 3))}, "`initial_state` has shape"),
    ({"segment_ids": jnp.ones((2, 40))}, "`segment_ids` has dtype float32"),
    ({"chunk_size": 0}, "`chunk_size` is 0"),
    ({"implementation": "triton"}, "`implementation` is 'triton'"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        linear_recurrence(**({"x": X, "decay": DECAY} | change))


def test_it_runs_in_a_scan_under_remat_and_in_half_precision():
    """As a layer would use it: stacked, rematerialised, bfloat16."""

    @functools.partial(jax.checkpoint)
    def layer(x, decay):
        return linear_recurrence(x, decay=decay)[0], None

    def loss(x):
        return jnp.sum(jax.lax.scan(layer, x, jnp.stack([DECAY, DECAY]).astype(x.dtype))[0].astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss))(X.astype(jnp.bfloat16))
    assert gradient.dtype == jnp.bfloat16 and np.all(np.isfinite(np.asarray(gradient, np.float32)))
