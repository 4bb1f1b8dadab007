"""Where text comes from: what files a source is made of, which split each belongs to, and how it is cut into units of work.

The units depend on the input alone, not on the number of workers, so the corpus does not either.
"""

import csv
import hashlib
import io
import json
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import fsspec

from seqjax.data.corpus import SPLITS
from seqjax.data.reading import (
    InputProblem,
    Item,
    Piece,
    Problem,
    jsonl_pieces,
    parquet_pieces,
    text_pieces,
    wikitext_pieces,
)

SMALLEST_UNIT, LARGEST_UNIT = 1 << 22, 1 << 26  # bytes of input in a unit of work: about a thousandth of the input
GZIP_RATIO = 3  # a gzip file counts as this many times its size
CUT_SEARCH = 1 << 20  # bytes in which a place to cut a plain file is looked for
STDLIB_FRACTION = 0.05  # of the standard library's files, in validation and in test each


class Source(NamedTuple):
    """A kind of input."""

    reader: str  # "text", "jsonl", "parquet" or "wikitext"
    documents: tuple[str, ...]  # what a document can be; the first is the default
    help: str


SOURCES: dict[str, Source] = {
    "stdlib": Source("text", ("file",), "the Python standard library's own source (no paths, no network)"),
    "text": Source("text", ("file", "line", "blank-line"), "text files, folders or globs"),
    "jsonl": Source("jsonl", ("record",), "one JSON object per line, its text in --field"),
    "parquet": Source("parquet", ("row",), "parquet files, the text in column --field"),
    "c4": Source("jsonl", ("record",), "official C4 shards: en/c4-train.*.json.gz, en/c4-validation.*.json.gz"),
    "pg19": Source("text", ("file",), "official PG-19: train|validation|test/<id>.txt and metadata.csv"),
    "wikitext": Source(
        "wikitext", ("article", "file"), "WikiText-2/103: wiki.{train,valid,test}.tokens or .raw, parquet"
    ),
}


@dataclass(frozen=True)
class Selection:
    """What to read: paths, explicit paths per split, and how documents are found and split."""

    source: str
    paths: tuple[str, ...] = ()
    split_paths: tuple[tuple[str, tuple[str, ...]], ...] = ()  # (split, paths)
    document: str = ""
    field: str = "text"
    validation_fraction: float = 0.0
    test_fraction: float = 0.0


class Unit(NamedTuple):
    """A unit of work: items of one split; split None: every document goes where the hash of its text says."""

    split: str | None
    items: tuple[Item, ...]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(item.size for item in self.items)

    @property
    def key(self) -> str:
        """Names the unit by what it reads: a part stays valid as long as its unit is the same."""
        return hashlib.sha256(json.dumps([self.split, *self.items]).encode()).hexdigest()[:24]


class InputFile(NamedTuple):
    """A file as listed: `stamp` is its modification time or tag, to notice a change between runs."""

    path: str
    size: int
    stamp: str
    relative: str  # path below the folder that was named; its hash decides the split


def hash_split(key: str, validation_fraction: float, test_fraction: float) -> str:
    """The split of a document by the sha256 of `key`: the same key is always in the same split."""
    place = int.from_bytes(hashlib.sha256(key.encode(errors="surrogatepass")).digest()[:8], "big") / 2**64
    if place < test_fraction:
        return "test"
    return "validation" if place < test_fraction + validation_fraction else "train"


