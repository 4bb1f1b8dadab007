"""Reading input: local paths and fsspec URLs, plain or gzip, as a stream of text pieces of bounded size.

A document is a run of pieces, the last of which has ``end``. Documents longer than `PIECE` characters are cut where byte-level
BPE with a GPT-2 or GPT-4 pre-tokenizer gives the same tokens as for the uncut text: after a newline between two visible
characters, between a newline and a single space, or, for want of these, before a single space between letters. Text that has
none of them for half a piece is cut at another newline, else at white space, else anywhere: there a token that would span
the cut may be two. SentencePiece, which puts a space before every text, sees all cuts; bytes see none.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import fsspec

PIECE = 1 << 17  # characters of a document that are tokenized at once
BLOCK = 1 << 20  # bytes read at once
LONGEST_RECORD = 1 << 28  # bytes of one JSON line, which must be parsed whole


class InputProblem(Exception):
    """Input that cannot be used: `where` (file and line, row or byte) and `reason`."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)
        self.where, self.reason = where, reason

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class Item(NamedTuple):
    """A file, or the range [start, stop) of one: bytes of a plain file, row groups of a parquet file."""

    path: str
    size: int  # bytes on disk, for the progress bar
    start: int = 0
    stop: int | None = None  # None: to the end
    continues: bool = False  # begins inside a document
    unfinished: bool = False  # its last document goes on in the next item
    about: dict[str, str] | None = None  # name (and title) of the document, where a file is one
    stamp: str = ""  # modification time or tag of the file


class Piece(NamedTuple):
    """Text of a document; `end` marks the last piece of it, `about` its name."""

    text: str
    end: bool
    where: str
    about: dict[str, str] | None = None


# Called with (where, reason): raises, or counts what is skipped and returns.
Problem = Callable[[str, str], None]


class InputStream:
    """Bytes of an item, with the position in the stored file for progress and gzip errors as `InputProblem`."""

    def __init__(self, item: Item, problem: Problem) -> None:
        self.item, self._problem = item, problem
        self.truncated = False
        self._damage: Exception | None = None
        try:
            self._raw: Any = fsspec.open(item.path, "rb").open()
        except (FileNotFoundError, PermissionError) as error:
            raise InputProblem(item.path, f"cannot be read: {error}") from error
        self._zipped = item.path.endswith(".gz")
        self._stream: Any = gzip.GzipFile(fileobj=self._raw) if self._zipped else self._raw
        self.offset = item.start  # of the next byte, unpacked
        if item.start:
            self._stream.seek(item.start)

    def read(self, size: int = BLOCK) -> bytes:
        """Up to `size` bytes; empty at the end of the item, and where a damaged gzip was skipped."""
        if self.truncated:
            return b""
        if self.item.stop is not None:
            size = min(size, self.item.stop - self.offset)
        if not self._zipped:
            data = self._stream.read(size) if size > 0 else b""
        else:
            data = self._unzip(size)
        self.offset += len(data)
        return data

    def _unzip(self, size: int) -> bytes:
        # read1, because read() would throw away what it unpacked before it met the damage.
        parts: list[bytes] = []
        while size > 0 and self._damage is None:
            try:
                part = self._stream.read1(size)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                self._damage = error
                break
            if not part:
                break
            parts.append(part)
            size -= len(part)
        if not parts and self._damage is not None:
            self.truncated = True
            self._problem(self.item.path, f"damaged gzip after {self.offset} unpacked bytes: {self._damage}")
        return b"".join(parts)

    def consumed(self) -> int:
        """Bytes of the stored file read so far."""
        return self._raw.tell() if self._zipped else self.offset - self.item.start

    def lines_before(self) -> int:
        """Newlines before the item's start: only errors need it, so it is counted only then."""
        if not self.item.start:
            return 0
        count, left = 0, self.item.start
        with fsspec.open(self.item.path, "rb") as stream:
            while left and (data := stream.read(min(BLOCK, left))):
                count += data.count(b"\n")
                left -= len(data)
        return count

    def close(self) -> None:
        """Close the file."""
        self._raw.close()


