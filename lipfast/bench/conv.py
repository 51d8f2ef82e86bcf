"""Convolutions on maps that stay in lanes, against torch's channels_last convolution of the masked dense weight; and
`lipfast.ops.sparse_conv2d`, which makes its results in each call, on maps and on ordinary tensors.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lipfast.bench.harness import Case, Size, Timed
from lipfast.ops import ConvForm, LaneConv, LaneMap, SparseWeight, sparse_conv2d
from lipfast.ops.lane_conv import asked_kernel

CHANNELS = 128  # the paper's network
DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05)
# Baseline -> dtype. Each has cases of its own: a CPU without bf16 instructions takes a hundred times longer for bf16,
# on all cores, which leaves few turns for the others, and large maps out.
BASELINES = {"torch": torch.float32, "torch bf16": torch.bfloat16}
LARGEST_BF16 = 128  # px
TOLERANCE = 1e-5  # relative, in norm, against torch in float64 on a few rows of channels


@dataclass(frozen=True)
class _Layer:
    """A layer of the benchmark and the densities it is timed at."""

    name: str
    kernel: int
    stride: int
    pixels: int
    densities: tuple[float, ...]


LAYERS = [_Layer(f"3x3 {pixels} px", 3, 1, pixels, DENSITIES) for pixels in (64, 128, 256, 512)]
LAYERS += [
    _Layer("3x3 stride 2 128 px", 3, 2, 128, (1.0, 0.2, 0.1, 0.05)),
    _Layer("1x1 128 px", 1, 1, 128, (1.0, 0.1)),
    _Layer("5x5 64 px", 5, 1, 64, (1.0, 0.5, 0.2, 0.1)),
]
DENSE_LAYERS = [
    _Layer("3x3 stride 2 128 px", 3, 2, 128, (1.0,)),
    _Layer("1x1 128 px", 1, 1, 128, (1.0,)),
    _Layer("5x5 64 px, exact", 5, 1, 64, (1.0,)),
    _Layer("3x3 128 px, exact", 3, 1, 128, (1.0,)),
]


OPERATOR_LAYERS = [_Layer(f"3x3 {pixels} px", 3, 1, pixels, (0.1, 0.05)) for pixels in (64, 128)]
OPERANDS: dict[str, Callable[[Tensor], Tensor | LaneMap]] = {  # of sparse_conv2d
    "lanes": lambda x: LaneMap.from_tensor(x, 1),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "NCHW": lambda x: x,
}


def cases(size: Size) -> list[Case]:
    """Forward alone, and forward with both gradients, of every layer and density."""
    layers = _cases(LAYERS if size == "full" else [_Layer("3x3 toy", 3, 1, 16, (1.0, 0.1))], size, "auto")
    return layers + _operator_cases(OPERATOR_LAYERS if size == "full" else [_Layer("3x3 toy", 3, 1, 16, (0.1,))], size)


def dense_cases(size: Size) -> list[Case]:
    """The register-blocked dense kernels, which run what Winograd cannot or, with ``exact``, must not."""
    return _cases(DENSE_LAYERS if size == "full" else [_Layer("5x5 toy", 5, 1, 16, (1.0,))], size, "dense")


def _cases(layers: list[_Layer], size: Size, kernel: str) -> list[Case]:
    channels = CHANNELS if size == "full" else 8
    return [
        Case(
            op="conv_training" if training else "conv_forward",
            name=f"{layer.name} {1 - density:.0%} zeros" + ("" if baseline == "torch" else ", bf16"),
            shape=f"{channels} -> {channels} channels, {layer.kernel}x{layer.kernel}, stride {layer.stride}, "
            f"{layer.pixels} px, batch 1",
            density=density,
            setup=functools.partial(_setup, layer, channels, density, training, kernel, baseline),
        )
        for baseline in (BASELINES if kernel == "auto" else ["torch"])
        for layer in layers
        if baseline == "torch" or layer.pixels <= LARGEST_BF16
        for density in layer.densities
        for training in (False, True)
    ]


def _operator_cases(layers: list[_Layer], size: Size) -> list[Case]:
    channels = CHANNELS if size == "full" else 8
    return [
        Case(
            op="sparse_conv2d_training" if training else "sparse_conv2d",
            name=f"{layer.name} {1 - density:.0%} zeros, {operand}",
            shape=f"{channels} -> {channels} channels, 3x3, stride 1, {layer.pixels} px, batch 1",
            density=density,
            setup=functools.partial(_setup_operator, layer, channels, density, training, operand),
        )
        for layer in layers
        for density in layer.densities
        for operand in OPERANDS
        for training in (False, True)
    ]


def _setup_operator(layer: _Layer, channels: int, density: float, training: bool, operand: str) -> Timed:
    form = ConvForm(channels, channels, (3, 3), 1, (1, 1))
    x, weight, mask, bias = _draw(layer, channels, density)
    packed = SparseWeight.from_dense(weight, mask)
    dy = torch.randn(x.shape)
    given, dy_given = OPERANDS[operand](x), OPERANDS[operand](dy)
    numbers, gradient = (t.data if isinstance(t, LaneMap) else t for t in (given, dy_given))
    leaves = (numbers, packed.values, bias)

    def forward() -> Tensor:
        if isinstance(given, LaneMap):
            return sparse_conv2d(given, packed, bias, padding=1).data
        return sparse_conv2d(given, packed, bias, padding=1)

    def train() -> tuple[Tensor, ...]:
        for leaf in leaves:
            leaf.requires_grad_()
        y = forward()
        found = torch.autograd.grad(y, leaves, gradient)
        for leaf in leaves:
            leaf.requires_grad_(False)
        return y.detach(), *found

    def check() -> None:
        y, dx, dvalues, _ = train()
        y, dx = (LaneMap(t, layer.pixels, layer.pixels, 1).to_tensor() if t.dim() == 5 else t for t in (y, dx))
        _compare({"y": y, "dx": dx, "dw": dvalues}, x, weight, mask, bias, form, dy)

    return Timed(
        ours=train if training else forward,
        baselines={"torch": _in_torch(x, weight, bias, dy, form, torch.float32, training)},
        check=check,
        backend="cpu",
        flops=2.0 * len(packed.values) * layer.pixels**2 * (3 if training else 1),
    )


def _draw(layer: _Layer, channels: int, density: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, masked weight, mask and bias."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, layer.pixels, layer.pixels, generator=generator)
    weight = torch.randn(channels, channels, layer.kernel, layer.kernel, generator=generator)
    mask = torch.rand(weight.shape, generator=generator) < density
    return x, weight * mask, mask, torch.randn(channels, generator=generator)


def _setup(layer: _Layer, channels: int, density: float, training: bool, kernel: str, baseline: str) -> Timed:
    x, weight, mask, bias = _draw(layer, channels, density)
    padding = layer.kernel // 2
    form = ConvForm(channels, channels, (layer.kernel, layer.kernel), layer.stride, (padding, padding))
    asked = kernel if kernel != "auto" else asked_kernel()
    ours = _OnLanes(
        LaneConv(form, None if density == 1 else mask, 1, layer.pixels, layer.pixels, kernel=asked),
        x,
        weight[mask],
        bias,
    )
    products = ours.dy.numel() // channels * len(ours.values)
    return Timed(
        ours=ours.train if training else ours.forward,
        baselines={baseline: _in_torch(x, weight, bias, ours.dy, form, BASELINES[baseline], training)},
        check=functools.partial(_check, ours, x, weight, mask, bias, form),
        backend="cpu: " + "/".join(ours.conv.kernels.values() if training else [ours.conv.kernels["forward"]]),
        flops=2.0 * products * (3 if training else 1),
    )


class _OnLanes:
    """A layer with its maps in lanes."""

    def __init__(self, conv: LaneConv, x: Tensor, values: Tensor, bias: Tensor) -> None:
        self.conv, self.values, self.bias = conv, values.contiguous(), bias
        self.x = LaneMap.from_tensor(x, conv.in_halo, block=conv.in_block)
        self.y, self.dx = conv.output_map(), conv.input_map()
        self.dy = torch.randn(1, conv.form.out_channels, conv.out_height, conv.out_width)
        self.dy_lanes = LaneMap.from_tensor(self.dy, conv.gradient_halo, block=conv.out_block)
        self.dvalues, self.dbias = torch.empty(conv.kept), torch.empty(conv.form.out_channels)

    def forward(self) -> None:
        self.conv.forward(self.values, self.bias, self.x, self.y)

    def train(self) -> None:
        self.forward()
        self.conv.input_gradient(self.values, self.dy_lanes, self.dx)
        self.conv.weight_gradient(self.x, self.dy_lanes, self.dvalues, self.dbias)


def _in_torch(
    x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, form: ConvForm, dtype: torch.dtype, training: bool
) -> Callable[[], object]:
    x, weight, dy = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, weight, dy))
    bias, stride, padding = bias.to(dtype), [form.stride] * 2, list(form.padding)

    def forward() -> object:
        return functional.conv2d(x, weight, bias, stride, padding)

    def train() -> object:
        forward()
        wanted = [True, True, True]
        return torch.ops.aten.convolution_backward(
            dy, x, weight, [len(bias)], stride, padding, [1, 1], False, [0, 0], 1, wanted
        )

    return train if training else forward


def _check(ours: _OnLanes, x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor, form: ConvForm) -> None:
    ours.train()
    found = {"y": ours.y.to_tensor(), "dx": ours.dx.to_tensor(), "dw": ours.dvalues}
    _compare(found, x, weight, mask, bias, form, ours.dy)


def _compare(
    found: dict[str, Tensor], x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor, form: ConvForm, dy: Tensor
) -> None:
    x, weight, bias = (t.detach().double().requires_grad_() for t in (x, weight, bias))
    y = functional.conv2d(x, weight, bias, form.stride, list(form.padding))
    dx, dw = torch.autograd.grad(y, (x, weight), dy.double())
    for name, want in {"y": y.detach(), "dx": dx, "dw": dw[mask]}.items():
        error = float((found[name] - want).norm() / want.norm())
        assert error <= TOLERANCE, f"{name} is off by {error:.1e} of its norm"
