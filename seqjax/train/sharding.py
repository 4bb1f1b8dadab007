"""One mesh, one table of rules: where every array of a training run lives.

The mesh has the axes ``data`` (replicas), ``fsdp`` (parameters and batch sharded), ``tensor`` (heads, MLP and
vocabulary sharded) and ``context`` (time sharded). Parameters name their logical axes; ``RULES`` says which mesh axis
each may use.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from seqjax.train.parameters import Structure, flatten

AXES = ("data", "fsdp", "tensor", "context")

# Logical axis -> mesh axis. What is not named here is replicated.
RULES: dict[str | None, str] = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}

BATCH = PartitionSpec(("data", "fsdp"))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1, which takes what the others leave."""

    data: int = -1  # copies of the parameters, each with its part of the batch
    fsdp: int = 1  # parts into which parameters, optimiser state and batch are cut
    tensor: int = 1  # parts into which heads, MLP and vocabulary are cut
    context: int = 1  # parts into which the time axis is cut


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of all devices (of all processes).

    Raises:
        ValueError: if the axes do not multiply to the number of devices; the message says what would.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [getattr(config, axis) for axis in AXES]
    text = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"mesh {text}: sizes are positive, and at most one is -1 (the rest of the devices)")
    known = math.prod(size for size in sizes if size != -1)
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        divisors = [str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise ValueError(
            f"mesh {text} needs {'a multiple of ' if -1 in sizes else ''}{known} devices, but there are {len(devices)}; "
            f"the sizes must multiply to {len(devices)}, so each is one of {', '.join(divisors)} (-1 infers one)"
        )
    shape = tuple(len(devices) // known if size == -1 else size for size in sizes)
    if devices == jax.devices():
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parameter_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Partition of one parameter: each mesh axis at most once, and only where it divides the dimension."""
    used: set[str] = set()
    spec = []
    for axis, size in zip(axes, shape):
        target = RULES.get(axis)
        if target is None or target in used or mesh.shape[target] == 1 or size % mesh.shape[target]:
            spec.append(None)
        else:
            used.add(target)
            spec.append(target)
    return PartitionSpec(*spec)


def parameter_shardings(structure: Structure, mesh: Mesh) -> dict[str, NamedSharding]:
    """Sharding of every parameter by name."""
    return {
        name: NamedSharding(mesh, parameter_spec(structure.axes[name], structure.shapes[name].shape, mesh))
        for name in structure.names
    }


def unsharded(structure: Structure, mesh: Mesh) -> dict[str, str]:
    """Parameters that a rule wants to cut but cannot, with the reason; they are kept whole along that axis."""
    notes = {}
    for name in structure.names:
        for axis, size in zip(structure.axes[name], structure.shapes[name].shape):
            target = RULES.get(axis)
            if target is not None and size % mesh.shape[target]:
                notes[name] = f"{axis}={size} is not divisible by {target}={mesh.shape[target]}"
    return notes


def like_parameters(tree: PyTree, shardings: Mapping[str, NamedSharding], mesh: Mesh) -> PyTree:
    """Shardings of an optimiser state: what is stored per parameter is cut like the parameter, the rest replicated."""

    def choose(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for key in reversed(path):
            name = getattr(key, "key", "")
            if name in shardings and len(shardings[name].spec) <= leaf.ndim:
                return shardings[name]
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(choose, tree)


def batch_sharding(mesh: Mesh, ndim: int = 2) -> NamedSharding:
    """Rows over (data, fsdp), and time over context where there is a time axis."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), *(("context",) if ndim > 1 else ())))


def carry_shardings(axes: PyTree[int], mesh: Mesh) -> PyTree[NamedSharding]:
    """Shardings of carried state: rows over (data, fsdp), at the batch axis of each leaf."""
    return jax.tree.map(lambda axis: NamedSharding(mesh, PartitionSpec(*(None,) * axis, ("data", "fsdp"))), axes)


def check_batch(mesh: Mesh, batch_size: int, window: int, accumulation: int = 1) -> None:
    """Refuse batches that the mesh cannot cut.

    Raises:
        ValueError: naming the sizes and the nearest possible ones.
    """
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    unit = rows * accumulation
    if batch_size % unit:
        below, above = batch_size // unit * unit, -(-batch_size // unit) * unit
        near = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"batch size {batch_size} does not divide over data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} devices x "
            f"{accumulation} microbatches; possible near it: {near}"
        )
    if window % mesh.shape["context"]:
        raise ValueError(f"window {window} does not divide over context={mesh.shape['context']}; use a multiple of it")


def sharded_init(build: Callable[[], Any], structure: Structure, mesh: Mesh) -> dict[str, jax.Array]:
    """Initial parameters, each part computed where it will live: no device ever holds the whole model."""
    return jax.jit(lambda: flatten(build()), out_shardings=parameter_shardings(structure, mesh))()
