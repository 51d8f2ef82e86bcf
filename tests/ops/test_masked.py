"""Masked dense ops by definition; the GPU kernels meet the same reference in tests/gpu/test_triton.py."""

import pytest
import torch

from lipfast.errors import InputError
from lipfast.ops import masked


@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (2, 32), (4, 3, 3, 4), (2, 65), (3, 0)])
def test_bits_are_where_they_should_be(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    words = masked.pack_mask(mask)
    rows = mask.reshape(shape[0], -1)
    assert words.shape == (shape[0], -(-rows.shape[1] // 32))
    for r, row in enumerate(rows.tolist()):
        packed = sum((word & 0xFFFFFFFF) << 32 * w for w, word in enumerate(words[r].tolist()))
        assert packed == sum(alive << i for i, alive in enumerate(row))


def test_dead_weights_do_not_count_whatever_they_hold():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 7, 6), torch.randn(4, 3, 3, 3)
    alive = torch.rand(4, 3, 3, 3) < 0.5
    want = torch.nn.functional.conv2d(x, weight * alive, padding=1, stride=2)
    weight[~alive] = float("nan")
    got = masked.masked_conv2d(x, weight, masked.pack_mask(alive), (2, 2), (1, 1), precision="ieee")
    torch.testing.assert_close(got, want)


def test_normalise_activate_is_batch_norm_and_leaky_relu():
    torch.manual_seed(0)
    layer = torch.nn.BatchNorm2d(3).train()
    x = torch.randn(2, 3, 4, 5)
    want = torch.nn.functional.leaky_relu(layer(x), 0.2).detach()
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    got = masked.normalise_activate(x, mean, variance, layer.weight.detach(), layer.bias.detach())
    torch.testing.assert_close(got, want)


def test_wrong_arguments_are_named():
    x, weight = torch.randn(1, 1, 3, 3), torch.randn(2, 1, 3, 3)
    words = masked.pack_mask(weight != 0)
    with pytest.raises(InputError, match="ieee, tf32, bf16, got 'fp8'"):
        masked.masked_conv2d(x, weight, words, precision="fp8")
    with pytest.raises(InputError, match=r"words must be int32 \(2, 1\).*ops.pack_mask"):
        masked.masked_conv2d(x, weight, words[:1], precision="ieee")
    with pytest.raises(InputError, match=r"variance must be \(1,\), got \(2,\)"):
        masked.normalise_activate(x, torch.zeros(1), torch.ones(2), torch.ones(1), torch.zeros(1))
    with pytest.raises(InputError, match="expected a bool tensor"):
        masked.pack_mask(weight)
