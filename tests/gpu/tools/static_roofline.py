"""What compiled GPU code can reach at most, read from its machine code. Needs no GPU.

For each kernel of a cubin: registers, stack, spills, shared memory, occupancy, the instruction mix of its hot loop, the
cycles that loop needs on each pipe of a multiprocessor, and from the slowest pipe a *ceiling*: the largest share of the
FP32 peak the loop could reach. A ceiling is a bound, not a prediction: latency, bank conflicts, cache misses and clocks
below boost only lower it, and nothing here has been timed.

Disassembly comes from the ``nvdisasm`` and ``cuobjdump`` inside the triton wheel.
"""

from __future__ import annotations

import functools
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """Data-sheet limits of one GPU; pipe widths are lanes a clock and multiprocessor (CUDA Programming Guide)."""

    name: str
    fp32: int
    integer: int
    special: int
    multiprocessors: int
    gigahertz: float  # boost
    gigabytes_per_second: float
    warps: int  # resident on a multiprocessor
    blocks: int
    registers: int
    shared_bytes: int
    memory_pipe_bytes: int = 128  # loads, stores and shuffles: bytes a clock
    schedulers: int = 4
    shared_reserved: int = 1024  # a block

    @property
    def fp32_teraflops(self) -> float:
        return self.fp32 * 2 * self.multiprocessors * self.gigahertz / 1e3


MACHINES = {
    "sm_80": Machine("A100-40GB SXM", 64, 64, 16, 108, 1.41, 1555, 64, 32, 65536, 164 << 10),
    "sm_90": Machine("H100 SXM", 128, 64, 16, 132, 1.98, 3350, 64, 32, 65536, 228 << 10),
}

# First match wins. "alu" is everything else.
PIPES = {
    "fma": r"FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2",
    "imad": r"IMAD",
    "tensor": r"HMMA|HGMMA|IMMA|BMMA|DMMA|QGMMA",
    "shared": r"LDS|STS|LDSM|STSM",
    "shuffle": r"SHFL",
    "global": r"LDG|STG|LD\b|ST\b|LDGSTS|UBLKCP",
    "atomic": r"ATOM|RED(?!UX)",
    "local": r"LDL|STL",
    "special": r"MUFU|I2F|F2I|F2F|POPC|FLO|BREV",
    "constant": r"LDC|ULDC|LDCU",
    "control": r"BRA|BRX|EXIT|BAR|NOP|BSSY|BSYNC|WARPSYNC|RET|CALL|DEPBAR|LDGDEPBAR|BREAK|YIELD",
}


@functools.cache
def pipe(op: str) -> str:
    return next((name for name, pattern in PIPES.items() if re.match(pattern, op)), "alu")


def bytes_per_lane(op: str) -> int:
    """Width of a load or store from its name: ``LDG.E.128`` moves 16 bytes a lane."""
    for mark, width in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1)):
        if mark in op:
            return width
    return 4


@dataclass(frozen=True)
class Instruction:
    op: str
    operands: str
    conditional: bool


@dataclass
class Block:
    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


def tool(name: str) -> str:
    from triton import knobs

    return str(getattr(knobs.nvidia, name).path)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclass
class Kernel:
    """One function of a cubin: its resources and its control-flow graph (block 0 is the entry)."""

    name: str
    arch: str
    registers: int
    stack: int
    shared: int  # static bytes
    blocks: list[Block]

    def instructions(self) -> Iterator[Instruction]:
        for block in self.blocks:
            yield from block.instructions

    @property
    def spill_instructions(self) -> int:
        return sum(i.op.startswith(("LDL", "STL")) for i in self.instructions())


