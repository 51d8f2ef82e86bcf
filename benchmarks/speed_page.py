"""Writes the tables of docs/speed.md, docs/engine.md and README.md from docs/results:  python benchmarks/speed_page.py

Each figure is that of the newest row of its case on its CPU, of those taken in fair minutes if there are any: while the
two cores shared a cache, and neighbours left the CPU to the benchmark. Others have a star.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pages import Sections, filled, table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs/results"
FAR = 200e-9  # seconds of a line of the cache from core to core and back, from which on cores are far from each other

Row = dict[str, Any]

XEON = "Intel(R) Xeon(R) Processor"
PEAKS = {"Zen 5": 500e9, "Zen 4": 236e9, "Emerald Rapids": 320e9, "Cascade Lake": 290e9, "Zen 3, AVX2": 205e9}  # FLOP/s
LEFT = 0.75  # of that peak, below which neighbours took too much of a run
# AMD's servers name no model; those with AVX-512 differ by what one multiply-add after the other brings.
CPUS: dict[str, Callable[[Row], bool]] = {
    "Zen 5": lambda row: row["cpu"] == "AMD EPYC" and row["isa"] == "avx512" and row["fma_peak"] > 350e9,
    "Zen 4": lambda row: row["cpu"] == "AMD EPYC" and row["isa"] == "avx512" and row["fma_peak"] <= 350e9,
    "Emerald Rapids": lambda row: row["cpu"] == XEON,
    "Cascade Lake": lambda row: row["cpu"] == f"{XEON} @ 2.50GHz",
    "Zen 3, AVX2": lambda row: row["cpu"] == "AMD EPYC" and row["isa"] == "avx2",
}


# --- rows ---------------------------------------------------------------------------------------------------------


def stored(file: str) -> list[Row]:
    return [json.loads(line) for line in (RESULTS / f"{file}.jsonl").read_text().splitlines() if line]


def cpu(row: Row) -> str:
    for name, is_it in CPUS.items():
        if is_it(row):
            return name
    raise ValueError(f"no name for the CPU {row['cpu']!r} with {row['isa']}")


def is_fair(row: Row) -> bool:
    return row.get("core_round_trip", 0.0) <= FAR and row["fma_peak"] >= LEFT * PEAKS[cpu(row)]


def newest_of(rows: Iterable[Row], key: Callable[[Row], tuple[Any, ...]]) -> dict[tuple[Any, ...], Row]:
    """The row of each key that counts."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=lambda row: (is_fair(row), row["utc"])):
        found[key(row)] = row
    return found


@functools.cache
def newest(file: str) -> dict[tuple[str, ...], Row]:
    """By CPU, operation, case and baseline."""
    return newest_of(stored(file), lambda row: (cpu(row), row["op"], row["case"], row["baseline"]))


def cases(file: str, op: str, ending: str = "") -> list[tuple[str]]:
    """The cases of an operation, in the order in which they were first measured, without the ending that they share."""
    names = dict.fromkeys(row["case"] for row in stored(file) if row["op"] == op and row["case"].endswith(ending))
    return [(name.removesuffix(ending),) for name in names]


# --- cells --------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    size, unit = next(((size, unit) for size, unit in ((1.0, "s"), (1e-3, "ms")) if seconds >= size), (1e-6, "us"))
    return f"{seconds / size:.3g} {unit}"


def times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio >= 0.995 else f"{ratio:.2f}x"


def star(row: Row) -> str:
    return "" if is_fair(row) else "*"


def faster(*rows: Row | None, with_time: bool = True) -> str:
    """How many times as fast as the fastest of the baselines, and the time; empty where a row is missing."""
    found = [row for row in rows if row]
    if not found or len(found) < len(rows):
        return ""
    row = min(found, key=lambda row: row["speedup"]["median"])
    time = f" ({duration(row['seconds']['median'])})" if with_time else ""
    return times(row["speedup"]["median"]) + time + star(row)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def by_cpu(
    head: list[str],
    cases: Iterable[tuple[Any, ...]],
    cell: Callable[..., str],
    aim: Callable[..., str] | None = None,
) -> str:
    """A row for each case that any CPU has: the case, ``cell(cpu, *case)`` for each CPU, and what was aimed at."""
    lines = [
        [*case, *line, *([aim(*case)] if aim else [])]
        for case in cases
        if any(line := [cell(name, *case) for name in CPUS])
    ]
    return table([*head, *CPUS, *(["aimed at"] if aim else [])], lines)


