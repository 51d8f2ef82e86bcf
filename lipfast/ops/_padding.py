"""Padding of maps and its adjoint, for backends whose kernels read an already padded map."""

import math

import torch
from torch import Tensor

from lipfast.ops import _dispatch

MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def widest(side: int, mode: str) -> float:
    """How many pixels a padding mode of `MODES` can put beside a side: those it copies must be there."""
    return {"reflect": side - 1, "circular": side}.get(mode, math.inf)


def pad(x: Tensor, padding: tuple[int, int], mode: str) -> Tensor:
    """``x`` ``(batch, channels, rows, columns)`` with ``padding`` (rows, columns) a side; ``x`` itself if none."""
    rows, columns = padding
    if rows == columns == 0:
        return x
    return torch.nn.functional.pad(x, (columns, columns, rows, rows), mode=MODES[mode])


def fold(gradient: Tensor, size: torch.Size, padding: tuple[int, int], mode: str) -> Tensor:
    """The transpose of `pad`: add each padding pixel's gradient to the pixel of the ``size`` map it copied.

    Spelt out, as autograd is off inside an operator's implementation, and as torch's own adjoints add in any order on a
    GPU. May change ``gradient``.
    """
    if padding == (0, 0):
        return gradient
    if mode in ("reflect", "circular") and gradient.is_cuda:  # one pass; what follows takes ten
        triton = _dispatch.load("triton")
        if not isinstance(triton, ModuleNotFoundError):
            folded: Tensor = triton.fold_padding(gradient.contiguous(), size, padding, mode)
            return folded
    if mode != "zeros":
        for axis, width in ((2, padding[0]), (3, padding[1])):
            if width:
                _fold_axis(gradient, axis, width, size[axis], mode)
    rows, columns = padding
    return gradient[:, :, rows : rows + size[2], columns : columns + size[3]].contiguous()


def _fold_axis(gradient: Tensor, axis: int, width: int, side: int, mode: str) -> None:
    """Add the ``width`` lines before and behind ``side`` lines to those they copied."""
    before, behind = gradient.narrow(axis, 0, width), gradient.narrow(axis, width + side, width)
    if mode == "reflect":
        gradient.narrow(axis, width + 1, width).add_(before.flip(axis))
        gradient.narrow(axis, side - 1, width).add_(behind.flip(axis))
    elif mode == "replicate":
        gradient.narrow(axis, width, 1).add_(before.sum(axis, keepdim=True))
        gradient.narrow(axis, width + side - 1, 1).add_(behind.sum(axis, keepdim=True))
    else:
        gradient.narrow(axis, side, width).add_(before)
        gradient.narrow(axis, width, width).add_(behind)


def is_channels_last(x: Tensor) -> bool:
    """True where the channels of a pixel lie together, and only then."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def in_layout_of(x: Tensor, y: Tensor) -> Tensor:
    """``y`` in the memory format of ``x``: channels_last if ``x`` is."""
    return y.contiguous(memory_format=torch.channels_last) if is_channels_last(x) else y
