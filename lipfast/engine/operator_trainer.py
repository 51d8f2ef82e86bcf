"""Training steps of pruned networks on a GPU: operator by operator, packed weights, packed Adam, CUDA graphs.

Beside `LaneTrainer` only what runs a step differs. All parameters lie in one vector, the pruned ones packed, so that
Adam is one kernel and its input one gradient. Forward and backward pass are captured as CUDA graphs; the loss stays
eager, as callers may change it, and so does Adam, whose step count is a number.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lipfast import ops
from lipfast.engine.capture import Recording, call_with, record
from lipfast.engine.graph_trainer import Capture, GraphTrainer, capture_as_graphs
from lipfast.engine.lane_module import Compiled
from lipfast.engine.lane_trainer import LaneTrainer, Moments
from lipfast.engine.operators import PrunedConv, dense_name, lower_to_operators
from lipfast.engine.runtime import pack, unpack
from lipfast.engine.trainer import TorchTrainer, is_on_gpu
from lipfast.errors import InputError
from lipfast.ops._once import differentiable_once
from lipfast.ops.pruned_conv import Pattern

# Floats that a parameter begins at a multiple of: 16 bytes, for 128-bit loads.
ALIGNMENT = 4


class OperatorTrainer(LaneTrainer):
    """A `lipfast.engine.trainer.Trainer` for a pruned network on any device.

    A network that cannot be recorded trains in torch, with one warning that says why.

    Args:
        capture: turns a module and example arguments into one that replays them; None is
            `lipfast.engine.graph_trainer.capture_as_graphs` on a GPU and no capture elsewhere.
    """

    def __init__(
        self,
        network: nn.Module,
        masks: Mapping[str, Tensor] | None,
        *,
        lr: float,
        capture: Capture | None = None,
    ) -> None:
        super().__init__(network, masks, lr=lr)
        self._capture = capture

    def _plan(self, z: Tensor) -> "PackedNetwork":
        return PackedNetwork(self._network, self._masks, z, self._capture)

    def _without_program(self) -> TorchTrainer:
        return (GraphTrainer if is_on_gpu(self._network) else TorchTrainer)(self._network, self._masks, lr=self._lr)


class PackedNetwork:
    """One network at one input size with its packed parameters and their optimiser's state.

    Args:
        network: its dense parameters are read by `load` and written by `save`; its buffers are used as they are.
        masks: parameter name -> bool tensor, on the network's device.
        z: an example of the input.
        capture: see `OperatorTrainer`.
    """

    def __init__(self, network: nn.Module, masks: Mapping[str, Tensor], z: Tensor, capture: Capture | None) -> None:
        self._shape, self._device, self._dtype = z.shape, z.device, z.dtype
        self._parameters, self._buffers = dict(network.named_parameters()), dict(network.named_buffers())
        if any(parameter.dtype != torch.float32 for parameter in self._parameters.values()):
            raise InputError("its parameters are not all float32")
        self._masks = masks
        leaves = {**self._parameters, **self._buffers}
        recording = record(lambda leaves, x: call_with(network, leaves, (x,)), [z], leaves)
        self._flat = _FlatNetwork(recording, self._parameters, self._buffers, masks, z.device)
        self.values = self._flat.values
        self._first, self._second = torch.zeros_like(self.values.data), torch.zeros_like(self.values.data)
        if capture is None and z.device.type == "cuda":
            capture = capture_as_graphs
        self._capture, self._captured = capture, cast(nn.Module | None, None)

    def fits(self, z: Tensor) -> bool:
        """Whether inputs like this are what was recorded."""
        return (z.shape, z.device, z.dtype) == (self._shape, self._device, self._dtype)

    def step(self, z: Tensor, loss: Callable[[Tensor], Tensor], count: int, lr: float) -> tuple[Tensor, Tensor]:
        """Forward, loss, backward, Adam number ``count``."""
        # A graph writes to the same memory in every step, and the caller may keep what it was given.
        output = self._module(z)(z).clone()
        value = loss(output)
        (gradient,) = torch.autograd.grad(value, self.values)
        ops.adam_step(self.values.detach(), gradient, self._first, self._second, count, lr)
        return value.detach(), output.detach()

    def load(self, moments: Moments) -> None:
        """Take the weights from the network, and Adam's moments."""
        with torch.no_grad():
            for name, parts in self._packed():
                for part, dense in zip(parts, (self._parameters[name], *moments[name]), strict=True):
                    part.copy_(pack(dense, self._masks.get(name)).view(part.shape))

    def moments(self) -> Moments:
        """Adam's moments in dense copies."""
        shape_of = {name: parameter.shape for name, parameter in self._parameters.items()}
        return {
            name: (unpack(first, shape_of[name], mask), unpack(second, shape_of[name], mask))
            for name, (_, first, second) in self._packed()
            for mask in [self._masks.get(name)]
        }

    def save(self) -> None:
        """Bring the network's weights up to date; its buffers always are."""
        with torch.no_grad():
            for name, (values, _, _) in self._packed():
                parameter = self._parameters[name]
                parameter.copy_(unpack(values, parameter.shape, self._masks.get(name)))

    def _packed(self) -> list[tuple[str, list[Tensor]]]:
        """Parameter name -> its parts of the vectors of values and of both moments."""
        vectors = [self._flat.pieces(vector) for vector in (self.values.detach(), self._first, self._second)]
        return [(name, [pieces[name] for pieces in vectors]) for name in self._parameters]

    def _module(self, z: Tensor) -> nn.Module:
        """What runs a step: the captured network, captured now if it was not."""
        if self._capture is None:
            return self._flat
        if self._captured is None:
            before = [buffer.clone() for buffer in self._buffers.values()]
            self._captured = self._capture(self._flat, (z.clone(),))
            for buffer, saved in zip(self._buffers.values(), before, strict=True):
                buffer.copy_(saved)  # capturing runs the network, which moves BatchNorm's running statistics
        return self._captured


