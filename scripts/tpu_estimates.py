"""What the kernels would cost on TPUs that are not here, by the TPU compiler's own static estimates (needs libtpu: ``pip install seqjax[tpu]``).

    python scripts/tpu_estimates.py                            all chips and kernels: about twenty minutes on two cores
    python scripts/tpu_estimates.py --only delta_rule --chips v6e

For every kernel, chip, head dimension and dtype, scaled to batch 4, T = 8192, 16 heads:

- estimate: of every Pallas call the longer of cycles / clock and bytes / bandwidth. Cycles are the instruction bundles of a grid step times
  the steps, or, for calls with loops inside a step, libtpu's profile (``--xla_jf_dump_static_llo_profile_to``), which walks the schedule;
  bytes are the call's operands and results.
- roofline: the work the operation cannot do without (``seqjax.cli.bench.kernel_cases``) over the chip's bandwidth and peaks.
- whole: estimate plus what XLA does around the calls; xla: the form it replaces. Both by the cycles that XLA itself assigns to its
  instructions, times the trips of the loops around them.

Nothing here has been compared with a chip: read ratios, not times.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

# The compile-only client must neither look for a TPU nor for the metadata server of a TPU machine.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Two workers at a time each load the compiler.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

from pallas_kernels import _configs
from seqjax.cli.bench import estimates, kernel_cases
from seqjax.cli.bench.estimates import HEADS
from seqjax.cli.bench.kernel_cases import KernelCase
from seqjax.cli.bench.op_cases import Sizes
from seqjax.cli.bench.report import Goal, Report

OUT = pathlib.Path(os.path.relpath(pathlib.Path(__file__).parents[1] / "experiments/benchmarks/tpu_estimates.json"))
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
CLOCK = {"v5e": 1.50e9, "v5p": 1.75e9, "v6e": 1.75e9}
"""Hz. The published bf16 peaks are these times two operations per multiplier and cycle (v5e 4 x 128^2 multipliers, v5p 8 x 128^2, v6e two
MXUs of 256^2, each counted twice). By the same estimates a 4096^3 product takes 1.03, 1.03 and 1.07 times what the peak allows."""
ALUS = 4
"""Elementwise operations per lane and cycle of a core's vector unit (scaling book, jax-ml/scaling-book, `tpus.md`)."""
SPLITS = {"bfloat16": 1, "float32": 6}
"""bfloat16 products in one product of full precision."""

BATCH, TIME = 4, 8192
PROFILED = {"linear_recurrence": (512, 1024)}
SHORTER = (256, 512)
"""Two T at which calls are profiled, one row per core, to tell what a token costs: multiples of the kernels' blocks of time, and small, since the
profile's cost is that of walking all steps."""
PROFILED_HEADS = {"selective_scan": 4}
"""Fewer heads than ``HEADS`` to profile with; cycles are scaled by them, and said to be: a scan of fewer channels shares less."""
COMPILED = 512
"""T at which XLA's own estimates are read, of ``BATCH`` rows."""
NONE = "no estimate"
PASSES = ("forward", "training forward", "backward")
COMPARED = ("real", "scan", "scalar")
"""Endings of the kernels that are compared with their XLA form, in bfloat16 at dim 128: that takes a minute each."""


@dataclasses.dataclass(frozen=True)
class Options(estimates.Options):
    """Static estimates of the Pallas kernels for TPUs that are not here."""

    out: pathlib.Path | None = OUT
    """JSON file; rows of other runs that this one does not repeat stay in it."""
    chips: tuple[str, ...] = tuple(TOPOLOGIES)
    """Chips: v5e, v5p, v6e."""
    dims: tuple[int, ...] = (64, 128, 256)
    """Key and value dimensions in bfloat16; 128 is estimated in float32 too."""
    jobs: int = 2
    """Compilers at a time."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """One kernel in one setting."""

    case: str
    dim: int
    dtype: str
    config: tuple[tuple[str, int], ...] = ()
    """Fields of the kernel's configuration that are not the default ones."""
    heads: int = HEADS

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Unit":
        """From JSON."""
        config = tuple((name, value) for name, value in fields["config"])
        return cls(fields["case"], fields["dim"], fields["dtype"], config, fields["heads"])

    def sizes(self, batch: int) -> Sizes:
        """With so many rows."""
        return Sizes(batch, self.heads, self.dim, self.dtype)

    @property
    def lengths(self) -> tuple[int, int]:
        """The two T at which it is profiled."""
        return PROFILED.get(self.case.split()[0], SHORTER)

    @property
    def kernel(self) -> KernelCase:
        """Its entry in the table of kernels."""
        return next(case for case in kernel_cases.CASES if case.name == self.case)


