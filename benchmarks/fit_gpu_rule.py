"""Writes the table of `lipfast.ops._gpu_rule` from timings:  python benchmarks/fit_gpu_rule.py docs/results/gpu.jsonl

For each measured layer, direction and precision: the density at which the sparse kernel takes as long as the fastest
dense one, between measured densities by a straight line, below the smallest by the line through the two smallest. Maps
are NCHW in the engine, so dense kernels are taken in that format. An input gradient at stride 1 is the forward kernel
with mirrored lists and takes its times: its own rows fold mirrored borders back, which a dense gradient needs as well
and the dense rows leave out.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lipfast.ops._gpu_rule import DIRECTIONS, TABLE

LIBRARIES = ("cuda", "triton")
CHANNELS = 128  # of the layers that stand for their form
# What may stand in for a sparse kernel at each precision; gradients of "bf16" run in TF32.
RIVALS = {
    "ieee": {"torch ieee": "dense"},
    "tf32": {"torch ieee": "dense", "torch tf32": "dense"},
    "bf16": {"torch ieee": "dense", "torch tf32": "dense", "masked bf16": "masked"},
}


def break_even(dense: float, sparse: Mapping[float, float]) -> float:
    """The largest density at which ``sparse`` (density -> time) is not slower than ``dense``; 0 if it never is."""
    points = sorted(sparse.items())
    if points[-1][1] <= dense:
        return points[-1][0]
    for (low, fast), (high, slow) in reversed(list(itertools.pairwise(points))):
        if fast <= dense < slow:
            return low + (high - low) * (dense - fast) / (slow - fast)
    (low, fast), (high, slow) = points[:2]
    return max(0.0, low - (fast - dense) * (high - low) / (slow - fast)) if slow > fast else 0.0


def fit(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The table: library -> form -> direction -> precision -> rows."""
    times: dict[tuple[str, int, str], dict[str, dict[float, float]]] = {}
    for row in rows:
        if row["kind"] == "conv" and row["inputs"] == row["outputs"] == CHANNELS:
            form = f"{row['kernel']}x{row['kernel']}" + (f" stride {row['stride']}" if row["stride"] > 1 else "")
            out = (row["pixels"] - 1) // row["stride"] + 1
            found = times.setdefault((form, (CHANNELS * out) ** 2, row["direction"]), {})
            found.setdefault(row["implementation"], {})[row["density"]] = row["microseconds"]["median"]
    table: dict[str, Any] = {}
    for library, ((form, work, direction), found) in itertools.product(LIBRARIES, times.items()):
        if library not in found:
            continue
        for precision, rivals in RIVALS.items():
            dense = {name: max(found[name].values()) for name in rivals if name in found}
            best = min(dense, key=dense.__getitem__)
            place = table.setdefault(library, {}).setdefault(form, {}).setdefault(direction, {})
            mirrored = direction == "input_gradient" and "stride" not in form
            sparse = times[form, work, "forward"] if mirrored else found
            density = break_even(dense[best], sparse[library])
            place.setdefault(precision, []).append(
                {"work": work, "sparse_below": round(density, 4), "dense": rivals[best]}
            )
    assert all(set(forms) == set(DIRECTIONS) for each in table.values() for forms in each.values())
    return table


def main(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    devices = {row["device"] for row in rows}
    versions = {json.dumps(row["versions"]) for row in rows}
    if len(devices) != 1 or len(versions) != 1:
        raise SystemExit(f"{path}: rows of several machines or versions: {', '.join(sorted(devices | versions))}")
    measured = {"device": devices.pop(), "versions": json.loads(versions.pop()), "time": rows[0]["time"]}
    TABLE.write_text(json.dumps({"measured": measured, "libraries": fit(rows)}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
