"""``seqjax bench kernels``: the Pallas kernels on this device, beside the XLA form and the peers, against what the device can do.

First the device itself is measured: bytes per second of a copy, floating-point operations per second of a large product, both on random
data. Then, cell by cell of the grid and for the forward pass and forward+backward: the kernel must equal the XLA form, or its time is not
published; kernel, XLA form, flash-linear-attention (torch, if it is installed) and cuDNN's attention of equal width take turns.
The cells that say most come first, so that a time budget cuts the rest.
"""

import dataclasses
import functools
import importlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from rich.console import Console

from seqjax.cli import UserError
from seqjax.cli.bench import kernel_cases
from seqjax.cli.bench.kernel_cases import KernelCase, Work
from seqjax.cli.bench.measure import exponent, first_line, interleaved, median, median_ratio, relative_error
from seqjax.cli.bench.op_cases import Inputs, Sizes
from seqjax.cli.bench.ops import TOLERANCE, worst
from seqjax.cli.bench.report import Common, Goal, Report, progress

# Enough tokens that a call is long beside its launch; a tenth of it on a CPU is a smoke test.
MIN_SECONDS = 0.02
PACKED, EXPONENT, OFF = 1.15, 1.05, 1.10


@dataclasses.dataclass(frozen=True)
class Options(Common):
    """Time the Pallas kernels on this device, beside the XLA form, flash-linear-attention and cuDNN attention."""

    filter: str = ""
    """Only kernels whose name contains this, e.g. "delta_rule" or "scalar"."""
    grid: Literal["small", "full"] = "small"
    """"full" is every combination; "small" varies one of T, heads and dim at a time."""
    tokens: int = 32768
    """Tokens of a cell; rows are tokens / T."""
    lengths: tuple[int, ...] = (2048, 8192, 32768)
    """Sequence lengths T, tokens."""
    heads: tuple[int, ...] = (8, 16, 32)
    """Heads; elementwise ops have heads * dim channels."""
    dims: tuple[int, ...] = (64, 128, 256)
    """Key and value dimension of a head."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the inputs."""
    repeats: int = 7
    """Samples per figure; medians are shown."""
    budget_s: float = 0.0
    """Seconds after which no further cell is begun; 0 is no limit."""

    def __post_init__(self) -> None:
        for name in ("lengths", "heads", "dims"):
            values = getattr(self, name)
            if not values or min(values) < 1 or len(set(values)) < len(values):
                raise UserError(f"--{name} {values}: expected distinct positive numbers")
        if self.tokens < max(self.lengths):
            raise UserError(f"--tokens {self.tokens}: expected at least the longest T, {max(self.lengths)}")
        if self.repeats < 1:
            raise UserError(f"--repeats {self.repeats}: expected at least 1")


