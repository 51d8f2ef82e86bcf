"""Every operator of the engine, behind a convolution, against torch in float64: outputs and all gradients."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lipfast
from lipfast.engine.builder import Segment
from lipfast.engine.capture import Recording, call_with, record
from lipfast.engine.lower import lower
from lipfast.errors import InputError

CHANNELS = 5
# Sides around the grid of 4 x 4 blocks: exact, one off, smaller than the grid.
SIZES = [(16, 16), (17, 14), (8, 20), (3, 5)]


def behind_conv(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1), *modules)


class Apply(nn.Module):
    """A function as a module, behind a convolution."""

    def __init__(self, function) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


class Activation(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.LeakyReLU(0.2), nn.Sigmoid(), nn.Tanh(), nn.SiLU(), nn.ReLU(inplace=True)], ids=str
)
def test_activations(compare, size, activation):
    compare(behind_conv(activation), torch.randn(2, 3, *size))


# Scaled, so that values lie on all sides of the bounds.
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.relu6(9 * x),
        lambda x: nn.ReLU6(inplace=True)(9 * x),
        lambda x: F.hardsigmoid(5 * x),
        lambda x: F.hardswish(5 * x, inplace=True),
        lambda x: F.gelu(5 * x),
        lambda x: F.gelu(5 * x, approximate="tanh"),
    ],
    ids=range(6),
)
def test_bounded_activations(compare, size, function):
    compare(Apply(function), torch.randn(2, 3, *size))


@pytest.mark.parametrize("act", [F.relu6, F.hardsigmoid, F.hardswish])
def test_bounded_activations_let_nan_through_and_keep_their_bounds(act):
    module = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(module.weight)
    x = torch.tensor([torch.nan, -torch.inf, -3.0, 0.0, 3.0, 6.0, torch.inf]).view(1, 1, 1, -1)
    with torch.no_grad():
        got = lipfast.accelerate(nn.Sequential(module, Activation(act)).eval())(x)
    assert torch.equal(got.isnan(), act(x).isnan())
    assert torch.allclose(got, act(x), equal_nan=True)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_right_far_from_zero(approximate):
    """About as near to the exact values as torch's float32, and nothing is left of numbers far below zero."""
    module = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(module.weight)
    x = torch.cat([torch.linspace(-12, 12, 40001), torch.tensor([-3e38, 3e38, torch.nan, torch.inf])]).view(1, 1, 1, -1)
    with torch.no_grad():
        got = lipfast.accelerate(nn.Sequential(module, nn.GELU(approximate)).eval())(x)
    assert torch.equal(got[..., [-4, -3, -1]].flatten(), torch.tensor([0, 3e38, torch.inf]))
    assert bool(got[..., -2].isnan().all())
    z, got = x[..., :-4].double(), got[..., :-4].double()
    argument = (2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)
    cdf = torch.erfc(-z * 0.5**0.5) / 2 if approximate == "none" else torch.sigmoid(2 * argument)
    assert bool(((got - z * cdf).abs() <= 2.5e-7 * z.abs()).all())  # torch: 2.5e-7 and 1.1e-7 of z
    assert float(got[z < -10].abs().max()) < 1e-20


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(compare, size, affine, training):
    norm = nn.BatchNorm2d(CHANNELS, affine=affine)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    compare(behind_conv(norm, nn.LeakyReLU(0.2)).train(training), torch.randn(3, 3, *size))


def test_batch_norm_without_running_statistics(compare):
    compare(behind_conv(nn.BatchNorm2d(CHANNELS, track_running_stats=False)).eval(), torch.randn(2, 3, 12, 9))


def randomised(module: nn.Module) -> nn.Module:
    """The module with normally distributed parameters."""
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("activation", [nn.Identity(), nn.SiLU(), nn.LeakyReLU(0.2)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm(compare, size, groups, activation):
    norm = randomised(nn.GroupNorm(groups, 6))
    network = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), norm, activation, nn.Conv2d(6, 2, 3, padding=1))
    compare(network, torch.randn(3, 3, *size))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm(compare, affine, training):
    norm = randomised(nn.InstanceNorm2d(CHANNELS, affine=affine))
    compare(behind_conv(norm, nn.ReLU()).train(training), torch.randn(2, 3, 9, 14))


def tracking_instance_norm() -> nn.Module:
    norm = randomised(nn.InstanceNorm2d(CHANNELS, affine=True, track_running_stats=True))
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return norm


def test_instance_norm_with_running_statistics(compare):
    compare(behind_conv(tracking_instance_norm(), nn.ReLU()).eval(), torch.randn(2, 3, 9, 14))


def test_running_statistics_of_instances_are_left_to_torch_and_move():
    module, x = behind_conv(tracking_instance_norm(), nn.ReLU()), torch.randn(2, 3, 9, 14)
    fast = lipfast.accelerate(module)
    with pytest.warns(UserWarning, match="instance_norm: running statistics"):
        got = fast(x)
    assert torch.allclose(got, module(x), atol=1e-5)
    for name, tensor in module.state_dict().items():
        assert torch.allclose(fast.state_dict()[name], tensor, atol=1e-6), name


def test_a_group_norm_that_others_read_too(compare):
    """Its gradient comes in two parts, its result must outlive the activation, and the block's input is read twice."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = behind_conv(), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
            self.norm = randomised(nn.GroupNorm(CHANNELS, CHANNELS))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            normal = self.norm(x)
            return self.second(F.silu(normal)) + normal * x

    compare(Block(), torch.randn(2, 3, 10, 7))


# gamma 0, tiny, small beside beta, and the same as large ones: the first three cannot be recovered from the result.
AWKWARD = [(0.0, 0.5), (1e-6, 2.0), (-0.01, 1.0), (-1.5, 0.3), (1.0, 20.0)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("activation", [nn.Identity(), nn.LeakyReLU(0.2), nn.LeakyReLU(1e-30), nn.ReLU()], ids=str)
def test_batch_norm_whose_result_does_not_tell_its_input(compare, size, activation):
    norm = nn.BatchNorm2d(CHANNELS)
    norm.weight.data, norm.bias.data = torch.tensor(AWKWARD).T.contiguous()
    compare(behind_conv(norm, activation, nn.Conv2d(CHANNELS, 2, 1)), torch.randn(2, 3, *size))


@pytest.mark.parametrize(
    "join", [lambda a, b: torch.cat([a, b], 1), lambda a, b: torch.cat([torch.cat([b, a], 1), a], 1)]
)
def test_batch_norm_behind_a_concatenation_of_batch_norms(compare, join):
    """The second must not overwrite what the first's backward pass reads."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = behind_conv(nn.BatchNorm2d(CHANNELS), nn.LeakyReLU(0.2))
            self.second = behind_conv(nn.LeakyReLU(0.1))
            self.norm = nn.LazyBatchNorm2d()

        def forward(self, x: Tensor) -> Tensor:
            return F.leaky_relu(self.norm(join(self.first(x), self.second(x))), 0.3)

    module = Branches()
    module(torch.randn(2, 3, 8, 8))
    for norm in (module.first[1], module.norm):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    compare(module, torch.randn(2, 3, 12, 9))


@pytest.mark.parametrize("act", [F.relu, F.leaky_relu])
def test_an_activation_behind_a_batch_norm_that_others_read(compare, act):
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = behind_conv(nn.BatchNorm2d(CHANNELS))
            self.after = nn.BatchNorm2d(CHANNELS)

        def forward(self, x: Tensor) -> Tensor:
            return self.after(act(self.norm(x))) * 0.5

    compare(Both(), torch.randn(2, 3, 12, 9))


