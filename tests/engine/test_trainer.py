"""The dense trainer against a plainly written loop, and its promises about dead weights and snapshots."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from lipfast import priors
from lipfast.engine.trainer import STEP_COUNT, fastest_format, make_trainer
from lipfast.errors import ConfigError, InputError

TINY = {"in_channels": 4, "down": [8, 6], "skip": 2}


def setting(seed: int = 0, keep: float = 0.5):
    network = priors.build("skip", TINY, seed)
    generator = torch.Generator().manual_seed(seed)
    masks = {
        name: torch.rand(network.state_dict()[name].shape, generator=generator) < keep
        for name in priors.prunable(network)
    }
    z, target = torch.rand(1, 4, 16, 16, generator=generator), torch.rand(1, 3, 16, 16, generator=generator)
    return network, masks, z, lambda output: (output - target).square().mean()


def test_steps_agree_with_a_plain_masked_adam():
    network, masks, z, loss = setting()
    plain = copy.deepcopy(network)
    for name, mask in masks.items():
        plain.get_parameter(name).data.mul_(mask)
    optimiser = torch.optim.Adam(plain.parameters(), lr=0.01)
    trainer = make_trainer(network, masks, lr=0.01, engine="torch")
    for _ in range(5):
        optimiser.zero_grad()
        output = plain(z)
        value = loss(output)
        value.backward()
        optimiser.step()
        for name, mask in masks.items():
            plain.get_parameter(name).data.mul_(mask)
        got_value, got_output = trainer.step(z, loss)
        # float32 rounding of two memory layouts, magnified by Adam's division (measured: 2e-6)
        assert float(got_value) == pytest.approx(float(value.detach()), rel=1e-4)
        assert torch.allclose(got_output, output, atol=1e-4)
        assert not got_output.requires_grad


def test_dead_weights_and_their_moments_stay_exactly_zero():
    network, masks, z, loss = setting()
    trainer = make_trainer(network, masks, lr=0.01)
    for _ in range(4):
        trainer.step(z, loss)
        snapshot = trainer.snapshot()
        for name, mask in masks.items():
            for entry in (name, f"adam.exp_avg.{name}", f"adam.exp_avg_sq.{name}"):
                dead = snapshot[entry][~mask]
                assert torch.equal(dead.view(torch.int32), torch.zeros_like(dead, dtype=torch.int32))  # no -0.0
            assert bool((snapshot[name][mask] != 0).all())


def test_restoring_a_snapshot_gives_the_same_bits():
    network, masks, z, loss = setting()
    trainer = make_trainer(network, masks, lr=0.01)
    trainer.step(z, loss)
    snapshot = trainer.snapshot()
    frozen = {name: tensor.clone() for name, tensor in snapshot.items()}
    first = [trainer.step(z, loss)[0] for _ in range(3)]
    end = trainer.snapshot()
    assert all(torch.equal(snapshot[name], frozen[name]) for name in frozen)  # training does not reach into it
    trainer.restore(snapshot)
    assert [trainer.step(z, loss)[0] for _ in range(3)] == first
    assert all(torch.equal(a, b) for a, b in zip(end.values(), trainer.snapshot().values(), strict=True))


def test_a_snapshot_moves_to_a_new_trainer():
    network, masks, z, loss = setting()
    trainer = make_trainer(network, masks, lr=0.01)
    trainer.step(z, loss)
    snapshot = trainer.snapshot()
    other = make_trainer(setting(seed=1)[0], masks, lr=0.01)
    other.restore(snapshot)
    assert torch.equal(other.step(z, loss)[0], trainer.step(z, loss)[0])
    assert float(snapshot[STEP_COUNT]) == 1
    assert all(tensor.is_contiguous() for tensor in snapshot.values())


def test_dense_snapshot_in_a_pruned_trainer_revives_nothing():
    network, masks, z, loss = setting()
    dense = make_trainer(copy.deepcopy(network), None, lr=0.01)
    dense.step(z, loss)
    pruned = make_trainer(network, masks, lr=0.01)
    pruned.restore(dense.snapshot())
    pruned.step(z, loss)
    weights = pruned.network().state_dict()
    assert all(bool((weights[name][~mask] == 0).all()) for name, mask in masks.items())


def test_batchnorm_statistics_are_part_of_a_snapshot():
    network, _, z, loss = setting()
    trainer = make_trainer(network, None, lr=0.01)
    before = trainer.snapshot()
    trainer.step(z, loss)
    trainer.restore(before)
    state = trainer.network().state_dict()
    assert int(state["decoder.0.norm.num_batches_tracked"]) == 0
    assert torch.equal(state["decoder.0.norm.running_mean"], torch.zeros(8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("output.bias"), "lacks 'output.bias'"),
        (lambda s: s.update(extra=torch.zeros(1)), "has the unknown entry 'extra'"),
        (
            lambda s: s.update({"output.bias": torch.zeros(4)}),
            r"'output.bias' must be torch.float32 \(3,\), got .* \(4,\)",
        ),
    ],
)
def test_foreign_snapshots_are_refused_and_change_nothing(change, message):
    trainer = make_trainer(setting()[0], None, lr=0.01)
    snapshot = trainer.snapshot()
    foreign = {name: tensor + 1 for name, tensor in snapshot.items()}
    change(foreign)
    with pytest.raises(InputError, match=message):
        trainer.restore(foreign)
    assert all(torch.equal(a, b) for a, b in zip(snapshot.values(), trainer.snapshot().values(), strict=True))


def test_bad_masks_are_refused():
    network = setting()[0]
    with pytest.raises(InputError, match="no parameter 'nothing'"):
        make_trainer(network, {"nothing": torch.ones(1, dtype=torch.bool)}, lr=0.01)
    with pytest.raises(
        InputError, match=r"'output.weight' must be bool \(3, 8, 1, 1\), got torch.float32 \(3, 8, 1, 1\)"
    ):
        make_trainer(network, {"output.weight": torch.ones(3, 8, 1, 1)}, lr=0.01)
    with pytest.raises(InputError, match=r"got torch.bool \(3,\)"):
        make_trainer(network, {"output.weight": torch.ones(3, dtype=torch.bool)}, lr=0.01)


def test_bad_settings_are_refused():
    network = setting()[0]
    with pytest.raises(ConfigError, match="learning rate must be above 0, got -1"):
        make_trainer(network, None, lr=-1)
    with pytest.raises(ConfigError, match="unknown engine 'warp'; known: auto, torch"):
        make_trainer(network, None, lr=0.01, engine="warp")


def test_the_first_square_root_of_a_process_is_right():
    program = (
        "import lipfast.engine, torch\n"
        "squares = torch.arange(1.0, 4001).double()\n"
        "assert torch.allclose(squares.float().sqrt().double(), squares.sqrt(), rtol=1e-7, atol=0)\n"
    )
    for _ in range(4):  # without the guard each process goes wrong with a chance of a third
        ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr


def test_a_small_strided_layer_trains_without_corrupting_the_heap():
    # In channels_last torch's weight gradient of it writes past its memory with AVX-512: killed within 300 steps.
    layers = "nn.Conv2d(4, 9, 1, stride=2), nn.Hardtanh(), nn.Conv2d(9, 3, 3, padding=1)"
    program = f"""
import torch
from torch import nn
from lipfast.engine.trainer import make_trainer
trainer = make_trainer(nn.Sequential({layers}), None, lr=0.01, engine="torch")
z = torch.randn(3, 4, 56, 56)
for _ in range(300):
    trainer.step(z, lambda output: output.square().mean())
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    ("layer", "safe"),
    [
        (nn.Conv2d(15, 64, 1, stride=2), False),
        (nn.Conv2d(15, 64, 1, stride=(1, 2)), False),
        (nn.Conv2d(16, 64, 1, stride=2), True),
        (nn.Conv2d(15, 64, 1), True),
        (nn.Conv2d(15, 64, 3, stride=2), True),
    ],
)
def test_channels_last_is_left_to_networks_for_which_it_is_safe(monkeypatch, layer, safe):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    expected = torch.channels_last if safe else torch.contiguous_format
    assert fastest_format(nn.Sequential(nn.ReLU(), layer)) == expected
