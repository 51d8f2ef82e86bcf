"""Inference of whole pruned networks, by `accelerate` and by `torch.compile`, against dense torch and each other."""

import copy
import functools
from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn

from lipfast.bench.harness import Case, Size, Timed
from lipfast.bench.networks import Classifier, ConvStack, EfficientNetB0, MobileNetV2, ResNet18, UNet
from lipfast.engine import dynamo
from lipfast.engine.lane_module import accelerate

DENSITY = 0.1

Build = Callable[[], nn.Module]
Door = Callable[[nn.Module], Callable[[Tensor], Tensor]]


def cases(size: Size) -> list[Case]:
    """Each network through each door."""
    networks: list[tuple[str, Build, tuple[int, ...]]] = [
        ("eight 128-channel 3x3 convs", ConvStack, (1, 128, 128, 128)),
        ("U-Net", UNet, (1, 3, 128, 128)),
        ("ResNet-18", ResNet18, (1, 3, 224, 224)),
        ("ResNet-18", ResNet18, (8, 3, 224, 224)),
        ("MobileNetV2", MobileNetV2, (1, 3, 224, 224)),
        ("EfficientNet-B0", EfficientNetB0, (1, 3, 224, 224)),
        ("VGG-16's classifier", Classifier, (1, 512, 7, 7)),
        ("VGG-16's classifier", Classifier, (8, 512, 7, 7)),
    ]
    if size == "toy":
        networks = [
            ("stack", lambda: ConvStack(8, 2), (1, 8, 16, 16)),
            ("U-Net", lambda: UNet(4), (1, 3, 16, 24)),
            ("ResNet-18", lambda: ResNet18(4), (2, 3, 32, 32)),
            ("MobileNetV2", lambda: MobileNetV2(0.25), (1, 3, 64, 64)),
            ("EfficientNet-B0", lambda: EfficientNetB0(0.25), (1, 3, 64, 64)),
            ("VGG-16's classifier", lambda: Classifier(4, 24), (5, 4, 7, 7)),
        ]
    doors: dict[str, Door] = {"accelerate": accelerate, "torch.compile": _compile}
    return [
        Case(
            op="inference",
            name=f"{name}, batch {shape[0]}, {door}",
            shape=" x ".join(map(str, shape)),
            density=DENSITY,
            setup=functools.partial(_setup, build, shape, function),
        )
        for name, build, shape in networks
        for door, function in doors.items()
    ]


def _compile(model: nn.Module) -> Callable[[Tensor], Tensor]:
    # By function, so that the benchmark runs from a source tree, where there are no entry points.
    compiled: Callable[[Tensor], Tensor] = torch.compile(model, backend=dynamo.lipfast)
    return compiled


def _is_prunable(module: nn.Module) -> TypeGuard[nn.Conv2d | nn.Linear]:
    """A window for each channel has nothing to spare."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def _setup(build: Build, shape: tuple[int, ...], door: Door) -> Timed:
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for module in model.modules():
            if _is_prunable(module):
                nn.init.kaiming_normal_(module.weight)
                keep = torch.rand_like(module.weight) < DENSITY
                module.weight.copy_(torch.where(keep, module.weight / DENSITY**0.5, 0.0))
    x = torch.randn(shape)
    fast = door(model)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x_last = x.contiguous(memory_format=torch.channels_last)

    def call(module: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
        with torch.no_grad():
            return module(tensor)

    def check() -> None:
        expected = call(last, x_last)
        error = (call(fast, x) - expected).abs().max() / expected.abs().max()
        assert float(error) < 1e-4, f"relative error {float(error)}"

    baselines: dict[str, Callable[[], object]] = {"channels_last": lambda: call(last, x_last)}
    if door is not accelerate:
        other = accelerate(model)
        baselines["accelerate"] = lambda: call(other, x)
    return Timed(ours=lambda: call(fast, x), baselines=baselines, check=check, backend="cpu")
