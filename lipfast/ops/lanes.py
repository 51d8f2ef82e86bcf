"""Maps in the lane layout: SIMD lane l holds sub-image l (drawing in ``csrc/cpu/lanes.h`` and ``docs/lanes.md``)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import lipfast._C as _C
from lipfast.errors import InputError
from lipfast.ops._autograd import note_writes, refuse_tangents
from lipfast.ops._checks import check_padding
from lipfast.ops._once import differentiable_once

GRID = 4  # blocks along each side of a picture
LANES = GRID * GRID
PADDING_MODES = {"zeros": 0, "reflect": 1, "replicate": 2, "circular": 3}


def empty(*shape: int, zeroed: bool = True) -> Tensor:
    """float32 memory in large pages, 64-byte aligned; shape as for ``torch.empty``. Dropped memory is used again, so
    without ``zeroed`` it holds any numbers."""
    count = 1
    for side in shape:
        count *= side
    if 4 * count >= 1 << 63:
        raise InputError(f"a map of {shape} floats is larger than any memory")
    if count == 0:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    return torch.frombuffer(_C.Arena(4 * count, zeroed), dtype=torch.float32).view(shape)


def plane_vectors(vectors: int) -> int:
    """How far apart, in vectors, planes of so many vectors are laid.

    Planes a multiple of 16 cache lines apart share a few cache sets, so that the channels of one tile evict each other;
    nine lines more, which is a tile's width and one, spread them.
    """
    return vectors + 9 if vectors >= 64 and vectors % 16 == 0 else vectors


def with_lines(x: Tensor) -> Tensor:
    """A tensor, 4-D or (pixels, channels), whose rows or pixels are contiguous: a copy of others (expanded gradients,
    say), which the kernels would convert number by number."""
    return x if 1 in (x.stride(1), x.stride(-1)) else x.contiguous()


@dataclass(frozen=True)
class LaneMap:
    """A batch of feature maps in lanes.

    Gradients of ``data`` are those of the pixels: what a halo repeats counts through the layer that reads it.

    Attributes:
        data: ``(batch, channels, block_h + 2 halo, block_w + 2 halo, 16)`` float32 on the CPU, 64-byte aligned vectors;
            a slice of another map's channels is fine.
        height, width: pixels of a picture; at most four blocks a side.
        halo: vectors around each block, filled by `fill_halo`.
    """

    data: Tensor
    height: int
    width: int
    halo: int

    @classmethod
    def allocate(
        cls,
        batch: int,
        channels: int,
        height: int,
        width: int,
        halo: int = 0,
        block: tuple[int, int] | None = None,
        *,
        zeroed: bool = True,
    ) -> "LaneMap":
        """A map of zeros, or of any numbers for who writes all of it; ``block`` gives a block's pixels where a
        neighbour's stride asks for more than a quarter."""
        block_h, block_w = block or (-(-height // GRID), -(-width // GRID))
        if min(batch, channels, halo) < 0 or min(height, width) < 1:
            raise InputError(
                f"LaneMap: {batch} pictures of {channels} channels, {height} x {width} pixels with halo {halo}: "
                "batch, channels and halo are at least 0 and sides at least 1"
            )
        if GRID * block_h < height or GRID * block_w < width:
            raise InputError(f"LaneMap: {height} x {width} pixels do not fit blocks of {block_h} x {block_w}")
        rows, columns = block_h + 2 * halo, block_w + 2 * halo
        plane = plane_vectors(rows * columns)
        planes = empty(batch, channels, plane, LANES, zeroed=zeroed)[:, :, : rows * columns]
        return cls(planes.view(batch, channels, rows, columns, LANES), height, width, halo)

    @classmethod
    def from_tensor(
        cls, x: Tensor, halo: int = 0, padding_mode: str = "zeros", pad: int = 0, block: tuple[int, int] | None = None
    ) -> "LaneMap":
        """Convert ``(batch, channels, height, width)`` float32 (any strides) and fill the halo when ``halo > 0``.

        Differentiable once.

        Raises:
            InputError: not a 4-D float32 CPU tensor, or a picture smaller than its padding.
        """
        if x.dim() != 4 or x.dtype != torch.float32 or x.device.type != "cpu":
            raise InputError(
                f"LaneMap.from_tensor: expected 4-D float32 on cpu, got {x.dim()}-D {x.dtype} on {x.device}"
            )
        batch, channels, height, width = x.shape
        _check_border(height, width, halo, padding_mode, pad)
        refuse_tangents("LaneMap.from_tensor", x)
        lanes = cls.allocate(batch, channels, height, width, halo, block, zeroed=False)
        if x.numel():
            _C.lanes_from_plain(with_lines(x.detach()).numpy(), lanes.data.numpy(), halo, torch.get_num_threads())
            if halo or lanes.has_dead_pixels:
                lanes.fill_halo(padding_mode, pad)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return lanes
        return cls(_Converted.apply(x, lanes), height, width, halo)  # type: ignore[no-untyped-call]

    @property
    def has_dead_pixels(self) -> bool:
        """True where the blocks cover more than the picture."""
        rows, columns = self.block
        return GRID * rows != self.height or GRID * columns != self.width

    def to_tensor(self, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        """The ordinary ``(batch, channels, height, width)`` tensor, NCHW or channels_last. Differentiable once."""
        refuse_tangents("LaneMap.to_tensor", self.data)
        shape = (*self.data.shape[:2], self.height, self.width)
        out = torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=memory_format)
        if out.numel():
            _C.lanes_to_plain(self.data.detach().numpy(), out.numpy(), self.halo, torch.get_num_threads())
        if not (torch.is_grad_enabled() and self.data.requires_grad):
            return out
        converted: Tensor = _ConvertedBack.apply(self.data, self, out)  # type: ignore[no-untyped-call]
        return converted

    def fill_halo(self, mode: str = "zeros", pad: int = 0) -> None:
        """Write halo and dead pixels: ``pad`` pixels of padding around the picture, zeros farther out."""
        _check_border(self.height, self.width, self.halo, mode, pad)
        data = self.data.detach()
        _C.fill_halo(
            data.numpy(), self.height, self.width, self.halo, PADDING_MODES[mode], pad, torch.get_num_threads()
        )
        note_writes(data)

    @property
    def block(self) -> tuple[int, int]:
        """Pixels of a block."""
        return self.data.shape[2] - 2 * self.halo, self.data.shape[3] - 2 * self.halo

    def copy_pixels(self, source: "LaneMap") -> None:
        """Take the pixels of a map of equal size, whatever its blocks and halo; the halo is left as it is."""
        _C.copy_pixels(
            *(source.data.detach().numpy(), source.halo, self.data.detach().numpy(), self.halo),
            *(self.height, self.width, torch.get_num_threads()),
        )
        note_writes(self.data)


class _Converted(torch.autograd.Function):
    """A map that was made of a tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lanes: LaneMap) -> Tensor:
        ctx.like = lanes.height, lanes.width, lanes.halo
        return lanes.data

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return LaneMap(aligned(gradient), *ctx.like).to_tensor(), None


class _ConvertedBack(torch.autograd.Function):
    """A tensor that was made of a map."""

    @staticmethod
    def forward(ctx: Any, data: Tensor, lanes: LaneMap, plain: Tensor) -> Tensor:
        ctx.halo, ctx.block = lanes.halo, lanes.block
        return plain

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return LaneMap.from_tensor(gradient, ctx.halo, block=ctx.block).data, None, None


def aligned(data: Tensor) -> Tensor:
    """``data`` of a map as kernels take it, in whole lines; a copy of other tensors (expanded gradients, say)."""
    *far, step, one = data.stride()
    suits = (step, one) == (LANES, 1) and not any(stride % LANES for stride in far) and data.data_ptr() % 64 == 0
    return data if suits else data.contiguous()


def _check_border(height: int, width: int, halo: int, mode: str, pad: int) -> None:
    if not 0 <= pad <= halo:
        raise InputError(f"LaneMap: {pad} pixels of padding do not fit a halo of {halo}")
    check_padding("LaneMap", (height, width), (pad, pad), mode)
