"""The lane engine's training steps against torch's."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from lipfast.engine.lane_trainer import LaneTrainer
from lipfast.engine.trainer import TorchTrainer, make_trainer
from lipfast.errors import InputError
from lipfast.priors.skip import SkipNet

SMALL = {"in_channels": 4, "down": (8, 8), "skip": 2}
CONFIGS = [
    SMALL,
    {**SMALL, "down": (8, 8, 8), "skip": 0, "upsample": "nearest", "downsample": "avg", "activation": "swish"},
    {**SMALL, "upsample": "nearest", "downsample": "max", "activation": "relu", "padding": "zeros"},
    {**SMALL, "mix": False, "sigmoid": False, "kernel_down": 5, "kernel_skip": 3},
]


def build(config: dict, density: float = 0.3, seed: int = 0) -> tuple[SkipNet, dict]:
    """A network whose BatchNorms are not at their initial 1 and 0, where many gradients vanish, and masks."""
    torch.manual_seed(seed)
    network = SkipNet(**config)
    for parameter in network.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    masks = {n: torch.rand(p.shape) < density for n, p in network.named_parameters() if p.dim() == 4 and density < 1}
    for name, mask in masks.items():
        network.get_parameter(name).data *= mask
    return network, masks


def mse(target):
    return lambda output: ((output - target) ** 2).mean()


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
@pytest.mark.parametrize(("size", "density"), [((32, 32), 1.0), ((32, 48), 0.3), ((37, 45), 0.3)])
def test_first_step_has_torchs_gradients(config, size, density):
    # With seeds 0 and 1 some instruction set rounds a value to the other side of a kink or a maximum.
    network, masks = build(config, density, seed=2)
    exact = copy.deepcopy(network).double().train()
    z, target = (
        torch.rand(network.input_shape(*size)),
        torch.rand(1, 3, *exact(torch.rand(1, 4, *size).double()).shape[2:]),
    )
    exact = copy.deepcopy(network).double().train()
    expected = mse(target.double())(exact(z.double()))
    expected.backward()
    trainer = LaneTrainer(network, masks, lr=0.01)
    loss, output = trainer.step(z, mse(target))
    assert not loss.requires_grad
    assert not output.requires_grad
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)
    snapshot = trainer.snapshot()
    scale = max(float(p.grad.abs().max()) for p in exact.parameters())
    for name, parameter in exact.named_parameters():
        gradient = parameter.grad * masks[name] if name in masks else parameter.grad
        # Adam's first moment after one step is a tenth of the gradient. A pre-activation within rounding error of an
        # activation's kink may fall on its other side: one pixel of a thousand, hence not a matter of epsilons.
        assert float((10 * snapshot[f"adam.exp_avg.{name}"] - gradient).abs().max()) < 2e-3 * scale, name
    for name, buffer in exact.named_buffers():
        assert torch.allclose(snapshot[name].double(), buffer.double(), rtol=1e-4, atol=1e-6), name


def loss_curve(kind, lr: float, ulps: int = 0) -> torch.Tensor:
    """The losses of 200 steps; ``ulps`` scales the input by so many units in the last place."""
    network, masks = build(SMALL)
    torch.manual_seed(1)
    z, target = torch.rand(1, 4, 32, 32), torch.rand(1, 3, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    trainer = kind(network, masks, lr=lr)
    return torch.stack([trainer.step(z * (1 + ulps * 2.0**-23), mse(target))[0] for _ in range(200)]).double()


def largest_difference(curve: torch.Tensor, reference: torch.Tensor) -> float:
    """Of means over 20 steps, relative: single steps of Adam jump about."""
    return float((curve.reshape(10, 20).mean(1) / reference.reshape(10, 20).mean(1) - 1).abs().max())


def test_two_hundred_steps_stay_within_one_percent_of_torch():
    torchs = loss_curve(TorchTrainer, 0.001)
    lanes = loss_curve(LaneTrainer, 0.001)
    assert torchs[-1] < torchs[0] / 2
    assert float((lanes / torchs - 1)[:50].abs().max()) < 1e-3  # before rounding errors have grown
    assert largest_difference(lanes, torchs) < 0.01


def test_at_the_full_rate_the_engines_differ_like_torch_from_itself():
    """At a rate of 0.01 a change of the input by one unit in the last place moves torch's own curve by several per
    cent, so nothing can stay within one: the yardstick is torch's own spread."""
    torchs = loss_curve(TorchTrainer, 0.01)
    spread = max(largest_difference(loss_curve(TorchTrainer, 0.01, ulps), torchs) for ulps in (-2, -1, 1, 2))
    assert spread > 0.01
    assert torchs[-1] < torchs[0] / 3
    # The largest of four draws; another draw is rarely three times as far out.
    assert largest_difference(loss_curve(LaneTrainer, 0.01), torchs) < 3 * spread


