"""Masked dense ops by definition; the GPU kernels meet the same reference in tests/gpu/test_triton.py."""

import pytest
import torch
from torch.autograd import forward_ad

from lipfast.errors import BackendError, InputError
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
    with pytest.raises(InputError, match="does not fit an input of"):
        masked.masked_conv2d(x.squeeze(0), weight, words, precision="ieee")
    with pytest.raises(InputError, match=r"apply_mask: words must be int32 \(1, 1\)"):
        masked.apply_mask(x, words)
    with pytest.raises(InputError, match="masked_conv2d: padding_mode 'bogus' is unknown"):
        masked.masked_conv2d(x, weight, words, padding_mode="bogus", precision="ieee")
    with pytest.raises(InputError, match=r"masked_conv2d: stride is one whole number or two, got \(1, 2, 3\)"):
        masked.masked_conv2d(x, weight, words, stride=(1, 2, 3), precision="ieee")
    with pytest.raises(InputError, match="got a scalar"):
        masked.apply_mask(torch.tensor(1.0), words)
    with pytest.raises(InputError, match=r"masked_conv2d: weight must be torch\.float32 as x, got torch\.float64"):
        masked.masked_conv2d(x, weight.double(), words, precision="ieee")
    vectors = [torch.zeros(1), torch.ones(1), torch.ones(1).double(), torch.zeros(1)]
    with pytest.raises(InputError, match=r"weight must be torch\.float32 as mean, got torch\.float64"):
        masked.normalise_activate(x, *vectors)


LAYERS = [  # input, weight, stride, padding, mode
    ((2, 3, 5, 4), (4, 3, 3, 3), (1, 1), (1, 1), "reflect"),
    ((1, 2, 6, 5), (3, 2, 3, 2), (2, 1), (1, 0), "zeros"),
    ((1, 35, 2, 3), (2, 35, 1, 1), (1, 1), (0, 0), "zeros"),  # more taps than a mask word has bits
    ((1, 1, 5, 5), (1, 1, 3, 3), (2, 2), (2, 2), "replicate"),
]


@pytest.mark.parametrize(("size", "shape", "stride", "padding", "mode"), LAYERS)
def test_the_masked_convolution_has_the_gradients_of_its_definition(size, shape, stride, padding, mode):
    torch.manual_seed(0)
    x, weight = torch.randn(size, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    alive = torch.rand(shape) < 0.5
    words = masked.pack_mask(alive)
    inputs = (x.requires_grad_(), weight.requires_grad_())
    form = (words, stride, padding, mode)
    assert torch.autograd.gradcheck(lambda x, weight: masked.masked_conv2d(x, weight, *form, precision="ieee"), inputs)
    y = masked.masked_conv2d(x, weight, *form, precision="ieee")
    (dweight,) = torch.autograd.grad(y.square().sum(), weight)
    assert not dweight[~alive].any()
    assert dweight[alive].any()


def test_dead_weights_reach_no_gradient():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 3, 7, 6, requires_grad=True), torch.randn(4, 3, 3, 3)
    alive = torch.rand(4, 3, 3, 3) < 0.5
    want = torch.autograd.grad(torch.nn.functional.conv2d(x, weight * alive).square().sum(), x)[0]
    weight[~alive] = float("nan")
    weight.requires_grad_()
    y = masked.masked_conv2d(x, weight, masked.pack_mask(alive), precision="ieee")
    dx, dweight = torch.autograd.grad(y.square().sum(), (x, weight))
    torch.testing.assert_close(dx, want)
    assert torch.equal(dweight == 0, ~alive)


def draw_normalisation(size, dtype=torch.float64):
    torch.manual_seed(0)
    mean, weight, bias = (torch.randn(size[1], dtype=dtype) for _ in range(3))
    parts = (torch.randn(size, dtype=dtype), mean, torch.rand(size[1], dtype=dtype) + 0.5, weight, bias)
    return tuple(part.requires_grad_() for part in parts)


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 3, 5, 4), (1, 5, 1, 7)])
@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
def test_normalise_activate_has_the_gradients_of_its_definition(size, slope):
    inputs = draw_normalisation(size)
    assert torch.autograd.gradcheck(lambda *parts: masked.normalise_activate(*parts, 1e-3, slope), inputs)


