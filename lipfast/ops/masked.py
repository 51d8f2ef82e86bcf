"""Dense maps and weights under packed masks: what a GPU runs at moderate sparsity, and between its convolutions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lipfast.errors import InputError
from lipfast.ops import _dispatch

PRECISIONS = ("ieee", "tf32", "bf16")


def pack_mask(mask: Tensor, *, backend: str | None = None) -> Tensor:
    """Pack a bool tensor, row by row of its first axis.

    Returns:
        ``(rows, ceil(n / 32))`` int32 for rows of n elements: bit ``i % 32`` of word ``i // 32`` says whether element i
        lives; bits behind the last element are 0.

    Raises:
        InputError: not a bool tensor with at least one axis.
        BackendError: ``backend`` cannot run here.
    """
    if mask.dtype != torch.bool or mask.dim() == 0:
        raise InputError(f"pack_mask: expected a bool tensor with axes, got {mask.dtype} {tuple(mask.shape)}")
    _, run = _dispatch.pick("pack_channel_masks", mask.device, backend)
    words: Tensor = run(mask)
    return words


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    words: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    padding_mode: str = "zeros",
    *,
    precision: str,
    backend: str | None = None,
) -> Tensor:
    """Convolve with the living part of a dense weight. No gradient.

    Args:
        x: ``(batch, inputs, rows, columns)``.
        weight: ``(outputs, inputs, tap rows, tap columns)``; dead entries may hold anything, NaN included.
        words: `pack_mask` of the weight's mask.
        stride, padding, padding_mode: as in ``torch.nn.Conv2d``.
        precision: of the factors: "ieee" (fp32), "tf32" (10 bits of mantissa) or "bf16" (7 bits); sums are fp32. Has no
            default, as it decides about the result.
        backend: run exactly this implementation; None lets the seam choose.

    Raises:
        InputError: an argument breaks the lines above.
        BackendError: ``backend`` cannot run here.
    """
    if precision not in PRECISIONS:
        raise InputError(f"masked_conv2d: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    expected = (len(weight), -(-weight[0].numel() // 32))
    if words.dtype != torch.int32 or tuple(words.shape) != expected:
        raise InputError(
            f"masked_conv2d: words must be int32 {expected} for a weight of {tuple(weight.shape)}, "
            f"got {words.dtype} {tuple(words.shape)}; make them with ops.pack_mask"
        )
    _, run = _dispatch.pick("masked_conv2d", x.device, backend)
    y: Tensor = run(x, weight, words, tuple(stride), tuple(padding), padding_mode, precision=precision)
    return y


def normalise_activate(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    slope: float = 0.2,
    *,
    backend: str | None = None,
) -> Tensor:
    """LeakyReLU(BatchNorm(x)) with given statistics, in one pass where a kernel exists. No gradient.

    Args:
        x: ``(batch, channels, rows, columns)``.
        mean, variance, weight, bias: ``(channels,)`` float32.
        eps: added to the variance.
        slope: of the negative side; 1 leaves the activation out.
        backend: run exactly this implementation; None lets the seam choose.

    Raises:
        InputError: a vector of another length.
        BackendError: ``backend`` cannot run here.
    """
    for name, vector in {"mean": mean, "variance": variance, "weight": weight, "bias": bias}.items():
        if vector.shape != x.shape[1:2]:
            raise InputError(f"normalise_activate: {name} must be ({x.shape[1]},), got {tuple(vector.shape)}")
    _, run = _dispatch.pick("normalise_activate", x.device, backend)
    y: Tensor = run(x.contiguous(), mean, variance, weight, bias, eps, slope)
    return y
