"""Row-wise operations on carried state: find the batch axis of every leaf, reset rows, split into microbatches.

Layers are free to place their batch axis anywhere (stacked layers put theirs second), so it is measured rather than
agreed on: the axis that grows when the state is made for two rows instead of one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree


def batch_axes(make: Callable[[int], Any]) -> PyTree[int]:
    """The batch axis of every leaf of ``make(batch_size)``, found from shapes without computing anything.

    Raises:
        ValueError: if a leaf does not have exactly one axis that follows the batch size.
    """
    one, two = jax.eval_shape(lambda: make(1)), jax.eval_shape(lambda: make(2))

    def axis(path: Any, first: jax.ShapeDtypeStruct, second: jax.ShapeDtypeStruct) -> int:
        found = [i for i, (a, b) in enumerate(zip(first.shape, second.shape)) if (a, b) == (1, 2)]
        if first.ndim != second.ndim or len(found) != 1:
            raise ValueError(
                f"carried state {jax.tree_util.keystr(path)} has shape {first.shape} for one row and {second.shape} for "
                "two; every leaf needs one axis that is the batch size"
            )
        return found[0]

    return jax.tree_util.tree_map_with_path(axis, one, two)


def reset_rows(carry: PyTree, initial: PyTree, reset: Bool[Array, "B"], axes: PyTree[int]) -> PyTree:
    """Replace the rows of ``carry`` where ``reset`` is true by those of ``initial``."""

    def choose(old: Array, new: Array, axis: int) -> Array:
        shape = [1] * old.ndim
        shape[axis] = reset.shape[0]
        return jnp.where(reset.reshape(shape), new, old)

    return jax.tree.map(choose, carry, initial, axes)


def split_rows(tree: PyTree, parts: int, axes: PyTree[int] | int = 0) -> PyTree:
    """Deal the rows of every leaf out to ``parts`` microbatches, stacked along a new first axis.

    Microbatch i holds rows i, i + parts, i + 2 parts, ...: neighbouring rows live on one device, so dealing them out
    keeps every device busy in every microbatch without moving data.
    """

    def split(leaf: Array, axis: int) -> Array:
        rows = leaf.shape[axis]
        dealt = leaf.reshape(*leaf.shape[:axis], rows // parts, parts, *leaf.shape[axis + 1 :])
        return jnp.moveaxis(dealt, axis + 1, 0)

    return jax.tree.map(split, tree, _like(axes, tree))


def merge_rows(tree: PyTree, axes: PyTree[int] | int = 0) -> PyTree:
    """The inverse of :func:`split_rows`."""

    def merge(leaf: Array, axis: int) -> Array:
        dealt = jnp.moveaxis(leaf, 0, axis + 1)
        return dealt.reshape(*dealt.shape[:axis], dealt.shape[axis] * dealt.shape[axis + 1], *dealt.shape[axis + 2 :])

    return jax.tree.map(merge, tree, _like(axes, tree))


def _like(axes: PyTree[int] | int, tree: PyTree) -> PyTree[int]:
    return jax.tree.map(lambda _: axes, tree) if isinstance(axes, int) else axes
