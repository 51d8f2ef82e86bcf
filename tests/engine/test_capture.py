"""Recording: what shapes the rules of `capture` give, when they leave it to torch, and what that saves."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lipfast.engine import capture

X = torch.randn(2, 4, 7, 5)
ROW = torch.randn(4)
W = torch.randn(6, 4, 3, 2)
KNOWN = {
    "norm": (F.batch_norm, (X, ROW, ROW.abs()), {"training": True}),
    "norm, evaluation, affine": (F.batch_norm, (X, ROW, ROW.abs(), ROW, ROW, False, 0.1, 1e-3), {}),
    "norm of places": (F.layer_norm, (X[:, :, 0].mT, (4,), ROW, ROW), {"eps": 1e-3}),
    "norm of places over two axes": (F.layer_norm, (X, X.shape[2:]), {}),
    "leaky relu": (F.leaky_relu, (X, 0.3), {}),
    "relu": (F.relu, (X,), {"inplace": False}),
    "silu": (F.silu, (X.double(),), {}),
    "sigmoid": (torch.sigmoid, (X,), {}),
    "tanh": (torch.tanh, (X[0],), {}),
    "conv": (torch.conv2d, (X, W, torch.randn(6)), {"padding": 1}),
    "conv, uneven": (torch.conv2d, (X, W, None, (2, 1), (1, 2), (1, 2)), {}),
    "conv, one step in a sequence": (torch.conv2d, (X, W, None, [2]), {}),
    "conv, groups": (torch.conv2d, (X, torch.randn(6, 2, 3, 3), None, 2, 0, 1, 2), {}),
    "linear": (F.linear, (X[0, :, 0], torch.randn(3, 5), torch.randn(3)), {}),
    "linear, four axes": (F.linear, (X, torch.randn(3, 5)), {}),
    "linear, one axis": (F.linear, (ROW, torch.randn(3, 4)), {}),
    "resize by scale": (F.interpolate, (X,), {"scale_factor": 1.7, "mode": "bilinear", "align_corners": True}),
    "resize by scales": (F.interpolate, (X, None, (2, 0.5)), {"recompute_scale_factor": True}),
    "resize to size": (F.interpolate, (X, (9, 3)), {"mode": "bilinear"}),
    "pad": (F.pad, (X, (1, 2, 0, 3)), {}),
    "pad, mirrored": (F.pad, (X, (4, 3, 6, 0), "reflect"), {}),
    "pad, around": (F.pad, (X, (5, 0, 7, 7)), {"mode": "circular"}),
    "cat": (torch.cat, ([X, X[:, :3], X],), {"dim": 1}),
    "cat, from behind": (torch.cat, ((X, X[..., :2]), -1), {}),
    "transposed": (torch.conv_transpose2d, (X, torch.randn(4, 3, 2, 3), torch.randn(6), (2, 1), 1, (1, 0), 2), {}),
    "transposed, spread": (torch.conv_transpose2d, (X, torch.randn(4, 3, 3, 3)), {"dilation": 2}),
    "largest": (F.max_pool2d, (X, 3, 2, 1), {"ceil_mode": False, "return_indices": False}),
    "largest, apart": (F.max_pool2d, (X, (2, 3)), {"dilation": (3, 1)}),
    "largest, below the dispatch": (torch.max_pool2d, (X, 2, []), {}),
    "average": (F.avg_pool2d, (X, 2, 1, 1, False, True, None), {}),
    "average to a size": (F.adaptive_avg_pool2d, (X, (3, 2)), {}),
    "average to one": (F.adaptive_avg_pool2d, (X, 1), {}),
    "mean": (Tensor.mean, (X, (2, 3)), {"keepdim": True}),
    "mean, from behind": (torch.mean, (X, -1), {}),
    "softmax": (F.softmax, (X, -3), {}),
    "log softmax": (F.log_softmax, (X,), {"dim": 1, "_stacklevel": 5, "dtype": None}),
    "dropout": (F.dropout, (X,), {"p": 0.3, "training": True}),
    "pixel shuffle": (torch.pixel_shuffle, (X, 2), {}),
    "pixel unshuffle": (torch.pixel_unshuffle, (X[:, :, :6, :4], 2), {}),
    "sum": (Tensor.add, (X, X[:1, :, :1]), {"alpha": 2}),
    "sum with a number": (torch.add, (X, 1), {}),
    "a number less": (Tensor.__rsub__, (X, 1.5), {}),
    "product with a factor": (Tensor.mul, (X[0], X[:, :, :1, :1]), {}),
    "quotient": (torch.div, (X, 3), {"rounding_mode": "floor"}),
    "power": (torch.pow, (2, X), {}),
    "bounds": (Tensor.clamp, (X,), {"min": X[0], "max": ROW.view(4, 1, 1)}),
    "relu6": (F.hardtanh, (X,), {"min_val": 0.0, "max_val": 6.0, "inplace": False}),
    "gelu": (F.gelu, (X,), {"approximate": "tanh"}),
}
REFUSED = {
    "conv of other channels": (torch.conv2d, (X, W[:, :3]), {}),
    "conv of other groups": (torch.conv2d, (X, torch.randn(5, 2, 3, 3), None, 1, 0, 1, 2), {}),
    "conv of a smaller map": (torch.conv2d, (X, torch.randn(6, 4, 9, 1)), {}),
    "conv of another type": (torch.conv2d, (X, W.double()), {}),
    "bias of another length": (torch.conv2d, (X, W, ROW), {}),
    "norm of other channels": (F.batch_norm, (X, ROW[:3], ROW[:3]), {}),
    "norm of places of other features": (F.layer_norm, (X, (3,)), {}),
    "norm of places by another type": (F.layer_norm, (X, X.shape[3:], X[0, 0, 0].double()), {}),
    "norm of one value": (F.batch_norm, (X[:1, :, :1, :1], None, None), {"training": True}),
    "linear of other features": (F.linear, (X, torch.randn(3, 4)), {}),
    "linear of another type": (F.linear, (X, torch.randn(3, 5).double()), {}),
    "linear with a bias of another length": (F.linear, (X, torch.randn(3, 5), ROW), {}),
    "size and scale": (F.interpolate, (X, (3, 3), 2.0), {}),
    "no size": (F.interpolate, (X,), {}),
    "one size in a sequence": (F.interpolate, (X, (3,)), {}),
    "one scale in a sequence": (F.interpolate, (X,), {"scale_factor": (2.0,)}),
    "a size of nothing": (F.interpolate, (X,), {"scale_factor": 0.1}),
    "mirrored too far": (F.pad, (X, (5, 0, 0, 0), "reflect"), {}),
    "around too far": (F.pad, (X, (0, 0, 8, 0), "circular"), {}),
    "no such mode": (F.pad, (X, (1, 1, 1, 1), "mirror"), {}),
    "cat of other rows": (torch.cat, ([X, X[:, :, :3]], 1), {}),
    "cat of nothing": (torch.cat, ([],), {}),
    "no such argument": (F.relu, (X,), {"slope": 1}),
    "transposed to nothing": (torch.conv_transpose2d, (X, torch.randn(4, 3, 1, 1), None, 1, 4), {}),
    "more output than steps": (torch.conv_transpose2d, (X, torch.randn(4, 3, 2, 2), None, 2, 0, 2), {}),
    "transposed of other channels": (torch.conv_transpose2d, (X, torch.randn(3, 3, 2, 2)), {}),
    "window above the map": (F.max_pool2d, (X, 8), {}),
    "padding above half a window": (F.max_pool2d, (X, 3, 1, 2), {}),
    "no window": (F.avg_pool2d, (X, 0), {}),
    "average over nothing": (F.avg_pool2d, (X, 2), {"divisor_override": 0}),
    "average to a size below 0": (F.adaptive_avg_pool2d, (X, -1), {}),
    "mean over no such axis": (torch.mean, (X, 4), {}),
    "mean over an axis twice": (torch.mean, (X, (1, -3)), {}),
    "softmax over no such axis": (F.softmax, (X, 4), {}),
    "dropout of more than all": (F.dropout, (X, 1.5), {}),
    "shuffle of other channels": (torch.pixel_shuffle, (X, 3), {}),
    "unshuffle of another size": (torch.pixel_unshuffle, (X, 2), {}),
    "sum of other sizes": (torch.add, (X, X[:, :3]), {}),
}


def on_meta(value):
    if isinstance(value, (list, tuple)):
        return type(value)(on_meta(part) for part in value)
    return value.to("meta") if isinstance(value, Tensor) else value


@pytest.mark.parametrize("name", KNOWN)
def test_rules_know_what_torch_returns(name):
    function, args, kwargs = KNOWN[name]
    want = function(*args, **kwargs)
    got = capture._stand_in(function, on_meta(args), kwargs)
    assert got is not None
    assert (got.shape, got.dtype, got.device.type) == (want.shape, want.dtype, "meta")


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_is_left_to_torch(name):
    function, args, kwargs = REFUSED[name]
    assert capture._stand_in(function, on_meta(args), kwargs) is None
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)):
        function(*args, **kwargs)


@pytest.mark.parametrize(
    "call",
    [
        (F.interpolate, (X,), {"size": (3, 3), "mode": "bicubic"}),
        (torch.conv2d, (X, W), {"padding": "same"}),
        (F.pad, (X, (-1, 1, 0, 0)), {}),
        (torch.relu, (X.int(),), {}),
        (F.hardtanh, (X, 0.0, 6.0, True), {}),
        (F.dropout, (X,), {"training": False}),  # the very tensor
        (F.max_pool2d, (X, 2), {"ceil_mode": True}),
        (F.max_pool2d, (X, 2), {"return_indices": True}),
        (F.adaptive_avg_pool2d, (X, (None, 2)), {}),
        (F.softmax, (X, 1), {"dtype": torch.float64}),
        (torch.mean, (X,), {}),
        (Tensor.mul, (X, X > 0), {}),
        (Tensor.add, (X, X.double()), {}),
        (torch.add, (X, X), {"out": torch.empty(2, 4, 7, 5)}),
    ],
)
def test_what_no_rule_is_sure_of_is_left_to_torch(call):
    function, args, kwargs = call
    assert capture._stand_in(function, on_meta(args), kwargs) is None


@pytest.mark.parametrize("function", [F.relu, F.leaky_relu, F.silu, F.hardtanh, F.hardswish])
def test_a_function_in_place_gives_the_very_tensor_newer_by_a_write(function):
    x = X.to("meta")
    assert capture._stand_in(function, (x,), {"inplace": True}) is x
    assert x._version == 1


def test_recording_common_networks_imports_nothing_more():
    """torch's own shapes of these functions import sympy and more on first use: two seconds of every process."""
    program = """
import sys, torch
from lipfast import priors
from lipfast.bench import networks
from lipfast.engine.capture import record
import lipfast.engine.lane_module

before = set(sys.modules)
assert "sympy" not in before, "torch, or the engine, imports it by itself: nothing is left to see here"
for network, size in [
    (priors.build("skip", {}, 0), (1, 32, 64, 64)),
    (networks.ResNet18(8), (2, 3, 64, 64)),
    (networks.VGG16(4), (2, 3, 32, 32)),
    (networks.MobileNetV2(0.25), (2, 3, 64, 64)),
    (networks.EfficientNetB0(0.25), (2, 3, 64, 64)),
    (networks.Classifier(4, 24), (2, 4, 7, 7)),
    (networks.NAFNet(8, (1, 1)), (1, 3, 16, 16)),
]:
    leaves = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    record(lambda leaves, x: torch.func.functional_call(network, leaves, (x,)), [torch.rand(size)], leaves)
    print(type(network).__name__, len(set(sys.modules) - before))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    counts = dict(line.split() for line in found.stdout.splitlines())
    assert len(counts) == 7
    assert max(map(int, counts.values())) < 10, counts


def test_assignment_to_a_part_of_another_tensor():
    given = torch.ones(3)
    assert torch.equal(capture.with_part(given, slice(1, None), 2.0), torch.tensor([1.0, 2.0, 2.0]))
    assert torch.equal(given, torch.ones(3))
