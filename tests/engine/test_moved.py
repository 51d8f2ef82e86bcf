"""Calls that only move numbers: maps stay where they lie, and torch gets what it reads in its order."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lipfast

WIDTH = 12


class Network(nn.Module):
    """A convolution, and what ``between(self, map)`` makes of it, with ``mix``, layers on features, and others."""

    def __init__(self, between) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.norm = nn.LayerNorm(WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.last = nn.Conv2d(WIDTH, 4, 3, padding=1)
        self.places = nn.Parameter(torch.randn(1, 24, WIDTH))
        self.between = between
        for layer in (self.first, self.wide, self.narrow, self.last):
            layer.weight.data *= torch.arange(layer.weight.numel()).view_as(layer.weight) % 5 == 0

    def mix(self, x: Tensor) -> Tensor:
        return self.narrow(F.gelu(self.wide(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, self.first(x))


MIX = ["layer_norm", "conv", "act", "conv"]


def tokens(m: Network, x: Tensor) -> Tensor:
    """As pyramids of transformers have it."""
    n, c, h, w = x.shape
    y = x.flatten(2).transpose(1, 2)
    y = y + m.mix(y)
    return m.last(y.transpose(1, 2).reshape(n, c, h, w))


def behind(m: Network, x: Tensor) -> Tensor:
    y = x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, WIDTH)
    return m.last(m.mix(y).permute(0, 2, 1).unflatten(2, x.shape[2:]))


def windows(m: Network, x: Tensor) -> Tensor:
    """Windows of 2 x 3 pixels, rolled by one."""
    n, c, h, w = x.shape
    y = torch.roll(x.permute(0, 2, 3, 1), (-1, -1), (1, 2))
    y = y.view(n, h // 2, 2, w // 3, 3, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 6, c)
    y = (y + m.mix(y)).view(n, h // 2, w // 3, 2, 3, c).transpose(2, 3).reshape(n, h, w, c)
    return m.last(torch.roll(y, shifts=(1, 1), dims=(1, 2)).permute(0, 3, 1, 2).contiguous())


def framed(m: Network, x: Tensor) -> Tensor:
    """Padded and cropped with the channels behind."""
    y = m.mix(F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 2, 0, 1)))
    return m.last(y[:, :-1, 1:-2].permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("between", "wanted"),
    [
        (tokens, ["conv", *MIX, "combine", "conv"]),
        (behind, ["conv", *MIX, "conv"]),
        (windows, ["conv", *MIX, "combine", "conv"]),
        (framed, ["conv", "resample", *MIX, "resample", "conv"]),
    ],
)
@pytest.mark.parametrize("size", [(1, 3, 4, 6), (3, 3, 2, 3), (2, 3, 6, 9), (17, 3, 2, 3)])
def test_maps_stay_where_they_are(compare, items_of, size, between, wanted):
    module, x = Network(between), torch.randn(size)
    assert items_of(module, x) == [wanted]
    compare(module, x, {name: p != 0 for name, p in module.named_parameters() if bool((p == 0).any())})


def test_learned_places_of_tokens_are_added_in_lanes(items_of):
    module = Network(lambda m, x: m.mix(x.flatten(2).transpose(1, 2) + m.places))
    assert items_of(module, torch.randn(1, 3, 4, 6)) == [["conv", "combine", *MIX]]


def grouped(x: Tensor) -> Tensor:
    """Tokens in windows of 2 x 3 pixels."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(n, h // 2, 2, w // 3, 3, c).transpose(2, 3).reshape(-1, 6, c)


@pytest.mark.filterwarnings("ignore:lipfast:UserWarning")
@pytest.mark.parametrize(
    "between",
    [
        lambda m, x: m.mix(grouped(x)),
        lambda m, x: (grouped(x), m.last(x), x.transpose(2, 3), x.mT.flatten(1)),
        lambda m, x: (m.mix(grouped(x)).softmax(-1), m.mix(x.flatten(2).mT)),
        lambda m, x: m.mix(grouped(x)).view(x.shape[0], -1, WIDTH) + m.mix(x.flatten(2).transpose(1, 2)),
        lambda m, x: m.mix(grouped(x)) * m.mix(grouped(x.flip(2))),
        lambda m, x: m.mix(x.flatten(2).transpose(1, 2)[:, 1]),
        lambda m, x: m.mix(x.flatten(2).transpose(1, 2)[:, 1:]),
        lambda m, x: m.mix(x.transpose(2, 3).flatten(2).transpose(1, 2)),
        lambda m, x: m.last(x.transpose(2, 3)) + m.last(x.transpose(2, 3).contiguous()),
        lambda m, x: m.last(x.reshape(x.shape[0], WIDTH, x.shape[3], x.shape[2])),
        lambda m, x: m.mix(F.pad(x.permute(0, 2, 3, 1).reshape(2, 6, 4, WIDTH), (0, 0, 1, 1, 1, 1))),
        lambda m, x: m.mix(x.permute(0, 2, 3, 1).reshape(2, 6, 4, WIDTH)[:, 1:-1, 1:-1]),
        lambda m, x: m.mix(x.permute(0, 2, 3, 1).reshape(2, 8, 3, WIDTH)[:, :, :2]),
        lambda m, x: m.mix(m.mix(x.flatten(2).mT).chunk(2, dim=1)[1]),
        lambda m, x: m.mix(m.wide(grouped(x)).chunk(2, dim=-1)[1]).sum(1),
        lambda m, x: m.mix(x.permute(2, 3, 0, 1)).mean((0, 1)),
        lambda m, x: m.mix(grouped(x) * m.places[:, :6]) + m.places[0, 0],
        lambda m, x: torch.stack(m.mix(grouped(x)).unbind(1)).square(),
        lambda m, x: m.wide(grouped(x)).view(-1, 6, WIDTH, 2).transpose(2, 3).flatten(2),
    ],
)
def test_what_lies_in_no_maps_order_stays_right(compare_accelerated, between):
    compare_accelerated(Network(between), torch.randn(2, 3, 4, 6))


def test_a_layer_on_some_tokens_runs_in_lanes(items_of):
    """As classifiers read one of them: in a segment behind the call that picks it."""
    module = Network(lambda m, x: m.mix(m.mix(x.flatten(2).transpose(1, 2))[:, 0]))
    assert items_of(module, torch.randn(2, 3, 4, 6)) == [["conv", *MIX], "Tensor.__getitem__", MIX]


def test_rows_are_put_in_order_once(items_of):
    def read_often(m: Network, x: Tensor) -> list[Tensor]:
        y = m.mix(grouped(x))
        return [y.sum(1), y.amax(1), y.view(2, -1, WIDTH).sum(1), y]

    names = items_of(Network(read_often), torch.randn(2, 3, 4, 6))
    assert names.count("_rows_in_order") == 1
    assert names.count("Tensor.view") == 1


def test_places_are_found_on_the_cpu_whatever_the_default_device_is():
    module, x = Network(windows), torch.randn(2, 3, 4, 6)
    expected, fast = module(x), lipfast.accelerate(module)
    with torch.device("meta"):
        assert torch.allclose(fast(x), expected, atol=1e-5)
