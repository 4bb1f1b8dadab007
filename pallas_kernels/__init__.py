"""Pallas kernels for linear recurrences on GPU and TPU: functions on arrays that import jax only.

One folder per recurrence, one file per device. ``seqjax.ops`` reaches them through ``implementation="pallas"``.
``AVAILABLE`` names the ops that have a kernel; it is empty until the first kernel lands.
"""

AVAILABLE: frozenset[str] = frozenset()
