"""From a graph to a `Program`: which maps exist, where they lie in memory, which step runs when.

Steps are written down first, forward and then backward, with maps as `Slot`s. That gives each map the span of steps in
which it is alive, and so its place in the arena: maps alive at different times share memory. Then the program is built.

A halo is filled right before the first step that reads it, or by the step that writes the map where that step can; the
planner follows what each halo holds, so nothing is filled twice.
"""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

import lipfast._C as _C
from lipfast.engine.blocks import Block, choose_blocks, fuse, sheets
from lipfast.engine.graph import ACTIVATIONS, CONV_KINDS, DONE_BY_CONV, Graph, Heads, Node, Shape, Taps, consecutive
from lipfast.ops.lane_conv import KERNELS, asked_kernel
from lipfast.ops.lanes import LANES, PADDING_MODES, plane_vectors

_ALIGNMENT = 16  # floats: one vector
_FORWARD, _BACKWARD = 0, 1
_NEVER_FREED = 1 << 60
# Activations whose slope can be told from their result, so that they may overwrite their input.
_SLOPE_FROM_RESULT = ("relu", "relu6", "leaky_relu")
# Operators whose result may take the place of their first input where nothing is differentiated.
_OVERWRITE = ("act", "prelu", "norm", "group_norm", "layer_norm", "finish", "combine", "multiply", "scale", "offset")
_LEAST_SLOPE_UNDONE = 1e-3  # below it a LeakyReLU's result may underflow and no longer tell its input


@dataclasses.dataclass
class Weight:
    """One weight of a segment: its dense shape, which entries live (None: all) and whether it is trained."""

    shape: tuple[int, ...]
    mask: Tensor | None
    trained: bool

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return int(self.mask.count_nonzero()) if self.mask is not None else int(numpy.prod(self.shape))


@dataclasses.dataclass
class Options:
    """What a program is for.

    Attributes:
        backward: whether gradients are wanted at all.
        input_gradients: for each graph input.
        backward_again: the backward pass may run twice after one forward pass, so it must not overwrite activations.
        exact: no Winograd.
    """

    backward: bool
    input_gradients: Sequence[bool]
    backward_again: bool = True
    exact: bool = False


@dataclasses.dataclass
class Plan:
    """A program and where its numbers are.

    ``values[k]`` is the part of the program's values (and gradients) that holds weight k; ``statistics[k]`` those of
    the program's statistics that hold running mean and variance k. Section 0 takes the graph's inputs, then its
    outputs; section 1 the gradients of the outputs in ``output_gradients``, then those of the inputs in
    ``input_gradients``.
    """

    program: _C.Program
    values: list[slice]
    statistics: list[tuple[slice, slice]]
    output_gradients: list[int]
    input_gradients: list[int]


@dataclasses.dataclass(eq=False)
class Storage:
    """Memory of one map; steps are counted over both sections."""

    shape: Shape
    block: Block
    grid: int
    halo: int = 0
    first: int = -1
    last: int = -1
    offset: int = -1

    @property
    def plane(self) -> int:
        """Vectors from one channel to the next."""
        return plane_vectors((self.block[0] + 2 * self.halo) * (self.block[1] + 2 * self.halo))

    @property
    def floats(self) -> int:
        """Size of the whole map."""
        return sheets(self.shape[0], self.grid) * self.shape[1] * self.plane * LANES


@dataclasses.dataclass(frozen=True)
class Slot:
    """``count`` channels of a storage from ``first`` on, each ``step`` behind the one before."""

    storage: Storage
    first: int
    count: int
    step: int = 1

    @property
    def last(self) -> int:
        """One behind the last channel."""
        return self.first + (self.count - 1) * self.step + 1

    def part(self, which: range) -> "Slot":
        """Some of its channels."""
        return Slot(self.storage, self.first + which.start * self.step, len(which), self.step * which.step)

    def covers(self, other: "Slot") -> bool:
        """Whether all channels of another slot of the same storage are among these."""
        return self == other or (self.step == 1 and self.first <= other.first and other.last <= self.last)

    def within(self, whole: "Slot") -> range:
        """Which channels of ``whole``, a slot of the same storage, these are."""
        first, step = (self.first - whole.first) // whole.step, self.step // whole.step
        return range(first, first + self.count * step, step)


_ZERO = ("zeros", 0)  # a halo's padding mode and width


@dataclasses.dataclass(frozen=True)
class Halo:
    """What a step wants around a map: ``pad`` pixels of padding, and the blocks' seams ``reach`` pixels wide."""

    mode: str
    pad: int
    reach: int

    @property
    def state(self) -> tuple[str, int]:
        """What the halo holds then. Zeros are zeros however wide the padding."""
        return (self.mode, self.pad) if self.mode != "zeros" else _ZERO


def plan(graph: Graph, weights: Sequence[Weight], statistics: Sequence[int], options: Options) -> Plan:
    """Plan and build the program of a graph, which is left as it is.

    Args:
        graph: what to compute.
        weights: by weight number.
        statistics: channels of each pair of running statistics.
        options: what the program is for.

    Raises:
        MemoryError: the maps do not fit.
    """
    return _Planner(copy.deepcopy(graph), weights, statistics, options).build()


