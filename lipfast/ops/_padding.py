"""Padding of maps and its adjoint, for backends whose kernels read an already padded map."""

import torch
from torch import Tensor

MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def pad(x: Tensor, padding: tuple[int, int], mode: str) -> Tensor:
    """``x`` ``(batch, channels, rows, columns)`` with ``padding`` (rows, columns) a side; ``x`` itself if none."""
    rows, columns = padding
    if rows == columns == 0:
        return x
    return torch.nn.functional.pad(x, (columns, columns, rows, rows), mode=MODES[mode])


def fold(gradient: Tensor, size: torch.Size, padding: tuple[int, int], mode: str) -> Tensor:
    """The transpose of `pad`: add each padding pixel's gradient to the pixel of the ``size`` map it copied.

    Spelt out, as autograd is off inside an operator's implementation.
    """
    rows, columns = padding
    if rows == columns == 0:
        return gradient
    widths = [columns, columns, rows, rows]
    if mode == "reflect":
        folded: Tensor = torch.ops.aten.reflection_pad2d_backward(gradient, gradient.new_empty(size), widths)
        return folded
    if mode == "replicate":
        summed: Tensor = torch.ops.aten.replication_pad2d_backward(gradient, gradient.new_empty(size), widths)
        return summed
    if mode == "circular":
        return _unroll(_unroll(gradient, rows, 2), columns, 3)
    return gradient[:, :, rows : rows + size[2], columns : columns + size[3]].contiguous()


def _unroll(gradient: Tensor, width: int, axis: int) -> Tensor:
    """Fold circular padding of ``width`` along one axis."""
    side = gradient.shape[axis] - 2 * width
    inner = gradient.narrow(axis, width, side).clone()
    inner.narrow(axis, side - width, width).add_(gradient.narrow(axis, 0, width))
    inner.narrow(axis, 0, width).add_(gradient.narrow(axis, side + width, width))
    return inner


def is_channels_last(x: Tensor) -> bool:
    """True where the channels of a pixel lie together, and only then."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def in_layout_of(x: Tensor, y: Tensor) -> Tensor:
    """``y`` in the memory format of ``x``: channels_last if ``x`` is."""
    return y.contiguous(memory_format=torch.channels_last) if is_channels_last(x) else y
