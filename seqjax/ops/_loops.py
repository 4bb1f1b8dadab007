"""How the XLA forms loop, by platform.

On a GPU a step of a loop is a kernel launch or several, of about two microseconds each, whatever it computes; a CPU has none of that but a
cache, in which what a step works on should stay; TPUs loop in one program.
"""

from pallas_kernels import _target

UNROLL = 8
"""Steps of a loop on a GPU that are compiled as one: an elementwise state then stays in registers between them. By the bytes and launches
of what XLA makes for an H200, 8 to 16 were best for all ops; compile time grows with it."""


def platform() -> str:
    """ "cpu", "gpu" or "tpu": where what is traced will run."""
    return _target.target().platform


def unroll() -> int:
    """Steps of a loop to compile as one."""
    return UNROLL if platform() == "gpu" else 1
