"""Bilinear resampling by definition; the GPU kernels meet the same reference in tests/gpu/test_triton.py."""

import pytest
import torch

from lipfast import ops
from lipfast.errors import BackendError, InputError

FORMS = [  # input, size, align_corners, scales
    ((1, 1, 1, 1), (2, 2), False, None),
    ((2, 3, 3, 5), (6, 10), False, (2.0, 2.0)),
    ((1, 2, 5, 7), (8, 11), False, (1.7, 1.6)),
    ((1, 2, 5, 7), (11, 13), True, None),
    ((1, 2, 5, 7), (3, 9), False, None),
]


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def test_a_pixel_is_a_mean_of_the_nearest_four():
    x = torch.tensor([[0.0, 4.0], [8.0, 20.0]]).view(1, 1, 2, 2)
    doubled = ops.upsample_bilinear(x, (4, 4))[0, 0]
    assert doubled[0].tolist() == [0, 1, 3, 4]
    assert doubled[1].tolist() == [2, 3.5, 6.5, 8]  # three quarters of the upper row, one of the lower
    assert ops.upsample_bilinear(x, (3, 3), align_corners=True)[0, 0].tolist() == [[0, 2, 4], [4, 8, 12], [8, 14, 20]]


@pytest.mark.parametrize(("shape", "size", "align_corners", "scales"), FORMS)
def test_it_is_torchs_interpolation(shape, size, align_corners, scales):
    x = draw(*shape)
    how = {"size": size} if scales is None else {"scale_factor": scales}
    want = torch.nn.functional.interpolate(x, **how, mode="bilinear", align_corners=align_corners)
    assert torch.equal(ops.upsample_bilinear(x, size, align_corners=align_corners, scales=scales), want)


@pytest.mark.parametrize(("shape", "size", "align_corners", "scales"), FORMS)
def test_it_has_the_gradient_of_its_definition(shape, size, align_corners, scales):
    def upsample(x):
        return ops.upsample_bilinear(x, size, align_corners=align_corners, scales=scales)

    assert torch.autograd.gradcheck(upsample, draw(*shape).requires_grad_())


def test_scales_place_the_pixels():
    x = draw(1, 1, 5, 7)
    by_scales = ops.upsample_bilinear(x, (8, 11), scales=(1.7, 1.6))
    assert not torch.equal(by_scales, ops.upsample_bilinear(x, (8, 11)))


def test_the_result_is_contiguous_and_an_empty_batch_stays_empty():
    x = draw(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert ops.upsample_bilinear(x, (8, 10)).is_contiguous()
    assert ops.upsample_bilinear(x[:0], (8, 10)).shape == (0, 3, 8, 10)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own
def test_operators_keep_torchs_contracts():
    op, form = torch.ops.lipfast, (False, [1.7, 1.6], None)
    x, dy = draw(2, 3, 5, 7, dtype=torch.float32).requires_grad_(), draw(2, 3, 8, 11, dtype=torch.float32)
    torch.library.opcheck(op.upsample_bilinear.default, (x, [8, 11], *form))
    like_channels_last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(op.upsample_bilinear.default, (like_channels_last, [9, 9], True, None, None))
    torch.library.opcheck(op.upsample_bilinear_backward.default, (dy, [5, 7], *form))


def test_double_backward_is_refused():
    x = draw(1, 2, 3, 3).requires_grad_()
    (dx,) = torch.autograd.grad(ops.upsample_bilinear(x, (6, 6)).square().sum(), x, create_graph=True)
    with pytest.raises(BackendError, match=r"upsample_bilinear: double backward is not supported.*create_graph"):
        dx.sum().backward()


def test_wrong_arguments_are_named():
    x = draw(1, 2, 3, 5)
    with pytest.raises(InputError, match=r"expected a float tensor.*got torch.float64 \(2, 3, 5\)"):
        ops.upsample_bilinear(x[0], (6, 10))
    with pytest.raises(InputError, match=r"not empty, got torch.float64 \(1, 0, 3, 5\)"):
        ops.upsample_bilinear(x[:, :0], (6, 10))
    with pytest.raises(InputError, match=r"got torch.int64 \(1, 2, 3, 5\)"):
        ops.upsample_bilinear(x.long(), (6, 10))
    with pytest.raises(InputError, match=r"size must be \(rows, columns\), each at least 1, got \(6, 0\)"):
        ops.upsample_bilinear(x, (6, 0))
    with pytest.raises(InputError, match=r"size is one whole number or two, got \(6,\)"):
        ops.upsample_bilinear(x, (6,))
    for scales in ((2.0, 1.0), (2.0,), (2.0, 2.0, 5.0), (2.0, float("nan"))):
        with pytest.raises(InputError, match=r"scales \(2.0,.*\) of a map of \(3, 5\) do not give size \(6, 10\)"):
            ops.upsample_bilinear(x, (6, 10), scales=scales)


def test_an_unknown_backend_is_named():
    with pytest.raises(BackendError, match="unknown backend 'fpga'"):
        ops.upsample_bilinear(draw(1, 2, 3, 5), (6, 10), backend="fpga")
