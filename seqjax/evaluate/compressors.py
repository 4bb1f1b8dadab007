"""General compressors as a yardstick: bits per byte of gzip -9 and xz -9 on the text that a model was evaluated on."""

import dataclasses
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from seqjax.data import Corpus


@dataclasses.dataclass(frozen=True)
class Compression:
    """Size of a text after compression, headers included."""

    name: str
    bytes: int
    """Uncompressed size."""
    together: int
    """Compressed size of all documents as one file."""
    separate: int
    """Sum of the compressed sizes of the documents, one file each."""

    @property
    def bits_per_byte(self) -> float:
        """Compressed bits per byte of text, all documents in one file."""
        return 8 * self.together / self.bytes

    @property
    def separate_bits_per_byte(self) -> float:
        """Compressed bits per byte of text, every document on its own."""
        return 8 * self.separate / self.bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        measures = {"bits_per_byte": self.bits_per_byte, "separate_bits_per_byte": self.separate_bits_per_byte}
        return dataclasses.asdict(self) | measures


def _gzip() -> Any:
    return zlib.compressobj(9, zlib.DEFLATED, wbits=31)  # 31: the gzip container with the largest window


def _xz() -> Any:
    return lzma.LZMACompressor(lzma.FORMAT_XZ, preset=9)


COMPRESSORS: dict[str, Callable[[], Any]] = {"gzip -9": _gzip, "xz -9": _xz}
"""Name -> maker of an incremental compressor, with the settings of the command-line tool of that name."""


def compress(documents: Iterable[bytes]) -> list[Compression]:
    """Compress documents, both together and each on its own; holds one document in memory.

    Raises:
        ValueError: there is no text.
    """
    streams = {name: make() for name, make in COMPRESSORS.items()}
    together, separate, size = dict.fromkeys(streams, 0), dict.fromkeys(streams, 0), 0
    for document in documents:
        size += len(document)
        for name, stream in streams.items():
            together[name] += len(stream.compress(document))
            alone = COMPRESSORS[name]()
            separate[name] += len(alone.compress(document)) + len(alone.flush())
    if not size:
        raise ValueError("`documents` hold no text to compress")
    return [
        Compression(name, size, together[name] + len(stream.flush()), separate[name])
        for name, stream in streams.items()
    ]


def document_texts(corpus: Corpus) -> Iterator[bytes]:
    """UTF-8 text of each document of a split, decoded from its tokens."""
    tokenizer = corpus.tokenizer()
    for index in range(corpus.num_documents):
        yield tokenizer.decode(corpus.document(index).tolist()).encode()
