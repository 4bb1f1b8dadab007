"""``seqjax data``: describe and check a token corpus."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from seqjax.data.corpus import SHARD, Corpus, read_manifest
from seqjax.data.preparation import WORD_CONVENTIONS

SNIPPET_TOKENS = 60


@dataclass(frozen=True)
class Info:
    """Describe a corpus: splits, tokens, documents, tokenizer, a decoded example and checksums."""

    path: tyro.conf.Positional[str]
    """corpus folder"""


@dataclass(frozen=True)
class Check:
    """Read the whole corpus and compare it with the checksums in its manifest."""

    path: tyro.conf.Positional[str]
    """corpus folder"""


def main(argv: Sequence[str]) -> int:
    """Run ``info`` or ``check``: 0 fine, 1 damaged, 2 wrong usage."""
    command = tyro.cli(
        Annotated[Info, tyro.conf.subcommand("info")] | Annotated[Check, tyro.conf.subcommand("check")],
        prog="seqjax data",
        description="Describe or check a token corpus.",
        args=list(argv),
    )
    path = Path(command.path).expanduser()
    manifest = read_manifest(path)
    if isinstance(command, Info):
        _describe(path, manifest)
        return 0
    return _check(path, manifest)


def splits_table(manifest: dict[str, Any]) -> Table:
    """Tokens (one eos per document included), documents, bytes and words of each split."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("split", "tokens", "documents", "bytes", "words", "bytes/token"):
        table.add_column(name, justify="left" if name == "split" else "right", no_wrap=True)
    for split, counts in manifest["splits"].items():
        table.add_row(
            split,
            f"{counts['tokens']:,}",
            f"{counts['documents']:,}",
            f"{counts['bytes']:,}",
            f"{counts['words']:,}",
            f"{counts['bytes'] / counts['tokens']:.2f}",
        )
    return table


def _describe(path: Path, manifest: dict[str, Any]) -> None:
    console = Console()
    tokenizer, created = manifest["tokenizer"], manifest["created"]
    console.print(splits_table(manifest))
    facts = {
        "corpus": f"{path}, {sum(sum(split['files'].values()) for split in manifest['splits'].values()) / 1e6:,.1f} MB",
        "source": f"{manifest['source']}, {manifest['plan']['inputs']['files']:,} files, "
        f"{manifest['plan']['inputs']['bytes']:,} bytes, one document per {manifest['plan']['settings']['document']}",
        "tokenizer": f"{tokenizer['name']} ({tokenizer['kind']}), {tokenizer['vocab_size']:,} ids, eos {tokenizer['eos_id']}, "
        f"fingerprint {tokenizer['fingerprint'][:12]}",
        "words": WORD_CONVENTIONS[manifest["word_convention"]],
        "skipped": f"{manifest['skipped']['count']:,}",
        "made": f"{created['time']} by seqjax {created['seqjax']}, tokenizers {created['tokenizers']}",
    }
    for name, fact in facts.items():
        console.print(f"[bold]{name:>10}[/]  {escape(fact)}", highlight=False, soft_wrap=True)
    for split, counts in manifest["splits"].items():
        console.print(f"[bold]{split:>10}[/]  sha256 {counts['sha256']}", highlight=False, soft_wrap=True)
    for split in manifest["splits"]:
        corpus = Corpus.open(path, split)
        if split == next(iter(manifest["splits"])):
            decode = corpus.tokenizer().decode
        names = corpus.documents()
        name = f" {names[0].get('title') or names[0]['name']}" if names else ""
        text = decode(corpus.document(0)[:SNIPPET_TOKENS])
        console.print(f"[bold]{split:>10}[/] {escape(name)}  {escape(repr(text))}", highlight=False, soft_wrap=True)


def _check(path: Path, manifest: dict[str, Any]) -> int:
    for split in manifest["splits"]:
        try:
            corpus = Corpus.open(path, split)
            corpus.tokenizer()
            steps = -(-corpus.num_tokens // (SHARD // 2))
            for _ in track(
                corpus.check(), f"reading {split}", total=steps, console=Console(stderr=True), transient=True
            ):
                pass
        except ValueError as error:
            print(f"seqjax data check: {error}", file=sys.stderr)
            return 1
        print(f"{split}: {corpus.num_tokens:,} tokens, {corpus.num_documents:,} documents, sha256 as in the manifest")
    return 0
