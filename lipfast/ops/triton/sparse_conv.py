"""Portable weight-sparse convolution: any kernel size and stride, fp32, fp16 or bf16 maps, fp32 sums, no atomics.

The maps are padded beforehand. Each kept weight is one entry: its offset in a padded map and its value, ordered by
output channel (forward) or input channel (input gradient). One load feeds one multiply-add, which caps these kernels at
a quarter of the FP32 peak of an H100; the CUDA library exists to pass that.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lipfast.ops import _padding
from lipfast.ops._autograd import version_of
from lipfast.ops._checks import check_positions
from lipfast.ops.triton.configs import CONFIGS


@triton.jit
def sparse_forward_kernel(
    x, values, offsets, starts, bias, y,
    pixels, y_columns, stride_rows, stride_columns, x_columns, x_item, y_channels,
    BLOCK: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Grid: (pixel blocks, output channels, batch). x is padded ``[batch, channels, rows, columns]``."""
    channel = tl.program_id(1)
    item = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    corner = (pixel // y_columns) * (stride_rows * x_columns) + (pixel % y_columns) * stride_columns
    source = x + item * x_item + corner
    total = tl.zeros((BLOCK,), tl.float32)
    if BIASED:
        total += tl.load(bias + channel).to(tl.float32)
    for entry in range(tl.load(starts + channel), tl.load(starts + channel + 1)):
        weight = tl.load(values + entry).to(tl.float32)
        total += weight * tl.load(source + tl.load(offsets + entry), mask=inside, other=0.0).to(tl.float32)
    target = y + (item * y_channels + channel) * pixels + pixel
    tl.store(target, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def sparse_input_gradient_kernel(
    dy, values, slots, channels, rows, columns, starts, dx,
    pixels, dx_columns, dx_channels, dy_rows, dy_columns, dy_channels,
    STRIDE_ROWS: tl.constexpr, STRIDE_COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (pixel blocks, input channels, batch). Gathers, so that no two programs add to one pixel."""
    channel = tl.program_id(1)
    item = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = pixel // dx_columns, pixel % dx_columns
    total = tl.zeros((BLOCK,), tl.float32)
    for entry in range(tl.load(starts + channel), tl.load(starts + channel + 1)):
        weight = tl.load(values + tl.load(slots + entry)).to(tl.float32)
        down, across = row - tl.load(rows + entry), column - tl.load(columns + entry)
        dy_row, dy_column = down // STRIDE_ROWS, across // STRIDE_COLUMNS
        hit = (pixel < pixels) & (down >= 0) & (across >= 0) & (dy_row < dy_rows) & (dy_column < dy_columns)
        hit &= (dy_row * STRIDE_ROWS == down) & (dy_column * STRIDE_COLUMNS == across)
        plane = dy + (item * dy_channels + tl.load(channels + entry)) * (dy_rows * dy_columns)
        total += weight * tl.load(plane + dy_row * dy_columns + dy_column, mask=hit, other=0.0).to(tl.float32)
    target = dx + (item * dx_channels + channel) * pixels + pixel
    tl.store(target, total.to(dx.dtype.element_ty), mask=pixel < pixels)


@triton.jit
def sparse_weight_gradient_kernel(
    x, dy, channels, offsets, corners, gradient,
    batch, pixels, x_item, y_channels,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: kept weights. One program owns one weight: one reduction, always in the same order.

    ``corners[pixel]``: where the window of an output pixel begins in a padded map. Loading it replaces a division.
    """
    entry = tl.program_id(0)
    channel = tl.load(channels + entry)
    offset = tl.load(offsets + entry)
    total = tl.zeros((BLOCK,), tl.float32)
    x += offset
    dy += channel * pixels
    for _ in range(batch):
        for first in range(0, pixels, BLOCK):
            pixel = first + tl.arange(0, BLOCK)
            inside = pixel < pixels
            corner = tl.load(corners + pixel, mask=inside, other=0)
            one = tl.load(x + corner, mask=inside, other=0.0).to(tl.float32)
            total += one * tl.load(dy + pixel, mask=inside, other=0.0).to(tl.float32)
        x += x_item
        dy += y_channels * pixels
    tl.store(gradient + entry, tl.sum(total, axis=0))


@dataclass(frozen=True)
class _Entries:
    """Where each kept weight sits: output and input channel, tap row and column, each ``(kept,)`` int32."""

    target: Tensor
    source: Tensor
    row: Tensor
    column: Tensor
    by_source: Tensor  # order of the entries by input channel
    target_starts: Tensor  # (outputs + 1,)
    source_starts: Tensor  # (inputs + 1,)


_known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # positions -> {shape: _Entries}


def _entries(positions: Tensor, shape: torch.Size) -> _Entries:
    shapes = _known.setdefault(positions, {})  # type: ignore[no-untyped-call]
    key = (version_of(positions), *shape)
    if key not in shapes:
        shapes.clear()
        check_positions(positions, shape.numel())
        outputs, inputs, rows, columns = shape
        column, rest = positions % columns, positions // columns
        row, pair = rest % rows, rest // rows
        target, source = pair // inputs, pair % inputs
        starts = [
            torch.nn.functional.pad(torch.bincount(index, minlength=count).cumsum(0), (1, 0)).int()
            for index, count in ((target, outputs), (source, inputs))
        ]
        by_source = torch.argsort(source, stable=True)
        shapes[key] = _Entries(
            *(part.int() for part in (target, source, row, column, by_source)),
            *starts,
        )
    entries: _Entries = shapes[key]
    return entries


@functools.lru_cache(maxsize=64)  # sizes of a network's maps; 4 bytes a pixel
def _corners(rows: int, columns: int, stride: tuple[int, int], x_columns: int, device: torch.device) -> Tensor:
    """``(rows * columns,)`` int32: where each output pixel's window begins in a map of ``x_columns`` columns."""
    row = torch.arange(rows, device=device) * (stride[0] * x_columns)
    return (row[:, None] + torch.arange(columns, device=device) * stride[1]).int().flatten()


def sparse_conv2d_forward(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    shape: torch.Size,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    padding_mode: str,
) -> Tensor:
    """See ``lipfast.ops.reference.sparse_conv2d_forward``."""
    given, x = x, _padding.pad(x, padding, padding_mode)
    entries = _entries(positions, shape)
    offsets = _offsets(entries.source, entries.row, entries.column, x)
    y = _convolve(x, values, offsets, entries.target_starts, bias, (shape[2], shape[3]), stride)
    return _padding.in_layout_of(given, y)


def _offsets(channel: Tensor, row: Tensor, column: Tensor, x: Tensor) -> Tensor:
    """Where the entries read in an item of a padded map."""
    return (channel * x.shape[2] + row) * x.shape[3] + column


def _convolve(
    x: Tensor,
    values: Tensor,
    offsets: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    taps: tuple[int, int],
    stride: tuple[int, int],
) -> Tensor:
    """Sum the entries of each output channel over the padded map ``x``."""
    x, y_channels = x.contiguous(), len(starts) - 1
    batch, channels, rows, columns = x.shape
    y_rows, y_columns = (rows - taps[0]) // stride[0] + 1, (columns - taps[1]) // stride[1] + 1
    y = torch.empty(batch, y_channels, y_rows, y_columns, dtype=x.dtype, device=x.device)
    if y.numel():
        config = CONFIGS["sparse_forward"]
        sparse_forward_kernel[(triton.cdiv(y_rows * y_columns, config["meta"]["BLOCK"]), y_channels, batch)](
            x, values, offsets, starts, values if bias is None else bias, y,
            y_rows * y_columns, y_columns, *stride, columns, channels * rows * columns, y_channels,
            BIASED=bias is not None, **config["meta"], num_warps=config["warps"],
        )  # fmt: skip
    return y


def sparse_conv2d_input_gradient(
    dy: Tensor,
    values: Tensor,
    positions: Tensor,
    shape: torch.Size,
    input_size: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
    padding_mode: str,
) -> Tensor:
    """See ``lipfast.ops.reference.sparse_conv2d_input_gradient``."""
    run = _mirrored if stride == (1, 1) else _strided_input_gradient
    padded = run(dy, values, positions, shape, (input_size[2] + 2 * padding[0], input_size[3] + 2 * padding[1]), stride)
    return _padding.in_layout_of(dy, _padding.fold(padded, input_size, padding, padding_mode))


def _mirrored(
    dy: Tensor, values: Tensor, positions: Tensor, shape: torch.Size, size: tuple[int, int], stride: tuple[int, int]
) -> Tensor:
    """At stride 1 the input gradient is a convolution with mirrored taps; ``size``: of the padded input."""
    entries = _entries(positions, shape)
    order, taps = entries.by_source, (shape[2], shape[3])
    wide = _padding.pad(dy, (taps[0] - 1, taps[1] - 1), "zeros")
    offsets = _offsets(entries.target, taps[0] - 1 - entries.row, taps[1] - 1 - entries.column, wide)
    return _convolve(wide, values[order], offsets[order], entries.source_starts, None, taps, stride)


def _strided_input_gradient(
    dy: Tensor, values: Tensor, positions: Tensor, shape: torch.Size, size: tuple[int, int], stride: tuple[int, int]
) -> Tensor:
    entries, dy, (rows, columns) = _entries(positions, shape), dy.contiguous(), size
    dx = torch.empty(len(dy), shape[1], rows, columns, dtype=dy.dtype, device=dy.device)
    if dx.numel():
        config = CONFIGS["sparse_input_gradient"]
        order = entries.by_source
        sparse_input_gradient_kernel[(triton.cdiv(rows * columns, config["meta"]["BLOCK"]), shape[1], len(dy))](
            dy, values, order, *(part[order] for part in (entries.target, entries.row, entries.column)),
            entries.source_starts, dx, rows * columns, columns, shape[1], dy.shape[2], dy.shape[3], shape[0],
            STRIDE_ROWS=stride[0], STRIDE_COLUMNS=stride[1], **config["meta"], num_warps=config["warps"],
        )  # fmt: skip
    return dx


def sparse_conv2d_weight_gradient(
    x: Tensor,
    dy: Tensor,
    positions: Tensor,
    shape: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
    padding_mode: str,
) -> Tensor:
    """See ``lipfast.ops.reference.sparse_conv2d_weight_gradient``."""
    x = _padding.pad(x, padding, padding_mode).contiguous()
    dy = dy.contiguous()
    entries = _entries(positions, shape)
    gradient = torch.empty(len(positions), dtype=torch.float32, device=x.device)
    if len(positions):
        config = CONFIGS["sparse_weight_gradient"]
        batch, channels, rows, columns = x.shape
        offsets = _offsets(entries.source, entries.row, entries.column, x)
        sparse_weight_gradient_kernel[(len(positions),)](
            x, dy, entries.target, offsets, _corners(dy.shape[2], dy.shape[3], stride, columns, x.device), gradient,
            batch, dy.shape[2] * dy.shape[3], channels * rows * columns, shape[0],
            **config["meta"], num_warps=config["warps"],
        )  # fmt: skip
    return gradient
