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


def adam_step(
    values: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """See ``lipfast.ops.adam_step``; torch.optim's single-tensor form, line by line."""
    if weight_decay != 0:
        gradient = gradient.add(values, alpha=weight_decay)
    m.lerp_(gradient, 1 - beta1)
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    # torch's own float32 root comes from MKL, which misses the nearest float in 0.6 % of cases; this one never does.
    root = v.double().sqrt().float()
    denominator = (root / (1 - beta2**step) ** 0.5).add_(eps)
    values.addcdiv_(m, denominator, value=-(lr / (1 - beta1**step)))


def sgd_step(
    values: Tensor,
    gradient: Tensor,
    momentum_buffer: Tensor,
    step: int,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """See ``lipfast.ops.sgd_step``; torch.optim's single-tensor form, line by line."""
    if weight_decay != 0:
        gradient = gradient.add(values, alpha=weight_decay)
    if momentum != 0:
        if step == 1:
            momentum_buffer.copy_(gradient)
        else:
            momentum_buffer.mul_(momentum).add_(gradient, alpha=1 - dampening)
        gradient = gradient.add(momentum_buffer, alpha=momentum) if nesterov else momentum_buffer
    values.add_(gradient, alpha=-lr)
