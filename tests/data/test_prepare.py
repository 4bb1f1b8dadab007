import errno
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import fsspec
import numpy as np
import psutil
import pyarrow as pa
import pytest
from pyarrow import parquet

from seqjax.data import Corpus, PrepareConfig, parts, preparation, prepare, sources, stdlib_files
from seqjax.data.preparation import PrepareError
from tests.data.texts import SHARED, paragraphs, prose, write_jsonl


def texts_of(path, split="train") -> list[str]:
    corpus = Corpus.open(path, split)
    decode = corpus.tokenizer().decode
    return [decode(corpus.document(index)) for index in range(corpus.num_documents)]


def digests(manifest) -> dict:
    names = ("tokens", "documents", "bytes", "words", "sha256", "documents_sha256")
    return {split: {name: entry[name] for name in names} for split, entry in manifest["splits"].items()}


@pytest.fixture
def small_units(monkeypatch):
    """Units of 64 KiB, so that small inputs are cut into many."""
    monkeypatch.setattr(sources, "SMALLEST_UNIT", 1 << 16)


@pytest.fixture(scope="module")
def long_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("long") / "book.txt"
    path.write_text(prose(11, 700_000))
    return path


def test_documents_come_back_with_their_sizes(corpus_path, documents):
    corpus = Corpus.open(corpus_path)
    assert texts_of(corpus_path) == documents[:50] and texts_of(corpus_path, "validation") == documents[50:]
    assert corpus.document_bytes.tolist() == [len(text.encode()) for text in documents[:50]]
    assert corpus.document_words.tolist() == [len(text.split()) for text in documents[:50]]
    assert corpus.num_tokens == corpus.document_offsets[-1] == sum(len(text.encode()) + 1 for text in documents[:50])
    assert all((corpus.document(index)[-1] == corpus.eos_id) for index in range(50))
    assert not (corpus_path / ".work").exists()


@pytest.mark.parametrize("document", ["file", "line", "blank-line"])
def test_one_plain_file_is_cut_into_units_without_a_trace(long_text, tmp_path, small_units, monkeypatch, document):
    config = PrepareConfig("text", (str(long_text),), document=document, train_bpe=300, workers=1)
    units, _ = sources.plan_units(sources.Selection("text", (str(long_text),), document=document))
    assert len(units) > 8
    cut = prepare(replace(config, out=str(tmp_path / "cut")))
    monkeypatch.setattr(sources, "SMALLEST_UNIT", 1 << 30)
    whole = prepare(replace(config, out=str(tmp_path / "whole"), train_bpe=None, tokenizer=str(tmp_path / "cut")))
    assert digests(cut) == digests(whole)
    text = long_text.read_text()
    assert cut["splits"]["train"]["words"] == len(text.split())
    if document == "file":
        assert texts_of(tmp_path / "cut") == [text]
        assert Corpus.open(tmp_path / "cut").documents() == [{"name": "book.txt"}]
    elif document == "line":
        assert texts_of(tmp_path / "cut") == [line for line in text.split("\n") if line.strip()]
    else:
        assert texts_of(tmp_path / "cut") == paragraphs(text)


def test_the_corpus_does_not_depend_on_the_number_of_workers(long_text, tmp_path, small_units):
    config = PrepareConfig("text", (str(long_text),), document="line", train_bpe=300, validation_fraction=0.2)
    manifests = [prepare(replace(config, out=str(tmp_path / f"w{n}"), workers=n)) for n in (1, 3)]
    assert digests(manifests[0]) == digests(manifests[1])
    assert manifests[0]["tokenizer"] == manifests[1]["tokenizer"]
    for split in ("train", "validation"):
        files = [sorted((tmp_path / f"w{n}" / split).rglob("*")) for n in (1, 3)]
        for a, b in zip(*files, strict=True):
            assert a.is_dir() or a.read_bytes() == b.read_bytes()


