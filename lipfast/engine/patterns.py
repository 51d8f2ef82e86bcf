"""Calls in another form before they are lowered: operators that networks spell out in several torch calls, and weights
that they compute."""

import dataclasses
from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lipfast.engine.capture import Call, Recording, Ref, refs_in

MULTIPLY = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
_DIVIDE = (torch.div, Tensor.div, Tensor.__truediv__)
_ADD = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
_ROOT = (torch.sqrt, Tensor.sqrt)
_INVERSE_ROOT = (torch.rsqrt, Tensor.rsqrt)
_MEAN = (torch.mean, Tensor.mean)
_SQUARE = (torch.square, Tensor.square)
_POWER = (torch.pow, Tensor.pow, Tensor.__pow__)


def pixel_norm(x: Tensor, epsilon: float) -> Tensor:
    """``x / sqrt(mean over channels of x^2 + epsilon)``, as progressive generators write it."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + epsilon)


def gather_patterns(recording: Recording) -> None:
    """Replace the calls that spell out a `pixel_norm` by one."""
    finder = _Finder(recording)
    calls: list[Call] = []
    dropped: set[int] = set()
    for call in recording.calls:
        found = finder.pixel_norm(call)
        if found is None:
            calls.append(call)
            continue
        x, epsilon, parts = found
        calls.append(dataclasses.replace(call, function=pixel_norm, args=(x, epsilon), kwargs={}))
        dropped.update(id(part) for part in parts)
    recording.calls = [call for call in calls if id(call) not in dropped]


# Functions of nothing but their arguments, by name in torch and as methods.
_PURE = (
    "abs", "add", "clamp", "clone", "contiguous", "detach", "div", "eq", "exp", "expand", "expand_as", "flatten",
    "float", "ge", "gt", "le", "log", "lt", "matmul", "maximum", "mean", "minimum", "mul", "neg", "norm", "permute",
    "pow", "relu", "reshape", "round", "rsqrt", "sigmoid", "sign", "sqrt", "square", "std", "sub", "sum", "t", "tanh",
    "transpose", "unsqueeze", "var", "view", "where", "__add__", "__ge__", "__gt__", "__le__", "__lt__", "__mul__",
    "__neg__", "__pow__", "__radd__", "__rmul__", "__rsub__", "__sub__", "__truediv__",
)  # fmt: skip
_PURE_FUNCTIONS = {getattr(owner, name) for owner in (torch, Tensor) for name in _PURE if hasattr(owner, name)}


def weights_first(recording: Recording, inputs: Container[str] = ()) -> int:
    """Move what is computed from parameters alone (the product of a weight and its mask, a standardised weight) before
    everything else: where it is called it would cut a run of layers in two. Returns how many calls those are.

    ``inputs``: leaves that are none."""
    parameters = {number for number, name in recording.leaves.items() if name not in inputs}
    moved = parameters - _written(recording)
    first: list[Call] = []
    rest: list[Call] = []
    for call in recording.calls:
        refs = call.refs()
        if call.function in _PURE_FUNCTIONS and refs and all(ref.number in moved for ref in refs):
            moved.update(ref.number for ref in call.results())
            first.append(call)
        else:
            rest.append(call)
    recording.calls = first + rest
    return len(first)


def _written(recording: Recording) -> set[int]:
    """Tensors that calls may write into, running statistics among them."""
    written: set[int] = set()
    for call in recording.calls:
        name = getattr(call.function, "__name__", "")
        in_place = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
        if in_place or "out" in call.kwargs:
            written.update(ref.number for ref in call.refs())
        elif call.function in (F.batch_norm, F.instance_norm):
            written.update(ref.number for ref in call.refs()[1:])
    return written


class _Finder:
    """Looks calls up by what they made."""

    def __init__(self, recording: Recording) -> None:
        self._made = {call.result.number: call for call in recording.calls if isinstance(call.result, Ref)}
        self._uses: dict[int, int] = {}
        for ref in [*refs_in(recording.result), *(ref for call in recording.calls for ref in call.refs())]:
            self._uses[ref.number] = self._uses.get(ref.number, 0) + 1

    def pixel_norm(self, call: Call) -> tuple[Ref, float, list[Call]] | None:
        """The input, epsilon and inner calls of a pixel norm that ends in ``call``."""
        roots = {**dict.fromkeys(MULTIPLY, _INVERSE_ROOT), **dict.fromkeys(_DIVIDE, _ROOT)}
        refs = call.refs()
        if call.function not in roots or len(refs) != 2:
            return None
        orders = [refs, refs[::-1]] if call.function in MULTIPLY else [refs]
        for x, scale in orders:
            root = self._maker(scale, roots[call.function])
            total = self._maker(root.refs()[0], _ADD) if root else None
            mean = self._maker(total.refs()[0], _MEAN) if total and len(total.refs()) == 1 else None
            square = self._square(mean.refs()[0], x) if mean and _over_channels(mean) else None
            if root and total and mean and square and len(x.shape) == 4:
                (epsilon,) = [arg for arg in total.args if not isinstance(arg, Ref)]
                if isinstance(epsilon, (int, float)) and not total.kwargs:
                    return x, float(epsilon), [root, total, mean, square]
        return None

    def _maker(self, ref: Ref, functions: Iterable[Callable[..., Any]]) -> Call | None:
        """The call that made a tensor that nothing else reads, if it is one of these functions."""
        call = self._made.get(ref.number)
        return call if call is not None and call.function in functions and self._uses[ref.number] == 1 else None

    def _square(self, ref: Ref, x: Ref) -> Call | None:
        call = self._maker(ref, (*_SQUARE, *_POWER, *MULTIPLY))
        if call is None or any(operand != x for operand in call.refs()):
            return None
        others = [arg for arg in call.args if not isinstance(arg, Ref)]
        wanted = {
            **dict.fromkeys(_SQUARE, (1, [])),
            **dict.fromkeys(_POWER, (1, [2])),
            **dict.fromkeys(MULTIPLY, (2, [])),
        }
        return call if (len(call.refs()), others) == wanted[call.function] and not call.kwargs else None


def _over_channels(mean: Call) -> bool:
    """Whether a mean is over axis 1 and keeps it."""
    named = dict(zip(("input", "dim", "keepdim"), mean.args, strict=False)) | mean.kwargs
    return named.get("dim") in (1, -3, [1], (1,)) and named.get("keepdim") is True and not named.get("dtype")
