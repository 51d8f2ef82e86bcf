"""Masks that a forward pass itself multiplies its weights by: found in a recording, so that layers read the weight
and know what of it lives."""

import collections
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lipfast.engine.builder import Segment
from lipfast.engine.capture import Call, Recording, Ref, refs_in
from lipfast.engine.heads import ADDMM, MULTIPLY, PRODUCT
from lipfast.engine.lower import Lowered

# Layers, and where among their arguments the weight is.
_PLACES = {
    **dict.fromkeys((torch.conv2d, torch.conv_transpose2d, F.linear, torch._C._nn.linear), 1),
    **dict.fromkeys(PRODUCT, 1),
    **dict.fromkeys(ADDMM, 2),
}


def masks_in_graph(
    recording: Recording, tensors: Mapping[str, Tensor], packed: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, str], dict[int, Ref]]:
    """Find products of a parameter and a mask that serve as a layer's weight, and let the layer read the parameter.

    Changes the recording: each such weight becomes another reference to the parameter's leaf.

    Args:
        recording: what to look through.
        tensors: its leaves by name.
        packed: the masks of leaves that are given as their kept values. A mask that keeps all of those changes nothing.

    Returns:
        Parameter's leaf -> which weights live, of those not packed; -> leaf of the mask; number of each new reference
        -> the product.
    """
    packed = packed or {}
    leaves = dict(recording.leaves)  # also the results of conversions that change nothing
    count = 1 + max([*leaves, *(ref.number for call in recording.calls for ref in call.results())], default=0)
    uses: collections.Counter[str] = collections.Counter()
    found: list[tuple[Ref, str, str]] = []  # product, weight, mask
    for call in recording.calls:
        read = [leaves[ref.number] for ref in call.refs() if ref.number in leaves]
        if call.function is Tensor.to and read and call.refs()[0].dtype == call.results()[0].dtype == torch.float32:
            leaves[call.results()[0].number] = read[0]
            continue
        uses.update(read)
        if call.function in MULTIPLY and len(call.refs()) == len(read) == 2:
            weight, mask = read if _is_mask(tensors[read[1]]) else read[::-1]
            product = call.results()[0]
            shape = packed.get(weight, tensors[weight]).shape
            fits = _is_mask(tensors[mask]) and tensors[mask].shape == shape == product.shape
            if fits and (weight not in packed or bool(tensors[mask][packed[weight]].all())):
                found.append((product, weight, mask))
    sources = {weight: mask for _, weight, mask in found}
    alike = collections.Counter(weight for _, weight, mask in found if sources[weight] == mask)
    products: dict[int, tuple[Ref, Ref]] = {}  # number -> the parameter in its place, the product
    for product, weight, _ in found:
        if alike[weight] != uses[weight] or tensors[weight].dtype != torch.float32:
            sources.pop(weight, None)  # somewhere it is read whole, or by another mask
            continue
        products[product.number] = Ref(count, product.shape, product.dtype), product
        recording.leaves[count] = weight
        count += 1
    exchange_weights(recording.calls, {number: parameter for number, (parameter, _) in products.items()})
    masks = {weight: tensors[mask] != 0 for weight, mask in sources.items() if weight not in packed}
    return masks, sources, {parameter.number: product for parameter, product in products.values()}


def exchange_weights(calls: Iterable[Call], others: Mapping[int, Ref]) -> None:
    """Let layers read other tensors as their weights; ``others``: number of the weight -> what takes its place."""
    for call in calls:
        weight = weight_of(call)
        if weight is not None and weight.number in others:
            place = _PLACES[call.function]
            call.args = (*call.args[:place], others[weight.number], *call.args[place + 1 :])


def _is_mask(tensor: Tensor) -> bool:
    """All zeros and ones, some of them zeros; a parameter is none."""
    if tensor.requires_grad or tensor.dim() not in (2, 4):
        return False
    return bool(((tensor == 0) | (tensor == 1)).all()) and not bool((tensor == 1).all())


def read_in_lanes(lowered: Lowered, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the masks whose weights a segment reads; torch's calls take theirs dense."""
    segments = [item for item in lowered.items if isinstance(item, Segment)]
    read = {lowered.recording.leaves.get(ref.number) for segment in segments for ref in segment.weights}
    return {name: mask for name, mask in masks.items() if name in read}


def drop_products(lowered: Lowered, products: Iterable[Ref]) -> None:
    """Leave out products that nothing reads any more."""
    segments = [ref for item in lowered.items if isinstance(item, Segment) for ref in (*item.inputs, *item.weights)]
    calls = [ref for item in lowered.items if isinstance(item, Call) for ref in item.refs()]
    read = {ref.number for ref in (*segments, *calls, *refs_in(lowered.recording.result))}
    unread = {product.number for product in products} - read
    lowered.items = [
        item
        for item in lowered.items
        if isinstance(item, Segment) or unread.isdisjoint(ref.number for ref in item.results())
    ]


def weight_of(call: Call) -> Ref | None:
    """What a layer's call reads as its weight; None for other calls."""
    place = _PLACES.get(call.function, len(call.args))
    weight = call.args[place] if place < len(call.args) else None
    return weight if isinstance(weight, Ref) else None
