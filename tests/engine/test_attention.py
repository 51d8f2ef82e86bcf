"""Attention layers of torch: their linear layers run in lanes, pruned."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import lipfast

pytestmark = pytest.mark.filterwarnings("ignore:lipfast")  # of operators that run in torch


class Attends(nn.Module):
    """An attention layer behind a norm, as transformers have it."""

    def __init__(self, batch_first: bool, call) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(24), nn.MultiheadAttention(24, 4, batch_first=batch_first)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        result, weights = self.call(self.attention, y)
        return x + result if weights is None else x + result * weights.sum()


CALLS = {
    "no weights": lambda layer, x: layer(x, x, x, need_weights=False),
    "weights": lambda layer, x: layer(x, x, x),
    "weights of each head": lambda layer, x: layer(x, x, x, average_attn_weights=False),
    "other keys": lambda layer, x: layer(x, x.flip(1), x.flip(1), need_weights=False),
    "other values": lambda layer, x: layer(x, x, 2 * x, need_weights=False),
    "mask": lambda layer, x: layer(x, x, x, need_weights=False, attn_mask=torch.eye(x.shape[1], dtype=torch.bool)),
    "one sequence": lambda layer, x: (layer(x[0], x[0], x[0], need_weights=False)[0].unsqueeze(0), None),
}


def pruned(module: nn.Module) -> dict[str, Tensor]:
    masks = {}
    for name, parameter in module.named_parameters():
        if parameter.dim() == 2:
            masks[name] = torch.rand(parameter.shape) < 0.2
            parameter.data.mul_(masks[name])
    return masks


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_attention(name, batch_first):
    torch.manual_seed(0)
    module = Attends(batch_first, CALLS[name])
    masks = pruned(module)
    exact, fast = copy.deepcopy(module).double(), lipfast.accelerate(module)  # which finds zeros of all its layers
    assert fast.masks.keys() == masks.keys()
    x = torch.randn(7, 7, 24)
    expected, got = exact(x.double()), fast(x)
    assert torch.allclose(got.double(), expected, atol=1e-5)
    slope = torch.randn(7, 7, 24)
    expected.backward(slope.double())
    got.backward(slope)
    for own, parameter in exact.named_parameters():
        wanted = parameter.grad[masks[own]] if own in masks else parameter.grad
        assert torch.allclose(fast.get_parameter(own).grad.double(), wanted, atol=1e-4), own


def test_both_layers_of_an_attention_run_in_lanes():
    torch.manual_seed(0)
    module = Attends(True, CALLS["no weights"])
    pruned(module)
    fast = lipfast.accelerate(module)
    fast(torch.randn(2, 9, 24))
    (compiled,) = fast._compiled.values()
    segments = [item for item in compiled._items if hasattr(item, "graph")]
    assert sum(node.kind == "conv" for item in segments for node in item.graph.nodes) == 2


def test_weights_pruned_by_hooks():
    torch.manual_seed(0)
    module = Attends(True, CALLS["no weights"])
    prune.random_unstructured(module.attention, "in_proj_weight", 0.8)
    fast, x = lipfast.accelerate(module), torch.randn(2, 9, 24)
    assert list(fast.masks) == ["attention.in_proj_weight"]
    assert torch.allclose(fast(x), module(x), atol=1e-5)


def test_dropped_attention_is_drawn_as_torch_draws_it():
    torch.manual_seed(0)
    module = Attends(True, CALLS["no weights"])
    module.attention.dropout = 0.5
    pruned(module)
    fast, x = lipfast.accelerate(module), torch.randn(2, 9, 24)
    fast(x)
    torch.manual_seed(3)
    expected = module(x)
    torch.manual_seed(3)
    assert torch.allclose(fast(x), expected, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_of_a_transformer(training):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=True)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    pruned(module)
    fast, x = lipfast.accelerate(module), torch.randn(3, 10, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.allclose(fast(x), module(x), atol=1e-5)
