"""Training steps in the lane layout: packed weights, one call into C++ forward and one backward, packed Adam."""

import warnings
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from lipfast import ops
from lipfast.engine.builder import Segment
from lipfast.engine.capture import Recording, Ref, call_with, record
from lipfast.engine.lower import lower
from lipfast.engine.plan import Options
from lipfast.engine.runtime import Running, pack, unpack, weights_of
from lipfast.engine.trainer import (
    FIRST_MOMENT,
    SECOND_MOMENT,
    STEP_COUNT,
    TorchTrainer,
    check_masks,
    check_snapshot,
    on_one_torch_thread,
)
from lipfast.errors import ConfigError, InputError

# Parameter name -> Adam's first and second moment, in the parameter's shape.
Moments = dict[str, tuple[Tensor, Tensor]]


class LaneTrainer:
    """A `lipfast.engine.trainer.Trainer` on a lane program.

    The network is planned at the first step, when the input's size is known, and again when it changes. A network that
    the engine cannot run whole goes to torch, with one warning that names the operator.
    """

    def __init__(self, network: nn.Module, masks: Mapping[str, Tensor] | None, *, lr: float) -> None:
        if not lr > 0:
            raise ConfigError(f"the learning rate must be above 0, got {lr}")
        self._network = network.train()
        self._lr = lr
        self._parameters = dict(network.named_parameters())
        pairs = check_masks(self._parameters, masks or {})
        self._masks = {name: mask.to(weight.device).contiguous() for name, (weight, mask) in pairs.items()}
        self._steps = 0
        self._program: Program | None = None
        self._moments: Moments | None = self._no_moments()  # dense; only while there is no program, which has its own
        self._torch: TorchTrainer | None = None
        self._silence_dead_weights()

    def step(self, z: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """See `lipfast.engine.trainer.Trainer`."""
        if self._torch is None and (self._program is None or not self._program.fits(z)):
            self._replan(z)
        if self._torch is not None:
            return self._torch.step(z, loss)
        assert self._program is not None
        self._steps += 1
        return self._program.step(z, loss, self._steps, self._lr)

    def snapshot(self) -> dict[str, Tensor]:
        """See `lipfast.engine.trainer.Trainer`."""
        if self._torch is not None:
            return self._torch.snapshot()
        self._unpack()
        entries = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in self._network.state_dict().items()
        }
        for name, (first, second) in self._copy_moments().items():
            entries[FIRST_MOMENT + name], entries[SECOND_MOMENT + name] = first, second
        entries[STEP_COUNT] = torch.tensor(float(self._steps))
        return entries

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """See `lipfast.engine.trainer.Trainer`."""
        if self._torch is not None:
            return self._torch.restore(snapshot)
        check_snapshot(self._entries(), snapshot)
        with torch.no_grad():
            for name, tensor in self._network.state_dict().items():
                tensor.copy_(snapshot[name])
        self._steps = int(snapshot[STEP_COUNT])
        self._moments = {
            name: (
                snapshot[FIRST_MOMENT + name].to(p.device, copy=True),
                snapshot[SECOND_MOMENT + name].to(p.device, copy=True),
            )
            for name, p in self._parameters.items()
        }
        self._silence_dead_weights()
        self._load()
        return None

    def network(self) -> nn.Module:
        """See `lipfast.engine.trainer.Trainer`."""
        if self._torch is None:
            self._unpack()
        return self._network

    def _entries(self) -> dict[str, Tensor]:
        """What a snapshot holds, by name; of the moments only shape and type are right."""
        entries = dict(self._network.state_dict())
        for name, parameter in self._parameters.items():
            entries[FIRST_MOMENT + name] = entries[SECOND_MOMENT + name] = parameter
        return entries | {STEP_COUNT: torch.tensor(float(self._steps))}

    def _no_moments(self) -> Moments:
        return {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self._parameters.items()}

    def _copy_moments(self) -> Moments:
        if self._program is not None:
            return self._program.moments()
        assert self._moments is not None
        return {name: (first.clone(), second.clone()) for name, (first, second) in self._moments.items()}

    def _unpack(self) -> None:
        """Bring the network's tensors up to date."""
        if self._program is not None:
            self._program.save()

    def _load(self) -> None:
        """Hand weights and moments to the program, if there is one."""
        if self._program is not None and self._moments is not None:
            self._program.load(self._moments)
            self._moments = None

    def _silence_dead_weights(self) -> None:
        assert self._moments is not None
        with torch.no_grad():
            for name, mask in self._masks.items():
                for tensor in (self._parameters[name], *self._moments[name]):
                    tensor.masked_fill_(~mask, 0.0)

    def _replan(self, z: Tensor) -> None:
        self._unpack()
        self._moments = self._copy_moments()
        self._program = None
        try:
            self._program = self._plan(z)
        except InputError as reason:
            warnings.warn(f"lipfast: this fit runs in torch, not in lanes: {reason}", stacklevel=3)
            before = self.snapshot()
            self._torch = self._without_program()
            self._torch.restore(before)
            return
        self._load()

    def _plan(self, z: Tensor) -> "Program":
        """What runs steps for inputs like ``z``. Raises InputError where it cannot."""
        return _Fitted(self._network, self._masks, z)

    def _without_program(self) -> TorchTrainer:
        """What trains a network that has no program."""
        return TorchTrainer(self._network, self._masks, lr=self._lr)