def test_fractions_split_by_content_so_that_equal_texts_stay_together(tmp_path):
    texts = [prose(seed, 60) for seed in range(400)]
    write_jsonl(tmp_path / "a.jsonl", texts + texts[::-1])
    config = PrepareConfig("jsonl", (str(tmp_path / "a.jsonl"),), validation_fraction=0.2, test_fraction=0.1, workers=1)
    manifest = prepare(replace(config, out=str(tmp_path / "out")))
    found = {split: texts_of(tmp_path / "out", split) for split in manifest["splits"]}
    assert sorted(sum(found.values(), [])) == sorted(texts * 2)
    assert not set(found["train"]) & set(found["validation"]) and not set(found["train"]) & set(found["test"])
    assert 110 < len(found["validation"]) < 210 and 40 < len(found["test"]) < 120
    with pytest.raises(ValueError, match="none of the 2 documents fell into validation"):
        write_jsonl(tmp_path / "b.jsonl", ["a b", "c d"])
        prepare(
            PrepareConfig(
                "jsonl", (str(tmp_path / "b.jsonl"),), str(tmp_path / "o"), validation_fraction=1e-9, workers=1
            )
        )


def test_official_layouts_are_recognised(tmp_path):
    c4 = tmp_path / "c4" / "en"
    for name, texts in {
        "c4-train.00000-of-00002": ["a b"],
        "c4-train.00001-of-00002": ["c"],
        "c4-validation.00000-of-00001": ["v"],
    }.items():
        write_jsonl(c4 / f"{name}.json.gz", texts)
    prepare(PrepareConfig("c4", (str(tmp_path / "c4"),), str(tmp_path / "c4out"), workers=1))
    assert texts_of(tmp_path / "c4out") == ["a b", "c"] and texts_of(tmp_path / "c4out", "validation") == ["v"]

    pg19 = tmp_path / "pg19"
    for split, book, text in [
        ("train", "12", "T twelve"),
        ("train", "7", "T seven"),
        ("validation", "3", "V"),
        ("test", "4", "T"),
    ]:
        (pg19 / split).mkdir(parents=True, exist_ok=True)
        (pg19 / split / f"{book}.txt").write_text(text)
    (pg19 / "metadata.csv").write_text('12,"A, Title",1850,http://x\n7,Other,1851,http://y\n')
    prepare(PrepareConfig("pg19", (str(pg19),), str(tmp_path / "pgout"), workers=1))
    assert Corpus.open(tmp_path / "pgout").documents() == [
        {"name": "12", "title": "A, Title", "publication_date": "1850", "url": "http://x"},
        {"name": "7", "title": "Other", "publication_date": "1851", "url": "http://y"},
    ]
    assert texts_of(tmp_path / "pgout", "test") == ["T"]
    assert Corpus.open(tmp_path / "pgout", "test").documents() == [{"name": "4"}]

    wiki = tmp_path / "wikitext-2"
    wiki.mkdir()
    for split in ("train", "valid", "test"):
        (wiki / f"wiki.{split}.tokens").write_text(f" \n = {split} = \n \n A b <unk> . \n")
    manifest = prepare(PrepareConfig("wikitext", (str(wiki),), str(tmp_path / "wout"), workers=1))
    # 3 words of the heading, 4 of the line, 4 newlines.
    assert {split: entry["words"] for split, entry in manifest["splits"].items()} == dict.fromkeys(
        ("train", "validation", "test"), 11
    )
    assert manifest["word_convention"] == "whitespace+newlines"
    shutil.copy(wiki / "wiki.test.tokens", wiki / "wiki.test.raw")
    with pytest.raises(
        ValueError, match=r"test has several variants.*wiki.test.raw, wiki.test.tokens.*--validation and --test"
    ):
        prepare(PrepareConfig("wikitext", (str(wiki),), str(tmp_path / "wout2"), workers=1))


def test_wikitext_parquet_equals_the_tokens_file(tmp_path):
    text = " \n = A = \n \n One two . \n \n = B = \n \n Three . \n"
    (tmp_path / "wiki.train.tokens").write_text(text)
    rows = ["" if line == " \n" else line for line in text.splitlines(keepends=True)]
    parquet.write_table(pa.table({"text": rows}), tmp_path / "train-00000-of-00001.parquet")
    made = [
        prepare(PrepareConfig("wikitext", train=(str(tmp_path / name),), out=str(tmp_path / f"out{name}"), workers=1))
        for name in ("wiki.train.tokens", "train-00000-of-00001.parquet")
    ]
    assert digests(made[0]) == digests(made[1]) and made[0]["splits"]["train"]["documents"] == 2


