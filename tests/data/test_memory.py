"""Memory of `seqjax prepare` on one large input.

A larger run, with the figures on the terminal: 10 GB in one plain file and in one gzip file, where nothing can be cut into
ranges (needs 60 GB of disk):

    SEQJAX_MEMORY_MB=10000 TMPDIR=/big/disk pytest -m slow -s tests/data/test_memory.py
"""

import gzip
import json
import os
import subprocess
import sys

import pytest

from seqjax.data import Corpus
from tests.data.texts import prose

# Runs the command in its own process, watches the resident memory of it and its workers, and prints the peak of any one.
WATCH = """
import json, sys, threading, time
import psutil

def main():
    from seqjax.cli import main as command
    peak, done = {}, threading.Event()
    def watch():
        me = psutil.Process()
        while not done.is_set():
            for process in [me, *me.children(recursive=True)]:
                try:
                    peak[process.pid] = max(peak.get(process.pid, 0), process.memory_info().rss)
                except psutil.NoSuchProcess:
                    pass
            time.sleep(0.02)
    threading.Thread(target=watch, daemon=True).start()
    begin = time.monotonic()
    code = command(sys.argv[1:])
    done.set()
    print(json.dumps({"peak": max(peak.values()), "processes": len(peak), "seconds": time.monotonic() - begin}))
    return code

if __name__ == "__main__":
    sys.exit(main())
"""


def write_large(path, megabytes: int) -> int:
    """A file of one document: the same block of prose again and again, so that writing it costs little."""
    block = prose(1, 1_000_000).encode()
    size = 0
    with gzip.open(path, "wb", 1) if path.suffix == ".gz" else open(path, "wb") as file:
        while size < megabytes * 10**6:
            file.write(block)
            size += len(block)
    return size


def prepare_and_measure(tmp_path, name: str, megabytes: int, *arguments: str) -> dict:
    path, out = tmp_path / name, tmp_path / "out"
    size = write_large(path, megabytes)
    (tmp_path / "watch.py").write_text(WATCH)
    command = [sys.executable, str(tmp_path / "watch.py"), "prepare", "text", str(path), "--out", str(out), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(result.stdout.splitlines()[-1])
    corpus = Corpus.open(out)
    assert corpus.num_documents == 1 and corpus.document_bytes.tolist() == [size]
    print(
        f"\n{name} {size / 1e6:,.0f} MB {' '.join(arguments)}: peak {measured['peak'] / 1e6:.0f} MB in one of "
        f"{measured['processes']} processes, {measured['seconds']:.0f} s"
    )
    return measured


@pytest.mark.parametrize("name", ["one.txt", "one.txt.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    for folder in ("small", "large"):
        (tmp_path / folder).mkdir()
    small = prepare_and_measure(tmp_path / "small", name, 24, "--workers", "1")
    large = prepare_and_measure(tmp_path / "large", name, 96, "--workers", "1")
    assert large["peak"] < 400e6
    # The file, its characters or its tokens alone would be 72, 72-288 or 144 MB more.
    assert large["peak"] - small["peak"] < 60e6


def test_memory_is_bounded_with_a_subword_tokenizer(tmp_path):
    measured = prepare_and_measure(tmp_path, "one.txt", 10, "--train-bpe", "400", "--bpe-megabytes", "1")
    assert measured["peak"] < 500e6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one.txt", "one.txt.gz"])
def test_a_large_file_needs_less_than_a_gigabyte_per_worker(tmp_path, name):
    measured = prepare_and_measure(tmp_path, name, int(os.environ.get("SEQJAX_MEMORY_MB", "1000")))
    assert measured["peak"] < 1e9