def test_batch_norm_of_a_large_mean_keeps_its_digits(compare):
    """A sum of squares minus a squared sum would lose all of them."""
    module = behind_conv(nn.BatchNorm2d(CHANNELS))
    with torch.no_grad():
        module[0].bias.fill_(1000.0)
    # The conv's result is rounded at 1000, so the normalised values carry that error: 1000 epsilon / deviation.
    compare(module, torch.randn(2, 3, 16, 16), tolerance=3e-3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_upsampling_by_two(compare, size, mode):
    compare(behind_conv(nn.Upsample(scale_factor=2, mode=mode)), torch.randn(2, 3, *size))


@pytest.mark.parametrize(
    "options",
    [
        {"scale_factor": 2, "mode": "bilinear", "align_corners": True},
        {"size": (13, 7), "mode": "bilinear", "align_corners": False},
        {"size": (5, 31), "mode": "bilinear", "align_corners": True},
        {"size": (13, 31), "mode": "nearest"},
        {"scale_factor": 1.7, "mode": "nearest"},
        {"scale_factor": (3, 2), "mode": "bilinear", "align_corners": False},
    ],
    ids=str,
)
def test_any_resampling(compare, options):
    # torch's own positions are rounded to float32: at 31 px a weight is off by up to 31 epsilon.
    compare(Apply(lambda x: F.interpolate(x, **options)), torch.randn(2, 3, 9, 12))


@pytest.mark.parametrize("size", [(16, 16), (18, 14), (9, 21)])
@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2),
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, 2, 1),
        nn.AvgPool2d(3, 2, 1),
        nn.MaxPool2d(3, 1, 1),
        nn.AvgPool2d(3, 3),
        Activation(lambda x: F.max_pool2d(x, 2, ())),
    ],
    ids=str,
)
def test_pooling(compare, size, pool):
    compare(behind_conv(pool, nn.Conv2d(CHANNELS, 2, 1)), torch.randn(2, 3, *size))


# The last window starts in the picture (9, 18 px) or would not (21 px); it may lie beyond it by more than the padding.
# Eighteen pictures share lanes.
@pytest.mark.parametrize("size", [(1, 3, 16, 16), (3, 3, 9, 21), (3, 3, 18, 7), (18, 3, 7, 6)])
@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.AvgPool2d(5, 1, 2, count_include_pad=False),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
        nn.AvgPool2d(2, 2, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        nn.AvgPool2d(5, 3, 2, ceil_mode=True),
        nn.AvgPool2d(5, 3, 2, ceil_mode=True, count_include_pad=False),
        nn.AvgPool2d(1, 2, ceil_mode=True),
        nn.MaxPool2d(2, 2, ceil_mode=True),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.MaxPool2d(5, 4, ceil_mode=True),
        nn.MaxPool2d(5, 4, 2, ceil_mode=True),
    ],
    ids=str,
)
def test_pooling_at_the_edges(compare, size, pool):
    compare(behind_conv(pool, nn.Conv2d(CHANNELS, 2, 1)), torch.randn(size))
    compare(behind_conv(nn.ReLU(), pool), torch.randn(size))


@pytest.mark.parametrize("channels", [1, 17])
@pytest.mark.parametrize("size", [(11, 8), (1, 1)])
@pytest.mark.parametrize(
    "pool", [nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.MaxPool2d(3, 2, 1, ceil_mode=True)], ids=str
)
def test_pooling_of_any_number_of_channels(compare, pool, size, channels):
    compare(nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), pool), torch.randn(3, 3, *size))


def test_equal_maxima_go_to_the_first_pixel(compare):
    module = behind_conv(nn.MaxPool2d(3, 2, 1))
    nn.init.zeros_(module[0].weight)
    compare(module, torch.randn(2, 3, 12, 9))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("size", [(16, 16), (13, 10)])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 1), (1, 2)])
def test_convolutions(compare, mode, size, kernel, stride):
    second = nn.Conv2d(CHANNELS, 4, kernel, stride, kernel // 2, padding_mode=mode)
    module = behind_conv(second)
    compare(module, torch.randn(2, 3, *size), {"1.weight": torch.rand(second.weight.shape) < 0.3})


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(CHANNELS, 4, 3),
        nn.Conv2d(CHANNELS, 4, 3, padding=2),
        nn.Conv2d(CHANNELS, 4, 3, padding=2, dilation=2),
        nn.Conv2d(CHANNELS, 10, 3, padding=1, groups=5),
        nn.Conv2d(CHANNELS, 4, (1, 3), padding=(0, 1)),
        nn.Conv2d(CHANNELS, 4, 3, padding="same"),
        nn.Conv2d(CHANNELS, 4, 2),
        nn.Conv2d(CHANNELS, 4, 3, stride=2),
        nn.Conv2d(CHANNELS, 4, 7, stride=2, padding=3),
        nn.Conv2d(CHANNELS, 4, 3, padding=1, bias=False),
        nn.Conv2d(CHANNELS, 4, 9, padding=4),
        nn.Conv2d(CHANNELS, 4, 15, padding=7, padding_mode="reflect"),
        nn.Conv2d(CHANNELS, CHANNELS, 11, padding=5, groups=CHANNELS),
        nn.Conv2d(CHANNELS, 4, (9, 1), padding=(3, 0)),
        nn.Conv2d(CHANNELS, 4, 9, stride=2, padding=4),
        nn.ConvTranspose2d(CHANNELS, 4, 9, stride=2, padding=4),
    ],
    ids=str,
)
def test_other_forms_of_convolution(compare, conv):
    compare(behind_conv(conv), torch.randn(2, 3, 14, 11))
    weight = torch.rand(conv.weight.shape) < 0.3
    compare(behind_conv(conv), torch.randn(9, 3, 14, 11), {"1.weight": weight})


@pytest.mark.parametrize("size", [(12, 24), (60, 36)])
@pytest.mark.parametrize("side", [3, 4, 12])
def test_convolutions_of_patches(compare, side, size):
    conv = nn.Conv2d(CHANNELS, 7, side, stride=side)
    compare(behind_conv(conv, nn.ReLU()), torch.randn(2, 3, *size), {"1.weight": torch.rand(conv.weight.shape) < 0.3})


@pytest.mark.parametrize(
    "padding",
    [
        nn.ReflectionPad2d(2),
        nn.ReplicationPad2d(1),
        nn.ZeroPad2d(1),
        nn.CircularPad2d(2),
        nn.ReflectionPad2d((1, 0, 2, 1)),
        nn.ZeroPad2d(-1),
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", [3, 5])
def test_padding_modules(compare, padding, kernel):
    compare(behind_conv(padding, nn.Conv2d(CHANNELS, 2, kernel)), torch.randn(2, 3, 12, 13))
    compare(behind_conv(padding), torch.randn(2, 3, 12, 13))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: 2 * x,
        lambda x: x / 3 - 1,
        lambda x: 1 - x,
        lambda x: -x + x * 0.5,
        lambda x: torch.add(x, x, alpha=3),
        lambda x: x[:, 1:3],
        lambda x: x[:, :, 2:-1, ::2],
        lambda x: x[..., 3:],
        lambda x: torch.cat([x, x[:, :2], x], dim=1),
        lambda x: torch.cat([torch.relu(x), x], dim=1) + 1,
        lambda x: F.dropout(x, training=False),
    ],
    ids=range(11),
)
def test_arithmetic_slices_and_concatenation(compare, function):
    compare(Apply(function), torch.randn(2, 3, 9, 12))


