"""One convolution on maps that stay in the lane layout."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

import lipfast._C as _C
from lipfast.errors import ConfigError, InputError
from lipfast.ops import _padding
from lipfast.ops.lanes import GRID, LANES, PADDING_MODES, LaneMap, empty

KERNELS = {"auto": 0, "sparse": 1, "winograd": 2, "dense": 3}


def asked_kernel(kernel: str | None = None) -> str:
    """The kernel to run: the argument, else ``LIPFAST_KERNEL``, else ``auto`` (the cost model chooses)."""
    name = kernel or os.environ.get("LIPFAST_KERNEL") or "auto"
    if name not in KERNELS:
        raise ConfigError(f"convolution kernel {name!r} is unknown; use one of {', '.join(KERNELS)}")
    return name


@dataclass(frozen=True)
class ConvForm:
    """What a convolution is, apart from its weights; sizes as in ``torch.nn.Conv2d``."""

    out_channels: int
    in_channels: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    padding_mode: str = "zeros"
    dilation: int = 1
    groups: int = 1

    @classmethod
    def of(
        cls,
        shape: torch.Size,
        stride: tuple[int, int],
        padding: tuple[int, int],
        padding_mode: str,
        dilation: int,
        groups: int,
    ) -> "ConvForm":
        """Of a weight of that shape; the stride is that of the rows."""
        kernel = (shape[2], shape[3])
        return cls(shape[0], shape[1] * groups, kernel, stride[0], padding, padding_mode, dilation, groups)

    @property
    def settings(self) -> tuple[tuple[int, int], tuple[int, int], str, int, int]:
        """Stride of rows and columns, padding, its mode, dilation and groups."""
        return (self.stride, self.stride), self.padding, self.padding_mode, self.dilation, self.groups

    @property
    def border(self) -> int:
        """Pixels around an input that hold copies of others; zeros lie there anyway."""
        return 0 if self.padding_mode == "zeros" else self.padding[0]

    def border_of(self, height: int, width: int) -> int:
        """The same around an output, for a layer like this one behind it; 0 where it has too few pixels."""
        fits = all(self.border <= _padding.widest(side, self.padding_mode) for side in (height, width))
        return self.border if fits else 0

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Pixels of the output for an input of ``height`` x ``width``."""
        rows, columns = (
            (side + 2 * pad - self.dilation * (kernel - 1) - 1) // self.stride + 1
            for side, pad, kernel in zip((height, width), self.padding, self.kernel, strict=True)
        )
        return rows, columns


