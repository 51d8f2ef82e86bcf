"""Prune, rewind and pack; kept weights in and out of packed vectors."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipfast.ops.reference import FlatPruning
from lipfast.ops.triton.configs import CONFIGS
from lipfast.ops.triton.mask import pack_mask
from lipfast.ops.triton.select import prune_smallest


@triton.jit
def _slots(alive, through, n, BLOCK: tl.constexpr):
    """Elements of this block, which of them live, and where the living ones go in the packed vector.

    ``through[block]``: living elements up to and with this block.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    living = tl.load(alive + i, mask=i < n, other=0).to(tl.int32)
    before = tl.load(through + tl.program_id(0)) - tl.sum(living, axis=0)
    return i, living != 0, before + tl.cumsum(living, axis=0) - 1


@triton.jit
def compact_kernel(alive, start, through, dense, values, n, BLOCK: tl.constexpr, DENSE: tl.constexpr):
    i, living, slot = _slots(alive, through, n, BLOCK)
    value = tl.load(start + i, mask=i < n, other=0.0)
    if DENSE:
        tl.store(dense + i, tl.where(living, value, 0.0), mask=i < n)
    tl.store(values + slot, value, mask=living)


@triton.jit
def expand_kernel(alive, values, through, dense, n, BLOCK: tl.constexpr):
    i, living, slot = _slots(alive, through, n, BLOCK)
    tl.store(dense + i, tl.load(values + slot, mask=living, other=0.0), mask=i < n)


def _count_through(alive: Tensor, block: int) -> Tensor:
    """``(blocks,)`` int32: living elements up to and with each block of a flat mask."""
    padded = torch.nn.functional.pad(alive, (0, -alive.numel() % block))
    return padded.view(-1, block).sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _compact(alive: Tensor, start: Tensor, dense: Tensor | None) -> Tensor:
    """The living elements of ``start``; waits for the device once, to learn how many there are."""
    if alive.numel() == 0:
        return torch.empty_like(start)
    config = CONFIGS["compact"]
    through = _count_through(alive, config["meta"]["BLOCK"])
    values = torch.empty(int(through[-1]), dtype=start.dtype, device=start.device)
    compact_kernel[(len(through),)](
        alive.view(torch.uint8), start, through, start if dense is None else dense, values, alive.numel(),
        DENSE=dense is not None, **config["meta"], num_warps=config["warps"],
    )  # fmt: skip
    return values


def gather_kept(dense: Tensor, mask: Tensor) -> Tensor:
    """See ``lipfast.ops.gather_kept``."""
    return _compact(mask.reshape(-1), dense.reshape(-1), None)


def scatter_kept(values: Tensor, mask: Tensor) -> Tensor:
    """See ``lipfast.ops.scatter_kept``."""
    flat = mask.reshape(-1)
    dense = torch.empty(flat.numel(), dtype=values.dtype, device=values.device)
    if flat.numel():
        config = CONFIGS["expand"]
        through = _count_through(flat, config["meta"]["BLOCK"])
        expand_kernel[(len(through),)](
            flat.view(torch.uint8), values, through, dense, flat.numel(), **config["meta"], num_warps=config["warps"]
        )
    return dense.view(mask.shape)


def rewind_pack(alive: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """``start`` with dead elements 0 ``(n,)``, and its living elements packed ``(kept,)``; both inputs flat."""
    dense = torch.empty_like(start)
    return dense, _compact(alive, start, dense)


class _Pruning(FlatPruning):
    """A `lipfast.ops.select.PruningRound` on the GPU: one selection and one rewind over all tensors together."""

    def rewind(self, start: Sequence[Tensor], into: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        masks = self.masks()
        if not masks:
            return [], [], torch.empty(0)
        alive = torch.cat([mask.reshape(-1) for mask in masks])
        dense, values = rewind_pack(alive, torch.cat([first.reshape(-1) for first in start]))
        pieces = torch.split(dense, [mask.numel() for mask in masks])
        for target, piece in zip(into, pieces, strict=True):
            target.copy_(piece.view(target.shape))
        return masks, [_pack_bits(mask) for mask in masks], values


def _pack_bits(mask: Tensor) -> Tensor:
    """Eight weights to a byte, as the seam packs them: the words of `pack_mask`, low byte first."""
    return pack_mask(mask.contiguous()).view(torch.uint8)[: -(-mask.numel() // 8)]


def begin_pruning(weights: Sequence[Tensor], alive: Sequence[Tensor], count: int) -> _Pruning:
    """See ``lipfast.ops.select.PruningRound``."""
    return _Pruning(prune_smallest, weights, alive, count)
