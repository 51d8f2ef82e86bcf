"""The meaning of every op in plain torch: the shortest correct form, no checks, no speed."""

import torch
from torch import Tensor


def prune_smallest(magnitude: Tensor, alive: Tensor, count: int) -> Tensor:
    """See ``lipfast.ops.prune_smallest``; here for one flat tensor."""
    candidates = alive.nonzero().squeeze(1)
    order = torch.argsort(magnitude[candidates], stable=True)  # stable: ties fall to the lower index
    survivors = alive.clone()
    survivors[candidates[order[:count]]] = False
    return survivors
