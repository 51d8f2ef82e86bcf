"""What moves, splits and joins channels, works on each pixel's channels, or adds numbers to planes: against torch in
float64, alone and in the blocks of networks that are made of it."""

import copy
import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lipfast
from lipfast.engine.builder import Segment
from lipfast.engine.capture import Call, call_with, record
from lipfast.engine.lower import lower
from lipfast.engine.plan import Options, Weight
from lipfast.engine.runtime import Running

TOLERANCE = 500 * 2.0**-23  # see conftest.py
SIZES = [(2, 12, 16, 16), (1, 12, 9, 14), (3, 12, 3, 5), (9, 12, 8, 7), (17, 12, 4, 4)]


class Layers(nn.Module):
    """Convolutions and linear layers of 12 channels, and what a function makes of them."""

    def __init__(self, function: Callable[["Layers", Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 1)
        self.third = nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")
        self.down, self.up = nn.Linear(12, 3), nn.Linear(3, 12)
        self.weight, self.bias = nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(12))
        self.gain, self.shift = nn.Parameter(torch.randn(1, 12, 1, 1)), nn.Parameter(torch.randn(12, 1, 1))
        self.norm = nn.BatchNorm2d(12)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.first(x))


def check(
    function: Callable[[Layers, Tensor], Tensor], x: Tensor, *, whole: bool = True, training: bool = True
) -> None:
    """Result and all gradients of a pruned module in lanes; ``whole``: nothing but weights is computed in torch."""
    torch.manual_seed(1)
    module = Layers(function)
    for layer in (module.first, module.second, module.third, module.down, module.up):
        layer.weight.data *= torch.rand(layer.weight.shape) < 0.3
    exact = copy.deepcopy(module).double()
    unmoved = copy.deepcopy(exact).eval()(x.double())
    given, given64 = x.clone().requires_grad_(), x.double().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error" if whole else "ignore")
        fast = lipfast.accelerate(module)
        with torch.no_grad():
            inference = copy.deepcopy(fast).eval()(x)
        result = fast(given)
    expected = exact(given64)
    assert result.shape == expected.shape
    assert error(result, expected) < TOLERANCE
    assert error(inference, unmoved) < TOLERANCE
    slope = torch.randn(expected.shape)
    result.backward(slope)
    expected.backward(slope.double())
    assert error(given.grad, given64.grad) < TOLERANCE
    gradients = {name: parameter.grad for name, parameter in exact.named_parameters() if parameter.grad is not None}
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in fast.named_parameters():
        if name not in gradients:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        mask = fast.masks.get(name)
        wanted = gradients[name] if mask is None else gradients[name][mask]
        assert float((parameter.grad - wanted).abs().max()) <= TOLERANCE * scale, name


def error(got: Tensor, reference: Tensor) -> float:
    return float((got.detach().double() - reference.detach()).abs().max() / reference.detach().abs().max())


def gated(m: Layers, x: Tensor) -> Tensor:
    a, b = m.second(x).chunk(2, dim=1)
    return m.third(a * b)


def shuffled(m: Layers, x: Tensor) -> Tensor:
    n, c, height, width = x.shape
    return x.view(n, 2, c // 2, height, width).transpose(1, 2).contiguous().view(n, c, height, width)


def shuffle_unit(m: Layers, x: Tensor) -> Tensor:
    a, b = torch.relu(m.norm(m.second(x))).chunk(2, 1)
    x = shuffled(m, torch.cat((a, m.third(b)), 1))
    a, b = x.chunk(2, 1)
    return shuffled(m, torch.cat((a, m.third(b)), dim=1))


def excited(m: Layers, x: Tensor) -> Tensor:
    n, c = x.shape[:2]
    factors = torch.sigmoid(m.up(torch.relu(m.down(F.adaptive_avg_pool2d(x, 1).view(n, c))))).view(n, c, 1, 1)
    return m.second(x * factors.expand_as(x))


def told(m: Layers, x: Tensor) -> Tensor:
    told = m.up(F.silu(m.down(x.mean((2, 3)))))
    return m.second(x + told[:, :, None, None])


def thirds(m: Layers, x: Tensor) -> Tensor:
    a, b, c = torch.split(m.second(x), [3, 6, 3], dim=1)
    return torch.cat([c, m.third(b), a], 1) + x


def channel_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).pow(2).mean(1, keepdim=True)
    return weight[:, None, None] * ((x - mean) / torch.sqrt(variance + 1e-6)) + bias[:, None, None]