@pytest.mark.parametrize(
    "norm",
    [
        lambda x: x * torch.rsqrt(torch.mean(x**2, dim=1, keepdim=True) + 1e-8),
        lambda x: x * ((x * x).mean(1, keepdim=True) + 1e-8).rsqrt(),
        lambda x: x / torch.sqrt(torch.mean(x.square(), 1, True) + 1e-8),
        lambda x: torch.rsqrt(x.pow(2).mean(dim=1, keepdim=True) + 1e-8).mul(x) * 0.7 + x,
    ],
    ids=range(4),
)
def test_pixel_norm_as_people_write_it(compare, norm):
    compare(Apply(norm), torch.randn(2, 3, 9, 12))


def test_what_only_looks_like_a_pixel_norm_stays_in_torch():
    y = nn.Parameter(torch.randn(1, CHANNELS, 1, 1))
    for norm in (
        lambda x: x * torch.rsqrt(torch.mean(x**3, dim=1, keepdim=True).abs() + 1.0),
        lambda x: x * torch.rsqrt(torch.mean(x**2, dim=2, keepdim=True) + 1.0),
        lambda x: x * torch.rsqrt(torch.mean((2 * x) ** 2, dim=1, keepdim=True) + 1.0),
        lambda x: x * torch.rsqrt(torch.mean(x**2, dim=1, keepdim=True) + y.abs()),
    ):
        module = Apply(norm).eval()
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", UserWarning)
            x = torch.randn(1, 3, 8, 8)
            assert torch.allclose(lipfast.accelerate(module)(x), module(x), rtol=1e-4, atol=1e-5)


class ReadLate(nn.Module):
    """Reads a part of a concatenation again after what was computed from the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 2, 1)
        self.join, self.late = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        joined = self.join(torch.cat([first, self.second(x)], dim=1))
        return joined + self.late(first)


def test_a_part_of_a_concatenation_may_have_other_readers(compare):
    compare(ReadLate(), torch.randn(2, 3, 9, 12))


def test_writing_to_what_has_a_view_is_refused():
    def write(x: Tensor) -> Tensor:
        part = x[:, :2]
        return torch.cat([torch.relu_(x), part], dim=1)

    with pytest.raises(InputError, match="shares its memory"):
        lipfast.accelerate(Apply(write))(torch.randn(1, 3, 8, 8))


class Blocks(nn.Module):
    """Two convs with BatchNorm, and what a block makes of them."""

    def __init__(self, join: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))
        self.join = join
        for norm in self.norms:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = (norm(conv(x)) for conv, norm in zip(self.convs, self.norms, strict=False))
        return self.convs[2](self.join(a, b, x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "join",
    [
        lambda a, b, x: torch.relu(a + x),
        lambda a, b, x: torch.relu(x + a),
        lambda a, b, x: torch.relu(a + b),
        lambda a, b, x: torch.sigmoid(a) + b,
        lambda a, b, x: torch.relu(a + a),
        lambda a, b, x: torch.relu(a) + a,
        lambda a, b, x: F.leaky_relu(torch.relu(a + b) + x, 0.2),
        lambda a, b, x: torch.relu(a - b),
        lambda a, b, x: torch.relu(a + b + x + 1),
        lambda a, b, x: torch.cat([torch.relu(a + x), b], dim=1)[:, 1:4],
    ],
    ids=range(10),
)
def test_residual_blocks(compare, join, training):
    compare(Blocks(join).train(training), torch.randn(2, 3, 9, 12))


def _twice(function, x: Tensor) -> Tensor:
    """Two readers, whose gradients are added."""
    return function(x, 2) * torch.sigmoid(function(x, 2))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.pixel_shuffle(torch.cat([x, x[:, :3]], dim=1), 2),
        lambda x: torch.cat([F.pixel_shuffle(x[:, :4], 2), F.pixel_shuffle(torch.sigmoid(x[:, 1:]), 2)], dim=1),
        lambda x: F.pixel_unshuffle(F.pixel_shuffle(x[:, :4], 2), 2) * x[:, 1:],
        lambda x: _twice(F.pixel_shuffle, x[:, :4]),
        lambda x: _twice(F.pixel_unshuffle, F.interpolate(x, scale_factor=2)),
        lambda x: F.pixel_shuffle(torch.cat([x, x[:, :4]], dim=1), 3),
        lambda x: F.pixel_unshuffle(F.interpolate(x, scale_factor=4), 4),
    ],
    ids=range(7),
)
def test_pixel_shuffle(compare, size, function):
    compare(Apply(function), torch.randn(2, 3, *size))


TRANSPOSED = {
    "2x2 stride 2": nn.ConvTranspose2d(CHANNELS, 7, 2, stride=2),
    "3x3 stride 2, as decoders have it": nn.ConvTranspose2d(CHANNELS, 6, 3, stride=2, padding=1, output_padding=1),
    "4x4 stride 2, as generators have it": nn.ConvTranspose2d(CHANNELS, 6, 4, stride=2, padding=1, bias=False),
    "3x3": nn.ConvTranspose2d(CHANNELS, 4, 3, padding=1),
    "3x3 that grows": nn.ConvTranspose2d(CHANNELS, 4, 3),
    "5x2 dilated": nn.ConvTranspose2d(CHANNELS, 4, (5, 2), padding=(1, 0), dilation=2),
    "grouped": nn.ConvTranspose2d(CHANNELS, 2 * CHANNELS, 3, stride=2, groups=CHANNELS, output_padding=(1, 0)),
    "wide padding": nn.ConvTranspose2d(CHANNELS, 3, 3, stride=2, padding=3),
    "1x1": nn.ConvTranspose2d(CHANNELS, 3, 1),
}


class Enlarged(nn.Module):
    """A transposed convolution whose result is read again, as a U-Net's is."""

    def __init__(self, name: str, join: str) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS)
        self.up = copy.deepcopy(TRANSPOSED[name])
        self.join, self.last = join, nn.LazyConv2d(2, 3, padding=1) if join else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(F.leaky_relu(self.norm(self.conv(x)), 0.2))
        if self.join == "relu":
            return self.last(torch.relu(up))
        if self.join == "cat":
            return self.last(torch.cat([up, torch.sigmoid(up)], dim=1))
        return self.last(up)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("join", ["", "relu", "cat"])
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("name", list(TRANSPOSED))
def test_transposed_convolutions(compare, name, density, join, size):
    if name == "wide padding" and min(size) < 5:
        size = (9, 6)
    module = Enlarged(name, join)
    for parameter in module.up.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, *size)
    module(x)
    masks = {"up.weight": torch.rand(module.up.weight.shape) < density} if density < 1 else {}
    compare(module, x, masks)


@pytest.mark.parametrize("size", [(9, 9), (16, 16)])
@pytest.mark.parametrize("other", ["bilinear", "reflect", "pool"])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (4, 2, 1), (4, 2, 0), (5, 1, 2)])
def test_a_transposed_convolution_whose_input_others_pad(compare, kernel, stride, padding, other, size):
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, CHANNELS, 1)
            self.up = nn.ConvTranspose2d(CHANNELS, 4, kernel, stride, padding)
            self.beside = nn.Conv2d(CHANNELS, 4, 3, padding=1, padding_mode="reflect")

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            up = self.up(x)
            if other == "bilinear":
                more = F.interpolate(x, scale_factor=2, mode="bilinear")
            else:
                more = self.beside(x) if other == "reflect" else F.max_pool2d(x, 3, 1, 1)
            return (up * up).mean((2, 3), keepdim=True) * more[:, :4]

    compare(Both(), torch.randn(2, 3, *size))