# --- layers -------------------------------------------------------------------------------------------------------

LAYERS = ["3x3 64 px", "3x3 128 px", "3x3 256 px", "3x3 512 px", "3x3 stride 2 128 px", "1x1 128 px", "5x5 64 px"]
ZEROS = [0, 50, 80, 90, 95]
AIMS = {  # of 3x3 layers at 128 px
    "conv_forward": dict(zip(ZEROS, [2.8, 2.8, 3.5, 6.0, 11.0], strict=True)),
    "conv_training": dict(zip(ZEROS, [2.5, 2.5, 4.0, 7.0, 12.0], strict=True)),
}
PART_OF_AIM = {"3x3 64 px": 0.8, "3x3 128 px": 1.0, "3x3 256 px": 0.9, "3x3 512 px": 0.9}


def conv(name: str, op: str, layer: str, zeros: int, baseline: str) -> Row | None:
    bf16 = ", bf16" if baseline == "torch bf16" else ""
    return newest("conv").get((name, op, f"{layer} {zeros}% zeros{bf16}", baseline))


def layers(op: str, baseline: str = "torch") -> str:
    def cell(name: str, layer: str, zeros: int) -> str:
        return faster(conv(name, op, layer, zeros, baseline))

    def aim(layer: str, zeros: int) -> str:
        if layer in PART_OF_AIM:
            return f"{PART_OF_AIM[layer] * AIMS[op][zeros]:.3g}x"
        if op == "conv_forward" and "stride 2" in layer:
            return f"{AIMS[op][zeros]:.3g}x"
        return "3x" if (op, layer, zeros) == ("conv_forward", "1x1 128 px", 90) else ""

    both = itertools.product(LAYERS, ZEROS)
    return by_cpu(["layer", "zeros, %"], both, cell, aim if baseline == "torch" else None)


def shares() -> str:
    """Of the multiply-adds that the CPU could do: those of kept weights, where the sparse kernel runs."""

    def cell(name: str, layer: str, zeros: int) -> str:
        row = conv(name, "conv_forward", layer, zeros, "torch")
        return percent(row["share_of_ceiling"]) + star(row) if row and row["backend"] == "cpu: sparse" else ""

    return by_cpu(["layer", "zeros, %"], itertools.product(LAYERS, ZEROS), cell)


def operator() -> str:
    def cell(name: str, case: str, direction: str) -> str:
        op = "sparse_conv2d" if direction == "forward" else "sparse_conv2d_training"
        return faster(newest("conv").get((name, op, case, "torch")))

    names = [case for (case,) in cases("conv", "sparse_conv2d")]
    return by_cpu(["layer, given as", "pass"], itertools.product(names, ["forward", "with all gradients"]), cell)


def dense() -> str:
    def cell(name: str, case: str, direction: str) -> str:
        op = "conv_forward" if direction == "forward" else "conv_training"
        return faster(newest("dense").get((name, op, f"{case} 0% zeros", "torch")))

    names = [case for (case,) in cases("dense", "conv_forward", " 0% zeros")]
    return by_cpu(["layer", "pass"], itertools.product(names, ["forward", "with both gradients"]), cell)


def choices() -> str:
    """How often another kernel than the chosen one was faster, and what the chosen one came to against itself."""
    lines = []
    for name in CPUS:
        rows = [row for key, row in newest("choice").items() if key[0] == name]
        alike = [row["speedup"]["median"] for row in rows if row["backend"] == f"cpu: {row['baseline']}"]
        others = [row["speedup"]["median"] for row in rows if row["backend"] != f"cpu: {row['baseline']}"]
        if rows:
            slower = sum(ratio < 0.95 for ratio in others)
            lines.append([name, len(others), slower, f"{min(others):.2f}", f"{min(alike):.2f} to {max(alike):.2f}"])
    return table(["CPU", "comparisons", "more than 5 % slower", "worst", "against itself"], lines)


# --- around the layers --------------------------------------------------------------------------------------------


def layout() -> str:
    def cell(name: str, case: str) -> str:
        row = newest("layout").get((name, "layout", case, "two copies"))
        return percent(row["share_of_ceiling"]) + star(row) if row else ""

    return by_cpu(["there and back"], cases("layout", "layout"), cell)


