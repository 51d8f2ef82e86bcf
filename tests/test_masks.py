import itertools

import pytest
import torch

from lipfast import masks
from lipfast.errors import InputError
from lipfast.search import schedule


@pytest.fixture
def state():
    """Two layers with many ties: magnitudes 0, 1, 2 only."""
    generator = torch.Generator().manual_seed(5)
    draw = torch.randint(-2, 3, (30, 4, 3, 3), generator=generator).float()
    return {"first": draw, "second": draw[:10].clone(), "first.bias": torch.ones(30)}


@pytest.fixture
def full(state):
    return masks.full(state, ["first", "second"])


def test_counts_are_exact_over_sixteen_rounds_and_masks_are_nested(state, full):
    kept = schedule.kept_after(masks.total(full), 0.2, 16)
    current = full
    for before, after in itertools.pairwise(kept):
        pruned = masks.prune_globally(current, state, before - after)
        assert masks.living(pruned) == after
        assert masks.nested(pruned, current)
        current = pruned


def test_ties_fall_to_the_lower_index_across_layers(state, full):
    magnitudes = torch.cat([state["first"].flatten(), state["second"].flatten()]).abs().tolist()
    order = sorted(range(len(magnitudes)), key=lambda index: (magnitudes[index], index))
    expected = torch.ones(len(magnitudes), dtype=torch.bool)
    expected[order[:301]] = False
    pruned = masks.prune_globally(full, state, 301)
    assert torch.equal(torch.cat([mask.flatten() for mask in pruned.values()]), expected)


def test_each_layer_loses_its_own_count(state, full):
    pruned = masks.prune_each_layer(full, state, {"first": 7, "second": 0})
    assert masks.living({"first": pruned["first"]}) == 30 * 36 - 7
    assert bool(pruned["second"].all())


def test_masks_of_two_networks_are_not_compared(full):
    shorter = {**full, "second": full["second"][:9]}
    with pytest.raises(
        InputError, match=r"masks: second has shape \(9, 4, 3, 3\) in one set, \(10, 4, 3, 3\) in the other"
    ):
        masks.nested(shorter, full)


def test_nested_counts_a_missing_mask_as_all_alive(full):
    holed = {**full, "first": torch.zeros_like(full["first"])}
    assert masks.nested(holed, full)
    assert not masks.nested(full, holed)
    assert not masks.nested({"second": full["second"]}, holed)
    assert masks.nested({}, full)


def test_apply_zeroes_dead_weights_exactly_and_touches_nothing_else(state, full):
    state["first"][0] = -3.0  # times False would leave -0.0
    pruned = {**full, "first": full["first"].clone()}
    pruned["first"][0] = False
    applied = masks.apply(pruned, state)
    assert applied["first"][0].view(torch.int32).eq(0).all()
    assert torch.equal(applied["first"][1:], state["first"][1:])
    assert torch.equal(applied["first.bias"], state["first.bias"])


def test_figures(full):
    half = {"first": full["first"], "second": torch.zeros_like(full["second"])}
    assert masks.sparsity(half) == pytest.approx(0.25)
    assert masks.layer_density(half) == {"first": 1.0, "second": 0.0}
    assert masks.empty_layers(half) == ["second"]
    assert masks.density({}) == 1.0
    assert masks.layer_density({"none": torch.ones(0, 3, dtype=torch.bool)}) == {"none": 1.0}


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        (lambda full, state: masks.prune_globally(full, {"second": state["second"]}, 1), "'first' has no score"),
        (lambda full, state: masks.prune_each_layer(full, {}, {"first": 1, "second": 1}), "'first' has no score"),
        (lambda full, state: masks.prune_each_layer(full, state, {"first": 1}), "'second' has no count"),
    ],
)
def test_a_mask_without_score_or_count_is_named(state, full, prune, message):
    with pytest.raises(InputError, match=f"masks: {message}"):
        prune(full, state)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"third": torch.ones(1, dtype=torch.bool)}, "no parameter 'third'"),
        ({"first": torch.ones(30, 4, 3, 3)}, "first must be a bool tensor, got torch.float32"),
        ({"first": torch.ones(4, 30, 3, 3, dtype=torch.bool)}, r"first must have shape \(30, 4, 3, 3\), got \(4, 30"),
    ],
)
def test_validate_names_what_does_not_fit(state, wrong, message):
    with pytest.raises(InputError, match=message):
        masks.validate(wrong, state)


def test_full_names_an_unknown_parameter(state):
    with pytest.raises(InputError, match="no parameter 'third'"):
        masks.full(state, ["third"])
