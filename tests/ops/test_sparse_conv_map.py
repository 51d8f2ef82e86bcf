"""Sparse convolution of maps that stay in lanes: against the same layers on ordinary tensors, in float64."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from lipfast.errors import BackendError, InputError
from lipfast.ops import LaneMap, SparseWeight, sparse_conv2d

TOLERANCE = 1e-5  # of float32 sums, Winograd's among them (tests/ops/test_sparse_conv.py)


def pruned(*shape: int, density: float = 0.4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < density)


def relu(x: LaneMap) -> LaneMap:
    """What halos repeat is what they repeated before."""
    return dataclasses.replace(x, data=x.data.relu())


LAYERS = {  # weight, size, batch, settings
    "3x3": ((20, 18, 3, 3), (33, 40), 3, {"padding": 1}),
    "3x3 reflect": ((5, 7, 3, 3), (17, 13), 1, {"padding": 1, "padding_mode": "reflect"}),
    "3x3 replicate, smaller than the lanes": ((9, 4, 3, 3), (3, 2), 1, {"padding": 1, "padding_mode": "replicate"}),
    "3x3 circular": ((4, 3, 3, 3), (16, 16), 17, {"padding": 1, "padding_mode": "circular"}),
    "3x3 without padding": ((4, 5, 3, 3), (16, 19), 1, {}),
    "3x3 stride 2": ((6, 5, 3, 3), (16, 32), 1, {"padding": 1, "stride": 2}),
    "1x1": ((17, 33, 1, 1), (16, 20), 1, {}),
    "one pixel": ((3, 2, 3, 3), (1, 1), 2, {"padding": 1}),
    "5x5 dilated": ((3, 4, 5, 5), (18, 17), 1, {"padding": 4, "dilation": 2}),
    "7x1": ((4, 3, 7, 1), (19, 16), 1, {"padding": (3, 0)}),
    "grouped": ((8, 3, 3, 3), (12, 9), 2, {"padding": 1, "groups": 2}),
}


def first_map(x: Tensor, halo: int, settings: dict, block=None) -> LaneMap:
    mode = settings.get("padding_mode", "zeros")
    return LaneMap.from_tensor(x, halo, mode, settings["padding"] if mode != "zeros" else 0, block)


def torchs(x: Tensor, weight: Tensor, bias: Tensor, settings: dict) -> Tensor:
    settings = dict(settings)
    mode, padding = settings.pop("padding_mode", "zeros"), settings.pop("padding", 0)
    rows, columns = padding if isinstance(padding, tuple) else (padding, padding)
    mode = "constant" if mode == "zeros" else mode
    padded = functional.pad(x, (columns, columns, rows, rows), mode=mode) if rows or columns else x
    return functional.conv2d(padded, weight, bias, **settings)


def close(got: Tensor, want: Tensor) -> bool:
    return float((got - want).norm()) <= TOLERANCE * max(float(want.norm()), want.numel() ** 0.5)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_torch_on_every_instruction_set(isa, name, backend):
    shape, size, batch, settings = LAYERS[name]
    weight, bias = pruned(*shape).requires_grad_(), torch.linspace(-1, 1, shape[0], requires_grad=True)
    x = torch.randn(batch, shape[1] * settings.get("groups", 1), *size, requires_grad=True)
    lanes = first_map(x, 5, settings)
    y = sparse_conv2d(lanes, SparseWeight.from_dense(weight), bias, **settings, backend=backend)
    double = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    want = torchs(*double, settings)
    assert (y.height, y.width, y.halo) == (*want.shape[2:], 5)
    dy = torch.randn(want.shape)
    got = torch.autograd.grad(y.to_tensor(), (x, weight, bias), dy)
    wanted = torch.autograd.grad(want, double, dy.double())
    assert close(y.to_tensor().detach(), want.detach())
    assert close(got[0], wanted[0])
    assert close(got[1], wanted[1] * (weight.detach() != 0))
    assert close(got[2], wanted[2])


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_layers_follow_each_other_as_they_are(mode):
    x = torch.randn(2, 5, 13, 18, requires_grad=True)
    weights = [pruned(7, 5, 3, 3).requires_grad_(), pruned(7, 7, 3, 3, seed=1).requires_grad_()]
    packed = [SparseWeight.from_dense(weight) for weight in weights]
    settings = {"padding": 1, "padding_mode": mode}
    lanes, plain = first_map(x, 1, settings), x
    for weight in packed:
        lanes = relu(sparse_conv2d(lanes, weight, **settings))
        plain = sparse_conv2d(plain, weight, **settings).relu()
    both = sparse_conv2d(lanes, packed[1], **settings), sparse_conv2d(plain, packed[1], **settings)
    total = both[0].to_tensor() + lanes.to_tensor(), both[1] + plain
    assert torch.equal(*total)
    dy = torch.randn(2, 7, 13, 18)
    got, want = (torch.autograd.grad(y, (x, *weights), dy, retain_graph=True) for y in total)
    assert all(close(a, b) for a, b in zip(got, want, strict=True))


def test_what_is_not_asked_for_has_no_gradient():
    x, weight = torch.randn(1, 3, 8, 8), pruned(4, 3, 3, 3).requires_grad_()
    y = sparse_conv2d(LaneMap.from_tensor(x, 1), SparseWeight.from_dense(weight), padding=1)
    y.to_tensor().sum().backward()
    assert weight.grad is not None
    lanes = LaneMap.from_tensor(x.requires_grad_(), 1)
    y = sparse_conv2d(lanes, SparseWeight.from_dense(weight.detach()), padding=1)
    y.to_tensor().sum().backward()
    assert x.grad is not None


def test_gradients_of_halos_and_dead_pixels_are_left_out():
    x, weight = torch.randn(1, 3, 9, 10, requires_grad=True), SparseWeight.from_dense(pruned(4, 3, 3, 3))
    y = sparse_conv2d(LaneMap.from_tensor(x, 1), weight, padding=1)
    (got,) = torch.autograd.grad(y.data, x, torch.ones_like(y.data))  # expanded or not, and ones in the halo
    (want,) = torch.autograd.grad(sparse_conv2d(x, weight, padding=1).sum(), x)
    assert close(got, want)
    y = sparse_conv2d(LaneMap.from_tensor(x, 1), weight, padding=1)
    (got,) = torch.autograd.grad(y.data.sum(), x)
    assert close(got, want)


@pytest.mark.filterwarnings("ignore:Input .* requires gradient and is not a double precision")  # maps are float32
def test_gradients_by_finite_differences():
    x, bias = torch.randn(1, 2, 5, 6, requires_grad=True), torch.randn(3, requires_grad=True)
    packed = SparseWeight.from_dense(pruned(3, 2, 3, 3))
    settings = {"stride": 1, "padding": 1, "padding_mode": "reflect"}

    def run(x, values, bias):
        weight = SparseWeight(values, packed.positions, packed.shape)
        return sparse_conv2d(first_map(x, 1, settings), weight, bias, **settings).to_tensor()

    # Linear in each argument, so a wide step errs by rounding alone: 1e-6 of sums of size 10 over a step of 1.
    inputs = (x, packed.values.detach().requires_grad_(), bias)
    assert torch.autograd.gradcheck(run, inputs, eps=0.5, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own
@pytest.mark.parametrize(("stride", "needs"), [(1, [True, True]), (2, [True, False]), (1, [False, True])])
def test_operators_keep_torchs_contracts(stride, needs):
    packed = SparseWeight.from_dense(pruned(4, 3, 3, 3))
    x = LaneMap.from_tensor(torch.randn(2, 3, 64, 64), 1, block=(16, 16))
    form = ([4, 3, 3, 3], stride, [1, 1], "zeros", 1, 1, None)
    arguments = (packed.positions, torch.randn(4, requires_grad=True), [64, 64, 1], *form)
    values, data = packed.values.requires_grad_(), x.data.clone().requires_grad_()
    torch.library.opcheck(torch.ops.lipfast.sparse_conv2d_map.default, (data, values, *arguments))
    y = sparse_conv2d(x, packed, stride=stride, padding=1).data.detach()
    arguments = (packed.positions, needs, [64, 64, 1], *form)
    torch.library.opcheck(
        torch.ops.lipfast.sparse_conv2d_map_gradients.default, (x.data, y, values.detach(), *arguments)
    )


def test_same_bits_for_any_number_of_threads(for_each_thread_count):
    x, weight = torch.randn(2, 20, 40, 33, requires_grad=True), pruned(20, 20, 3, 3).requires_grad_()

    def run():
        y = sparse_conv2d(LaneMap.from_tensor(x, 1), SparseWeight.from_dense(weight), padding=1).to_tensor()
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, weight))]

    first, *others = for_each_thread_count(run)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_halo_that_is_filled_anew_before_the_backward_pass_is_noticed():
    x, weight = LaneMap.from_tensor(torch.randn(1, 3, 8, 8), 1), pruned(4, 3, 3, 3).requires_grad_()
    y = sparse_conv2d(x, SparseWeight.from_dense(weight), padding=1)
    x.fill_halo("reflect", 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.to_tensor().sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # torch's own
def test_double_backward_and_tangents_are_refused():
    x, weight = torch.randn(1, 3, 8, 8, requires_grad=True), SparseWeight.from_dense(pruned(4, 3, 3, 3))
    lanes = LaneMap.from_tensor(x, 1)
    y = sparse_conv2d(lanes, weight, padding=1).data.square().sum()
    (gradient,) = torch.autograd.grad(y, lanes.data, create_graph=True)
    with pytest.raises(BackendError, match="sparse_conv2d: double backward is not supported"):
        gradient.sum().backward()
    y = sparse_conv2d(LaneMap.from_tensor(x, 1), weight, padding=1).to_tensor().square().sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()
    with forward_ad.dual_level(), pytest.raises(BackendError, match="forward-mode"):
        LaneMap.from_tensor(forward_ad.make_dual(x.detach(), torch.ones_like(x)), 1)


def test_an_empty_batch_has_gradients_of_zero():
    x, weight = torch.randn(0, 3, 8, 8, requires_grad=True), pruned(4, 3, 3, 3).requires_grad_()
    y = sparse_conv2d(LaneMap.from_tensor(x, 1), SparseWeight.from_dense(weight), padding=1).to_tensor()
    assert y.shape == (0, 4, 8, 8)
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert dx.shape == x.shape
    assert torch.equal(dweight, torch.zeros_like(weight))


BAD = {
    "holds (batch, channels, rows, columns, 16) float32, got (1, 3, 4, 4, 16) torch.float64": (
        LaneMap(torch.zeros(1, 3, 4, 4, 16, dtype=torch.float64), 8, 8, 1),
        {},
    ),
    "got (3, 4, 4, 16) torch.float32": (LaneMap(torch.zeros(3, 4, 4, 16), 8, 8, 1), {}),
    "reads a halo of 1 around each block, the map has 0": (LaneMap.from_tensor(torch.zeros(1, 3, 8, 8)), {}),
    "takes (batch, 3, height, width), got (2, 4, 8, 9)": (LaneMap.from_tensor(torch.zeros(2, 4, 8, 9), 1), {}),
    "one stride for both axes, got (1, 2)": (LaneMap.from_tensor(torch.zeros(1, 3, 8, 8), 1), {"stride": (1, 2)}),
    "padding differs by side, (1, 0)": (
        LaneMap.from_tensor(torch.zeros(1, 3, 8, 8), 2),
        {"padding": (1, 0), "padding_mode": "reflect"},
    ),
    "blocks of (3, 3) do not suit an input of 9 x 9": (
        LaneMap.from_tensor(torch.zeros(1, 3, 9, 9), 1),
        {"stride": 2, "padding": 1},
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_answered_by_its_value(message):
    x, settings = BAD[message]
    with pytest.raises(InputError) as caught:
        sparse_conv2d(x, SparseWeight.from_dense(torch.ones(2, 3, 3, 3)), **{"padding": 1, **settings})
    assert message in str(caught.value)


def test_a_map_in_larger_blocks_takes_a_stride():
    x, weight = torch.randn(1, 3, 9, 9), SparseWeight.from_dense(pruned(4, 3, 3, 3))
    y = sparse_conv2d(LaneMap.from_tensor(x, 1, block=(4, 4)), weight, stride=2, padding=1)
    assert y.block == (2, 2)
    assert close(y.to_tensor(), sparse_conv2d(x, weight, stride=2, padding=1))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_an_output_too_small_for_its_padding_has_zeros_around(backend):
    x, weight = torch.randn(1, 3, 4, 4), SparseWeight.from_dense(pruned(4, 3, 5, 5))
    settings = {"stride": 2, "padding": 2, "padding_mode": "reflect"}
    y = sparse_conv2d(first_map(x, 2, settings, (2, 2)), weight, **settings, backend=backend)
    assert close(y.to_tensor(), sparse_conv2d(x, weight, **settings))
    want = LaneMap.from_tensor(y.to_tensor(), 2)
    assert torch.equal(y.data, want.data)
