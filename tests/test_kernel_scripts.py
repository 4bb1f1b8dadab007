"""The scripts that say what kernels cost and which block sizes they get read and write what they should."""

import ast
import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import _configs, interpreted
from seqjax.cli.bench import kernel_cases
from seqjax.cli.bench.op_cases import Sizes

ROOT = pathlib.Path(__file__).resolve().parents[1]

# What matters of an optimised TPU module: a loop of three trips with one of two inside it, a Pallas call, copies of no origin.
MODULE = """HloModule jit_call, is_scheduled=true

%inner_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.5 = f32[8]{0:T(256)} fusion(%p), kind=kLoop, metadata={op_name="jit(call)/transpose(jvp())/while"}, backend_config={"window_config":{"estimated_cycles":"7"}}
}

%inner_condition (p: (s32[], f32[8])) -> pred[] {
  %constant.2 = s32[]{:T(128)} constant(2)
  ROOT %lt.1 = pred[]{:T(512)} compare(%i, %constant.2), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %constant.9 = s32[]{:T(128)} constant(500)
  %fusion.1 = f32[8]{0:T(256)} fusion(%p), kind=kLoop, metadata={op_name="jit(call)/jvp(while)/mul"}, backend_config={"window_config":{"estimated_cycles":"100"}}
  %while.1 = (s32[], f32[8]{0}) while(%tuple.1), condition=%inner_condition, body=%inner_body
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(3)
  ROOT %lt.2 = pred[]{:T(512)} compare(%i, %constant.3), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %copy.1 = f32[8]{0:T(256)} copy(%x), backend_config={"window_config":{"estimated_cycles":"20"}}
  %while.2 = (s32[], f32[8]{0}) while(%tuple.2), condition=%condition, body=%body
  %kernel.1 = f32[8]{0:T(256)} custom-call(%copy.1), custom_call_target="tpu_custom_call", metadata={op_name="jit(call)/transpose(jvp())/pallas_call"}, backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"},{"memory_space":"1","offset":"4096","size":"1024"}],"bundle_analysis_data":{"estimated_cycles":"5000","flops":"0"}}
  %copy.2 = f32[8]{0:T(256)} copy(%kernel.1), backend_config={"window_config":{"estimated_cycles":"30"}}
}
"""


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def estimates():
    return script("tpu_estimates")


@pytest.fixture(scope="module")
def tuner():
    return script("tune_kernels")


def test_instructions_count_once_per_trip_and_in_their_pass(estimates):
    assert estimates.module_cycles(MODULE) == {"forward": 20 + 3 * 100, "backward": 3 * 2 * 7 + 30}


def test_the_profile_and_the_memory_of_a_call_are_read(estimates):
    assert estimates.profiled_cycles(MODULE) == 5000
    assert estimates.profiled_cycles(MODULE.replace("bundle_analysis_data", "nothing").replace('"5000"', '"0"')) == 0
    assert estimates.scoped_memory(MODULE) == 5120


def test_bundles_and_vector_spills_are_counted(estimates):
    analysis = "Schedule analysis:\n\ttotal scheduled bundles:    30\n\tnon empty scheduled bundles: 28\n"
    lines = [
        "LB: loop body",
        "   0x1   :  { %1 = sst [smem:[#allocation33_spill]] %s0 }",  # a scalar
        "  0x19 LB: > { %2 = vadd.f32 %v1, %v2 }",
        "  0x1a   : > { %3 = vst [vmem:[#allocation5_spill] sm:$0xff] %v7  ;;  %4 = vst [vmem:[#allocation6_spill]] %v8 }",
        "  0x1b   : > { %5 = vst [vmem:[%s3]] %v7 }",
    ]
    assert estimates.bundles_of(analysis, "\n".join(lines)) == {"total": 28, "bundles": 28, "spills": 1}
    inner = "  0x1c LB: >> { %6 = vadd.f32 %v1, %v2 }"
    assert estimates.bundles_of(analysis, "\n".join([*lines, inner]))["bundles"] is None


def test_the_profile_stands_in_where_bundles_do_not_count(estimates, monkeypatch):
    units = [estimates.Unit("linear_recurrence real", dim, "bfloat16") for dim in (64, 128, 256)]
    counted = {"cycles": [1.0], "note": None, "spills": 3}
    looped = {"cycles": [], "note": estimates.NONE, "spills": 4}
    bundles = {
        64: dict.fromkeys(estimates.PASSES, counted),
        128: {part: looped if part == "backward" else counted for part in estimates.PASSES},
        256: "does not compile",
    }
    profiled = dict.fromkeys(estimates.PASSES, {"cycles": [7.0], "note": "profile"})

    def run_units(kind, chip, units):
        return [(unit, bundles[unit.dim] if kind == "bundles" else profiled) for unit in units]

    monkeypatch.setattr(estimates, "run_units", run_units)
    found = {unit.dim: result for unit, result in estimates.measured("v6e", units)}
    assert found[64] == bundles[64] and found[256] == "does not compile"
    assert found[128]["forward"] == counted
    assert found[128]["backward"] == {"cycles": [7.0], "note": "profile", "spills": 4}


