"""What only a GPU can answer: the CUDA library and the graph trainer on a real device. Run by make test-gpu."""

import pytest
import torch
from sparse_conv_cases import LAYERS, SIZES, check

from lipfast.engine.graph_trainer import GraphTrainer
from lipfast.engine.trainer import TorchTrainer
from lipfast.ops._cuda_library import Library, find_library

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_cuda_library_matches_the_reference(layer, size):
    check(Library(find_library()), layer, size, "cuda")


def test_a_captured_network_trains_like_a_plain_one():
    def network():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(8, 16, 3, padding=1),
            torch.nn.BatchNorm2d(16),
            torch.nn.LeakyReLU(0.2),
            torch.nn.Conv2d(16, 3, 1),
        ).cuda()

    z, target = torch.rand(1, 8, 32, 32, device="cuda"), torch.rand(1, 3, 32, 32, device="cuda")
    graph, plain = GraphTrainer(network(), None, lr=0.01), TorchTrainer(network(), None, lr=0.01)
    for _ in range(5):
        loss, _ = graph.step(z, lambda y: ((y - target) ** 2).mean())
        want, _ = plain.step(z, lambda y: ((y - target) ** 2).mean())
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)
