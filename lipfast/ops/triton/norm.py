"""Normalise, scale, shift and activate in one pass over a map, with given statistics or with those of the batch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipfast.ops.triton.configs import CONFIGS

WHOLE = CONFIGS["batch_norm_whole"]["meta"]["BLOCK"]  # elements that one program keeps in registers
ELEMENTS_A_WARP = 512


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
    sums = torch.empty(batch * channels, blocks, dtype=torch.float32, device=x.device)
    products = torch.empty(batch * channels, blocks, dtype=torch.float32, device=x.device)
    if x.numel():
        normalise_backward_kernel[(blocks, batch * channels)](
            x, dy, scale, shift, mean, dx, sums, products, rows * columns, channels, slope,
            **config["meta"], num_warps=config["warps"],
        )  # fmt: skip
    each = (batch, channels, blocks)
    return dx, sums.view(each).sum((0, 2)), products.view(each).sum((0, 2))


@triton.jit
def _part(x, plane, BLOCK: tl.constexpr):
    """This program's elements of a plane: their places in the map, which there are, and the values."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < plane
    place = tl.program_id(1).to(tl.int64) * plane + i
    return place, inside, tl.load(x + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _moments(value, inside, count):
    """Mean of ``count`` values, and the sum of their squared distances from it."""
    mean = tl.sum(value, axis=0) / count
    apart = tl.where(inside, value - mean, 0.0)
    return mean, tl.sum(apart * apart, axis=0)


@triton.jit
def _parts_of_channel(n_channels, n_parts, PARTS: tl.constexpr):
    """The parts of this program's channel: which block of a plane each is, its place, and which there are."""
    blocks = tl.num_programs(0)
    part = tl.arange(0, PARTS)
    block = part % blocks
    return block, (part // blocks * n_channels + tl.program_id(1) % n_channels) * blocks + block, part < n_parts


@triton.jit
def _joined(means, squares, plane, n_channels, n_parts, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and variance of this program's channel from those of its parts, in a fixed order."""
    block, place, there = _parts_of_channel(n_channels, n_parts, PARTS)
    count = tl.where(there, tl.minimum(plane - block * BLOCK, BLOCK), 0).to(tl.float32)
    total = tl.sum(count, axis=0)
    part_mean = tl.load(means + place, mask=there, other=0.0)
    mean = tl.sum(part_mean * count, axis=0) / total
    apart = part_mean - mean
    square = tl.load(squares + place, mask=there, other=0.0) + count * apart * apart
    return mean, tl.sum(square, axis=0) / total


@triton.jit
def statistics_kernel(x, means, squares, plane, BLOCK: tl.constexpr):
    """Grid: (blocks of a plane, batch * channels). means, squares: ``[batch * channels, blocks of a plane]``."""
    _, inside, value = _part(x, plane, BLOCK)
    count = tl.minimum(plane - tl.program_id(0) * BLOCK, BLOCK).to(tl.float32)
    mean, square = _moments(value, inside, count)
    place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(means + place, mean)
    tl.store(squares + place, square)


@triton.jit
def batch_norm_kernel(
    x, weight, bias, running_mean, running_variance, means, squares, y, mean_out, inverse_out,
    plane, n_channels, n_parts, momentum, unbiased, eps, slope,
    AFFINE: tl.constexpr, RUNNING: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid as above; with one part, this program sees its whole channel and needs no statistics made before."""
    place, inside, value = _part(x, plane, BLOCK)
    channel = tl.program_id(1) % n_channels
    if PARTS == 1:
        mean, square = _moments(value, inside, plane.to(tl.float32))
        variance = square / plane
    else:
        mean, variance = _joined(means, squares, plane, n_channels, n_parts, PARTS, BLOCK)
    inverse = 1.0 / tl.sqrt_rn(variance + eps)
    scale, shift = _affine(weight, bias, mean, inverse, channel, AFFINE)
    normal = value * scale + shift
    normal = tl.where(normal > 0, normal, normal * slope)
    tl.store(y + place, normal.to(y.dtype.element_ty), mask=inside)
    if (tl.program_id(0) == 0) & (tl.program_id(1) < n_channels):
        tl.store(mean_out + channel, mean)
        tl.store(inverse_out + channel, inverse)
        if RUNNING:
            before = tl.load(running_mean + channel)
            tl.store(running_mean + channel, before + momentum * (mean - before))
            before = tl.load(running_variance + channel)
            tl.store(running_variance + channel, before + momentum * (variance * unbiased - before))


@triton.jit
def _affine(weight, bias, mean, inverse, channel, AFFINE: tl.constexpr):
    """The map's normalisation as ``value * scale + shift``; both passes must round it alike."""
    scale = inverse
    shift = -mean * scale
    if AFFINE:
        scale = inverse * tl.load(weight + channel)
        shift = tl.load(bias + channel) - mean * scale
    return scale, shift


@triton.jit
def _gradient_of_normal(
    x, dy, weight, bias, mean, inverse, plane, n_channels, slope, AFFINE: tl.constexpr, BLOCK: tl.constexpr
):
    """Places of this program's elements, which there are, the scaled map's gradient, the normalised map, the scale."""
    place, inside, value = _part(x, plane, BLOCK)
    channel = tl.program_id(1) % n_channels
    center, inverse = tl.load(mean + channel), tl.load(inverse + channel)
    scale, shift = _affine(weight, bias, center, inverse, channel, AFFINE)
    g = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.where(value * scale + shift > 0, g, g * slope)
    normal = tl.where(inside, (value - center) * inverse, 0.0)
    return place, inside, g, normal, scale


@triton.jit
def batch_norm_sums_kernel(
    x, dy, weight, bias, mean, inverse, sums, products, plane, n_channels, slope,
    AFFINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid as above. sums, products: ``[batch * channels, blocks of a plane]``."""
    _, _, g, normal, _ = _gradient_of_normal(
        x, dy, weight, bias, mean, inverse, plane, n_channels, slope, AFFINE, BLOCK
    )
    place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + place, tl.sum(g, axis=0))
    tl.store(products + place, tl.sum(g * normal, axis=0))


@triton.jit
def batch_norm_backward_kernel(
    x, dy, weight, bias, mean, inverse, sums, products, dx, dweight, dbias,
    plane, n_channels, n_parts, slope, total,
    AFFINE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid as above; ``total`` elements a channel."""
    place, inside, g, normal, scale = _gradient_of_normal(
        x, dy, weight, bias, mean, inverse, plane, n_channels, slope, AFFINE, BLOCK
    )
    channel = tl.program_id(1) % n_channels
    if PARTS == 1:
        sum_g = tl.sum(g, axis=0)
        sum_product = tl.sum(g * normal, axis=0)
    else:
        _, at, there = _parts_of_channel(n_channels, n_parts, PARTS)
        sum_g = tl.sum(tl.load(sums + at, mask=there, other=0.0), axis=0)
        sum_product = tl.sum(tl.load(products + at, mask=there, other=0.0), axis=0)
    gradient = scale * (g - (sum_g + normal * sum_product) / total)
    tl.store(dx + place, gradient.to(dx.dtype.element_ty), mask=inside)
    if (tl.program_id(0) == 0) & (tl.program_id(1) < n_channels):
        tl.store(dweight + channel, sum_product)
        tl.store(dbias + channel, sum_g)


class _Cut:
    """How programs share a map: one to a plane where it holds a whole channel, else one to a block of a plane."""

    def __init__(self, x: Tensor) -> None:
        batch, self.channels, rows, columns = x.shape
        self.plane = rows * columns
        largest = WHOLE if batch == 1 and self.plane <= WHOLE else CONFIGS["batch_norm"]["meta"]["BLOCK"]
        self.block = min(largest, max(32, triton.next_power_of_2(self.plane)))
        self.warps = min(CONFIGS["batch_norm_whole"]["warps"], max(1, self.block // ELEMENTS_A_WARP))
        self.blocks = triton.cdiv(self.plane, self.block)
        self.parts = batch * self.blocks
        self.grid = (self.blocks, batch * self.channels)

    def partial(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Two numbers for each program; nothing where each sees a whole channel."""
        count = 0 if self.parts == 1 else self.grid[0] * self.grid[1]
        return torch.empty(count, dtype=torch.float32, device=like.device), torch.empty(
            count, dtype=torch.float32, device=like.device
        )

    @property
    def settings(self) -> dict[str, int]:
        return {"BLOCK": self.block, "num_warps": self.warps}


def batch_norm_activate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_variance: Tensor | None,
    momentum: float,
    eps: float,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``lipfast.ops.reference.batch_norm_activate``."""
    x, cut = x.contiguous(), _Cut(x)
    y = torch.empty_like(x)
    mean, inverse = torch.empty(2, cut.channels, dtype=torch.float32, device=x.device).unbind()
    means, squares = cut.partial(x)
    if cut.parts > 1:
        statistics_kernel[cut.grid](x, means, squares, cut.plane, **cut.settings)
    total = len(x) * cut.plane
    batch_norm_kernel[cut.grid](
        x, weight, bias, running_mean, running_variance, means, squares, y, mean, inverse,
        cut.plane, cut.channels, cut.parts, momentum, total / max(1, total - 1), eps, slope,
        AFFINE=weight is not None, RUNNING=running_mean is not None, PARTS=triton.next_power_of_2(cut.parts),
        **cut.settings,
    )  # fmt: skip
    return y, mean, inverse


def batch_norm_activate_backward(
    x: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``lipfast.ops.reference.batch_norm_activate_backward``."""
    x, dy, cut = x.contiguous(), dy.contiguous(), _Cut(x)
    dx = torch.empty_like(x)
    dweight, dbias = torch.empty(2, cut.channels, dtype=torch.float32, device=x.device).unbind()
    sums, products = cut.partial(x)
    given = (x, dy, weight, bias, mean, inverse)
    affine = weight is not None
    if cut.parts > 1:
        batch_norm_sums_kernel[cut.grid](
            *given, sums, products, cut.plane, cut.channels, slope, AFFINE=affine, **cut.settings
        )
    batch_norm_backward_kernel[cut.grid](
        *given, sums, products, dx, dweight, dbias, cut.plane, cut.channels, cut.parts, slope, len(x) * cut.plane,
        AFFINE=affine, PARTS=triton.next_power_of_2(cut.parts), **cut.settings,
    )  # fmt: skip
    return dx, dweight, dbias