def biased_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - torch.mean(x, dim=1, keepdim=True)
    variance = x.var(1, unbiased=False, keepdim=True)
    return centred * (variance + 1e-6).rsqrt() * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


FUNCTIONS = {
    "gate": gated,
    "gate of parts that others read": lambda m, x: m.third(x[:, :6]) * x[:, 6:],
    "shuffle": lambda m, x: m.second(shuffled(m, x)),
    "shuffle of 3": lambda m, x: F.channel_shuffle(x, 3),
    "shuffle by flatten": lambda m, x: m.second(
        x.reshape(len(x), 4, 3, *x.shape[2:]).permute(0, 2, 1, 3, 4).flatten(1, 2)
    ),
    "units": shuffle_unit,
    "excited": excited,
    "told": told,
    "thirds": thirds,
    "overlapping parts": lambda m, x: m.third(x[:, :6]) + m.third(x[:, 4:10]),
    "every second channel": lambda m, x: m.third(torch.tanh(x[:, 1::2])),
    "parts returned": lambda m, x: m.second(x)[:, 3:7],
    "a part twice": lambda m, x: torch.cat([x[:, :6], m.third(x[:, :6])], 1),
    "parts of one map apart": lambda m, x: torch.relu(m.second(x).chunk(3, 1)[1]),
    "glu": lambda m, x: m.third(F.glu(m.second(x), 1)),
    "numbers of planes": lambda m, x: m.second(x) - 0.5 * x.mean((2, 3), keepdim=True),
    "numbers of planes for two maps": lambda m, x: _twice(m, x, m.second(x).mean((2, 3), keepdim=True)),
    "minus a map": lambda m, x: x.mean((2, 3), keepdim=True) - m.second(x),
    "planes behind an activation": lambda m, x: m.second(torch.relu(x) + torch.tanh(x.mean((2, 3), keepdim=True))),
    "gain and shift": lambda m, x: m.second(m.gain * x + m.shift),
    "shift before": lambda m, x: torch.relu(m.shift + m.second(x)) * m.gain,
    "channel norm": lambda m, x: m.second(channel_norm(x, m.weight, m.bias)) + x,
    "biased norm": lambda m, x: torch.relu(biased_norm(m.second(x), m.weight, m.bias)),
    "norm without weights": lambda m, x: m.second(
        (x - x.mean(1, True)) / ((x - x.mean(1, True)) ** 2).mean(1, True).add(1).sqrt()
    ),
    "norm that keeps the mean": lambda m, x: m.second(x / torch.sqrt(x.var(1, False, keepdim=True) + 1e-5)) * m.gain,
    "norm of pixels behind": lambda m, x: m.second(behind(x, lambda t: kept_mean(t) * m.weight) + x),
    "norm of pixels behind, centred": lambda m, x: m.second(behind(x, lambda t: spelled(t) * m.weight + m.bias)),
    "norm whose inside others read": lambda m, x: normed_twice(m, x),
    "unsqueezed": lambda m, x: x * m.up(m.down(x.mean((2, 3)))).unsqueeze(-1).unsqueeze(-1),
    "scaled as it is stored": lambda m, x: torch.relu(m.second(x) * m.gain + x) * m.gain,
    "scaled and shifted": lambda m, x: torch.tanh(m.third(m.second(x).mul(m.gain).add(m.shift)[:, :6])),
    "scaled twice": lambda m, x: m.second(x) * m.gain * m.weight[:, None, None] + x,
    "squeezed": lambda m, x: m.up(m.down(F.adaptive_avg_pool2d(m.second(x), 1).squeeze(-1).squeeze(-1))),
}


def kept_mean(x: Tensor) -> Tensor:
    return x / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)


def spelled(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)


def behind(x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    return norm(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


def _twice(m: Layers, x: Tensor, numbers: Tensor) -> Tensor:
    return torch.tanh(x + numbers) * m.second(torch.relu(x) + numbers)


def normed_twice(m: Layers, x: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    centred = x - mean
    normed = centred / torch.sqrt(centred.square().mean(1, keepdim=True) + 1.0)
    return m.second(normed) + centred


PARTLY_IN_TORCH = ("norm whose inside others read",)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_channels(name, size):
    torch.manual_seed(0)
    check(FUNCTIONS[name], torch.randn(size), whole=name not in PARTLY_IN_TORCH)


class Decoder(nn.Module):
    """Features to maps: a linear layer whose result is taken for small pictures."""

    def __init__(self, sides: tuple[int, int]) -> None:
        super().__init__()
        self.sides = sides
        self.first, self.second = nn.Linear(10, 4 * sides[0] * sides[1]), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)).view(-1, 4, *self.sides))


