"""Every Triton kernel against the reference, on odd sizes, with an unmapped page behind each tensor."""

from contextlib import nullcontext

import pytest
import torch
from gpu_device import DEVICE  # first: it switches the interpreter on
from guard import guarded, guarding_outputs

from lipfast.ops import _padding, reference
from lipfast.ops import triton as ops

SIZES = [1, 31, 32, 33, 1023, 1024, 1025, 2080]  # either side of a mask word and of a block
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
# One rounding to the stored type. The interpreter truncates to bf16 where a GPU rounds: one whole step.
STEP = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def place(tensor):
    return guarded(tensor) if DEVICE == "cpu" else tensor.to(DEVICE)


def run(function, *arguments, **named):
    with guarding_outputs() if DEVICE == "cpu" else nullcontext():
        return function(*arguments, **named)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(got, want, *, steps=2.0, terms=1):
    """Within ``steps`` roundings of the stored type, or of fp32 sums of ``terms`` terms, at the size of the answer."""
    scale = max(float(want.abs().max()), 1.0) if want.numel() else 1.0
    bound = steps * STEP[got.dtype] * scale + terms * 2**-23 * scale
    assert got.dtype == want.dtype
    torch.testing.assert_close(got.cpu().float(), want.float(), rtol=0, atol=bound)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("masked", [False, True])
def test_adam(n, dtype, masked):
    values, gradient = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    alive = torch.rand(n) < 0.6 if masked else torch.ones(n, dtype=torch.bool)
    values *= alive
    m, v = torch.randn(n) * alive, torch.rand(n) * alive
    want = [part.clone().float() for part in (values, m, v)]
    reference.adam_step(want[0], gradient.float(), *want[1:], 3, 0.01, 0.9, 0.999, 1e-8, 0.1)
    got = [place(part) for part in (values, m, v)]
    words = run(ops.pack_mask, place(alive)) if masked else None
    run(ops.adam_step, got[0], place(gradient), *got[1:], 3, 0.01, 0.9, 0.999, 1e-8, 0.1, words)
    for mine, theirs in zip(got, want, strict=True):
        close(mine, (theirs * alive).to(mine.dtype), terms=8)


@pytest.mark.parametrize("n", [33, 1025])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("step", [1, 2])
def test_sgd(n, dtype, momentum, nesterov, step):
    values, gradient, buffer = torch.randn(n).to(dtype), torch.randn(n).to(dtype), torch.randn(n)
    alive = torch.rand(n) < 0.6
    values, buffer = values * alive, buffer * alive
    settings = (step, 0.1, momentum, 0.0, 0.01, nesterov)
    want, want_buffer = values.clone().float(), buffer.clone()
    reference.sgd_step(want, gradient.float(), want_buffer, *settings)
    got, got_buffer = place(values), place(buffer)
    run(ops.sgd_step, got, place(gradient), got_buffer, *settings, run(ops.pack_mask, place(alive)))
    close(got, (want * alive).to(dtype), terms=8)
    close(got_buffer, want_buffer * alive, terms=8)


@pytest.mark.parametrize("n", [1, 33, 1024, 1025, 2080])
@pytest.mark.parametrize("distinct", [1, 3, 10_000])  # few distinct magnitudes: ties are the common case
def test_selection_has_the_reference_bits(n, distinct):
    magnitude = torch.randint(0, distinct, (n,)).float() / 7
    alive = torch.rand(n) < 0.7
    for share in (0.0, 0.2, 1.0):
        count = int(share * int(alive.sum()))
        got = run(ops.prune_smallest, place(magnitude), place(alive), count)
        assert torch.equal(got.cpu(), reference.prune_smallest(magnitude, alive, count))


@pytest.mark.parametrize("n", SIZES)
def test_masks(n):
    alive = torch.rand(n) < 0.5
    words = run(ops.pack_mask, place(alive))
    bits = words.cpu().unsqueeze(1) >> torch.arange(32) & 1
    assert torch.equal(bits.flatten()[:n].bool(), alive)
    assert not bits.flatten()[n:].any()


