"""Bilinear resampling of maps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lipfast.errors import InputError
from lipfast.ops import _dispatch
from lipfast.ops._autograd import refuse_double_backward, refuse_tangents, register_gradient
from lipfast.ops._checks import pair


def upsample_bilinear(
    x: Tensor,
    size: int | Sequence[int],
    *,
    align_corners: bool = False,
    scales: Sequence[float] | None = None,
    backend: str | None = None,
) -> Tensor:
    """``torch.nn.functional.interpolate(x, mode="bilinear")``; differentiable.

    On a GPU, equal inputs give equal gradients up to 8 times the size. torch's own kernels, which do not promise that,
    run beyond, in float64 and where a side shrinks.

    Args:
        x: ``(batch, channels, rows, columns)``, any float type; only the batch may be empty.
        size: (rows, columns) of the result, one number for both; the result is contiguous.
        align_corners: the corner pixels' centres keep their places, else the corners of the map do.
        scales: (rows, columns), the factors that gave ``size``, if factors did: they place the pixels then, which
            differs from what the sizes say where ``size`` was rounded down.
        backend: run exactly this implementation; None lets the seam choose.

    Raises:
        InputError: an argument breaks the lines above.
        BackendError: ``backend`` cannot run here, or double backward.
    """
    if x.dim() != 4 or 0 in x.shape[1:] or not x.is_floating_point():
        raise InputError(
            "upsample_bilinear: expected a float tensor (batch, channels, rows, columns) that is not empty, "
            f"got {x.dtype} {tuple(x.shape)}"
        )
    size = pair("upsample_bilinear", "size", size)
    if min(size) < 1:
        raise InputError(f"upsample_bilinear: size must be (rows, columns), each at least 1, got {tuple(size)}")
    if scales is not None and not _give(scales, x.shape[2:], size):
        raise InputError(
            f"upsample_bilinear: scales {tuple(scales)} of a map of {tuple(x.shape[2:])} do not give size "
            f"{tuple(size)}; leave scales out to go by the sizes"
        )
    refuse_tangents("upsample_bilinear", x)
    y: Tensor = _upsample(x, list(size), align_corners, scales if scales is None else list(scales), backend)
    return y


def _give(scales: Sequence[float], sides: Sequence[int], size: Sequence[int]) -> bool:
    """Whether one factor for each side makes ``size`` of ``sides``."""
    return len(scales) == 2 and [s * side // 1 for s, side in zip(scales, sides, strict=True)] == list(size)


@torch.library.custom_op("lipfast::upsample_bilinear", mutates_args=())
def _upsample(
    x: Tensor, size: list[int], align_corners: bool, scales: list[float] | None, backend: str | None
) -> Tensor:
    y: Tensor = _dispatch.pick("upsample_bilinear", x.device, backend)[1](x, size, align_corners, scales)
    return y.contiguous()


@torch.library.custom_op("lipfast::upsample_bilinear_backward", mutates_args=())
def _upsample_gradient(
    dy: Tensor, size: list[int], align_corners: bool, scales: list[float] | None, backend: str | None
) -> Tensor:
    dx: Tensor = _dispatch.pick("upsample_bilinear_backward", dy.device, backend)[1](dy, size, align_corners, scales)
    return dx.contiguous()


@_upsample.register_fake
@_upsample_gradient.register_fake
def _(given: Tensor, size: list[int], *rest: Any) -> Tensor:
    return given.new_empty((*given.shape[:2], *size))


def _keep_form(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, *ctx.settings = inputs
    ctx.size = list(x.shape[2:])


def _upsample_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return _upsample_gradient(dy, ctx.size, *ctx.settings), None, None, None, None


register_gradient(_upsample, "upsample_bilinear", _upsample_backward, setup_context=_keep_form)

refuse_double_backward(_upsample_gradient, "upsample_bilinear")
