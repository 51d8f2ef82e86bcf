"""What only a GPU can answer: the CUDA library and the graph trainer on a real device. Run by make test-gpu."""

import pytest
import torch
from sparse_conv_cases import LAYERS, SIZES, check

from lipfast.engine.graph_trainer import GraphTrainer
from lipfast.engine.trainer import TorchTrainer, make_trainer
from lipfast.ops import _gpu_rule
from lipfast.ops._cuda_library import Library, find_library

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_cuda_library_matches_the_reference(layer, size):
    check(Library(find_library()), layer, size, "cuda")


def network():
    """With what adds in any order where torch may: mirrored borders, bilinear upsampling, cuDNN's gradients."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(8, 16, 3, stride=2, padding=1, padding_mode="reflect"),
        torch.nn.BatchNorm2d(16),
        torch.nn.LeakyReLU(0.2),
        torch.nn.Upsample(scale_factor=2, mode="bilinear"),
        torch.nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
        torch.nn.Conv2d(16, 3, 1),
    ).cuda()


@pytest.fixture
def deterministic_torch(monkeypatch):
    """torch's switch, which costs time; lipfast's own kernels always are."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("kernels", [None, "sparse", "dense"])  # None: a network that is not pruned
def test_equal_seeds_train_to_equal_bits(kernels, deterministic_torch, monkeypatch):
    monkeypatch.setattr(_gpu_rule, "choose", lambda layer, **where: dict.fromkeys(_gpu_rule.DIRECTIONS, kernels))
    z, target = torch.rand(1, 8, 64, 64, device="cuda"), torch.rand(1, 3, 64, 64, device="cuda")

    def train():
        module = network()
        torch.manual_seed(1)
        parameters = module.named_parameters()
        masks = {n: (torch.rand(p.shape) < 0.2).cuda() for n, p in parameters if p.dim() == 4} if kernels else None
        trainer = make_trainer(module, masks, lr=0.01)
        steps = [trainer.step(z, lambda y: ((y - target) ** 2).mean()) for _ in range(10)]
        return steps[-1][1], trainer.snapshot()

    (output, state), (again, state_again) = train(), train()
    assert torch.equal(output, again)
    assert all(torch.equal(tensor, state_again[name]) for name, tensor in state.items())


def test_a_captured_network_trains_like_a_plain_one():
    z, target = torch.rand(1, 8, 32, 32, device="cuda"), torch.rand(1, 3, 32, 32, device="cuda")
    graph, plain = GraphTrainer(network(), None, lr=0.01), TorchTrainer(network(), None, lr=0.01)
    for _ in range(5):
        loss, _ = graph.step(z, lambda y: ((y - target) ** 2).mean())
        want, _ = plain.step(z, lambda y: ((y - target) ** 2).mean())
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)
