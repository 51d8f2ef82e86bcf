"""Networks that serve as image priors, and the registry that builds them by name.

Every prior is an ``nn.Module`` with

- ``kind``: its name in the registry,
- ``config``: the JSON-able keyword arguments that build it again,
- ``stride``: the multiple (px) its image sides should have,
- ``minimum_size``: the shortest image side (px) it can be fitted to,
- ``input_shape(height, width)``: the shape (1, C, h, w) of the input that gives an output of height x width px.
"""

from typing import Any, Protocol, cast

import torch
from torch import nn

from lipfast.config import check_seed, checks_types
from lipfast.errors import ConfigError
from lipfast.priors.decoder import DeepDecoder
from lipfast.priors.skip import SkipNet, from_authors, to_authors

__all__ = ["DeepDecoder", "Prior", "SkipNet", "as_prior", "build", "from_authors", "kinds", "prunable", "to_authors"]

_KINDS: dict[str, type[nn.Module]] = {"skip": SkipNet, "decoder": DeepDecoder}


class Prior(Protocol):
    """What fit, search and restore need to know of a network."""

    kind: str
    stride: int
    minimum_size: int

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build the same network."""

    def input_shape(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape of the input for an image of ``height`` x ``width`` px."""


def kinds() -> list[str]:
    """The names that :func:`build` knows."""
    return list(_KINDS)


@checks_types
def build(kind: str, config: dict[str, Any] | None = None, seed: int = 0) -> nn.Module:
    """Build a prior with PyTorch's default initialisation, drawn from ``seed``; the global generators are untouched.

    Args:
        kind: a name from :func:`kinds`.
        config: keyword arguments of the network; what is left out has its default.
        seed: equal seeds give equal weights; 0 to 2^63 - 1.

    Raises:
        ConfigError: an unknown kind, an unknown option, or an option or a seed out of its range.
    """
    check_seed("seed", seed)
    if kind not in _KINDS:
        raise ConfigError(f"unknown prior {kind!r}; known: {', '.join(_KINDS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return _KINDS[kind](**(config or {}))
        except TypeError as problem:  # an option the constructor does not have
            raise ConfigError(f"prior {kind!r}: {problem}") from None


def prunable(network: nn.Module) -> list[str]:
    """Names, as in ``network.state_dict()``, of the weights that pruning may remove: all conv weights, in module order.

    For :class:`SkipNet` that is the paper's order: encoder scales 0 .. 4 as (skip, down, conv), decoder deepest first
    as (3x3, 1x1), output conv. Biases and BatchNorm are never pruned.
    """
    return [f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]


def as_prior(network: nn.Module) -> Prior:
    """``network`` typed as a prior.

    Raises:
        ConfigError: it lacks one of a prior's attributes.
    """
    missing = [name for name in ("input_shape", "stride", "minimum_size") if not hasattr(network, name)]
    if missing:
        raise ConfigError(f"{type(network).__name__} is not a prior: it has no {', '.join(missing)}")
    return cast(Prior, network)
