"""Rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.ops import rotary_embedding
from tests.laws.harness import TOLERANCE, assert_close_rms

X = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
POSITIONS = jnp.array([[0, 1, 2, 3, 4], [-3, 7, 100, 5, 5]])


def test_pairs_of_split_halves_turn_like_complex_numbers():
    actual = rotary_embedding(X, POSITIONS, base=100.0)
    z = np.asarray(X[..., :4], np.float64) + 1j * np.asarray(X[..., 4:], np.float64)
    turned = z * np.exp(1j * np.asarray(POSITIONS)[..., None, None] * 100.0 ** (-np.arange(4) / 4))
    assert_close_rms(actual, np.concatenate([turned.real, turned.imag], axis=-1), TOLERANCE["float32"])


def test_inner_products_depend_on_the_difference_of_positions_only():
    query, key = X[:1, :1, 0], X[1:, :1, 0]

    def product(p, s):
        turned = [rotary_embedding(a[:, :, None], jnp.array([[n]])) for a, n in ((query, p), (key, s))]
        return float(jnp.sum(turned[0] * turned[1]))

    assert product(5, 2) == pytest.approx(product(3, 0), rel=1e-5)
    assert product(1003, 1000) == pytest.approx(product(3, 0), rel=1e-4)
    assert product(3, 0) != pytest.approx(product(4, 0), rel=1e-3)


def test_a_fraction_turns_the_first_features_and_passes_the_rest():
    actual = rotary_embedding(X, POSITIONS, fraction=0.5)
    np.testing.assert_array_equal(actual[..., 4:], X[..., 4:])
    np.testing.assert_array_equal(actual[..., :4], rotary_embedding(X[..., :4], POSITIONS))


def test_lengths_are_kept_and_far_positions_in_bfloat16_use_float32_angles():
    far = jnp.full((2, 5), 65537)
    wide = rotary_embedding(X, far)
    assert_close_rms(jnp.sum(wide**2, -1), np.asarray(jnp.sum(X**2, -1)), TOLERANCE["float32"])
    narrow = rotary_embedding(X.astype(jnp.bfloat16), far)
    assert narrow.dtype == jnp.bfloat16
    assert_close_rms(narrow, np.asarray(wide), TOLERANCE["bfloat16"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[0]}, r"`x` has shape .*expected \[B, T, H, K\]"),
        ({"positions": POSITIONS[:, :4]}, "`positions` .* T=4"),
        ({"positions": POSITIONS.astype(jnp.float32)}, "`positions` has dtype float32"),
        ({"x": X.astype(jnp.int32)}, "`x` has dtype int32"),
        ({"fraction": 0.0}, "`fraction` is 0.0"),
        ({"fraction": 0.4}, "features turn in pairs"),
        ({"base": -1.0}, "`base` is -1.0"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        rotary_embedding(**({"x": X, "positions": POSITIONS} | change))
