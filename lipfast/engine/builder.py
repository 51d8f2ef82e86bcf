"""What calls become, as handlers append it: one segment's graph, and how torch has its tensors."""

import dataclasses
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lipfast.engine.capture import Call, Ref
from lipfast.engine.graph import CONV_KINDS, Graph, Node
from lipfast.engine.heads import MULTIPLY, REARRANGE, attention, numbered, ranges, replayed

Handler = Callable[..., int | list[int]]  # returns the value, or values, of a call's result

PERMUTE = (Tensor.permute, torch.permute)
MULTIPLY_TOO = (*MULTIPLY, Tensor.mul_, Tensor.__imul__)
_ELEMENT_BY_ELEMENT = ("act", "prelu", "combine", "offset", "shift", "gain", "multiply")
# Linear layers: torch's matrix product is faster where more is kept.
_MOST_KEPT_OF_LINEAR = 0.3


class Unsupported(Exception):
    """The engine has no kernel for a call; the message says why."""


class OutOfOrder(Unsupported):
    """An operand's numbers lie elsewhere than in a map: torch puts them in order between two segments."""


@dataclasses.dataclass
class Segment:
    """A graph and the recording's tensors it touches.

    ``graph.inputs[k]`` is tensor ``inputs[k]``, likewise outputs; weight number k is tensor ``weights[k]``, statistics
    number k is the pair ``statistics[k]`` (running mean, running variance). Tensors in ``features_last``, numbers, have
    the axes (batch, height, width, channels); those in ``permuted`` lie in memory as if they had the other order.
    """

    graph: Graph
    inputs: list[Ref]
    outputs: list[Ref]
    weights: list[Ref]
    statistics: list[tuple[Ref, Ref]]
    calls: list[Call]
    grad: bool | None = None  # as `Call.grad`, the same for all of them
    features_last: frozenset[int] = frozenset()
    permuted: frozenset[int] = frozenset()


def _check(tensor: Any, axes: int, *, or_more: bool = False) -> None:
    """Refuse what is no float32 tensor of so many axes, or is empty."""
    fits = isinstance(tensor, Ref) and (len(tensor.shape) == axes or (or_more and len(tensor.shape) > axes))
    if not fits or tensor.dtype != torch.float32:
        raise Unsupported(f"an operand is not a {axes}-D {'or larger ' if or_more else ''}float32 tensor")
    if 0 in tensor.shape:
        raise Unsupported("an operand is empty")


def _rows_in_order(tensor: Tensor, order: Tensor) -> Tensor:
    """Rows of features where ``order`` says which row of ``tensor`` each one is."""
    return tensor.reshape(-1, tensor.shape[-1]).index_select(0, order).view(tensor.shape)


