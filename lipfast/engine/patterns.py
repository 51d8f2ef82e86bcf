"""Calls in another form before they are lowered: operators that networks spell out in several torch calls, and weights
that they compute."""

import dataclasses
import math
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from lipfast.engine.capture import Call, Recording, Ref, assign_, refs_in, with_part, without_unread
from lipfast.engine.heads import (
    ADD,
    ADDMM,
    DIVIDE,
    MULTIPLY,
    NORM,
    PRODUCT,
    AttentionFinder,
    Found,
    added_rows,
    axes_of_norm,
    bias_rows,
    causal,
    kept_axes,
    problem_factors,
    swaps_last,
)

_ROOT = (torch.sqrt, Tensor.sqrt)
_INVERSE_ROOT = (torch.rsqrt, Tensor.rsqrt)
_MEAN = (torch.mean, Tensor.mean)
_SQUARE = (torch.square, Tensor.square)
_POWER = (torch.pow, Tensor.pow, Tensor.__pow__)
_SUBTRACT = (torch.sub, Tensor.sub, Tensor.__sub__)
_VARIANCE = (torch.var, Tensor.var)
_OF_VARIANCE = ("input", "dim", "unbiased", "keepdim")
_MAX = (torch.max, Tensor.max)
_AMAX = (torch.amax, Tensor.amax)
_UNSQUEEZE = (torch.unsqueeze, Tensor.unsqueeze)
_ADDCMUL = (torch.addcmul, Tensor.addcmul)
_TANH = (torch.tanh, Tensor.tanh)
_NEW = {Tensor.new_zeros: torch.zeros, Tensor.new_ones: torch.ones}
_RESHAPE = (torch.reshape, Tensor.reshape, Tensor.view, torch.flatten, Tensor.flatten)
_TRANSPOSE = (torch.transpose, Tensor.transpose, Tensor.permute, torch.permute, Tensor.swapaxes, torch.swapaxes)


def pixel_norm(x: Tensor, epsilon: float, axis: int) -> Tensor:
    """``x / sqrt(mean over channels of x^2 + epsilon)``, as progressive generators write it, and RMSNorms."""
    return x * torch.rsqrt(x.square().mean(dim=axis, keepdim=True) + epsilon)


def channel_norm(x: Tensor, epsilon: float, axis: int, centred: bool) -> Tensor:
    """``(x - mean) / sqrt(variance + epsilon)`` over the channels of each pixel, as LayerNorms of maps are written;
    without ``centred`` ``x / sqrt(variance + epsilon)``, as image restoration networks do without additive numbers."""
    mean = x.mean(dim=axis, keepdim=True)
    scale = torch.rsqrt((x - mean).square().mean(dim=axis, keepdim=True) + epsilon)
    return (x - mean if centred else x) * scale


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU through tanh."""
    return F.gelu(x, approximate="tanh")


def largest_channel(x: Tensor, dim: int, keepdim: bool) -> Tensor:
    """The values of ``x.max(dim, keepdim)``, whose indices nobody reads."""
    values: Tensor = x.max(dim, keepdim=keepdim).values
    return values


def response(x: Tensor, epsilon: float, features_last: bool) -> Tensor:
    """How large each channel is over a picture's pixels, as a share of the channels' mean: the factor of a global
    response norm."""
    size: Tensor = torch.linalg.vector_norm(x, dim=(1, 2) if features_last else (2, 3), keepdim=True)
    return size / (size.mean(dim=-1 if features_last else 1, keepdim=True) + epsilon)


def gather_patterns(recording: Recording) -> None:
    """Replace the calls that spell out an operator by one: of a function of torch, of this file or of heads.py."""
    recording.calls = list(_simpler(recording))
    finder, changed = _Finder(recording), written(recording)
    attentions = {id(found.last): found for found in AttentionFinder(recording).find()}
    calls: list[Call] = []
    inner: set[int] = set()
    for call in recording.calls:
        found = attentions.get(id(call)) or finder.find(call)
        parts = found.inner if found else []
        touched = {ref.number for part in (call, *parts) for ref in (*part.refs(), *part.results())}
        if found is None or touched & changed or any(part.grad != call.grad for part in parts):
            calls.append(call)
            continue
        calls += [*found.before, found.call]
        inner.update(id(part) for part in parts)
    recording.calls = without_unread(calls, inner, recording.result)


def _simpler(recording: Recording) -> Iterator[Call]:
    """The calls, with ``addcmul`` as a product and a sum, ``max`` over channels as its values where those alone are
    read, and zeros like another tensor's without that one."""
    read = {
        ref.number for ref in [*refs_in(recording.result), *(ref for call in recording.calls for ref in call.refs())]
    }
    fresh = recording.unused()
    for call in recording.calls:
        if call.function in _ADDCMUL and isinstance(call.result, Ref) and not _has_out(call):
            yield from _product_and_sum(call, next(fresh))
        elif call.function in _MAX and len(call.results()) == 2 and call.results()[1].number not in read:
            yield _values_alone(call)
        elif call.function in (Tensor.reshape_as, Tensor.view_as) and len(call.args) == 2:
            yield dataclasses.replace(call, function=Tensor.reshape, args=(call.args[0], call.args[1].shape))
        elif call.function in _NEW and not call.kwargs.keys() - {"dtype"}:
            kwargs = {"dtype": call.result.dtype, "device": torch.device("meta")}  # where all was recorded
            yield dataclasses.replace(call, function=_NEW[call.function], args=(call.result.shape,), kwargs=kwargs)
        else:
            yield call


