"""Whole pruned networks on GPU kernels: accelerated modules and training steps against torch's.

The same bodies run on the CPU, where Triton's interpreter stands in for the GPU, and under ``make test-gpu``.
"""

import copy

import pytest
import torch
from gpu_device import DEVICE  # first: it switches the interpreter on
from torch import nn

import lipfast
from lipfast.engine import lane_module
from lipfast.engine.operator_trainer import OperatorTrainer
from lipfast.engine.trainer import TorchTrainer
from lipfast.ops import _dispatch, _gpu_rule
from lipfast.ops import triton as triton_ops

CHOICES = {
    "sparse": dict.fromkeys(_gpu_rule.DIRECTIONS, "sparse"),
    "masked forward": {"forward": "masked", "input_gradient": "sparse", "weight_gradient": "dense"},
}


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch):
    """On a CPU: Triton takes CPU tensors, and networks run operator by operator as on a GPU."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if DEVICE == "cpu":
        monkeypatch.setitem(_dispatch.BACKENDS, "triton", (None, "lipfast.ops.triton"))
        monkeypatch.setenv("LIPFAST_BACKEND", "triton")
        monkeypatch.setattr(lane_module, "runs_in_lanes", lambda device: False)


@pytest.fixture(params=CHOICES)
def forced(request, monkeypatch):
    """The same kernels in every layer; the rule would keep layers as small as these dense."""
    monkeypatch.setattr(_gpu_rule, "choose", lambda layer, **where: CHOICES[request.param])


@pytest.fixture
def calls(monkeypatch):
    """How often each Triton op runs; on a GPU the CUDA library may serve some."""
    counts: dict[str, int] = {}

    def counting(name, function):
        def count(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return function(*args, **kwargs)

        return count

    for name in triton_ops.__all__:
        monkeypatch.setattr(triton_ops, name, counting(name, getattr(triton_ops, name)))
    return counts


def pruned_network():
    """A strided, a mirrored and a 1x1 layer with zeros in them, and the masks."""
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(6),
        nn.LeakyReLU(0.2),
        nn.Conv2d(6, 5, 3, padding=1, bias=False),
        nn.Conv2d(5, 4, 1),
    )
    masks = {n: torch.rand(p.shape) < 0.3 for n, p in network.named_parameters() if p.dim() == 4}
    for name, mask in masks.items():
        network.get_parameter(name).data *= mask
    return network.to(DEVICE), masks


def loss_of(output):
    return (output - 0.3).square().mean()


def test_an_accelerated_module_computes_and_learns_what_torch_does(forced, calls):
    network, masks = pruned_network()
    fast = lipfast.accelerate(network)
    x = torch.randn(1, 3, 12, 10, device=DEVICE, requires_grad=True)
    want, got = network(x), fast(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad(loss_of(want), (x, *network.parameters()))
    gradients = torch.autograd.grad(loss_of(got), (x, *fast.parameters()))
    names = ("x", *(name for name, _ in network.named_parameters()))
    for name, mine, theirs in zip(names, gradients, wanted, strict=True):
        theirs = theirs[masks[name].to(DEVICE)] if name in masks else theirs
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    if DEVICE == "cpu":
        assert sum(count for name, count in calls.items() if "conv2d" in name) >= 5


@pytest.mark.parametrize("align_corners", [False, True])
def test_norms_and_enlargements_run_in_our_kernels(align_corners, calls):
    """In both modes, whatever is pruned: with torch's activations, statistics, sizes and scales."""
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Upsample(scale_factor=(1.5, 2), mode="bilinear", align_corners=align_corners),
        nn.BatchNorm2d(4, momentum=0.3),
        nn.Upsample(size=(17, 20), mode="bilinear", align_corners=align_corners),
        nn.Upsample(size=(9, 10), mode="bilinear"),  # shrinks: torch's
        nn.BatchNorm2d(4, affine=False),
    ).to(DEVICE)
    fast = lipfast.accelerate(network)
    for training in (True, False):
        x = torch.randn(2, 3, 7, 6, device=DEVICE, requires_grad=True)
        network.train(training)
        fast.train(training)
        want, got = network(x), fast(x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        gradients = [
            torch.autograd.grad(loss_of(y), (x, *net.parameters())) for y, net in ((got, fast), (want, network))
        ]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    for (name, mine), theirs in zip(fast.named_buffers(), network.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=name)
    assert calls["batch_norm_activate"] == calls["batch_norm_activate_backward"] == 3
    assert calls["upsample_bilinear"] == calls["upsample_bilinear_backward"] == 4
    assert calls["normalise_activate"] == 2  # the one without weights is torch's


def test_a_trainer_takes_torchs_steps(forced):
    network, masks = pruned_network()
    ours = OperatorTrainer(copy.deepcopy(network), masks, lr=0.01)
    plain = TorchTrainer(network, masks, lr=0.01)
    z = torch.rand(1, 3, 12, 10, device=DEVICE)
    for _ in range(2):
        (loss, output), (want_loss, want_output) = ours.step(z, loss_of), plain.step(z, loss_of)
        torch.testing.assert_close(loss, want_loss, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(output, want_output, rtol=0, atol=1e-3)
    state = ours.snapshot()
    for name, mask in masks.items():
        assert not state[name].cpu()[~mask].any()
    again = OperatorTrainer(network, masks, lr=0.01)
    again.restore(state)
    torch.testing.assert_close(
        again.step(z, loss_of), ours.step(z, loss_of), rtol=0, atol=0 if DEVICE == "cpu" else 1e-5
    )


@pytest.mark.parametrize("weight_gradient", ["dense", "sparse"])
def test_a_trainer_learns_every_kind_of_parameter(weight_gradient, monkeypatch):
    """Pruned convolutions by kernels of both kinds, a pruned layer that is none, norms of every make, sizes that need
    alignment: all lie in one vector. A bias before a norm would learn rounding errors, so there is none."""
    kernels = {"forward": "dense", "input_gradient": "dense", "weight_gradient": weight_gradient}
    monkeypatch.setattr(_gpu_rule, "choose", lambda layer, **where: kernels)
    network = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect", bias=False),
        nn.BatchNorm2d(5, affine=False),
        nn.ReLU(),
        nn.Conv2d(5, 7, 1, bias=False),
        nn.BatchNorm2d(7, track_running_stats=False),
        nn.Conv2d(7, 3, 3, stride=2, bias=False),
        nn.BatchNorm2d(3, momentum=0.3),
        nn.LeakyReLU(0.1, inplace=True),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(3, 3, 1),
        nn.Flatten(),
        nn.Linear(3 * 6 * 4, 4),
    ).to(DEVICE)
    masks = {n: torch.rand(p.shape, device=DEVICE) < 0.6 for n, p in network.named_parameters() if p.dim() > 1}
    ours = OperatorTrainer(copy.deepcopy(network), masks, lr=0.01)
    plain = TorchTrainer(network, masks, lr=0.01)
    z = torch.rand(2, 3, 8, 6, device=DEVICE)
    for step in range(3):
        (loss, _), (want, _) = ours.step(z, loss_of), plain.step(z, loss_of)
        torch.testing.assert_close(loss, want, rtol=1e-3, atol=1e-6)
        if step == 0:  # later ones differ where a gradient is 0 but for rounding, which Adam makes a whole step of
            got, wanted = ours.snapshot(), plain.snapshot()
    assert got.keys() == wanted.keys()
    for name, mask in masks.items():
        assert not got[name][~mask].any()
    statistics = [name for name in wanted if "running" in name or "num_batches" in name]
    assert len(statistics) == 2 * 3
    for name in (*statistics, *(f"adam.exp_avg.{name}" for name, _ in network.named_parameters())):
        theirs = wanted[name].to(got[name].device)
        torch.testing.assert_close(got[name], theirs, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_a_shared_weight_learns_from_kernels_of_both_kinds(monkeypatch):
    def choose(layer, **where):
        gradient = "dense" if layer.output_size[2] > 4 else "sparse"
        return {"forward": "dense", "input_gradient": "dense", "weight_gradient": gradient}

    monkeypatch.setattr(_gpu_rule, "choose", choose)
    conv = nn.Conv2d(3, 3, 3, padding=1)
    network = nn.Sequential(conv, nn.Tanh(), nn.AvgPool2d(2), conv).to(DEVICE)
    masks = {"0.weight": torch.rand(3, 3, 3, 3, device=DEVICE) < 0.5}
    ours, plain = (make(copy.deepcopy(network), masks, lr=0.01) for make in (OperatorTrainer, TorchTrainer))
    z = torch.rand(1, 3, 8, 8, device=DEVICE)
    for trainer in (ours, plain):
        trainer.step(z, loss_of)
    got, want = (trainer.snapshot()["adam.exp_avg.0.weight"] for trainer in (ours, plain))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-7)


def test_by_its_rule_a_gpu_keeps_small_dense_layers_dense(calls):
    network, _ = pruned_network()
    x = torch.randn(1, 3, 12, 10, device=DEVICE)
    torch.testing.assert_close(lipfast.accelerate(network)(x), network(x), rtol=1e-4, atol=1e-5)
    assert not any("conv2d" in name for name in calls)  # 30 % kept


def test_the_lists_of_a_mask_are_made_once(forced):
    """They cost a sort; steps find them by the very tensor of positions."""
    from lipfast.ops.triton import sparse_conv

    network, masks = pruned_network()
    trainer = OperatorTrainer(network, masks, lr=0.01)
    z = torch.rand(1, 3, 12, 10, device=DEVICE)
    trainer.step(z, loss_of)
    before = [id(entry) for shapes in sparse_conv._known.values() for entry in shapes.values()]
    trainer.step(z, loss_of)
    assert [id(entry) for shapes in sparse_conv._known.values() for entry in shapes.values()] == before
    assert DEVICE != "cpu" or len(before) >= 2  # the first layer's input needs no gradient
