"""What the planner reads: a network as operators on feature maps.

A `Graph` is straight-line code over numbered values, each a ``(batch, channels, height, width)`` map. Weights are named
by number, too: ``weights[k]`` says which tensor holds them.

Rows of features, ``(..., features)``, are maps of one item: ``(1, features, height, width)``, where each item is a
pixel. So a linear layer is a 1x1 convolution whose lanes are items. Such a map may have more pixels than items.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lipfast.ops.lanes import GRID

Shape = tuple[int, int, int, int]  # batch, channels, height, width

# Numbers of csrc/cpu/pointwise.h's Activation.
_NUMBERED = (
    "none",
    "relu",
    "leaky_relu",
    "sigmoid",
    "tanh",
    "silu",
    "relu6",
    "hardsigmoid",
    "hardswish",
    "gelu",
    "gelu_tanh",
)
ACTIVATIONS = {name: number for number, name in enumerate(_NUMBERED)}

CONV_KINDS = ("conv", "conv_transpose")
DONE_BY_CONV = ("none", "relu", "relu6", "leaky_relu")  # activations that a convolution computes as it stores
WEIGHT_NAMES = ("weight", "bias", "gamma", "beta", "slopes", "factors")  # attributes of nodes that are weight numbers


def consecutive(counts: Sequence[int]) -> list[range]:
    """Ranges of so many channels, one behind the other."""
    ends = list(itertools.accumulate(counts))
    return [range(end - count, end) for count, end in zip(counts, ends, strict=True)]


@dataclass
class Node:
    """One operator. ``kind`` and its attributes:

    conv        weight, bias (weight numbers; bias may be None), stride, pad (h, w), dilation, groups, padding_mode
    conv_transpose  the input gradient of a conv: weight, stride, pad, dilation, groups, all of that conv
    shift       beta (weight number): a number for each channel, or one for all, is added
    gain        gamma (weight number): one number that multiplies all
    prelu       slopes (weight number): below zero, one for each channel or for all
    norm        gamma, beta (weight numbers or None), running (statistics number or None), training, momentum, epsilon,
                act, slope
    group_norm  gamma, beta (weight numbers or None), groups, epsilon, act, slope, slopes (weight number of one that is
                learned, in inference only, or None)
    layer_norm  gamma, beta (weight numbers or None), epsilon, centred (else the mean stays in): each pixel over its
                channels
    attention   heads: the `Heads` of rows of features: queries, keys, values; factors (weight number or None), biases
                (weight numbers)
    channel_attention  the same, of channels that look at each other
    act         act, slope
    finish      act(norm(inputs[0]) + inputs[1]), in inference only: gamma, beta, running (None: no norm, but a factor
                and a shift of each channel), epsilon, act, slope, slopes; the second input is optional. gated: the last
                input multiplies what comes out
    combine     a_scale, b_scale, shift: a_scale * inputs[0] + b_scale * inputs[1] + shift (second input optional)
    multiply    inputs[0] * inputs[1]
    scale       inputs[0] times inputs[1], which has one number for each plane, (n, c, 1, 1), or pixel, (n, 1, h, w)
    offset      inputs[0] plus inputs[1], which has one number for each plane or pixel
    channel_mean  over all channels: (n, 1, h, w)
    largest     of all channels; shared: equal ones share its gradient, else the first has it
    response    epsilon: how large each channel is over the pixels, as a share of the channels' mean: (n, c, 1, 1)
    cat         channels of all inputs one after the other; interleaved: the first of each, the second of each, ...
    channels    first, last: a range of the input's channels
    upsample2   bilinear (else nearest)
    pixel_shuffle, pixel_unshuffle  factor r: r * r channels become pixels of r x r, or the reverse
    resample    rows, columns: a `Taps` each
    pool        kernel, stride, pad, counted (pixels beyond the picture, `pad` or 0, that count in an average), maximum
    mean        over all pixels: (n, c, 1, 1)
    mean_to     averages of windows that cover the input, as many as the result has pixels
    pixel_norm  epsilon
    flatten     a map's items to rows of features
    unflatten   and back
    reblock     nothing: only how the map is cut into blocks changes
    """

    kind: str
    inputs: list[int]
    output: int
    attributes: dict[str, Any] = field(default_factory=dict)

    def weights(self) -> list[int]:
        """The numbers of its weights."""
        named = [self.attributes.get(name) for name in WEIGHT_NAMES]
        return [number for number in (*named, *self.attributes.get("biases", ())) if number is not None]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["attributes"][name]
        except KeyError:
            raise AttributeError(f"{self.__dict__.get('kind')} has no attribute {name!r}") from None


@dataclass(frozen=True)
class Taps:
    """One axis of a resampling: output i takes ``(1 - weight[i]) * in[first[i]] + weight[i] * in[second[i]]``.

    ``first[i] == -1`` stands for zero. ``second`` and ``weight`` are empty for a selection.
    """

    first: tuple[int, ...]
    second: tuple[int, ...] = ()
    weight: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Heads:
    """How attention finds its heads in rows of features, and what it makes of them.

    A problem is a head of one picture, or of one window of it. ``pixels`` and ``channels`` say for queries, keys,
    values and the result which row each token is and which feature the head's first: (problems, tokens), (problems,).
    ``maps``: whether these are maps instead, whose pixels are the rows.
    ``rows``: for each bias of the scores, which row of it a problem adds.
    """

    features: int  # of a head's queries and keys
    value_features: int  # and of its values and what they make
    queries: int
    keys: int
    across: bool  # channels look at channels instead: each is a token, whose features are all that have it here
    scale: float  # of the scores
    epsilon: float | None  # queries and keys are divided by their lengths, or by this where it is larger
    safe: bool  # a query without an answer sees zeros
    shape: tuple[int, ...]  # of the result
    pixels: tuple[Tensor, ...]
    channels: tuple[Tensor, ...]
    maps: tuple[bool, ...]
    rows: tuple[Tensor, ...]

    def features_of(self, which: int) -> int:
        """How many features a head has of queries (0), keys (1), values (2) or the result (3)."""
        return self.features if which < 2 else self.value_features

    def places(self, which: int, width: int) -> Tensor:
        """Of queries (0), keys (1), values (2) or the result (3), (problems, tokens, features): the places among the
        numbers of rows of ``width`` features."""
        first = self.pixels[which].long() * width + self.channels[which].long()[:, None]
        return first[..., None] + torch.arange(self.features_of(which))

    def order_of_result(self, pixels: Tensor) -> Tensor | None:
        """For each row of the result the pixel of its tokens, of ``pixels``, those of the operand like which it lies;
        None where it has more or fewer rows, or heads do not agree."""
        rows = self.pixels[3].long().flatten()
        count = math.prod(self.shape) // self.shape[1 if self.maps[3] else -1]
        if any(len(torch.unique(numbers)) != count for numbers in (pixels, rows)):
            return None
        order = torch.zeros(count, dtype=torch.long)
        order[rows] = pixels.long().flatten()
        return order if torch.equal(order[rows], pixels.long().flatten()) else None

    def _taken_of(self, which: int) -> set[int]:
        """The features, of the rows that an operand lies in, which some head takes."""
        firsts = set(self.channels[which].tolist())
        return {first + feature for first in firsts for feature in range(self.features_of(which))}

    def repeats(self, which: int, width: int) -> bool:
        """Whether an operand's heads, in rows of ``width`` features, may have some of its numbers twice."""
        firsts = torch.unique(self.channels[which])
        if bool((firsts.diff() < self.features_of(which)).any()):
            return True
        tokens = self.pixels[which].long() * width + self.channels[which].long()[:, None]
        taken = torch.zeros(int(tokens.max()) + 1, dtype=torch.bool)
        taken[tokens.flatten()] = True
        return int(taken.count_nonzero()) < tokens.numel()

    def overlap(self, one: int, other: int, width: int) -> bool:
        """Whether two operands, both in the same rows, share some of their numbers without being the same."""
        if self._taken_of(one).isdisjoint(self._taken_of(other)):
            return False
        if (self.pixels[one].shape, self.features_of(one)) == (self.pixels[other].shape, self.features_of(other)):
            same = torch.equal(self.pixels[one], self.pixels[other])
            if same and torch.equal(self.channels[one], self.channels[other]):
                return False
        first, second = self.places(one, width), self.places(other, width)
        taken = torch.zeros(int(max(first.max(), second.max())) + 1, dtype=torch.bool)
        taken[first] = True
        return bool(taken[second].any())


