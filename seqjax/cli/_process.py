"""The process of a command: what has to be settled before Python starts."""

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# Commands that compute with arrays.
COMMANDS = ("train", "evaluate", "generate", "bench", "experiment")
VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def with_huge_pages(command: Sequence[str], environment: Mapping[str, str], thp: Path = THP) -> dict[str, str] | None:
    """The environment in which glibc asks for huge pages, or None if there is nothing to gain.

    A jitted step on a CPU frees its buffers at its end, and glibc gives blocks of more than 32 MiB back to the kernel: every step
    takes some 10^5 page faults to get zeroed pages of 4 KiB again, a quarter of the time of a small model's training step. Pages of 2 MiB
    make that some 2000. glibc (>= 2.35) reads the wish from ``GLIBC_TUNABLES`` when the process starts, and it matters where the kernel
    gives such pages only to those who ask ("madvise"). An allocator that the user tuned is left alone.
    """
    name, version = platform.libc_ver()
    if not command or command[0] not in COMMANDS or name != "glibc":
        return None
    if tuple(map(int, version.split(".")[:2])) < (2, 35) or "glibc.malloc" in environment.get(VARIABLE, ""):
        return None
    try:
        asked_only = "[madvise]" in thp.read_text()
    except OSError:
        return None
    return (
        {**environment, VARIABLE: ":".join(filter(None, (environment.get(VARIABLE), TUNABLE)))} if asked_only else None
    )


def entry() -> int:
    """The console script: ``main``, in a process that was started anew if it lacked huge pages."""
    from seqjax.cli import main

    environment = with_huge_pages(sys.argv[1:], os.environ)
    if environment is not None:
        os.execve(sys.executable, sys.orig_argv, environment)
    return main()
