"""``seqjax bench ops``: every op's fast form against its definition.

For each op, in this order: the fast form must equal the reference (outputs, final state, gradients), else nothing is
published; then time of forward and of forward+backward over a range of lengths, the exponent of that cost in T, the scratch
memory the compiler reserves, and the ratio to the step-by-step reference scan at one length.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from rich.console import Console

from seqjax.cli import UserError
from seqjax.cli.bench.measure import exponent, interleaved, median, median_ratio, relative_error, temporary_bytes
from seqjax.cli.bench.op_cases import CASES, Case, Inputs, Sizes
from seqjax.cli.bench.report import CheckFailed, Common, Goal, Report, progress

# Relative RMS error allowed between the two forms. The chunked forms sum in another order: a few ulp per thousand terms.
TOLERANCE = {"float32": 2e-4, "bfloat16": 3e-2}
# A prime, so that no chunk size divides it.
CHECKED_LENGTH = 197


@dataclasses.dataclass(frozen=True)
class Options(Common):
    """Time every op: fast form against the step-by-step scan, cost and memory in T."""

    filter: str = ""
    """Only ops whose name contains this, e.g. "delta_rule" or "channel"."""
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    """Sequence lengths T, tokens; at least two for an exponent."""
    reference_length: int = 4096
    """T at which the fast form is compared with the step-by-step scan, tokens."""
    batch: int = 1
    """Rows."""
    heads: int = 4
    """Heads; elementwise ops have heads * dim channels."""
    dim: int = 64
    """Key and value dimension of a head."""
    repeats: int = 5
    """Samples per figure; medians are shown."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the inputs; states are float32 always."""

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1 or len(set(self.lengths)) < len(self.lengths):
            raise UserError(f"--lengths {self.lengths}: expected distinct positive lengths")
        for name in ("reference_length", "batch", "heads", "dim", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")


def forward(case: Case, implementation: str) -> Callable[[Inputs], Any]:
    """inputs -> (output, state)."""
    return lambda inputs: case.call(inputs, implementation)


def forward_backward(case: Case, implementation: str) -> Callable[[Inputs, Any], Any]:
    """(inputs, cotangents of output and state) -> (loss, gradients of all inputs)."""

    def loss(inputs: Inputs, cotangents: Any) -> jax.Array:
        results = case.call(inputs, implementation)
        products = jax.tree.map(lambda a, b: jnp.sum(jnp.real(a.astype(b.dtype) * b)), results, cotangents)
        return functools.reduce(jnp.add, jax.tree.leaves(products))

    return jax.value_and_grad(loss)


def cotangents_like(case: Case, inputs: Inputs) -> Any:
    """Random cotangents for the output and, where there is one, the final state."""
    shapes = jax.eval_shape(forward(case, "xla"), inputs)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))

    def draw(key: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        wide = jnp.complex64 if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else jnp.float32
        return jax.random.normal(key, leaf.shape, wide)

    return jax.tree.unflatten(tree, [draw(key, leaf) for key, leaf in zip(keys, leaves)])


@dataclasses.dataclass(frozen=True)
class Form:
    """One implementation of an op, compiled once per shape."""

    forward: Callable[[Inputs], Any]
    both: Callable[[Inputs, Any], Any]


def forms(case: Case) -> dict[str, Form]:
    """The reference and the fast form."""
    return {
        name: Form(jax.jit(forward(case, name)), jax.jit(forward_backward(case, name))) for name in ("reference", "xla")
    }


def check(case: Case, form: dict[str, Form], sizes: Sizes, time: int) -> float:
    """Compare the fast form with the reference: outputs, final state and gradients.

    Returns:
        The largest relative RMS error.

    Raises:
        CheckFailed: it exceeds the tolerance of the input type, or something is not finite.
    """
    inputs = case.make(jax.random.key(0), sizes, time)
    cotangents = cotangents_like(case, inputs)
    # The loss itself is not compared: it is one sum that may cancel to nearly nothing.
    results = {name: (one.forward(inputs), one.both(inputs, cotangents)[1]) for name, one in form.items()}
    errors = {
        part: relative_error(results["xla"][index], results["reference"][index])
        for index, part in enumerate(("output and final state", "gradients"))
    }
    for part, error in errors.items():
        if error > TOLERANCE[sizes.dtype]:
            raise CheckFailed(
                f"{case.name}: {part} of the fast form differ from the reference by {error:.2e} (relative RMS, "
                f"T={time}); allowed for {sizes.dtype}: {TOLERANCE[sizes.dtype]:.0e}"
            )
    return max(errors.values())


def measure(case: Case, options: Options, sizes: Sizes) -> tuple[dict[str, Any], list[Goal]]:
    """Row and goals of one op; goals are named by kind.

    Raises:
        CheckFailed: the fast form is wrong.
    """
    lengths = sorted(n for n in options.lengths if case.longest is None or n <= case.longest)
    if not lengths:
        raise UserError(f"--lengths: {case.name} is measured up to T={case.longest} only; ask for a shorter one too")
    form = forms(case)
    error = max(check(case, form, sizes, time) for time in {CHECKED_LENGTH, options.reference_length})

    calls: dict[str, Callable[[], Any]] = {}
    memory = []
    for time in lengths:
        inputs = case.make(jax.random.key(0), sizes, time)
        cotangents = cotangents_like(case, inputs)
        calls[f"forward {time}"] = functools.partial(form["xla"].forward, inputs)
        calls[f"both {time}"] = functools.partial(form["xla"].both, inputs, cotangents)
        memory.append(temporary_bytes(form["xla"].both, inputs, cotangents))
    times = interleaved(calls, options.repeats)
    both = [median(times[f"both {time}"]) for time in lengths]

    inputs = case.make(jax.random.key(0), sizes, options.reference_length)
    cotangents = cotangents_like(case, inputs)
    pair = interleaved(
        {name: functools.partial(one.both, inputs, cotangents) for name, one in form.items()}, options.repeats
    )
    ratio = median_ratio(pair["reference"], pair["xla"])

    longest = lengths[-1]
    row: dict[str, Any] = {
        "op": case.name,
        "error": error,
        "T": longest,
        "f ms": 1e3 * median(times[f"forward {longest}"]),
        "f+b ms": 1e3 * both[-1],
        "Mtoken/s": sizes.batch * longest / both[-1] / 1e6,
        "scan f+b ms": 1e3 * median(pair["reference"]),
        "fast f+b ms": 1e3 * median(pair["xla"]),
        "speed-up": ratio,
    }
    goals = []
    if case.recurrent:
        goals.append(Goal(f"speed-up over the scan at T={options.reference_length}", ratio, 10.0, at_least=True))
    if len(lengths) > 1:
        row["time exponent"] = exponent(lengths, both)
        row["memory exponent"] = exponent(lengths, [max(entry, 1) for entry in memory])
        # The slope between the two longest: constants such as one chunk's scratch drop out.
        row["bytes/token"] = (memory[-1] - memory[-2]) / (sizes.batch * (lengths[-1] - lengths[-2]))
        if case.recurrent:
            goals.append(Goal("exponent of time in T", row["time exponent"], 1.1))
            goals.append(Goal("exponent of scratch memory in T", row["memory exponent"], 1.1))
        if case.state_bytes is not None:
            row["state bytes"] = case.state_bytes(sizes) // sizes.batch
            goals.append(Goal("scratch per token / one state", row["bytes/token"] / row["state bytes"], 0.5))
    missed = [goal.name for goal in goals if not goal.passed]
    row["verdict"] = ("FAIL: " + "; ".join(missed) if missed else "PASS") if goals else None
    row["f ms by T"] = {time: 1e3 * median(times[f"forward {time}"]) for time in lengths}
    row["f+b ms by T"] = {time: 1e3 * value for time, value in zip(lengths, both)}
    row["scratch bytes by T"] = dict(zip(lengths, memory))
    return row, goals


def worst(goals: list[tuple[str, Goal]]) -> list[Goal]:
    """Of each kind of goal the op that is furthest from keeping it."""
    kinds: dict[str, list[tuple[str, Goal]]] = {}
    for op, goal in goals:
        kinds.setdefault(goal.name, []).append((op, goal))
    result = []
    for name, entries in kinds.items():
        op, goal = min(entries, key=lambda entry: entry[1].measured if entry[1].at_least else -entry[1].measured)
        passed = sum(entry.passed for _, entry in entries)
        label = f"{name}: worst of {len(entries)} is {op}, {passed} pass" if len(entries) > 1 else f"{name}: {op}"
        result.append(dataclasses.replace(goal, name=label))
    return result


def run(options: Options, console: Console) -> Report:
    """Check and time the chosen ops.

    Raises:
        UserError: the filter matches nothing.
        CheckFailed: a fast form is wrong.
    """
    chosen = [case for case in CASES if options.filter in case.name]
    if not chosen:
        raise UserError(f"--filter {options.filter!r} matches none of: {', '.join(case.name for case in CASES)}")
    sizes = Sizes(options.batch, options.heads, options.dim, options.dtype)
    rows, goals = [], []
    with progress(console) as bar:
        task = bar.add_task("ops", total=len(chosen))
        for case in chosen:
            bar.update(task, description=case.name)
            row, more = measure(case, options, sizes)
            rows.append(row)
            goals.extend((case.name, goal) for goal in more)
            bar.advance(task)
    title = (
        f"ops: batch {options.batch}, {options.heads} heads of {options.dim}, {options.dtype}; "
        f"scan and fast: T={options.reference_length}"
    )
    notes = [
        "speed-up: forward+backward of the reference form over the fast form, interleaved in this run. The reference of the "
        "convolution and of attention is not a scan, so they have no goal.",
        "bytes/token: growth of the compiler's scratch memory of forward+backward; state bytes: one recurrent state of a row. "
        "A form that kept a state per token would show at least the latter.",
    ]
    return Report("ops", title, rows, worst(goals), notes)
