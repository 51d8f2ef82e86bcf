"""Describes the compiled CUDA library: resources and ceilings of each kernel, one JSON row per kernel and target.

    python tests/gpu/tools/cuda_static.py LIBRARY.so

The sparse kernels' ceilings are for one kept weight at 10 % density (or ``--density``): the loop over a list, plus the
shares of reading a channel's window and of staging channels, each divided by the kept weights it serves.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import static_roofline
from static_roofline import (
    DENSE,
    MACHINES,
    Kernel,
    Machine,
    Work,
    children_of,
    cycles_of,
    hot_loops,
    occupancy,
    work_of,
)

THREADS = 128
DENSITY = 0.1
DENSITIES = (0.2, 0.1, 0.05, 0.02)
GEOMETRIES = {(1, 1, 1): "1x1", (3, 3, 1): "3x3", (2, 3, 2): "3x3 stride 2", (2, 2, 1): "3x3 stride 2 transposed"}


@dataclass(frozen=True)
class Tile:
    """Template arguments of ``lipfast::Tile``, read from a mangled name."""

    tap_rows: int
    tap_columns: int
    column_stride: int
    row_phases: int
    output_scale: int
    group: int
    rows: int
    columns: int
    stage: int

    @property
    def kept_in_list(self) -> float:
        """Weights of a (group, channel) list if none were pruned; not every virtual channel uses every tap."""
        share = {2: 3 / 4, 1: 1.0}[self.row_phases] * {2: 9 / 16, 1: 1.0}[self.output_scale]
        return self.group * self.tap_rows * self.tap_columns * share

    @property
    def shared_bytes(self) -> int:
        """``Tile::kSharedBytes``: two halves, each planes and lists."""
        columns = (8 * self.columns - 1) * self.column_stride + self.tap_columns
        plane = (4 * self.rows - 1 + self.tap_rows) * (-(-columns // 4) * 4)
        lists = 8 * 4 * (self.stage * self.group * self.tap_rows * self.tap_columns + 1)
        return 2 * (4 * -(-self.stage * plane // 4) * 4 + -(-lists // 16) * 16)


def cubins(library: Path) -> Iterator[Path]:
    """The compiled code of each target inside a library."""
    with tempfile.TemporaryDirectory() as folder:
        tool = static_roofline.tool("cuobjdump")
        subprocess.run([tool, "-xelf", "all", str(library.resolve())], cwd=folder, capture_output=True, check=True)
        yield from sorted(Path(folder).glob("*.cubin"))


def describe(kernel: Kernel, density: float) -> dict[str, object]:
    machine = MACHINES[kernel.arch]
    plain = re.search(r"lipfast\d+([A-Z][a-z]+(?:[A-Z][a-z]+)*Kernel)", kernel.name)
    name = plain[1] if plain else kernel.name
    row: dict[str, object] = {"kernel": name, "target": kernel.arch, "registers": kernel.registers}
    row["spills"] = kernel.spill_instructions + kernel.stack
    numbers = [int(n) for n in re.findall(r"Li(\d+)E", kernel.name)]
    shared = kernel.shared
    if numbers:
        tile = Tile(*numbers)
        large = tile.rows * tile.columns > 4
        shape = GEOMETRIES[tile.tap_rows, tile.tap_columns, tile.column_stride]
        row["kernel"] = f"{name} {shape} {'large' if large else 'small'}"
        shared += tile.shared_bytes + (4 * 4 * 32 * 33 if name.startswith("Weight") else 0)
    resident, limit = occupancy(machine, THREADS, kernel.registers, shared)
    row |= {"shared": shared, "occupancy": round(resident / machine.warps, 3), "occupancy_limit": limit}
    return row | (ceiling(kernel, tile, density, resident) if numbers else {})


@dataclass(frozen=True)
class Cost:
    """Cycles of a multiprocessor for one warp, pipe by pipe."""

    machine: Machine
    multiply_adds: int  # of one kept weight in a thread
    weights: float  # of a list if none were pruned
    entry: dict[str, float]  # a kept weight
    channel: dict[str, float]  # a list, beside its weights; spent where the list is not empty
    stage: dict[str, float]  # a list's share of staging channels

    def cycles(self, density: float) -> dict[str, float]:
        """For one kept weight, with its share of what surrounds its list. Weights are pruned independently."""
        kept = self.weights * density
        used = 1 - (1 - density) ** self.weights  # share of lists that are not empty
        return {pipe: self.entry[pipe] + (used * self.channel[pipe] + self.stage[pipe]) / kept for pipe in self.entry}

    def ceiling(self, density: float) -> float:
        """Share of the FP32 peak."""
        return self.multiply_adds * 32 / self.machine.fp32 / max(self.cycles(density).values())

    def break_even(self, dense_teraflops: float) -> float:
        """Density below which the bound is under a dense convolution's time at ``dense_teraflops``; 0 if nowhere."""
        dense = self.multiply_adds * 32 / self.machine.fp32 * self.machine.fp32_teraflops / dense_teraflops
        densities = (step / 1000 for step in range(1000, 0, -1))
        return next((d for d in densities if d * max(self.cycles(d).values()) < dense), 0.0)