def test_other_transposed_convolutions_stay_in_torch():
    for up in (
        nn.ConvTranspose2d(CHANNELS, 3, 3, stride=3),
        nn.ConvTranspose2d(CHANNELS, 3, 3, dilation=2, output_padding=1),
    ):
        module = behind_conv(up, nn.Conv2d(3, 2, 1)).eval()
        x = torch.randn(2, 3, 9, 12)
        with torch.no_grad(), pytest.warns(UserWarning, match="conv_transpose2d: (kernel|output_padding)"):
            assert torch.allclose(lipfast.accelerate(module)(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(12, 8), (3, 2), (None, 8), 4, 1])
def test_adaptive_pooling_by_whole_windows(compare, size):
    compare(Apply(lambda x: F.adaptive_avg_pool2d(x, size)), torch.randn(2, 3, 12, 8 if size != 4 else 12))


@pytest.mark.parametrize(("batch", "channels"), [(1, 17), (3, 1), (18, 5)])
@pytest.mark.parametrize("size", [(3, 6), 6, (1, 5), (16, 1), (20, 31), (None, 4)])
def test_adaptive_pooling_by_uneven_windows(compare, size, batch, channels):
    module = nn.Sequential(nn.Conv2d(3, channels, 1), nn.AdaptiveAvgPool2d(size))
    compare(module, torch.randn(batch, 3, 16, 13))


def _factors(x: Tensor) -> Tensor:
    return torch.sigmoid(F.adaptive_avg_pool2d(x, 1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "join",
    [
        lambda a, b, x: a * b,
        lambda a, b, x: torch.sigmoid(a).mul(b) + a,
        lambda a, b, x: a * a,
        lambda a, b, x: x * a * x,
        lambda a, b, x: a * _factors(b),
        lambda a, b, x: _factors(a) * a + b,
        lambda a, b, x: torch.relu(a) * x.mean((2, 3), keepdim=True),
        lambda a, b, x: _factors(a) * _factors(b) * x,
        lambda a, b, x: a * torch.flatten(_factors(b), 1).view(-1, 3, 1, 1),
        lambda a, b, x: a * _factors(b).view(2, 3).reshape((2, 3, 1, 1)).expand_as(a),
        lambda a, b, x: torch.cat([a * b, b * _factors(a)], dim=1)[:, 1:4],
    ],
    ids=range(11),
)
def test_products(compare, join, training):
    compare(Blocks(join).train(training), torch.randn(2, 3, 9, 13))


def test_other_products_stay_in_torch():
    for join in (
        lambda a, b, x: (_factors(a) * b[:, :1]) * b,
        lambda a, b, x: a * b[:, :, :1],
        lambda a, b, x: a.clamp(-1, 1) * b,
    ):
        module = Blocks(join).eval()
        x = torch.randn(2, 3, 9, 12)
        with torch.no_grad(), pytest.warns(UserWarning, match="the product of|clamp: the engine has no such operator"):
            assert torch.allclose(lipfast.accelerate(module)(x), module(x), rtol=1e-4, atol=1e-5)


class Downsampling(nn.Module):
    """A block whose residual is made after the sum's other side, as ResNets do."""

    def __init__(self, kernel: int, stride: int, activation: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, kernel, stride, kernel // 2, bias=False)
        self.second, self.shortcut = nn.Conv2d(6, 20, 3, padding=1), nn.Conv2d(3, 20, 1, stride)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(20), nn.BatchNorm2d(20)])
        self.activation = activation
        for norm in self.norms:
            nn.init.normal_(norm.weight)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[1](self.second(torch.relu(self.norms[0](self.first(x)))))
        return self.activation(y + self.norms[2](self.shortcut(x)))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.SiLU(), nn.Identity()], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("size", "kernel", "stride"), [((33, 18), 3, 1), ((16, 9), 1, 1), ((12, 20), 3, 2)])
def test_convolutions_that_finish_as_they_store(compare, size, kernel, stride, density, activation):
    module = Downsampling(kernel, stride, activation).eval()
    names = ("first.weight", "second.weight", "shortcut.weight")
    masks = {name: torch.rand(module.get_parameter(name).shape) < density for name in names} if density < 1 else {}
    compare(module, torch.randn(2, 3, *size), masks)


HEADS = {
    "pooled": lambda m, x: m.small(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)),
    "mean": lambda m, x: m.small(x.mean((2, 3))),
    "mean kept": lambda m, x: m.small(x.mean([-1, -2], keepdim=True).view(x.shape[0], -1)),
    "whole map": lambda m, x: m.large(x.flatten(1)),
    "two layers": lambda m, x: m.last(F.dropout(torch.relu(m.large(x.reshape(-1, 3 * 5 * 7))), training=False)),
}


class Head(nn.Module):
    """A convolution and what classifiers end with."""

    def __init__(self, head: Callable[["Head", Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.small, self.large, self.last = nn.Linear(3, 4), nn.Linear(3 * 5 * 7, 6), nn.Linear(6, 2)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self, self.conv(x))


@pytest.mark.parametrize("batch", [1, 2, 8, 17])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("head", list(HEADS))
def test_heads(compare, head, pruned, batch):
    module = Head(HEADS[head])
    masks = {name: torch.rand(layer.weight.shape) < 0.5 for name, layer in module.named_children()} if pruned else {}
    compare(module, torch.randn(batch, 3, 5, 7), {f"{name}.weight": mask for name, mask in masks.items()})


def test_a_mean_in_an_odd_picture_counts_its_pixels_only(compare):
    compare(Head(HEADS["pooled"]), torch.randn(3, 3, 9, 13))


class Residual(nn.Module):
    """Layers of features with everything that may lie between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(20, 33), nn.Linear(33, 33), nn.Linear(33, 5)
        self.norms = nn.ModuleList(nn.BatchNorm1d(33) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norms[0](self.first(torch.flatten(x, 1))))
        y = F.dropout(torch.relu(self.norms[1](self.second(y)) + y), training=False)
        return self.last(2 * y - 1)


@pytest.mark.parametrize(
    ("batch", "training"), [(1, False), (3, False), (65, False), (3, True), (8, True), (17, True), (65, True)]
)
@pytest.mark.parametrize("size", [(20,), (5, 2, 2)])
def test_pruned_layers_of_features(compare, batch, size, training):
    module = Residual().train(training)
    layers = ("first", "second", "last")
    masks = {f"{name}.weight": torch.rand(getattr(module, name).weight.shape) < 0.2 for name in layers}
    compare(module, torch.randn(batch, *size), masks)


class Tokens(nn.Module):
    """Layers of features of tokens, and the forms in which networks hand them on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 33), nn.Linear(33, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(F.gelu(self.first(x)), training=False).contiguous()
        y = x + 0.5 * self.second(y).flatten(0, 1).view(x.shape)
        return self.last(torch.relu(y.reshape(-1, 1, 6))).view(*x.shape[:-1], 5)


TOKENS = [(1, 1), (3, 1), (2, 5), (1, 197), (8, 25), (4, 64), (2, 3, 7), (2, 1, 3, 5)]


@pytest.mark.parametrize("size", TOKENS, ids=str)
def test_pruned_layers_of_tokens(compare, size):
    module = Tokens()
    masks = {name: torch.rand(p.shape) < 0.2 for name, p in module.named_parameters() if p.dim() == 2}
    compare(module, torch.randn(*size, 6), masks)


class Normed(nn.Module):
    """Layer norms before, between and behind layers of features, beside a sum and alone."""

    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(70, 30), nn.Linear(30, 70)
        self.norms = nn.ModuleList(nn.LayerNorm(size, 1e-3, affine) for size in (70, 30, 70))
        for parameter in self.norms.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.norms[1](self.first(self.norms[0](x))))
        return self.norms[2](x + self.second(y)) + x


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("size", [*TOKENS, (33,)], ids=str)
def test_layer_norms(compare, size, affine):
    module = Normed(affine)
    masks = {f"{name}.weight": torch.rand(getattr(module, name).weight.shape) < 0.2 for name in ("first", "second")}
    compare(module, 3 + torch.randn(*size, 70), masks)


class Pixels(nn.Module):
    """A block of a ConvNeXt: layers of each pixel's channels, which lie behind for them, scaled and added."""

    def __init__(self, scale: tuple[int, ...], form: Callable[["Pixels", Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 7, padding=3, groups=6)
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 24), nn.Linear(24, 6)
        self.scale = nn.Parameter(torch.randn(scale))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, self.stem(x))

    def layers(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))


