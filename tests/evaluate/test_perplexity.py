import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqjax.data import Corpus
from seqjax.evaluate import head, perplexity
from tests.evaluate.corpora import open_corpus, write_corpus
from tests.sample.tiny import TinyRecurrent

TEXTS = ["one two three four five six", "a", "naïve 🎉", "", "the long document goes on and on, " * 6]
EOS, VOCABULARY = 256, 257


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return open_corpus(tmp_path_factory.mktemp("corpus") / "c", TEXTS)


@pytest.fixture(scope="module")
def model():
    return TinyRecurrent(VOCABULARY, 12, rngs=nnx.Rngs(2))


class Bigram(nnx.Module):
    """p(next | token) is a table; the state is empty but has its batch axis."""

    def __init__(self, log_probabilities):
        self.table = nnx.Param(jnp.asarray(log_probabilities))

    def initial_state(self, batch_size):
        return jnp.zeros((batch_size, 1))

    def hidden(self, tokens, state=None, *, segment_ids=None):
        return jnp.eye(self.table.shape[0])[tokens], self.initial_state(tokens.shape[0]) if state is None else state

    def logits(self, hidden):
        return self.table[...][jnp.argmax(hidden, -1)]


class Counter(Bigram):
    """The logit of byte "a" is half the number of tokens read since the document's or the context's start, at most 8."""

    def __init__(self):
        super().__init__(jnp.zeros((VOCABULARY, VOCABULARY)))

    def hidden(self, tokens, state=None, *, segment_ids=None):
        state = self.initial_state(tokens.shape[0]) if state is None else state
        ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids

        def step(carry, inputs):
            count, previous = carry
            segment = inputs
            fresh = (previous != 0) & (segment != previous)
            count = jnp.where(segment == 0, count, jnp.where(fresh, 0, count) + 1)
            return (count, jnp.where(segment == 0, previous, segment)), count

        start = (state[:, 0], jnp.zeros(tokens.shape[0], jnp.int32))
        (count, _), out = jax.lax.scan(step, start, ids.T)
        return out.T[..., None], count[:, None]

    def logits(self, hidden):
        return jnp.minimum(hidden / 2, 8.0) * (jnp.arange(VOCABULARY) == ord("a"))


def by_hand(model, text, width=None):
    """Losses of a document: the model run on eos + text, whole or in pieces of ``width`` inputs, one softmax per token."""
    tokens = [*text.encode(), EOS]
    inputs = [EOS, *tokens[:-1]]
    width = width or len(inputs)
    losses = []
    for start in range(0, len(inputs), width):
        logits, _ = model(np.array([inputs[start : start + width]]))
        log_probabilities = np.asarray(jax.nn.log_softmax(logits[0].astype(jnp.float32)))
        losses += [-log_probabilities[i, target] for i, target in enumerate(tokens[start : start + width])]
    return losses


def test_uniform_model_has_the_vocabulary_as_perplexity(corpus):
    result = perplexity(Bigram(np.zeros((VOCABULARY, VOCABULARY))), corpus, window=16, batch_size=2)
    assert result.tokens == sum(len(text.encode()) + 1 for text in TEXTS)
    assert result.bytes == sum(len(text.encode()) for text in TEXTS)
    assert result.words == sum(len(text.split()) for text in TEXTS)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-5)
    assert result.word_perplexity == pytest.approx(
        math.exp(result.tokens * math.log(VOCABULARY) / result.words), rel=1e-4
    )
    assert result.bits_per_byte == pytest.approx(math.log2(VOCABULARY) * result.tokens / result.bytes, rel=1e-5)
    assert result.complete


@pytest.mark.parametrize("state", ["carry", "reset"])
def test_bigram_model_scores_every_transition_once(corpus, state):
    table = np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY)) * 2
    log_probabilities = table - np.log(np.exp(table).sum(1, keepdims=True))
    expected = 0.0
    for text in TEXTS:
        tokens = [EOS, *text.encode(), EOS]
        expected -= sum(log_probabilities[a, b] for a, b in zip(tokens[:-1], tokens[1:]))
    # Logits need not be normalised: an offset per row changes nothing.
    result = perplexity(Bigram(table + 3.0), corpus, state=state, window=7, batch_size=3)
    assert result.nats == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("window", "batch_size"), [(512, 1), (16, 2), (5, 3), (1, 7), (64, 8)])
def test_carried_state_gives_whole_document_losses_for_any_window_and_batch(corpus, model, window, batch_size):
    result = perplexity(model, corpus, state="carry", window=window, batch_size=batch_size, chunk_tokens=batch_size * 3)
    expected = [sum(by_hand(model, text)) for text in TEXTS]
    np.testing.assert_allclose([document.nats for document in result.documents], expected, rtol=1e-4)
    assert result.nats == pytest.approx(sum(expected), rel=1e-5)
    assert [document.name for document in result.documents] == [f"text-{i}" for i in range(len(TEXTS))]


def test_reset_state_gives_window_losses_for_any_batch(tmp_path, model):
    text = TEXTS[-1]
    corpus = open_corpus(tmp_path / "c", [text])  # one document: its windows are those of the split
    expected = by_hand(model, text, 16)
    for batch_size in (1, 4):
        result = perplexity(model, corpus, state="reset", window=16, batch_size=batch_size)
        assert result.nats == pytest.approx(sum(expected), rel=1e-5)
    assert abs(sum(expected) - sum(by_hand(model, text))) > 1  # the two kinds of context differ


