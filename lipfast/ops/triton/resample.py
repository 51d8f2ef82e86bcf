"""Bilinear enlargement of maps and its adjoint, which sums in a fixed order; torch's own adds with atomics."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipfast.ops import reference
from lipfast.ops.triton.configs import CONFIGS

SLACK = tl.constexpr(2**-20)  # of an axis: more than float32 rounds a position on it by
MOST_READERS = 24  # of an input position along an axis, all one thread's work: enough for 8 times any size


@triton.jit
def _sources(i, ratio, shift, size):
    """The neighbouring positions of ``size`` that output position ``i`` reads, and the weight of the second."""
    # One rounding, as in torch's kernel; and both kernels below must get the same bits, whatever is fused in them.
    position = tl.maximum(tl.fma(i.to(tl.float32) + shift, ratio, -shift), 0.0)
    low = position.to(tl.int32)
    return low, tl.minimum(low + 1, size - 1), position - low.to(tl.float32)


@triton.jit
def _first_reader(i, inverse, shift, size):
    """At or before the first output position, of ``size``, that reads input position ``i``."""
    first = tl.ceil((i.to(tl.float32) - 1 + shift) * inverse - shift - size * SLACK)
    return tl.maximum(first.to(tl.int32), 0)


@triton.jit
def _reading(i, reader, ratio, shift, size, readers):
    """Whether output position ``reader``, if of ``readers``, reads input position ``i``, and with what weight."""
    low, high, weight = _sources(reader, ratio, shift, size)
    share = tl.where(low == i, 1 - weight, 0.0) + tl.where(high == i, weight, 0.0)
    return (reader < readers) & ((low == i) | (high == i)), share


@triton.jit
def bilinear_kernel(
    x, y, planes, in_rows, in_columns, out_rows, out_columns, row_ratio, column_ratio, shift,
    PLANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of an output plane, groups of PLANES of the batch * channels ``planes``)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    top, bottom, down = _sources(i // out_columns, row_ratio, shift, in_rows)
    left, right, across = _sources(i % out_columns, column_ratio, shift, in_columns)
    for number in tl.static_range(PLANES):
        plane = tl.program_id(1).to(tl.int64) * PLANES + number
        inside = i < tl.where(plane < planes, out_rows * out_columns, 0)
        above = x + plane * in_rows * in_columns + top * in_columns
        below = x + plane * in_rows * in_columns + bottom * in_columns
        top_left = tl.load(above + left, mask=inside, other=0.0).to(tl.float32)
        top_right = tl.load(above + right, mask=inside, other=0.0).to(tl.float32)
        bottom_left = tl.load(below + left, mask=inside, other=0.0).to(tl.float32)
        bottom_right = tl.load(below + right, mask=inside, other=0.0).to(tl.float32)
        value = (1 - down) * ((1 - across) * top_left + across * top_right)
        value += down * ((1 - across) * bottom_left + across * bottom_right)
        tl.store(y + plane * out_rows * out_columns + i, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def bilinear_backward_kernel(
    dy, dx, planes, in_rows, in_columns, out_rows, out_columns, row_ratio, column_ratio, row_inverse, column_inverse,
    shift, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid as above, of the input planes. At most ROWS by COLUMNS output pixels read an input pixel."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = i // in_columns, i % in_columns
    first_row = _first_reader(row, row_inverse, shift, out_rows)
    first_column = _first_reader(column, column_inverse, shift, out_columns)
    for number in tl.static_range(PLANES):
        plane = tl.program_id(1).to(tl.int64) * PLANES + number
        inside = i < tl.where(plane < planes, in_rows * in_columns, 0)
        total = tl.zeros((BLOCK,), tl.float32)
        for down in range(ROWS):
            reads_row, row_share = _reading(row, first_row + down, row_ratio, shift, in_rows, out_rows)
            line = tl.zeros((BLOCK,), tl.float32)
            gradients = dy + plane * out_rows * out_columns + (first_row + down) * out_columns + first_column
            for across in tl.static_range(COLUMNS):
                reads, share = _reading(column, first_column + across, column_ratio, shift, in_columns, out_columns)
                gradient = tl.load(gradients + across, mask=inside & reads_row & reads, other=0.0)
                line += share * gradient.to(tl.float32)
            total += row_share * line
        tl.store(dx + plane * in_rows * in_columns + i, total.to(dx.dtype.element_ty), mask=inside)


class _Axis(NamedTuple):
    """How output positions of an axis map to input positions: ``position = (i + shift) * ratio - shift``."""

    before: int
    after: int
    ratio: float
    shift: float

    @property
    def inverse(self) -> float:
        """Of the ratio; 0 where all output positions read input position 0."""
        return 1 / self.ratio if self.ratio else 0.0


def _axis(before: int, after: int, align_corners: bool, scale: float | None) -> _Axis:
    """torch's ``area_pixel_compute_scale``."""
    if before == after:  # a copy, whatever the scale: on CPUs torch has it so for each axis, on GPUs for both at once
        ratio = 1.0
    elif align_corners:
        ratio = (before - 1) / (after - 1)
    else:
        ratio = 1 / scale if scale else before / after
    return _Axis(before, after, ratio, 0.0 if align_corners else 0.5)


