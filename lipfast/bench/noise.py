"""Noise on a fit's input against torch's generator, which runs on one thread."""

import functools

import torch

from lipfast import ops
from lipfast.bench.harness import Case, Size, Timed
from lipfast.ops import _dispatch

CHANNELS = 32  # of the paper's input
SCALE = 1 / 30


def cases(size: Size) -> list[Case]:
    """One case for each picture size."""
    return [
        Case(
            op="add_noise",
            name=f"{side} px",
            shape=f"{CHANNELS} channels, {side} x {side} px",
            density=1.0,
            setup=functools.partial(_setup, side),
        )
        for side in ((16,) if size == "toy" else (64, 128, 256, 512))
    ]


def _setup(side: int) -> Timed:
    z = torch.rand(1, CHANNELS, side, side, generator=torch.Generator().manual_seed(0))
    backend, _ = _dispatch.pick("add_noise", z.device)
    generator = torch.Generator().manual_seed(1)
    steps = iter(range(1 << 62))
    return Timed(
        ours=lambda: ops.add_noise(z, SCALE, 1, next(steps)),
        baselines={"torch": lambda: z + SCALE * torch.randn(z.shape, generator=generator)},
        check=functools.partial(_check, z),
        backend=backend,
        bytes=8 * z.numel(),
    )


def _check(z: torch.Tensor) -> None:
    """The numbers are the reference's, within rounding."""
    torch.testing.assert_close(
        ops.add_noise(z, 1.0, 1, 2), ops.add_noise(z, 1.0, 1, 2, backend="reference"), rtol=1e-5, atol=2e-6
    )
