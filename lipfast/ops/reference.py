"""The meaning of every op in plain torch: the shortest correct form, no checks, no speed."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from lipfast.ops import _padding
from lipfast.ops.lane_conv import ConvForm
from lipfast.ops.lanes import LaneMap


def prune_smallest(magnitude: Tensor, alive: Tensor, count: int) -> Tensor:
    """See ``lipfast.ops.prune_smallest``; here for one flat tensor."""
    candidates = alive.nonzero().squeeze(1)
    order = torch.argsort(magnitude[candidates], stable=True)  # stable: ties fall to the lower index
    survivors = alive.clone()
    survivors[candidates[order[:count]]] = False
    return survivors


class _Pruning:
    """A `lipfast.ops.select.PruningRound`."""

    def __init__(self, weights: Sequence[Tensor], alive: Sequence[Tensor], count: int) -> None:
        self._weights, self._alive, self._count = weights, alive, count
        self.living = sum(int(mask.sum()) for mask in alive)
        nan = [bool(weight[mask].isnan().any()) for weight, mask in zip(weights, alive, strict=True)]
        self.nan_part = nan.index(True) if any(nan) else -1

    def masks(self) -> list[Tensor]:
        """The survivors of each tensor."""
        if not self._weights:
            return []
        magnitude = torch.cat([weight.reshape(-1).abs() for weight in self._weights])
        alive = torch.cat([mask.reshape(-1) for mask in self._alive])
        pieces = torch.split(prune_smallest(magnitude, alive, self._count), [mask.numel() for mask in self._alive])
        return [piece.reshape(mask.shape) for piece, mask in zip(pieces, self._alive, strict=True)]

    def rewind(self, start: Sequence[Tensor], into: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Survivors, survivors as bits, and the packed start values; writes the rewound weights to ``into``."""
        masks = self.masks()
        values = [first[mask] for first, mask in zip(start, masks, strict=True)]
        for target, first, mask in zip(into, start, masks, strict=True):
            target.copy_(torch.where(mask, first, torch.zeros_like(first)))
        return (
            masks,
            [pack_bits(mask) for mask in masks],
            torch.cat(values) if values else torch.empty(0, dtype=torch.float32),
        )


def begin_pruning(weights: Sequence[Tensor], alive: Sequence[Tensor], count: int) -> _Pruning:
    """See ``lipfast.ops.select.PruningRound``."""
    return _Pruning(weights, alive, count)


def pack_bits(mask: Tensor) -> Tensor:
    """``(ceil(n / 8),)`` uint8: eight weights to a byte, the lowest bit first, zeros behind the last weight."""
    padded = torch.nn.functional.pad(mask.reshape(-1), (0, -mask.numel() % 8)).reshape(-1, 8)
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], device=mask.device)
    return (padded * powers).sum(dim=1).to(torch.uint8)


def gather_kept(dense: Tensor, mask: Tensor) -> Tensor:
    """See ``lipfast.ops.gather_kept``."""
    return dense[mask]


def scatter_kept(values: Tensor, mask: Tensor) -> Tensor:
    """See ``lipfast.ops.scatter_kept``."""
    dense = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    dense[mask] = values
    return dense


