"""The CUDA compiler dumps machine code where `scripts/gpu_estimates.py` looks for it.

Needs ``pip install seqjax[cuda-compile]`` and jax >= 0.11, no GPU.
"""

import importlib.metadata
import json
import pathlib
import subprocess
import sys

import jax
import pytest

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="the GPU kernels need jax 0.11 (Python 3.12)"),
]
DISASSEMBLER = "nvidia-cuda-nvdisasm"  # no part of jax[cuda13]
ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_every_pass_of_a_kernel_has_an_estimate(tmp_path):
    """In a process of its own: where the compiler dumps to is settled when it is first used."""
    if not importlib.metadata.entry_points(group="jax_plugins"):
        pytest.fail("compiling for GPUs needs the CUDA plugin: pip install 'seqjax[cuda-compile]'")
    if not any(found.metadata["Name"] == DISASSEMBLER for found in importlib.metadata.distributions()):
        pytest.fail(f"needs the disassembler: pip install {DISASSEMBLER}")
    out = tmp_path / "estimates.json"
    command = ["scripts/gpu_estimates.py", "--only", "linear_attention none", "--dims", "128", "--out", str(out)]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    result = json.loads(out.read_text())
    assert result["command"].startswith("python scripts/gpu_estimates.py --only")
    assert [row["pass"] for row in result["rows"]] == ["forward", "training forward", "backward"]
    for row in result["rows"]:
        # Close to bound by memory, with one walk per head and block of values: below the bound it was not read right.
        assert 1.0 <= row["over roofline"] < 10.0, row
        ((name, call),) = row["calls"].items()
        assert name.startswith("linear_attention_") and call["spills"] == 0 and "guessed" not in call
        assert call["loop"]["trips"] == 8192 // 64
        # Scores, read and write of a chunk of 64 x 128 in products of 64 x 64 x 16, at least.
        assert call["loop"]["kinds"]["tensor"] >= 20
        assert max(call["ms"].values()) <= row["kernels ms"] * 1.001