def test_a_row_takes_the_longer_of_cycles_and_bytes(estimates):
    unit = estimates.Unit("linear_recurrence real", 128, "bfloat16")
    info = estimates.chip_info("v5p")
    assert info.num_cores == 2
    bandwidth = info.num_cores * info.mem_bw_bytes_per_second
    calls = {"calls": ["a"], "vmem": 1 << 20, "note": None, "spills": 0}
    profile = {
        "forward": calls | {"cycles": [1.75e6], "bytes": [1]},  # a millisecond of the clock
        "training forward": calls | {"cycles": [1.0], "bytes": [0.002 * bandwidth]},
        "backward": calls | {"cycles": [0], "bytes": [1], "note": estimates.NONE},
    }
    compiled = {"around": {"forward": 1.75e6, "backward": 0}, "xla": {"forward": 7e6, "backward": 7e6}}
    ahead, trained, back = estimates.estimate_rows("v5p", unit, profile, compiled)
    assert (ahead["estimate ms"], trained["estimate ms"], back["estimate ms"]) == (
        pytest.approx(1),
        pytest.approx(2),
        None,
    )
    assert ahead["over xla"] == pytest.approx(2 / 4) and "over xla" not in trained
    # x and h in bfloat16 and the log decay in float32 of 4 x 8192 x 2048 channels, and the final state.
    least = (8 * 4 * 8192 * 2048 + 4 * 4 * 2048) / bandwidth
    assert ahead["roofline ms"] == pytest.approx(1e3 * least)
    assert ahead["over roofline"] == pytest.approx(1e-3 / least)
    goals = {goal.name.split(":")[0]: goal for goal in estimates.goals_of([ahead, trained, back])}
    assert goals["estimate over roofline"].measured == trained["over roofline"]
    assert goals["estimate over xla"].passed


def test_a_worker_that_dies_costs_one_unit(estimates, monkeypatch):
    units = [estimates.Unit("selective_scan", dim, "bfloat16") for dim in (64, 128, 256)]
    worker = (
        "import json, sys, os\n"
        "for unit in json.loads(sys.stdin.read()):\n"
        "    print(json.dumps({'begin': unit}), flush=True)\n"
        "    if unit['dim'] == 128: print('LLO_CHECK failure: no', file=sys.stderr, flush=True); os._exit(134)\n"
        "    print(json.dumps({'unit': unit, 'result': {'dim': unit['dim']}}), flush=True)\n"
    )
    monkeypatch.setattr(estimates, "worker_command", lambda kind, chip, folder: [sys.executable, "-c", worker])
    results = list(estimates.run_units("profile", "v6e", units))
    assert [unit.dim for unit, _ in results] == [64, 128, 256]
    assert [result for _, result in results] == [{"dim": 64}, "LLO_CHECK failure: no", {"dim": 256}]


def test_the_work_of_an_operation_is_its_arrays_and_its_products():
    case = kernel_cases.chosen("linear_attention none")[0]
    work = kernel_cases.work(case, Sizes(2, 3, 16, "bfloat16"), 100)
    rows = 2 * 100 * 3
    assert work["forward"].bytes == 4 * rows * 16 * 2 + 2 * 3 * 16 * 16 * 4
    assert work["forward"].products == rows * (2 * kernel_cases.CHUNK * 32 + 4 * 256)
    assert work["both"].bytes == work["forward"].bytes + work["backward"].bytes
    assert work["forward"].seconds(bandwidth=1.0, peak=1e30) == work["forward"].bytes
    assert work["forward"].seconds(bandwidth=1e30, peak=2.0) == work["forward"].products / 2


def test_the_calls_of_a_trace_are_found_and_the_choice_is_known():
    case, sizes = kernel_cases.chosen("linear_attention scalar")[0], Sizes(1, 2, 64, "float32")
    inputs, results = kernel_cases.shapes(case, sizes, 32)
    assert kernel_cases.picked(case, sizes, 32) == "xla"
    assert "this is a cpu" in str(kernel_cases.refusal(case, sizes, 32))
    with interpreted("tpu"):
        assert kernel_cases.refusal(case, sizes, 32) is None
        assert len(kernel_cases.kernels(kernel_cases.forward(case, "pallas"), inputs)) == 1
        assert len(kernel_cases.kernels(kernel_cases.both(case, "pallas"), inputs, results)) == 2


