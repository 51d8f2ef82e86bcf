"""Exact selection of the smallest living magnitudes by histogram passes over the float bits; no sort, no atomics.

A non-negative float orders as its bits do. Four passes of eight bits each find the bits of the last magnitude to die
and how many of its ties die with it; a scan hands those out by index.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipfast.ops.triton.configs import CONFIGS

DIGIT_BITS = 8
BINS = 1 << DIGIT_BITS


@triton.jit
def _candidates(magnitude, alive, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(magnitude + i, mask=i < n, other=0.0).to(tl.int32, bitcast=True)
    living = tl.load(alive + i, mask=i < n, other=0) != 0
    return i, bits, living & (i < n)


@triton.jit
def histogram_kernel(magnitude, alive, state, counts, n, SHIFT: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """counts[block, digit]: candidates whose higher digits are those chosen so far (``state[0]``)."""
    _, bits, living = _candidates(magnitude, alive, n, BLOCK)
    chosen = tl.load(state)
    if SHIFT < 24:
        living &= (bits >> (SHIFT + 8)) == (chosen >> (SHIFT + 8))
    digit = (bits >> SHIFT) & (BINS - 1)
    found = tl.histogram(digit, BINS, mask=living)
    tl.store(counts + tl.program_id(0) * BINS + tl.arange(0, BINS), found)


@triton.jit
def choose_kernel(counts, state, n_blocks, SHIFT: tl.constexpr, BINS: tl.constexpr, BLOCKS: tl.constexpr):
    """One program: find the digit in which the last removal falls; state = (chosen bits, removals left inside)."""
    digit = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    for first in range(0, n_blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        part = tl.load(counts + block[:, None] * BINS + digit[None, :], mask=block[:, None] < n_blocks, other=0)
        total += tl.sum(part, axis=0)
    left = tl.load(state + 1)
    through = tl.cumsum(total, axis=0)
    below = through - total
    here = (below < left) & (left <= through)  # exactly one digit, as 1 <= left <= candidates
    tl.store(state, tl.load(state) | (tl.sum(tl.where(here, digit, 0), axis=0) << SHIFT))
    tl.store(state + 1, left - tl.sum(tl.where(here, below, 0), axis=0))


@triton.jit
def count_kernel(magnitude, alive, state, counts, n, BLOCK: tl.constexpr):
    """counts[block]: living ties with the chosen magnitude."""
    _, bits, living = _candidates(magnitude, alive, n, BLOCK)
    tie = living & (bits == tl.load(state))
    tl.store(counts + tl.program_id(0), tl.sum(tie.to(tl.int32), axis=0))


@triton.jit
def remove_kernel(magnitude, alive, state, through, survivors, n, BLOCK: tl.constexpr):
    """``through[block]``: ties up to and with this block. The first ``state[1]`` ties die, as does all below."""
    i, bits, living = _candidates(magnitude, alive, n, BLOCK)
    chosen = tl.load(state)
    left = tl.load(state + 1)
    tie = (living & (bits == chosen)).to(tl.int32)
    before = tl.load(through + tl.program_id(0)) - tl.sum(tie, axis=0)
    rank = before + tl.cumsum(tie, axis=0)  # from 1
    dies = (bits < chosen) | ((tie != 0) & (rank <= left))
    tl.store(survivors + i, (living & ~dies).to(tl.uint8), mask=i < n)


def prune_smallest(magnitude: Tensor, alive: Tensor, count: int) -> Tensor:
    """See ``lipfast.ops.prune_smallest``; here for one flat tensor. Never waits for the device."""
    n = magnitude.numel()
    if n == 0 or count == 0:
        return alive.clone()
    block = CONFIGS["histogram"]["meta"]["BLOCK"]
    grid = (triton.cdiv(n, block),)
    living = alive.view(torch.uint8)
    state = torch.zeros(2, dtype=torch.int32, device=magnitude.device)
    state[1] = count
    counts = torch.empty(grid[0], BINS, dtype=torch.int32, device=magnitude.device)
    for shift in range(32 - DIGIT_BITS, -1, -DIGIT_BITS):
        histogram_kernel[grid](
            magnitude, living, state, counts, n, SHIFT=shift, BINS=BINS, **CONFIGS["histogram"]["meta"]
        )
        choose_kernel[(1,)](counts, state, grid[0], SHIFT=shift, **CONFIGS["choose"]["meta"])
    ties = torch.empty(grid[0], dtype=torch.int32, device=magnitude.device)
    count_kernel[grid](magnitude, living, state, ties, n, **CONFIGS["count"]["meta"])
    survivors = torch.empty_like(living)
    through = ties.cumsum(0, dtype=torch.int32)
    remove_kernel[grid](magnitude, living, state, through, survivors, n, **CONFIGS["remove"]["meta"])
    return survivors.view(torch.bool)