def test_statistics_of_the_batch_pass_their_gradient_on():
    """With mean and variance computed from x, it is BatchNorm in training."""
    x, _, _, weight, bias = draw_normalisation((2, 3, 5, 4))
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    got = masked.normalise_activate(x, mean, variance, weight, bias)
    plain = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True)
    want = torch.nn.functional.leaky_relu(plain, 0.2)
    torch.testing.assert_close(got, want)
    dy, parts = torch.randn_like(got), (x, weight, bias)
    torch.testing.assert_close(torch.autograd.grad(got, parts, dy), torch.autograd.grad(want, parts, dy))


def test_a_mask_lets_the_gradient_of_the_living_through():
    x = torch.randn(3, 5, 7, requires_grad=True)
    alive = torch.rand(3, 5, 7) < 0.5
    y = masked.apply_mask(x, masked.pack_mask(alive))
    assert torch.equal(y, torch.where(alive, x, 0))
    y.sum().backward()
    assert torch.equal(x.grad, alive.float())


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own
def test_operators_keep_torchs_contracts():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 7, 5, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    words = masked.pack_mask(torch.rand(4, 3, 3, 3) < 0.5)
    form = ([2, 1], [1, 1], "reflect", "ieee", None)
    op = torch.ops.lipfast
    torch.library.opcheck(op.masked_conv2d.default, (x, weight, words, *form))
    like_channels_last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(op.masked_conv2d.default, (like_channels_last, weight, words, *form))
    dy = torch.randn(2, 4, 4, 5)
    plain_x, plain_weight = x.detach(), weight.detach()
    input_gradient, weight_gradient = op.masked_conv2d_input_gradient, op.masked_conv2d_weight_gradient
    torch.library.opcheck(input_gradient.default, (dy, plain_weight, words, list(x.shape), *form))
    torch.library.opcheck(weight_gradient.default, (plain_x, dy, words, list(weight.shape), *form))
    torch.library.opcheck(op.apply_mask.default, (weight, words, None))
    parts = [part.detach().requires_grad_() for part in draw_normalisation((2, 3, 5, 4), torch.float32)]
    torch.library.opcheck(op.normalise_activate.default, (*parts, 1e-5, 0.2, None))


@pytest.mark.parametrize("op", ["masked_conv2d", "normalise_activate"])
def test_double_backward_is_refused(op):
    if op == "masked_conv2d":
        x, weight = torch.randn(1, 2, 5, 5, requires_grad=True), torch.randn(3, 2, 3, 3)
        y = masked.masked_conv2d(x, weight, masked.pack_mask(weight > 0), precision="ieee")
    else:
        x, *vectors = draw_normalisation((1, 2, 3, 3))
        y = masked.normalise_activate(x, *vectors)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(BackendError, match=f"{op}: double backward is not supported.*create_graph"):
        dx.sum().backward()


def test_one_number_serves_both_axes():
    x, weight = torch.randn(1, 1, 8, 9), torch.randn(2, 1, 3, 3)
    words = masked.pack_mask(weight != 0)
    one = masked.masked_conv2d(x, weight, words, stride=2, padding=1, precision="ieee")
    assert torch.equal(one, masked.masked_conv2d(x, weight, words, (2, 2), (1, 1), precision="ieee"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": 0}, r"stride \(0, 0\), .* out of range"),
        ({"stride": 1.5}, "stride must be a whole number, got 1.5"),
        ({"padding": -1}, r".* padding \(-1, -1\) are out of range"),
        ({"padding": 8, "padding_mode": "reflect"}, "reflect padding of 8 is too large for a side of 8"),
    ],
)
def test_windows_that_fit_no_map_are_refused(settings, message):
    x, weight = torch.randn(1, 1, 8, 9), torch.randn(2, 1, 3, 3)
    with pytest.raises(InputError, match=f"masked_conv2d: {message}"):
        masked.masked_conv2d(x, weight, masked.pack_mask(weight != 0), **settings, precision="ieee")


def test_masks_without_rows():
    assert masked.pack_mask(torch.ones(0, 33, dtype=torch.bool)).shape == (0, 2)


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # torch's own
def test_tangents_are_refused():
    x = torch.randn(2, 5)
    words = masked.pack_mask(x > 0)
    with forward_ad.dual_level(), pytest.raises(BackendError, match="apply_mask: forward-mode differentiation"):
        masked.apply_mask(forward_ad.make_dual(x, x), words)
