"""Pallas kernels for linear recurrences on GPU and TPU: functions on arrays that import jax only.

One folder per recurrence, one file per device (``gpu.py``: Mosaic GPU; ``tpu.py``: Mosaic TPU). Each folder exports the
differentiable function and ``refusal``, which says why a call has no kernel where it is traced. ``seqjax.ops`` reaches them
through ``implementation="pallas"``.

| folder | recurrence |
|---|---|
| `linear_recurrence` | h_t = a_t h_{t-1} + x_t, elementwise, real and complex (TPU, GPU) |
| `selective_scan` | h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t^T, y_t = h_t C_t, diagonal per channel (TPU, GPU) |
| `linear_attention` | S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T: no decay, one per head or one per channel (TPU, GPU) |
| `delta_rule` | S_t = S' + beta_t k_t (v_t - S'^T k_t)^T, S' = diag(exp(g_t)) S_{t-1}; no decay, one per head or one per channel (TPU, GPU) |
"""

from pallas_kernels._target import Target, interpreted, target

__all__ = ["Target", "interpreted", "target"]