def _product_and_sum(call: Call, number: int) -> list[Call]:
    named = dict(zip(("input", "tensor1", "tensor2"), call.args, strict=False)) | call.kwargs
    factors = refs_in((named.get("tensor1"), named.get("tensor2")))
    if len(call.args) > 3 or [factor.dtype for factor in factors] != [call.result.dtype] * 2:
        return [call]
    one, other = (torch.empty(factor.shape, device="meta") for factor in factors)
    shape = torch.mul(one, other).shape
    product = Ref(number, tuple(shape), call.result.dtype)
    kwargs = {"alpha": named["value"]} if "value" in named else {}
    return [
        dataclasses.replace(call, function=torch.mul, args=tuple(factors), kwargs={}, result=product),
        dataclasses.replace(call, function=torch.add, args=(named["input"], product), kwargs=kwargs),
    ]


def _values_alone(call: Call) -> Call:
    named = dict(zip(("input", "dim", "keepdim"), call.args, strict=False)) | call.kwargs
    if named.get("dim") not in (1, -3) or len(named["input"].shape) != 4 or _has_out(call):
        return call
    args, values = (named["input"], 1, bool(named.get("keepdim"))), call.results()[0]
    return dataclasses.replace(call, function=largest_channel, args=args, kwargs={}, result=values)


# Functions of nothing but their arguments, by name in torch and as methods.
_PURE = (
    "_weight_norm", "abs", "add", "addcmul", "addmm", "arange", "bmm", "cat", "chunk", "clamp", "clone", "contiguous",
    "cos", "detach", "div", "dot", "einsum", "eq", "exp", "expand", "expand_as", "flatten", "flip", "float", "full",
    "ge", "gt", "index_select", "le", "log", "long", "lt", "masked_fill", "matmul", "maximum", "mean", "minimum", "mm",
    "mul", "mv", "ne", "neg", "norm", "ones", "permute", "pow", "relu", "repeat", "reshape", "reshape_as", "round",
    "rsqrt", "sigmoid", "sign", "sin", "softmax", "split", "sqrt", "square", "squeeze", "stack", "std", "std_mean",
    "sub", "sum", "t", "tanh", "to", "transpose", "unbind", "unsqueeze", "var", "var_mean", "view", "view_as", "where",
    "zeros", "__add__", "__eq__", "__ge__", "__getitem__", "__gt__", "__le__", "__lt__", "__mul__", "__ne__", "__neg__",
    "__pow__", "__radd__", "__rmul__", "__rsub__", "__rtruediv__", "__sub__", "__truediv__",
)  # fmt: skip
_PURE_FUNCTIONS = {getattr(owner, name) for owner in (torch, Tensor) for name in _PURE if hasattr(owner, name)}
_PURE_FUNCTIONS |= {
    torch.tensor,
    Tensor.T.__get__,  # type: ignore[attr-defined]
    Tensor.mT.__get__,  # type: ignore[attr-defined]
    F.linear,
    torch._C._nn.linear,
    F.softmax,
    F.gelu,
    F.layer_norm,
    F.normalize,
    added_rows,
    bias_rows,
    causal,
    problem_factors,
    with_part,
}


def is_pure(call: Call) -> bool:
    """Whether a call's result depends on its arguments alone, and it changes nothing."""
    activation = call.function in (F.silu, F.relu) and len(call.args) == 1 and not call.kwargs.get("inplace")
    norm = call.function is F.batch_norm and not _running_statistics(call)  # of a weight, to standardise it
    table = call.function is F.embedding and all(arg is None for arg in (*call.args[3:4], call.kwargs.get("max_norm")))
    return (activation or norm or table or call.function in _PURE_FUNCTIONS) and not _has_out(call)


