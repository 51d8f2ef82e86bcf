import pytest
import torch

from lipfast import masks, priors
from lipfast.errors import ConfigError
from lipfast.search import controls


@pytest.fixture
def rounds():
    """Masks of three rounds over two layers of very different fates."""
    full = {"a": torch.ones(40, 5, dtype=torch.bool), "b": torch.ones(20, dtype=torch.bool)}
    score = {"a": torch.linspace(1, 2, 200).reshape(40, 5), "b": torch.linspace(0, 3, 20)}
    one = masks.prune_globally(full, score, 40)
    return [full, one, masks.prune_globally(one, score, 60)]


@pytest.mark.parametrize("each_layer", [False, True])
def test_counts_match_and_masks_are_nested(rounds, each_layer):
    drawn = [controls.random_masks(like, seed=4, each_layer=each_layer) for like in rounds]
    assert [masks.living(mask) for mask in drawn] == [220, 180, 120]
    assert masks.nested(drawn[2], drawn[1])
    assert masks.nested(drawn[1], drawn[0])


def test_layer_counts_match_only_when_asked(rounds):
    matched = controls.random_masks(rounds[1], seed=4, each_layer=True)
    assert masks.layer_density(matched) == masks.layer_density(rounds[1])
    free = controls.random_masks(rounds[1], seed=4, each_layer=False)
    assert masks.layer_density(free) != masks.layer_density(rounds[1])


def test_the_choice_follows_the_seed(rounds):
    first, again, other = (controls.random_masks(rounds[2], seed=seed, each_layer=False) for seed in (4, 4, 5))
    assert torch.equal(first["a"], again["a"])
    assert not torch.equal(first["a"], other["a"])


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_out_of_range_are_refused(rounds, seed):
    with pytest.raises(ConfigError, match=rf"random_masks: seed={seed} must be"):
        controls.random_masks(rounds[1], seed, each_layer=False)


def test_the_choice_knows_nothing_of_the_weights_drawn_from_the_same_seed():
    """Both draw from one seed: with one stream, random masks would keep the largest initial weights."""
    network = priors.build("decoder", {"k": 16}, 5)
    state = network.state_dict()
    full = masks.full(state, priors.prunable(network))
    like = masks.prune_globally(full, state, int(0.9 * masks.total(full)))
    drawn = controls.random_masks(like, 5, each_layer=False)
    kept = torch.cat([state[name][mask] for name, mask in drawn.items()])
    # 154 weights: the standard deviation of the share of positive ones is 4 %
    assert float((kept > 0).float().mean()) == pytest.approx(0.5, abs=0.2)
