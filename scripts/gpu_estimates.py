"""What the kernels would cost on an H200 that is not here, by a model of their machine code.

    python scripts/gpu_estimates.py                             all kernels: three quarters of an hour on two cores
    python scripts/gpu_estimates.py --only delta_rule --dims 128

Needs ``pip install seqjax[cuda-compile]`` and jax >= 0.11, no GPU. The real compiler makes every call for an H200. Of each of its
Mosaic kernels one warp per warpgroup is then followed through the machine code, with thread 0 of a block in the middle of the grid: integers
that decide branches are computed, so loops run as often as they would. Gives

- instructions, and the cycles for which a block occupies each unit of a multiprocessor (``UNITS``);
- latency, the cycles that a block takes alone: an instruction issues in order, after those before it by their stall counts (a part of the
  encoding), when the scoreboards that it waits on are free (``LATENCY``) and its unit is; wgmma, copies of TMA and their barriers as ``Clock`` says.

A kernel takes the longest of: cycles of a unit times the blocks that a multiprocessor gets; latency times the rounds that it runs them in; bytes of
its operands and results / bandwidth. What XLA does around the kernels: bytes that its instructions read and write / bandwidth or operations of their
products / peak, at least ``LAUNCH`` each; and the same for the XLA form of the operation, which leaves out what else bounds it, and what of its bytes
stays in the cache. Roofline: the work the operation cannot do without (``seqjax.cli.bench.kernel_cases``).

Not modelled: bank conflicts, caches, warps of a scheduler in each other's way (but for the sums), what a loaded memory adds to latencies, the
clock's dependence on power, the start of blocks. Nothing here has been compared with a GPU: read ratios, not times.
"""

import collections
import dataclasses
import functools
import itertools
import math
import operator
import os
import pathlib
import re
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

# Compile only: the plugin must not look for a GPU or its driver.
os.environ["JAX_PLATFORMS"] = "cpu"

from seqjax.cli.bench import estimates, kernel_cases
from seqjax.cli.bench.estimates import H200, HEADS, Row
from seqjax.cli.bench.kernel_cases import KernelCase
from seqjax.cli.bench.op_cases import Sizes
from seqjax.cli.bench.report import Report

OUT = pathlib.Path(os.path.relpath(pathlib.Path(__file__).parents[1] / "experiments/benchmarks/gpu_estimates.json"))
SMS, SHARED_MEMORY, REGISTERS, THREADS, BLOCKS = 132, 233472, 65536, 2048, 32
"""Multiprocessors of an H200, and what one of them has; 1 KiB of the shared memory is lost to every block."""
BANDWIDTH, PEAK = 4.3e12, 780e12
"""Bytes/s of a copy and bfloat16 operations/s of a large product, as measured on an H200 before."""
LAUNCH = 2e-6
"""Seconds that a kernel takes at least."""
SETTINGS = ((4, 8192), (16, 2048), (1, 32768))
"""Rows and T: 32768 tokens each; the first one is the one that is shown in full."""
PASSES = ("forward", "training forward", "backward")

# --- The machine: cycles of a multiprocessor (four schedulers, one warp of a warpgroup on each) ---

LANES = {"issue": 32, "fma": 32, "imad": 16, "alu": 16, "mufu": 4}
"""Lanes of a scheduler's unit, and so 32 / lanes cycles per warp (CUDA programming guide, arithmetic instructions, compute capability 9.0)."""
UNITS = (*LANES, "smem", "tensor")
SHARED_BYTES, TENSOR_FLOPS = 128, 4096
"""Per cycle and multiprocessor."""
OPCODES = {
    "fma": "FADD FMUL FFMA HADD2 HFMA2 HMUL2",
    "imad": "IMAD",
    "alu": "IADD3 IABS LOP3 ISETP FSETP SEL FSEL FMNMX VIMNMX IMNMX PRMT SHF LEA MOV VIADD F2FP PLOP3 P2R R2P BREV POPC CS2R",
    "mufu": "MUFU F2F F2I I2F I2FP FRND FLO",
    "smem": "LDS STS LDSM STSM SHFL",
    "tensor": "HGMMA",
}
UNIT = {opcode: unit for unit, opcodes in OPCODES.items() for opcode in opcodes.split()}
KINDS = {
    "copy": "UTMALDG UTMASTG UBLKCP UTMACMDFLUSH UTMACCTL UTMAREDG UTMAPF",
    "sync": "BAR SYNCS MEMBAR FENCE DEPBAR WARPGROUP WARPSYNC CCTL ERRBAR NANOSLEEP ELECT",
    "global": "LD ST LDG STG RED REDG ATOM ATOMG",
    "control": "BRA EXIT BSSY BSYNC NOP YIELD CALL RET BREAK",
}
KIND = UNIT | {opcode: kind for kind, opcodes in KINDS.items() for opcode in opcodes.split()}
"""What instructions are counted as: their unit, or one of these; else "uniform" (the scalar unit and moves to and from it)."""
LATENCY = {
    "LDS": 30, "LDSM": 33, "STS": 20, "STSM": 20, "SHFL": 25, "MUFU": 20, "F2F": 20, "F2I": 20, "I2F": 20, "S2R": 20, "S2UR": 20,
    "LDC": 30, "LD": 600, "LDG": 600, "ATOM": 600, "ATOMG": 600, "MEMBAR": 20, "FENCE": 20, "SYNCS": 20, "HGMMA": 30,
}  # fmt: skip
"""Cycles from the issue of an instruction to the release of the scoreboard of its result (wgmma: from its end)."""
READ = 20
"""The same for the scoreboard of its operands."""
MEET = 25
"""Cycles of a barrier of warps that arrive together."""
COPY_IN, COPY_OUT = 600, 300
"""Cycles from the start of a copy of TMA to the arrival of the data, and until its source in shared memory has been read."""


