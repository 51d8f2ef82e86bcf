"""Sparse convolution: every instruction set and kernel against torch in float64."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

import lipfast._C as _C
from lipfast import ops
from lipfast.errors import BackendError, ConfigError, InputError
from lipfast.ops import ConvForm, LaneConv, LaneMap, SparseWeight, _cuda_sparse_conv, _dispatch, sparse_conv2d
from lipfast.ops._cuda_library import Facts
from lipfast.ops.lane_conv import KERNELS
from lipfast.ops.triton import sparse_conv as triton_sparse_conv

ISAS = _C.available_isas()
# Direct float32 sums of n products err by about eps * sqrt(n): 6e-8 * sqrt(6272) = 5e-6 for 7x7 over 128 channels;
# Winograd's transforms multiply that by 3. Relative to the norm of the answer.
TOLERANCE = 1e-5


def draw(form: ConvForm, size: tuple[int, int], batch: int, density: float, seed: int = 0):
    """Input, weight, mask, bias for a form."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, form.in_channels, *size, generator=generator)
    weight = torch.randn(form.out_channels, form.in_channels // form.groups, *form.kernel, generator=generator)
    mask = torch.rand(weight.shape, generator=generator) < density
    return x, weight * mask, mask, torch.randn(form.out_channels, generator=generator)


def torch_gradients(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor, form: ConvForm, dy: Tensor | None = None):
    """Output and gradients by torch in float64; ``dy`` is drawn when absent."""
    x, weight, bias = (t.double().requires_grad_() for t in (x, weight, bias))
    rows, columns = form.padding
    mode = "constant" if form.padding_mode == "zeros" else form.padding_mode
    padded = functional.pad(x, (columns, columns, rows, rows), mode=mode) if rows or columns else x
    y = functional.conv2d(padded, weight, bias, form.stride, dilation=form.dilation, groups=form.groups)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) if dy is None else dy
    y.backward(dy.double())
    return (y.detach(), x.grad, weight.grad[mask], bias.grad), dy


def close(got: Tensor, want: Tensor) -> bool:
    scale = max(
        float(want.norm()), want.numel() ** 0.5
    )  # inputs are of size 1, so an answer of zeros may err as ones do
    return float((got - want).norm()) <= TOLERANCE * scale


def on_lanes(x, weight, mask, bias, form, dy, kernel="auto", exact=False):
    """The four results by the kernels, on lane maps."""
    conv = LaneConv(form, mask, x.shape[0], *x.shape[2:], kernel=kernel, exact=exact)
    values = weight[mask]
    xs, ys, dxs = conv.input_map(), conv.output_map(halo=1), conv.input_map()
    xs.data.copy_(LaneMap.from_tensor(x, xs.halo, block=conv.in_block).data)
    conv.fill_input(xs)
    conv.forward(values, bias, xs, ys)
    dys = LaneMap.from_tensor(dy, conv.gradient_halo, block=conv.out_block)
    conv.input_gradient(values, dys, dxs)
    dvalues, dbias = torch.full((conv.kept,), torch.nan), torch.full((form.out_channels,), torch.nan)
    conv.weight_gradient(xs, dys, dvalues, dbias)
    return conv, (ys.to_tensor(), dxs.to_tensor(), dvalues, dbias)


