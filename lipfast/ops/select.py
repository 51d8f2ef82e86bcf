"""Selection: which weights a pruning round removes."""

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from lipfast.errors import InputError
from lipfast.ops import _dispatch
from lipfast.ops._checks import whole_number


class PruningRound(Protocol):
    """What a backend's ``begin_pruning(weights, alive, count)`` returns: the cut is found, nothing is written yet.

    ``living`` counts the living weights; ``nan_part`` is the index of the first tensor with a living NaN, -1 if none.
    The methods are called only when there is no NaN and ``0 <= count <= living``.
    """

    living: int
    nan_part: int

    def masks(self) -> list[Tensor]:
        """The survivors of each tensor, new."""

    def rewind(self, start: Sequence[Tensor], into: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Survivors, survivors as bits, and the packed start values, new; writes the rewound weights to ``into``."""


def prune_smallest(
    weights: Sequence[Tensor], alive: Sequence[Tensor], count: int, *, backend: str | None = None
) -> list[Tensor]:
    """Mark exactly ``count`` of the living weights as dead: the smallest magnitudes over all tensors together.

    Among equal magnitudes the lower index dies first, where indices run through the tensors in the order given, so
    every backend returns the same bits. (Comparing with a threshold would remove every tied weight at once.)

    It is not a ``torch.library`` operator: it runs once in a pruning round, outside any graph.

    Args:
        weights: float32 tensors of any shape on one device; the living ones not NaN.
        alive: bool tensors of the same shapes on the same device. False stays False.
        count: how many weights die, ``0 <= count <= number alive``.
        backend: run exactly this implementation; None lets the seam choose.

    Returns:
        New bool tensors shaped like ``alive``.

    Raises:
        InputError: an argument breaks the lines above.
        BackendError: ``backend`` cannot run here.

    Source: Frankle & Carbin 2019 (arXiv:1803.03635), global magnitude criterion; the tie rule is ours.
    Cost: two passes over the weights (csrc/cpu/prune.h).
    """
    pruning = begin_pruning("prune_smallest", weights, alive, count, backend)
    with _dispatch.on(device_of(weights)):
        return pruning.masks()


def begin_pruning(
    op: str, weights: Sequence[Tensor], alive: Sequence[Tensor], count: int, backend: str | None
) -> PruningRound:
    """Find the cut of a round whose arguments are checked; ``op`` is who asks, for messages."""
    check_parts(op, "weights", weights, alive, torch.float32)
    check_parts(op, "alive", alive, alive, torch.bool)
    count = whole_number(op, "count", count)
    _, begin = _dispatch.pick("begin_pruning", device_of(weights), backend)
    with torch.no_grad():
        pruning = cast(PruningRound, begin([weight.detach() for weight in weights], alive, count))
    if not 0 <= count <= pruning.living:
        total = sum(mask.numel() for mask in alive)
        raise InputError(f"{op}: count={count} but {pruning.living} of {total} weights are alive")
    if pruning.nan_part >= 0:
        raise InputError(
            f"{op}: weights[{pruning.nan_part}] holds NaN; magnitudes cannot be ordered, lower the learning rate"
        )
    return pruning


def device_of(tensors: Sequence[Tensor]) -> torch.device:
    """Where the tensors of a round are."""
    return tensors[0].device if tensors else torch.device("cpu")


def check_parts(op: str, name: str, tensors: Sequence[Tensor], alive: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Check that there is one tensor of this type for each mask, of its shape and on the first one's device.

    Raises:
        InputError: names the first that does not fit.
    """
    if len(tensors) != len(alive):
        raise InputError(f"{op}: got {len(tensors)} tensors as {name} but {len(alive)} masks")
    for position, (tensor, mask) in enumerate(zip(tensors, alive, strict=True)):
        if tensor.dtype != dtype or tensor.shape != mask.shape:
            raise InputError(
                f"{op}: {name}[{position}] must be {dtype} {tuple(mask.shape)} as its mask, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
        if tensor.device != alive[0].device:
            raise InputError(
                f"{op}: {name}[{position}] is on {tensor.device}, the first mask on {alive[0].device}; "
                "move all to one device"
            )