@dataclasses.dataclass(frozen=True)
class Options(estimates.Options):
    """Static estimates of the Pallas kernels for a GPU that is not here."""

    out: pathlib.Path | None = OUT
    """JSON file; rows of other runs that this one does not repeat stay in it."""
    clock_ghz: float = 1.755
    """Clock of the multiprocessors under load."""


# --- Machine code ---


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of the disassembly."""

    guard: str
    """Predicate under which it is executed, "!" before it if it is to be false; "" if always."""
    opcode: str
    operands: tuple[str, ...]
    stall: int
    """Cycles before the next instruction of the warp."""
    waits: tuple[int, ...]
    """Scoreboards that it waits on."""
    reads: int | None
    """Scoreboard that is released when it has read its operands."""
    writes: int | None
    """Scoreboard that is released when it has its result."""
    target: int | None = None
    """Index of the instruction to which it branches."""

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def kind(self) -> str:
        """As in ``KIND``."""
        return KIND.get(self.name, "uniform")

    def has(self, *modifiers: str) -> bool:
        """All the modifiers."""
        return set(modifiers) <= set(self.opcode.split(".")[1:])

    @functools.cached_property
    def units(self) -> dict[str, float]:
        """Cycles of the multiprocessor's units that it takes in all four warps of a warpgroup."""
        unit = UNIT.get(self.name)
        cycles = {"issue": 1.0}
        if unit in LANES:
            cycles[unit] = 32 / LANES[unit]
        elif unit == "tensor":
            rows, columns, depth = map(int, re.findall(r"\d+", self.opcode.split(".")[1]))
            cycles["tensor"] = 2 * rows * columns * depth / TENSOR_FLOPS
            # Operands in shared memory, bfloat16; the first may be in registers.
            shared = columns + rows * self.operands[1].startswith("gdesc")
            cycles["smem"] = 2 * depth * shared / SHARED_BYTES
        elif unit == "smem":
            if self.name in ("LDSM", "STSM"):
                size = 4 * int(self.opcode.split(".")[3]) if self.opcode.count(".") > 2 else 4
            else:
                size = next((bits // 8 for bits in (128, 64) if self.has(str(bits))), 4)
            cycles["smem"] = 4 * 32 * size / SHARED_BYTES
        return cycles


LINE = re.compile(r"\s*(\S+):(.):(.):(.):(\d+)\s+/\*[0-9a-f]+\*/\s+(?:@(!?U?P[T\d])\s+)?([A-Z]\w*[\w.]*)\s*(.*?)\s*$")


def parse(text: str) -> list[Instruction]:
    """The instructions of a kernel in a ``.sass_ctrl`` dump: "waits:read scoreboard:written one:yield:stall /*address*/ instruction"."""
    lines, labels, targets = [], {}, []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif found := LINE.match(line):
            waits, reads, writes, _, stall, guard, opcode, rest = found.groups()
            if waits.startswith("0x"):
                waiting = tuple(i for i in range(6) if int(waits, 16) >> i & 1)
            else:
                waiting = tuple(int(i) for i in waits.split("&") if i != "-")
            operands = tuple(part.strip() for part in rest.split(",")) if rest else ()
            scoreboards = [None if i == "-" else int(i) for i in (reads, writes)]
            lines.append(Instruction(guard or "", opcode, operands, int(stall), waiting, *scoreboards))
            targets.append(re.search(r"`\((\.L_x_\d+)\)", rest))
    if not lines:
        raise ValueError("text: no instruction with control bits in it")
    return [
        dataclasses.replace(line, target=labels[target[1]] if target else None) for line, target in zip(lines, targets)
    ]


MASK = 0xFFFFFFFF
PREDICATE = re.compile(r"!?U?P[T\d]")
NO_RESULT = {"ST", "STS", "STSM", "STG", "RED"}
Value = int | bool | None


def destinations(line: Instruction) -> list[str]:
    """Registers and predicates that it writes, rather too many of them than too few; first that of ``result``."""
    if line.name in NO_RESULT or line.kind in ("copy", "control") or not line.operands:
        return []
    if line.name == "R2P":
        return [f"P{i}" for i in range(7)]
    predicates = [part for part in line.operands[:3] if re.fullmatch(r"U?P\d", part)]
    first = next((part for part in line.operands[:2] if re.fullmatch(r"U?R\d+", part)), None)
    if first is None:
        return predicates
    width = 1
    if line.name == "HGMMA":
        width = int(re.findall(r"\d+", line.opcode)[1]) // 2
    elif line.name == "LDSM" or line.has("128"):
        width = 4
    elif line.has("64") or line.has("WIDE") or (line.name == "CS2R" and not line.has("32")):
        width = 2
    prefix, number = first.rstrip("0123456789"), int(first.lstrip("UR"))
    registers = [f"{prefix}{number + i}" for i in range(width)]
    return (
        predicates + registers
        if PREDICATE.fullmatch(line.operands[0]) and line.name != "SHFL"
        else registers + predicates
    )


def signed(value: int) -> int:
    """A 32-bit pattern as an integer."""
    return value - (1 << 32) if value >> 31 else value


TERMS = {"MOV": 1, "R2UR": 1, "IMAD": 3, "IADD3": 3, "VIADD": 2, "LOP3": 3, "SHF": 3, "LEA": 3, "SEL": 3}
"""Operands of the instructions that ``result`` knows."""


def result(line: Instruction, read: Callable[[str], Any], thread: int, block: tuple[int, int, int]) -> Value:
    """What an integer or logical instruction gives; None if that is not known."""
    name, operands = line.name.removeprefix("U"), line.operands
    if line.name in ("S2R", "S2UR"):
        source = operands[1]
        return thread if source == "SR_TID.X" else block["XYZ".index(source[-1])] if "CTAID" in source else None
    if name == "CS2R":
        return 0 if operands[1] == "SRZ" else None
    if name == "HFMA2":  # a constant made of two halves
        if operands[1].lstrip("-") != "RZ" or operands[2] != "RZ":
            return None
        return struct.unpack("<I", struct.pack("<ee", float(operands[4]), float(operands[3])))[0]
    if name == "SHFL":
        return read(operands[2])
    if name == "PLOP3":
        choices = [(0, 1) if value is None else (value,) for value in map(read, operands[2:5])]
        found = {int(operands[5], 16) >> (a << 2 | b << 1 | c) & 1 for a, b, c in itertools.product(*choices)}
        return bool(found.pop()) if len(found) == 1 else None
    if name == "ISETP":
        return _comparison(line, *map(read, operands[2:]))

    if name not in TERMS or line.has("X") or line.has("64") or line.has("U64") or (line.has("HI") and name != "SHF"):
        return None
    # Predicates before the result are results too, those after it carries.
    first = next(i for i, part in enumerate(operands) if not PREDICATE.fullmatch(part))
    first += 1 + sum(bool(PREDICATE.fullmatch(part)) for part in operands[first + 1 : first + 3])
    values = [read(part) for part in operands[first : first + TERMS[name]]]
    if None in values:
        return None
    a, b, c = (*values, 0, 0)[:3]
    if name == "LOP3":
        table = next(int(part, 16) for part in reversed(operands) if part.startswith("0x"))
        terms = [(a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8) if table >> i & 1]
        bits = functools.reduce(operator.or_, terms, 0) & MASK
        return bool(bits) if PREDICATE.fullmatch(operands[0]) else bits
    if name == "SHF":
        if line.has("L"):
            return a << b & MASK
        return (signed(c) if line.has("S32") else c) >> b & MASK
    if name == "SEL":
        return a if c else b
    if name == "LEA":
        return (a << c) + b & MASK
    return (a * b + c if name == "IMAD" else a + b + c) & MASK


def _comparison(line: Instruction, a: Value, b: Value, other: Value, lower: Value = None) -> Value:
    """Of two integers, and with another predicate."""
    outcome: Value = None
    if a is not None and b is not None:
        if not line.has("U32"):
            a, b = signed(a), signed(b)
        compare = {"EQ": a == b, "NE": a != b, "LT": a < b, "LE": a <= b, "GT": a > b, "GE": a >= b}
        # Of upper halves: the lower ones decide if these are equal.
        outcome = lower if line.has("EX") and a == b else compare[line.opcode.split(".")[1]]
    stronger = line.has("OR")  # the value that decides alone
    if stronger in (outcome, other):
        return stronger
    return None if None in (outcome, other) else not stronger


# --- Time ---


class Clock:
    """Cycles of one warp, its place in the queue of every unit, and what it waited for.

    wgmma run one after the other and are waited for by groups; copies out are waited for by groups, oldest first. A wait for a barrier
    in shared memory takes until ``COPY_IN`` after the last copy that was started before the warp waited at the same place before: what two slots
    in turns come to.
    """

    def __init__(self):
        self.now = 0.0
        self.lost: dict[str, float] = collections.defaultdict(float)
        self._free: dict[str, float] = collections.defaultdict(float)
        self._scoreboards = [(0.0, "")] * 6
        self._groups: list[float] = []
        self._stores: list[float] = []
        self._copied = -math.inf
        self._waited: dict[int, float] = {}

    def _until(self, time: float, why: str):
        if time > self.now:
            self.lost[why] += time - self.now
            self.now = time

    def issue(self, place: int, line: Instruction, executed: bool):
        """The next instruction, at that place of the code; one whose guard is false takes its slot only."""
        for i in line.waits:
            self._until(*self._scoreboards[i])
        name = line.name
        end = self.now
        if executed:
            for unit, cycles in line.units.items():
                if unit not in ("issue", "tensor", "smem"):
                    self._until(self._free[unit], unit)
                    self._free[unit] = self.now + cycles
            if line.kind in ("smem", "tensor"):
                # Queued: the warp goes on.
                end = max(self.now, self._free[line.kind]) + max(line.units["smem"], line.units.get("tensor", 0))
                self._free[line.kind] = end
                if line.operands[-1] == "gsb0":
                    self._groups.append(end + LATENCY["HGMMA"])
            elif line.opcode.startswith("WARPGROUP.DEPBAR"):
                self._groups = self._wait_groups(self._groups, line, "wgmma")
            elif line.opcode.startswith("DEPBAR"):
                self._stores = self._wait_groups(self._stores, line, "copies out")
            elif name == "UTMACMDFLUSH":
                self._stores.append(self.now + COPY_OUT)
            elif name == "UTMALDG" or line.opcode.startswith("UBLKCP.S"):
                self._copied = self.now
            elif line.opcode.startswith("SYNCS.PHASECHK"):
                self._until(self._waited.get(place, self._copied) + COPY_IN, "copies in")
                self._waited[place] = self._copied
            elif name == "BAR" and line.has("SYNC"):
                self.now += MEET
                self.lost["barriers"] += MEET
        end = max(end, self.now)
        if line.writes is not None:
            self._hold(line.writes, end + LATENCY.get(name, READ), line)
        if line.reads is not None:
            self._hold(line.reads, end + READ, line)
        stall = max(line.stall, 1)
        self.lost["issue"] += stall
        self.now += stall

    def _hold(self, scoreboard: int, time: float, line: Instruction):
        self._scoreboards[scoreboard] = max(self._scoreboards[scoreboard], (time, f"{line.name} ({line.kind})"))

    def _wait_groups(self, groups: list[float], line: Instruction, why: str) -> list[float]:
        left = int(line.operands[1], 16)
        for time in groups[: len(groups) - left]:
            self._until(time, why)
        return groups[len(groups) - left :] if left else []


@dataclasses.dataclass(frozen=True)
class Trace:
    """A warp's way through a kernel."""

    program: list[Instruction]
    executed: list[int]
    """Times that every instruction was."""
    skipped: list[int]
    """Times that every instruction was met with a false guard."""
    jumps: dict[tuple[int, int], int]
    """Times that it went back to a place from another one."""
    guessed: bool
    """Whether a branch back other than that of a wait depended on what is not known, and was taken not to be taken."""
    cycles: float
    lost: dict[str, float]
    """Cycles by what the warp spent them on."""

    @functools.cached_property
    def units(self) -> dict[str, float]:
        """Cycles of every unit."""
        total: dict[str, float] = collections.defaultdict(float, issue=sum(self.skipped))
        for line, times in zip(self.program, self.executed):
            for unit, cycles in line.units.items():
                total[unit] += times * cycles
        return dict(total)

    def count(self, start: int = 0, stop: int | None = None) -> dict[str, int]:
        """Instructions met in a part of the code by kind, most first."""
        kinds: collections.Counter = collections.Counter()
        met = zip(self.program[start:stop], self.executed[start:stop], self.skipped[start:stop])
        for line, executed, skipped in met:
            kinds[line.kind] += executed + skipped
        return {kind: times for kind, times in kinds.most_common() if times}

    @property
    def loop(self) -> tuple[int, int, int] | None:
        """First and last instruction and trips of the loop in which most instructions are executed; None without loops."""
        sizes = {(start, end): sum(self.count(start, end + 1).values()) for start, end in self.jumps}
        if not sizes:
            return None
        start, end = max(sizes, key=lambda loop: sizes[loop])
        return start, end, self.jumps[start, end] + 1


STEPS = 20_000_000


def decisive(program: list[Instruction]) -> list[bool]:
    """Which instructions write what branches and guards depend on."""
    needed, writes = set(), [destinations(line) for line in program]
    sources = [
        set(re.findall(r"\bU?[RP]\d+\b", " ".join((line.guard, *line.operands))))
        if line.kind in ("alu", "imad", "uniform") or line.name in ("SHFL", "HFMA2")
        else set()
        for line in program
    ]
    for line in program:
        if line.target is not None or line.name == "EXIT":
            needed |= set(re.findall(r"U?P\d", " ".join((line.guard, *line.operands))))
    while True:
        before = len(needed)
        for written, read in zip(writes, sources):
            if needed & set(written):
                needed |= read
        if len(needed) == before:
            return [bool(needed & set(written)) for written in writes]


def follow(program: list[Instruction], thread: int, block: tuple[int, int, int]) -> Trace:
    """The way of a thread's warp. A branch on what is not known is not taken: a wait succeeds, a loop ends.

    Args:
        program: of the kernel.
        thread: its number in the block.
        block: of the grid.

    Raises:
        RuntimeError: no end within ``STEPS`` instructions.
    """
    decides, writes = decisive(program), [destinations(line) for line in program]
    values: dict[str, Any] = {"RZ": 0, "URZ": 0, "PT": True, "UPT": True}

    @functools.cache
    def constant(text: str) -> int | None:
        return int(text, 16) & MASK if re.fullmatch(r"-?0x[0-9a-f]+", text) else None

    def read(text: str) -> Any:
        if (value := constant(text)) is not None:
            return value
        text = text.removesuffix(".reuse")
        if text[0] in "-~!":
            value = read(text[1:])
            if value is None:
                return None
            return not value if text[0] == "!" else (-value if text[0] == "-" else ~value) & MASK
        return values.get(text)

    clock = Clock()
    executed, skipped = [0] * len(program), [0] * len(program)
    jumps: collections.Counter = collections.Counter()
    guessed, place = False, 0
    for _ in range(STEPS):
        line = program[place]
        holds = read(line.guard) if line.guard else True
        if line.target is not None and line.operands[0] != line.operands[-1]:  # BRA UP0, target
            condition = read(line.operands[0])
            holds = None if None in (holds, condition) else holds and condition
        # An instruction that one lane or warp may execute takes its time; a branch that may not be taken is not.
        acts = holds is not False
        clock.issue(place, line, acts)
        if acts:
            executed[place] += 1
        else:
            skipped[place] += 1
        if decides[place] and acts:
            value = result(line, read, thread, block) if holds else None
            names = writes[place]
            for i, name in enumerate(names):
                values[name] = value if i == 0 or line.name == "CS2R" else None  # a pair of zeros
        if line.name == "EXIT" and holds:
            return Trace(program, executed, skipped, dict(jumps), guessed, clock.now, dict(clock.lost))
        if line.target is not None and holds:
            if line.target <= place:
                jumps[line.target, place] += 1
            place = line.target
            continue
        if line.target is not None and line.target <= place and holds is None:
            body = zip(program[line.target : place], writes[line.target : place])
            deciding = [other.name for other, names in body if line.guard.lstrip("!") in names]
            guessed |= deciding[-1:] != ["SYNCS"]
        place += 1
    raise RuntimeError(f"program: no end within {STEPS} instructions")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel as it was compiled, and the ways of its warpgroups."""

    grid: tuple[int, int, int]
    threads: int
    registers: int
    """Per thread."""
    spills: int
    """Bytes per thread."""
    shared: int
    """Bytes per block."""
    traces: tuple[Trace, ...]

    @classmethod
    def of(cls, launch: dict[str, Any], ptxas: str, sass: str) -> "Kernel":
        """From ``launch_of`` and the dumps of the compiler."""
        program = parse(sass)
        middle = tuple(n // 2 for n in launch["grid"])
        traces = tuple(follow(program, thread, middle) for thread in range(0, launch["threads"], 128))
        registers = max(map(int, re.findall(r"[Uu]sed (\d+) registers", ptxas)))
        spills = max((int(n) for n in re.findall(r"(\d+) bytes spill", ptxas)), default=0)
        return cls(launch["grid"], launch["threads"], registers, spills, launch["shared"], traces)

    @property
    def blocks(self) -> int:
        """Of the grid."""
        return math.prod(self.grid)

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor has room for."""
        warps = self.threads // 32
        registers = warps * 256 * math.ceil(self.registers * 32 / 256)  # a warp gets them by 256
        return min(REGISTERS // registers, SHARED_MEMORY // (self.shared + 1024), THREADS // self.threads, BLOCKS)

    @property
    def units(self) -> dict[str, float]:
        """Cycles of every unit, of a block."""
        return {unit: sum(trace.units.get(unit, 0) for trace in self.traces) for unit in UNITS}

    def seconds(self, hertz: float, traffic: float) -> dict[str, float]:
        """By what could bound it: the units, "latency", and "hbm" for so many bytes."""
        per_sm = math.ceil(self.blocks / SMS)
        found = {unit: cycles * per_sm / hertz for unit, cycles in self.units.items()}
        latency = max(trace.cycles for trace in self.traces)
        found["latency"] = math.ceil(per_sm / self.resident) * latency / hertz
        return found | {"hbm": traffic / BANDWIDTH}


# --- The compiler's output ---


def launch_of(log: Iterable[str]) -> dict[str, Any]:
    """Grid, threads and bytes of shared memory, from the first lines of the dump of a kernel's passes."""
    constants: dict[str, int] = {}
    for line in log:
        if found := re.match(r"\s*(%[\w#]+) = arith\.constant (\d+) : (?:index|i32)", line):
            constants[found[1]] = int(found[2])
        elif "gpu.launch " in line:
            names = re.findall(r" = (%[\w#]+)", line.split("gpu.launch")[1])
            shared = re.search(r"dynamic_shared_memory_size (%[\w#]+)", line)
            sizes = [constants[name] for name in names[:6]]
            return {
                "grid": tuple(sizes[:3]),
                "threads": math.prod(sizes[3:]),
                "shared": constants[shared[1]] if shared else 0,
            }
    raise ValueError("log: no gpu.launch in it")


WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8,
          "c64": 8}  # fmt: skip
FREE = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "fusion-done", "copy-done"}


def shape_bytes(text: str) -> int:
    """Of all arrays in the text of a type."""
    arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", text)
    return sum(WIDTHS[dtype] * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in arrays)


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction of an optimised module."""

    name: str
    type: str
    opcode: str
    operands: list[str]
    line: str

    @classmethod
    def of(cls, line: str) -> "Operation | None":
        """From its text; None if that is no instruction."""
        parts = re.match(r"  (?:ROOT )?%(\S+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)", line)
        if not parts:
            return None
        name, kind, opcode, operands = parts.groups()
        return cls(name, kind, opcode, re.findall(r"%([\w.\-]+)", operands), line)

    def called(self, attribute: str) -> str:
        """Name of a computation that it has as an attribute, or ""."""
        found = re.search(rf"{attribute}=%([\w.\-]+)", self.line)
        return found[1] if found else ""


def fused_work(lines: list[str]) -> tuple[int, int]:
    """Bytes read and written, and operations of the products, of a fused computation: of an array that is only sliced, the slices; of one that
    is written in part, that part.
    """
    operations = {found.name: found for line in lines if (found := Operation.of(line))}

    def source(name: str) -> str:
        while name in operations and operations[name].opcode == "bitcast":
            name = operations[name].operands[0]
        return name

    touched: dict[str, int] = collections.Counter()
    flops = 0
    for operation in operations.values():
        if operation.opcode in FREE:
            continue
        for place, operand in enumerate(map(source, operation.operands)):
            if operand not in operations or operations[operand].opcode != "parameter":
                continue
            if place == 0 and operation.opcode in ("dynamic-slice", "slice"):
                touched[operand] += shape_bytes(operation.type)
            elif place > 0 or operation.opcode != "dynamic-update-slice":
                touched[operand] += shape_bytes(operations[operand].type)
        if operation.opcode == "dot":
            sides = [operations[operand].type for operand in operation.operands]
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", operation.line)
            dims = dimensions(sides[0])
            depth = math.prod(dims[int(n)] for n in (contracted[1] if contracted else "").split(",") if n)
            flops += 2 * depth * math.prod(dimensions(operation.type))
    reads = sum(min(size, shape_bytes(operations[name].type)) for name, size in touched.items())
    (root,) = (Operation.of(line) for line in lines if line.startswith("  ROOT "))
    assert root is not None
    results = root.operands if root.opcode == "tuple" else [root.name]
    written = 0
    for result in map(source, results):
        found = operations[result]
        if found.opcode == "dynamic-update-slice":
            found = operations[found.operands[1]]
        written += shape_bytes(found.type)
    return reads + written, flops


def dimensions(text: str) -> list[int]:
    """Of the one array in the text of a type."""
    return [int(n) for n in re.findall(r"\d+", text[text.index("[") : text.index("]")])]


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel of an optimised module."""

    name: str
    """Of a Mosaic kernel; "" for XLA's own."""
    key: str
    """What makes two Mosaic kernels one; "" for XLA's own."""
    bytes: int
    """Of its operands and results."""
    backward: bool
    times: int = 1
    """That it runs, in a loop."""
    flops: int = 0
    """Of the products in a kernel of XLA's."""

    @property
    def seconds(self) -> float:
        """At least, of one of XLA's."""
        return max(self.bytes / BANDWIDTH, self.flops / PEAK, LAUNCH)


def launches(text: str) -> list[Launch]:
    """Of an optimised module, in order. What was made by transposition is backward; what has no origin belongs to what is before it."""
    entry, computations = estimates.computations(text)
    found: list[Launch] = []

    def visit(name: str, times: int):
        sizes: dict[str, int] = {}
        for line in computations[name]:
            operation = Operation.of(line)
            if operation is None:
                continue
            sizes[operation.name] = shape_bytes(operation.type)
            origin = re.search(r'op_name="([^"]*)"', line)
            if operation.opcode == "while":
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                visit(operation.called("body"), times * int(trips[1] if trips else 1))
            elif operation.opcode not in FREE:
                traffic, flops = sizes[operation.name] + sum(sizes.get(operand, 0) for operand in operation.operands), 0
                if operation.opcode.startswith("fusion"):
                    traffic, flops = fused_work(computations[operation.called("calls")])
                elif operation.opcode in ("dynamic-slice", "slice"):
                    traffic = 2 * sizes[operation.name]
                elif operation.opcode == "dynamic-update-slice":
                    traffic = 2 * sizes.get(operation.operands[1], 0)
                mosaic = 'custom_call_target="mosaic_gpu' in line
                hashed = re.search(r'kernel_hash = "(.*?)", ', line)
                back = "transpose(" in origin[1] if origin else bool(found) and found[-1].backward
                called = origin[1].split("/")[-2] if mosaic and origin else ""
                found.append(Launch(called, hashed[1] if mosaic and hashed else "", traffic, back, times, flops))

    visit(entry, 1)
    return found


class Compiler:
    """Compiles for the H200 and reads what it says about Mosaic kernels. One per process: the dumps go where its environment says."""

    def __init__(self, folder: str):
        self._folder = pathlib.Path(folder)
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        os.environ["MOSAIC_GPU_DUMP_SASS_CTRL"] = "1"
        os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
        self._known: dict[str, Kernel] = {}

    @functools.cached_property
    def mesh(self) -> Any:
        """Of one H200."""
        import numpy as np
        from jax.experimental import topologies
        from jax.sharding import Mesh

        topology = topologies.get_topology_desc("h200", platform="cuda", target_config=H200, topology="1x1x1")
        return Mesh(np.array(topology.devices), ("data",))

    def __call__(self, function: Callable, *arguments: Any) -> list[tuple[Launch, Kernel | None]]:
        """The launches of a call with arguments of such shapes, in order."""
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        everywhere = NamedSharding(self.mesh, PartitionSpec())
        placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), arguments)
        found = launches(jax.jit(function).lower(*placed).compile().as_text() or "")
        dumps = sorted(self._folder.glob("*.sass_ctrl"), key=lambda path: int(path.stem.rsplit("_", 1)[1]))
        for launch in found:
            if launch.key and launch.key not in self._known:
                dump = next((path for path in dumps if path.stem.rsplit("_", 1)[0] == launch.name), None)
                if dump is None:
                    raise RuntimeError(f"no machine code of {launch.name}: pip install nvidia-cuda-nvdisasm")
                dumps.remove(dump)
                with dump.with_suffix(".mlir-passes.log").open() as log:
                    shape = launch_of(log)
                ptxas = dump.with_suffix(".ptxas").read_text()
                self._known[launch.key] = Kernel.of(shape, ptxas, dump.read_text())
        for file in self._folder.iterdir():
            file.unlink()
        return [(launch, self._known.get(launch.key)) for launch in found]


