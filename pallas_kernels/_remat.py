"""What a forward pass computes for the backward one, by a name that policies of `jax.checkpoint` know."""

from typing import TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

RECURRENCE = "recurrence"
"""Name of the results and residuals of recurrences: with `jax.checkpoint_policies.save_only_these_names` they are kept, not computed again."""

Tree = TypeVar("Tree")


def keep(tree: Tree) -> Tree:
    """The same arrays, named."""
    return jax.tree.map(lambda array: checkpoint_name(array, RECURRENCE), tree)
