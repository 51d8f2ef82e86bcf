"""A whole pruning step in one pass: prune, rewind what survives, pack it."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lipfast.errors import InputError
from lipfast.ops import _dispatch
from lipfast.ops._autograd import note_writes
from lipfast.ops.select import begin_pruning, check_parts, device_of


@dataclass(frozen=True)
class Rewound:
    """What a pruning step leaves.

    Attributes:
        masks: new bool tensors shaped like the weights: who survives.
        bits: the same packed, ``(ceil(n / 8),)`` uint8 for each tensor: eight weights to a byte, the lowest bit first,
            zeros behind the last weight.
        weights: the rewound weights, dense, exactly +0 where dead.
        values: ``(survivors,)`` float32: the rewound weights that live, tensor after tensor.
    """

    masks: list[Tensor]
    bits: list[Tensor]
    weights: list[Tensor]
    values: Tensor


def prune_rewind_pack(
    weights: Sequence[Tensor],
    alive: Sequence[Tensor],
    start: Sequence[Tensor],
    count: int,
    *,
    into: Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> Rewound:
    """Kill the ``count`` smallest living weights, rewind the rest to ``start``, pack them.

    Who dies is what ``prune_smallest(weights, alive, count)`` says.

    It is not a ``torch.library`` operator: it runs once in a pruning round, outside any graph.

    Args:
        weights: the trained weights: float32 tensors of any shape on one device; the living ones not NaN.
        alive: bool tensors of the same shapes on the same device. False stays False.
        start: the weights to rewind to, as ``weights``.
        count: how many weights die, ``0 <= count <= number alive``.
        into: tensors that receive the rewound weights, as ``weights``: a network's own parameters, ``weights`` or
            ``start`` itself, but none that overlaps another or lies between its elements; None for new ones.
        backend: run exactly this implementation; None lets the seam choose.

    Raises:
        InputError: an argument breaks the lines above. ``into`` is untouched then.
        BackendError: ``backend`` cannot run here.

    Source: Frankle & Carbin 2019 (arXiv:1803.03635): rewinding of the survivors.
    Cost: one pass to find the cut, one that reads weights and start and writes all of the result.
    """
    check_parts("prune_rewind_pack", "start", start, alive, torch.float32)
    if into is None:
        into = [torch.empty_like(first, memory_format=torch.contiguous_format) for first in start]
    check_parts("prune_rewind_pack", "into", into, alive, torch.float32)
    _check_apart(into)
    pruning = begin_pruning("prune_rewind_pack", weights, alive, count, backend)
    with torch.no_grad(), _dispatch.on(device_of(weights)):
        masks, bits, values = pruning.rewind([first.detach() for first in start], into)
    note_writes(*into)
    return Rewound(masks, bits, list(into), values)


def _check_apart(into: Sequence[Tensor]) -> None:
    """No two results lie in the same memory: one would be written over the other."""
    places = sorted((*_place(tensor), position) for position, tensor in enumerate(into) if tensor.numel())
    for (_, end, before), (start, _, after) in itertools.pairwise(places):
        if start < end:
            raise InputError(
                f"prune_rewind_pack: into[{before}] and into[{after}] share memory; give each a tensor of its own"
            )


def _place(tensor: Tensor) -> tuple[int, int]:
    """The bytes from its first element to behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
