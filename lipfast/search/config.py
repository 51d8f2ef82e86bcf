"""What a search is asked for, as a value that names its run folder."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from lipfast.config import check_fields, check_seed
from lipfast.errors import ConfigError
from lipfast.search import schedule

SCHEMA = 2  # raise when a default or a field's meaning changes; runs of before keep their own names


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """One search by iterative magnitude pruning (IMP). Equal configs on equal pictures share a run folder."""

    rounds: int = 16  # of pruning; the dense fit before them is round 0
    prune: float = 0.2  # share of the weights still alive that a round removes
    scope: Literal["global", "layer"] = "global"  # smallest magnitudes over all layers together, or within each
    rewind: str = "0"  # to the initialisation "0", the weights at "5%" of the steps, or after "150it" steps
    target: Literal["degraded", "clean"] = "degraded"  # what the search fits; only an experiment has the clean picture
    leave_out: tuple[str, ...] = ()  # parameters never pruned, as shell patterns such as "output.*"
    several: Literal["each", "mean"] = (
        "each"  # several pictures: an input and output each, or one output for their mean
    )
    empty_layer: Literal["continue", "stop"] = "continue"  # what to do when a layer has lost every weight
    controls: tuple[int, ...] = ()  # rounds whose ticket is compared with a random mask of the same sparsity
    evaluate: bool = True  # fit every ticket to the degraded picture, also where the search itself does not
    prior: str = "skip"  # network kind, see lipfast.priors
    network: Mapping[str, Any] = field(default_factory=dict)  # its options; what is left out has its default
    seed: int = 0  # draws the initial weights, the input z, its noise, and the random masks
    degrade_seed: int = 0  # draws the degradation, so that several seeds see the same observation

    def __post_init__(self) -> None:
        check_fields(self)
        if not 1 <= self.rounds <= 1000:
            raise ConfigError(f"rounds={self.rounds} must be 1 to 1000")
        schedule.prune_count(1, self.prune)
        for name in ("seed", "degrade_seed"):
            check_seed(name, getattr(self, name))
        if beyond := [number for number in self.controls if not 1 <= number <= self.rounds]:
            raise ConfigError(f"controls: round {beyond[0]} is not one of rounds 1 to {self.rounds}")
        object.__setattr__(self, "controls", tuple(sorted(set(self.controls))))  # one search, however they are named
        _parse_rewind(self.rewind)

    def identity(self) -> dict[str, Any]:
        """Every field, defaults included, and the schema, JSON-able."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}


def rewind_step(rewind: str, iterations: int) -> int:
    """The step whose weights a ticket starts from: ``"0"``, ``"5%"`` (of ``iterations``, rounded down), ``"150it"``.

    Raises:
        ConfigError: none of these forms, or beyond the last step.
    """
    share, steps = _parse_rewind(rewind)
    step = int(share * iterations) if share is not None else steps
    if step > iterations or (share or 0) > 1:
        raise ConfigError(f"rewind={rewind!r} lies beyond the last of {iterations} steps")
    return step


def _parse_rewind(rewind: str) -> tuple[Fraction | None, int]:
    """``(share of the steps, 0)`` or ``(None, steps)``."""
    if rewind == "0":
        return None, 0
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)%", rewind):
        return Fraction(match[1]) / 100, 0
    if match := re.fullmatch(r"(\d+)it", rewind):
        return None, int(match[1])
    raise ConfigError(f"rewind={rewind!r} must be 0, a share of the steps such as 5%, or steps such as 150it")
