"""`prepare`: text to a token corpus, in parallel, resumable, atomic and reproducible.

The input is cut into units of work that do not depend on the number of workers. Each worker process turns a unit into a part
(see `parts`); when all are there, the parts are joined in order into the arrays, and the manifest is written last. Until
then the folder ``OUT/.work`` holds the plan and the parts: running the same command again continues where it stopped. The
parts need as much disk as the corpus until it is finished.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from seqjax._signals import StopRequest
from seqjax.data.corpus import FORMAT, FORMAT_VERSION, SPLITS, read_manifest
from seqjax.data.parts import MOST_SKIPS_LISTED, PartWriter, join_parts, read_record, write_json
from seqjax.data.reading import InputProblem
from seqjax.data.sources import SOURCES, InputFile, Selection, Unit, plan_units, unit_pieces
from seqjax.data.tokenizers import (
    FastTokenizer,
    Tokenizer,
    load_stored_tokenizer,
    load_tokenizer,
    store_tokenizer,
    train_bpe,
)

WORD_CONVENTIONS = {
    "whitespace": "words between white space",
    "whitespace+newlines": "words between white space, and one <eos> per newline (WikiText)",
}


class PrepareError(RuntimeError):
    """The work failed: the input is bad or the disk is full. What is finished stays, and the same command continues."""


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare; the fields are the arguments of `seqjax prepare`."""

    source: str  # what is read, one of SOURCES
    paths: tuple[str, ...] = ()
    """Files, folders, globs or fsspec URLs, plain or .gz; splits come from official file names or from the fractions."""
    out: str = ""  # corpus folder to write
    tokenizer: str = "bytes"
    """`bytes`, a tokenizer.json, a SentencePiece .model, VOCAB.json,MERGES.txt, a folder with these, or a corpus."""
    train_bpe: int | None = None  # instead, train a byte-level BPE with this many tokens on the train split
    bpe_megabytes: int = 500  # text that the BPE is trained on, taken evenly from the train split
    eos: str | None = None  # the tokenizer's end-of-document token, where it has an unusual name
    train: tuple[str, ...] = ()  # paths of the train split, instead of the positional paths
    validation: tuple[str, ...] = ()  # paths of the validation split
    test: tuple[str, ...] = ()  # paths of the test split
    validation_fraction: float = 0.0
    """Share of the documents for validation, chosen by the hash of the file name (of the text, where a file holds many)."""
    test_fraction: float = 0.0  # share of the documents for test
    document: Literal["file", "line", "blank-line", "article"] | None = None
    """What a document is. text: file (default), line, or blank-line (paragraphs). wikitext: article (default) or file."""
    field: str = "text"  # json field or parquet column that holds the text
    workers: int = 0  # processes, 0: one per core; the corpus does not depend on it
    on_error: Literal["stop", "skip"] = "stop"
    """Bad input (invalid UTF-8, empty document, damaged file, malformed record): stop, or leave it out and report it."""
    overwrite: bool = False  # replace a corpus, or an unfinished one with other settings, that is in the way


# (bytes done, bytes in all, documents done, what is being done)
Progress = Callable[[int, int, int, str], None]


