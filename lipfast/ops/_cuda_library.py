"""The CUDA library of ``csrc/cuda``: loading it, the lists its kernels read, and launching them.

Nothing here needs a GPU to be imported. The same functions drive the library that nvcc builds and the one that runs the
kernels on the CPU for the tests.
"""

import ctypes
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lipfast.errors import BackendError

ABI_VERSION = 1
POINT, SAME, HALF, DOUBLE = range(4)  # enum LipfastGeometry in csrc/cuda/sparse_conv.h, which explains them
PADDING_MODES = {"zeros": 0, "reflect": 1, "replicate": 2, "circular": 3}

# A launch with fewer blocks than this takes the small register tile: about one block for each multiprocessor of an
# A100 or H100. Chosen by counting, not timed.
FILLING_BLOCKS = 128


class _Facts(ctypes.Structure):
    _fields_ = (
        ("group", ctypes.c_int32),
        ("taps", ctypes.c_int32),
        ("tap_columns", ctypes.c_int32),
        ("stage", ctypes.c_int32),
        ("tile_rows", ctypes.c_int32 * 2),
        ("tile_columns", ctypes.c_int32 * 2),
    )


class _Arguments(ctypes.Structure):
    """``LipfastSparseConv``, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "codes", "slots", "starts", "values", "bias")),
        *((name, ctypes.c_void_p) for name in ("packed", "y", "partial", "gradient")),
        *((name, ctypes.c_int32) for name in ("kept", "batch", "input_channels", "output_channels")),
        *((name, ctypes.c_int32) for name in ("rows", "columns", "y_rows", "y_columns", "pad_top", "pad_left")),
        *((name, ctypes.c_int32) for name in ("output_offset", "padding", "geometry", "small_tile", "splits")),
    )


@dataclass(frozen=True)
class Facts:
    """What a geometry's kernels expect; see ``LipfastGeometryFacts``. Tiles are (large, small), in output pixels."""

    group: int
    taps: int
    tap_columns: int
    stage: int
    tile_rows: tuple[int, int]
    tile_columns: tuple[int, int]

    def tiles(self, size: Sequence[int], small: bool) -> int:
        """Blocks that cover a plane of ``size`` (rows, columns)."""
        rows, columns = size
        return -(-rows // self.tile_rows[small]) * -(-columns // self.tile_columns[small])


class Library:
    """The shared library at ``path``.

    Raises:
        BackendError: the file is damaged or was built for another version of this module.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._c = ctypes.CDLL(str(path))
        except OSError as error:
            raise BackendError(f"the CUDA library {path} cannot be loaded ({error}); build it again") from error
        self._c.lipfast_cuda_error.restype = ctypes.c_char_p
        wanted = 1000 * ABI_VERSION + ctypes.sizeof(_Arguments)
        if (got := self._c.lipfast_cuda_abi()) != wanted:
            raise BackendError(f"the CUDA library {path} has interface {got}, expected {wanted}; build it again")

    def devices(self) -> int:
        """Number of usable GPUs.

        Raises:
            BackendError: the driver is missing or too old, in CUDA's words.
        """
        count = ctypes.c_int32()
        self._check("counting devices", self._c.lipfast_cuda_devices(ctypes.byref(count)))
        return count.value

    @functools.cache  # noqa: B019  one entry per geometry; the library lives as long as the process
    def facts(self, geometry: int) -> Facts:
        raw = _Facts()
        self._check("geometry facts", self._c.lipfast_geometry_facts(geometry, ctypes.byref(raw)))
        return Facts(raw.group, raw.taps, raw.tap_columns, raw.stage, (*raw.tile_rows,), (*raw.tile_columns,))

    def run(self, name: str, arguments: _Arguments, device: torch.device) -> None:
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        call = getattr(self._c, name)
        self._check(name, call(ctypes.byref(arguments), device.index or 0, ctypes.c_void_p(stream)))

    def _check(self, what: str, code: int) -> None:
        if code != 0:
            raise BackendError(f"{what}: CUDA error {code}, {self._c.lipfast_cuda_error(code).decode()}")


def find_library() -> Path:
    """Where the library is: ``LIPFAST_CUDA_LIBRARY``, else beside the package.

    Raises:
        ModuleNotFoundError: it was not built, which is the normal case.
    """
    path = Path(os.environ.get("LIPFAST_CUDA_LIBRARY") or Path(__file__).parents[1] / "_cuda.so")
    if not path.exists():
        raise ModuleNotFoundError(f"no CUDA library at {path}; install with LIPFAST_CUDA=1 where nvcc is on PATH")
    return path


@dataclass(frozen=True)
class Lists:
    """The kept weights of one layer in the order the kernels walk them, for one direction.

    Attributes:
        codes, slots: ``(kept,)`` int32; starts: ``(groups * inputs + 1,)`` int32. Format: ``csrc/cuda/sparse_conv.h``.
        inputs, outputs: virtual channels.
    """

    geometry: int
    codes: Tensor
    slots: Tensor
    starts: Tensor
    inputs: int
    outputs: int


def build_lists(library: Library, geometry: int, positions: Tensor, shape: torch.Size, *, transposed: bool) -> Lists:
    """Order the weights at ``positions`` (ascending flat indices into a dense weight of ``shape``) for the kernels.

    ``transposed`` gives the input gradient's lists. Costs a sort of ``kept`` keys: once per mask, not per step.
    """
    facts = library.facts(geometry)
    outputs, inputs, rows, columns = shape
    column, rest = positions % columns, positions // columns
    row, rest = rest % rows, rest // rows
    source, target = rest % inputs, rest // inputs
    if transposed:
        source, target, inputs, outputs = target, source, outputs, inputs
    if geometry == SAME and transposed:
        row, column = rows - 1 - row, columns - 1 - column
    elif geometry == HALF:  # rows of parity p form channel 2c + p
        source, inputs, row = 2 * source + row % 2, 2 * inputs, row // 2
    elif geometry == DOUBLE:  # pixels of one parity class form a channel; its window starts one pixel early
        target, outputs = 4 * target + 2 * (row % 2) + column % 2, 4 * outputs
        row, column = 1 - row // 2, 1 - column // 2
    in_group = target % facts.group * facts.taps + row * facts.tap_columns + column
    pair = target // facts.group * inputs + source  # (group, input channel)
    order = torch.argsort(pair * (facts.group * facts.taps) + in_group)
    groups = -(-outputs // facts.group)
    counts = torch.bincount(pair, minlength=groups * inputs)
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    codes = source % facts.stage * (facts.group * facts.taps) + in_group
    return Lists(geometry, codes[order].int(), order.int(), starts.int(), inputs, outputs)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def convolve(
    library: Library,
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    lists: Lists,
    y: Tensor,
    *,
    pad: int,
    padding_mode: str = "zeros",
    output_offset: int = 0,
) -> None:
    """Fill ``y`` ``(batch, channels, rows, columns)``; the first pixel's window sticks ``pad`` pixels out of ``x``."""
    facts = library.facts(lists.geometry)
    scale = 2 if lists.geometry == DOUBLE else 1
    rows, columns = (-(-(size + output_offset) // scale) for size in y.shape[2:])
    blocks = facts.tiles((rows, columns), False) * -(-lists.outputs // (4 * facts.group)) * len(x)
    packed = torch.empty(len(values), dtype=torch.int64, device=x.device)
    arguments = _arguments(x, lists, y, pad, padding_mode)
    arguments.values, arguments.bias, arguments.packed = _pointer(values), _pointer(bias), _pointer(packed)
    arguments.output_offset = output_offset
    arguments.small_tile = blocks < FILLING_BLOCKS
    library.run("lipfast_sparse_conv", arguments, x.device)


def weight_gradient(
    library: Library, x: Tensor, dy: Tensor, lists: Lists, *, pad: int, padding_mode: str = "zeros"
) -> Tensor:
    """``(kept,)`` gradient of each kept weight, summed over batch and pixels in a fixed order."""
    facts = library.facts(lists.geometry)
    group_blocks = -(-lists.outputs // (4 * facts.group))
    small = facts.tiles(dy.shape[2:], False) * len(x) * group_blocks < FILLING_BLOCKS
    jobs = facts.tiles(dy.shape[2:], small) * len(x)
    splits = max(1, min(jobs, 2 * FILLING_BLOCKS // group_blocks))
    kept = len(lists.codes)
    packed = torch.empty(kept, dtype=torch.int64, device=x.device)
    partial = torch.empty(splits, kept, device=x.device)
    gradient = torch.empty(kept, device=x.device)
    arguments = _arguments(x, lists, dy, pad, padding_mode)
    arguments.packed, arguments.partial, arguments.gradient = _pointer(packed), _pointer(partial), _pointer(gradient)
    arguments.small_tile, arguments.splits = small, splits
    library.run("lipfast_sparse_conv_weight_gradient", arguments, x.device)
    return gradient


def _arguments(x: Tensor, lists: Lists, y: Tensor, pad: int, padding_mode: str) -> _Arguments:
    return _Arguments(
        x=_pointer(x),
        codes=_pointer(lists.codes),
        slots=_pointer(lists.slots),
        starts=_pointer(lists.starts),
        y=_pointer(y),
        kept=len(lists.codes),
        batch=len(x),
        input_channels=lists.inputs,
        output_channels=lists.outputs,
        rows=x.shape[2],
        columns=x.shape[3],
        y_rows=y.shape[2],
        y_columns=y.shape[3],
        pad_top=pad,
        pad_left=pad,
        padding=PADDING_MODES[padding_mode],
        geometry=lists.geometry,
    )
