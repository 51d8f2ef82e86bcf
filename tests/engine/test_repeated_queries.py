"""Queries that are the same in each window (GC ViT): they are repeated in lanes, and what they see lies as keys do."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, SIDE = 12, 2, 3


class GlobalQueries(nn.Module):
    """``repeat(queries, windows)`` of a picture that is as small as a window."""

    def __init__(self, repeat=lambda q, count: q.repeat_interleave(count, dim=0), side: int = SIDE) -> None:
        super().__init__()
        self.repeat, self.side = repeat, side
        self.first, self.last = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 3, 3, padding=1)
        self.norm, self.joined, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.randn(HEADS, side**2, SIDE**2))
        for layer in (self.first, self.joined, self.out, self.last):
            layer.weight.data *= torch.arange(layer.weight.numel()).view_as(layer.weight) % 5 == 0

    def heads(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1, HEADS, WIDTH // HEADS).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        n, c, h, w = x.shape
        rows, columns = h // SIDE, w // SIDE
        queries = F.adaptive_avg_pool2d(x, self.side).permute(0, 2, 3, 1)
        q = self.heads(self.repeat(queries, rows * columns))
        x = x.permute(0, 2, 3, 1)
        y = self.norm(x).reshape(n, rows, SIDE, columns, SIDE, c).transpose(2, 3).reshape(-1, SIDE**2, c)
        k, v = (self.heads(part) for part in self.joined(y).chunk(2, -1))
        seen = ((q * 0.4) @ k.transpose(-2, -1) + self.bias).softmax(-1) @ v
        y = self.out(seen.transpose(1, 2).reshape(-1, self.side**2, c))
        if self.side != SIDE:
            return y
        y = y.reshape(n, rows, columns, SIDE, SIDE, c).transpose(2, 3).reshape(n, h, w, c)
        return self.last((x + y).permute(0, 3, 1, 2))


@pytest.mark.parametrize("size", [(1, 3, 3, 3), (1, 3, 6, 9), (3, 3, 6, 6)])
def test_repeated_queries(compare_accelerated, segments_of, size):
    module, x = GlobalQueries(), torch.randn(size)
    (kinds,) = segments_of(module, x)
    assert "resample" in kinds
    assert kinds[-4:] == ["attention", "conv", "combine", "conv"]  # what is added lies as the picture does
    compare_accelerated(module, x)


def test_fewer_queries_than_keys(compare_accelerated, segments_of):
    module, x = GlobalQueries(side=2), torch.randn(2, 3, 6, 6)
    (kinds,) = segments_of(module, x)
    assert kinds[-2:] == ["attention", "conv"]
    compare_accelerated(module, x)


@pytest.mark.filterwarnings("ignore:lipfast:UserWarning")
@pytest.mark.parametrize(
    "repeat",
    [
        lambda q, count: torch.repeat_interleave(q, count, 0, output_size=count * len(q)),
        lambda q, count: q.repeat(count, 1, 1, 1),
        lambda q, count: q.expand(count, *q.shape).flatten(0, 1),
        lambda q, count: q.repeat_interleave(torch.full((len(q),), count), 0, output_size=len(q) * count),
        lambda q, count: q.repeat_interleave(count, dim=1).reshape(-1, SIDE, SIDE, WIDTH),
        lambda q, count: q.flatten(1, 2).repeat_interleave(count, dim=0),
        lambda q, count: q.transpose(1, 2).repeat_interleave(count, dim=0),
        lambda q, count: q.permute(0, 3, 1, 2).repeat_interleave(count, dim=0).permute(0, 2, 3, 1),
        lambda q, count: q.reshape(-1, 1, SIDE, WIDTH).repeat_interleave(count, dim=0).view(-1, SIDE, SIDE, WIDTH),
        lambda q, count: q.repeat_interleave(count).view(-1, SIDE, SIDE, WIDTH),
    ],
)
def test_other_repeats_stay_right(compare_accelerated, repeat):
    compare_accelerated(GlobalQueries(repeat), torch.randn(2, 3, 6, 6))
