"""The scripts that say what kernels cost and which block sizes they get read and write what they should."""

import ast
import dataclasses
import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import _configs, interpreted
from seqjax.cli.bench import estimates as estimates_module
from seqjax.cli.bench import kernel_cases
from seqjax.cli.bench.op_cases import Sizes
from seqjax.cli.bench.report import Report

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


# A loop of three trips, in which the first warpgroup makes a product and all wait for a copy; the end of that wait is out of line.
SASS = """
	.section	.text.kernel,"ax",@progbits
.text.kernel:
   -:-:1:Y:02        /*0000*/                   S2R R0, SR_TID.X
   -:-:-:Y:01        /*0010*/                   UMOV UR4, URZ
   1:-:-:-:05        /*0020*/                   SHF.R.U32.HI R0, RZ, 0x7, R0
   -:-:-:Y:05        /*0030*/                   ISETP.NE.U32.AND P1, PT, R0, RZ, PT
   -:0:-:Y:01        /*0040*/              @!P3 UTMALDG.3D [UR16], [UR22]
.L_x_1:
   -:-:3:Y:02        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR25], R13
   3:-:-:Y:05        /*0060*/              @!P2 BRA `(.L_x_0)
.L_x_3:
   -:-:2:Y:01        /*0070*/                   LDS R4, [R2]
   -:-:-:-:06        /*0080*/                   UIADD3 UR4, UP1, UR4, 0x1, URZ
 2&3:-:-:-:04        /*0090*/                   FFMA R4, R4.reuse, R4, R4
   -:-:-:-:06        /*00a0*/                   UISETP.NE.U32.AND UP0, UPT, UR4, 0x3, UPT
   -:-:-:-:13        /*00b0*/                   PLOP3.LUT P0, PT, PT, PT, UP0, 0x80, 0x0
   -:-:-:Y:05        /*00c0*/               @P1 BRA `(.L_x_2)
   -:-:-:Y:01        /*00d0*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24
   -:-:-:Y:01        /*00e0*/                   HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR8], R24, gsb0
   -:-:-:Y:02        /*00f0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0
.L_x_2:
   -:-:-:Y:05        /*0100*/               @P0 BRA `(.L_x_1)
   -:-:-:Y:05        /*0110*/                   EXIT
.L_x_0:
   -:-:-:Y:05        /*0120*/                   BRA `(.L_x_3)
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
def gpu():
    return script("gpu_estimates")


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


def test_a_warp_goes_the_way_of_its_thread(gpu):
    program = gpu.parse(SASS)
    assert program[0].writes == 1 and program[2].waits == (1,) and program[9].waits == (2, 3) and program[4].reads == 0
    first, second = (gpu.follow(program, thread, (0, 0, 0)) for thread in (0, 128))
    assert first.loop == second.loop == (5, 16, 3) and not first.guessed
    assert first.executed[13:16] == [3, 3, 3] and second.executed[13:16] == [0, 0, 0]
    assert first.executed[18] == 0, "the wait succeeds"
    kinds = first.count(5, 17)
    assert kinds["tensor"] == 6 and kinds["smem"] == 3 and kinds["fma"] == 3 and kinds["control"] == 9
    # Before the loop: the thread's number arrives on a scoreboard, 18 cycles after the move behind it has issued; and the copy takes its slot.
    start = gpu.LATENCY["S2R"] + 5 + 5 + 1
    # The first wait is until the copy is there; other copies are not started, so that it is there from then on.
    wait = gpu.LATENCY["SYNCS"] + 5
    load = 4 + gpu.LATENCY["LDS"] + 4  # the pipe and the latency; what the increment takes is within them
    rest = 6 + 13 + 5
    product = 32 + 32 + gpu.LATENCY["HGMMA"] + 2
    trip = wait + load + rest + product + 5
    assert first.cycles == start - 1 + gpu.COPY_IN + 3 * trip + 5
    assert second.cycles == first.cycles - 3 * product
    assert first.lost["wgmma"] == 3 * (product - 4) and first.lost["copies in"] == gpu.COPY_IN - 1
    longer = gpu.follow(gpu.parse(SASS.replace("UR4, 0x3, UPT", "UR4, 0x5, UPT")), 0, (0, 0, 0))
    assert longer.loop == (5, 16, 5) and longer.cycles == first.cycles + 2 * trip
    endless = SASS.replace("UR4, 0x3, UPT", "UR9, 0x3, UPT")
    assert gpu.follow(gpu.parse(endless), 0, (0, 0, 0)).guessed
    with pytest.raises(ValueError, match="no instruction"):
        gpu.parse("nothing")


def test_instructions_take_their_units(gpu):
    program = gpu.parse(SASS)
    assert program[13].units == {"issue": 1, "tensor": 32, "smem": 32}
    assert program[14].units == {"issue": 1, "tensor": 32, "smem": 16}, "the first operand is in registers"
    assert program[7].units == {"issue": 1, "smem": 4}
    line = "   -:-:-:Y:01        /*0000*/                   {} R4, R5 \n"
    for opcode, units in (
        ("LDS.64", {"smem": 8}),
        ("LDSM.16.M88.4", {"smem": 16}),
        ("MUFU.EX2", {"mufu": 8}),
        ("ISETP.NE.U32.AND", {"alu": 2}),
        ("IMAD.MOV.U32", {"imad": 2}),
        ("FFMA", {"fma": 1}),
        ("R2UR", {}),
    ):
        assert gpu.parse(line.format(opcode))[0].units == {"issue": 1} | units
    trace = gpu.follow(program, 0, (0, 0, 0))
    assert trace.units["tensor"] == 6 * 32 and trace.units["smem"] == 3 * (4 + 32 + 16)
    assert trace.units["issue"] == sum(trace.executed) + sum(trace.skipped) == 5 + 3 * 12 + 1


def test_integers_that_decide_are_computed(gpu):
    def value(text, **registers):
        line = gpu.parse(f"   -:-:-:Y:01        /*0000*/                   {text} \n")[0]
        read = {"RZ": 0, "PT": True, "!PT": False, "URZ": 0, "UPT": True} | registers
        return gpu.result(
            line, lambda name: read.get(name, int(name, 16) if name[:2] == "0x" else None), 133, (1, 2, 3)
        )

    assert value("S2R R0, SR_TID.X") == 133 and value("S2UR UR0, SR_CTAID.Z") == 3
    assert value("HFMA2.MMA R0, -RZ, RZ, 0, 2.384185791015625e-07") == 4
    assert value("IADD3 R0, P3, R1, 0x30, RZ", R1=2) == 0x32 and value("IADD3 R0, P3, R1, 0x30, RZ") is None
    assert value("LOP3.LUT R0, R1, R2, RZ, 0x3c, !PT", R1=5, R2=3) == 6
    assert value("LOP3.LUT P0, RZ, R1, 0x1, RZ, 0xc0, !PT", R1=5) is True
    assert value("ISETP.GT.AND P0, PT, R1, 0x5, PT", R1=0xFFFFFFFF) is False, "signed"
    assert value("ISETP.GT.U32.AND P0, PT, R1, 0x5, PT", R1=0xFFFFFFFF) is True
    assert value("ISETP.NE.AND.EX P0, PT, R1, RZ, PT, P1", R1=0, P1=True) is True, "the lower halves differ"
    assert value("ISETP.NE.AND P0, PT, R1, RZ, P1", P1=False) is False, "whatever R1 is"
    assert value("ISETP.NE.OR P0, PT, R1, RZ, P1", P1=False) is None
    assert value("PLOP3.LUT P0, PT, PT, P1, PT, 0x80, 0x0", P1=False) is False
    assert value("SHF.R.S32.HI R0, RZ, 0x1, R1", R1=0xFFFFFFFE) == 0xFFFFFFFF


def test_a_kernel_takes_what_holds_it_back(gpu):
    launch = [
        "    %c4 = arith.constant 4 : index loc(#loc)",
        "    %c33 = arith.constant 33 : index loc(#loc)",
        "    %c1 = arith.constant 1 : index loc(#loc)",
        "    %c256 = arith.constant 256 : index loc(#loc)",
        "    %size = arith.constant 110000 : i32 loc(#loc)",
        "    %3 = gpu.launch async [%2] blocks(%4, %5, %6) in (%7 = %c4, %8 = %c33, %9 = %c1) "
        "threads(%a, %b, %c) in (%d = %c256, %e = %c1, %f = %c1) dynamic_shared_memory_size %size {",
    ]
    shape = gpu.launch_of(launch)
    assert shape == {"grid": (4, 33, 1), "threads": 256, "shared": 110000}
    kernel = gpu.Kernel.of(shape, "Used 120 registers\n0 bytes spill stores, 8 bytes spill loads", SASS)
    assert (kernel.blocks, kernel.registers, kernel.spills, kernel.resident) == (132, 120, 8, 2)
    first, second = kernel.traces
    assert kernel.units["issue"] == first.units["issue"] + second.units["issue"]
    seconds = kernel.seconds(hertz=1.0, traffic=2 * gpu.BANDWIDTH)
    assert seconds["latency"] == first.cycles and seconds["hbm"] == 2
    assert seconds["tensor"] == 6 * 32 < seconds["latency"]
    more = dataclasses.replace(kernel, grid=(4, 33, 3))  # three on a multiprocessor, two of them at a time
    assert more.seconds(1.0, 0)["latency"] == 2 * first.cycles and more.seconds(1.0, 0)["tensor"] == 3 * 6 * 32
    crowded = dataclasses.replace(kernel, registers=129, shared=1000)
    assert crowded.resident == 1, "256 threads of 136 registers"


def test_what_xla_launches_is_counted_per_trip_and_pass(gpu):
    module = MODULE.replace("tpu_custom_call", "mosaic_gpu_v2").replace(
        'pallas_call"}, backend_config={"used', 'a_kernel/mpmd_map"}, backend_config={kernel_hash = "h", "used'
    )
    module = module.replace(
        "condition=%condition, body=%body", 'condition=%condition, body=%body, {"known_trip_count":{"n":"3"}}'
    ).replace("kind=kLoop", "kind=kLoop, calls=%double")
    double = [
        "%double (q: f32[8]) -> f32[8] {",
        "  %q = f32[8]{0} parameter(0)",
        "  ROOT %add.7 = f32[8]{0} add(%q, %q)",
        "}",
    ]
    found = gpu.launches(module.replace("\n\n", "\n\n" + "\n".join(double) + "\n\n", 1))
    assert [(entry.name, entry.times, entry.backward, entry.bytes) for entry in found] == [
        ("", 1, False, 32 + 0),
        ("", 3, False, 64),
        ("", 3, True, 64),
        ("a_kernel", 1, True, 64),
        ("", 1, True, 64),
    ]
    assert [entry.key for entry in found] == ["", "", "", "h", ""]


def test_a_fused_computation_reads_slices_and_writes_parts(gpu):
    lines = """
  %all = bf16[8,16,4]{2,1,0} parameter(0)
  %place = s32[] parameter(1)
  %other = f32[4,32]{1,0} parameter(2)
  %results = f32[8,16,32]{2,1,0} parameter(3)
  %whole = f32[16,32]{1,0} parameter(4)
  %some = bf16[1,16,4]{2,1,0} dynamic-slice(%all, %place, %zero, %zero), dynamic_slice_sizes={1,16,4}
  %side = bf16[16,4]{1,0} bitcast(%some)
  %right = bf16[4,32]{1,0} convert(%other)
  %dot.1 = f32[16,32]{1,0} dot(%side, %right), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %sum = f32[16,32]{1,0} add(%dot.1, %whole)
  %part = f32[1,16,32]{2,1,0} bitcast(%sum)
  %written = f32[8,16,32]{2,1,0} dynamic-update-slice(%results, %part, %place, %zero, %zero)
  ROOT %both = (f32[8,16,32]{2,1,0}, f32[16,32]{1,0}) tuple(%written, %sum)
