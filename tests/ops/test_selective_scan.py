"""Selective scan: what is its own beyond the laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.ops import linear_recurrence, selective_scan
from tests.laws.harness import TOLERANCE, assert_close_rms

KEYS = jax.random.split(jax.random.key(0), 5)
INPUTS = {
    "x": jax.random.normal(KEYS[0], (2, 37, 4)),
    "delta": jax.nn.softplus(jax.random.normal(KEYS[1], (2, 37, 4))),
    "A": -jnp.exp(jax.random.normal(KEYS[2], (4, 3))),
    "B": jax.random.normal(KEYS[3], (2, 37, 3)),
    "C": jax.random.normal(KEYS[4], (2, 37, 3)),
}


@pytest.mark.parametrize("chunk_size", [1, 5, 37, 64])
def test_any_chunk_size_gives_the_plain_loop(chunk_size):
    x, delta, A, B, C = (np.asarray(INPUTS[name], np.float64) for name in ("x", "delta", "A", "B", "C"))
    h, expected = np.zeros((2, 4, 3)), []
    for t in range(37):
        h = np.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * x[:, t])[..., None] * B[:, t, None]
        expected.append(np.einsum("bdn,bn->bd", h, C[:, t]))
    actual = selective_scan(**INPUTS, chunk_size=chunk_size)
    assert_close_rms(actual, (np.stack(expected, 1), h), TOLERANCE["float32"])


def test_one_state_per_channel_is_the_elementwise_recurrence():
    ones = jnp.ones((2, 37, 1))
    x, delta, A = INPUTS["x"], INPUTS["delta"], INPUTS["A"][:, :1]
    actual = selective_scan(x, delta, A, ones, ones)[0]
    expected = linear_recurrence(delta * x, delta * A[:, 0])[0]
    assert_close_rms(actual, np.asarray(expected), TOLERANCE["float32"])


def test_a_step_of_size_zero_leaves_the_state_alone():
    state = jax.random.normal(KEYS[0], (2, 4, 3))
    after = selective_scan(**INPUTS | {"delta": jnp.zeros((2, 37, 4))}, initial_state=state)[1]
    np.testing.assert_array_equal(after, state)


def test_training_memory_holds_no_state_per_token():
    batch, dim, states = 1, 32, 16

    def temporary(time):
        shapes = [(batch, time, dim)] * 2 + [(dim, states)] + [(batch, time, states)] * 2
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        loss = jax.grad(lambda *a: jnp.sum(selective_scan(*a)[0] ** 2), argnums=range(5))
        return jax.jit(loss).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(2048), temporary(16384)
    per_token = (long - short) / (16384 - 2048)
    assert per_token < 4 * dim * states / 2, "grows by as much as half a state per token"
    assert long < 16384 * dim * states * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": INPUTS["delta"][:, :9]}, "`delta` .* T=9"),
        ({"A": INPUTS["A"].T}, "`A` has shape"),
        ({"B": INPUTS["B"][..., :2]}, "`B` .* N=2"),
        ({"C": INPUTS["C"].astype(jnp.int32)}, "`C` has dtype int32"),
        ({"initial_state": jnp.ones((2, 3, 4))}, "`initial_state` has shape"),
        ({"segment_ids": jnp.ones((2, 37))}, "`segment_ids` has dtype float32"),
        ({"chunk_size": -1}, "`chunk_size` is -1"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**INPUTS | change)