# --- The table ---

PUBLISHED: dict[str, tuple[str, float, float | None]] = {
    "linear_attention none": ("H100, 4 x 4096 x 64 heads", 0.950 / 2, 4.530 / 2),
    "linear_attention scalar": ("H100, 4 x 4096 x 64 heads", 1.147 / 2, 4.524 / 2),
    "linear_attention channel": ("H100, 65536 x 16 heads with V = 256, as two of 128", 5.89 / 4, 23.4 / 4),
    "delta_rule scalar": ("H200, 8192 x 64 heads, backward of 32 heads", 0.814, 0.814 + 2 * 1.444),
    "delta_rule channel": ("H800, 2 x 16384 x 16 heads, forward only", 2.30, None),
}
"""Flash-linear-attention with heads of 128: milliseconds forward and forward + backward, scaled linearly to 32768 tokens of 16 heads; the
shape that is best for it. Figures of its users (pytorch/helion, NX-AI/mlstm_kernels, QwenLM/FlashQLA, PaddlePaddle/flash-attention)."""
TARGETS = {
    ("linear_attention scalar", "forward"): 0.6,
    ("linear_attention scalar", "backward"): 0.6,
    ("linear_attention channel", "backward"): 0.9,
    ("delta_rule scalar", "forward"): 0.5,
    ("delta_rule scalar", "backward"): 0.55,
}
"""Most of the published time that a pass (with "backward": a forward and a backward pass) is to take."""
Launches = list[tuple[Launch, Kernel | None]]


