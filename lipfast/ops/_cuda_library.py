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

ABI_VERSION = 2
CONVOLUTION, WEIGHT_GRADIENT = range(2)  # enum LipfastKernel in csrc/cuda/sparse_conv.h, which explains the rest
SIZES = ("large", "medium", "small")
PADDING_MODES = {"zeros": 0, "reflect": 1, "replicate": 2, "circular": 3}
READ_AHEAD = 128  # entries
VECTOR = 4  # floats of the widest copy
LANES = 32

# A launch takes the largest tile that gives this many blocks: about one for each multiprocessor of an A100 or H100.
FILLING_BLOCKS = 96
MOST_SHARED_BYTES = 160 << 10  # of a block; an A100 has 163 KB


class _Facts(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int32) for name in ("warps", "lists", "rows", "stage", "pitch"))


class _Arguments(ctypes.Structure):
    """``LipfastSparseConv``, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "entries", "counts", "begins", "outputs")),
        *((name, ctypes.c_void_p) for name in ("values", "bias", "y", "partial", "gradient")),
        *((name, ctypes.c_int32) for name in ("listed", "list_warps", "batch", "channels", "rows", "columns")),
        *((name, ctypes.c_int32) for name in ("y_channels", "y_rows", "y_columns", "stages")),
        *((name, ctypes.c_int32) for name in ("row_phases", "column_phases", "row_scale", "column_scale")),
        *((name, ctypes.c_int32) for name in ("halo_rows", "pad_top", "pad_left", "shift")),
        *((name, ctypes.c_int32) for name in ("top_cut", "left_cut", "padding", "size", "splits")),
    )


@dataclass(frozen=True)
class Facts:
    """How a block cuts the work; see ``LipfastTileFacts``."""

    warps: int
    lists: int
    rows: int
    stage: int
    pitch: int

    def tiles(self, size: Sequence[int]) -> int:
        """Tiles that cover a plane of ``size`` (rows, columns)."""
        return -(-size[0] // self.rows) * -(-size[1] // LANES)

    def group_blocks(self, outputs: int) -> int:
        """Blocks that share a tile, each with its own output channels."""
        return -(-outputs // (self.warps * self.lists))


@dataclass(frozen=True)
class Form:
    """One direction of a layer as a stride-1 problem on virtual channels: (rows, columns) everywhere.

    Attributes:
        taps: window of the stride-1 problem.
        phases: virtual channels of a source channel along each axis.
        scale: virtual channels of an output channel along each axis.
    """

    taps: tuple[int, int]
    phases: tuple[int, int] = (1, 1)
    scale: tuple[int, int] = (1, 1)

    @classmethod
    def of(cls, shape: torch.Size, stride: tuple[int, int], *, transposed: bool) -> "Form":
        """Of a weight of ``shape``; ``transposed`` for its input gradient."""
        taps = (-(-shape[2] // stride[0]), -(-shape[3] // stride[1]))
        return cls(taps, scale=stride) if transposed else cls(taps, phases=stride)

    @property
    def halo(self) -> tuple[int, int]:
        """Rows and columns that a tile's source is larger than the tile."""
        return self.taps[0] - 1, self.taps[1] - 1


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

    @functools.cache  # noqa: B019  one entry per kernel and size; the library lives as long as the process
    def facts(self, kernel: int, size: int) -> Facts:
        raw = _Facts()
        self._check("tile facts", self._c.lipfast_tile_facts(kernel, size, ctypes.byref(raw)))
        return Facts(*(getattr(raw, name) for name, *_ in _Facts._fields_))

    @functools.cache  # noqa: B019  one entry per kernel and form; every call of a layer asks
    def sizes(self, kernel: int, form: Form) -> tuple[int, ...]:
        """Tile sizes, largest first, whose staged channels fit into a block's shared memory."""
        phases = form.phases[0] * form.phases[1]
        bytes_of = self._c.lipfast_shared_bytes
        return tuple(
            size
            for size in range(len(SIZES))
            if bytes_of(kernel, size, form.halo[0], phases) <= MOST_SHARED_BYTES
            and self._copied_at_once(self.facts(kernel, size), form)
        )

    @staticmethod
    def _copied_at_once(facts: Facts, form: Form) -> bool:
        """Whether a block has a thread for every four pixels of a staged channel."""
        return (facts.rows + form.halo[0]) * facts.pitch <= VECTOR * LANES * facts.warps

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
    """The kept weights of one layer in the order the kernels walk them, for one direction and tile.

    Attributes:
        form, size: what they were made for.
        entries, counts, begins, outputs: int32; shapes, format and order in ``csrc/cuda/sparse_conv.h``.
        shift: staged columns before the first one that is used.
        stages: of input channels.
        listed: entries, padding counted in.
    """

    form: Form
    size: int
    entries: Tensor
    counts: Tensor
    begins: Tensor
    outputs: Tensor
    shift: int
    stages: int
    listed: int


