import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqjax.data.tokenizers import Tokenizer, load_stored_tokenizer, load_tokenizer, store_tokenizer, train_bpe
from tests.data.texts import SHARED, prose

TEXT = "naïve 東京  \n\n\t 12,345 don't <|endoftext|> </s> \u2028 end\r\n"


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([prose(seed, 4000) for seed in range(8)], 400)


@pytest.fixture(scope="module")
def specs(bpe, tmp_path_factory):
    """One spec of every kind, made from a BPE and a SentencePiece model that are trained here."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizers")
    content = bpe.files()["tokenizer.json"]
    (folder / "tokenizer.json").write_bytes(content)
    (folder / "zipped").mkdir()
    (folder / "zipped" / "tokenizer.json.gz").write_bytes(gzip.compress(content))
    model = json.loads(content)["model"]
    pair = folder / "pair"
    pair.mkdir()
    (pair / "vocab.json").write_text(json.dumps(model["vocab"]))
    (pair / "merges.txt.gz").write_bytes(
        gzip.compress(("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n").encode())
    )
    (folder / "corpus.txt").write_text("".join(prose(seed, 4000) for seed in range(8)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "piece"),
        vocab_size=340,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return {
        "bytes": "bytes",
        "json": folder / "tokenizer.json",
        "json.gz": folder / "zipped",
        "pair folder": pair,
        "pair": f"{pair / 'vocab.json'},{pair / 'merges.txt.gz'}",
        "sentencepiece": folder / "piece.model",
    }


KINDS = ["bytes", "json", "json.gz", "pair folder", "pair", "sentencepiece"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_encodes_without_marks_and_stores_itself(kind, specs, tmp_path):
    tokenizer = load_tokenizer(specs[kind])
    assert isinstance(tokenizer, Tokenizer)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.eos_id not in ids and max(ids) < tokenizer.vocab_size and tokenizer.eos_id < tokenizer.vocab_size
    if kind != "sentencepiece":  # its normalisation folds white space
        assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == tokenizer.decode(ids)
    texts = [TEXT, "", "a", TEXT * 3]
    for text, batch in zip(texts, tokenizer.encode_batch(texts)):
        assert batch.dtype == np.uint32
        np.testing.assert_array_equal(batch, np.array(tokenizer.encode(text), np.uint32))
    store_tokenizer(tokenizer, tmp_path)
    again = load_stored_tokenizer(tmp_path, json.loads(json.dumps(tokenizer.to_dict())))
    assert again.to_dict() == tokenizer.to_dict() and again.encode(TEXT) == ids


def test_all_forms_of_one_bpe_give_the_same_ids_and_the_same_form_the_same_fingerprint(specs):
    loaded = {kind: load_tokenizer(specs[kind]) for kind in KINDS}
    ids = loaded["json"].encode(TEXT)
    assert all(loaded[kind].encode(TEXT) == ids for kind in ("json.gz", "pair folder", "pair"))
    assert loaded["json"].fingerprint == loaded["json.gz"].fingerprint
    assert loaded["pair"].fingerprint == loaded["pair folder"].fingerprint
    assert len({loaded[kind].fingerprint for kind in ("bytes", "json", "pair", "sentencepiece")}) == 4


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_bytes_and_byte_level_bpe_lose_nothing(bpe, text):
    assert load_tokenizer("bytes").decode(text.encode()) == text
    assert bpe.decode(bpe.encode(text)) == text


def test_training_is_reproducible_and_bounded_by_the_text(bpe):
    again = train_bpe((prose(seed, 4000) for seed in range(8)), 400)
    assert again.fingerprint == bpe.fingerprint and bpe.vocab_size == 400
    assert len(bpe.encode(prose(99, 2000))) < 0.6 * len(prose(99, 2000).encode())
    with pytest.raises(ValueError, match="supports only"):
        train_bpe(["ab" * 10], 5000)
    with pytest.raises(ValueError, match="at least 257"):
        train_bpe(["ab"], 200)


def test_errors_name_the_file_and_the_remedy(specs, tmp_path):
    with pytest.raises(ValueError, match="not found: expected `bytes`"):
        load_tokenizer(tmp_path / "nothing.json")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match="broken.*not a valid tokenizer.json"):
        load_tokenizer(tmp_path / "broken.json")
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(b"{}" * 100)[:-6])
    with pytest.raises(ValueError, match="cut.json.gz: damaged gzip"):
        load_tokenizer(tmp_path / "cut.json.gz")
    (tmp_path / "x.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "x.model")
    with pytest.raises(ValueError, match="no end-of-document token.*--eos"):
        load_tokenizer(specs["json"], eos="<nowhere>")
    with pytest.raises(ValueError, match="holds neither"):
        (tmp_path / "empty").mkdir()
        load_tokenizer(tmp_path / "empty")
    tokenizer = load_tokenizer(specs["json"])
    store_tokenizer(load_tokenizer(specs["pair"]), tmp_path)
    store_tokenizer(train_bpe([prose(1, 3000)], 300), tmp_path)
    with pytest.raises(ValueError, match="fingerprint.*changed"):
        load_stored_tokenizer(tmp_path, tokenizer.to_dict())


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_gpt2_and_neox_give_the_published_ids():
    folder = SHARED / "tokenizers"
    gpt2, neox = load_tokenizer(folder / "gpt2"), load_tokenizer(folder / "gpt-neox-20b")
    assert gpt2.encode("Hello world") == [15496, 995] and gpt2.eos_id == 50256 and gpt2.vocab_size == 50257
    assert neox.encode("Hello world") == [12092, 1533] and neox.eos_id == 0
    pair = load_tokenizer(f"{folder / 'gpt2/vocab.json.gz'},{folder / 'gpt2/merges.txt.gz'}")
    with gzip.open(SHARED / "wikitext-103/wiki.test.raw.gz", "rt", newline="") as file:
        text = file.read(100_000)
    assert pair.encode(text) == gpt2.encode(text)
