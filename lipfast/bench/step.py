"""One training step of the paper's network (forward, backward, Adam) against torch in its fastest forms.

The masks have the layer densities of a real magnitude pruning (below) at random positions.
"""

import copy
import functools
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from lipfast import priors
from lipfast.bench.harness import Case, Size, Timed
from lipfast.engine.lane_trainer import LaneTrainer
from lipfast.engine.trainer import TorchTrainer

# Sparsity -> density of each conv layer, in network order, of the paper's network after 400 steps of denoising
# (Set5 baby, 128 px, sigma 25) and one global magnitude pruning to that sparsity. Skip branches and 1x1 layers lose
# fewer weights than the 3x3 layers that hold most of them.
LAYER_DENSITIES: dict[float, tuple[float, ...]] = {
    0.59: (
        *(0.789, 0.432, 0.421, 0.734, 0.419, 0.418, 0.551, 0.416, 0.411, 0.461, 0.412, 0.405, 0.467, 0.403, 0.397),
        *(0.403, 0.460, 0.402, 0.455, 0.396, 0.458, 0.398, 0.457, 0.405, 0.464, 0.292),
    ),
    0.79: (
        *(0.695, 0.277, 0.199, 0.654, 0.198, 0.200, 0.420, 0.201, 0.202, 0.357, 0.204, 0.208, 0.338, 0.203, 0.204),
        *(0.205, 0.331, 0.208, 0.329, 0.210, 0.329, 0.211, 0.331, 0.201, 0.333, 0.159),
    ),
    0.89: (
        *(0.633, 0.194, 0.094, 0.607, 0.093, 0.095, 0.344, 0.095, 0.099, 0.283, 0.100, 0.107, 0.270, 0.102, 0.106),
        *(0.104, 0.256, 0.108, 0.255, 0.113, 0.256, 0.114, 0.257, 0.103, 0.258, 0.091),
    ),
    0.97: (
        *(0.539, 0.097, 0.021, 0.531, 0.019, 0.020, 0.250, 0.019, 0.019, 0.201, 0.020, 0.025, 0.193, 0.022, 0.024),
        *(0.021, 0.164, 0.024, 0.163, 0.029, 0.168, 0.032, 0.166, 0.030, 0.170, 0.036),
    ),
}
SIDES = (128, 256, 512)  # px
LARGEST_BF16 = 128  # px; a CPU without bf16 instructions takes half a minute for a step at 256

Loss = Callable[[Tensor], Tensor]
Steps = dict[str, Callable[[], object]]
Forms = Callable[[nn.Module, dict[str, Tensor], Tensor, Loss], Steps]

TOY: dict[str, object] = {"in_channels": 4, "down": [8, 8], "skip": 2}  # a small skip net's config


def cases(size: Size) -> list[Case]:
    """One case for each picture size and sparsity."""
    # bf16 in cases of its own: a CPU without its instructions takes ten times as long as for all others together.
    forms: tuple[tuple[str, int, Forms], ...] = (
        ("", max(SIDES), _eager_forms),
        (", bf16", LARGEST_BF16, _autocast_form),
    )
    if size == "toy":
        return [
            _case(TOY, 32, 0.0, "", _eager_forms),
            *(_case(TOY, 32, 0.89, against, baselines) for against, _, baselines in forms),
            _compiled_case(TOY, 32, "eager"),
        ]
    steps = [
        _case({}, side, sparsity, against, baselines)
        for against, largest, baselines in forms
        for side in SIDES
        if side <= largest
        for sparsity in (0.0, *LAYER_DENSITIES)
    ]
    return steps + [_compiled_case({}, side, "inductor") for side in SIDES]


def _case(config: dict[str, object], side: int, sparsity: float, against: str, baselines: Forms) -> Case:
    return Case(
        op="training_step",
        name=f"{side} px, {sparsity:.0%} zeros{against}",
        shape=f"skip net, {side} x {side} px",
        density=1 - sparsity,
        setup=functools.partial(_setup, config, side, sparsity, baselines),
    )


