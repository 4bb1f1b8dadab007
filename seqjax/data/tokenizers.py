"""Tokenizers: raw bytes, Hugging Face ``tokenizer.json``, GPT-2 ``vocab.json`` + ``merges.txt``, SentencePiece, and BPE training.

Every tokenizer encodes plain text without adding marks, never reads special tokens out of the text (the characters
``<|endoftext|>`` in a document are ordinary text), and has one end-of-document token that `seqjax prepare` appends to
every document. A tokenizer knows the files that define it, so that a corpus folder stores it and stays self-contained.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

EOS_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "[EOS]", "[SEP]")
BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "[CLS]")


@runtime_checkable
class Tokenizer(Protocol):
    """What every tokenizer offers; `fingerprint` is a sha256 over the files that define it and its eos token."""

    name: str
    vocab_size: int
    eos_id: int
    bos_id: int | None
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any added mark."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids (uint32) of several texts; equal to `encode` of each."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are not valid UTF-8 become U+FFFD."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """JSON description: kind, name, vocab_size, eos_id, bos_id, fingerprint."""
        ...

    def files(self) -> dict[str, bytes]:
        """The defining files, name to content, as a corpus stores them."""
        ...


class _Described:
    """Shared by the three kinds: the description and the fingerprint."""

    kind = ""
    name = ""
    vocab_size = 0
    eos_id = 0
    bos_id: int | None = None
    fingerprint = ""

    def files(self) -> dict[str, bytes]:
        """The defining files, name to content."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """JSON description: kind, name, vocab_size, eos_id, bos_id, fingerprint."""
        fields = ("kind", "name", "vocab_size", "eos_id", "bos_id", "fingerprint")
        return {field: getattr(self, field) for field in fields}

    def _seal(self) -> None:
        digest = hashlib.sha256(f"{self.kind}:{self.eos_id}".encode())
        for name, content in sorted(self.files().items()):
            # JSON is hashed by value, so that layout and key order of the file do not matter.
            if name.endswith(".json"):
                content = json.dumps(json.loads(content), sort_keys=True, ensure_ascii=True).encode()
            digest.update(f"\n{name}:{len(content)}\n".encode())
            digest.update(content)
        self.fingerprint = digest.hexdigest()


class ByteTokenizer(_Described):
    """UTF-8 bytes are ids 0-255 and the end of a document is 256; needs no files and loses nothing."""

    kind = "bytes"

    def __init__(self) -> None:
        self.name, self.vocab_size, self.eos_id, self.bos_id = "bytes", 257, 256, None
        self._seal()

    def encode(self, text: str) -> list[int]:
        """UTF-8 bytes of the text."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """UTF-8 bytes of each text as uint32."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the bytes; the eos id has no text."""
        return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")


class FastTokenizer(_Described):
    """A tokenizer of the `tokenizers` library, defined by ``tokenizer.json`` or by ``vocab.json`` + ``merges.txt``."""

    def __init__(self, files: dict[str, bytes], *, name: str, eos: str | None = None) -> None:
        import tokenizers

        self._files, self.name = files, name
        try:
            if "tokenizer.json" in files:
                self.kind = "tokenizer.json"
                # The stored JSON is the definition; truncation and padding are settings of its last user.
                self._inner = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
                self._inner.no_truncation()
                self._inner.no_padding()
            else:
                self.kind = "gpt2"
                self._inner = _byte_level_bpe(files["vocab.json"], files["merges.txt"])
        except Exception as error:  # the library raises bare Exception for malformed files
            raise ValueError(f"tokenizer {name!r}: not a valid {' + '.join(files)}: {error}") from error
        self._inner.encode_special_tokens = True
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_id = _special_id(vocabulary, eos, EOS_NAMES, name)
        self.bos_id = next((vocabulary[token] for token in BOS_NAMES if token in vocabulary), None)
        self._seal()

    def files(self) -> dict[str, bytes]:
        """``tokenizer.json``, or ``vocab.json`` and ``merges.txt``."""
        return self._files

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of several texts."""
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; the eos id has no text."""
        return self._inner.decode([i for i in map(int, ids) if i != self.eos_id], skip_special_tokens=False)


