"""Programs with the tensors they work on: what trainers and modules share."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lipfast import ops
from lipfast.engine.builder import Segment
from lipfast.engine.capture import Ref
from lipfast.engine.graph import CONV_KINDS, Shape
from lipfast.engine.plan import Options, Plan, Weight, plan
from lipfast.engine.watch import Watch
from lipfast.ops._memory import address, memory
from lipfast.ops.lanes import with_lines


class Running:
    """One segment's program, planned for one input size, and views of its numbers."""

    def __init__(self, segment: Segment, weights: Sequence[Weight], options: Options) -> None:
        channels = [mean.shape[0] for mean, _ in segment.statistics]
        self.plan: Plan = plan(segment.graph, weights, channels, options)
        self.program = self.plan.program
        self.values = torch.from_numpy(self.program.values())
        self.gradients = torch.from_numpy(self.program.gradients())
        statistics = torch.from_numpy(self.program.statistics())
        self.statistics = [(statistics[mean], statistics[variance]) for mean, variance in self.plan.statistics]
        places = [*self.plan.values, *(part for pair in self.plan.statistics for part in pair)]
        self.loaded: Watch | None = None  # over what was loaded, where it need not be loaded again
        self._starts, self._counts = [part.start for part in places], [part.stop - part.start for part in places]
        self._inputs = _forms(segment, segment.graph.inputs, segment.inputs)
        self._outputs = _forms(segment, segment.graph.outputs, segment.outputs)

    def value(self, weight: int) -> Tensor:
        """The packed values of a weight, a view."""
        return self.values[self.plan.values[weight]]

    def gradient(self, weight: int) -> Tensor:
        """The packed gradient of a weight, a view."""
        return self.gradients[self.plan.values[weight]]

    def load(self, arrays: list[NDArray[Any]], threads: int) -> None:
        """Take all weights, packed, and each BatchNorm's running mean and variance: flat float32 arrays, in order."""
        self.program.load(arrays, self._starts, self._counts, len(self.plan.values), threads)

    def forward(self, inputs: Sequence[Tensor], threads: int) -> list[Tensor]:
        """Outputs for float32 inputs of the planned shapes, in fresh tensors."""
        outputs = [form.empty() for form in self._outputs]
        maps = [*_as_maps(inputs, self._inputs), *_as_maps(outputs, self._outputs)]
        self.program.run(0, [tensor.detach().numpy() for tensor in maps], threads)
        return outputs

    def backward(self, output_gradients: Sequence[Tensor | None], threads: int) -> list[Tensor]:
        """Gradients of the inputs that were asked for; those of the weights are in ``gradients`` afterwards.

        ``output_gradients``: float32, None stands for zeros.
        """
        forms = [self._inputs[number] for number in self.plan.input_gradients]
        inputs = [form.empty() for form in forms]
        wanted = [self._outputs[number] for number in self.plan.output_gradients]
        found = [output_gradients[number] for number in self.plan.output_gradients]
        given = [form.empty().zero_() if g is None else g for g, form in zip(found, wanted, strict=True)]
        maps = [*_as_maps(given, wanted), *_as_maps(inputs, forms)]
        self.program.run(1, [tensor.detach().numpy() for tensor in maps], threads)
        return inputs

    def profile(self) -> list[tuple[str, str, float]]:
        """(section, step, seconds) since ``program.set_profile(True)``."""
        rows: list[tuple[str, str, float]] = self.program.profile()
        return rows


