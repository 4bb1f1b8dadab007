"""What `scripts/tpu_estimates.py` and `scripts/gpu_estimates.py` have in common: options, and result files that runs of a part add to."""

import dataclasses
import importlib.metadata
import json
import pathlib
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any

from seqjax.cli.bench import kernel_cases
from seqjax.cli.bench.report import Common, Goal, Report, plain

Row = dict[str, Any]
HEADS = 16
"""Of the calls that are estimated."""
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150754820096 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 2 } device_description_str: "NVIDIA H200"
"""
"""What the CUDA compiler has to know of a GPU that is not here: `target_config` of a topology."""


@dataclasses.dataclass(frozen=True)
class Options(Common):
    """Static estimates of the Pallas kernels."""

    only: str = ""
    """Only kernels whose name contains this, e.g. "delta_rule" or "scalar"."""
    dims: tuple[int, ...] = (64, 128, 256)
    """Key and value dimensions."""


def computations(module: str) -> tuple[str, dict[str, list[str]]]:
    """The name of the entry of an optimised module, and the instructions of all computations by their names."""
    found: dict[str, list[str]] = {}
    entry = name = ""
    for line in module.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = header[2]
            found[name] = []
            entry = name if header[1] else entry
        elif name and line.startswith("  "):
            found[name].append(line)
    return entry, found


def earlier(options: Options) -> list[Row]:
    """Rows of the result file that is there."""
    if options.out is None or not options.out.exists():
        return []
    return json.loads(options.out.read_text())["rows"]


def merged(fresh: list[Row], old: list[Row], names: tuple[str, ...], passes: tuple[str, ...]) -> list[Row]:
    """Fresh rows and those old ones that they do not repeat, in the order of the table of kernels.

    Args:
        fresh: rows.
        old: rows.
        names: columns that tell rows apart, "kernel" and "pass" among them; rows of a kernel are sorted by them.
        passes: the order of "pass".
    """
    kernels = [case.name for case in kernel_cases.CASES]
    orders = {"kernel": kernels.index, "pass": passes.index}

    def key(row: Row) -> tuple:
        return tuple(row[name] for name in names)

    def place(row: Row) -> tuple:
        return tuple(orders[name](row[name]) if name in orders else row[name] for name in names)

    repeated = {key(row) for row in fresh}
    return sorted(fresh + [row for row in old if key(row) not in repeated], key=place)


def goals(rows: list[Row], names: tuple[str, ...], limits: Callable[[Row], Mapping[str, float]]) -> list[Goal]:
    """The worst row of each kind of goal; ``limits`` are those of a row's columns."""
    from seqjax.cli.bench.ops import worst

    found = []
    for row in rows:
        label = " ".join(str(row[name]) for name in names)
        for column, limit in limits(row).items():
            if row.get(column) is not None:
                found.append((label, Goal(f"estimate {column}", row[column], limit)))
    return worst(found)


def write(report: Report, options: Options, packages: tuple[str, ...] = ()) -> None:
    """The result file, with the command line of the script that runs and the versions of further packages."""
    if options.out is None:
        return
    result = report.to_dict(options)
    result["command"] = shlex.join(["python", f"scripts/{pathlib.Path(sys.argv[0]).name}", *sys.argv[1:]])
    result["versions"] |= {name: importlib.metadata.version(name) for name in packages}
    options.out.write_text(json.dumps(plain(result), indent=1) + "\n")
