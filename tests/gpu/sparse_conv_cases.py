"""What the CUDA sparse convolution must compute, as test bodies for the emulator and for a real GPU.

    python tests/gpu/sparse_conv_cases.py LIBRARY [DEVICE]

checks every layer and exits with 1 if one is wrong; the sanitizer and mutation tests run it in a process of its own, and
``compute-sanitizer`` can on a GPU.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from lipfast.ops import _cuda_library, reference
from lipfast.ops._cuda_sparse_conv import Kernels


@dataclass(frozen=True)
class Layer:
    size: tuple[int, int, int, int]  # input: batch, channels, rows, columns
    outputs: int
    kernel: int
    stride: int
    padding: int
    mode: str
    density: float


LAYERS = [
    Layer((2, 5, 17, 19), 9, 3, 1, 1, "zeros", 0.3),
    Layer((1, 9, 20, 36), 17, 3, 1, 1, "reflect", 0.2),  # more than one tile and one group each way
    Layer((1, 5, 16, 32), 33, 3, 1, 1, "reflect", 0.9),  # long lists; exactly one large tile
    Layer((2, 9, 9, 7), 33, 1, 1, 0, "zeros", 0.4),
    Layer((2, 5, 17, 19), 9, 3, 2, 1, "zeros", 0.3),
    Layer((1, 3, 34, 18), 9, 3, 2, 1, "reflect", 0.3),
    Layer((1, 3, 5, 6), 3, 3, 2, 0, "zeros", 0.5),
    Layer((1, 3, 5, 6), 3, 3, 1, 0, "zeros", 0.5),
    Layer((1, 3, 6, 6), 3, 3, 1, 1, "circular", 1.0),
    Layer((1, 3, 6, 5), 3, 3, 1, 2, "replicate", 0.5),
    Layer((1, 8, 6, 6), 32, 3, 1, 1, "zeros", 1.0),  # every list full, in both halves of shared memory
    Layer((1, 2, 8, 8), 3, 3, 1, 1, "zeros", 0.0),  # nothing kept
    Layer((1, 1, 1, 1), 1, 1, 1, 0, "zeros", 1.0),
]
TILES = {"large": 0, "small": 10**9}  # FILLING_BLOCKS that forces a tile


def check(library: _cuda_library.Library, layer: Layer, tile: str, device: str) -> None:
    """Compare forward and both gradients with the reference; raises AssertionError."""
    torch.manual_seed(0)
    shape = torch.Size((layer.outputs, layer.size[1], layer.kernel, layer.kernel))
    positions = (torch.rand(shape.numel()) < layer.density).nonzero().squeeze(1)
    values, bias, x = torch.randn(len(positions)), torch.randn(layer.outputs), torch.randn(layer.size)
    layout = ((layer.stride,) * 2, (layer.padding,) * 2, layer.mode)
    y = reference.sparse_conv2d_forward(x, values, positions, shape, bias, *layout)
    dy = torch.randn_like(y)
    dx = reference.sparse_conv2d_input_gradient(dy, values, positions, shape, x.shape, *layout)
    gradient = reference.sparse_conv2d_weight_gradient(x, dy, positions, shape, *layout)

    on = [part.to(device) for part in (x, dy, values, positions, bias)]
    kernels = Kernels(library)
    settings = (layer.stride, layer.padding, layer.mode)
    with mock.patch.object(_cuda_library, "FILLING_BLOCKS", TILES[tile]):
        same(kernels.forward(on[0], on[2], on[3], shape, on[4], *settings), y, terms=9 * layer.size[1])
        same(kernels.input_gradient(on[1], on[2], on[3], shape, x.shape, *settings), dx, terms=9 * layer.outputs)
        got = kernels.weight_gradient(on[0], on[1], on[3], shape, *settings)
        same(got, gradient, terms=dy[0, 0].numel() * len(dy))
        again = kernels.weight_gradient(on[0], on[1], on[3], shape, *settings)
        assert torch.equal(got, again), "equal inputs must give equal bits"


def same(got: torch.Tensor, want: torch.Tensor, *, terms: int) -> None:
    """Equal up to fp32 rounding of a sum of ``terms`` terms; NaN (never written) is not equal to anything."""
    assert got.shape == want.shape
    if want.numel() == 0:
        return
    bound = terms**0.5 * 8 * 2**-23 * max(1.0, float(want.abs().max()))
    error = float((got.cpu() - want).abs().max())
    assert error <= bound, f"error {error:.2g}, allowed {bound:.2g}"


def main(path: str, device: str = "cpu") -> int:
    library = _cuda_library.Library(Path(path))
    wrong = 0
    for layer in LAYERS:
        for tile in TILES:
            try:
                check(library, layer, tile, device)
            except Exception as error:
                print(f"{layer} {tile}: {error}")
                wrong += 1
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