def over_all_baselines(file: str, op: str, head: str) -> str:
    def cell(name: str, case: str) -> str:
        return faster(*(row for key, row in newest(file).items() if key[:3] == (name, op, case)))

    return by_cpu([head], cases(file, op), cell)


# --- steps and searches -------------------------------------------------------------------------------------------

SIDES = [128, 256, 512]
STEP_ZEROS = [0, 59, 79, 89, 97]
STEP_AIMS = {(128, 0): 2.3, (128, 59): 2.3, (128, 79): 3.0, (128, 89): 5.0, (128, 97): 7.0}
STEP_AIMS |= {(512, 89): 4.5, (512, 97): 6.0}
FORMS = ["channels_last", "contiguous"]  # of torch


def step(name: str, side: int, zeros: int, with_time: bool = True) -> str:
    keys = ((name, "training_step", f"{side} px, {zeros}% zeros", form) for form in FORMS)
    return faster(*map(newest("step").get, keys), with_time=with_time)


def steps() -> str:
    def aim(side: int, zeros: int) -> str:
        return f"{STEP_AIMS[side, zeros]:.3g}x" if (side, zeros) in STEP_AIMS else ""

    return by_cpu(["px", "zeros, %"], itertools.product(SIDES, STEP_ZEROS), step, aim)


def other_steps() -> str:
    def cell(name: str, case: str, baseline: str) -> str:
        return faster(newest("step").get((name, "training_step", case, baseline)))

    others = [(f"{side} px, torch.compile", "torch.compile, inductor") for side in SIDES]
    others += [(f"128 px, {zeros}% zeros, bf16", "bf16 autocast") for zeros in STEP_ZEROS]
    return by_cpu(["step", "against"], others, cell)


PROFILED = "Zen 4"
PROFILED_ZEROS = {0.0: "dense", 0.89: "89 % zeros", 0.97: "97 % zeros"}


def profile() -> str:
    """Each operation of a training step: time, share of the step, arithmetic of kept weights or bytes of maps."""
    rows = (row for row in stored("profile") if cpu(row) == PROFILED)
    found = newest_of(rows, lambda row: (row["operation"], row["sparsity"]))

    def cell(row: Row) -> str:
        flops, moved = row["flops_per_second"], row["bytes_per_second"]
        rate = f", {flops / 1e9:.0f} GFLOP/s" if flops else f", {moved / 1e9:.0f} GB/s" if moved else ""
        return f"{duration(row['seconds'])} ({percent(row['share'])}{rate})"

    operations = sorted({operation for operation, _ in found}, key=lambda name: -found[name, 0.0]["seconds"])
    lines = ([name, *(cell(found[name, zeros]) for zeros in PROFILED_ZEROS)] for name in operations)
    return table(["operation", *PROFILED_ZEROS.values()], lines)


def memory() -> str:
    def cell(name: str, side: int, zeros: int) -> str:
        row = newest("memory").get((name, "step_memory", f"{side} px, {zeros}% zeros", "channels_last"))
        return percent(row["peak_bytes"] / row["baseline_peak_bytes"]) if row else ""

    return by_cpu(["px", "zeros, %"], itertools.product(SIDES, STEP_ZEROS), cell)


def searches() -> str:
    """The newest of each CPU, whichever form of torch it was compared with."""
    found = newest_of((row for row in stored("search") if row["op"] == "search"), lambda row: (cpu(row),))
    lines = [
        [
            name,
            row["shape"].split(", ")[1],
            duration(row["seconds"]["median"]),
            f"{duration(row['baseline_seconds']['median'])}, {row['baseline']}",
            times(row["speedup"]["median"]),
        ]
        for name, row in ((name, found[(name,)]) for name in CPUS)
    ]
    return table(["CPU", "length", "lipfast", "torch", ""], lines)


# --- other networks -----------------------------------------------------------------------------------------------


def inference(name: str, network: str, with_time: bool = True) -> str:
    key = (name, "inference", f"{network}, accelerate", "channels_last")
    return faster(newest("model").get(key), with_time=with_time)


def compiled(name: str, network: str) -> str:
    key = (name, "inference", f"{network}, torch.compile", "accelerate")
    return faster(newest("model").get(key), with_time=False)


def training(name: str, network: str, with_time: bool = True) -> str:
    keys = ((name, "training_step", f"{network}, training", form) for form in FORMS)
    return faster(*map(newest("model").get, keys), with_time=with_time)


