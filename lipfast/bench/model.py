"""Whole pruned networks: inference by `accelerate` and by `torch.compile`, against dense torch and each other, and
training steps against torch with the masks of `torch.nn.utils.prune`."""

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lipfast.bench.harness import Case, Size, Timed
from lipfast.bench.networks import (
    VGG16,
    Classifier,
    ConvNeXtTiny,
    ConvStack,
    EfficientNetB0,
    LeNet5,
    MobileNetV2,
    NAFNet,
    ResNet18,
    ResNet20,
    Restormer,
    SwinTiny,
    UNet,
    VisionTransformer,
)
from lipfast.engine import dynamo
from lipfast.engine.lane_module import accelerate

DENSITY = 0.1

Build = Callable[[], nn.Module]
Door = Callable[[nn.Module], Callable[[Tensor], Tensor]]


def cases(size: Size) -> list[Case]:
    """Each network through each door, then the training steps of classifiers of small pictures."""
    networks: list[tuple[str, Build, tuple[int, ...]]] = [
        ("eight 128-channel 3x3 convs", ConvStack, (1, 128, 128, 128)),
        ("U-Net", UNet, (1, 3, 128, 128)),
        ("ResNet-18", ResNet18, (1, 3, 224, 224)),
        ("ResNet-18", ResNet18, (8, 3, 224, 224)),
        ("MobileNetV2", MobileNetV2, (1, 3, 224, 224)),
        ("EfficientNet-B0", EfficientNetB0, (1, 3, 224, 224)),
        ("VGG-16's classifier", Classifier, (1, 512, 7, 7)),
        ("VGG-16's classifier", Classifier, (8, 512, 7, 7)),
        ("ResNet-20", ResNet20, (128, 3, 32, 32)),
        ("VGG-16 for 32 px", VGG16, (128, 3, 32, 32)),
        ("ViT-S/16", VisionTransformer, (1, 3, 224, 224)),
        ("ViT-S/16", VisionTransformer, (8, 3, 224, 224)),
        ("ConvNeXt-T", ConvNeXtTiny, (1, 3, 224, 224)),
        ("NAFNet", NAFNet, (1, 3, 128, 128)),
        ("Swin-T", SwinTiny, (1, 3, 224, 224)),
        ("ConvNeXt V2-T", functools.partial(ConvNeXtTiny, responses=True), (1, 3, 224, 224)),
        ("Attention U-Net", functools.partial(UNet, gated=True), (1, 3, 128, 128)),
        ("Restormer", Restormer, (1, 3, 128, 128)),
    ]
    trained: list[tuple[str, Build, tuple[int, ...]]] = [
        ("LeNet-5", LeNet5, (60, 1, 28, 28)),
        ("ResNet-20", ResNet20, (128, 3, 32, 32)),
        ("VGG-16 for 32 px", VGG16, (128, 3, 32, 32)),
        ("VGG-16 for 32 px", VGG16, (50, 3, 32, 32)),  # whose last vectors are not full
        ("VGG-16 with GroupNorm", lambda: VGG16(groups=8), (128, 3, 32, 32)),
        ("ViT-S/16", VisionTransformer, (8, 3, 224, 224)),
        ("ConvNeXt-T", ConvNeXtTiny, (4, 3, 224, 224)),
        ("NAFNet", NAFNet, (1, 3, 128, 128)),
        ("Swin-T", SwinTiny, (4, 3, 224, 224)),
        ("ConvNeXt V2-T", functools.partial(ConvNeXtTiny, responses=True), (4, 3, 224, 224)),
        ("Attention U-Net", functools.partial(UNet, gated=True), (1, 3, 128, 128)),
        ("Restormer", Restormer, (1, 3, 128, 128)),
    ]
    if size == "toy":
        networks = [
            ("stack", lambda: ConvStack(8, 2), (1, 8, 16, 16)),
            ("U-Net", lambda: UNet(4), (1, 3, 16, 24)),
            ("ResNet-18", lambda: ResNet18(4), (2, 3, 32, 32)),
            ("MobileNetV2", lambda: MobileNetV2(0.25), (1, 3, 64, 64)),
            ("EfficientNet-B0", lambda: EfficientNetB0(0.25), (1, 3, 64, 64)),
            ("VGG-16's classifier", lambda: Classifier(4, 24), (5, 4, 7, 7)),
            ("ViT-S/16", lambda: VisionTransformer(32, 2, 2, 32), (2, 3, 32, 32)),
            ("ConvNeXt-T", lambda: ConvNeXtTiny(8, (1, 1, 1, 1)), (2, 3, 64, 64)),
            ("NAFNet", lambda: NAFNet(8, (1, 1)), (1, 3, 16, 24)),
            ("Swin-T", lambda: SwinTiny(12, (2, 1), 3, 8, 4), (2, 3, 32, 32)),
            ("ConvNeXt V2-T", lambda: ConvNeXtTiny(8, (1, 1, 1, 1), True), (2, 3, 64, 64)),
            ("Attention U-Net", lambda: UNet(16, gated=True), (1, 3, 16, 24)),
            ("Restormer", lambda: Restormer(6, (1, 1), 1), (1, 3, 16, 24)),
        ]
        trained = [
            ("LeNet-5", LeNet5, (4, 1, 28, 28)),
            ("ResNet-20", lambda: ResNet20(4), (16, 3, 16, 16)),
            ("VGG-16 for 32 px", lambda: VGG16(4), (16, 3, 32, 32)),
            ("ViT-S/16", lambda: VisionTransformer(32, 2, 2, 32), (2, 3, 32, 32)),
            ("VGG-16 with GroupNorm", lambda: VGG16(8, 4), (16, 3, 32, 32)),
            ("ConvNeXt-T", lambda: ConvNeXtTiny(8, (1, 1, 1, 1)), (2, 3, 64, 64)),
            ("NAFNet", lambda: NAFNet(8, (1, 1)), (1, 3, 16, 24)),
            ("Swin-T", lambda: SwinTiny(12, (2, 1), 3, 8, 4), (2, 3, 32, 32)),
            ("ConvNeXt V2-T", lambda: ConvNeXtTiny(8, (1, 1, 1, 1), True), (2, 3, 64, 64)),
            ("Attention U-Net", lambda: UNet(16, gated=True), (1, 3, 16, 24)),
            ("Restormer", lambda: Restormer(6, (1, 1), 1), (1, 3, 16, 24)),
        ]
    doors: dict[str, Door] = {"accelerate": accelerate, "torch.compile": _compile}
    inference = [
        _case(
            "inference", f"{name}, batch {shape[0]}, {door}", shape, functools.partial(_setup, build, shape, function)
        )
        for name, build, shape in networks
        for door, function in doors.items()
    ]
    training = [
        _case(
            "training_step",
            f"{name}, batch {shape[0]}, training",
            shape,
            functools.partial(_setup_training, build, shape),
        )
        for name, build, shape in trained
    ]
    return inference + training


