"""Winograd convolution in the lane layout against torch in float64.

Tolerance: F(4x4, 3x3) and F(2x2, 5x5) lose about two bits to their transforms (points 0, +-5/8, +-3/2). Measured over
the sizes below, on normal data, the error relative to the largest result stays below 7e-6; 1e-5 is the bound that users
are promised.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

import lipfast._C as _C
from lipfast.ops import lanes
from lipfast.ops.lanes import LaneMap

TOLERANCE = 1e-5
SIZES = [
    (1, 1),
    (3, 5),
    (7, 9),
    (16, 16),
    (33, 40),
]  # less than the grid, partial tiles in both directions, whole tiles
CHANNELS = [(1, 1), (3, 17), (17, 3), (32, 32)]  # (in, out)
GUARD = 12345.0


@dataclass(frozen=True)
class Form:
    """Tiles of tile x tile pixels of a kernel x kernel layer."""

    kernel: int
    tile: int

    @property
    def pad(self) -> int:
        return self.kernel // 2


FORMS = [Form(3, 2), Form(3, 4), Form(5, 2)]
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.kernel}x{form.kernel}, tile {form.tile}")


@pytest.fixture(params=_C.available_isas())
def isa(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@dataclass
class Layer:
    """Random data of one layer and its float64 answers."""

    x: Tensor
    w: Tensor
    bias: Tensor
    dy: Tensor

    @classmethod
    def draw(cls, batch: int, channels: tuple[int, int], size: tuple[int, int], kernel: int = 3) -> "Layer":
        generator = torch.Generator().manual_seed(0)
        inputs, outputs = channels

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        weight = normal(outputs, inputs, kernel, kernel)
        return cls(normal(batch, inputs, *size), weight, normal(outputs), normal(batch, outputs, *size))

    def answers(self) -> tuple[Tensor, Tensor, Tensor]:
        """(y, dx, dw) in float64."""
        x, w = self.x.double().requires_grad_(), self.w.double().requires_grad_()
        y = torch.nn.functional.conv2d(x, w, self.bias.double(), padding=self.w.shape[2] // 2)
        dx, dw = torch.autograd.grad(y, (x, w), self.dy.double())
        return y.detach(), dx, dw


def scratch(floats: int) -> np.ndarray:
    """Exactly as much as asked for, filled with NaN: nothing may be read before it is written."""
    return lanes.empty(floats).fill_(float("nan")).numpy()


def transform(w: Tensor, form: Form, transposed: bool = False, threads: int = 2) -> Tensor:
    sizes = *w.shape[:2], form.kernel
    u = torch.full((_C.winograd_weight_floats(*w.shape[:2], form.tile, form.kernel),), float("nan"))
    _C.winograd_transform_weights(w.contiguous().numpy(), *sizes, transposed, form.tile, u.numpy(), threads)
    return u


def convolve(x: LaneMap, u: Tensor, bias: Tensor | None, outputs: int, form: Form, threads: int = 2) -> LaneMap:
    block = (x.data.shape[2] - 2 * x.halo, x.data.shape[3] - 2 * x.halo)
    y = LaneMap.allocate(x.data.shape[0], outputs, x.height, x.width, halo=1, block=block)
    y.data.fill_(GUARD)
    maps = (x.data.numpy(), x.halo), (y.data.numpy(), y.halo)
    sizes = x.height, x.width, form.kernel, form.tile
    floats = _C.winograd_forward_scratch(*maps[0], *maps[1], *sizes, threads)
    offsets = None if bias is None else bias.numpy()
    _C.winograd_forward(*maps[0], u.numpy(), offsets, *maps[1], *sizes, scratch(floats), threads)
    return y


def weight_gradient(x: LaneMap, dy: LaneMap, form: Form, threads: int = 2) -> Tensor:
    dw = torch.full((dy.data.shape[1], x.data.shape[1], form.kernel, form.kernel), float("nan"))
    maps = (x.data.numpy(), x.halo), (dy.data.numpy(), dy.halo)
    sizes = x.height, x.width, form.kernel, form.tile
    floats = _C.winograd_weight_gradient_scratch(*maps[0], *maps[1], *sizes, threads)
    _C.winograd_weight_gradient(*maps[0], *maps[1], dw.numpy(), *sizes, scratch(floats), threads)
    return dw


def padded(x: Tensor, form: Form, block: tuple[int, int] | None = None) -> LaneMap:
    return LaneMap.from_tensor(x, halo=form.pad, padding_mode="zeros", pad=form.pad, block=block)


def assert_close(got: Tensor, want: Tensor) -> None:
    error = (got.double() - want).abs().max() / want.abs().max()
    assert error <= TOLERANCE, f"relative error {error:.1e}"


@forms
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("batch", [1, 3])
def test_three_directions_match_float64(isa, batch, channels, size, form):
    layer = Layer.draw(batch, channels, size, form.kernel)
    y, dx, dw = layer.answers()
    inputs, outputs = channels
    x_lanes, dy_lanes = padded(layer.x, form), padded(layer.dy, form)
    assert_close(convolve(x_lanes, transform(layer.w, form), layer.bias, outputs, form).to_tensor(), y)
    assert_close(convolve(dy_lanes, transform(layer.w, form, transposed=True), None, inputs, form).to_tensor(), dx)
    assert_close(weight_gradient(x_lanes, dy_lanes, form), dw)


@forms
def test_many_channels_and_tiles(isa, form):
    """More input channels than one inner product, more output channels than one group, several ranges of tiles."""
    layer = Layer.draw(1, (170, 50), (68, 72), form.kernel)
    y, dx, dw = layer.answers()
    x_lanes, dy_lanes = padded(layer.x, form), padded(layer.dy, form)
    assert_close(convolve(x_lanes, transform(layer.w, form), layer.bias, 50, form).to_tensor(), y)
    assert_close(convolve(dy_lanes, transform(layer.w, form, transposed=True), None, 170, form).to_tensor(), dx)
    assert_close(weight_gradient(x_lanes, dy_lanes, form), dw)


@forms
def test_pruned_weights_and_larger_blocks(isa, form):
    """Zeros in the weights, and blocks with whole dead rows as a neighbouring map's stride may ask for."""
    layer = Layer.draw(2, (5, 7), (9, 10), form.kernel)
    layer.w *= torch.rand(layer.w.shape, generator=torch.Generator().manual_seed(1)) > 0.8
    y, dx, dw = layer.answers()
    x_lanes, dy_lanes = padded(layer.x, form, (4, 6)), padded(layer.dy, form, (4, 6))
    assert_close(convolve(x_lanes, transform(layer.w, form), layer.bias, 7, form).to_tensor(), y)
    assert_close(convolve(dy_lanes, transform(layer.w, form, transposed=True), None, 5, form).to_tensor(), dx)
    assert_close(weight_gradient(x_lanes, dy_lanes, form), dw)