def test_restoring_a_snapshot_is_bit_exact():
    network, masks = build(SMALL)
    trainer = LaneTrainer(network, masks, lr=0.01)
    z, target = torch.rand(1, 4, 32, 32), torch.rand(1, 3, 32, 32)
    start = trainer.snapshot()
    first = [trainer.step(z, mse(target))[0] for _ in range(4)]
    middle = trainer.snapshot()
    second = [trainer.step(z, mse(target))[0] for _ in range(3)]
    end = trainer.snapshot()
    trainer.restore(middle)
    assert [trainer.step(z, mse(target))[0] for _ in range(3)] == second
    assert all(torch.equal(end[name], tensor) for name, tensor in trainer.snapshot().items())
    assert float(end["adam.step"]) == 7
    fresh = LaneTrainer(build(SMALL)[0], masks, lr=0.01)
    fresh.restore(start)
    assert [fresh.step(z, mse(target))[0] for _ in range(4)] == first


def test_snapshots_are_interchangeable_with_the_torch_trainer():
    network, masks = build(SMALL)
    lanes, dense = LaneTrainer(network, masks, lr=0.01), TorchTrainer(copy.deepcopy(network), masks, lr=0.01)
    z, target = torch.rand(1, 4, 32, 32), torch.rand(1, 3, 32, 32)
    for _ in range(3):
        lanes.step(z, mse(target))
    dense.restore(lanes.snapshot())
    assert float(dense.step(z, mse(target))[0]) == pytest.approx(float(lanes.step(z, mse(target))[0]), rel=1e-5)


def test_dead_weights_stay_exactly_zero():
    network, masks = build(SMALL)
    trainer = LaneTrainer(network, masks, lr=0.01)
    for _ in range(3):
        trainer.step(torch.rand(1, 4, 32, 32), mse(torch.rand(1, 3, 32, 32)))
    parameters = dict(trainer.network().state_dict())
    assert all(float(parameters[name][~mask].abs().sum()) == 0 for name, mask in masks.items())
    assert all(bool((parameters[name][mask] != 0).all()) for name, mask in masks.items())


def test_the_number_of_threads_does_not_change_a_bit():
    outcomes = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        network, masks = build(SMALL)
        trainer = LaneTrainer(network, masks, lr=0.01)
        torch.manual_seed(1)
        for _ in range(3):
            trainer.step(torch.rand(1, 4, 40, 36), mse(torch.rand(1, 3, 40, 36)))
        assert torch.get_num_threads() == threads
        outcomes.append(trainer.snapshot())
    torch.set_num_threads(before)
    for other in outcomes[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in outcomes[0].items())


def test_a_new_input_size_is_planned_anew():
    network, masks = build(SMALL)
    lanes, dense = LaneTrainer(network, masks, lr=0.01), TorchTrainer(copy.deepcopy(network), masks, lr=0.01)
    for side in (32, 48, 32):
        z, target = torch.rand(1, 4, side, side), torch.rand(1, 3, side, side)
        dense.restore(lanes.snapshot())
        expected = dense.step(z, mse(target))[0]
        assert float(lanes.step(z, mse(target))[0]) == pytest.approx(float(expected), rel=1e-4)


def test_a_layer_that_is_used_twice_goes_to_torch():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    network = nn.Sequential(conv, nn.SiLU(), conv)
    trainers = [make_trainer(copy.deepcopy(network), None, lr=0.1, engine=engine) for engine in ("auto", "torch")]
    z, target = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    with pytest.warns(UserWarning, match="a parameter is shared"):
        losses = [[float(trainer.step(z, mse(target))[0]) for _ in range(3)] for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_an_unknown_operator_goes_to_torch_and_says_so():
    network = nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.Softplus())
    trainer = make_trainer(network, None, lr=0.01)
    with pytest.warns(UserWarning, match="softplus"):
        loss, _ = trainer.step(torch.rand(1, 4, 8, 8), mse(torch.rand(1, 3, 8, 8)))
    assert float(trainer.step(torch.rand(1, 4, 8, 8), mse(torch.rand(1, 3, 8, 8)))[0]) < 10 * float(loss)
    assert float(trainer.snapshot()["adam.step"]) == 2


def test_a_foreign_snapshot_is_refused():
    trainer = LaneTrainer(build(SMALL)[0], None, lr=0.01)
    snapshot = trainer.snapshot()
    snapshot.pop("output.bias")
    with pytest.raises(InputError, match=r"output\.bias"):
        trainer.restore(snapshot)


def test_a_fit_does_not_wait_for_torchs_compiler():
    """Three seconds of imports, for the first operator of ours that goes through torch's dispatcher."""
    script = """
import sys, torch
from lipfast.engine.lane_trainer import LaneTrainer
network = torch.nn.Conv2d(3, 3, 3, padding=1)
mask = torch.arange(81).view(3, 3, 3, 3) % 2 == 0
trainer = LaneTrainer(network, {"weight": mask}, lr=0.1)
trainer.step(torch.randn(1, 3, 8, 8), lambda output: output.square().mean())
trainer.snapshot()
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