def _has_out(call: Call) -> bool:
    """Whether a call is given the tensor to write to; ``torch.norm`` hands itself a None."""
    return call.kwargs.get("out") is not None


def weights_first(recording: Recording, inputs: Container[str] = ()) -> int:
    """Move what is computed from parameters and constants alone (the product of a weight and its mask, a standardised
    weight, a mask of windows) before everything else: where it is called it would cut a run of layers in two. Returns
    how many calls those are.

    ``inputs``: leaves that are none."""
    parameters = {number for number, name in recording.leaves.items() if name not in inputs}
    moved = parameters - written(recording)
    first: list[Call] = []
    rest: list[Call] = []
    for given in recording.calls:
        call = _out_of_place(given)
        if is_pure(call) and all(ref.number in moved for ref in call.refs()):
            moved.update(ref.number for ref in call.results())
            first.append(call)
        else:
            rest.append(given)
    recording.calls = first + rest
    return len(first)


def _out_of_place(call: Call) -> Call:
    """A ReLU or assignment that overwrites its operand, which forward made and nothing reads any more, as one that does
    not."""
    if call.function is F.relu and call.args:
        return dataclasses.replace(call, args=call.args[:1], kwargs={})
    return dataclasses.replace(call, function=with_part) if call.function is assign_ else call


def written(recording: Recording) -> set[int]:
    """Tensors that calls may write into, running statistics among them."""
    numbers: set[int] = set()
    for call in recording.calls:
        name = getattr(call.function, "__name__", "")
        in_place = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
        if in_place or _has_out(call):
            numbers.update(ref.number for ref in call.refs())
        elif call.function in (F.batch_norm, F.instance_norm):
            numbers.update(ref.number for ref in _running_statistics(call))
    return numbers


def _running_statistics(call: Call) -> list[Ref]:
    """What a BatchNorm or InstanceNorm is given of them."""
    named = dict(zip(("input", "running_mean", "running_var"), call.args, strict=False)) | call.kwargs
    return refs_in([named.get("running_mean"), named.get("running_var")])


_Found = tuple[Callable[..., Any], tuple[Any, ...], list[Call]] | None  # a function, its arguments, the inner calls


