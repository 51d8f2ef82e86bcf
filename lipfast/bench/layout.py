"""Conversion NCHW -> lanes -> NCHW against copying the same bytes."""

import functools

import torch

import lipfast._C as _C
from lipfast.bench.harness import Case, Size, Timed
from lipfast.ops import LaneMap

SHAPES: tuple[tuple[int, int, int, int], ...] = (
    (1, 128, 64, 64),
    (1, 128, 128, 128),
    (1, 128, 512, 512),
    (8, 64, 56, 56),
    (1, 3, 224, 224),
)


def cases(size: Size) -> list[Case]:
    """One case for each shape and memory format."""
    shapes = SHAPES if size == "full" else ((1, 3, 17, 16),)
    return [
        Case(
            op="layout",
            name=f"{name} {'x'.join(map(str, shape))}",
            shape=str(shape),
            density=1.0,
            setup=functools.partial(_setup, shape, memory_format),
        )
        for shape in shapes
        for name, memory_format in (("NCHW", torch.contiguous_format), ("channels_last", torch.channels_last))
    ]


def _setup(shape: tuple[int, int, int, int], memory_format: torch.memory_format) -> Timed:
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    lanes, back, copy = (
        LaneMap.allocate(shape[0], shape[1], shape[2], shape[3]),
        torch.empty_like(x),
        torch.empty_like(x),
    )

    def round_trip() -> None:
        threads = torch.get_num_threads()
        _C.lanes_from_plain(x.numpy(), lanes.data.numpy(), 0, threads)
        _C.lanes_to_plain(lanes.data.numpy(), back.numpy(), 0, threads)

    def copies() -> None:
        copy.copy_(x)
        copy.copy_(x)

    def check() -> None:
        round_trip()
        assert torch.equal(back, x), "the round trip changed a pixel"

    return Timed(
        ours=round_trip,
        baselines={"two copies": copies},
        check=check,
        backend="cpu",
        bytes=4.0 * x.element_size() * x.numel(),
    )
