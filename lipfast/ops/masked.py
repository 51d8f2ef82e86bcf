"""Dense maps and weights under packed masks: what a GPU runs at moderate sparsity, and between its convolutions."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lipfast.errors import InputError
from lipfast.ops import _dispatch, _padding
from lipfast.ops._autograd import refuse_double_backward, refuse_tangents, register_gradient
from lipfast.ops._checks import check_window, pair

PRECISIONS = ("ieee", "tf32", "bf16")


def pack_mask(mask: Tensor, *, backend: str | None = None) -> Tensor:
    """Pack a bool tensor, row by row of its first axis.

    Returns:
        ``(rows, ceil(n / 32))`` int32 for rows of n elements: bit ``i % 32`` of word ``i // 32`` says whether element i
        lives; bits behind the last element are 0.

    Raises:
        InputError: not a bool tensor with at least one axis.
        BackendError: ``backend`` cannot run here.
    """
    if mask.dtype != torch.bool or mask.dim() == 0:
        raise InputError(f"pack_mask: expected a bool tensor with axes, got {mask.dtype} {tuple(mask.shape)}")
    _, run = _dispatch.pick("pack_channel_masks", mask.device, backend)
    words: Tensor = run(mask)
    return words


def apply_mask(x: Tensor, words: Tensor, *, backend: str | None = None) -> Tensor:
    """A copy of ``x`` with its dead elements 0, whatever they held, NaN included; differentiable.

    Args:
        x: any shape with at least one axis, any float type.
        words: `pack_mask` of a mask of the shape of ``x``.
        backend: run exactly this implementation; None lets the seam choose.

    Raises:
        InputError: ``words`` of another mask.
        BackendError: ``backend`` cannot run here.
    """
    if x.dim() == 0:
        raise InputError("apply_mask: expected a tensor with axes, got a scalar")
    _check_words("apply_mask", x, words)
    refuse_tangents("apply_mask", x)
    y: Tensor = _apply_mask(x, words, backend)
    return y


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    words: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    padding_mode: str = "zeros",
    *,
    precision: str,
    backend: str | None = None,
) -> Tensor:
    """Convolve with the living part of a dense weight; differentiable, with a gradient of 0 for dead weights.

    Args:
        x: ``(batch, inputs, rows, columns)``.
        weight: ``(outputs, inputs, tap rows, tap columns)``, of the type of ``x``; dead entries may hold anything, NaN
            included.
        words: `pack_mask` of the weight's mask.
        stride, padding, padding_mode: as in ``torch.nn.Conv2d``.
        precision: of the factors: "ieee" (fp32), "tf32" (10 bits of mantissa) or "bf16" (7 bits); sums are fp32. Has no
            default, as it decides about the result. Gradients come from torch's dense kernels, for "bf16" in TF32.
        backend: run exactly this implementation; None lets the seam choose.

    Raises:
        InputError: an argument breaks the lines above.
        BackendError: ``backend`` cannot run here, or double backward.
    """
    if precision not in PRECISIONS:
        raise InputError(f"masked_conv2d: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if weight.dim() != 4 or x.dim() != 4 or x.shape[1] != weight.shape[1]:
        raise InputError(
            f"masked_conv2d: a weight of {tuple(weight.shape)} does not fit an input of {tuple(x.shape)}; "
            "both have 4 axes and the same number of input channels"
        )
    if weight.dtype != x.dtype:
        raise InputError(f"masked_conv2d: weight must be {x.dtype} as x, got {weight.dtype}")
    _check_words("masked_conv2d", weight, words)
    stride, padding = pair("masked_conv2d", "stride", stride), pair("masked_conv2d", "padding", padding)
    check_window("masked_conv2d", x.shape[2:], weight.shape[2:], stride, padding, padding_mode)
    refuse_tangents("masked_conv2d", x, weight)
    y: Tensor = _conv(x, weight, words, list(stride), list(padding), padding_mode, precision, backend)
    return y


def normalise_activate(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    slope: float = 0.2,
    *,
    backend: str | None = None,
) -> Tensor:
    """LeakyReLU(BatchNorm(x)) with given statistics, in one pass where a kernel exists.

    Differentiable in ``x`` and all four vectors, so statistics that were computed from ``x`` pass their gradient on.

    Args:
        x: ``(batch, channels, rows, columns)``.
        mean, variance, weight, bias: ``(channels,)`` float32.
        eps: added to the variance.
        slope: of the negative side; 1 leaves the activation out.
        backend: run exactly this implementation; None lets the seam choose.

    Raises:
        InputError: a vector of another length, or of another type than the rest.
        BackendError: ``backend`` cannot run here, or double backward.
    """
    if x.dim() != 4:
        raise InputError(f"normalise_activate: expected (batch, channels, rows, columns), got {tuple(x.shape)}")
    for name, vector in {"mean": mean, "variance": variance, "weight": weight, "bias": bias}.items():
        if vector.shape != x.shape[1:2]:
            raise InputError(f"normalise_activate: {name} must be ({x.shape[1]},), got {tuple(vector.shape)}")
        if vector.dtype != mean.dtype:
            raise InputError(f"normalise_activate: {name} must be {mean.dtype} as mean, got {vector.dtype}")
    refuse_tangents("normalise_activate", x, mean, variance, weight, bias)
    y: Tensor = _normalise(x, mean, variance, weight, bias, eps, slope, backend)
    return y


def _check_words(op: str, masked: Tensor, words: Tensor) -> None:
    expected = (len(masked), -(-math.prod(masked.shape[1:]) // 32))
    if words.dtype != torch.int32 or tuple(words.shape) != expected:
        raise InputError(
            f"{op}: words must be int32 {expected} for a tensor of {tuple(masked.shape)}, "
            f"got {words.dtype} {tuple(words.shape)}; make them with ops.pack_mask"
        )


@torch.library.custom_op("lipfast::apply_mask", mutates_args=())
def _apply_mask(x: Tensor, words: Tensor, backend: str | None) -> Tensor:
    y: Tensor = _dispatch.pick("apply_mask", x.device, backend)[1](x, words)
    return y.contiguous()


@_apply_mask.register_fake
def _(x: Tensor, words: Tensor, backend: str | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_words(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.backend = inputs[2]


def _apply_mask_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return _apply_mask(dy, *ctx.saved_tensors, ctx.backend), None, None


register_gradient(_apply_mask, "apply_mask", _apply_mask_backward, setup_context=_keep_words)


@torch.library.custom_op("lipfast::masked_conv2d", mutates_args=())
def _conv(
    x: Tensor,
    weight: Tensor,
    words: Tensor,
    stride: list[int],
    padding: list[int],
    padding_mode: str,
    precision: str,
    backend: str | None,
) -> Tensor:
    _, run = _dispatch.pick("masked_conv2d", x.device, backend)
    y: Tensor = run(x, weight, words, _pair(stride), _pair(padding), padding_mode, precision=precision)
    return _padding.in_layout_of(x, y.contiguous())


@torch.library.custom_op("lipfast::masked_conv2d_input_gradient", mutates_args=())
def _conv_input_gradient(
    dy: Tensor,
    weight: Tensor,
    words: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    padding_mode: str,
    precision: str,
    backend: str | None,
) -> Tensor:
    _, run = _dispatch.pick("masked_conv2d_input_gradient", dy.device, backend)
    form = (torch.Size(input_size), _pair(stride), _pair(padding), padding_mode)
    dx: Tensor = run(dy, weight, words, *form, precision=precision)
    return _padding.in_layout_of(dy, dx.contiguous())


@torch.library.custom_op("lipfast::masked_conv2d_weight_gradient", mutates_args=())
def _conv_weight_gradient(
    x: Tensor,
    dy: Tensor,
    words: Tensor,
    shape: list[int],
    stride: list[int],
    padding: list[int],
    padding_mode: str,
    precision: str,
    backend: str | None,
) -> Tensor:
    _, run = _dispatch.pick("masked_conv2d_weight_gradient", x.device, backend)
    form = (torch.Size(shape), _pair(stride), _pair(padding), padding_mode)
    gradient: Tensor = run(x, dy, words, *form, precision=precision)
    return gradient.contiguous()


@_conv.register_fake
def _(x: Tensor, weight: Tensor, words: Tensor, stride: list[int], padding: list[int], *rest: Any) -> Tensor:
    rows, columns = (
        (side + 2 * pad - taps) // step + 1
        for side, pad, taps, step in zip(x.shape[2:], padding, weight.shape[2:], stride, strict=True)
    )
    return _like(x, x.new_empty((x.shape[0], weight.shape[0], rows, columns)))


@_conv_input_gradient.register_fake
def _(dy: Tensor, weight: Tensor, words: Tensor, input_size: list[int], *rest: Any) -> Tensor:
    return _like(dy, dy.new_empty(input_size))


@_conv_weight_gradient.register_fake
def _(x: Tensor, dy: Tensor, words: Tensor, shape: list[int], *rest: Any) -> Tensor:
    return x.new_empty(shape)


def _keep_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, words, *ctx.form = inputs
    ctx.save_for_backward(x, weight, words)


def _conv_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, words = ctx.saved_tensors
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    dx = _conv_input_gradient(dy, weight, words, list(x.shape), *ctx.form) if needs_x else None
    dweight = _conv_weight_gradient(x, dy, words, list(weight.shape), *ctx.form) if needs_weight else None
    return (dx, dweight, None, *[None] * len(ctx.form))


register_gradient(_conv, "masked_conv2d", _conv_backward, setup_context=_keep_conv)


@torch.library.custom_op("lipfast::normalise_activate", mutates_args=())
def _normalise(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    slope: float,
    backend: str | None,
) -> Tensor:
    _, run = _dispatch.pick("normalise_activate", x.device, backend)
    y: Tensor = run(x, mean, variance, weight, bias, eps, slope)
    return y.contiguous()


@torch.library.custom_op("lipfast::normalise_activate_backward", mutates_args=())
def _normalise_gradients(
    x: Tensor, dy: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, slope: float, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    _, run = _dispatch.pick("normalise_activate_backward", x.device, backend)
    dx, sums, products = run(x, dy, scale, shift, mean, slope)
    return dx.contiguous(), sums, products


@_normalise.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_normalise_gradients.register_fake
def _(x: Tensor, dy: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(scale), torch.empty_like(scale)


def _keep_normalise(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.slope, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _normalise_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """The chain rule through ``scale = weight / sqrt(variance + eps)`` and ``shift = bias - mean * scale``."""
    x, mean, variance, weight, bias = ctx.saved_tensors
    inverse = torch.rsqrt(variance + ctx.eps)
    scale = weight * inverse
    settings = (scale, bias - mean * scale, mean, ctx.slope, ctx.backend)
    dx, sums, products = _normalise_gradients(x, dy, *settings)
    dvariance = products * weight * inverse**3 * -0.5
    return dx, -sums * scale, dvariance, products * inverse, sums, None, None, None


register_gradient(_normalise, "normalise_activate", _normalise_backward, setup_context=_keep_normalise)

refuse_double_backward(_conv_input_gradient, "masked_conv2d")
refuse_double_backward(_conv_weight_gradient, "masked_conv2d")
refuse_double_backward(_normalise_gradients, "normalise_activate")


def _like(x: Tensor, y: Tensor) -> Tensor:
    """``y`` in the layout that kernels give it, as of ``x``."""
    return y.contiguous(memory_format=torch.channels_last if _padding.is_channels_last(x) else torch.contiguous_format)


def _pair(numbers: Sequence[int]) -> tuple[int, int]:
    return numbers[0], numbers[1]
