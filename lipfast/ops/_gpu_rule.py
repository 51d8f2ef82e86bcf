"""Which kernel a GPU runs for each direction of a pruned convolution: the one that was faster on an H200.

``gpu_rule.json`` holds the densities below which the sparse kernels were faster than dense ones of the same precision,
for the layers of the skip net; ``benchmarks/fit_gpu_rule.py`` writes it from the rows of ``make bench-gpu``. A layer
takes the row of the measured one that is most like it.
"""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("gpu_rule.json")
DIRECTIONS = ("forward", "input_gradient", "weight_gradient")


@dataclass(frozen=True)
class Layer:
    """A pruned convolution at one input size.

    Attributes:
        shape: of its dense weight, (outputs, inputs, kernel rows, kernel columns).
        output_size: (batch, channels, rows, columns).
        stride: rows, columns.
        density: share of kept weights.
    """

    shape: tuple[int, ...]
    output_size: tuple[int, ...]
    stride: tuple[int, int]
    density: float

    @property
    def form(self) -> str:
        """The measured form it is most like."""
        window = "1x1" if self.shape[2] == self.shape[3] == 1 else "3x3"
        return window if self.stride == (1, 1) else "3x3 stride 2"

    @property
    def work(self) -> int:
        """Multiply-adds of the dense layer for each tap."""
        return self.shape[0] * self.shape[1] * math.prod(self.output_size[2:]) * self.output_size[0]


def choose(layer: Layer, *, library: str, precision: str) -> dict[str, str]:
    """Direction -> "sparse", "dense" or "masked".

    Args:
        layer: what is convolved.
        library: which backend runs sparse kernels, "cuda" or "triton"; any other has none that is worth a choice.
        precision: "ieee", "tf32" or "bf16": what factors may be rounded to.
    """
    chosen = {}
    for direction in DIRECTIONS:
        row = _nearest(layer, direction, library, precision)
        chosen[direction] = "sparse" if layer.density < row["sparse_below"] else row["dense"]
    return chosen


def _nearest(layer: Layer, direction: str, library: str, precision: str) -> Mapping[str, Any]:
    """The row of the measured layer of the same form whose amount of work is nearest."""
    rows = _table().get(library, {}).get(layer.form, {}).get(direction, {}).get(precision)
    if not rows:
        return {"sparse_below": 0.0, "dense": "dense"}
    nearest: Mapping[str, Any] = min(rows, key=lambda row: abs(math.log(row["work"] / max(1, layer.work))))
    return nearest


@functools.cache
def _table() -> Mapping[str, Any]:
    table: Mapping[str, Any] = json.loads(TABLE.read_text())["libraries"]
    return table
