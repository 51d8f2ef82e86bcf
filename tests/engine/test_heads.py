"""Attention between linear layers runs in lanes, however features are cut into heads."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lipfast
from lipfast.engine.capture import call_with, record
from lipfast.engine.lower import Segment, lower
from lipfast.ops.lanes import LANES

# What torch does in between is said once more where it is not what is tested.
partly = pytest.mark.filterwarnings("ignore:lipfast:UserWarning")

_CUTS = {
    "parts, heads": lambda y, n, t, h: y.reshape(n, t, 3, h, -1).permute(2, 0, 3, 1, 4).unbind(0),
    "heads, parts": lambda y, n, t, h: y.reshape(n, t, h, 3, -1).permute(3, 0, 2, 1, 4).unbind(0),
    "picked": lambda y, n, t, h: list(y.view(n, t, 3, h, -1).permute(2, 0, 3, 1, 4)),
    "copied": lambda y, n, t, h: [part.view(n, t, h, -1).transpose(1, 2).contiguous() for part in y.chunk(3, dim=-1)],
    "chunks": lambda y, n, t, h: [part.view(n, t, h, -1).transpose(1, 2) for part in y.chunk(3, dim=-1)],
}


class Attention(nn.Module):
    """Two linear layers around attention; scores are spread so that the softmax is far from uniform."""

    def __init__(self, width: int, heads: int, cut: str = "parts, heads") -> None:
        super().__init__()
        self.heads, self.cut = heads, _CUTS[cut]
        self.joined, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        nn.init.normal_(self.joined.weight, std=2.0 / width**0.5)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        seen = self.attend(*self.cut(self.joined(x), n, tokens, self.heads))
        return self.out(seen.transpose(1, 2).contiguous().view(n, tokens, width))


def masks_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: torch.arange(p.numel()).view_as(p) % 5 == 0 for name, p in module.named_parameters() if p.dim() == 2}


def prune(module: nn.Module) -> None:
    for name, mask in masks_of(module).items():
        module.get_parameter(name).data.mul_(mask)


def kinds(module: nn.Module, x: Tensor) -> list[list[str]]:
    """The operators of each lane segment."""
    leaves = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    recording = record(lambda leaves, x: call_with(module, leaves, (x,)), [x], leaves)
    items = lower(recording, masks_of(module)).items
    return [[node.kind for node in item.graph.nodes] for item in items if isinstance(item, Segment)]


@pytest.mark.parametrize("cut", _CUTS)
@pytest.mark.parametrize(
    ("pictures", "tokens", "width", "heads"),
    [(1, 1, 8, 2), (1, 5, 6, 3), (3, 7, 30, 5), (2, LANES, 32, 2), (1, 33, 66, 2), (1, 197, 40, 1), (9, 50, 24, 6)],
)
def test_attention_is_that_of_torch(compare, pictures, tokens, width, heads, cut):
    module = Attention(width, heads, cut)
    compare(module, torch.randn(pictures, tokens, width), masks_of(module))


class CrossAttention(Attention):
    """Queries of fewer tokens than keys and values have, from layers of their own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.queries, self.rest = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.joined = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        n, tokens = x.shape[:2]
        few = x[:, :3].contiguous()
        query = self.queries(few).view(n, 3, self.heads, -1).transpose(1, 2)
        key, value = self.rest(x).view(n, tokens, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(query, key, value, scale=0.3).transpose(1, 2).flatten(2))


@partly
@pytest.mark.parametrize("tokens", [3, 20, 49])
def test_keys_of_other_tokens(tokens):
    module = CrossAttention(24, 3)
    prune(module)
    x = torch.randn(2, tokens, 24, requires_grad=True)
    expected = module.double()(x.double())
    dx = torch.autograd.grad(expected.square().sum(), x)[0]
    fast = lipfast.accelerate(module.float())
    found = fast(x)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert torch.allclose(torch.autograd.grad(found.square().sum(), x)[0], dx, atol=1e-4)


class Encoder(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(48, 4, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return result


@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention_is_one_segment(compare, batch_first):
    module = Encoder(batch_first)
    x = torch.randn(3, 10, 48)
    assert kinds(module, x) == [["conv", "attention", "conv"]]
    if not batch_first:  # which transposes in torch, before and after
        compare(module, x, masks_of(module))


class Changed(Attention):
    """Attention that is not the plain one."""

    def __init__(self, attend) -> None:
        super().__init__(24, 3, "picked")
        self.function = attend

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.function(query, key, value)


@partly
@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.ones(7, 7).tril().bool()),
        lambda q, k, v: F.scaled_dot_product_attention(q * 2, k, v),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, k + v),
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, :4], v[:, :, :4]),
        lambda q, k, v: F.scaled_dot_product_attention(q, k.flip(-1), v),
        lambda q, k, v: v + F.scaled_dot_product_attention(q[0], k[0], v[0]).permute(1, 0, 2).reshape(7, 24).mean(),
        lambda q, k, v: F.scaled_dot_product_attention(q, k.view(torch.int32).view(torch.float32), v),
        lambda q, k, v: F.scaled_dot_product_attention(q, k.expand(2, 3, 7, 8), v) + q.mean(),
    ],
)
def test_other_attention_stays_right(attend):
    module = Changed(attend)
    prune(module)
    x = torch.randn(2, 7, 24, requires_grad=True)
    expected = module(x)
    found = lipfast.accelerate(module)(x)
    assert torch.allclose(found, expected, atol=1e-5)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-4)


def test_attention_with_dropout_is_left_to_torch():
    module = Changed(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    assert all("attention" not in found for found in kinds(module, torch.randn(2, 7, 24)))
    module = Changed(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.0))
    assert kinds(module, torch.randn(2, 7, 24)) == [["conv", "attention", "conv"]]


@partly
def test_a_head_that_is_also_read_alone():
    """Its views run in torch, too, behind the segment."""
    module = Changed(lambda q, k, v: F.scaled_dot_product_attention(q, k, v) + k.mean(2, keepdim=True))
    prune(module)
    x = torch.randn(2, 7, 24)
    assert torch.allclose(lipfast.accelerate(module)(x), module(x), atol=1e-5)


def test_bits_do_not_depend_on_threads():
    module = Attention(48, 4)
    prune(module)
    fast, x = lipfast.accelerate(module), torch.randn(3, 21, 48, requires_grad=True)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            y = fast(x)
            found.append((y, torch.autograd.grad(y.sin().sum(), x)[0]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for rest in found[1:] for one, other in zip(found[0], rest, strict=True))
