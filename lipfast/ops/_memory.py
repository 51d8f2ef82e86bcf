"""Where tensors lie. ``Tensor.data_ptr()`` and ``Tensor.numpy()`` hand memory out to be written; these only look."""

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Places = tuple[Sequence[object], ...]


def address(tensor: Tensor) -> int:
    """Of the first element, in bytes."""
    storage: int = torch._C._data_address(tensor)  # type: ignore[attr-defined]
    return storage + int(tensor.storage_offset()) * tensor.element_size()


def places(tensors: Sequence[Tensor]) -> Places:
    """Where tensors lie and in what order, to be compared. By whole lists: a network has hundreds."""
    storages = map(torch._C._data_address, tensors)  # type: ignore[attr-defined]
    return [*storages], [*map(Tensor.storage_offset, tensors)], [*map(Tensor.stride, tensors)]


def memory(tensor: Tensor) -> NDArray[np.uint8]:
    """All bytes of a tensor on the CPU without gaps between its elements, for as long as it lives."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * tensor.nbytes).from_address(address(tensor)))