@forms
@pytest.mark.parametrize("size", SIZES)
def test_writes_pixels_only_and_reads_one_halo_only(isa, size, form):
    """Poison around the maps: beyond the padding nothing is read, beyond the pixels nothing is written."""
    layer = Layer.draw(1, (3, 4), size, form.kernel)
    clean, clean_dy = padded(layer.x, form), padded(layer.dy, form)
    poisoned = LaneMap.from_tensor(layer.x, halo=form.pad + 2, padding_mode="zeros", pad=form.pad)
    poisoned.data.fill_(float("nan"))
    poisoned.data[:, :, 2:-2, 2:-2] = clean.data
    dy = LaneMap.from_tensor(layer.dy, halo=form.pad)
    dy.data.fill_(float("nan"))
    pixels = slice(form.pad, -form.pad)
    dy.data[:, :, pixels, pixels] = clean_dy.data[:, :, pixels, pixels]
    u = transform(layer.w, form)
    y = convolve(poisoned, u, None, 4, form)
    assert torch.equal(y.data, convolve(clean, u, None, 4, form).data)
    assert torch.equal(weight_gradient(poisoned, dy, form), weight_gradient(clean, clean_dy, form))
    y.data[:, :, 1:-1, 1:-1] = GUARD
    assert bool((y.data == GUARD).all())


