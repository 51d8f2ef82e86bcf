"""Describes the compiled CUDA library: resources and ceilings of each kernel, one JSON row per kernel and target.

    python tests/gpu/tools/cuda_static.py LIBRARY.so

A sparse kernel's ceilings are for one kept weight: the loop over a list, plus the shares of what a warp does once for a
stage and of copying the stage, each divided by the kept weights it serves.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import static_roofline
from static_roofline import MACHINES, Kernel, children_of, cycles_of, hot_loops, occupancy, work_of

DENSITY = 0.1
DENSITIES = (0.2, 0.1, 0.05, 0.02)
PITCH, BUFFERS, LANES, VECTOR = 40, 3, 32, 4  # kPitch, kBuffers, kWarp, kVector in csrc/cuda/tile.cuh
SIZES = ("large", "medium", "small")
FLAT_THREADS = 128


@dataclass(frozen=True)
class Form:
    """A direction of a layer as the kernels see it.

    Attributes:
        halo: rows and columns that a tile's source is larger than the tile.
        phases: virtual channels of a source channel.
        taps: of a virtual source and a virtual output channel that are not pruned, on average.
    """

    halo: int
    phases: int
    taps: float


FORMS = {
    "1x1": Form(0, 1, 1),
    "3x3": Form(2, 1, 9),
    "3x3 stride 2": Form(1, 4, 9 / 4),
    "3x3 stride 2 transposed": Form(1, 1, 9 / 4),
}


@dataclass(frozen=True)
class Tile:
    """Template arguments of ``lipfast::Tile``, read from a mangled name."""

    warps: int
    lists: int
    rows: int
    stage: int

    @property
    def threads(self) -> int:
        return LANES * self.warps

    def plane(self, form: Form) -> int:
        return (self.rows + form.halo) * PITCH

    def shared_bytes(self, form: Form) -> int:
        """``Tile::SharedBytes``."""
        return 4 * self.plane(form) * (form.phases + BUFFERS * self.stage) + 16 * self.threads

    def copies(self, form: Form) -> float:
        """Passes of a thread's loop over the pixels of a stage."""
        return self.stage * self.plane(form) / VECTOR / self.threads

    def weights(self, form: Form, density: float) -> float:
        """Kept weights of a warp in a stage."""
        return self.lists * self.stage * form.taps * density


def cubins(library: Path) -> Iterator[Path]:
    """The compiled code of each target inside a library."""
    with tempfile.TemporaryDirectory() as folder:
        tool = static_roofline.tool("cuobjdump")
        subprocess.run([tool, "-xelf", "all", str(library.resolve())], cwd=folder, capture_output=True, check=True)
        yield from sorted(Path(folder).glob("*.cubin"))


def describe(kernel: Kernel) -> dict[str, object]:
    plain = re.search(r"lipfast\d+([A-Z][a-z]+(?:[A-Z][a-z]+)*Kernel)", kernel.name)
    name = plain[1] if plain else kernel.name
    row: dict[str, object] = {"kernel": name, "target": kernel.arch, "registers": kernel.registers}
    row["spills"] = kernel.spill_instructions + kernel.stack
    machine, tile = MACHINES[kernel.arch], tile_of(kernel)
    shared, threads = kernel.shared, FLAT_THREADS
    if tile is not None:
        shared += tile.shared_bytes(FORMS["3x3"]) + (4 * 33 * tile.threads // 2 if name.startswith("Weight") else 0)
        threads = tile.threads
    resident, limit = occupancy(machine, threads, kernel.registers, shared)
    row |= {"shared": shared, "occupancy": round(resident / machine.warps, 3), "occupancy_limit": limit}
    return row | (ceilings(kernel, tile, resident) if tile is not None else {})


def tile_of(kernel: Kernel) -> Tile | None:
    numbers = [int(n) for n in re.findall(r"Li(\d+)E", kernel.name)]
    return Tile(*numbers) if numbers else None


def ceilings(kernel: Kernel, tile: Tile, resident: int) -> dict[str, object]:
    """What a kept weight costs and, for each form and density, the share of the FP32 peak that is possible."""
    weight_gradient = "WeightGradient" in kernel.name
    # Every 32 pairs the next ones are fetched; every 16 weights (8 pairs) their sums are added up.
    pair_loop = hot_loops(kernel)[0]
    stage_loop = hot_loops(kernel)[1]
    pair = work_of(kernel, pair_loop, [], rare={"STG": 1 / 8} if weight_gradient else {"LDG": 1 / 32})
    one_address(pair)
    inside = children_of(kernel, stage_loop)
    stage = work_of(kernel, stage_loop, inside, hot="no opcode")  # a list has an odd entry half of the time
    copy_loop = next(loop for loop in inside if any_op(kernel, loop.blocks, "LDGSTS"))
    machine = MACHINES[kernel.arch]
    found: dict[str, dict[str, float]] = {}
    bounds: dict[str, str] = {}
    forms = {name: form for name, form in FORMS.items() if not (weight_gradient and "transposed" in name)}
    for name, form in forms.items():
        copy = work_of(kernel, copy_loop, [], rare={"LDGSTS.E.BYPASS": float(form.phases == 1)})
        for density in DENSITIES:
            weights = tile.weights(form, density)
            work = static_roofline.Work()
            work.add(pair, (weights - tile.lists / 2) / 2 if weights > tile.lists / 2 else 0)
            work.add(stage, 1)
            work.add(copy, tile.copies(form))
            cycles = cycles_of(work, machine, resident)
            bound = max(cycles, key=cycles.__getitem__)
            share = weights * tile.rows * LANES / machine.fp32 / cycles[bound]
            found.setdefault(name, {})[str(density)] = round(share, 3)
            if density == DENSITY:
                bounds[name] = bound
    return {
        "multiply_adds": round(pair.of("FFMA") / 2, 2),
        "multiply_adds_wanted": tile.rows,
        "entry_instructions": round(pair.issued / 2, 1),
        "stage_instructions": round(stage.issued, 1),
        "branches": round(pair.of("BR") / 2, 1),
        "mix": pair.mix(),
        "bound": bounds["3x3"],
        "ceiling": found["3x3"][str(DENSITY)],
        "ceilings": found,
    }


def one_address(pair: static_roofline.Work) -> None:
    """A pair is one address for the whole warp, so that its 128-bit load passes like a word."""
    for op in [op for op in pair.ops if op.startswith(("LDS", "LDG")) and ".128" in op]:
        pair.ops[op.replace(".128", "")] += pair.ops.pop(op)


def any_op(kernel: Kernel, blocks: frozenset[int], prefix: str) -> bool:
    return any(i.op.startswith(prefix) for b in blocks for i in kernel.blocks[b].instructions)


def describe_library(library: Path) -> list[dict[str, object]]:
    rows = []
    for cubin in cubins(library):
        described = [(describe(kernel), tile_of(kernel)) for kernel in static_roofline.read_cubin(cubin).values()]
        # The tiles of one kernel are named by their size.
        described.sort(key=lambda each: -each[1].lists * each[1].rows if each[1] else 0)
        seen: Counter[object] = Counter()
        for row, tile in described:
            if tile is not None:
                name = row["kernel"]
                row["kernel"] = f"{name} {SIZES[seen[name]]}"
                seen[name] += 1
            rows.append(row)
    return sorted(rows, key=lambda row: (str(row["target"]), str(row["kernel"])))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path)
    for row in describe_library(parser.parse_args().library):
        print(json.dumps(row))