def read_cubin(path: Path) -> dict[str, Kernel]:
    """Disassemble every kernel of ``path``; keys are mangled names."""
    usage = _run(tool("cuobjdump"), "-res-usage", str(path))
    text = _run(tool("nvdisasm"), "-c", str(path))
    number = re.search(r"\.target\s+sm_(\d+)|EF_CUDA_SM(\d+)", text)
    if number is None:
        raise ValueError(f"{path}: nvdisasm names no target")
    arch = f"sm_{number[1] or number[2]}"
    kernels = {}
    for name, body in _functions(text):
        found = re.search(rf"Function {re.escape(name)}:\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
        if found is None:
            raise ValueError(f"{path}: cuobjdump reports no resources of {name}")
        registers, stack, shared = map(int, found.groups())
        if arch == "sm_90" and shared >= 1024:
            shared -= 1024  # sm_90 lists the reserved kilobyte
        kernels[name] = Kernel(name, arch, registers, stack, shared, _graph(body))
    return kernels


def _functions(text: str) -> Iterator[tuple[str, list[str]]]:
    name, body = None, []
    for line in text.splitlines():
        if (head := re.match(r"\.text\.(\S+):", line)) or line.startswith(".section") or line.startswith("\t.section"):
            if name is not None:
                yield name, body
            name, body = (head[1] if head else None), []
        elif name is not None:
            body.append(line)
    if name is not None:
        yield name, body


_LINE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;?\s*$")


def _graph(lines: list[str]) -> list[Block]:
    blocks, labels, jumps = [Block()], {}, {}
    ended = False
    for line in lines:
        if label := re.match(r"(\.L\w+):", line):
            if blocks[-1].instructions:
                blocks.append(Block())
            labels[label[1]] = len(blocks) - 1
            ended = False
            continue
        if (found := _LINE.match(line)) is None:
            continue
        if ended:
            blocks.append(Block())
            ended = False
        guard, op, operands = found.groups()
        if "BRA.DIV" in op:
            op = "NOP"  # taken only by a diverged warp, which these kernels never have
        two_conditions = op.startswith("BRA") and re.match(r"!?U?P\d", operands) is not None
        blocks[-1].instructions.append(Instruction(op, operands, guard is not None or two_conditions))
        # sm_80 leaves loops by a CALL that never returns.
        if re.match(r"BRA|BRX|EXIT|RET", op) or re.match(r"CALL.*\.L_x", op + operands):
            jumps[len(blocks) - 1] = re.findall(r"\.L\w+", operands) if op[0] in "BC" else []
            ended = True
    for index, block in enumerate(blocks):
        block.successors = [labels[target] for target in dict.fromkeys(jumps.get(index, []))]
        last = block.instructions[-1] if block.instructions else None
        if (index not in jumps or (last is not None and last.conditional)) and index + 1 < len(blocks):
            block.successors.append(index + 1)
    return blocks


@dataclass(frozen=True)
class Loop:
    header: int
    blocks: frozenset[int]


def find_loops(blocks: list[Block]) -> list[Loop]:
    """Natural loops, innermost first (Aho, Lam, Sethi, Ullman: Compilers, section 9.6)."""
    order = _postorder(0, lambda b: blocks[b].successors)
    rank = {b: i for i, b in enumerate(order)}
    predecessors: dict[int, list[int]] = {b: [] for b in order}
    for b in order:
        for s in blocks[b].successors:
            predecessors[s].append(b)
    dominator = {0: 0}
    changed = True
    while changed:
        changed = False
        for b in reversed(order[:-1]):
            new = None
            for p in predecessors[b]:
                if p in dominator:
                    new = p if new is None else _common_dominator(new, p, dominator, rank)
            if new is not None and dominator.get(b) != new:
                dominator[b] = new
                changed = True
    bodies: dict[int, set[int]] = {}
    for b in order:
        for header in blocks[b].successors:
            if _dominates(header, b, dominator):
                bodies.setdefault(header, {header}).update(_reaching(b, header, predecessors))
    return sorted((Loop(h, frozenset(body)) for h, body in bodies.items()), key=lambda loop: len(loop.blocks))


def _postorder(start: int, following: Callable[[int], list[int]]) -> list[int]:
    seen, order, stack = {start}, [], [(start, iter(following(start)))]
    while stack:
        block, rest = stack[-1]
        unseen = next((s for s in rest if s not in seen), None)
        if unseen is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(unseen)
            stack.append((unseen, iter(following(unseen))))
    return order


def _common_dominator(a: int, b: int, dominator: Mapping[int, int], rank: Mapping[int, int]) -> int:
    while a != b:
        while rank[a] < rank[b]:
            a = dominator[a]
        while rank[b] < rank[a]:
            b = dominator[b]
    return a


def _dominates(a: int, b: int, dominator: Mapping[int, int]) -> bool:
    while b != a and b != 0:
        b = dominator[b]
    return a == b


def _reaching(start: int, header: int, predecessors: Mapping[int, list[int]]) -> set[int]:
    body, stack = {header}, [start]
    while stack:
        if (b := stack.pop()) not in body:
            body.add(b)
            stack.extend(predecessors[b])
    return body


@dataclass
class Work:
    """Expected instructions of one pass, by opcode."""

    ops: Counter[str] = field(default_factory=Counter)

    def add(self, other: Work, times: float) -> None:
        for op, count in other.ops.items():
            self.ops[op] += count * times

    @property
    def issued(self) -> float:
        return float(sum(self.ops.values()))

    def of(self, prefix: str) -> float:
        return float(sum(n for op, n in self.ops.items() if op.startswith(prefix)))

    def mix(self) -> dict[str, float]:
        found: Counter[str] = Counter()
        for op, count in self.ops.items():
            found[pipe(op)] += count
        return {name: round(float(count), 2) for name, count in found.most_common()}

    def cycles(self, machine: Machine, uniform_shared: bool = False) -> dict[str, float]:
        """Multiprocessor cycles a warp's pass occupies on each pipe. ``uniform_shared``: all lanes load one address."""
        mix: Counter[str] = Counter()
        memory = 0.0
        for op, count in self.ops.items():
            mix[pipe(op)] += count
            if pipe(op) in ("shared", "global", "atomic", "local"):
                width = 4 if uniform_shared and pipe(op) == "shared" else bytes_per_lane(op)
                memory += count * max(1.0, width * 32 / machine.memory_pipe_bytes)
        return {
            "issue": self.issued / machine.schedulers,
            "fp32": (mix["fma"] + mix["imad"]) * 32 / machine.fp32,
            "integer": mix["alu"] * 32 / machine.integer,
            "special": mix["special"] * 32 / machine.special,
            "load/store": memory + mix["shuffle"],
        }


# Cycles a warp at least waits for a result it needs at once (Abdelkhalik et al. 2022, arXiv:2208.11174; Hopper's are no
# shorter): other warps of the same scheduler may issue meanwhile, as far as there are any.
SHUFFLE_LATENCY = 23
BRANCH_LATENCY = 4  # for the comparison it depends on


def cycles_of(work: Work, machine: Machine, resident: int, uniform_shared: bool = False) -> dict[str, float]:
    """`Work.cycles` and, as ``latency``, what ``resident`` warps of a multiprocessor need if each waits in turn."""
    alone = work.issued + BRANCH_LATENCY * work.of("BR") + SHUFFLE_LATENCY * work.of("SHFL")
    return work.cycles(machine, uniform_shared) | {"latency": alone / resident}


def work_of(
    kernel: Kernel,
    loop: Loop | None,
    children: list[Loop],
    *,
    hot: str = "FFMA",
    rare: Mapping[str, float] | None = None,
) -> Work:
    """Expected instructions of one pass through ``loop`` (None: the whole kernel), its ``children`` left out.

    A branch is weighed by how many *cases* (blocks with a ``hot`` instruction) each side still leads to, so a dispatch
    over equally likely cases comes out right whatever tree the compiler built, and a skip over the only case is never
    taken. ``rare`` gives the probability of sides that contain an opcode, such as a flush every 32 passes. Any other
    branch is even.
    """
    inside = loop.blocks if loop else frozenset(range(len(kernel.blocks)))
    header = loop.header if loop else 0
    child_of = {b: child for child in children for b in child.blocks}
    result = Work()

    def following(b: int) -> list[int]:
        """Blocks after b inside the loop, a child loop being one step."""
        if b not in child_of:
            targets = kernel.blocks[b].successors
        else:
            child = child_of[b]
            targets = [s for c in child.blocks for s in kernel.blocks[c].successors if s not in child.blocks]
        return [s for s in dict.fromkeys(targets) if s in inside and s != header]

    order = _postorder(header, following)
    rank = {b: i for i, b in enumerate(order)}
    after = {b: [s for s in following(b) if rank[s] < rank[b]] for b in order}  # no edge back: nothing runs twice

    @functools.cache
    def contains(b: int, op: str) -> frozenset[int]:
        """Blocks with ``op`` reachable from b, stopping at the first one on each path."""
        here = child_of[b].blocks if b in child_of else [b]
        if any(i.op.startswith(op) for x in here for i in kernel.blocks[x].instructions):
            return frozenset([b])
        return frozenset().union(*(contains(s, op) for s in after[b]))

    def weights(b: int) -> dict[int, float]:
        sides = after[b]
        for op, probability in (rare or {}).items():
            having = [s for s in sides if contains(s, op)]
            if len(sides) == 2 and len(having) == 1:
                return {s: probability if s in having else 1 - probability for s in sides}
        cases = {s: len(contains(s, hot)) for s in sides}
        if len(sides) == 2 and min(cases.values()) == 0 < max(cases.values()):
            return {s: float(cases[s] > 0) for s in sides}
        total = sum(cases.values())
        if b in child_of or total == 0 or len(set().union(*(contains(s, hot) for s in sides))) < total:
            return {s: 1 / len(sides) for s in sides}
        return {s: cases[s] / total for s in sides}

    mass: Counter[int] = Counter({header: 1.0})
    for b in reversed(order):
        if b not in child_of:
            for instruction in kernel.blocks[b].instructions:
                result.ops[instruction.op] += mass[b]
        for s, weight in weights(b).items():
            mass[s] += mass[b] * weight
    return result


def hot_loops(kernel: Kernel, hot: str = "FFMA") -> list[Loop]:
    """The innermost loop with the most ``hot`` instructions, then the loops around it, outwards."""
    loops = find_loops(kernel.blocks)

    def count(loop: Loop) -> int:
        return sum(i.op.startswith(hot) for b in loop.blocks for i in kernel.blocks[b].instructions)

    innermost = [a for a in loops if not any(b.blocks < a.blocks for b in loops)]
    if not innermost:
        return []
    best = max(innermost, key=count)
    return [best, *(loop for loop in loops if best.blocks < loop.blocks)]


def children_of(kernel: Kernel, loop: Loop | None) -> list[Loop]:
    """Largest loops strictly inside ``loop`` (None: the outermost loops of the kernel)."""
    inside = [x for x in find_loops(kernel.blocks) if loop is None or x.blocks < loop.blocks]
    return [x for x in inside if not any(x.blocks < y.blocks for y in inside)]


def occupancy(machine: Machine, threads: int, registers: int, shared: int) -> tuple[int, str]:
    """Resident warps of a multiprocessor and what limits them (rules of cuda_occupancy.h, full shared carve-out)."""
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    limits = {
        "warps": machine.warps // warps,
        "blocks": machine.blocks,
        "registers": (machine.registers // 4 // per_warp * 4) // warps if per_warp else machine.blocks,
        "shared": machine.shared_bytes // (-(-(shared + machine.shared_reserved) // 128) * 128),
    }
    reason = min(limits, key=limits.__getitem__)
    return limits[reason] * warps, reason