class _Finder:
    """Looks calls up by what they made."""

    def __init__(self, recording: Recording) -> None:
        self._made = {call.result.number: call for call in recording.calls if isinstance(call.result, Ref)}
        self._leaves = recording.leaves

    def find(self, call: Call) -> Found | None:
        """The operator that ends in ``call``."""
        found = (
            self.channel_norm(call)
            or self.pixel_norm(call)
            or self.response(call)
            or self.of_channels(call)
            or self.channel_shuffle(call)
            or self.linear(call)
            or self.gelu(call)
        )
        if found is None:
            return None
        function, args, inner = found
        return Found(call, dataclasses.replace(call, function=function, args=args, kwargs={}), [], inner)

    def pixel_norm(self, call: Call) -> _Found:
        """A pixel norm that ends in ``call``."""
        for x, epsilon, mean, parts in self._over_roots(call):
            axis = _axis_of_channels(mean) if mean.function in _MEAN else None
            square = self._square(mean.refs()[0], x) if axis else None
            if square:
                return pixel_norm, (x, epsilon, axis), [*parts, square]
        return None

    def channel_norm(self, call: Call) -> _Found:
        """A norm over channels, without weights, that ends in ``call``."""
        for normalised, epsilon, variance, parts in self._over_roots(call):
            axis = _axis_of_channels(variance)
            if axis is None:
                continue
            of, more = self._of_variance(variance, axis)
            x, inner = self._centred(normalised, axis)
            if of is not None and of in (x, normalised):
                return channel_norm, (of, epsilon, axis, of == x), [*parts, *more, *inner]
        return None

    def _of_variance(self, variance: Call, axis: int) -> tuple[Ref | None, list[Call]]:
        """Of the mean square of ``x - mean of x`` over that axis: x and the calls before the mean."""
        operand = variance.refs()[0]
        if variance.function in _VARIANCE:
            return (operand if _is_biased(variance) else None), []
        made = self._maker(operand, (*_SQUARE, *_POWER, *MULTIPLY))
        square = self._square(operand, made.refs()[0]) if made else None
        x, inner = self._centred(made.refs()[0], axis) if made else (None, [])
        return (x, [square, *inner]) if square else (None, [])

    def response(self, call: Call) -> _Found:
        """The factor of a global response norm, which ends in ``call``."""
        refs = call.refs()
        total = self._maker(refs[1], ADD) if call.function in DIVIDE and len(refs) == 2 == len(call.args) else None
        numbers = [arg for arg in total.args if isinstance(arg, (int, float))] if total and not total.kwargs else []
        mean = self._maker(total.refs()[0], _MEAN) if total and len(numbers) == len(total.refs()) == 1 else None
        norm = self._maker(refs[0], NORM) if mean and mean.refs() == refs[:1] else None
        if total is None or mean is None or norm is None or len(norm.refs()) != 1 or len(norm.refs()[0].shape) != 4:
            return None
        pixels = axes_of_norm(norm)
        channels = kept_axes(mean)
        if (pixels, channels) not in (({1, 2}, {3}), ({2, 3}, {1})):
            return None
        return response, (norm.refs()[0], float(numbers[0]), channels == {3}), [total, mean, norm]

    def of_channels(self, call: Call) -> _Found:
        """A mean or maximum over channels that ``call`` gives back the axis which it dropped."""
        if call.function not in _UNSQUEEZE or [*call.args[1:], *call.kwargs.values()] not in ([1], [-3]):
            return None
        made = self._maker(call.refs()[0], (*_MEAN, *_AMAX, largest_channel))
        named = dict(zip(("input", "dim", "keepdim"), made.args, strict=False)) | made.kwargs if made else {}
        plain = not named.get("keepdim") and not named.get("dtype") and named.get("dim") in (1, -3, [1], (1,))
        if made is None or not plain or len(named["input"].shape) != 4:
            return None
        return made.function, (named["input"], 1, True), [made]

    def _over_roots(self, call: Call) -> Iterator[tuple[Ref, float, Call, list[Call]]]:
        """For ``a / sqrt(b + epsilon)``, or a product with the inverse root: a, epsilon, what made b, and all inner
        calls."""
        roots = {**dict.fromkeys(MULTIPLY, _INVERSE_ROOT), **dict.fromkeys(DIVIDE, _ROOT)}
        refs = call.refs()
        if call.function not in roots or len(refs) != 2:
            return
        for a, scale in [refs, refs[::-1]] if call.function in MULTIPLY else [refs]:
            root = self._maker(scale, roots[call.function])
            total = self._maker(root.refs()[0], ADD) if root else None
            mean = self._maker(total.refs()[0], (*_MEAN, *_VARIANCE)) if total and len(total.refs()) == 1 else None
            numbers = [arg for arg in total.args if not isinstance(arg, Ref)] if total else []
            plain = len(numbers) == 1 and isinstance(numbers[0], (int, float)) and total and not total.kwargs
            if root and total and mean and plain:
                yield a, float(numbers[0]), mean, [root, total, mean]

    def _centred(self, ref: Ref, axis: int) -> tuple[Ref | None, list[Call]]:
        """Of ``x - mean of x over channels``, which are that axis: x and the calls."""
        difference = self._maker(ref, _SUBTRACT)
        if difference is None or len(difference.refs()) != 2 or len(difference.args) != 2 or difference.kwargs:
            return None, []
        x, of = difference.refs()
        mean = self._maker(of, _MEAN)
        if mean is None or mean.refs() != [x] or _axis_of_channels(mean) != axis:
            return None, []
        return x, [difference, mean]

    def channel_shuffle(self, call: Call) -> _Found:
        """A shuffle of groups of channels that ends in ``call``."""
        if call.function not in _RESHAPE or len(call.results()) != 1 or len(call.refs()) != 1:
            return None
        made = self._made.get(call.refs()[0].number)
        contiguous = [made] if made and made.function is Tensor.contiguous else []
        turned = self._made.get(made.refs()[0].number) if made and contiguous else made
        split = self._maker(turned.refs()[0], _RESHAPE) if turned and turned.function in _TRANSPOSE else None
        if turned is None or split is None or len(split.refs()) != 1:
            return None
        x, apart, across, result = split.refs()[0], split.results()[0], turned.results()[0], call.results()[0]
        if len(x.shape) != 4 or len(apart.shape) != 5 or x.shape != result.shape:
            return None
        n, groups, each, *sides = apart.shape
        if (n, groups * each, *sides) != x.shape or across.shape != (n, each, groups, *sides) or not _swaps(turned):
            return None
        return torch.channel_shuffle, (x, groups), [*contiguous, turned, split]

    def linear(self, call: Call) -> _Found:
        """A linear layer that is spelled as a product with a parameter whose axes change places first, or as a sum of
        products."""
        if call.function is torch.einsum:
            return self._einsum(call)
        count = 3 if call.function in ADDMM else 2
        if call.function not in (*ADDMM, *PRODUCT) or not len(call.args) == len(call.refs()) == count or call.kwargs:
            return None
        *bias, x, turned = call.refs()
        turn = self._made.get(turned.number)
        weight = turn.refs()[0] if turn and len(turned.shape) == 2 and swaps_last(turn) else None
        if turn is None or weight is None or weight.number not in self._leaves:
            return None
        fits = all(ref.shape == weight.shape[:1] for ref in bias)
        return (F.linear, (x, weight, *bias), [turn]) if fits else None

    def _einsum(self, call: Call) -> _Found:
        """A linear layer: a sum over the last axis and one of a parameter's two."""
        refs = call.refs()
        if len(refs) != 2 or len(call.args) != 3 or len(refs[1].shape) != 2 or refs[1].number not in self._leaves:
            return None
        given, _, made = call.args[0].replace(" ", "").partition("->")
        x, _, weight = given.partition(",")
        inner, outer = x[-1:], made[-1:]
        axes = made.replace("...", "") + inner
        functions: dict[str, Callable[..., Any]] = {inner + outer: torch.matmul, outer + inner: F.linear}
        if made[:-1] != x[:-1] or len(set(axes)) != len(axes) or weight not in functions:
            return None
        return functions[weight], tuple(refs), []

    def gelu(self, call: Call) -> _Found:
        """``0.5 * x * (1 + tanh(0.798 * (x + 0.0447 * x^3)))`` that ends in ``call``."""
        refs = call.refs()
        for half, rest in (refs, refs[::-1]) if call.function in MULTIPLY and len(refs) == 2 else ():
            x, calls = self._with_number(half, MULTIPLY, 0.5)
            ref: Ref | None = rest
            for functions, number in ((ADD, 1.0), (_TANH, None), (MULTIPLY, (2 / math.pi) ** 0.5)):
                ref, more = self._with_number(ref, functions, number)
                calls += more
            added = self._maker(ref, ADD) if ref else None
            if x is None or added is None or added.args[:1] != (x,) or len(added.refs()) != 2 or added.kwargs:
                continue
            cube, product = self._with_number(added.refs()[1], MULTIPLY, 0.044715)
            base, power = self._with_number(cube, _POWER, 3)
            if base == x:
                return gelu_tanh, (x,), [*calls, added, *product, *power]
        return None

    def _with_number(
        self, ref: Ref | None, functions: Iterable[Callable[..., Any]], number: float | None
    ) -> tuple[Ref | None, list[Call]]:
        """What a call of these functions made ``ref`` of, with that number or none, and the call."""
        call = self._maker(ref, functions) if ref else None
        if call is None or call.kwargs or len(call.refs()) != 1:
            return None, []
        numbers = [arg for arg in call.args if not isinstance(arg, Ref)]
        return (call.refs()[0], [call]) if numbers == ([] if number is None else [number]) else (None, [])

    def _maker(self, ref: Ref, functions: Iterable[Callable[..., Any]]) -> Call | None:
        """The call that made a tensor, if it is one of these functions."""
        call = self._made.get(ref.number)
        return call if call is not None and call.function in functions else None

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


def _axis_of_channels(reduction: Call) -> int | None:
    """The axis over which a mean or variance is and which it keeps, if it can be that of channels: 1 of a map, or -1,
    the last one; None for others."""
    kept = kept_axes(reduction, _OF_VARIANCE) if reduction.function in _VARIANCE else kept_axes(reduction)
    axes = len(reduction.refs()[0].shape)
    if kept == {axes - 1}:
        return -1
    return 1 if kept == {1} and axes == 4 else None


def _is_biased(variance: Call) -> bool:
    """Whether a variance is a mean of squares, and no estimate from a sample."""
    named = dict(zip(_OF_VARIANCE, variance.args, strict=False)) | variance.kwargs
    return named.get("unbiased") is False or named.get("correction") == 0


def _swaps(turned: Call) -> bool:
    """Whether a call swaps axes 1 and 2 of five."""
    axes = [axis % 5 for axis in pytree.tree_leaves((turned.args[1:], turned.kwargs)) if isinstance(axis, int)]
    return sorted(axes) == [1, 2] or axes == [0, 2, 1, 3, 4]