class Builder:
    """Collects calls into one graph."""

    def __init__(
        self,
        handlers: Mapping[Any, Handler],
        row_by_row: Container[Any],
        kept: Callable[[Ref], int],
        leaves: Mapping[int, str],
        parameters: Container[int],
        fresh: Iterator[int],
        grad: bool | None = None,
    ) -> None:
        self.graph = Graph([], [], [], {})
        self._handlers = handlers
        self._row_by_row = row_by_row  # functions that do to each row of features the same
        self.kept, self.grad = kept, grad
        self._fresh = fresh  # numbers of further tensors
        self.order: Tensor | None = None  # of the rows of what attention just made, if not that of its map
        self._leaves = leaves
        self._parameters = parameters  # and what is computed from them alone
        self._values: dict[int, int] = {}  # tensor number -> value
        self._made: dict[int, Ref] = {}  # tensors that calls of this segment made
        self._last: set[int] = set()  # tensors that are maps with the channels behind, (..., channels)
        self._orders: dict[int, Tensor] = {}  # of such tensors and rows of features: the pixel of each row, if moved
        self._scattered: dict[int, tuple[int, Tensor]] = {}  # tensors in no such form: a value, their places in it
        self._movers: dict[int, Call] = {}  # what made those of both kinds, where it only moved numbers
        self._permuted: set[int] = set()  # maps whose axes were permuted last, so that their memory was not
        self._inputs: list[Ref] = []
        self._weights: list[Ref] = []
        self._statistics: list[tuple[Ref, Ref]] = []
        self._calls: list[Call] = []

    def add(self, call: Call) -> Unsupported | None:
        """Append a call, or say why not and change nothing that matters."""
        try:
            self._lower(call)
        except Unsupported as reason:
            if not self._rearrange(call):
                return reason
        self._calls.append(call)
        return None

    def _lower(self, call: Call) -> None:
        handler = self._handlers.get(call.function)
        if handler is None:
            raise Unsupported("the engine has no such operator")
        results = [call.result] if isinstance(call.result, Ref) else call.result
        if not isinstance(results, (tuple, list)) or not all(isinstance(result, Ref) for result in results):
            raise Unsupported("it returns something else than tensors")
        before = len(self.graph.nodes), dict(self._values), len(self._inputs), len(self._weights), len(self._statistics)
        known = set(self.graph.shapes)
        try:
            made_values = handler(self, *call.args, **call.kwargs)
            values = made_values if isinstance(made_values, list) else [made_values]
            if len(values) != len(results):
                raise Unsupported(f"it returns {len(results)} tensors")
            last = self._puts_features_last(call, values[0])
            order = self._order_of(call)
            for value, result in zip(values, results, strict=True):
                self._check_result(value, result, last)
        except (Unsupported, TypeError) as reason:
            nodes, self._values, inputs, weights, statistics = before
            self._last &= self._values.keys()
            for made in (self.graph.nodes, nodes), (self._inputs, inputs), (self._weights, weights):
                del made[0][made[1] :]
            del self.graph.inputs[inputs:], self._statistics[statistics:]
            self.graph.forget(set(self.graph.shapes) - known)
            raise reason if isinstance(reason, Unsupported) else Unsupported(str(reason)) from reason
        for value, result in zip(values, results, strict=True):
            self._note(result, value, last, order)
            if self._lies_permuted(call, result, self.graph.nodes[before[0] :]):
                self._permuted.add(result.number)

    def _note(self, result: Ref, value: int, features_last: bool, order: Tensor | None) -> None:
        """The value of a tensor that a call made, and how it has it."""
        self._values[result.number] = value
        self._made[result.number] = result
        if features_last:
            self._last.add(result.number)
        if order is not None:
            self._orders[result.number] = order

    def _order_of(self, call: Call) -> Tensor | None:
        """In which order the rows of a call's operands, and so of its result, are those of their maps."""
        if call.function is attention:
            return self.order
        known = [ref.number for ref in call.refs() if ref.number in self._values]
        orders = [self._orders[number] for number in known if number in self._orders]
        if not orders:
            return None
        if call.function not in self._row_by_row or len(orders) < len(known):
            raise OutOfOrder("its rows lie in another order")
        if not all(torch.equal(orders[0], order) for order in orders[1:]):
            raise OutOfOrder("rows of its operands lie in different orders")
        return orders[0]

    def _rearrange(self, call: Call) -> bool:
        """Note where a call that only moves numbers puts them; False if it is no such call."""
        refs, results = call.refs(), call.results()
        if call.function not in REARRANGE or len(refs) != 1 or any(made.dtype != torch.float32 for made in results):
            return False
        known = self._places(refs[0])
        if known is None:
            return False
        value, places = known
        for result, moved in zip(results, replayed(call, places), strict=True):
            found = self._recognised(value, moved)
            if found is None:
                self._scattered[result.number] = value, moved
                self._made[result.number] = result
            else:
                self._note(result, value, *found)
            if found is None or found[1] is not None:
                self._movers[result.number] = call
        return True

    def _places(self, tensor: Ref) -> tuple[int, Tensor] | None:
        """A tensor's value, and for each of its numbers the place in it, pixel by pixel; None if it has none."""
        if tensor.number in self._scattered:
            return self._scattered[tensor.number]
        if not self.makes(tensor):
            return None
        value = self._values[tensor.number]
        n, channels, height, width = self.graph.shapes[value]
        places = numbered(n * channels * height * width).view(-1, channels)
        if tensor.number in self._orders:
            places = places[self._orders[tensor.number]]
        if value in self.graph.rows or tensor.number in self._last:
            return value, places.view(tensor.shape)
        whole = places.view(n, height, width, channels).permute(0, 3, 1, 2)
        return (value, whole.reshape(tensor.shape)) if whole.shape == tensor.shape else None

    def _recognised(self, value: int, places: Tensor) -> tuple[bool, Tensor | None] | None:
        """Whether a tensor of these places of a value is it with the features last, and in which order its rows are."""
        n, channels, height, width = self.graph.shapes[value]
        pixels, rows = n * height * width, value in self.graph.rows
        if places.numel() != pixels * channels:
            return None
        whole = numbered(pixels * channels).view(n, height, width, channels).permute(0, 3, 1, 2)
        if not rows and torch.equal(places, whole):
            return False, None
        if places.dim() < 2 or places.shape[-1] != channels:
            return None
        found = ranges(places.reshape(1, -1, channels), channels)
        if found is None:
            return None
        order = found[0].flatten().long()
        return not rows, None if torch.equal(order, torch.arange(pixels)) else order

    def _check_result(self, value: int, result: Ref, features_last: bool) -> None:
        if 0 in self.graph.shapes[value]:
            raise Unsupported("an empty result")
        n, channels, height, width = self.graph.shapes[value]
        behind = (math.prod(result.shape[:-1]), result.shape[-1]) == (n * height * width, channels)
        if not (behind if features_last else self.graph.holds(value, result.shape)):
            raise Unsupported(f"a result of shape {result.shape}")
        if result.dtype != torch.float32:
            raise Unsupported(f"a result of {result.dtype}")

    def _puts_features_last(self, call: Call, value: int) -> bool:
        """Whether a call's result, of that value, is a map with the channels behind, as its operands are, or as it puts
        them."""
        if call.function is attention:
            return not (call.args[3].maps[3] or value in self.graph.rows)
        last = any(ref.number in self._last for ref in call.refs())
        return last != (call.function in PERMUTE)

    def _lies_permuted(self, call: Call, result: Ref, added: list[Node]) -> bool:
        """Whether a call's result lies in memory in another order than its axes, as the first map of its shape does."""
        if len(result.shape) != 4:
            return False  # flattened, which lays it out anew
        if call.function in PERMUTE:
            return call.refs()[0].number not in self._permuted
        of_first = next((ref.number in self._permuted for ref in call.refs() if ref.shape == result.shape), False)
        element_by_element = call.function in MULTIPLY_TOO or all(node.kind in _ELEMENT_BY_ELEMENT for node in added)
        return of_first and element_by_element and call.function is not Tensor.contiguous

    def finish(self, last_use: dict[int, int], position: int) -> "list[Segment | Call]":
        """The segment up to the call at ``position``; the plain calls when there is nothing worth a conversion."""
        if not any(self._repays(node) for node in self.graph.nodes):
            return [part for call in self._calls for part in (call.spelled or [call])]
        wanted = [ref for number, ref in self._made.items() if last_use.get(number, -1) >= position]
        outputs, after = self._returned(wanted)
        self.graph.outputs = [self._values[ref.number] for ref in outputs]
        self.graph.pad_rows()
        orders = frozenset(self._last), frozenset(self._permuted)
        weights, statistics = self._weights, self._statistics
        segment = Segment(self.graph, self._inputs, outputs, weights, statistics, self._calls, self.grad, *orders)
        return [segment, *after]

    def _returned(self, wanted: Sequence[Ref]) -> tuple[list[Ref], list[Call]]:
        """What the segment must return for these tensors, and the torch calls that make those of it that it has in
        another order."""
        outputs: dict[int, Ref] = {}
        after: dict[int, Call] = {}
        missing, seen = list(wanted), set[int]()
        while missing:
            one = missing.pop(0)
            if one.number in seen:
                continue
            seen.add(one.number)
            mover = self._movers.get(one.number)
            if mover is not None:
                after[id(mover)] = mover
                missing += [of for of in mover.refs() if self.makes(of)]
            elif one.number in self._orders:
                base, call = self._in_order(one)
                outputs[base.number] = base
                after[id(call)] = call
            else:
                outputs[one.number] = one
        positions = {id(call): place for place, call in enumerate(self._calls)}
        return list(outputs.values()), sorted(after.values(), key=lambda call: positions.get(id(call), -1))

    def _in_order(self, tensor: Ref) -> tuple[Ref, Call]:
        """A tensor of rows as its map has them, and the call that puts them in order."""
        base = Ref(next(self._fresh), tensor.shape, tensor.dtype)
        self._values[base.number] = self._values[tensor.number]
        if tensor.number in self._last:
            self._last.add(base.number)
        return base, Call(_rows_in_order, (base, self._orders[tensor.number]), {}, tensor, self.grad)

    def _repays(self, node: Node) -> bool:
        """Whether an operator can save more than converting maps costs: a convolution that mixes channels, or a pruned
        linear layer."""
        if node.kind not in CONV_KINDS:
            return False
        weight = self._weights[node.weight]
        if node.output in self.graph.rows:
            return self.mostly_pruned(weight)
        return bool(node.groups == 1 or weight.shape[1] > 1)

    # What handlers use.

    def map(self, tensor: Any) -> int:
        """The value of a 4-D float32 tensor."""
        _check(tensor, 4)
        if self.has_rows(tensor) or self.has_features_last(tensor):
            raise Unsupported("an operand is no map with the channels before height and width")
        if tensor.number not in self._values:
            self._values[tensor.number] = self._outside(tensor, self.graph.fresh(tensor.shape))
        return self._values[tensor.number]

    def _outside(self, tensor: Ref, value: int) -> int:
        """Note that a value is a tensor from outside this segment."""
        if tensor.number in self._scattered:
            raise OutOfOrder("the numbers of an operand lie in no map's order")
        self._inputs.append(tensor)
        self.graph.inputs.append(value)
        return value

    def knows(self, tensor: Any) -> bool:
        """Whether a tensor has a value in this segment."""
        return isinstance(tensor, Ref) and tensor.number in self._values

    def has_rows(self, tensor: Any) -> bool:
        """Whether a tensor's value in this segment is rows of features."""
        return self.knows(tensor) and self._values[tensor.number] in self.graph.rows

    def has_features_last(self, tensor: Any) -> bool:
        """Whether a tensor of this segment is a map with the channels behind."""
        return isinstance(tensor, Ref) and tensor.number in self._last

    def is_map_behind(self, tensor: Any) -> bool:
        """Whether a tensor of this segment is all of a map, (n, height, width, channels)."""
        if not self.has_features_last(tensor):
            return False
        n, channels, height, width = self.graph.shapes[self._values[tensor.number]]
        return bool(tensor.shape == (n, height, width, channels))

    def flattened(self, tensor: Any) -> int:
        """The value of a 4-D float32 tensor whose items are flattened. One from outside comes in as rows of features,
        which costs nothing."""
        if self.knows(tensor):
            return self.map(tensor)
        _check(tensor, 4)
        return self._outside(tensor, self.graph.fresh_rows(tensor.shape[0], math.prod(tensor.shape[1:])))

    def rows(self, tensor: Any) -> int:
        """The value of a (..., features) float32 tensor as rows of features, or as the map that it is."""
        _check(tensor, 2, or_more=True)
        if self.has_features_last(tensor):
            return self._values[tensor.number]
        known = self._values.get(tensor.number)
        if known is None:
            rows = self.graph.fresh_rows(math.prod(tensor.shape[:-1]), tensor.shape[-1])
            self._values[tensor.number] = self._outside(tensor, rows)
        elif known not in self.graph.rows:
            if len(tensor.shape) != 2:
                raise Unsupported("an operand is a map, not rows of features")
            self._values[tensor.number] = self.node_of_rows("flatten", [known], self.graph.flat_shape(known))
        return self._values[tensor.number]

    def along(self, tensor: Any, axis: int) -> int:
        """The value of a tensor whose channels are that axis, 1 of a map or -1 of rows of features."""
        return self.map(tensor) if axis == 1 else self.rows(tensor)

    def mostly_pruned(self, weight: Ref) -> bool:
        """Whether a linear layer keeps few enough weights to be faster than torch's."""
        return self.kept(weight) <= _MOST_KEPT_OF_LINEAR * math.prod(weight.shape)

    def any(self, tensor: Any) -> int:
        """The value of a map, flattened or not, or of rows of features, for what works on each number alone."""
        return self._values[tensor.number] if self.knows(tensor) else self.map(tensor)

    def is_repeated(self, value: int) -> bool:
        """Whether a value holds pixels of another one again and again."""
        return any(node.output == value and node.kind == "resample" for node in self.graph.nodes)

    def pixels(self, tensor: Ref, rows: Tensor) -> Tensor:
        """Which pixels of its map these rows of a tensor are."""
        order = self._orders.get(tensor.number)
        return rows if order is None else order[rows.long()].int()

    def beside(self, tensor: Any, other: Any) -> None:
        """Take a tensor from outside as a map, if it has the shape of one with the channels behind."""
        if self.knows(tensor) or not isinstance(tensor, Ref) or not self.has_features_last(other):
            return
        if tensor.shape == other.shape and tensor.dtype == torch.float32:
            value = self.graph.fresh(self.graph.shapes[self._values[other.number]])
            self._values[tensor.number] = self._outside(tensor, value)
            self._last.add(tensor.number)

    def map_or_rows(self, tensor: Any) -> int:
        """The value of a map or of rows of features, for what works on each channel or feature."""
        return self.rows(tensor) if isinstance(tensor, Ref) and len(tensor.shape) == 2 else self.map(tensor)

    def makes(self, tensor: Any) -> bool:
        """Whether a tensor is computed inside this segment."""
        return isinstance(tensor, Ref) and tensor.number in self._made

    def is_parameter(self, tensor: Any) -> bool:
        """Whether a tensor is a parameter or buffer of the module, or computed from such."""
        return isinstance(tensor, Ref) and tensor.number in self._parameters

    def shape(self, tensor: Any) -> tuple[int, int, int, int]:
        """The sides of a map."""
        return self.graph.shapes[self.map(tensor)]

    def weight(self, tensor: Ref | None) -> int | None:
        """The number of a tensor that is a weight of this segment: not computed inside it. One that is used twice gets
        two, whose gradients autograd adds up."""
        if tensor is None:
            return None
        if not isinstance(tensor, Ref) or tensor.dtype != torch.float32 or self.makes(tensor):
            raise Unsupported("a weight that is not a float32 tensor from outside")
        moved = {ref.number for pair in self._moved() for ref in self._statistics[pair]}
        if tensor.number in moved:
            raise Unsupported("running statistics that changed before they are read")
        self._weights.append(tensor)
        return len(self._weights) - 1

    def running(self, mean: Ref | None, variance: Ref | None, training: bool) -> int | None:
        """The number of a pair of running statistics."""
        if mean is None or variance is None:
            return None
        if mean.dtype != torch.float32:
            raise Unsupported("running statistics that are not float32")
        if mean.number not in self._leaves or variance.number not in self._leaves:
            raise Unsupported("running statistics that the module computes")
        known = [number for number, other in enumerate(self._statistics) if other == (mean, variance)]
        if known and (training or not self._moved().isdisjoint(known)):
            raise Unsupported("running statistics that change twice, or are read after they changed")
        if training and any(ref.number in (mean.number, variance.number) for ref in self._weights):
            raise Unsupported("running statistics that are read before they change")
        self._statistics.append((mean, variance))
        return len(self._statistics) - 1

    def _moved(self) -> set[int]:
        """The running statistics that this segment changes."""
        norms = (node for node in self.graph.nodes if node.kind == "norm" and node.training)
        return {node.running for node in norms if node.running is not None}

    def node(self, kind: str, inputs: list[int], shape: tuple[int, int, int, int], **attributes: Any) -> int:
        """Append an operator and return its value."""
        value = self.graph.fresh(shape)
        self.graph.nodes.append(Node(kind, inputs, value, attributes))
        return value

    def node_of_rows(self, kind: str, inputs: list[int], shape: tuple[int, int], **attributes: Any) -> int:
        """Append an operator that makes rows of features."""
        value = self.graph.fresh_rows(*shape)
        self.graph.nodes.append(Node(kind, inputs, value, attributes))
        return value

    def same(self, kind: str, tensor: Any, **attributes: Any) -> int:
        """An operator that keeps the shape."""
        return self.node(kind, [self.map(tensor)], self.shape(tensor), **attributes)

    def each(self, kind: str, tensor: Any, **attributes: Any) -> int:
        """An operator on each number alone."""
        return self.like(kind, self.any(tensor), **attributes)

    def like(self, kind: str, value: int, *others: int, **attributes: Any) -> int:
        """An operator whose result has the form of its first input."""
        if value in self.graph.rows:
            return self.node_of_rows(kind, [value, *others], self.graph.flat_shape(value), **attributes)
        return self.node(kind, [value, *others], self.graph.shapes[value], **attributes)
