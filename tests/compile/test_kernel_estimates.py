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

    units = [
        estimates.Unit("linear_recurrence real", 64, "bfloat16"),
        estimates.Unit("linear_attention none", 64, "bfloat16"),
    ]
    found = dict(estimates.measured("v6e", units))
    compiled = dict(estimates.run_units("xla", "v6e", units[:1]))
    for unit, notes in zip(units, ({"profile"}, {None})):  # the first has a loop in a step, so its bundles don't count
        assert isinstance(found[unit], dict), found[unit]
        rows = estimates.estimate_rows("v6e", unit, found[unit], compiled.get(unit))
        assert [row["pass"] for row in rows] == list(estimates.PASSES)
        assert {row["note"] for row in rows} == notes
        for row in rows:
            # Both are close to bound by memory: an estimate below the necessary bytes, or far above them, was not read right.
            assert 1.0 <= row["over roofline"] < 6.0, row
            assert 0 < row["VMEM MiB"] < 128, row
    rows = estimates.estimate_rows("v6e", units[0], found[units[0]], compiled[units[0]])
    assert rows[0]["xla ms"] > rows[0]["roofline ms"]
