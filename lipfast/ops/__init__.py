"""The seam: every kernel of lipfast is called through the functions named here."""

from lipfast.ops.pack import gather_kept, scatter_kept
from lipfast.ops.rewind import Rewound, prune_rewind_pack
from lipfast.ops.select import prune_smallest
from lipfast.ops.step import adam_step, sgd_step

__all__ = [
    "Rewound",
    "adam_step",
    "gather_kept",
    "prune_rewind_pack",
    "prune_smallest",
    "scatter_kept",
    "sgd_step",
]
