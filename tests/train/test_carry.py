import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqjax.models import LanguageModel
from seqjax.tasks import NextToken, batch_axes, merge_rows, reset_rows, split_rows


@pytest.fixture(scope="module")
def model(tiny_model):
    return LanguageModel(tiny_model, rngs=nnx.Rngs(0))


def batch(key, time, rows=4, **more):
    tokens = jax.random.randint(jax.random.key(key), (rows, time + 1), 0, 320)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": jnp.ones((rows, time), jnp.int32),
        "loss_mask": jnp.ones((rows, time)),
    } | more


def test_carried_state_makes_two_windows_one_text_and_reset_separates_them(model):
    task = NextToken(carry=True)
    loss = jax.jit(lambda b, c: task.loss(model, b, jax.random.key(0), c))
    whole = batch(0, 16)
    first, second = ({name: x[:, half] for name, x in whole.items()} for half in (slice(0, 8), slice(8, 16)))
    begin, go_on = (jnp.full(4, value) for value in (True, False))
    total, _, _ = task.loss(model, whole, jax.random.key(0), task.initial_carry(model, 4))
    junk = jax.tree.map(lambda x: x + jnp.ones_like(x), task.initial_carry(model, 4))
    loss_first, _, carry = loss(first | {"reset": begin}, junk)
    loss_second, _, _ = loss(second | {"reset": go_on}, carry)
    np.testing.assert_allclose((loss_first + loss_second) / 2, total, rtol=1e-5)
    fresh, _, _ = loss(second | {"reset": begin}, carry)
    alone, _, _ = loss(second | {"reset": begin}, junk)
    np.testing.assert_allclose(fresh, alone, rtol=1e-6)
    assert abs(fresh - loss_second) > 1e-4


def test_metrics_are_means_over_unmasked_tokens(model):
    task = NextToken(z_loss=0.1, chunk_size=8)
    mask = jnp.ones((4, 8)).at[1:, 3:].set(0)
    rows = batch(1, 8, loss_mask=mask)
    value, metrics, carry = jax.jit(lambda b: task.loss(model, b, jax.random.key(0), None))(rows)
    logits, _ = model(rows["tokens"])
    log_normaliser = jax.nn.logsumexp(logits, -1)
    nll = log_normaliser - jnp.take_along_axis(logits, rows["targets"][..., None], -1)[..., 0]
    assert carry is None and float(metrics["tokens"]) == mask.sum()
    np.testing.assert_allclose(metrics["loss"], (nll * mask).sum() / mask.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["z_loss"], (0.1 * log_normaliser**2 * mask).sum() / mask.sum(), rtol=1e-5)
    np.testing.assert_allclose(value, metrics["loss"] + metrics["z_loss"], rtol=1e-6)


def test_a_batch_of_padding_has_loss_and_gradient_zero(model):
    rows = batch(1, 8, loss_mask=jnp.zeros((4, 8)), segment_ids=jnp.zeros((4, 8), jnp.int32))
    gradient = jax.jit(jax.grad(lambda m: NextToken().loss(m, rows, jax.random.key(0), None)[0]))(model)
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(leaf, 0)


def test_rows_are_found_reset_split_and_merged_wherever_their_axis_is():
    def make(rows):
        return {"stacked": jnp.zeros((3, rows, 2)), "flat": jnp.zeros((rows,))}

    axes = batch_axes(make)
    assert axes == {"stacked": 1, "flat": 0}
    carry = {"stacked": jnp.arange(36.0).reshape(3, 6, 2), "flat": jnp.arange(6.0)}
    parts = split_rows(carry, 3, axes)
    assert parts["stacked"].shape == (3, 3, 2, 2)
    np.testing.assert_array_equal(parts["flat"], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(parts["stacked"][1], carry["stacked"][:, 1::3])
    jax.tree.map(np.testing.assert_array_equal, merge_rows(parts, axes), carry)
    reset = reset_rows(carry, make(6), jnp.arange(6) == 2, axes)
    np.testing.assert_array_equal(reset["flat"], [0, 1, 0, 3, 4, 5])
    np.testing.assert_array_equal(reset["stacked"][:, [2]], 0)
    np.testing.assert_array_equal(reset["stacked"][:, 3], carry["stacked"][:, 3])


def test_state_without_a_batch_axis_is_refused():
    with pytest.raises(ValueError, match=r"\['count'\].*needs one axis that is the batch size"):
        batch_axes(lambda rows: {"count": jnp.zeros(3)})