@forms
@pytest.mark.parametrize("size", [(5, 6), (33, 40), (80, 72)])
def test_same_bits_for_any_number_of_threads(isa, size, form):
    layer = Layer.draw(1, (20, 45), size, form.kernel)
    x_lanes, dy_lanes = padded(layer.x, form), padded(layer.dy, form)
    results = []
    for threads in (1, 2, 3, 8):
        u = transform(layer.w, form, threads=threads)
        back = transform(layer.w, form, transposed=True, threads=threads)
        y = convolve(x_lanes, u, layer.bias, 45, form, threads).data
        dx = convolve(dy_lanes, back, None, 20, form, threads).data
        results.append((u, back, y, dx, weight_gradient(x_lanes, dy_lanes, form, threads)))
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            # Between the frequencies of u lies room that nobody writes: NaN here.
            torch.testing.assert_close(same, one, rtol=0, atol=0, equal_nan=True)


def test_runs_on_a_range_of_channels(isa):
    """Input and output may be slices of larger maps: the slots of a concatenation."""
    layer = Layer.draw(2, (6, 5), (13, 17))
    whole_x = LaneMap.allocate(2, 10, 13, 17, halo=1)
    form = Form(3, 4)
    whole_x.data[:, 2:8] = padded(layer.x, form).data
    whole_y = LaneMap.allocate(2, 9, 13, 17)
    maps = (whole_x.data.numpy()[:, 2:8], 1), (whole_y.data.numpy()[:, 3:8], 0)
    floats = _C.winograd_forward_scratch(*maps[0], *maps[1], 13, 17, 3, 4, 2)
    u = transform(layer.w, form)
    _C.winograd_forward(*maps[0], u.numpy(), layer.bias.numpy(), *maps[1], 13, 17, 3, 4, scratch(floats), 2)
    got = whole_y.to_tensor()
    assert_close(got[:, 3:8], layer.answers()[0])
    assert not bool(got[:, :3].any())
    assert not bool(got[:, 8:].any())


@pytest.mark.parametrize(
    ("block", "tile"),
    [
        ((1, 1), 2),
        ((2, 2), 2),
        ((3, 3), 4),
        ((4, 4), 4),
        ((5, 5), 4),
        ((8, 8), 4),
        ((9, 9), 4),
        ((9, 2), 2),
        ((32, 32), 4),
    ],
)
def test_tile_for_a_block_is_the_one_with_fewer_products(block, tile):
    products = {t: -(-block[0] // t) * -(-block[1] // t) * (t + 2) ** 2 for t in (4, 2)}
    assert _C.winograd_tile(*block, 3, 1) == min(products, key=products.__getitem__) == tile
    products = {t: -(-block[0] // t) * -(-block[1] // t) * (2 * t + 1) ** 2 for t in (4, 2)}
    assert _C.winograd_tile(*block, 3, 2) == min(products, key=products.__getitem__)


class TestBadArguments:
    def call(self, x_halo=1, kernel=3, tile=4, floats=None, bias=None, size=(8, 8), y_size=(8, 8)):
        x = LaneMap.allocate(1, 2, *size, halo=x_halo)
        y = LaneMap.allocate(1, 3, *y_size)
        u = torch.zeros(_C.winograd_weight_floats(3, 2, 4, 3))
        memory = scratch(1 << 20 if floats is None else floats)
        maps = (x.data.numpy(), x_halo), (y.data.numpy(), 0)
        _C.winograd_forward(*maps[0], u.numpy(), bias, *maps[1], *size, kernel, tile, memory, 2)

    def test_correct_call_passes(self):
        self.call()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x_halo": 0}, "halo must be at least 1, got 0"),
            ({"x_halo": 1, "kernel": 5, "tile": 2}, "halo must be at least 2, got 1"),
            ({"tile": 3}, "tile is 2 or 4, got 3"),
            ({"kernel": 5}, "tile is 2, got 4"),
            ({"kernel": 7}, "kernel is 3 or 5, got 7"),
            ({"floats": 16}, "scratch: expected .* floats"),
            ({"bias": np.zeros(2, np.float32)}, "bias: expected contiguous float32 of 3 elements"),
            ({"tile": 2}, f"u: expected contiguous float32 of {_C.winograd_weight_floats(3, 2, 2, 3)} elements"),
            ({"y_size": (12, 12)}, "differ in more than channels"),
        ],
    )
    def test_message_names_the_value(self, change, message):
        with pytest.raises(ValueError, match=message):
            self.call(**change)
