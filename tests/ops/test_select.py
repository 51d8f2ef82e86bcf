import pytest
import torch

from lipfast import ops
from lipfast.errors import BackendError, InputError


def test_prunes_the_smallest_over_all_tensors_ties_to_the_lower_index():
    weights = [torch.tensor([3.0, -1.0, 1.0]), torch.tensor([[1.0, -0.5]])]
    alive = [torch.ones(3, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)]
    first, second = ops.prune_smallest(weights, alive, 3)
    assert first.tolist() == [True, False, False]
    assert second.tolist() == [[True, False]]


def test_the_dead_stay_dead_and_are_not_counted_again():
    alive = [torch.tensor([False, True, True])]
    (survivors,) = ops.prune_smallest([torch.tensor([0.0, 2.0, 1.0])], alive, 1)
    assert survivors.tolist() == [False, True, False]
    assert alive[0].tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("weights", "alive", "count", "message"),
    [
        ([torch.rand(4)], [torch.ones(4, dtype=torch.bool)], 5, "count=5 but 4 of 4 weights are alive"),
        ([torch.rand(4)], [torch.ones(4, dtype=torch.bool)], -1, "count=-1"),
        ([torch.rand(4)], [], 0, "1 weight tensors but 0 masks"),
        ([torch.rand(4).double()], [torch.ones(4, dtype=torch.bool)], 1, "must be float32, got torch.float64"),
        ([torch.rand(4)], [torch.ones(4)], 1, "must be bool"),
        ([torch.rand(4)], [torch.ones(5, dtype=torch.bool)], 1, r"must be bool \(4,\)"),
        ([torch.tensor([1.0, float("nan")])], [torch.ones(2, dtype=torch.bool)], 1, "NaN"),
    ],
)
def test_bad_arguments_are_named(weights, alive, count, message):
    with pytest.raises(InputError, match=message):
        ops.prune_smallest(weights, alive, count)


def test_a_named_backend_never_falls_back():
    with pytest.raises(BackendError, match="unknown backend 'fpga'"):
        ops.prune_smallest([torch.rand(4)], [torch.ones(4, dtype=torch.bool)], 1, backend="fpga")
