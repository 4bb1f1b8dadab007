"""Write README.md from the result files beside it: `python experiments/benchmarks/table.py`."""

import json
import pathlib
import sys
from typing import Any

from seqjax.cli.bench.report import cell, columns

HERE = pathlib.Path(__file__).resolve().parent
HEAD = """# Benchmarks

Made by `python experiments/benchmarks/table.py` from the result files in this folder; don't edit by hand. Every number comes from
`seqjax bench`, which checks results before it times them and states its goals; each file holds its command, commit, machine and
versions. To add yours:

    seqjax bench ops          --out experiments/benchmarks/MACHINE/ops.json
    seqjax bench decode       --out experiments/benchmarks/MACHINE/decode.json
    seqjax bench train        --out experiments/benchmarks/MACHINE/train.json
    seqjax bench loader       --out experiments/benchmarks/MACHINE/loader.json
    seqjax bench transformers --out experiments/benchmarks/MACHINE/transformers.json     # pip install 'seqjax[parity]'
    seqjax bench models       --out experiments/benchmarks/DEVICE/models.json           # on a GPU or TPU
    bash scripts/device_check.sh      # kernels on a GPU or TPU: experiments/benchmarks/DEVICE/kernels.json
    python scripts/tpu_estimates.py   # kernels on TPUs that are not here: experiments/benchmarks/tpu_estimates.json
    python scripts/gpu_estimates.py   # and on a GPU that is not here: experiments/benchmarks/gpu_estimates.json
    python experiments/benchmarks/table.py
"""


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as a Markdown table."""
    names = columns(rows)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return lines + ["| " + " | ".join(cell(row.get(name)) for name in names) + " |" for row in rows]


def section(result: dict[str, Any]) -> list[str]:
    """One result file."""
    machine, versions = result["machine"], result["versions"]
    packages = [
        f"{name} {versions[name]}"
        for name in (
            "python",
            "jax",
            "flax",
            "libtpu",
            "jax-cuda13-plugin",
            "nvidia-cuda-nvcc",
            "torch",
            "flash-linear-attention",
            "transformers",
        )
        if name in versions
    ]
    lines = [f"### {result['title']}", "", *table(result["rows"]), "", "| | goal | measured | |", "|---|---|---|---|"]
    for goal in result["goals"]:
        verdict = "PASS" if goal["passed"] else "**FAIL**"
        lines.append(f"| {verdict} | {goal['name']} | {cell(goal['measured'])} | {goal['goal']} |")
    lines += ["", *(f"- {note}" for note in result["notes"])]
    lines += [
        f"- `{result['command']}`, commit {result['commit']}, {result['date'][:10]}, {machine['processor']}, "
        f"{machine['cores']} cores, load {cell(result['load_before'])} before the run; {', '.join(packages)}",
        "",
    ]
    return lines


def readme(folder: pathlib.Path) -> str:
    """The page for all result files under the folder, one heading per machine, and what no machine has measured last."""
    lines = [HEAD]
    for machine in sorted({path.parent for path in folder.glob("*/*.json")}):
        lines += [f"## {machine.name}", ""]
        for path in sorted(machine.glob("*.json")):
            lines += section(json.loads(path.read_text()))
    estimates = sorted(folder.glob("*.json"))
    lines += ["## Estimates without a device", ""] if estimates else []
    for path in estimates:
        lines += section(json.loads(path.read_text()))
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    (HERE / "README.md").write_text(readme(HERE))
    print(f"written to {HERE / 'README.md'}", file=sys.stderr)
