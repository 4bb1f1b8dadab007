"""``seqjax evaluate RUN``: perplexity per token and per word, bits per byte, loss by position, beside compressors."""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seqjax.cli import UserError

# A result file names every document up to this many; the totals are those of all.
MOST_DOCUMENTS = 10_000


def parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    result = argparse.ArgumentParser(
        prog="seqjax evaluate",
        description="Score every token of a split once: perplexity per token and word, bits per byte, loss by position. "
        "Writes RUN/evaluation/NAME.json and NAME.png.",
    )
    result.add_argument("run", type=Path, help="run folder, as `seqjax train` made it")
    result.add_argument("--data", type=Path, help="corpus folder (default: the one the run was trained on)")
    result.add_argument("--split", default="validation", help="split of the corpus (default: %(default)s)")
    result.add_argument("--step", type=int, help="checkpoint to evaluate (default: the newest)")
    result.add_argument(
        "--carry",
        action="store_true",
        help="a token's context is its document so far, the state being carried from window to window",
    )
    result.add_argument(
        "--reset",
        action="store_true",
        help="a token's context is its window so far. Default: as the run was trained; both flags compare the two",
    )
    result.add_argument("--window", type=int, help="tokens per window (default: the training window)")
    result.add_argument("--batch-size", type=int, help="rows per call (default: that of training, at most 16)")
    result.add_argument("--max-tokens", type=int, help="only the first so many tokens of the split")
    result.add_argument("--compare-compressors", action="store_true", help="gzip -9 and xz -9 on the same text")
    result.add_argument("--name", help="of the result files (default: CORPUS-SPLIT and the kind of context)")
    return result


def main(argv: Sequence[str]) -> int:
    """Command-line entry."""
    arguments = parser().parse_args(argv)
    from rich.console import Console

    from seqjax.cli._provenance import provenance
    from seqjax.data import Corpus
    from seqjax.evaluate import STATES, State, compress, document_texts, head, perplexity, plot_loss_by_position
    from seqjax.train import load_run

    console = Console()
    config, model, tokenizer = load_run(arguments.run, arguments.step)
    folder = arguments.data or Path(config.data.path)
    corpus = Corpus.open(folder, arguments.split)
    if corpus.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"corpus {folder} was made with tokenizer {corpus.manifest['tokenizer']['name']!r} ({corpus.fingerprint[:12]}), but "
            f"{arguments.run} was trained with {tokenizer.name!r} ({tokenizer.fingerprint[:12]}): prepare the text again with "
            f"`--tokenizer {config.data.path}`"
        )
    states: list[State] = [name for name in STATES if getattr(arguments, name)]
    states = states or ["carry" if config.task.carry else "reset"]
    window = config.data.window if arguments.window is None else arguments.window
    batch_size = min(config.data.batch_size, 16) if arguments.batch_size is None else arguments.batch_size

    results, seconds = {}, {}
    for state in states:
        start = time.perf_counter()
        with _progress(state) as update:
            try:
                results[state] = perplexity(
                    model,
                    corpus,
                    state=state,
                    window=window,
                    batch_size=batch_size,
                    max_tokens=arguments.max_tokens,
                    progress=update,
                )
            except FloatingPointError as error:
                print(f"seqjax evaluate: {error}", file=sys.stderr)
                return 1
        seconds[state] = round(time.perf_counter() - start, 2)
    compressions = []
    if arguments.compare_compressors:
        compressions = compress(document_texts(head(corpus, arguments.max_tokens)))

    _show(console, f"{arguments.run} on {folder.name} {arguments.split}", results, compressions, corpus.manifest)
    name = arguments.name or "-".join([folder.name, arguments.split, *states])
    output = arguments.run / "evaluation"
    output.mkdir(exist_ok=True)
    report = {
        "corpus": folder.name,
        "split": arguments.split,
        "step": arguments.step,
        "results": {state: _row(result) for state, result in results.items()},
        "compressors": [compression.to_dict() for compression in compressions],
        "seconds": seconds,
        **provenance(),
    }
    (output / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    labels = {"carry": "state carried through the document", "reset": f"windows of {window}"}
    plot_loss_by_position(
        {labels[state]: result for state, result in results.items()},
        output / f"{name}.png",
        window=config.data.window,
        title=f"{arguments.run.name} on {folder.name} {arguments.split}",
    )
    console.print(f"written to {output / name}.json and .png", highlight=False, soft_wrap=True)
    return 0


class _progress:
    """A progress bar on standard error; ``with _progress(label) as update: update(done, total)``."""

    def __init__(self, label: str):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task(f"evaluate ({label})", total=None)

    def __enter__(self):
        self._bar.start()
        return lambda done, total: self._bar.update(self._task, completed=done, total=total)

    def __exit__(self, *_):
        self._bar.stop()


def _row(result: Any) -> dict[str, Any]:
    row = result.to_dict()
    if len(row["documents"]) > MOST_DOCUMENTS:
        row["documents"], row["documents_not_listed"] = [], len(row["documents"])
    return row


def _number(value: float, digits: int = 4) -> str:
    return "-" if math.isnan(value) else f"{value:,.{digits}g}" if abs(value) < 1e6 else f"{value:.{digits}g}"


def _show(console, title: str, results: dict[str, Any], compressions: Sequence[Any], manifest: dict[str, Any]) -> None:
    from rich.table import Table

    from seqjax.data.preparation import WORD_CONVENTIONS

    first = next(iter(results.values()))
    part = "" if first.complete else " (the first part of the split)"
    console.print(
        f"{first.tokens:,} tokens, {first.words:,} words, {first.bytes:,} bytes, {len(first.documents):,} documents{part}",
        highlight=False,
    )
    table = Table(title=title, title_justify="left")
    for column in ("", "bits per byte", "perplexity per word", "perplexity per token", "nats per token"):
        table.add_column(column, justify="left" if not column else "right")
    for state, result in results.items():
        label = "model, state carried" if state == "carry" else f"model, windows of {result.window}"
        measures = (result.bits_per_byte, result.word_perplexity, result.perplexity, result.nats_per_token)
        table.add_row(label, *map(_number, measures))
    for compression in compressions:
        table.add_row(f"{compression.name}, one file", _number(compression.bits_per_byte))
        table.add_row(f"{compression.name}, file by file", _number(compression.separate_bits_per_byte))
    console.print(table)
    if manifest["word_convention"] in WORD_CONVENTIONS:
        words = WORD_CONVENTIONS[manifest["word_convention"]]
        console.print(f"words: {words}", highlight=False, soft_wrap=True)

    table = Table(title="nats per token by position in document", title_justify="left")
    table.add_column("position", justify="right")
    table.add_column("tokens", justify="right")
    for state in results:
        table.add_column(state, justify="right")
    for i, bucket in enumerate(first.by_position):
        place = f"{bucket.start:,}" if bucket.stop == bucket.start + 1 else f"{bucket.start:,} - {bucket.stop - 1:,}"
        losses = (f"{result.by_position[i].nats_per_token:.3f}" for result in results.values())
        table.add_row(place, f"{bucket.tokens:,}", *losses)
    console.print(table)

    if 1 < len(first.documents) <= 20:
        table = Table(title="documents (bits per byte)", title_justify="left")
        for column in ("document", "bytes", *results):
            table.add_column(column, justify="left" if column == "document" else "right")
        for i, document in enumerate(first.documents):
            scores = (_number(result.documents[i].bits_per_byte) for result in results.values())
            table.add_row(document.name, f"{document.bytes:,}", *scores)
        console.print(table)
