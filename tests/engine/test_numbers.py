"""Code that asks for numbers: those that it makes of none that it is given are known, others are refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lipfast
from lipfast.engine.capture import call_with, record
from lipfast.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:lipfast")  # of operators that run in torch
CHANNELS = 4


class Asks(nn.Module):
    """A convolution, some numbers, and a forward function that is given the module."""

    def __init__(self, forward) -> None:
        super().__init__()
        self._forward = forward
        self.conv, self.numbers = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.Parameter(torch.ones(3))
        self.plain = torch.ones(3)
        self.register_buffer("kept", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def steps(positions: Tensor) -> bool:
    """As transformers' masks ask."""
    apart = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1)
    return bool(((apart != 1).cumsum(-1)[:, -1] == 0).all())


def window(x: Tensor) -> Tensor:
    """A mask that is written part by part."""
    mask = torch.zeros(x.shape[-2:], device=x.device)
    mask[:2] = 1
    mask[:, 2:4] += 1
    mask.mul_(2)
    return mask


KNOWN = {
    "bool": lambda self, x: self.conv(x) * (2 if steps(torch.arange(x.shape[-1], device=x.device)[None]) else 3),
    "item": lambda self, x: self.conv(x) * torch.linspace(0, 1, x.shape[-1]).square().sum().item(),
    "int": lambda self, x: self.conv(x)[..., : int(torch.tensor([1.0, 3.7]).max())],
    "float": lambda self, x: self.conv(x) * float(window(x).sum()) + window(x),
    "list": lambda self, x: F.pad(self.conv(x), torch.tensor([1, 0, 2, 1]).flip(0).tolist()),
    "index": lambda self, x: [x, self.conv(x)][torch.ones((), dtype=torch.long)],
    "contains": lambda self, x: self.conv(x) * (2 if 3 in torch.arange(x.shape[-1]) else 3),
    "equal": lambda self, x: self.conv(x) * (2 if torch.equal(torch.eye(3), torch.ones(3).diag()) else 3),
    "by name of the device": lambda self, x: self.conv(x) * torch.full((2,), 3.0, device="cpu")[1].item(),
}


@pytest.mark.parametrize("name", KNOWN)
def test_numbers_of_nothing_that_is_given_are_known(name):
    torch.manual_seed(0)
    model = Asks(KNOWN[name])
    fast = lipfast.accelerate(model)
    for size in ((2, 5, 6), (1, 7, 3), (2, 5, 6)):
        x = torch.randn(size[0], CHANNELS, *size[1:])
        found, wanted = fast(x), model(x)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        for module, y in (fast, found), (model, wanted):
            module.zero_grad()
            y.square().mean().backward()
        torch.testing.assert_close(fast.get_parameter("conv.bias").grad, model.conv.bias.grad, rtol=1e-4, atol=1e-5)


def test_calls_that_served_an_answer_alone_are_left_out():
    model, x = Asks(KNOWN["bool"]), torch.randn(1, CHANNELS, 5, 6)
    recording = record(lambda leaves, x: call_with(model, leaves, (x,)), [x], dict(model.named_parameters()))
    assert [call.function for call in recording.calls] == [torch.conv2d, Tensor.mul]


UNKNOWN = {
    "of the input": lambda self, x: float(x.sum()),
    "of a parameter": lambda self, x: self.numbers.sum().item(),
    "of a buffer": lambda self, x: int(self.kept[0]),
    "of a plain attribute": lambda self, x: bool(self.plain[0] > 0),
    "of the input, beside others": lambda self, x: bool((torch.arange(x.shape[-1]) * x[0, 0, 0]).all()),
    "drawn": lambda self, x: float(torch.rand(3).sum()),
    "drawn in place": lambda self, x: float(torch.zeros(3).normal_().sum()),
    "drawn from a generator": lambda self, x: float(torch.rand(3, generator=torch.Generator()).sum()),
    "drawn by dropout": lambda self, x: float(F.dropout(torch.ones(3)).sum()),
    "drawn as an order": lambda self, x: int(torch.randperm(5)[0]),
    "never written": lambda self, x: float(torch.empty(3).sum()),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_numbers_are_refused(name):
    fast = lipfast.accelerate(Asks(lambda self, x: self.conv(x) * UNKNOWN[name](self, x)))
    state = torch.get_rng_state()
    with pytest.raises(InputError, match="asks for the numbers of a tensor"):
        fast(torch.randn(1, CHANNELS, 5, 6, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
