"""Tensors that end where an unmapped page begins: one element read or written too far kills the process."""

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)


def guarded_empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uninitialised CPU memory whose last element lies right before a page that may not be touched."""
    shape = torch.Size(size)
    count = shape.numel() * dtype.itemsize
    body = -(-max(count, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, body + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _libc.mprotect(ctypes.c_void_p(start + body), mmap.PAGESIZE, PROT_NONE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")
    if count == 0:
        return torch.zeros(shape, dtype=dtype)
    tensor = torch.frombuffer(memory, dtype=dtype, count=shape.numel(), offset=body - count)
    return tensor.view(shape)


def guarded(tensor: Tensor) -> Tensor:
    """A contiguous copy of ``tensor`` in front of an unmapped page."""
    return guarded_empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)


@contextmanager
def guarding_outputs() -> Iterator[None]:
    """Inside, ``torch.empty`` and ``torch.empty_like`` on the CPU return guarded memory, so outputs are guarded too."""

    def empty(*size: int, dtype: torch.dtype = torch.float32, device: object = None) -> Tensor:
        return guarded_empty(*(size[0] if len(size) == 1 and not isinstance(size[0], int) else size), dtype=dtype)

    def empty_like(other: Tensor) -> Tensor:
        return guarded_empty(*other.shape, dtype=other.dtype)

    with mock.patch("torch.empty", empty), mock.patch("torch.empty_like", empty_like):
        yield
