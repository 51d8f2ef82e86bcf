"""The seam between a fit and whatever executes its network: one training step at a time.

:class:`Trainer` is the contract; :class:`TorchTrainer` fulfils it with torch's dense kernels in their fastest measured
form; :func:`make_trainer` chooses.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from lipfast.errors import ConfigError, InputError

# Snapshot entries beside the network's own state_dict.
FIRST_MOMENT = "adam.exp_avg."  # + parameter name
SECOND_MOMENT = "adam.exp_avg_sq."  # + parameter name
STEP_COUNT = "adam.step"  # () float32

ENGINES = ("auto", "torch")


class Trainer(Protocol):
    """Trains one network with Adam; dead weights stay exactly zero."""

    def step(self, z: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """One forward, backward and Adam update.

        Args:
            z: (N, C, h, w) float32, what the network is fed.
            loss: maps the network's output (N, C, H, W) to a scalar; differentiable.

        Returns:
            The loss () and the output (N, C, H, W) from before the update, both detached.
        """

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of everything that decides the coming steps, in dense, contiguous form: the network's ``state_dict``
        (weights, biases, BatchNorm's affine and running statistics) and, under ``adam.``, both moments of every
        parameter and the step count. :meth:`restore` of it is bit-exact.
        """

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Go back to a snapshot of the same network.

        Raises:
            InputError: an entry is missing, left over, or has another shape or type.
        """

    def network(self) -> nn.Module:
        """The ordinary dense module with the current weights; dead weights are exactly 0."""


def make_trainer(network: nn.Module, masks: Mapping[str, Tensor] | None, *, lr: float, engine: str = "auto") -> Trainer:
    """The trainer that runs ``network``, which it takes over and changes in place.

    Args:
        network: any module; it is set to training mode.
        masks: parameter name -> bool tensor of its shape, False where the weight is dead; a missing name is not pruned.
        lr: Adam's learning rate.
        engine: "torch" for torch's dense kernels, "auto" for the best available: lanes on a CPU; on a GPU CUDA graphs
            of our kernels and of torch's (docs/gpu.md); torch for a network with hooks.

    Raises:
        ConfigError: unknown engine or a learning rate that is not above 0.
        InputError: a mask that names no parameter, or has another shape or type.
    """
    if engine not in ENGINES:
        raise ConfigError(f"unknown engine {engine!r}; known: {', '.join(ENGINES)}")
    if engine == "auto":
        from lipfast.engine.lane_trainer import LaneTrainer  # here: they import this module
        from lipfast.engine.operator_trainer import OperatorTrainer
        from lipfast.engine.runtime import hooked_module

        if hooked_module(network) is None:
            return (OperatorTrainer if is_on_gpu(network) else LaneTrainer)(network, masks, lr=lr)
    return TorchTrainer(network, masks, lr=lr)


def is_on_gpu(network: nn.Module) -> bool:
    """Whether any of its parameters is."""
    return any(parameter.is_cuda for parameter in network.parameters())


@contextmanager
def on_one_torch_thread() -> Iterator[None]:
    """For small operations between the engine's passes: torch's other threads would spin for milliseconds after each,
    on the cores that the engine's threads are about to use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fastest_format(network: nn.Module) -> torch.memory_format:
    """The memory format in which torch trains a convolutional network fastest.

    channels_last but for CPUs without AVX-512, for which torch has no fast weight gradient in it (steps of the
    paper's network take up to 1.7 times as long there), and for networks for which it is not safe.
    """
    if is_on_gpu(network):
        return torch.channels_last
    wide = "AVX512" in torch.backends.cpu.get_cpu_capability()
    corrupts = any(_writes_past_its_memory(module) for module in network.modules())
    return torch.channels_last if wide and not corrupts else torch.contiguous_format


def _writes_past_its_memory(module: nn.Module) -> bool:
    """Whether torch's weight gradient of this layer corrupts the heap in channels_last.

    With AVX-512, that of 1x1 convolutions with a stride and fewer than 16 input channels does, and the process dies
    later, anywhere (oneDNN 3.12 in torch 2.13, github.com/uxlfoundation/oneDNN/issues/6035). Contiguous tensors are
    fine.
    """
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels // module.groups < 16
    )