def decoded_blocks(stream: InputStream, problem: Problem) -> Iterator[str]:
    """UTF-8 text in blocks that end at a newline (a line longer than 4 blocks is cut between characters).

    A byte-order mark at the start is dropped. Where `problem` returns, the line with the invalid bytes is left out.
    """
    carry, lines = b"", 0
    first = stream.item.start == 0
    while True:
        data = stream.read()
        block = carry + data
        if first:
            block, first = block.removeprefix(b"\xef\xbb\xbf"), False
        if not data:
            # The line that a damaged gzip broke off is incomplete: it is part of what was skipped.
            cut = 0 if stream.truncated else len(block)
        else:
            cut = block.rfind(b"\n") + 1
            if cut == 0 and len(block) > 4 * BLOCK:
                cut = len(block)
                while cut > len(block) - 4 and block[cut - 1] & 0xC0 == 0x80:
                    cut -= 1
                cut -= block[cut - 1] >= 0xC0
        carry, block = block[cut:], block[:cut]
        lines_here = block.count(b"\n")
        yield from _decoded(block, stream, lines, stream.offset - len(carry) - len(block), problem)
        lines += lines_here
        if not data:
            return


def _decoded(block: bytes, stream: InputStream, lines: int, offset: int, problem: Problem) -> Iterator[str]:
    while block:
        try:
            yield block.decode()
            return
        except UnicodeDecodeError as error:
            line = stream.lines_before() + lines + block.count(b"\n", 0, error.start) + 1
            bad = " ".join(f"0x{byte:02x}" for byte in block[error.start : error.end])
            problem(f"{stream.item.path}:{line}", f"invalid UTF-8 ({bad}) at byte {offset + error.start}")
            begin = block.rfind(b"\n", 0, error.start) + 1
            end = block.find(b"\n", error.start) + 1 or len(block)
            if begin:
                yield block[:begin].decode()
            lines += block.count(b"\n", 0, end)
            block, offset = block[end:], offset + end


class PieceCutter:
    """Collects the text of a document and gives it back in pieces; the cuts depend on the text alone."""

    def __init__(self, about: dict[str, str] | None = None) -> None:
        self.about = about
        self._text: list[str] = []
        self._length = 0
        self.started = False

    def add(self, text: str, where: str) -> Iterator[Piece]:
        """Add text; yields the pieces that are complete."""
        self._text.append(text)
        self._length += len(text)
        self.started = True
        if self._length > 2 * PIECE:
            joined, begin = "".join(self._text), 0
            while len(joined) - begin > PIECE + 2:
                cut = _cut_place(joined, begin)
                yield Piece(joined[begin:cut], False, where, self.about)
                begin = cut
            self._text, self._length = [joined[begin:]], len(joined) - begin

    def finish(self, where: str, *, end: bool = True) -> Iterator[Piece]:
        """The rest of the document, the last piece with `end`."""
        joined, begin = "".join(self._text), 0
        while len(joined) - begin > PIECE + 2:
            cut = _cut_place(joined, begin)
            yield Piece(joined[begin:cut], False, where, self.about)
            begin = cut
        if end or begin < len(joined):
            yield Piece(joined[begin:], end, where, self.about)
        self._text, self._length, self.started = [], 0, False


def _cut_place(text: str, begin: int) -> int:
    """Where to end the piece that begins at `begin`: see the module docstring."""
    low, high = begin + PIECE // 2, begin + PIECE
    place = high
    while (place := text.rfind("\n", low, place)) >= 0:
        before, after, following = text[place - 1], text[place + 1], text[place + 2]
        if not after.isspace() and not before.isspace():
            return place + 1
        if after == " " and not following.isspace():
            return place + 1
    place = high
    while (place := text.rfind(" ", low, place)) >= 0:
        if text[place - 1].isalpha() and text[place + 1].isalpha():
            return place
    for pattern in ("\n", " "):
        if (place := text.rfind(pattern, low, high)) >= 0:
            return place + 1
    return high


