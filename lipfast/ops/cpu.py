"""Tensors to the CPU kernels. What the seam checked is not checked again, except by the bindings for safety."""

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

import lipfast._C as _C


def _array(tensor: Tensor) -> NDArray[Any]:
    """The tensor's memory as numpy sees it: shared, not copied."""
    return tensor.detach().numpy()


class _Pruning:
    """A `lipfast.ops.select.PruningRound` in C++."""

    def __init__(self, weights: Sequence[Tensor], alive: Sequence[Tensor], count: int) -> None:
        self._alive, self._count = alive, count
        scores = [_array(weight.contiguous()) for weight in weights]
        masks = [_array(mask.contiguous()) for mask in alive]
        self._round = _C.Pruning(scores, masks, count, torch.get_num_threads())
        self.living = self._round.living
        self.nan_part = self._round.nan_part

    def masks(self) -> list[Tensor]:
        """The survivors of each tensor."""
        masks = [torch.empty(mask.shape, dtype=torch.bool) for mask in self._alive]
        self._round.write([_array(mask) for mask in masks], None, None, None, None, torch.get_num_threads())
        return masks

    def rewind(self, start: Sequence[Tensor], into: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Survivors, survivors as bits, and the packed start values; writes the rewound weights to ``into``."""
        masks = [torch.empty(mask.shape, dtype=torch.bool) for mask in self._alive]
        bits = [torch.empty(-(-mask.numel() // 8), dtype=torch.uint8) for mask in self._alive]
        values = torch.empty(self.living - self._count)
        dense = [target if target.is_contiguous() else torch.empty(target.shape) for target in into]
        self._round.write(
            [_array(mask) for mask in masks],
            [_array(packed) for packed in bits],
            [_array(first.contiguous()) for first in start],
            [_array(written) for written in dense],
            _array(values),
            torch.get_num_threads(),
        )
        for target, written in zip(into, dense, strict=True):
            if written is not target:
                target.copy_(written)
        return masks, bits, values


def begin_pruning(weights: Sequence[Tensor], alive: Sequence[Tensor], count: int) -> _Pruning:
    """See ``lipfast.ops.select.PruningRound``."""
    return _Pruning(weights, alive, count)


def gather_kept(dense: Tensor, mask: Tensor) -> Tensor:
    """See ``lipfast.ops.gather_kept``."""
    threads, alive = torch.get_num_threads(), _array(mask.contiguous())
    values = torch.empty(_C.count_ones(alive, threads))
    _C.gather_kept(_array(dense.contiguous()), alive, _array(values), threads)
    return values


def scatter_kept(values: Tensor, mask: Tensor) -> Tensor:
    """See ``lipfast.ops.scatter_kept``."""
    dense = torch.empty(mask.shape)
    _C.scatter_kept(_array(values.contiguous()), _array(mask.contiguous()), _array(dense), torch.get_num_threads())
    return dense


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
    """See ``lipfast.ops.adam_step``."""
    threads = torch.get_num_threads()
    _C.adam_step(
        *(_array(values), _array(gradient), _array(m), _array(v)), step, lr, beta1, beta2, eps, weight_decay, threads
    )


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
    """See ``lipfast.ops.sgd_step``."""
    arrays = (_array(values), _array(gradient), _array(momentum_buffer))
    _C.sgd_step(*arrays, step, lr, momentum, dampening, weight_decay, nesterov, torch.get_num_threads())
