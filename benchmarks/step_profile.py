"""Where a training step of the paper's network goes: each kind of operation with its time, GFLOP/s or GB/s, and shares.

``python benchmarks/step_profile.py OUT.jsonl [--side 128] [--sparsity 0 0.89]``: appends one line for each kind and
prints them as a table. Arithmetic is that of the kept weights; bytes are each map that an operation must read or
write, once.
"""

import argparse
import datetime
import functools
import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lipfast._C as _C
from lipfast.bench import harness
from lipfast.bench.step import LAYER_DENSITIES, pruned_fit
from lipfast.engine.lane_trainer import LaneTrainer, _Fitted

Row = dict[str, Any]

WARM_UP = 5
STEPS = 30
# Words that a step's label begins with -> what the table calls it, longest first; the last word is its map's size.
KINDS = {
    "conv dw": "conv, weight gradient",
    "conv dx": "conv, input gradient",
    "conv": "conv, forward",
    "norm backward": "BatchNorm, backward",
    "norm": "BatchNorm, forward",
    "upsample backward": "upsampling, backward",
    "upsample": "upsampling, forward",
    "convert": "conversions",
    "halo": "halos",
}
OTHERS = "the rest"
OUTSIDE = "Python, loss, Adam"
# Maps of the label's size that an operation reads or writes; an enlargement's smaller map is a quarter.
MAPS_MOVED = {
    "BatchNorm, backward": 3.0,
    "BatchNorm, forward": 2.0,
    "upsampling, backward": 1.25,
    "upsampling, forward": 1.25,
    "conversions": 2.0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--side", type=int, default=128, help="pixels")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.0, 0.89], choices=[0.0, *LAYER_DENSITIES])
    arguments = parser.parse_args()
    for sparsity in arguments.sparsity:
        rows = profiled({}, arguments.side, sparsity, STEPS)
        with arguments.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        show(rows)


def profiled(config: dict[str, object], side: int, sparsity: float, steps: int) -> list[Row]:
    """A row for each kind of operation, those that take longest first."""
    network, masks, z, target = pruned_fit(config, side, sparsity)
    arithmetic = flops_of(network, masks, z)
    trainer = LaneTrainer(network, masks, lr=0.01)
    step = functools.partial(trainer.step, z, lambda output: nn.functional.mse_loss(output, target))
    for _ in range(WARM_UP):
        step()
    program = trainer._program
    assert isinstance(program, _Fitted), "the network does not run in lanes"
    running = program.running
    running.program.set_profile(True)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    whole = (time.perf_counter() - start) / steps

    seconds: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    for _, label, taken in running.profile():
        kind = kind_of(label)
        seconds[kind] += taken / steps
        moved[kind] += 4 * MAPS_MOVED.get(kind, 0.0) * numbers_of(label)
    seconds[OUTSIDE] = whole - seconds.total()
    threads = torch.get_num_threads()
    machine = {
        "threads": threads,
        "isa": _C.isa(),
        "cpu": harness.cpu_name(),
        "fma_peak": harness.fma_peak(threads, _C.isa()),
        "copy_peak": harness.copy_peak(harness.LARGEST_COPY, threads),
        "core_round_trip": harness.core_round_trip(threads),
        "torch": torch.__version__,
        "commit": harness.commit(),
        "utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    return [
        {
            "side": side,
            "sparsity": sparsity,
            "operation": kind,
            "seconds": taken,
            "share": taken / whole,
            "flops_per_second": arithmetic[kind] / taken if arithmetic[kind] else None,
            "bytes_per_second": moved[kind] / taken if moved[kind] else None,
            **machine,
        }
        for kind, taken in seconds.most_common()
    ]


def kind_of(label: str) -> str:
    """What the table calls a step of a program."""
    return next((name for start, name in KINDS.items() if label.startswith(f"{start} ")), OTHERS)


def numbers_of(label: str) -> int:
    """How many numbers the map of a label has, whose last word is channels x height x width; 0 where it is not."""
    size = label.rsplit(" ", 1)[-1].split("x")
    return math.prod(map(int, size)) if len(size) == 3 else 0


def flops_of(network: nn.Module, masks: dict[str, Tensor], z: Tensor) -> Counter[str]:
    """Floating-point operations of the kept weights by kind of pass; a multiplication and an addition are two."""
    flops: Counter[str] = Counter()

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = f"{name}.weight"
        kept = int(masks[weight].sum()) if weight in masks else network.get_parameter(weight).numel()
        once = 2 * kept * output.shape[2] * output.shape[3]
        flops["conv, forward"] += once
        flops["conv, weight gradient"] += once
        flops["conv, input gradient"] += once if inputs[0].requires_grad else 0  # none for the input noise

    convs = {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    hooks = [module.register_forward_hook(functools.partial(note, name)) for name, module in convs.items()]
    network(z)
    for hook in hooks:
        hook.remove()
    return flops


def show(rows: list[Row]) -> None:
    """The table, in Markdown."""
    first = rows[0]
    print(f"{first['side']} px, {first['sparsity']:.0%} zeros; ", end="")
    print(f"{first['fma_peak'] / 1e9:.0f} GFLOP/s, copies {first['copy_peak'] / 1e9:.0f} GB/s")
    print("| operation | ms | share | GFLOP/s | GB/s |\n|---|---|---|---|---|")
    for row in rows:
        rates = [row[name] for name in ("flops_per_second", "bytes_per_second")]
        cells = [f"{row['seconds'] * 1e3:.1f}", f"{row['share']:.0%}", *(f"{r / 1e9:.0f}" if r else "" for r in rates)]
        print(f"| {row['operation']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
