"""Padding of maps and its adjoint, for backends whose kernels read an already padded map."""

import torch
from torch import Tensor

_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def pad(x: Tensor, padding: tuple[int, int], mode: str) -> Tensor:
    """``x`` ``(batch, channels, rows, columns)`` with ``padding`` (rows, columns) a side; ``x`` itself if none."""
    rows, columns = padding
    if rows == columns == 0:
        return x
    return torch.nn.functional.pad(x, (columns, columns, rows, rows), mode=_MODES[mode])


def fold(gradient: Tensor, size: torch.Size, padding: tuple[int, int], mode: str) -> Tensor:
    """The transpose of `pad`: add each padding pixel's gradient to the pixel of the ``size`` map it copied."""
    if padding == (0, 0):
        return gradient
    with torch.enable_grad():
        x = torch.zeros(size, dtype=gradient.dtype, device=gradient.device, requires_grad=True)
        return torch.autograd.grad(pad(x, padding, mode), x, gradient)[0]
