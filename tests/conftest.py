"""Process-wide settings that must precede the start of jax."""

import os

# Eight virtual CPU devices, so that sharding laws are ordinary tests; must be set before jax starts its backend.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The compile-only TPU client must not look for the metadata server of a TPU machine.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Test processes side by side (scripts/test.sh) each load the TPU compiler.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