@dataclasses.dataclass(frozen=True)
class _Form:
    """A tensor outside a program and the map that it is inside: itself, flattened, or as rows of features, which fill
    the map's first pixels."""

    shape: Sequence[int]
    map: Shape
    rows: bool
    features_last: bool  # the tensor is a map's with the channels behind,
    permuted: bool  # and that or the other order is not that of its memory

    def empty(self) -> Tensor:
        """A fresh tensor, whatever torch's default device is."""
        if self.permuted and self.features_last:
            _, channels, height, width = self.map  # no view: of those that a Function makes torch lets nobody write
            strides = (channels * height * width, width, 1, height * width)
            return torch.empty_strided(self.shape, strides, dtype=torch.float32, device="cpu")
        order = torch.channels_last if self.permuted else torch.contiguous_format
        return torch.empty(self.shape, dtype=torch.float32, device="cpu", memory_format=order)

    def as_map(self, tensor: Tensor) -> Tensor:
        """A view in the map's shape, or (rows, features); a copy where none can be."""
        if self.features_last:
            n, channels, height, width = self.map
            return with_lines(tensor.reshape(n, height, width, channels).permute(0, 3, 1, 2))
        return with_lines(tensor.reshape((-1, self.map[1]) if self.rows else self.map))


def _forms(segment: Segment, values: Sequence[int], tensors: Sequence[Ref]) -> list[_Form]:
    rows, shapes = segment.graph.rows, segment.graph.shapes
    return [
        _Form(t.shape, shapes[v], v in rows, t.number in segment.features_last, t.number in segment.permuted)
        for v, t in zip(values, tensors, strict=True)
    ]


def _as_maps(tensors: Sequence[Tensor], forms: Sequence[_Form]) -> list[Tensor]:
    return [form.as_map(tensor.resolve_neg()) for tensor, form in zip(tensors, forms, strict=True)]


class Arrays:
    """Float32 tensors as flat arrays. One that lies where it lay in the last call keeps its array: making it takes a
    while."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[tuple[int, int], NDArray[Any]]] = {}

    def of(self, place: Any, tensor: Tensor) -> NDArray[Any]:
        """The array of the tensor that serves as ``place``, for as long as it lives; a copy where it has gaps."""
        if not tensor.is_contiguous():
            copied: NDArray[Any] = tensor.detach().reshape(-1).numpy()
            return copied
        where = address(tensor), tensor.numel()
        known = self._known.get(place)
        if known is None or known[0] != where:
            known = self._known[place] = where, memory(tensor).view(np.float32)
        return known[1]


def pack(dense: Tensor, mask: Tensor | None) -> Tensor:
    """The living entries in row-major order, 1-D."""
    if mask is None:
        return dense.detach().reshape(-1)
    if dense.dtype != torch.float32:
        return dense.detach()[mask]
    packed: Tensor = ops.kernel("gather_kept", dense.device)(dense.detach(), mask)
    return packed


def unpack(values: Tensor, shape: Sequence[int], mask: Tensor | None) -> Tensor:
    """The dense float32 tensor of packed values; dead entries are 0."""
    if mask is None:
        return values.reshape(tuple(shape)).clone()
    dense: Tensor = ops.kernel("scatter_kept", values.device)(values.detach(), mask)
    return dense


def weights_of(segment: Segment, leaves: Mapping[int, str], masks: Mapping[str, Tensor], trained: bool) -> list[Weight]:
    """The planner's view of a segment's weights. A tensor that is no parameter is dense, and so is what is not the
    weight of a layer: kernels know no sparse bias."""
    listed = []
    of_layers = layer_weights(segment)
    for number, ref in enumerate(segment.weights):
        mask = masks.get(leaves.get(ref.number, "")) if number in of_layers else None
        listed.append(Weight(ref.shape, None if mask is None or bool(mask.all()) else mask, trained))
    return listed


def layer_weights(segment: Segment) -> set[int]:
    """The numbers of the weights of convolutions and linear layers, not of biases and norms."""
    return {node.weight for node in segment.graph.nodes if node.kind in CONV_KINDS}


def hooked_module(model: nn.Module) -> str | None:
    """Name of a module with hooks, which a recording would run once and never again; None if there is none."""
    return next((name for name, module in model.named_modules() if has_hooks(module)), None)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of this module runs more than its forward."""
    return any(hooks_of(module))


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Where a module keeps what a call of it runs beside its forward."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
