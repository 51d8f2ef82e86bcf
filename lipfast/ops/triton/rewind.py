"""Prune, rewind and pack; kept weights in and out of packed vectors."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipfast.ops.triton.configs import CONFIGS
from lipfast.ops.triton.mask import ones_and_zeros, pack_mask
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


def _compact(alive: Tensor, start: Tensor, dense: Tensor | None, kept: int | None = None) -> Tensor:
    """The living elements of ``start``; if ``kept`` does not say how many there are, waits for the device to tell."""
    if alive.numel() == 0:
        return torch.empty_like(start)
    config = CONFIGS["compact"]
    through = _count_through(alive, config["meta"]["BLOCK"])
    kept = int(through[-1]) if kept is None else kept
    values = torch.empty(kept, dtype=start.dtype, device=start.device)
    compact_kernel[(len(through),)](
        alive.view(torch.uint8), start, through, start if dense is None else dense, values, alive.numel(),
        DENSE=dense is not None, **config["meta"], num_warps=config["warps"],
    )  # fmt: skip
    return values


def gather_kept(dense: Tensor, mask: Tensor) -> Tensor:
    """See ``lipfast.ops.gather_kept``."""
    return _compact(ones_and_zeros(mask).reshape(-1), dense.reshape(-1), None)


def scatter_kept(values: Tensor, mask: Tensor) -> Tensor:
    """See ``lipfast.ops.scatter_kept``."""
    flat = ones_and_zeros(mask).reshape(-1)
    dense = torch.empty(flat.numel(), dtype=values.dtype, device=values.device)
    if flat.numel():
        config = CONFIGS["expand"]
        through = _count_through(flat, config["meta"]["BLOCK"])
        expand_kernel[(len(through),)](
            flat.view(torch.uint8), values, through, dense, flat.numel(), **config["meta"], num_warps=config["warps"]
        )
    return dense.view(mask.shape)


def rewind_pack(alive: Tensor, start: Tensor, kept: int | None = None) -> tuple[Tensor, Tensor]:
    """``start`` with dead elements 0 ``(n,)``, and its living elements packed ``(kept,)``; both inputs flat."""
    dense = torch.empty_like(start)
    return dense, _compact(alive, start, dense, kept)


class _Pruning:
    """A `lipfast.ops.select.PruningRound` on the GPU: one selection and one rewind over all tensors together.

    Waits for the device once, for what it must answer before anything is written. There is at least one tensor: none is
    on no GPU.
    """

    def __init__(self, weights: Sequence[Tensor], alive: Sequence[Tensor], count: int) -> None:
        self._shapes, self._count = [mask.shape for mask in alive], count
        self._magnitude, self._alive = _flat(weights).abs(), ones_and_zeros(_flat(alive))
        nan = self._magnitude.isnan() & self._alive
        counts: list[int] = torch.stack((self._alive.sum(), nan.sum())).tolist()
        self.living, found = counts
        self.nan_part = [bool(part.any()) for part in self._split(nan)].index(True) if found else -1

    def masks(self) -> list[Tensor]:
        """The survivors of each tensor."""
        return self._shaped(self._survivors())

    def rewind(self, start: Sequence[Tensor], into: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Survivors, survivors as bits, and the packed start values; writes the rewound weights to ``into``."""
        alive = self._survivors()
        dense, values = rewind_pack(alive, _flat(start), self.living - self._count)
        torch._foreach_copy_(list(into), self._shaped(dense))
        return self._shaped(alive), self._bits(alive), values

    def _survivors(self) -> Tensor:
        return prune_smallest(self._magnitude, self._alive, self._count)

    def _shaped(self, whole: Tensor) -> list[Tensor]:
        return [part.view(shape) for part, shape in zip(self._split(whole), self._shapes, strict=True)]

    def _split(self, whole: Tensor) -> Sequence[Tensor]:
        return torch.split(whole, [shape.numel() for shape in self._shapes])

    def _bits(self, alive: Tensor) -> list[Tensor]:
        """Eight weights to a byte, as the seam packs them: the words of `pack_mask`, low byte first."""
        parts = [
            torch.nn.functional.pad(part, (0, -len(part) % 32)) if len(part) % 32 else part
            for part in self._split(alive)
        ]
        words = torch.split(pack_mask(_flat(parts)), [len(part) // 32 for part in parts])
        sizes = (shape.numel() for shape in self._shapes)
        return [word.view(torch.uint8)[: -(-size // 8)] for word, size in zip(words, sizes, strict=True)]


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def begin_pruning(weights: Sequence[Tensor], alive: Sequence[Tensor], count: int) -> _Pruning:
    """See ``lipfast.ops.select.PruningRound``."""
    return _Pruning(weights, alive, count)
