"""Attention between linear layers runs in lanes, however features are cut into heads."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lipfast
from lipfast.engine.builder import Segment
from lipfast.engine.capture import call_with, record, run_call
from lipfast.engine.heads import attention
from lipfast.engine.lower import lower
from lipfast.engine.patterns import gather_patterns
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


def prune_layers(module: "Attention") -> None:
    """Not what makes biases."""
    for layer in (module.joined, module.out):
        prune(layer)


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
def test_multihead_attention_is_one_segment(compare, segments_of, batch_first):
    module = Encoder(batch_first)
    x = torch.randn(3, 10, 48)
    assert segments_of(module, x, masks_of(module)) == [["conv", "attention", "conv"]]
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


def test_attention_with_dropout_is_left_to_torch(segments_of):
    module = Changed(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    assert all("attention" not in found for found in segments_of(module, torch.randn(2, 7, 24), masks_of(module)))
    module = Changed(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.0))
    assert segments_of(module, torch.randn(2, 7, 24), masks_of(module)) == [["conv", "attention", "conv"]]


@partly
def test_a_head_that_is_also_read_alone():
    """Its views run in torch, too, behind the segment."""
    module = Changed(lambda q, k, v: F.scaled_dot_product_attention(q, k, v) + k.mean(2, keepdim=True))
    prune(module)
    x = torch.randn(2, 7, 24)
    assert torch.allclose(lipfast.accelerate(module)(x), module(x), atol=1e-5)


def _overlapping(heads: Tensor) -> Tensor:
    """Each takes half of the next one's features."""
    rows = heads.transpose(1, 2).flatten(2)
    return rows[..., [list(range(4 * head, 4 * head + 8)) for head in range(3)]].transpose(1, 2)


@partly
@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, [0, 0, 0]], v[:, [1, 1, 1]]),
        lambda q, k, v: F.scaled_dot_product_attention(q[:, :, [0, 1, 2, 3, 4, 5, 5]], k, v),
        lambda q, k, v: F.scaled_dot_product_attention(q, _overlapping(k), v),
    ],
)
def test_heads_that_share_features(compare_accelerated, segments_of, attend):
    """Their gradients would be added at once."""
    module, x = Changed(attend), torch.randn(2, 7, 24)
    prune(module)
    assert segments_of(module, x, masks_of(module)) == [["conv"], ["conv"]]
    compare_accelerated(module, x)


_SPELLINGS = {
    "scaled queries": lambda q, k, v: ((q * 0.3) @ k.transpose(-2, -1)).softmax(dim=-1) @ v,
    "scaled scores": lambda q, k, v: torch.matmul(F.softmax(q @ k.mT / 1.7, dim=3), v),
    "both scaled": lambda q, k, v: torch.softmax(torch.matmul(q * 0.5, (0.5 * k).transpose(2, 3)), -1).matmul(v),
    "dropout": lambda q, k, v: F.dropout((q @ k.transpose(-2, -1)).softmax(-1), 0.5, training=False) @ v,
    "einsum": lambda q, k, v: torch.einsum(
        "bhxy,bhyd->bhxd", torch.einsum("blxd,blyd->blxy", q, k).mul(0.4).softmax(-1), v
    ),
    "stacks": lambda q, k, v: torch.bmm(
        torch.bmm(q.reshape(-1, *q.shape[2:]), k.reshape(-1, *k.shape[2:]).transpose(1, 2)).softmax(-1),
        v.reshape(-1, *v.shape[2:]),
    ).view(q.shape),
    "joined by transformers": lambda q, k, v: F.scaled_dot_product_attention(q, k, v).reshape(2, -1, *q.shape[2:]),
}


@pytest.mark.parametrize("spelling", _SPELLINGS)
def test_spellings_are_one_segment(compare, segments_of, spelling):
    module = Changed(_SPELLINGS[spelling])
    x = torch.randn(2, 7, 24)
    assert segments_of(module, x, masks_of(module)) == [["conv", "attention", "conv"]]
    compare(module, x, masks_of(module))


