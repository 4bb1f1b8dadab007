from typing import Any

import pytest
from flax import nnx

from seqjax.sample import SamplerConfig, TextStream, generate, generate_text
from tests.sample.tiny import Bytes, Successor, TinyRecurrent


def pieces(ids, **arguments):
    stream = TextStream(Bytes(), **arguments)
    out = []
    for token in ids:
        out.append(stream.push(token))
        if stream.stopped:
            return out, stream
    return [*out, stream.finish()], stream


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語 and 🎉🎉 emoji", "a\ufffdb real replacement \ufffd"])
def test_pieces_join_to_the_text_and_never_split_a_character(text):
    out, _ = pieces(text.encode())
    assert "".join(out) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in out)
        assert sum(map(bool, out)) == len(text)  # each character leaves as soon as its last byte is there


def test_bytes_that_are_no_text_come_out_too():
    data = b"ok \xff\xff\xff\xff\xff\xff then \xe6\x97"
    out, _ = pieces(data)
    assert "".join(out) == data.decode("utf-8", errors="replace")
    assert "".join(out[:8])  # not held back for ever


def test_long_streams_decode_a_bounded_window():
    lengths = []

    class Spy(Bytes):
        def decode(self, ids):
            lengths.append(len(ids))
            return super().decode(ids)

    text = "żółw 🐢 " * 200
    stream = TextStream(Spy())
    assert "".join([stream.push(token) for token in text.encode()] + [stream.finish()]) == text
    assert max(lengths) <= 70


@pytest.mark.parametrize("stop", [["STOP"], ["xx", "STOP", "P!"], ["ST", "STOP"]])
def test_stop_strings_cut_the_text_wherever_they_fall(stop):
    out, stream = pieces(b"go on STO STSTOP! more", stop_strings=stop)
    text = "go on STO STSTOP! more"
    assert "".join(out) == text[: min(text.find(s) for s in stop if s in text)]
    assert stream.stopped


def test_half_a_stop_string_at_the_end_is_text():
    out, stream = pieces(b"wait ST", stop_strings=["STOP"])
    assert "".join(out) == "wait ST"
    assert out[-1] == "ST"
    assert not stream.stopped


def test_context_is_not_repeated():
    stream = TextStream(Bytes(), context=list("prompt é".encode()))
    assert "".join([stream.push(token) for token in "é!".encode()] + [stream.finish()]) == "é!"


def test_generated_text_of_a_known_model():
    got = generate_text(Successor(257), Bytes(), ["a", "b"], max_new_tokens=5, sampler=SamplerConfig(0.0), stop=["ef"])
    assert [result.text for result in got] == ["bcd", "cd"]
    assert [result.tokens for result in got] == [list(b"bcdef"), list(b"cdef")]
    assert {result.finish for result in got} == {"stop_string"}


def test_end_of_text_ends_a_row_unless_told_otherwise():
    model = Successor(257)
    prompt = "\x7f"
    ended = generate_text(model, Bytes(), [prompt], max_new_tokens=300)[0]
    assert ended.finish == "stop_token"
    assert len(ended.tokens) == 128
    on = generate_text(model, Bytes(), [prompt], max_new_tokens=131, stop_at_end=False)[0]
    assert on.finish == "length"
    assert on.text.endswith("\x00\x01")


def test_streamed_pieces_are_the_text_of_each_row():
    model = TinyRecurrent(257, 16, rngs=nnx.Rngs(1))
    streamed = {0: "", 1: "", 2: ""}

    def on_text(row, piece):
        streamed[row] += piece

    got = generate_text(model, Bytes(), ["", "x", "longer prompt"], max_new_tokens=40, seed=3, on_text=on_text, block=7)
    assert [result.text for result in got] == list(streamed.values())
    assert all(result.text == Bytes().decode(result.tokens) for result in got)


def test_prompts_begin_documents_unless_told_otherwise():
    model = TinyRecurrent(257, 16, rngs=nnx.Rngs(1))
    arguments: dict[str, Any] = {"max_new_tokens": 10, "sampler": SamplerConfig(0.0), "stop_at_end": False}
    began, within, empty = (
        generate_text(model, Bytes(), [text], begin=begin, **arguments)[0].tokens
        for text, begin in [("xyz", True), ("xyz", False), ("", False)]
    )
    assert began == generate(model, [[256, *b"xyz"]], max_new_tokens=10, sampler=SamplerConfig(0.0))[0].tokens
    assert within == generate(model, [list(b"xyz")], max_new_tokens=10, sampler=SamplerConfig(0.0))[0].tokens
    assert empty == generate(model, [[256]], max_new_tokens=10, sampler=SamplerConfig(0.0))[0].tokens
    assert began != within


def test_tokens_that_only_pad_the_model_are_never_drawn():
    model = TinyRecurrent(2000, 16, rngs=nnx.Rngs(1))
    tokens = generate_text(model, Bytes(), ["a", "b"], max_new_tokens=60, stop_at_end=False)
    assert max(token for result in tokens for token in result.tokens) <= 256
    assert max(token for result in generate(model, [[97]], max_new_tokens=60) for token in result.tokens) > 256
