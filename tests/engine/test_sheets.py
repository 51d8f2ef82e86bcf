"""Small pictures of a batch that share lanes: four of them, each in 2 x 2 blocks, or sixteen uncut ones; the last sheet
may lack some."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lipfast
from lipfast.engine import blocks, plan

BATCHES = {2: (8, 7, 1), 1: (32, 19)}  # by blocks along a side: of full sheets, and of some that lack pictures
SIZES = [(8, 8), (7, 6), (3, 5), (1, 1)]


class Apply(nn.Module):
    """A function behind a convolution of 6 channels."""

    def __init__(self, function) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


class Residual(nn.Module):
    """A block of a ResNet, its shortcut strided."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Tanh())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8))
        self.short = nn.Sequential(nn.Conv2d(channels, 8, 1, 2, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.second(self.first(x)) + self.short(x))


def classifier() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, padding=2), nn.Tanh(), Residual(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )


@pytest.fixture(params=[(grid, pictures) for grid, batches in BATCHES.items() for pictures in batches], ids=str)
def batch(request, monkeypatch) -> Callable[..., Tensor]:
    """Pictures of a size, which share lanes."""
    torch.manual_seed(0)
    grid, pictures = request.param
    monkeypatch.setattr(blocks, "grids_for", lambda graph: [grid])
    return lambda *size: torch.randn(pictures, 3, *size)


def grid_of(module: nn.Module, x: Tensor, monkeypatch) -> int:
    """What the planner chooses for a pruned module."""
    chosen = []
    choose = plan.choose_blocks

    def note(graph, weights):
        found = choose(graph, weights)
        chosen.append(graph.grid)
        return found

    monkeypatch.setattr(plan, "choose_blocks", note)
    torch.manual_seed(0)
    masks = {name: torch.rand(p.shape) < 0.2 for name, p in module.named_parameters() if p.dim() > 1}
    with torch.no_grad():
        lipfast.accelerate(module, masks)(x)
    return chosen[0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 5, 1),
        nn.Conv2d(3, 5, 3, padding=1),
        nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(3, 6, 5, padding=(2, 3), groups=3),
        nn.Conv2d(3, 4, 3, padding=2, dilation=2),
        nn.ConvTranspose2d(3, 4, 2, stride=2),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"),
        nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="circular"),
    ],
    ids=range(8),
)
@pytest.mark.parametrize("density", [0.4, 1.0])
def test_convolutions(compare, batch, size, conv, density):
    masks = {"0.weight": torch.rand(conv.weight.shape) < density}
    masks["0.weight"].view(-1)[0] = True
    compare(nn.Sequential(conv, nn.Tanh(), nn.Conv2d(conv.out_channels, 2, 3, padding=1)), batch(*size), masks)


@pytest.mark.parametrize("size", [(8, 8), (6, 11)])
@pytest.mark.parametrize("stride", [1, 2])
def test_mirrored_borders(compare, batch, size, stride):
    first = nn.Conv2d(3, 5, 5, padding=2, padding_mode="reflect")
    second = nn.Conv2d(5, 4, 3, stride, padding=1, padding_mode="reflect")
    masks = {"0.weight": torch.rand(first.weight.shape) < 0.3}
    compare(nn.Sequential(first, nn.Tanh(), second), batch(*size), masks)


@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.max_pool2d(x, 3, 2, 1),
        lambda x: F.avg_pool2d(x, 2),
        lambda x: F.avg_pool2d(x, 3, 1, 1),
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        lambda x: F.interpolate(x, scale_factor=2),
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
        lambda x: F.pad(x, (1, 2, 0, 3)),
        lambda x: torch.cat([x[:, 1:3], torch.sigmoid(x[:, :4])], dim=1),
        lambda x: torch.cat([x, torch.tanh(x)], dim=1)[:, :, 1:-1, 2:],
        lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
        lambda x: x * torch.sigmoid(F.adaptive_avg_pool2d(x, 1)) + x,
        lambda x: x / (x.square().mean(1, keepdim=True) + 1e-2).sqrt(),
        lambda x: F.pixel_unshuffle(torch.tanh(F.pixel_shuffle(x[:, :4], 2)), 2),
        lambda x: torch.flatten(x, 1),
        lambda x: F.adaptive_avg_pool2d(x, (1, 1)).flatten(1),
    ],
    ids=range(16),
)
def test_operators(compare, batch, size, function):
    compare(Apply(function), batch(*size))


