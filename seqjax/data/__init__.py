"""Text to tokens to batches: tokenizers, token corpora on disk, and deterministic grain loaders. Imports no model code."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seqjax.data.corpus import Corpus
    from seqjax.data.loader import LoaderConfig, make_evaluation_batches, make_loader
    from seqjax.data.preparation import PrepareConfig, prepare
    from seqjax.data.sources import SOURCES, stdlib_files
    from seqjax.data.tokenizers import Tokenizer, load_tokenizer, train_bpe

# Loaded on first use: the workers of `prepare` must not pay for grain (which imports JAX).
_HOME = {
    "Corpus": "corpus",
    "LoaderConfig": "loader",
    "PrepareConfig": "preparation",
    "SOURCES": "sources",
    "Tokenizer": "tokenizers",
    "load_tokenizer": "tokenizers",
    "make_evaluation_batches": "loader",
    "make_loader": "loader",
    "prepare": "preparation",
    "stdlib_files": "sources",
    "train_bpe": "tokenizers",
}
__all__ = [
    "SOURCES",
    "Corpus",
    "LoaderConfig",
    "PrepareConfig",
    "Tokenizer",
    "load_tokenizer",
    "make_evaluation_batches",
    "make_loader",
    "prepare",
    "stdlib_files",
    "train_bpe",
]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f"seqjax.data.{_HOME[name]}"), name)
    raise AttributeError(f"module 'seqjax.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
