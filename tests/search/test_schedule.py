from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipfast.errors import ConfigError
from lipfast.search import schedule

SKIPNET = 2_208_768  # prunable weights of the paper's network


def test_sixteen_rounds_match_an_independent_computation():
    """Integers only: one fifth of what is left, rounded down, sixteen times."""
    expected = [SKIPNET]
    for _ in range(16):
        expected.append(expected[-1] - expected[-1] // 5)
    assert schedule.kept_after(SKIPNET, 0.2, 16) == expected


def test_sixteen_rounds_match_the_papers_sparsities():
    published = "20.00 36.00 48.80 59.04 67.23 73.79 79.03 83.22 86.58 89.26 91.41 93.13 94.50 95.60 96.48 97.19"
    kept = schedule.kept_after(SKIPNET, 0.2, 16)[1:]
    assert [f"{100 * (1 - count / SKIPNET):.2f}" for count in kept] == published.split()


def test_a_rate_is_the_decimal_the_user_wrote():
    assert schedule.prune_count(10, 0.3) == 3  # 0.3 in binary is below 3/10 and would give 2
    assert schedule.prune_count(10, 0.7) == 7


@given(living=st.integers(0, 10**8), percent=st.integers(1, 99))
def test_a_round_never_takes_more_than_asked_nor_the_last_weight(living, percent):
    removed = schedule.prune_count(living, percent / 100)
    assert removed <= Fraction(percent, 100) * living < removed + 1
    assert living == 0 or removed < living


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.2, 1.5, float("nan")])
def test_a_rate_outside_the_unit_interval_is_named(rate):
    with pytest.raises(ConfigError, match=rf"prune={rate} must be a share"):
        schedule.prune_count(100, rate)


def test_rounds_that_leave_nothing_are_refused_with_the_possible_number():
    with pytest.raises(ConfigError, match=r"rounds=9 .* use at most 7 rounds"):
        schedule.kept_after(SKIPNET, 0.9, 9)
    assert schedule.kept_after(SKIPNET, 0.9, 7)[-1] > 0


def test_a_small_layer_may_lose_nothing_but_not_every_layer():
    assert schedule.layer_counts({"small": 4, "large": 100}, 0.2) == {"small": 0, "large": 20}
    with pytest.raises(ConfigError, match="removes nothing"):
        schedule.layer_counts({"small": 4}, 0.2)
