"""Optimiser steps against torch.optim: bit for bit where torch's own arithmetic is exactly rounded."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

import lipfast._C as _C
from lipfast import ops
from lipfast.errors import BackendError, InputError

SIZES = [0, 1, 15, 16, 17, 1025, 8191, 8193, 20_001]  # around lanes and chunks
ADAM = [
    {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
    {"lr": 0.3, "beta1": 0.3, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.1},
    {"lr": 0.01, "beta1": 0.5, "beta2": 0.0, "eps": 1e-8, "weight_decay": 0.0},
]
SGD = [
    {"lr": 0.1},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    {"lr": 0.1, "momentum": 0.8, "dampening": 0.3},
]


def draw(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator)


def adam_state(size, seed=0):
    return [draw(size, seed), torch.zeros(size), torch.zeros(size)]


def torch_adam(values, settings):
    parameter = torch.nn.Parameter(values.clone())
    betas = (settings["beta1"], settings["beta2"])
    others = {name: settings[name] for name in ("lr", "eps", "weight_decay")}
    return parameter, torch.optim.Adam([parameter], betas=betas, foreach=False, **others)


def ulps(x):
    """The gap to the next float, for each element."""
    return torch.from_numpy(np.spacing(x.abs().numpy()))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("settings", ADAM)
def test_adam_has_the_references_bits(isa, size, settings):
    mine, theirs = adam_state(size), adam_state(size)
    for step in range(1, 6):
        gradient = draw(size, step)
        for state, backend in ((mine, "cpu"), (theirs, "reference")):
            values, m, v = state
            ops.adam_step(values, gradient, m, v, step, **settings, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_adams_moments_are_torchs_bit_for_bit_over_hundreds_of_steps(isa):
    values, m, v = adam_state(333)
    parameter, optimizer = torch_adam(values, ADAM[0])
    for step in range(1, 301):
        gradient = draw(333, step) * 10.0 ** (step % 7 - 3)
        parameter.grad = gradient.clone()
        optimizer.step()
        ops.adam_step(values, gradient, m, v, step, **ADAM[0])
        assert torch.equal(m, optimizer.state[parameter]["exp_avg"])
        assert torch.equal(v, optimizer.state[parameter]["exp_avg_sq"])


@pytest.mark.parametrize("settings", ADAM)
def test_each_adam_step_is_torchs_but_for_the_root(isa, settings):
    parameter, optimizer = torch_adam(draw(501), settings)
    m, v = torch.zeros(501), torch.zeros(501)
    for step in range(1, 301):
        values = parameter.detach().clone()  # equal state before each step
        if step > 1:
            m.copy_(optimizer.state[parameter]["exp_avg"])
            v.copy_(optimizer.state[parameter]["exp_avg_sq"])
        before = values.clone()
        gradient = draw(501, step)
        parameter.grad = gradient.clone()
        optimizer.step()
        ops.adam_step(values, gradient, m, v, step, **settings)
        theirs = parameter.detach()
        # A root that is 1 ulp off shifts the quotient by up to 4: each of the root, its division and the quotient can
        # cross into a binade of half the ulp, and each rounds. Measured: 3.
        gap = 4 * torch.maximum(ulps(theirs), ulps(theirs - before))
        assert bool(((values - theirs).abs() <= gap).all())
        assert torch.equal(m, optimizer.state[parameter]["exp_avg"])
        assert torch.equal(v, optimizer.state[parameter]["exp_avg_sq"])


@pytest.mark.parametrize("settings", SGD)
def test_sgd_is_torchs_bit_for_bit_over_hundreds_of_steps(isa, settings):
    values, buffer = draw(333), torch.full((333,), 99.0)  # step 1 must overwrite it
    parameter = torch.nn.Parameter(values.clone())
    optimizer = torch.optim.SGD([parameter], foreach=False, **settings)
    for step in range(1, 301):
        gradient = draw(333, step)
        parameter.grad = gradient.clone()
        optimizer.step()
        ops.sgd_step(values, gradient, buffer, step, **settings)
        assert torch.equal(values, parameter.detach())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("settings", SGD)
def test_sgd_has_the_references_bits(isa, size, settings):
    mine, theirs = [draw(size), torch.zeros(size)], [draw(size), torch.zeros(size)]
    for step in (1, 2, 3):
        for state, backend in ((mine, "cpu"), (theirs, "reference")):
            ops.sgd_step(state[0], draw(size, step), state[1], step, **settings, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@given(
    st.lists(st.floats(-(2.0**50), 2.0**50, width=32, allow_subnormal=False), min_size=1, max_size=40),
    st.integers(1, 10_000),
    st.just(0.0) | st.floats(2.0**-100, 10, width=32),  # below, products of it round more coarsely than the bound
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_adam_moves_against_the_first_gradient_by_at_most_lr(isa, gradient, size_seed, lr):
    gradient = torch.tensor(gradient, dtype=torch.float32)
    values, m, v = torch.zeros(len(gradient)), torch.zeros(len(gradient)), torch.zeros(len(gradient))
    ops.adam_step(values, gradient, m, v, 1, lr=lr)
    assert bool((values * gradient.sign() <= 0).all())
    assert bool((values.abs() <= lr * (1 + 1e-5)).all())


def test_the_number_of_threads_changes_nothing(isa, for_each_thread_count):
    def run():
        values, m, v = adam_state(50_001)
        for step in (1, 2, 3):
            ops.adam_step(values, draw(50_001, step), m, v, step)
        return values

    first, *others = for_each_thread_count(run)
    assert all(torch.equal(first, other) for other in others)


def test_nothing_but_its_own_weights_is_written(isa):
    whole = [draw(64, seed) for seed in range(4)]
    before = [tensor.clone() for tensor in whole]
    values, gradient, m, v = (tensor[3:40] for tensor in whole)  # unaligned, in the middle of a larger vector
    v.abs_()
    ops.adam_step(values, gradient, m, v, 1)
    for tensor, old in zip(whole, before, strict=True):
        assert torch.equal(tensor[:3], old[:3])
        assert torch.equal(tensor[40:], old[40:])
    assert torch.equal(gradient, before[1][3:40])


def test_autograd_notices_that_numbers_were_written():
    values, gradient, m, v = (draw(20, seed) for seed in range(4))
    kept = values.requires_grad_().square().sum(), m.requires_grad_().square().sum()
    ops.adam_step(values, gradient, m, v.abs(), 1)
    for loss in kept:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    loss = values.square().sum()
    ops.sgd_step(values, gradient, m, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        ops.adam_step(*(draw(20, seed) for seed in range(3)), draw(20).abs(), 1)


def test_torch_operator_checks():
    step = (1, 0.01, 0.9, 0.999, 1e-8, 0.0, None)
    torch.library.opcheck(torch.ops.lipfast.adam_step.default, (draw(20), draw(20), draw(20), draw(20).abs(), *step))
    torch.library.opcheck(
        torch.ops.lipfast.sgd_step.default, (draw(20), draw(20), draw(20), 2, 0.01, 0.9, 0.0, 0.0, False, None)
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gradient": torch.rand(3)}, "gradient must match values, 4 on cpu; got 3 on cpu"),
        ({"m": torch.rand(4).double()}, "m must be a contiguous 1-D float32 tensor, got .* torch.float64"),
        ({"v": torch.rand(8)[::2]}, "v must be a contiguous 1-D"),
        ({"values": torch.rand(2, 2)}, r"values must be a contiguous 1-D float32 tensor, got \(2, 2\)"),
        ({"step": 0}, r"steps count from 1 to 2\^63 - 1, got step=0"),
        ({"step": 2**70}, r"steps count from 1 to 2\^63 - 1, got step=1180591620717411303424"),
        ({"step": 1.5}, "step must be a whole number, got 1.5"),
        ({"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1.0"),
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"eps": float("nan")}, "eps must be at least 0, got nan"),
    ],
)
def test_bad_adam_arguments_are_named(changed, message):
    arguments = {name: torch.rand(4) for name in ("values", "gradient", "m", "v")}
    with pytest.raises(InputError, match=f"adam_step: {message}"):
        ops.adam_step(**{**arguments, "step": 1, **changed})


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # torch's own
def test_tangents_are_refused():
    values, gradient, m, v = (torch.rand(4) for _ in range(4))
    with forward_ad.dual_level(), pytest.raises(BackendError, match="adam_step: forward-mode differentiation"):
        ops.adam_step(values, forward_ad.make_dual(gradient, gradient), m, v, 1)


def test_bad_sgd_arguments_are_named():
    with pytest.raises(InputError, match=r"sgd_step: nesterov wants momentum > 0 and dampening 0, got 0.0 and 0.0"):
        ops.sgd_step(torch.rand(4), torch.rand(4), torch.rand(4), 1, nesterov=True)
    for dampening in (math.nan, math.inf):
        with pytest.raises(InputError, match=f"sgd_step: dampening must be a finite number, got {dampening}"):
            ops.sgd_step(torch.rand(4), torch.rand(4), torch.rand(4), 1, dampening=dampening)


def test_the_binding_checks_before_the_kernel_sees_a_pointer():
    four, three = np.ones(4, np.float32), np.ones(3, np.float32)
    with pytest.raises(ValueError, match="v: expected contiguous float32 of 4 elements"):
        _C.adam_step(four, four, four, three, 1, 0.1, 0.9, 0.999, 1e-8, 0.0, 1)
    with pytest.raises(ValueError, match="momentum_buffer"):
        _C.sgd_step(four, four, three, 1, 0.1, 0.9, 0.0, 0.0, False, 1)