def test_parquet_row_groups_are_units(tmp_path, small_units):
    texts = [prose(seed, 2000) for seed in range(200)]
    parquet.write_table(pa.table({"body": texts}), tmp_path / "x.parquet", row_group_size=20)
    config = PrepareConfig("parquet", (str(tmp_path / "x.parquet"),), str(tmp_path / "out"), field="body", workers=1)
    assert len(sources.plan_units(sources.Selection("parquet", config.paths, document="row", field="body"))[0]) > 3
    prepare(config)
    assert texts_of(tmp_path / "out") == texts


def test_urls_globs_folders_and_gzip_are_the_same_text(tmp_path):
    memory = fsspec.filesystem("memory")
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    for name, text in {"a.txt": "alpha", "sub/b.txt": "beta"}.items():
        (folder / name).write_text(text)
        memory.pipe(f"/shelf/{name}.gz", gzip.compress(text.encode()))
    (folder / ".hidden").write_text("no")
    for number, path in enumerate(["memory://shelf", "memory://shelf/**/*.gz", str(folder), f"{folder}/**/*.txt"]):
        out = tmp_path / str(number)
        prepare(PrepareConfig("text", (path,), str(out), workers=1))
        assert sorted(texts_of(out)) == ["alpha", "beta"], path


def test_the_standard_library_is_an_input_everywhere(tmp_path):
    splits = {split: stdlib_files(split) for split in ("train", "validation", "test")}
    assert sum(map(len, splits.values())) == len(stdlib_files()) > 300
    assert min(map(len, splits.values())) > 10
    names = [path.as_posix() for path in stdlib_files()]
    assert not any("/site-packages/" in name or "/test/" in name for name in names)
    manifest = prepare(PrepareConfig("stdlib", out=str(tmp_path / "out"), workers=2))
    corpus = Corpus.open(tmp_path / "out", "test")
    assert corpus.document_bytes.sum() == sum(path.stat().st_size for path in splits["test"]) - 3 * sum(
        path.read_bytes().startswith(b"\xef\xbb\xbf") for path in splits["test"]
    )
    assert manifest["plan"]["settings"]["python"] == sys.version.split()[0]
    assert len(corpus.documents()) == corpus.num_documents


