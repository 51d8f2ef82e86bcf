"""Optimiser steps on flat buffers, optionally under a packed mask."""

import triton
import triton.language as tl
from torch import Tensor

from lipfast.ops.triton.configs import CONFIGS


@triton.jit
def _kept(words, first, n_words, WORDS: tl.constexpr, MASKED: tl.constexpr):
    """``[WORDS, 32]`` bool: bit i of a word says whether element i of its 32 lives. One load for 32 elements."""
    index = first + tl.arange(0, WORDS)
    if MASKED:  # noqa: SIM108  a branch at compile time
        word = tl.load(words + index, mask=index < n_words, other=0)
    else:
        word = tl.full((WORDS,), -1, tl.int32)
    return ((word[:, None] >> tl.arange(0, 32)[None, :]) & 1) != 0


@triton.jit
def adam_kernel(
    values, gradient, m, v, words, n, step_size, root_scale, beta1, beta2, eps, weight_decay,
    WORDS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * WORDS
    i = first * 32 + tl.arange(0, WORDS)[:, None] * 32 + tl.arange(0, 32)[None, :]  # [WORDS, 32]
    inside = i < n
    keep = _kept(words, first, (n + 31) // 32, WORDS, MASKED)
    old = tl.load(values + i, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gradient + i, mask=inside, other=0.0).to(tl.float32)
    m_old = tl.load(m + i, mask=inside, other=0.0)
    v_old = tl.load(v + i, mask=inside, other=0.0)
    g += weight_decay * old
    m_new = m_old + (g - m_old) * (1 - beta1)
    v_new = v_old * beta2 + (g * g) * (1 - beta2)
    new = old - step_size * (m_new / (tl.sqrt_rn(v_new) * root_scale + eps))
    tl.store(m + i, tl.where(keep, m_new, 0.0), mask=inside)
    tl.store(v + i, tl.where(keep, v_new, 0.0), mask=inside)
    tl.store(values + i, tl.where(keep, new, 0.0).to(values.dtype.element_ty), mask=inside)


@triton.jit
def sgd_kernel(
    values, gradient, buffer, words, n, lr, momentum, dampening, weight_decay,
    WORDS: tl.constexpr, MASKED: tl.constexpr, MOMENTUM: tl.constexpr, FIRST: tl.constexpr, NESTEROV: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * WORDS
    i = first * 32 + tl.arange(0, WORDS)[:, None] * 32 + tl.arange(0, 32)[None, :]  # [WORDS, 32]
    inside = i < n
    keep = _kept(words, first, (n + 31) // 32, WORDS, MASKED)
    old = tl.load(values + i, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gradient + i, mask=inside, other=0.0).to(tl.float32)
    g += weight_decay * old
    if MOMENTUM:
        if FIRST:  # noqa: SIM108  a branch at compile time
            velocity = g
        else:
            velocity = momentum * tl.load(buffer + i, mask=inside, other=0.0) + (1 - dampening) * g
        tl.store(buffer + i, tl.where(keep, velocity, 0.0), mask=inside)
        g = g + momentum * velocity if NESTEROV else velocity
    tl.store(values + i, tl.where(keep, old - lr * g, 0.0).to(values.dtype.element_ty), mask=inside)


def _grid(n: int, words: int) -> tuple[int]:
    return (triton.cdiv(n, 32 * words),)


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
    words: Tensor | None = None,
) -> None:
    """See ``lipfast.ops.adam_step``. With ``words`` (`pack_mask`) buffers are dense; the dead stay 0."""
    if (n := values.numel()) == 0:
        return
    config = CONFIGS["adam"]
    adam_kernel[_grid(n, config["meta"]["WORDS"])](
        values, gradient, m, v, m if words is None else words, n,
        lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, beta1, beta2, eps, weight_decay,
        MASKED=words is not None, **config["meta"], num_warps=config["warps"],
    )  # fmt: skip


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
    words: Tensor | None = None,
) -> None:
    """See ``lipfast.ops.sgd_step``. With ``words`` (`pack_mask`) buffers are dense; the dead stay 0."""
    if (n := values.numel()) == 0:
        return
    config = CONFIGS["sgd"]
    sgd_kernel[_grid(n, config["meta"]["WORDS"])](
        values, gradient, momentum_buffer, momentum_buffer if words is None else words, n,
        lr, momentum, dampening, weight_decay,
        MASKED=words is not None, MOMENTUM=momentum != 0, FIRST=step == 1, NESTEROV=nesterov,
        **config["meta"], num_warps=config["warps"],
    )  # fmt: skip
