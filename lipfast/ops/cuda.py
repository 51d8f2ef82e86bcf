"""The CUDA backend: weight-sparse convolution on an NVIDIA GPU through the library of ``csrc/cuda``.

Importing this module needs the built library and a usable driver. Without them it raises `ModuleNotFoundError` with the
reason, which the seam passes on and ``lipfast doctor`` prints; other backends then serve CUDA tensors.

What the library has no kernel for (other types than float32, strides above 2, windows whose pixels do not fit into
shared memory) goes to the Triton backend.
"""

import torch
from torch import Tensor

from lipfast.errors import BackendError
from lipfast.ops import _cuda_library, _cuda_sparse_conv
from lipfast.ops import triton as _triton


def _open() -> _cuda_library.Library:
    library = _cuda_library.Library(_cuda_library.find_library())
    try:
        count = library.devices()
    except BackendError as reason:
        raise ModuleNotFoundError(f"the CUDA library cannot use this machine's driver: {reason}") from reason
    if count == 0:
        raise ModuleNotFoundError("the CUDA library finds no GPU")
    return library


_kernels = _cuda_sparse_conv.Kernels(_open())


def sparse_conv2d_forward(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    shape: torch.Size,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    padding_mode: str,
) -> Tensor:
    """See ``lipfast.ops.reference.sparse_conv2d_forward``."""
    if _cuda_sparse_conv.fits(_kernels.library, x, shape, stride, padding):
        return _kernels.forward(x, values, positions, shape, bias, stride, padding, padding_mode)
    return _triton.sparse_conv2d_forward(x, values, positions, shape, bias, stride, padding, padding_mode)


def sparse_conv2d_input_gradient(
    dy: Tensor,
    values: Tensor,
    positions: Tensor,
    shape: torch.Size,
    input_size: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
    padding_mode: str,
) -> Tensor:
    """See ``lipfast.ops.reference.sparse_conv2d_input_gradient``."""
    if _cuda_sparse_conv.fits(_kernels.library, dy, shape, stride, padding):
        return _kernels.input_gradient(dy, values, positions, shape, input_size, stride, padding, padding_mode)
    return _triton.sparse_conv2d_input_gradient(dy, values, positions, shape, input_size, stride, padding, padding_mode)


def sparse_conv2d_weight_gradient(
    x: Tensor,
    dy: Tensor,
    positions: Tensor,
    shape: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
    padding_mode: str,
) -> Tensor:
    """See ``lipfast.ops.reference.sparse_conv2d_weight_gradient``."""
    if _cuda_sparse_conv.fits(_kernels.library, x, shape, stride, padding):
        return _kernels.weight_gradient(x, dy, positions, shape, stride, padding, padding_mode)
    return _triton.sparse_conv2d_weight_gradient(x, dy, positions, shape, stride, padding, padding_mode)