def ceiling(kernel: Kernel, tile: Tile, density: float, resident: int) -> dict[str, object]:
    machine = MACHINES[kernel.arch]
    flush = {"STG": 1 / 32} if "WeightGradient" in kernel.name else None  # once in 32 kept weights
    entry_loop, channel_loop, stage_loop = hot_loops(kernel)[:3]
    entry = work_of(kernel, entry_loop, children_of(kernel, entry_loop), rare=flush)
    channel = work_of(kernel, channel_loop, children_of(kernel, channel_loop))
    inside_stage = children_of(kernel, stage_loop)
    stage = work_of(kernel, stage_loop, inside_stage)
    for copy_loop in (loop for loop in inside_stage if not channel_loop.blocks <= loop.blocks):
        rounds = max(1.0, tile.stage * tile.kept_in_list * density / 32)  # a warp copies 32 entries at once
        stage.add(work_of(kernel, copy_loop, children_of(kernel, copy_loop)), rounds)
    shared_by_a_list = Work()
    shared_by_a_list.add(stage, 1 / tile.stage)
    cost = Cost(
        machine,
        tile.rows * tile.columns,
        tile.kept_in_list,
        cycles_of(entry, machine, resident, uniform_shared=True),  # a list entry is one word for the whole warp
        cycles_of(channel, machine, resident),
        cycles_of(shared_by_a_list, machine, resident),
    )
    cycles = cost.cycles(density)
    bound = max(cycles, key=cycles.__getitem__)
    return {
        "multiply_adds": round(entry.of("FFMA"), 2),
        "multiply_adds_wanted": cost.multiply_adds,
        "entry_instructions": round(entry.issued, 1),
        "channel_instructions": round(channel.issued, 1),
        "stage_instructions": round(stage.issued, 1),
        "branches": round(entry.of("BR"), 1),
        "mix": entry.mix(),
        "bound": bound,
        "ceiling": round(cost.ceiling(density), 3),
        "ceilings": {str(share): round(cost.ceiling(share), 3) for share in DENSITIES},
        "break_even": {
            name: round(cost.break_even(share * peak), 3) for name, (share, peak) in DENSE[kernel.arch].items()
        },
    }


def describe_library(library: Path, density: float = DENSITY) -> list[dict[str, object]]:
    rows = []
    for cubin in cubins(library):
        rows += [describe(kernel, density) for kernel in static_roofline.read_cubin(cubin).values()]
    return sorted(rows, key=lambda row: (str(row["target"]), str(row["kernel"])))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path)
    parser.add_argument("--density", type=float, default=DENSITY)
    arguments = parser.parse_args()
    for row in describe_library(arguments.library, arguments.density):
        print(json.dumps(row))