def test_candidates_are_the_heuristics_and_every_combination(tuner):
    tries = tuner.candidates("linear_attention", "gpu")
    assert tries[0] == () and len(tries) == len(set(tries)) == 1 + 3 * 2
    assert (("stages", 3), ("backward_stages", 2)) in tries
    assert tuner.candidates("linear_attention", "abacus") == [()]
    assert {kernel for kernel, _ in tuner.CANDIDATES} == set(tuner.STANDS_FOR)
    assert set(tuner.STANDS_FOR.values()) <= {case.name for case in kernel_cases.CASES}


def test_a_winner_beats_the_heuristics_clearly(tuner):
    two, three = (("stages", 2),), (("stages", 3),)
    assert tuner.winner({(): 1.0, two: 0.98, three: 1.2}) == ()
    assert tuner.winner({(): 1.0, two: 0.9, three: 0.8}) == three
    assert tuner.winner({two: 0.9, three: 0.8}) == three


def test_the_table_is_written_as_it_is_read(tuner):
    place = ("linear_attention", "TPU v6 lite", "itemsize=2 key=128 value=128")
    table = tuner.updated({}, place, (("chunk", 128), ("lockstep", 8)))
    tree = ast.parse(tuner.source(table)).body[-1]
    assert isinstance(tree, ast.AnnAssign) and tree.value is not None
    assert ast.literal_eval(tree.value) == {place: {"chunk": 128, "lockstep": 8}}
    assert tuner.updated(table, place, ()) == {}
    from pallas_kernels._tuned import TUNED

    assert tuner.source(TUNED) == (ROOT / "pallas_kernels" / "_tuned.py").read_text()


def test_a_kernel_gets_the_entry_of_its_device_and_dimensions(monkeypatch):
    kind = jax.local_devices()[0].device_kind
    entries = {("walk", kind, "key=64 value=32"): {"stages": 3}, ("walk", "another", "key=64 value=64"): {"stages": 4}}
    monkeypatch.setattr(_configs, "TUNED", entries)
    assert _configs.tuned("walk", value=32, key=64) == {"stages": 3}
    assert _configs.tuned("walk", value=64, key=64) == {} == _configs.tuned("run", value=32, key=64)
    with interpreted("gpu"):
        assert _configs.tuned("walk", value=32, key=64) == {}, "interpretation has no device"
    with _configs.override("walk", {"stages": 7}) as asked:
        assert _configs.tuned("walk", value=32, key=64) == {"stages": 7}
        assert _configs.tuned("run", value=32, key=64) == {}
        assert asked == ["key=64 value=32"]
    assert _configs.tuned("walk", value=32, key=64) == {"stages": 3}


@pytest.mark.parametrize(
    ("kernel", "fields", "name"),
    [
        ("linear_recurrence", {"channels": 128}, "_d128"),
        ("selective_scan", {"width": 128}, "_d128x"),
        ("linear_attention", {"chunk": 32, "lockstep": 2}, "_c32_h2_"),
        ("delta_rule", {"chunk": 32, "lockstep": 2}, "_c32_h2_"),
    ],
)
def test_every_tpu_kernel_takes_tuned_sizes(tuner, kernel, fields, name):
    case = next(case for case in kernel_cases.CASES if case.name == tuner.STANDS_FOR[kernel])
    inputs, _ = kernel_cases.shapes(case, Sizes(1, 4, 64, "bfloat16"), 72)
    with interpreted("tpu"), _configs.override(kernel, fields) as asked:
        calls = kernel_cases.kernels(kernel_cases.forward(case, "pallas"), inputs)
    assert asked and any(name in str(call.params["name"]) for call in calls)
    assert set(fields) <= set(tuner.CANDIDATES[kernel, "tpu"])


@pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="the GPU kernels need jax 0.11 (Python 3.12)")
@pytest.mark.parametrize(
    ("kernel", "field", "message"),
    [
        ("linear_recurrence", "tokens", "tokens must be a multiple"),
        ("linear_attention", "stages", "stages must be at least 2"),
        ("delta_rule", "stages", "stages must be at least 2"),
    ],
)
def test_gpu_kernels_take_tuned_sizes(tuner, kernel, field, message):
    """A size that cannot be is refused by the configuration, so it has got there."""
    case = next(case for case in kernel_cases.CASES if case.name == tuner.STANDS_FOR[kernel])
    inputs, _ = kernel_cases.shapes(case, Sizes(1, 4, 64, "bfloat16"), 72)
    with interpreted("gpu"), _configs.override(kernel, {field: -1}), pytest.raises(ValueError, match=message):
        jax.make_jaxpr(kernel_cases.forward(case, "pallas"))(inputs)
    assert field in tuner.CANDIDATES[kernel, "gpu"]


def test_packed_rows_have_equal_documents():
    ids = kernel_cases.packed_ids(2, 64)
    assert ids.shape == (2, 64)
    assert jnp.bincount(ids[0]).tolist() == [0] + [8] * 8