@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (2, 4, 8), (3, 5, 7, 9), (1, 2080)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_apply_mask(shape, dtype):
    alive, x = torch.rand(shape) < 0.5, torch.randn(shape).to(dtype)
    words = run(ops.pack_channel_masks, place(alive))
    x[~alive] = float("nan")  # what is dead must not leak
    assert torch.equal(run(ops.apply_mask, place(x), words).cpu(), torch.where(alive, x, 0))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_what_lives_is_packed_and_unpacked(n, density):
    alive, start = torch.rand(n) < density, torch.randn(n)
    dense, values = run(ops.rewind_pack, place(alive), place(start))
    assert torch.equal(dense.cpu(), start * alive)
    assert torch.equal(values.cpu(), start[alive])
    assert torch.equal(run(ops.gather_kept, place(start), place(alive)).cpu(), start[alive])
    assert torch.equal(run(ops.scatter_kept, values, place(alive)).cpu(), start * alive)


def test_a_pruning_round_is_the_reference_round():
    shapes = [(3, 5, 3, 3), (7,), (4, 33)]
    weights, start = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    alive = [torch.rand(shape) < 0.7 for shape in shapes]
    want_into = [torch.empty_like(first) for first in start]
    want = reference.begin_pruning(weights, alive, 100)
    want_masks, want_bits, want_values = want.rewind(start, want_into)
    got_into = [place(first) for first in start]
    got = run(ops.begin_pruning, [place(weight) for weight in weights], [place(mask) for mask in alive], 100)
    masks, bits, values = run(got.rewind, [place(first) for first in start], got_into)
    assert (got.living, got.nan_part) == (want.living, want.nan_part)
    for mine, theirs in (*zip(masks, want_masks), *zip(bits, want_bits), *zip(got_into, want_into)):  # noqa: B905
        assert torch.equal(mine.cpu(), theirs)
    assert torch.equal(values.cpu(), want_values)


def test_a_pruning_round_names_the_tensor_with_a_living_nan():
    weights, alive = [torch.randn(5), torch.randn(4, 3)], [torch.ones(5).bool(), torch.ones(4, 3).bool()]
    weights[0][2], alive[0][2] = float("nan"), False  # dead: nobody looks at it
    for dead, part in ((weights[0][2], -1), (weights[1][1, 1], 1)):
        dead.fill_(float("nan"))
        got = run(ops.begin_pruning, [place(weight) for weight in weights], [place(mask) for mask in alive], 3)
        assert (got.living, got.nan_part) == (16, part)


def test_any_byte_but_zero_is_true():
    start, alive = torch.randn(133), torch.rand(133) < 0.4
    bytes_ = torch.where(alive, 255, 0).to(torch.uint8).view(torch.bool)
    values = run(ops.gather_kept, place(start), place(bytes_))
    assert torch.equal(values.cpu(), start[alive])
    assert torch.equal(run(ops.scatter_kept, values, place(bytes_)).cpu(), start * alive)
    words = run(ops.pack_channel_masks, place(bytes_.view(7, 19)))
    assert torch.equal(words.cpu(), reference.pack_channel_masks(alive.view(7, 19)))