def adam_step(
    values: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """See ``lipfast.ops.adam_step``; torch.optim's single-tensor form, line by line."""
    if weight_decay != 0:
        gradient = gradient.add(values, alpha=weight_decay)
    m.lerp_(gradient, 1 - beta1)
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    # torch's own float32 root comes from MKL, which misses the nearest float in 0.6 % of cases; this one never does.
    root = v.double().sqrt().float()
    denominator = (root / (1 - beta2**step) ** 0.5).add_(eps)
    values.addcdiv_(m, denominator, value=-(lr / (1 - beta1**step)))


def sgd_step(
    values: Tensor,
    gradient: Tensor,
    momentum_buffer: Tensor,
    step: int,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """See ``lipfast.ops.sgd_step``; torch.optim's single-tensor form, line by line."""
    if weight_decay != 0:
        gradient = gradient.add(values, alpha=weight_decay)
    if momentum != 0:
        if step == 1:
            momentum_buffer.copy_(gradient)
        else:
            momentum_buffer.mul_(momentum).add_(gradient, alpha=1 - dampening)
        gradient = gradient.add(momentum_buffer, alpha=momentum) if nesterov else momentum_buffer
    values.add_(gradient, alpha=-lr)


def _dense(values: Tensor, positions: Tensor, shape: torch.Size) -> Tensor:
    return values.new_zeros(shape.numel()).index_copy(0, positions, values).view(shape)


def sparse_conv2d_forward(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    shape: torch.Size,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    padding_mode: str,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve ``x`` with the weight of ``shape`` whose kept ``values`` sit at flat ``positions`` (ascending)."""
    weight = _dense(values, positions, shape)
    return dense_conv2d(x, weight, bias, stride, padding, padding_mode, dilation, groups)


def sparse_conv2d_input_gradient(
    dy: Tensor,
    values: Tensor,
    positions: Tensor,
    shape: torch.Size,
    input_size: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
    padding_mode: str,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """Gradient for ``x`` of ``input_size``, given the gradient ``dy`` of the output."""
    weight = _dense(values, positions, shape)
    return dense_input_gradient(dy, weight, input_size, stride, padding, padding_mode, dilation, groups)


def sparse_conv2d_weight_gradient(
    x: Tensor,
    dy: Tensor,
    positions: Tensor,
    shape: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
    padding_mode: str,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """``(kept,)``: gradient of each kept weight, given the gradient ``dy`` of the output."""
    dense = dense_weight_gradient(x, dy, shape, stride, padding, padding_mode, dilation, groups)
    return dense.reshape(-1)[positions]


def sparse_conv2d_map(
    x: LaneMap, values: Tensor, positions: Tensor, shape: torch.Size, bias: Tensor | None, form: ConvForm
) -> LaneMap:
    """``sparse_conv2d_forward`` of a map's pixels, as a map with as wide a halo, filled with the layer's padding."""
    y = sparse_conv2d_forward(x.to_tensor(), values, positions, shape, bias, *form.settings)
    block = (x.block[0] // form.stride, x.block[1] // form.stride)
    return LaneMap.from_tensor(y, x.halo, form.padding_mode, form.border_of(*y.shape[2:]), block)


def sparse_conv2d_map_gradients(
    x: LaneMap,
    dy: Tensor,
    values: Tensor,
    positions: Tensor,
    shape: torch.Size,
    form: ConvForm,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the map, the kept values and the bias, given that of the output's pixels; empty if not needed."""
    plain = x.to_tensor()
    gradient = LaneMap(dy, *form.out_size(x.height, x.width), x.halo).to_tensor()
    dx, dvalues, dbias = (dy.new_empty(0) for _ in range(3))
    if needs_x:
        found = sparse_conv2d_input_gradient(gradient, values, positions, shape, plain.shape, *form.settings)
        dx = LaneMap.from_tensor(found, x.halo, block=x.block).data
    if needs_weights:
        dvalues = sparse_conv2d_weight_gradient(plain, gradient, positions, shape, *form.settings)
        dbias = gradient.sum((0, 2, 3))
    return dx, dvalues, dbias


def dense_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    padding_mode: str,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """``conv2d`` with any padding."""
    if padding_mode == "zeros":  # without a padded copy of the map
        return torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
    padded = _padding.pad(x, padding, padding_mode)
    return torch.nn.functional.conv2d(padded, weight, bias, stride, dilation=dilation, groups=groups)


def dense_input_gradient(
    dy: Tensor,
    weight: Tensor,
    input_size: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
    padding_mode: str,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """Gradient of `dense_conv2d` for ``x``."""
    padded_size = (*input_size[:2], input_size[2] + 2 * padding[0], input_size[3] + 2 * padding[1])
    padded: Tensor = conv2d_input(  # type: ignore[no-untyped-call]
        padded_size, weight, dy, stride, dilation=dilation, groups=groups
    )
    return _padding.fold(padded, input_size, padding, padding_mode)


def dense_weight_gradient(
    x: Tensor,
    dy: Tensor,
    shape: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
    padding_mode: str,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """Gradient of `dense_conv2d` for the weight."""
    padded = _padding.pad(x, padding, padding_mode)
    dense: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
        padded, shape, dy, stride, dilation=dilation, groups=groups
    )
    return dense


def pack_channel_masks(alive: Tensor) -> Tensor:
    """See ``lipfast.ops.pack_mask``."""
    rows = alive.reshape(len(alive), math.prod(alive.shape[1:]))
    bits = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 32)).view(len(alive), -(-rows.shape[1] // 32), 32)
    powers = torch.ones(32, dtype=torch.int64, device=alive.device) << torch.arange(32, device=alive.device)
    return (bits * powers).sum(2).to(torch.int32)  # bit 31 wraps to the sign


def apply_mask(x: Tensor, words: Tensor) -> Tensor:
    """See ``lipfast.ops.apply_mask``."""
    bits = words.unsqueeze(2) >> torch.arange(32, device=words.device) & 1
    alive = bits.flatten(1)[:, : x.numel() // max(1, len(x))].reshape(x.shape).bool()
    return torch.where(alive, x, 0)


@contextmanager
def convolving_in(precision: str, device: torch.device) -> Iterator[None]:
    """torch's own convolutions inside multiply at least as exactly as ``precision`` asks, as fast as it allows."""
    if device.type != "cuda":  # a CPU multiplies in fp32
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = precision != "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    words: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    padding_mode: str,
    *,
    precision: str,
) -> Tensor:
    """See ``lipfast.ops.masked_conv2d``."""
    with convolving_in(precision, x.device):
        return dense_conv2d(x, apply_mask(weight, words), None, stride, padding, padding_mode)


def masked_conv2d_input_gradient(
    dy: Tensor,
    weight: Tensor,
    words: Tensor,
    input_size: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
    padding_mode: str,
    *,
    precision: str,
) -> Tensor:
    """Gradient of ``masked_conv2d`` for ``x`` of ``input_size``."""
    with convolving_in(precision, dy.device):
        return dense_input_gradient(dy, apply_mask(weight, words), input_size, stride, padding, padding_mode)


def masked_conv2d_weight_gradient(
    x: Tensor,
    dy: Tensor,
    words: Tensor,
    shape: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
    padding_mode: str,
    *,
    precision: str,
) -> Tensor:
    """Gradient of ``masked_conv2d`` for the weight of ``shape``; 0 where it is dead."""
    with convolving_in(precision, x.device):
        return apply_mask(dense_weight_gradient(x, dy, shape, stride, padding, padding_mode), words)


def normalise_activate(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float
) -> Tensor:
    """See ``lipfast.ops.normalise_activate``."""
    normal = torch.nn.functional.batch_norm(x.to(mean.dtype), mean, variance, weight, bias, eps=eps)
    return torch.nn.functional.leaky_relu(normal, slope).to(x.dtype)


def normalise_activate_backward(
    x: Tensor, dy: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward pass of ``LeakyReLU(scale * x + shift)``.

    Returns:
        The gradient for ``x``; with g the gradient for ``scale * x + shift``: the sums over each channel of g and of
        ``g * (x - mean)``.
    """
    per_channel = (1, -1, 1, 1)
    wide, g, scale = x.to(scale.dtype), dy.to(scale.dtype), scale.view(per_channel)
    g = torch.where(wide * scale + shift.view(per_channel) > 0, g, g * slope)
    return (g * scale).to(x.dtype), g.sum((0, 2, 3)), (g * (wide - mean.view(per_channel))).sum((0, 2, 3))


def batch_norm_activate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_variance: Tensor | None,
    momentum: float,
    eps: float,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """LeakyReLU of slope ``slope`` (1: none) of BatchNorm in training, which moves the running statistics.

    Returns:
        The result; mean and ``1 / sqrt(variance + eps)`` of each channel.
    """
    mean = x.mean((0, 2, 3))
    variance = x.var((0, 2, 3), correction=0)
    inverse = torch.rsqrt(variance + eps)
    normal = torch.nn.functional.batch_norm(x, running_mean, running_variance, weight, bias, True, momentum, eps)
    return torch.nn.functional.leaky_relu(normal, slope), mean, inverse


def batch_norm_activate_backward(
    x: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``batch_norm_activate`` for ``x``, ``weight`` and ``bias``."""
    mean, inverse = (vector.view(1, -1, 1, 1) for vector in (mean, inverse))
    normal = (x - mean) * inverse
    scale = 1.0 if weight is None else weight.view(1, -1, 1, 1)
    scaled = normal * scale + (0.0 if bias is None else bias.view(1, -1, 1, 1))
    g = torch.where(scaled > 0, dy, dy * slope)
    dbias, dweight = g.sum((0, 2, 3)), (g * normal).sum((0, 2, 3))
    dot = (dbias.view(1, -1, 1, 1) + normal * dweight.view(1, -1, 1, 1)) * (x.shape[1] / x.numel())
    return inverse * scale * (g - dot), dweight, dbias


def upsample_bilinear(x: Tensor, size: Sequence[int], align_corners: bool, scales: Sequence[float] | None) -> Tensor:
    """See ``lipfast.ops.upsample_bilinear``; what ``interpolate`` calls, which takes either a size or scales."""
    y: Tensor = torch.ops.aten.upsample_bilinear2d(x, size, align_corners, *(scales or (None, None)))
    return y


def upsample_bilinear_backward(
    dy: Tensor, size: Sequence[int], align_corners: bool, scales: Sequence[float] | None
) -> Tensor:
    """Gradient of ``upsample_bilinear`` for a map of ``size`` (rows, columns)."""
    sizes = (dy.shape[2:], (*dy.shape[:2], *size))
    dx: Tensor = torch.ops.aten.upsample_bilinear2d_backward(dy, *sizes, align_corners, *(scales or (None, None)))
    return dx


_WORD = 0xFFFFFFFF
_ROTATIONS = ((10, 26), (11, 21), (13, 27), (23, 5), (6, 20), (17, 11), (25, 10), (18, 20))


def _threefry(first: Tensor, key: Sequence[int]) -> list[Tensor]:
    """The four words of counters with these first words: Threefry4x32 with twenty rounds, in int64."""
    keys = [*key, 0x1BD11BDA ^ key[0] ^ key[1] ^ key[2] ^ key[3]]
    x = [(word + keys[k]) & _WORD for k, word in enumerate([first, *[torch.zeros_like(first)] * 3])]
    for turn in range(20):
        for start, rotation in zip((0, 2), _ROTATIONS[turn % 8], strict=True):
            other = 3 - start if turn % 2 else start + 1
            x[start] = x[start] + x[other] & _WORD
            x[other] = (x[other] << rotation & _WORD | x[other] >> 32 - rotation) ^ x[start]
        if turn % 4 == 3:
            count = turn // 4 + 1
            x = [word + keys[(count + k) % 5] & _WORD for k, word in enumerate(x)]
            x[3] = x[3] + count & _WORD
    return x


def _normals(for_radius: Tensor, for_angle: Tensor) -> list[Tensor]:
    """Two normal numbers of two words, in float64: 24 bits of each word, and two for the quarter of the angle."""
    radius = (-2 * (((for_radius >> 8) + 1).double() * 2.0**-24).log()).sqrt()
    part = (for_angle >> 6 & 0xFFFFFF).double() * 2.0**-24 - 0.5
    angle = (part + (for_angle >> 30)) * (math.pi / 2)
    return [radius * angle.cos(), radius * angle.sin()]


def add_noise(base: Tensor, scale: float, seed: int, step: int) -> Tensor:
    """See ``lipfast.ops.add_noise``. Numbers come in groups of 64, those that sixteen counters give: the first of each,
    the second of each, and so on."""
    lanes, count = 16, base.numel()
    counters = torch.arange(-(-count // (4 * lanes)) * lanes, device=base.device)  # below 2^32
    words = _threefry(counters, (seed & _WORD, seed >> 32, step & _WORD, step >> 32))
    numbers = torch.stack(_normals(words[0], words[1]) + _normals(words[2], words[3]))
    flat = numbers.reshape(4, -1, lanes).transpose(0, 1).reshape(-1)[:count]
    return base + scale * flat.float().reshape(base.shape)
