"""The stop rules on made-up sequences, against direct computations."""

import numpy
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lipfast.fit import MovingVariance, WindowedVariance


def sequence(steps: int, quietest: int, seed: int = 0) -> torch.Tensor:
    """Outputs (steps, 1, 6, 5) that fluctuate less and less until ``quietest`` and more and more afterwards."""
    generator = torch.Generator().manual_seed(seed)
    strength = 0.01 + 0.002 * (torch.arange(steps) - quietest).abs()
    return (0.5 + strength.view(-1, 1, 1, 1) * torch.randn(steps, 1, 6, 5, generator=generator)).clamp(0, 1)


def windowed_variances(outputs: torch.Tensor, window: int) -> list[float | None]:
    values = outputs.double().flatten(1).numpy()
    found = [values[max(0, t + 1 - window) : t + 1] for t in range(len(values))]
    return [None if len(w) < window else float(((w - w.mean(0)) ** 2).mean()) for w in found]


def moving_variances(outputs: torch.Tensor, alpha: float, warm_up: int) -> list[float | None]:
    """Weighted variance by its definition: weights alpha (1 - alpha)^age, the first output takes the rest."""
    values = outputs.double().flatten(1).numpy()
    found: list[float | None] = []
    for t in range(len(values)):
        weights = alpha * (1 - alpha) ** numpy.arange(t, -1, -1.0)
        weights[0] = (1 - alpha) ** t
        mean = (weights[:, None] * values[: t + 1]).sum(0)
        spread = (weights[:, None] * (values[: t + 1] - mean) ** 2).sum(0).mean()
        found.append(None if t + 1 < warm_up else float(spread))
    return found


def expected_stop(variances, patience):
    """(step of the minimum, step at which the rule fires or None), by looking at the whole list."""
    best_step, best, fired = None, float("inf"), None
    for step, variance in enumerate(variances, start=1):
        if variance is None:
            continue
        if variance < best:
            best, best_step = variance, step
        elif fired is None and step - best_step >= patience:
            return best_step, step
    return best_step, None


RULES = {
    "wmv": (lambda: WindowedVariance(window=10, patience=15), lambda x: windowed_variances(x, 10)),
    "emv": (lambda: MovingVariance(alpha=0.2, patience=15, warm_up=10), lambda x: moving_variances(x, 0.2, 10)),
}


@pytest.fixture(params=RULES)
def rule_and_truth(request):
    make, truth = RULES[request.param]
    return make, truth


@pytest.mark.parametrize("seed", range(3))
def test_variance_minimum_and_firing_step(rule_and_truth, seed):
    make, truth = rule_and_truth
    rule, outputs = make(), sequence(80, quietest=40, seed=seed)
    variances = truth(outputs)
    fired = None
    best_step, expected_firing = expected_stop(variances, patience=15)
    for step, output in enumerate(outputs, start=1):
        lowest = rule.observe(output)
        wanted = variances[step - 1]
        # The window's 16-bit rounding moves a variance by about 1e-5 sqrt(variance / values); 1e-3 relative is wide.
        assert rule.variance == (None if wanted is None else pytest.approx(wanted, rel=1e-3))
        assert lowest == (rule.best_step == step)
        if rule.fired and fired is None:
            fired = step
            break
    assert (rule.best_step, fired) == (best_step, expected_firing)
    assert fired is not None


def test_nothing_is_judged_before_the_window_is_full(rule_and_truth):
    rule = rule_and_truth[0]()
    for output in sequence(9, quietest=0):
        assert not rule.observe(output)
    assert (rule.best_step, rule.variance, rule.fired) == (None, None, False)


@pytest.mark.parametrize("cut", [0, 1, 9, 10, 33])
def test_state_moves_to_a_new_rule(rule_and_truth, cut):
    make, _ = rule_and_truth
    whole, first, second = make(), make(), make()
    outputs = sequence(45, quietest=20)
    for output in outputs[:cut]:
        first.observe(output)
    second.restore(first.tensors())
    for step, output in enumerate(outputs):
        expected = whole.observe(output)
        if step >= cut:
            assert second.observe(output) == expected
            assert second.variance == whole.variance
    assert (second.best_step, second.fired) == (whole.best_step, whole.fired)


@given(st.lists(st.integers(0, 65535), min_size=4, max_size=40), st.integers(2, 5))
@example([0, 0, 0, 1], 3)
@settings(max_examples=80, deadline=None)
def test_window_sums_are_exact_integers(levels, window):
    """On 16-bit levels no sum is rounded: the variance is that of whole numbers, but for the rounding of one division,
    however long the sequence."""
    rule = WindowedVariance(window, patience=3)
    for level in levels:
        rule.observe(torch.tensor([level / 65535, 0.5]))
    last = levels[-window:]
    exact = (window * sum(v * v for v in last) - sum(last) ** 2) / window**2 / 65535**2 / 2
    assert rule.variance is None if len(levels) < window else rule.variance == pytest.approx(exact, rel=1e-9, abs=1e-16)


def test_a_window_needs_two_bytes_a_value():
    rule = WindowedVariance(window=100, patience=3)
    rule.observe(torch.rand(1, 3, 32, 32))
    ring = rule.tensors()["ring"]
    assert ring.numel() * ring.element_size() == 100 * 3 * 32 * 32 * 2
