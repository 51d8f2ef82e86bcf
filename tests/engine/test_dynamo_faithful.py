"""torch.compile(backend="lipfast") computes what eager torch does in the less usual ways to use weights and tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

pytestmark = pytest.mark.filterwarnings("ignore:lipfast")  # of operators that run in torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def picture() -> Tensor:
    return torch.randn(2, 8, 9, 10)


def weight_and_masks() -> tuple[nn.Parameter, Tensor, Tensor]:
    first, second = ((torch.rand(8, 8, 3, 3) > 0.6).float() for _ in range(2))
    return nn.Parameter(torch.randn(8, 8, 3, 3)), first, second


def assert_same(function, fast, x: Tensor, *parameters: Tensor) -> None:
    """Results with and without gradients, and the gradients."""
    expected, got = function(x), fast(x)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-3)
    if parameters:
        wanted, found = (torch.autograd.grad(y.sum(), parameters) for y in (expected, got))
        for a, b in zip(found, wanted, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-2)
    with torch.no_grad():
        assert torch.allclose(fast(x), function(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("second", ["whole", "another mask", "the same mask"])
def test_a_weight_that_is_read_twice(second):
    w, mask, other = weight_and_masks()

    def function(x):
        factor = {"whole": 1.0, "another mask": other, "the same mask": mask}[second]
        return F.conv2d(F.conv2d(x, w * mask, padding=1), w * factor, padding=1)

    assert_same(function, torch.compile(function, backend="lipfast"), picture(), w)


def test_a_mask_whose_ones_become_other_numbers():
    w, mask, _ = weight_and_masks()

    def function(x):
        return F.conv2d(x, w * mask, padding=1)

    fast, x = torch.compile(function, backend="lipfast"), picture()
    assert_same(function, fast, x, w)
    mask.mul_(0.5)
    assert_same(function, fast, x, w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_masked_weights_that_are_converted(dtype):
    w = nn.Parameter(torch.randn(8, 8, 3, 3, dtype=dtype))
    mask = (torch.rand(8, 8, 3, 3) > 0.6).float()

    def function(x):
        return F.conv2d(x, w.to(torch.float32) * mask, padding=1)

    assert_same(function, torch.compile(function, backend="lipfast"), picture())


def test_statistics_that_are_read_after_they_moved():
    first, second = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)

    def function(x, mean, variance):
        y = F.batch_norm(5 * first(x), mean, variance, training=True)
        return F.batch_norm(second(y), mean, variance, training=False)

    x, fast = picture(), torch.compile(function, backend="lipfast")
    statistics = [(torch.zeros(8), torch.ones(8)) for _ in range(2)]
    assert torch.allclose(fast(x, *statistics[0]), function(x, *statistics[1]), atol=1e-4)
    assert torch.allclose(statistics[0][0], statistics[1][0], atol=1e-5)


def test_the_gradient_of_clamp_at_its_bounds():
    conv = nn.Conv2d(8, 8, 3)
    with torch.no_grad():
        conv.weight[:4] = 0  # results of exactly 0
        conv.bias.zero_()

    def function(x):
        return torch.clamp(conv(x), 0, 6)

    assert_same(function, torch.compile(function, backend="lipfast"), picture(), conv.weight, conv.bias)


@pytest.mark.parametrize("other", ["frozen", "view"])
def test_results_that_need_no_gradient_beside_one_that_does(other):
    frozen, student, x = nn.Conv2d(8, 8, 3).requires_grad_(False), nn.Conv2d(8, 8, 3), picture()

    def function(x):
        return (frozen(x) if other == "frozen" else x.view(2, -1)), student(x)

    results = [torch.compile(function, backend="lipfast")(x), function(x)]
    assert [[y.requires_grad for y in pair] for pair in results] == [[False, True]] * 2
    gradients = [torch.autograd.grad((y.square().sum() + t.sum()), student.weight)[0] for t, y in results]
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("write", ["part", "all", "sum"])
def test_writes_into_tensors_made_on_the_inputs_device(write):
    conv = nn.Conv2d(8, 8, 3, padding=1)

    def function(x):
        out = torch.zeros(x.shape, device=x.device)
        if write == "part":
            out[:, :, 1:-1] = x[:, :, 1:-1]
        elif write == "all":
            out.fill_(2.0)
        else:
            out.add_(x)
        return conv(out)

    assert_same(function, torch.compile(function, backend="lipfast"), picture(), conv.weight)


def derivative(w, x):
    return torch.func.grad(lambda z: F.conv2d(z, w).relu().sum())(x)


def tangent(w, x):
    return torch.func.jvp(lambda z: F.conv2d(z, w).relu(), (x,), (x,))[1]


def over_items(w, x):
    return torch.vmap(lambda z: F.conv2d(z[None], w).relu())(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own, for jvp
@pytest.mark.parametrize("function", [derivative, tangent, over_items])
def test_graphs_that_take_derivatives_inside_run_in_torch(function):
    w = torch.randn(8, 8, 3, 3)
    fast = torch.compile(lambda x: function(w, x), backend="lipfast")
    x = picture()
    with pytest.warns(UserWarning, match="a graph runs in torch: it takes derivatives"):
        got = fast(x)
    assert torch.allclose(got, function(w, x), atol=1e-4)


def test_modes_are_refused():
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="lipfast has no mode 'max-autotune'"):
        torch.compile(nn.Conv2d(8, 8, 3), backend="lipfast", mode="max-autotune")(picture())


@pytest.mark.parametrize("kind", ["depthwise", "linear", "large kernel"])
def test_pruned_layers_that_stay_in_torch_keep_their_masks(kind):
    first = {
        "depthwise": lambda: nn.Conv2d(8, 8, 3, groups=8),
        "linear": lambda: nn.Linear(10, 6),
        "large kernel": lambda: nn.Conv2d(8, 8, 9, padding=4),
    }[kind]()
    model = nn.Sequential(first, nn.Conv2d(8, 4, 1))
    for layer in model:
        prune.random_unstructured(layer, "weight", 0.5)
    fast = torch.compile(model, backend="lipfast")
    x = picture()
    for _ in range(2):
        expected, got = model(x), fast(x)
        assert torch.allclose(got, expected, atol=1e-5)
        parameters = [first.weight_orig, model[1].weight_orig]
        wanted, found = (torch.autograd.grad(y.square().sum(), parameters) for y in (expected, got))
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, wanted, strict=True))
        with torch.no_grad():
            first.weight_mask.copy_(1 - first.weight_mask)  # changes sides
