"""A pruned convolution with each direction in another kernel, and the rule that names them."""

import dataclasses
import itertools
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lipfast.ops import _gpu_rule, reference
from lipfast.ops.pruned_conv import Pattern, PrunedForm, choose_kernels, pruned_conv2d

ROOT = Path(__file__).parents[2]
fit_gpu_rule = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks/fit_gpu_rule.py")))
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


@pytest.mark.parametrize("kernels", ALL, ids=lambda kernels: " ".join(kernels.values()))
def test_a_dense_weight_that_is_given_takes_the_gradient_of_dense_kernels(kernels):
    parts, pattern, mask = draw((1, 2, 7, 6), (3, 2, 3, 3))
    form = PrunedForm(padding=(1, 1), padding_mode="reflect")
    dense = torch.zeros(3, 2, 3, 3, dtype=torch.float64).masked_scatter(mask, parts[1].detach()).requires_grad_()
    want, got = (
        pruned_conv2d(*parts, pattern, form, kernels),
        pruned_conv2d(*parts, pattern, form, kernels, dense=dense),
    )
    torch.testing.assert_close(got, want)
    dy = torch.randn_like(want)
    wanted = torch.autograd.grad(want, parts, dy)
    dx, values, bias, whole = torch.autograd.grad(got, (*parts, dense), dy, allow_unused=True)
    assert (values is None, whole is None) == (
        (False, True) if kernels["weight_gradient"] == "sparse" else (True, False)
    )
    torch.testing.assert_close((dx, whole[mask] if values is None else values, bias), wanted)


def test_a_bias_that_cancels_has_no_gradient():
    parts, pattern, _ = draw((2, 2, 5, 4), (3, 2, 3, 3))
    form, kernels = PrunedForm(), dict.fromkeys(DIRECTIONS, "dense")

    def gradients(**given):
        y = torch.nn.functional.batch_norm(
            pruned_conv2d(*parts, pattern, form, kernels, **given), None, None, training=True
        )
        return torch.autograd.grad((y * torch.arange(y.numel()).view(y.shape)).sum(), parts)

    (*others, bias), (*plain, summed) = gradients(bias_cancels=True), gradients()
    assert float(summed.abs().max()) < 1e-10 < float(plain[1].abs().max())
    assert not bias.any()
    torch.testing.assert_close(others, plain)


def test_groups_and_dilation_run_densely():
    mask = torch.rand(4, 2, 3, 3) < 0.01
    form = PrunedForm(dilation=2, groups=2)
    assert set(choose(mask, form, (1, 4, 60, 60)).values()) == {"dense"}
    parts, pattern, mask = draw((1, 4, 9, 9), (4, 2, 3, 3))
    got = pruned_conv2d(*parts, pattern, form, dict.fromkeys(DIRECTIONS, "dense"))
    weight = torch.zeros(4, 2, 3, 3, dtype=torch.float64).masked_scatter(mask, parts[1])
    torch.testing.assert_close(got, torch.nn.functional.conv2d(parts[0], weight, parts[2], dilation=2, groups=2))


def choose(mask, form, out):
    return choose_kernels(Pattern.of(mask, CPU), form, torch.Size(out), device=CPU, precision="ieee")


# The rule.

LAYER = _gpu_rule.Layer((128, 128, 3, 3), (1, 128, 128, 128), (1, 1), 0.1)


def chosen(layer=LAYER, *, density=0.1, library="cuda", precision="ieee"):
    layer = dataclasses.replace(layer, density=density)
    return tuple(_gpu_rule.choose(layer, library=library, precision=precision).values())


def row(form, direction, precision, work=128**2 * 128**2, library="cuda"):
    rows = json.loads(_gpu_rule.TABLE.read_text())["libraries"][library][form][direction][precision]
    return next(row for row in rows if row["work"] == work)


@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
def test_a_direction_is_sparse_below_the_measured_density(precision):
    for place, direction in enumerate(DIRECTIONS):
        known = row("3x3", direction, precision)
        assert chosen(density=known["sparse_below"] - 1e-4, precision=precision)[place] == (
            "sparse" if known["sparse_below"] > 0 else known["dense"]
        )
        assert chosen(density=known["sparse_below"], precision=precision)[place] == known["dense"]


def test_denser_is_never_sparser():
    for library, precision in itertools.product(("cuda", "triton"), ("ieee", "tf32", "bf16")):
        sparse = [
            sum(kernel == "sparse" for kernel in chosen(density=d / 100, library=library, precision=precision))
            for d in range(101)
        ]
        assert sparse == sorted(sparse, reverse=True)
        assert sparse[-1] == 0
    assert chosen(density=0.01) == ("sparse", "sparse", "sparse")


def test_a_backend_without_gpu_kernels_runs_densely():
    assert chosen(density=0.01, library="reference") == ("dense", "dense", "dense")


def test_a_layer_takes_the_row_with_the_nearest_work():
    wide = dataclasses.replace(LAYER, shape=(512, 512, 3, 3), output_size=(1, 512, 31, 33))  # work of 128 at 128 px
    for place, direction in enumerate(DIRECTIONS):
        limit = row("3x3", direction, "ieee")["sparse_below"]
        assert chosen(wide, density=limit - 1e-4)[place] == "sparse"
        assert chosen(wide, density=limit)[place] == "dense"


@pytest.mark.parametrize(
    ("shape", "stride", "form"),
    [
        ((8, 8, 5, 5), (1, 1), "3x3"),
        ((8, 8, 1, 1), (1, 1), "1x1"),
        ((8, 8, 1, 7), (1, 1), "3x3"),
        ((8, 8, 3, 3), (2, 2), "3x3 stride 2"),
        ((8, 8, 3, 3), (2, 1), "3x3 stride 2"),
    ],
)
def test_layers_that_were_not_measured_take_the_most_alike(shape, stride, form):
    assert dataclasses.replace(LAYER, shape=shape, stride=stride).form == form


# How it is fitted.

SPARSE = {0.02: 10.0, 0.1: 30.0, 0.2: 60.0}


@pytest.mark.parametrize(
    ("dense", "density"), [(20.0, 0.06), (45.0, 0.15), (60.0, 0.2), (99.0, 0.2), (10.0, 0.02), (7.5, 0.01), (5.0, 0.0)]
)
def test_where_sparse_breaks_even(dense, density):
    assert fit_gpu_rule.break_even(dense, SPARSE) == pytest.approx(density)


def test_the_rule_is_what_the_stored_timings_say():
    stored = [json.loads(line) for line in (ROOT / "docs/results/gpu.jsonl").read_text().splitlines()]
    assert json.loads(_gpu_rule.TABLE.read_text())["libraries"] == fit_gpu_rule.fit(stored)
