"""Networks operator by operator, as a GPU runs them, on CPU tensors: the device is only a parameter."""

import copy

import pytest
import torch
from torch import nn

import lipfast
from lipfast.engine import lane_module
from lipfast.engine.operator_trainer import OperatorTrainer
from lipfast.engine.operators import PrunedConv
from lipfast.engine.trainer import TorchTrainer
from lipfast.errors import InputError
from lipfast.ops import _gpu_rule
from lipfast.priors.skip import SkipNet

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
CHOICES = {
    "sparse": dict.fromkeys(_gpu_rule.DIRECTIONS, "sparse"),
    "dense": dict.fromkeys(_gpu_rule.DIRECTIONS, "dense"),
    "mixed": {"forward": "masked", "input_gradient": "dense", "weight_gradient": "sparse"},
}


@pytest.fixture(params=CHOICES)
def kernels(request, monkeypatch):
    """Runs everything operator by operator, with the same kernels in all layers; the reference computes."""
    monkeypatch.setattr(lane_module, "runs_in_lanes", lambda device: False)
    monkeypatch.setenv("LIPFAST_BACKEND", "reference")
    monkeypatch.setattr(_gpu_rule, "choose", lambda layer, **where: CHOICES[request.param])
    return request.param


class Mixed(nn.Module):
    """What a recording must get right: padding modes, a padded map with other readers, in-place calls, new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(6)
        self.left, self.right = nn.Conv2d(6, 5, 3, bias=False), nn.Conv2d(6, 5, 3)
        self.spread = nn.Conv2d(5, 4, 3, padding="same", dilation=2)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)  # pruned, and yet torch's
        self.dense = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu_(self.norm(self.first(x)))
        padded = nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
        x = self.left(padded) + self.right(padded) + padded.mean() * torch.ones(1, device=x.device)
        return self.dense(self.up(self.grouped(self.spread(x))))


def pruned(module: nn.Module, density: float = 0.4) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The module with zeros, and where they are not; its ``dense`` layer stays."""
    torch.manual_seed(0)
    convolutions = {n: m for n, m in module.named_modules() if isinstance(m, CONVOLUTIONS) and n != "dense"}
    masks = {f"{name}.weight": torch.rand(m.weight.shape) < density for name, m in convolutions.items()}
    for name, mask in masks.items():
        module.get_parameter(name).data *= mask
    return module, masks


def plan_of(fast, *inputs):
    fast(*inputs)
    return [item for item in next(reversed(fast._compiled.values()))._items if isinstance(item, PrunedConv)]


def test_the_answer_and_all_gradients_are_torchs(kernels):
    module, masks = pruned(Mixed())
    fast = lipfast.accelerate(module)
    assert set(fast.masks) == set(masks)
    x = torch.randn(2, 3, 16, 18, requires_grad=True)
    want, got = module(x), fast(x)
    torch.testing.assert_close(got, want)
    dy = torch.randn_like(want)
    want_dx, *want_gradients = torch.autograd.grad(want, (x, *module.parameters()), dy)
    got_dx, *gradients = torch.autograd.grad(got, (x, *fast.parameters()), dy)
    torch.testing.assert_close(got_dx, want_dx, atol=1e-5, rtol=1e-4)
    for (name, _), mine, theirs in zip(module.named_parameters(), gradients, want_gradients, strict=True):
        theirs = theirs[masks[name]] if name in masks else theirs
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(fast.get_buffer(name), buffer, msg=name)


def test_every_pruned_convolution_is_ours(kernels):
    module, masks = pruned(Mixed())
    found = plan_of(lipfast.accelerate(module), torch.randn(1, 3, 16, 18))
    assert [item.form.padding_mode for item in found] == ["reflect", "circular", "circular", "zeros"]
    assert [item.form.padding for item in found] == [(1, 1), (1, 1), (1, 1), (1, 1)]
    assert len(found) == len(masks) - 2  # padding="same" and the transposed one stay torch's


