"""Linear layers and activations that networks spell without the functions of torch that are made for them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import lipfast
from lipfast.engine import dynamo
from lipfast.engine.lane_module import Compiled
from lipfast.engine.lower import Lowered

IN, OUT = 20, 36


def addmm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As transformers' Conv1D has it."""
    return torch.addmm(bias, x.view(-1, x.size(-1)), weight).view((*x.size()[:-1], weight.shape[1]))


# Of a weight (inputs, outputs), and the operators that become of it.
_BY_COLUMNS = {
    "addmm": (addmm, ["conv_transpose", "shift"]),
    "method": (lambda x, w, b: b.addmm(x.flatten(0, -2), w).unflatten(0, x.shape[:-1]), ["conv_transpose", "shift"]),
    "matmul": (lambda x, w, b: torch.matmul(x, w) + b, ["conv_transpose", "shift"]),
    "operator": (lambda x, w, b: x @ w, ["conv_transpose"]),
    "mm": (lambda x, w, b: b + torch.mm(x.reshape(-1, IN), w), ["conv_transpose", "shift"]),
    "einsum": (lambda x, w, b: torch.einsum("bti,io->bto", x, w) + b, ["conv_transpose", "shift"]),
    "any axes": (lambda x, w, b: torch.einsum("...i, io -> ...o", x, w), ["conv_transpose"]),
}
# Of a weight (outputs, inputs).
_BY_ROWS = {
    "t": (lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w.t()), ["conv"]),
    "T": (lambda x, w, b: x @ w.T + b, ["conv", "shift"]),
    "mT": (lambda x, w, b: x.matmul(w.mT), ["conv"]),
    "transpose": (lambda x, w, b: torch.matmul(x, w.transpose(0, 1)) + b, ["conv", "shift"]),
    "einsum": (lambda x, w, b: torch.einsum("bti,oi->bto", x, w), ["conv"]),
}


class Conv1D(nn.Module):
    """Calls ``spelling(x, weight, bias)`` with normalised features; called as the layer of transformers."""

    def __init__(self, spelling, shape: tuple[int, int]) -> None:
        super().__init__()
        self.spelling = spelling
        self.weight, self.bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(OUT))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.spelling(F.layer_norm(x, x.shape[-1:]), self.weight, self.bias)
        return y


Conv1D.__module__ = "transformers.pytorch_utils"


def by_columns(spelling, kept: int = 5) -> Conv1D:
    """A layer that keeps each so manieth weight."""
    layer = Conv1D(spelling, (IN, OUT))
    layer.weight.data *= torch.arange(IN * OUT).view(IN, OUT) % kept == 0
    return layer


def masks_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p != 0 for name, p in module.named_parameters() if bool((p == 0).any())}


@pytest.mark.parametrize("spelling", _BY_COLUMNS)
@pytest.mark.parametrize("size", [(1, 1, IN), (3, 7, IN), (2, 65, IN)])
def test_weights_by_columns(compare, items_of, size, spelling):
    function, wanted = _BY_COLUMNS[spelling]
    layer, x = by_columns(function), torch.randn(size)
    assert items_of(layer, x) == [["layer_norm", *wanted]]
    compare(layer, x, masks_of(layer))


@pytest.mark.parametrize("spelling", _BY_ROWS)
def test_weights_by_rows(compare, items_of, spelling):
    function, wanted = _BY_ROWS[spelling]
    layer, x = Conv1D(function, (OUT, IN)), torch.randn(3, 7, IN)
    layer.weight.data *= torch.arange(IN * OUT).view(OUT, IN) % 5 == 0
    assert items_of(layer, x) == [["layer_norm", *wanted]]
    compare(layer, x, masks_of(layer))


class BehindMaps(nn.Module):
    """Layers on the pixels of a map, between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, IN, 3, padding=1), nn.Conv2d(IN, 2, 3, padding=1)
        self.wide, self.narrow = Conv1D(addmm, (IN, OUT)), Conv1D(lambda x, w, b: x @ w, (OUT, IN))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        tokens = self.narrow(F.gelu(self.wide(y.flatten(2).transpose(1, 2))))
        return self.last(tokens.transpose(1, 2).view_as(y))


@pytest.mark.parametrize("size", [(1, 3, 6, 9), (3, 3, 4, 5)])
def test_dense_layers_behind_maps(compare, items_of, size):
    module, x = BehindMaps(), torch.randn(size)
    layers = ["layer_norm", "conv_transpose", "shift", "act", "layer_norm", "conv_transpose"]
    assert items_of(module, x) == [["conv", *layers, "conv"]]
    compare(module, x)


@pytest.mark.filterwarnings("ignore:lipfast:UserWarning")
@pytest.mark.parametrize(
    "spelling",
    [
        lambda x, w, b: torch.addmm(b[None], x.flatten(0, 1), w),
        lambda x, w, b: torch.addmm(b, x[0], w, beta=2),
        lambda x, w, b: torch.addmm(b, x[0], w, alpha=0.5),
        lambda x, w, b: torch.addmm(x[0] @ w, x[0], w),
        lambda x, w, b: torch.addmm(b[:1], x[0], w),
        lambda x, w, b: torch.addmm(b[:1], x[0], w.t().contiguous().t()),
        lambda x, w, b: w.t() @ x.mT,
        lambda x, w, b: x @ w.expand(3, IN, OUT),
        lambda x, w, b: x @ w.flip(0),
        lambda x, w, b: x @ w.view(OUT, IN).t(),
        lambda x, w, b: torch.addmm(b[:1], x.flatten(0, 1), w),
        lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w, alpha=2, beta=0.5),
        lambda x, w, b: x @ w[:, 0],
        lambda x, w, b: x[0, 0] @ w,
        lambda x, w, b: x[0] @ x[1].t() @ x[2] @ w,
        lambda x, w, b: (x @ w) @ (w.t() @ w),
        lambda x, w, b: torch.einsum("bti,io->tbo", x, w),
        lambda x, w, b: torch.einsum("bti,io->bt", x, w),
        lambda x, w, b: torch.einsum("tti,io->to", x[:, :3], w),
        lambda x, w, b: torch.einsum("bti,io", x, w),
    ],
)
def test_other_products_stay_right(compare_accelerated, spelling):
    compare_accelerated(by_columns(spelling), torch.randn(3, 7, IN))


def test_products_of_features_are_no_layers(items_of):
    def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        features = x.flatten()[:OUT].view(OUT, 1)
        return x @ weight @ features

    assert items_of(by_columns(product), torch.randn(1, 7, IN))[-1] == "Tensor.matmul"


def test_torch_does_what_it_does_as_fast(items_of):
    layer, x = by_columns(_BY_COLUMNS["matmul"][0], kept=2), torch.randn(3, 7, IN)
    assert items_of(layer, x) == ["layer_norm", "matmul", "Tensor.add"]
    assert torch.allclose(lipfast.accelerate(layer)(x), layer(x), atol=1e-5)


class Transformer(nn.Module):
    """Two layers as GPT-2 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.norm = Conv1D(addmm, (IN, OUT)), nn.LayerNorm(OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.wide(x))


