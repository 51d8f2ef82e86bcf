"""Attention of channels, which compare pictures with each other, runs in lanes, on maps and on tokens."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lipfast
from lipfast.engine.capture import call_with, record, run_call
from lipfast.engine.heads import attention
from lipfast.engine.patterns import gather_patterns

# What torch does in between is said once more where it is not what is tested.
partly = pytest.mark.filterwarnings("ignore:lipfast:UserWarning")

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of heads (n, heads, channels, pixels), and a factor


def over_norms(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return ((q @ k.transpose(-2, -1)) * factor).softmax(dim=-1) @ v


ATTEND: dict[str, Attend] = {
    "over norms": over_norms,
    "scaled": lambda q, k, v, f: ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v,
    "with a factor": lambda q, k, v, f: torch.softmax(0.2 * f * torch.einsum("nhcp,nhdp->nhcd", q, k), -1) @ v,
    "fused": lambda q, k, v, f: F.scaled_dot_product_attention(q, k, v, scale=0.1),
    "values first": lambda q, k, v, f: (
        v.transpose(-2, -1) @ (0.1 * q @ k.transpose(-2, -1)).softmax(-1).transpose(-2, -1)
    ).transpose(-2, -1),
    "over large norms": lambda q, k, v, f: (
        (F.normalize(q, dim=-1, eps=2.0) @ F.normalize(k, dim=-1, eps=2.0).transpose(-2, -1)).softmax(-1) @ v
    ),
}


class OfMaps(nn.Module):
    """As Restormer has it: all three from one convolution and a depthwise one."""

    def __init__(self, attend: str, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.attend = heads, ATTEND[attend]
        self.factor = nn.Parameter(torch.linspace(1, 3, heads).view(heads, 1, 1))
        self.joined, self.out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)
        self.depthwise = nn.Conv2d(3 * width, 3 * width, 3, padding=1, groups=3 * width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.depthwise(self.joined(x)).chunk(3, dim=1)
        q, k, v = (part.view(x.shape[0], self.heads, -1, x.shape[2] * x.shape[3]) for part in parts)
        return x + self.out(self.attend(q, k, v, self.factor).reshape(x.shape))


class OfTokens(nn.Module):
    """As XCiT has it: features of tokens from a linear layer."""

    def __init__(self, attend: str, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.attend = heads, ATTEND[attend]
        self.factor = nn.Parameter(torch.linspace(1, 3, heads).view(heads, 1, 1))
        self.joined, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.joined(x).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 4, 1).unbind(0)
        seen = self.attend(q, k, v, self.factor)
        return x + self.out(seen.permute(0, 3, 1, 2).reshape(n, tokens, width))


def pruned(module: nn.Module) -> nn.Module:
    for layer in (module.joined, module.out):
        layer.weight.data.mul_(torch.arange(layer.weight.numel()).view_as(layer.weight) % 5 == 0)
    return module


@pytest.mark.parametrize("attend", ATTEND)
@pytest.mark.parametrize(
    ("size", "heads"),
    [((1, 8, 8, 8), 2), ((3, 6, 9, 14), 1), ((2, 6, 2, 1), 2), ((1, 42, 5, 18), 2), ((2, 48, 16, 16), 4)],
    ids=str,
)
def test_attention_of_maps(compare_accelerated, segments_of, size, heads, attend):
    torch.manual_seed(0)
    module = pruned(OfMaps(attend, size[1], heads))
    compare_accelerated(module, torch.randn(size))
    assert any("channel_attention" in segment for segment in segments_of(module, torch.randn(size)))


@pytest.mark.parametrize("attend", ATTEND)
@pytest.mark.parametrize(("tokens", "width", "heads"), [(5, 8, 2), (49, 30, 3), (197, 16, 1)])
def test_attention_of_tokens(compare_accelerated, segments_of, tokens, width, heads, attend):
    torch.manual_seed(0)
    module = pruned(OfTokens(attend, width, heads))
    x = torch.randn(1, tokens, width)
    compare_accelerated(module, x)
    assert [kind for kind in segments_of(module, x)[0] if "attention" in kind] == ["channel_attention"]


@partly
@pytest.mark.parametrize("attend", ATTEND)
def test_several_sequences_are_left_to_torch(compare_accelerated, segments_of, attend):
    torch.manual_seed(0)
    module, x = pruned(OfTokens(attend, 12, 2)), torch.randn(3, 20, 12)
    compare_accelerated(module, x)
    assert not any("channel_attention" in segment for segment in segments_of(module, x))


class Odd(OfMaps):
    """Something that only looks alike."""

    def __init__(self, attend: Attend) -> None:
        super().__init__("scaled", 6, 2)
        self.function = attend

    def forward(self, x: Tensor) -> Tensor:
        parts = self.depthwise(self.joined(x)).chunk(3, dim=1)
        q, k, v = (part.view(x.shape[0], self.heads, 3, -1) for part in parts)
        return x + self.out(self.function(q, k, v, self.factor).reshape(x.shape))


@partly
@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v, f: over_norms(q, k.flip(-1), v, f),
        lambda q, k, v, f: over_norms(q, k, v.flip(-1), f),
        lambda q, k, v, f: over_norms(q[..., :40], k[..., :40], v, f),
        lambda q, k, v, f: over_norms(F.normalize(q, dim=-2), k, v, f),
        lambda q, k, v, f: over_norms(q, k, v, f).flip(2),
        lambda q, k, v, f: (q @ k.transpose(-2, -1) + f).softmax(-1) @ v,
        lambda q, k, v, f: (F.normalize(q, dim=-1) @ k.transpose(-2, -1)).softmax(-1) @ v,
        lambda q, k, v, f: (q @ k.transpose(-2, -1)).softmax(-2) @ v,
        lambda q, k, v, f: over_norms(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), f[:1]).transpose(0, 1),
        lambda q, k, v, f: over_norms(q, k, q, f),
        lambda q, k, v, f: over_norms(q, q, q, f),
    ],
    ids=range(11),
)
def test_what_only_looks_alike_is_as_in_torch(compare_accelerated, attend):
    torch.manual_seed(0)
    compare_accelerated(pruned(Odd(attend)), torch.randn(2, 6, 8, 8))


@pytest.mark.parametrize("attend", ATTEND)
def test_reference_is_what_networks_spell_out(attend):
    """`heads.attention`, by which the lanes are described, against the calls it stands for."""
    torch.manual_seed(0)
    module, x = OfMaps(attend, 6, 2), torch.randn(2, 6, 4, 5)
    leaves = dict(module.named_parameters())
    recording = record(lambda leaves, x: call_with(module, leaves, (x,)), [x], leaves)
    gather_patterns(recording)
    assert [call.function for call in recording.calls].count(attention) == 1
    known = {number: leaves[name] for number, name in recording.leaves.items()} | {recording.inputs[0].number: x}
    known |= recording.constants
    for call in recording.calls:
        run_call(call, known, x.device)
    assert torch.allclose(known[recording.result.number], module(x), atol=1e-5)


def test_bits_do_not_depend_on_threads():
    torch.manual_seed(0)
    fast, x = lipfast.accelerate(pruned(OfMaps("over norms", 42, 2))), torch.randn(2, 42, 9, 14)

    def results() -> list[Tensor]:
        fast.zero_grad()
        y = fast(x)
        y.square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in fast.parameters())]

    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(results())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
