"""Convolution with a weight most of whose entries are zero, and stay zero."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lipfast.errors import InputError
from lipfast.ops import _dispatch, _padding
from lipfast.ops._autograd import refuse_tangents
from lipfast.ops._checks import check_dense, check_window, pair, whole_number
from lipfast.ops.lane_conv import ConvForm, fits_lanes
from lipfast.ops.lanes import LANES, LaneMap
from lipfast.ops.sparse_conv_map import conv_of_map, fake_weight_gradients, register_gradients


@dataclass(frozen=True)
class SparseWeight:
    """The kept entries of a convolution's weight.

    Attributes:
        values: ``(kept,)`` float32 in row-major order of the dense weight; may require gradients or be a parameter.
        positions: ``(kept,)`` int64, ascending flat indices of the kept entries.
        shape: of the dense weight, ``(out, in / groups, kernel rows, kernel columns)``.
    """

    values: Tensor
    positions: Tensor
    shape: torch.Size

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor | None = None) -> "SparseWeight":
        """Pack a dense weight: what ``mask`` keeps, or what is not zero.

        Args:
            weight: ``(out, in / groups, kh, kw)``, any float dtype. Gradients flow back to it.
            mask: bool of the same shape, True = kept; None keeps the non-zero entries.

        Raises:
            InputError: not four axes, or a mask of another shape or dtype.
        """
        check_dense("SparseWeight.from_dense", "weight", weight)
        if weight.dim() != 4:
            raise InputError(
                f"SparseWeight.from_dense: a convolution's weight has 4 axes, got shape {tuple(weight.shape)}"
            )
        if mask is None:
            mask = weight.detach() != 0
        elif mask.shape != weight.shape or mask.dtype != torch.bool:
            raise InputError(
                f"SparseWeight.from_dense: expected a bool mask of shape {tuple(weight.shape)}, "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
        positions = mask.reshape(-1).nonzero().squeeze(1)
        return cls(weight.reshape(-1)[positions], positions, weight.shape)

    def to_dense(self) -> Tensor:
        """The dense weight, exact zeros where nothing is kept; differentiable."""
        return self.values.new_zeros(self.shape.numel()).index_copy(0, self.positions, self.values).view(self.shape)

    @property
    def density(self) -> float:
        """Share of kept entries."""
        return len(self.positions) / max(1, self.shape.numel())


Maps = TypeVar("Maps", Tensor, LaneMap)


def sparse_conv2d(
    x: Maps,
    weight: SparseWeight,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    padding_mode: str = "zeros",
    dilation: int = 1,
    groups: int = 1,
    *,
    backend: str | None = None,
) -> Maps:
    """``torch.nn.functional.conv2d`` with a packed weight; gradients for the kept entries only.

    A tensor is converted to the lane layout and back on the CPU (docs/lanes.md), and the output has its memory format.
    float32 runs the kernels; other dtypes run the reference. So do strides that differ by axis, empty maps, and on the
    CPU layers that lanes do not suit (docs/lanes.md).

    A `LaneMap` stays in lanes: layers behind each other convert nothing. Its halo must be filled with this layer's
    padding, as `LaneMap.from_tensor` and `LaneMap.fill_halo` do, and at least as wide as the layer reads; the output
    has a halo of the same width, filled in the same way (with zeros if it has too few pixels to copy), so equal layers
    follow as they are. A halo that is filled anew before a layer's backward pass is noticed, as writes in place are.
    Such a layer has one stride for both axes.

    Args:
        x: ``(batch, in, height, width)``, NCHW or channels_last, or a map in lanes.
        weight: see `SparseWeight`; ``values`` on the device and of the dtype of ``x``.
        bias: ``(out,)`` or None.
        stride, padding: one number or one for each axis. dilation, groups: as in torch.
        padding_mode: ``zeros``, ``reflect``, ``replicate`` or ``circular``.
        backend: run exactly this implementation; None lets the seam choose.

    Returns:
        ``(batch, out, out height, out width)``, a map in lanes where ``x`` is one.

    Raises:
        InputError: an argument breaks the lines above; the message names it.
        BackendError: ``backend`` cannot run here, or double backward: the gradient has no gradient of its own.

    Source: the layout and kernels are this project's (docs/kernels.md).
    """
    stride, padding = pair("sparse_conv2d", "stride", stride), pair("sparse_conv2d", "padding", padding)
    dilation, groups = (whole_number("sparse_conv2d", *named) for named in (("dilation", dilation), ("groups", groups)))
    size, numbers = _size_and_numbers(x)
    _check_weight(size, numbers, weight, bias, groups)
    check_window("sparse_conv2d", size[2:], weight.shape[2:], stride, padding, padding_mode, dilation)
    refuse_tangents("sparse_conv2d", numbers, weight.values, bias)
    if isinstance(x, LaneMap):
        if stride[0] != stride[1]:
            raise InputError(f"sparse_conv2d: a map in lanes takes one stride for both axes, got {stride}")
        layer = ConvForm.of(weight.shape, stride, padding, padding_mode, dilation, groups)
        return conv_of_map(x, weight.values, weight.positions, bias, layer, backend)  # type: ignore[return-value]
    if padding_mode != "zeros" and padding[0] != padding[1]:
        x, padding, padding_mode = _padding.pad(x, padding, padding_mode), (0, 0), "zeros"
    layer = ConvForm.of(weight.shape, stride, padding, padding_mode, dilation, groups)
    if backend is None and (stride[0] != stride[1] or not _has_kernel(x, layer)):
        backend = "reference"
    form = (list(weight.shape), list(stride), list(padding), padding_mode, dilation, groups)
    y: Tensor = _conv(x, weight.values, weight.positions, bias, *form, backend)
    return y


def _has_kernel(x: Tensor, layer: ConvForm) -> bool:
    """Whether there is a kernel for a layer that is worth its while."""
    if x.dtype != torch.float32 or 0 in x.shape:
        return False
    return x.device.type != "cpu" or fits_lanes(layer, x.shape[2], x.shape[3])


def _size_and_numbers(x: Tensor | LaneMap) -> tuple[tuple[int, ...], Tensor]:
    """Batch, channels, height and width, if ``x`` has four axes, and the tensor that holds its numbers."""
    if isinstance(x, LaneMap):
        if x.data.dim() != 5 or x.data.shape[4] != LANES or x.data.dtype != torch.float32:
            raise InputError(
                f"sparse_conv2d: a map in lanes holds (batch, channels, rows, columns, {LANES}) float32, "
                f"got {tuple(x.data.shape)} {x.data.dtype}"
            )
        return (*x.data.shape[:2], x.height, x.width), x.data
    check_dense("sparse_conv2d", "x", x)
    return x.shape, x


def _check_weight(size: tuple[int, ...], x: Tensor, weight: SparseWeight, bias: Tensor | None, groups: int) -> None:
    """``size``: batch, channels, height and width of what ``x`` holds."""
    if not isinstance(weight, SparseWeight):
        raise InputError(
            f"sparse_conv2d: weight must be a SparseWeight, got {type(weight).__name__}; use SparseWeight.from_dense"
        )
    if len(weight.shape) != 4 or 0 in weight.shape:
        raise InputError(f"sparse_conv2d: a weight has 4 axes, none of them empty, got {tuple(weight.shape)}")
    values, positions = weight.values, weight.positions
    if values.dim() != 1 or values.shape != positions.shape or positions.dtype != torch.int64:
        raise InputError(
            "sparse_conv2d: a weight has (kept,) values and as many int64 positions, "
            f"got {tuple(values.shape)} and {tuple(positions.shape)} {positions.dtype}"
        )
    out, per_group = weight.shape[:2]
    if groups < 1 or len(size) != 4 or size[1] != per_group * groups or out % groups:
        raise InputError(
            f"sparse_conv2d: a weight of {tuple(weight.shape)} with {groups} groups takes "
            f"(batch, {per_group * groups}, height, width), got {tuple(size)}"
        )
    if values.dtype != x.dtype or not values.device == positions.device == x.device:
        raise InputError(
            f"sparse_conv2d: values are {values.dtype} on {values.device}, positions on {positions.device}, "
            f"x is {x.dtype} on {x.device}; convert one of them"
        )
    if bias is not None and (bias.shape, bias.dtype, bias.device) != ((out,), x.dtype, x.device):
        raise InputError(
            f"sparse_conv2d: bias must be ({out},) {x.dtype} on {x.device}, "
            f"got {tuple(bias.shape)} {bias.dtype} on {bias.device}"
        )


Form = tuple[torch.Size, tuple[int, int], tuple[int, int], str]


def _run(op: str, device: torch.device, backend: str | None, dilation: int, groups: int, *args: Any) -> Tensor:
    name, function = _dispatch.pick(op, device, backend)
    if (dilation, groups) == (1, 1):
        return function(*args)  # type: ignore[no-any-return]
    if name in ("cuda", "triton"):  # their kernels have neither
        function = _dispatch.pick(op, device, "reference")[1]
    return function(*args, dilation, groups)  # type: ignore[no-any-return]


def _tuples(shape: list[int], stride: list[int], padding: list[int], mode: str) -> Form:
    return torch.Size(shape), (stride[0], stride[1]), (padding[0], padding[1]), mode


@torch.library.custom_op("lipfast::sparse_conv2d", mutates_args=())
def _conv(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    shape: list[int],
    stride: list[int],
    padding: list[int],
    padding_mode: str,
    dilation: int,
    groups: int,
    backend: str | None,
) -> Tensor:
    size, *form = _tuples(shape, stride, padding, padding_mode)
    args = (x, values.contiguous(), positions, size, bias, *form)
    return _run("sparse_conv2d_forward", x.device, backend, dilation, groups, *args)


@torch.library.custom_op("lipfast::sparse_conv2d_gradients", mutates_args=())
def _gradients(
    x: Tensor,
    dy: Tensor,
    values: Tensor,
    positions: Tensor,
    needs: list[bool],
    shape: list[int],
    stride: list[int],
    padding: list[int],
    padding_mode: str,
    dilation: int,
    groups: int,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x`` (if ``needs[0]``, else empty), and of values and bias (if ``needs[1]``, else empty)."""
    size, steps, pads, mode = _tuples(shape, stride, padding, padding_mode)
    values = values.contiguous()
    name, _ = _dispatch.pick("sparse_conv2d_input_gradient", x.device, backend)
    if name == "cpu":
        _, run = _dispatch.pick("sparse_conv2d_gradients", x.device, name)
        layer = ConvForm.of(size, steps, pads, mode, dilation, groups)
        found: tuple[Tensor, Tensor, Tensor] = run(x, dy, values, positions, size, layer, *needs)
        return found
    dx, dvalues, dbias = (x.new_empty(0) for _ in range(3))
    where = (x.device, backend, dilation, groups)
    if needs[0]:
        dx = _run("sparse_conv2d_input_gradient", *where, dy, values, positions, size, x.shape, steps, pads, mode)
    if needs[1]:
        dvalues = _run("sparse_conv2d_weight_gradient", *where, x, dy, positions, size, steps, pads, mode)
        dbias = dy.sum((0, 2, 3))
    return dx, dvalues, dbias


@_conv.register_fake
def _(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    shape: list[int],
    stride: list[int],
    padding: list[int],
    padding_mode: str,
    dilation: int,
    groups: int,
    backend: str | None,
) -> Tensor:
    rows, columns = (
        (side + 2 * pad - dilation * (kernel - 1) - 1) // step + 1
        for side, pad, kernel, step in zip(x.shape[2:], padding, shape[2:], stride, strict=True)
    )
    like = torch.channels_last if _padding.is_channels_last(x) else torch.contiguous_format
    return x.new_empty((x.shape[0], shape[0], rows, columns)).contiguous(memory_format=like)


@_gradients.register_fake
def _(
    x: Tensor, dy: Tensor, values: Tensor, positions: Tensor, needs: list[bool], shape: list[int], *form: Any
) -> tuple[Tensor, Tensor, Tensor]:
    like = torch.channels_last if _padding.is_channels_last(dy) else torch.contiguous_format
    dx = x.new_empty(x.shape).contiguous(memory_format=like) if needs[0] else x.new_empty(0)
    return dx, *fake_weight_gradients(x, positions, shape, needs[1])


register_gradients(_conv, _gradients)
