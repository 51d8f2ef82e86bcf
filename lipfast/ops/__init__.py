"""The seam: every kernel of lipfast is called through the functions named here."""

from lipfast.ops.select import prune_smallest

__all__ = ["prune_smallest"]
