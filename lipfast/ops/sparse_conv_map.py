"""`lipfast.ops.sparse_conv2d` of a map that stays in lanes."""

from typing import Any

import torch
from torch import Tensor

from lipfast.errors import InputError
from lipfast.ops import _dispatch
from lipfast.ops._autograd import refuse_double_backward, register_gradient
from lipfast.ops.lane_conv import ConvForm, input_halo
from lipfast.ops.lanes import LANES, LaneMap, aligned, plane_vectors


def conv_of_map(
    x: LaneMap, values: Tensor, positions: Tensor, bias: Tensor | None, layer: ConvForm, backend: str | None
) -> LaneMap:
    """The convolution of a map whose halo is filled; the result's is, too.

    Raises:
        InputError: the layer reads a wider halo, or wants other blocks.
    """
    needs = input_halo(layer)
    if x.halo < needs:
        raise InputError(f"sparse_conv2d: this layer reads a halo of {needs} around each block, the map has {x.halo}")
    if 0 in x.data.shape:
        backend = "reference"
    weight = [layer.out_channels, layer.in_channels // layer.groups, *layer.kernel]
    form = (weight, layer.stride, list(layer.padding), layer.padding_mode, layer.dilation, layer.groups)
    data = _conv(x.data, values, positions, bias, [x.height, x.width, x.halo], *form, backend)
    return LaneMap(data, *layer.out_size(x.height, x.width), x.halo)


def _layer(shape: list[int], stride: int, padding: list[int], mode: str, dilation: int, groups: int) -> ConvForm:
    """What the operators' arguments describe."""
    return ConvForm.of(torch.Size(shape), (stride, stride), (padding[0], padding[1]), mode, dilation, groups)


@torch.library.custom_op("lipfast::sparse_conv2d_map", mutates_args=())
def _conv(
    data: Tensor,
    values: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    size: list[int],
    shape: list[int],
    stride: int,
    padding: list[int],
    padding_mode: str,
    dilation: int,
    groups: int,
    backend: str | None,
) -> Tensor:
    """``size``: height, width and halo of the map in ``data``."""
    _, run = _dispatch.pick("sparse_conv2d_map", data.device, backend)
    layer = _layer(shape, stride, padding, padding_mode, dilation, groups)
    y: LaneMap = run(LaneMap(aligned(data), *size), values.contiguous(), positions, torch.Size(shape), bias, layer)
    return y.data


@torch.library.custom_op("lipfast::sparse_conv2d_map_gradients", mutates_args=())
def _gradients(
    data: Tensor,
    dy: Tensor,
    values: Tensor,
    positions: Tensor,
    needs: list[bool],
    size: list[int],
    shape: list[int],
    stride: int,
    padding: list[int],
    padding_mode: str,
    dilation: int,
    groups: int,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``data`` (if ``needs[0]``, else empty), and of values and bias (if ``needs[1]``, else empty)."""
    _, run = _dispatch.pick("sparse_conv2d_map_gradients", data.device, backend)
    layer = _layer(shape, stride, padding, padding_mode, dilation, groups)
    found: tuple[Tensor, Tensor, Tensor] = run(
        LaneMap(aligned(data), *size), aligned(dy), values.contiguous(), positions, torch.Size(shape), layer, *needs
    )
    return found


@_conv.register_fake
def _(
    data: Tensor,
    values: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    size: list[int],
    shape: list[int],
    stride: int,
    *others: Any,
) -> Tensor:
    return _fake_map(data, shape[0], size[2], stride)


@_gradients.register_fake
def _(
    data: Tensor,
    dy: Tensor,
    values: Tensor,
    positions: Tensor,
    needs: list[bool],
    size: list[int],
    shape: list[int],
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = _fake_map(data, data.shape[1], size[2], 1) if needs[0] else data.new_empty(0)
    return dx, *fake_weight_gradients(data, positions, shape, needs[1])


def fake_weight_gradients(x: Tensor, positions: Tensor, shape: list[int], needed: bool) -> tuple[Tensor, Tensor]:
    """What the gradients of values and bias look like."""
    sizes = (positions.shape, shape[:1]) if needed else ((0,), (0,))
    return x.new_empty(sizes[0]), x.new_empty(sizes[1])


def _fake_map(data: Tensor, channels: int, halo: int, stride: int) -> Tensor:
    """What a map with as many pictures in blocks ``stride`` times as small looks like."""
    rows, columns = ((side - 2 * halo) // stride + 2 * halo for side in data.shape[2:4])
    plane = LANES * plane_vectors(rows * columns)
    strides = (channels * plane, plane, columns * LANES, LANES, 1)
    return data.new_empty_strided((data.shape[0], channels, rows, columns, LANES), strides)


def register_gradients(op: Any, gradients: Any) -> None:
    """Make ``gradients`` those of ``op``, the sparse convolution of a map or of a tensor. Where ``op`` takes a bias, it
    takes which gradients are needed, [of the input, of the weights], and ``dy`` behind the input."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, values, positions, _, *ctx.form = inputs
        ctx.save_for_backward(x, values, positions)

    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, values, positions = ctx.saved_tensors
        needs_x, needs_values, _, needs_bias, *_ = ctx.needs_input_grad
        needs = [needs_x, needs_values or needs_bias]
        dx, dvalues, dbias = gradients(x, dy, values, positions, needs, *ctx.form)
        found = (dx if needs_x else None, dvalues if needs_values else None, None, dbias if needs_bias else None)
        return (*found, *[None] * len(ctx.form))

    register_gradient(op, "sparse_conv2d", backward, setup_context=keep)
    refuse_double_backward(gradients, "sparse_conv2d")


register_gradients(_conv, _gradients)
