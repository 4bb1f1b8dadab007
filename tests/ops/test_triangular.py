"""The blocked inverse of unit lower-triangular matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.ops._triangular import unit_lower_inverse

inverse = jax.jit(unit_lower_inverse)


@pytest.mark.parametrize("size", [1, 2, 5, 16, 40, 64])
def test_it_inverts_every_size(size):
    matrix = np.random.default_rng(size).standard_normal((3, 2, size, size)) / np.sqrt(size)
    with jax.enable_x64(True):
        actual = np.asarray(inverse(jnp.asarray(matrix)))
    exact = np.linalg.inv(np.tril(matrix, -1) + np.eye(size))
    np.testing.assert_allclose(actual, exact, rtol=0, atol=1e-12 * np.abs(exact).max())


@pytest.mark.parametrize("beta", [1.0, 1.99])
def test_float32_suffices_for_keys_that_repeat_and_beta_up_to_two(beta):
    """All keys alike: A is beta below the diagonal, its powers exceed 1e17, its inverse stays below 2."""
    strict = np.tril(np.full((64, 64), np.float32(beta)), -1)
    exact = np.linalg.inv(strict.astype(np.float64) + np.eye(64))
    assert np.abs(exact).max() < 2
    np.testing.assert_allclose(inverse(jnp.asarray(strict)), exact, rtol=0, atol=4e-5)


def dense(strict):
    return jnp.linalg.inv(jnp.tril(strict, -1) + jnp.eye(strict.shape[-1]))


def test_its_derivatives_are_those_of_the_inverse_and_ignore_the_upper_triangle():
    with jax.enable_x64(True):
        matrix, weight, change = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 20, 20)) / 4)
        actual, expected = (jax.grad(lambda m, f=f: jnp.sum(f(m) * weight))(matrix) for f in (inverse, dense))
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)
        assert not np.any(np.triu(actual))
        actual, expected = (jax.jvp(f, (matrix,), (change,))[1] for f in (inverse, dense))
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)