def stdlib_files(split: str | None = None) -> list[Path]:
    """The ``.py`` files of the running interpreter's standard library, sorted, of one split or of all.

    Left out: installed packages, test suites (often absent, and with files in broken encodings on purpose), files that the
    build generated for this machine, and empty files. 5% of the files each are validation and test, by the hash of the path.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        outside = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib-dynload"}
        if outside.intersection(parts) or parts[0].startswith(("config-", "_sysconfigdata")) or not path.stat().st_size:
            continue
        relative = "/".join(parts)
        if split is None or split == hash_split(relative, STDLIB_FRACTION, STDLIB_FRACTION):
            found.append((relative, path))
    return [path for _, path in sorted(found)]


def plan_units(selection: Selection) -> tuple[list[Unit], list[InputFile]]:
    """The units of work of a source, in the order of the corpus, and the files that they read.

    Raises:
      ValueError: no such source, no files where they should be, or contradicting paths.
    """
    files = _select(selection)
    if not files:
        raise ValueError(f"source {selection.source!r} found no files in {', '.join(selection.paths) or '(no paths)'}")
    about = _pg19_metadata(selection) if selection.source == "pg19" else {}
    unit_bytes = min(max(sum(file.size for _, file in files) >> 10, SMALLEST_UNIT), LARGEST_UNIT)
    units: list[Unit] = []
    for split in (*SPLITS, None):
        pending: list[Item] = []
        weight = 0
        for file in (file for file_split, file in files if file_split == split):
            items = _cut_file(file, selection, about, unit_bytes)
            # A file of several units has them to itself, so that a document never crosses a unit with others in it.
            if len(items) > 1:
                units += [Unit(split, tuple(pending))] if pending else []
                units += [Unit(split, (item,)) for item in items]
                pending, weight = [], 0
                continue
            pending.append(items[0])
            weight += file.size * (GZIP_RATIO if file.path.endswith(".gz") else 1)
            if weight >= unit_bytes:
                units.append(Unit(split, tuple(pending)))
                pending, weight = [], 0
        units += [Unit(split, tuple(pending))] if pending else []
    return units, [file for _, file in files]


def unit_pieces(
    unit: Unit, selection: Selection, problem: Problem, tick: Callable[[int], None]
) -> Iterator[tuple[str, Item, Piece]]:
    """(split, item, piece) of every document of a unit; `tick` hears the bytes on disk that are done."""
    reader = SOURCES[selection.source].reader
    done = 0
    for item in unit.items:

        def tick_item(count: int, base: int = done, most: int = item.size) -> None:
            tick(base + min(count, most))

        if reader == "text":
            pieces = text_pieces(item, selection.document, problem, tick_item)
        elif reader == "wikitext":
            pieces = wikitext_pieces(item, selection.document, problem, tick_item)
        elif reader == "jsonl":
            pieces = jsonl_pieces(item, selection.field, problem, tick_item)
        else:
            pieces = parquet_pieces(item, selection.field, problem, tick_item)
        split = unit.split
        begins = True
        for piece in pieces:
            if unit.split is None and begins:
                split = hash_split(piece.text, selection.validation_fraction, selection.test_fraction)
            begins = piece.end
            yield split or "train", item, piece
        done += item.size
        tick(done)


def _select(selection: Selection) -> list[tuple[str | None, InputFile]]:
    source = selection.source
    if source not in SOURCES:
        raise ValueError(f"source is {source!r}, expected one of {', '.join(SOURCES)}")
    if selection.document not in SOURCES[source].documents:
        raise ValueError(
            f"a document of source {source!r} is {selection.document!r}, expected {' or '.join(SOURCES[source].documents)}"
        )
    if source == "stdlib":
        if selection.paths or selection.split_paths:
            raise ValueError("source 'stdlib' takes no paths: it reads the running Python's own library")
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [_local(path, path.relative_to(root).as_posix()) for path in stdlib_files()]
        return [(hash_split(file.relative, STDLIB_FRACTION, STDLIB_FRACTION), file) for file in files]
    if selection.split_paths:
        if selection.paths:
            raise ValueError("name either paths or --train/--validation/--test paths, not both")
        return [(split, file) for split, paths in selection.split_paths for file in _list_files(paths)]
    if not selection.paths:
        raise ValueError(f"source {source!r} needs paths: {SOURCES[source].help}")
    files = _list_files(selection.paths)
    if source == "c4":
        return _by_name(files, re.compile(r"c4-(train|validation)\.[^/]*\.json(\.gz)?$"), "c4-train.*.json.gz")
    if source == "pg19":
        return _by_name(files, re.compile(r"(?:^|/)(train|validation|test)/[^/]+\.txt(\.gz)?$"), "train/<id>.txt")
    if source == "wikitext":
        pattern = re.compile(r"(?:^|[/.])(train|validation|valid|test)([.-][^/]*)?\.(tokens|raw|txt|parquet)(\.gz)?$")
        return _by_name(files, pattern, "wiki.train.tokens, .raw or train-*.parquet")
    if not (selection.validation_fraction or selection.test_fraction):
        return [("train", file) for file in files]
    if selection.document == "file":
        fractions = selection.validation_fraction, selection.test_fraction
        return [(hash_split(file.relative, *fractions), file) for file in files]
    return [(None, file) for file in files]


def _by_name(files: list[InputFile], pattern: re.Pattern[str], example: str) -> list[tuple[str | None, InputFile]]:
    chosen: dict[str, list[InputFile]] = {split: [] for split in SPLITS}
    for file in files:
        if match := pattern.search(file.path):
            chosen[{"valid": "validation"}.get(match[1], match[1])].append(file)
    if not any(chosen.values()):
        seen = ", ".join(PurePosixPath(file.path).name for file in files[:5])
        raise ValueError(
            f"no file is named like {example}; found {seen or 'nothing'}{' ...' if len(files) > 5 else ''}"
        )
    # The same text twice, as x.tokens beside x.raw or x.txt beside x.txt.gz, would be counted twice.
    for split, members in chosen.items():
        stems = [re.sub(r"(\.head)?\.(tokens|raw|txt|json|parquet)(\.gz)?$", "", file.path) for file in members]
        for stem in stems:
            if stems.count(stem) > 1:
                names = [PurePosixPath(file.path).name for file, s in zip(members, stems) if s == stem]
                raise ValueError(
                    f"{split} has several variants of one file ({', '.join(names)}): name the files with --train, --validation and --test"
                )
    return [(split, file) for split in SPLITS for file in chosen[split]]


def _list_files(paths: Sequence[str]) -> list[InputFile]:
    """Files of the paths: a file, a folder (everything below it that is not hidden) or a glob; sorted within each path."""
    listed: list[InputFile] = []
    for path in paths:
        filesystem, inner = fsspec.core.url_to_fs(str(Path(path).expanduser()) if "://" not in path else path)
        local = "file" in (filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,))
        if any(mark in inner for mark in "*?[") and not filesystem.exists(inner):
            found = filesystem.glob(inner, detail=True)
            root = re.split(r"[*?[]", inner, maxsplit=1)[0].rpartition("/")[0]
        elif filesystem.isdir(inner):
            found = filesystem.find(inner, detail=True)
            root = inner
        elif filesystem.exists(inner):
            found = {inner: filesystem.info(inner)}
            root = inner.rpartition("/")[0]
        else:
            raise ValueError(f"input {path!r} does not exist")
        members = []
        for name, info in sorted(found.items()):
            relative = name.removeprefix(root).lstrip("/")
            if info["type"] != "file" or (name != inner and any(part.startswith(".") for part in relative.split("/"))):
                continue
            stamp = str(info.get("mtime") or info.get("ETag") or info.get("created") or "")
            members.append(
                InputFile(name if local else filesystem.unstrip_protocol(name), info["size"], stamp, relative)
            )
        if not members:
            raise ValueError(f"input {path!r} holds no files")
        listed += members
    return listed


def _local(path: Path, relative: str) -> InputFile:
    stat = path.stat()
    return InputFile(str(path), stat.st_size, str(stat.st_mtime), relative)


def _cut_file(file: InputFile, selection: Selection, about: dict[str, dict[str, str]], unit_bytes: int) -> list[Item]:
    reader = SOURCES[selection.source].reader
    whole_file = selection.document == "file"
    description = about.get(_document_id(file.path)) if about else None
    if whole_file and description is None:
        description = {"name": _document_id(file.path) if selection.source == "pg19" else file.relative}
    whole = Item(file.path, file.size, about=description if whole_file else None, stamp=file.stamp)
    if ".parquet" in file.path and reader in ("parquet", "wikitext"):
        return [whole] if reader == "wikitext" else _cut_parquet(file, unit_bytes)
    if file.path.endswith(".gz") or file.size <= 2 * unit_bytes:
        return [whole]
    boundaries = _BOUNDARIES["file" if whole_file else selection.document]
    cuts = [0]
    with fsspec.open(file.path, "rb") as stream:
        for place in range(unit_bytes, file.size - unit_bytes // 2, unit_bytes):
            stream.seek(place)
            ahead = stream.read(CUT_SEARCH)
            if match := next(filter(None, (boundary.search(ahead) for boundary in boundaries)), None):
                cut = place + match.end()
                if cuts[-1] < cut < file.size:
                    cuts.append(cut)
    spans = list(zip(cuts, [*cuts[1:], file.size]))
    return [
        Item(
            file.path,
            stop - start,
            start,
            stop,
            continues=whole_file and start > 0,
            unfinished=whole_file and stop < file.size,
            about=whole.about,
            stamp=file.stamp,
        )
        for start, stop in spans
    ]


# Where a plain file may be cut so that the parts hold whole documents; for `file`, where a document may be cut so that
# byte-level BPE sees no difference (see `reading`), restricted to ASCII around the cut and tried in turn.
_BOUNDARIES = {
    "file": (re.compile(rb"[!-~]\n(?=[!-~])|\n(?= [!-~])"), re.compile(rb"[A-Za-z](?= [A-Za-z])")),
    "line": (re.compile(rb"\n"),),
    "record": (re.compile(rb"\n"),),
    "blank-line": (re.compile(rb"\n[ \t\r]*\n(?=[^ \t\r\n])"),),
    "article": (re.compile(rb"\n(?= ?\n ?= [^=\n][^\n]*[^=\n] = ?\n ?\n)"),),
}


def _cut_parquet(file: InputFile, unit_bytes: int) -> list[Item]:
    import pyarrow
    from pyarrow import parquet

    try:
        with fsspec.open(file.path, "rb") as stream:
            metadata = parquet.ParquetFile(stream).metadata
    except (pyarrow.ArrowException, OSError):
        return [Item(file.path, file.size, stamp=file.stamp)]  # the reader says what is wrong with it
    sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    items, start, weight = [], 0, 0
    for group, size in enumerate(sizes):
        weight += size
        if weight >= unit_bytes or group == len(sizes) - 1:
            items.append(Item(file.path, file.size * weight // max(sum(sizes), 1), start, group + 1, stamp=file.stamp))
            start, weight = group + 1, 0
    return items or [Item(file.path, file.size, stamp=file.stamp)]


def _document_id(path: str) -> str:
    return PurePosixPath(path).name.removesuffix(".gz").removesuffix(".txt")


def _pg19_metadata(selection: Selection) -> dict[str, dict[str, str]]:
    """Titles by book id from metadata.csv (book_id, short_book_title, publication_date, url; no header), if it is there."""
    for path in selection.paths:
        filesystem, inner = fsspec.core.url_to_fs(path)
        file = f"{inner.rstrip('/')}/metadata.csv"
        if not filesystem.exists(file):
            continue
        try:
            rows = list(csv.reader(io.StringIO(filesystem.cat_file(file).decode())))
        except UnicodeDecodeError as error:
            raise InputProblem(file, f"invalid UTF-8 at byte {error.start}") from error
        names = ("title", "publication_date", "url")
        return {row[0]: {"name": row[0], **dict(zip(names, row[1:]))} for row in rows if row}
    return {}
