import gzip
import io

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from seqjax.data import reading
from seqjax.data.reading import PIECE, InputProblem, Item
from seqjax.data.tokenizers import train_bpe
from tests.data.texts import paragraphs, prose

WIKI = (
    " \n = First = \n \n Text of <unk> one . \n \n = = Section = = \n \n = not a heading = \n more . \n \n"
    " = Second = \n \n Text @-@ two . \n \n = = = Deep = = = \n \n end . \n"
)


def collect(pieces) -> list[str]:
    documents, text = [], ""
    for piece in pieces:
        text += piece.text
        if piece.end:
            documents.append(text)
            text = ""
    assert not text, "the last document has no end"
    return documents


def stop(where, reason):
    raise InputProblem(where, reason)


def read(reader, path, kind, skipped=None):
    problem = stop if skipped is None else lambda where, reason: skipped.append(f"{where}: {reason}")
    item = Item(str(path), path.stat().st_size)
    return collect(reader(item, kind, problem, lambda count: None))


def test_a_long_document_comes_in_bounded_pieces_whose_tokens_are_those_of_the_whole(tmp_path):
    bpe = train_bpe([prose(seed, 5000) for seed in range(4)], 400)
    single_lines = prose(7, 3 * PIECE).replace(" \n \n ", "\n").replace("\n\n", "\n")
    only_paragraphs = single_lines.replace("\n", "\n\n'")
    for text in (prose(5, 6 * PIECE), single_lines, only_paragraphs, single_lines.replace("\n", " \n ")):
        path = tmp_path / "long.txt"
        path.write_bytes(text.encode())
        item = Item(str(path), 1)
        pieces = list(reading.text_pieces(item, "file", stop, lambda count: None))
        assert "".join(piece.text for piece in pieces) == text and [piece.end for piece in pieces[:-1]] == [False] * (
            len(pieces) - 1
        )
        assert len(pieces) >= 3 and max(len(piece.text) for piece in pieces) <= PIECE + 2
        joined = np.concatenate(bpe.encode_batch([piece.text for piece in pieces]))
        np.testing.assert_array_equal(joined, bpe.encode(text))


def test_text_without_any_place_to_cut_is_still_bounded_and_whole(tmp_path):
    path = tmp_path / "x.txt"
    text = "é" * (8 << 20)
    path.write_bytes(text.encode())
    pieces = list(reading.text_pieces(Item(str(path), 1), "file", stop, lambda count: None))
    assert "".join(piece.text for piece in pieces) == text and max(len(piece.text) for piece in pieces) <= PIECE + 2


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from(["a b", "c", "", "  ", "é\u2028x", "d\te"]), max_size=12),
    st.booleans(),
    st.sampled_from(["\n", "\r\n"]),
)
def test_lines_and_paragraphs_are_what_their_definition_says(tmp_path_factory, lines, final, newline):
    path = tmp_path_factory.mktemp("lines") / "x.txt"
    text = newline.join(lines) + (newline if final else "")
    path.write_bytes(text.encode())
    assert read(reading.text_pieces, path, "line") == [line for line in lines if line.strip()]
    assert read(reading.text_pieces, path, "file") == [text]
    assert read(reading.text_pieces, path, "blank-line") == paragraphs(text)


def test_wikitext_articles_begin_at_level_one_headings_and_keep_the_exact_text(tmp_path):
    path = tmp_path / "wiki.valid.tokens"
    path.write_text(WIKI)
    item = Item(str(path), 1)
    pieces = list(reading.wikitext_pieces(item, "article", stop, lambda count: None))
    assert [piece.about for piece in pieces] == [{"name": "First"}, {"name": "Second"}]
    assert "".join(piece.text for piece in pieces) == WIKI and pieces[1].text.startswith(" \n = Second = \n")
    rows = ["" if line == " \n" else line for line in io.StringIO(WIKI, newline="\n")]
    parquet.write_table(pa.table({"text": rows}), tmp_path / "validation.parquet")
    assert read(reading.wikitext_pieces, tmp_path / "validation.parquet", "article") == [piece.text for piece in pieces]
    assert read(reading.wikitext_pieces, path, "file") == [WIKI]


