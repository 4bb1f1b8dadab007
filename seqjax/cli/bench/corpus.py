"""The corpus that the ``train`` and ``loader`` suites read when none is named."""

import contextlib
import pathlib
import tempfile
from collections.abc import Generator

from rich.console import Console

from seqjax.data import Corpus, PrepareConfig, prepare


@contextlib.contextmanager
def corpus_or_default(path: pathlib.Path | None, console: Console) -> Generator[pathlib.Path]:
    """The named corpus after a check that it opens, or the embedded one (bytes) in a folder that is removed afterwards.

    Raises:
        ValueError: the folder holds no corpus.
    """
    if path is not None:
        Corpus.open(path)
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="seqjax-bench-") as folder:
        out = pathlib.Path(folder) / "stdlib-bytes"
        with console.status("preparing the embedded corpus (the standard library's source, as bytes)"):
            prepare(PrepareConfig("stdlib", out=str(out), workers=1))
        yield out
