"""A pruned convolution with each direction in another kernel, and the rule that names them."""

import dataclasses
import itertools
import json

import pytest
import torch

from lipfast.ops import _gpu_rule, reference
from lipfast.ops._cuda_library import FILLING_BLOCKS
from lipfast.ops.pruned_conv import Pattern, PrunedForm, choose_kernels, pruned_conv2d

CPU = torch.device("cpu")
FORMS = [  # input, weight, form
    ((2, 3, 9, 8), (4, 3, 3, 3), PrunedForm((1, 1), (1, 1), "reflect")),
    ((1, 3, 9, 7), (5, 3, 3, 2), PrunedForm((2, 1), (1, 0))),
    ((1, 5, 6, 7), (3, 5, 1, 1), PrunedForm()),
    ((1, 2, 11, 12), (3, 2, 3, 3), PrunedForm((2, 2), (2, 2), "circular")),
]
DIRECTIONS = _gpu_rule.DIRECTIONS
ALL = [
    {"forward": forward, "input_gradient": back, "weight_gradient": weight}
    for forward, back, weight in itertools.product(("sparse", "dense", "masked"), *2 * [("sparse", "dense")])
]


@pytest.fixture(autouse=True)
def by_the_reference(monkeypatch):
    """Which has float64; tests/gpu runs the same directions in Triton."""
    monkeypatch.setenv("LIPFAST_BACKEND", "reference")


def draw(size, shape, dtype=torch.float64):
    torch.manual_seed(0)
    mask = torch.rand(shape) < 0.4
    x, values, bias = torch.randn(size), torch.randn(int(mask.sum())), torch.randn(shape[0])
    parts = [part.to(dtype).requires_grad_() for part in (x, values, bias)]
    return parts, Pattern.of(mask, CPU), mask


