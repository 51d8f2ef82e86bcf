"""A pruning round (select, prune, rewind, pack) against what one writes with torch."""

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lipfast import ops
from lipfast.bench.harness import Case, Size, Timed
from lipfast.ops import _dispatch

PRUNE_FRACTION = 0.2  # of the living weights, each round
ROUNDS = (1, 5, 10)

Shape = tuple[int, int, int, int]


def skip_net_shapes() -> list[Shape]:
    """The 26 convolutions of the paper's network: encoder scales, then the decoder deepest first, then the output."""
    encoder: list[Shape] = []
    for scale in range(5):
        inputs = 128 if scale else 32
        encoder += [(4, inputs, 1, 1), (128, inputs, 3, 3), (128, 128, 3, 3)]
    decoder: list[Shape] = [(128, 132, 3, 3), (128, 128, 1, 1)] * 5
    return [*encoder, *decoder, (3, 128, 1, 1)]


def generator_shapes() -> list[Shape]:
    """The convolutions of the 256 px progressive generator and its outputs."""
    depths = [512, 512, 512, 512, 256, 128, 64]
    shapes: list[Shape] = [(512, 512, 3, 3)]
    for above, below in itertools.pairwise(depths):
        shapes += [(below, above, 3, 3), (below, below, 3, 3)]
    return [*shapes, *((3, depth, 1, 1) for depth in depths)]


def cases(size: Size) -> list[Case]:
    """One case for each network and pruning round."""
    networks = {"skip net": skip_net_shapes(), "generator": generator_shapes()}
    if size == "toy":
        networks = {"toy": [(5, 3, 3, 3), (7, 5, 1, 1)]}
    return [
        Case(
            op="prune_rewind_pack",
            name=f"{name} round {number}",
            shape=f"{sum(torch.Size(shape).numel() for shape in shapes)} weights in {len(shapes)} tensors",
            density=(1 - PRUNE_FRACTION) ** number,
            setup=functools.partial(_setup, shapes, number),
        )
        for name, shapes in networks.items()
        for number in ROUNDS
    ]


def _setup(shapes: list[Shape], number: int) -> Timed:
    start = draw(shapes, seed=0)
    trained = draw(shapes, seed=1)
    alive = [torch.rand(shape) < (1 - PRUNE_FRACTION) ** (number - 1) for shape in shapes]
    trained = [weight * mask for weight, mask in zip(trained, alive, strict=True)]
    living = sum(int(mask.sum()) for mask in alive)
    count = round(PRUNE_FRACTION * living)
    total = sum(mask.numel() for mask in alive)
    network = draw(shapes, seed=2)  # stands for the parameters that the rewound weights go to
    backend, _ = _dispatch.pick("begin_pruning", start[0].device)
    return Timed(
        ours=lambda: ops.prune_rewind_pack(trained, alive, start, count, into=network),
        baselines={"global_unstructured + load_state_dict + mask": torch_round(trained, start, total - living + count)},
        check=functools.partial(check, trained, alive, start, count),
        backend=backend,
        bytes=total * (4 + 1 + 4 + 4 + 1 + 1 / 8)
        + (living - count) * 4,  # scores, mask, start; dense, mask, bits; values
    )


def draw(shapes: list[Shape], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def torch_round(trained: list[Tensor], start: list[Tensor], dead: int) -> Callable[[], object]:
    """The round with torch alone, leaving ``dead`` zeros; weights that were dead before are zeros and so die first."""
    layers = [_Layer(first.clone()) for first in start]
    network = nn.ModuleList(layers)
    state = {f"{index}.weight": first for index, first in enumerate(start)}
    parameters = [(layer, "weight") for layer in layers]
    scores = dict(zip(parameters, trained, strict=True))

    def run() -> None:
        prune.global_unstructured(
            parameters, pruning_method=prune.L1Unstructured, importance_scores=scores, amount=dead
        )
        masks = [layer.get_buffer("weight_mask") for layer in layers]
        for layer in layers:
            prune.remove(layer, "weight")  # type: ignore[no-untyped-call]
        network.load_state_dict(state)
        with torch.no_grad():
            for layer, mask in zip(layers, masks, strict=True):
                layer.weight.mul_(mask)

    return run


class _Layer(nn.Module):
    """Something with a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def check(trained: list[Tensor], alive: list[Tensor], start: list[Tensor], count: int) -> None:
    mine = ops.prune_rewind_pack(trained, alive, start, count)
    theirs = ops.prune_rewind_pack(trained, alive, start, count, backend="reference")
    for name in ("masks", "bits", "weights"):
        pairs = zip(getattr(mine, name), getattr(theirs, name), strict=True)
        assert all(torch.equal(ours, expected) for ours, expected in pairs), name
    assert torch.equal(mine.values, theirs.values), "values"
