"""``seqjax list``: what there is to train, to read and to rerun."""

import argparse
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

TOKENIZERS = {
    "bytes": "UTF-8 bytes and an end token; needs no files",
    "FILE.json": "a `tokenizer.json` of the Hugging Face tokenizers library",
    "FILE.model": "a SentencePiece model",
    "VOCAB.json,MERGES.txt": "GPT-2's two files",
    "FOLDER": "a folder that holds one of these, or a corpus, whose tokenizer is reused",
    "--train-bpe N": "a byte-level BPE of N tokens, learned from the text that is prepared",
}


def main(argv: Sequence[str]) -> int:
    """Command-line entry."""
    parser = argparse.ArgumentParser(prog="seqjax list", description="Name what this installation and checkout offer.")
    parser.add_argument("kind", nargs="*", metavar="KIND", help=f"{', '.join(TABLES)} (default: all)")
    arguments = parser.parse_args(argv)
    unknown = [kind for kind in arguments.kind if kind not in TABLES]
    if unknown:
        parser.error(f"there is no kind {unknown[0]!r}; expected {', '.join(TABLES)}")
    from rich.console import Console

    console = Console()
    for kind in arguments.kind or TABLES:
        console.print(TABLES[kind]())
    return 0


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        # Names must stay whole on a narrow terminal; texts may wrap.
        table.add_column(column, justify="right" if column in right else "left", no_wrap=column in ("name", *right))
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _first_sentence(text: str | None) -> str:
    """The first sentence of a docstring, without reST markup."""
    paragraph = " ".join((text or "").strip().split("\n\n")[0].split())
    # A full stop between symbols ("q_t . k_s") ends nothing.
    return re.split(r"(?<=\S)\.\s+(?=[A-Z])", paragraph)[0].rstrip(".").replace("``", "")


def _presets() -> Any:
    from seqjax.layers import MIXERS
    from seqjax.models import PRESETS, parameter_count

    mixer_names = {config_class: name for name, (_, config_class) in MIXERS.items()}
    rows = []
    for name, config in PRESETS.items():
        runs = [
            (mixer_names[type(mixer)] + (f" (window {mixer.window})" if getattr(mixer, "window", None) else ""))
            for mixer in config.pattern
        ]
        pattern = ", ".join(
            f"{count} x {mixer}" if (count := len(list(group))) > 1 else mixer for mixer, group in groupby(runs)
        )
        mlp = "-" if config.mlp_dim is None else f"{config.mlp} {config.mlp_dim:,}"
        sizes = (f"{parameter_count(config):,}", f"{config.dim:,}", f"{config.num_layers}", f"{config.vocab_size:,}")
        rows.append((name, *sizes, pattern, mlp))
    columns = ("name", "parameters", "width", "layers", "vocabulary", "mixers", "MLP")
    return _table("presets (seqjax train NAME)", columns, rows, columns[1:5])


def _mixers() -> Any:
    from seqjax.layers import MIXERS

    rows = [(name, config.__name__, _first_sentence(mixer.__doc__)) for name, (mixer, config) in MIXERS.items()]
    return _table("mixers (seqjax.layers.MIXERS)", ("name", "config", "recurrence"), rows)


def _sources() -> Any:
    from seqjax.data import SOURCES

    rows = [(name, source.help, ", ".join(source.documents)) for name, source in SOURCES.items()]
    return _table("sources (seqjax prepare NAME)", ("name", "input", "documents"), rows)


def _tokenizers() -> Any:
    return _table("tokenizers (seqjax prepare --tokenizer NAME)", ("name", "what"), list(TOKENIZERS.items()))


def _experiments() -> Any:
    from seqjax.cli.experiment import available, experiments_folder

    names = available()
    if not names:
        return "no experiments here: they come with a checkout of the repository\n"
    rows = [(name, _claim(experiments_folder() / name / "experiment.py")) for name in names]
    return _table("experiments (seqjax experiment NAME)", ("name", "claim"), rows)


def _claim(path: Any) -> str:
    """The CLAIM of an experiment, read without importing (and so without running) it."""
    import ast

    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "CLAIM" for t in node.targets):
            try:
                return str(ast.literal_eval(node.value))
            except ValueError:
                return ""
    return ""


TABLES: dict[str, Callable[[], Any]] = {
    "presets": _presets,
    "mixers": _mixers,
    "sources": _sources,
    "tokenizers": _tokenizers,
    "experiments": _experiments,
}
