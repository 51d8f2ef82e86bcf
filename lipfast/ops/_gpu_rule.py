"""Which kernel a GPU runs for each direction of a pruned convolution: by bounds, as nothing here has been timed.

A direction goes to its sparse kernel where the kernel's *bound* beats a dense convolution of the same precision, i.e.
below a share of the break-even densities of docs/gpu.md (``gpu_break_even.json``, written with them by ``make
gpu-tables``). The rest runs densely: in torch, or, where bf16 factors are allowed, forward in
`lipfast.ops.masked_conv2d`, which rounds them while loading so that no map is converted.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lipfast.ops._cuda_library import FILLING_BLOCKS

TABLE = Path(__file__).with_name("gpu_break_even.json")
# Of the break-even density. Dense kernels are assumed at a share of the peak that they are known to reach; a sparse
# kernel falls short of its bound by an amount that only a GPU can tell. Half is a guess, to be replaced by timings.
SHARE_OF_BREAK_EVEN = 0.5
DIRECTIONS = ("forward", "input_gradient", "weight_gradient")
# Output pixels and channels of a block with the large register tile (csrc/cuda/sparse_conv.cu).
TILE = (16, 32)
CHANNELS_A_BLOCK = {"1x1": 48, "3x3": 32, "3x3 stride 2": 32, "3x3 stride 2 transposed": 48}
# What dense arithmetic a precision competes with: bf16 gradients run in TF32.
RIVALS = {"ieee": ("fp32", "fp32"), "tf32": ("tf32", "tf32"), "bf16": ("bf16", "tf32")}  # forward, gradients


@dataclass(frozen=True)
class Layer:
    """A pruned convolution at one input size.

    Attributes:
        shape: of its dense weight, (outputs, inputs, kernel rows, kernel columns).
        input_size, output_size: (batch, channels, rows, columns).
        stride: rows, columns.
        density: share of kept weights.
    """

    shape: tuple[int, ...]
    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    stride: tuple[int, int]
    density: float

    @property
    def form(self) -> str:
        """The row of the tables it is in; rows that do not exist have no CUDA kernel."""
        rows, columns = self.shape[2:]
        stride = "" if self.stride == (1, 1) else f" stride {self.stride[0]}"
        return f"{rows}x{columns}{stride}" if self.stride[0] == self.stride[1] else "uneven stride"


def choose(layer: Layer, *, target: str, library: str, precision: str) -> dict[str, str]:
    """Direction -> "sparse", "dense" or "masked".

    Args:
        layer: what is convolved.
        target: "sm_80" or "sm_90": whose bounds count, see `target_of`.
        library: which backend runs sparse kernels, "cuda" or "triton"; any other has none that is worth a choice.
        precision: "ieee", "tf32" or "bf16": what factors may be rounded to.
    """
    chosen = {}
    for direction in DIRECTIONS:
        rival = RIVALS[precision][direction != "forward"]
        sparse = layer.density < SHARE_OF_BREAK_EVEN * break_even(layer, direction, target, library)[rival]
        dense = "masked" if precision == "bf16" and direction == "forward" else "dense"
        chosen[direction] = "sparse" if sparse else dense
    return chosen


def break_even(layer: Layer, direction: str, target: str, library: str) -> Mapping[str, float]:
    """Density below which the sparse kernel's bound beats dense arithmetic, by its name; all 0 without a kernel."""
    rows: Mapping[str, Any] = _table()[target].get(library, {})
    if library == "cuda" and layer.form in CHANNELS_A_BLOCK:
        rows = rows[f"{layer.form} {'large' if fills_a_gpu(layer, direction) else 'small'}"]
    elif library in ("cuda", "triton"):  # the CUDA backend passes other layers on
        rows = _table()[target]["triton"]
        mirrored = direction == "input_gradient" and layer.stride == (1, 1)
        direction = "forward" if mirrored else direction
    found: Mapping[str, float] = rows.get(direction, {"fp32": 0.0, "tf32": 0.0, "bf16": 0.0})
    return found


def fills_a_gpu(layer: Layer, direction: str) -> bool:
    """Whether the CUDA kernels take the large register tile; the same count as in `_cuda_library`."""
    form, channels, (rows, columns) = layer.form, layer.shape[0], layer.output_size[2:]
    if direction == "input_gradient":
        channels, (rows, columns) = layer.shape[1], layer.input_size[2:]
        if form == "3x3 stride 2":
            form, channels = "3x3 stride 2 transposed", 4 * channels
            rows, columns = -(-rows // 2), -(-columns // 2)
    tiles = -(-rows // TILE[0]) * -(-columns // TILE[1])
    return tiles * -(-channels // CHANNELS_A_BLOCK[form]) * layer.input_size[0] >= FILLING_BLOCKS


def target_of(device: torch.device) -> str:
    """Whose bounds count for a device: the A100's own; the H100's, which are stricter, for any other."""
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) == (8, 0):
        return "sm_80"
    return "sm_90"


@functools.cache
def _table() -> Mapping[str, Any]:
    table: Mapping[str, Any] = json.loads(TABLE.read_text())
    return table