def test_invalid_utf8_names_the_line_and_loses_only_that_line(tmp_path):
    good = [f"line {number} é" for number in range(120_000)]  # several blocks
    for bad in (0, 70_001, 119_999):
        lines = [line.encode() for line in good]
        lines[bad] = b"broken \xff\xfe here"
        path = tmp_path / "x.txt"
        path.write_bytes(b"\n".join(lines))
        offset = sum(len(line) + 1 for line in lines[:bad]) + 7
        with pytest.raises(InputProblem) as error:
            read(reading.text_pieces, path, "line")
        assert str(error.value) == f"{path}:{bad + 1}: invalid UTF-8 (0xff) at byte {offset}"
        skipped = []
        assert read(reading.text_pieces, path, "line", skipped) == good[:bad] + good[bad + 1 :]
        assert len(skipped) == 1 and f"{path}:{bad + 1}:" in skipped[0]


def test_the_line_of_an_error_is_counted_from_the_start_of_the_file_also_within_a_range(tmp_path):
    path = tmp_path / "x.txt"
    head = b"one\ntwo\n"
    path.write_bytes(head + b"three\nb\xe9d\n")
    for reader, kind in ((reading.text_pieces, "line"), (reading.jsonl_pieces, "text")):
        with pytest.raises(InputProblem, match="x.txt:[34]:") as error:
            collect(reader(Item(str(path), 1, len(head), len(head) + 11), kind, stop, lambda count: None))
    assert error.value.where.endswith(":3")  # "three" is no JSON


@pytest.mark.parametrize("cut", [5, 1000, -9, -4])
def test_a_truncated_gzip_is_named_and_what_could_be_read_is_kept(tmp_path, cut):
    lines = [f"line {number} {number * 7919 % 10007}" for number in range(2000)]
    path = tmp_path / "x.txt.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode())[:cut])
    with pytest.raises(InputProblem, match="x.txt.gz: damaged gzip after"):
        read(reading.text_pieces, path, "line")
    skipped = []
    kept = read(reading.text_pieces, path, "line", skipped)
    assert kept == lines[: len(kept)] and len(skipped) == 1
    if cut == -4:
        assert len(kept) >= 1999  # only the checksum is missing; the last line has no newline to prove it whole


def test_a_file_that_is_not_gzip_is_named(tmp_path):
    path = tmp_path / "x.txt.gz"
    path.write_bytes(b"plain text")
    with pytest.raises(InputProblem, match="damaged gzip after 0.*Not a gzipped file"):
        read(reading.text_pieces, path, "line")


@pytest.mark.parametrize(
    "line,reason",
    [
        (b'{"text": "a"', "malformed JSON"),
        (b'{"body": "a"}', "no field 'text'; the record has 'body'"),
        (b'{"text": 3}', "field 'text' is int, expected a string"),
        (b'["text"]', "a JSON list, expected an object"),
        (b'{"text": "\xff"}', "invalid UTF-8"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b"[" * 100_000, "malformed JSON"),
    ],
)
def test_a_malformed_json_line_is_named_and_only_it_is_lost(tmp_path, line, reason):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "first"}\n\n' + line + b'\n{"text": "last"}')
    with pytest.raises(InputProblem, match="x.jsonl:3: .*" + reason[:20]) as error:
        read(reading.jsonl_pieces, path, "text")
    assert reason in str(error.value)
    skipped = []
    assert read(reading.jsonl_pieces, path, "text", skipped) == ["first", "last"]
    assert len(skipped) == 1


def test_parquet_rows_nulls_and_missing_columns(tmp_path):
    path = tmp_path / "x.parquet"
    parquet.write_table(pa.table({"body": ["a", None, "c"], "n": [1, 2, 3]}), path, row_group_size=2)
    with pytest.raises(InputProblem, match="x.parquet: row 1: column 'body' is null"):
        read(reading.parquet_pieces, path, "body")
    skipped = []
    assert read(reading.parquet_pieces, path, "body", skipped) == ["a", "c"] and len(skipped) == 1
    with pytest.raises(InputProblem, match="no column 'text'; it has body, n"):
        read(reading.parquet_pieces, path, "text")
    with pytest.raises(InputProblem, match="column 'n' is int64"):
        read(reading.parquet_pieces, path, "n")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputProblem, match="damaged parquet"):
        read(reading.parquet_pieces, path, "body")


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfabc")
    assert read(reading.text_pieces, path, "file") == ["abc"]
