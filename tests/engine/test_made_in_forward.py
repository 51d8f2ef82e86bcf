"""Masks, indices and tables that forward makes of parameters and constants come before everything else, however they
are made, and say what they say in torch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lipfast

WIDTH, HEADS, SIDE = 12, 2, 3


class WindowAttention(nn.Module):
    """Attention in shifted windows as SCUNet has it: the mask and the places of biases are made in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.joined, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.randn(HEADS, 2 * SIDE - 1, 2 * SIDE - 1))
        self.first, self.last = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 3, 3, padding=1)
        for layer in (self.first, self.joined, self.out, self.last):
            layer.weight.data *= torch.arange(layer.weight.numel()).view_as(layer.weight) % 5 == 0

    def biases(self) -> Tensor:
        places = torch.tensor(np.array([[i, j] for i in range(SIDE) for j in range(SIDE)]))
        apart = places[:, None] - places[None] + SIDE - 1
        return self.bias[:, apart[..., 0], apart[..., 1]]

    def mask(self, rows: int, columns: int, shift: int) -> Tensor:
        mask = torch.zeros(rows, columns, SIDE, SIDE, SIDE, SIDE, dtype=torch.bool)
        kept = SIDE - shift
        mask[-1, :, :kept, :, kept:, :] = True
        mask[-1, :, kept:, :, :kept, :] = True
        mask[:, -1, :, :kept, :, kept:] = True
        mask[:, -1, :, kept:, :, :kept] = True
        return torch.where(mask.reshape(rows * columns, 1, SIDE**2, SIDE**2), float("-inf"), 0.0)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.roll(self.first(x).permute(0, 2, 3, 1), (-1, -1), (1, 2))
        n, h, w, c = y.shape
        rows, columns = h // SIDE, w // SIDE
        y = y.view(n, rows, SIDE, columns, SIDE, c).permute(0, 1, 3, 2, 4, 5).reshape(n, rows * columns, SIDE**2, c)
        q, k, v = self.joined(self.norm(y)).unflatten(-1, (3, HEADS, -1)).permute(3, 0, 1, 4, 2, 5)
        added = self.biases() + self.mask(rows, columns, 1)
        seen = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous(), attn_mask=added[None])
        y = self.out(seen.transpose(2, 3).flatten(3)).view(n, rows, columns, SIDE, SIDE, c).transpose(2, 3)
        return self.last(torch.roll(y.reshape(n, h, w, c), (1, 1), (1, 2)).permute(0, 3, 1, 2))


@pytest.mark.parametrize("size", [(1, 3, 6, 9), (2, 3, 3, 6)])
def test_masks_and_places_that_are_made_in_each_call(compare_accelerated, items_of, size):
    module, x = WindowAttention(), torch.randn(size)
    assert items_of(module, x) == [["conv", "layer_norm", "conv", "attention", "conv", "conv"]]
    compare_accelerated(module, x)


class Network(nn.Module):
    """Two layers, and what ``between(features, weight)`` makes of those of the first."""

    def __init__(self, between) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scales = nn.Parameter(torch.rand(3, WIDTH))
        self.between = between
        for layer in (self.first, self.second):
            layer.weight.data *= torch.arange(WIDTH**2).view(WIDTH, WIDTH) % 5 == 0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.between(self.first(x), self.scales)
        return self.second(y)


def filled(*parts) -> Tensor:
    tensor = torch.zeros(3, WIDTH)
    for index, value in parts:
        tensor[index] = value
    return tensor


def test_a_tensor_that_is_filled_once_cuts_nothing(compare_accelerated, items_of):
    module, x = Network(lambda y, s: y * filled((0, 2.0), ((slice(1, 3), 2), s[1:, 0]))[0]), torch.randn(5, WIDTH)
    assert items_of(module, x) == [["conv", "conv", "conv"]]
    compare_accelerated(module, x)


def read_between(y: Tensor, s: Tensor) -> Tensor:
    tensor = torch.ones(3, WIDTH)
    before = y + tensor[0]
    tensor[0] = 5.0
    return before + 2 * tensor[0]


def viewed_before(y: Tensor, s: Tensor) -> Tensor:
    tensor = torch.zeros(3, WIDTH)
    part = tensor[0]
    y = y.cumsum(0) + part
    tensor[0, 3:] = 7.0
    return y + tensor[1]


def filled_with_features(y: Tensor, s: Tensor) -> Tensor:
    tensor = torch.full((3, WIDTH), 2.0)
    tensor[1] = y.mean(0)
    tensor[2] = s[0]
    return y + tensor[1] * tensor[2]


def through_a_view(y: Tensor, s: Tensor) -> Tensor:
    """Into memory that another tensor has."""
    scales = s * 1
    flat = scales.view(-1)
    y = y.cumsum(0) + scales[0]
    flat[:WIDTH] = 3.0
    return y + flat[WIDTH : 2 * WIDTH]


@pytest.mark.filterwarnings("ignore:lipfast:UserWarning")
@pytest.mark.parametrize("between", [read_between, viewed_before, filled_with_features, through_a_view])
def test_what_else_is_filled_stays_right(compare_accelerated, between):
    compare_accelerated(Network(between), torch.randn(5, WIDTH))


@pytest.mark.filterwarnings("ignore:lipfast:UserWarning")
def test_each_call_returns_a_mask_of_its_own():
    class Returned(Network):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            mask = filled((0, 2.0))
            return self.second(self.first(x) * mask[0]), mask

    module, x = Returned(None), torch.randn(5, WIDTH)
    fast = lipfast.accelerate(module)
    with torch.no_grad():
        fast(x)[1].zero_()
        assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(fast(x), module(x), strict=True))


def test_arrays_may_be_written_between_calls():
    table = np.ones(WIDTH, np.float32)
    module, x = Network(lambda y, s: y * (torch.tensor(table) + s[0])), torch.randn(5, WIDTH)
    fast = lipfast.accelerate(module)
    with torch.no_grad():
        for number in (1.0, 3.0, 2.0, 2.0):
            table[2:] = number
            assert torch.allclose(fast(x), module(x), atol=1e-5)
