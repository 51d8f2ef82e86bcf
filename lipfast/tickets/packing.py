"""A masked tensor as bytes: its kept values in index order and one bit per weight."""

import numpy as np
import torch
from torch import Tensor

from lipfast.errors import TicketError


def pack(value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(kept values float32 (k,), bits uint8 (ceil(n / 8),))`` of a tensor of n weights, k of them alive.

    Weight i is bit ``i % 8``, lowest first, of byte ``i // 8``; bits past the last weight are 0.
    """
    bits = np.packbits(mask.reshape(-1).cpu().numpy(), bitorder="little")
    return value[mask].contiguous(), torch.from_numpy(bits)


def unpack(values: Tensor, bits: Tensor, shape: tuple[int, ...], name: str) -> tuple[Tensor, Tensor]:
    """Invert ``pack`` for bytes nobody vouches for: ``(dense tensor of shape, mask of shape)``.

    Raises:
        TicketError: a type, a length, or the count of bits does not agree with the others.
    """
    count = 1
    for length in shape:
        count *= length
    if bits.dtype != torch.uint8 or bits.dim() != 1 or bits.numel() != (count + 7) // 8:
        raise TicketError(
            f"{name}: the mask of {count} weights must be {(count + 7) // 8} bytes, "
            f"got {tuple(bits.shape)} {bits.dtype}; the file is damaged"
        )
    if values.dtype != torch.float32 or values.dim() != 1:
        raise TicketError(
            f"{name}: kept values must be 1-D float32, got {tuple(values.shape)} {values.dtype}; the file is damaged"
        )
    flat = np.unpackbits(bits.numpy(), bitorder="little")  # (8 * bytes,)
    if flat[count:].any():
        raise TicketError(f"{name}: the mask has bits set past its last weight; the file is damaged")
    alive = torch.from_numpy(flat[:count].astype(bool))  # (n,)
    if (living := int(alive.sum())) != values.numel():
        raise TicketError(f"{name}: the mask keeps {living} weights but {values.numel()} values came with it")
    dense = torch.zeros(count)
    dense[alive] = values
    return dense.reshape(shape), alive.reshape(shape)