def behind(m: Pixels, x: Tensor) -> Tensor:
    return x + (m.scale * m.layers(m.deep(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


def in_front(m: Pixels, x: Tensor) -> Tensor:
    return x + m.scale * torch.permute(m.layers(x.permute((0, 2, 3, 1))), (0, 3, 1, 2))


PIXELS = {
    "scaled behind": ((6,), behind),
    "scaled behind, with axes": ((1, 1, 6), behind),
    "scaled in front": ((6, 1, 1), in_front),
    "scaled in front, four axes": ((1, 6, 1, 1), in_front),
    "channels stay behind": ((6,), lambda m, x: (y := x.permute(0, 2, -1, 1)) + m.layers(y)),
    "nothing but permuted": ((6,), lambda m, x: torch.tanh(x).permute(0, 2, 3, 1)),
    "multiplied as permuted": ((6,), lambda m, x: m.scale * torch.tanh(x.permute(0, 2, 3, 1))),
    "flattened": ((6,), lambda m, x: m.layers(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).flatten(1)),
    "laid out anew": ((6,), lambda m, x: torch.tanh(x.permute(0, 2, 3, 1).contiguous())),
}


@pytest.mark.parametrize("batch", [1, 4, 18])
@pytest.mark.parametrize("name", list(PIXELS))
def test_layers_of_pixels(compare, name, batch):
    module = Pixels(*PIXELS[name])
    masks = {
        f"{layer}.weight": torch.rand(getattr(module, layer).weight.shape) < 0.3 for layer in ("stem", "up", "down")
    }
    compare(module, torch.randn(batch, 3, 11, 14), masks)


def test_a_map_and_its_permuted_view_may_both_be_results():
    torch.manual_seed(0)
    module = Pixels((6,), lambda m, x: (x, x.permute(0, 2, 3, 1), m.layers(x.permute(0, 2, 3, 1))))
    fast, x = lipfast.accelerate(module), torch.randn(2, 3, 8, 12)
    results = fast(x), module(x)
    weights = [torch.randn_like(result) for result in results[1]]
    for found in results:
        torch.autograd.backward(found, weights)
    for got, expected in zip(*results, strict=True):
        assert torch.allclose(got, expected, atol=1e-5)
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(fast.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-4), name


PERMUTED = {
    "a learned number first": ((1, 1, 1, 1), lambda m, x: m.scale * x),
    "learned numbers first": ((1, 1, 1, 6), lambda m, x: torch.addcmul(m.scale, m.scale, x)),
    "square": ((1,), lambda m, x: x.square() + m.scale),
    "slope": ((1,), lambda m, x: F.prelu(x, m.scale)),
    "gate": ((1,), lambda m, x: x.mean(-1, keepdim=True) * x),
    "one channel": ((1,), lambda m, x: x.amax(-1, keepdim=True)),
}
PERMUTED = {name: (size, lambda m, x, f=form: f(m, x.permute(0, 2, 3, 1))) for name, (size, form) in PERMUTED.items()}


@pytest.mark.parametrize("name", ["scaled behind", *list(PIXELS)[4:], *PERMUTED])
def test_permuted_results_lie_as_in_torch(name):
    module = Pixels(*(PIXELS | PERMUTED)[name])
    x = torch.randn(2, 3, 8, 12)
    assert lipfast.accelerate(module)(x).stride() == module(x).stride()


@pytest.mark.parametrize(
    "form",
    [
        lambda m, x: m.deep(x.permute(0, 3, 2, 1).permute(0, 3, 2, 1)),
        lambda m, x: m.deep(x.permute(0, 2, 3, 1)[:, :6, :6].contiguous().permute(0, 3, 1, 2)),
        lambda m, x: x + x.permute(0, 2, 3, 1),
        lambda m, x: m.norm(x.permute(0, 2, 3, 1)).flatten(1),
        lambda m, x: m.norm(x.permute(0, 2, 3, 1)).mean((1, 2)),
        lambda m, x: torch.cat([m.norm(x.permute(0, 2, 3, 1)), x.permute(0, 2, 3, 1)], 1),
        lambda m, x: F.max_pool2d(m.norm(x.permute(0, 2, 3, 1)), 2),
        lambda m, x: F.batch_norm(x.permute(0, 2, 3, 1), None, None, training=True),
        lambda m, x: m.scale * x,  # along the width
        lambda m, x: m.layers(x),
        lambda m, x: m.norm(x.permute(0, 2, 3, 1)).view(torch.int32),
        lambda m, x: m.up(x.flatten(2).mT).view(torch.int32),
    ],
    ids=range(12),
)
def test_what_only_looks_like_layers_of_pixels_is_as_in_torch(form):
    """Maps of equal sides, so that no shape tells the axes apart."""
    torch.manual_seed(0)
    module = Pixels((6,), form)
    module.up.weight.data *= torch.rand_like(module.up.weight) < 0.2
    fast = lipfast.accelerate(module)
    x = torch.randn(2, 3, 12, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        got, expected = fast(x), module(x)
    assert got.dtype == expected.dtype
    assert torch.allclose(got.view(torch.float32), expected.view(torch.float32), atol=1e-5)


def test_layer_norms_give_the_same_bits_on_any_number_of_threads():
    torch.manual_seed(0)
    network = nn.Sequential(nn.LayerNorm(70), nn.Linear(70, 30), nn.LayerNorm(30))
    masks = {"1.weight": torch.rand(30, 70) < 0.2}
    x, before, found = torch.randn(4, 50, 70), torch.get_num_threads(), []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        fast = lipfast.accelerate(network, masks)
        fast(x).pow(3).sum().backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in fast.parameters()]))
    torch.set_num_threads(before)
    assert all(torch.equal(gradients, found[0]) for gradients in found)


def test_a_layer_norm_without_epsilon_is_as_in_torch():
    module = nn.Sequential(nn.Linear(4, 8, bias=False), nn.LayerNorm(8, eps=0.0), nn.Linear(8, 8))
    masks = {"0.weight": (torch.arange(32) % 4 == 0).view(8, 4), "2.weight": torch.eye(8) > 0}
    for name, mask in masks.items():
        module.get_parameter(name).data.mul_(mask)
    fast, x = lipfast.accelerate(module, masks), torch.randn(1, 213, 4)  # which leaves lanes empty
    with pytest.warns(UserWarning, match="epsilon 0.0"):
        fast(x).square().sum().backward()
    module(x).square().sum().backward()
    assert torch.allclose(fast.get_parameter("1.weight").grad, module[1].weight.grad, rtol=1e-3)


def test_a_layer_norm_over_more_than_features_stays_in_torch():
    model = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm((4, 6)))
    lowered = lower(recorded(model), {"0.weight": torch.arange(48).view(6, 8) % 4 == 0})
    assert lowered.refused == ["layer_norm: a norm over more than the last axis"]


