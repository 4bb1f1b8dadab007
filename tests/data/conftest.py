from pathlib import Path

import pytest

from seqjax.data import PrepareConfig, prepare
from tests.data.texts import prose, write_jsonl


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return [prose(seed, 40 + 37 * seed % 1500) for seed in range(60)]


@pytest.fixture(scope="session")
def corpus_path(tmp_path_factory, documents) -> Path:
    """A corpus of bytes: documents 0-49 in train, the rest in validation."""
    folder = tmp_path_factory.mktemp("corpus")
    train, validation = write_jsonl(folder / "a.jsonl", documents[:50]), write_jsonl(folder / "b.jsonl", documents[50:])
    config = PrepareConfig(
        "jsonl", out=str(folder / "out"), train=(str(train),), validation=(str(validation),), workers=1
    )
    prepare(config)
    return folder / "out"