class Program(Protocol):
    """What a trainer runs a network of one input size with."""

    def fits(self, z: Tensor) -> bool:
        """Whether it was planned for inputs like this."""

    def step(self, z: Tensor, loss: Callable[[Tensor], Tensor], count: int, lr: float) -> tuple[Tensor, Tensor]:
        """Forward, loss, backward, Adam number ``count``; the loss and the output, detached."""

    def load(self, moments: Moments) -> None:
        """Take weights and statistics from the network, and Adam's moments."""

    def moments(self) -> Moments:
        """Adam's moments in dense copies."""

    def save(self) -> None:
        """Bring weights and statistics of the network up to date."""


class _Fitted:
    """The program of one network at one input size, with its optimiser's state."""

    def __init__(self, network: nn.Module, masks: Mapping[str, Tensor], z: Tensor) -> None:
        _check_input(z)
        self._leaves = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        self._parameters = dict(network.named_parameters())
        recording = record(lambda leaves, x: call_with(network, leaves, (x,)), [z], self._leaves)
        segment = _whole_network(recording, self._parameters)
        weights = weights_of(segment, recording.leaves, masks, trained=True)
        self.running = Running(segment, weights, Options(True, [False], backward_again=False))
        self._shape = z.shape
        self._names = [recording.leaves[ref.number] for ref in segment.weights]
        self._masks = [weight.mask for weight in weights]
        self._statistics = [tuple(recording.leaves[ref.number] for ref in pair) for pair in segment.statistics]
        self._counted, self._uncounted = recording.counted, 0
        self._first, self._second = torch.zeros_like(self.running.values), torch.zeros_like(self.running.values)

    def fits(self, z: Tensor) -> bool:
        """Whether the program was planned for inputs like this."""
        return z.shape == self._shape and z.dtype == torch.float32 and z.device.type == "cpu"

    def step(self, z: Tensor, loss: Callable[[Tensor], Tensor], count: int, lr: float) -> tuple[Tensor, Tensor]:
        """Forward, loss, backward, Adam number ``count``."""
        threads = torch.get_num_threads()
        with on_one_torch_thread():
            (output,) = self.running.forward([z], threads)
            value = loss(output.requires_grad_())
            (gradient,) = torch.autograd.grad(value, output)
            self.running.backward([gradient], threads)
        running = self.running
        moments, settings = (self._first, self._second), (0.9, 0.999, 1e-8, 0.0)  # torch's defaults
        adam_step = ops.kernel("adam_step", running.values.device)
        adam_step(running.values, running.gradients, *moments, count, lr, *settings)
        self._uncounted += 1
        return value.detach(), output.detach()

    def load(self, moments: Moments) -> None:
        """Take weights and statistics from the network, and Adam's moments."""
        with torch.no_grad():
            for weight, (name, mask) in enumerate(zip(self._names, self._masks, strict=True)):
                part = self.running.plan.values[weight]
                for packed, dense in zip(self._packed(), (self._parameters[name], *moments[name]), strict=True):
                    packed[part] = pack(dense, mask)
            for (mean, variance), names in zip(self.running.statistics, self._statistics, strict=True):
                mean.copy_(self._leaves[names[0]])
                variance.copy_(self._leaves[names[1]])
        self._uncounted = 0

    def moments(self) -> Moments:
        """Adam's moments in dense copies."""
        found = {}
        for weight, (name, mask) in enumerate(zip(self._names, self._masks, strict=True)):
            part, shape = self.running.plan.values[weight], self._parameters[name].shape
            found[name] = (unpack(self._first[part], shape, mask), unpack(self._second[part], shape, mask))
        return found

    def save(self) -> None:
        """Bring weights and statistics of the network up to date."""
        with torch.no_grad():
            for weight, (name, mask) in enumerate(zip(self._names, self._masks, strict=True)):
                dense = self._parameters[name]
                dense.copy_(unpack(self.running.value(weight), dense.shape, mask))
            for (mean, variance), names in zip(self.running.statistics, self._statistics, strict=True):
                self._leaves[names[0]].copy_(mean)
                self._leaves[names[1]].copy_(variance)
            for name, number in self._counted:
                self._leaves[name].add_(number * self._uncounted)
        self._uncounted = 0

    def _packed(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.running.values, self._first, self._second


def _check_input(z: Tensor) -> None:
    if z.dtype != torch.float32 or z.device.type != "cpu":
        raise InputError(f"the engine runs float32 on the CPU, the input is {z.dtype} on {z.device}")


def _whole_network(recording: Recording, parameters: Mapping[str, Tensor]) -> Segment:
    """The recording as one segment from its input to its result, with every parameter used once.

    Raises:
        InputError: it is not; the message names the operator or parameter.
    """
    lowered = lower(recording)
    if lowered.refused:
        raise InputError(f"no kernel for {lowered.refused[0]}")
    items = lowered.items
    if len(items) != 1 or not isinstance(items[0], Segment) or not isinstance(recording.result, Ref):
        raise InputError("the network is not one chain of operators from one input to one output")
    segment = items[0]
    if segment.inputs != recording.inputs or segment.outputs != [recording.result]:
        raise InputError("the network is not one chain of operators from one input to one output")
    names = [recording.leaves.get(ref.number) for ref in segment.weights]
    if len(set(names)) != len(names) or set(names) != set(parameters):
        raise InputError("a parameter is shared, unused or computed")
    return segment