def compiled(
    compiler: Callable[..., Launches], case: KernelCase, sizes: Sizes, time: int, form: str
) -> dict[str, Launches]:
    """The launches of every pass of the form, "pallas" or "xla"."""
    inputs, results = kernel_cases.shapes(case, sizes, time)
    trained = compiler(kernel_cases.both(case, form), inputs, results)
    return {
        "forward": compiler(kernel_cases.forward(case, form), inputs),
        "training forward": [entry for entry in trained if not entry[0].backward],
        "backward": [entry for entry in trained if entry[0].backward],
    }


def described(kernel: Kernel, seconds: dict[str, float]) -> dict[str, Any]:
    """What the file keeps of a kernel."""
    trace = max(kernel.traces, key=lambda trace: trace.cycles)
    found = {
        "grid": kernel.grid,
        "threads": kernel.threads,
        "registers": kernel.registers,
        "spills": kernel.spills,
        "shared bytes": kernel.shared,
        "blocks per SM": kernel.resident,
        "ms": {bound: 1e3 * value for bound, value in seconds.items()},
        "instructions": trace.count(),
        "cycles alone": trace.cycles,
        "of which": dict(sorted(trace.lost.items(), key=lambda entry: -entry[1])),
    }
    if trace.guessed:
        found["guessed"] = "a loop's end depends on data"
    if trace.loop:
        start, end, trips = trace.loop
        kinds = {kind: round(times / trips, 1) for kind, times in trace.count(start, end + 1).items()}
        found["loop"] = {"trips": trips, "instructions per trip": round(sum(kinds.values()), 1), "kinds": kinds}
    return found


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of the launches of a pass, in seconds."""

    kernels: float
    around: float
    """What XLA does around them."""
    bounds: str
    """Of what takes a fifth of the whole or more: share and, of kernels, bound."""
    calls: dict[str, Any]

    @classmethod
    def of(cls, found: Launches, hertz: float) -> "Estimate":
        """From what was compiled."""
        calls: dict[str, Any] = {}
        around = sum(launch.times * launch.seconds for launch, kernel in found if kernel is None)
        times = [("xla", around, "")]
        for launch, kernel in found:
            if kernel is None:
                continue
            seconds = kernel.seconds(hertz, launch.bytes)
            bound = max(seconds, key=lambda name: seconds[name])
            times.append((short(launch.name), launch.times * max(seconds[bound], LAUNCH), f" {bound}"))
            label = launch.name if launch.name not in calls else f"{launch.name} {len(calls)}"
            calls[label] = described(kernel, seconds)
        whole = sum(time for _, time, _ in times)
        shares = [f"{name} {100 * time / whole:.0f}%{bound}" for name, time, bound in times if time > 0.2 * whole]
        return cls(whole - around, around, ", ".join(shares), calls)


def short(name: str) -> str:
    """What a kernel does, from its name."""
    return next((part for part in name.split("_") if part in VERBS), name)


VERBS = ("forward", "backward", "prepare", "read", "unwind", "differentiate", "invert")


def estimate_rows(
    case: KernelCase, dim: int, found: list[dict[str, Launches]], without: dict[str, Launches], hertz: float
) -> list[Row]:
    """One row per pass, from the launches of every pass in every one of ``SETTINGS`` and, for the first, of the form ``without`` kernels."""
    estimate = [{part: Estimate.of(entry[part], hertz) for part in PASSES} for entry in found]
    batch, time = SETTINGS[0]
    necessary = kernel_cases.work(case, Sizes(batch, HEADS, dim, "bfloat16"), time)
    rows = []
    for part in PASSES:
        first = estimate[0][part]
        whole = first.kernels + first.around
        form = sum(launch.times * launch.seconds for launch, _ in without[part])
        least = necessary["backward" if part == "backward" else "forward"].seconds(BANDWIDTH, PEAK)
        row: Row = {
            "kernel": case.name,
            "dim": dim,
            "pass": part,
            "launches": sum(launch.times for launch, _ in found[0][part]),
            "kernels ms": 1e3 * first.kernels,
            "xla ms": 1e3 * first.around,
            "whole ms": 1e3 * whole,
            "roofline ms": 1e3 * least,
            "over roofline": whole / least,
            "bounds": first.bounds,
            "xla form ms": 1e3 * form,
            "xla form over whole": form / whole,
        }
        for other, (_, length) in zip(estimate[1:], SETTINGS[1:]):
            row[f"T={length} ms"] = 1e3 * (other[part].kernels + other[part].around)
        if dim == 128 and case.name in PUBLISHED and part != "training forward":
            figure = PUBLISHED[case.name][1 if part == "forward" else 2]
            if figure is not None:
                trained = rows[-1]["whole ms"] if part == "backward" else 0.0
                row |= {"published ms": figure, "over published": (row["whole ms"] + trained) / figure}
        row["calls"] = first.calls
        rows.append(row)
    return rows


def limits(row: Row) -> dict[str, float]:
    """The goals of a row."""
    found = {"over roofline": 2.0, "xla form over whole": 2.0}
    if (row["kernel"], row["pass"]) in TARGETS:
        found["over published"] = TARGETS[row["kernel"], row["pass"]]
    return found


NOTES = [
    "A model of the machine code, compared with no GPU: read ratios. kernels: of each the longest of occupied units, latency (its blocks one after "
    "another as far as they do not fit beside each other) and bytes; xla: bytes of the instructions around them, at least 2 us each; xla form: the same "
    "and the products of the operation without kernels, which is what jax < 0.11 and other cards get; roofline: necessary bytes at 4.3 TB/s and matrix "
    "products in chunks of 64 at 780 TFLOP/s. training forward also writes what the backward pass needs.",
    "bounds: what takes a fifth of the whole or more, its share of it and, of kernels, what bounds them: issue, fma, imad, alu (half rate), mufu, smem "
    "(128 bytes per cycle and multiprocessor), tensor, latency, hbm. T=n: rows of n tokens, as many tokens in all.",
    "published ms: flash-linear-attention, scaled linearly in tokens and heads, the shape that is best for it: "
    + "; ".join(f"{name} {entry[0]}" for name, entry in PUBLISHED.items())
    + ". With backward: a forward and a backward pass, on either side.",
]


def main() -> int:
    """Estimate, print and write, also what there is after every kernel."""
    import tyro

    options = tyro.cli(Options, prog="gpu_estimates.py")
    with tempfile.TemporaryDirectory() as folder:
        compiler = Compiler(folder)
        import jax
        from rich.console import Console

        from seqjax.cli.bench.report import show

        old, rows = estimates.earlier(options), []

        def report() -> Report:
            title = f"GPU kernels by a model of their machine code: 4 rows, T = 8192, {HEADS} heads of dim, bfloat16, an H200 (no GPU involved)"
            merged = estimates.merged(rows, old, ("kernel", "dim", "pass"), PASSES)
            goals = estimates.goals(merged, ("kernel", "pass", "dim"), limits)
            return Report("gpu_estimates", title, merged, goals, NOTES, os.getloadavg()[0])

        with jax.sharding.use_abstract_mesh(compiler.mesh.abstract_mesh):
            for case in kernel_cases.chosen(options.only):
                for dim in options.dims:
                    jax.clear_caches()
                    sizes = [(Sizes(batch, HEADS, dim, "bfloat16"), time) for batch, time in SETTINGS]
                    if reason := kernel_cases.refusal(case, *sizes[0]):
                        print(case.name, dim, reason, file=sys.stderr)
                        continue
                    found = [compiled(compiler, case, *setting, "pallas") for setting in sizes]
                    without = compiled(compiler, case, *sizes[0], "xla")
                    rows += estimate_rows(case, dim, found, without, 1e9 * options.clock_ghz)
                    print(case.name, dim, file=sys.stderr)
                    estimates.write(report(), options, ("jax-cuda13-plugin", "nvidia-cuda-nvcc"))
    show(report(), Console(width=240))
    return 1 if options.strict and not all(goal.passed for goal in report().goals) else 0


if __name__ == "__main__":
    sys.exit(main())
