"""A convolution with a pruned weight whose directions run in different kernels, as timings on a GPU advise."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lipfast.ops import _dispatch, _gpu_rule, _padding, masked, reference, sparse_conv
from lipfast.ops._once import differentiable_once
from lipfast.ops.sparse_conv import SparseWeight


@dataclass(frozen=True)
class Pattern:
    """Which weights of a convolution live, on the device it runs on.

    Attributes:
        positions: ``(kept,)`` int64, ascending flat indices.
        words: the same as `lipfast.ops.pack_mask` packs it.
        shape: of the dense weight.
    """

    positions: Tensor
    words: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, mask: Tensor, device: torch.device) -> "Pattern":
        """From a bool tensor of the weight's shape, True where a weight is kept."""
        with torch.inference_mode(False):  # such tensors could not be used in training afterwards
            mask = mask.to(device)
            return cls(mask.reshape(-1).nonzero().squeeze(1), masked.pack_mask(mask), mask.shape)

    @property
    def density(self) -> float:
        """Share of kept weights."""
        return len(self.positions) / max(1, self.shape.numel())


@dataclass(frozen=True)
class PrunedForm:
    """What a pruned convolution is, apart from its weights. Strides and paddings are (rows, columns)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    padding_mode: str = "zeros"
    dilation: int = 1
    groups: int = 1


def choose_kernels(
    pattern: Pattern,
    form: PrunedForm,
    output_size: torch.Size,
    *,
    device: torch.device,
    precision: str,
) -> dict[str, str]:
    """What runs each direction of a layer by the rule of docs/gpu.md: "sparse", "dense" or "masked"."""
    if (form.dilation, form.groups) != (1, 1):
        return dict.fromkeys(_gpu_rule.DIRECTIONS, "dense")
    library, _ = _dispatch.pick("sparse_conv2d_forward", device)
    layer = _gpu_rule.Layer(tuple(pattern.shape), tuple(output_size), form.stride, pattern.density)
    return _gpu_rule.choose(layer, library=library, precision=precision)


def pruned_conv2d(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pattern: Pattern,
    form: PrunedForm,
    kernels: dict[str, str],
    *,
    precision: str = "ieee",
    dense: Tensor | None = None,
    bias_cancels: bool = False,
) -> Tensor:
    """Convolve with the kept ``values`` of a weight; gradients for them, ``x`` and ``bias``.

    Args:
        x: ``(batch, inputs, rows, columns)`` float32; values ``(kept,)``, bias ``(outputs,)`` alike, on one device.
        pattern: where the values sit.
        form: stride, padding and so on.
        kernels: what runs each direction, as `choose_kernels` gives it.
        precision: of factors in dense arithmetic: "ieee", "tf32" or "bf16"; sparse kernels always multiply in fp32.
        dense: the same weight unpacked, where the caller has it. It then takes the gradient of a dense kernel, whole;
            ``values`` take that of a sparse one.
        bias_cancels: what reads the result subtracts each channel's mean, so that the gradient of ``bias`` is exactly 0
            and is not summed up.

    Returns:
        ``(batch, outputs, rows, columns)``. Double backward is refused by torch.
    """
    settings = (pattern, form, kernels, precision, bias_cancels)
    y: Tensor = _PrunedConv.apply(x, values, bias, dense, *settings)  # type: ignore[no-untyped-call]
    return y


def dense_pruned_conv2d(x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, form: PrunedForm) -> Tensor:
    """The same in torch's own functions, for any float type and under autocast."""
    weight = SparseWeight(values, pattern.positions, pattern.shape).to_dense()
    return reference.dense_conv2d(x, weight, bias, *_settings(form))


