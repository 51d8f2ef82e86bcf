"""The seam: every kernel of lipfast is called through the functions named here."""

from lipfast.ops.select import prune_smallest
from lipfast.ops.step import adam_step, sgd_step

__all__ = ["adam_step", "prune_smallest", "sgd_step"]
