"""Training on a GPU with the network's forward and backward pass as CUDA graphs.

A step of the paper's network is several hundred small kernels; launched one by one from Python, the launches themselves
can outlast the work at small sizes. A graph launches each pass at once. The loss stays eager (it is a handful of
kernels, and callers may change it from step to step), as do the masks and the fused Adam. `OperatorTrainer` captures
its networks with the same function, and hands those that it cannot record to `GraphTrainer`.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from lipfast.engine.trainer import TorchTrainer

Capture = Callable[[nn.Module, tuple[Tensor, ...]], nn.Module]


def capture_as_graphs(module: nn.Module, arguments: tuple[Tensor, ...]) -> nn.Module:
    """The module's forward and backward pass as CUDA graphs."""
    with warnings.catch_warnings():
        # make_graphed_callables warms up on a stream of its own, of which torch warns once, and the first operation of
        # autograd's thread may be a matrix product, of which it warns, too.
        warnings.filterwarnings("ignore", message=".*(AccumulateGrad|no current CUDA context)")
        return cast(nn.Module, torch.cuda.make_graphed_callables(module, arguments))


class _Holder(nn.Module):
    """Takes the capture instead of the caller's module, whose ``forward`` must stay what it was."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor) -> Tensor:
        return cast(Tensor, self.network(z))


class GraphTrainer(TorchTrainer):
    """A :class:`TorchTrainer` that captures the network when it first sees an input's shape.

    Args:
        capture: a stand-in for `capture_as_graphs`, for use without a GPU.
    """

    def __init__(
        self,
        network: nn.Module,
        masks: Mapping[str, Tensor] | None,
        *,
        lr: float,
        capture: Capture | None = None,
    ) -> None:
        super().__init__(network, masks, lr=lr)
        self._capture: Capture = capture or capture_as_graphs
        self._captured: tuple[torch.Size, nn.Module] | None = None

    def _forward(self, z: Tensor) -> Tensor:
        if self._captured is None or self._captured[0] != z.shape:
            before = self.snapshot()  # capturing runs the network, which moves BatchNorm's running statistics
            self._captured = (z.shape, self._capture(_Holder(self._network), (z.clone(),)))
            self.restore(before)
        # The graph writes to the same memory in every step, and the caller may keep what it was given.
        return cast(Tensor, self._captured[1](z)).clone()