@pytest.mark.parametrize("size", [(2, 3, 5, 7), (1, 2, 32, 33)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_normalise_activate(size, dtype):
    x = torch.randn(size).to(dtype)
    mean, variance, weight, bias = torch.randn(4, size[1]).unbind()
    variance = variance.abs() + 0.5
    want = torch.nn.functional.leaky_relu(
        torch.nn.functional.batch_norm(x.float(), mean, variance, weight, bias), 0.2
    ).to(dtype)
    got = run(ops.normalise_activate, *(place(part) for part in (x, mean, variance, weight, bias)), 1e-5, 0.2)
    close(got, want, terms=8)


@pytest.mark.parametrize("size", [(2, 3, 5, 7), (1, 2, 32, 33)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_normalise_activate_backward(size, dtype):
    x, dy = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    scale, shift, mean = torch.randn(3, size[1]).unbind()
    want = reference.normalise_activate_backward(x, dy, scale, shift, mean, 0.2)
    got = run(ops.normalise_activate_backward, *(place(part) for part in (x, dy, scale, shift, mean)), 0.2)
    pixels = x[:, 0].numel()
    # Where scale * x + shift is within rounding of 0, either slope is right; these seeds have no such pixel.
    for mine, theirs, terms in zip(got, want, (8, pixels, pixels), strict=True):
        close(mine, theirs, terms=terms)


# Whole channels of odd and full blocks, several items, planes beyond a block, and one that is beyond a whole plane.
NORM_SIZES = [(1, 3, 5, 7), (1, 2, 32, 32), (3, 2, 5, 4), (2, 1, 64, 65), (1, 1, 130, 128)]


@pytest.mark.parametrize("size", NORM_SIZES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("slope", [0.2, 1.0])
def test_batch_norm_activate(size, affine, slope):
    x = torch.randn(size) * 3 + 5
    weight, bias = torch.randn(2, size[1]).unbind() if affine else (None, None)
    before = torch.rand(2, size[1])
    layer = (weight, bias, *before.clone().unbind(), 0.3, 1e-3, slope)
    want = reference.batch_norm_activate(x.double(), *(v.double() if isinstance(v, torch.Tensor) else v for v in layer))
    moved = [v.double() for v in before]
    torch.nn.functional.batch_norm(x.double(), *moved, None, None, True, 0.3, 1e-3)
    running = [place(vector.clone()) for vector in before]
    given = [None if v is None else place(v) for v in (weight, bias)]
    got = run(ops.batch_norm_activate, place(x), *given, *running, 0.3, 1e-3, slope)
    for mine, theirs in zip((*got, *running), (*want, *moved), strict=True):
        close(mine, theirs.float(), terms=32)  # sums of blocks in trees; values of up to 20 lose as many bits

    dy = torch.randn(size)
    want = reference.batch_norm_activate_backward(
        x.double(), dy.double(), *(None if v is None else v.double() for v in (weight, bias)), *want[1:], slope
    )
    got = run(ops.batch_norm_activate_backward, place(x), place(dy), *given, *(place(v.cpu()) for v in got[1:]), slope)
    for mine, theirs, terms in zip(got, want, (32, x[:, 0].numel() ** 0.5, x[:, 0].numel() ** 0.5), strict=True):
        close(mine, theirs.float(), terms=32 + int(terms))


def test_batch_norm_without_running_statistics_keeps_none():
    x = torch.randn(1, 2, 4, 4)
    got, mean, _ = run(ops.batch_norm_activate, place(x), None, None, None, None, 0.1, 1e-5, 1.0)
    close(got, torch.nn.functional.batch_norm(x, None, None, training=True), terms=16)
    close(mean, x.mean((0, 2, 3)), terms=16)


@pytest.mark.parametrize("mode", ["reflect", "circular"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("size", "padding"),
    [((2, 3, 5, 7), (1, 2)), ((1, 2, 4, 4), (3, 3)), ((1, 1, 31, 33), (0, 1)), ((1, 2, 3, 2), (2, 1))],
)
def test_padding_is_folded_back(size, padding, mode, dtype):
    padded = (*size[:2], size[2] + 2 * padding[0], size[3] + 2 * padding[1])
    gradient = torch.randn(padded).to(dtype)
    want = _padding.fold(gradient.double(), torch.Size(size), padding, mode)
    x = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    (theirs,) = torch.autograd.grad(_padding.pad(x, padding, mode), x, gradient.double())
    torch.testing.assert_close(want, theirs)
    close(run(ops.fold_padding, place(gradient), torch.Size(size), padding, mode), want.to(dtype), terms=9)


ENLARGEMENTS = [  # input, size, scales
    ((1, 1, 1, 1), (2, 2), None),
    ((2, 3, 3, 5), (6, 10), (2.0, 2.0)),
    ((1, 5, 5, 7), (11, 13), None),
    ((1, 3, 5, 7), (8, 11), (1.7, 1.6)),  # sizes rounded down
    ((1, 1, 4, 9), (12, 9), (3.0, 1.05)),  # positions on pixels, and an axis that stays
    ((1, 1, 3, 1), (24, 8), None),
    ((1, 2, 15, 17), (30, 34), None),
]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("dtype", "shape", "size", "scales"),
    [(torch.float32, *form) for form in ENLARGEMENTS] + [(dtype, *ENLARGEMENTS[1]) for dtype in FLOATS[1:]],
)
def test_bilinear_enlargement_and_its_gradient(dtype, shape, size, scales, align_corners):
    form = (align_corners, scales)
    x, dy = torch.randn(shape).to(dtype), torch.randn(*shape[:2], *size).to(dtype)
    side = max(shape[2:])  # positions round to float32: each of two weights is off by up to half a side of epsilons
    want = reference.upsample_bilinear(x.double(), size, *form)
    close(run(ops.upsample_bilinear, place(x), size, *form), want.to(dtype), terms=4 + 2 * side)
    readers = -(-dy[0, 0].numel() // x[0, 0].numel())
    want = reference.upsample_bilinear_backward(dy.double(), shape[2:], *form)
    got = run(ops.upsample_bilinear_backward, place(dy), shape[2:], *form)
    close(got, want.to(dtype), terms=4 + 2 * side * readers)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("before", "after"), [(1, 16), (2, 3), (3, 24), (7, 21), (20, 53), (150, 307)])
def test_a_bilinear_gradient_reaches_every_reader(before, after, align_corners, monkeypatch):
    """The weights of an output pixel add up to 1: a reader that is left out is missing from the sum."""
    monkeypatch.delattr(reference, "upsample_bilinear_backward")  # up to 8 times, torch is not asked
    for size, dy in (((before, 1), torch.ones(1, 1, after, 1)), ((1, before), torch.ones(1, 1, 1, after))):
        got = run(ops.upsample_bilinear_backward, place(dy), size, align_corners, None)
        assert float(got.double().sum()) == pytest.approx(after, rel=4 * 2**-23)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float64, (9, 9)), (torch.float32, (3, 9)), (torch.float32, (99, 99))]
)
def test_what_bilinear_kernels_leave_to_torch(dtype, size):
    x, dy = torch.randn(2, 3, 5, 5, dtype=dtype), torch.randn(2, 3, *size, dtype=dtype)
    form, tolerance = (False, None), {"rtol": 0, "atol": 1e-4 if dtype == torch.float32 else 1e-12}
    want = reference.upsample_bilinear(x, size, *form)
    torch.testing.assert_close(ops.upsample_bilinear(x.to(DEVICE), size, *form).cpu(), want, **tolerance)
    want = reference.upsample_bilinear_backward(dy, (5, 5), *form)
    got = ops.upsample_bilinear_backward(dy.to(DEVICE), (5, 5), *form)
    torch.testing.assert_close(got.cpu(), want, **tolerance)


LAYERS = [  # input, weight, stride, padding, mode
    ((2, 3, 9, 8), (4, 3, 3, 3), (1, 1), (1, 1), "reflect"),
    ((1, 3, 9, 8), (4, 3, 3, 2), (2, 1), (1, 0), "zeros"),
    ((1, 5, 6, 7), (3, 5, 1, 1), (1, 1), (0, 0), "zeros"),
    ((1, 2, 24, 23), (3, 2, 3, 3), (2, 2), (1, 1), "circular"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("size", "shape", "stride", "padding", "mode"), LAYERS)
def test_sparse_convolution_and_both_gradients(size, shape, stride, padding, mode, dtype):
    shape = torch.Size(shape)
    positions = (torch.rand(shape.numel()) < 0.3).nonzero().squeeze(1)
    values, bias, x = torch.randn(len(positions)), torch.randn(shape[0]), torch.randn(size)
    values, bias, x = (part.to(dtype).float() for part in (values, bias, x))  # the same numbers for both
    want = reference.sparse_conv2d_forward(x, values, positions, shape, bias, stride, padding, mode)
    dy = torch.randn_like(want).to(dtype).float()
    device_x, device_dy, device_values = (place(part.to(dtype)) for part in (x, dy, values))
    device_positions = place(positions)
    layout = (stride, padding, mode)

    got = run(
        ops.sparse_conv2d_forward, device_x, device_values, device_positions, shape, place(bias.to(dtype)), *layout
    )
    close(got, want.to(dtype), terms=27)
    got = run(ops.sparse_conv2d_input_gradient, device_dy, device_values, device_positions, shape, x.shape, *layout)
    want = reference.sparse_conv2d_input_gradient(dy, values, positions, shape, x.shape, *layout)
    close(got, want.to(dtype), steps=8, terms=36)  # folding the padding adds up to four rounded pixels
    got = run(ops.sparse_conv2d_weight_gradient, device_x, device_dy, device_positions, shape, *layout)
    want = reference.sparse_conv2d_weight_gradient(x, dy, positions, shape, *layout)
    close(got, want, terms=dy[0, 0].numel() * len(dy))


def test_channels_last_comes_back_as_channels_last():
    shape = torch.Size((4, 3, 3, 3))
    positions, x = torch.arange(0, shape.numel(), 3), torch.randn(2, 3, 6, 5)
    values, layout = torch.randn(len(positions)), ((1, 1), (1, 1), "reflect")
    given = x.to(DEVICE).contiguous(memory_format=torch.channels_last)
    y = ops.sparse_conv2d_forward(given, values.to(DEVICE), positions.to(DEVICE), shape, None, *layout)
    dx = ops.sparse_conv2d_input_gradient(y, values.to(DEVICE), positions.to(DEVICE), shape, x.shape, *layout)
    want = reference.sparse_conv2d_forward(x, values, positions, shape, None, *layout)
    for got in (y, dx):
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert not got.is_contiguous()
    close(y, want, terms=27)


def test_a_layer_without_weights_is_its_bias():
    shape, empty = torch.Size((2, 3, 3, 3)), torch.zeros(0)
    positions = torch.zeros(0, dtype=torch.int64)
    layout = ((1, 1), (1, 1), "zeros")
    x, bias = torch.randn(1, 3, 4, 4), torch.randn(2)
    got = run(ops.sparse_conv2d_forward, place(x), empty.to(DEVICE), positions.to(DEVICE), shape, place(bias), *layout)
    assert torch.equal(got.cpu(), bias.view(1, 2, 1, 1).expand(1, 2, 4, 4))
    assert len(run(ops.sparse_conv2d_weight_gradient, place(x), got, positions.to(DEVICE), shape, *layout)) == 0


@pytest.mark.parametrize("precision", ["ieee", "tf32"] + ["bf16"] * (DEVICE != "cpu"))  # no bf16 dot when interpreted
@pytest.mark.parametrize(("size", "shape", "stride", "padding", "mode"), LAYERS)
def test_masked_convolution(size, shape, stride, padding, mode, precision):
    x, weight = torch.randn(size), torch.randn(shape)
    alive = torch.rand(shape) < 0.5
    weight[~alive] = float("nan")  # dead weights are never used, whatever they hold
    words = run(ops.pack_channel_masks, place(alive))
    got = run(ops.masked_conv2d, place(x), place(weight), words, stride, padding, mode, precision=precision)
    kept = alive.flatten().nonzero().squeeze(1)
    want = reference.sparse_conv2d_forward(
        x, weight.flatten()[kept], kept, torch.Size(shape), None, stride, padding, mode
    )
    rounding = {"ieee": 2**-23, "tf32": 2**-10, "bf16": 2**-8}[precision]
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=45 * rounding * float(want.abs().max()))


@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (2, 32), (4, 3, 3, 4), (2, 65)])
def test_packed_rows_have_the_reference_bits(shape):
    alive = torch.rand(shape) < 0.5
    assert torch.equal(run(ops.pack_channel_masks, place(alive)).cpu(), reference.pack_channel_masks(alive))