class _PrunedConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        dense: Tensor | None,
        pattern: Pattern,
        form: PrunedForm,
        kernels: dict[str, str],
        precision: str,
        bias_cancels: bool,
    ) -> Tensor:
        ctx.given_dense, ctx.input_size, ctx.settings = dense is not None, x.shape, (pattern, kernels, precision)
        ctx.bias_cancels = bias_cancels
        weight = SparseWeight(values, pattern.positions, pattern.shape)
        if dense is None:  # of no use to sparse kernels
            dense = values if set(kernels.values()) == {"sparse"} else weight.to_dense()
        ctx.form, ctx.form_of_x = form, form
        if _pads_once(form, kernels):
            x, form = _padding.pad(x, form.padding, form.padding_mode), replace(form, padding=(0, 0))
            ctx.form_of_x = form
        ctx.save_for_backward(x, values, dense)
        settings = (form.stride, form.padding, form.padding_mode)
        if kernels["forward"] == "sparse":
            return sparse_conv.sparse_conv2d(x, weight, bias, *settings)
        if kernels["forward"] == "masked":
            y = masked.masked_conv2d(x, dense, pattern.words, *settings, precision=precision)
            return y if bias is None else y.add_(bias.view(1, -1, 1, 1))
        with reference.convolving_in(precision, x.device):
            return reference.dense_conv2d(x, dense, bias, *_settings(form))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x, values, dense), (pattern, kernels, _) = ctx.saved_tensors, ctx.settings
        needs_x, needs_values, needs_bias, needs_dense = ctx.needs_input_grad[:4]
        dx = _input_gradient(dy, values, dense, ctx.input_size, ctx.form, *ctx.settings) if needs_x else None
        dweight = _weight_gradient(x, dy, ctx.form_of_x, *ctx.settings) if needs_values or needs_dense else None
        dvalues = ddense = None
        if dweight is None or kernels["weight_gradient"] == "sparse":
            dvalues = dweight
        elif ctx.given_dense:
            ddense = dweight
        else:
            dvalues = dweight.reshape(-1)[pattern.positions]
        dbias = None
        if needs_bias:
            dbias = dy.new_zeros(dy.shape[1]) if ctx.bias_cancels else dy.sum((0, 2, 3))
        return dx, dvalues, dbias, ddense, None, None, None, None, None


def _input_gradient(
    dy: Tensor,
    values: Tensor,
    dense: Tensor,
    input_size: torch.Size,
    form: PrunedForm,
    pattern: Pattern,
    kernels: dict[str, str],
    precision: str,
) -> Tensor:
    if kernels["input_gradient"] == "sparse":
        _, run = _dispatch.pick("sparse_conv2d_input_gradient", dy.device)
        settings = (form.stride, form.padding, form.padding_mode)
        dx: Tensor = run(dy, values.contiguous(), pattern.positions, pattern.shape, input_size, *settings)
        return dx
    with reference.convolving_in(precision, dy.device):
        return reference.dense_input_gradient(dy, dense, input_size, *_settings(form))


def _weight_gradient(
    x: Tensor, dy: Tensor, form: PrunedForm, pattern: Pattern, kernels: dict[str, str], precision: str
) -> Tensor:
    """Of the kept values by a sparse kernel, else of the dense weight."""
    if kernels["weight_gradient"] == "sparse":
        _, run = _dispatch.pick("sparse_conv2d_weight_gradient", x.device)
        gradient: Tensor = run(x, dy, pattern.positions, pattern.shape, form.stride, form.padding, form.padding_mode)
        return gradient
    with reference.convolving_in(precision, x.device):
        return reference.dense_weight_gradient(x, dy, pattern.shape, *_settings(form))


def _pads_once(form: PrunedForm, kernels: dict[str, str]) -> bool:
    """Whether forward and weight gradient share a padded copy of the map: dense kernels pad with zeros alone."""
    dense = (kernels["forward"], kernels["weight_gradient"]) == ("dense", "dense")
    return dense and form.padding_mode != "zeros" and form.padding != (0, 0)


def _settings(form: PrunedForm) -> tuple[tuple[int, int], tuple[int, int], str, int, int]:
    return form.stride, form.padding, form.padding_mode, form.dilation, form.groups
