"""Find block sizes for the Pallas kernels on this device and write those that beat the heuristics into ``pallas_kernels/_tuned.py``.

    python scripts/tune_kernels.py                               time the candidates on the accelerator of this machine
    python scripts/tune_kernels.py --estimate v6e                rank them by the TPU compiler's static estimate; needs libtpu, no TPU
    python scripts/tune_kernels.py --only delta_rule --dry-run   show, write nothing

A candidate wins by forward+backward of a training call (batch 4, T = 8192, 16 heads) and replaces the heuristics if it saves more than 3 percent.
"""

import argparse
import importlib.util
import itertools
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
TABLE = ROOT / "pallas_kernels" / "_tuned.py"
GAIN = 0.97

# Kernel and platform -> values to try of every field. What does not compile or fit is passed over.
CANDIDATES: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {
    ("linear_recurrence", "gpu"): {"tokens": (16, 32, 64), "stages": (3, 4, 6, 8)},
    ("linear_recurrence", "tpu"): {"tokens": (128, 256, 512), "channels": (512, 1024, 2048)},
    ("selective_scan", "gpu"): {"width": (128, 256)},
    ("selective_scan", "tpu"): {"width": (128, 256, 512, 1024)},
    ("linear_attention", "gpu"): {"stages": (2, 3, 4), "backward_stages": (2, 3)},
    ("linear_attention", "tpu"): {"chunk": (64, 128, 256), "lockstep": (2, 4, 8, 16)},
    ("delta_rule", "gpu"): {"stages": (2, 3), "backward_stages": (2, 3)},
    ("delta_rule", "tpu"): {"chunk": (64, 128), "lockstep": (2, 4, 8)},
}
# Of the cases of a kernel the one that stands for all of them.
STANDS_FOR = {
    "linear_recurrence": "linear_recurrence real",
    "selective_scan": "selective_scan",
    "linear_attention": "linear_attention scalar",
    "delta_rule": "delta_rule scalar",
}
Fields = tuple[tuple[str, int], ...]


def candidates(kernel: str, platform: str) -> list[Fields]:
    """The heuristics (no fields), then every combination."""
    values = CANDIDATES.get((kernel, platform), {})
    return [(), *(tuple(zip(values, combination)) for combination in itertools.product(*values.values()) if values)]


def winner(seconds: Mapping[Fields, float]) -> Fields:
    """The fastest candidate, or the heuristics if it does not beat them clearly."""
    best = min(seconds, key=lambda fields: seconds[fields])
    return best if () not in seconds or seconds[best] < GAIN * seconds[()] else ()


def updated(table: Mapping[tuple[str, str, str], dict[str, int]], place: tuple[str, str, str], fields: Fields) -> dict:
    """The table with the entry, or without it where the heuristics win."""
    rest = {key: value for key, value in table.items() if key != place}
    return rest | ({place: dict(fields)} if fields else {})


def source(table: Mapping[tuple[str, str, str], dict[str, int]]) -> str:
    """Text of the module that holds the table."""
    head = '"""Written by ``scripts/tune_kernels.py``: (kernel, kind of device, dimensions) -> fields of its configuration."""\n\n'
    kind = "TUNED: dict[tuple[str, str, str], dict[str, int]] = {"

    def literal(value: Any) -> str:
        return repr(value).replace("'", '"')

    lines = [f"    {literal(key)}: {literal(table[key])}," for key in sorted(table)]
    return head + kind + ("\n" + "\n".join(lines) + "\n" if lines else "") + "}\n"


def timed(kernel: str, sizes: Any, time: int, tries: list[Fields]) -> Iterator[tuple[Fields, float | str, list[str]]]:
    """Median seconds on the device, or why not; and what the kernel looked up."""
    import jax

    from pallas_kernels import _configs
    from seqjax.cli.bench import kernel_cases, kernels
    from seqjax.cli.bench.measure import interleaved, median

    case = next(case for case in kernel_cases.CASES if case.name == STANDS_FOR[kernel])
    if reason := kernel_cases.refusal(case, sizes, time):
        yield (), reason, []
        return
    arguments = kernel_cases.arrays(case, sizes, time)
    for fields in tries:
        with _configs.override(kernel, dict(fields)) as asked:
            try:
                # A trace of the same function would be taken from the cache, with the fields it had.
                jax.clear_caches()
                call = kernels.compiled(kernel_cases.both(case, "pallas"), *arguments)
                yield fields, median(interleaved({"": call}, 5, min_seconds=kernels.MIN_SECONDS)[""]), asked
            except Exception as error:  # a candidate that does not compile is no candidate
                yield fields, kernels.first_line(error), asked


def estimated(
    kernel: str, sizes: Any, chip: str, tries: list[Fields]
) -> Iterator[tuple[Fields, float | str, list[str]]]:
    """Seconds by the static estimate, or why not; and what the kernel looked up."""
    estimates = estimates_module()
    units = [estimates.Unit(STANDS_FOR[kernel], sizes.dim, sizes.dtype, fields) for fields in tries]
    for unit, found in estimates.measured(chip, units):
        if isinstance(found, str) or "refused" in found:
            yield unit.config, found if isinstance(found, str) else found["refused"], []
            continue
        rows = [row for row in estimates.estimate_rows(chip, unit, found, None) if row["pass"] != "forward"]
        parts = [row["estimate ms"] for row in rows]
        yield unit.config, estimates.NONE if None in parts else 1e-3 * sum(parts), found["asked"]


def estimates_module() -> Any:
    """``scripts/tpu_estimates.py``."""
    spec = importlib.util.spec_from_file_location("tpu_estimates", ROOT / "scripts" / "tpu_estimates.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tpu_estimates"] = module
    spec.loader.exec_module(module)
    return module


def main() -> int:
    """Try, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--estimate", choices=("v5e", "v5p", "v6e"), help="rank by the static estimate for this chip")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256], help="key and value dimensions")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    options = parser.parse_args()
    if options.estimate:
        os.environ["JAX_PLATFORMS"] = "cpu"

    import jax

    from pallas_kernels._tuned import TUNED
    from seqjax.cli.bench.op_cases import Sizes

    if options.estimate:
        platform = "tpu"
        kind = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}[options.estimate]
    else:
        platform, kind = jax.default_backend(), jax.devices()[0].device_kind
        if platform == "cpu":
            print("tune_kernels: needs a GPU or a TPU, or --estimate CHIP", file=sys.stderr)
            return 2
    table = dict(TUNED)
    for kernel, dim in itertools.product(STANDS_FOR, options.dims):
        tries = candidates(kernel, platform)
        if options.only not in kernel or len(tries) == 1:
            continue
        sizes = Sizes(4, 16, dim, options.dtype)
        ranking = (
            estimated(kernel, sizes, options.estimate, tries) if options.estimate else timed(kernel, sizes, 8192, tries)
        )
        seconds: dict[Fields, float] = {}
        places: set[str] = set()
        for fields, result, asked in ranking:
            shown = " ".join(f"{name}={value}" for name, value in fields) or "heuristics"
            print(f"{kind} {kernel} {dim}: {shown}: {result if isinstance(result, str) else f'{1e3 * result:.4f} ms'}")
            if not isinstance(result, str):
                seconds[fields] = result
            places |= set(asked) if fields else set()
        if len(seconds) < 2:
            continue
        if not places:
            print(f"{kind} {kernel} {dim}: its default_config asks for no tuned fields")
            continue
        best = winner(seconds)
        for place in sorted(places):
            table = updated(table, (kernel, kind, place), best)
    if not options.dry_run and table != TUNED:
        TABLE.write_text(source(table))
        print(f"written to {TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