def provenance() -> str:
    """Days and commits of the rows above, for each benchmark and CPU."""

    def cell(name: str, link: str) -> str:
        commits: dict[str, set[str]] = {}
        for key, row in newest(link[1 : link.index("]")]).items():
            if key[0] == name:
                commits.setdefault(row["utc"][:10], set()).add(row["commit"][:7])
        return "; ".join(f"{day}: {', '.join(sorted(found))}" for day, found in sorted(commits.items()))

    files = ["conv", "dense", "choice", "layout", "select", "adam", "step", "memory", "search", "model"]
    return by_cpu(["rows"], [(f"[{file}](results/{file}.jsonl)",) for file in files], cell)


# --- the README ---------------------------------------------------------------------------------------------------


def headline_layers() -> str:
    def line(name: str) -> list[str]:
        rows = (conv(name, "conv_forward", "3x3 128 px", zeros, "torch") for zeros in ZEROS)
        return [name, *(faster(row, with_time=False) for row in rows)]

    return table(["zeros in the layer", *map(some, ZEROS)], map(line, CPUS))


def headline_steps() -> str:
    def line(name: str) -> list[str]:
        cells = [step(name, SIDES[0], zeros, with_time=False) for zeros in STEP_ZEROS]
        for side in SIDES[1:]:
            ends = (step(name, side, zeros, with_time=False) for zeros in (STEP_ZEROS[0], STEP_ZEROS[-1]))
            cells.append(" to ".join(ends))
        return [name, *cells]

    head = ["zeros in the network", *map(some, STEP_ZEROS), *(f"at {side} px" for side in SIDES[1:])]
    return table(head, map(line, CPUS))


def some(zeros: int) -> str:
    return f"{zeros} %" if zeros else "none"


SHOWN_CPUS = ["Zen 5", "Zen 4", "Zen 3, AVX2"]
SHOWN = [  # network, batch in inference, batch in training (0: not shown)
    ("U-Net", 1, 0),
    ("Attention U-Net", 1, 1),
    ("ResNet-18", 1, 0),
    ("ResNet-18", 8, 0),
    ("ResNet-20", 128, 128),
    ("VGG-16 for 32 px", 128, 128),
    ("MobileNetV2", 1, 0),
    ("EfficientNet-B0", 1, 0),
    ("ConvNeXt-T", 1, 4),
    ("ConvNeXt V2-T", 1, 4),
    ("ViT-S/16", 1, 8),
    ("Swin-T", 1, 4),
    ("NAFNet", 1, 1),
    ("Restormer", 1, 1),
]


def headline_networks() -> str:
    def line(network: str, batch: int, trained: int) -> list[str]:
        other = f" ({trained})" if trained not in (0, batch) else ""
        made = [inference(name, f"{network}, batch {batch}", with_time=False) for name in SHOWN_CPUS]
        made += [training(name, f"{network}, batch {trained}", with_time=False) for name in SHOWN_CPUS]
        return [f"{network}, batch of {batch}{other}", *made]

    head = [f"{kind}: {name}" for kind in ("inference", "training") for name in SHOWN_CPUS]
    return table(["network", *head], itertools.starmap(line, SHOWN))


PAGES: dict[Path, Sections] = {
    ROOT / "docs/speed.md": {
        "forward": lambda: layers("conv_forward"),
        "training": lambda: layers("conv_training"),
        "shares": shares,
        "bf16 forward": lambda: layers("conv_forward", "torch bf16"),
        "bf16 training": lambda: layers("conv_training", "torch bf16"),
        "operator": operator,
        "dense": dense,
        "choices": choices,
        "layout": layout,
        "pruning": lambda: over_all_baselines("select", "prune_rewind_pack", "weights"),
        "adam": lambda: over_all_baselines("adam", "adam_step", "kept"),
        "steps": steps,
        "other steps": other_steps,
        "memory": memory,
        "searches": searches,
        "inference": lambda: by_cpu(["network"], cases("model", "inference", ", accelerate"), inference),
        "compiled": lambda: by_cpu(["network"], cases("model", "inference", ", torch.compile"), compiled),
        "networks trained": lambda: by_cpu(["network"], cases("model", "training_step", ", training"), training),
        "provenance": provenance,
    },
    ROOT / "docs/engine.md": {"profile": profile},
    ROOT / "README.md": {"layers": headline_layers, "steps": headline_steps, "networks": headline_networks},
}


if __name__ == "__main__":
    for page, sections in PAGES.items():
        page.write_text(filled(page, sections))
