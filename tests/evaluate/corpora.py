"""Small corpora of byte tokens, written in the on-disk format."""

import json

import numpy as np

from seqjax.data import load_tokenizer
from seqjax.data.corpus import FORMAT, FORMAT_VERSION, Corpus, write_array
from seqjax.data.tokenizers import store_tokenizer


def write_corpus(path, splits: dict[str, list[str]], tokenizer=None, convention="whitespace"):
    """A corpus folder of the given texts; returns its path."""
    tokenizer = tokenizer or load_tokenizer("bytes")
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer.to_dict(),
        "word_convention": convention,
        "splits": {},
    }
    for split, texts in splits.items():
        documents = [np.array([*tokenizer.encode(text), tokenizer.eos_id]) for text in texts]
        offsets = np.cumsum([0, *map(len, documents)])
        tokens = np.concatenate(documents)
        (path / split).mkdir(parents=True)
        write_array(path / split / "tokens", "uint16", len(tokens), [tokens])
        arrays = {
            "document_offsets": offsets,
            "document_bytes": np.array([len(text.encode()) for text in texts]),
            "document_words": np.array([len(text.split()) for text in texts]),
        }
        for name, values in arrays.items():
            write_array(path / split / name, "int64", len(values), [values])
        names = [json.dumps({"name": f"text-{i}"}) for i in range(len(texts))]
        (path / split / "documents.jsonl").write_text("\n".join(names) + "\n")
        manifest["splits"][split] = {"tokens": len(tokens), "documents": len(texts), "files": {}}
    store_tokenizer(tokenizer, path / "tokenizer")
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def open_corpus(path, texts: list[str]) -> Corpus:
    """A corpus of one validation split, opened."""
    return Corpus.open(write_corpus(path, {"validation": texts}), "validation")
