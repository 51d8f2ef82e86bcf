"""Checks of arguments that several ops share. Each raises InputError, which names op and value."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lipfast.errors import InputError
from lipfast.ops import _padding

_LIMIT = 2**31  # beyond any picture; sums and products of such numbers fit torch's 64 bits


def check_dense(op: str, name: str, value: Any) -> None:
    """``value`` is a tensor, and not one of torch's sparse ones."""
    if not isinstance(value, Tensor):
        raise InputError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise InputError(f"{op}: {name} must be a dense tensor, got layout {value.layout}; use to_dense()")


def whole_number(op: str, name: str, value: Any) -> int:
    """``value`` as an int: Python's, numpy's or a tensor's."""
    if isinstance(value, int):
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise InputError(f"{op}: {name} must be a whole number, got {value!r}") from None


def pair(op: str, name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """A number for rows and one for columns, from one or both."""
    several = isinstance(value, Iterable) and not (isinstance(value, Tensor) and value.dim() == 0)
    given = tuple(value) if several else (value, value)  # type: ignore[arg-type]
    if len(given) != 2:
        raise InputError(f"{op}: {name} is one whole number or two, got {value}")
    return whole_number(op, name, given[0]), whole_number(op, name, given[1])


def check_padding(op: str, size: Sequence[int], padding: Sequence[int], padding_mode: str) -> None:
    """A map of ``size`` (rows, columns) has the pixels that its padding copies."""
    if padding_mode not in _padding.MODES:
        raise InputError(f"{op}: padding_mode {padding_mode!r} is unknown; use {', '.join(_padding.MODES)}")
    for side, pad in zip(size, padding, strict=True):
        if pad > _padding.widest(side, padding_mode):
            raise InputError(f"{op}: {padding_mode} padding of {pad} is too large for a side of {side} pixels")


def check_window(
    op: str,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    padding_mode: str,
    dilation: int = 1,
) -> None:
    """A convolution's window fits a padded map of ``size`` (rows, columns)."""
    if min(*stride, dilation) < 1 or min(padding) < 0 or max(*stride, *padding, dilation) >= _LIMIT:
        raise InputError(f"{op}: stride {stride}, dilation {dilation}, padding {padding} are out of range")
    check_padding(op, size, padding, padding_mode)
    for side, pad, taps in zip(size, padding, kernel, strict=True):
        if side + 2 * pad < dilation * (taps - 1) + 1:
            raise InputError(f"{op}: {tuple(size)} pixels with padding {padding} are smaller than the kernel")


def check_positions(positions: Tensor, count: int) -> None:
    """Positions of kept weights ascend and lie among ``count``. Waits for the device: once a pattern, not a call."""
    falls = (positions[1:] <= positions[:-1]).nonzero()
    if len(falls):
        before, after = positions[int(falls[0]) :][:2].tolist()
        raise InputError(f"sparse_conv2d: the weight's positions must ascend, got {after} after {before}")
    first, last = positions[[0, -1]].tolist() if len(positions) else (0, count - 1)
    if first < 0 or last >= count:
        raise InputError(f"sparse_conv2d: the weight's positions must lie in [0, {count}), got {first} to {last}")
