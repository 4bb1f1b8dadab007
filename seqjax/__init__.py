"""Recurrent sequence models in JAX: ops, layers, models, data, training.

Floors (imports go only downward): ``cli`` > ``train, sample, evaluate, analyze`` > ``tasks, data, interop`` > ``models`` >
``layers`` > ``ops`` > ``pallas_kernels``. Sub-packages load on first use, so ``import seqjax`` costs next to nothing and
``seqjax.ops`` can be used without Flax or any trainer dependency.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["analyze", "data", "evaluate", "interop", "layers", "models", "ops", "sample", "tasks", "train"]

if TYPE_CHECKING:
    from seqjax import analyze, data, evaluate, interop, layers, models, ops, sample, tasks, train


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f"seqjax.{name}")
    raise AttributeError(f"module 'seqjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