class TorchTrainer:
    """Dense training with torch's own kernels.

    One memory format throughout (None: `fastest_format`), fused Adam, and one multiplication of the pruned layers'
    gradients by their masks: a weight that is zero and has only ever seen zero gradients has zero moments and stays
    zero, bit for bit.
    (For the paper's net, 2 Zen 5 cores, torch 2.13: fused Adam 2.0 ms against 5.8 ms for foreach, masking 0.3 ms
    against 5.2 ms for masked_fill, in a step of about 114 ms at 128 px; channels_last, contiguous and torch.compile
    take 114, 124 and 143 ms.)
    """

    def __init__(
        self,
        network: nn.Module,
        masks: Mapping[str, Tensor] | None,
        *,
        lr: float,
        memory_format: torch.memory_format | None = None,
    ) -> None:
        if not lr > 0:
            raise ConfigError(f"the learning rate must be above 0, got {lr}")
        self._format = memory_format or fastest_format(network)
        self._network: nn.Module = network.to(memory_format=self._format).train()  # type: ignore[call-overload]
        self._parameters = dict(self._network.named_parameters())
        self._masks = {
            name: mask.to(weight.dtype).to(weight.device).contiguous(memory_format=self._layout(weight))
            for name, (weight, mask) in check_masks(self._parameters, masks or {}).items()
        }
        self._optimiser = torch.optim.Adam(self._parameters.values(), lr=lr, fused=True)
        for parameter in self._parameters.values():  # what the first step would create, so that it can be snapshot
            self._optimiser.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
        self._silence_dead_weights()

    def step(self, z: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """See :class:`Trainer`."""
        self._optimiser.zero_grad(set_to_none=True)
        output = self._forward(z.contiguous(memory_format=self._format))
        value = loss(output)
        value.backward()  # type: ignore[no-untyped-call]
        self._mask_gradients()
        self._optimiser.step()
        return value.detach(), output.detach()

    def snapshot(self) -> dict[str, Tensor]:
        """See :class:`Trainer`."""
        return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in self._live()}

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """See :class:`Trainer`."""
        live = dict(self._live())
        check_snapshot(live, snapshot)
        with torch.no_grad():
            for name, tensor in live.items():
                tensor.copy_(snapshot[name])
            for parameter in self._parameters.values():
                self._optimiser.state[parameter]["step"].copy_(snapshot[STEP_COUNT])
            self._silence_dead_weights()

    def network(self) -> nn.Module:
        """See :class:`Trainer`."""
        return self._network

    def _forward(self, z: Tensor) -> Tensor:
        return cast(Tensor, self._network(z))

    def _layout(self, weight: Tensor) -> torch.memory_format:
        return self._format if weight.dim() == 4 else torch.contiguous_format

    def _live(self) -> list[tuple[str, Tensor]]:
        """The tensors a snapshot copies, under its names; Adam's step counts are equal, so one stands for all."""
        entries = list(self._network.state_dict().items())
        for name, parameter in self._parameters.items():
            state = self._optimiser.state[parameter]
            entries += [(FIRST_MOMENT + name, state["exp_avg"]), (SECOND_MOMENT + name, state["exp_avg_sq"])]
            steps = state["step"]
        return [*entries, (STEP_COUNT, steps)]

    def _mask_gradients(self) -> None:
        masked = [(self._parameters[name].grad, mask) for name, mask in self._masks.items()]
        pairs = [(gradient, mask) for gradient, mask in masked if gradient is not None]
        if pairs:
            torch._foreach_mul_([gradient for gradient, _ in pairs], [mask for _, mask in pairs])

    def _silence_dead_weights(self) -> None:
        """Zero the dead weights and their moments, whatever was loaded."""
        for name, mask in self._masks.items():
            parameter = self._parameters[name]
            state = self._optimiser.state[parameter]
            for tensor in (parameter.data, state["exp_avg"], state["exp_avg_sq"]):
                tensor.masked_fill_(mask == 0, 0.0)  # a product could leave -0.0


def check_masks(parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Pair each mask with its parameter.

    Raises:
        InputError: a mask that names no parameter, or has another shape or type.
    """
    pairs = {}
    for name, mask in masks.items():
        if name not in parameters:
            raise InputError(f"masks: the network has no parameter {name!r}")
        shape = tuple(parameters[name].shape)
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise InputError(f"masks: {name!r} must be bool {shape}, got {mask.dtype} {tuple(mask.shape)}")
        pairs[name] = (parameters[name], mask)
    return pairs


def check_snapshot(live: Mapping[str, Tensor], snapshot: Mapping[str, Tensor]) -> None:
    """Check that ``snapshot`` has exactly the entries of ``live``, with their shapes and types.

    Raises:
        InputError: it has not; the message names the first such entry.
    """
    for name in [*live, *snapshot]:
        if name not in snapshot or name not in live:
            where = "lacks" if name not in snapshot else "has the unknown entry"
            raise InputError(f"restore: the snapshot {where} {name!r}; it belongs to another network")
        here, there = live[name], snapshot[name]
        if here.shape != there.shape or here.dtype != there.dtype:
            raise InputError(
                f"restore: {name!r} must be {here.dtype} {tuple(here.shape)}, "
                f"got {there.dtype} {tuple(there.shape)}; the snapshot belongs to another network"
            )
