"""Which accelerator a kernel is traced for."""

import contextlib
from collections.abc import Generator
from typing import Any, NamedTuple

import jax

_OLDEST_FOR_GPU = (0, 11)


class Target(NamedTuple):
    """Where the kernels of a trace will run."""

    platform: str
    """"tpu", "gpu" or "cpu"."""
    interpret: bool
    """Run the kernel of that platform by interpretation, on any device."""


# A context of JAX's: what is jitted or rematerialised is traced anew where it differs.
_FORCED: Any = jax.make_user_context(default_value=None)
_NAMES = {"cuda": "gpu", "rocm": "gpu"}


def target() -> Target:
    """That of ``interpreted``, else of the mesh that is set (its devices may be those of a topology that is not here), else the default
    backend's.
    """
    if (forced := _FORCED.value) is not None:
        return forced
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return Target(_NAMES.get(platform, platform), False)


def refusal() -> str | None:
    """Why no kernel runs where this is traced, or None."""
    here = target()
    if here.platform == "gpu":
        if jax.version.__version_info__ < _OLDEST_FOR_GPU:
            return f"for GPUs needs jax >= 0.11 (Python >= 3.12); this is jax {jax.__version__}"
        if not here.interpret and jax.default_backend() == "gpu":
            capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
            if not capability.startswith("9."):
                return f"is for Hopper GPUs (compute capability 9.x); this one has {capability or 'none'}"
    elif here.platform != "tpu":
        return f"runs on TPU and GPU, and this is a {here.platform}"
    return None


@contextlib.contextmanager
def interpreted(platform: str) -> Generator[None]:
    """Trace the kernels of ``platform`` ("tpu" or "gpu") and interpret them: their numbers, without the device.

    Raises:
        ValueError: another platform.
    """
    if platform not in ("tpu", "gpu"):
        raise ValueError(f"interpreted: `platform` is {platform!r}; expected 'tpu' or 'gpu'")
    with _FORCED(Target(platform, True)):
        yield


def gpu_interpreter() -> contextlib.AbstractContextManager[Any]:
    """Context in which GPU kernels are interpreted, races between threads and copies being errors."""
    from jax.experimental.pallas import mosaic_gpu

    module: Any = mosaic_gpu  # jax >= 0.11.1 has these names
    return module.force_gpu_interpret_mode(module.InterpretGPUParams(detect_races=True))
