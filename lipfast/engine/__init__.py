"""Executing whole networks: training steps behind one seam."""

import lipfast.ops as _ops  # noqa: F401  # settles torch's first square root, which every engine takes
