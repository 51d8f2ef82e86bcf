"""Kept weights between their dense tensor and the packed vector."""

from typing import Any, cast

import torch
from torch import Tensor

from lipfast.errors import InputError
from lipfast.ops import _dispatch
from lipfast.ops._autograd import refuse_tangents, register_gradient


def gather_kept(dense: Tensor, mask: Tensor, *, backend: str | None = None) -> Tensor:
    """Pack the weights where ``mask`` is True, in order of their flat index. Differentiable in ``dense``.

    Args:
        dense: float32, any shape.
        mask: bool, same shape and device.
        backend: run exactly this implementation; None lets the seam choose.

    Returns:
        ``(mask.sum(),)`` float32, new.

    Raises:
        InputError: an argument breaks the lines above.
        BackendError: ``backend`` cannot run here.
    """
    _check("gather_kept", "dense", dense, mask)
    if dense.shape != mask.shape:
        raise InputError(f"gather_kept: dense has shape {tuple(dense.shape)} but mask {tuple(mask.shape)}")
    return cast(Tensor, _gather(dense, mask, backend))


def scatter_kept(values: Tensor, mask: Tensor, *, backend: str | None = None) -> Tensor:
    """Put packed weights back where ``mask`` is True, exactly +0 elsewhere. Differentiable in ``values``.

    Args:
        values: ``(mask.sum(),)`` float32, in order of the flat index.
        mask: bool, any shape, same device.
        backend: run exactly this implementation; None lets the seam choose.

    Returns:
        float32 of the mask's shape, new.

    Raises:
        InputError: an argument breaks the lines above.
        BackendError: ``backend`` cannot run here.
    """
    _check("scatter_kept", "values", values, mask)
    if values.dim() != 1:
        raise InputError(f"scatter_kept: values must be 1-D, got {tuple(values.shape)}")
    return cast(Tensor, _scatter(values, mask, backend))


def _check(op: str, name: str, tensor: Tensor, mask: Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise InputError(f"{op}: {name} must be float32, got {tensor.dtype}; use .float()")
    refuse_tangents(op, tensor)
    if mask.dtype != torch.bool or mask.device != tensor.device:
        raise InputError(f"{op}: mask must be bool on {tensor.device}, got {mask.dtype} on {mask.device}")


@torch.library.custom_op("lipfast::gather_kept", mutates_args=())
def _gather(dense: Tensor, mask: Tensor, backend: str | None) -> Tensor:
    _, run = _dispatch.pick("gather_kept", dense.device, backend)
    return cast(Tensor, run(dense, mask))


@torch.library.custom_op("lipfast::scatter_kept", mutates_args=())
def _scatter(values: Tensor, mask: Tensor, backend: str | None) -> Tensor:
    kept = int(mask.sum())
    if len(values) != kept:
        raise InputError(f"scatter_kept: got {len(values)} values but the mask keeps {kept} of {mask.numel()}")
    _, run = _dispatch.pick("scatter_kept", values.device, backend)
    return cast(Tensor, run(values, mask))


@_gather.register_fake
def _(dense: Tensor, mask: Tensor, backend: str | None) -> Tensor:
    return dense.new_empty(torch.library.get_ctx().new_dynamic_size())


@_scatter.register_fake
def _(values: Tensor, mask: Tensor, backend: str | None) -> Tensor:
    return values.new_empty(mask.shape)


def _keep_mask(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, mask, ctx.backend = inputs
    ctx.save_for_backward(mask)


def _gather_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return _scatter(gradient, *ctx.saved_tensors, ctx.backend), None, None


def _scatter_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return _gather(gradient, *ctx.saved_tensors, ctx.backend), None, None


register_gradient(_gather, "gather_kept", _gather_backward, setup_context=_keep_mask)
register_gradient(_scatter, "scatter_kept", _scatter_backward, setup_context=_keep_mask)
