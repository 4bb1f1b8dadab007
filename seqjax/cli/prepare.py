"""``seqjax prepare``: turn text into a token corpus."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from seqjax.cli.data import splits_table
from seqjax.data.preparation import PrepareConfig, PrepareError, prepare
from seqjax.data.sources import SOURCES

LOG_SECONDS = 10  # between progress lines where there is no terminal
SKIPS_SHOWN = 10


@dataclass(frozen=True)
class Arguments(PrepareConfig):
    """The fields of `PrepareConfig`, the first two of them positional."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="{" + ",".join(SOURCES) + "}")]
    """what is read"""
    paths: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """files, folders, globs or fsspec URLs, plain or .gz; splits come from official file names or from the fractions"""


def main(argv: Sequence[str]) -> int:
    """Run the command: 0 the corpus is there, 1 bad input, a full disk or a killed worker, 2 wrong usage."""
    sources = "\n".join(f"  {name}: {source.help}" for name, source in SOURCES.items())
    description = (
        "Turn text into a token corpus: a folder with token arrays, the tokenizer and a manifest. Running the same command "
        f"again continues where it stopped.\n\nSources:\n{sources}\n\nExample:\n"
        "  seqjax prepare pg19 data/pg19 --out corpora/pg19 --train-bpe 16384"
    )
    config = tyro.cli(
        Arguments,
        prog="seqjax prepare",
        description=description,
        args=list(argv),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    console = Console(stderr=True)
    begin = time.monotonic()
    try:
        with _Meter(console) as meter:
            manifest = prepare(config, meter)
    except PrepareError as error:
        print(f"seqjax prepare: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("seqjax prepare: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    seconds = time.monotonic() - begin
    out = Console()
    out.print(splits_table(manifest))
    if not meter.called:
        out.print(
            f"{escape(config.out)} is already there, made with the same settings from the same input", soft_wrap=True
        )
    else:
        megabytes = sum(split["bytes"] for split in manifest["splits"].values()) / 1e6
        out.print(f"{escape(config.out)}: {megabytes:,.1f} MB of text in {seconds:.1f} s", soft_wrap=True)
    skipped = manifest["skipped"]
    if skipped["count"]:
        console.print(
            f"[yellow]skipped {skipped['count']:,}[/] (the manifest lists the first {len(skipped['first'])}):"
        )
        for line in skipped["first"][:SKIPS_SHOWN]:
            console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)
    return 0


class _Meter:
    """Progress with rate and time left: a bar on a terminal, else a line every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"))
        self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
        self._what, self._task = "", TaskID(0)
        self._start = self._logged = 0.0
        self._first = (0, 0)
        self.called = False

    def __enter__(self) -> "_Meter":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def __call__(self, done: int, total: int, documents: int, what: str) -> None:
        """Hear how far it is; `done` and `total` are bytes read, or tokens while writing."""
        now = time.monotonic()
        self.called = True
        if what != self._what:
            if self._what:
                self._bar.remove_task(self._task)
            # What was there from an earlier run is not this run's speed.
            self._what, self._start, self._first, self._logged = what, now, (done, documents), now
            self._task = self._bar.add_task(what, total=total, completed=done, rate="")
        seconds = max(now - self._start, 1e-3)
        if what == "writing":
            rate = f"{(done - self._first[0]) / seconds / 1e6:.1f} M tokens/s"
        else:
            rate = f"{(done - self._first[0]) / seconds / 1e6:.1f} MB/s, {(documents - self._first[1]) / seconds:,.0f} docs/s"
        self._bar.update(self._task, completed=done, total=total, rate=rate)
        if not self._console.is_terminal and now - self._logged >= LOG_SECONDS:
            self._logged = now
            left = (total - done) * seconds / max(done - self._first[0], 1)
            self._console.print(
                f"{what}: {done / max(total, 1):.0%}, {rate}, {documents:,} documents, about {left:.0f} s left"
            )