class _Planner:
    def __init__(self, graph: Graph, weights: Sequence[Weight], statistics: Sequence[int], options: Options) -> None:
        fuse(graph, options.backward, weights)
        self.blocks = choose_blocks(graph, weights)
        self.graph, self.weights, self.options = graph, weights, options
        self.readers, self.read_once = graph.consumers(), graph.read_once()
        self.steps: list[tuple[str, tuple[Any, ...]]] = []
        self.filled: dict[Storage, dict[Slot, tuple[str, int]]] = {}
        self.values = _slices([weight.count for weight in weights])
        starts = _slices([2 * channels for channels in statistics])
        self.statistics = [
            (slice(part.start, part.start + channels), slice(part.start + channels, part.stop))
            for part, channels in zip(starts, statistics, strict=True)
        ]
        self.statistic_count = starts[-1].stop if starts else 0
        self.saved: dict[int, int] = {}
        self.program = _C.Program(keeps_weights=not options.backward)
        self.convs = {at: self._add_conv(node) for at, node in enumerate(graph.nodes) if node.kind in CONV_KINDS}
        self.made_at = {node.output: at for at, node in enumerate(graph.nodes)}
        self.home = self._place()

    def build(self) -> Plan:
        self._forward()
        self.forward_steps = len(self.steps)
        given, wanted = _Backward(self).emit() if self.options.backward else ([], [])
        value_count = self.values[-1].stop if self.values else 0
        map_floats = self._allocate()
        try:
            self.program.allocate(map_floats, value_count, self.statistic_count)
        except MemoryError:
            size = f"{4e-9 * map_floats:.1f} GB"
            raise MemoryError(f"engine: no {size} for the maps of this network; give a smaller input") from None
        self._write()
        return Plan(self.program, self.values, self.statistics, given, wanted)

    # Placing values.

    def _place(self) -> dict[int, Slot]:
        """The memory of each value: producers write straight into the concatenation that reads them, and operators that
        can overwrite their only-read input do."""
        home: dict[int, Slot] = {}
        overwritten: set[int] = set()  # values that do not outlive their reader
        for node in reversed(self.graph.nodes):
            if node.output not in home:
                if node.kind == "channels":
                    continue  # what has no place of its own is part of its input
                home[node.output] = self.fresh(node.output)
            if node.kind == "cat":
                for value, which in self._cat_parts(node):
                    home.setdefault(value, home[node.output].part(which))
            elif self._may_overwrite(node, overwritten):
                home.setdefault(node.inputs[0], home[node.output])
                overwritten.update(self._parts(node.inputs[0]))
        for value in self.graph.inputs:
            if value not in home:
                home[value] = self.fresh(value)
        for node in self.graph.nodes:
            if node.kind == "channels":
                home.setdefault(node.output, home[node.inputs[0]].part(channels_of(node)))
        return home

    def fresh(self, value: int) -> Slot:
        """Memory that a value fits."""
        shape = self.graph.shapes[value]
        return Slot(Storage(shape, self.blocks[value], self.graph.side(value)), 0, shape[1])

    def _may_overwrite(self, node: Node, overwritten: set[int]) -> bool:
        parts = self._parts(node.inputs[0])
        if not self.read_once.issuperset(parts):
            return False
        maker = self.made_at.get(node.inputs[0])
        if maker is not None and self.graph.nodes[maker].kind == "channels":
            return False  # better part of what it is taken from than a copy
        if not self.options.backward:
            return node.kind in _OVERWRITE
        if node.kind in ("shift", "offset"):
            return True
        if node.output in overwritten:
            return False  # the backward pass reads the result in the input's place
        if node.kind == "norm":
            return bool(node.act == "none" or (node.act == "leaky_relu" and node.slope >= _LEAST_SLOPE_UNDONE))
        return node.kind == "act" and node.act in _SLOPE_FROM_RESULT and (node.act != "leaky_relu" or node.slope > 0)

    def _parts(self, value: int) -> set[int]:
        """A value and, for a concatenation, all that may lie in its memory."""
        parts = {value}
        for node in self.graph.nodes:
            if node.output == value and node.kind == "cat":
                parts.update(*(self._parts(part) for part in node.inputs))
        return parts

    # Writing steps.

    def emit(self, name: str, *args: Any) -> None:
        """Note a step. Slots among the arguments are alive at it."""
        for slot in args:
            if isinstance(slot, Slot):
                storage = slot.storage
                storage.first = len(self.steps) if storage.first < 0 else storage.first
                storage.last = len(self.steps)
        self.steps.append((name, args))

    def wrote(self, slot: Slot) -> None:
        """The slot's pixels are new, so its halo is stale."""
        states = self.filled.setdefault(slot.storage, {})
        for other in [known for known in states if known.first < slot.last and slot.first < known.last]:
            del states[other]

    def halo_of(self, node: Node) -> Halo | None:
        """What a node wants around its input."""
        if node.kind == "conv":
            reach = self.reach(node)
            return Halo(node.padding_mode, max(node.pad), reach) if reach > 0 else None
        if node.kind == "conv_transpose":
            reach = int(self.program.gradient_halo(self.convs[self.made_at[node.output]]))
            return Halo("zeros", 0, reach) if reach > 0 else None
        if node.kind == "upsample2" and node.bilinear:
            return Halo("replicate", 1, 1)
        if node.kind == "pool":
            pad = max(node.pad, self._beyond(node))
            reach = max(pad, node.kernel - node.stride - node.pad)
            zeros = not node.maximum or self._unmoved_by_zeros(node.inputs[0])
            return Halo("zeros" if zeros else "replicate", pad, reach) if reach > 0 else None
        return None

    def _beyond(self, pool: Node) -> int:
        """How many pixels behind the picture the last window of a pooling holds."""
        sides = zip(self.graph.shapes[pool.inputs[0]][2:], self.graph.shapes[pool.output][2:], strict=True)
        return max(int((windows - 1) * pool.stride - pool.pad + pool.kernel) - side for side, windows in sides)

    def reach(self, conv: Node) -> int:
        """How far beyond a block a convolution reads its input, or a transposed one its result's gradient."""
        kernel = self.weights[conv.weight].shape[2:]
        behind = max(conv.dilation * (k - 1) - p - (conv.stride - 1) for k, p in zip(kernel, conv.pad, strict=True))
        return int(max(*conv.pad, behind))

    def _unmoved_by_zeros(self, value: int) -> bool:
        """Whether zeros beside it change none of a value's maxima, nor take a share of their gradients."""
        makers = [node for node in self.graph.nodes if node.output == value]
        return not self.options.backward and any(node.attributes.get("act") in ("relu", "relu6") for node in makers)

    def need(self, section: int, slot: Slot, halo: Halo | None) -> None:
        """Fill the slot's halo unless it holds that already."""
        if halo is None:
            return
        slot.storage.halo = max(slot.storage.halo, halo.reach)
        if not self._holds(slot, halo.state):
            mode, pad = halo.state
            self.emit("fill_halo", section, slot, PADDING_MODES[mode], pad)
            self.now_holds(slot, halo.state)

    def _holds(self, slot: Slot, state: tuple[str, int]) -> bool:
        states = self.filled.get(slot.storage, {})
        return any(held == state and known.covers(slot) for known, held in states.items())

    def now_holds(self, slot: Slot, state: tuple[str, int]) -> None:
        """The slot's halo and dead pixels are as `need` would make them."""
        self.wrote(slot)
        self.filled[slot.storage][slot] = state

    def has_dead_pixels(self, value: int) -> bool:
        """Whether the blocks cover more than the picture."""
        return any(
            self.graph.side(value) * block != side
            for block, side in zip(self.blocks[value], self.graph.shapes[value][2:], strict=True)
        )

    # Forward.

    def _forward(self) -> None:
        for number, value in enumerate(self.graph.inputs):
            self.emit("from_plain", _FORWARD, number, self.home[value])
            self.wrote(self.home[value])
        pairs = self._pairs()
        paired = {position for pair in pairs.values() for each in pair for position in each.positions}
        finished = {at: conv for at, conv in self._finished_convs().items() if conv not in paired}
        waiting = paired | set(finished.values())  # until all that their finish reads is there
        for position, node in enumerate(self.graph.nodes):
            if position in pairs:
                self._conv_pair(*pairs[position])
            if position in waiting:
                continue
            if position in finished:
                self._conv_finish(finished[position], node)
                continue
            slot = self.home[node.inputs[0]]
            self.need(_FORWARD, slot, self.halo_of(node))
            getattr(self, f"_{node.kind}")(position, node, slot, self.home[node.output])
        for number, value in enumerate(self.graph.outputs):
            self.emit("to_plain", _FORWARD, self.home[value], len(self.graph.inputs) + number)

    def _finished_convs(self) -> dict[int, int]:
        """Position of a finish -> that of the conv which can do it as it stores its sums: nothing else reads them."""
        makers = {self.graph.nodes[at].output: at for at in self.convs if self.graph.nodes[at].kind == "conv"}
        return {
            position: makers[node.inputs[0]]
            for position, node in enumerate(self.graph.nodes)
            if node.kind == "finish"
            and node.act in DONE_BY_CONV
            and node.inputs[0] in makers
            and node.inputs[0] in self.read_once
        }

    def _pairs(self) -> dict[int, tuple["_Finished", "_Finished"]]:
        """Convolutions with the depthwise one behind each that run as one, by the position at which both are done."""
        makers: dict[int, _Finished] = {}
        for position in self.convs:
            if self.graph.nodes[position].kind == "conv" and not self.options.backward:
                each = self._finished(position)
                makers[self.graph.nodes[each.last].output] = each
        pairs: dict[int, tuple[_Finished, _Finished]] = {}
        taken: set[_Finished] = set()
        for second in makers.values():
            value = self.graph.nodes[second.conv].inputs[0]
            first = makers.get(value)
            if first is None or first in taken or value not in self.read_once:
                continue
            if self.program.is_pair(self.convs[first.conv], self.convs[second.conv]):
                pairs[second.last] = first, second
                taken.update((first, second))
        return pairs

    def _finished(self, conv: int) -> "_Finished":
        """A convolution with the finish behind it, unless that adds something."""
        value = self.graph.nodes[conv].output
        reader = self.readers[value][0] if value in self.read_once else None
        alone = (
            reader is not None
            and self.graph.nodes[reader].kind == "finish"
            and self.graph.nodes[reader].inputs == [value]
        )
        return _Finished(conv, reader if alone else None)

    def offset(self, weight: int | None) -> int:
        """Where a weight starts in the values; -1 for none."""
        return -1 if weight is None else self.values[weight].start

    def _conv(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        weights = self.offset(node.weight), self.offset(node.bias)
        self._make("conv_forward", node, _FORWARD, self.convs[position], *weights, x, y)

    def _conv_transpose(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        self.emit("conv_input_gradient", _FORWARD, self.convs[position], self.offset(node.weight), x, y)
        self.wrote(y)

    def _shift(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        self._make("finish", node, _FORWARD, x, -1, -1, y, *self.affine(None, node.beta))

    def _gain(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        self._make("finish", node, _FORWARD, x, -1, -1, y, *self.affine(node.gamma, None))

    def affine(self, gamma: int | None, beta: int | None) -> tuple[Any, ...]:
        """The numbers of a finish that is but a factor and a shift."""
        offsets = [self.offset(gamma), self.offset(beta), -1, -1, self.step(gamma), self.step(beta), -1]
        return 0.0, offsets, ACTIVATIONS["none"], 0.0

    def step(self, weight: int | None) -> int:
        """From one channel's number to the next one's: 0 where one is that of all channels."""
        return 0 if weight is not None and self.weights[weight].count == 1 else 1

    def _conv_finish(self, conv_position: int, finish: Node) -> None:
        conv = self.graph.nodes[conv_position]
        x, y = self.home[conv.inputs[0]], self.home[finish.output]
        self.need(_FORWARD, x, self.halo_of(conv))
        self._make("conv_finish", finish, self._numbers(conv_position, finish), x, self._residual(finish), y)

    def _numbers(self, conv_position: int, finish: Node | None) -> tuple[Any, ...]:
        """What a step takes that does a convolution and its finish."""
        conv = self.graph.nodes[conv_position]
        weights = self.convs[conv_position], self.offset(conv.weight), self.offset(conv.bias)
        if finish is None:
            return *weights, *self.affine(None, None)
        return *weights, finish.epsilon, self._finish_offsets(finish), ACTIVATIONS[finish.act], finish.slope

    def _conv_pair(self, first: "_Finished", second: "_Finished") -> None:
        nodes = self.graph.nodes
        x, last = self.home[nodes[first.conv].inputs[0]], nodes[second.last]
        self.need(_FORWARD, x, self.halo_of(nodes[first.conv]))
        value, halo = nodes[second.conv].inputs[0], self.halo_of(nodes[second.conv])
        between = Storage(self.graph.shapes[value], self.blocks[value], self.graph.side(value))
        between.halo = halo.reach if halo else 0
        numbers = [self._numbers(p.conv, None if p.finish is None else nodes[p.finish]) for p in (first, second)]
        maps = x, between.halo, between.plane, *_halo_arguments(halo), self.home[last.output]
        self._make("conv_pair", last, *numbers, *maps)

    def _residual(self, finish: Node) -> Slot | int:
        return self.home[finish.inputs[1]] if len(finish.inputs) - finish.gated > 1 else -1

    def _finish_offsets(self, finish: Node) -> list[int]:
        """gamma, beta, running mean, running variance, the steps of gamma and beta, a learned slope"""
        running = [-1, -1] if finish.running is None else [part.start for part in self.statistics[finish.running]]
        affine = finish.gamma, finish.beta
        return [*map(self.offset, affine), *running, *map(self.step, affine), self.offset(finish.slopes)]

    def norm_offsets(self, position: int, node: Node) -> list[int]:
        """gamma, beta, running mean, running variance, what backward needs."""
        saved = self._saved_at(position, 2 * self.graph.shapes[node.output][1])
        running = [-1, -1] if node.running is None else [part.start for part in self.statistics[node.running]]
        return [self.offset(node.gamma), self.offset(node.beta), *running, saved]

    def _saved_at(self, position: int, count: int) -> int:
        """Where among the statistics a norm saves what its backward pass needs."""
        if position not in self.saved:
            self.saved[position] = self.statistic_count
            self.statistic_count += count
        return self.saved[position]

    def group_norm_numbers(self, position: int, node: Node) -> tuple[Any, ...]:
        """What both passes of a group norm take."""
        on_sheets = sheets(self.graph.shapes[node.output][0], self.graph.grid)
        saved = self._saved_at(position, 2 * on_sheets * node.groups * LANES)
        offsets = [self.offset(node.gamma), self.offset(node.beta), saved, self.offset(node.slopes)]
        return node.groups, node.epsilon, ACTIVATIONS[node.act], node.slope, offsets

    def _finish(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        numbers = (node.epsilon, self._finish_offsets(node), ACTIVATIONS[node.act], node.slope)
        factor = self.home[node.inputs[-1]] if node.gated else -1
        self._make("finish", node, _FORWARD, x, self._residual(node), factor, y, *numbers)

    def _norm(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        training = node.training or node.running is None
        numbers = (node.epsilon, node.momentum, ACTIVATIONS[node.act], node.slope, self.norm_offsets(position, node))
        self._make("norm_forward", node, x, y, *numbers, training, self.options.backward and x == y)

    def _group_norm(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        self._make("group_norm", node, x, y, *self.group_norm_numbers(position, node))

    def _make(self, name: str, node: Node, *args: Any) -> None:
        """Note the step that writes a node's output, and around it the halo that the first reader wants."""
        y, halo = self.home[node.output], self._first_halo(node.output)
        self.emit(name, *args, *_halo_arguments(halo))
        self.wrote(y)
        if halo:
            y.storage.halo = max(y.storage.halo, halo.reach)
            self.now_holds(y, halo.state)

    def _first_halo(self, value: int) -> Halo | None:
        for position in self.readers[value]:
            if halo := self.halo_of(self.graph.nodes[position]):
                return halo
        return None

    def _act(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        self.emit("activate", x, y, ACTIVATIONS[node.act], node.slope)
        self.wrote(y)

    def _prelu(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        self.emit("prelu", x, y, self.offset(node.slopes), self.step(node.slopes))
        self.wrote(y)

    def _combine(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        second = self.home[node.inputs[1]] if len(node.inputs) > 1 else -1
        self.emit("combine", _FORWARD, x, node.a_scale, second, node.b_scale, node.shift, y)
        self.wrote(y)

    def _multiply(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        self.emit("multiply", _FORWARD, x, self.home[node.inputs[1]], y, False)
        self.wrote(y)

    _scale = _multiply

    def _offset(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        self.emit("combine", _FORWARD, x, 1.0, self.home[node.inputs[1]], 1.0, 0.0, y)
        self.wrote(y)

    def _cat(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        for value, slot in self.cat_slots(node):
            if self.home[value] != slot:
                self.copy(_FORWARD, self.home[value], slot)

    def cat_slots(self, node: Node) -> list[tuple[int, Slot]]:
        """Each input of a concatenation with its place in the result."""
        return [(value, self.home[node.output].part(which)) for value, which in self._cat_parts(node)]

    def _cat_parts(self, node: Node) -> list[tuple[int, range]]:
        """Each input of a concatenation with the channels of the result that it makes."""
        counts = [self.graph.shapes[value][1] for value in node.inputs]
        parts = consecutive(counts)
        if node.interleaved:
            parts = [range(place, sum(counts), len(counts)) for place in range(len(counts))]
        return list(zip(node.inputs, parts, strict=True))

    def copy(self, section: int, x: Slot, y: Slot) -> None:
        """y = x"""
        self.emit("combine", section, x, 1.0, -1, 0.0, 0.0, y)
        self.wrote(y)

    def _channels(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        part = x.part(channels_of(node))
        if y != part:
            self.copy(_FORWARD, part, y)

    def _upsample2(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        self.emit("upsample2", node.bilinear, x, y)
        self.wrote(y)

    def _pixel_shuffle(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        self.emit("shuffle", _FORWARD, x, y, True, False)
        self.wrote(y)

    def _pixel_unshuffle(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        self.emit("shuffle", _FORWARD, y, x, False, False)
        self.wrote(y)

    def _resample(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        self.emit("resample", x, y, node.rows, node.columns)
        self.wrote(y)

    def _pool(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        self._make("pool", node, x, y, *pool_numbers(node))

    def _mean(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        self.emit("mean", x, y)
        self.wrote(y)

    def _channel_mean(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        self.emit("dot_channels", _FORWARD, x, -1, 1 / x.count, y, False)
        self.wrote(y)

    def _largest(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        self.emit("largest_channel", x, y)
        self.wrote(y)

    def _response(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        self.emit("response_norm", x, y, node.epsilon)
        self.wrote(y)

    def _mean_to(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        self.emit("mean_to", x, y)
        self.wrote(y)

    def _layer_norm(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        self.emit("layer_norm", x, y, node.epsilon, node.centred, self.offset(node.gamma), self.offset(node.beta))
        self.wrote(y)

    def _attention(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        read = [self.home[value] for value in node.inputs]
        self.emit("attention", *read, y, *self.attention_numbers(node))
        self.wrote(y)

    def _channel_attention(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        read = [self.home[value] for value in node.inputs]
        self.emit("channel_attention", *read, y, *self.channel_attention_numbers(node))
        self.wrote(y)

    def attention_numbers(self, node: Node) -> tuple[Any, ...]:
        """What both passes of attention take."""
        heads: Heads = node.heads
        places = [(p.numpy().reshape(-1), c.numpy()) for p, c in zip(heads.pixels, heads.channels, strict=True)]
        biases = [
            (self.offset(bias), self.weights[bias].shape[0], rows.numpy(), self.weights[bias].trained)
            for bias, rows in zip(node.biases, heads.rows, strict=True)
        ]
        sizes = [len(heads.channels[0]), heads.features, heads.value_features, heads.queries, heads.keys]
        scales, factors = self._scales_of(node)
        return sizes, places, scales, heads.safe, factors, biases

    def channel_attention_numbers(self, node: Node) -> tuple[Any, ...]:
        """What both passes of attention across channels take."""
        heads: Heads = node.heads
        pictures = heads.pixels[0][:, 0] // heads.queries
        firsts = [channels.numpy() for channels in heads.channels]
        return [len(pictures), heads.features], pictures.int().numpy(), firsts, *self._scales_of(node)

    def _scales_of(self, node: Node) -> tuple[tuple[float, float], tuple[int, bool]]:
        """The scale of scores and the least length of what is divided by its own, -1 if nothing is; where further
        factors are, and whether they learn."""
        heads: Heads = node.heads
        learn = node.factors is not None and self.weights[node.factors].trained
        return (heads.scale, -1.0 if heads.epsilon is None else heads.epsilon), (self.offset(node.factors), learn)

    def _pixel_norm(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        self.emit("pixel_norm", x, y, node.epsilon)
        self.wrote(y)

    def _flatten(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        self.emit("flatten", _FORWARD, x, y, False)
        self.wrote(y)

    def _unflatten(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        self.emit("flatten", _FORWARD, y, x, True)
        self.wrote(y)

    def _reblock(self, position: int, node: Node, x: Slot, y: Slot) -> None:
        self.emit("reblock", _FORWARD, x, y)
        self.wrote(y)

    # Memory.

    def _allocate(self) -> int:
        """Give each storage its offset, largest first, at the lowest place that is free while it lives."""
        storages = list({slot.storage for _, args in self.steps for slot in args if isinstance(slot, Slot)})
        storages.sort(key=lambda s: (-s.floats, s.first))
        placed: list[Storage] = []
        for storage in storages:
            if self.options.backward_again and storage.first < self.forward_steps <= storage.last:
                storage.last = _NEVER_FREED
            storage.offset = _lowest_gap(storage, placed)
            placed.append(storage)
        return max((s.offset + s.floats for s in placed), default=0)

    # Building.

    def _write(self) -> None:
        maps: dict[Slot, int] = {}
        for name, args in self.steps:
            getattr(self.program, name)(*[self._argument(maps, arg) for arg in args])

    def _argument(self, maps: dict[Slot, int], arg: Any) -> Any:
        if isinstance(arg, Taps):
            return _C.AxisTable(list(arg.first), list(arg.second), list(arg.weight))
        if not isinstance(arg, Slot):
            return arg
        whole = Slot(arg.storage, 0, arg.storage.shape[1])
        if whole not in maps:
            s = arg.storage
            maps[whole] = self.program.add_map(s.offset, list(s.shape), s.grid, *s.block, s.halo, s.plane)
        if arg not in maps:
            maps[arg] = self.program.add_channels(maps[whole], arg.first, arg.last, arg.step)
        return maps[arg]

    def _add_conv(self, node: Node) -> int:
        weight = self.weights[node.weight]
        out_channels, in_channels, *kernel = weight.shape
        shape = [out_channels, in_channels * node.groups, node.groups, *kernel, node.stride, node.dilation, *node.pad]
        read, written = node.inputs[0], node.output
        if node.kind == "conv_transpose":  # of which the convolution makes the input
            read, written = written, read
        n, _, height, width = self.graph.shapes[read]
        geometry = [n, height, width, *self.blocks[read], *self.blocks[written], self.graph.side(read)]
        mask = None if weight.mask is None else weight.mask.contiguous().view(torch.uint8).numpy()
        padding = PADDING_MODES[node.attributes.get("padding_mode", "zeros")]
        conv: int = self.program.add_conv(shape, geometry, padding, mask, KERNELS[asked_kernel()], self.options.exact)
        return conv


@dataclasses.dataclass(frozen=True)
class _Finished:
    """Positions of a convolution and of the finish behind it."""

    conv: int
    finish: int | None

    @property
    def positions(self) -> list[int]:
        """Of both."""
        return [self.conv] if self.finish is None else [self.conv, self.finish]

    @property
    def last(self) -> int:
        """Where both are done."""
        return self.positions[-1]


def _halo_arguments(halo: Halo | None) -> tuple[bool, int, int]:
    """What a step takes that fills a halo behind its own writes: whether, with which padding, how wide."""
    mode, pad = halo.state if halo else _ZERO
    return halo is not None, PADDING_MODES[mode], pad


def channels_of(node: Node) -> range:
    """Which channels of its input a ``channels`` operator takes."""
    return range(node.first, node.last, node.step)


def pool_numbers(node: Node) -> tuple[Any, ...]:
    """What both passes of a pooling take."""
    return node.kernel, node.stride, node.pad, node.counted, node.maximum


def _slices(counts: Sequence[int]) -> list[slice]:
    """Consecutive ranges, each starting at a whole vector."""
    parts, start = [], 0
    for count in counts:
        parts.append(slice(start, start + count))
        start += -(-count // _ALIGNMENT) * _ALIGNMENT
    return parts


def _lowest_gap(storage: Storage, placed: list[Storage]) -> int:
    alive = sorted((p for p in placed if p.first <= storage.last and storage.first <= p.last), key=lambda p: p.offset)
    offset = 0
    for other in alive:
        if other.offset - offset >= storage.floats:
            break
        offset = max(offset, other.offset + other.floats)
    return offset


class _Backward:
    """Writes the steps of the backward pass."""

    def __init__(self, planner: _Planner) -> None:
        self.planner, self.graph, self.weights = planner, planner.graph, planner.weights
        self.needed = self._needed()
        self.homes: dict[int, Slot] = {}  # value -> memory of its gradient
        self.parts = self._parts_of_gradients()  # value -> what makes it from a map in whose gradient its own lies
        self.aliases = self._aliases()  # value -> the concatenation in whose gradient its own lies
        self.written: set[int] = set()
        self.second: dict[int, Slot] = {}  # a second part of a gradient, which BatchNorm adds as it reads

    def emit(self) -> tuple[list[int], list[int]]:
        """Write all steps; return the positions of the graph outputs whose gradients go in, and of the graph inputs
        whose gradients come out."""
        planner, graph = self.planner, self.graph
        given = [number for number, value in enumerate(graph.outputs) if value in self.needed]
        for place, number in enumerate(given):
            self._into(
                graph.outputs[number],
                lambda slot, place=place: planner.emit("from_plain", _BACKWARD, place, slot),
            )
        for position in range(len(graph.nodes) - 1, -1, -1):
            node = graph.nodes[position]
            if node.output in self.needed and self._has(node.output):
                if node.kind != "norm":
                    self._flush(node.output)
                getattr(self, f"_{node.kind}")(position, node)
        wanted = [n for n, value in enumerate(graph.inputs) if self._wants_input(n) and self._has(value)]
        for place, number in enumerate(wanted):
            self._flush(graph.inputs[number])
            planner.emit("to_plain", _BACKWARD, self._home(graph.inputs[number]), len(given) + place)
        return given, wanted

    def _wants_input(self, number: int) -> bool:
        return bool(self.planner.options.input_gradients[number])

    def _needed(self) -> set[int]:
        """Values whose gradient something trained or asked for depends on."""
        needed = {value for n, value in enumerate(self.graph.inputs) if self._wants_input(n)}
        for node in self.graph.nodes:
            trained = any(self.weights[number].trained for number in node.weights())
            if trained or any(value in needed for value in node.inputs):
                needed.add(node.output)
        return needed

    def _aliases(self) -> dict[int, int]:
        """Values whose gradient is simply the part of a concatenation's gradient that lies in their place: the
        concatenation's gradient is complete before any other reader adds to theirs."""
        aliases = {}
        for position, node in enumerate(self.graph.nodes):
            if node.kind != "cat" or node.output not in self.needed:
                continue
            complete = min(self.planner.readers[node.output], default=len(self.graph.nodes))
            for value, slot in self.planner.cat_slots(node):
                others = [p for p in self.planner.readers[value] if p != position]
                if (
                    value not in self.parts
                    and self.planner.home[value] == slot
                    and node.inputs.count(value) == 1
                    and value not in self.graph.outputs
                    and all(p < complete for p in others)
                ):
                    aliases[value] = node.output
        return aliases

    def _parts_of_gradients(self) -> dict[int, Node]:
        """Values whose gradients together are that of the map whose channels they are: nothing else reads the map, and
        they are all of it. With the operators that make them."""
        reached, _ = self.graph.behind(self.graph.outputs)
        parts: dict[int, Node] = {}
        for value, positions in self.planner.readers.items():
            nodes = [self.graph.nodes[position] for position in positions]
            if value in self.graph.outputs or any(n.kind != "channels" or n.output not in reached for n in nodes):
                continue
            taken = sorted(channel for node in nodes for channel in channels_of(node))
            if taken == list(range(self.graph.shapes[value][1])):
                parts.update((node.output, node) for node in nodes)
        return parts

    # Where gradients are.

    def _has(self, value: int) -> bool:
        return value in self.written or (value in self.aliases and self._has(self.aliases[value]))

    def _home(self, value: int) -> Slot:
        if value not in self.homes:
            if value in self.aliases:
                which = self.planner.home[value].within(self.planner.home[self.aliases[value]])
                self.homes[value] = self._home(self.aliases[value]).part(which)
            elif value in self.parts:
                node = self.parts[value]
                self.homes[value] = self._home(node.inputs[0]).part(channels_of(node))
            else:
                self.homes[value] = self._temporary(value)
        return self.homes[value]

    def _temporary(self, value: int) -> Slot:
        return self.planner.fresh(value)

    def _wrote(self, value: int) -> None:
        self.written.add(value)
        self.planner.wrote(self._home(value))

    def _into(self, value: int, write: Any, halo: int = 0) -> Slot:
        """Let ``write(slot)`` overwrite a slot whose content becomes part of the value's gradient; returns the slot."""
        if not self._has(value):
            slot = self._home(value)
            slot.storage.halo = max(slot.storage.halo, halo)
            write(slot)
            self._wrote(value)
            return slot
        self._flush(value)
        slot = self._temporary(value)
        slot.storage.halo = halo
        write(slot)
        self.planner.wrote(slot)
        self.second[value] = slot
        return slot

    def _take_over(self, output: int, value: int) -> None:
        """Let the gradient of an operator's input overwrite that of its output, where nothing else lies there: memory
        that was just read needs not be fetched again to be written."""
        dy = self._home(output)
        whole = dy.count == dy.storage.shape[1]
        shared = output in self.aliases or output in self.aliases.values()
        placed = value in self.aliases or value in self.parts or value in self.homes
        if whole and not shared and not placed:
            self.homes[value] = dy

    def _flush(self, value: int) -> None:
        """Add the second part of a gradient to the first."""
        if value in self.second:
            home = self._home(value)
            self.planner.emit("combine", _BACKWARD, home, 1.0, self.second.pop(value), 1.0, 0.0, home)
            self._wrote(value)

    def _added(self, value: int) -> tuple[Slot, bool]:
        """The slot of a gradient and whether a kernel must add to it."""
        accumulate = self._has(value)
        return self._home(value), accumulate

    def _cleared(self, value: int) -> Slot:
        """The slot of a gradient for a kernel that always adds."""
        if not self._has(value):
            self.planner.emit("clear", _BACKWARD, self._home(value))
        return self._home(value)

    # Operators.

    def _conv(self, position: int, node: Node) -> None:
        planner = self.planner
        x, dy = node.inputs[0], self._home(node.output)
        conv, values = planner.convs[position], planner.offset(node.weight)
        bias = node.bias if node.bias is not None and self.weights[node.bias].trained else None
        propagates = x in self.needed
        reach = planner.program.gradient_halo(conv) if propagates else 0
        if reach > 0 or planner.has_dead_pixels(node.output):
            planner.need(_BACKWARD, dy, Halo("zeros", 0, reach))
        if self.weights[node.weight].trained or bias is not None:
            planner.need(_BACKWARD, planner.home[x], planner.halo_of(node))
            planner.emit("conv_weight_gradient", conv, values, planner.offset(bias), planner.home[x], dy)
        if propagates:
            self._into(x, lambda slot: planner.emit("conv_input_gradient", _BACKWARD, conv, values, dy, slot))

    def _conv_transpose(self, position: int, node: Node) -> None:
        planner = self.planner
        x, dy = node.inputs[0], self._home(node.output)
        conv, values = planner.convs[position], planner.offset(node.weight)
        reach = planner.reach(node)
        if reach > 0 or planner.has_dead_pixels(node.output):
            planner.need(_BACKWARD, dy, Halo("zeros", max(node.pad), reach))
        if self.weights[node.weight].trained:
            if planner.has_dead_pixels(x):  # whoever read x later may have filled them
                planner.need(_BACKWARD, planner.home[x], Halo("zeros", 0, 0))
            planner.emit("conv_weight_gradient", conv, values, -1, dy, planner.home[x])
        if x in self.needed:
            end = (False, PADDING_MODES["zeros"], 0)
            self._into(x, lambda slot: planner.emit("conv_forward", _BACKWARD, conv, values, -1, dy, slot, *end))

    def _shift(self, position: int, node: Node) -> None:
        x, dy = node.inputs[0], self._home(node.output)
        if self.weights[node.beta].trained:
            self._shift_gradient(node, dy)
        if x in self.needed:
            self._take_over(node.output, x)
            self._add(x, dy)

    def _shift_gradient(self, node: Node, dy: Slot) -> None:
        planner = self.planner
        if planner.step(node.beta) == 0:
            planner.emit("total", planner.offset(node.beta), dy, -1)
            return
        if planner.has_dead_pixels(node.output):
            planner.need(_BACKWARD, dy, Halo("zeros", 0, 0))
        planner.emit("channel_sums", planner.offset(node.beta), dy)

    def _gain(self, position: int, node: Node) -> None:
        planner, x, dy = self.planner, node.inputs[0], self._home(node.output)
        if self.weights[node.gamma].trained:
            planner.emit("total", planner.offset(node.gamma), dy, planner.home[x])
        if x in self.needed:
            self._take_over(node.output, x)
            dx, accumulate = self._added(x)
            numbers = planner.affine(node.gamma, None)
            planner.emit("finish", _BACKWARD, dy, dx if accumulate else -1, -1, dx, *numbers, *_halo_arguments(None))
            self._wrote(x)

    def _prelu(self, position: int, node: Node) -> None:
        planner, x, dy = self.planner, node.inputs[0], self._home(node.output)
        slopes = planner.offset(node.slopes), planner.step(node.slopes)
        if x not in self.needed:
            planner.emit("prelu_backward", planner.home[x], dy, -1, *slopes, False)
            return
        self._take_over(node.output, x)
        dx, accumulate = self._added(x)
        planner.emit("prelu_backward", planner.home[x], dy, dx, *slopes, accumulate)
        self._wrote(x)

    def _norm(self, position: int, node: Node) -> None:
        planner = self.planner
        x = node.inputs[0]
        dy, second = self._home(node.output), self.second.pop(node.output, -1)
        self._take_over(node.output, x)
        training = node.training or node.running is None
        numbers = (node.epsilon, ACTIVATIONS[node.act], node.slope, planner.norm_offsets(position, node), training)
        reach = self._zero_halo_wanted(x)

        def write(slot: Slot) -> None:
            recover = planner.home[x] == planner.home[node.output]
            planner.emit("norm_backward", planner.home[x], dy, second, slot, *numbers, reach > 0, recover)

        slot = self._into(x, write, halo=reach)
        if reach > 0:
            planner.now_holds(slot, _ZERO)

    def _group_norm(self, position: int, node: Node) -> None:
        planner, x, dy = self.planner, node.inputs[0], self._home(node.output)
        self._take_over(node.output, x)
        numbers = planner.group_norm_numbers(position, node)
        self._into(x, lambda slot: planner.emit("group_norm_backward", planner.home[x], dy, slot, *numbers))

    def _zero_halo_wanted(self, value: int) -> int:
        """How wide a zero halo the conv that made a value wants around its gradient."""
        for position, conv in self.planner.convs.items():
            node = self.graph.nodes[position]
            if node.kind == "conv" and node.output == value and node.inputs[0] in self.needed:
                return int(self.planner.program.gradient_halo(conv))
        return 0

    def _act(self, position: int, node: Node) -> None:
        self._take_over(node.output, node.inputs[0])
        dx, accumulate = self._added(node.inputs[0])
        x = self.planner.home[node.inputs[0]]
        dy = self._home(node.output)
        self.planner.emit("activate_backward", x, dy, dx, ACTIVATIONS[node.act], node.slope, accumulate)
        self._wrote(node.inputs[0])

    def _combine(self, position: int, node: Node) -> None:
        dy = self._home(node.output)
        for value, scale in zip(node.inputs, (node.a_scale, node.b_scale), strict=False):
            if value in self.needed:
                dx, accumulate = self._added(value)
                second = dx if accumulate else -1
                self.planner.emit("combine", _BACKWARD, dy, scale, second, 1.0, 0.0, dx)
                self._wrote(value)

    def _multiply(self, position: int, node: Node) -> None:
        for value, other in zip(node.inputs, node.inputs[::-1], strict=True):
            if value in self.needed:
                self._add_product(self._home(node.output), other, value)

    def _scale(self, position: int, node: Node) -> None:
        x, factor = node.inputs
        dy = self._home(node.output)
        if x in self.needed:
            self._add_product(dy, factor, x)
        if factor in self.needed:
            self._add_spread(node, dy, self.planner.home[x])

    def _offset(self, position: int, node: Node) -> None:
        x, numbers = node.inputs
        dy = self._home(node.output)
        if numbers in self.needed:
            self._add_spread(node, dy, -1)
        if x in self.needed:
            self._take_over(node.output, x)
            self._add(x, dy)

    def _add_spread(self, node: Node, dy: Slot, x: Slot | int) -> None:
        """The gradient of what was spread over planes or pixels: sums of dy, or of dy times x."""
        to, accumulate = self._added(node.inputs[1])
        if self.graph.of_pixels(node):
            self.planner.emit("dot_channels", _BACKWARD, dy, x, 1.0, to, accumulate)
        else:
            self.planner.emit("dot_planes", dy, x, to, accumulate)
        self._wrote(node.inputs[1])

    def _add_product(self, dy: Slot, other: int, value: int) -> None:
        dx, accumulate = self._added(value)
        self.planner.emit("multiply", _BACKWARD, dy, self.planner.home[other], dx, accumulate)
        self._wrote(value)

    def _cat(self, position: int, node: Node) -> None:
        whole, dy = self.planner.home[node.output], self._home(node.output)
        for value, slot in self.planner.cat_slots(node):
            if value in self.needed and self.aliases.get(value) != node.output:
                self._add(value, dy.part(slot.within(whole)))

    def _add(self, value: int, more: Slot) -> None:
        """Add a map to a value's gradient, if it does not lie there."""
        dx, accumulate = self._added(value)
        if dx != more:
            self.planner.emit("combine", _BACKWARD, more, 1.0, dx if accumulate else -1, 1.0, 0.0, dx)
        self._wrote(value)

    def _channels(self, position: int, node: Node) -> None:
        x = node.inputs[0]
        if node.output not in self.parts:
            dx = self._cleared(x).part(channels_of(node))
            self.planner.emit("combine", _BACKWARD, dx, 1.0, self._home(node.output), 1.0, 0.0, dx)
        self._wrote(x)

    def _upsample2(self, position: int, node: Node) -> None:
        dy = self._home(node.output)
        if node.bilinear:
            self.planner.need(_BACKWARD, dy, Halo("replicate", 1, 1))
        dx, accumulate = self._added(node.inputs[0])
        self.planner.emit("upsample2_backward", node.bilinear, dy, dx, accumulate)
        self._wrote(node.inputs[0])

    def _pixel_shuffle(self, position: int, node: Node) -> None:
        dx, accumulate = self._added(node.inputs[0])
        self.planner.emit("shuffle", _BACKWARD, dx, self._home(node.output), False, accumulate)
        self._wrote(node.inputs[0])

    def _pixel_unshuffle(self, position: int, node: Node) -> None:
        dx, accumulate = self._added(node.inputs[0])
        self.planner.emit("shuffle", _BACKWARD, self._home(node.output), dx, True, accumulate)
        self._wrote(node.inputs[0])

    def _resample(self, position: int, node: Node) -> None:
        dx = self._cleared(node.inputs[0])
        self.planner.emit("resample_backward", self._home(node.output), dx, node.rows, node.columns)
        self._wrote(node.inputs[0])

    def _pool(self, position: int, node: Node) -> None:
        x = node.inputs[0]
        dx = self._cleared(x)
        self.planner.emit("pool_backward", self.planner.home[x], self._home(node.output), dx, *pool_numbers(node))
        self._wrote(x)

    def _mean(self, position: int, node: Node) -> None:
        dx = self._cleared(node.inputs[0])
        self.planner.emit("mean_backward", self._home(node.output), dx)
        self._wrote(node.inputs[0])

    def _channel_mean(self, position: int, node: Node) -> None:
        dx = self._cleared(node.inputs[0])
        self.planner.emit("combine", _BACKWARD, dx, 1.0, self._home(node.output), 1 / dx.count, 0.0, dx)
        self._wrote(node.inputs[0])

    def _largest(self, position: int, node: Node) -> None:
        self._add_from(node, "largest_channel_backward", node.shared)

    def _response(self, position: int, node: Node) -> None:
        self._add_from(node, "response_norm_backward", node.epsilon)

    def _add_from(self, node: Node, step: str, number: Any) -> None:
        """A gradient that is made from an operator's input, its result's gradient and a number."""
        x = node.inputs[0]
        dx, accumulate = self._added(x)
        self.planner.emit(step, self.planner.home[x], self._home(node.output), dx, number, accumulate)
        self._wrote(x)

    def _mean_to(self, position: int, node: Node) -> None:
        dx = self._cleared(node.inputs[0])
        self.planner.emit("mean_to_backward", self._home(node.output), dx)
        self._wrote(node.inputs[0])

    def _layer_norm(self, position: int, node: Node) -> None:
        planner, x, dy = self.planner, node.inputs[0], self._home(node.output)
        if planner.has_dead_pixels(node.output):
            planner.need(_BACKWARD, dy, Halo("zeros", 0, 0))
        self._take_over(node.output, x)
        dx, accumulate = self._added(x)
        offsets = planner.offset(node.gamma), planner.offset(node.beta)
        planner.emit("layer_norm_backward", planner.home[x], dy, dx, node.epsilon, node.centred, *offsets, accumulate)
        self._wrote(x)

    def _attention(self, position: int, node: Node) -> None:
        self._attend(node, "attention_backward", self.planner.attention_numbers(node))

    def _channel_attention(self, position: int, node: Node) -> None:
        self._attend(node, "channel_attention_backward", self.planner.channel_attention_numbers(node))

    def _attend(self, node: Node, step: str, numbers: tuple[Any, ...]) -> None:
        wanted = {value: self._cleared(value) for value in dict.fromkeys(node.inputs) if value in self.needed}
        read = [self.planner.home[value] for value in node.inputs]
        made = [wanted.get(value, -1) for value in node.inputs]
        self.planner.emit(step, *read, self._home(node.output), *made, *numbers)
        for value in wanted:
            self._wrote(value)

    def _pixel_norm(self, position: int, node: Node) -> None:
        self._add_from(node, "pixel_norm_backward", node.epsilon)

    def _flatten(self, position: int, node: Node) -> None:
        dy = self._home(node.output)
        self._into(node.inputs[0], lambda slot: self.planner.emit("flatten", _BACKWARD, slot, dy, True))

    def _unflatten(self, position: int, node: Node) -> None:
        dy = self._home(node.output)
        self._into(node.inputs[0], lambda slot: self.planner.emit("flatten", _BACKWARD, dy, slot, False))

    def _reblock(self, position: int, node: Node) -> None:
        dy = self._home(node.output)
        self._into(node.inputs[0], lambda slot: self.planner.emit("reblock", _BACKWARD, dy, slot))
