"""Text in, text out: generation with a tokenizer, streamed in pieces that never split a character, with stop strings."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from seqjax.sample.generate import CausalModel, generate
from seqjax.sample.sampling import UNFILTERED, SamplerConfig

_REPLACEMENT = "\ufffd"
# A character has at most four bytes, so at most three decoded as replacement characters can still turn into one.
_LONGEST_PARTIAL = 3
# Decoding starts this many tokens back: enough for tokenizers whose pieces depend on what stands before them.
_CONTEXT = 32


class TextTokenizer(Protocol):
    """What text generation needs of a tokenizer."""

    @property
    def eos_id(self) -> int:
        """Token that ends a document and, as the model's first input, begins one."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        ...

    def encode(self, text: str, /) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, ids: list[int], /) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        ...


class TextStream:
    """Turns a growing list of tokens into pieces of text.

    A token may end within a character (byte and byte-level BPE tokens do) and a stop string may be half there: such a tail is
    withheld until it is settled. The pieces joined are the decoded text, cut in front of the first stop string.

    Args:
        tokenizer: decodes ids.
        context: tokens in front of the stream (the end of the prompt); they are never part of a piece.
        stop_strings: text that ends the stream.
    """

    def __init__(self, tokenizer: TextTokenizer, context: Sequence[int] = (), stop_strings: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop_strings = [text for text in stop_strings if text]
        self._window = list(context)[-_CONTEXT:]
        self._read = len(self._decode())
        self._pending = ""
        self.stopped = False
        """Whether a stop string was met."""

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window) if self._window else ""

    def push(self, token: int) -> str:
        """Add a token; returns the text that is settled by it (often empty)."""
        if self.stopped:
            return ""
        self._window.append(token)
        text = self._decode()
        partial = len(text) - len(text.rstrip(_REPLACEMENT))
        settled = max(self._read, len(text) - min(partial, _LONGEST_PARTIAL))
        fresh, self._read = text[self._read : settled], settled
        if settled == len(text) and len(self._window) > 2 * _CONTEXT:
            self._window = self._window[-_CONTEXT:]
            self._read = len(self._decode())
        return self._release(fresh, final=False)

    def finish(self) -> str:
        """End the stream; returns what was withheld."""
        fresh = "" if self.stopped else self._decode()[self._read :]
        self._read += len(fresh)
        return self._release(fresh, final=True)

    def _release(self, fresh: str, final: bool) -> str:
        self._pending += fresh
        found = [position for text in self._stop_strings if (position := self._pending.find(text)) >= 0]
        if found:
            self.stopped = True
            piece, self._pending = self._pending[: min(found)], ""
            return piece
        keep = 0
        if not final:
            longest = max(map(len, self._stop_strings), default=1)
            for length in range(min(longest - 1, len(self._pending)), 0, -1):
                if any(text.startswith(self._pending[-length:]) for text in self._stop_strings):
                    keep = length
                    break
        cut = len(self._pending) - keep
        piece, self._pending = self._pending[:cut], self._pending[cut:]
        return piece


@dataclasses.dataclass(frozen=True)
class TextGeneration:
    """One prompt's continuation as text."""

    prompt: str
    text: str
    """The continuation, cut in front of a stop string."""
    tokens: list[int]
    """Tokens drawn, up to the one that completed a stop string; without a stop token."""
    finish: Literal["length", "stop_token", "stop_string"]
    """Why it ended."""


def generate_text(
    model: CausalModel,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampler: SamplerConfig = UNFILTERED,
    seed: int | Sequence[int] = 0,
    stop: Sequence[str] = (),
    begin: bool = True,
    stop_at_end: bool = True,
    on_text: Callable[[int, str], None] | None = None,
    block: int = 16,
    prefill_chunk: int = 512,
) -> list[TextGeneration]:
    """Continue texts.

    Args:
        model: the language model.
        tokenizer: the one the model was trained with.
        prompts: texts; an empty one begins a new document.
        max_new_tokens: most new tokens per prompt.
        sampler: how tokens are drawn.
        seed: row i draws from ``seed + i``, or from ``seed[i]``.
        stop: strings that end a continuation and are not part of it.
        begin: the prompts begin documents: the model reads the tokenizer's eos first, as it did in training. False: they stand
            somewhere within a document.
        stop_at_end: end a row when the document ends.
        on_text: called as ``on_text(row, piece)`` with each settled piece; the pieces of a row joined are its text.
        block: tokens per jitted call, the granularity of streaming.
        prefill_chunk: prompt tokens read per jitted call.

    Raises:
        ValueError: as :func:`seqjax.sample.generate`.
    """
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    ids = [[tokenizer.eos_id, *row] if begin or not row else row for row in encoded]
    streams = [TextStream(tokenizer, row, stop) for row in encoded]
    texts = [""] * len(ids)

    def emit(row: int, piece: str) -> None:
        if piece:
            texts[row] += piece
            if on_text is not None:
                on_text(row, piece)

    def on_token(row: int, token: int) -> bool:
        emit(row, streams[row].push(token))
        return streams[row].stopped

    results = generate(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        seed=seed,
        stop_ids=[tokenizer.eos_id] if stop_at_end else [],
        vocabulary=tokenizer.vocab_size,
        on_token=on_token,
        block=block,
        prefill_chunk=prefill_chunk,
    )
    for row, stream in enumerate(streams):
        emit(row, stream.finish())
    return [
        TextGeneration(prompt, text, result.tokens, "stop_string" if stream.stopped else _finish(result.finish))
        for prompt, text, result, stream in zip(prompts, texts, results, streams)
    ]


def _finish(reason: str) -> Literal["length", "stop_token"]:
    return "stop_token" if reason == "stop_token" else "length"
