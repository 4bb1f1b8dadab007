"""Kernels on a mesh: the partitioner cannot cut a kernel, so it is called once per device on that device's part."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

AXES = {"B": ("data", "fsdp"), "D": ("tensor",), "H": ("tensor",), "G": ("tensor",)}
"""Mesh axes that may cut a dimension: rows are independent, and so are channels and heads. Time is never cut here."""


def per_device(
    function: Callable[..., Any], arguments: tuple[jax.Array | None, ...], shapes: tuple[str, ...], results: Any
) -> Any:
    """``function(*arguments)``, under ``jax.shard_map`` if a mesh is set whose axes are the partitioner's to use.

    Args:
        function: takes the arrays (None stays None).
        arguments: arrays or None.
        shapes: their symbolic shapes, such as "B T H K"; symbols of ``AXES`` are cut where the mesh has the axes and
            they divide the dimension. Query/key heads G and heads H are cut together or not at all.
        results: pytree of the symbolic shapes of what the function returns.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual}
    if math.prod(mesh.shape[name] for name in free) == 1:
        return function(*arguments)
    sizes = {s: n for a, spec in zip(arguments, shapes) if a is not None for s, n in zip(spec.split(), a.shape)}
    cuts: dict[str, tuple[str, ...]] = {}
    for symbol, size in sizes.items():
        axes = tuple(name for name in AXES.get(symbol, ()) if name in free)
        if axes and size % math.prod(mesh.shape[name] for name in axes) == 0:
            cuts[symbol] = axes
    if "G" in sizes and not {"G", "H"} <= set(cuts):
        cuts.pop("G", None)
        cuts.pop("H", None)

    def spec(shape: str) -> PartitionSpec:
        return PartitionSpec(*(cuts.get(symbol) for symbol in shape.split()))

    given = [i for i, a in enumerate(arguments) if a is not None]

    def local(*arrays):
        filled: list[Any] = [None] * len(arguments)
        for i, array in zip(given, arrays):
            filled[i] = array
        return function(*filled)

    return jax.shard_map(
        local,
        in_specs=tuple(spec(shapes[i]) for i in given),
        out_specs=jax.tree.map(spec, results),
        axis_names=free,
        check_vma=False,
    )(*(arguments[i] for i in given))
