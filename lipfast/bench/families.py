"""Which benchmarks there are. One family is one module with ``cases(size: Size) -> list[Case]``."""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:  # the harness loads torch, and the list is there for --help too
    from lipfast.bench.harness import Case, Size

# name on the command line -> module, and what it times
FAMILIES: dict[str, tuple[str, str]] = {
    "adam": ("lipfast.bench.adam", "Adam on kept weights against torch.optim.Adam on dense ones."),
    "choice": ("lipfast.bench.choice", "The chosen convolution kernel against the others, forward and gradients."),
    "conv": ("lipfast.bench.conv", "Convolutions in lanes, forward and training, against torch's."),
    "dense": ("lipfast.bench.dense", "Dense direct convolutions in lanes against torch's."),
    "layout": ("lipfast.bench.layout", "Conversion to lanes and back against copying."),
    "memory": ("lipfast.bench.memory", "Peak memory of a training step of the paper's network against torch's."),
    "model": ("lipfast.bench.model", "Inference of whole pruned networks against dense torch."),
    "noise": ("lipfast.bench.noise", "Noise on a fit's input against torch's generator."),
    "search": ("lipfast.bench.search", "A whole search against the same search with torch's trainer, round by round."),
    "select": ("lipfast.bench.select", "A pruning round (select, prune, rewind, pack) against torch's own means."),
    "step": ("lipfast.bench.step", "A training step of the paper's network against torch's fastest forms."),
}
# Their cases time themselves (`lipfast.bench.harness.Measured`).
MEASURE_THEMSELVES = ("memory", "search")


def cases(family: str, size: "Size") -> "list[Case]":
    """The cases of a family. They hold no data until they are set up."""
    build = cast("Callable[[Size], list[Case]]", importlib.import_module(FAMILIES[family][0]).cases)
    return build(size)
