"""Stop rules that need no clean image: the variance of recent outputs falls while the picture forms and rises again
when the noise is being learnt.

Both rules remember the output at the lowest variance so far and fire when that has not improved for ``patience`` steps.

Source: Wang, Li, Zhuang, Chen, Liang, Sun 2021, "Early Stopping for Deep Image Prior" (arXiv:2112.06074): ES-WMV and
its running form ES-EMV.
"""

from typing import Protocol

import torch
from torch import Tensor

# Outputs are kept as 16-bit integers: a window of 100 takes a third of the memory of floats' (with its sum), integer
# sums never drift, and the rounding adds a variance of 2e-11, far below any that occurs.
_LEVELS = 65535
_ZERO_LEVEL = 32768
LARGEST_WINDOW = 2**16  # outputs whose sum 32 bits hold


class StopRule(Protocol):
    """Watches the outputs of a fit, one a step."""

    best_step: int | None  # step of the lowest variance so far, from 1; None while there is none
    fired: bool  # the lowest variance is `patience` steps old

    def observe(self, output: Tensor) -> bool:
        """Take the next output (any shape, values in [0, 1]); say whether it has the lowest variance so far."""

    def mean(self) -> Tensor:
        """(n,) float32: the mean of the outputs that the latest variance is about."""

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the rule's state."""

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on from the state of an equal rule."""


class _Minimum:
    """The running minimum of a sequence and how old it is."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.step = 0
        self.best_step: int | None = None
        self.best = float("inf")
        self.fired = False
        self.variance: float | None = None  # the latest; None while the rule warms up

    def _judge(self, variance: float | None) -> bool:
        self.variance = variance
        if variance is None:
            return False
        if variance < self.best:
            self.best, self.best_step = variance, self.step
            return True
        assert self.best_step is not None  # the first variance is below infinity
        self.fired = self.step - self.best_step >= self.patience
        return False

    def _numbers(self) -> Tensor:
        best_step = -1 if self.best_step is None else self.best_step
        return torch.tensor([self.step, best_step, self.best, self.fired], dtype=torch.float64)

    def _set_numbers(self, numbers: Tensor) -> None:
        step, best_step, best, fired = numbers.tolist()
        self.step, self.best, self.fired = int(step), best, bool(fired)
        self.best_step = None if best_step < 0 else int(best_step)


class WindowedVariance(_Minimum):
    """ES-WMV: the mean squared distance of the last ``window`` outputs from their mean, per value.

    Memory: 2 ``window`` + 4 bytes per value of an output. Cost: a few passes over one output a step.

    Args:
        window: outputs looked at, 2 to ``LARGEST_WINDOW``.
        patience: steps without a new minimum before the rule fires, at least 1.
    """

    def __init__(self, window: int = 100, patience: int = 1000) -> None:
        super().__init__(patience)
        self.window = window
        self._ring = torch.empty(0)  # (window, n) int16, the slot of step s is s % window
        self._sum = torch.empty(0)  # (n,) int32 over the ring
        self._squares = torch.zeros(window, dtype=torch.int64)  # each slot's sum of squares

    def observe(self, output: Tensor) -> bool:
        """See :class:`StopRule`."""
        levels = (output.detach().flatten() * _LEVELS).round_().clamp_(0, _LEVELS).sub_(_ZERO_LEVEL)
        levels = levels.to(torch.int16).cpu()  # the shift changes no variance
        if self.step == 0:
            self._ring = torch.zeros(self.window, levels.numel(), dtype=torch.int16)
            self._sum = torch.zeros(levels.numel(), dtype=torch.int32)
        slot = self.step % self.window
        self._sum += levels.to(torch.int32) - self._ring[slot]
        self._ring[slot] = levels
        self._squares[slot] = levels.to(torch.int64).square().sum()
        self.step += 1
        return self._judge(self._window_variance() if self.step >= self.window else None)

    def mean(self) -> Tensor:
        """See :class:`StopRule`; every output of the window weighs the same."""
        return (self._sum.double() / self.window + _ZERO_LEVEL).div_(_LEVELS).float()

    def _window_variance(self) -> float:
        spread = float(self._squares.sum()) - float(self._sum.double().square().sum()) / self.window
        return spread / (self.window * self._sum.numel() * _LEVELS**2)

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`StopRule`."""
        return {"numbers": self._numbers(), "ring": self._ring.clone()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See :class:`StopRule`."""
        self._set_numbers(tensors["numbers"])
        self._ring = tensors["ring"].clone()
        if self._ring.numel():
            self._sum = self._ring.sum(0, dtype=torch.int32)
            self._squares = torch.stack([slot.to(torch.int64).square().sum() for slot in self._ring])


class MovingVariance(_Minimum):
    """ES-EMV: exponentially weighted mean and variance of the outputs, which need no window.

    The first ``warm_up`` variances are ignored: the average starts at the first output with variance 0, which no later
    output could beat.

    Args:
        alpha: weight of the newest output, in (0, 1).
        patience: steps without a new minimum before the rule fires, at least 1.
        warm_up: outputs before the first variance counts.
    """

    def __init__(self, alpha: float = 0.1, patience: int = 1000, warm_up: int = 100) -> None:
        super().__init__(patience)
        self.alpha, self.warm_up = alpha, warm_up
        self._mean = torch.empty(0)
        self._variance = 0.0

    def observe(self, output: Tensor) -> bool:
        """See :class:`StopRule`."""
        values = output.detach().flatten().cpu()
        if self.step == 0:
            self._mean = values.clone()
        else:
            away = values - self._mean
            spread = float(away.double().square().mean())
            self._variance = (1 - self.alpha) * (self._variance + self.alpha * spread)
            self._mean += self.alpha * away
        self.step += 1
        return self._judge(self._variance if self.step >= self.warm_up else None)

    def mean(self) -> Tensor:
        """See :class:`StopRule`; an output weighs ``1 - alpha`` times as much as the next."""
        return self._mean.clone()

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`StopRule`."""
        variance = torch.tensor(self._variance, dtype=torch.float64)
        return {"numbers": self._numbers(), "mean": self._mean.clone(), "variance": variance}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See :class:`StopRule`."""
        self._set_numbers(tensors["numbers"])
        self._mean = tensors["mean"].clone()
        self._variance = float(tensors["variance"])