def form(out, into, kernel, stride=1, padding=None, mode="zeros", dilation=1, groups=1) -> ConvForm:
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    padding = padding or tuple(dilation * (k - 1) // 2 for k in kernel)
    return ConvForm(out, into, kernel, stride, padding, mode, dilation, groups)


FORMS = {
    "1x1": (form(17, 33, 1), (16, 20), 1),
    "3x3": (form(20, 18, 3), (33, 40), 3),
    "3x3 reflect": (form(5, 7, 3, mode="reflect"), (17, 13), 1),
    "3x3 replicate, smaller than the lanes": (form(9, 4, 3, mode="replicate"), (3, 2), 1),
    "3x3 circular": (form(4, 3, 3, mode="circular"), (16, 16), 17),
    "3x3 one pixel": (form(3, 2, 3), (1, 1), 2),
    "3x3 stride 2 reflect": (form(12, 9, 3, stride=2, mode="reflect"), (32, 34), 1),
    "3x3 stride 2 odd": (form(6, 5, 3, stride=2), (15, 33), 3),
    "3x3 stride 3": (form(6, 5, 3, stride=3), (19, 20), 1),
    "5x5": (form(6, 5, 5), (16, 18), 1),
    "5x5 reflect": (form(20, 18, 5, mode="reflect"), (33, 41), 3),
    "7x7 stride 2, as ResNet's first": (form(16, 3, 7, stride=2), (40, 40), 1),
    "2x2 without padding": (form(8, 8, 2, stride=2, padding=(0, 0)), (16, 15), 1),
    "3x1": (form(4, 4, (3, 1)), (9, 11), 1),
    "wide padding": (form(4, 4, 3, padding=(3, 3), mode="reflect"), (8, 9), 1),
    "dilated": (form(4, 6, 3, dilation=2), (20, 20), 1),
    "grouped": (form(8, 6, 3, groups=2), (12, 12), 1),
    "valid": (form(4, 4, 3, padding=(0, 0)), (18, 18), 1),
}


@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("name", FORMS)
def test_equals_torch_on_every_instruction_set(isa, name, density):
    conv_form, size, batch = FORMS[name]
    x, weight, mask, bias = draw(conv_form, size, batch, density)
    want, dy = torch_gradients(x, weight, mask, bias, conv_form)
    for kernel in KERNELS:
        conv, got = on_lanes(x, weight, mask, bias, conv_form, dy, kernel)
        for what, a, b in zip(("y", "dx", "dw", "db"), got, want, strict=True):
            assert close(a, b), (what, kernel, conv.kernels)


def test_one_weight_and_empty_rows(isa):
    conv_form = form(6, 5, 3)
    x, _, mask, bias = draw(conv_form, (12, 16), 1, 0.0)
    mask[4, 2, 0, 1] = True
    weight = torch.where(mask, 1.5, 0.0)
    want, dy = torch_gradients(x, weight, mask, bias, conv_form)
    _, got = on_lanes(x, weight, mask, bias, conv_form, dy, "sparse")
    assert all(close(a, b) for a, b in zip(got, want, strict=True))


@st.composite
def convolutions(drawing):
    groups = drawing(st.sampled_from([1, 1, 1, 2]))
    kernel = drawing(st.sampled_from([1, 2, 3, 3, 5]))
    dilation = drawing(st.sampled_from([1, 1, 2]))
    size = drawing(st.tuples(st.integers(1, 24), st.integers(1, 24)))
    pad = drawing(st.integers(0, 3))
    mode = drawing(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    most = {"reflect": min(size) - 1, "circular": min(size)}.get(mode, pad)
    pad = min(pad, most)
    if min(size) + 2 * pad < dilation * (kernel - 1) + 1:
        mode, pad = "zeros", dilation * (kernel - 1)
    channels = drawing(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    stride = drawing(st.integers(1, 3))
    conv_form = form(channels[0] * groups, channels[1] * groups, kernel, stride, (pad, pad), mode, dilation, groups)
    return conv_form, size, drawing(st.integers(1, 3)), drawing(st.sampled_from([0.0, 0.1, 0.5, 1.0]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(convolutions(), st.sampled_from(ISAS), st.sampled_from(list(KERNELS)))
def test_any_convolution_equals_torch(case, isa, kernel):
    conv_form, size, batch, density = case
    x, weight, mask, bias = draw(conv_form, size, batch, density)
    want, dy = torch_gradients(x, weight, mask, bias, conv_form)
    before = _C.isa()
    _C.set_isa(isa)
    try:
        _, got = on_lanes(x, weight, mask, bias, conv_form, dy, kernel)
    finally:
        _C.set_isa(before)
    assert all(close(a, b) for a, b in zip(got, want, strict=True))


# Tiles of one row and of two, input channels in several blocks, more output channels than a tile takes at once.
@pytest.mark.parametrize("density", [0.01, 0.1, 0.6])
@pytest.mark.parametrize("out", [40, 131])
def test_many_channels_in_blocks(isa, out, density):
    conv_form = form(out, 90, 3, mode="reflect")
    x, weight, mask, bias = draw(conv_form, (37, 70), 1, density)
    want, dy = torch_gradients(x, weight, mask, bias, conv_form)
    conv, got = on_lanes(x, weight, mask, bias, conv_form, dy, "sparse")
    assert set(conv.kernels.values()) == {"sparse"}
    assert all(close(a, b) for a, b in zip(got, want, strict=True))


# Vectors of three rows: every width of a tile, of two rows where they fit the registers and one that is left over.
@pytest.mark.parametrize("columns", range(1, 10))
@pytest.mark.parametrize("stride", [1, 2])
def test_tiles_of_every_shape(isa, stride, columns):
    conv_form = form(9, 90, 3, stride=stride)
    x, weight, mask, bias = draw(conv_form, (12 * stride, 4 * columns * stride), 2, 0.4)
    want, dy = torch_gradients(x, weight, mask, bias, conv_form)
    _, got = on_lanes(x, weight, mask, bias, conv_form, dy, "sparse")
    assert all(close(a, b) for a, b in zip(got, want, strict=True))


# More taps than are copied side by side at once, more outputs than wait for the next of them, tiles of every width, and
# several rows whose gradients are summed up before they are added across lanes.
@pytest.mark.parametrize(("into", "out"), [(140, 135), (20, 7)])
@pytest.mark.parametrize("size", [(5, 28), (25, 76), (1, 3)])
def test_dense_kernels_take_their_taps_in_blocks(isa, into, out, size):
    conv_form = form(out, into, 3)
    x, weight, mask, bias = draw(conv_form, size, 1, 1.0)
    want, dy = torch_gradients(x, weight, mask, bias, conv_form)
    conv, got = on_lanes(x, weight, mask, bias, conv_form, dy, "dense")
    assert set(conv.kernels.values()) == {"dense"}
    assert all(close(a, b) for a, b in zip(got, want, strict=True))


# Whole and cut tiles of both sizes, one block of tiles and many, more channels than are multiplied at once.
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (30, 31), (33, 130), (64, 64)])
@pytest.mark.parametrize("channels", [(3, 2), (140, 170)])
def test_winograd_with_a_stride(isa, channels, size):
    conv_form = form(*channels, 3, stride=2)
    x, weight, mask, bias = draw(conv_form, size, 2, 0.9)
    want, dy = torch_gradients(x, weight, mask, bias, conv_form)
    conv, got = on_lanes(x, weight, mask, bias, conv_form, dy, "winograd")
    assert set(conv.kernels.values()) == {"winograd"}
    assert all(close(a, b) for a, b in zip(got, want, strict=True))


def test_winograd_with_a_stride_reads_no_more_than_it_needs(isa):
    """Poison wherever the layer has no business: a second ring around the input, the gradient's far halo."""
    conv_form = form(5, 4, 3, stride=2)
    x, weight, mask, bias = draw(conv_form, (22, 18), 1, 1.0)
    want, dy = torch_gradients(x, weight, mask, bias, conv_form)
    conv = LaneConv(conv_form, None, 1, 22, 18, kernel="winograd")
    xs, dys = (LaneMap.from_tensor(t, halo=3, block=block) for t, block in ((x, conv.in_block), (dy, conv.out_block)))
    for lanes in (xs, dys):
        ring = torch.ones(lanes.data.shape[2:4], dtype=torch.bool)
        ring[2:-2, 2:-2] = False
        lanes.data[:, :, ring] = torch.nan
    ys, dxs, dvalues, dbias = conv.output_map(), conv.input_map(), torch.empty(conv.kept), torch.empty(5)
    conv.forward(weight.flatten(), bias, xs, ys)
    conv.input_gradient(weight.flatten(), dys, dxs)
    conv.weight_gradient(xs, dys, dvalues, dbias)
    assert all(close(a, b) for a, b in zip((ys.to_tensor(), dxs.to_tensor(), dvalues, dbias), want, strict=True))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_computes_the_same(exit_code_of_a_child):
    conv_form = form(20, 18, 3)
    x, weight, mask, bias = draw(conv_form, (33, 40), 1, 0.1)
    dy = torch.randn(1, 20, 33, 40)
    (want, *_) = on_lanes(x, weight, mask, bias, conv_form, dy, "sparse")[1]
    conv = LaneConv(conv_form, mask, 1, 33, 40, kernel="sparse")
    xs, ys = LaneMap.from_tensor(x, conv.in_halo, block=conv.in_block), conv.output_map(halo=1)

    def same() -> bool:  # the pool's threads stayed with the parent; torch's own are not asked
        conv.forward(weight[mask], bias, xs, ys)
        return torch.equal(ys.to_tensor(), want)

    assert exit_code_of_a_child(same) == 0


@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize("stride", [1, 2])
def test_same_bits_for_any_number_of_threads(for_each_thread_count, stride, density):
    conv_form = form(24, 20, 3, stride, mode="reflect")
    x, weight, mask, bias = draw(conv_form, (33, 36), 2, density)
    dy = torch.randn(2, 24, *conv_form.out_size(33, 36))
    kernel = "winograd" if density == 1.0 else "sparse"
    results = for_each_thread_count(lambda: on_lanes(x, weight, mask, bias, conv_form, dy, kernel)[1])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_choice_can_be_asked_and_overridden(monkeypatch):
    conv_form = form(64, 64, 3)
    few, most = (draw(conv_form, (64, 64), 1, density)[2] for density in (0.05, 0.9))
    assert set(LaneConv(conv_form, few, 1, 64, 64).kernels.values()) == {"sparse"}
    assert set(LaneConv(conv_form, most, 1, 64, 64).kernels.values()) == {"winograd"}
    assert "winograd" not in LaneConv(conv_form, most, 1, 64, 64, exact=True).kernels.values()
    assert set(LaneConv(form(64, 64, 5), None, 1, 64, 64).kernels.values()) == {"winograd"}
    for size in (1, 1), (3, 40), (40, 3):  # of so few pixels that most taps reach none
        assert "winograd" not in LaneConv(form(64, 64, 5), None, 1, *size, kernel="winograd").kernels.values()
    assert set(LaneConv(form(64, 64, 5, stride=2), None, 1, 64, 64).kernels.values()) == {"dense"}
    for kernel in ("sparse", "winograd", "dense"):
        monkeypatch.setenv("LIPFAST_KERNEL", kernel)
        assert set(LaneConv(conv_form, most, 1, 64, 64).kernels.values()) == {kernel}
    monkeypatch.setenv("LIPFAST_KERNEL", "fast")
    with pytest.raises(ConfigError, match="kernel 'fast' is unknown; use one of auto, sparse, winograd, dense"):
        LaneConv(conv_form, most, 1, 64, 64)


def test_the_choice_weighs_the_size_of_the_map():
    conv_form = form(128, 128, 3)
    mask = draw(conv_form, (4, 4), 1, 0.35)[2]
    # Winograd transforms all weights, whatever the map: that pays on a large one only.
    assert set(LaneConv(conv_form, mask, 1, 128, 128).kernels.values()) == {"winograd"}
    assert LaneConv(conv_form, mask, 1, 16, 16).kernels["forward"] == "sparse"
    assert set(LaneConv(conv_form, mask, 16, 16, 16).kernels.values()) == {"winograd"}  # as many pixels in a batch


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["3x3", "3x3 stride 2 reflect", "1x1", "grouped", "dilated"])
def test_the_operator_and_its_gradients_equal_torch(name, memory_format):
    conv_form, size, batch = FORMS[name]
    x, weight, mask, bias = draw(conv_form, size, batch, 0.2)
    want, dy = torch_gradients(x, weight, mask, bias, conv_form)
    x = x.to(memory_format=memory_format).requires_grad_()
    packed, bias = SparseWeight.from_dense(weight), bias.requires_grad_()
    values = packed.values.requires_grad_()
    y = sparse_conv2d(x, packed, bias, conv_form.stride, conv_form.padding, conv_form.padding_mode,
                      conv_form.dilation, conv_form.groups)  # fmt: skip
    assert y.is_contiguous(memory_format=memory_format)
    for _ in range(2):  # a second backward finds what the first left
        gradients = torch.autograd.grad(y, (x, values, bias), dy, retain_graph=True)
        assert all(close(a, b) for a, b in zip((y.detach(), *gradients), want, strict=True))


def test_gradients_by_finite_differences():
    conv_form = form(3, 2, 3, stride=2, mode="reflect")
    x, weight, mask, bias = (t.double() if t.is_floating_point() else t for t in draw(conv_form, (5, 6), 1, 0.5))
    packed = SparseWeight.from_dense(weight, mask)

    def run(x, values, bias):
        return sparse_conv2d(x, SparseWeight(values, packed.positions, packed.shape), bias, 2, 1, "reflect")

    inputs = (x.requires_grad_(), packed.values.detach().requires_grad_(), bias.requires_grad_())
    assert torch.autograd.gradcheck(run, inputs)  # float64 runs the reference


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own
def test_operators_keep_torchs_contracts():
    x, weight, mask, bias = draw(form(4, 3, 3), (8, 9), 1, 0.4)
    packed = SparseWeight.from_dense(weight, mask)
    shape, settings_ = list(packed.shape), ([1, 1], [1, 1], "zeros", 1, 1, None)
    x.requires_grad_(), packed.values.requires_grad_(), bias.requires_grad_()
    torch.library.opcheck(
        torch.ops.lipfast.sparse_conv2d.default, (x, packed.values, packed.positions, bias, shape, *settings_)
    )
    dy, plain = torch.randn(1, 4, 8, 9), packed.values.detach()
    for needs in [True, True], [True, False], [False, True]:
        torch.library.opcheck(
            torch.ops.lipfast.sparse_conv2d_gradients.default,
            (x.detach(), dy, plain, packed.positions, needs, shape, *settings_),
        )


def test_double_backward_is_refused():
    x, weight, _, _ = draw(form(2, 2, 3), (8, 8), 1, 0.5)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(
        sparse_conv2d(x, SparseWeight.from_dense(weight), padding=1).square().sum(), x, create_graph=True
    )
    with pytest.raises(BackendError, match="sparse_conv2d: double backward is not supported"):
        dx.sum().backward()


def test_a_new_pattern_in_old_memory_is_noticed():
    x = torch.randn(1, 1, 8, 8)
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1, 1] = 1.0
    packed = SparseWeight.from_dense(weight)
    assert torch.equal(sparse_conv2d(x, packed, padding=1), x)
    packed.positions[0] = 5  # the same tensor, the tap to the right
    assert torch.equal(sparse_conv2d(x, packed, padding=1)[..., :-1], x[..., 1:])


def test_dense_form_round_trip():
    _, weight, mask, _ = draw(form(5, 4, 3), (8, 8), 1, 0.3)
    packed = SparseWeight.from_dense(weight, mask)
    assert torch.equal(packed.to_dense(), weight)
    assert len(packed.positions) == int(mask.sum())
    assert packed.density == float(mask.sum()) / mask.numel()


BAD = {
    "takes (batch, 3, height, width), got (1, 4, 8, 8)": {"x": torch.zeros(1, 4, 8, 8)},
    "x is torch.float64": {"x": torch.zeros(1, 3, 8, 8, dtype=torch.float64)},
    "bias must be (2,) torch.float32 on cpu, got (3,)": {"bias": torch.zeros(3)},
    "padding_mode 'mirror' is unknown": {"padding_mode": "mirror"},
    "stride (0, 0)": {"stride": 0},
    f"stride ({2**63}, {2**63})": {"stride": 2**63},
    f"padding ({2**40}, {2**40})": {"padding": 2**40},
    f"dilation {2**62}": {"dilation": 2**62},
    "x must be a tensor, got ndarray": {"x": torch.zeros(1, 3, 8, 8).numpy()},
    "x must be a dense tensor, got layout torch.sparse_coo": {"x": torch.zeros(1, 3, 8, 8).to_sparse()},
    "stride is one whole number or two, got (1, 1, 1)": {"stride": (1, 1, 1)},
    "reflect padding of 8 is too large for a side of 8": {"padding": 8, "padding_mode": "reflect"},
    "smaller than the kernel": {"x": torch.zeros(1, 3, 2, 2)},
    "bias must be (2,) torch.float32 on cpu, got (2,) torch.float32 on meta": {"bias": torch.zeros(2, device="meta")},
    "dilation must be a whole number, got (2, 2)": {"dilation": (2, 2)},
    "with 0 groups": {"groups": 0},
    "weight must be a SparseWeight, got Tensor": {"weight": torch.ones(2, 3, 3, 3)},
    "none of them empty, got (0, 3, 3, 3)": {"weight": SparseWeight.from_dense(torch.ones(0, 3, 3, 3))},
    "got (53,) and (54,) torch.int64": {
        "weight": SparseWeight(torch.ones(53), torch.arange(54), torch.Size((2, 3, 3, 3)))
    },
    "got (54,) and (54,) torch.int32": {
        "weight": SparseWeight(torch.ones(54), torch.arange(54).int(), torch.Size((2, 3, 3, 3)))
    },
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_answered_by_its_value(message):
    arguments = {"x": torch.zeros(1, 3, 8, 8), "weight": SparseWeight.from_dense(torch.ones(2, 3, 3, 3))} | BAD[message]
    with pytest.raises(InputError) as caught:
        sparse_conv2d(**arguments)
    assert message in str(caught.value)


def test_a_stride_may_be_a_tensor_of_one_number():
    x, weight = torch.randn(1, 3, 8, 8), SparseWeight.from_dense(torch.ones(2, 3, 3, 3))
    assert torch.equal(sparse_conv2d(x, weight, stride=torch.tensor(2)), sparse_conv2d(x, weight, stride=2))


def test_weights_of_another_kind_are_refused():
    weight = torch.ones(2, 3, 3, 3)
    with pytest.raises(InputError, match="weight must be a tensor, got ndarray"):
        SparseWeight.from_dense(weight.numpy())
    with pytest.raises(InputError, match=r"weight must be a dense tensor, got layout torch\.sparse_coo"):
        SparseWeight.from_dense(weight.to_sparse())


def test_masks_of_another_kind_are_refused():
    with pytest.raises(InputError, match=r"expected a bool mask of shape \(2, 3, 3, 3\), got torch.float32"):
        SparseWeight.from_dense(torch.ones(2, 3, 3, 3), torch.ones(2, 3, 3, 3))
    with pytest.raises(InputError, match=r"4 axes, got shape \(2, 3\)"):
        SparseWeight.from_dense(torch.ones(2, 3))


def test_bindings_check_every_map_before_a_kernel_sees_it():
    conv = LaneConv(form(2, 3, 3), None, 1, 8, 8)
    values = torch.zeros(conv.kept)
    with pytest.raises(ValueError, match="values: expected contiguous float32 of 54 elements, got float32 \\(53\\)"):
        conv.forward(values[:-1], None, conv.input_map(), conv.output_map())
    with pytest.raises(ValueError, match="x: expected 3 channels in blocks of 2 x 2 with a halo of at least 1"):
        conv.forward(values, None, LaneMap.allocate(1, 3, 8, 8), conv.output_map())
    with pytest.raises(ValueError, match="y: expected 2 channels"):
        conv.forward(values, None, conv.input_map(), LaneMap.allocate(1, 3, 8, 8))
    with pytest.raises(ValueError, match="hold 1 and 2 pictures"):
        conv.forward(values, None, conv.input_map(), LaneMap.allocate(2, 2, 8, 8))


def packed(shape=(6, 4, 3, 3), density=0.4) -> SparseWeight:
    dense = torch.randn(shape)
    return SparseWeight.from_dense(dense, torch.rand(shape) < density)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.flip(0), "positions must ascend"),
        (lambda p: torch.cat([p[:1], p[:-1]]), "positions must ascend, got (.*) after \\1"),
        (lambda p: p - p[0] - 1, r"must lie in \[0, 216\), got -1 to"),
        (lambda p: torch.cat([p[:-1], torch.tensor([216])]), r"must lie in \[0, 216\), got \d+ to 216"),
    ],
)
def test_positions_that_are_none_are_refused(change, message):
    weight = packed()
    wrong = SparseWeight(weight.values, change(weight.positions), weight.shape)
    with pytest.raises(InputError, match=message):
        sparse_conv2d(torch.randn(1, 4, 9, 9), wrong)


