"""Optimiser steps on the kept weights of a pruned network, packed into one vector."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lipfast.errors import InputError
from lipfast.ops import _dispatch
from lipfast.ops._autograd import note_writes, refuse_tangents
from lipfast.ops._checks import whole_number


def adam_step(
    values: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    backend: str | None = None,
) -> None:
    """One step of Adam in place, in time proportional to ``values``.

    Bit for bit ``torch.optim.Adam(foreach=False)``, operation by operation, with one exception: torch's root. On x86 it
    comes from MKL, which misses the nearest float in 0.6 % of cases; here every root is the nearest float, so equal
    inputs give equal bits on every instruction set and for any number of threads. From equal state, one step gives
    torch's moments bit for bit, and values whose change is within 4 ulp of torch's.

    Args:
        values: ``(n,)`` float32, contiguous: the kept weights (and biases, ...). Updated.
        gradient: as ``values``. Only read.
        m: as ``values``: first moment, zeros before the first step. Updated.
        v: as ``values``: second moment, zeros before the first step. Updated.
        step: which step this is, from 1.
        lr: learning rate, at least 0.
        beta1, beta2: decay of the moments, in [0, 1).
        eps: added to the root, at least 0.
        weight_decay: times the values, added to the gradient (L2, not decoupled); at least 0.
        backend: run exactly this implementation; None lets the seam choose.

    Raises:
        InputError: an argument breaks the lines above.
        BackendError: ``backend`` cannot run here.

    Source: Kingma & Ba 2015 (arXiv:1412.6980), algorithm 1, with torch's placement of ``eps``.
    """
    step = whole_number("adam_step", "step", step)
    _check("adam_step", values, {"gradient": gradient, "m": m, "v": v}, step)
    for name, beta in {"beta1": beta1, "beta2": beta2}.items():
        if not 0 <= beta < 1:
            raise InputError(f"adam_step: {name} must be in [0, 1), got {beta}")
    _check_not_negative("adam_step", {"lr": lr, "eps": eps, "weight_decay": weight_decay})
    with torch.no_grad():
        _adam_operator(values, gradient, m, v, step, lr, beta1, beta2, eps, weight_decay, backend)


def sgd_step(
    values: Tensor,
    gradient: Tensor,
    momentum_buffer: Tensor,
    step: int,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    *,
    backend: str | None = None,
) -> None:
    """One step of stochastic gradient descent in place, in time proportional to ``values``.

    Bit for bit ``torch.optim.SGD(foreach=False)`` where torch's kernels fuse multiply-adds (x86 with AVX2 or AVX-512).

    Args:
        values: ``(n,)`` float32, contiguous: the kept weights (and biases, ...). Updated.
        gradient: as ``values``. Only read.
        momentum_buffer: as ``values``; step 1 overwrites it, later steps update it. Not touched when ``momentum`` is 0.
        step: which step this is, from 1.
        lr, momentum, weight_decay: as in ``torch.optim.SGD``, at least 0.
        dampening, nesterov: as in ``torch.optim.SGD``, finite; ``nesterov`` wants momentum and no dampening.
        backend: run exactly this implementation; None lets the seam choose.

    Raises:
        InputError: an argument breaks the lines above.
        BackendError: ``backend`` cannot run here.

    Source: Sutskever et al. 2013, in the form of ``torch.optim.SGD``.
    """
    step = whole_number("sgd_step", "step", step)
    _check("sgd_step", values, {"gradient": gradient, "momentum_buffer": momentum_buffer}, step)
    _check_not_negative("sgd_step", {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
    if not math.isfinite(dampening):
        raise InputError(f"sgd_step: dampening must be a finite number, got {dampening}")
    if nesterov and (momentum <= 0 or dampening != 0):
        raise InputError(f"sgd_step: nesterov wants momentum > 0 and dampening 0, got {momentum} and {dampening}")
    with torch.no_grad():
        _sgd_operator(values, gradient, momentum_buffer, step, lr, momentum, dampening, weight_decay, nesterov, backend)


def _adam_step(
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
    backend: str | None,
) -> None:
    _, run = _dispatch.pick("adam_step", values.device, backend)
    run(values, gradient, m, v, step, lr, beta1, beta2, eps, weight_decay)
    note_writes(values, m, v)


def _sgd_step(
    values: Tensor,
    gradient: Tensor,
    momentum_buffer: Tensor,
    step: int,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    backend: str | None,
) -> None:
    _, run = _dispatch.pick("sgd_step", values.device, backend)
    run(values, gradient, momentum_buffer, step, lr, momentum, dampening, weight_decay, nesterov)
    note_writes(values, momentum_buffer)


_library = torch.library.Library("lipfast", "FRAGMENT")  # type: ignore[no-untyped-call]


def _define(name: str, function: Callable[..., None], *written: str) -> Callable[..., None]:
    """An operator that writes to its arguments. `torch.library.custom_op` would take 80 us a call to say so."""
    schema = name + torch.library.infer_schema(function, mutates_args=written)
    _library.define(schema)  # type: ignore[no-untyped-call]
    _library.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"lipfast::{name}", lambda *_: None, lib=_library)
    operator: Callable[..., None] = getattr(torch.ops.lipfast, name).default
    return operator


_adam_operator = _define("adam_step", _adam_step, "values", "m", "v")
_sgd_operator = _define("sgd_step", _sgd_step, "values", "momentum_buffer")


def _check(op: str, values: Tensor, others: Mapping[str, Tensor], step: int) -> None:
    for name, tensor in {"values": values, **others}.items():
        if tensor.dtype != torch.float32 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise InputError(
                f"{op}: {name} must be a contiguous 1-D float32 tensor, got {tuple(tensor.shape)} {tensor.dtype} with "
                f"strides {tensor.stride()}; pack kept weights with ops.gather_kept"
            )
        if tensor.shape != values.shape or tensor.device != values.device:
            raise InputError(
                f"{op}: {name} must match values, {len(values)} on {values.device}; "
                f"got {len(tensor)} on {tensor.device}"
            )
    if not 1 <= step < 2**63:
        raise InputError(f"{op}: steps count from 1 to 2^63 - 1, got step={step}")
    refuse_tangents(op, values, *others.values())


def _check_not_negative(op: str, settings: Mapping[str, float]) -> None:
    for name, value in settings.items():
        if not value >= 0:  # NaN as well
            raise InputError(f"{op}: {name} must be at least 0, got {value}")