def _compiled_case(config: dict[str, object], side: int, compiler: str) -> Case:
    """One for each size, because compiling takes a minute; torch's time does not depend on the zeros."""
    return Case(
        op="training_step",
        name=f"{side} px, torch.compile",
        shape=f"skip net, {side} x {side} px",
        density=1.0,
        setup=functools.partial(_setup, config, side, 0.0, functools.partial(_compiled_form, compiler)),
    )


def masks_like_a_search(network: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """Masks of the layer densities above, at positions drawn with a fixed seed; {} for sparsity 0."""
    if sparsity == 0:
        return {}
    generator = torch.Generator().manual_seed(0)
    names = priors.prunable(network)
    densities = LAYER_DENSITIES[sparsity]
    masks = {}
    for index, name in enumerate(names):
        density = densities[index * len(densities) // len(names)]
        masks[name] = torch.rand(network.get_parameter(name).shape, generator=generator) < density
    return masks


def pruned_fit(
    config: dict[str, object], side: int, sparsity: float
) -> tuple[nn.Module, dict[str, Tensor], Tensor, Tensor]:
    """A pruned skip net, its masks, and what it is fitted to: input (1, C, side, side), target (1, 3, side, side)."""
    network = priors.build("skip", dict(config), seed=0)
    masks = masks_like_a_search(network, sparsity)
    for name, mask in masks.items():
        network.get_parameter(name).data.mul_(mask)
    generator = torch.Generator().manual_seed(1)
    z = torch.rand(network.input_shape(side, side), generator=generator) * 0.1  # type: ignore[operator]
    target = torch.rand(1, 3, side, side, generator=generator)
    return network, masks, z, target


def _setup(config: dict[str, object], side: int, sparsity: float, baselines_of: Forms) -> Timed:
    network, masks, z, target = pruned_fit(config, side, sparsity)

    def loss(output: Tensor) -> Tensor:
        return nn.functional.mse_loss(output, target)

    def check() -> None:
        mine, output = LaneTrainer(copy.deepcopy(network), masks, lr=0.01).step(z, loss)
        theirs, expected = TorchTrainer(copy.deepcopy(network), masks, lr=0.01).step(z, loss)
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=0)

    baselines = baselines_of(network, masks, z, loss)
    trainer = LaneTrainer(network, masks, lr=0.01)
    return Timed(ours=lambda: trainer.step(z, loss), baselines=baselines, check=check, backend="cpu")


def _eager_forms(network: nn.Module, masks: dict[str, Tensor], z: Tensor, loss: Loss) -> Steps:
    formats = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
    return {name: functools.partial(_trainer_in(form, network, masks).step, z, loss) for name, form in formats.items()}


def _autocast_form(network: nn.Module, masks: dict[str, Tensor], z: Tensor, loss: Loss) -> Steps:
    halved = _trainer_in(torch.channels_last, network, masks)
    return {"bf16 autocast": _autocast_step(lambda: halved.step(z, loss))}


def _compiled_form(compiler: str, network: nn.Module, masks: dict[str, Tensor], z: Tensor, loss: Loss) -> Steps:
    trainer = _CompiledTrainer(copy.deepcopy(network), masks, lr=0.01, compiler=compiler)
    return {f"torch.compile, {compiler}": lambda: trainer.step(z, loss)}


class _CompiledTrainer(TorchTrainer):
    """torch's trainer with its forward and backward pass compiled."""

    def __init__(self, network: nn.Module, masks: dict[str, Tensor], *, lr: float, compiler: str) -> None:
        super().__init__(network, masks, lr=lr)
        self._compiled = torch.compile(self._network, backend=compiler, fullgraph=True)

    def _forward(self, z: Tensor) -> Tensor:
        return cast(Tensor, self._compiled(z))


def _trainer_in(memory_format: torch.memory_format, network: nn.Module, masks: dict[str, Tensor]) -> TorchTrainer:
    return TorchTrainer(copy.deepcopy(network), masks, lr=0.01, memory_format=memory_format)


def _autocast_step(step: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            step()

    return run