def test_positions_are_checked_on_gpus_when_they_are_new():
    shape = torch.Size((6, 4, 3, 3))
    wrong = packed(shape).positions.flip(0)
    tile = Facts(warps=1, lists=1, rows=1, stage=1, pitch=1)
    gpu = _cuda_sparse_conv.Kernels(SimpleNamespace(sizes=lambda *given: (0,), facts=lambda *given: tile))
    dy, settings = torch.ones(1, 6, 7, 7), ((1, 1), (0, 0), "zeros")
    with pytest.raises(InputError, match="positions must ascend"):
        gpu.weight_gradient(torch.ones(1, 4, 9, 9), dy, wrong, shape, *settings)
    with pytest.raises(InputError, match="positions must ascend"):
        triton_sparse_conv._entries(wrong, shape)


@pytest.mark.parametrize(
    ("side", "settings", "kernel"),
    [
        (9, {"stride": 300}, "reference"),
        (9, {"stride": 100_000}, "reference"),
        (33, {"dilation": 16}, "reference"),
        (9, {"padding": 40}, "reference"),
        (9, {"stride": 5}, "cpu"),
        (64, {"stride": 16}, "cpu"),  # a picture cut into patches
        (33, {"dilation": 6, "padding": 6}, "cpu"),
    ],
)
def test_what_lanes_would_blow_up_runs_in_torch(monkeypatch, side, settings, kernel):
    x, weight, picked, pick = torch.randn(1, 4, side, side), packed(), [], _dispatch.pick
    monkeypatch.setattr(_dispatch, "pick", lambda *given: picked.append(pick(*given)) or picked[-1])
    got = sparse_conv2d(x, weight, **settings)
    assert [name for name, _ in picked][:1] == [kernel]
    assert torch.allclose(got, functional.conv2d(x, weight.to_dense(), **settings), atol=1e-5)


