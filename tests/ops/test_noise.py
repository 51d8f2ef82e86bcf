"""Gaussian noise against its reference, whose words are known answers, and against the normal distribution."""

import math

import pytest
import torch

import lipfast._C as _C
from lipfast import ops
from lipfast.errors import BackendError, InputError
from lipfast.ops import reference

SIZES = [0, 1, 15, 16, 17, 63, 64, 65, 4095, 4097, 100_003]  # around lanes, groups and chunks


def drawn(count, seed=0, step=0, **options):
    return ops.add_noise(torch.zeros(count), 1.0, seed, step, **options)


def test_the_references_words_are_those_of_its_authors():
    found = reference._threefry(torch.tensor([0]), (0, 0, 0, 0))
    assert " ".join(f"{int(word):08x}" for word in found) == "9c6ca96a e17eae66 fc10ecd4 5256a7d8"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (2**63 - 1, 5), (12345678901234, 2**40 + 3)])
def test_equals_the_reference(isa, size, seed, step):
    base = torch.rand(size, generator=torch.Generator().manual_seed(1))
    got = ops.add_noise(base, 0.3, seed, step, backend="cpu")
    torch.testing.assert_close(got, ops.add_noise(base, 0.3, seed, step, backend="reference"), rtol=1e-6, atol=1e-6)


def test_equal_bits_on_every_instruction_set_and_for_any_number_of_threads(isa):
    here = drawn(100_003, 7, 9)
    before, threads = _C.isa(), torch.get_num_threads()
    try:
        _C.set_isa("plain")
        for count in 1, 2, 3, 8:
            torch.set_num_threads(count)
            assert torch.equal(drawn(100_003, 7, 9), here)
    finally:
        _C.set_isa(before)
        torch.set_num_threads(threads)


def test_a_longer_draw_begins_with_the_shorter_one():
    assert torch.equal(drawn(5000)[:77], drawn(77))


def test_is_normal():
    """Moments and distribution within five standard errors; no relation of neighbours."""
    n = 1 << 20
    x = drawn(n, 3, 1).double()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - expected) < 5 * math.sqrt(variance / n)
    places = torch.special.ndtr(x).sort().values
    distance = (places - (torch.arange(n, dtype=torch.float64) + 0.5) / n).abs().max()
    assert float(distance) < 2 / math.sqrt(n)  # Kolmogorov and Smirnov: 1 in 1500
    for shift in 1, 4, 16, 64:
        assert abs(float((x[shift:] * x[:-shift]).mean())) < 5 / math.sqrt(n)
    assert 4.5 < float(x.abs().max()) < 5.8


@pytest.mark.parametrize("other", [(4, 1), (3, 2), (3 + (1 << 32), 1), (3, 1 + (1 << 32))])
def test_seeds_and_steps_are_independent(other):
    n = 1 << 16
    relation = (drawn(n, 3, 1) * drawn(n, *other)).mean()
    assert abs(float(relation)) < 5 / math.sqrt(n)


def test_any_shape_and_layout():
    base = torch.rand(2, 3, 5, 4).to(memory_format=torch.channels_last)
    got = ops.add_noise(base, 2.0, 1, 1)
    assert got.is_contiguous()
    assert torch.equal(got, ops.add_noise(base.contiguous(), 2.0, 1, 1))
    assert torch.equal(ops.add_noise(base, 0.0, 1, 1), base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": torch.zeros(3, dtype=torch.float64)}, "base must be float32, got torch.float64"),
        ({"scale": float("nan")}, "scale must be finite, got nan"),
        ({"seed": -1}, r"seed must be 0 to 2\^63 - 1, got -1"),
        ({"step": 2**63}, f"step must be .*, got {2**63}"),
        ({"step": 0.5}, "step must be a whole number, got 0.5"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(InputError, match=message):
        ops.add_noise(**{"base": torch.zeros(3), "scale": 1.0, "seed": 0, "step": 0, **change})


def test_an_absent_backend_is_named():
    with pytest.raises(BackendError, match="cuda runs on cuda"):
        drawn(3, backend="cuda")
