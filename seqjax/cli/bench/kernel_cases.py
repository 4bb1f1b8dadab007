"""The table of kernels: which op and inputs, the work that the operation cannot do without, and the peer. One entry per kernel and gate.

`seqjax bench kernels`, `scripts/tpu_estimates.py`, `scripts/tune_kernels.py` and `tests/device` all go by it.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.cli.bench import op_cases
from seqjax.cli.bench.op_cases import SELECTIVE_STATE, Inputs, Sizes
from seqjax.layers.flops import CHUNK, delta_rule_flops, linear_attention_flops

DOCUMENTS = 8
"""Documents of a packed row."""


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """An op with a Pallas kernel, in one setting."""

    op: op_cases.Case
    """Its inputs and its call."""
    products: Callable[[int], float]
    """Floating-point operations in matrix products, forward, per head and token, for heads of K = V = the argument."""
    others: Callable[[int], float]
    """Elementwise operations, forward, per head and token (matrix-state ops: those on scores, which are few)."""
    backward: float
    """Operations of the backward pass over those of the forward one."""
    fla: tuple[str, str, dict[str, str]] | None = None
    """The peer in flash-linear-attention: module, function, and its argument names for ours."""

    @property
    def name(self) -> str:
        """That of the op and its gate."""
        return self.op.name


_QKV = {"query": "q", "key": "k", "value": "v", "log_decay": "g", "beta": "beta"}
_OPS = {case.name: case for case in op_cases.CASES}

CASES: tuple[KernelCase, ...] = (
    KernelCase(
        _OPS["linear_recurrence real"],
        lambda dim: 0,
        lambda dim: 3 * dim,
        2,
        ("fla.ops.hgrn", "chunk_hgrn", {"x": "x", "log_decay": "g"}),
    ),
    KernelCase(_OPS["linear_recurrence complex"], lambda dim: 0, lambda dim: 8 * dim, 2),
    # Per channel and state: the product with A, its exponential, decay, write (2), read (2).
    KernelCase(_OPS["selective_scan"], lambda dim: 0, lambda dim: 7 * SELECTIVE_STATE * dim, 3),
    *(
        KernelCase(
            _OPS[f"linear_attention {gate}"],
            lambda dim: linear_attention_flops(1, dim, dim),
            lambda dim: 4 * CHUNK,
            2.5,
            (*peer, _QKV),
        )
        for gate, peer in (
            ("none", ("fla.ops.simple_gla", "chunk_simple_gla")),
            ("scalar", ("fla.ops.simple_gla", "chunk_simple_gla")),
            ("channel", ("fla.ops.gla", "chunk_gla")),
        )
    ),
    *(
        KernelCase(
            _OPS[f"delta_rule {gate}"],
            lambda dim: delta_rule_flops(1, dim, dim),
            lambda dim: 8 * CHUNK,
            2.5,
            (*peer, _QKV),
        )
        for gate, peer in (
            ("none", ("fla.ops.delta_rule", "chunk_delta_rule")),
            ("scalar", ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")),
            ("channel", ("fla.ops.kda", "chunk_kda")),
        )
    ),
)


def chosen(text: str) -> list[KernelCase]:
    """Cases whose name contains the text."""
    return [case for case in CASES if text in case.name]


def packed_ids(batch: int, time: int, documents: int = DOCUMENTS) -> jax.Array:
    """Segment ids [B, T] of equally long documents."""
    return jnp.broadcast_to(1 + jnp.arange(time) * documents // time, (batch, time))


def forward(case: KernelCase, implementation: str | None) -> Callable[..., Any]:
    """(inputs, segment ids or None) -> (output, state)."""

    def call(inputs: Inputs, ids: jax.Array | None = None) -> Any:
        return case.op.call(inputs if ids is None else inputs | {"segment_ids": ids}, implementation)

    return call


def both(case: KernelCase, implementation: str | None) -> Callable[..., Any]:
    """(inputs, cotangents, segment ids or None) -> (results, gradients): no arithmetic besides the op's."""

    def call(inputs: Inputs, cotangents: Any, ids: jax.Array | None = None) -> Any:
        results, pull = jax.vjp(lambda inputs: forward(case, implementation)(inputs, ids), inputs)
        return results, pull(cotangents)[0]

    return call