def _block(side: int, out_side: int, stride: int) -> int:
    """Pixels of an output block, such that blocks ``stride`` times as large hold the input."""
    return max(-(-out_side // GRID), -(-side // (GRID * stride)))


# Lanes that take so many times the picture's floats lose to torch, unless they are few (docs/lanes.md).
_MOST_OF_A_PICTURE = 16
_FEW_FLOATS = 4096


def fits_lanes(form: ConvForm, height: int, width: int) -> bool:
    """Whether a channel of ``height`` x ``width`` pixels takes a reasonable amount of memory as input of a layer."""
    return _lane_floats(form, height, width) <= max(_FEW_FLOATS, _MOST_OF_A_PICTURE * height * width)


def _lane_floats(form: ConvForm, height: int, width: int) -> int:
    """Floats of a channel. A block is no smaller than the stride, and as much as taps reach beyond lies around each."""
    rows, columns = (side + 2 * input_halo(form) for side in input_block(form, height, width))
    return LANES * rows * columns


def input_halo(form: ConvForm) -> int:
    """Vectors around each block of an input that the taps of a layer read."""
    behind = [form.dilation * (k - 1) - pad - form.stride + 1 for k, pad in zip(form.kernel, form.padding, strict=True)]
    return max(0, *form.padding, *behind)


def input_block(form: ConvForm, height: int, width: int) -> tuple[int, int]:
    """The smallest blocks of an input from which a layer makes whole blocks of its output."""
    sides = zip((height, width), form.out_size(height, width), strict=True)
    rows, columns = (form.stride * _block(side, out_side, form.stride) for side, out_side in sides)
    return rows, columns


class LaneConv:
    """Forward, input gradient and weight gradient of one convolution, weights packed.

    ``values`` are the kept weights of ``(out, in / groups, kh, kw)`` in row-major order, all of them where ``mask`` is
    None. Maps are `LaneMap` of the sizes given here. The object keeps its scratch memory, so one call at a time.

    Args:
        form: the convolution.
        mask: bool of the weight's shape, True where a weight is kept; None is dense.
        batch, height, width: of the input.
        block: pixels of an input block, multiples of the stride; None: as few as the layer allows.
        kernel: ``auto``, ``sparse``, ``winograd`` or ``dense``; None reads ``LIPFAST_KERNEL``. A kernel that cannot do
            the layer (Winograd other than 3x3, stride 1 or 2, padding 1, and 5x5, stride 1, padding 2, from 4 x 4 px
            on) leaves the choice to the cost model.
        exact: never Winograd, whose rounding error is a few times larger (relative 1e-6 to 2e-6 instead of 3e-7).

    Raises:
        InputError: sizes that do not fit together; the message names them.
    """

    def __init__(
        self,
        form: ConvForm,
        mask: Tensor | None,
        batch: int,
        height: int,
        width: int,
        *,
        block: tuple[int, int] | None = None,
        kernel: str | None = None,
        exact: bool = False,
    ) -> None:
        if form.padding_mode not in PADDING_MODES:
            raise InputError(f"padding_mode {form.padding_mode!r} is unknown; use one of {', '.join(PADDING_MODES)}")
        if form.padding_mode != "zeros" and form.padding[0] != form.padding[1]:
            raise InputError(f"conv: {form.padding_mode} padding differs by side, {form.padding}; pad the input first")
        if min(form.stride, form.dilation, form.groups) < 1 or min(form.padding) < 0:
            raise InputError(f"conv: stride, dilation and groups are at least 1 and padding 0, got {form}")
        self.form, self.batch, self.height, self.width = form, batch, height, width
        self.out_height, self.out_width = form.out_size(height, width)
        if min(batch, self.out_height, self.out_width) < 1:
            raise InputError(f"conv: {batch} pictures of {height} x {width} pixels leave no output with {form}")
        floats = form.in_channels * _lane_floats(form, height, width)
        if floats >= 1 << 31:
            raise InputError(f"conv: a picture of {height} x {width} pixels takes {floats} floats in lanes with {form}")
        least = input_block(form, height, width)
        self.in_block = block or least
        if any(side < few or side % form.stride for side, few in zip(self.in_block, least, strict=True)):
            raise InputError(
                f"conv: blocks of {self.in_block} do not suit an input of {height} x {width} pixels with {form}; they "
                f"must be multiples of the stride and at least {least}"
            )
        self.out_block = (self.in_block[0] // form.stride, self.in_block[1] // form.stride)
        choice = KERNELS[asked_kernel(kernel)]
        bytes_ = None if mask is None else mask.contiguous().view(torch.uint8).numpy()
        try:
            self._conv = _C.Conv(
                form.out_channels,
                form.in_channels,
                form.groups,
                form.kernel,
                form.stride,
                form.dilation,
                form.padding,
                PADDING_MODES[form.padding_mode],
                (batch, height, width),
                self.out_block,
                bytes_,
                choice,
                exact,
            )
        except ValueError as wrong:
            raise InputError(str(wrong)) from None
        self._scratch: dict[int, Tensor] = {}

    @property
    def kept(self) -> int:
        """How many weights are kept."""
        return int(self._conv.kept)

    @property
    def kernels(self) -> dict[str, str]:
        """What runs each direction: sparse, winograd or dense."""
        return dict(zip(("forward", "input_gradient", "weight_gradient"), self._conv.kernels, strict=True))

    @property
    def in_halo(self) -> int:
        """Halo that an input map needs."""
        return int(max(0, self._conv.input_halo, *self.form.padding))

    @property
    def gradient_halo(self) -> int:
        """Halo that an output gradient needs, filled with zeros."""
        return int(self._conv.gradient_halo)

    def input_map(self, halo: int | None = None) -> LaneMap:
        """A map to hold the input (``in_halo``), or its gradient (any halo)."""
        halo = self.in_halo if halo is None else halo
        return LaneMap.allocate(self.batch, self.form.in_channels, self.height, self.width, halo, self.in_block)

    def output_map(self, halo: int = 0, *, zeroed: bool = True) -> LaneMap:
        """A map to hold the output (any halo) or its gradient (``gradient_halo``)."""
        sizes = (self.batch, self.form.out_channels, self.out_height, self.out_width)
        return LaneMap.allocate(*sizes, halo, self.out_block, zeroed=zeroed)

    def fill_input(self, x: LaneMap) -> None:
        """Write the padding into the halo of an input map."""
        x.fill_halo(self.form.padding_mode, self.form.border)

    def forward(self, values: Tensor, bias: Tensor | None, x: LaneMap, y: LaneMap) -> None:
        """``y = conv(x) + bias``; the halo of ``x`` is filled, only pixels of ``y`` are written."""
        threads = torch.get_num_threads()
        self._conv.forward(
            values.detach().numpy(),
            None if bias is None else bias.detach().numpy(),
            x.data.numpy(),
            x.halo,
            y.data.numpy(),
            y.halo,
            self._scratch_for(threads),
            threads,
        )

    def input_gradient(self, values: Tensor, dy: LaneMap, dx: LaneMap) -> None:
        """Gradient for the input; halo and dead pixels of ``dy`` hold zeros; only pixels of ``dx`` are written."""
        threads = torch.get_num_threads()
        self._conv.input_gradient(
            values.detach().numpy(),
            dy.data.numpy(),
            dy.halo,
            dx.data.numpy(),
            dx.halo,
            self._scratch_for(threads),
            threads,
        )

    def weight_gradient(self, x: LaneMap, dy: LaneMap, dvalues: Tensor, dbias: Tensor | None) -> None:
        """Gradients for the kept values ``(kept,)`` and the bias, overwritten; dead pixels of ``dy`` hold zeros."""
        threads = torch.get_num_threads()
        self._conv.weight_gradient(
            x.data.numpy(),
            x.halo,
            dy.data.numpy(),
            dy.halo,
            dvalues.numpy(),
            None if dbias is None else dbias.numpy(),
            self._scratch_for(threads),
            threads,
        )

    def _scratch_for(self, threads: int) -> NDArray[Any]:
        if threads not in self._scratch:
            self._scratch = {threads: empty(self._conv.scratch_floats(threads))}
        scratch: NDArray[Any] = self._scratch[threads].numpy()
        return scratch
