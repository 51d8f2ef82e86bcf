"""Adam on kept weights against torch.optim.Adam on the dense ones: time should follow the density."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lipfast import ops
from lipfast.bench.harness import Case, Size, Timed
from lipfast.ops import _dispatch

SKIP_NET = 2_217_831  # parameters of the paper's network
GENERATOR = 18_844_992  # prunable weights of the 256 px progressive generator
DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05)
LR = 0.01
BYTES_PER_WEIGHT = 28  # reads value, gradient and both moments, writes all but the gradient


def cases(size: Size) -> list[Case]:
    """One case for each number of parameters and density."""
    shapes = {"toy": 5_000} if size == "toy" else {"skip net": SKIP_NET, "generator": GENERATOR}
    return [
        Case(
            op="adam_step",
            name=f"{name} {density:.0%}",
            shape=f"{count} parameters",
            density=density,
            setup=functools.partial(_setup, count, density),
        )
        for name, count in shapes.items()
        for density in DENSITIES
    ]


def _setup(count: int, density: float) -> Timed:
    kept = round(count * density)
    values, gradient = _draw(kept, seed=0)
    m, v = torch.zeros(kept), torch.zeros(kept)
    backend, _ = _dispatch.pick("adam_step", values.device)
    dense = _draw(count, seed=1)
    steps = iter(range(1, 1 << 62))
    return Timed(
        ours=lambda: ops.adam_step(values, gradient, m, v, next(steps), LR),
        baselines={
            "torch, dense, fused": _torch_step(*dense, fused=True),
            "torch, dense": _torch_step(*dense, fused=False),
        },
        check=functools.partial(_check, kept),
        backend=backend,
        bytes=BYTES_PER_WEIGHT * kept,
    )


def _draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator), torch.randn(count, generator=generator)


def _torch_step(values: Tensor, gradient: Tensor, *, fused: bool) -> Callable[[], object]:
    parameter = torch.nn.Parameter(values.clone())
    parameter.grad = gradient.clone()
    return torch.optim.Adam([parameter], lr=LR, fused=fused, foreach=False).step


def _check(count: int) -> None:
    """A few steps end where torch's do, within a few roundings each."""
    values, gradient = _draw(count, seed=2)
    parameter = torch.nn.Parameter(values.clone())
    parameter.grad = gradient.clone()
    optimizer = torch.optim.Adam([parameter], lr=LR, foreach=False)
    m, v = torch.zeros(count), torch.zeros(count)
    for step in range(1, 4):
        optimizer.step()
        ops.adam_step(values, gradient, m, v, step, LR)
    torch.testing.assert_close(values, parameter.detach(), rtol=1e-6, atol=1e-8)
