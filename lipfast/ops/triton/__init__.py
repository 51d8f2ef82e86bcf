"""The Triton backend: CUDA (and ROCm) tensors. One kernel family per file; settings in ``configs.py``.

Under ``TRITON_INTERPRET=1`` the same kernels run on CPU tensors, slowly, which is how they are tested without a GPU.
"""

from lipfast.ops.triton.fold import fold_padding
from lipfast.ops.triton.mask import apply_mask, pack_mask
from lipfast.ops.triton.masked_conv import (
    masked_conv2d,
    masked_conv2d_input_gradient,
    masked_conv2d_weight_gradient,
    pack_channel_masks,
)
from lipfast.ops.triton.norm import (
    batch_norm_activate,
    batch_norm_activate_backward,
    normalise_activate,
    normalise_activate_backward,
)
from lipfast.ops.triton.resample import upsample_bilinear, upsample_bilinear_backward
from lipfast.ops.triton.rewind import begin_pruning, gather_kept, rewind_pack, scatter_kept
from lipfast.ops.triton.select import prune_smallest
from lipfast.ops.triton.sparse_conv import (
    sparse_conv2d_forward,
    sparse_conv2d_input_gradient,
    sparse_conv2d_weight_gradient,
)
from lipfast.ops.triton.step import adam_step, sgd_step

__all__ = [
    "adam_step",
    "apply_mask",
    "batch_norm_activate",
    "batch_norm_activate_backward",
    "begin_pruning",
    "fold_padding",
    "gather_kept",
    "masked_conv2d",
    "masked_conv2d_input_gradient",
    "masked_conv2d_weight_gradient",
    "normalise_activate",
    "normalise_activate_backward",
    "pack_channel_masks",
    "pack_mask",
    "prune_smallest",
    "rewind_pack",
    "scatter_kept",
    "sgd_step",
    "sparse_conv2d_forward",
    "sparse_conv2d_input_gradient",
    "sparse_conv2d_weight_gradient",
    "upsample_bilinear",
    "upsample_bilinear_backward",
]
