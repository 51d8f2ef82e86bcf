"""Tensors to the CPU kernels. What the seam checked is not checked again, except by the bindings for safety."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

import lipfast._C as _C


def _array(tensor: Tensor) -> NDArray[Any]:
    """The tensor's memory as numpy sees it: shared, not copied."""
    return tensor.detach().numpy()


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