def test_lanes_beyond_what_kernels_address_are_refused_before_they_are_made():
    with pytest.raises(InputError, match="a picture of 9 x 9 pixels takes 640025600256 floats in lanes"):
        LaneConv(form(6, 4, 3, stride=100_000), None, 1, 9, 9)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_an_empty_batch_has_gradients_of_zero(mode):
    x, weight, bias = torch.randn(0, 4, 9, 9), packed(), torch.ones(6)
    for tensor in (x, weight.values, bias):
        tensor.requires_grad_()
    y = sparse_conv2d(x, weight, bias, padding=1, padding_mode=mode)
    assert y.shape == (0, 6, 9, 9)
    y.sum().backward()
    assert all(torch.equal(tensor.grad, torch.zeros_like(tensor)) for tensor in (x, weight.values, bias))


def test_biases_of_any_layout():
    x, weight = torch.randn(1, 4, 9, 9), packed()
    for bias in torch.randn(1).expand(6), torch.randn(12)[::2]:
        expected = functional.conv2d(x, weight.to_dense(), bias)
        assert torch.allclose(sparse_conv2d(x, weight, bias), expected, atol=1e-5)


def test_another_default_dtype(request):
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    x, weight = torch.randn(1, 4, 9, 9, requires_grad=True), packed()
    mask = weight.to_dense() != 0
    torch.set_default_dtype(torch.float64)
    y = sparse_conv2d(x, weight)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.float32
    dense = ops.scatter_kept(ops.gather_kept(weight.to_dense(), mask), mask)
    assert torch.equal(dense, weight.to_dense())
    rewound = ops.prune_rewind_pack([dense], [mask], [dense], 0)
    assert torch.equal(rewound.values, weight.values)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_forked_beside_a_thread_computes_the_same(exit_code_of_a_child):
    x, weight = torch.randn(1, 4, 300, 300), packed()
    expected = sparse_conv2d(x, weight)
    stop = threading.Event()

    def run():
        while not stop.is_set():
            sparse_conv2d(x, weight)

    thread = threading.Thread(target=run)
    thread.start()

    def same() -> bool:  # numpy compares: torch's own threads stayed with the parent
        return np.array_equal(sparse_conv2d(x, weight).numpy(), expected.numpy())

    codes = [exit_code_of_a_child(same) for _ in range(5)]
    stop.set()
    thread.join()
    assert codes == [0] * 5


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # torch's own
def test_tangents_are_refused_by_the_convolution():
    x, weight = torch.randn(1, 4, 9, 9), packed()
    with forward_ad.dual_level(), pytest.raises(BackendError, match="sparse_conv2d: forward-mode differentiation"):
        sparse_conv2d(forward_ad.make_dual(x, x), weight)
    y = sparse_conv2d(x.requires_grad_(), weight)
    with forward_ad.dual_level(), pytest.raises(BackendError, match="sparse_conv2d: forward-mode differentiation"):
        y.backward(forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))