def test_loss_by_position_falls_with_a_carried_state_and_is_flat_past_the_window_without(tmp_path):
    length, window = 300, 8
    corpus = open_corpus(tmp_path / "c", ["a" * length] * 3)

    def loss(count, target=1.0):
        logit = min(count / 2, 8.0)
        return math.log(math.exp(logit) + VOCABULARY - 1) - logit * target

    carried = perplexity(Counter(), corpus, state="carry", window=window, batch_size=2)
    for bucket in carried.by_position:
        expected = [loss(p + 1, p < length) for p in range(bucket.start, min(bucket.stop, length + 1))]
        assert bucket.tokens == 3 * len(expected)
        assert bucket.nats_per_token == pytest.approx(np.mean(expected), rel=1e-5)
        assert bucket.standard_error == pytest.approx(np.std(expected) / math.sqrt(bucket.tokens), abs=1e-3)
    assert carried.by_position[0].start == 0
    assert all(a.stop == b.start for a, b in zip(carried.by_position, carried.by_position[1:]))

    fresh = perplexity(Counter(), corpus, state="reset", window=window, batch_size=2)
    losses = [loss(c + 1) for c in range(window)]
    far = [bucket for bucket in fresh.by_position if bucket.start >= 32 and bucket.stop <= length]
    assert far
    assert all(min(losses) <= bucket.nats_per_token <= max(losses) for bucket in far)
    assert carried.by_position[-2].nats_per_token < 0.1 < min(bucket.nats_per_token for bucket in far)
    # The first window begins with the document, so place in the window and context agree there.
    assert [bucket.start for bucket in fresh.by_window_position] == [0, 1, 2, 3, 4, 6]


@pytest.mark.parametrize("state", ["carry", "reset"])
def test_a_part_is_the_first_tokens_of_the_split(corpus, model, state):
    count = len(TEXTS[0].encode()) + 1 + 2 + 4  # two documents, then "naï" of the third
    result = perplexity(model, corpus, state=state, window=512, batch_size=2, max_tokens=count)
    assert not result.complete
    assert result.tokens == count
    assert len(result.documents) == 3
    if state == "carry":
        expected = [sum(by_hand(model, TEXTS[0])), sum(by_hand(model, TEXTS[1])), sum(by_hand(model, TEXTS[2])[:4])]
        np.testing.assert_allclose([document.nats for document in result.documents], expected, rtol=1e-4)
    assert result.documents[2].bytes == 4
    assert perplexity(model, corpus, max_tokens=10**9).complete


def test_a_part_leaves_the_corpus_as_it_was(corpus):
    before = corpus.document_offsets.copy(), corpus.document_bytes.copy(), corpus.num_tokens
    part = head(corpus, 30)
    assert part.num_tokens == 30
    assert part.document_offsets.tolist() == [0, 28, 30]
    assert part.document_bytes.tolist() == [27, 1]
    assert corpus.num_tokens == before[2]
    np.testing.assert_array_equal(corpus.document_offsets, before[0])
    np.testing.assert_array_equal(corpus.document_bytes, before[1])


@pytest.mark.parametrize(("convention", "words"), [("whitespace", 4), ("whitespace+newlines", 6)])
def test_a_part_counts_words_by_the_corpus_convention(tmp_path, convention, words):
    path = write_corpus(tmp_path / "c", {"validation": ["one two\nthree\nfour five\n"]}, convention=convention)
    part = head(Corpus.open(path, "validation"), len("one two\nthree\nfour"))
    assert part.document_words.tolist() == [words]


def test_result_is_json_and_its_tables_add_up(corpus, model):
    result = perplexity(model, corpus, window=32, batch_size=4)
    row = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert row["documents"][3]["bits_per_byte"] is None  # the empty text has no bytes
    assert row["perplexity"] == pytest.approx(math.exp(row["nats"] / row["tokens"]))
    assert sum(document["nats"] for document in row["documents"]) == pytest.approx(row["nats"])
    for table in (row["by_position"], row["by_window_position"]):
        assert sum(bucket["tokens"] for bucket in table) == row["tokens"]
        assert sum(bucket["tokens"] * bucket["nats_per_token"] for bucket in table) == pytest.approx(row["nats"])


def test_progress_reaches_the_number_of_tokens(corpus, model):
    seen = []
    perplexity(model, corpus, window=16, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (corpus.num_tokens, corpus.num_tokens)


def test_non_finite_loss_names_document_and_place(corpus):
    table = np.zeros((VOCABULARY, VOCABULARY))
    table[ord("v")] = np.nan  # "five": the target after v
    with pytest.raises(FloatingPointError, match="token 22 of document 0"):
        perplexity(Bigram(table), corpus, batch_size=2)


def test_a_smaller_model_vocabulary_is_refused(corpus):
    with pytest.raises(ValueError, match="the model has 200 tokens, the corpus uses 257"):
        perplexity(TinyRecurrent(200, 4, rngs=nnx.Rngs(0)), corpus)


@pytest.mark.parametrize(
    ("argument", "value"), [("state", "none"), ("max_tokens", 0), ("window", 0), ("batch_size", 0)]
)
def test_mistakes_are_named(corpus, model, argument, value):
    with pytest.raises(ValueError, match=f"{argument}.* is .*{value}"):
        perplexity(model, corpus, **{argument: value})