def prepare(config: PrepareConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Make the corpus; returns its manifest. Returns at once if the same corpus is already there.

    Scripts that call this with more than one worker need the usual ``if __name__ == "__main__"`` guard.

    Raises:
      ValueError: contradicting or impossible settings, nothing to read, or another corpus in the way.
      PrepareError: bad input (file, line and reason) with ``on_error="stop"``, a full disk, or a worker that was killed.
    """
    report = progress or (lambda done, total, documents, what: None)
    selection = _selection(config)
    out = Path(config.out).expanduser()
    units, files = plan_units(selection)
    plan = _plan(config, selection, files)
    if not config.overwrite and (out / "manifest.json").exists():
        manifest = read_manifest(out)
        difference = _difference(manifest["plan"], plan)
        if difference is None and manifest["skipped"]["count"] and config.on_error == "stop":
            difference = "settings (on_error: skip, which left input out)"
        if difference is None:
            shutil.rmtree(out / ".work", ignore_errors=True)  # left by a run that died after its manifest
            return manifest
        raise ValueError(
            f"{out} already holds a corpus made with other {difference}: "
            "choose another --out, or replace it with --overwrite"
        )
    work = out / ".work"
    try:
        work.mkdir(parents=True, exist_ok=True)
        with _locked(work / "lock", out):
            _begin(out, work, plan, config.overwrite)
            return _run(config, selection, units, plan, out, work, report)
    except InputProblem as problem:
        raise PrepareError(
            f"{problem}\nWhat is finished is kept: correct the input and run the same command again, "
            "or leave such input out with --on-error skip"
        ) from problem
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise PrepareError(
                f"the disk of {out} is full: what is finished is kept; make room and run the same command again to continue"
            ) from error
        raise


def _selection(config: PrepareConfig) -> Selection:
    if config.source not in SOURCES:
        raise ValueError(f"source is {config.source!r}, expected one of {', '.join(SOURCES)}")
    if not config.out:
        raise ValueError("--out is missing: the folder that the corpus is written to")
    fractions = (config.validation_fraction, config.test_fraction)
    if min(fractions) < 0 or sum(fractions) >= 1:
        raise ValueError(f"validation and test fractions are {fractions}, expected at least 0 and together below 1")
    explicit = tuple((split, getattr(config, split)) for split in SPLITS if getattr(config, split))
    if any(fractions) and (explicit or config.source in ("stdlib", "c4", "pg19", "wikitext")):
        raise ValueError("fractions are for paths without splits; this input names its splits")
    if config.on_error not in ("stop", "skip"):
        raise ValueError(f"on_error is {config.on_error!r}, expected 'stop' or 'skip'")
    if config.workers < 0:
        raise ValueError(f"workers is {config.workers}, expected 0 (one per core) or more")
    if config.train_bpe is not None and config.tokenizer != "bytes":
        raise ValueError(
            f"name a tokenizer ({config.tokenizer!r}) or train one (--train-bpe {config.train_bpe}), not both"
        )
    return Selection(
        config.source,
        config.paths,
        explicit,
        config.document or SOURCES[config.source].documents[0],
        config.field,
        *fractions,
    )


def _plan(config: PrepareConfig, selection: Selection, files: list[InputFile]) -> dict[str, Any]:
    """Everything that decides the content of the corpus; equal plans make equal corpora."""
    listing = "\n".join(f"{file.path}\t{file.size}\t{file.stamp}" for file in files)
    if config.train_bpe is None:
        tokenizer: Any = load_tokenizer(config.tokenizer, eos=config.eos).to_dict()
    else:
        tokenizer = {"train_bpe": config.train_bpe, "bpe_megabytes": config.bpe_megabytes}
    settings = {
        **asdict(selection),
        "python": platform.python_version() if config.source == "stdlib" else None,
    }
    return json.loads(
        json.dumps(
            {
                "settings": settings,
                "tokenizer": tokenizer,
                "inputs": {
                    "files": len(files),
                    "bytes": sum(file.size for file in files),
                    "listing_sha256": hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest(),
                },
            }
        )
    )


def _difference(old: dict[str, Any], new: dict[str, Any], *, inputs: bool = True) -> str | None:
    """What makes `new` another corpus than `old`, in words; None if nothing does."""
    if old["settings"] != new["settings"]:
        names = [name for name in new["settings"] if old["settings"].get(name) != new["settings"][name]]
        return (
            "settings (" + ", ".join(f"{n}: {old['settings'].get(n)!r} -> {new['settings'][n]!r}" for n in names) + ")"
        )
    if old["tokenizer"] != new["tokenizer"]:
        return f"tokenizer ({_tokenizer_name(old)} -> {_tokenizer_name(new)})"
    if inputs and old["inputs"] != new["inputs"]:
        before, after = old["inputs"], new["inputs"]
        return (
            f"input files ({before['files']} files, {before['bytes']} bytes -> {after['files']} files, "
            f"{after['bytes']} bytes, or changed since)"
        )
    return None


def _tokenizer_name(plan: dict[str, Any]) -> str:
    described = plan["tokenizer"]
    if "train_bpe" in described:
        return f"a BPE of {described['train_bpe']} trained here on {described['bpe_megabytes']} MB"
    return f"{described['name']} {described['fingerprint'][:12]}"


@contextlib.contextmanager
def _locked(path: Path, out: Path) -> Generator[None]:
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another `seqjax prepare` is writing {out}") from None
        yield


def _begin(out: Path, work: Path, plan: dict[str, Any], overwrite: bool) -> None:
    """Continue the same plan; refuse another, or begin again with `overwrite`.

    Changed input files do not stop the work: parts are named by what they were made from, so only the changed ones are made
    again. A BPE trained on the old files is the exception.
    """
    plan_file = work / "plan.json"
    try:
        old = json.loads(plan_file.read_bytes())
    except (OSError, ValueError):
        old = None
    if old is not None:
        difference = _difference(old, plan, inputs="train_bpe" in plan["tokenizer"])
        if difference is None:
            write_json(plan_file, plan)
            return
        if not overwrite:
            raise ValueError(
                f"{out} holds an unfinished preparation with other {difference}: "
                "choose another --out, or begin again with --overwrite"
            )
    (out / "manifest.json").unlink(missing_ok=True)
    for name in (*SPLITS, "tokenizer"):
        shutil.rmtree(out / name, ignore_errors=True)
    shutil.rmtree(work / "parts", ignore_errors=True)
    shutil.rmtree(work / "tokenizer", ignore_errors=True)
    (work / "tokenizer.json").unlink(missing_ok=True)
    (work / "parts").mkdir()
    write_json(plan_file, plan)


@dataclass(frozen=True)
class _Job:
    """What a worker needs, besides the unit."""

    selection: Selection
    work: Path
    tokenizer: dict[str, Any]
    dtype: str
    count_newlines: bool
    skip: bool


def _run(
    config: PrepareConfig,
    selection: Selection,
    units: list[Unit],
    plan: dict[str, Any],
    out: Path,
    work: Path,
    report: Progress,
) -> dict[str, Any]:
    (work / "parts").mkdir(exist_ok=True)
    tokenizer = _tokenizer(config, selection, units, work, report)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    convention = "whitespace+newlines" if config.source == "wikitext" else "whitespace"
    job = _Job(
        selection, work, tokenizer.to_dict(), dtype, convention == "whitespace+newlines", config.on_error == "skip"
    )
    records: dict[int, dict[str, Any]] = {}
    for index, unit in enumerate(units):
        record = read_record(work / "parts", unit.key, dtype)
        # A part made by leaving something out is no answer where bad input must stop the work.
        if record is not None and (job.skip or not record["skipped"]["count"]):
            records[index] = record
    total = sum(unit.size for unit in units)
    state = {"bytes": sum(units[i].size for i in records), "documents": sum(map(_documents, records.values()))}

    def advance(size: int, documents: int) -> None:
        state["bytes"] += size
        state["documents"] += documents
        report(state["bytes"], total, state["documents"], "tokenizing")

    advance(0, 0)
    todo = [index for index in range(len(units)) if index not in records]
    workers = min(config.workers or _cores(), max(len(todo), 1))
    if workers == 1:
        for index in todo:
            records[index] = _work_unit(units[index], job, tokenizer, advance, lambda: False)
    else:
        records |= _work_parallel(todo, units, job, workers, advance)
    return _finish(
        config, [records[i] for i in range(len(units))], plan, convention, tokenizer, dtype, out, work, report
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _documents(record: dict[str, Any]) -> int:
    return sum(counts["documents"] for counts in record["splits"].values())


def _tokenizer(
    config: PrepareConfig, selection: Selection, units: list[Unit], work: Path, report: Progress
) -> Tokenizer:
    """Load or train the tokenizer and store it for the workers; a trained one is kept when the work is resumed."""
    stored = work / "tokenizer.json"
    if config.train_bpe is None:
        tokenizer = load_tokenizer(config.tokenizer, eos=config.eos)
    elif stored.is_file():
        return load_stored_tokenizer(work / "tokenizer", json.loads(stored.read_bytes()))
    else:
        tokenizer = _train(config, selection, units, report)
    store_tokenizer(tokenizer, work / "tokenizer")
    write_json(stored, tokenizer.to_dict())
    return tokenizer


def _train(config: PrepareConfig, selection: Selection, units: list[Unit], report: Progress) -> FastTokenizer:
    chosen = [unit for unit in units if unit.split in ("train", None)]
    if not chosen:
        raise ValueError("--train-bpe needs a train split; the input has none")
    budget = max(config.bpe_megabytes * 10**6 // len(chosen), 1)
    total = sum(unit.size for unit in chosen)

    def ignore(where: str, reason: str) -> None:
        if config.on_error == "stop":
            raise InputProblem(where, reason)

    def texts() -> Iterator[str]:
        done = documents = 0
        for unit in chosen:
            taken = 0
            for split, _, piece in unit_pieces(unit, selection, ignore, lambda count: None):
                if split == "train":
                    taken += len(piece.text)
                    documents += piece.end
                    yield piece.text
                if taken >= budget:
                    break
            done += unit.size
            report(done, total, documents, "reading text for the BPE")

    assert config.train_bpe is not None
    return train_bpe(texts(), config.train_bpe, name=f"bpe-{config.train_bpe}")


def _work_unit(
    unit: Unit,
    job: _Job,
    tokenizer: Tokenizer,
    advance: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> dict[str, Any]:
    """Make one part; `advance` hears (bytes, documents) about twice a second."""
    folder = job.work / "parts"
    skipped, first_skipped = 0, []

    def problem(where: str, reason: str) -> None:
        if not job.skip:
            raise InputProblem(where, reason)
        nonlocal skipped
        skipped += 1
        if len(first_skipped) < MOST_SKIPS_LISTED:
            first_skipped.append(f"{where}: {reason}")

    size = documents = told_size = told_documents = 0
    told_at = time.monotonic()

    def tell() -> None:
        nonlocal told_size, told_documents, told_at
        advance(size - told_size, documents - told_documents)
        told_size, told_documents, told_at = size, documents, time.monotonic()

    def tick(count: int) -> None:
        nonlocal size
        size = count
        if time.monotonic() - told_at > 0.5:
            if cancelled():
                raise KeyboardInterrupt
            tell()

    writers: dict[str, PartWriter] = {}
    try:
        for split, item, piece in unit_pieces(unit, job.selection, problem, tick):
            if split not in writers:
                stem = folder / f"{unit.key}.{split}"
                writers[split] = PartWriter(stem, job.dtype, tokenizer, job.count_newlines, problem)
            writers[split].add(item, piece)
            documents += piece.end
        splits = {split: writer.finish() for split, writer in writers.items()}
        record = {"key": unit.key, "splits": splits, "skipped": {"count": skipped, "first": first_skipped}}
    finally:
        for writer in writers.values():
            writer.close()
    write_json(folder / f"{unit.key}.json", record)
    size = unit.size
    tell()
    return record


# Set in each worker process by `_start_worker`.
_worker: dict[str, Any] = {}


def _start_worker(job: _Job, events: Any, cancel: Any) -> None:
    # Ctrl-C reaches the whole process group; the parent decides. And a worker must not outlive a killed parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    # The processes are the parallelism: threads inside each tokenizer would only fight for the same cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker.update(
        job=job, events=events, cancel=cancel, tokenizer=load_stored_tokenizer(job.work / "tokenizer", job.tokenizer)
    )


def _work_in_process(unit: Unit) -> dict[str, Any]:
    events, cancel = _worker["events"], _worker["cancel"]
    advance = lambda size, documents: events.put((size, documents))  # noqa: E731
    return _work_unit(unit, _worker["job"], _worker["tokenizer"], advance, cancel.is_set)


def _work_parallel(
    todo: list[int], units: list[Unit], job: _Job, workers: int, advance: Callable[[int, int], None]
) -> dict[int, dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    events, cancel = context.SimpleQueue(), context.Event()
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job, events, cancel))
    records: dict[int, dict[str, Any]] = {}
    waiting = list(reversed(todo))
    running: dict[Future, int] = {}
    try:
        with StopRequest(signal.SIGINT) as stop:
            while waiting or running:
                if stop.signal is not None:
                    raise KeyboardInterrupt
                # A few units ahead of the workers: with all of them queued, a failure would take long to be heard.
                while waiting and len(running) < 2 * workers:
                    index = waiting.pop()
                    running[pool.submit(_work_in_process, units[index])] = index
                finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                while not events.empty():
                    advance(*events.get())
                for future in finished:
                    records[running.pop(future)] = future.result()
            while not events.empty():
                advance(*events.get())
            if stop.signal is not None:  # it came with the last part
                raise KeyboardInterrupt
    except BrokenProcessPool as error:
        raise PrepareError(
            "a worker process was killed (out of memory?): finished parts are kept; run the same command again, "
            "with fewer --workers if memory is short"
        ) from error
    finally:
        cancel.set()
        # Workers that report into a full pipe would never see the cancellation: keep reading until they are gone.
        drain = threading.Thread(target=_drain, args=(events, running), daemon=True)
        drain.start()
        pool.shutdown(wait=True, cancel_futures=True)
        drain.join(timeout=5)
    return records


def _drain(events: Any, running: dict[Future, int]) -> None:
    while not all(future.done() for future in running):
        while not events.empty():
            events.get()
        time.sleep(0.05)


def _finish(
    config: PrepareConfig,
    records: list[dict[str, Any]],
    plan: dict[str, Any],
    convention: str,
    tokenizer: Tokenizer,
    dtype: str,
    out: Path,
    work: Path,
    report: Progress,
) -> dict[str, Any]:
    total = sum(counts["tokens"] for record in records for counts in record["splits"].values())
    state = {"tokens": 0}

    def tick(count: int) -> None:
        state["tokens"] += count
        report(state["tokens"], total, sum(map(_documents, records)), "writing")

    splits = {}
    for split in SPLITS:
        if (entry := join_parts(work / "parts", out, split, records, dtype, tick)) is not None:
            splits[split] = entry
    if not splits:
        raise PrepareError("the input has no document")
    for name, fraction in (("validation", config.validation_fraction), ("test", config.test_fraction)):
        if fraction and name not in splits:
            raise ValueError(
                f"none of the {sum(map(_documents, records))} documents fell into {name} by its fraction {fraction}: "
                f"give a larger fraction or name its files with --{name}"
            )
    store_tokenizer(tokenizer, out / "tokenizer")
    first = [line for record in records for line in record["skipped"]["first"]][:MOST_SKIPS_LISTED]
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "source": config.source,
        "plan": plan,
        "tokenizer": tokenizer.to_dict(),
        "word_convention": convention,
        "splits": splits,
        "skipped": {"count": sum(record["skipped"]["count"] for record in records), "first": first},
        "created": {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("seqjax", "tokenizers", "tensorstore", "numpy")},
        },
    }
    write_json(out / "manifest.json", manifest)
    shutil.rmtree(work, ignore_errors=True)
    return manifest
