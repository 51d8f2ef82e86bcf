"""Rewriting a graph before it is planned: fusing operators, choosing how each map is cut into blocks."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lipfast.engine.graph import CONV_KINDS, DONE_BY_CONV, Graph, Node, consecutive
from lipfast.ops._padding import widest
from lipfast.ops.lanes import GRID, LANES

Block = tuple[int, int]  # rows, columns of pixels

# A block may grow to fit a neighbour's stride if the map's memory grows by at most this much; else it is re-cut.
_MOST_WASTE = 1.3

_NORMS = ("norm", "group_norm", "layer_norm", "pixel_norm")
_OF_CHANNELS = ("cat", "channels", "channel_mean", "largest")
_SAME_BLOCKS = (
    *_NORMS, *_OF_CHANNELS, "act", "prelu", "finish", "shift", "gain", "combine", "multiply", "channel_attention",
)  # fmt: skip
_STEPS = ("conv", "conv_transpose", "pool")  # one side's blocks are `stride` times the other's
_ENLARGES = ("conv_transpose", "upsample2", "pixel_shuffle")


def fuse(graph: Graph, backward: bool, weights: Sequence[Any]) -> None:
    """Padding goes into the conv behind it, an activation into the norm before it, a factor and a shift of each channel
    into the LayerNorm before them; unread operators go.

    Without a backward pass BatchNorm with running statistics or such a factor, a residual sum, an activation and a
    product become one operator. ``weights``: by weight number, with their ``mask``.
    """
    _fuse_padding(graph)
    _fuse_activation(graph, backward, weights)
    _fuse_affine(graph, weights)
    _scale_numbers_first(graph, weights)
    _take_parts_of_parts(graph)
    if not backward:
        _fuse_finish(graph, weights)
        _fuse_gates(graph)
    _drop_unread(graph)


def _producers(graph: Graph) -> dict[int, Node]:
    return {node.output: node for node in graph.nodes}


def _fuse_padding(graph: Graph) -> None:
    producers = _producers(graph)
    for node in graph.nodes:
        source = producers.get(node.inputs[0]) if node.kind == "conv" else None
        if source is None or source.kind != "resample" or not source.attributes.get("pads") or min(source.pads) < 0:
            continue
        if node.pad == (0, 0):
            # A halo is as wide on all sides, and copies no more pixels than the shorter side has.
            shorter = min(graph.shapes[source.inputs[0]][2:])
            if max(source.pads) > widest(shorter, source.padding_mode):
                continue
            node.attributes |= {"pad": source.pads, "padding_mode": source.padding_mode}
        elif node.padding_mode == source.padding_mode == "zeros":
            node.attributes["pad"] = (node.pad[0] + source.pads[0], node.pad[1] + source.pads[1])
        else:
            continue
        node.inputs[0] = source.inputs[0]


def _fuse_activation(graph: Graph, backward: bool, weights: Sequence[Any]) -> None:
    producers, read_once = _producers(graph), graph.read_once()
    for node in graph.nodes:
        act = _activation(node, weights) if node.kind == "act" or not backward else None
        source = producers.get(node.inputs[0]) if act else None
        if act is None or source is None or source.output not in read_once:
            continue
        takes = source.kind == "group_norm" or (source.kind == "norm" and node.kind == "act")
        if takes and source.act == "none":
            source.attributes |= act
            source.output = node.output
            node.kind = "gone"
    graph.nodes = [node for node in graph.nodes if node.kind != "gone"]


def _activation(node: Node, weights: Sequence[Any]) -> dict[str, Any] | None:
    """What an activation is to the operator before it: that of one slope, learned, is a LeakyReLU."""
    if node.kind == "act":
        return {"act": node.act, "slope": node.slope, "slopes": None}
    if node.kind == "prelu" and weights[node.slopes].count == 1:
        return {"act": "leaky_relu", "slope": 0.0, "slopes": node.slopes}
    return None


def _fuse_affine(graph: Graph, weights: Sequence[Any]) -> None:
    read_once = graph.read_once()
    norms = {node.output: node for node in graph.nodes if node.kind == "layer_norm" and node.beta is None}
    for node in graph.nodes:
        norm = norms.get(node.inputs[0])
        if norm is None or norm.output not in read_once or norm.beta is not None:
            continue
        if norm.gamma is None and _scales_channels(graph, node, weights):
            norm.attributes |= {"gamma": node.weight, "beta": node.bias}
        elif node.kind == "shift" and weights[node.beta].count == graph.shapes[node.output][1]:
            norm.attributes["beta"] = node.beta
        else:
            continue
        norm.output = node.output
        norms[norm.output] = norm
        node.kind = "gone"
    graph.nodes = [node for node in graph.nodes if node.kind != "gone"]


def _scale_numbers_first(graph: Graph, weights: Sequence[Any]) -> None:
    """A factor of each channel behind a product with a number for each plane multiplies those: two passes less over the
    map, as in a global response norm."""
    producers, read_once = _producers(graph), graph.read_once()
    for at, node in enumerate(graph.nodes):
        source = producers.get(node.inputs[0])
        if source is None or source.kind != "scale" or source.output not in read_once or graph.of_pixels(source):
            continue
        if _scales_channels(graph, node, weights) and node.bias is None:
            before = next(i for i, other in enumerate(graph.nodes) if other is source)
            numbers = graph.fresh(graph.shapes[source.inputs[1]])
            graph.forget({source.output})
            source.output, node.output = node.output, numbers
            node.inputs, source.inputs = [source.inputs[1]], [source.inputs[0], numbers]
            graph.nodes[before], graph.nodes[at] = node, source
            producers |= {source.output: source, numbers: node}


def _scales_channels(graph: Graph, node: Node, weights: Sequence[Any]) -> bool:
    """Whether a convolution takes one pixel of one channel, by a weight that is not pruned."""
    if node.kind != "conv" or node.groups != graph.shapes[node.inputs[0]][1] or node.stride != 1 or node.pad != (0, 0):
        return False
    weight = weights[node.weight]
    return bool(weight.shape == (node.groups, 1, 1, 1) and weight.mask is None)


def _take_parts_of_parts(graph: Graph) -> None:
    """Whoever reads those channels of a concatenation that came from one value reads that value."""
    sources = {node.output: node for node in graph.nodes if node.kind == "cat" and not node.interleaved}
    for node in graph.nodes:
        source = sources.get(node.inputs[0])
        if source is None or node.kind != "channels" or node.step != 1 or node.output in graph.outputs:
            continue
        parts = consecutive([graph.shapes[value][1] for value in source.inputs])
        for value, which in zip(source.inputs, parts, strict=True):
            if which == range(node.first, node.last):
                for reader in graph.nodes:
                    reader.inputs = [value if read == node.output else read for read in reader.inputs]


_PLAIN = {
    "gamma": None, "beta": None, "running": None, "epsilon": 0.0, "act": "none", "slope": 0.0, "slopes": None,
    "gated": False,
}  # fmt: skip


def _fuse_finish(graph: Graph, weights: Sequence[Any]) -> None:
    """One ``finish`` for each run of norm, sum and act in which nothing else reads what lies between."""
    read_once = graph.read_once()
    makers: dict[int, Node] = {}
    for node in graph.nodes:
        own = _as_finish(graph, node, weights)
        if own is None:
            continue
        for place, value in enumerate(node.inputs):
            source = makers.get(value) if value in read_once else None
            if source is not None and _joins(source, own, node.inputs):
                node.inputs = [*source.inputs, *node.inputs[:place], *node.inputs[place + 1 :]]
                norm = {name: source.attributes[name] for name in ("gamma", "beta", "running", "epsilon")}
                own |= norm if norm["beta"] is not None else norm | {"beta": own["beta"]}
                source.kind = "gone"
                break
        node.kind, node.attributes = "finish", own
        makers[node.output] = node
    graph.nodes = [node for node in graph.nodes if node.kind != "gone"]
    convs = {node.output for node in graph.nodes if node.kind == "conv"} & read_once
    for node in graph.nodes:
        if node.kind == "finish" and node.gamma is node.running is None and len(node.inputs) == 2:
            node.inputs.sort(key=lambda value: value not in convs)  # which adds the other one as it stores its sums


def _fuse_gates(graph: Graph) -> None:
    """An activation multiplies what it makes, where nothing else reads that and no convolution makes it."""
    producers, read_once = _producers(graph), graph.read_once()
    for node in graph.nodes:
        for value in node.inputs if node.kind == "multiply" else ():
            source = producers.get(value)
            if source is None or value not in read_once or source.kind != "finish":
                continue
            if source.gated or source.act in DONE_BY_CONV:
                continue
            others = [other for other in node.inputs if other != value]
            node.inputs, node.kind = [*source.inputs, *others], "finish"
            node.attributes = source.attributes | {"gated": True}
            source.kind = "gone"
            break
    graph.nodes = [node for node in graph.nodes if node.kind != "gone"]


def _as_finish(graph: Graph, node: Node, weights: Sequence[Any]) -> dict[str, Any] | None:
    """The attributes of the ``finish`` that does the same; None if there is none."""
    if node.kind == "norm" and not node.training and node.running is not None:
        return _PLAIN | {name: value for name, value in node.attributes.items() if name in _PLAIN}
    if node.kind == "shift":
        return {**_PLAIN, "beta": node.beta}
    if node.kind == "gain":
        return {**_PLAIN, "gamma": node.gamma}
    if _scales_channels(graph, node, weights):
        return {**_PLAIN, "gamma": node.weight, "beta": node.bias}
    act = _activation(node, weights)
    if act is not None:
        return _PLAIN | act
    if node.kind == "combine" and len(node.inputs) == 2 and node.a_scale == node.b_scale == 1 and node.shift == 0:
        return dict(_PLAIN)
    return None


def _joins(source: Node, own: dict[str, Any], inputs: list[int]) -> bool:
    """Whether what ``source`` does may come before ``own``: norm, then sum, then act. A norm or factor takes the shift
    behind it."""
    scales = own["running"] is not None or own["gamma"] is not None
    shifts = own["beta"] is not None and source.beta is not None
    return not (scales or shifts) and source.act == "none" and len(source.inputs) + len(inputs) <= 3


def _drop_unread(graph: Graph) -> None:
    wanted = set(graph.outputs)
    kept = []
    for node in reversed(graph.nodes):
        moves_statistics = node.kind == "norm" and node.training and node.running is not None
        if node.output in wanted or moves_statistics:
            kept.append(node)
            wanted.update(node.inputs)
    graph.nodes = kept[::-1]


def _smallest(graph: Graph, value: int) -> Block:
    """The smallest blocks that hold a value."""
    height, width = graph.shapes[value][2:]
    return -(-height // graph.side(value)), -(-width // graph.side(value))


@dataclasses.dataclass
class _Edge:
    """Blocks of value ``large`` must be ``factor`` times those of ``small`` where ``node`` runs."""

    node: Node
    large: int
    small: int
    factor: int
    classes: tuple[int, int] = (-1, -1)  # of large and small: edges between the same two agree together
    recut: list[int] = dataclasses.field(default_factory=list)  # empty where they are; see _recut

    def wanted(self, blocks: dict[int, Block]) -> Block:
        """The blocks of ``large`` that fit those of ``small``."""
        rows, columns = blocks[self.small]
        return self.factor * rows, self.factor * columns


# Pictures are cut into fewer blocks, so that others of the batch fill their lanes, where that saves this share.
_LEAST_GAIN = 0.05
_CUTS = (4, 2, 1)
# What a forward pass costs, in products of a weight and a vector: a weight is loaded for a tile of 2 x 8 vectors, and
# each pass over a map takes time.
_TILE_ROWS, _TILE_COLUMNS, _PER_TILE = 2, 8, 4
_PER_VECTOR, _PER_VECTOR_RECUT = 10, 20


def grids_for(graph: Graph) -> list[int]:
    """Into how many blocks a side may be cut: 4, and 2 or 1 where others of the batch fill the lanes."""
    batches = {shape[0] for value, shape in graph.shapes.items() if value not in graph.rows}
    alone = any(node.kind == "channel_attention" for node in graph.nodes)  # its sums are over all lanes
    return list(_CUTS) if len(batches) == 1 and not alone else [GRID]


def sheets(pictures: int, grid: int) -> int:
    """What so many pictures take, each side cut into ``grid`` blocks."""
    return -(-pictures * grid**2 // LANES)


def choose_blocks(graph: Graph, weights: Sequence[Any]) -> dict[int, Block]:
    """The blocks of every value; sets the graph's grid and inserts a ``reblock`` where two neighbours do not agree.

    ``weights``: by weight number, with their ``count``.
    """
    found = {grid: _agree(dataclasses.replace(graph, grid=grid), weights) for grid in grids_for(graph)}
    batch = max(shape[0] for shape in graph.shapes.values())  # rows of features are one

    def cost(grid: int) -> float:
        whole = found[grid].cost * sheets(batch, grid)
        return whole if grid == GRID else whole / (1 - _LEAST_GAIN)

    graph.grid = min(found, key=cost)
    best = found[graph.grid]
    for edge in best.edges:
        _reblock(graph, edge, best.blocks)
    return best.blocks


@dataclasses.dataclass
class _Agreement:
    """Blocks for all values, and what a forward pass of one sheet costs with them."""

    blocks: dict[int, Block]
    edges: list[_Edge]
    cost: float


def _agree(graph: Graph, weights: Sequence[Any]) -> _Agreement:
    """Blocks that neighbours agree on, but where growing to agree costs more than cutting a map anew."""
    best = _agree_but(graph, weights, set())
    recut: set[tuple[int, int]] = set()
    while True:
        apart = {edge.classes for edge in best.edges} - recut
        found = [(_agree_but(graph, weights, recut | {pair}), pair) for pair in sorted(apart)]
        better = [(agreement, pair) for agreement, pair in found if agreement.cost < best.cost]
        if not better:
            return best
        best, pair = min(better, key=lambda each: each[0].cost)
        recut.add(pair)


def _agree_but(graph: Graph, weights: Sequence[Any], recut: set[tuple[int, int]]) -> _Agreement:
    """Blocks that neighbours agree on where that is cheap, but for these pairs of classes."""
    classes = _Classes(graph)
    edges = _edges(graph, classes)
    for edge in edges:
        edge.classes = classes.root(edge.large), classes.root(edge.small)
        classes.cover(edge)
    agreeing = [edge for edge in edges if edge.classes not in recut]
    for _ in range(len(edges)):
        changed = [classes.agree(edge) for edge in agreeing]
        if not any(changed):
            break
    blocks = {value: classes.block(value) for value in graph.shapes}
    makers, read_once = _producers(graph), graph.read_once()
    for edge in edges:
        wanted = edge.wanted(blocks)
        if blocks[edge.large] != wanted:
            edge.recut = _recut(graph, edge, wanted, makers, read_once)
            blocks |= dict.fromkeys(edge.recut[:-1], wanted)
    return _Agreement(blocks, edges, _cost(graph, weights, blocks, edges))


def _recut(graph: Graph, edge: _Edge, wanted: Block, makers: dict[int, Node], read_once: set[int]) -> list[int]:
    """The values from ``large`` up to the one to cut anew: the input of the convolution that makes ``large``, if that
    has fewer channels and nothing else reads what lies between."""
    path = [edge.large]
    while edge.node.kind not in _ENLARGES and path[-1] in read_once:
        maker = makers.get(path[-1])
        if maker is None or len(maker.inputs) > 1 or not _hold(wanted, graph, maker.inputs[0]):
            break
        path.append(maker.inputs[0])
        if maker.kind == "conv" and maker.stride == 1 and graph.shapes[path[-1]][1] < graph.shapes[edge.large][1]:
            return path
        if maker.kind not in _SAME_BLOCKS:
            break
    return [edge.large]


def _hold(block: Block, graph: Graph, value: int) -> bool:
    return all(side >= least for side, least in zip(block, _smallest(graph, value), strict=True))


def _cost(graph: Graph, weights: Sequence[Any], blocks: dict[int, Block], edges: list[_Edge]) -> float:
    """Of one sheet; rows of features, which need not agree, do not count."""
    total = 0.0
    for node in graph.nodes:
        written = node.inputs[0] if node.kind == "conv_transpose" else node.output  # by the convolution that it undoes
        if node.kind in CONV_KINDS and written not in graph.rows:
            rows, columns = blocks[written]
            tiles = -(-rows // _TILE_ROWS) * -(-columns // _TILE_COLUMNS)
            total += weights[node.weight].count * (rows * columns + _PER_TILE * tiles)
    for value, block in blocks.items():
        if value not in graph.rows:
            total += _PER_VECTOR * _vectors(graph, value, block)
    for edge in edges:
        if edge.recut:
            total += _PER_VECTOR_RECUT * _vectors(graph, edge.recut[-1], blocks[edge.recut[-1]])
    return total


def _vectors(graph: Graph, value: int, block: Block) -> int:
    """Of one sheet, with a halo."""
    return graph.shapes[value][1] * (block[0] + 2) * (block[1] + 2)


def _edges(graph: Graph, classes: "_Classes") -> list[_Edge]:
    edges = []
    for node in graph.nodes:
        first = node.inputs[0]
        if node.kind in _SAME_BLOCKS or (node.kind in _STEPS and node.stride == 1):
            for value in node.inputs:
                classes.join(value, node.output)
        elif node.kind in ("scale", "offset"):
            classes.join(first, node.output)
            if graph.of_pixels(node):
                classes.join(node.inputs[1], node.output)
        elif node.kind in _ENLARGES:
            edges.append(_Edge(node, node.output, first, node.attributes.get("factor", 2)))
        elif node.kind == "pixel_unshuffle":
            edges.append(_Edge(node, first, node.output, node.factor))
        elif node.kind in _STEPS:
            edges.append(_Edge(node, first, node.output, node.stride))
    return edges


class _Classes:
    """Values that must have equal blocks."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._parent = {value: value for value in graph.shapes}
        self._block = {value: list(_smallest(graph, value)) for value in graph.shapes}

    def root(self, value: int) -> int:
        while self._parent[value] != value:
            value = self._parent[value]
        return value

    def join(self, a: int, b: int) -> None:
        a, b = self.root(a), self.root(b)
        if a != b:
            self._parent[a] = b
            self._block[b] = [max(pair) for pair in zip(self._block[a], self._block[b], strict=True)]

    def block(self, value: int) -> Block:
        rows, columns = self._block[self.root(value)]
        return rows, columns

    def cover(self, edge: _Edge) -> None:
        """A window may leave pixels out: 9 px become 4, whose blocks of 1 px times 2 would not hold all 9."""
        small = self._block[self.root(edge.small)]
        for axis in (0, 1):
            natural = _smallest(self._graph, edge.large)[axis]
            small[axis] = max(small[axis], -(-natural // edge.factor))

    def agree(self, edge: _Edge) -> bool:
        """Grow one side of an edge if that is cheap; True if something changed."""
        changed = False
        large, small = self._block[self.root(edge.large)], self._block[self.root(edge.small)]
        for axis in (0, 1):
            need = edge.factor * small[axis]
            if need > large[axis] and self._cheap(edge.large, axis, need):
                large[axis], changed = need, True
            elif need < large[axis] and self._cheap(edge.small, axis, -(-large[axis] // edge.factor)):
                small[axis], changed = -(-large[axis] // edge.factor), True
        return changed

    def _cheap(self, value: int, axis: int, block: int) -> bool:
        return self._graph.side(value) * block <= _MOST_WASTE * self._graph.shapes[value][2 + axis]


def _reblock(graph: Graph, edge: _Edge, blocks: dict[int, Block]) -> None:
    if not edge.recut:
        return
    value = edge.recut[-1]
    copy = graph.fresh(graph.shapes[value])
    blocks[copy] = edge.wanted(blocks)
    neighbour = edge.node if len(edge.recut) == 1 else _producers(graph)[edge.recut[-2]]
    at = next(i for i, node in enumerate(graph.nodes) if node is neighbour)
    if edge.node.kind in _ENLARGES:  # the operator writes the copy, which is re-cut into what others expect
        edge.node.output = copy
        graph.nodes.insert(at + 1, Node("reblock", [copy], value))
    else:
        neighbour.inputs[0] = copy
        graph.nodes.insert(at, Node("reblock", [value], copy))
