"""Dense convolution on the tensor cores under a packed mask: what can win on a GPU at moderate sparsity.

An implicit matrix product (output channels x taps) * (taps x pixels), so that neighbouring lanes load neighbouring
pixels. Each weight tile is masked while it is loaded, one mask word for 32 weights: pruned weights need no clean copy.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipfast.ops import _padding
from lipfast.ops.reference import masked_conv2d_input_gradient, masked_conv2d_weight_gradient
from lipfast.ops.triton.configs import CONFIGS
from lipfast.ops.triton.mask import ones_and_zeros, pack_mask

# The gradients are products of dense matrices, for which torch's own kernels are hard to beat.
__all__ = ["masked_conv2d", "masked_conv2d_input_gradient", "masked_conv2d_weight_gradient", "pack_channel_masks"]


@triton.jit
def masked_conv_kernel(
    x, weight, words, y,
    n_pixels, n_channels, n_taps, words_per_channel,
    y_pixels, y_columns, stride_rows, stride_columns, x_columns, x_plane, x_item,
    tap_rows, tap_columns,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (pixel blocks over the whole batch, channel blocks). ``weight`` is ``[channels, taps]``, taps = (input
    channel, row, column); row c of ``words`` holds the mask bits of channel c."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    item, place = pixel // y_pixels, pixel % y_pixels
    corner = item.to(tl.int64) * x_item + (
        (place // y_columns) * (stride_rows * x_columns) + (place % y_columns) * stride_columns
    )
    bit = tl.arange(0, 32)
    total = tl.zeros((CHANNELS, PIXELS), tl.float32)
    for step in range(words_per_channel):
        tap = step * 32 + bit
        column, rest = tap % tap_columns, tap // tap_columns
        offset = (rest // tap_rows) * x_plane + (rest % tap_rows) * x_columns + column
        word = tl.load(words + channel * words_per_channel + step, mask=channel < n_channels, other=0)
        keep = ((word[:, None] >> bit[None, :]) & 1) != 0  # [CHANNELS, 32]; bits beyond the taps are 0
        a = tl.load(weight + channel[:, None] * n_taps + tap[None, :], mask=keep, other=0.0)
        inside = (tap[:, None] < n_taps) & (pixel[None, :] < n_pixels)
        b = tl.load(x + offset[:, None] + corner[None, :], mask=inside, other=0.0)  # [32, PIXELS]
        if PRECISION == "bf16":
            total = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
        else:
            total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)
    place = place.to(tl.int64) + item.to(tl.int64) * n_channels * y_pixels
    inside = (channel[:, None] < n_channels) & (pixel[None, :] < n_pixels)
    tl.store(y + channel[:, None] * y_pixels + place[None, :], total.to(y.dtype.element_ty), mask=inside)


def pack_channel_masks(alive: Tensor) -> Tensor:
    """See ``lipfast.ops.pack_mask``."""
    taps = math.prod(alive.shape[1:])
    rows = torch.nn.functional.pad(ones_and_zeros(alive).reshape(len(alive), taps), (0, -taps % 32))
    return pack_mask(rows.contiguous()).view(len(alive), -(-taps // 32))


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    words: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    padding_mode: str,
    *,
    precision: str,
) -> Tensor:
    """See ``lipfast.ops.masked_conv2d``."""
    given, x = x, _padding.pad(x, padding, padding_mode).contiguous()
    batch, inputs, rows, columns = x.shape
    outputs, _, tap_rows, tap_columns = weight.shape
    y_rows, y_columns = (rows - tap_rows) // stride[0] + 1, (columns - tap_columns) // stride[1] + 1
    y = torch.empty(batch, outputs, y_rows, y_columns, dtype=x.dtype, device=x.device)
    config = CONFIGS["masked_conv_ieee" if precision == "ieee" else "masked_conv"]
    pixels = batch * y_rows * y_columns
    grid = (triton.cdiv(pixels, config["meta"]["PIXELS"]), triton.cdiv(outputs, config["meta"]["CHANNELS"]))
    masked_conv_kernel[grid](
        x, weight.contiguous(), words, y,
        pixels, outputs, inputs * tap_rows * tap_columns, words.shape[1],
        y_rows * y_columns, y_columns, *stride, columns, rows * columns, inputs * rows * columns,
        tap_rows, tap_columns,
        PRECISION=precision, **config["meta"], num_warps=config["warps"], num_stages=config["stages"],
    )  # fmt: skip
    return _padding.in_layout_of(given, y)