@dataclasses.dataclass(frozen=True)
class Cell:
    """A point of the grid."""

    case: KernelCase
    time: int
    heads: int
    dim: int

    def sizes(self, options: Options) -> Sizes:
        """With as many rows as make the tokens."""
        return Sizes(options.tokens // self.time, self.heads, self.dim, options.dtype)


def middle(values: tuple[int, ...]) -> int:
    """The middle one by size."""
    return sorted(values)[len(values) // 2]


def cells(options: Options) -> list[Cell]:
    """The grid, round by round: the centre of every kernel, then its neighbours along T, dim and heads, then the rest."""
    cases = [
        case for case in kernel_cases.chosen(options.filter) if "complex" not in case.name or options.dtype == "float32"
    ]
    if not cases:
        names = ", ".join(case.name for case in kernel_cases.CASES)
        raise UserError(f"--filter {options.filter!r} with {options.dtype} matches none of: {names}")
    centre = middle(options.lengths), middle(options.heads), middle(options.dims)
    points = [(t, h, d) for d in options.dims for h in options.heads for t in options.lengths]

    def distance(point: tuple[int, ...]) -> tuple[int, int]:
        off = [a != b for a, b in zip(point, centre)]
        # T first, since its exponent needs all of them; then dim, then heads.
        return sum(off), off[0] * 1 + off[2] * 2 + off[1] * 4

    points = sorted((p for p in points if options.grid == "full" or distance(p)[0] <= 1), key=distance)
    return [Cell(case, *point) for point in points for case in cases]


# --- The device ---


@dataclasses.dataclass(frozen=True)
class Device:
    """What the device was measured to do."""

    bandwidth: float
    """Bytes per second of a copy, read and written."""
    peak: float
    """Floating-point operations per second of a large product."""

    def seconds(self, work: Work) -> float:
        """Roofline of the work."""
        return work.seconds(self.bandwidth, self.peak)


def measure_device(dtype: str, repeats: int) -> Device:
    """Bandwidth of an elementwise pass and peak of a product of random matrices."""
    small = jax.default_backend() == "cpu"
    width = jnp.dtype(dtype).itemsize
    values = jax.random.normal(jax.random.key(0), ((1 << 24 if small else 1 << 30) // width,), dtype)
    size = 512 if small else 8192
    matrix = jax.random.normal(jax.random.key(1), (size, size), dtype)
    copy, product = jax.jit(lambda a: a + 1), jax.jit(lambda a: jnp.dot(a, a, precision="highest"))
    times = interleaved(
        {"copy": lambda: copy(values), "product": lambda: product(matrix)}, repeats, min_seconds=MIN_SECONDS
    )
    return Device(2 * values.nbytes / median(times["copy"]), 2 * size**3 / median(times["product"]))


# --- The candidates ---


def compiled(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """A call of the jitted function, compiled now."""
    return functools.partial(jax.jit(function).lower(*arguments).compile(), *arguments)


class Torch:
    """flash-linear-attention, in this process and on the same numbers."""

    def __init__(self) -> None:
        self.torch: Any = importlib.import_module("torch")
        importlib.import_module("fla")
        if not self.torch.cuda.is_available():
            raise ImportError("torch sees no CUDA device")

    @staticmethod
    def open() -> "Torch | str":
        """The peer, or why there is none."""
        try:
            return Torch()
        except Exception as error:  # a broken installation of a peer is a reason like its absence
            return first_line(error)

    def block_until_ready(self) -> "Torch":
        """As results of JAX have it, so that one clock times all candidates."""
        self.torch.cuda.synchronize()
        return self

    def calls(self, case: KernelCase, inputs: Inputs, cotangents: Any) -> dict[str, Callable[[], Any]]:
        """The peer's forward pass and forward+backward."""
        assert case.fla is not None
        module, name, names = case.fla
        function = getattr(importlib.import_module(module), name)
        unpack = self.torch.utils.dlpack.from_dlpack
        given = {names[key]: unpack(value) for key, value in inputs.items() if key in names}
        leaves = {key: value.detach().clone().requires_grad_() for key, value in given.items()}
        upstream = [unpack(leaf) for leaf in jax.tree.leaves(cotangents)]

        def forward() -> Any:
            with self.torch.no_grad():
                function(**given, output_final_state=True)
            return self

        def both() -> Any:
            output, state = function(**leaves, output_final_state=True)
            self.torch.autograd.grad(
                [output, state], list(leaves.values()), [g.to(r.dtype) for g, r in zip(upstream, (output, state))]
            )
            return self

        return {"forward": forward, "both": both}


def cudnn_calls(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """cuDNN's causal attention on the same query, key and value."""
    arguments = tuple(inputs[name] for name in ("query", "key", "value"))
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")

    def both(arguments: Any, cotangent: Any) -> Any:
        output, pull = jax.vjp(attend, *arguments)
        return output, pull(cotangent)

    return {"forward": compiled(attend, *arguments), "both": compiled(both, arguments, arguments[2])}


def check(case: KernelCase, options: Options, sizes: Sizes) -> float:
    """Relative error of the kernel's results and gradients against the XLA form, on one row of a prime number of tokens."""
    sizes = dataclasses.replace(sizes, batch=1)
    inputs, cotangents = kernel_cases.arrays(case, sizes, 1009 if options.tokens > 1009 else 197)
    pair = [jax.jit(kernel_cases.both(case, form))(inputs, cotangents) for form in ("pallas", "xla")]
    return relative_error(*pair)


# --- Measuring ---


def measure(cell: Cell, options: Options, device: Device, peer: "Torch | str") -> Iterator[dict[str, Any]]:
    """Rows of a cell: the forward pass, and forward+backward."""
    case, sizes = cell.case, cell.sizes(options)
    inputs, cotangents = kernel_cases.arrays(case, sizes, cell.time)
    calls: dict[str, dict[str, Callable[[], Any]]] = {}
    reasons: dict[str, str] = {}

    def add(name: str, make: Callable[[], dict[str, Callable[[], Any]]]) -> None:
        try:
            made = make()
            for call in made.values():
                jax.block_until_ready(call())
            calls[name] = made
        except Exception as error:  # whatever stops one candidate, the others are still worth their numbers
            reasons[name] = first_line(error)

    def form(name: str) -> dict[str, Callable[[], Any]]:
        return {
            "forward": compiled(kernel_cases.forward(case, name), inputs),
            "both": compiled(kernel_cases.both(case, name), inputs, cotangents),
        }

    error = None
    if reason := kernel_cases.refusal(case, sizes, cell.time):
        reasons["pallas"] = reason
    else:
        try:
            error = check(case, options, sizes)
        except Exception as failure:
            reasons["pallas"] = first_line(failure)
        else:
            if error <= TOLERANCE[options.dtype]:
                add("pallas", lambda: form("pallas"))
            else:
                reasons["pallas"] = f"wrong: relative error {error:.1e}"
    add("xla", lambda: form("xla"))
    if case.fla is None:
        reasons["fla"] = "has no such operation"
    elif isinstance(peer, str):
        reasons["fla"] = peer
    else:
        add("fla", lambda: peer.calls(case, inputs, cotangents))
    if "query" in inputs and jax.default_backend() == "gpu":
        add("cudnn", lambda: cudnn_calls(inputs))

    necessary = kernel_cases.work(case, sizes, cell.time)
    picked = kernel_cases.picked(case, sizes, cell.time)
    for part in ("forward", "both"):
        times = interleaved(
            {name: made[part] for name, made in calls.items()}, options.repeats, min_seconds=MIN_SECONDS
        )
        row: dict[str, Any] = {
            "kernel": case.name,
            "pass": "f" if part == "forward" else "f+b",
            "T": cell.time,
            "rows": sizes.batch,
            "heads": cell.heads,
            "dim": cell.dim,
        }
        row |= {
            f"{name} ms": 1e3 * median(times[name]) if name in times else None
            for name in ("pallas", "xla", "fla", "cudnn")
        }
        ours = [name for name in ("pallas", "xla") if name in times]
        if ours:
            best = min(ours, key=lambda name: median(times[name]))
            seconds = median(times[best])
            row |= {
                "best": best,
                "TFLOP/s": necessary[part].products / seconds / 1e12,
                "GB/s": necessary[part].bytes / seconds / 1e9,
                "% of roofline": 100 * device.seconds(necessary[part]) / seconds,
                "None picks": picked,
                "off the best": median(times[picked]) / seconds if picked in times else None,
            }
        for name in ("xla", "fla", "cudnn"):
            if "pallas" in times and name in times:
                row[f"pallas / {name}"] = median_ratio(times["pallas"], times[name])
        row |= {"error": error, "not timed": reasons}
        yield row


def packed_ratio(cell: Cell, options: Options) -> float:
    """Time of the kernel's forward+backward with rows of documents over that with one document per row."""
    case, sizes = cell.case, cell.sizes(options)
    inputs, cotangents = kernel_cases.arrays(case, sizes, cell.time)
    ids = kernel_cases.packed_ids(sizes.batch, cell.time)
    both = kernel_cases.both(case, "pallas")
    calls = {"packed": compiled(both, inputs, cotangents, ids), "whole": compiled(both, inputs, cotangents)}
    times = interleaved(calls, options.repeats, min_seconds=MIN_SECONDS)
    return median_ratio(times["packed"], times["whole"])


def goals_of(rows: list[dict[str, Any]], packed: dict[str, float]) -> list[Goal]:
    """Right results, documents for nearly nothing, a cost linear in T, and a choice that is close to the best."""
    goals = [
        ("wrong kernels", Goal("results", float(sum("wrong" in row["not timed"].get("pallas", "") for row in rows)), 0))
    ]
    goals += [(name, Goal("packed rows / one document", ratio, PACKED)) for name, ratio in packed.items()]
    series: dict[tuple, dict[int, float]] = {}
    for row in rows:
        place = f"{row['kernel']} {row['pass']} T={row['T']} heads={row['heads']} dim={row['dim']}"
        if row.get("off the best") is not None:
            goals.append((place, Goal("what None picks / the best form", row["off the best"], OFF)))
        if row["pallas ms"] is not None:
            line = (row["kernel"], row["pass"], row["heads"], row["dim"])
            # Cells have equal tokens: per row, the time is that of T of them.
            series.setdefault(line, {})[row["T"]] = row["pallas ms"] / row["rows"]
    for line, values in series.items():
        if len(values) > 1:
            slope = exponent(list(values), list(values.values()))
            goals.append((" ".join(map(str, line)), Goal("exponent of the kernel's time in T", slope, EXPONENT)))
    return worst(goals)


def run(options: Options, console: Console) -> Report:
    """Measure the device, then cell by cell until the grid or the budget ends.

    Raises:
        UserError: the filter matches nothing.
    """
    start = time.monotonic()
    # Torch shares the device's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    todo = cells(options)
    peer = Torch.open() if jax.default_backend() == "gpu" else "is for GPUs"
    device = measure_device(options.dtype, options.repeats)
    rows: list[dict[str, Any]] = []
    packed: dict[str, float] = {}
    done = 0
    with progress(console) as bar:
        task = bar.add_task("kernels", total=len(todo))
        for cell in todo:
            if options.budget_s and time.monotonic() - start > options.budget_s:
                break
            bar.update(task, description=f"{cell.case.name} T={cell.time} {cell.heads}x{cell.dim}")
            rows += measure(cell, options, device, peer)
            # The first cell of a kernel is the centre of the grid.
            first = not any(row["kernel"] == cell.case.name for row in rows[:-2])
            if first and rows[-1]["pallas ms"] is not None:
                try:
                    packed[cell.case.name] = packed_ratio(cell, options)
                except Exception as error:  # the other cells are still worth their numbers
                    rows[-1]["not timed"]["packed"] = first_line(error)
            done += 1
            bar.advance(task)
    device_name = jax.devices()[0].device_kind
    title = f"kernels on {device_name}: {options.tokens} tokens, {options.dtype}; f: forward, f+b: forward+backward"
    reasons = {
        f"{name}: {reason}": None for row in rows for name, reason in row["not timed"].items() if name != "cudnn"
    }
    notes = [
        f"measured: copy {device.bandwidth / 1e9:,.0f} GB/s, product {device.peak / 1e12:,.3g} TFLOP/s ({options.dtype}, random data). "
        "% of roofline: of these, for the necessary bytes and matrix products (chunks of 64), by the best of our forms; TFLOP/s and GB/s count "
        "the same work.",
        "Candidates take turns in one process; each sample queues several calls and waits once, so launches overlap where the library lets "
        "them. pallas / x: below 1 the kernel is faster.",
        "packed / one document, f+b: " + (", ".join(f"{k} {v:.3f}" for k, v in packed.items()) or "not measured") + ".",
        *([f"Budget of {options.budget_s:.0f} s: {done} of {len(todo)} cells measured."] if done < len(todo) else []),
        *(f"not timed: {reason}" for reason in reasons),
    ]
    return Report("kernels", title, rows, goals_of(rows, packed), notes)
