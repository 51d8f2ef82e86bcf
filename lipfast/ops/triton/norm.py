"""Normalise, scale, shift and activate in one pass over a map."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipfast.ops.triton.configs import CONFIGS


@triton.jit
def normalise_kernel(
    x, mean, variance, weight, bias, y, plane, n_channels, eps, slope, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid: (blocks of a plane, batch * channels)."""
    row = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = row % n_channels
    start = row.to(tl.int64) * plane
    scale = tl.load(weight + channel) / tl.sqrt_rn(tl.load(variance + channel) + eps)
    shift = tl.load(bias + channel) - tl.load(mean + channel) * scale
    value = tl.load(x + start + i, mask=i < plane, other=0.0).to(tl.float32)
    value = value * scale + shift
    value = tl.where(value > 0, value, value * slope)
    tl.store(y + start + i, value.to(y.dtype.element_ty), mask=i < plane)


@triton.jit
def normalise_backward_kernel(
    x, dy, scale, shift, mean, dx, sums, products, plane, n_channels, slope, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid as above. sums, products: ``[batch * channels, blocks of a plane]``."""
    row = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = row % n_channels
    start = row.to(tl.int64) * plane
    factor = tl.load(scale + channel)
    value = tl.load(x + start + i, mask=i < plane, other=0.0).to(tl.float32)
    g = tl.load(dy + start + i, mask=i < plane, other=0.0).to(tl.float32)
    g = tl.where(value * factor + tl.load(shift + channel) > 0, g, g * slope)
    tl.store(dx + start + i, (g * factor).to(dx.dtype.element_ty), mask=i < plane)
    place = row * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + place, tl.sum(g, axis=0))
    tl.store(products + place, tl.sum(g * (value - tl.load(mean + channel)), axis=0))


def normalise_activate(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float
) -> Tensor:
    """LeakyReLU(BatchNorm(x)) with given statistics.

    Args:
        x: ``(batch, channels, rows, columns)`` contiguous, any float type.
        mean, variance, weight, bias: ``(channels,)`` float32.
        eps: added to the variance.
        slope: of the negative side; 1 leaves out the activation.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    batch, channels, rows, columns = x.shape
    if x.numel():
        config = CONFIGS["normalise"]
        normalise_kernel[(triton.cdiv(rows * columns, config["meta"]["BLOCK"]), batch * channels)](
            x, *(vector.contiguous() for vector in (mean, variance, weight, bias)), y,
            rows * columns, channels, eps, slope, **config["meta"], num_warps=config["warps"],
        )  # fmt: skip
    return y


def normalise_activate_backward(
    x: Tensor, dy: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``lipfast.ops.reference.normalise_activate_backward``."""
    x, dy = x.contiguous(), dy.contiguous()
    batch, channels, rows, columns = x.shape
    config = CONFIGS["normalise_backward"]
    blocks = triton.cdiv(rows * columns, config["meta"]["BLOCK"])
    dx = torch.empty_like(x)
    sums = torch.empty(batch * channels, blocks, device=x.device)
    products = torch.empty(batch * channels, blocks, device=x.device)
    if x.numel():
        normalise_backward_kernel[(blocks, batch * channels)](
            x, dy, scale, shift, mean, dx, sums, products, rows * columns, channels, slope,
            **config["meta"], num_warps=config["warps"],
        )  # fmt: skip
    each = (batch, channels, blocks)
    return dx, sums.view(each).sum((0, 2)), products.view(each).sum((0, 2))
