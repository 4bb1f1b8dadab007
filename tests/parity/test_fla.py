"""flash-linear-attention takes what the benchmarks hand it, and its models have the sizes of ours (needs ``pip install flash-linear-attention``)."""

import importlib
import inspect

import pytest

from seqjax import models
from seqjax.cli.bench import kernel_cases

pytestmark = pytest.mark.parity
pytest.importorskip("torch")
pytest.importorskip("fla")


@pytest.mark.parametrize("case", [case for case in kernel_cases.CASES if case.fla], ids=lambda case: case.name)
def test_the_peer_of_a_kernel_has_these_arguments(case):
    module, name, arguments = case.fla
    inputs, _ = kernel_cases.shapes(case, kernel_cases.Sizes(1, 2, 16, "float32"), 32)
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    assert {arguments[key] for key in inputs if key in arguments} <= set(parameters)
    assert {"output_final_state"} <= set(parameters)


@pytest.mark.parametrize("name", ["gated-deltanet-300m", "mamba2-300m"])
def test_the_peer_of_a_model_is_as_large(name):
    from seqjax.cli.bench import fla_models

    config = models.preset(name)
    other = fla_models.build(config, device="meta")
    assert sum(p.numel() for p in other.parameters()) == pytest.approx(models.parameter_count(config), rel=2e-3)


def test_the_peer_knows_no_other_models():
    from seqjax.cli.bench import fla_models

    with pytest.raises(NotImplementedError, match="Gated DeltaNet blocks or of Mamba-2"):
        fla_models.build(models.preset("hybrid-tiny"), device="meta")
