"""Softmax attention in recorded calls: how features are cut into heads, what is added to scores, how heads are joined.

Between linear layers networks view, permute, roll and copy; all of that only says which token of which head lies where.
So those calls are run once on the numbers of the places, and attention reads and writes its tokens where they are.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from lipfast.engine.capture import Call, Recording, Ref, refs_in
from lipfast.engine.graph import Heads

_SDPA = F.scaled_dot_product_attention
PRODUCT = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
ADDMM = (torch.addmm, Tensor.addmm)
_MATMUL = (*PRODUCT, torch.bmm, Tensor.bmm)
_SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)
MULTIPLY = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
DIVIDE = (torch.div, Tensor.div, Tensor.__truediv__)
NORM = (torch.norm, Tensor.norm, torch.linalg.vector_norm)
_CLAMP, _CLAMP_MIN = (torch.clamp, Tensor.clamp), (torch.clamp_min, Tensor.clamp_min)
ADD = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
_OF_BOTH = (
    "chunk", "clone", "flatten", "flip", "movedim", "narrow", "permute", "reshape", "roll", "select", "split",
    "squeeze", "swapaxes", "t", "transpose", "unbind", "unflatten", "unsqueeze",
)  # fmt: skip
# Functions of one tensor whose results have its numbers in other places.
REARRANGE = {getattr(owner, name) for owner in (torch, Tensor) for name in _OF_BOTH}
REARRANGE |= {Tensor.view, Tensor.contiguous, Tensor.__getitem__, Tensor.mT.__get__, Tensor.T.__get__}  # type: ignore[attr-defined]
_WIDTH = 32  # what queries are padded to in biases, csrc/cpu/attention.h's BiasWidth


def attention(
    query: Tensor, key: Tensor, value: Tensor, heads: Heads, factors: Tensor | None, *biases: Tensor
) -> Tensor:
    """Softmax attention of heads that lie in rows of features as ``heads`` says, where they were joined again.

    ``factors``: of each problem's scores; ``biases``: `bias_rows` each.
    """
    q, k, v = (_gathered(tensor, heads, which) for which, tensor in enumerate((query, key, value)))
    if heads.across:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if heads.epsilon is not None:
        q, k = F.normalize(q, dim=-1, eps=heads.epsilon), F.normalize(k, dim=-1, eps=heads.epsilon)
    scores = heads.scale * q @ k.transpose(1, 2)
    if factors is not None:
        scores = scores * factors[:, None, None]
    for bias, rows in zip(biases, heads.rows, strict=True):
        scores = scores + bias[rows.long()].transpose(1, 2)[:, : heads.queries]
    weights = torch.softmax(scores, -1)
    weights = weights.nan_to_num(0.0) if heads.safe else weights
    places = heads.places(3, heads.shape[1 if heads.maps[3] else -1])
    made = (weights @ v).transpose(1, 2) if heads.across else weights @ v
    seen = torch.zeros(math.prod(heads.shape), dtype=query.dtype).index_put((places,), made)
    if not heads.maps[3]:
        return seen.view(heads.shape)
    n, channels, height, width = heads.shape
    return seen.view(n, height, width, channels).permute(0, 3, 1, 2)


def _gathered(tensor: Tensor, heads: Heads, which: int) -> Tensor:
    rows = tensor.permute(0, 2, 3, 1) if heads.maps[which] else tensor
    return rows.reshape(-1)[heads.places(which, rows.shape[-1])]


def bias_rows(bias: Tensor) -> Tensor:
    """What is added to scores, (..., queries, keys), as (rows, keys, queries) with whole vectors of queries; True and
    False are where there is an answer and where there is none."""
    if bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape, device=bias.device).masked_fill(~bias, -torch.inf)
    turned = bias.reshape(-1, *bias.shape[-2:]).transpose(1, 2)
    return F.pad(turned, (0, -bias.shape[-2] % _WIDTH))


def added_rows(rows: tuple[Tensor, ...], *biases: Tensor) -> Tensor:
    """The sum of several biases' rows, for each problem one."""
    each = [bias[which.long()] for which, bias in zip(rows, biases, strict=True)]
    return functools.reduce(torch.add, each)


