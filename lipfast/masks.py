"""Masks: which weights of a network live.

A mask set maps a parameter's name in ``network.state_dict()`` to a bool tensor of its shape; True lives. A parameter
without a mask is never pruned. Weights are counted in the order of the mapping: its first tensor holds index 0.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lipfast import ops
from lipfast.errors import InputError

Masks = dict[str, Tensor]


def full(state: Mapping[str, Tensor], names: Iterable[str]) -> Masks:
    """Masks under which every weight of the named parameters lives."""
    masks = {}
    for name in names:
        if name not in state:
            raise InputError(f"masks: the network has no parameter {name!r}; its names are those of state_dict()")
        masks[name] = torch.ones(state[name].shape, dtype=torch.bool)
    return masks


def validate(masks: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Check that every mask is a bool tensor shaped like the parameter it names.

    Raises:
        InputError: names the first mask that does not fit, what was expected and what came.
    """
    for name, mask in masks.items():
        if not isinstance(name, str) or name not in state:
            raise InputError(f"masks: the network has no parameter {name!r}; its names are those of state_dict()")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(f"masks: {name} must be a bool tensor, got {kind}; use mask.bool()")
        if mask.shape != state[name].shape:
            raise InputError(
                f"masks: {name} must have shape {tuple(state[name].shape)}, got {tuple(mask.shape)}; "
                "is the mask of another network?"
            )


def living(masks: Mapping[str, Tensor]) -> int:
    """How many masked weights live."""
    return sum(int(mask.sum()) for mask in masks.values())


def total(masks: Mapping[str, Tensor]) -> int:
    """How many weights the masks cover, dead and alive."""
    return sum(mask.numel() for mask in masks.values())


def density(masks: Mapping[str, Tensor]) -> float:
    """Share of the covered weights that live; 1.0 where nothing is covered."""
    covered = total(masks)
    return living(masks) / covered if covered else 1.0


def sparsity(masks: Mapping[str, Tensor]) -> float:
    """Share of the covered weights that are dead. The true figure of the mask that is applied, never a nominal one."""
    return 1.0 - density(masks)


def layer_density(masks: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of living weights of each masked parameter."""
    return {name: density({name: mask}) for name, mask in masks.items()}


def empty_layers(masks: Mapping[str, Tensor]) -> list[str]:
    """Names of the parameters that have lost every weight."""
    return [name for name, mask in masks.items() if not bool(mask.any())]


def nested(inner: Mapping[str, Tensor], outer: Mapping[str, Tensor]) -> bool:
    """Whether every weight alive in ``inner`` is alive in ``outer`` (a parameter without a mask is all alive).

    Raises:
        InputError: a parameter has two shapes.
    """
    for name, mask in outer.items():
        if name not in inner:
            if not bool(mask.all()):
                return False
        elif inner[name].shape != mask.shape:
            raise InputError(
                f"masks: {name} has shape {tuple(inner[name].shape)} in one set, {tuple(mask.shape)} in the other; "
                "are they of two networks?"
            )
        elif bool((inner[name] & ~mask).any()):
            return False
    return True


def apply(masks: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy of ``state`` with every dead weight exactly 0.0; everything else bit for bit."""
    return {
        name: torch.where(masks[name], value, torch.zeros_like(value)) if name in masks else value.clone()
        for name, value in state.items()
    }


def prune_globally(masks: Masks, score: Mapping[str, Tensor], count: int) -> Masks:
    """Kill exactly ``count`` living weights: the smallest ``|score|`` over all masked parameters together.

    Args:
        masks: which weights live now.
        score: a float32 tensor for each masked parameter; for magnitude pruning the weights themselves.
        count: how many die, ``0 <= count <= living(masks)``. Ties go to the lower index.

    Raises:
        InputError: a mask without a score, or a count out of range.
    """
    _check_named("score", score, masks)
    names = list(masks)
    survivors = ops.prune_smallest([score[name] for name in names], [masks[name] for name in names], count)
    return dict(zip(names, survivors, strict=True))


def prune_each_layer(masks: Masks, score: Mapping[str, Tensor], counts: Mapping[str, int]) -> Masks:
    """As ``prune_globally`` but each parameter loses its own ``counts[name]`` smallest scores."""
    _check_named("score", score, masks)
    _check_named("count", counts, masks)
    return {name: ops.prune_smallest([score[name]], [mask], counts[name])[0] for name, mask in masks.items()}


def _check_named(what: str, given: Mapping[str, object], masks: Masks) -> None:
    """Whether each mask has its score, or its count."""
    for name in masks:
        if name not in given:
            raise InputError(f"masks: {name!r} has no {what}; give one for each mask")
