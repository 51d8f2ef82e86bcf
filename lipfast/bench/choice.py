"""The convolution kernel that lipfast chooses against each that it could have chosen: no ratio should be below 0.95."""

import functools

import torch

from lipfast.bench.harness import Case, Size, Timed
from lipfast.ops import ConvForm, LaneConv, LaneMap

KERNELS = ("sparse", "winograd", "dense")
DIRECTIONS = ("forward", "input_gradient", "weight_gradient")
DENSITIES = (1.0, 0.5, 0.3, 0.25, 0.2, 0.15, 0.1, 0.03)
# channels in, out; kernel; stride; pixels: layers of the paper's network and of classifiers
LAYERS = (
    *((128, 128, 3, 1, 128), (128, 128, 3, 1, 32), (64, 64, 3, 1, 56), (128, 128, 1, 1, 128), (128, 128, 3, 2, 64)),
    (128, 128, 5, 1, 64),
)


def cases(size: Size) -> list[Case]:
    """One case for each layer, density and direction."""
    layers, densities = (LAYERS, DENSITIES) if size == "full" else (((8, 8, 3, 1, 16),), (0.5,))
    return [
        Case(
            op=f"conv_{direction}",
            name=f"{kernel}x{kernel} stride {stride} {pixels} px {1 - density:.0%} zeros {direction}",
            shape=f"{into} -> {out} channels, {kernel}x{kernel}, stride {stride}, {pixels} px, batch 1",
            density=density,
            setup=functools.partial(
                _setup, ConvForm(out, into, (kernel, kernel), stride, (kernel // 2,) * 2), pixels, density, direction
            ),
        )
        for into, out, kernel, stride, pixels in layers
        for density in densities
        for direction in DIRECTIONS
    ]


def _setup(form: ConvForm, pixels: int, density: float, direction: str) -> Timed:
    chosen = OneDirection(form, pixels, density, direction, "auto")
    others = {name: OneDirection(form, pixels, density, direction, name) for name in KERNELS}
    # A kernel that cannot do the layer leaves the choice to the cost model: nothing to compare with.
    able = {name: other for name, other in others.items() if other.kernel == name}
    return Timed(
        ours=chosen.run,
        baselines={name: other.run for name, other in able.items()},
        check=functools.partial(_check, chosen, list(able.values())),
        backend=f"cpu: {chosen.kernel}",
    )


class OneDirection:
    """A layer of which one direction runs, by one kernel."""

    def __init__(self, form: ConvForm, pixels: int, density: float, direction: str, kernel: str) -> None:
        generator = torch.Generator().manual_seed(0)
        mask = torch.rand(form.out_channels, form.in_channels, *form.kernel, generator=generator) < density
        self.conv = LaneConv(form, None if density == 1 else mask, 1, pixels, pixels, kernel=kernel)
        self.kernel, self.direction = self.conv.kernels[direction], direction
        self.values = torch.randn(self.conv.kept, generator=generator)
        x = torch.randn(1, form.in_channels, pixels, pixels, generator=generator)
        dy = torch.randn(1, form.out_channels, *form.out_size(pixels, pixels), generator=generator)
        self.x = LaneMap.from_tensor(x, self.conv.in_halo, block=self.conv.in_block)
        self.dy = LaneMap.from_tensor(dy, self.conv.gradient_halo, block=self.conv.out_block)
        self.y, self.dx = self.conv.output_map(), self.conv.input_map()
        self.dvalues = torch.empty(self.conv.kept)

    def run(self) -> None:
        if self.direction == "forward":
            self.conv.forward(self.values, None, self.x, self.y)
        elif self.direction == "input_gradient":
            self.conv.input_gradient(self.values, self.dy, self.dx)
        else:
            self.conv.weight_gradient(self.x, self.dy, self.dvalues, None)

    def answer(self) -> torch.Tensor:
        self.run()
        if self.direction == "weight_gradient":
            return self.dvalues
        return (self.y if self.direction == "forward" else self.dx).to_tensor()


def _check(chosen: OneDirection, others: list[OneDirection]) -> None:
    want = chosen.answer()
    for other in others:
        assert float((other.answer() - want).norm() / want.norm()) < 1e-5, other.kernel
