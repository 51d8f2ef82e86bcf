"""Writes the tables of docs/gpu.md from the committed ones:  python tests/gpu/tools/bounds.py

Everything it prints is a bound worked out from machine code and data sheets; nothing is a timing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tables
from static_roofline import MACHINES

PAGE = Path(__file__).parents[3] / "docs/gpu.md"

# Bytes that cross memory for one element of a streaming kernel: buffers read and written, and 1/8 of mask bits.
STREAM_BYTES = {
    "adam": 28.125,
    "adam bf16": 22.125,
    "adam packed": 28,
    "sgd": 20.125,
    "apply_mask": 8.125,
    "apply_mask fp16": 4.125,
    "normalise": 8,
    "normalise bf16": 4,
    "normalise_backward": 12,
}
STREAM_ELEMENTS = {  # of a program
    "adam": 1024,
    "sgd": 1024,
    "apply_mask": 2048,
    "normalise": 1024,
    "normalise_backward": 1024,
}


@dataclass(frozen=True)
class Layer:
    """Equal convolutions of the paper's skip net."""

    count: int
    inputs: int
    outputs: int
    kernel: int
    stride: int
    pixels: int  # side of the output map

    @property
    def multiply_adds(self) -> int:
        return self.inputs * self.outputs * self.kernel**2 * self.pixels**2

    @property
    def bytes(self) -> int:
        """Input and output once, fp32; weights at 10 % density with 8 bytes each."""
        maps = self.inputs * (self.pixels * self.stride) ** 2 + self.outputs * self.pixels**2
        return 4 * maps + 8 * self.inputs * self.outputs * self.kernel**2 // 10


def skip_net(side: int) -> Iterator[Layer]:
    """The layers that hold nearly all of the work, largest map first."""
    for scale in range(5):
        out = side >> (scale + 1)
        yield Layer(1, 32 if scale == 0 else 128, 128, 3, 2, out)
        yield Layer(1, 128, 128, 3, 1, out)
        yield Layer(1, 132, 128, 3, 1, side >> scale)
        yield Layer(1, 128, 128, 1, 1, side >> scale)


def blocks(layer: Layer, small: bool) -> int:
    """Blocks of the CUDA forward kernel: 32 output channels and a tile of pixels each."""
    rows, columns = (8, 16) if small else (16, 32)
    channels = 48 if layer.kernel == 1 else 32
    return -(-layer.pixels // rows) * -(-layer.pixels // columns) * -(-layer.outputs // channels)


def stream_margin(row: dict[str, Any]) -> float:
    """Memory time of a streaming kernel over its issue time: above 1, memory is the bound."""
    machine = MACHINES[row["target"]]
    name = row["kernel"]
    elements = STREAM_ELEMENTS[name.split()[0]]
    bytes_a_clock = machine.gigabytes_per_second / machine.multiprocessors / machine.gigahertz
    memory = elements * STREAM_BYTES[name] / bytes_a_clock
    return float(memory / (row["instructions"] * 4 / machine.schedulers))  # four warps a program


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    names = list(head)
    lines = [names, ["---"] * len(names), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def cuda_table() -> str:
    head = [
        "kernel",
        "target",
        "registers",
        "spills",
        "shared bytes",
        "occupancy",
        "limited by",
        "instructions a weight",
    ]
    head += ["FFMA", "branches", "bound", "ceiling at 20 %", "10 %", "5 %", "2 %"]
    rows = []
    for row in tables.read("cuda"):
        cells = [row[name] for name in ("kernel", "target", "registers", "spills", "shared")]
        cells += [percent(row["occupancy"]), row["occupancy_limit"]]
        if "ceiling" in row:
            cells += [row["entry_instructions"], row["multiply_adds"], row["branches"], row["bound"]]
            cells += [percent(share) for share in row["ceilings"].values()]
        else:
            cells += 8 * [""]
        rows.append(cells)
    return table(head, rows)


def bars_table() -> str:
    rows = []
    for row in tables.read("cuda"):
        if row["target"] == "sm_90" and "ceiling" in row:
            bar = 0.3 if row["kernel"].startswith("SparseConv") else 0.2
            reached = row["ceiling"] >= bar
            rows.append([row["kernel"], percent(row["ceiling"]), percent(bar), "yes" if reached else "**no**"])
    return table(["kernel on an H100", "ceiling at 10 %", "bar", "reached"], rows)


def break_even_table() -> str:
    head = ["kernel", "target", "dense fp32", "dense TF32", "dense bf16"]
    rows = [
        [
            row["kernel"],
            row["target"],
            *(percent(share) if share else "nowhere" for share in row["break_even"].values()),
        ]
        for row in tables.read("cuda")
        if "break_even" in row and "large" in row["kernel"]
    ]
    return table(head, rows)


def layer_table(side: int) -> str:
    head = ["layer", "output", "dense GFLOP", "MB", "dense fp32 at 80 % of peak", "memory", "sparse, 10 % kept"]
    head += ["blocks, large tile", "small tile"]
    ceilings = {
        row["kernel"]: row["ceiling"] for row in tables.read("cuda") if row["target"] == "sm_90" and "ceiling" in row
    }
    machine = MACHINES["sm_90"]
    rows = []
    for layer in skip_net(side):
        name = {(1, 1): "1x1", (3, 1): "3x3", (3, 2): "3x3 stride 2"}[layer.kernel, layer.stride]
        small = blocks(layer, False) < 128
        flops = 2 * layer.multiply_adds
        ceiling = ceilings[f"SparseConvKernel {name} {'small' if small else 'large'}"]
        rows.append(
            [
                f"{name}, {layer.inputs} to {layer.outputs}",
                f"{layer.pixels} px",
                f"{flops / 1e9:.3f}",
                f"{layer.bytes / 1e6:.2f}",
                f"{flops / machine.fp32_teraflops / 0.8 / 1e6:.1f} us",
                f"{layer.bytes / machine.gigabytes_per_second / 1e3:.1f} us",
                f"{0.1 * flops / machine.fp32_teraflops / ceiling / 1e6:.1f} us",
                blocks(layer, False),
                blocks(layer, True),
            ]
        )
    return table(head, rows)


def triton_table() -> str:
    head = ["kernel", "target", "registers", "spills", "shared bytes", "occupancy", "128-bit accesses", "narrower"]
    head += ["tensor core", "memory time / issue time", "FP32 ceiling"]
    rows = []
    for row in tables.read("triton"):
        nvidia = row["target"] != "gfx942"
        cells = [row[name] for name in ("kernel", "target", "registers", "spills", "shared")]
        cells += [percent(row["occupancy"]), row["wide"], row["narrow"], row["tensor_core"]] if nvidia else 4 * [""]
        cells.append(f"{stream_margin(row):.1f}" if nvidia and row["kernel"] in STREAM_BYTES else "")
        cells.append(percent(row["ceiling"]) if "ceiling" in row else "")
        rows.append(cells)
    return table(head, rows)


SECTIONS = {
    "cuda": cuda_table,
    "bars": bars_table,
    "break-even": break_even_table,
    "layers": lambda: layer_table(256),
    "triton": triton_table,
}


def page(text: str) -> str:
    """``text`` with each table between its markers written anew."""
    for name, make in SECTIONS.items():
        marked = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, found = marked.subn(lambda match, make=make: f"{match[1]}{make()}\n{match[2]}", text)
        if found != 1:
            raise ValueError(f"{PAGE}: {found} places for table {name}")
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