def _case(op: str, name: str, shape: tuple[int, ...], setup: Callable[[], Timed]) -> Case:
    return Case(op=op, name=name, shape=" x ".join(map(str, shape)), density=DENSITY, setup=setup)


def _compile(model: nn.Module) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()  # it compiles one function for so many modules only
    # By function, so that the benchmark runs from a source tree, where there are no entry points.
    compiled: Callable[[Tensor], Tensor] = torch.compile(model, backend=dynamo.lipfast)
    return compiled


def _is_prunable(module: nn.Module) -> TypeGuard[nn.Conv2d | nn.Linear]:
    """A window for each channel has nothing to spare."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


@contextlib.contextmanager
def _expecting_parts_in_torch() -> Iterator[None]:
    """Around first calls: what a transformer does to some of its tokens is not for lanes, and is named in a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lipfast: .* it runs in torch", UserWarning)
        yield


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
        with _expecting_parts_in_torch():
            error = (call(fast, x) - expected).abs().max() / expected.abs().max()
        assert float(error) < 1e-4, f"relative error {float(error)}"

    baselines: dict[str, Callable[[], object]] = {"channels_last": lambda: call(last, x_last)}
    if door is not accelerate:
        other = accelerate(model)
        with _expecting_parts_in_torch():
            call(other, x)
        baselines["accelerate"] = lambda: call(other, x)
    return Timed(ours=lambda: call(fast, x), baselines=baselines, check=check, backend="cpu")


# At a kink of a ReLU or between two maxima, rounding decides where a gradient goes.
_GRADIENTS_DIFFER = 0.05


def _setup_training(build: Build, shape: tuple[int, ...]) -> Timed:
    torch.manual_seed(0)
    x, labels = torch.randn(shape), torch.randint(10, shape[:1])
    fast = accelerate(_pruned(build))
    hooked = _pruned(build)
    last = _pruned(build).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x_last = x.contiguous(memory_format=torch.channels_last)

    def loss(result: Tensor) -> Tensor:
        return nn.functional.cross_entropy(result, labels) if result.dim() == 2 else result.square().mean()

    def stepper(model: nn.Module, x: Tensor) -> Callable[[], None]:
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

        def step() -> None:
            optimiser.zero_grad()
            loss(model(x)).backward()  # type: ignore[no-untyped-call]
            optimiser.step()

        return step

    steps = [stepper(fast, x), stepper(hooked, x), stepper(last, x_last)]

    def check() -> None:
        with _expecting_parts_in_torch():
            steps[0]()
        steps[1]()
        for name, mask in fast.masks.items():
            expected = hooked.get_parameter(f"{name}_orig").grad
            got = fast.get_parameter(name).grad
            assert expected is not None
            assert got is not None
            error = (got - expected[mask]).norm() / expected[mask].norm()
            assert float(error) < _GRADIENTS_DIFFER, f"{name}: relative error {float(error)}"

    return Timed(
        ours=steps[0], baselines={"contiguous": steps[1], "channels_last": steps[2]}, check=check, backend="cpu"
    )


def _pruned(build: Build) -> nn.Module:
    """The same network each time, with the hooks of `torch.nn.utils.prune`."""
    torch.manual_seed(0)
    model = build()
    for module in model.modules():
        if _is_prunable(module):
            prune.l1_unstructured(module, "weight", amount=1 - DENSITY)  # type: ignore[no-untyped-call]
    return model