@pytest.mark.parametrize("size", SIZES[:3])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_counts_all_pictures(compare, batch, size, training):
    norm = nn.BatchNorm2d(5)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    compare(nn.Sequential(nn.Conv2d(3, 5, 3), norm, nn.LeakyReLU(0.2)).train(training), batch(9, size[1] + 2))


@pytest.mark.parametrize("size", [(8, 8), (7, 6), (3, 5)])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("activation", [nn.Identity(), nn.SiLU(), nn.LeakyReLU(0.2)], ids=str)
def test_group_norm_counts_each_picture(compare, batch, size, groups, activation):
    norm = nn.GroupNorm(groups, 6)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    module = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), norm, activation, nn.Conv2d(6, 4, 3, padding=1))
    compare(module, batch(*size) * torch.arange(1.0, 4.0).view(3, 1, 1))


@pytest.mark.parametrize("training", [True, False])
def test_a_classifier(compare, batch, training):
    network = classifier().train(training)
    masks = {name: torch.rand(p.shape) < 0.5 for name, p in network.named_parameters() if p.dim() == 4}
    compare(network, batch(13, 8), masks, tolerance=1e-3)  # BatchNorms over few pixels amplify rounding


@pytest.mark.parametrize("pictures", [16, 14])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_each_picture_is_what_it_is_alone(pictures, layout):
    """Chosen, not forced; NaN in one of them stays there."""
    torch.manual_seed(0)
    fast = lipfast.accelerate(classifier().eval())
    x = torch.randn(pictures, 3, 8, 8).contiguous(memory_format=layout)
    with torch.no_grad():
        together = fast(x)
        alone = torch.cat([fast(picture[None]) for picture in x])
        x[5, 1, 2, 3] = torch.nan
        hurt = fast(x)
    assert torch.allclose(together, alone, atol=1e-5)
    others = torch.arange(pictures) != 5
    assert bool(hurt[5].isnan().all())
    assert torch.equal(hurt[others], together[others])


@pytest.mark.parametrize("pictures", [32, 27])
def test_any_number_of_threads_gives_the_same_bits(pictures):
    torch.manual_seed(0)
    network = classifier()
    x, before = torch.randn(pictures, 3, 8, 8), torch.get_num_threads()
    found = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        fast = lipfast.accelerate(network)
        fast(x).square().sum().backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in fast.parameters()]))
    torch.set_num_threads(before)
    assert all(torch.equal(gradients, found[0]) for gradients in found)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((16, 3, 8, 8), 1),
        ((48, 3, 8, 8), 1),
        ((4, 3, 8, 8), 2),
        ((20, 3, 8, 8), 2),
        ((1, 3, 8, 8), 4),
        ((3, 3, 8, 8), 2),
        ((6, 3, 8, 8), 2),
        ((15, 3, 8, 8), 1),
        ((18, 3, 8, 8), 2),
    ],
    ids=str,
)
def test_the_batch_decides_how_many_share_lanes(monkeypatch, size, expected):
    assert grid_of(classifier(), torch.randn(size), monkeypatch) == expected


def test_rows_alone_have_all_lanes(monkeypatch):
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    assert grid_of(module, torch.randn(16, 3, 8, 8), monkeypatch) == 4


def test_large_pictures_keep_all_lanes(monkeypatch):
    assert grid_of(nn.Conv2d(3, 8, 3, padding=1), torch.randn(4, 3, 256, 256), monkeypatch) == 4