# --- Reading the compiler's output ---


def profiled_cycles(text: str) -> int:
    """Cycles of the Pallas calls in a module that was compiled under the profile flag; 0 where it has none."""
    found = re.findall(r'tpu_custom_call.*"estimated_cycles":"(\d+)"', text)
    return sum(map(int, found))


def scoped_memory(text: str) -> int:
    """Bytes of VMEM that the Pallas calls in an optimised module hold, the most of them."""
    sizes = [
        sum(int(size) for size in re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', used[1]))
        for line in text.splitlines()
        if "tpu_custom_call" in line and (used := re.search(r'"used_scoped_memory_configs":\[([^\]]*)\]', line))
    ]
    return max(sizes, default=0)


def bundles_of(analysis: str, bundles: str) -> dict[str, Any]:
    """Of the dump of a Pallas call: how many bundles it is (at least one cycle each), and how many of these spill a vector register.

    Args:
        analysis: its ``*-schedule-analysis_final_bundles.txt``.
        bundles: its ``*-final_bundles.txt``; a second loop in it makes the count meaningless, and "bundles" None.
    """
    total = re.search(r"non empty scheduled bundles: (\d+)", analysis)
    loops = len(re.findall(r"^\s*0x[0-9a-f]+\s+LB:", bundles, re.MULTILINE))
    spills = sum(1 for line in bundles.splitlines() if re.search(r"vst[.\w]* \[vmem:\[#allocation\w*_spill", line))
    count = int(total[1]) if total else 0
    return {"total": count, "bundles": count if loops <= 1 else None, "spills": spills}


def module_cycles(text: str) -> dict[str, float]:
    """XLA's estimates for the instructions of an optimised module, in sum for the "forward" and the "backward" pass.

    An instruction in a loop counts once per trip; trips are the constant in the loop's condition. What was made by transposition is
    backward; what has no origin (copies) belongs to the pass of the instruction scheduled before it.
    """
    entry, computations = estimates.computations(text)
    totals = {"forward": 0.0, "backward": 0.0}

    def trips(condition: str) -> int:
        constants = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(computations[condition]))
        return max(map(int, constants), default=1)

    def visit(name: str, times: int, part: str) -> None:
        for line in computations[name]:
            if origin := re.search(r'op_name="([^"]*)"', line):
                part = "backward" if "transpose(" in origin[1] else "forward"
            if loop := re.search(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)", line):
                visit(loop[2], times * trips(loop[1]), part)
            elif "tpu_custom_call" not in line and (cycles := re.search(r'"estimated_cycles":"(\d+)"', line)):
                totals[part] += times * int(cycles[1])

    visit(entry, 1, "forward")
    return totals


# --- Compiling, in processes of their own ---


def traced(unit: Unit, batch: int, time: int, implementation: str = "pallas") -> tuple[Any, Any, Any, Any]:
    """The functions of the forward pass and of both passes, and their arguments, as shapes."""
    inputs, results = kernel_cases.shapes(unit.kernel, unit.sizes(batch), time)
    return (
        kernel_cases.forward(unit.kernel, implementation),
        kernel_cases.both(unit.kernel, implementation),
        inputs,
        results,
    )