def test_a_bias_has_no_gradient_where_a_norm_alone_reads_the_result(kernels):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.normed, self.plain, self.both = (nn.Conv2d(2, 2, 1) for _ in range(3))
            self.norm = nn.BatchNorm2d(2)

        def forward(self, x):
            y = self.both(x)
            return self.norm(self.normed(x)) * self.plain(x) + self.norm(y) * y

    torch.manual_seed(0)
    fast = lipfast.accelerate(
        Net(), {f"{name}.weight": torch.rand(2, 2, 1, 1) < 0.9 for name in ("normed", "plain", "both")}
    )
    for training, cancelling in ((True, {"normed.weight"}), (False, set())):
        fast.train(training)
        plan = plan_of(fast, torch.rand(2, 2, 3, 3))
        assert {item.name for item in plan if item.bias_cancels} == cancelling


def test_other_types_and_autocast_follow_torchs_rules(kernels):
    module, _ = pruned(Mixed())
    fast = lipfast.accelerate(module.eval())
    x = torch.randn(1, 3, 16, 18)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = fast(x), module(x)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, atol=0.05, rtol=0.05)
    torch.testing.assert_close(fast.double()(x.double()), module.double()(x.double()))


def test_a_plan_made_in_inference_mode_serves_training(kernels):
    module, _ = pruned(Mixed())
    fast, x = lipfast.accelerate(module.eval()), torch.randn(1, 3, 16, 18)
    with torch.inference_mode():
        want = fast(x)
    got = fast(x)
    torch.testing.assert_close(got, want)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # in torch's functions, which keep the positions for backward
        fast(x).float().sum().backward()
    assert all(p.grad is not None for p in fast.parameters())


def test_state_and_optimisers_see_what_they_see_in_lanes(kernels):
    module, masks = pruned(Mixed())
    fast = lipfast.accelerate(module)
    optimiser = torch.optim.SGD(fast.parameters(), lr=0.1)
    fast(torch.randn(1, 3, 16, 18)).square().mean().backward()
    optimiser.step()
    state = fast.state_dict()
    for name, mask in masks.items():
        assert state[name].shape == mask.shape
        assert not state[name][~mask].any()
    again = lipfast.accelerate(module)
    again.load_state_dict(state)
    x = torch.randn(1, 3, 16, 18)
    assert torch.equal(again.eval()(x), fast.eval()(x))
    torch.testing.assert_close(fast.to_dense()(x), fast(x))


def test_precision_is_what_was_asked_for(kernels, monkeypatch):
    module, _ = pruned(Mixed())
    asked: list[str] = []

    def note(layer, *, precision, **where):
        asked.append(precision)
        return CHOICES["dense"]

    monkeypatch.setattr(_gpu_rule, "choose", note)
    x = torch.randn(1, 3, 16, 18)
    for arguments in ({"precision": "bf16"}, {"exact": True}, {"exact": True, "precision": "tf32"}):
        lipfast.accelerate(module, **arguments)(x)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    fast = lipfast.accelerate(module)
    fast(x)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    fast(x)
    assert asked[::3] == ["bf16", "ieee", "ieee", "tf32", "ieee"]
    with pytest.raises(InputError, match="ieee, tf32, bf16, got 'fp8'"):
        lipfast.accelerate(module, precision="fp8")


def test_tensors_made_on_the_way_are_where_the_module_runs():
    """In lanes as well: they were recorded without data."""
    module, _ = pruned(Mixed())
    with pytest.warns(UserWarning, match="runs in torch"):
        got = lipfast.accelerate(module)(torch.randn(1, 3, 16, 18))
    assert got.device.type == "cpu"


# Training steps.

CONFIG = {"in_channels": 4, "down": (8, 8), "skip": 2}


def skip_net():
    torch.manual_seed(0)
    network = SkipNet(**CONFIG)
    for parameter in network.parameters():
        if parameter.dim() == 1:  # away from 1 and 0, where many gradients vanish
            parameter.data += 0.3 * torch.randn_like(parameter)
    return pruned(network)