BAD = {
    "jsonl": ('{"text": "ok"}\n{"text": ""}\n{"text": "fine"}\n', "x.jsonl:2: empty document", ["ok", "fine"]),
    "line": (b"ok\n\xff\nfine\n", "x.txt:2: invalid UTF-8", ["ok", "fine"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_stops_with_its_place_or_is_skipped_and_reported(tmp_path, kind):
    content, message, kept = BAD[kind]
    path = tmp_path / ("x.jsonl" if kind == "jsonl" else "x.txt")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    config = PrepareConfig(
        "jsonl" if kind == "jsonl" else "text",
        (str(path),),
        str(tmp_path / "out"),
        workers=1,
        document=None if kind == "jsonl" else "line",
    )
    with pytest.raises(PrepareError, match=re.escape(message)):
        prepare(config)
    with pytest.raises(ValueError, match="half-written"):
        Corpus.open(tmp_path / "out")
    manifest = prepare(replace(config, on_error="skip"))
    assert texts_of(tmp_path / "out") == kept
    assert manifest["skipped"]["count"] == 1 and message in manifest["skipped"]["first"][0]
    with pytest.raises(ValueError, match="on_error: skip"):
        prepare(config)


def test_an_empty_file_is_a_bad_document(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    (tmp_path / "texts" / "b.txt").write_text(" \n \n")
    config = PrepareConfig("text", (str(tmp_path / "texts"),), str(tmp_path / "out"), workers=1)
    with pytest.raises(PrepareError, match="b.txt: empty document"):
        prepare(config)
    prepare(replace(config, on_error="skip"))
    assert texts_of(tmp_path / "out") == ["text"] and Corpus.open(tmp_path / "out").documents() == [{"name": "a.txt"}]


def test_an_error_in_a_worker_process_reaches_the_user(tmp_path, small_units):
    lines = [json.dumps({"text": prose(seed, 500)}) for seed in range(600)]
    lines[450] = "{broken"
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    with pytest.raises(PrepareError, match=r"x.jsonl:451: malformed JSON.*column 2"):
        prepare(PrepareConfig("jsonl", (str(tmp_path / "x.jsonl"),), str(tmp_path / "out"), workers=2))


def test_resuming_makes_only_what_is_missing_and_corrected_input_only_what_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SMALLEST_UNIT", 800)  # one unit per file
    files = [write_jsonl(tmp_path / f"{n}.jsonl", [prose(n, 300)] * 3) for n in range(6)]
    config = PrepareConfig("jsonl", tuple(map(str, files)), str(tmp_path / "out"), workers=1)
    expected = prepare(replace(config, out=str(tmp_path / "expected")))
    good = files[4].read_bytes()
    files[4].write_bytes(b"{broken\n")
    made = []
    original = preparation.unit_pieces
    monkeypatch.setattr(
        preparation, "unit_pieces", lambda unit, *rest: made.append(unit.items[0].path) or original(unit, *rest)
    )
    with pytest.raises(PrepareError, match="4.jsonl:1"):
        prepare(config)
    assert made == [str(file) for file in files[:5]]
    files[4].write_bytes(good)
    made.clear()
    manifest = prepare(config)
    assert made == [str(file) for file in files[4:]] and digests(manifest) == digests(expected)
    made.clear()
    assert prepare(config) == manifest and not made  # it is there


def test_a_part_that_lost_bytes_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SMALLEST_UNIT", 250)  # one unit per file
    files = [write_jsonl(tmp_path / f"{n}.jsonl", [prose(n, 300)]) for n in range(3)]
    config = PrepareConfig("jsonl", tuple(map(str, files)), str(tmp_path / "out"), workers=1)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped here"):
        patch.setattr(preparation, "join_parts", lambda *a: (_ for _ in ()).throw(RuntimeError("stopped here")))
        prepare(config)
    victim = next((tmp_path / "out/.work/parts").glob("*.tokens"))
    victim.write_bytes(victim.read_bytes()[:-2])
    prepare(config)
    assert texts_of(tmp_path / "out") == [prose(n, 300) for n in range(3)]


def test_other_settings_are_refused_by_name_and_replaced_when_asked(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", ["some text"])
    config = PrepareConfig("jsonl", (str(path),), str(tmp_path / "out"), workers=1)
    prepare(config)
    with pytest.raises(ValueError, match="another --out, or replace it with --overwrite") as error:
        prepare(replace(config, validation_fraction=0.1))
    assert "validation_fraction: 0.0 -> 0.1" in str(error.value)
    with pytest.raises(ValueError, match="other tokenizer"):
        prepare(replace(config, train_bpe=260))
    write_jsonl(path, ["other text"])
    with pytest.raises(ValueError, match="other input files"):
        prepare(config)
    prepare(replace(config, overwrite=True))
    assert texts_of(tmp_path / "out") == ["other text"]


def test_impossible_settings_say_what_is_possible(tmp_path):
    out = str(tmp_path / "out")
    for config, message in [
        (PrepareConfig("wiki", out=out), "expected one of stdlib, text"),
        (PrepareConfig("text", ("x",)), "--out is missing"),
        (PrepareConfig("text", out=out), "needs paths"),
        (PrepareConfig("text", (str(tmp_path / "no"),), out), "does not exist"),
        (PrepareConfig("stdlib", ("x",), out), "takes no paths"),
        (PrepareConfig("text", ("x",), out, document="article"), "expected file or line or blank-line"),
        (PrepareConfig("text", ("x",), out, validation_fraction=1.0), "together below 1"),
        (PrepareConfig("pg19", ("x",), out, validation_fraction=0.1), "names its splits"),
        (PrepareConfig("text", ("x",), out, train=("y",)), "not both"),
        (PrepareConfig("text", ("x",), out, tokenizer="x.json", train_bpe=300), "not both"),
        (PrepareConfig("c4", (str(tmp_path),), out), "holds no files|named like c4-train"),
    ]:
        with pytest.raises(ValueError, match=message):
            prepare(config)


def test_a_full_disk_says_so_and_the_work_goes_on_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SMALLEST_UNIT", 250)  # one unit per file
    files = [write_jsonl(tmp_path / f"{n}.jsonl", [prose(n, 300)]) for n in range(4)]
    config = PrepareConfig("jsonl", tuple(map(str, files)), str(tmp_path / "out"), workers=1)
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(PrepareError, match="the disk of .* is full.*to continue"):
        patch.setattr(parts.os, "fsync", full)
        prepare(config)
    done = len(list((tmp_path / "out/.work/parts").glob("*.json")))
    assert 1 <= done < 4
    with monkeypatch.context() as patch, pytest.raises(PrepareError, match="is full"):
        # The way TensorStore reports it.
        patch.setattr(parts, "write_array", lambda *a: (_ for _ in ()).throw(OSError("x: No space left on device")))
        prepare(config)
    prepare(config)
    assert texts_of(tmp_path / "out") == [prose(n, 300) for n in range(4)]


def test_killed_workers_interrupts_and_kill_9_lose_nothing_and_leave_no_process(tmp_path):
    texts = [prose(seed, 3000) for seed in range(1000)]
    path, out = write_jsonl(tmp_path / "x.jsonl", texts), tmp_path / "out"
    # About ninety units, at most four per PACE seconds: however late this process gets to stop it, it is not done.
    script = (
        "import os, sys, time; from seqjax.cli import main; from seqjax.data import preparation, sources; "
        "sources.SMALLEST_UNIT = 1 << 15; wait = preparation.wait; "
        "preparation.wait = lambda *a, **k: (time.sleep(float(os.environ['PACE'])), wait(*a, **k))[1]; "
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["prepare", "jsonl", str(path), "--workers", "2", "--train-bpe", "300", "--bpe-megabytes", "1", "--out"]
    command = [sys.executable, "-c", script, *arguments, str(out)]

    def records() -> set:
        return set(out.glob(".work/parts/*.json"))

    def stop_after_a_new_part(stop) -> tuple[int, str, list[psutil.Process]]:
        before = records()
        pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, env=os.environ | {"PACE": "0.5"}, **pipes)
        deadline = time.monotonic() + 60
        while not records() - before and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None, "it finished before it could be stopped"
        children = psutil.Process(process.pid).children()
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        assert len(workers) == 2
        stop(process, workers)
        errors = process.communicate(timeout=60)[1]
        assert before < records()
        with pytest.raises(ValueError, match="half-written"):
            Corpus.open(out)
        psutil.wait_procs(children, timeout=20)
        assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        return process.returncode, errors, children

    code, errors, _ = stop_after_a_new_part(lambda process, workers: workers[0].kill())
    assert code == 1 and "a worker process was killed" in errors and "run the same command again" in errors
    code, errors, _ = stop_after_a_new_part(lambda process, workers: process.send_signal(signal.SIGINT))
    assert code == 130 and "run the same command again to continue" in errors and "Traceback" not in errors
    code, *_ = stop_after_a_new_part(lambda process, workers: process.kill())
    assert code == -signal.SIGKILL
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"PACE": "0"})
    assert texts_of(out) == texts
    list(Corpus.open(out).check())


def test_two_preparations_of_one_folder_do_not_mix(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", ["text"])
    work = tmp_path / "out" / ".work"
    work.mkdir(parents=True)
    with (
        preparation._locked(work / "lock", tmp_path / "out"),
        pytest.raises(ValueError, match="another `seqjax prepare`"),
    ):
        prepare(PrepareConfig("jsonl", (str(path),), str(tmp_path / "out"), workers=1))


class TestDamage:
    @pytest.fixture
    def copy(self, corpus_path, tmp_path):
        shutil.copytree(corpus_path, tmp_path / "copy")
        return tmp_path / "copy"

    def test_a_missing_or_shortened_file_is_seen_on_opening(self, copy):
        shard = copy / "train" / "tokens" / "c" / "0"
        shard.write_bytes(shard.read_bytes()[:-5])
        with pytest.raises(ValueError, match="damaged: train/tokens/c/0 has .* bytes instead of"):
            Corpus.open(copy)
        shard.unlink()
        with pytest.raises(ValueError, match="train/tokens/c/0 is missing"):
            Corpus.open(copy)
        Corpus.open(copy, "validation")

    def test_changed_bytes_are_seen_on_reading(self, copy):
        shard = copy / "train" / "tokens" / "c" / "0"
        data = bytearray(shard.read_bytes())
        data[1000] ^= 1
        shard.write_bytes(data)
        with pytest.raises(ValueError, match="cannot be read, it is damaged.*(?i:crc|checksum|digest)"):
            list(Corpus.open(copy).check())

    def test_a_manifest_of_other_tokens_is_seen_by_check(self, copy):
        manifest = json.loads((copy / "manifest.json").read_text())
        for name, message in (
            ("sha256", "tokens of train differ"),
            ("documents_sha256", "document arrays of train differ"),
        ):
            changed = json.loads(json.dumps(manifest))
            changed["splits"]["train"][name] = "0" * 64
            (copy / "manifest.json").write_text(json.dumps(changed))
            with pytest.raises(ValueError, match=message):
                list(Corpus.open(copy).check())

    def test_foreign_and_broken_manifests(self, copy, tmp_path):
        with pytest.raises(ValueError, match="does not exist: make one with"):
            Corpus.open(tmp_path / "nowhere")
        with pytest.raises(ValueError, match="it is not a corpus"):
            Corpus.open(tmp_path)
        (copy / "manifest.json").write_text('{"format": "x"')
        with pytest.raises(ValueError, match="manifest.json is damaged"):
            Corpus.open(copy)
        (copy / "manifest.json").write_text('{"format": "seqjax-corpus", "format_version": 99}')
        with pytest.raises(ValueError, match="version 99, this seqjax reads"):
            Corpus.open(copy)


def test_arrays_of_several_shards_are_whole(tmp_path, monkeypatch):
    from seqjax.data import corpus as module

    monkeypatch.setattr(module, "CHUNK", 64)
    monkeypatch.setattr(module, "SHARD", 256)
    values = np.arange(1001, dtype=np.uint16)
    module.write_array(tmp_path / "a", "uint16", 1001, np.split(values, [3, 3, 500, 999]))
    array = module._open_array(tmp_path / "a", module.ts.Context())
    np.testing.assert_array_equal(array.read().result(), values)
    assert len([path for path in (tmp_path / "a").rglob("*") if path.is_file()]) == 1 + 4


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
class TestSharedData:
    def test_wikitext_103_has_the_official_counts_and_exact_text(self, tmp_path):
        folder = SHARED / "wikitext-103"
        manifest = prepare(
            PrepareConfig(
                "wikitext",
                validation=(str(folder / "wiki.valid.tokens.gz"),),
                test=(str(folder / "wiki.test.tokens.gz"),),
                out=str(tmp_path / "out"),
                workers=1,
            )
        )
        assert {s: (e["words"], e["documents"]) for s, e in manifest["splits"].items()} == {
            "validation": (217_646, 60),
            "test": (245_569, 60),
        }
        with gzip.open(folder / "wiki.valid.tokens.gz") as file:
            assert "".join(texts_of(tmp_path / "out", "validation")).encode() == file.read()

    def test_wikitext_2_has_the_official_counts(self, tmp_path):
        manifest = prepare(PrepareConfig("wikitext", (str(SHARED / "wikitext-2"),), str(tmp_path / "out"), workers=1))
        assert [entry["words"] for entry in manifest["splits"].values()] == [217_646, 245_569]

    def test_pg19_mini_has_the_counted_words_and_titles(self, tmp_path):
        manifest = prepare(PrepareConfig("pg19", (str(SHARED / "pg19-mini"),), str(tmp_path / "out"), workers=1))
        assert {s: (e["documents"], e["bytes"], e["words"]) for s, e in manifest["splits"].items()} == {
            "train": (50, 36_186_560, 6_618_906),
            "validation": (5, 6_146_141, 1_110_367),
            "test": (5, 4_036_615, 746_508),
        }
        assert all(entry["title"] for entry in Corpus.open(tmp_path / "out", "test").documents())

    def test_c4_has_its_documents(self, tmp_path):
        manifest = prepare(PrepareConfig("c4", (str(SHARED / "c4"),), str(tmp_path / "out"), workers=1))
        assert {s: e["documents"] for s, e in manifest["splits"].items()} == {"train": 900, "validation": 130}
