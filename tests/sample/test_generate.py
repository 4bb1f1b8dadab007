from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from seqjax.sample import SamplerConfig, chunk_widths, generate, prefill
from tests.sample.tiny import Successor, TinyRecurrent

PROMPTS = [[3], [1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4], [7, 7, 2, 0, 11], list(range(30)) * 2]


@pytest.fixture(scope="module")
def model():
    return TinyRecurrent(40, 16, rngs=nnx.Rngs(0))


def naive(model, prompt, count):
    """Greedy continuation by running the whole sequence again for every token (zeros behind it cannot be seen)."""
    run = jax.jit(lambda model, tokens: model(tokens)[0])
    tokens = np.zeros((1, 80), np.int32)
    tokens[0, : len(prompt)] = prompt
    for end in range(len(prompt), len(prompt) + count):
        tokens[0, end] = np.argmax(run(model, tokens)[0, end - 1])
    return tokens[0, len(prompt) : len(prompt) + count].tolist()


@pytest.mark.parametrize("chunk", [512, 16, 7])
def test_prefill_ends_at_the_last_real_token_of_each_row(model, chunk):
    logits, state = prefill(model, PROMPTS, chunk=chunk)
    for row, prompt in enumerate(PROMPTS):
        expected, expected_state = model(np.asarray([prompt]))
        np.testing.assert_allclose(logits[row], expected[0, -1], atol=1e-4)
        np.testing.assert_allclose(state["hidden"][row], expected_state["hidden"][0], atol=1e-5)


def test_greedy_batch_equals_running_the_whole_sequence_again(model):
    results = generate(model, PROMPTS, max_new_tokens=12, sampler=SamplerConfig(0.0), block=5, prefill_chunk=16)
    assert [result.tokens for result in results] == [naive(model, prompt, 12) for prompt in PROMPTS]
    assert {result.finish for result in results} == {"length"}


def test_sampled_batch_equals_each_prompt_alone_and_any_block_or_chunk(model):
    sampler = SamplerConfig(1.1, top_p=0.95)
    together = generate(model, PROMPTS, max_new_tokens=21, sampler=sampler, seed=5)
    alone = [
        generate(model, [prompt], max_new_tokens=21, sampler=sampler, seed=5 + row, block=4, prefill_chunk=16)[0]
        for row, prompt in enumerate(PROMPTS)
    ]
    assert together == alone
    assert generate(model, PROMPTS, max_new_tokens=21, sampler=sampler, seed=[5, 6, 7, 8], block=1) == together


def test_seeds_reproduce_and_differ(model):
    def draw(seed):
        return generate(model, [[1, 2]] * 2, max_new_tokens=24, seed=seed)

    first = draw(0)
    assert first == draw(0)
    assert first[0] != first[1]
    assert first[1] == draw(1)[0]
    assert draw(-1)[1] == first[0]


def test_first_token_has_the_models_distribution(model):
    """2000 rows of one prompt: frequencies against softmax of the logits (five standard deviations)."""
    rows = 2000
    results = generate(model, [[5, 6]] * rows, max_new_tokens=1, seed=11)
    frequency = np.bincount([result.tokens[0] for result in results], minlength=40) / rows
    expected = np.asarray(jax.nn.softmax(model(np.asarray([[5, 6]]))[0][0, -1]))
    assert np.all(np.abs(frequency - expected) <= 5 * np.sqrt(expected * (1 - expected) / rows) + 1 / rows)


def test_stop_tokens_end_rows_one_by_one():
    model = Successor(20)
    results = generate(model, [[1], [5], [9]], max_new_tokens=8, stop_ids=[7, 19], block=3)
    assert [result.tokens for result in results] == [[2, 3, 4, 5, 6], [6], list(range(10, 18))]
    assert [result.finish for result in results] == ["stop_token", "stop_token", "length"]
    assert [result.stop_token for result in results] == [7, 7, None]


def test_on_token_streams_in_order_and_can_end_a_row():
    seen = []

    def on_token(row, token):
        seen.append((row, token))
        return row == 0 and token == 4

    results = generate(Successor(20), [[1], [5]], max_new_tokens=6, on_token=on_token, block=2)
    assert results[0].tokens == [2, 3, 4]
    assert results[0].finish == "stopped"
    assert results[1].tokens == [6, 7, 8, 9, 10, 11]
    assert [token for row, token in seen if row == 0] == [2, 3, 4]
    assert [token for row, token in seen if row == 1] == results[1].tokens
    assert seen.index((1, 7)) < seen.index((0, 4))  # blocks of two: streamed before the end


def test_decoding_stops_early_once_every_row_is_done():
    calls = []

    class Counting(Successor):
        def __call__(self, tokens, state=None, *, segment_ids=None):
            jax.debug.callback(lambda: calls.append(1))
            return super().__call__(tokens, state, segment_ids=segment_ids)

    generate(Counting(20), [[1], [2]], max_new_tokens=1000, stop_ids=[6], block=500)
    jax.effects_barrier()
    assert len(calls) <= 6


def test_the_models_parameters_survive_donation(model):
    before = jax.tree.map(np.array, nnx.state(model))
    generate(model, PROMPTS, max_new_tokens=3)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, nnx.state(model)))


def test_few_prefill_shapes_cover_every_prompt_length():
    for length in range(1, 2000):
        widths = chunk_widths(length, 512)
        assert sum(widths) >= length > sum(widths[:-1])
    assert {width for length in range(1, 2000) for width in chunk_widths(length, 512)} == {16, 32, 64, 128, 256, 512}


def test_other_lengths_of_prompts_and_output_compile_nothing_new():
    traces = []

    class Traced(TinyRecurrent):
        def hidden(self, tokens, state=None, *, segment_ids=None):
            traces.append(tokens.shape)
            return super().hidden(tokens, state, segment_ids=segment_ids)

    model = Traced(30, 4, rngs=nnx.Rngs(3))
    for length in (1, 17):
        generate(model, [[1] * length], max_new_tokens=3, prefill_chunk=32)
    assert set(traces) == {(1, 1), (1, 16), (1, 32)}
    known = len(traces)
    for length, count in [(9, 16), (16, 40), (31, 17), (100, 5), (200, 33)]:
        generate(model, [[1] * length], max_new_tokens=count, prefill_chunk=32)
    assert len(traces) == known


def test_zero_new_tokens(model):
    assert [result.tokens for result in generate(model, PROMPTS, max_new_tokens=0)] == [[]] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "`prompts` is empty"),
        ({"prompts": [[1], []]}, r"`prompts\[1\]` has no tokens"),
        ({"prompts": [[1, 40]]}, r"`prompts\[0\]` contains the token id 40, but the model has 40 tokens"),
        ({"prompts": [[-1]]}, "token id -1"),
        ({"prompts": [[1]], "max_new_tokens": -1}, "`max_new_tokens` is -1"),
        ({"prompts": [[1]], "block": 0}, "`block` is 0"),
        ({"prompts": [[1], [2]], "seed": [1]}, "`seed` has 1 values for 2 prompts"),
    ],
)
def test_mistakes_are_named(model, arguments: dict[str, Any], message):
    defaults: dict[str, Any] = {"max_new_tokens": 2}
    with pytest.raises(ValueError, match=message):
        generate(model, **defaults | arguments)


def test_non_finite_logits_are_an_error_not_a_token():
    model = Successor(8)
    model.table[...] = model.table[...].at[3].set(np.nan)
    with pytest.raises(FloatingPointError, match="prompt 0"):
        generate(model, [[1]], max_new_tokens=6)
