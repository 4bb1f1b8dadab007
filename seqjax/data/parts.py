"""The finished parts of a preparation: what a worker writes for each unit of work, and how parts become a corpus.

A part is two raw files per split, ``tokens`` and ``documents`` (int64 triples: tokens, bytes, words), and one record that is
written last, after the data are synced; a part without its record is done again.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from seqjax.data.corpus import documents_digest, write_array
from seqjax.data.reading import Item, Piece, Problem
from seqjax.data.tokenizers import Tokenizer

BATCH_CHARACTERS = 1 << 20  # text that is tokenized in one call
MOST_SKIPS_LISTED = 100
READ_ELEMENTS = 3 << 18  # of a part, at once, when parts are joined


class PartWriter:
    """Tokens and documents of one split of one unit."""

    def __init__(self, stem: Path, dtype: str, tokenizer: Tokenizer, count_newlines: bool, problem: Problem) -> None:
        self._dtype, self._tokenizer, self._count_newlines, self._problem = dtype, tokenizer, count_newlines, problem
        self._tokens = open(f"{stem}.tokens", "wb")  # noqa: SIM115 - closed by `finish`
        self._documents = open(f"{stem}.documents", "wb")  # noqa: SIM115
        self._names = open(f"{stem}.names", "wb")  # noqa: SIM115
        self._digest = hashlib.sha256()
        self._pending: list[tuple[Item, Piece]] = []
        self._pending_characters = 0
        self.counts = {"tokens": 0, "documents": 0, "bytes": 0, "words": 0}
        self._open = np.zeros(3, np.int64)  # tokens, bytes, words of the document that is being written
        self._mid_word = self._visible = False
        self.open_end = False

    def add(self, item: Item, piece: Piece) -> None:
        """Take a piece; it is tokenized with others when there is enough text."""
        self._pending.append((item, piece))
        self._pending_characters += len(piece.text)
        if self._pending_characters >= BATCH_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        encoded = self._tokenizer.encode_batch([piece.text for _, piece in self._pending])
        for (item, piece), tokens in zip(self._pending, encoded):
            data = piece.text.encode()
            self._digest.update(data)
            self._tokens.write(tokens.astype(self._dtype, copy=False).data)
            words = len(piece.text.split())
            if self._mid_word and words and not piece.text[0].isspace():
                words -= 1  # a cut inside a word made two of one
            self._mid_word = bool(data) and not piece.text[-1].isspace() and not piece.end
            self._visible |= words > 0
            words += piece.text.count("\n") if self._count_newlines else 0
            self._open += (len(tokens), len(data), words)
            self.open_end = True
            if piece.end:
                self._end_document(item, piece)
        self._pending, self._pending_characters = [], 0

    def _end_document(self, item: Item, piece: Piece) -> None:
        self.open_end = self._mid_word = False
        visible, self._visible = self._visible, False
        if not visible and not item.continues:
            self._tokens.seek(self._tokens.tell() - int(self._open[0]) * np.dtype(self._dtype).itemsize)
            self._tokens.truncate()
            self._open[:] = 0
            self._problem(piece.where, "empty document")
            return
        self._tokens.write(np.array([self._tokenizer.eos_id], self._dtype).data)
        self._open[0] += 1
        self._write_document()
        if piece.about is not None:
            self._names.write(json.dumps(piece.about, ensure_ascii=False).encode() + b"\n")

    def _write_document(self) -> None:
        self._documents.write(self._open.astype("<i8").data)
        for name, value in zip(("tokens", "bytes", "words"), self._open.tolist()):
            self.counts[name] += value
        self.counts["documents"] += 1
        self._open[:] = 0

    def finish(self) -> dict[str, Any]:
        """Write what is left and sync; returns the record of this split."""
        if self._pending:
            self._flush()
        open_end = self.open_end
        if open_end:
            self._write_document()
        for file in (self._tokens, self._documents, self._names):
            file.flush()
            os.fsync(file.fileno())
        self.close()
        return {**self.counts, "open_end": open_end, "text_sha256": self._digest.hexdigest()}

    def close(self) -> None:
        """Close the files."""
        for file in (self._tokens, self._documents, self._names):
            file.close()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either there and whole or not there: temporary file, sync, rename, sync folder."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_record(folder: Path, key: str, dtype: str) -> dict[str, Any] | None:
    """The record of a finished unit, or None if it is not there or its files are not those that it describes."""
    path = folder / f"{key}.json"
    try:
        record = json.loads(path.read_bytes())
        for split, counts in record["splits"].items():
            stem = folder / f"{key}.{split}"
            sizes = {"tokens": counts["tokens"] * np.dtype(dtype).itemsize, "documents": counts["documents"] * 24}
            for name, size in sizes.items():
                if os.path.getsize(f"{stem}.{name}") != size:
                    return None
    except (OSError, ValueError, KeyError):
        return None
    return record


def join_parts(
    folder: Path, out: Path, split: str, records: list[dict[str, Any]], dtype: str, tick: Callable[[int], None]
) -> dict[str, Any] | None:
    """Write the arrays of one split from the parts in order; returns its entry of the manifest, None if it has no document."""
    parts = [(record["key"], record["splits"][split]) for record in records if split in record["splits"]]
    if not sum(counts["documents"] for _, counts in parts):
        return None
    totals = {name: sum(counts[name] for _, counts in parts) for name in ("tokens", "bytes", "words")}
    # A document that goes on in the next part was counted in both.
    documents = sum(counts["documents"] - counts["open_end"] for _, counts in parts)
    target = out / split
    target.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()

    def tokens() -> Iterator[np.ndarray]:
        for key, _ in parts:
            for block in _blocks(folder / f"{key}.{split}.tokens", dtype):
                digest.update(block.data)
                tick(len(block))
                yield block

    def triples() -> Iterator[np.ndarray]:
        """Documents of all parts, the halves of those that cross parts added up."""
        carry = np.zeros((1, 3), np.int64)
        for key, counts in parts:
            left = counts["documents"]
            for index, block in enumerate(_blocks(folder / f"{key}.{split}.documents", "<i8")):
                rows = block.reshape(-1, 3).copy()
                if index == 0:
                    rows[0] += carry[0]
                    carry = np.zeros((1, 3), np.int64)
                left -= len(rows)
                if not left and counts["open_end"]:
                    rows, carry = rows[:-1], rows[-1:].copy()
                yield rows

    def offsets() -> Iterator[np.ndarray]:
        position = 0
        yield np.zeros(1, np.int64)
        for rows in triples():
            ends = position + np.cumsum(rows[:, 0])
            if len(ends):
                position = int(ends[-1])
                yield ends

    def column(index: int) -> Iterator[np.ndarray]:
        return (rows[:, index] for rows in triples())

    write_array(target / "tokens", dtype, totals["tokens"], tokens())
    write_array(target / "document_offsets", "int64", documents + 1, offsets())
    write_array(target / "document_bytes", "int64", documents, column(1))
    write_array(target / "document_words", "int64", documents, column(2))
    names = [folder / f"{key}.{split}.names" for key, _ in parts]
    if any(path.stat().st_size for path in names):
        with open(target / "documents.jsonl", "wb") as file:
            for path in names:
                file.write(path.read_bytes())
            file.flush()
            os.fsync(file.fileno())
    text = hashlib.sha256("".join(counts["text_sha256"] for _, counts in parts).encode())
    arrays = (block for blocks in (offsets(), column(1), column(2)) for block in blocks)
    files = {
        path.relative_to(target).as_posix(): path.stat().st_size for path in sorted(target.rglob("*")) if path.is_file()
    }
    return {
        "tokens": totals["tokens"],
        "documents": documents,
        "bytes": totals["bytes"],
        "words": totals["words"],
        "dtype": dtype,
        "sha256": digest.hexdigest(),
        "documents_sha256": documents_digest(arrays),
        "text_sha256": text.hexdigest(),
        "files": files,
    }


def _blocks(path: Path, dtype: str, elements: int = READ_ELEMENTS) -> Iterator[np.ndarray]:
    """A part in blocks, valid until the next: one buffer for all, because the heap does not give back freed large blocks."""
    buffer = np.empty(min(elements, path.stat().st_size // np.dtype(dtype).itemsize), dtype)
    with open(path, "rb") as file:
        while size := file.readinto(buffer.data.cast("B")):
            yield buffer[: size // buffer.itemsize]