def recorded(model: nn.Module, items: int = 4) -> Recording:
    def call(leaves, x):
        return call_with(model, leaves, (x,))

    return record(call, [torch.randn(items, 8)], {**dict(model.named_parameters()), **dict(model.named_buffers())})


@pytest.mark.parametrize(
    ("items", "behind", "expected"),
    [
        (197, nn.ReLU(), (4, 50)),
        (197, nn.BatchNorm1d(6).eval(), (4, 50)),
        (197, nn.BatchNorm1d(6), (1, 197)),  # its statistics count the items
        (3, nn.ReLU(), (1, 3)),
        (64, nn.ReLU(), (4, 16)),
    ],
    ids=str,
)
def test_rows_are_padded_where_that_fills_lanes(items, behind, expected):
    model = nn.Sequential(nn.Linear(8, 6), behind)
    (segment,) = lower(recorded(model, items), {"0.weight": torch.arange(48).view(6, 8) % 4 == 0}).items
    assert {segment.graph.shapes[value][2:] for value in segment.graph.rows} == {expected}


@pytest.mark.parametrize("masks", [{}, {"0.weight": torch.arange(48).view(6, 8) % 2 == 0}], ids=["dense", "half"])
def test_layers_of_features_stay_in_torch_unless_pruned(masks):
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU())
    lowered = lower(recorded(model), masks)
    assert not any(isinstance(item, Segment) for item in lowered.items)
    assert "weights: torch is as fast" in lowered.refused[0]


def test_a_linear_layer_of_more_kept_weights_than_lists_can_hold_stays_in_torch(monkeypatch):
    monkeypatch.setattr("lipfast.engine.handlers._LARGEST_LINEAR", 9)
    model = nn.Sequential(nn.Linear(8, 6))
    mask = torch.arange(48).view(6, 8) % 4 == 0
    assert "a linear layer with 12 weights: too large" in lower(recorded(model), {"0.weight": mask}).refused[0]


def behind_wide_conv(channels: int, *modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), *modules)


# Beside SIZES: one pixel; eighteen pictures, which share lanes.
SHAPES = [(1, 3, 16, 16), (3, 3, 17, 14), (3, 3, 1, 1), (18, 3, 7, 6)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("channels", "slopes"), [(1, 1), (5, 1), (5, 5), (17, 17)])
def test_prelu(compare, shape, channels, slopes):
    prelu = randomised(nn.PReLU(slopes))
    compare(behind_wide_conv(channels, prelu), torch.randn(shape))
    compare(
        behind_wide_conv(channels, nn.BatchNorm2d(channels).eval(), prelu, nn.Conv2d(channels, 2, 1)),
        torch.randn(shape),
    )


@pytest.mark.parametrize("slopes", [1, 6])
@pytest.mark.parametrize("norm", [lambda: nn.GroupNorm(2, 6), lambda: nn.InstanceNorm2d(6), lambda: nn.BatchNorm2d(6)])
def test_prelu_behind_a_norm(compare, norm, slopes):
    compare(behind_wide_conv(6, norm(), randomised(nn.PReLU(slopes))), torch.randn(3, 3, 9, 7))


@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.InstanceNorm2d(5), lambda: nn.BatchNorm2d(5)])
def test_one_slope_is_part_of_what_comes_before_in_inference(inference, norm):
    prelu, x = nn.PReLU(), torch.randn(2, 3, 9, 6)
    module = behind_wide_conv(5, norm(), prelu, nn.Conv2d(5, 5, 3, padding=1), prelu).eval()
    running = inference(module, x, {})
    assert not [step for _, step, _ in running.profile() if step.startswith(("prelu", "finish"))]
    for slope in (0.25, -1.5):
        slopes = [running.value(number) for number in range(len(running.plan.values))]
        for value in slopes:
            if value.numel() == 1:
                value.fill_(slope)
        nn.init.constant_(prelu.weight, slope)
        assert torch.allclose(running.forward([x], 2)[0], module(x), atol=1e-5)


@pytest.mark.parametrize("slopes", [1, 7])
@pytest.mark.parametrize("batch", [1, 3, 50])
def test_prelu_of_features(compare, batch, slopes):
    module = nn.Sequential(nn.Linear(6, 7), randomised(nn.PReLU(slopes)), nn.Linear(7, 5))
    masks = {name: torch.rand(p.shape) < 0.2 for name, p in module.named_parameters() if p.dim() == 2}
    compare(module, torch.randn(batch, 6), masks)


@pytest.mark.parametrize("pool", [1, 3])
def test_prelu_of_a_flattened_map(compare, pool):
    module = behind_wide_conv(5, nn.AdaptiveAvgPool2d(pool), nn.Flatten(), randomised(nn.PReLU(5 * pool**2)))
    compare(module, torch.randn(3, 3, 8, 9))


def test_prelu_of_tokens_with_a_slope_for_all(compare):
    module = nn.Sequential(nn.Linear(6, 7), randomised(nn.PReLU()), nn.Linear(7, 5))
    masks = {name: torch.rand(p.shape) < 0.2 for name, p in module.named_parameters() if p.dim() == 2}
    compare(module, torch.randn(2, 7, 6), masks)


@pytest.mark.parametrize(
    "form",
    [
        lambda m, x, maps: F.prelu(m.first(x), m.slopes),  # for each token
        lambda m, x, maps: F.prelu(m.first(maps), m.slopes),
        lambda m, x, maps: F.prelu(m.conv(maps).permute(0, 2, 3, 1), m.slopes),  # for each row of pixels
    ],
    ids=["tokens", "tokens of four axes", "rows"],
)
def test_slopes_along_another_axis_stay_in_torch(form):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.conv = nn.Linear(7, 7), nn.Conv2d(7, 7, 1)
            self.slopes = nn.Parameter(torch.randn(7))

        def forward(self, x: Tensor, maps: Tensor) -> Tensor:
            return form(self, x, maps)

    module = Net()
    module.first.weight.data *= torch.rand(7, 7) < 0.2
    x, maps = torch.randn(3, 7, 7), torch.randn(2, 7, 7, 7)
    with torch.no_grad(), pytest.warns(UserWarning, match="prelu: slopes along another axis"):
        assert torch.allclose(lipfast.accelerate(module)(x, maps), module(x, maps), atol=1e-5)


class Gated(nn.Module):
    """A map, another one and what joins them."""

    def __init__(self, channels: int, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(3, channels, 1)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.first(x), self.second(x))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels", [1, 5, 70])