def problem_factors(factors: Tensor, rows: Tensor) -> Tensor:
    """For each problem the factor of its scores."""
    return factors.flatten().index_select(0, rows.to(factors.device))


def causal(queries: int, keys: int) -> Tensor:
    """The scores' bias of queries that see no later token."""
    return torch.full((queries, keys), -torch.inf, device="cpu").triu(1)


class AttentionFinder:
    """Finds attention in a recording, by the calls that end it."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._makers = {ref.number: call for call in recording.calls for ref in call.results()}
        self._read: dict[int, list[Call]] = {}
        for call in recording.calls:
            for ref in call.refs():
                self._read.setdefault(ref.number, []).append(call)
        self._returned = {ref.number for ref in refs_in(recording.result)}
        self._fresh = recording.unused()

    def find(self) -> Iterator["Found"]:
        """Each attention."""
        for call in self._recording.calls:
            core = self._fused(call) or self._spelled(call)
            found = self._joined(core) if core else None
            if found:
                yield found

    # The product of queries and keys, the softmax, the product with values.

    def _fused(self, call: Call) -> "_Core | None":
        if call.function is not _SDPA:
            return None
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        named = dict(zip(names, call.args, strict=False)) | call.kwargs
        operands = [named.get(name) for name in names[:3]]
        if named.get("dropout_p") or named.get("enable_gqa") or not all(isinstance(o, Ref) for o in operands):
            return None
        cut = [self._cut(ref, scaled=place < 2) for place, ref in enumerate(operands) if isinstance(ref, Ref)]
        if any(operand is None for operand in cut):
            return None
        q, k, v = (operand for operand in cut if operand)
        problems, queries, keys = q.index.shape[:-2], q.index.shape[-2], k.index.shape[-2]
        biases: list[_OfScores] = []
        if named.get("is_causal"):
            biases.append(_OfScores(None, torch.zeros(problems, dtype=torch.int32)))
        mask = named.get("attn_mask")
        if mask is not None:
            bias = _of_heads(mask, problems, (queries, keys))
            if bias is None:
                return None
            biases.append(bias)
        scale = named.get("scale")
        scale = q.factor * k.factor * (q.index.shape[-1] ** -0.5 if scale is None else float(scale))
        return _Core(call, q, k, v, scale, True, None, biases, [], False)

    def _spelled(self, call: Call) -> "_Core | None":
        """Attention whose last product ``call`` is."""
        last = _product(call)
        if last is None or last.turned:
            return None
        inner: list[Call] = []
        values = last.second
        made = self._past_dropout(last.first, inner)
        turned = self._makers.get(last.second.number)
        if (made is None or made.function not in _SOFTMAX) and turned is not None and swaps_last(turned):
            inner = [turned]  # values times weights: both products the other way round
            values, made = last.first, self._past_dropout(turned.refs()[0], inner)
        softmax = made if made and made.function in _SOFTMAX and _over_last(made) else None
        if softmax is None:
            return None
        inner.append(softmax)
        scores = self._scores(softmax.refs()[0], inner)
        around = values is last.first
        value = self._cut(values, turned=around, scaled=False)
        if scores is None or value is None:
            return None
        query, key, scale, factors, biases = scores
        return _Core(call, query, key, value, scale, False, factors, biases, inner, around)

    def _past_dropout(self, ref: Ref, inner: list[Call]) -> Call | None:
        """The call that made a tensor, dropout that drops nothing aside."""
        call = self._makers.get(ref.number)
        if call is not None and call.function is F.dropout:
            named = dict(zip(("input", "p", "training"), call.args, strict=False)) | call.kwargs
            if named.get("training", True) and named.get("p", 0.5) > 0:
                return None
            inner.append(call)
            call = self._makers.get(call.refs()[0].number)
        return call

    def _scores(
        self, ref: Ref, inner: list[Call]
    ) -> "tuple[_Cut, _Cut, float, _OfScores | None, list[_OfScores]] | None":
        """Queries, keys, scale, factors and biases of scores."""
        later: list[Call] = []  # what happens to the product, last first
        scale, scaled = 1.0, False
        while True:
            call = self._makers.get(ref.number)
            if call is None:
                return None
            inner.append(call)
            product = _product(call)
            if product:
                break
            both = call.refs() if len(call.args) == len(call.refs()) == 2 and not call.kwargs else []
            if both and (call.function in MULTIPLY or (call.function in ADD and not scaled)):  # else scaled, too
                scaled |= call.function in MULTIPLY
                later.append(call)
                ref = next((r for r in both if self._leads_to_product(r)), both[0])
            elif (factor := _factor(call)) is not None or _moves_one(call):
                scale *= 1.0 if factor is None else factor
                scaled |= factor not in (None, 1)
                later.append(call)
                ref = call.refs()[0]
            else:
                return None
        query, key = self._cut(product.first), self._cut(product.second, turned=not product.turned)
        if query is None or key is None:
            return None
        sizes = query.index.shape[-2], key.index.shape[-2]
        found = _factors_and_biases(later, product.call, query.index.shape[:-2], sizes)
        if found is None or len(found[0]) > 1:
            return None
        factors, biases = found
        return query, key, scale * query.factor * key.factor, factors[0] if factors else None, biases

    def _leads_to_product(self, ref: Ref) -> bool:
        """Whether scores come from there: a bias is a parameter's, or another tensor from outside."""
        waiting, seen = [ref], {ref.number}
        while waiting:
            call = self._makers.get(waiting.pop().number)
            if call is not None and _product(call):
                return True
            if call is not None and call.function in (*REARRANGE, *ADD, *_SCALES):
                waiting += [of for of in call.refs() if of.number not in seen]
                seen.update(of.number for of in call.refs())
        return False

    # Heads.

    def _cut(self, ref: Ref, turned: bool = False, scaled: bool = True) -> "_Cut | None":
        """The rows of features that (..., tokens, features) are made of, and how; ``turned``: (..., features, tokens).
        ``scaled``: they may be multiples, or normalised."""
        chain: list[tuple[Call, Ref]] = []  # last first
        factor = 1.0
        normal: _Normal | None = None
        behind = 0  # so many of them after normalising
        calls: list[Call] = []
        while call := self._makers.get(ref.number):
            before = scaled and normal is None  # else a factor changes nothing but what epsilon means
            found = self._normalised(call) if before else None
            of = call.refs()[0] if call.refs() else ref
            multiple = _factor(call) if before and of.shape == ref.shape else None
            if found is not None:
                normal, of, behind = found, found.of, len(chain)
                calls += found.calls
            elif multiple is not None:
                factor *= multiple
            elif call.function not in REARRANGE or len(call.refs()) != 1 or of.dtype != ref.dtype:
                break  # gradients do not pass another dtype
            chain.append((call, ref))
            ref = of
        if ref.dtype != torch.float32 or len(ref.shape) < 2 or 0 in ref.shape:
            return None
        index = _moved(chain, numbered(math.prod(ref.shape)).view(ref.shape))
        if index.dim() < 3 or 0 in index.shape:
            return None
        index = index.transpose(-1, -2) if turned else index
        calls += [call for call, _ in chain]
        if normal is None:
            return _Cut(ref, index, factor, None, calls)
        token = _moved(chain[:behind], normal.tokens())
        token = token.transpose(-1, -2) if turned else token
        whole = normal.of.shape[normal.axis] == index.shape[-1] and torch.equal(token, token[..., :1].expand_as(token))
        return _Cut(ref, index, factor, normal.epsilon, calls) if whole else None

    def _normalised(self, call: Call) -> "_Normal | None":
        """A call as the division of a tensor by its lengths along an axis."""
        if call.function is F.normalize:
            named = dict(zip(("input", "p", "dim", "eps", "out"), call.args, strict=False)) | call.kwargs
            axis = _axis(named.get("dim", 1), named["input"])
            if named.get("p", 2) != 2 or axis is None or named.get("out") is not None:
                return None
            return _Normal(named["input"], axis, float(named.get("eps", 1e-12)), [])
        if call.function not in DIVIDE or len(call.refs()) != 2 or call.kwargs:
            return None
        of, lengths = call.refs()
        made = self._makers.get(lengths.number)
        least = _least(made) if made else None
        norm = self._makers.get(made.refs()[0].number) if made and least is not None else made
        axes = axes_of_norm(norm) if norm and norm.refs() == [of] else set()
        if made is None or norm is None or len(axes) != 1:
            return None
        return _Normal(of, axes.pop(), least or 0.0, [norm] if made is norm else [made, norm])

    def _joined(self, core: "_Core") -> "Found | None":
        """Attention up to the call that joins the heads."""
        operands = (core.query, core.key, core.value)
        problems, queries, features = core.query.index.shape[:-2], *core.query.index.shape[-2:]
        keys, of_value = core.value.index.shape[-2:]
        same = core.key.index.shape == (*problems, keys, features) and core.value.index.shape[:-2] == problems
        if not same or core.query.epsilon != core.key.epsilon or not isinstance(core.call.result, Ref):
            return None
        sizes = (of_value, queries) if core.turned else (queries, of_value)
        if core.call.result.dtype != torch.float32 or core.call.result.shape != (*problems, *sizes):
            return None
        chain = [core.call]
        while (following := self._only_reader(chain[-1].result)) is not None:
            chain.append(following)
        found = self._in_rows(core, chain, across=False) or self._in_rows(core, chain, across=True)
        if found is None:
            return None
        chain, across, placed = found
        if across:
            features, of_value, queries, keys = queries, keys, features, of_value
        if across and (features != of_value or core.biases):
            return None
        pixels, channels, maps = zip(*placed, strict=True)
        heads = Heads(
            features, of_value, queries, keys, across, core.scale, core.query.epsilon, core.safe,
            chain[-1].result.shape, pixels, channels, maps,
            tuple(bias.rows.flatten() for bias in core.biases),
        )  # fmt: skip
        inner = [*core.inner, *(call for operand in operands for call in operand.calls), *chain[:-1]]
        return self._found(core, chain[-1], inner, heads)

    def _in_rows(
        self, core: "_Core", chain: list[Call], across: bool
    ) -> "tuple[list[Call], bool, list[_Place]] | None":
        """The longest part of the calls that join heads whose result has them in rows of features, as operands have
        them, and where; ``across``: with tokens and features in each other's place."""
        placed: list[_Place] = []
        for operand in (core.query, core.key, core.value):
            place = _places(operand.index.transpose(-1, -2) if across else operand.index, operand.rows.shape)
            if place is None:
                return None
            placed.append(place)
        for end in range(len(chain), 0, -1):
            moved = _inverse(core.call.result, chain[1:end])
            moved = moved.transpose(-1, -2) if moved is not None and core.turned != across else moved
            result = _places(moved, chain[end - 1].result.shape)
            if result:
                return chain[:end], across, [*placed, result]
        return None

    def _only_reader(self, ref: Any) -> Call | None:
        """The rearrangement that reads a tensor, where nothing else does."""
        readers = self._read.get(ref.number, []) if isinstance(ref, Ref) else []
        if len(readers) != 1 or ref.number in self._returned or not _moves_one(readers[0]):
            return None
        return readers[0] if isinstance(readers[0].result, Ref) and len(readers[0].result.shape) > 1 else None

    def _found(self, core: "_Core", last: Call, inner: list[Call], heads: Heads) -> "Found":
        """With the calls that prepare biases."""
        before: list[Call] = []
        new = functools.partial(self._new_call, before, last.grad)
        sizes = (heads.queries, heads.keys)
        refs = []
        for bias in core.biases:
            scores = new(causal, sizes, sizes) if bias.scores is None else bias.scores
            width = -(-heads.queries // _WIDTH) * _WIDTH
            refs.append(new(bias_rows, (scores,), (math.prod(scores.shape) // math.prod(sizes), heads.keys, width)))
        learn = [i for i, bias in enumerate(core.biases) if self._learns(bias)]
        if len(learn) > 1:  # the kernel adds up one gradient
            problems, *_ = heads.channels[0].shape
            rows = tuple(heads.rows[i] for i in learn)
            total = new(added_rows, (rows, *(refs[i] for i in learn)), (problems, *refs[learn[0]].shape[1:]))
            refs = [total, *(ref for i, ref in enumerate(refs) if i not in learn)]
            others = [rows for i, rows in enumerate(heads.rows) if i not in learn]
            heads = dataclasses.replace(heads, rows=(torch.arange(problems, dtype=torch.int32), *others))
        factors = None
        if core.factors:
            of_problems = core.factors.rows.flatten()
            factors = new(problem_factors, (core.factors.scores, of_problems), of_problems.shape)
        args = (core.query.rows, core.key.rows, core.value.rows, heads, factors, *refs)
        of_it = {id(call) for call in (*inner, last)}
        spelled = [call for call in self._recording.calls if id(call) in of_it]
        return Found(
            last, dataclasses.replace(last, function=attention, args=args, kwargs={}, spelled=spelled), before, inner
        )

    def _learns(self, bias: "_OfScores") -> bool:
        return bias.scores is not None and bias.scores.number in self._recording.differentiable

    def _new_call(
        self, calls: list[Call], grad: bool | None, function: Callable[..., Any], args: tuple[Any, ...], shape: Any
    ) -> Ref:
        ref = Ref(next(self._fresh), tuple(shape), torch.float32)
        calls.append(Call(function, args, {}, ref, grad))
        return ref


@dataclasses.dataclass
class Found:
    """An operator that calls spell out: the last of them, what takes its place, calls before that, and the others, that
    may not be needed any more."""

    last: Call
    call: Call
    before: list[Call]
    inner: list[Call]


@dataclasses.dataclass
class _Cut:
    """Heads, (..., tokens, features): which numbers of rows of features they are, normalised, times a factor."""

    rows: Ref
    index: Tensor
    factor: float
    epsilon: float | None  # each token is divided by its length, or by this where it is larger
    calls: list[Call]


@dataclasses.dataclass
class _Normal:
    """A tensor divided by its lengths along an axis, or by epsilon where it is larger."""

    of: Ref
    axis: int
    epsilon: float
    calls: list[Call]  # that make the lengths

    def tokens(self) -> Tensor:
        """For each of its numbers one of what it is divided by."""
        shape = [1 if axis == self.axis else size for axis, size in enumerate(self.of.shape)]
        return numbered(math.prod(shape)).view(shape).expand(self.of.shape)


@dataclasses.dataclass
class _OfScores:
    """What is added to scores (None: causality), or multiplied with them, and for each problem which row of it."""

    scores: Ref | None
    rows: Tensor


@dataclasses.dataclass
class _Core:
    """The calls from queries and keys to what queries see."""

    call: Call
    query: _Cut
    key: _Cut
    value: _Cut
    scale: float
    safe: bool
    factors: _OfScores | None
    biases: list[_OfScores]
    inner: list[Call]
    turned: bool  # the result has features before queries


@dataclasses.dataclass
class _Product:
    """A product of matrices; ``turned``: the second one's last two axes change places first."""

    call: Call
    first: Ref
    second: Ref
    turned: bool


_SCALES = (*MULTIPLY, *DIVIDE)


@functools.lru_cache(maxsize=4)
def numbered(count: int) -> Tensor:
    """The numbers from 0 on, to be read only: making them takes longer than looking at them."""
    return torch.arange(count, dtype=torch.int32, device="cpu")


def _factor(call: Call) -> float | None:
    """What a product or quotient of a tensor and a number scales by; None for other calls."""
    numbers = [arg for arg in call.args if isinstance(arg, (int, float)) and not isinstance(arg, bool)]
    if call.function not in _SCALES or len(numbers) != 1 or len(call.args) != 2 or len(call.refs()) != 1 or call.kwargs:
        return None
    if call.function in DIVIDE:
        return 1.0 / numbers[0] if isinstance(call.args[0], Ref) and numbers[0] else None
    return float(numbers[0])


def _moved(chain: list[tuple[Call, Ref]], numbers: Tensor) -> Tensor:
    """Where calls put numbers, last call first, with what they make for the next one; factors leave them."""
    for call, result in reversed(chain):
        if call.function in REARRANGE:
            numbers = replayed(call, numbers)[[made.number for made in call.results()].index(result.number)]
    return numbers


def _axis(dim: Any, tensor: Ref) -> int | None:
    """The only axis of a tensor that ``dim`` means."""
    (dim,) = dim if isinstance(dim, (list, tuple)) and len(dim) == 1 else (dim,)
    return dim % len(tensor.shape) if isinstance(dim, int) and tensor.shape else None


def kept_axes(call: Call, names: Sequence[str] = ("input", "dim", "keepdim")) -> set[int]:
    """The axes that a call reduces and keeps; ``names`` of its arguments."""
    named = dict(zip(names, call.args, strict=False)) | call.kwargs
    dim, axes = named.get("dim"), len(call.refs()[0].shape)
    if named.get("keepdim") is not True or named.get("dtype") or not axes:
        return set()
    given: Sequence[Any] = dim if isinstance(dim, (list, tuple)) else [dim]
    return {axis % axes for axis in given} if all(isinstance(axis, int) for axis in given) else set()


def axes_of_norm(norm: Call) -> set[int]:
    """The axes over which a call takes the root of a sum of squares and which it keeps; none for another call."""
    if norm.function not in NORM:
        return set()
    order = "ord" if norm.function is torch.linalg.vector_norm else "p"
    names = ("input", order, "dim", "keepdim")
    named = dict(zip(names, norm.args, strict=False)) | norm.kwargs
    squares = named.get(order, 2 if order == "ord" else "fro") in (2, "fro")
    return kept_axes(norm, names) if squares and named.get("out") is None else set()


def _least(call: Call) -> float | None:
    """The number that a call makes smaller ones equal to; None for other calls."""
    names = ("input", "min", "max") if call.function in _CLAMP else ("input", "min")
    named = dict(zip(names, call.args, strict=False)) | call.kwargs
    plain = call.function in (*_CLAMP, *_CLAMP_MIN) and named.get("max") is named.get("out") is None
    least = named.get("min")
    return float(least) if plain and isinstance(least, (int, float)) and least >= 0 else None


def _over_last(softmax: Call) -> bool:
    """Whether a softmax is over the last axis, of float32."""
    named = dict(zip(("input", "dim"), softmax.args, strict=False)) | softmax.kwargs
    axes = len(softmax.refs()[0].shape)
    return named.get("dim") in (-1, axes - 1) and named.get("dtype") in (None, torch.float32)


def _product(call: Call) -> _Product | None:
    """A call as a product of two stacks of matrices."""
    refs = call.refs()
    if len(refs) != 2 or call.kwargs or any(len(ref.shape) < 3 for ref in refs):
        return None
    if call.function in _MATMUL:
        return _Product(call, refs[0], refs[1], False)
    if call.function is not torch.einsum or not isinstance(call.args[0], str):
        return None
    given, _, made = call.args[0].replace(" ", "").partition("->")
    first, _, second = given.partition(",")
    stack, row, inner = first[:-2], first[-2:-1], first[-1:]
    if second[:-2] != stack or made[:-2] != stack or len(set(first)) != len(first) or made[-2:-1] != row:
        return None
    turned = second[-1:] == inner and second[-2:-1] == made[-1:]
    straight = second[-2:-1] == inner and second[-1:] == made[-1:]
    return _Product(call, refs[0], refs[1], turned) if (turned or straight) and made[-1:] not in first else None


def _of_heads(given: Any, problems: Sequence[int], sizes: Sequence[int]) -> _OfScores | None:
    """A tensor that scores, (..., queries, keys), are combined with, if it is one of ``sizes`` for whole heads."""
    fits = isinstance(given, Ref) and given.dtype in (torch.float32, torch.bool) and len(given.shape) >= 2
    if not fits or given.shape[-2:] != tuple(sizes):
        return None
    stack = given.shape[:-2]
    rows = torch.arange(math.prod(stack), dtype=torch.int32).view(stack)
    try:
        return _OfScores(given, rows.expand(problems))
    except RuntimeError:  # it makes more problems of these
        return None


def _factor_of_heads(given: Ref, problems: Sequence[int]) -> _OfScores | None:
    """A tensor that scores are multiplied by, if it has a number for each head or one for all."""
    if math.prod(given.shape) == 1 and given.dtype == torch.float32:
        return _OfScores(given, torch.zeros(problems, dtype=torch.int32))
    return _of_heads(given, problems, (1, 1))


def _factors_and_biases(
    later: list[Call], product: Call, problems: torch.Size, sizes: tuple[int, int]
) -> tuple[list[_OfScores], list[_OfScores]] | None:
    """What scores of a product, (..., queries, keys), are multiplied by and what is added to them, in the order of its
    problems; ``later``: what happens to them, last first."""
    order = torch.arange(problems.numel()).view(problems)  # the problem at each place of the scores' stack
    inside = torch.arange(math.prod(sizes)).view(sizes)
    scores = product.result
    factors: list[_OfScores] = []
    biases: list[_OfScores] = []
    for call in reversed(later):
        if _factor(call) is not None:
            scores = call.result
            continue
        if call.function in REARRANGE:
            (moved,) = replayed(call, order[..., None, None] * inside.numel() + inside)
            if moved.shape[-2:] != inside.shape or moved.numel() != math.prod(scores.shape):
                return None
            order, scores = moved[..., 0, 0] // inside.numel(), call.result
            if not torch.equal(moved, order[..., None, None] * inside.numel() + inside):
                return None
            continue
        other = next((ref for ref in call.refs() if ref != scores), scores)
        added = call.function in ADD
        found = _of_heads(other, order.shape, sizes) if added else _factor_of_heads(other, order.shape)
        if found is None or other.dtype != torch.float32 or call.result.shape != scores.shape:
            return None
        rows = torch.empty(problems.numel(), dtype=torch.int32)
        rows[order.flatten()] = found.rows.flatten()
        (biases if added else factors).append(_OfScores(other, rows))
        scores = call.result
    in_order = torch.equal(order.flatten(), torch.arange(problems.numel()))
    return (factors, biases) if in_order else None


def replayed(call: Call, operand: Tensor) -> list[Tensor]:
    """What a call of one tensor makes of another one, however that lies in memory."""
    args, kwargs = pytree.tree_map(lambda leaf: operand if isinstance(leaf, Ref) else leaf, (call.args, call.kwargs))
    function = Tensor.reshape if call.function is Tensor.view else call.function
    return pytree.tree_leaves(function(*args, **kwargs))


def _inverse(result: Ref, chain: list[Call]) -> Tensor | None:
    """Where calls put the numbers of a tensor; None where they leave some out."""
    moved = numbered(math.prod(result.shape)).view(result.shape)
    for call in chain:
        moved = replayed(call, moved)[0]
    if moved.numel() != math.prod(result.shape):
        return None
    places = torch.empty(moved.numel(), dtype=torch.int32)
    places[moved.flatten().long()] = numbered(moved.numel())
    return places.view(result.shape)


_Place = tuple[Tensor, Tensor, bool]


def _places(index: Tensor | None, shape: Sequence[int]) -> _Place | None:
    """The pixels of each problem's tokens, its first channel, and whether channels are axis 1 of a tensor of that shape
    whose numbers (..., tokens, features) are. None where a head is no range of features."""
    if index is None:
        return None
    index = index.flatten(0, -3)
    found = ranges(index, shape[-1])
    if found is not None:
        return *found, False
    if len(shape) != 4:
        return None
    _, channels, height, width = shape
    picture, rest = index // (channels * height * width), index % (channels * height * width)
    pixel = picture * (height * width) + rest % (height * width)
    found = ranges(pixel * channels + rest // (height * width), channels)
    return None if found is None else (*found, True)


def ranges(index: Tensor, width: int) -> tuple[Tensor, Tensor] | None:
    """The row of each token and the first feature of each problem, of (problems, tokens, features) numbers of rows that
    are ``width`` wide; None where a problem's features are no range of them."""
    first, features = index[..., 0], index[:, 0, 0] % width
    consecutive = torch.equal(index, first[..., None] + torch.arange(index.shape[-1], dtype=torch.int32))
    together = bool((first % width == features[:, None]).all()) and int(features.max()) + index.shape[-1] <= width
    return (first // width, features) if consecutive and together else None


def _moves_one(call: Call) -> bool:
    """Whether a call makes one tensor of the numbers of one."""
    return call.function in REARRANGE and len(call.refs()) == len(call.results()) == 1


def swaps_last(call: Call) -> bool:
    """Whether a call swaps the last two axes of a tensor, and does nothing else."""
    if not _moves_one(call) or len(call.refs()[0].shape) < 2:
        return False
    before = numbered(math.prod(call.refs()[0].shape)).view(call.refs()[0].shape)
    return torch.equal(replayed(call, before)[0], before.transpose(-1, -2))
