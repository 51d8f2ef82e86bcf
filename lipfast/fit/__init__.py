"""Fitting a prior to one observation: the loop, its stop rules, and the state that lets it continue bit for bit."""

from lipfast.fit.device import check_instruction_set, checked_device
from lipfast.fit.loop import FitConfig, FitResult, Outcome, Progress, check, fit
from lipfast.fit.state import FitState
from lipfast.fit.stopping import MovingVariance, StopRule, WindowedVariance

__all__ = [
    "FitConfig",
    "FitResult",
    "FitState",
    "MovingVariance",
    "Outcome",
    "Progress",
    "StopRule",
    "WindowedVariance",
    "check",
    "check_instruction_set",
    "checked_device",
    "fit",
]
