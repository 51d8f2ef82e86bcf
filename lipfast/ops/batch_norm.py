"""BatchNorm in training with the activation behind it, in as few passes over the map as the device has kernels for."""

from typing import Any

import torch
from torch import Tensor

from lipfast.ops import _dispatch
from lipfast.ops._once import differentiable_once


def batch_norm_activate(
    x: Tensor,
    running_mean: Tensor | None,
    running_variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    slope: float,
) -> Tensor:
    """LeakyReLU of BatchNorm in training.

    Args:
        x: ``(batch, channels, rows, columns)``.
        running_mean, running_variance: ``(channels,)``, moved by ``momentum``; or None both.
        weight, bias: ``(channels,)``, or None both. Gradients go to them and to ``x``.
        eps: added to the variance.
        slope: of the negative side; 1 leaves the activation out.
    """
    settings = (momentum, eps, slope)
    y: Tensor = _BatchNormActivate.apply(  # type: ignore[no-untyped-call]
        x, running_mean, running_variance, weight, bias, *settings
    )
    return y


class _BatchNormActivate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        running_mean: Tensor | None,
        running_variance: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        momentum: float,
        eps: float,
        slope: float,
    ) -> Tensor:
        _, run = _dispatch.pick("batch_norm_activate", x.device)
        y, mean, inverse = run(x, weight, bias, running_mean, running_variance, momentum, eps, slope)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        ctx.slope = slope
        return y  # type: ignore[no-any-return]

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, mean, inverse = ctx.saved_tensors
        _, run = _dispatch.pick("batch_norm_activate_backward", x.device)
        dx, dweight, dbias = run(x, dy, weight, bias, mean, inverse, ctx.slope)
        affine = weight is not None
        return dx, None, None, dweight if affine else None, dbias if affine else None, None, None, None
