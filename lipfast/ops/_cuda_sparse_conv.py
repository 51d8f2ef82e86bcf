"""Weight-sparse convolution in terms of the CUDA library: which geometry serves which direction, and its padding."""

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lipfast.ops import _padding
from lipfast.ops._autograd import version_of
from lipfast.ops._cuda_library import DOUBLE, HALF, POINT, SAME, Library, Lists, build_lists, convolve, weight_gradient

_GEOMETRY = {((1, 1), 1): POINT, ((3, 3), 1): SAME, ((3, 3), 2): HALF}


def fits(x: Tensor, shape: torch.Size, stride: tuple[int, int], padding: tuple[int, int]) -> bool:
    """Whether the library has a kernel for float32 maps and weights of ``shape``."""
    square = stride[0] == stride[1] and padding[0] == padding[1]
    known = square and ((shape[2], shape[3]), stride[0]) in _GEOMETRY
    return known and x.dtype == torch.float32 and padding[0] < shape[2]


class Kernels:
    """The three directions of a layer. Weight lists are kept for as long as the caller keeps ``positions`` alive."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._lists: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def forward(
        self,
        x: Tensor,
        values: Tensor,
        positions: Tensor,
        shape: torch.Size,
        bias: Tensor | None,
        stride: int,
        padding: int,
        padding_mode: str,
    ) -> Tensor:
        lists = self._lists_of(positions, shape, stride, transposed=False)
        rows, columns = ((size + 2 * padding - shape[2]) // stride + 1 for size in x.shape[2:])
        y = torch.empty(len(x), shape[0], rows, columns, device=x.device)
        convolve(self._library, x.contiguous(), values, bias, lists, y, pad=padding, padding_mode=padding_mode)
        return _padding.in_layout_of(x, y)

    def input_gradient(
        self,
        dy: Tensor,
        values: Tensor,
        positions: Tensor,
        shape: torch.Size,
        input_size: torch.Size,
        stride: int,
        padding: int,
        padding_mode: str,
    ) -> Tensor:
        lists = self._lists_of(positions, shape, stride, transposed=True)
        # Zero padding has no gradient, so those pixels are not computed; other modes fold theirs back.
        cut = padding if padding_mode == "zeros" else 0
        margin = padding - cut
        rows, columns = (size + 2 * margin for size in input_size[2:])
        dx = torch.empty(len(dy), shape[1], rows, columns, device=dy.device)
        if stride == 1:
            convolve(self._library, dy.contiguous(), values, None, lists, dx, pad=shape[2] - 1 - cut)
        else:
            convolve(self._library, dy.contiguous(), values, None, lists, dx, pad=1, output_offset=cut)
        return _padding.in_layout_of(dy, _padding.fold(dx, input_size, (margin, margin), padding_mode))

    def weight_gradient(
        self, x: Tensor, dy: Tensor, positions: Tensor, shape: torch.Size, stride: int, padding: int, padding_mode: str
    ) -> Tensor:
        lists = self._lists_of(positions, shape, stride, transposed=False)
        return weight_gradient(
            self._library, x.contiguous(), dy.contiguous(), lists, pad=padding, padding_mode=padding_mode
        )

    def _lists_of(self, positions: Tensor, shape: torch.Size, stride: int, *, transposed: bool) -> Lists:
        geometry = _GEOMETRY[(shape[2], shape[3]), stride]
        if transposed and geometry == HALF:
            geometry = DOUBLE
        known = self._lists.setdefault(positions, {})  # type: ignore[no-untyped-call]
        key = (geometry, transposed, version_of(positions), *shape)
        if key not in known:
            known[key] = build_lists(self._library, geometry, positions, shape, transposed=transposed)
        lists: Lists = known[key]
        return lists
