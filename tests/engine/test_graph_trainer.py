"""Training with a captured network is training: same bits, whatever capturing did to the network."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lipfast.engine import operator_trainer, trainer
from lipfast.engine.graph_trainer import GraphTrainer
from lipfast.engine.trainer import TorchTrainer, make_trainer


def warm_up_like_cuda(module, sample):
    """What capturing does to a module: it runs it a few times, gradients included."""
    for _ in range(3):
        module(*sample).sum().backward()
    module.zero_grad(set_to_none=True)
    captures.append(sample[0].shape)
    return module


captures: list[torch.Size] = []


@pytest.fixture(autouse=True)
def no_captures():
    captures.clear()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1))


def train(trained, sizes=(8, 8, 8)):
    torch.manual_seed(1)
    target = torch.rand(1, 1, 8, 8)
    outputs = []
    for size in sizes:
        z = torch.rand(1, 2, size, size)
        outputs.append(trained.step(z, lambda y: ((y - target[..., : y.shape[-2], : y.shape[-1]]) ** 2).mean()))
    return outputs


def masks():
    return {"0.weight": torch.rand(4, 2, 3, 3, generator=torch.Generator().manual_seed(2)) < 0.5}


def test_same_bits_as_without_a_capture():
    graph = GraphTrainer(network(), masks(), lr=0.01, capture=warm_up_like_cuda)
    plain = TorchTrainer(network(), masks(), lr=0.01)
    for (loss, output), (want_loss, want_output) in zip(train(graph), train(plain), strict=True):
        assert torch.equal(loss, want_loss)
        assert torch.equal(output, want_output)
    want = plain.snapshot()
    for name, tensor in graph.snapshot().items():
        assert torch.equal(tensor, want[name]), name


def test_captures_once_for_a_shape():
    train(GraphTrainer(network(), None, lr=0.01, capture=warm_up_like_cuda), sizes=(8, 8, 4, 4))
    assert captures == [torch.Size((1, 2, 8, 8)), torch.Size((1, 2, 4, 4))]


def test_the_callers_module_keeps_its_own_forward():
    def spoil(module, sample):
        module.forward = None  # the real capture replaces it, too
        return nn.Conv2d(2, 1, 1)

    trained = GraphTrainer(network(), None, lr=0.01, capture=spoil)
    train(trained, sizes=(8,))
    assert trained.network()(torch.rand(1, 2, 8, 8)).shape == (1, 1, 8, 8)


def test_auto_takes_operators_for_a_network_on_a_gpu(monkeypatch):
    class OnGpu(nn.Linear):
        def parameters(self, recurse=True):
            return iter([SimpleNamespace(is_cuda=True)])

    monkeypatch.setattr(operator_trainer, "OperatorTrainer", lambda network, masks, *, lr: ("operators", masks))
    for masks in (None, {"weight": "a mask"}):
        assert make_trainer(OnGpu(1, 1), masks, lr=0.5, engine="auto") == ("operators", masks)
    hooked = OnGpu(1, 1)
    hooked.register_forward_hook(lambda *_: None)
    monkeypatch.setattr(trainer, "TorchTrainer", lambda network, masks, *, lr: "torch")
    assert make_trainer(hooked, None, lr=0.5, engine="auto") == "torch"