def text_pieces(item: Item, document: str, problem: Problem, tick: Callable[[int], None]) -> Iterator[Piece]:
    """Documents of a text file: the whole ``file`` (exact text), every ``line`` without its newline, or paragraphs separated
    by a ``blank-line`` (newlines kept). Lines of white space are not documents."""
    stream = InputStream(item, problem)
    try:
        if document == "file":
            cutter = PieceCutter(item.about)
            for block in decoded_blocks(stream, problem):
                yield from cutter.add(block, item.path)
                tick(stream.consumed())
            yield from cutter.finish(item.path, end=not item.unfinished)
            return
        cutter = PieceCutter()
        where = item.path
        for number, line in _lines(_ticking(decoded_blocks(stream, problem), stream, tick)):
            if document == "line":
                where = f"{item.path}:{number}"
                if cutter.started or not _blank(line):
                    yield from cutter.add(line.removesuffix("\n").removesuffix("\r"), where)
                if line.endswith("\n") and cutter.started:
                    yield from cutter.finish(where)
            elif _blank(line):
                if cutter.started:
                    yield from cutter.finish(where)
            else:
                if not cutter.started:
                    where = f"{item.path}:{number}"
                yield from cutter.add(line, where)
        if cutter.started:
            yield from cutter.finish(where)
    finally:
        stream.close()


def wikitext_pieces(item: Item, document: str, problem: Problem, tick: Callable[[int], None]) -> Iterator[Piece]:
    """WikiText's articles, or the whole ``file``; together they are the exact text.

    An ``article`` begins with the blank line before a one-``=`` heading that a blank line follows. Parquet holds one line
    per row, blank ones as empty strings; the official file's blank line (a space and a newline) is restored.
    """
    if ".parquet" in item.path:
        lines: Iterable[str] = (row if row else " \n" for row, _ in _parquet_rows(item, "text", problem, tick))
        close: Callable[[], None] = lambda: None  # noqa: E731
    else:
        stream = InputStream(item, problem)
        lines = (line for _, line in _lines(_ticking(decoded_blocks(stream, problem), stream, tick)))
        close = stream.close
    try:
        cutter = PieceCutter(item.about)
        number = 0
        for line, following, after in _look_ahead(lines):
            number += 1
            begins = document == "article" and _blank(line) and _heading(following) and _blank(after)
            titled = following
            if number == 1 and document == "article" and _heading(line):
                begins, titled = True, line
            if begins:
                if cutter.started:
                    yield from cutter.finish(f"{item.path}:{number - 1}")
                cutter = PieceCutter({"name": titled.strip().strip("=").strip()})
            yield from cutter.add(line, f"{item.path}:{number}")
        if cutter.started:
            yield from cutter.finish(f"{item.path}:{number}", end=not item.unfinished)
    finally:
        close()


def jsonl_pieces(item: Item, field: str, problem: Problem, tick: Callable[[int], None]) -> Iterator[Piece]:
    """The string `field` of every JSON line; blank lines are passed over."""
    stream = InputStream(item, problem)
    try:
        carry, number = b"", 0
        while True:
            data = stream.read()
            lines = (carry + data).split(b"\n")
            carry = lines.pop() if data else b""
            if stream.truncated:
                lines.pop()
            if len(carry) > LONGEST_RECORD:
                where = f"{item.path}:{stream.lines_before() + number + len(lines) + 1}"
                raise InputProblem(where, f"a line longer than {LONGEST_RECORD >> 20} MiB; is this one JSON per line?")
            for line in lines:
                number += 1
                if line.strip():
                    yield from _record_pieces(line, field, stream, number, problem)
            tick(stream.consumed())
            if not data:
                return
    finally:
        stream.close()