def pick_size(library: Library, kernel: int, form: Form, outputs: int, plane: Sequence[int], batch: int) -> int:
    """The largest tile that fills a GPU with ``outputs`` (virtual) channels of ``plane`` pixels, else the smallest."""
    sizes = library.sizes(kernel, form)
    for size in sizes:
        facts = library.facts(kernel, size)
        if facts.tiles(plane) * facts.group_blocks(outputs) * batch >= FILLING_BLOCKS:
            return size
    return sizes[-1]


def build_lists(
    library: Library,
    kernel: int,
    size: int,
    positions: Tensor,
    shape: torch.Size,
    stride: tuple[int, int],
    *,
    pad_left: int,
    transposed: bool = False,
) -> Lists:
    """Order the weights at ``positions`` (ascending flat indices into a dense weight of ``shape``) for a kernel.

    ``transposed`` gives the input gradient's lists. Costs a sort of ``kept`` keys: once per mask, not per step.
    """
    facts, form = library.facts(kernel, size), Form.of(shape, stride, transposed=transposed)
    tap, source, target, inputs, outputs = _virtual(positions, shape, form, transposed=transposed)
    # Columns of x on 16 bytes are staged on 16 bytes where the row has room for it.
    shift = -pad_left % VECTOR if form.phases[1] == 1 else 0
    shift = shift if LANES + form.halo[1] + shift <= facts.pitch else 0
    plane = (facts.rows + form.halo[0]) * facts.pitch
    offset = source % facts.stage * plane + tap[0] * facts.pitch + tap[1] + shift

    # Warps get channels with many and with few weights alike, so that they reach the barriers together.
    stages = -(-inputs // facts.stage)
    warps = facts.group_blocks(outputs) * facts.warps
    places = torch.full((warps * facts.lists,), -1, dtype=torch.int64, device=positions.device)
    by_weight = torch.argsort(torch.bincount(target, minlength=outputs), descending=True, stable=True)
    rank = torch.arange(outputs, device=positions.device)
    place = rank % warps * facts.lists + rank // warps
    places[place] = by_weight
    place_of = torch.empty_like(by_weight)
    place_of[by_weight] = place

    # A segment is what one warp does for one output channel in one stage.
    warp, list_number = place_of[target] // facts.lists, place_of[target] % facts.lists
    segment = (warp * stages + source // facts.stage) * facts.lists + list_number
    segments = warps * stages * facts.lists
    order = torch.argsort(segment * (facts.stage * plane) + offset)
    counts = torch.bincount(segment, minlength=segments)
    starts = _before(counts + counts % 2)
    listed = len(positions) + segments + len(positions) % 2  # as many as there can be: no need to ask the device
    ordered = segment[order]
    at = starts[ordered] + torch.arange(len(positions), device=positions.device) - _before(counts)[ordered]
    entries = torch.full((listed + READ_AHEAD, 2), -1, dtype=torch.int32, device=positions.device)
    entries[at] = torch.stack((4 * offset[order], order), 1).int()
    begins = starts[:: stages * facts.lists].int()
    counts = torch.nn.functional.pad(counts, (0, facts.lists)).int()
    return Lists(form, size, entries, counts, begins, places.int(), shift, stages, listed)


def _virtual(
    positions: Tensor, shape: torch.Size, form: Form, *, transposed: bool
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, int, int]:
    """Of each weight: its tap (row, column), source and target channel; then the numbers of both kinds of channel."""
    outputs, inputs, rows, columns = shape
    column, rest = positions % columns, positions // columns
    row, rest = rest % rows, rest // rows
    source, target = rest % inputs, rest // inputs
    if not transposed:
        down, across = form.phases
        source = (source * down + row % down) * across + column % across
        return (row // down, column // across), source, target, inputs * down * across, outputs
    down, across = form.scale
    virtual = (source * down + row % down) * across + column % across
    tap = form.taps[0] - 1 - row // down, form.taps[1] - 1 - column // across
    return tap, target, virtual, outputs, inputs * down * across


def _before(counts: Tensor) -> Tensor:
    """Sum of the counts before each."""
    return counts.cumsum(0) - counts


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
    pad: tuple[int, int],
    padding_mode: str = "zeros",
    cut: tuple[int, int] = (0, 0),
) -> None:
    """Fill ``y`` ``(batch, channels, rows, columns)``; the first pixel's window sticks ``pad`` pixels out of ``x``."""
    arguments = _arguments(library, CONVOLUTION, x, lists, y, pad, padding_mode)
    arguments.values, arguments.bias = _pointer(values), _pointer(bias)
    arguments.top_cut, arguments.left_cut = cut
    library.run("lipfast_sparse_conv", arguments, x.device)


def weight_gradient(
    library: Library, x: Tensor, dy: Tensor, kept: int, lists: Lists, *, pad: tuple[int, int], padding_mode: str
) -> Tensor:
    """``(kept,)`` gradient of each kept weight, summed over batch and pixels in a fixed order."""
    facts = library.facts(WEIGHT_GRADIENT, lists.size)
    blocks = facts.group_blocks(dy.shape[1])
    splits = max(1, min(facts.tiles(dy.shape[2:]) * len(x), FILLING_BLOCKS * 4 // 3 // blocks))
    partial = torch.empty(splits, lists.listed, dtype=torch.float32, device=x.device)
    gradient = torch.empty(kept, dtype=torch.float32, device=x.device)
    arguments = _arguments(library, WEIGHT_GRADIENT, x, lists, dy, pad, padding_mode)
    arguments.partial, arguments.gradient, arguments.splits = _pointer(partial), _pointer(gradient), splits
    library.run("lipfast_sparse_conv_weight_gradient", arguments, x.device)
    return gradient


def _arguments(
    library: Library, kernel: int, x: Tensor, lists: Lists, y: Tensor, pad: tuple[int, int], padding_mode: str
) -> _Arguments:
    form, facts = lists.form, library.facts(kernel, lists.size)
    return _Arguments(
        x=_pointer(x),
        entries=_pointer(lists.entries),
        counts=_pointer(lists.counts),
        begins=_pointer(lists.begins),
        outputs=_pointer(lists.outputs),
        y=_pointer(y),
        listed=lists.listed,
        list_warps=len(lists.outputs) // facts.lists,
        batch=len(x),
        channels=x.shape[1],
        rows=x.shape[2],
        columns=x.shape[3],
        y_channels=y.shape[1],
        y_rows=y.shape[2],
        y_columns=y.shape[3],
        stages=lists.stages,
        row_phases=form.phases[0],
        column_phases=form.phases[1],
        row_scale=form.scale[0],
        column_scale=form.scale[1],
        halo_rows=form.halo[0],
        pad_top=pad[0],
        pad_left=pad[1],
        shift=lists.shift,
        padding=PADDING_MODES[padding_mode],
        size=lists.size,
    )