""".splitlines()[1:]
    part = 16 * 32 * 4
    # A slice, its place twice but an array only once, a whole operand each of the product and the sum; two results.
    assert gpu.fused_work(lines) == (16 * 4 * 2 + 4 + 4 * 32 * 4 + part + 2 * part, 2 * 16 * 32 * 4)


def test_gpu_rows_add_what_xla_does_and_name_the_bound(gpu):
    kernel = gpu.Kernel((132, 1, 1), 128, 100, 0, 1000, (gpu.follow(gpu.parse(SASS), 0, (0, 0, 0)),))
    slow = gpu.Launch("walk_forward_k128", "h", int(0.001 * gpu.BANDWIDTH), False)
    around = gpu.Launch("", "", int(0.0005 * gpu.BANDWIDTH), False, times=2)
    entry = {part: [(slow, kernel), (around, None)] for part in gpu.PASSES}
    case = kernel_cases.chosen("linear_attention scalar")[0]
    without = {part: [(dataclasses.replace(around, times=6), None)] for part in gpu.PASSES}
    ahead, trained, back = gpu.estimate_rows(case, 128, [entry] * 3, without, 1e9)
    assert (ahead["xla form ms"], ahead["xla form over whole"]) == (pytest.approx(3), pytest.approx(1.5))
    assert (ahead["kernels ms"], ahead["xla ms"], ahead["launches"]) == (pytest.approx(1), pytest.approx(1), 3)
    assert ahead["bounds"] == "xla 50%, forward 50% hbm" and ahead["T=32768 ms"] == pytest.approx(2)
    assert ahead["over roofline"] == pytest.approx(ahead["whole ms"] / ahead["roofline ms"])
    assert ahead["published ms"] == pytest.approx(1.147 / 2) and ahead["over published"] == pytest.approx(
        2 / (1.147 / 2)
    )
    assert "published ms" not in trained
    assert back["over published"] == pytest.approx(4 / (4.524 / 2)), "forward and backward"
    assert gpu.limits(back)["over published"] == 0.6
    assert ahead["calls"]["walk_forward_k128"]["loop"]["trips"] == 3


def test_a_run_of_a_part_keeps_the_other_rows(tmp_path):
    options = estimates_module.Options(tmp_path / "rows.json")
    assert estimates_module.earlier(options) == []
    old = [{"kernel": "selective_scan", "pass": part, "dim": 64, "ms": 1.0} for part in ("forward", "backward")]
    estimates_module.write(Report("suite", "title", old, []), options)
    fresh = [
        {"kernel": "selective_scan", "pass": "backward", "dim": 64, "ms": 2.0},
        {"kernel": "linear_recurrence real", "pass": "backward", "dim": 64, "ms": 3.0},
    ]
    rows = estimates_module.merged(
        fresh, estimates_module.earlier(options), ("kernel", "dim", "pass"), ("forward", "backward")
    )
    assert [row["ms"] for row in rows] == [3.0, 1.0, 2.0]
    goals = estimates_module.goals(rows, ("kernel", "pass"), lambda row: {"ms": 2.5, "missing": 1.0})
    assert [goal.passed for goal in goals] == [False] and "worst of 3 is linear_recurrence" in goals[0].name


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
