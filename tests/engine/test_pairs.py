"""Convolutions that run as one with the depthwise one behind them: answers against torch, and when they do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lipfast
import lipfast._C as _C
from lipfast.engine.runtime import Running

TOLERANCE = 1e-5
DENSITY = 0.4


class Inverted(nn.Module):
    """An inverted residual block without its last layer: a convolution, a depthwise one, and what follows each."""

    def __init__(
        self,
        channels: int,
        kernels: tuple[int, int] = (1, 3),
        strides: tuple[int, int] = (1, 1),
        mode: str = "zeros",
        act: nn.Module | None = None,
        norm: bool = True,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        (a, b), (s, t) = kernels, strides
        pad = dilation * (b // 2)
        self.first = nn.Conv2d(3, channels, a, s, a // 2, bias=not norm, padding_mode=mode)
        self.second = nn.Conv2d(channels, channels, b, t, pad, dilation, channels, not norm, mode)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) if norm else nn.Identity() for _ in range(2))
        self.act = act or nn.Identity()
        for each in self.norms if norm else ():
            nn.init.normal_(each.weight)
            each.running_mean.normal_()
            each.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norms[1](self.second(self.act(self.norms[0](self.first(x))))))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def steps(running: Running) -> list[str]:
    return [label for _, label, _ in running.profile()]


def error(got: Tensor, module: nn.Module, x: Tensor) -> float:
    """Against torch in float64, relative to the largest number."""
    with torch.no_grad():
        expected = copy.deepcopy(module).double()(x.double())
    return float((got.double() - expected).abs().max() / expected.abs().max())


@pytest.fixture
def check(inference, monkeypatch):
    """That so many pairs run, give torch's answer, and the same bits for any number of threads. By default the dense
    kernel makes the first of so small layers, or, where they are 3x3, Winograd's, which does not pair."""

    def run(module: nn.Module, x: Tensor, pairs: int = 1) -> None:
        masks = {"first.weight": torch.rand(module.first.weight.shape) < DENSITY}
        for kernel in ("sparse", "auto") if module.first.kernel_size == (1, 1) else ("sparse",):
            monkeypatch.setenv("LIPFAST_KERNEL", kernel)
            running = inference(module, x, masks)
            assert sum(", depthwise" in label for label in steps(running)) == pairs
            (y,) = running.forward([x], 1)
            assert error(y, module, x) < TOLERANCE
            for threads in (2, 3):
                assert torch.equal(running.forward([x], threads)[0], y)

    return run


ACTS = [nn.Identity(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.SiLU(), nn.Hardswish(), nn.GELU()]


@pytest.mark.parametrize("size", [(16, 16), (17, 14), (7, 7), (3, 5)])
@pytest.mark.parametrize("act", ACTS, ids=str)
@pytest.mark.parametrize("norm", [True, False])
def test_every_activation(check, size, act, norm):
    check(Inverted(20, act=act, norm=norm), torch.randn(1, 3, *size))


@pytest.mark.parametrize("batch", [1, 3, 17])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    ("kernels", "strides"), [((1, 5), (1, 1)), ((3, 3), (1, 2)), ((3, 7), (2, 1)), ((1, 3), (1, 2))]
)
def test_every_window(check, batch, mode, kernels, strides):
    check(Inverted(9, kernels, strides, mode, nn.SiLU()), torch.randn(batch, 3, 13, 10))


def test_dilated_and_with_more_channels_than_a_tile_takes_at_once(check):
    check(Inverted(33, (1, 3), dilation=2), torch.randn(1, 3, 12, 12))
    check(Inverted(2100, (1, 3)), torch.randn(1, 3, 5, 6))


def test_its_halo_is_there_for_what_reads_it(compare):
    module = nn.Sequential(Inverted(12, act=nn.SiLU()), nn.Conv2d(12, 4, 3, padding=1, padding_mode="reflect")).eval()
    compare(module, torch.randn(2, 3, 9, 12), {"0.first.weight": torch.rand(12, 3, 1, 1) < DENSITY})


