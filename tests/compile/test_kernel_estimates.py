"""The TPU compiler gives estimates for kernels and for XLA's own instructions, where `scripts/tpu_estimates.py` looks for them (needs libtpu)."""

import importlib.util
import pathlib
import sys

import pytest

pytestmark = pytest.mark.compile


def test_every_pass_of_a_kernel_has_an_estimate():
    if importlib.util.find_spec("libtpu") is None:
        pytest.fail("the compile tier needs libtpu: pip install 'seqjax[tpu]'")
    path = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "tpu_estimates.py"
    spec = importlib.util.spec_from_file_location("tpu_estimates", path)
    assert spec is not None and spec.loader is not None
    estimates = importlib.util.module_from_spec(spec)
    sys.modules["tpu_estimates"] = estimates
    spec.loader.exec_module(estimates)

    unit = estimates.Unit("linear_recurrence real", 64, "bfloat16")
    (_, profile), *_ = estimates.run_units("profile", "v6e", [unit])
    (_, compiled), *_ = estimates.run_units("compile", "v6e", [unit])
    assert isinstance(profile, dict), profile
    assert isinstance(compiled, dict), compiled
    rows = estimates.estimate_rows("v6e", unit, profile, compiled)
    assert [row["pass"] for row in rows] == list(estimates.PASSES)
    for row in rows:
        # Bound by memory: an estimate below the necessary bytes, or far above them, was not read right.
        assert 1.0 <= row["over roofline"] < 3.0, row
        assert 0 < row["VMEM MiB"] < 128, row
    assert rows[0]["xla ms"] > rows[0]["roofline ms"]
