"""What the CUDA sparse convolution must compute, as test bodies for the emulator and for a real GPU.

    python tests/gpu/sparse_conv_cases.py LIBRARY [DEVICE]

checks every layer and exits with 1 if one is wrong; the sanitizer and mutation tests run it in a process of its own,
and ``compute-sanitizer`` can on a GPU.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from lipfast.ops import _cuda_library, _cuda_sparse_conv, reference
from lipfast.ops._cuda_library import SIZES
from lipfast.ops._cuda_sparse_conv import Kernels, fits


@dataclass(frozen=True)
class Layer:
    size: tuple[int, int, int, int]  # input: batch, channels, rows, columns
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    mode: str
    density: float


LAYERS = [
    Layer((2, 5, 17, 19), 9, (3, 3), (1, 1), (1, 1), "zeros", 0.3),
    Layer(
        (1, 9, 20, 36), 17, (3, 3), (1, 1), (1, 1), "reflect", 0.2
    ),  # more than one tile each way, columns on 16 bytes
    Layer(
        (1, 5, 16, 32), 70, (3, 3), (1, 1), (1, 1), "reflect", 0.9
    ),  # long lists; exactly four large tiles; two groups
    Layer((1, 130, 5, 12), 3, (3, 3), (1, 1), (1, 1), "zeros", 0.1),  # more stages than buffers, the last not full
    Layer((2, 9, 9, 7), 33, (1, 1), (1, 1), (0, 0), "zeros", 0.4),
    Layer((2, 5, 17, 19), 9, (3, 3), (2, 2), (1, 1), "zeros", 0.3),
    Layer((1, 3, 34, 18), 9, (3, 3), (2, 2), (1, 1), "reflect", 0.3),
    Layer((1, 40, 6, 8), 5, (3, 3), (2, 2), (1, 1), "zeros", 0.3),
    Layer((1, 3, 5, 6), 3, (3, 3), (2, 2), (0, 0), "zeros", 0.5),
    Layer((1, 3, 5, 6), 3, (3, 3), (1, 1), (0, 0), "zeros", 0.5),
    Layer((1, 3, 6, 6), 3, (3, 3), (1, 1), (1, 1), "circular", 1.0),
    Layer((1, 3, 6, 5), 3, (3, 3), (1, 1), (2, 2), "replicate", 0.5),
    Layer((1, 3, 9, 8), 4, (5, 5), (1, 1), (2, 2), "reflect", 0.3),
    Layer((1, 2, 11, 12), 4, (7, 7), (2, 2), (3, 3), "zeros", 0.3),
    Layer((1, 3, 9, 8), 4, (3, 2), (2, 1), (1, 0), "zeros", 0.5),
    Layer((1, 3, 4, 40), 4, (1, 7), (1, 1), (0, 3), "circular", 0.5),
    Layer((1, 1, 258, 3), 2, (3, 3), (1, 1), (1, 1), "zeros", 0.5),  # weight gradient: several tiles for a block
    Layer((1, 8, 6, 6), 32, (3, 3), (1, 1), (1, 1), "zeros", 1.0),
    Layer((1, 2, 8, 8), 3, (3, 3), (1, 1), (1, 1), "zeros", 0.0),  # nothing kept
    Layer((1, 1, 1, 1), 1, (1, 1), (1, 1), (0, 0), "zeros", 1.0),
]


def check(library: _cuda_library.Library, layer: Layer, size: str, device: str) -> None:
    """Compare forward and both gradients at one tile size with the reference; raises AssertionError."""
    torch.manual_seed(0)
    shape = torch.Size((layer.outputs, layer.size[1], *layer.kernel))
    positions = (torch.rand(shape.numel()) < layer.density).nonzero().squeeze(1)
    values, bias, x = torch.randn(len(positions)), torch.randn(layer.outputs), torch.randn(layer.size)
    layout = (layer.stride, layer.padding, layer.mode)
    y = reference.sparse_conv2d_forward(x, values, positions, shape, bias, *layout)
    dy = torch.randn_like(y)
    dx = reference.sparse_conv2d_input_gradient(dy, values, positions, shape, x.shape, *layout)
    gradient = reference.sparse_conv2d_weight_gradient(x, dy, positions, shape, *layout)

    on = [part.to(device) for part in (x, dy, values, positions, bias)]
    kernels, taps = Kernels(library), shape[2] * shape[3]
    assert fits(library, on[0], shape, layer.stride, layer.padding)
    with mock.patch.object(_cuda_sparse_conv, "pick_size", _largest_from(SIZES.index(size))):
        same(kernels.forward(on[0], on[2], on[3], shape, on[4], *layout), y, terms=taps * shape[1])
        same(kernels.input_gradient(on[1], on[2], on[3], shape, x.shape, *layout), dx, terms=taps * shape[0])
        got = kernels.weight_gradient(on[0], on[1], on[3], shape, *layout)
        same(got, gradient, terms=dy[0, 0].numel() * len(dy))
        again = kernels.weight_gradient(on[0], on[1], on[3], shape, *layout)
        assert torch.equal(got, again), "equal inputs must give equal bits"


def _largest_from(first: int) -> Callable[..., int]:
    """Instead of `pick_size`: the largest tile that can run, not larger than ``SIZES[first]``."""
    return lambda library, kernel, form, *rest: next(s for s in library.sizes(kernel, form) if s >= first)


def same(got: torch.Tensor, want: torch.Tensor, *, terms: int) -> None:
    """Equal up to fp32 rounding of a sum of ``terms`` terms; NaN (never written) is not equal to anything."""
    assert got.shape == want.shape
    if want.numel() == 0:
        return
    bound = terms**0.5 * 8 * 2**-23 * max(1.0, float(want.abs().max()))
    error = float((got.cpu() - want).abs().max())
    assert error <= bound, f"error {error:.2g}, allowed {bound:.2g}"


def main(path: str, device: str = "cpu") -> int:
    """All cases, or until the first that fails: 1 then, 0 otherwise."""
    library = _cuda_library.Library(Path(path))
    for layer in LAYERS:
        for size in SIZES:
            try:
                check(library, layer, size, device)
            except Exception as error:
                print(f"{layer} {size}: {error}")
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
