"""A token corpus on disk: one folder that holds everything needed to train on it and to check it.

    CORPUS/manifest.json                written last: a folder without it is unfinished and is not read
           tokenizer/                   the tokenizer's defining files
           train|validation|test/
               tokens                   uint16 or uint32 [tokens]: all documents one after another, each ended by eos
               document_offsets         int64 [documents + 1]: document i is tokens[offsets[i]:offsets[i + 1]], eos included
               document_bytes           int64 [documents]: UTF-8 bytes of the text (for bits per byte)
               document_words           int64 [documents]: words by the manifest's word convention (for word perplexity)
               documents.jsonl          name (and title) of each document, where the source has names

The arrays are TensorStore zarr3, sharded into files of 8M tokens that are read in pieces of 32k tokens with a checksum.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from seqjax.data.tokenizers import Tokenizer, load_stored_tokenizer

FORMAT = "seqjax-corpus"
FORMAT_VERSION = 1
ARRAYS = ("tokens", "document_offsets", "document_bytes", "document_words")
SPLITS = ("train", "validation", "test")
SHARD = 1 << 23  # elements in a file: 16 MiB of uint16, of which the writer holds a few copies
CHUNK = 1 << 15  # elements read and checked at once: 64 KiB of uint16, small enough for shuffled windows
CACHE_BYTES = 256 << 20


class Corpus:
    """One split of a corpus, opened for reading; use `Corpus.open`."""

    def __init__(self, path: Path, split: str, manifest: dict[str, Any]) -> None:
        self.path, self.split, self.manifest = path, split, manifest
        self.counts: dict[str, Any] = manifest["splits"][split]
        context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
        self._arrays = {name: _open_array(path / split / name, context) for name in ARRAYS}
        self.tokens = self._arrays["tokens"]
        n = self.num_documents
        shapes = {"tokens": self.num_tokens, "document_offsets": n + 1, "document_bytes": n, "document_words": n}
        for name, length in shapes.items():
            if self._arrays[name].shape != (length,):
                raise ValueError(
                    f"{path}/{split}/{name} has shape {self._arrays[name].shape}, the manifest says ({length},): "
                    "the corpus is damaged, prepare it again"
                )

    @classmethod
    def open(cls, path: str | Path, split: str = "train") -> "Corpus":
        """Open a split; costs a few reads, and checks that every file is there with its size.

        Raises:
          ValueError: not a corpus, an unfinished or a damaged one, or no such split.
        """
        path = Path(path).expanduser()
        manifest = read_manifest(path)
        if split not in manifest["splits"]:
            raise ValueError(f"corpus {path} has no split {split!r}; it has {', '.join(manifest['splits'])}")
        for name, size in manifest["splits"][split]["files"].items():
            file = path / split / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                what = "is missing" if found is None else f"has {found} bytes instead of {size}"
                raise ValueError(
                    f"corpus {path} is damaged: {split}/{name} {what}; prepare it again or restore the file"
                )
        return cls(path, split, manifest)

    @property
    def num_tokens(self) -> int:
        """Tokens of this split, one eos per document included."""
        return self.counts["tokens"]

    @property
    def num_documents(self) -> int:
        """Documents of this split."""
        return self.counts["documents"]

    @property
    def vocab_size(self) -> int:
        """Number of token ids of the tokenizer."""
        return self.manifest["tokenizer"]["vocab_size"]

    @property
    def eos_id(self) -> int:
        """The token that ends every document."""
        return self.manifest["tokenizer"]["eos_id"]

    @property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer; a model trained on one fingerprint cannot read another."""
        return self.manifest["tokenizer"]["fingerprint"]

    @functools.cached_property
    def document_offsets(self) -> np.ndarray:
        """int64 [documents + 1]; read into memory once (8 bytes per document)."""
        return self._arrays["document_offsets"].read().result()

    @functools.cached_property
    def document_bytes(self) -> np.ndarray:
        """int64 [documents]: UTF-8 bytes of each document's text."""
        return self._arrays["document_bytes"].read().result()

    @functools.cached_property
    def document_words(self) -> np.ndarray:
        """int64 [documents]: words by `manifest["word_convention"]`."""
        return self._arrays["document_words"].read().result()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer stored in the corpus, checked against the manifest."""
        return load_stored_tokenizer(self.path / "tokenizer", self.manifest["tokenizer"])

    def document(self, index: int) -> np.ndarray:
        """Tokens of a document, its eos included."""
        start, stop = self.document_offsets[index : index + 2]
        return self.tokens[int(start) : int(stop)].read().result()

    def documents(self) -> list[dict[str, str]]:
        """Name (and title, where the source has one) of each document; empty for sources without names."""
        path = self.path / self.split / "documents.jsonl"
        return [json.loads(line) for line in path.read_bytes().splitlines()] if path.is_file() else []

    def check(self) -> Iterator[int]:
        """Recompute the checksums; yields the number of tokens read so far, for a progress bar.

        Raises:
          ValueError: an array does not have the checksum of the manifest, or cannot be read.
        """
        digest, done = hashlib.sha256(), 0
        try:
            for start in range(0, self.num_tokens, SHARD // 2):
                block = self.tokens[start : min(start + SHARD // 2, self.num_tokens)].read().result()
                digest.update(np.ascontiguousarray(block).data)
                done += len(block)
                yield done
            arrays = [self.document_offsets, self.document_bytes, self.document_words]
        except ValueError as error:
            raise ValueError(f"corpus {self.path}: {self.split} cannot be read, it is damaged: {error}") from error
        if digest.hexdigest() != self.counts["sha256"]:
            raise ValueError(f"corpus {self.path}: the tokens of {self.split} differ from their sha256: damaged")
        if documents_digest(arrays) != self.counts["documents_sha256"]:
            raise ValueError(
                f"corpus {self.path}: the document arrays of {self.split} differ from their sha256: damaged"
            )


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a finished corpus.

    Raises:
      ValueError: no such folder, not a corpus, an unfinished one, or one of another format version.
    """
    file = path / "manifest.json"
    if not file.is_file():
        if (path / ".work").is_dir():
            raise ValueError(f"corpus {path} is half-written: run the same `seqjax prepare` again to finish it")
        what = "holds no manifest.json, it is not a corpus" if path.is_dir() else "does not exist"
        raise ValueError(f"corpus {path} {what}: make one with `seqjax prepare`")
    try:
        manifest = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"corpus {path}: manifest.json is damaged: {error}") from error
    if manifest.get("format") != FORMAT or manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"corpus {path}: format {manifest.get('format')!r} version {manifest.get('format_version')}, "
            f"this seqjax reads {FORMAT!r} version {FORMAT_VERSION}: prepare it again"
        )
    return manifest


