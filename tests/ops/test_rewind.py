import numpy as np
import pytest
import torch

import lipfast._C as _C
from lipfast import ops
from lipfast.errors import InputError

SHAPES = [(4, 1, 1, 1), (17, 3, 3, 3), (1,), (0, 5), (40_001,)]  # around lanes and chunks, one empty


def draw(shapes, seed=0, distinct=9):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randint(-distinct, distinct, shape, generator=generator).float() for shape in shapes]
    alive = [torch.rand(shape, generator=generator) < 0.8 for shape in shapes]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    return weights, alive, start


def equal(mine, theirs):
    return len(mine) == len(theirs) and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.97, 1.0])
def test_same_bits_as_the_reference(isa, fraction):
    weights, alive, start = draw(SHAPES)
    count = int(fraction * sum(int(mask.sum()) for mask in alive))
    mine = ops.prune_rewind_pack(weights, alive, start, count, backend="cpu")
    theirs = ops.prune_rewind_pack(weights, alive, start, count, backend="reference")
    assert equal(mine.masks, theirs.masks)
    assert equal(mine.bits, theirs.bits)
    assert equal(mine.weights, theirs.weights)
    assert torch.equal(mine.values, theirs.values)


def test_each_part_is_what_it_says(isa):
    weights, alive, start = draw(SHAPES, seed=1)
    got = ops.prune_rewind_pack(weights, alive, start, 1000)
    assert equal(got.masks, ops.prune_smallest(weights, alive, 1000))
    for mask, bits, dense, first in zip(got.masks, got.bits, got.weights, start, strict=True):
        assert np.array_equal(bits.numpy(), np.packbits(mask.numpy().reshape(-1), bitorder="little"))
        assert torch.equal(dense[mask], first[mask])
        assert not bool(dense[~mask].view(torch.int32).any())  # +0 bit for bit, even where start is negative
    assert torch.equal(got.values, torch.cat([dense[mask] for dense, mask in zip(got.weights, got.masks, strict=True)]))


@pytest.mark.parametrize("target", ["weights", "start"])
def test_writes_into_its_own_arguments(isa, target):
    weights, alive, start = draw(SHAPES, seed=2)
    expected = ops.prune_rewind_pack(weights, alive, start, 500)
    into = weights if target == "weights" else start
    got = ops.prune_rewind_pack(weights, alive, start, 500, into=into)
    assert all(mine is given for mine, given in zip(got.weights, into, strict=True))
    assert equal(into, expected.weights)
    assert torch.equal(got.values, expected.values)


def test_writes_into_parameters_of_any_layout(isa):
    weights, alive, start = draw([(6, 5, 3, 3)])
    expected = ops.prune_rewind_pack(weights, alive, start, 50)
    parameter = torch.nn.Parameter(torch.zeros(6, 5, 3, 3).to(memory_format=torch.channels_last))
    ops.prune_rewind_pack(weights, alive, start, 50, into=[parameter])
    assert torch.equal(parameter.detach(), expected.weights[0])


def test_the_number_of_threads_changes_nothing(isa, for_each_thread_count):
    weights, alive, start = draw([(100_003,), (70_000,)], seed=3)
    first, *others = for_each_thread_count(lambda: ops.prune_rewind_pack(weights, alive, start, 60_000))
    for other in others:
        assert equal(first.masks, other.masks)
        assert equal(first.bits, other.bits)
        assert torch.equal(first.values, other.values)


def test_refusal_leaves_the_target_alone(isa):
    weights, alive, start = draw([(50,)])
    weights[0][alive[0].nonzero()[0]] = float("nan")
    into = [torch.full((50,), 7.0)]
    with pytest.raises(InputError, match=r"prune_rewind_pack: weights\[0\] holds NaN"):
        ops.prune_rewind_pack(weights, alive, start, 1, into=into)
    assert bool((into[0] == 7).all())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"start": [torch.rand(4)]}, r"start\[0\] must be torch.float32 \(5,\)"),
        ({"into": [torch.rand(5).double()]}, r"into\[0\] must be torch.float32 \(5,\) as its mask, got torch.float64"),
        ({"into": []}, "0 tensors as into but 1 masks"),
        ({"count": 6}, "count=6 but 5 of 5"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    arguments = {
        "weights": [torch.rand(5)],
        "alive": [torch.ones(5, dtype=torch.bool)],
        "start": [torch.rand(5)],
        "count": 1,
    }
    with pytest.raises(InputError, match=message):
        ops.prune_rewind_pack(**{**arguments, **changed})


@pytest.mark.parametrize(
    "views", [lambda memory: [memory[:8], memory[4:]], lambda memory: [memory[4:], memory[:8]], lambda m: [m[:8]] * 2]
)
def test_results_in_one_place_are_refused(views):
    weights, alive, start = draw([(8,), (8,)])
    memory = torch.full((12,), 7.0)
    with pytest.raises(InputError, match=r"prune_rewind_pack: into\[\d\] and into\[\d\] share memory"):
        ops.prune_rewind_pack(weights, alive, start, 3, into=views(memory))
    assert bool((memory == 7).all())


def test_results_side_by_side_in_one_tensor_are_written():
    weights, alive, start = draw([(8,), (0,), (8,)])
    memory = torch.full((16,), 7.0)
    done = ops.prune_rewind_pack(weights, alive, start, 3, into=[memory[8:], memory[:0], memory[:8]])
    assert torch.equal(memory[8:], torch.where(done.masks[0], start[0], 0))
    assert torch.equal(memory[:8], torch.where(done.masks[2], start[2], 0))


def test_the_binding_checks_before_the_kernel_sees_a_pointer():
    score, alive = np.ones(8, np.float32), np.ones(8, bool)
    pruning = _C.Pruning([score], [alive], 3, 1)
    with pytest.raises(ValueError, match="mask: expected contiguous bool of 8 elements, got bool \\(7\\)"):
        pruning.write([alive[:7]], None, None, None, None, 1)
    with pytest.raises(ValueError, match="values: expected contiguous float32 of 5 elements"):
        pruning.write(None, None, [score], None, score, 1)
    with pytest.raises(ValueError, match="need start"):
        pruning.write(None, None, None, [score], None, 1)
    with pytest.raises(ValueError, match="no cut"):
        _C.Pruning([score], [alive], 9, 1).write([alive], None, None, None, None, 1)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_was_saved_for_a_backward_pass_is_known_to_be_overwritten(backend):
    weight = torch.randn(5, 7, requires_grad=True)
    loss = (weight * weight).sum()
    ops.prune_rewind_pack([weight], [torch.ones(5, 7, dtype=torch.bool)], [torch.zeros(5, 7)], 3, into=[weight])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_of_inference_mode_are_written_too():
    with torch.inference_mode():
        weight = torch.randn(5, 7)
        ops.prune_rewind_pack([weight], [torch.ones(5, 7, dtype=torch.bool)], [torch.zeros(5, 7)], 3, into=[weight])
        assert not weight.any()