@pytest.mark.parametrize("kernels", ALL, ids=lambda kernels: " ".join(kernels.values()))
@pytest.mark.parametrize(("size", "shape", "form"), FORMS)
def test_every_choice_computes_the_same(size, shape, form, kernels):
    parts, pattern, mask = draw(size, shape)
    weight = torch.zeros(shape, dtype=torch.float64).masked_scatter(mask, parts[1])
    padding = (form.stride, form.padding, form.padding_mode)
    want = reference.dense_conv2d(parts[0], weight, parts[2], *padding)
    got = pruned_conv2d(*parts, pattern, form, kernels)
    torch.testing.assert_close(got, want)
    dy = torch.randn_like(want)
    for mine, theirs in zip(*(torch.autograd.grad(y, parts, dy) for y in (got, want)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradients_are_the_derivatives():
    parts, pattern, _ = draw((1, 2, 5, 4), (3, 2, 3, 3))
    form, kernels = PrunedForm((2, 2), (1, 1), "reflect"), dict.fromkeys(DIRECTIONS, "sparse")
    assert torch.autograd.gradcheck(lambda *given: pruned_conv2d(*given, pattern, form, kernels), parts)


def test_groups_and_dilation_run_densely():
    mask = torch.rand(4, 2, 3, 3) < 0.01
    form = PrunedForm(dilation=2, groups=2)
    assert set(choose(mask, form, (1, 4, 64, 64), (1, 4, 60, 60)).values()) == {"dense"}
    parts, pattern, mask = draw((1, 4, 9, 9), (4, 2, 3, 3))
    got = pruned_conv2d(*parts, pattern, form, dict.fromkeys(DIRECTIONS, "dense"))
    weight = torch.zeros(4, 2, 3, 3, dtype=torch.float64).masked_scatter(mask, parts[1])
    torch.testing.assert_close(got, torch.nn.functional.conv2d(parts[0], weight, parts[2], dilation=2, groups=2))


def choose(mask, form, size, out):
    sizes = torch.Size(size), torch.Size(out)
    return choose_kernels(Pattern.of(mask, CPU), form, *sizes, device=CPU, precision="ieee")


# The rule.

LAYER = _gpu_rule.Layer((128, 128, 3, 3), (1, 128, 256, 256), (1, 128, 256, 256), (1, 1), 0.1)


def chosen(layer=LAYER, *, density=0.1, target="sm_90", library="cuda", precision="ieee"):
    layer = dataclasses.replace(layer, density=density)
    return tuple(_gpu_rule.choose(layer, target=target, library=library, precision=precision).values())


def row(target, form, direction):
    return json.loads(_gpu_rule.TABLE.read_text())[target]["cuda"][form][direction]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("precision", "rival"), [("ieee", "fp32"), ("tf32", "tf32")])
def test_a_direction_is_sparse_up_to_half_its_break_even_density(target, precision, rival):
    for place, direction in enumerate(DIRECTIONS):
        limit = 0.5 * row(target, "3x3 large", direction)[rival]
        below, above = (chosen(density=d, target=target, precision=precision)[place] for d in (limit - 1e-4, limit))
        assert (below, above) == ("sparse", "dense"), direction


def test_denser_is_never_sparser():
    for library, target in itertools.product(("cuda", "triton"), ("sm_80", "sm_90")):
        sparse = [
            sum(kernel == "sparse" for kernel in chosen(density=d / 100, target=target, library=library))
            for d in range(101)
        ]
        assert sparse == sorted(sparse, reverse=True)
        assert sparse[0] == 3
        assert sparse[-1] == 0


def test_bf16_factors_go_to_the_masked_convolution_forward():
    assert chosen(density=0.5, precision="bf16") == ("masked", "dense", "dense")
    assert chosen(density=0.01, precision="bf16")[1:] == ("sparse", "sparse")  # against TF32


def test_a_backend_without_gpu_kernels_runs_densely():
    assert chosen(density=0.01, library="reference") == ("dense", "dense", "dense")


def test_small_maps_count_as_small_tiles():
    """A block covers 16 x 32 pixels and 32 channels (48 for 1x1): the table's other rows hold below 128 blocks."""
    small = dataclasses.replace(LAYER, input_size=(1, 128, 64, 64), output_size=(1, 128, 64, 64))
    assert _gpu_rule.fills_a_gpu(LAYER, "forward")
    assert not _gpu_rule.fills_a_gpu(small, "forward")
    batch = dataclasses.replace(small, input_size=(4, 128, 64, 64))
    assert _gpu_rule.fills_a_gpu(batch, "forward") == (FILLING_BLOCKS <= 8 * 4 * 4)
    limit = 0.5 * row("sm_90", "3x3 small", "forward")["fp32"]
    assert chosen(small, density=limit - 1e-4)[0] == "sparse"
    assert chosen(small, density=limit)[0] == "dense"


def test_input_gradients_of_stride_2_have_rows_of_their_own():
    strided = dataclasses.replace(LAYER, output_size=(1, 128, 128, 128), stride=(2, 2))
    rows = [_gpu_rule.break_even(strided, direction, "sm_90", "cuda") for direction in DIRECTIONS]
    assert rows == [row("sm_90", "3x3 stride 2 large", direction) for direction in DIRECTIONS]
    assert rows[0] != rows[1]
    # Its kernel makes four parity classes of a quarter of the pixels: 8 tiles times 11 groups of 48 for 512 of them.
    half = dataclasses.replace(strided, input_size=(1, 128, 128, 128), output_size=(1, 128, 64, 64))
    assert not _gpu_rule.fills_a_gpu(half, "input_gradient")


def test_layers_without_a_cuda_kernel_have_tritons_bounds():
    five = dataclasses.replace(LAYER, shape=(128, 128, 5, 5))
    uneven = dataclasses.replace(LAYER, stride=(2, 1))
    for layer, direction in itertools.product((five, uneven), DIRECTIONS):
        bounds = [_gpu_rule.break_even(layer, direction, "sm_90", library) for library in ("cuda", "triton")]
        assert bounds[0] == bounds[1]
    mirrored = _gpu_rule.break_even(five, "input_gradient", "sm_90", "triton")
    assert mirrored == _gpu_rule.break_even(five, "forward", "sm_90", "triton")
    assert mirrored["fp32"] > _gpu_rule.break_even(uneven, "input_gradient", "sm_90", "triton")["fp32"]


@pytest.mark.parametrize(
    ("capability", "hip", "target"), [((8, 0), None, "sm_80"), ((8, 6), None, "sm_90"), ((8, 0), "6", "sm_90")]
)
def test_whose_bounds_count(monkeypatch, capability, hip, target):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert _gpu_rule.target_of(torch.device("cuda", 1)) == target
    assert _gpu_rule.target_of(CPU) == "sm_90"
