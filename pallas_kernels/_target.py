"""Which accelerator a kernel is traced for."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax


class Target(NamedTuple):
    """Where the kernels of a trace will run."""

    platform: str
    """"tpu", "gpu" or "cpu"."""
    interpret: bool
    """Run the kernel of that platform by interpretation, on any device."""


_FORCED: contextvars.ContextVar[Target | None] = contextvars.ContextVar("pallas_kernels_target", default=None)
_NAMES = {"cuda": "gpu", "rocm": "gpu"}


def target() -> Target:
    """That of ``interpreted``, else of the mesh that is set (its devices may be those of a topology that is not here), else the default
    backend's.
    """
    if (forced := _FORCED.get()) is not None:
        return forced
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return Target(_NAMES.get(platform, platform), False)


@contextlib.contextmanager
def interpreted(platform: str) -> Iterator[None]:
    """Trace the kernels of ``platform`` ("tpu" or "gpu") and interpret them: their numbers, without the device.

    It acts while a function is traced: a function that was jitted and called outside keeps what it was traced with.

    Raises:
        ValueError: another platform.
    """
    if platform not in ("tpu", "gpu"):
        raise ValueError(f"interpreted: `platform` is {platform!r}; expected 'tpu' or 'gpu'")
    token = _FORCED.set(Target(platform, True))
    try:
        yield
    finally:
        _FORCED.reset(token)