@functools.cache
def calls_by_pass(unit: Unit, batch: int, time: int) -> dict[str, list[Any]]:
    """Equations of the Pallas calls of every pass, and of a forward pass that is not differentiated."""
    forward, both, inputs, results = traced(unit, batch, time)
    trained = kernel_cases.kernels(both, inputs, results)
    back = ["backward" in call_name(call) for call in trained]
    return {
        "forward": kernel_cases.kernels(forward, inputs),
        "training forward": [call for call, late in zip(trained, back) if not late],
        "backward": [call for call, late in zip(trained, back) if late],
    }


def call_name(call: Any) -> str:
    """The name that the kernel was given."""
    return getattr(call.params.get("name_and_src_info"), "name", None) or call.params["name"]


def call_bytes(call: Any) -> int:
    """Bytes of the operands and results of a Pallas call."""
    return sum(v.aval.size * v.aval.dtype.itemsize for v in (*call.invars, *call.outvars))


def by_profile(unit: Unit, cores: int, compile_: Any) -> dict[str, Any]:
    """As ``by_bundles``, by the compiler's own estimate, which takes longer and aborts on most bfloat16 products on v5e and v5p."""
    result: dict[str, Any] = {}
    full = calls_by_pass(unit, BATCH, TIME)
    seen: dict[str, tuple[int, int]] = {}

    def profile(call: Any) -> tuple[int, int]:
        key = str((call_name(call), call.params["grid_mapping"].grid, [v.aval for v in call.invars]))
        if key not in seen:
            text = compile_(lambda *a: call.primitive.bind(*a, **call.params), [v.aval for v in call.invars])
            seen[key] = profiled_cycles(text), scoped_memory(text)
        return seen[key]

    lengths = unit.lengths
    # Walking takes memory too: gigabytes for all channels of a scan.
    few = dataclasses.replace(unit, heads=PROFILED_HEADS.get(unit.case, HEADS))
    # Rows beside rows are cut over the cores, so that a core walks so many tokens.
    scale = (BATCH * TIME / cores - lengths[0]) / (lengths[1] - lengths[0])

    def cycles(part: str, rows: int) -> list[float]:
        """Of every call at full size. The tokens of the two lengths come in so many rows; what starting costs counts once."""
        short, long = (
            [profile(call)[0] for call in calls_by_pass(few, cores * batch, length)[part]]
            for batch, length in ((rows * n // lengths[0], lengths[0] // rows) if rows > 1 else (1, n) for n in lengths)
        )
        return [unit.heads / few.heads * (a + scale * (b - a)) if a and b else 0 for a, b in zip(short, long)]

    first = calls_by_pass(few, cores, lengths[0])
    for part in PASSES:
        found, note = cycles(part, 1), "profile"
        if 0 in found:
            # The profile has no number for blocks that are strided in HBM, as those of saved states are: rows of one chunk have none.
            chunks = max(call.params["grid_mapping"].grid[-1] for call in first[part])
            found, note = cycles(part, chunks), f"profile, T = {lengths[0] // chunks}"
        result[part] = {
            "calls": [call_name(call) for call in first[part]],
            "cycles": found,
            "bytes": [call_bytes(call) for call in full[part]],
            "vmem": max((profile(call)[1] for call in first[part]), default=0),
            "note": NONE if 0 in found else note + ("" if few == unit else f", {few.heads} heads"),
        }
    return result


def by_bundles(unit: Unit, cores: int, compile_: Any, dump: pathlib.Path) -> dict[str, Any]:
    """Cycles of every pass at full size, bundles of a grid step times steps; bytes, VMEM and spills of its calls."""
    result: dict[str, Any] = {}
    for part, calls in calls_by_pass(unit, BATCH, TIME).items():
        found, vmem = [], 0
        for call in calls:
            for file in dump.iterdir():
                file.unlink()
            text = compile_(lambda *a, call=call: call.primitive.bind(*a, **call.params), [v.aval for v in call.invars])
            vmem = max(vmem, scoped_memory(text))
            texts = {file.name: file.read_text() for file in sorted(dump.glob("*final_bundles.txt"))}
            # A pair of files per instruction, and others that mention the call: the call's own is the longest.
            pairs = [
                bundles_of(text, texts[name.replace("-00-schedule-analysis_", "-01-")])
                for name, text in texts.items()
                if "-00-schedule-analysis_" in name and "tpu_custom_call" in text
            ]
            found.append(max(pairs, key=lambda entry: entry["total"]))
        steps = [math.prod(call.params["grid_mapping"].grid) / cores for call in calls]
        known = all(entry["bundles"] for entry in found)
        result[part] = {
            "calls": [call_name(call) for call in calls],
            "cycles": [n * entry["bundles"] for n, entry in zip(steps, found)] if known else [],
            "bytes": [call_bytes(call) for call in calls],
            "vmem": vmem,
            "spills": sum(entry["spills"] for entry in found),
            "note": None if known else NONE,
        }
    return result


def worker(kind: str, chip: str, dump: pathlib.Path) -> None:
    """Read units from the standard input, write a line of JSON per unit: before and after it."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    mesh = Mesh(np.array([device]), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def compile_(function: Any, arguments: Any) -> str:
        placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), arguments)
        return jax.jit(function).lower(*placed).compile().as_text() or ""

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        for fields in json.loads(sys.stdin.read()):
            unit = Unit.of(fields)
            print(json.dumps({"begin": fields}), flush=True)
            # Traces of an earlier unit may be of another configuration.
            jax.clear_caches()
            cores = chip_info(chip).num_cores
            if reason := kernel_cases.refusal(unit.kernel, unit.sizes(BATCH), TIME):
                result: dict[str, Any] = {"refused": reason}
            elif kind in FLAGS:
                forced = _configs.override(unit.case.split()[0], dict(unit.config)) if unit.config else nullcontext([])
                with forced as asked:
                    found = (
                        by_bundles(unit, cores, compile_, dump)
                        if kind == "bundles"
                        else by_profile(unit, cores, compile_)
                    )
                result = found | {"asked": sorted(set(asked))}
            else:
                result = {}
                for name, implementation in (("around", "pallas"), ("xla", "xla")):
                    _, both, *arguments = traced(unit, BATCH, COMPILED, implementation)
                    cycles = module_cycles(compile_(both, arguments))
                    result[name] = {part: TIME / COMPILED * value for part, value in cycles.items()}
            print(json.dumps({"unit": fields, "result": result}), flush=True)


def chip_info(chip: str) -> Any:
    """JAX's table of the chip, whose numbers are per core."""
    from jax.experimental.pallas import tpu as pltpu

    version = {"v5e": pltpu.ChipVersion.TPU_V5E, "v5p": pltpu.ChipVersion.TPU_V5P, "v6e": pltpu.ChipVersion.TPU_V6E}
    cores = version[chip].num_physical_tensor_cores_per_chip
    return pltpu.get_tpu_info_for_chip(version[chip], cores)


FLAGS = {
    "profile": "--xla_jf_dump_static_llo_profile_to={}",
    "bundles": "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles",
}


def worker_command(kind: str, chip: str, folder: str) -> list[str]:
    """This script as a worker."""
    return [sys.executable, __file__, "--worker", kind, chip, folder]


def run_units(kind: str, chip: str, units: list[Unit]) -> Iterator[tuple[Unit, dict[str, Any] | str]]:
    """Results of a worker as they come; one that died on a unit, whose result is then the reason, is started anew without it."""
    while units:
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
            environment = dict(os.environ)
            if kind in FLAGS:
                environment["LIBTPU_INIT_ARGS"] = FLAGS[kind].format(folder)
            with subprocess.Popen(
                worker_command(kind, chip, folder),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            ) as process:
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write(json.dumps([dataclasses.asdict(unit) for unit in units]))
                process.stdin.close()
                begun = None
                for line in process.stdout:
                    if not line.startswith("{"):
                        continue
                    entry = json.loads(line)
                    if "begin" in entry:
                        begun = Unit.of(entry["begin"])
                        continue
                    unit, begun = Unit.of(entry["unit"]), None
                    units = [other for other in units if other != unit]
                    yield unit, entry["result"]
            if process.returncode == 0:
                return
            errors.seek(0)
            said = errors.read()
        if begun is None:
            raise RuntimeError(f"{kind} for {chip} failed:\n{said[-2000:]}")
        reasons = [line for line in said.splitlines() if "CHECK failure" in line or "Error" in line]
        units = [other for other in units if other != begun]
        yield begun, (reasons[-1] if reasons else f"exit code {process.returncode}")[:160]


# --- The table ---


def measured(chip: str, units: list[Unit]) -> Iterator[tuple[Unit, dict[str, Any] | str]]:
    """Cycles, bytes, VMEM and spills of every pass, or why not: by bundles, and by the profile where loops make their count meaningless."""
    waiting: dict[Unit, dict[str, Any]] = {}
    for unit, result in run_units("bundles", chip, units):
        if isinstance(result, dict) and "refused" not in result and NONE in (result[part]["note"] for part in PASSES):
            waiting[unit] = result
        else:
            yield unit, result
    for unit, result in run_units("profile", chip, list(waiting)):
        found = waiting[unit]
        if isinstance(result, dict):
            for part in PASSES:
                if found[part]["note"] == NONE:
                    found[part] |= result[part]
        yield unit, found


def estimate_rows(chip: str, unit: Unit, found: Any, compiled: Any) -> list[dict[str, Any]]:
    """One row per pass, from what was measured and what XLA was compiled to (None: was not)."""
    info, clock = chip_info(chip), CLOCK[chip]
    bandwidth = info.num_cores * info.mem_bw_bytes_per_second
    peak = info.num_cores * info.bf16_ops_per_second / SPLITS[unit.dtype]
    vector = info.num_cores * info.num_lanes * info.num_sublanes * ALUS * clock
    necessary = kernel_cases.work(unit.kernel, unit.sizes(BATCH), TIME)
    rows = []
    for part in PASSES:
        key = "backward" if part == "backward" else "forward"
        least = necessary[key].seconds(bandwidth, peak, vector)
        row: dict[str, Any] = {"chip": chip, "kernel": unit.case, "pass": part, "dtype": unit.dtype, "dim": unit.dim}
        rows.append(row)
        if isinstance(found, str):
            row |= {"roofline ms": 1e3 * least, "note": found}
            continue
        calls = found[part]
        seconds = None
        if calls["note"] != NONE:
            seconds = sum(max(c / clock, b / bandwidth) for c, b in zip(calls["cycles"], calls["bytes"]))
        row |= {
            "cycles ms": 1e3 * sum(calls["cycles"]) / clock if seconds else None,
            "bytes ms": 1e3 * sum(calls["bytes"]) / bandwidth,
            "estimate ms": 1e3 * seconds if seconds else None,
            "roofline ms": 1e3 * least,
            "over roofline": seconds / least if seconds else None,
        }
        if isinstance(compiled, dict) and part != "training forward":
            xla = max(compiled["xla"][key] / clock, necessary[key].bytes / bandwidth)
            whole = seconds + compiled["around"][key] / clock if seconds else None
            row |= {
                "whole ms": 1e3 * whole if whole else None,
                "xla ms": 1e3 * xla,
                "over xla": whole / xla if whole else None,
            }
        row |= {"VMEM MiB": calls["vmem"] / 2**20, "spills": calls["spills"], "note": calls["note"]}
        row["calls"] = dict.fromkeys(calls["calls"], "")
    return rows


def goals_of(rows: list[dict[str, Any]]) -> list[Goal]:
    """The worst row of each kind of goal."""
    limits = {"over roofline": 2.0, "over xla": 1.0}
    return estimates.goals(rows, ("chip", "kernel", "pass", "dtype", "dim"), lambda row: limits)


NOTES = [
    "estimate: longer of cycles / clock and bytes / bandwidth, summed over the Pallas calls of the pass; roofline: necessary bytes, matrix "
    "products in chunks of 64 (float32: six bfloat16 products each) and elementwise operations (four per lane and cycle). training forward "
    "also writes what the backward pass needs.",
    "whole: estimate plus XLA's own estimates for what surrounds the calls; xla: the same estimates for the XLA form, at least its necessary "
    f"bytes. Both are read at T = {COMPILED}, where XLA keeps more in VMEM than at full size, and scaled by tokens.",
    "Cycles are the bundles of a grid step times the steps, without waits; within 6 percent of libtpu's profile where both exist. 'profile': that "
    f"profile, for calls with loops inside a step, at T = {SHORTER[0]} and {SHORTER[1]} (linear_recurrence: 512 and 1024), extrapolated; 'T = n': in rows of n "
    "tokens, because the profile is 0 for blocks strided in HBM. A message of the compiler: the call does not compile. spills: bundles of a "
    "step that store a vector register to VMEM.",
    "'4 heads' (selective_scan): profiled with a quarter of the channels, since the profile of all takes gigabytes; about a third too high where "
    "both were read.",
    "Why more than twice the roofline. Heads of 64: half of the lanes of a vector register and a quarter (v6e: a sixteenth) of a matrix unit, for "
    "scores of as many tokens as with 128. delta_rule: the inverses, half of the forward pass, are chains of small products, and 16 of them "
    "in lockstep do not hide each other's latency. Decays per channel: seven levels of exponentials, products and selections where the "
    "roofline counts one product. float32: six products in which a matrix unit of v6e is a quarter full; the roofline takes it to be full. "
    "selective_scan: B and C are spread over lanes, whatever the number of channels, and sums over the states cross sublanes.",
]


def main() -> int:
    """Estimate, print and write, also what there is after every unit."""
    import tyro
    from rich.console import Console

    from seqjax.cli.bench.report import show

    options = tyro.cli(Options, prog="tpu_estimates.py")
    for chip in options.chips:
        if chip not in TOPOLOGIES:
            print(f"--chips {chip}: expected some of {', '.join(TOPOLOGIES)}", file=sys.stderr)
            return 2
    settings = [(dim, "bfloat16") for dim in options.dims] + ([(128, "float32")] if 128 in options.dims else [])
    units = [
        Unit(case.name, dim, dtype) for case in kernel_cases.chosen(options.only) for dim, dtype in settings
        if "complex" not in case.name or dtype == "float32"
    ]  # fmt: skip
    compared = [unit for unit in units if unit.case.endswith(COMPARED) and (unit.dim, unit.dtype) == (128, "bfloat16")]
    results: dict[tuple[str, str, Unit], Any] = {}
    turns = iter([(chip, kind) for chip in options.chips for kind in ("calls", "xla")])
    failures: list[BaseException] = []
    lock = threading.Lock()
    earlier = estimates.earlier(options)

    def report() -> Report:
        rows = [
            row
            for (chip, kind, unit), found in results.items()
            if kind == "calls" and not (isinstance(found, dict) and "refused" in found)
            for row in estimate_rows(chip, unit, found, results.get((chip, "xla", unit)))
        ]
        rows = estimates.merged(rows, earlier, ("kernel", "dtype", "dim", "pass", "chip"), PASSES)
        title = f"TPU kernels by the compiler's static estimate: batch {BATCH}, T = {TIME}, {HEADS} heads of dim (no TPU involved)"
        return Report("tpu_estimates", title, rows, goals_of(rows), NOTES, os.getloadavg()[0])

    def work() -> None:
        try:
            while True:
                with lock:
                    turn = next(turns, None)
                if turn is None:
                    return
                chip, kind = turn
                found = measured(chip, units) if kind == "calls" else run_units("xla", chip, compared)
                for unit, result in found:
                    with lock:
                        results[(*turn, unit)] = result
                        print(*turn, unit.case, unit.dim, unit.dtype, file=sys.stderr)
                        estimates.write(report(), options)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(options.jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]

    console = Console(width=220)
    final = report()
    estimates.write(final, options)
    show(final, console)
    console.print(f"in {options.out}" if options.out is not None else "not written")
    return 1 if options.strict and not all(goal.passed for goal in final.goals) else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3], pathlib.Path(sys.argv[4]))
        sys.exit(0)
    sys.exit(main())
