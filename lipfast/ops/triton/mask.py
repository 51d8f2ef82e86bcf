"""Packed masks: bit ``i % 32`` of int32 word ``i // 32`` says whether element ``i`` lives."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipfast.ops.triton.configs import CONFIGS


@triton.jit
def pack_mask_kernel(alive, words, n, WORDS: tl.constexpr):
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    bit = tl.arange(0, 32)
    i = word[:, None] * 32 + bit[None, :]  # [WORDS, 32]
    living = tl.load(alive + i, mask=i < n, other=0).to(tl.int32)
    tl.store(words + word, tl.sum(living << bit[None, :], axis=1), mask=word * 32 < n)


@triton.jit
def apply_mask_kernel(x, words, y, n, WORDS: tl.constexpr):
    """Grid: (word blocks of a row, rows); n elements a row."""
    row = tl.program_id(1).to(tl.int64)
    x, y, words = x + row * n, y + row * n, words + row * ((n + 31) // 32)
    index = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    bit = tl.arange(0, 32)
    i = index[:, None] * 32 + bit[None, :]  # [WORDS, 32]
    word = tl.load(words + index, mask=index * 32 < n, other=0)
    keep = ((word[:, None] >> bit[None, :]) & 1) != 0
    value = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(y + i, tl.where(keep, value, 0.0), mask=i < n)


def ones_and_zeros(mask: Tensor) -> Tensor:
    """A bool tensor in bytes that kernels may add up; torch takes any byte but 0 for True."""
    return mask.view(torch.uint8) != 0


def pack_mask(alive: Tensor) -> Tensor:
    """``(ceil(n / 32),)`` int32 words of a contiguous bool tensor with n elements, 0 or 1, in memory order."""
    n = alive.numel()
    words = torch.empty(triton.cdiv(n, 32), dtype=torch.int32, device=alive.device)
    if n:
        config = CONFIGS["pack_mask"]
        pack_mask_kernel[(triton.cdiv(len(words), config["meta"]["WORDS"]),)](
            alive.view(torch.uint8), words, n, **config["meta"], num_warps=config["warps"]
        )
    return words


def apply_mask(x: Tensor, words: Tensor) -> Tensor:
    """See ``lipfast.ops.apply_mask``."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        config = CONFIGS["apply_mask"]
        apply_mask_kernel[(triton.cdiv(words.shape[1], config["meta"]["WORDS"]), len(x))](
            x, words, y, x[0].numel(), **config["meta"], num_warps=config["warps"]
        )
    return y