@pytest.mark.parametrize(
    "join",
    [
        lambda a, b: a * torch.sigmoid(b[:, :1]),
        lambda a, b: torch.tanh(b[:, -1:]) * a * b,
        lambda a, b: a + b[:, :1],
        lambda a, b: 2 * b[:, :1] - a,
        lambda a, b: a[:, :1] * a + a,
        lambda a, b: a * torch.cat([b.mean(1, keepdim=True), a[:, :1]], 1).mean([-3], keepdim=True),
    ],
    ids=range(6),
)
def test_maps_of_one_channel(compare, join, channels, shape):
    compare(Gated(channels, join), torch.randn(shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels", [1, 5, 70])
@pytest.mark.parametrize(
    "join",
    [
        lambda a, b: a.mean(dim=1, keepdim=True),
        lambda a, b: a.amax(dim=1, keepdim=True),
        lambda a, b: torch.amax(a, 1, True) * b + a,
        lambda a, b: torch.max(a, dim=1, keepdim=True)[0],
        lambda a, b: a.max(-3, keepdim=True).values - b,
        lambda a, b: a.permute(0, 2, 3, 1).amax(-1, keepdim=True),
        lambda a, b: a.permute(0, 2, 3, 1) * b.permute(0, 2, 3, 1).mean((3,), keepdim=True),
    ],
    ids=range(7),
)
def test_means_and_maxima_over_channels(compare, join, channels, shape):
    compare(Gated(channels, join), torch.randn(shape))


@pytest.mark.parametrize("name", ["amax", "max"])
def test_equal_channels_have_the_gradient_as_in_torch(compare, name):
    """amax shares it, max gives it to the first."""
    module = Gated(6, lambda a, b: a.amax(1, keepdim=True) if name == "amax" else a.max(1, keepdim=True)[0])
    nn.init.zeros_(module.first.weight)
    module.first.bias.data = torch.tensor([1.0, 3.0, 2.0, 3.0, 3.0, -1.0])
    compare(module, torch.randn(2, 3, 9, 6))


def test_a_maximum_of_which_the_place_is_read_is_as_in_torch():
    module = Gated(5, lambda a, b: (m := a.max(1, keepdim=True))[0] * b + m[1])
    x = torch.randn(2, 3, 9, 6)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert torch.allclose(lipfast.accelerate(module)(x), module(x), atol=1e-5)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(
    "join",
    [
        lambda a, b: (
            a * ((g := sizes(b, 2, (1, 2))) / (g.mean(-1, keepdim=True) + 1e-3)).view(-1, 1, 6)
        ),  # for each row
        lambda a, b: a * ((g := sizes(b, 2, (1, 2))) / (g.mean(-1, keepdim=True) + 1e-3)),
        lambda a, b: a.flatten(1, 2) * b.amax(-1, keepdim=True).flatten(1, 2),
        lambda a, b: a.view(-1, 8, 6) + b.amax(-1, keepdim=True).view(-1, 8, 1),
        lambda a, b: a.view(-1, 4, 2, 8, 6).transpose(2, 3).reshape(a.shape).square() * b.amax(-1, keepdim=True),
        lambda a, b: (a.view(-1, 4, 2, 8, 6).transpose(2, 3).reshape(a.shape) ** 2).amax(-1, keepdim=True) + 1,
    ],
    ids=range(6),
)
def test_maps_with_channels_behind_in_other_forms_are_as_in_torch(join, batch):
    """Of equal sides and batch, so that no shape tells the axes apart."""
    module = Gated(6, lambda a, b: join(a.permute(0, 2, 3, 1).contiguous(), b.permute(0, 2, 3, 1).contiguous()))
    fast, x = lipfast.accelerate(module), torch.randn(batch, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        results = [fast(x), module(x)]
    assert torch.allclose(*results, atol=1e-5)
    for result in results:
        result.square().sum().backward()
    read = {name: parameter for name, parameter in module.named_parameters() if parameter.grad is not None}
    for name, parameter in read.items():
        scale = float(parameter.grad.abs().max())
        assert torch.allclose(fast.get_parameter(name).grad, parameter.grad, atol=1e-4 * scale), name


class SpatialAttention(nn.Module):
    """As CBAM has it."""

    def __init__(self, drops_axis: bool) -> None:
        super().__init__()
        self.drops_axis = drops_axis
        self.first, self.gate = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 1, 7, padding=3)
        self.norm, self.last = nn.BatchNorm2d(1), nn.Conv2d(6, 4, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        if self.drops_axis:
            seen = [torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1), torch.unsqueeze(x.amax(1), dim=1)]
        else:
            seen = [x.mean(dim=1, keepdim=True), torch.max(x, dim=1, keepdim=True)[0], x.amax(1, keepdim=True)]
        return self.last(x * torch.sigmoid(self.norm(self.gate(torch.cat(seen, dim=1)))))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("drops_axis", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 9, 14), (18, 3, 7, 6)])
def test_spatial_attention(compare, shape, drops_axis, training):
    compare(SpatialAttention(drops_axis).train(training), torch.randn(shape))


class Learned(nn.Module):
    """Two convolutions and learned numbers, one each, of one or more axes."""

    def __init__(self, channels: int, form: Callable[["Learned", Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 2, 1)
        self.scale, self.bias = nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(()))
        self.wide = nn.Parameter(torch.randn(1, 1, 1, 1))
        self.each, self.shift = nn.Parameter(torch.randn(channels, 1, 1)), nn.Parameter(torch.randn(channels, 1, 1))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.form(self, self.first(x)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels", [1, 5, 17])
@pytest.mark.parametrize(
    "form",
    [
        lambda m, x: m.scale * x,
        lambda m, x: x + m.bias,
        lambda m, x: m.scale * torch.relu(x) ** 2 + m.bias,
        lambda m, x: torch.relu(x).square() * m.wide + m.scale * x,
        lambda m, x: x + m.bias * torch.sigmoid(x),
        lambda m, x: F.relu(m.each * x + m.bias) + m.wide,
        lambda m, x: torch.pow(x, 2) * m.scale * m.bias,
        lambda m, x: x.mul(m.scale).pow(2.0),
        lambda m, x: m.scale * x + m.bias + m.wide,
        lambda m, x: torch.relu(m.scale * x + torch.tanh(x) + m.bias) * m.wide,
        lambda m, x: torch.addcmul(x, torch.tanh(x), x),
        lambda m, x: torch.addcmul(x, m.each, x, value=0.5),
        lambda m, x: x + torch.addcmul(m.shift, m.each, x.square()),
        lambda m, x: torch.addcmul(m.bias, x, m.scale),
    ],
    ids=range(14),
)
def test_learned_numbers_squares_and_addcmul(compare, form, channels, shape):
    compare(Learned(channels, form), torch.randn(shape))


def test_one_number_that_the_module_computes():
    module = Learned(5, lambda m, x: torch.sigmoid(m.scale) * x + m.bias.exp())
    fast, x = lipfast.accelerate(module), torch.randn(2, 3, 9, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for network in (fast, module):
            network(x).square().sum().backward()
    for name in ("scale", "bias", "first.weight"):
        expected = module.get_parameter(name).grad
        assert torch.allclose(
            fast.get_parameter(name).grad, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
        )


def test_one_number_of_features(compare):
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = (
                nn.Linear(6, 7),
                nn.LayerNorm(7, elementwise_affine=False),
                nn.Linear(7, 6),
            )
            self.scale, self.bias = nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(1))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale * self.last(torch.relu(self.norm(self.first(x)) + self.bias) ** 2)

    module = Rows()
    masks = {name: torch.rand(p.shape) < 0.2 for name, p in module.named_parameters() if p.dim() == 2}
    for shape in ((3, 6), (2, 50, 6)):
        compare(module, torch.randn(shape), masks)


class ResponseNorm(nn.Module):
    """A global response norm between the layers of a ConvNeXt V2 block, in one of its spellings."""

    def __init__(
        self, channels: int, last: bool, form: Callable[["ResponseNorm", Tensor, tuple[int, int], int], Tensor]
    ):
        super().__init__()
        self.first, self.last, self.form = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 4, 1), form
        self.features_last = last
        shape = (1, 1, 1, channels) if last else (1, channels, 1, 1)
        self.weight, self.bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x))
        if not self.features_last:
            return self.last(self.form(self, x, (2, 3), 1))
        return self.last(self.form(self, x.permute(0, 2, 3, 1), (1, 2), -1).permute(0, 3, 1, 2))


