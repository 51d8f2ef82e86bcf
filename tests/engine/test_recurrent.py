"""Recurrent layers: one call of torch's, with the parameters as they are."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import lipfast
from lipfast.engine import capture
from lipfast.errors import InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore:lipfast"),  # of operators that run in torch
    pytest.mark.filterwarnings("ignore:LSTM with projections"),  # torch's own, of its kernels
]

LAYERS = {
    "LSTM": lambda: nn.LSTM(6, 5),
    "LSTM, two ways": lambda: nn.LSTM(6, 5, 2, bidirectional=True, batch_first=True),
    "LSTM, projected": lambda: nn.LSTM(6, 5, proj_size=3, batch_first=True),
    "GRU": lambda: nn.GRU(6, 5, 2, bias=False),
    "RNN": lambda: nn.RNN(6, 5, bidirectional=True),
    "RNN with ReLU": lambda: nn.RNN(6, 5, nonlinearity="relu", batch_first=True),
}


class Lines(nn.Module):
    """A convolution, and a recurrent layer over the lines of its result."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.conv, self.layer = nn.Conv2d(3, 6, 3, padding=1), layer

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        lines = F.relu(self.conv(x)).mean(2).transpose(1, 2)
        y, last = self.layer(lines, *state)
        return y, *(last if isinstance(last, tuple) else [last])


@pytest.mark.parametrize("name", LAYERS)
def test_recurrent_layers_train_and_infer_as_in_torch(name):
    torch.manual_seed(0)
    model, x = Lines(LAYERS[name]()), torch.randn(2, 3, 8, 7)
    prune.random_unstructured(model.conv, "weight", 0.5)
    mask = torch.rand(model.layer.weight_hh_l0.shape) < 0.5
    for pruned in ({}, {"layer.weight_hh_l0": mask}):
        for key, alive in pruned.items():
            model.get_parameter(key).data *= alive
        fast = lipfast.accelerate(model, pruned)
        assert "layer.weight_hh_l0" in fast.masks or not pruned
        optimisers = [torch.optim.SGD(module.parameters(), 0.1) for module in (fast, model)]
        for _ in range(3):
            with torch.no_grad():
                for _ in range(2):
                    assert_alike(fast(x), model(x))
            for module, optimiser in zip((fast, model), optimisers, strict=True):
                optimiser.zero_grad()
                sum((part * (1 + place)).square().sum() for place, part in enumerate(module(x))).backward()
                if module is model:
                    for key, alive in pruned.items():
                        model.get_parameter(key).grad *= alive
                optimiser.step()
            assert_alike(fast(x), model(x))
        for other in (fast.to_dense(), copy.deepcopy(fast)):
            assert_alike(other(x), model(x))
    assert all(weight.device.type == "cpu" for weight in fast._source().layer._flat_weights)


def assert_alike(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_the_rule_knows_what_torch_returns(name, monkeypatch):
    layer, x = LAYERS[name](), torch.randn(2, 4, 6)
    wanted = layer(x)
    found = []
    rule = capture._recurred
    for function in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu):
        monkeypatch.setitem(capture._RULES, function, lambda *given: found.append(rule(*given)) or found[-1])
    lipfast.accelerate(layer)(x)
    flat = torch.utils._pytree.tree_leaves(wanted)
    assert [part.shape for part in found[0]] == [part.shape for part in flat]


def test_a_state_of_another_size_is_refused_by_torch():
    fast = lipfast.accelerate(nn.GRU(6, 5))
    with pytest.raises(InputError, match="hidden"):
        fast(torch.randn(4, 2, 6), torch.randn(1, 3, 5))


def test_a_state_that_is_given():
    torch.manual_seed(0)
    model, x = Lines(nn.GRU(6, 5, batch_first=True)), torch.randn(2, 3, 8, 7)
    fast = lipfast.accelerate(model)
    with torch.no_grad():
        for state in torch.randn(2, 1, 2, 5):
            assert_alike(fast(x, state), model(x, state))