def _record_pieces(line: bytes, field: str, stream: InputStream, number: int, problem: Problem) -> Iterator[Piece]:
    path = stream.item.path
    reason = ""
    try:
        record = json.loads(line)
        text = record[field]
        if isinstance(text, str):
            text.encode()
            where = (
                f"{path}:{number}" if not stream.item.start else f"{path}: line {number} after byte {stream.item.start}"
            )
            cutter = PieceCutter()
            yield from cutter.add(text, where)
            yield from cutter.finish(where)
            return
        reason = f"field {field!r} is {type(text).__name__}, expected a string"
    except UnicodeDecodeError as error:
        reason = f"invalid UTF-8 at byte {error.start} of the line"
    except UnicodeEncodeError as error:
        reason = f"field {field!r} holds half a surrogate pair at character {error.start}"
    except json.JSONDecodeError as error:
        reason = f"malformed JSON: {error.msg} at column {error.colno}"
    except RecursionError:
        reason = "malformed JSON: nested too deeply"
    except KeyError:
        reason = f"no field {field!r}; the record has {', '.join(map(repr, list(record)[:8]))}"
    except TypeError:
        reason = f"a JSON {type(record).__name__}, expected an object with a field {field!r}"
    problem(f"{path}:{stream.lines_before() + number}", reason)


def parquet_pieces(item: Item, field: str, problem: Problem, tick: Callable[[int], None]) -> Iterator[Piece]:
    """The string column `field`, one document per row."""
    for text, where in _parquet_rows(item, field, problem, tick):
        cutter = PieceCutter()
        yield from cutter.add(text, where)
        yield from cutter.finish(where)


def _parquet_rows(item: Item, column: str, problem: Problem, tick: Callable[[int], None]) -> Iterator[tuple[str, str]]:
    import pyarrow
    from pyarrow import parquet

    with fsspec.open(item.path, "rb") as stream:
        try:
            file = parquet.ParquetFile(stream)
            kind = file.schema_arrow.field(column).type if column in file.schema_arrow.names else None
            if kind is None:
                raise InputProblem(item.path, f"no column {column!r}; it has {', '.join(file.schema_arrow.names)}")
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise InputProblem(item.path, f"column {column!r} is {kind}, expected strings")
            groups = list(range(item.start, file.num_row_groups if item.stop is None else item.stop))
            row = sum(file.metadata.row_group(group).num_rows for group in range(item.start))
            total = sum(file.metadata.row_group(group).num_rows for group in groups)
            first = row
            for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=[column]):
                for value in batch.column(0):
                    where = f"{item.path}: row {row}"
                    row += 1
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError as error:
                        problem(where, f"invalid UTF-8 at byte {error.start}")
                        continue
                    if text is None:
                        problem(where, f"column {column!r} is null")
                        continue
                    yield text, where
                tick(item.size * (row - first) // max(total, 1))
        except (pyarrow.ArrowInvalid, pyarrow.ArrowException, OSError) as error:
            problem(item.path, f"damaged parquet: {error}")


def _ticking(blocks: Iterator[str], stream: InputStream, tick: Callable[[int], None]) -> Iterator[str]:
    for block in blocks:
        yield block
        tick(stream.consumed())


def _lines(blocks: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Numbered lines with their newline; a very long line comes in parts, only the last of which has the newline."""
    number = 1
    for block in blocks:
        for line in io.StringIO(block, newline="\n"):
            yield number, line
            number += line.endswith("\n")


def _look_ahead(lines: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Each line with the two after it; empty strings past the end."""
    window: list[str] = []
    for line in lines:
        window.append(line)
        if len(window) == 3:
            yield window[0], window[1], window[2]
            window.pop(0)
    while window:
        yield window[0], window[1] if len(window) > 1 else "", ""
        window.pop(0)


def _blank(line: str) -> bool:
    return not line.strip()


_HEADING = re.compile(r" ?= [^=\n].* =[ ]?\n?")


def _heading(line: str) -> bool:
    """A one-`=` heading: `` = Title = ``; deeper ones are `` = = Title = = ``."""
    return _HEADING.fullmatch(line) is not None and not line.rstrip().endswith("= =")
