"""Modules whose forward keeps something for the next call: as in torch, or refused and left as they were."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.engine.lane_module import LaneModule
from lipfast.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:lipfast")  # of operators that run in torch
CHANNELS = 4


class Keeps(nn.Module):
    """A convolution, a parameter, and a forward function that is given the module."""

    def __init__(self, forward, kept) -> None:
        super().__init__()
        self._forward = forward
        self.conv, self.numbers = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.Parameter(torch.randn(CHANNELS, 9))
        self.kept = kept
        self.mean = torch.randn(1, CHANNELS, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def by_device(self, x):
    """A table of parameters, as LeViT has it."""
    if self.training:
        return self.conv(x) + self.numbers[:, [3, 1, 4, 1, 5]].mean(1).view(-1, 1, 1)
    key = str(x.device)
    if key not in self.kept:
        self.kept[key] = self.numbers[:, [3, 1, 4, 1, 5]].mean(1).view(-1, 1, 1)
    return self.conv(x) + self.kept[key]


def by_size(self, x):
    """Made anew for another size."""
    if self.kept is None or self.kept[0] != x.shape[-1]:
        grid = torch.zeros(x.shape[-2:], device=x.device)
        grid[1:3, 2:] = 2
        self.kept = x.shape[-1], grid * torch.arange(x.shape[-1])
        self.shape, self.made = x.shape, {"so often": 1}
    return self.conv(x) * self.kept[1] * self.made["so often"]


def of_the_first_size(self, x):
    """Made once and for all."""
    if not self.kept:
        self.kept.append(x.shape[-1] ** -0.5)
    return self.conv(x * self.kept[0])


def of_the_first_picture(self, x):
    if self.kept is None:
        self.kept = self.conv(x.detach()).relu().detach()
    return self.conv(x) - self.kept.mean()


def of_the_mean(self, x):
    """Which is what it was already, as SwinIR has it."""
    self.mean = self.mean.type_as(x).to(x.device)
    return self.conv(x - self.mean)


KEEPING = {
    "by device": (by_device, {}),
    "by size": (by_size, None),
    "of the first size": (of_the_first_size, []),
    "of the first picture": (of_the_first_picture, None),
    "the same": (of_the_mean, None),
}


def pair(name: str, pruned: bool) -> tuple[LaneModule, Keeps]:
    torch.manual_seed(0)
    forward, kept = KEEPING[name]
    model = Keeps(forward, copy.deepcopy(kept)).eval()
    if pruned:
        model.conv.weight.data *= torch.rand_like(model.conv.weight) < 0.5
    return lipfast.accelerate(model), model


def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("name", KEEPING)
def test_what_is_kept_is_what_torch_keeps(name, pruned):
    """Through other sizes, modes and parameters."""
    fast, model = pair(name, pruned)
    with torch.no_grad():
        for size in ((2, 5, 6), (2, 5, 6), (1, 7, 9), (2, 5, 6)):
            x = torch.randn(size[0], CHANNELS, *size[1:])
            assert_close(fast(x), model(x))
        for module in (fast, model):
            module.numbers.mul_(2)
            module.conv.bias.add_(1)
        assert_close(fast(x), model(x))  # of the numbers of before, where they were kept
        for module in (fast, model):
            module.train()
        assert_close(fast(x), model(x))
        for module in (fast, model):
            module.eval()
            module.kept = copy.deepcopy(KEEPING[name][1])
        assert_close(fast(x), model(x))


@pytest.mark.parametrize("name", KEEPING)
def test_gradients_pass_what_is_kept_once_as_in_torch(name):
    fast, model = pair(name, pruned=False)
    x = torch.randn(2, CHANNELS, 5, 6)
    for module in (fast, model):
        module(x).square().mean().backward()
    for one, other in zip(fast.parameters(), model.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.allclose(one.grad, other.grad, atol=1e-5)
    assert_close(fast.to_dense()(x), model(x))
    if name == "by device":
        for module in (fast, model):
            with pytest.raises(RuntimeError, match="a second time"):  # its graph is gone
                module(x).mean().backward()


def test_what_is_kept_is_recorded_once_more_and_then_no_more(monkeypatch):
    fast, model = pair("by device", pruned=True)
    x, recorded = torch.randn(2, CHANNELS, 5, 6), []
    compile_ = LaneModule._compile
    monkeypatch.setattr(LaneModule, "_compile", lambda *given: recorded.append(1) or compile_(*given))
    with torch.no_grad():
        for _ in range(3):
            assert_close(fast(x), model(x))
    assert recorded == [1]
    assert torch.equal(fast.kept["cpu"], model.kept["cpu"])


def counts(self, x):
    self.kept = self.kept + 1
    return self.conv(x) * self.kept


def averages(self, x):
    self.kept["of all"] = self.kept.get("of all", 0) + x.mean()
    return self.conv(x) - self.kept["of all"]


def lists_all(self, x):
    self.kept.append(x.mean())
    return self.conv(x) - sum(self.kept)


def begins_otherwise(self, x):
    if self.kept is None:
        self.kept = self.numbers.sum()
        return self.conv(x)
    return self.conv(x) * self.kept


def writes_to_its_input(self, x):
    if self.kept is None:
        self.kept = x.add_(1).mean()
    return self.conv(x) * self.kept


def keeps_a_view_of_a_weight(self, x):
    if self.kept is None:
        self.kept = self.conv.weight.view(-1)
    return self.conv(x) * self.kept[0]


def keeps_an_object(self, x):
    if self.kept is None:
        self.kept = iter([x])
    return self.conv(x)


@pytest.mark.parametrize(
    ("forward", "kept"),
    [
        (counts, 0),
        (averages, {}),
        (lists_all, []),
        (begins_otherwise, None),
        (writes_to_its_input, None),
        (keeps_a_view_of_a_weight, None),
        (keeps_an_object, None),
    ],
)
def test_what_is_not_made_once_is_refused_and_left_alone(forward, kept):
    torch.manual_seed(0)
    model = Keeps(forward, kept)
    model.conv.weight.data *= torch.rand_like(model.conv.weight) < 0.5
    fast = lipfast.accelerate(model)
    for _ in range(2):
        with pytest.raises(InputError, match="forward assigns kept; only what it returns"):
            fast(torch.randn(2, CHANNELS, 5, 6))
        assert fast.kept == kept
