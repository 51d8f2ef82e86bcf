import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

import lipfast._C as _C
from lipfast import ops
from lipfast.errors import BackendError, InputError
from lipfast.ops import triton

SIZES = [0, 1, 15, 16, 17, 1025, 32767, 32768, 32769, 70_001]
GUARD = 12345.0


def draw(size, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator), torch.rand(size, generator=generator) < density


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 1.0])
def test_both_ways_agree_with_the_reference(isa, size, density):
    dense, mask = draw(size, density)
    values = ops.gather_kept(dense, mask, backend="cpu")
    assert torch.equal(values, ops.gather_kept(dense, mask, backend="reference"))
    back = ops.scatter_kept(values, mask, backend="cpu")
    assert torch.equal(back, ops.scatter_kept(values, mask, backend="reference"))
    assert torch.equal(back[mask], dense[mask])
    assert not bool(back[~mask].view(torch.int32).any())


@given(pattern=st.lists(st.booleans(), max_size=80))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_scatter_undoes_gather(isa, pattern):
    mask = torch.tensor(pattern, dtype=torch.bool)
    values = torch.arange(1.0, int(mask.sum()) + 1)
    assert torch.equal(ops.gather_kept(ops.scatter_kept(values, mask), mask), values)


@pytest.mark.parametrize("size", [17, 70_001])
def test_nothing_beyond_the_end_is_written(isa, size):
    dense, mask = draw(size, 0.5)
    kept = int(mask.sum())
    values = np.full(kept + 32, GUARD, np.float32)
    _C.gather_kept(dense.numpy(), mask.numpy(), values[:kept], 2)
    assert (values[kept:] == GUARD).all()
    back = np.full(size + 32, GUARD, np.float32)
    _C.scatter_kept(values[:kept], mask.numpy(), back[:size], 2)
    assert (back[size:] == GUARD).all()


def test_any_shape_and_layout(isa):
    dense, mask = draw(6 * 5 * 4, 0.5)
    dense, mask = dense.view(6, 5, 4).transpose(0, 2), mask.view(6, 5, 4).transpose(0, 2)
    values = ops.gather_kept(dense, mask)
    assert torch.equal(values, dense[mask])
    assert torch.equal(ops.scatter_kept(values, mask), dense * mask)


def test_the_number_of_threads_changes_nothing(isa, for_each_thread_count):
    dense, mask = draw(200_001, 0.3)
    values = for_each_thread_count(lambda: ops.gather_kept(dense, mask))
    assert all(torch.equal(values[0], other) for other in values[1:])
    back = for_each_thread_count(lambda: ops.scatter_kept(values[0], mask))
    assert all(torch.equal(back[0], other) for other in back[1:])


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own
def test_torch_operator_checks():
    dense, mask = draw(40, 0.5)
    dense.requires_grad_()
    torch.library.opcheck(torch.ops.lipfast.gather_kept.default, (dense, mask, None))
    values = torch.randn(int(mask.sum()), requires_grad=True)
    torch.library.opcheck(torch.ops.lipfast.scatter_kept.default, (values, mask, None))


def test_each_is_the_gradient_of_the_other(isa):
    # <gather(x), y> = <x, scatter(y)>, exactly: whole numbers this small add up without rounding.
    dense, mask = (torch.arange(40.0) - 20).requires_grad_(), draw(40, 0.5)[1]
    values = (torch.arange(float(mask.sum())) - 5).requires_grad_()
    product = (ops.gather_kept(dense, mask) * values).sum()
    assert product == (dense * ops.scatter_kept(values, mask)).sum()
    for _ in range(2):  # a second backward gives the same
        of_dense, of_values = torch.autograd.grad(product, (dense, values), retain_graph=True)
        assert torch.equal(of_dense, ops.scatter_kept(values, mask))
        assert torch.equal(of_values, dense[mask])
    (of_values,) = torch.autograd.grad((dense * ops.scatter_kept(values, mask)).sum(), values)
    assert torch.equal(of_values, dense[mask])


def test_bad_arguments_are_named():
    mask = torch.tensor([True, False, True])
    with pytest.raises(InputError, match=r"gather_kept: dense must be float32, got torch.float64"):
        ops.gather_kept(torch.rand(3).double(), mask)
    with pytest.raises(InputError, match=r"dense has shape \(4,\) but mask \(3,\)"):
        ops.gather_kept(torch.rand(4), mask)
    with pytest.raises(InputError, match=r"mask must be bool on cpu, got torch.float32"):
        ops.gather_kept(torch.rand(3), mask.float())
    with pytest.raises(InputError, match="got 3 values but the mask keeps 2 of 3"):
        ops.scatter_kept(torch.rand(3), mask)
    with pytest.raises(InputError, match=r"values must be 1-D, got \(2, 1\)"):
        ops.scatter_kept(torch.rand(2, 1), mask)


def test_a_mask_written_before_the_backward_pass_is_noticed():
    dense, mask = torch.randn(40, requires_grad=True), torch.arange(40) % 3 == 0
    for result in ops.gather_kept(dense, mask), ops.scatter_kept(dense[:14], mask):
        mask.logical_not_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.sum().backward()
        mask.logical_not_()


def test_any_byte_but_zero_is_true(isa):
    pattern = torch.rand(70) < 0.4
    mask = torch.where(pattern, 255, 0).to(torch.uint8).view(torch.bool)
    dense = torch.randn(70)
    assert torch.equal(ops.gather_kept(dense, mask), dense[pattern])
    assert torch.equal(ops.prune_smallest([dense], [mask], 5)[0], ops.prune_smallest([dense], [pattern], 5)[0])


def test_any_byte_but_zero_is_true_on_gpus():
    mask = torch.tensor([255, 0, 2, 1], dtype=torch.uint8).view(torch.bool)
    (survivors,) = triton.begin_pruning([torch.rand(4)], [mask], 0).masks()  # nothing dies, so no kernel is launched
    assert survivors.view(torch.uint8).tolist() == [1, 0, 1, 1]


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # torch's own
def test_tangents_are_refused():
    dense, mask = torch.randn(9), torch.arange(9) % 2 == 0
    with forward_ad.dual_level(), pytest.raises(BackendError, match="gather_kept: forward-mode differentiation"):
        ops.gather_kept(forward_ad.make_dual(dense, dense), mask)
