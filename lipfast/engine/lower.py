"""From recorded torch calls to the engine's operators, in segments.

A run of calls that the engine knows becomes one `Segment`; a call that it does not know stays a torch call between two
segments.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Container, Mapping, Sequence

import torch
from torch import Tensor

from lipfast.engine.builder import Builder, OutOfOrder, Segment
from lipfast.engine.capture import Call, Recording, Ref, refs_in
from lipfast.engine.handlers import HANDLERS, ROW_BY_ROW
from lipfast.engine.patterns import gather_patterns, is_pure, weights_first, written


@dataclasses.dataclass
class Lowered:
    """A recording with its lane segments; ``refused`` says why torch calls on maps are left, ``of_parameters`` which
    of the items compute on parameters alone."""

    recording: Recording
    items: list["Segment | Call"]
    refused: list[str]
    of_parameters: list[Call] = dataclasses.field(default_factory=list)


def lower(recording: Recording, masks: Mapping[str, Tensor] | None = None, inputs: Container[str] = ()) -> Lowered:
    """Split a recording into lane segments and torch calls, in order. Patterns in the recording become one call.

    A torch call that needs nothing of the segment it would end runs before it.

    Args:
        recording: what to split.
        masks: leaf name -> which of its weights live. Linear layers run in lanes if they are pruned, or behind maps.
        inputs: leaves that are neither parameters nor buffers.
    """

    @functools.cache
    def kept(weight: Ref) -> int:
        mask = (masks or {}).get(recording.leaves.get(weight.number, ""))
        return math.prod(weight.shape) if mask is None else int(mask.count_nonzero())

    with torch.device("cpu"):  # places are worked out with tensors, whatever torch's default device is
        return _lower(recording, kept, inputs)


def _lower(recording: Recording, kept: Callable[[Ref], int], inputs: Container[str]) -> Lowered:
    gather_patterns(recording)
    of_parameters = weights_first(recording, inputs)
    last_use = _last_uses(recording)
    first = recording.calls[:of_parameters]
    leaves = {number: name for number, name in recording.leaves.items() if name not in inputs}
    parameters = {*leaves, *(ref.number for call in first for ref in call.results())}
    changed = written(recording)
    items: list[Segment | Call] = list(first)
    refused: list[tuple[Call, str]] = []
    fresh = recording.unused()
    begin = functools.partial(Builder, HANDLERS, ROW_BY_ROW, kept, recording.leaves, parameters, fresh)
    builder = begin()

    def finish(position: int, grad: bool | None) -> Builder:
        items.extend(builder.finish(last_use, position))
        return begin(grad)

    for position, call in enumerate(recording.calls[of_parameters:], of_parameters):
        if call.grad != builder.grad:
            builder = finish(position, call.grad)
        reason = builder.add(call)
        if isinstance(reason, OutOfOrder):
            builder = finish(position, call.grad)
            reason = builder.add(call)
        if reason is None:
            continue
        refused.append((call, f"{call.name}: {reason}"))
        moves = is_pure(call) and not any(ref.number in changed for ref in call.refs())
        if not moves or any(builder.makes(ref) for ref in call.refs()):
            builder = finish(position, call.grad)
        items += call.spelled or [call]
    items += builder.finish(last_use, len(recording.calls))
    minor = _far_from_lanes(items, recording.leaves)
    return Lowered(recording, items, [why for call, why in refused if id(call) not in minor], first)


def _far_from_lanes(items: Sequence[Segment | Call], leaves: Container[int]) -> set[int]:
    """Torch calls, by id, that neither compute on what segments made nor make what they read, layers aside: those on
    weights alone, and simple ones without weights."""
    read = {ref.number for item in items if isinstance(item, Segment) for ref in item.inputs}
    made: set[int] = set()
    far: set[int] = set()
    for item in items:
        if isinstance(item, Segment):
            made.update(ref.number for ref in item.outputs)
        elif any(ref.number in made for ref in item.refs()):
            made.update(ref.number for ref in item.results())
        elif not any(ref.number in read for ref in item.results()):
            weighs = [ref.number in leaves for ref in item.refs()]
            if all(weighs) or (is_pure(item) and not any(weighs)):
                far.add(id(item))
    return far


def _last_uses(recording: Recording) -> dict[int, int]:
    """Number -> position of the last call that reads it; the module's result counts as one more call."""
    uses: dict[int, int] = {}
    for position, call in enumerate(recording.calls):
        uses.update({ref.number: position for ref in call.refs()})
    uses.update((ref.number, len(recording.calls)) for ref in refs_in(recording.result))
    return uses
