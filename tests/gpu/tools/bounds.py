"""Writes the tables of docs/gpu.md:  python tests/gpu/tools/bounds.py

Bounds come from the committed tables of compiled kernels and from data sheets, timings from docs/results/gpu.jsonl.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import tables
from pages import filled, table
from static_roofline import MACHINES

from lipfast.ops.triton.configs import CONFIGS

PAGE = Path(__file__).parents[3] / "docs/gpu.md"
RESULTS = PAGE.parent / "results/gpu.jsonl"
DIRECTIONS = ("forward", "input_gradient", "weight_gradient")
DENSITIES = (0.2, 0.1, 0.05, 0.02)

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
    "statistics": 4,
    "batch_norm": 8,
    "batch_norm whole": 8,
    "batch_norm_sums": 8,
    "batch_norm_backward": 12,
    "batch_norm_backward whole": 12,
}
# Streaming kernels that are launched as another one is.
LAUNCHED_AS = {
    "statistics": "batch_norm",
    "batch_norm whole": "batch_norm_whole",
    "batch_norm_sums": "batch_norm",
    "batch_norm_backward": "batch_norm",
    "batch_norm_backward whole": "batch_norm_whole",
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


def stream_margin(row: dict[str, Any]) -> float:
    """Memory time of a streaming kernel over its issue time: above 1, memory is the bound."""
    machine = MACHINES[row["target"]]
    name = row["kernel"]
    config = CONFIGS[LAUNCHED_AS.get(name, name.split()[0])]
    elements = config["meta"].get("BLOCK") or 32 * config["meta"]["WORDS"]  # of a program
    bytes_a_clock = machine.gigabytes_per_second / machine.multiprocessors / machine.gigahertz
    memory = elements * STREAM_BYTES[name] / bytes_a_clock
    return float(memory / (row["instructions"] * config["warps"] / machine.schedulers))


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def cuda_table() -> str:
    head = ["kernel", "target", "registers", "spills", "shared bytes", "occupancy", "limited by"]
    head += ["instructions a weight", "FFMA", "branches", "bound"]
    rows = []
    for row in tables.read("cuda"):
        cells = [row[name] for name in ("kernel", "target", "registers", "spills", "shared")]
        cells += [percent(row["occupancy"]), row["occupancy_limit"]]
        names = ("entry_instructions", "multiply_adds", "branches", "bound")
        rows.append(cells + [row.get(name, "") for name in names])
    return table(head, rows)


def ceiling_table() -> str:
    rows = []
    for row in tables.read("cuda"):
        for form, shares in row.get("ceilings", {}).items():
            rows.append([row["kernel"], form, row["target"], *(percent(share) for share in shares.values())])
    return table(["kernel", "form", "target", "20 % kept", "10 %", "5 %", "2 %"], rows)


# What the rows of docs/results/gpu.jsonl call the kernels of the tables, by direction.
KERNELS = {"forward": "SparseConvKernel", "weight_gradient": "WeightGradientKernel"}
BARS = {"forward": 0.3, "weight_gradient": 0.2}


def bars_table() -> str:
    """Static ceilings beside the bars, and what the same layers reached on a GPU."""
    ceilings = {
        row["kernel"]: row["ceilings"] for row in tables.read("cuda") if row["target"] == "sm_90" and "ceiling" in row
    }
    peak = MACHINES["sm_90"].fp32_teraflops
    rows = []
    for direction, kernel in KERNELS.items():
        for form in ("3x3", "1x1", "3x3 stride 2"):
            ceiling, timed = ceilings[f"{kernel} large"][form]["0.1"], measured(form, 128, direction, "cuda")[0.1]
            bar = BARS[direction]
            rows.append(
                [
                    direction.replace("_", " "),
                    form,
                    percent(ceiling),
                    percent(bar),
                    "yes" if ceiling >= bar else "**no**",
                    percent(timed["flops"] / timed["microseconds"]["median"] / 1e6 / peak),
                ]
            )
    return table(["direction", "form", "ceiling at 10 %", "bar", "reached", "timed, 128 px"], rows)


@functools.cache
def results() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def measured(form: str, pixels: int, direction: str, implementation: str) -> dict[float, dict[str, Any]]:
    """Density -> row."""
    kernel, stride = int(form[0]), 2 if "stride" in form else 1
    wanted = {"kind": "conv", "kernel": kernel, "stride": stride, "pixels": pixels, "direction": direction}
    wanted["implementation"] = implementation
    return {row["density"]: row for row in results() if wanted.items() <= row.items()}


def times_table() -> str:
    """Microseconds of a layer with 128 channels in and out."""
    head = ["form", "px", "direction", "dense fp32", "dense TF32", "dense TF32, channels_last"]
    head += [f"sparse, {percent(density)}" for density in DENSITIES]
    rows = []
    for form, pixels, direction in itertools.product(("3x3", "1x1", "3x3 stride 2"), (64, 128, 256), DIRECTIONS):
        dense = [
            measured(form, pixels, direction, f"torch {name}")[1.0] for name in ("ieee", "tf32", "tf32 channels_last")
        ]
        sparse = [measured(form, pixels, direction, "cuda")[density] for density in DENSITIES]
        median = [f"{row['microseconds']['median']:.0f}" for row in (*dense, *sparse)]
        rows.append([form, pixels, direction.replace("_", " "), *median])
    return table(head, rows)


def flat_table() -> str:
    rows = []
    for row in results():
        if row["kind"] == "flat":
            kept = percent(row["density"]) if "density" in row else ""
            speed = f"{row['bytes'] / row['microseconds']['median'] / 1e3:.0f} GB/s" if "bytes" in row else ""
            side = f"{row['pixels']} px" if "pixels" in row else ""
            rows.append(
                [row["op"], side, kept, row["implementation"], f"{row['microseconds']['median']:.1f} us", speed]
            )
    return table(["operation", "map", "kept", "implementation", "time", "bytes a second"], rows)


def step_table() -> str:
    head = ["px", "precision", "torch's switch for equal bits", "torch eager", "torch, CUDA graphs"]
    densities = (1.0, 0.4, *DENSITIES)
    head += [f"lipfast, {percent(density)} kept" for density in densities]
    found: dict[tuple[Any, ...], dict[Any, float]] = {}
    for row in results():
        if row["kind"] == "step":
            place = found.setdefault((row["pixels"], row["precision"], row["deterministic"]), {})
            place[row["implementation"], row["density"]] = row["microseconds"]["median"] / 1e3
    rows = [
        [
            pixels,
            precision,
            "on" if deterministic else "off",
            *(
                f"{times[name]:.2f} ms"
                for name in (("torch", 0.1), ("torch graphs", 0.1), *(("lipfast", d) for d in densities))
            ),
        ]
        for (pixels, precision, deterministic), times in sorted(found.items())
        if len(times) == 2 + len(densities)
    ]
    return table(head, rows)


def layer_table(side: int) -> str:
    head = ["layer", "output", "dense GFLOP", "MB", "dense fp32 at 80 % of peak", "memory", "sparse, 10 % kept"]
    row = next(r for r in tables.read("cuda") if r["kernel"] == "SparseConvKernel large" and r["target"] == "sm_90")
    machine = MACHINES["sm_90"]
    rows = []
    for layer in skip_net(side):
        name = {(1, 1): "1x1", (3, 1): "3x3", (3, 2): "3x3 stride 2"}[layer.kernel, layer.stride]
        flops = 2 * layer.multiply_adds
        rows.append(
            [
                f"{name}, {layer.inputs} to {layer.outputs}",
                f"{layer.pixels} px",
                f"{flops / 1e9:.3f}",
                f"{layer.bytes / 1e6:.2f}",
                f"{flops / machine.fp32_teraflops / 0.8 / 1e6:.1f} us",
                f"{layer.bytes / machine.gigabytes_per_second / 1e3:.1f} us",
                f"{0.1 * flops / machine.fp32_teraflops / row['ceilings'][name]['0.1'] / 1e6:.1f} us",
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
    "ceilings": ceiling_table,
    "bars": bars_table,
    "times": times_table,
    "flat": flat_table,
    "steps": step_table,
    "layers": lambda: layer_table(256),
    "triton": triton_table,
}


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE, SECTIONS))
