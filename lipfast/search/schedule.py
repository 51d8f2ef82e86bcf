"""How many weights each round removes: exact integers, so that k pruned is k.

A round removes ``floor(rate * living)`` of the weights then alive, in exact rational arithmetic: 0.2 means 1/5 and not
the nearest binary fraction. The rule compounds: round n starts from what round n - 1 really left. It never removes more
than was asked for, and the last weight is never taken; a round that would remove nothing is an error, not a no-op.
"""

from collections.abc import Mapping
from fractions import Fraction

from lipfast.errors import ConfigError


def prune_count(living: int, rate: float) -> int:
    """How many of ``living`` weights one round at ``rate`` removes: ``floor(rate * living)``."""
    return int(_exact(rate) * living)


def kept_after(total: int, rate: float, rounds: int) -> list[int]:
    """Living weights after rounds 0, 1, ..., ``rounds`` (round 0 prunes nothing) of global pruning.

    Raises:
        ConfigError: some round would find nothing left to remove.
    """
    kept = [total]
    for number in range(1, rounds + 1):
        removed = prune_count(kept[-1], rate)
        if removed == 0:
            raise ConfigError(
                f"rounds={rounds} at prune={rate} leaves nothing to prune: after round {number - 1}, {kept[-1]} of "
                f"{total} weights live; use at most {number - 1} rounds"
            )
        kept.append(kept[-1] - removed)
    return kept


def layer_counts(living: Mapping[str, int], rate: float) -> dict[str, int]:
    """Layer-wise pruning: each layer loses ``floor(rate * its living weights)``; a very small one may lose none.

    Raises:
        ConfigError: no layer would lose a weight.
    """
    counts = {name: prune_count(count, rate) for name, count in living.items()}
    if not any(counts.values()):
        raise ConfigError(f"prune={rate} removes nothing: {sum(living.values())} weights live in {len(living)} layers")
    return counts


def _exact(rate: float) -> Fraction:
    """The decimal the user wrote: 0.2 becomes 1/5."""
    if not 0 < rate < 1:
        raise ConfigError(f"prune={rate} must be a share of the living weights in (0, 1), such as 0.2")
    return Fraction(repr(float(rate)))