@dataclass
class Graph:
    """Operators in the order they run; ``inputs`` and ``outputs`` are values, ``shapes`` those of all values."""

    inputs: list[int]
    outputs: list[int]
    nodes: list[Node]
    shapes: dict[int, Shape]
    rows: set[int] = field(default_factory=set)  # values that are rows of features
    grid: int = GRID  # blocks along each side of a picture; below 4, pictures of a batch share the lanes

    def side(self, value: int) -> int:
        """Blocks along each side of a value's pictures."""
        return GRID if value in self.rows else self.grid

    def consumers(self) -> dict[int, list[int]]:
        """For each value the positions in ``nodes`` that read it, in order."""
        readers: dict[int, list[int]] = {value: [] for value in self.shapes}
        for position, node in enumerate(self.nodes):
            for value in node.inputs:
                readers[value].append(position)
        return readers

    def read_once(self) -> set[int]:
        """Values that one operator reads, once, and nobody outside."""
        return {value for value, found in self.consumers().items() if len(found) == 1} - set(self.outputs)

    def of_pixels(self, node: Node) -> bool:
        """Whether the second input of a ``scale`` or ``offset`` has a number for each pixel, else for each plane."""
        of_map, numbers = (self.shapes[value] for value in node.inputs)
        return of_map[1] != numbers[1]

    def behind(self, outputs: Iterable[int]) -> tuple[set[int], set[int]]:
        """The values and the weights that values are made from."""
        values = set(outputs)
        weights: set[int] = set()
        for node in reversed(self.nodes):
            if node.output in values:
                values.update(node.inputs)
                weights.update(node.weights())
        return values, weights

    def fresh(self, shape: Shape) -> int:
        """A new value of that shape."""
        value = max(self.shapes, default=-1) + 1
        self.shapes[value] = shape
        return value

    def forget(self, values: set[int]) -> None:
        """Drop values that no operator has."""
        for value in values:
            del self.shapes[value]
        self.rows.difference_update(values)

    def fresh_rows(self, batch: int, features: int) -> int:
        """A new value for rows of features; the batch fills as many of the four rows of lanes as it divides into."""
        height = next(side for side in (4, 2, 1) if batch % side == 0)
        value = self.fresh((1, features, height, batch // height))
        self.rows.add(value)
        return value

    def pad_rows(self) -> None:
        """Give rows of features more pixels than items, where that fills more lanes and nothing counts them."""
        if any(
            node.kind in ("flatten", "unflatten", "channel_attention") or (node.kind == "norm" and node.training)
            for node in self.nodes
        ):
            return
        for value in self.rows:
            _, features, height, width = self.shapes[value]
            padded = -(-height * width // GRID)
            if -(-padded // GRID) < -(-width // GRID):
                self.shapes[value] = 1, features, GRID, padded

    def flat_shape(self, value: int) -> tuple[int, int]:
        """(batch, features) of a value once it is flattened."""
        n, c, height, width = self.shapes[value]
        return (height * width, c) if value in self.rows else (n, c * height * width)

    def holds(self, value: int, shape: Sequence[int]) -> bool:
        """Whether a tensor of that shape has the numbers of a value in its order."""
        if value in self.rows:
            return (math.prod(shape[:-1]), shape[-1]) == self.flat_shape(value)
        without_ones = self.shapes[value][:3] if self.shapes[value][2:] == (1, 1) else None
        return tuple(shape) in (self.shapes[value], self.flat_shape(value), without_ones)
