"""Modules as flat dictionaries of arrays.

The hot loop, the optimiser and the checkpoints all see parameters as ``{"blocks.0.mixer.query.kernel": array, ...}``:
jit flattens a dict in C++, optax takes dicts of labels, and an error can name the array it is about.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """What a module is apart from its numbers: static under jit."""

    graphdef: Any  # flax's static description
    treedef: Any  # of the parameters' state
    names: tuple[str, ...]  # of the parameters, in the order of the treedef
    shapes: dict[str, jax.ShapeDtypeStruct]
    axes: dict[str, tuple[str | None, ...]]  # logical axis names, one per dimension
    decay: dict[str, bool]  # whether weight decay applies

    def merge(self, params: Mapping[str, Array]) -> Any:
        """The module with these parameters."""
        leaves = [params[name] for name in self.names]
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape.shape) for shape in self.shapes.values())


def flatten(module: nnx.Module) -> dict[str, Array]:
    """The parameters of a module by name."""
    state = _parameters(module)[1]
    leaves = jax.tree.leaves(state)
    return dict(zip(_names(state), leaves))


def structure(build: Callable[[], nnx.Module]) -> Structure:
    """Describe the module that ``build`` makes, without computing or allocating its arrays.

    Raises:
        ValueError: if the module holds variables other than parameters, or a parameter's ``axes`` do not fit its shape.
    """
    graphdef, state = _parameters(jax.eval_shape(build))
    names = _names(state)
    leaves, treedef = jax.tree.flatten(state)
    shapes, axes, decay = {}, {}, {}
    for name, leaf, (_, variable) in zip(names, leaves, nnx.to_flat_state(state)):
        metadata = variable.get_metadata()
        shapes[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        axes[name] = _logical_axes(name, leaf.shape, metadata.get("axes"))
        stacked = sum(axis == "layers" for axis in axes[name])
        decay[name] = bool(metadata.get("decay", leaf.ndim - stacked >= 2))
    return Structure(graphdef, treedef, tuple(names), shapes, axes, decay)


def _parameters(module: nnx.Module) -> tuple[Any, Any]:
    graphdef, state, rest = nnx.split(module, nnx.Param, ...)
    if jax.tree.leaves(rest):
        found = ", ".join(".".join(map(str, path)) for path, _ in nnx.to_flat_state(rest))
        raise ValueError(
            f"the module holds variables that are not parameters ({found}); the trainer keeps state outside modules: "
            "pass it as the task's carry, or recompute constants in the call"
        )
    return graphdef, state


def _names(state: Any) -> list[str]:
    return [".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]


def _logical_axes(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...] | None) -> tuple[str | None, ...]:
    """Axis names for every dimension: leading dimensions without a name are those of stacked layers."""
    given = (None,) * len(shape) if axes is None else tuple(axes)
    extra = len(shape) - len(given)
    if extra < 0:
        raise ValueError(f"parameter {name} has shape {shape} but {len(given)} axis names {given}")
    return ("layers",) * extra + given
