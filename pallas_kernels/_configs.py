"""Block sizes that were found faster than the heuristics, by kernel, kind of device and dimensions.

``default_config`` of a kernel asks ``tuned`` first and keeps its heuristics for whatever has no entry: unknown devices, interpretation,
fields that were not searched. Entries come from ``scripts/tune_kernels.py`` and are committed: nothing is tuned while a program runs.
"""

import contextlib
import contextvars
from collections.abc import Generator, Mapping

import jax

from pallas_kernels import _target
from pallas_kernels._tuned import TUNED

_OVERRIDE: contextvars.ContextVar[tuple[str, Mapping[str, int], list[str]] | None] = contextvars.ContextVar(
    "pallas_kernels_config", default=None
)


def tuned(kernel: str, **dims: int) -> Mapping[str, int]:
    """Fields of the configuration for where this is traced; empty if there is no entry.

    Args:
        kernel: its folder.
        dims: what the entry depends on, such as ``key=128, value=128, itemsize=2``.
    """
    forced = _OVERRIDE.get()
    if forced is not None and forced[0] == kernel:
        forced[2].append(label(dims))
        return forced[1]
    kind = None if not TUNED or _target.target().interpret else device_kind()
    return TUNED.get((kernel, kind, label(dims)), {}) if kind else {}


def label(dims: Mapping[str, int]) -> str:
    """The dimensions as the table has them: "itemsize=2 key=128 value=128"."""
    return " ".join(f"{name}={dims[name]}" for name in sorted(dims))


def device_kind() -> str:
    """Kind of the device of the mesh that is set (it may be of a topology that is not here), else of the default backend's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.local_devices()[0].device_kind if device is None else device.device_kind


@contextlib.contextmanager
def override(kernel: str, fields: Mapping[str, int]) -> Generator[list[str]]:
    """Trace ``kernel`` with these fields: how the tuner tries them. Yields a list that gets the label of every look-up."""
    asked: list[str] = []
    token = _OVERRIDE.set((kernel, fields, asked))
    try:
        yield asked
    finally:
        _OVERRIDE.reset(token)