class _FlatNetwork(nn.Module):
    """The network as a function of one vector of parameters."""

    def __init__(
        self,
        recording: Recording,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        super().__init__()
        lowered = lower_to_operators(recording, masks, device)
        convolutions = [item for item in lowered.items if isinstance(item, PrunedConv)]
        self._layout = _Layout(parameters, masks, convolutions, device)
        self.values = nn.Parameter(torch.zeros(self._layout.size, device=device))
        self._network_buffers = dict(buffers)
        self._compiled = Compiled(lowered, masks, exact=False, device=device)

    def forward(self, z: Tensor) -> Tensor:
        pieces = _Pieces.apply(self.values, self._layout)  # type: ignore[no-untyped-call]
        named = dict(zip(self._layout.names, pieces, strict=True))
        return cast(Tensor, self._compiled.run([z], {**named, **self._network_buffers}))

    def pieces(self, vector: Tensor) -> dict[str, Tensor]:
        """Parameter name -> its part of a vector like ``values``, a view: packed if pruned, else of its own shape."""
        return self._layout.pieces(vector)


class _Layout:
    """Where parameters lie in their vector, and where pruned weights lie in one vector of dense weights.

    Attributes:
        size: of the vector of parameters.
        names: of the pieces that `_Pieces` makes: all parameters, then the dense weights.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        convolutions: Sequence[PrunedConv],
        device: torch.device,
    ) -> None:
        self._device = device
        patterns = {conv.name: conv.pattern for conv in convolutions}
        self._patterns = {name: patterns.get(name) or Pattern.of(mask, device) for name, mask in masks.items()}
        self._shapes = {name: (int(masks[name].sum()),) if name in masks else p.shape for name, p in parameters.items()}
        counts = [torch.Size(shape).numel() for shape in self._shapes.values()]
        self._sizes = [part for count in counts for part in (count, -count % ALIGNMENT)]
        self._sizes[-1] += -sum(self._sizes) % 16  # lets Triton load the whole vector in 128-bit pieces
        self.size = sum(self._sizes)
        starts = list(itertools.accumulate(self._sizes[:-1], initial=0))[::2]
        self._starts = dict(zip(self._shapes, starts, strict=True))
        sparse = {conv.name for conv in convolutions if set(conv.kernels(conv.precision).values()) == {"sparse"}}
        self._dense = [name for name in masks if name not in sparse]
        self._places: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
        self.names = [*self._shapes, *(dense_name(name) for name in self._dense)]

    def pieces(self, vector: Tensor) -> dict[str, Tensor]:
        """Parameter name -> its part of the vector, a view of its shape."""
        parts = torch.split(vector, self._sizes)[::2]
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self._shapes.items(), strict=True)}

    def dense(self, vector: Tensor) -> list[Tensor]:
        """The weights that others than sparse kernels read, unpacked: three launches for all of them."""
        if not self._dense:
            return []
        packed, unpacked = self._kept(self._dense)
        shapes = [self._patterns[name].shape for name in self._dense]
        whole = vector.new_zeros(sum(shape.numel() for shape in shapes)).index_copy_(0, unpacked, vector[packed])
        parts = torch.split(whole, [shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def gradient(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """The vector's gradient from those of the pieces: a few launches for all of them."""
        flat = torch.zeros(self.size, device=self._device)
        pieces = list(self.pieces(flat).values())
        given = [(piece, g) for piece, g in zip(pieces, gradients, strict=False) if g is not None]
        if given:
            torch._foreach_copy_([piece for piece, _ in given], [g for _, g in given])
        dense = [(name, g) for name, g in zip(self._dense, gradients[len(pieces) :], strict=True) if g is not None]
        if dense:
            packed, unpacked = self._kept([name for name, _ in dense])
            kept = torch.cat([g.reshape(-1) for _, g in dense])[unpacked]
            flat.index_copy_(0, packed, flat[packed] + kept)  # a shared weight may have got gradients of both kinds
        return flat

    def _kept(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Where the kept weights of ``names`` lie in the vector, and in these weights laid end to end."""
        key = tuple(names)
        if key not in self._places:
            patterns = [self._patterns[name] for name in names]
            begins = itertools.accumulate((pattern.shape.numel() for pattern in patterns), initial=0)
            places = [
                torch.arange(self._starts[name], self._starts[name] + len(pattern.positions), device=self._device)
                for name, pattern in zip(names, patterns, strict=True)
            ]
            unpacked = [pattern.positions + begin for pattern, begin in zip(patterns, begins, strict=False)]
            self._places[key] = torch.cat(places), torch.cat(unpacked)
        return self._places[key]


class _Pieces(torch.autograd.Function):
    """A vector of parameters -> its pieces and dense weights. Backward, autograd would join hundreds of pieces."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, layout: _Layout) -> tuple[Tensor, ...]:
        ctx.layout = layout
        ctx.set_materialize_grads(False)
        return (*layout.pieces(vector).values(), *layout.dense(vector))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None]:
        return ctx.layout.gradient(gradients), None
