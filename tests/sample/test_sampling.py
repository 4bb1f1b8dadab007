import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.sample import SamplerConfig, candidates, probabilities, sample


def by_hand(logits, temperature, top_k, top_p, min_p):
    """The definition, one token at a time, in Python floats."""
    weight = [math.exp((value - max(logits)) / temperature) for value in logits]
    order = sorted(range(len(logits)), key=lambda i: (-weight[i], i))
    kept = order[: top_k or len(order)]
    if top_p is not None:
        total, nucleus, share = sum(weight[i] for i in kept), [], 0.0
        for i in kept:
            if nucleus and share >= top_p:
                break
            nucleus.append(i)
            share += weight[i] / total
        kept = nucleus
    if min_p is not None:
        kept = [i for i in kept if weight[i] >= min_p * weight[order[0]]]
    total = sum(weight[i] for i in kept)
    return [weight[i] / total if i in kept else 0.0 for i in range(len(logits))]


SETTINGS = [
    {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None},
    {"temperature": 0.5, "top_k": None, "top_p": None, "min_p": None},
    {"temperature": 2.0, "top_k": 5, "top_p": None, "min_p": None},
    {"temperature": 1.0, "top_k": None, "top_p": 0.7, "min_p": None},
    {"temperature": 1.0, "top_k": None, "top_p": 1e-6, "min_p": None},
    {"temperature": 1.3, "top_k": None, "top_p": None, "min_p": 0.2},
    {"temperature": 1.0, "top_k": 6, "top_p": 0.8, "min_p": 0.1},
    {"temperature": 0.7, "top_k": 1, "top_p": 0.5, "min_p": 1.0},
    {"temperature": 1.0, "top_k": 1000, "top_p": 1.0, "min_p": 0.0},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_distribution_is_the_definition(setting):
    logits = np.random.default_rng(3).normal(size=(4, 11)).astype(np.float32) * 2
    got = probabilities(jnp.asarray(logits), SamplerConfig(**setting))
    np.testing.assert_allclose(got, [by_hand(row.tolist(), **setting) for row in logits], atol=1e-5)


def test_top_k_keeps_exactly_k_of_equal_tokens_and_the_lower_ids():
    got = probabilities(jnp.zeros((1, 6)), SamplerConfig(top_k=2))
    np.testing.assert_allclose(got[0], [0.5, 0.5, 0, 0, 0, 0])


def test_top_p_counts_what_top_k_left():
    # After top-k = 2 the shares are 0.5 and 0.5, so top-p = 0.5 keeps one; of all four tokens it would keep two.
    logits = jnp.zeros((1, 4))
    assert np.count_nonzero(probabilities(logits, SamplerConfig(top_k=2, top_p=0.5))) == 1
    assert np.count_nonzero(probabilities(logits, SamplerConfig(top_p=0.5))) == 2


@pytest.mark.parametrize(
    "config", [SamplerConfig(0.8), SamplerConfig(1.0, top_k=3), SamplerConfig(1.0, top_p=0.8, min_p=0.05)], ids=str
)
def test_frequencies_of_draws_match_the_distribution(config):
    logits = jnp.asarray([[0.0, 1.0, -1.0, 2.0, 0.5, -3.0]])
    draws = 20_000
    tokens = sample(jax.random.split(jax.random.key(7), draws), jnp.repeat(logits, draws, 0), config)
    frequency = np.bincount(np.asarray(tokens), minlength=6) / draws
    expected = np.asarray(probabilities(logits, config))[0]
    # Five standard deviations of a binomial share; forbidden tokens have none.
    assert np.all(np.abs(frequency - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws))


def test_greedy_is_the_first_maximum_whatever_the_filters():
    logits = jnp.asarray([[1.0, 3.0, 3.0], [-5.0, -9.0, -7.0]])
    for config in (SamplerConfig(0.0), SamplerConfig(0.0, top_k=2, top_p=0.1, min_p=0.5)):
        assert sample(jax.random.split(jax.random.key(0), 2), logits, config).tolist() == [1, 0]


def test_tiny_temperature_and_huge_logits_stay_finite():
    logits = jnp.asarray([[1e4, 1e4 - 1.0, -1e30, -jnp.inf]])
    got = probabilities(logits, SamplerConfig(1e-6, top_p=0.9, min_p=0.1))
    np.testing.assert_array_equal(got[0], [1, 0, 0, 0])


def test_a_row_does_not_depend_on_its_batch():
    logits = jax.random.normal(jax.random.key(0), (5, 50))
    keys = jax.random.split(jax.random.key(1), 5)
    config = SamplerConfig(1.2, top_p=0.95)
    together = sample(keys, logits, config)
    alone = [int(sample(keys[i : i + 1], logits[i : i + 1], config)[0]) for i in range(5)]
    assert together.tolist() == alone


def test_bfloat16_logits_are_ranked_in_float32():
    weights, ids = candidates(jnp.asarray([[1.0, 2.0, 4.0]], jnp.bfloat16), SamplerConfig(0.3, top_k=2))
    assert weights.dtype == jnp.float32
    assert ids.tolist() == [[2, 1]]
    np.testing.assert_allclose(weights[0], [0.0, -2 / 0.3], rtol=1e-6)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 2.0),
    ],
)
def test_values_out_of_range_are_named(argument, value):
    with pytest.raises(ValueError, match=rf"`{argument}` is {value}"):
        SamplerConfig(**{argument: value})
