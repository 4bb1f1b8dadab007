"""Written by ``scripts/tune_kernels.py``: (kernel, kind of device, dimensions) -> fields of its configuration."""

TUNED: dict[tuple[str, str, str], dict[str, int]] = {}