def shapes(case: KernelCase, sizes: Sizes, time: int) -> tuple[Inputs, Any]:
    """Inputs and results as shapes."""
    inputs = jax.eval_shape(lambda key: case.op.make(key, sizes, time), jax.random.key(0))
    return inputs, jax.eval_shape(forward(case, "xla"), inputs)


def arrays(case: KernelCase, sizes: Sizes, time: int) -> tuple[Inputs, Any]:
    """Random inputs and cotangents of the results."""
    inputs = case.op.make(jax.random.key(0), sizes, time)
    leaves, tree = jax.tree.flatten(shapes(case, sizes, time)[1])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves)]
    return inputs, jax.tree.unflatten(tree, drawn)


@dataclasses.dataclass(frozen=True)
class Work:
    """What an operation cannot do without: every input read and every result written once, and its arithmetic."""

    bytes: float
    products: float
    """Floating-point operations in matrix products."""
    others: float
    """Elementwise operations."""

    def seconds(self, bandwidth: float, peak: float, vector: float | None = None) -> float:
        """The longest of the three, from bytes/s, products/s and elementwise operations/s (None: left out)."""
        return max(self.bytes / bandwidth, self.products / peak, self.others / vector if vector else 0.0)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def work(case: KernelCase, sizes: Sizes, time: int) -> dict[str, Work]:
    """Of "forward", of "backward" (reads inputs and cotangents, writes gradients) and of "both"."""
    inputs, results = shapes(case, sizes, time)
    tokens = sizes.batch * time * sizes.heads
    ahead = Work(_bytes((inputs, results)), tokens * case.products(sizes.dim), tokens * case.others(sizes.dim))
    back = Work(_bytes((inputs, results, inputs)), case.backward * ahead.products, case.backward * ahead.others)
    total = Work(ahead.bytes + back.bytes, ahead.products + back.products, ahead.others + back.others)
    return {"forward": ahead, "backward": back, "both": total}


def refusal(case: KernelCase, sizes: Sizes, time: int) -> str | None:
    """Why the kernel cannot take these inputs where this is traced, or None."""
    inputs, _ = shapes(case, sizes, time)
    try:
        jax.eval_shape(forward(case, "pallas"), inputs)
    except NotImplementedError as error:
        return str(error)
    return None


def picked(case: KernelCase, sizes: Sizes, time: int) -> str:
    """The form that ``implementation=None`` takes: the one that is traced to the same program."""
    inputs, _ = shapes(case, sizes, time)

    @functools.cache
    def program(implementation: str | None) -> str:
        # Addresses of functions differ from trace to trace.
        return re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(forward(case, implementation))(inputs)))

    return "xla" if program(None) == program("xla") else "pallas"


def kernels(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The equations of all Pallas calls in a trace of the function, in order, without those whose results nobody reads."""

    def read(jaxpr: Any) -> list[Any]:
        # JAX before 0.11 leaves this to the compiler.
        live, found = set(map(id, jaxpr.outvars)), []
        for equation in reversed(jaxpr.eqns):
            if equation.effects or live.intersection(map(id, equation.outvars)):
                live.update(map(id, equation.invars))
                found.append(equation)
        return found[::-1]

    def walk(jaxpr: Any) -> list[Any]:
        found = []
        for equation in read(jaxpr):
            if equation.primitive.name == "pallas_call":
                found.append(equation)
                continue
            for value in equation.params.values():
                for part in value if isinstance(value, list | tuple) else [value]:
                    part = getattr(part, "jaxpr", part)
                    found += walk(part) if hasattr(part, "eqns") else []
        return found

    return walk(jax.make_jaxpr(function)(*arguments).jaxpr)