def mse(output):
    return (output - 0.3).square().mean()


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


def test_training_is_torchs_training(kernels):
    network, masks = skip_net()
    ours = OperatorTrainer(copy.deepcopy(network), masks, lr=0.01)
    plain = TorchTrainer(copy.deepcopy(network), masks, lr=0.01)
    z = torch.rand(network.input_shape(32, 32))
    for step in range(3):
        (loss, output), (want_loss, want_output) = ours.step(z, mse), plain.step(z, mse)
        assert float(loss) == pytest.approx(float(want_loss), rel=1e-4), step
        torch.testing.assert_close(output, want_output, atol=2e-3, rtol=0)
    state, want = ours.snapshot(), plain.snapshot()
    assert state.keys() == want.keys()
    for name, tensor in state.items():
        scale = float(want[name].double().abs().max()) or 1.0
        # A bias before a BatchNorm has no gradient but rounding noise, which Adam blows up to full steps.
        if name.endswith("bias") or name.startswith("adam") or "running" in name:
            continue
        # Adam moves a weight by lr a step, whichever way the rounding of a tiny gradient points.
        assert float((tensor - want[name]).abs().double().median()) < 1e-3 * scale, name
    for name, mask in masks.items():
        for prefix in ("", "adam.exp_avg.", "adam.exp_avg_sq."):
            assert not state[prefix + name][~mask].any()


def test_captured_or_not_the_bits_are_the_same(kernels):
    network, masks = skip_net()
    plain = OperatorTrainer(copy.deepcopy(network), masks, lr=0.01)
    graph = OperatorTrainer(copy.deepcopy(network), masks, lr=0.01, capture=warm_up_like_cuda)
    inputs = [torch.rand(network.input_shape(side, side)) for side in (32, 32, 64, 32)]
    for z in inputs:
        for mine, theirs in zip(graph.step(z, mse), plain.step(z, mse), strict=True):
            assert torch.equal(mine, theirs)
    assert [shape[-1] for shape in captures] == [32, 64, 32]
    want = plain.snapshot()
    for name, tensor in graph.snapshot().items():
        assert torch.equal(tensor, want[name]), name


def test_outputs_outlive_the_graphs_memory(kernels):
    class Overwrites(nn.Module):
        """A graph: each replay writes where the last one did."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.last = module, torch.zeros(1)

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            self.last.data.fill_(float("nan"))
            self.last = self.module(z)
            return self.last

    network, masks = skip_net()
    trainer = OperatorTrainer(network, masks, lr=0.01, capture=lambda module, sample: Overwrites(module))
    z = torch.rand(network.input_shape(32, 32))
    _, output = trainer.step(z, mse)
    trainer.step(z, mse)
    assert output.isfinite().all()


def test_a_snapshot_is_resumed_to_the_bit(kernels):
    network, masks = skip_net()
    z = torch.rand(network.input_shape(32, 32))
    first = OperatorTrainer(copy.deepcopy(network), masks, lr=0.01)
    first.step(z, mse)
    saved = first.snapshot()
    second = OperatorTrainer(copy.deepcopy(network), masks, lr=0.01)
    second.restore(saved)
    for _ in range(2):
        for mine, theirs in zip(first.step(z, mse), second.step(z, mse), strict=True):
            assert torch.equal(mine, theirs)
    first.restore(saved)  # with a program in place
    third = OperatorTrainer(copy.deepcopy(network), masks, lr=0.01)
    third.restore(saved)
    assert torch.equal(first.step(z, mse)[0], third.step(z, mse)[0])


def test_a_network_that_cannot_be_recorded_trains_in_torch(kernels):
    class Reads(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * float(x.mean())

    network, masks = pruned(nn.Sequential(Reads(2, 3, 3)))
    trainer = OperatorTrainer(network, masks, lr=0.01)
    with pytest.warns(UserWarning, match="this fit runs in torch"):
        trainer.step(torch.rand(1, 2, 8, 8), mse)
    assert not trainer.network()[0].weight[~masks["0.weight"]].any()
