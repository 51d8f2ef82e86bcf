"""Launch settings of every Triton kernel, checked in: nothing is tuned at run time, so equal inputs give equal bits.

Chosen from compiled code (registers, access width); what they reach on an H200 is in docs/gpu.md.
``tests/gpu/test_triton_compiled.py`` compiles each of them for every target.
"""

from typing import TypedDict


class Config(TypedDict):
    """``meta`` are compile-time arguments of the kernel, the rest is how it is launched."""

    meta: dict[str, int]
    warps: int
    stages: int


def _config(warps: int = 4, stages: int = 2, **meta: int) -> Config:
    return {"meta": meta, "warps": warps, "stages": stages}


# Flat kernels take WORDS mask words, i.e. 32 * WORDS elements, a program. With four warps that is 16 elements a thread:
# four 128-bit accesses to each buffer.
CONFIGS: dict[str, Config] = {
    "adam": _config(WORDS=32),
    "sgd": _config(WORDS=32),
    "apply_mask": _config(WORDS=64),
    "pack_mask": _config(WORDS=64),
    # Planes share positions and weights; of one alone, a pixel takes over twice the instructions.
    "bilinear": _config(PLANES=4, BLOCK=128),
    "bilinear_backward": _config(PLANES=4, BLOCK=128),
    "histogram": _config(BLOCK=1024),
    "choose": _config(BINS=256, BLOCKS=64),
    "count": _config(BLOCK=1024),
    "remove": _config(BLOCK=1024),
    "compact": _config(BLOCK=1024),
    "expand": _config(BLOCK=1024),
    "fold": _config(BLOCK=512),
    "normalise": _config(BLOCK=1024),
    "normalise_backward": _config(BLOCK=1024),
    "batch_norm": _config(warps=8, BLOCK=4096),
    "batch_norm_whole": _config(warps=16, BLOCK=1 << 14),  # smaller channels take smaller blocks
    "sparse_forward": _config(BLOCK=512),
    "sparse_input_gradient": _config(BLOCK=512),
    "sparse_weight_gradient": _config(BLOCK=1024),
    "masked_conv": _config(warps=8, stages=3, PIXELS=128, CHANNELS=128),
    "masked_conv_ieee": _config(warps=8, stages=3, PIXELS=128, CHANNELS=64),
}