def test_zeros_in_layers_of_transformers_are_found(compare_accelerated):
    module = Transformer()
    assert lipfast.accelerate(module).masks == {}
    module.wide.weight.data *= torch.rand(IN, OUT) < 0.2
    fast = compare_accelerated(module, torch.randn(2, 9, IN))
    assert fast.wide.weight.dim() == 1
    other = Masked(addmm)  # not known to be a layer
    other.weight.data *= other.mask
    assert lipfast.accelerate(other).masks == {}


def test_pruning_hooks(compare_accelerated):
    module = Transformer()
    prune.random_unstructured(module.wide, "weight", 0.8)
    mask, x = module.wide.weight_mask.bool(), torch.randn(2, 9, IN)
    fast = lipfast.accelerate(module)
    assert torch.equal(fast.masks["wide.weight"], mask)
    assert torch.allclose(fast(x), module(x), atol=1e-5)
    prune.remove(module.wide, "weight")
    compare_accelerated(module, x)


class Masked(nn.Module):
    """Multiplies the weight by a mask itself."""

    def __init__(self, spelling) -> None:
        super().__init__()
        self.spelling = spelling
        self.weight, self.bias = nn.Parameter(torch.randn(IN, OUT)), nn.Parameter(torch.randn(OUT))
        self.register_buffer("mask", (torch.arange(IN * OUT).view(IN, OUT) % 5 == 0).float())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.spelling(F.layer_norm(x, x.shape[-1:]), self.weight * self.mask, self.bias)
        return y


@pytest.mark.parametrize("spelling", ["addmm", "matmul", "mm"])
def test_masks_in_the_code(compare_accelerated, spelling):
    fast = compare_accelerated(Masked(_BY_COLUMNS[spelling][0]), torch.randn(3, 7, IN))
    assert list(next(iter(fast._compiled.values())).multiplied._masks) == ["weight"]  # kernels get its kept values


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spelling", ["addmm", "matmul"])
def test_torch_compile(monkeypatch, spelling, training):
    function, x = _BY_COLUMNS[spelling][0], torch.randn(2, 9, IN)
    layer = Masked(function) if training else by_columns(function)
    found: list[int] = []

    def spied(lowered: Lowered, masks: dict[str, Tensor], **options: bool) -> Compiled:
        found.extend(int(mask.sum()) for mask in masks.values())
        return Compiled(lowered, masks, **options)

    monkeypatch.setattr(dynamo, "Compiled", spied)
    torch._dynamo.reset()
    fast = torch.compile(layer, backend=dynamo.lipfast)
    with torch.set_grad_enabled(training):
        results = fast(x), layer(x)
    assert torch.allclose(*results, atol=1e-5)
    assert found == [IN * OUT // 5]
    if training:
        parameters = list(layer.parameters())
        gradients = [torch.autograd.grad(y.square().sum(), parameters) for y in results]
        assert all(torch.allclose(*pair, rtol=1e-4, atol=1e-3) for pair in zip(*gradients, strict=True))


def gelu_new(x: Tensor) -> Tensor:
    """As transformers' NewGELUActivation has it."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


@pytest.mark.parametrize(
    ("activation", "wanted"),
    [
        (gelu_new, "gelu_tanh"),
        (lambda x: (1 + ((x + x**3 * 0.044715) * (2 / math.pi) ** 0.5).tanh()) * (x * 0.5), "gelu_tanh"),
        (lambda x: 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.044715 * torch.pow(x, 3.0)))), "tanh"),
        (lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(2)))), "tanh"),
        (lambda x: 0.5 * (x + 1) * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))), "tanh"),
        (lambda x: 0.5 * x * (2.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))), "tanh"),
        (lambda x: 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * F.relu(x) ** 3))), "tanh"),
    ],
)
@pytest.mark.filterwarnings("ignore:lipfast:UserWarning")
def test_gelu_through_tanh(compare_accelerated, items_of, activation, wanted):
    module = nn.Sequential(by_columns(addmm), Conv1D(lambda x, w, b: activation(x), (1, 1)))
    items = items_of(module, torch.randn(3, 7, IN))
    assert (items == [["layer_norm", "conv_transpose", "shift", "layer_norm", "act"]]) == (wanted == "gelu_tanh")
    compare_accelerated(module, 2 * torch.randn(3, 7, IN))
