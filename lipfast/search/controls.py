"""What a ticket is compared with: masks of the same sparsity that nobody searched for."""

from collections.abc import Mapping

import torch

from lipfast import masks
from lipfast.config import check_seed, derive_seed
from lipfast.masks import Masks


def random_masks(like: Mapping[str, torch.Tensor], seed: int, *, each_layer: bool) -> Masks:
    """Masks with exactly as many living weights as ``like``, chosen at random.

    Every weight draws one score from ``seed`` and the highest live, so the masks of successive rounds are nested: the
    same as choosing at random among the remaining in each round.

    Args:
        like: the masks to match in count.
        seed: of the choice, which is unrelated to the weights that a network draws from the same seed.
        each_layer: match the count in every layer; otherwise over all layers together.

    Raises:
        ConfigError: a seed below 0 or beyond 2^63 - 1.
    """
    check_seed("random_masks: seed", seed)
    generator = torch.Generator().manual_seed(derive_seed(seed, "search/controls"))
    scores = {name: torch.rand(mask.shape, generator=generator) for name, mask in like.items()}
    full = {name: torch.ones_like(mask) for name, mask in like.items()}
    if not each_layer:
        return masks.prune_globally(full, scores, masks.total(like) - masks.living(like))
    dead = {name: mask.numel() - int(mask.sum()) for name, mask in like.items()}
    return masks.prune_each_layer(full, scores, dead)