@pytest.mark.parametrize("batch", [1, 2, 8, 17])
@pytest.mark.parametrize("sides", [(1, 1), (3, 5), (8, 8)], ids=str)
def test_features_as_maps(compare, batch, sides):
    module = Decoder(sides)
    masks = {"first.weight": torch.arange(module.first.weight.numel()).view_as(module.first.weight) % 5 == 0}
    compare(module, torch.randn(batch, 10), masks)


class GatedTokens(nn.Module):
    """Features of tokens in two parts, one of which gates the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 24), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2, dim=-1)
        return self.second(F.silu(a) * b) + x


@pytest.mark.parametrize("size", [(3,), (2, 5), (1, 197), (4, 64)], ids=str)
def test_gated_features(compare, size):
    module = GatedTokens()
    masks = {name: torch.arange(p.numel()).view_as(p) % 7 == 0 for name, p in module.named_parameters() if p.dim() == 2}
    compare(module, torch.randn(*size, 10), masks)


NORMS_OF_FEATURES = {
    "root mean square": lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    "of torch": lambda x, w: F.rms_norm(x, (10,), w, 1e-3),
    "of torch, without weights": lambda x, w: F.rms_norm(x, (10,)) * w,
    "keeps the mean": lambda x, w: kept_mean(x) * w,
    "spelled out": lambda x, w: spelled(x) * w,
}


class NormedTokens(nn.Module):
    """Features of tokens between two layers, normalised."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.norm = NORMS_OF_FEATURES[norm]
        self.first, self.second = nn.Linear(10, 10), nn.Linear(10, 10)
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(10))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x) + 0.5, self.weight)) + x


@pytest.mark.parametrize("size", [(3,), (2, 5), (1, 197), (4, 64)], ids=str)
@pytest.mark.parametrize("norm", NORMS_OF_FEATURES)
def test_norms_of_features(compare, norm, size):
    torch.manual_seed(0)
    module = NormedTokens(norm)
    masks = {name: torch.arange(p.numel()).view_as(p) % 7 == 0 for name, p in module.named_parameters() if p.dim() == 2}
    compare(module, torch.randn(*size, 10), masks)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.cat([part.sum() * m.second(x) for part in x.chunk(2, dim=2)], 1),
        lambda m, x: m.second(x + x.mean((2, 3), keepdim=True)[:, :1]),
        lambda m, x: m.second(x.reshape(len(x), 3, 4, *x.shape[2:]).transpose(3, 4).reshape(x.shape)),
        lambda m, x: m.second(x.reshape(len(x), 3, 4, *x.shape[2:]).transpose(0, 1).reshape(x.shape)),
        lambda m, x: m.second(_frozen_norm(x)),
        lambda m, x: m.third(x[:, :9].reshape(len(x), 3, 3, 8, 8).transpose(3, 4).reshape(len(x), 9, 8, 8)[:, :6]),
        lambda m, x: m.second((x - x.mean(2, True)) / torch.sqrt((x - x.mean(1, True)).square().mean(1, True) + 1)),
        lambda m, x: m.second((x - x.mean(1, True)) / torch.sqrt(x.square().mean(1, True) + 1)),
        lambda m, x: m.second((x - x.mean(1, True)) / torch.sqrt(x.var(1, keepdim=True) + 1)),
        lambda m, x: m.second(x * m.weight[:3].sum() + m.bias.view(12, 1, 1).flip(0)),
        lambda m, x: m.second(kept_mean(x - x.mean(-1, keepdim=True))),
        lambda m, x: m.second(x / torch.sqrt((x - x.mean(1, True)).var(1, False, keepdim=True) + 1)),
        lambda m, x: m.second(x / torch.sqrt(x.var(2, False, keepdim=True) + 1)),
    ],
    ids=range(13),
)
def test_what_only_looks_alike_is_as_in_torch(function):
    torch.manual_seed(0)
    check(function, torch.randn(2, 12, 8, 8), whole=False)


