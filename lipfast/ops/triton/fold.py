"""The adjoint of padding a map, in one pass and in a fixed order; torch's own adds with atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipfast.ops.triton.configs import CONFIGS


@triton.jit
def _copies(i, size, width, CIRCULAR: tl.constexpr):
    """Padded positions besides its own that copied position ``i`` of ``size``; a negative one is none."""
    if CIRCULAR:
        before = i + width - size
        behind = i + width + size
    else:
        before = tl.where(i > 0, width - i, -1)
        behind = tl.where(i < size - 1, width + 2 * (size - 1) - i, -1)
    return before, tl.where(behind < size + 2 * width, behind, -1)


@triton.jit
def _candidate(own, before, behind, NUMBER: tl.constexpr):
    if NUMBER == 0:
        return own
    elif NUMBER == 1:  # noqa: RET505  Triton wants one way out for each branch
        return before
    else:
        return behind


@triton.jit
def fold_kernel(
    gradient, folded, n_rows, n_columns, row_width, column_width, CIRCULAR: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid: (blocks of a plane, batch * channels). ``gradient`` has so many more rows and columns at either side."""
    plane = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n_rows * n_columns
    row, column = i // n_columns, i % n_columns
    pitch = n_columns + 2 * column_width
    gradient += plane * (n_rows + 2 * row_width) * pitch
    row_before, row_behind = _copies(row, n_rows, row_width, CIRCULAR)
    column_before, column_behind = _copies(column, n_columns, column_width, CIRCULAR)
    total = tl.zeros((BLOCK,), tl.float32)
    for down in tl.static_range(3):
        source_row = _candidate(row + row_width, row_before, row_behind, down)
        for across in tl.static_range(3):
            source_column = _candidate(column + column_width, column_before, column_behind, across)
            there = inside & (source_row >= 0) & (source_column >= 0)
            total += tl.load(gradient + source_row * pitch + source_column, mask=there, other=0.0).to(tl.float32)
    tl.store(folded + plane * n_rows * n_columns + i, total.to(folded.dtype.element_ty), mask=inside)


def fold_padding(gradient: Tensor, size: torch.Size, padding: tuple[int, int], mode: str) -> Tensor:
    """The transpose of reflection or circular padding (`lipfast.ops._padding.fold`) for a contiguous ``gradient``."""
    folded = torch.empty(size, dtype=gradient.dtype, device=gradient.device)
    if folded.numel():
        config, pixels = CONFIGS["fold"], size[2] * size[3]
        fold_kernel[(triton.cdiv(pixels, config["meta"]["BLOCK"]), size[0] * size[1])](
            gradient, folded, size[2], size[3], *padding, CIRCULAR=mode == "circular",
            **config["meta"], num_warps=config["warps"],
        )  # fmt: skip
    return folded
