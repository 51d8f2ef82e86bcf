import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lipfast import ops
from lipfast.errors import BackendError, InputError

# Either side of the lane count, of a chunk (32768) and of the size from which a sample brackets the cut (65536).
SIZES = [0, 1, 7, 8, 15, 16, 17, 1025, 32767, 32769, 65535, 70001]
MANY = 1 << 30


def draw(size, distinct, seed=0):
    """Scores of a few or of many magnitudes, both signs, and which live."""
    generator = torch.Generator().manual_seed(seed)
    if distinct == MANY:
        score = torch.randn(size, generator=generator)
    else:
        score = torch.randint(-distinct, distinct, (size,), generator=generator).float()
    return score, torch.rand(size, generator=generator) < 0.7


def test_prunes_the_smallest_over_all_tensors_ties_to_the_lower_index(isa):
    weights = [torch.tensor([3.0, -1.0, 1.0]), torch.tensor([[1.0, -0.5]])]
    alive = [torch.ones(3, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)]
    first, second = ops.prune_smallest(weights, alive, 3)
    assert first.tolist() == [True, False, False]
    assert second.tolist() == [[True, False]]


def test_the_dead_stay_dead_and_are_not_counted_again(isa):
    alive = [torch.tensor([False, True, True])]
    (survivors,) = ops.prune_smallest([torch.tensor([0.0, 2.0, 1.0])], alive, 1)
    assert survivors.tolist() == [False, True, False]
    assert alive[0].tolist() == [False, True, True]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("distinct", [1, 3, MANY])  # few: ties are the common case
@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.999, 1.0])
def test_same_bits_as_the_reference(isa, size, distinct, fraction):
    score, alive = draw(size, distinct)
    cuts = [0, size // 3, size]
    weights = [score[a:b] for a, b in itertools.pairwise(cuts)]
    masks = [alive[a:b] for a, b in itertools.pairwise(cuts)]
    count = int(fraction * int(alive.sum()))
    got = ops.prune_smallest(weights, masks, count, backend="cpu")
    expected = ops.prune_smallest(weights, masks, count, backend="reference")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected, strict=True))
    assert sum(int(mask.sum()) for mask in got) == int(alive.sum()) - count


@given(
    magnitudes=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=70),
    seed=st.integers(0, 1000),
    share=st.floats(0, 1),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_dies_is_never_larger_than_what_lives(isa, magnitudes, seed, share):
    weight = torch.tensor(magnitudes, dtype=torch.float32)  # infinities, denormals and both zeros among them
    alive = torch.rand(len(weight), generator=torch.Generator().manual_seed(seed)) < 0.7
    count = int(share * int(alive.sum()))
    (survivors,) = ops.prune_smallest([weight], [alive], count)
    dead = alive & ~survivors
    assert not bool((survivors & ~alive).any())
    assert int(dead.sum()) == count
    if dead.any() and survivors.any():
        assert weight[dead].abs().max() <= weight[survivors].abs().min()
        tied = alive & (weight.abs() == weight[dead].abs().max())
        order = dead[tied].long()  # ones first: the lower index dies
        assert torch.equal(order, order.sort(descending=True).values)


def test_a_sample_that_misleads_costs_time_but_not_exactness(isa):
    # The bracketing sample takes every 16th weight of these: it sees only large ones and misses the cut.
    weight = torch.arange(1, (1 << 17) + 1).float()
    weight[8::16] += 1e6
    alive = torch.ones(len(weight), dtype=torch.bool)
    (survivors,) = ops.prune_smallest([weight], [alive], 1000)
    assert torch.equal(survivors, weight > weight.sort().values[999])


def test_the_number_of_threads_changes_nothing(isa, for_each_thread_count):
    score, alive = draw(200_001, 50)
    count = int(alive.sum()) // 3
    first, *others = for_each_thread_count(lambda: ops.prune_smallest([score, score], [alive, alive], count))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_any_memory_layout_counts_in_logical_order(isa):
    weight = torch.tensor([[1.0, 1.0], [1.0, 1.0]]).t()
    alive = torch.tensor([[True, False], [True, True]]).t()  # flat: True True False True
    (survivors,) = ops.prune_smallest([weight], [alive], 2)
    assert survivors.tolist() == [[False, False], [False, True]]


def test_nan_names_its_tensor_and_matters_only_where_alive(isa):
    weights = [torch.rand(40), torch.rand(40)]
    weights[1][37] = float("nan")
    alive = [torch.ones(40, dtype=torch.bool) for _ in weights]
    with pytest.raises(InputError, match=r"weights\[1\] holds NaN"):
        ops.prune_smallest(weights, alive, 1)
    alive[1][37] = False
    assert sum(int(mask.sum()) for mask in ops.prune_smallest(weights, alive, 1)) == 78


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("weights", "alive", "count", "message"),
    [
        ([torch.rand(4)], [torch.ones(4, dtype=torch.bool)], 5, "count=5 but 4 of 4 weights are alive"),
        ([torch.rand(4)], [torch.ones(4, dtype=torch.bool)], -1, "count=-1"),
        ([torch.rand(4)], [torch.ones(4, dtype=torch.bool)], 3.0, "count must be a whole number, got 3.0"),
        ([torch.rand(4)], [], 0, "1 tensors as weights but 0 masks"),
        ([torch.rand(4).double()], [torch.ones(4, dtype=torch.bool)], 1, "must be torch.float32 .* got torch.float64"),
        ([torch.rand(4)], [torch.ones(4)], 1, r"alive\[0\] must be torch.bool"),
        ([torch.rand(4)], [torch.ones(5, dtype=torch.bool)], 1, r"must be torch.float32 \(5,\) as its mask"),
        ([torch.tensor([1.0, float("nan")])], [torch.ones(2, dtype=torch.bool)], 1, "NaN"),
    ],
)
def test_bad_arguments_are_named(backend, weights, alive, count, message):
    with pytest.raises(InputError, match=message):
        ops.prune_smallest(weights, alive, count, backend=backend)


def test_a_count_may_be_numpys_or_a_tensors():
    weights, alive = [torch.rand(9)], [torch.ones(9, dtype=torch.bool)]
    for count in np.int64(4), torch.tensor(4):
        assert int(ops.prune_smallest(weights, alive, count)[0].sum()) == 5


def test_tensors_without_numbers_are_refused():
    with pytest.raises(BackendError, match="cannot run on meta tensors, which hold no numbers"):
        ops.prune_smallest([torch.rand(4, device="meta")], [torch.ones(4, dtype=torch.bool, device="meta")], 1)


def test_a_named_backend_never_falls_back():
    with pytest.raises(BackendError, match="unknown backend 'fpga'"):
        ops.prune_smallest([torch.rand(4)], [torch.ones(4, dtype=torch.bool)], 1, backend="fpga")
