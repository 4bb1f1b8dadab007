"""Process-wide settings that must precede the start of jax."""

import os
import sys

# Eight virtual CPU devices, so that sharding laws are ordinary tests; machine code is not optimised, since tiny shapes spend
# their time in the compiler (half of all processor time). Must be set before jax starts its backend. To test what users run:
# XLA_FLAGS=--xla_force_host_platform_device_count=8 bash scripts/test.sh
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")
# The compile-only TPU client must not look for the metadata server of a TPU machine.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Test processes side by side (scripts/test.sh) each load the TPU compiler.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def pytest_configure(config):
    """Only the device tier sees the accelerators of the machine."""
    tier = config.option.markexpr
    if "device" in tier and "not device" not in tier:
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if "jax" in sys.modules:  # a conftest further down was loaded before this ran
        sys.modules["jax"].config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