class OfMaps(nn.Module):
    """Attention of all pixels between 1x1 convolutions, as U-Nets and CoAtNet have it."""

    def __init__(self, attend) -> None:
        super().__init__()
        self.first, self.out = nn.Conv2d(6, 24, 1), nn.Conv2d(8, 5, 1)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(self.first(x)))


def _values_first(y: Tensor) -> Tensor:
    """As diffusion models spell it: one head, and values times weights."""
    n, c, h, w = y.shape
    q, k, v = (part.reshape(n, c // 3, h * w) for part in y.chunk(3, dim=1))
    weights = torch.softmax(torch.bmm(q.permute(0, 2, 1), k) * 0.3, dim=2)
    return torch.bmm(v, weights.permute(0, 2, 1)).reshape(n, c // 3, h, w)


def _heads_of_maps(y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    q, k, v = (part.transpose(-1, -2).contiguous() for part in y.view(n, 2, c // 2, -1).chunk(3, dim=2))
    return F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(n, -1, h, w)


def _heads_of_tokens(y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    q, k, v = y.flatten(2).transpose(1, 2).view(n, h * w, 3, 2, c // 6).permute(2, 0, 3, 1, 4)
    return (q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).reshape(n, h, w, c // 3).permute(0, 3, 1, 2)


@pytest.mark.parametrize("attend", [_values_first, _heads_of_maps, _heads_of_tokens])
@pytest.mark.parametrize("size", [(1, 6, 5, 7), (3, 6, 4, 4), (17, 6, 2, 3), (2, 6, 1, 1), (1, 6, 8, 8)])
def test_attention_of_maps(compare, segments_of, attend, size):
    module, x = OfMaps(attend), torch.randn(size)
    assert segments_of(module, x, masks_of(module)) == [["conv", "attention", "conv"]]
    compare(module, x, {name: p.new_ones(p.shape).bool() for name, p in module.named_parameters() if p.dim() == 4})


@partly
@pytest.mark.parametrize(
    "attend",
    [
        lambda y: _values_first(y.transpose(2, 3)),
        lambda y: _values_first(y).transpose(2, 3),
        lambda y: _heads_of_maps(y).flip(1),
        lambda y: _heads_of_maps(y).reshape(y.shape[0], 8, y.shape[3], y.shape[2]),
        lambda y: torch.bmm(y[:, :8, 0], (y[:, 8:16, 0].mT @ y[:, 16:, 0]).softmax(2))[..., None],
        lambda y: F.scaled_dot_product_attention(y[:, :8], y[:, 8:16], y[:, 16:]),
    ],
)
def test_other_attention_of_maps_stays_right(compare_accelerated, attend):
    module = OfMaps(attend)
    for layer in (module.first, module.out):
        layer.weight.data *= torch.arange(layer.weight.numel()).view_as(layer.weight) % 5 == 0
    compare_accelerated(module, torch.randn(2, 6, 4, 7))


@partly
@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v: (q @ k.transpose(-2, -1)).softmax(dim=-2) @ v,
        lambda q, k, v: (q @ k.transpose(-2, -1)).softmax(dim=-1).transpose(2, 3) @ v,
        lambda q, k, v: (q @ k.transpose(-2, -1) * q.mean()).softmax(-1) @ v,
        lambda q, k, v: (2 / (3 + q @ k.transpose(-2, -1)).cosh()).softmax(-1) @ v,
        lambda q, k, v: (q @ k.transpose(-2, -1) + k.mean()).softmax(-1) @ v,
        lambda q, k, v: (q.transpose(2, 3) @ k).softmax(-1) @ v.new_ones(8, 8) @ v.mT * torch.ones(7),
        lambda q, k, v: torch.einsum("bhdx,bhyd->bhxy", q.mT, k).softmax(-1) @ v,
        lambda q, k, v: torch.einsum("bhxd,bgyd->bhxy", q, k).softmax(-1) @ v,
        lambda q, k, v: (q @ k.transpose(-2, -1)).softmax(-1) @ (v * 3),
        lambda q, k, v: ((q @ k.transpose(-2, -1)).softmax(-1) * 2) @ v,
        lambda q, k, v: (q @ k.transpose(-2, -1)).transpose(2, 3).softmax(-1) @ v,
        lambda q, k, v: (q @ k.transpose(-2, -1)).roll(1, -1).softmax(-1) @ v,
        lambda q, k, v: (q @ k.transpose(-2, -1)).flip(1).softmax(-1) @ v,
        lambda q, k, v: (q @ k.transpose(-2, -1) + q @ v.mT).softmax(-1) @ v,
    ],
)
def test_other_spellings_stay_right(attend):
    test_other_attention_stays_right(attend)


class Biased(Attention):
    """Scores get what the module has to add: ``add(module, scores or None)``."""

    def __init__(self, attend, pictures: int = 2) -> None:
        super().__init__(24, 3, "picked")
        self.table = nn.Parameter(torch.randn(3, 20))
        self.scores = nn.Parameter(torch.randn(7, 7))
        self.register_buffer("mask", torch.where(torch.rand(2, 1, 7, 7) < 0.3, -torch.inf, 0.0))
        self.mask.diagonal(dim1=2, dim2=3).zero_()
        self.register_buffer("allowed", torch.rand(7, 7) < 0.5)
        self.allowed[3] = False  # sees nothing
        self.add = attend

    def of_table(self) -> Tensor:
        """A bias for each head, as relative positions have it."""
        apart = torch.arange(7)[:, None] - torch.arange(7)[None] + 6
        return self.table[:, apart]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.add(self, query, key, value)


def _windows(m: Biased, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As windows of pictures have it: a bias for each head, a mask for each window."""
    scores = (q * 0.3) @ k.transpose(-2, -1) + m.of_table().unsqueeze(0)
    scores = scores.view(2, 2, 3, 7, 7) + m.mask.view(1, 2, 1, 7, 7)
    return scores.view(-1, 3, 7, 7).softmax(-1) @ v


def _mask_of_forward(m: Biased, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Forward makes the mask, of numbers alone."""
    part = q.new_zeros(7) + (torch.arange(7) >= 4).long()
    part[-1:] = 2
    apart = part[:, None] - part[None]
    mask = apart.float().masked_fill(apart.ne(0), -100.0).masked_fill(apart == 0, 0.0)
    return (q @ k.mT + m.scores + mask).softmax(-1) @ v


_BIASES = {
    "one": lambda m, q, k, v: (q @ k.transpose(-2, -1) + m.scores).softmax(-1) @ v,
    "mask of forward": _mask_of_forward,
    "scaled before": lambda m, q, k, v: (m.of_table() + (q @ k.transpose(-2, -1)) / 3).softmax(-1) @ v,
    "scaled first": lambda m, q, k, v: ((q @ k.transpose(-2, -1)) * 3 + m.of_table()).softmax(-1) @ v,
    "heads": lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, m.of_table()),
    "windows": _windows,
    "pictures": lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, m.mask.repeat(2, 1, 1, 1)),
    "two that learn": lambda m, q, k, v: (m.scores + (q @ k.mT + m.of_table()[None])).softmax(-1) @ v,
    "allowed": lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, m.allowed),
    "causal": lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
}


@partly
@pytest.mark.parametrize(
    "attend",
    [
        lambda m, q, k, v: ((q @ k.mT + m.scores) * 0.3).softmax(-1) @ v,
        lambda m, q, k, v: torch.add(q @ k.mT, m.scores, alpha=2).softmax(-1) @ v,
        lambda m, q, k, v: (q @ k.mT + m.scores[:1]).softmax(-1) @ v,
        lambda m, q, k, v: (q @ k.mT - m.scores).softmax(-1) @ v,
        lambda m, q, k, v: (q @ k.mT + m.scores + 1).softmax(-1) @ v,
        lambda m, q, k, v: (q @ k.mT)[..., :5].softmax(-1) @ v[..., :5, :],
    ],
)
def test_other_biases_stay_right(compare_accelerated, attend):
    module = Biased(attend)
    prune_layers(module)
    compare_accelerated(module, torch.randn(4, 7, 24))


@pytest.mark.parametrize("bias", _BIASES)
def test_biases_of_scores(compare_accelerated, segments_of, bias):
    module = Biased(_BIASES[bias])
    prune_layers(module)
    x = torch.randn(4, 7, 24)
    assert segments_of(module, x, masks_of(module)) == [["conv", "attention", "conv"]]
    compare_accelerated(module, x)


def test_a_bias_that_alone_learns():
    module = Biased(_BIASES["heads"])
    for layer in (module.joined, module.out):
        prune(layer.requires_grad_(False))
    fast = lipfast.accelerate(module)
    x = torch.randn(4, 7, 24)
    fast(x).square().sum().backward()
    module.double()(x.double()).square().sum().backward()
    assert torch.allclose(fast.get_parameter("table").grad.double(), module.table.grad, atol=1e-4)


class Cosine(Biased):
    """Scores are cosines, times what each head learned."""

    def __init__(self, attend) -> None:
        super().__init__(attend)
        self.logit = nn.Parameter(torch.tensor([1.0, 3.0, 6.0]).view(3, 1, 1))  # beyond the largest, too
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.coordinates = nn.Parameter(torch.randn(20, 2))
        self.positions = nn.Sequential(nn.Linear(2, 8), nn.ReLU(inplace=True), nn.Linear(8, 3, bias=False))

    def factor(self) -> Tensor:
        return self.logit.clamp(max=4.0).exp()

    def of_positions(self) -> Tensor:
        apart = torch.arange(7)[:, None] - torch.arange(7)[None] + 6
        return 16 * torch.sigmoid(self.positions(self.coordinates)[apart].permute(2, 0, 1))


def _cosines(q: Tensor, k: Tensor) -> Tensor:
    return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)


def _short(x: Tensor) -> Tensor:
    """Normalised where it is not shorter than some are."""
    return F.normalize(x, dim=-1, eps=4.0)


def _norm(x: Tensor, **kwargs) -> Tensor:
    length: Tensor = x.norm(dim=-1, keepdim=True, **kwargs)
    return length


def _swin_v2(m: Cosine, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = _cosines(q, k) * m.factor() + m.of_positions().unsqueeze(0)
    scores = scores.view(2, 2, 3, 7, 7) + m.mask.view(1, 2, 1, 7, 7)
    return scores.view(-1, 3, 7, 7).softmax(-1) @ v


def _of_stacks(m: Cosine, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads and pictures are one axis, normalised after they were turned."""
    q, k, values = (part.reshape(-1, 7, 8) for part in (q, k, v))
    scores = torch.bmm(F.normalize(q, p=2, dim=2), F.normalize(k.transpose(1, 2), dim=1))
    return (scores.view(4, 3, 7, 7) * m.factor()).view(12, 7, 7).softmax(-1).bmm(values).view(v.shape)


_COSINES = {
    "swin v2": _swin_v2,
    "stacks": _of_stacks,
    "factor first": lambda m, q, k, v: (m.factor()[None] * _cosines(q, k) + m.scores).softmax(-1) @ v,
    "one factor": lambda m, q, k, v: (_cosines(q, k) * m.temperature).softmax(-1) @ v,
    "of windows": lambda m, q, k, v: (_cosines(q, k) * m.mask[:, :, :1, :1].exp().repeat(2, 1, 1, 1)).softmax(-1) @ v,
    "no factor": lambda m, q, k, v: (_cosines(q, k) * 5).softmax(-1) @ v,
    "no cosines": lambda m, q, k, v: (q @ k.mT * 0.02 * m.factor().reshape(1, 3, 1, 1)).softmax(-1) @ v,
    "fused": lambda m, q, k, v: F.scaled_dot_product_attention(F.normalize(q, dim=-1) * 4, F.normalize(k, dim=3), v),
    "short ones": lambda m, q, k, v: (_short(q) @ _short(k).mT).softmax(-1) @ v,
    "turned": lambda m, q, k, v: (
        (_cosines(q, k).transpose(0, 1) * m.factor()[:, None] + m.of_positions()[:, None]).transpose(0, 1).softmax(-1)
        @ v
    ),
    "norms": lambda m, q, k, v: (
        (
            (q / q.norm(dim=-1, keepdim=True))
            @ (k / torch.linalg.vector_norm(k, dim=(3,), keepdim=True)).mT
            * m.factor()
        ).softmax(-1)
        @ v
    ),
    "least norms": lambda m, q, k, v: (
        (
            (q / q.norm(p=2, dim=-1, keepdim=True).clamp(min=4.0))
            @ (k / torch.norm(k, dim=-1, keepdim=True).clamp_min(4.0)).mT
            * m.factor()
        ).softmax(-1)
        @ v
    ),
}


@pytest.mark.parametrize("attend", _COSINES)
def test_cosines(compare_accelerated, segments_of, attend):
    module = Cosine(_COSINES[attend])
    prune_layers(module)
    x = torch.randn(4, 7, 24)
    assert ["conv", "attention", "conv"] in segments_of(module, x, masks_of(module))
    compare_accelerated(module, x)


@partly
@pytest.mark.parametrize(
    "attend",
    [
        lambda m, q, k, v: (F.normalize(q, dim=-2) @ F.normalize(k, dim=-1).mT * m.factor()).softmax(-1) @ v,
        lambda m, q, k, v: (F.normalize(q, dim=1) @ k.mT).softmax(-1) @ v,
        lambda m, q, k, v: (F.normalize(q, p=1, dim=-1) @ F.normalize(k, p=1.0, dim=-1).mT).softmax(-1) @ v,
        lambda m, q, k, v: (F.normalize(q, dim=-1) @ k.mT).softmax(-1) @ v,
        lambda m, q, k, v: (F.normalize(q, dim=-1, eps=4.0) @ F.normalize(k, dim=-1).mT).softmax(-1) @ v,
        lambda m, q, k, v: (_cosines(q, k) * 3).softmax(-1) @ F.normalize(v, dim=-1),
        lambda m, q, k, v: (_short(_short(q)) @ _short(k).mT).softmax(-1) @ v,
        lambda m, q, k, v: (_short(q * 3) @ _short(k).mT).softmax(-1) @ v,
        lambda m, q, k, v: (
            (F.normalize(q.reshape(4, 3, 14, 4), dim=-1).view(q.shape) @ F.normalize(k, dim=-1).mT)
            .softmax(-1)
            .matmul(v)
        ),
        lambda m, q, k, v: (q / _norm(k) @ (k / _norm(q)).mT).softmax(-1) @ v,
        lambda m, q, k, v: (q / _norm(q, p=1) @ (k / _norm(k, p=1)).mT).softmax(-1) @ v,
        lambda m, q, k, v: (q / _norm(q).clamp(0.1, 2.0) @ (k / _norm(k).clamp(0.1)).mT).softmax(-1) @ v,
        lambda m, q, k, v: (q / (_norm(q) + 1) @ (k / (_norm(k) + 1)).mT).softmax(-1) @ v,
        lambda m, q, k, v: ((_cosines(q, k) + m.scores) * m.factor()).softmax(-1) @ v,
        lambda m, q, k, v: (_cosines(q, k) * m.factor() * m.temperature).softmax(-1) @ v,
        lambda m, q, k, v: (_cosines(q, k) * m.scores).softmax(-1) @ v,
        lambda m, q, k, v: (_cosines(q, k) / m.factor()).softmax(-1) @ v,
        lambda m, q, k, v: (q @ k.mT * q.mean((2, 3), keepdim=True)).softmax(-1) @ v,
        lambda m, q, k, v: (_cosines(q, k) * m.factor()[:, :, None, None]).softmax(-1)[0] @ v,
    ],
)
def test_other_cosines_stay_right(compare_accelerated, attend):
    module = Cosine(attend)
    prune_layers(module)
    compare_accelerated(module, torch.randn(4, 7, 24))


class WithoutBiasOfKeys(Attention):
    """As torchvision's Swin V2 has it: forward writes zeros into a copy of the bias."""

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        bias = self.joined.bias.clone()
        bias[width : 2 * width].zero_()
        heads = self.cut(F.linear(x, self.joined.weight, bias), n, tokens, self.heads)
        return self.out(self.attend(*heads).transpose(1, 2).reshape(n, tokens, width))


def test_a_bias_of_which_forward_fills_a_part(compare_accelerated, segments_of):
    module, x = WithoutBiasOfKeys(24, 3), torch.randn(2, 7, 24)
    prune(module)
    assert segments_of(module, x, masks_of(module)) == [["conv", "attention", "conv"]]
    compare_accelerated(module, x)


class ValuesOfAnotherWidth(nn.Module):
    """Queries and keys of ``features``, values of ``of_values`` in each head, as LeViT has them."""

    def __init__(self, features: int, of_values: int, attend=F.scaled_dot_product_attention) -> None:
        super().__init__()
        self.sizes, self.function = [features, features, of_values], attend
        self.joined, self.out = nn.Linear(24, 3 * sum(self.sizes)), nn.Linear(3 * of_values, 24)
        nn.init.normal_(self.joined.weight, std=0.4)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        heads = self.joined(x).view(n, tokens, 3, -1).transpose(1, 2).split(self.sizes, dim=3)
        return self.out(self.function(*heads).transpose(1, 2).reshape(n, tokens, -1))


@pytest.mark.parametrize(("features", "of_values"), [(1, 9), (4, 12), (16, 1), (33, 7), (5, LANES)])
@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_values_of_another_width(compare, segments_of, features, of_values, tokens):
    module, x = ValuesOfAnotherWidth(features, of_values), torch.randn(3, tokens, 24)
    assert segments_of(module, x, masks_of(module)) == [["conv", "attention", "conv"]]
    compare(module, x, masks_of(module))


@partly
@pytest.mark.parametrize("features", [range(4), range(8, 12)])
def test_values_that_share_features_with_keys(compare_accelerated, segments_of, features):
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, v[..., features.start : features.stop], v)

    module, x = ValuesOfAnotherWidth(4, 12, attend), torch.randn(3, 7, 24)
    prune(module)
    assert segments_of(module, x, masks_of(module)) == [["conv"], ["conv"]]
    compare_accelerated(module, x)


def _wide_values_of_maps(y: Tensor) -> Tensor:
    """Features lie before tokens, and values are multiplied by weights, as in LeViT of convolutions."""
    n, _, h, w = y.shape
    q, k, v = y.view(n, 2, 12, h * w).split([3, 3, 6], dim=2)
    return (v @ (q.mT @ k).mul(0.5).softmax(-1).mT).view(n, 12, h, w)


@pytest.mark.parametrize("size", [(1, 6, 5, 7), (3, 6, 4, 4), (2, 6, 1, 1)])
def test_values_of_another_width_in_maps(compare, segments_of, size):
    module, x = OfMaps(_wide_values_of_maps), torch.randn(size)
    module.out = nn.Conv2d(12, 5, 1)
    assert segments_of(module, x, masks_of(module)) == [["conv", "attention", "conv"]]
    compare(module, x, {name: p.new_ones(p.shape).bool() for name, p in module.named_parameters() if p.dim() == 4})


class Windows(nn.Module):
    """Attention in windows of a picture that was rolled, as Swin Transformers have it: no layer lies between what cuts,
    shifts and joins heads."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.joined, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.side = side
        nn.init.normal_(self.joined.weight, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        s, at = self.side, (n, h // self.side, self.side, w // self.side, self.side)
        y = torch.roll(self.joined(x), (-1, -1), (1, 2)).view(*at, 3 * c).permute(0, 1, 3, 2, 4, 5).contiguous()
        q, k, v = y.view(-1, s * s, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        y = y.transpose(1, 2).reshape(n, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return self.out(torch.roll(y, (1, 1), (1, 2)))


@pytest.mark.parametrize(
    ("pictures", "height", "width", "side"), [(1, 4, 6, 2), (3, 6, 3, 3), (2, 10, 15, 5), (2, 16, 32, 4)]
)
def test_windows_are_read_where_they_lie(compare, segments_of, pictures, height, width, side):
    module = Windows(side)
    x = torch.randn(pictures, height, width, 16)
    assert segments_of(module, x, masks_of(module)) == [["conv", "attention", "conv"]]
    compare(module, x, masks_of(module))


class LayersOfWindows(Windows):
    """The same with all layers on windows, so that their rows lie in another order than those of the map."""

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        s, at = self.side, (n, h // self.side, self.side, w // self.side, self.side, c)
        y = torch.roll(F.relu(self.out(x)), (-1, -1), (1, 2)).view(at).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        q, k, v = self.joined(y).view(-1, s * s, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = self.out((q @ k.transpose(-2, -1)).softmax(-1).matmul(v).transpose(1, 2).reshape(-1, s * s, c))
        y = y.view(n, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return x + torch.roll(y, (1, 1), (1, 2))


@pytest.mark.parametrize(
    ("pictures", "height", "width", "side"), [(1, 4, 6, 2), (3, 6, 3, 3), (2, 10, 15, 5), (2, 16, 32, 4)]
)
def test_layers_of_windows(compare_accelerated, segments_of, pictures, height, width, side):
    module, x = LayersOfWindows(side), torch.randn(pictures, height, width, 16)
    prune(module)
    assert segments_of(module, x, masks_of(module)) == [["conv", "act", "conv", "attention", "conv", "combine"]]
    compare_accelerated(module, x)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        *(pytest.param(Biased, [attend], id=name) for name, attend in _BIASES.items()),
        *(pytest.param(Cosine, [attend], id=name) for name, attend in _COSINES.items()),
        pytest.param(ValuesOfAnotherWidth, [5, 9], id="values of another width"),
    ],
)
def test_what_the_operator_means(kind, given):
    """The recording, run with the operator's definition in float64."""
    module, x = kind(*given), torch.randn(4, 7, 24)
    leaves = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    recording = record(lambda leaves, x: call_with(module, leaves, (x,)), [x], leaves)
    gather_patterns(recording)
    assert attention in [call.function for call in recording.calls]
    module, x = module.double(), x.double()
    leaves = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    known = {number: leaves[name] for number, name in recording.leaves.items()}
    known |= {recording.inputs[0].number: x, **recording.constants}
    for call in recording.calls:
        run_call(call, known, x.device)
    assert torch.allclose(known[recording.result.number], module(x), rtol=0, atol=1e-12)


class BiasOfLanes(nn.Module):
    """Scores' bias is all that comes from lanes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 5, 1)
        for layer in (self.first, self.out):
            layer.weight.data *= torch.arange(layer.weight.numel()).view_as(layer.weight) % 2

    def forward(self, x: Tensor) -> Tensor:
        q = x[:, :1].expand(-1, 3, -1, -1)
        return self.out(F.scaled_dot_product_attention(q, q, q, self.first(x)))


@partly
def test_a_bias_from_lanes_of_attention_that_is_not(compare_accelerated):
    compare_accelerated(BiasOfLanes(), torch.randn(2, 2, 8, 8))


def test_attention_that_is_not_in_lanes_keeps_its_calls():
    """None of its operands is: torch's own kernel is faster than any other spelling."""
    module = nn.Sequential(nn.Linear(24, 24), nn.ReLU())
    prune(module)

    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = module

        def forward(self, x: Tensor) -> Tensor:
            q = x.view(2, 7, 3, 8).transpose(1, 2)
            return self.layers(F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2))

    whole, x = Behind(), torch.randn(2, 7, 24)
    leaves = dict(whole.named_parameters())
    lowered = lower(record(lambda leaves, x: call_with(whole, leaves, (x,)), [x], leaves), masks_of(whole))
    assert F.scaled_dot_product_attention in [item.function for item in lowered.items if not isinstance(item, Segment)]
    with pytest.warns(UserWarning, match="lipfast"):
        assert torch.allclose(lipfast.accelerate(whole)(x), whole(x), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "attend", "learned"), [(Biased, _BIASES["heads"], "table"), (Cosine, _swin_v2, "logit")]
)
def test_bits_do_not_depend_on_threads(kind, attend, learned):
    module = kind(attend)
    prune_layers(module)
    fast, x = lipfast.accelerate(module), torch.randn(4, 7, 24, requires_grad=True)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            y = fast(x)
            found.append((y, *torch.autograd.grad(y.sin().sum(), (x, fast.get_parameter(learned)))))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for rest in found[1:] for one, other in zip(found[0], rest, strict=True))