def of_timm(m: ResponseNorm, x: Tensor, pixels: tuple[int, int], channels: int) -> Tensor:
    x_g = x.norm(p=2, dim=pixels, keepdim=True)
    x_n = x_g / (x_g.mean(dim=channels, keepdim=True) + 1e-3)
    return x + torch.addcmul(m.bias, m.weight, x * x_n)


def of_the_paper(m: ResponseNorm, x: Tensor, pixels: tuple[int, int], channels: int) -> Tensor:
    gx = torch.norm(x, p=2, dim=pixels, keepdim=True)
    nx = gx / (gx.mean(dim=channels, keepdim=True) + 1e-3)
    return m.weight * (x * nx) + m.bias + x


def of_vectors(m: ResponseNorm, x: Tensor, pixels: tuple[int, int], channels: int) -> Tensor:
    size = torch.linalg.vector_norm(x, dim=pixels, keepdim=True)
    return x * torch.div(size, torch.mean(size, channels, True) + 1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels", [1, 17])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("form", [of_timm, of_the_paper, of_vectors])
def test_global_response_norms(compare, form, last, channels, shape):
    compare(ResponseNorm(channels, last, form), torch.randn(shape))


def test_the_factors_of_a_response_norm_multiply_its_few_numbers(inference):
    module, x = ResponseNorm(17, True, of_timm), torch.randn(2, 3, 9, 6)
    steps = [step for _, step, _ in inference(module, x, {}).profile()]
    assert [step for step in steps if step.startswith(("response", "finish", "multiply"))] == [
        "finish 17x9x6",  # GELU
        "response norm 17x9x6",
        "finish 17x1x1",
        "multiply 17x9x6",
        "finish 17x9x6",
    ]


GATES = {
    "GELU": (lambda m, x: F.gelu(x) * x, ["finish"]),
    "behind": (lambda m, x: m.shift * x * F.silu(m.each * x + m.bias), ["finish", "finish"]),
    "of a sum": (lambda m, x: torch.sigmoid(x + m.each) * torch.tanh(x), ["finish", "finish"]),
    "twice": (lambda m, x: F.gelu(x) * x * x, ["finish", "multiply"]),
    "of two activations": (lambda m, x: F.gelu(x) * F.silu(x), ["finish", "finish"]),
    "ReLU, which convolutions do": (lambda m, x: torch.relu(m.again(x)) * x, ["conv", "multiply"]),
    "squared": (lambda m, x: F.gelu(x).square(), ["finish", "multiply"]),
    "behind a gate": (lambda m, x: torch.tanh(F.gelu(x) * x) + x, ["finish", "finish", "finish"]),
    "read twice": (lambda m, x: (y := F.gelu(x)) * x + y, ["finish", "multiply", "finish"]),
}


class WithGate(Learned):
    """With a third convolution in between."""

    def __init__(self, channels: int, form: Callable[["Learned", Tensor], Tensor]) -> None:
        super().__init__(channels, form)
        self.again = nn.Conv2d(channels, channels, 1)


@pytest.mark.parametrize("form", [lambda m, x: x + m.again(x), lambda m, x: m.again(x) + x], ids=["behind", "before"])
def test_convolutions_add_what_they_are_added_to(compare, inference, form):
    module, x = WithGate(17, form), torch.randn(2, 3, 9, 6)
    compare(module, x)
    steps = [step.split()[0] for _, step, _ in inference(module, x, {}).profile()]
    assert [step for step in steps if step in ("conv", "finish", "combine")] == ["conv"] * 3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate", GATES)
def test_activations_multiply_what_they_make(compare, inference, gate, shape):
    form, expected = GATES[gate]
    module, x = WithGate(17, form), torch.randn(shape)
    compare(module, x)
    steps = [step.split()[0] for _, step, _ in inference(module, x, {}).profile()]
    between = [step for step in steps if step in ("conv", "finish", "multiply")]
    assert between == ["conv", *expected, "conv"]


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("axes", [(2, 3), (1,)], ids=["planes", "pixels"])
def test_factors_of_channels_behind_those_of_planes_and_pixels(compare, axes, other):
    """In a row, of which another operator may read the middle."""

    def form(m: Learned, x: Tensor) -> Tensor:
        gated = x * torch.sigmoid(x.mean(axes, keepdim=True))
        return gated * m.each * torch.tanh(x.mean(axes, keepdim=True)) * m.shift + (gated if other else x)

    compare(Learned(5, form), torch.randn(3, 3, 9, 6))


def test_a_channel_of_zeros_has_no_response(compare):
    module = ResponseNorm(5, False, of_timm)
    for parameter in module.first.parameters():
        parameter.data[2] = 0
    compare(module, torch.randn(2, 3, 9, 6))


def test_what_only_looks_like_a_response_norm_is_as_in_torch():
    """Maps of equal sides and channels, so that no shape tells the axes apart."""
    forms = [
        lambda x, g: x * (g(x, 2, (1, 2)) / (g(x, 2, (1, 2)).mean(1, keepdim=True) + 1e-3)),
        lambda x, g: x * (g(x, 2, (2, 3)) / (g(x, 2, (2, 3)).mean(-1, keepdim=True) + 1e-3)),
        lambda x, g: x * ((y := g(x, 1, (2, 3))) / (y.mean(1, keepdim=True) + 1e-3)),
        lambda x, g: x * ((y := g(x, 2, (1, 2))) / (y.mean(-1, keepdim=True) + 1e-3)),
        lambda x, g: x * ((y := g(x, 2, (2, 3))) / (y.mean(1, keepdim=True) + 0.0)),
        lambda x, g: (y := x.permute(0, 2, 3, 1)) * ((z := g(y, 2, (2, 3))) / (z.mean(1, keepdim=True) + 1e-3)),
    ]
    for form in forms:
        module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Activation(lambda x, f=form: f(x, sizes)))
        x = torch.randn(2, 3, 8, 8)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            assert torch.allclose(lipfast.accelerate(module)(x), module(x), rtol=1e-4, atol=1e-5)


def sizes(x: Tensor, p: int, dim: tuple[int, int]) -> Tensor:
    return x.norm(p=p, dim=dim, keepdim=True)


@pytest.mark.parametrize(
    "module",
    [
        behind_wide_conv(17, nn.PReLU(17), nn.PReLU()),
        Learned(17, lambda m, x: m.scale * torch.relu(x) ** 2 + m.bias),
        Gated(17, lambda a, b: a * torch.sigmoid(b[:, :1]) + b.amax(1, keepdim=True)),
        ResponseNorm(17, False, of_timm),
    ],
    ids=["prelu", "numbers", "gate", "response"],
)
def test_learned_operators_give_the_same_bits_on_any_number_of_threads(module):
    x, before, found = torch.randn(3, 3, 33, 29), torch.get_num_threads(), []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        fast = lipfast.accelerate(module)
        y = fast(x)
        y.pow(3).sum().backward()
        gradients = [p.grad.flatten() for p in fast.parameters() if p.grad is not None]
        found.append(torch.cat([y.detach().flatten(), *gradients]))
    torch.set_num_threads(before)
    assert all(torch.equal(numbers, found[0]) for numbers in found)