class SentencePieceTokenizer(_Described):
    """A SentencePiece ``.model``. Its own normalisation may fold white space, so `decode(encode(text))` may differ from text."""

    kind = "sentencepiece"

    def __init__(self, model: bytes, *, name: str, eos: str | None = None) -> None:
        import sentencepiece

        self._model, self.name = model, name
        self._inner = sentencepiece.SentencePieceProcessor()
        try:
            self._inner.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(f"tokenizer {name!r}: not a SentencePiece model: {error}") from error
        self.vocab_size = self._inner.vocab_size()
        if eos is not None:
            self.eos_id = self._inner.piece_to_id(eos)
            missing = self.eos_id == self._inner.unk_id() and eos != self._inner.id_to_piece(self._inner.unk_id())
        else:
            self.eos_id = self._inner.eos_id()
            missing = self.eos_id < 0
        if missing:
            raise ValueError(f"tokenizer {name!r} has no end token {eos or '(eos_id is -1)'}: name one of its pieces")
        self.bos_id = self._inner.bos_id() if self._inner.bos_id() >= 0 else None
        self._seal()

    def files(self) -> dict[str, bytes]:
        """``sentencepiece.model``."""
        return {"sentencepiece.model": self._model}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self._inner.encode(text, out_type=int)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of several texts."""
        return [np.asarray(ids, np.uint32) for ids in self._inner.encode(list(texts), out_type=int, num_threads=1)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; the eos id has no text."""
        return self._inner.decode([i for i in map(int, ids) if i != self.eos_id])


def load_tokenizer(spec: str | Path, *, eos: str | None = None) -> Tokenizer:
    """The tokenizer that `spec` names.

    Args:
      spec: ``bytes``; a ``tokenizer.json``; a SentencePiece ``.model``; ``VOCAB.json,MERGES.txt``; a folder that holds
        one of these (or GPT-2's own ``encoder.json`` + ``vocab.bpe``); or a corpus folder, whose tokenizer is reused.
        Every file may be gzipped (``.gz``).
      eos: the token that ends a document, where it is not one of the usual names.

    Raises:
      ValueError: nothing there, a malformed file, or no end token.
    """
    if str(spec) == "bytes":
        return ByteTokenizer()
    if "," in str(spec):
        vocabulary, merges = (Path(part.strip()) for part in str(spec).split(",", 1))
        files = {"vocab.json": _read(vocabulary), "merges.txt": _read(merges)}
        return FastTokenizer(files, name=str(spec), eos=eos)
    path = Path(spec).expanduser()
    if path.is_dir():
        if (path / "manifest.json").is_file() and (path / "tokenizer").is_dir():
            return load_stored_tokenizer(
                path / "tokenizer", json.loads((path / "manifest.json").read_bytes())["tokenizer"]
            )
        return _from_folder(path, eos)
    if not path.is_file():
        raise ValueError(
            f"tokenizer {str(spec)!r} not found: expected `bytes`, a tokenizer.json, a SentencePiece .model, "
            "`vocab.json,merges.txt`, or a folder holding one of them"
        )
    suffixes = [s for s in path.suffixes if s != ".gz"]
    if suffixes[-1:] == [".model"]:
        return SentencePieceTokenizer(_read(path), name=path.name, eos=eos)
    if suffixes[-1:] == [".json"]:
        return FastTokenizer({"tokenizer.json": _read(path)}, name=_short_name(path), eos=eos)
    raise ValueError(f"tokenizer {str(spec)!r}: expected a .json or a .model file (each may end in .gz)")


def store_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer's defining files into `folder`, each under the name that `load_stored_tokenizer` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)


