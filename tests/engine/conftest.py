"""Running one module or graph through the engine and through torch in float64."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lipfast
from lipfast.engine.builder import Segment
from lipfast.engine.capture import call_with, record
from lipfast.engine.lane_module import LaneModule
from lipfast.engine.lower import lower
from lipfast.engine.plan import Options, Weight
from lipfast.engine.runtime import Running, pack, unpack, weights_of

# A float32 sum of n terms of size 1 is off by about sqrt(n) epsilon when errors are random, n epsilon at worst. Every
# comparison here is relative to the largest entry of the float64 answer; networks below sum at most a few thousand
# terms one after the other in up to a dozen layers.
EPSILON = 2.0**-23
TOLERANCE = 500 * EPSILON


def relative_error(got: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the largest entry of the reference."""
    scale = float(reference.detach().abs().max())
    return float((got.double() - reference.detach()).abs().max()) / (scale if scale > 0 else 1.0)


def leaves_of(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def segment_of(module: nn.Module, x: Tensor, masks: dict[str, Tensor] | None = None) -> tuple[Segment, dict[int, str]]:
    """The module as one lane segment; fails if any of it is left to torch."""
    recording = record(lambda leaves, x: call_with(module, leaves, (x,)), [x], leaves_of(module))
    lowered = lower(recording, masks)
    assert lowered.refused == []
    (segment,) = lowered.items
    assert isinstance(segment, Segment)
    return segment, recording.leaves


def load(running: Running, segment: Segment, weights: list[Weight], leaves: dict[int, Tensor]) -> None:
    for number, ref in enumerate(segment.weights):
        running.value(number).copy_(pack(leaves[ref.number], weights[number].mask))
    for views, refs in zip(running.statistics, segment.statistics, strict=True):
        for view, ref in zip(views, refs, strict=True):
            view.copy_(leaves[ref.number])


@pytest.fixture
def inference() -> Callable[..., Running]:
    """A module in evaluation as one program without a backward pass, its weights, pruned to the masks, loaded."""

    def make(module: nn.Module, x: Tensor, masks: dict[str, Tensor]) -> Running:
        for name, mask in masks.items():
            module.get_parameter(name).data.mul_(mask)
        segment, names = segment_of(module.eval(), x, masks)
        weights = weights_of(segment, names, masks, trained=False)
        running = Running(segment, weights, Options(backward=False, input_gradients=[False]))
        leaves = leaves_of(module)
        load(running, segment, weights, {number: leaves[name] for number, name in names.items()})
        return running

    return make


@pytest.fixture
def compare() -> Callable[..., None]:
    """Outputs, gradients of input and parameters, and buffers of a module: engine against torch in float64. The outputs
    also of the program without a backward pass, which fuses more and lets maps share memory."""

    def run(module: nn.Module, x: Tensor, masks: dict[str, Tensor] | None = None, tolerance: float = TOLERANCE) -> None:
        masks = masks or {}
        for name, mask in masks.items():
            module.get_parameter(name).data.mul_(mask)
        exact = copy.deepcopy(module).double()
        x64 = x.double().requires_grad_()
        expected = exact(x64)
        dy = torch.randn(expected.shape)
        expected.backward(dy.double())

        segment, names = segment_of(module, x, masks)
        leaves = leaves_of(module)
        weights = weights_of(segment, names, masks, trained=True)
        running = Running(segment, weights, Options(backward=True, input_gradients=[True]))
        inference = Running(segment, weights, Options(backward=False, input_gradients=[False]))
        for program in (running, inference):
            load(program, segment, weights, {number: leaves[name] for number, name in names.items()})
        (y,) = running.forward([x], 2)
        (dx,) = running.backward([dy], 2)

        assert relative_error(y, expected) < tolerance
        assert relative_error(inference.forward([x], 2)[0], expected) < tolerance
        assert relative_error(dx, x64.grad) < tolerance
        gradients = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad  # unread: none
            for name, parameter in exact.named_parameters()
        }
        scale = max(float(gradient.abs().max()) for gradient in gradients.values()) if gradients else 1.0
        for number, ref in enumerate(segment.weights):
            name = names[ref.number]
            mask = weights[number].mask
            got = unpack(running.gradient(number), leaves[name].shape, mask).double()
            wanted = gradients[name] if mask is None else gradients[name] * mask
            assert float((got - wanted).abs().max()) <= tolerance * scale, name
        buffers = dict(exact.named_buffers())
        for views, refs in zip(running.statistics, segment.statistics, strict=True):
            mean, variance = (buffers[names[ref.number]] for ref in refs)
            # A mean sums numbers as large as it and the deviation, of which nothing may be left.
            size = float(mean.abs().max() + variance.max().sqrt())
            assert float((views[0].double() - mean).abs().max()) <= tolerance * size
            assert relative_error(views[1], variance) < tolerance

    return run


@pytest.fixture
def items_of() -> Callable[..., list[str | list[str]]]:
    """What a module is cut into, what is computed from parameters aside: kinds of operators of segments, names of torch
    calls. Masks are where parameters are not zero, unless they are given."""

    def run(module: nn.Module, x: Tensor, masks: dict[str, Tensor] | None = None) -> list[str | list[str]]:
        if masks is None:
            masks = {name: p != 0 for name, p in module.named_parameters() if bool((p == 0).any())}
        recording = record(lambda leaves, x: call_with(module, leaves, (x,)), [x], leaves_of(module))
        lowered = lower(recording, masks)
        return [
            [node.kind for node in item.graph.nodes] if isinstance(item, Segment) else item.name
            for item in lowered.items[len(lowered.of_parameters) :]
        ]

    return run


@pytest.fixture
def segments_of(items_of: Callable[..., list[str | list[str]]]) -> Callable[..., list[list[str]]]:
    """The segments among them."""

    def run(module: nn.Module, x: Tensor, masks: dict[str, Tensor] | None = None) -> list[list[str]]:
        return [item for item in items_of(module, x, masks) if isinstance(item, list)]

    return run


@pytest.fixture
def compare_accelerated() -> Callable[..., LaneModule]:
    """Outputs, with gradients and without, and gradients of input and parameters of a pruned module: accelerated,
    whatever of it torch runs, against float64."""

    def run(module: nn.Module, x: Tensor) -> LaneModule:
        fast = lipfast.accelerate(module)
        exact, x64 = copy.deepcopy(module).double(), x.double().requires_grad_()
        x = x.detach().requires_grad_()
        expected = pytree.tree_leaves(exact(x64))
        dys = [torch.randn_like(y) for y in expected]
        dx, *gradients = torch.autograd.grad(
            expected, [x64, *exact.parameters()], dys, allow_unused=True, materialize_grads=True
        )
        found = pytree.tree_leaves(fast(x))
        with torch.no_grad():
            without = pytree.tree_leaves(fast(x))
        for y, other, wanted in zip(found, without, expected, strict=True):
            assert all(relative_error(got.detach(), wanted.detach()) < TOLERANCE for got in (y, other))
        torch.autograd.backward(found, [dy.float() for dy in dys])
        assert relative_error(x.grad, dx) < TOLERANCE
        scale = max(float(gradient.abs().max()) for gradient in gradients)
        for (name, parameter), gradient in zip(exact.named_parameters(), gradients, strict=True):
            own = fast.get_parameter(name)
            kept = gradient[parameter != 0] if own.shape != parameter.shape else gradient
            got = torch.zeros_like(kept) if own.grad is None else own.grad.double()
            assert float((got - kept).abs().max()) <= TOLERANCE * scale, name
        return fast

    return run
