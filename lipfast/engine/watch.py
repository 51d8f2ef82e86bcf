"""Tell whether tensors still hold the numbers that were read from them, without reading them before every call.

torch clones a storage lazily: original and clone share memory until one of them is written, and whoever writes is
moved to memory of its own first, whichever way the write comes (in place, an alias, ``.data``, an optimiser). So long
as a clone is kept, a tensor at its address holds its numbers.

Sources: ``aten::_lazy_clone`` and c10/core/impl/COW.h in PyTorch.
"""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

import lipfast._C as _C
from lipfast.locks import lock
from lipfast.ops._memory import Places, memory, places

T = TypeVar("T")
_cloning = lock(rank=2)  # torch does not lock a storage while it makes it shareable


class Watch:
    """Knows whether tensors hold what they held when it was made.

    A fingerprint of their bytes decides. Once it has found them unchanged, lazy clones are kept, and the next answers
    cost microseconds, until something writes. Memory that can be written past torch is read every time: shared,
    mapped, a numpy array's own, or handed to numpy by ``Tensor.numpy()``. Pointers from ``data_ptr()`` or DLPack that
    are older than the clones and written through later are not noticed, unless ``reads`` is set.

    Args:
        tensors: on the CPU, any layout.
        reads: read all of them every time.
    """

    def __init__(self, tensors: Sequence[Tensor], *, reads: bool = False) -> None:
        self._mark = _mark(tensors)
        self._clones: list[Tensor] = []
        self._places: Places = ()  # of the clones
        self._may_clone = not reads
        self._settled = False  # found unchanged; numbers that change all the time are not worth cloning

    @property
    def reads(self) -> bool:
        """Whether the next answer reads all numbers."""
        return not self._clones

    def unchanged(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these, in the order given at first, hold the same numbers in the same layout."""
        if self._clones and places(tensors) == self._places:
            return True
        clones = self._clone(tensors)  # before they are read, so that no write falls in between
        self._settled = _mark(tensors) == self._mark
        self._places = places(clones)
        self._clones = clones if self._settled else []
        return self._settled

    def _clone(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if not (self._settled and self._may_clone):
            return []
        self._may_clone = False  # asked twice: what torch took for a write left the numbers alone, and may be a pointer
        return _lazy_clones(tensors)


class Derived(Generic[T]):
    """What is computed from tensors, and computed again once they changed; ``reads``: see `Watch`."""

    def __init__(self, compute: Callable[[Sequence[Tensor]], T], *, reads: bool = False) -> None:
        self._compute, self._reads = compute, reads
        self._known: tuple[Watch, T] | None = None

    def of(self, tensors: Sequence[Tensor]) -> T:
        """What these tensors, in the order given at first, make."""
        if self._known is None or not self._known[0].unchanged(tensors):
            watch = Watch(tensors, reads=self._reads)  # before they are read, so that no write falls in between
            with torch.inference_mode(False), torch.no_grad():  # the next call may be in another mode
                self._known = watch, self._compute(tensors)
        return self._known[1]


def _mark(tensors: Sequence[Tensor]) -> tuple[object, ...]:
    dense = [t.detach() if _without_gaps(t) else t.detach().contiguous() for t in tensors]
    return (*(t.stride() for t in tensors), _C.fingerprint([memory(t) for t in dense], torch.get_num_threads()))


def _without_gaps(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def _lazy_clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    """None at all where one of them cannot be cloned lazily."""
    if not all(tensor.untyped_storage().resizable() for tensor in tensors):  # numpy has seen it, and may write
        return []
    try:
        with _cloning:
            return [tensor.detach()._lazy_clone() for tensor in tensors]
    except RuntimeError:  # not torch's own memory
        return []