def load_stored_tokenizer(folder: Path, description: dict[str, Any]) -> Tokenizer:
    """The tokenizer that a corpus stores, checked against the fingerprint in its manifest.

    Raises:
      ValueError: files are missing or are not those that the corpus was made with.
    """
    kind = description["kind"]
    names = {
        "bytes": (),
        "tokenizer.json": ("tokenizer.json",),
        "gpt2": ("vocab.json", "merges.txt"),
        "sentencepiece": ("sentencepiece.model",),
    }
    if kind not in names:
        raise ValueError(f"{folder}: unknown tokenizer kind {kind!r}, expected one of {sorted(names)}")
    files = {name: _read(folder / name) for name in names[kind]}
    tokenizer: Tokenizer
    if kind == "bytes":
        tokenizer = ByteTokenizer()
    elif kind == "sentencepiece":
        model = files["sentencepiece.model"]
        tokenizer = SentencePieceTokenizer(model, name=description["name"], eos=_sentencepiece_eos(model, description))
    else:
        tokenizer = FastTokenizer(files, name=description["name"], eos=_stored_eos(files, description))
    if tokenizer.fingerprint != description["fingerprint"]:
        raise ValueError(
            f"{folder}: the tokenizer files have fingerprint {tokenizer.fingerprint[:12]}, the manifest says "
            f"{description['fingerprint'][:12]}: they were changed; restore them or prepare the corpus again"
        )
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int, *, name: str = "bpe") -> FastTokenizer:
    """A byte-level BPE (GPT-2's pre-tokenization) trained on `texts`; reproducible for the same texts.

    Args:
      texts: pieces of text; the memory needed grows with the number of distinct words, not with the length.
      vocab_size: ids, including the 256 bytes and ``<|endoftext|>`` (id 0).
      name: the name that the corpus shows.

    Raises:
      ValueError: `vocab_size` below 257, or too little text to learn that many tokens.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ValueError(f"vocab_size of a trained BPE is {vocab_size}: 256 bytes and the end token need at least 257")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_NAMES[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    if inner.get_vocab_size() < vocab_size:
        raise ValueError(
            f"the text supports only {inner.get_vocab_size()} BPE tokens, {vocab_size} were asked for: ask for fewer"
        )
    return FastTokenizer({"tokenizer.json": inner.to_str(pretty=True).encode()}, name=name)


def _byte_level_bpe(vocabulary: bytes, merges: bytes):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    pairs = []
    for number, line in enumerate(merges.decode().splitlines(), 1):
        if not line or line.startswith("#version"):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise ValueError(f"merges line {number} is {line!r}, expected two symbols")
        pairs.append((pair[0], pair[1]))
    inner = tokenizers.Tokenizer(models.BPE(vocab=json.loads(vocabulary), merges=pairs))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    return inner


def _special_id(vocabulary: dict[str, int], eos: str | None, names: Sequence[str], tokenizer: str) -> int:
    candidates = names if eos is None else (eos,)
    for token in candidates:
        if token in vocabulary:
            return vocabulary[token]
    raise ValueError(
        f"tokenizer {tokenizer!r} has no end-of-document token (looked for {', '.join(candidates)}): name it with --eos"
    )


def _stored_eos(files: dict[str, bytes], description: dict[str, Any]) -> str:
    if "vocab.json" in files:
        vocabulary = json.loads(files["vocab.json"])
    else:
        import tokenizers

        vocabulary = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode()).get_vocab(with_added_tokens=True)
    return next((token for token, i in vocabulary.items() if i == description["eos_id"]), "")


def _sentencepiece_eos(model: bytes, description: dict[str, Any]) -> str:
    import sentencepiece

    inner = sentencepiece.SentencePieceProcessor()
    inner.LoadFromSerializedProto(model)
    return inner.id_to_piece(description["eos_id"])


def _from_folder(folder: Path, eos: str | None) -> Tokenizer:
    def find(*names: str) -> Path | None:
        found = (folder / f"{name}{suffix}" for name in names for suffix in ("", ".gz"))
        return next((path for path in found if path.is_file()), None)

    if path := find("tokenizer.json"):
        return FastTokenizer({"tokenizer.json": _read(path)}, name=folder.name, eos=eos)
    vocabulary, merges = find("vocab.json", "encoder.json"), find("merges.txt", "vocab.bpe")
    if vocabulary and merges:
        return FastTokenizer({"vocab.json": _read(vocabulary), "merges.txt": _read(merges)}, name=folder.name, eos=eos)
    models = sorted([*folder.glob("*.model"), *folder.glob("*.model.gz")])
    if len(models) == 1:
        return SentencePieceTokenizer(_read(models[0]), name=folder.name, eos=eos)
    raise ValueError(
        f"tokenizer folder {folder}: holds neither tokenizer.json, nor vocab.json + merges.txt, nor one .model file"
    )


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except FileNotFoundError:
        raise ValueError(f"tokenizer file {path} is missing") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"tokenizer file {path}: damaged gzip: {error}") from error


def _short_name(path: Path) -> str:
    """`gpt2` for ``.../gpt2/tokenizer.json``; the file's own stem where it is named for itself."""
    stem = path.name.removesuffix(".gz").removesuffix(".json")
    return path.resolve().parent.name if stem == "tokenizer" else stem
