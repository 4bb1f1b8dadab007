import gzip
import lzma

import pytest

from seqjax.evaluate import compress, document_texts, perplexity, plot_loss_by_position
from tests.evaluate.corpora import open_corpus
from tests.evaluate.test_perplexity import TEXTS, Counter

DOCUMENTS = [b"to be or not to be " * 20, b"", b"that is the question " * 10]


def test_sizes_are_those_of_the_tools():
    text = b"".join(DOCUMENTS)
    by_name = {compression.name: compression for compression in compress(DOCUMENTS)}
    expected = {"gzip -9": lambda data: gzip.compress(data, 9), "xz -9": lambda data: lzma.compress(data, preset=9)}
    assert set(by_name) == set(expected)
    for name, tool in expected.items():
        got = by_name[name]
        assert got.bytes == len(text)
        assert got.together == len(tool(text))
        assert got.separate == sum(len(tool(document)) for document in DOCUMENTS)
        assert got.bits_per_byte == pytest.approx(8 * got.together / len(text))
        assert got.to_dict()["separate_bits_per_byte"] > got.bits_per_byte


def test_nothing_to_compress():
    with pytest.raises(ValueError, match="no text"):
        compress([b""])


def test_texts_are_the_documents(tmp_path):
    corpus = open_corpus(tmp_path / "c", TEXTS)
    assert list(document_texts(corpus)) == [text.encode() for text in TEXTS]


def test_figure_shows_each_result_and_the_window(tmp_path):
    from matplotlib.image import imread

    corpus = open_corpus(tmp_path / "c", ["a" * 60])
    result = perplexity(Counter(), corpus, window=8, batch_size=1)
    plot_loss_by_position({"carried": result}, tmp_path / "one.png")
    plot_loss_by_position({"carried": result, "again": result}, tmp_path / "two.png", window=8, title="title")
    one, two = imread(tmp_path / "one.png"), imread(tmp_path / "two.png")
    assert one.shape[0] > 300
    assert one.shape != two.shape or (one != two).any()
    with pytest.raises(ValueError, match="`results` is empty"):
        plot_loss_by_position({}, tmp_path / "none.png")
