"""Gaussian noise that needs no generator."""

import math

import torch
from torch import Tensor

from lipfast.errors import InputError
from lipfast.ops import _dispatch
from lipfast.ops._checks import whole_number


def add_noise(base: Tensor, scale: float, seed: int, step: int, *, backend: str | None = None) -> Tensor:
    """``base`` plus ``scale`` times standard normal numbers, each a function of seed, step and place alone.

    So nothing has to be kept to go on later, all threads draw at once, and equal arguments give equal bits on every
    instruction set and for any number of threads. Numbers of different steps or seeds are independent.

    It is not a ``torch.library`` operator: it draws the input of a fit's step, outside any graph.

    Args:
        base: float32 of any shape.
        scale: standard deviation of what is added, finite.
        seed: 0 to 2^63 - 1.
        step: as ``seed``: which draw this is.
        backend: run exactly this implementation; None lets the seam choose.

    Returns:
        A new contiguous tensor of ``base``'s shape.

    Raises:
        InputError: an argument breaks the lines above.
        BackendError: ``backend`` cannot run here.

    Source: Threefry4x32-20 (Salmon et al. 2011, doi:10.1145/2063384.2063405), Box & Muller 1958.
    """
    if base.dtype != torch.float32:
        raise InputError(f"add_noise: base must be float32, got {base.dtype}")
    if not math.isfinite(scale):
        raise InputError(f"add_noise: scale must be finite, got {scale}")
    for name, number in {"seed": seed, "step": step}.items():
        if not 0 <= whole_number("add_noise", name, number) < 2**63:
            raise InputError(f"add_noise: {name} must be 0 to 2^63 - 1, got {number}")
    _, run = _dispatch.pick("add_noise", base.device, backend)
    drawn: Tensor = run(base.detach(), scale, seed, step)
    return drawn
