"""Where a number comes from: commit, machine, versions, command. Goes into every result file."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from typing import Any

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorstore",
    "libtpu",
    "torch",
    "flash-linear-attention",
    "transformers",
)


def provenance() -> dict[str, Any]:
    """Facts a reader needs to judge or repeat a measurement (JSON types only)."""
    import jax

    import seqjax

    versions = {"python": platform.python_version(), "seqjax": seqjax.__version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": shlex.join(["seqjax", *sys.argv[1:]]),
        "machine": {
            "devices": sorted({device.device_kind for device in jax.devices()}),
            "device_count": jax.device_count(),
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "system": platform.system(),
        },
        "versions": versions,
    }


def commit() -> str | None:
    """Short hash of the checkout seqjax runs from, with ``+`` if files differ from it; None outside a checkout."""
    root = pathlib.Path(__file__).resolve().parents[2]
    try:
        head = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        # Result files are written by the very command that asks, so they don't make the code a different one.
        status = subprocess.run(
            ["git", "-C", root, "status", "--porcelain", "--", "seqjax", "pallas_kernels"],
            capture_output=True,
            text=True,
        )
    except OSError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def processor() -> str:
    """Model name of the processor."""
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
