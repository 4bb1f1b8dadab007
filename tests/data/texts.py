"""Generated text and where the shared data are."""

import gzip
import io
import json
import os
import random
from pathlib import Path

# The shelf of real data beside the repository, where a machine has it.
SHARED = Path(os.environ.get("SEQJAX_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data")

WORDS = [
    "the",
    "state",
    "of",
    "a",
    "recurrence",
    "is",
    "small",
    "and",
    "its",
    "update",
    "is",
    "cheap",
    "so",
    "that",
    "long",
    "documents",
    "cost",
    "no",
    "more",
    "than",
    "short",
    "ones",
    "per",
    "token",
    "naïve",
    "café",
    "東京",
    "Ωμέγα",
    "don't",
    "3.14159",
    "(brackets)",
    "--",
    "dashes;",
    "tabs\tand",
    "",
    "double",
    "",
    "spaces",
]


def prose(seed: int, characters: int) -> str:
    """Reproducible text with lines, paragraphs, several scripts and runs of white space."""
    generator = random.Random(seed)
    parts, length = [], 0
    while length < characters:
        line = " ".join(generator.choices(WORDS, k=generator.randrange(3, 16)))
        line += generator.choice([".\n", ".\n", ".\n", "\n\n", " \n \n ", "! "])
        parts.append(line)
        length += len(line)
    return "".join(parts)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    data = "".join(
        json.dumps({"text": text, "url": f"u{i}"}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data.encode(), mtime=0) if path.suffix == ".gz" else data.encode())
    return path


def paragraphs(text: str) -> list[str]:
    """Runs of lines that are not blank."""
    found, current = [], ""
    for line in io.StringIO(text, newline="\n"):
        if line.strip():
            current += line
        elif current:
            found, current = [*found, current], ""
    return [*found, current] if current else found
