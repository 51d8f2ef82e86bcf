"""The seam: every kernel of lipfast is called through the functions named here."""

import torch

from lipfast.ops._dispatch import kernel
from lipfast.ops.lane_conv import ConvForm, LaneConv
from lipfast.ops.lanes import LaneMap
from lipfast.ops.masked import apply_mask, masked_conv2d, normalise_activate, pack_mask
from lipfast.ops.noise import add_noise
from lipfast.ops.pack import gather_kept, scatter_kept
from lipfast.ops.rewind import Rewound, prune_rewind_pack
from lipfast.ops.select import prune_smallest
from lipfast.ops.sparse_conv import SparseWeight, sparse_conv2d
from lipfast.ops.step import adam_step, sgd_step
from lipfast.ops.upsample import upsample_bilinear

__all__ = [
    "ConvForm",
    "LaneConv",
    "LaneMap",
    "Rewound",
    "SparseWeight",
    "adam_step",
    "add_noise",
    "apply_mask",
    "gather_kept",
    "kernel",
    "masked_conv2d",
    "normalise_activate",
    "pack_mask",
    "prune_rewind_pack",
    "prune_smallest",
    "scatter_kept",
    "sgd_step",
    "sparse_conv2d",
    "upsample_bilinear",
]

# The first square root that torch takes on several threads at once comes out with half its digits on some of them in
# one process of three (its MKL sets itself up without a lock). One taken alone first prevents it: a seed must give
# the same bits whichever engine runs.
torch.ones(8).sqrt()
