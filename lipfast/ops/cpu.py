"""Tensors to the CPU kernels. What the seam checked is not checked again, except by the bindings for safety."""

import collections
import functools
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import lipfast._C as _C
from lipfast.locks import lock
from lipfast.ops._checks import check_positions
from lipfast.ops._memory import memory
from lipfast.ops._padding import is_channels_last
from lipfast.ops.lane_conv import ConvForm, LaneConv, asked_kernel
from lipfast.ops.lanes import LaneMap, with_lines


def _array(tensor: Tensor) -> NDArray[Any]:
    """The tensor's memory as numpy sees it: shared, not copied."""
    return tensor.detach().numpy()


def _floats(tensor: Tensor) -> NDArray[Any]:
    """The numbers of a contiguous tensor. After `Tensor.numpy` torch could not tell who writes them, see
    ``lipfast/engine/watch.py``."""
    floats: NDArray[Any] = memory(tensor).view(np.float32)
    return floats


def _empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Whatever torch's defaults are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


class _Pruning:
    """A `lipfast.ops.select.PruningRound` in C++."""

    def __init__(self, weights: Sequence[Tensor], alive: Sequence[Tensor], count: int) -> None:
        self._alive, self._count = alive, count
        scores = [_array(weight.contiguous()) for weight in weights]
        masks = [_array(mask.contiguous()) for mask in alive]
        self._round = _C.Pruning(scores, masks, count, torch.get_num_threads())
        self.living = self._round.living
        self.nan_part = self._round.nan_part

    def masks(self) -> list[Tensor]:
        """The survivors of each tensor."""
        masks = [_empty(mask.shape, torch.bool) for mask in self._alive]
        self._round.write([_array(mask) for mask in masks], None, None, None, None, torch.get_num_threads())
        return masks

    def rewind(self, start: Sequence[Tensor], into: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Survivors, survivors as bits, and the packed start values; writes the rewound weights to ``into``."""
        masks = [_empty(mask.shape, torch.bool) for mask in self._alive]
        bits = [_empty((-(-mask.numel() // 8),), torch.uint8) for mask in self._alive]
        values = _empty((self.living - self._count,))
        dense = [target if target.is_contiguous() else _empty(target.shape) for target in into]
        self._round.write(
            [_array(mask) for mask in masks],
            [_array(packed) for packed in bits],
            [_array(first.contiguous()) for first in start],
            [_array(written) for written in dense],
            _array(values),
            torch.get_num_threads(),
        )
        for target, written in zip(into, dense, strict=True):
            if written is not target:
                target.copy_(written)
        return masks, bits, values


def begin_pruning(weights: Sequence[Tensor], alive: Sequence[Tensor], count: int) -> _Pruning:
    """See ``lipfast.ops.select.PruningRound``."""
    return _Pruning(weights, alive, count)


def gather_kept(dense: Tensor, mask: Tensor) -> Tensor:
    """See ``lipfast.ops.gather_kept``."""
    threads, alive = torch.get_num_threads(), _array(mask.contiguous())
    values = _empty((_C.count_ones(alive, threads),))
    dense = dense.contiguous()  # a name for it: it must outlive its floats
    _C.gather_kept(_floats(dense), alive, _floats(values), threads)
    return values


def scatter_kept(values: Tensor, mask: Tensor) -> Tensor:
    """See ``lipfast.ops.scatter_kept``."""
    dense, values = _empty(mask.shape), values.contiguous()
    _C.scatter_kept(_floats(values), _array(mask.contiguous()), _floats(dense), torch.get_num_threads())
    return dense


def adam_step(
    values: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """See ``lipfast.ops.adam_step``."""
    threads = torch.get_num_threads()
    _C.adam_step(
        *(_array(values), _array(gradient), _array(m), _array(v)), step, lr, beta1, beta2, eps, weight_decay, threads
    )


def sgd_step(
    values: Tensor,
    gradient: Tensor,
    momentum_buffer: Tensor,
    step: int,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """See ``lipfast.ops.sgd_step``."""
    arrays = (_array(values), _array(gradient), _array(momentum_buffer))
    _C.sgd_step(*arrays, step, lr, momentum, dampening, weight_decay, nesterov, torch.get_num_threads())


def add_noise(base: Tensor, scale: float, seed: int, step: int) -> Tensor:
    """See ``lipfast.ops.add_noise``."""
    noisy = _empty(base.shape)
    _C.add_noise(_array(base.contiguous()), scale, seed, step, _array(noisy), torch.get_num_threads())
    return noisy


class _ConvPlan:
    """A `LaneConv` with the maps that carry ordinary tensors through it, for one pattern of kept weights."""

    def __init__(
        self,
        positions: Tensor,
        form: ConvForm,
        shape: torch.Size,
        x_shape: Sequence[int],
        block: tuple[int, int] | None,
    ) -> None:
        mask = torch.zeros(shape.numel(), dtype=torch.bool, device="cpu")
        check_positions(positions, len(mask))
        mask[positions] = True
        self.positions = positions.clone()
        self.conv = LaneConv(form, mask.view(shape), x_shape[0], x_shape[2], x_shape[3], block=block)
        self.lock = lock()
        self._maps: dict[str, LaneMap] = {}

    def map(self, name: str) -> LaneMap:
        """The map called ``x``, ``y``, ``dx`` or ``dy``, allocated when first used."""
        if name not in self._maps:
            make = (
                self.conv.input_map if "x" in name else functools.partial(self.conv.output_map, self.conv.gradient_halo)
            )
            self._maps[name] = make()
        return self._maps[name]

    def load(self, name: str, tensor: Tensor) -> LaneMap:
        """Copy an ordinary tensor into a map; padding for ``x``, zeros around ``dy``."""
        lanes = self.map(name)
        _C.lanes_from_plain(_array(with_lines(tensor)), _array(lanes.data), lanes.halo, torch.get_num_threads())
        if name == "x":
            self.conv.fill_input(lanes)
        else:
            lanes.fill_halo()
        return lanes

    def gradients(self, values: Tensor, dy: LaneMap, dx: LaneMap | None, x: LaneMap | None) -> tuple[Tensor, Tensor]:
        """Write ``dx`` if it is given; gradients of the kept values and the bias, empty where ``x`` is not given."""
        if dx:
            self.conv.input_gradient(values, dy, dx)
        if not x:
            return _empty((0,)), _empty((0,))
        dvalues, dbias = _empty(self.positions.shape), _empty((self.conv.form.out_channels,))
        self.conv.weight_gradient(x, dy, dvalues, dbias)
        return dvalues, dbias


_MOST_PLANS = 128
_plans: collections.OrderedDict[Hashable, _ConvPlan] = collections.OrderedDict()
_plans_lock = lock()


def _plan(
    positions: Tensor,
    shape: torch.Size,
    x_shape: Sequence[int],
    form: ConvForm,
    block: tuple[int, int] | None = None,
) -> _ConvPlan:
    """The plan for these sizes and this pattern; building one takes as long as a few convolutions."""
    key = (positions.data_ptr(), shape, tuple(x_shape), form, block, asked_kernel(), _C.isa())
    with _plans_lock:
        plan = _plans.get(key)
        if plan is None or not torch.equal(plan.positions, positions):  # memory may have been used again
            plan = _plans[key] = _ConvPlan(positions, form, shape, x_shape, block)
        _plans.move_to_end(key)
        while len(_plans) > _MOST_PLANS:
            _plans.popitem(last=False)
    return plan


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def sparse_conv2d_forward(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    shape: torch.Size,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    padding_mode: str,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """See ``lipfast.ops.reference.sparse_conv2d_forward``."""
    plan = _plan(positions, shape, x.shape, ConvForm.of(shape, stride, padding, padding_mode, dilation, groups))
    with plan.lock:
        y = plan.map("y")
        plan.conv.forward(values, None if bias is None else bias.contiguous(), plan.load("x", x), y)
        return y.to_tensor(_memory_format(x))


def sparse_conv2d_input_gradient(
    dy: Tensor,
    values: Tensor,
    positions: Tensor,
    shape: torch.Size,
    input_size: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
    padding_mode: str,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """See ``lipfast.ops.reference.sparse_conv2d_input_gradient``."""
    plan = _plan(positions, shape, input_size, ConvForm.of(shape, stride, padding, padding_mode, dilation, groups))
    with plan.lock:
        dx = plan.map("dx")
        plan.conv.input_gradient(values, plan.load("dy", dy), dx)
        return dx.to_tensor(_memory_format(dy))


def sparse_conv2d_weight_gradient(
    x: Tensor,
    dy: Tensor,
    positions: Tensor,
    shape: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
    padding_mode: str,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """See ``lipfast.ops.reference.sparse_conv2d_weight_gradient``."""
    plan = _plan(positions, shape, x.shape, ConvForm.of(shape, stride, padding, padding_mode, dilation, groups))
    gradient = _empty(positions.shape)
    with plan.lock:
        plan.conv.weight_gradient(plan.load("x", x), plan.load("dy", dy), gradient, None)
    return gradient


def sparse_conv2d_gradients(
    x: Tensor,
    dy: Tensor,
    values: Tensor,
    positions: Tensor,
    shape: torch.Size,
    form: ConvForm,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, kept values and bias, empty where nobody asks: ``dy`` is converted once for all of them."""
    plan = _plan(positions, shape, x.shape, form)
    with plan.lock:
        dx, given = plan.map("dx") if needs_x else None, plan.load("x", x) if needs_weights else None
        of_weights = plan.gradients(values, plan.load("dy", dy), dx, given)
        return dx.to_tensor(_memory_format(dy)) if dx else _empty((0,)), *of_weights


def _plan_of_map(x: LaneMap, positions: Tensor, shape: torch.Size, form: ConvForm) -> _ConvPlan:
    return _plan(positions, shape, (*x.data.shape[:2], x.height, x.width), form, x.block)


def sparse_conv2d_map(
    x: LaneMap, values: Tensor, positions: Tensor, shape: torch.Size, bias: Tensor | None, form: ConvForm
) -> LaneMap:
    """``x`` with its halo filled; the result has a halo of the same width, filled in the same way."""
    plan = _plan_of_map(x, positions, shape, form)
    y = plan.conv.output_map(x.halo, zeroed=False)  # the halo is filled, too
    with plan.lock:
        plan.conv.forward(values, None if bias is None else bias.contiguous(), x, y)
    y.fill_halo(form.padding_mode, form.border_of(y.height, y.width))
    return y


def sparse_conv2d_map_gradients(
    x: LaneMap,
    dy: Tensor,
    values: Tensor,
    positions: Tensor,
    shape: torch.Size,
    form: ConvForm,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, kept values and bias, empty where nobody asks; what ``dy`` says of a halo is left out."""
    plan = _plan_of_map(x, positions, shape, form)
    dx = plan.conv.input_map(x.halo) if needs_x else None
    with plan.lock:
        gradient = plan.map("dy")
        gradient.copy_pixels(LaneMap(dy, gradient.height, gradient.width, x.halo))
        gradient.fill_halo()
        of_weights = plan.gradients(values, gradient, dx, x if needs_weights else None)
    return dx.data if dx else _empty((0,)), *of_weights