def test_another_default_device():
    x, weight = torch.randn(1, 4, 9, 9), packed()
    dense = weight.to_dense()
    mask, expected = dense != 0, functional.conv2d(x, dense)
    with torch.device("meta"):
        y = sparse_conv2d(x, weight)
        values = ops.gather_kept(dense, mask)
        rewound = ops.prune_rewind_pack([dense], [mask], [dense], 3)
    assert torch.allclose(y, expected, atol=1e-5)
    assert torch.equal(values, weight.values)
    assert {part.device.type for part in (rewound.masks[0], rewound.bits[0], rewound.values)} == {"cpu"}


def test_maps_of_several_strides_for_one_convolution():
    """The lists of taps are made anew for each, from what the first ones left."""
    torch.manual_seed(0)
    mask = torch.rand(20, 37, 3, 3) < 0.2
    form = ConvForm(20, 37, (3, 3), 1, (1, 1), "reflect")
    conv = LaneConv(form, mask, 1, 19, 26, kernel="sparse")
    x = torch.randn(1, 37, 19, 26, requires_grad=True)
    weight = (torch.randn(20, 37, 3, 3) * mask).requires_grad_()
    y = functional.conv2d(functional.pad(x, [1] * 4, mode="reflect"), weight)
    dy = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    values = weight.detach()[mask]
    for halo in (1, 3, 2, 1):
        xs = LaneMap.from_tensor(x.detach(), halo, "reflect", 1)
        dys = LaneMap.from_tensor(dy, max(conv.gradient_halo, halo))
        ys, dxs = conv.output_map(), LaneMap.allocate(1, 37, 19, 26, halo)
        dvalues = torch.empty_like(values)
        conv.forward(values, None, xs, ys)
        conv.input_gradient(values, dys, dxs)
        conv.weight_gradient(xs, dys, dvalues, None)
        torch.testing.assert_close(ys.to_tensor(), y.detach(), rtol=0, atol=1e-4)
        torch.testing.assert_close(dxs.to_tensor(), dx, rtol=0, atol=1e-4)
        torch.testing.assert_close(dvalues, dw[mask], rtol=0, atol=1e-3)
