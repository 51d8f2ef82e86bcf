"""Selection: which weights a pruning round removes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lipfast.errors import InputError
from lipfast.ops import _dispatch


def prune_smallest(
    weights: Sequence[Tensor], alive: Sequence[Tensor], count: int, *, backend: str | None = None
) -> list[Tensor]:
    """Mark exactly ``count`` of the living weights as dead: the smallest magnitudes over all tensors together.

    Among equal magnitudes the lower index dies first, where indices run through the tensors in the order given, so
    every backend returns the same bits. (Comparing with a threshold would remove every tied weight at once.)

    Args:
        weights: float32 tensors of any shape, no NaN, on one device. Dead entries may hold anything but NaN.
        alive: bool tensors of the same shapes on the same device. False stays False.
        count: how many weights die, ``0 <= count <= number alive``.
        backend: run exactly this implementation; None lets the seam choose.

    Returns:
        New bool tensors shaped like ``alive``.

    Raises:
        InputError: an argument breaks the lines above.
        BackendError: ``backend`` cannot run here.

    Source: Frankle & Carbin 2019 (arXiv:1803.03635), global magnitude criterion; the tie rule is ours.
    """
    _check(weights, alive)
    living = sum(int(mask.sum()) for mask in alive)
    if not 0 <= count <= living:
        total = sum(mask.numel() for mask in alive)
        raise InputError(f"prune_smallest: count={count} but {living} of {total} weights are alive")
    if not weights:
        return []
    magnitude = torch.cat([weight.detach().reshape(-1).abs() for weight in weights])  # (n,)
    flat = torch.cat([mask.reshape(-1) for mask in alive])  # (n,)
    if bool(magnitude.isnan().any()):
        raise InputError("prune_smallest: weights hold NaN; magnitudes cannot be ordered, lower the learning rate")
    _, run = _dispatch.pick("prune_smallest", magnitude.device, backend)
    survivors = run(magnitude, flat, count)
    pieces = survivors.split([mask.numel() for mask in alive])
    return [piece.reshape(mask.shape) for piece, mask in zip(pieces, alive, strict=True)]


def _check(weights: Sequence[Tensor], alive: Sequence[Tensor]) -> None:
    if len(weights) != len(alive):
        raise InputError(f"prune_smallest: got {len(weights)} weight tensors but {len(alive)} masks")
    for position, (weight, mask) in enumerate(zip(weights, alive, strict=True)):
        if weight.dtype != torch.float32:
            raise InputError(f"prune_smallest: weights[{position}] must be float32, got {weight.dtype}; use .float()")
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            raise InputError(
                f"prune_smallest: alive[{position}] must be bool {tuple(weight.shape)}, "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
        if weight.device != weights[0].device or mask.device != weights[0].device:
            raise InputError(
                f"prune_smallest: tensor {position} is on {weight.device}/{mask.device}, the first on "
                f"{weights[0].device}; move all to one device"
            )
