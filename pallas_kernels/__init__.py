"""Pallas kernels for linear recurrences on GPU and TPU: functions on arrays that import jax only.

One folder per recurrence, one file per device (``gpu.py``: Mosaic GPU; ``tpu.py``: Mosaic TPU). Each folder exports the
differentiable function and ``refusal``, which says why a call has no kernel where it is traced. ``seqjax.ops`` reaches them
through ``implementation="pallas"``.

| folder | recurrence |
|---|---|
| `linear_recurrence` | h_t = a_t h_{t-1} + x_t, elementwise, real and complex |
"""

from pallas_kernels._target import Target, interpreted, target

__all__ = ["Target", "interpreted", "target"]
