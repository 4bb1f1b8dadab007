import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.tasks import chunked_cross_entropy


def inputs(batch=3, time=11, dim=8, vocab=37, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (batch, time, dim)).astype(dtype)
    unembedding = jax.random.normal(keys[1], (dim, vocab))
    targets = jax.random.randint(keys[2], (batch, time), 0, vocab)
    mask = jax.random.uniform(keys[3], (batch, time)) * (jax.random.uniform(keys[3], (batch, time)) > 0.3)
    return hidden, unembedding, targets, mask


def plain(hidden, unembedding, targets, mask, z_loss=0.0, softcap=None):
    logits = (hidden.astype(jnp.float32) @ unembedding).astype(jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    nll = normaliser - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jnp.sum(mask * (nll + z_loss * normaliser**2)), {
        "nll": jnp.sum(mask * nll),
        "z_loss": jnp.sum(mask * z_loss * normaliser**2),
        "correct": jnp.sum(mask * (jnp.argmax(logits, -1) == targets)),
        "tokens": jnp.sum(mask),
    }


@pytest.mark.parametrize("chunk_size", [1, 6, 12, 1000])
@pytest.mark.parametrize(("z_loss", "softcap"), [(0.0, None), (0.1, 3.0)])
def test_chunked_equals_plain_in_value_metrics_and_gradients(chunk_size, z_loss, softcap):
    arguments = inputs()

    def chunked(hidden, unembedding, targets, mask):
        return chunked_cross_entropy(
            hidden, unembedding, targets, mask, chunk_size=chunk_size, z_loss=z_loss, softcap=softcap
        )

    value_and_grad = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True))
    (value, aux), gradients = value_and_grad(*arguments)
    (expected, expected_aux), expected_gradients = jax.value_and_grad(plain, argnums=(0, 1), has_aux=True)(
        *arguments, z_loss, softcap
    )
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    assert aux.keys() == expected_aux.keys()
    for name in aux:
        np.testing.assert_allclose(aux[name], expected_aux[name], rtol=2e-6, atol=1e-6, err_msg=name)
    for actual, reference in zip(gradients, expected_gradients):
        np.testing.assert_allclose(actual, reference, rtol=1e-4, atol=2e-6)
    undifferentiated, undifferentiated_aux = jax.jit(chunked)(*arguments)
    np.testing.assert_allclose(undifferentiated, expected, rtol=2e-6)
    np.testing.assert_allclose(undifferentiated_aux["correct"], expected_aux["correct"], rtol=2e-6)


def test_masked_tokens_contribute_nothing_even_if_they_are_infinite():
    hidden, unembedding, targets, mask = inputs()
    poisoned = jnp.where((mask == 0)[..., None], jnp.inf, hidden)
    value_and_grad = jax.value_and_grad(
        lambda h, w: chunked_cross_entropy(h, w, targets, mask > 0, chunk_size=6)[0], argnums=(0, 1)
    )
    clean_results = value_and_grad(hidden, unembedding)
    jax.tree.map(np.testing.assert_array_equal, value_and_grad(poisoned, unembedding), clean_results)
    assert np.isfinite(clean_results[1][1]).all()


def test_bfloat16_products_stay_close_to_float32_and_gradients_keep_their_dtypes():
    hidden, unembedding, targets, mask = inputs(dim=64, dtype=jnp.bfloat16)
    (value, _), (d_hidden, d_unembedding) = jax.value_and_grad(chunked_cross_entropy, argnums=(0, 1), has_aux=True)(
        hidden, unembedding, targets, mask, chunk_size=9
    )
    (expected, _), (e_hidden, e_unembedding) = jax.value_and_grad(plain, argnums=(0, 1), has_aux=True)(
        hidden, unembedding, targets, mask
    )
    assert (d_hidden.dtype, d_unembedding.dtype, value.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    np.testing.assert_allclose(value, expected, rtol=5e-3)
    for actual, reference in ((d_hidden, e_hidden), (d_unembedding, e_unembedding)):
        error = jnp.linalg.norm((actual - reference).astype(jnp.float32)) / jnp.linalg.norm(reference)
        assert error < 1e-2


def test_memory_does_not_hold_the_logits():
    batch, time, dim, vocab, chunk = 4, 512, 32, 4096, 64
    arguments = (
        jax.ShapeDtypeStruct((batch, time, dim), jnp.float32),
        jax.ShapeDtypeStruct((dim, vocab), jnp.float32),
        jax.ShapeDtypeStruct((batch, time), jnp.int32),
        jax.ShapeDtypeStruct((batch, time), jnp.float32),
    )
    logits_bytes = batch * time * vocab * 4

    def temporary(function):
        gradient = jax.jit(jax.grad(lambda *a: function(*a)[0], argnums=(0, 1)))
        memory = gradient.lower(*arguments).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporary(plain) > logits_bytes
    assert temporary(lambda *a: chunked_cross_entropy(*a, chunk_size=chunk)) < logits_bytes / 5


def test_wrong_shapes_are_named():
    hidden, unembedding, targets, mask = inputs()
    with pytest.raises(ValueError, match=r"`unembedding`.*\(8, V\)"):
        chunked_cross_entropy(hidden, unembedding.T, targets, mask)
    with pytest.raises(ValueError, match="`targets`"):
        chunked_cross_entropy(hidden, unembedding, targets[:, 1:], mask)
    with pytest.raises(ValueError, match="`mask`"):
        chunked_cross_entropy(hidden, unembedding, targets, mask[:1])
    with pytest.raises(ValueError, match="`chunk_size`"):
        chunked_cross_entropy(hidden, unembedding, targets, mask, chunk_size=0)