def _frozen_norm(x: Tensor) -> Tensor:
    with torch.no_grad():
        mean = x.mean(1, keepdim=True)
    return (x - mean) / torch.sqrt((x - mean).square().mean(1, keepdim=True) + 1)


class WholeAndParts(nn.Module):
    """Returns a map beside what is made of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        whole = self.first(x)
        a, b = whole.chunk(2, dim=1)
        return whole, self.second(a) * b, b


def test_a_map_may_be_a_result_beside_its_parts():
    torch.manual_seed(0)
    module, x = WholeAndParts(), torch.randn(2, 3, 9, 7)
    fast = lipfast.accelerate(module)
    for network in (module, fast):
        sum(result.square().sum() * (place + 1) for place, result in enumerate(network(x))).backward()
    for name, parameter in module.named_parameters():
        assert torch.allclose(fast.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-4), name


def test_a_norm_of_what_changes_later_is_of_what_it_was():
    def late(m: Layers, x: Tensor) -> Tensor:
        y = x.clamp(-1, 1)  # in torch
        centred = y - y.mean(1, keepdim=True)
        variance = centred.square().mean(1, keepdim=True)
        y.exp_()  # in torch, too
        return m.second(centred / torch.sqrt(variance + 1)) + y

    torch.manual_seed(0)
    check(late, torch.randn(2, 12, 8, 12), whole=False)


def items_of(module: nn.Module, *inputs: Tensor) -> list[Segment | Call]:
    leaves = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    recording = record(lambda stand_ins, *given: call_with(module, stand_ins, given), inputs, leaves)
    masks = {name: leaf != 0 for name, leaf in leaves.items() if leaf.dim() > 1}
    return lower(recording, masks).items


class Conditioned(nn.Module):
    """A convolution that is told a number, which torch embeds, and another one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.embed = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3), nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        angles = t[:, None].float() * torch.arange(4)
        told = self.embed(torch.cat([angles.sin(), angles.cos()], dim=1))
        return self.second(x + told[:, :, None, None])


def test_calls_that_need_nothing_of_a_segment_do_not_end_it():
    torch.manual_seed(0)
    module, x, t = Conditioned(), torch.randn(2, 3, 9, 9), torch.tensor([1, 5])
    with torch.no_grad():
        module.embed.weight *= torch.rand(8, 8) < 0.2
    items = items_of(module, x, t)
    assert [isinstance(item, Segment) for item in items] == [False] * (len(items) - 1) + [True]
    fast = lipfast.accelerate(module)
    with pytest.warns(UserWarning, match="cat: an operand"):
        fast(x, t)
    for number in (t, 3 * t):
        assert torch.allclose(fast(x, number), module(x, number), rtol=1e-4, atol=1e-5)


def test_a_call_that_reads_what_a_segment_changes_comes_behind_it():
    class Told(Conditioned):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            x = self.norm(self.first(x))
            return self.second(x) * self.norm.running_mean.exp().sum()

    torch.manual_seed(0)
    module, x, t = Told(), torch.randn(2, 3, 9, 9), torch.tensor([1, 5])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = lipfast.accelerate(module)(x, t)
    assert torch.allclose(result, module(x, t), rtol=1e-4, atol=1e-4)


def test_parts_are_read_and_written_where_they_lie():
    torch.manual_seed(0)
    items = items_of(Layers(shuffle_unit), torch.randn(1, 12, 8, 8))
    (segment,) = [item for item in items if isinstance(item, Segment)]
    weights = [Weight(ref.shape, None, True) for ref in segment.weights]
    running = Running(segment, weights, Options(backward=True, input_gradients=[False]))
    steps = [label.split()[0] for section, label, _ in running.profile() if section == "forward"]
    assert steps.count("combine") == 2  # the half that each unit hands on


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_same_bits_on_any_number_of_threads(threads):
    torch.manual_seed(0)
    x = torch.randn(2, 12, 17, 13)
    before = torch.get_num_threads()
    results = []
    try:
        for count, name in itertools.product((2, threads), ("units", "told", "channel norm")):
            torch.set_num_threads(count)
            torch.manual_seed(2)
            fast = lipfast.accelerate(Layers(FUNCTIONS[name]))
            y = fast(x)
            y.square().sum().backward()
            results.append([y, *(p.grad for p in fast.parameters() if p.grad is not None)])
    finally:
        torch.set_num_threads(before)
    for one, other in zip(results[:3], results[3:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
