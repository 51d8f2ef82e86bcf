"""Weight-sparse convolution in terms of the CUDA library: which form serves which direction, and its padding."""

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lipfast.ops import _padding
from lipfast.ops._autograd import version_of
from lipfast.ops._checks import check_positions
from lipfast.ops._cuda_library import (
    CONVOLUTION,
    LANES,
    WEIGHT_GRADIENT,
    Form,
    Library,
    Lists,
    build_lists,
    convolve,
    pick_size,
    weight_gradient,
)

Pair = tuple[int, int]  # rows, columns


def fits(library: Library, x: Tensor, shape: torch.Size, stride: Pair, padding: Pair) -> bool:
    """Whether the library has kernels for float32 maps and weights of ``shape``: strides 1 and 2."""
    if x.dtype != torch.float32 or not {*stride} <= {1, 2} or padding[0] >= shape[2] or padding[1] >= shape[3]:
        return False
    forward, back = (Form.of(shape, stride, transposed=transposed) for transposed in (False, True))
    widest = library.facts(CONVOLUTION, 0).pitch - LANES
    roomy = all(
        library.sizes(kernel, form)
        for kernel, form in ((CONVOLUTION, forward), (CONVOLUTION, back), (WEIGHT_GRADIENT, forward))
    )
    return roomy and forward.halo[1] <= widest


class Kernels:
    """The three directions of a layer. Weight lists are kept for as long as the caller keeps ``positions`` alive."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self._lists: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def forward(
        self,
        x: Tensor,
        values: Tensor,
        positions: Tensor,
        shape: torch.Size,
        bias: Tensor | None,
        stride: Pair,
        padding: Pair,
        padding_mode: str,
    ) -> Tensor:
        size = [(x.shape[2 + i] + 2 * padding[i] - shape[2 + i]) // stride[i] + 1 for i in (0, 1)]
        y = torch.empty(len(x), shape[0], *size, dtype=torch.float32, device=x.device)
        lists = self._lists_of(positions, shape, stride, CONVOLUTION, y, padding[1])
        convolve(self.library, x.contiguous(), values, bias, lists, y, pad=padding, padding_mode=padding_mode)
        return _padding.in_layout_of(x, y)

    def input_gradient(
        self,
        dy: Tensor,
        values: Tensor,
        positions: Tensor,
        shape: torch.Size,
        input_size: torch.Size,
        stride: Pair,
        padding: Pair,
        padding_mode: str,
    ) -> Tensor:
        # Zero padding has no gradient, so those pixels are not computed; other modes fold theirs back.
        cut = padding if padding_mode == "zeros" else (0, 0)
        margin = (padding[0] - cut[0], padding[1] - cut[1])
        rows, columns = (size + 2 * m for size, m in zip(input_size[2:], margin, strict=True))
        dx = torch.empty(len(dy), shape[1], rows, columns, dtype=torch.float32, device=dy.device)
        # A window ends at its pixel. Whole steps of the stride are cut off by where windows begin.
        taps = Form.of(shape, stride, transposed=True).taps
        pad = (taps[0] - 1 - cut[0] // stride[0], taps[1] - 1 - cut[1] // stride[1])
        rest = (cut[0] % stride[0], cut[1] % stride[1])
        lists = self._lists_of(positions, shape, stride, CONVOLUTION, dx, pad[1], cut=rest, transposed=True)
        convolve(self.library, dy.contiguous(), values, None, lists, dx, pad=pad, cut=rest)
        return _padding.in_layout_of(dy, _padding.fold(dx, input_size, margin, padding_mode))

    def weight_gradient(
        self,
        x: Tensor,
        dy: Tensor,
        positions: Tensor,
        shape: torch.Size,
        stride: Pair,
        padding: Pair,
        padding_mode: str,
    ) -> Tensor:
        lists = self._lists_of(positions, shape, stride, WEIGHT_GRADIENT, dy, padding[1])
        x, dy, kept = x.contiguous(), dy.contiguous(), len(positions)
        return weight_gradient(self.library, x, dy, kept, lists, pad=padding, padding_mode=padding_mode)

    def _lists_of(
        self,
        positions: Tensor,
        shape: torch.Size,
        stride: Pair,
        kernel: int,
        y: Tensor,
        pad_left: int,
        *,
        cut: Pair = (0, 0),
        transposed: bool = False,
    ) -> Lists:
        form = Form.of(shape, stride, transposed=transposed)
        scale = form.scale
        plane = [-(-(y.shape[2 + i] + cut[i]) // scale[i]) for i in (0, 1)]
        size = pick_size(self.library, kernel, form, y.shape[1] * scale[0] * scale[1], plane, len(y))
        known = self._lists.setdefault(positions, {})  # type: ignore[no-untyped-call]
        key = (kernel, size, pad_left, transposed, version_of(positions), *stride, *shape)
        if key not in known:
            check_positions(positions, shape.numel())
            known[key] = build_lists(
                self.library, kernel, size, positions, shape, stride, pad_left=pad_left, transposed=transposed
            )
        lists: Lists = known[key]
        return lists