def _axes(
    dtype: torch.dtype, before: Sequence[int], after: Sequence[int], align_corners: bool, scales: Sequence[float] | None
) -> list[_Axis]:
    """Rows and columns; nothing where torch has to do it: an axis shrinks, or float32 arithmetic is too coarse."""
    if dtype == torch.float64 or any(b > a for b, a in zip(before, after, strict=True)):
        return []
    sides = zip(before, after, scales or (None, None), strict=True)
    return [_axis(b, a, align_corners, scale) for b, a, scale in sides]


@functools.lru_cache
def _most_readers(axis: _Axis) -> int:
    """Output positions, counted from `_first_reader`, among which are all that read one input position."""
    if axis.ratio == 0:
        return axis.after
    slack = axis.after * SLACK.value
    most = 0
    for i in range(axis.before):
        # Twice the slack in front, as the kernel rounds where it starts.
        first = math.ceil((i - 1 + axis.shift) * axis.inverse - axis.shift - 2 * slack)
        last = math.floor((i + 1 + axis.shift) * axis.inverse - axis.shift + slack)
        most = max(most, min(last, axis.after - 1) - max(first, 0) + 1)
    return most


def upsample_bilinear(x: Tensor, size: Sequence[int], align_corners: bool, scales: Sequence[float] | None) -> Tensor:
    """See ``lipfast.ops.upsample_bilinear``; float64 and shrinking are torch's."""
    axes = _axes(x.dtype, x.shape[2:], size, align_corners, scales)
    if not axes:
        return reference.upsample_bilinear(x, size, align_corners, scales)
    rows, columns = axes
    x = x.contiguous()
    y = torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device)
    if y.numel():
        config = CONFIGS["bilinear"]
        planes = x.shape[0] * x.shape[1]
        blocks = triton.cdiv(rows.after * columns.after, config["meta"]["BLOCK"])
        bilinear_kernel[(blocks, triton.cdiv(planes, config["meta"]["PLANES"]))](
            x, y, planes, rows.before, columns.before, rows.after, columns.after, rows.ratio, columns.ratio, rows.shift,
            **config["meta"], num_warps=config["warps"],
        )  # fmt: skip
    return y


def upsample_bilinear_backward(
    dy: Tensor, size: Sequence[int], align_corners: bool, scales: Sequence[float] | None
) -> Tensor:
    """See ``lipfast.ops.reference.upsample_bilinear_backward``; float64, shrinking and more than x8 are torch's."""
    axes = _axes(dy.dtype, size, dy.shape[2:], align_corners, scales)
    readers = [_most_readers(axis) for axis in axes]
    if not axes or max(readers) > MOST_READERS:
        return reference.upsample_bilinear_backward(dy, size, align_corners, scales)
    rows, columns = axes
    dy = dy.contiguous()
    dx = torch.empty((*dy.shape[:2], *size), dtype=dy.dtype, device=dy.device)
    if dx.numel():
        config = CONFIGS["bilinear_backward"]
        planes = dy.shape[0] * dy.shape[1]
        blocks = triton.cdiv(rows.before * columns.before, config["meta"]["BLOCK"])
        bilinear_backward_kernel[(blocks, triton.cdiv(planes, config["meta"]["PLANES"]))](
            dy, dx, planes, rows.before, columns.before, rows.after, columns.after, rows.ratio, columns.ratio,
            rows.inverse, columns.inverse, rows.shift, ROWS=readers[0], COLUMNS=readers[1],
            **config["meta"], num_warps=config["warps"],
        )  # fmt: skip
    return dx