class Shared(nn.Module):
    """Something else wants what lies between the two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        return self.second(y) + y


class ResidualOfAnother(nn.Module):
    """What is added is made behind the two, by another pair."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.third, self.fourth = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.second(self.first(x)) + self.fourth(self.act(self.third(x))))


class Wider(nn.Module):
    """The second makes two channels of each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, padding=1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("module", [Shared, Wider])
def test_what_does_not_pair(check, module):
    check(module(), torch.randn(2, 3, 9, 12), pairs=0)


@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU()], ids=str)
def test_sums_behind_pairs(check, act):
    check(ResidualOfAnother(act), torch.randn(2, 3, 9, 12), pairs=2)


class ThreeInARow(Shared):
    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


def test_three_in_a_row_pair_once(check):
    check(ThreeInARow(), torch.randn(2, 3, 9, 12))


def test_new_weights_and_statistics_are_seen():
    module, x = Inverted(20, act=nn.ReLU()).eval(), torch.randn(1, 3, 9, 12)
    mask = torch.rand(20, 3, 1, 1) < DENSITY
    module.first.weight.data.mul_(mask)
    with torch.no_grad():
        fast = lipfast.accelerate(module)
        fast(x)
        for name in ("second.weight", "norms.0.bias", "norms.1.running_var", "first.weight"):
            fast.state_dict()[name].mul_(3)
            module.load_state_dict(fast.state_dict())
            assert error(fast(x), module, x) < TOLERANCE, name


def test_only_pairs_may_be_added():
    program = _C.Program(keeps_weights=True)
    geometry = [1, 8, 8, 2, 2, 2, 2, 4]
    mask = torch.ones(8, 3, 1, 1, dtype=torch.uint8).numpy()
    first = program.add_conv([8, 3, 1, 1, 1, 1, 1, 0, 0], geometry, 0, mask, 1, False)
    wide = program.add_conv([8, 8, 1, 3, 3, 1, 1, 1, 1], geometry, 0, None, 1, False)
    second = program.add_conv([8, 8, 8, 3, 3, 1, 1, 1, 1], geometry, 0, None, 1, False)
    assert program.is_pair(first, second)
    assert not program.is_pair(first, wide)
    program.allocate(1 << 16, 4096, 0)
    x = program.add_map(0, [1, 3, 8, 8], 4, 2, 2, 0, 4)
    y = program.add_map(1 << 12, [1, 8, 8, 8], 4, 2, 2, 0, 4)

    def add(one=first, two=second, read=x, halo=1, plane=16, values=0):
        end = (values, -1, 0.0, [-1, -1, -1, -1, 1, 1, -1], 0, 0.0)
        program.conv_pair((one, *end), (two, *end), read, halo, plane, True, 0, 0, y, False, 0, 0)

    add()
    for wrong, message in (
        ({"two": wide}, "not a depthwise convolution"),
        ({"halo": 0, "plane": 4}, "halo is smaller"),
        ({"plane": 15}, "planes of 15 vectors overlap"),
        ({"read": y}, "planned differently"),
        ({"one": 7}, "unknown index 7"),
        ({"values": 4090}, "offset out of range"),
    ):
        with pytest.raises(ValueError, match=message):
            add(**wrong)


def test_maps_are_cut_anew_where_they_have_the_fewest_channels(inference):
    """Blocks of 7 pixels become twice those of 4 before the layer that makes 48 channels of 5, not behind it."""
    module = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), *(nn.Conv2d(5, 5, 3, padding=1) for _ in range(9)))
    module.append(nn.Conv2d(5, 48, 1)).append(nn.ReLU()).append(nn.Conv2d(48, 48, 3, 2, 1, groups=48))
    x = torch.randn(1, 3, 28, 28)
    running = inference(module, x, {})
    assert [label for label in steps(running) if label.startswith("reblock")] == ["reblock 5x28x28"]
    assert error(running.forward([x], 2)[0], module, x) < TOLERANCE


def test_a_layer_without_padding_reads_a_map_that_is_too_large_for_the_blocks_behind_it(compare):
    """28 pixels become 24, whose blocks of 12 do not hold the 28."""
    module = nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 5), nn.ReLU()).eval()
    compare(module, torch.randn(4, 1, 28, 28))