def documents_digest(arrays: Iterable[np.ndarray]) -> str:
    """sha256 over document_offsets, document_bytes and document_words as little-endian int64."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array, "<i8").data)
    return digest.hexdigest()


def write_array(path: Path, dtype: str, length: int, blocks: Iterable[np.ndarray]) -> None:
    """Write a 1-d zarr3 array of known length from blocks of any size; holds one shard in memory.

    Raises:
      OSError: the disk is full or not writable.
    """
    shard = min(SHARD, max(-(-length // CHUNK), 1) * CHUNK)
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": [CHUNK],
        "codecs": [little_endian, {"name": "crc32c"}],
        "index_codecs": [little_endian, {"name": "crc32c"}],
    }
    metadata = {
        "shape": [length],
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{os.path.abspath(path)}/"},
        "metadata": metadata,
        "create": True,
        "delete_existing": True,
    }
    try:
        array = ts.open(spec).result()
        buffer, filled, position = np.empty(shard, dtype), 0, 0
        for block in blocks:
            while len(block):
                take = min(shard - filled, len(block))
                buffer[filled : filled + take] = block[:take]
                filled, block = filled + take, block[take:]
                if filled == shard:
                    array[position : position + shard].write(buffer).result()
                    position, filled = position + shard, 0
        if filled:
            array[position : position + filled].write(buffer[:filled]).result()
            position += filled
    except ValueError as error:
        # TensorStore reports operating-system errors as ValueError with the text of errno.
        raise OSError(f"writing {path}: {error}") from error
    if position != length:
        raise RuntimeError(f"{path}: {position} elements written, {length} announced")


def _open_array(path: Path, context: ts.Context) -> ts.TensorStore:
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{os.path.abspath(path)}/"},
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
    }
    try:
        return ts.open(spec, read=True, context=context).result()
    except ValueError as error:
        raise ValueError(f"corpus array {path} cannot be opened: {error}") from error
