"""What the engine does for each torch function that it knows: a handler with that function's signature appends its
operators."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lipfast.engine.builder import MULTIPLY_TOO, PERMUTE, Builder, Handler, Unsupported
from lipfast.engine.capture import Ref, pair
from lipfast.engine.graph import Heads, Taps, consecutive
from lipfast.engine.heads import ADDMM, PRODUCT, attention
from lipfast.engine.patterns import channel_norm, gelu_tanh, largest_channel, pixel_norm, response

_LARGEST_KERNEL = 15
# Lists of more kept weights of linear layers cost too much memory.
_LARGEST_LINEAR, _LARGEST_DENSE_LINEAR = 1 << 24, 1 << 22


def _conv2d(
    b: Builder,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> int:
    n, channels, height, width = b.shape(input)
    out_channels, _, *kernel = weight.shape
    if _is_of_patches(kernel, stride, padding, dilation, groups) and height % kernel[0] == width % kernel[0] == 0:
        patches = _pixel_unshuffle(b, input, kernel[0])
        of_channels = dataclasses.replace(weight, shape=(out_channels, channels * kernel[0] ** 2, 1, 1))
        return _on_features(b, patches, of_channels, bias)
    window = _window(kernel, stride, dilation)
    reach = [window["dilation"] * (k - 1) for k in kernel]
    if padding == "same":
        if reach[0] % 2 or reach[1] % 2:
            raise Unsupported("padding='same' with an even kernel")
        padding = reach[0] // 2, reach[1] // 2
    pad = (0, 0) if padding == "valid" else pair(padding)
    out_h = (height + 2 * pad[0] - reach[0] - 1) // window["stride"] + 1
    out_w = (width + 2 * pad[1] - reach[1] - 1) // window["stride"] + 1
    attributes: dict[str, Any] = {"weight": b.weight(weight), "bias": b.weight(bias), "padding_mode": "zeros"}
    attributes |= window | {"pad": pad, "groups": groups}
    return b.node("conv", [b.map(input)], (n, out_channels, out_h, out_w), **attributes)


def _is_of_patches(kernel: Sequence[int], stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Whether a convolution takes each square patch of pixels once, in steps too wide for the kernels."""
    side = kernel[0]
    wide = side > 2 and (side, side) == tuple(kernel) == pair(stride)
    return wide and padding != "same" and pair(padding) in ((0, 0), ("valid",) * 2) and groups == 1


def _conv_transpose2d(
    b: Builder,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> int:
    n, _, *sides = b.shape(input)
    _, per_group, *kernel = weight.shape
    axes = zip(sides, kernel, pair(stride), pair(padding), pair(output_padding), pair(dilation), strict=True)
    out = [(side - 1) * step - 2 * pad + spread * (k - 1) + more + 1 for side, k, step, pad, more, spread in axes]
    attributes: dict[str, Any] = _window(kernel, stride, dilation) | {"pad": pair(padding), "groups": groups}
    if max(pair(output_padding)) >= attributes["stride"]:
        raise Unsupported("output_padding as large as the stride")
    shape = (n, per_group * groups, out[0], out[1])
    value = b.node("conv_transpose", [b.map(input)], shape, weight=b.weight(weight), **attributes)
    return value if bias is None else b.node("shift", [value], shape, beta=b.weight(bias))


def _window(kernel: Sequence[int], stride: Any, dilation: Any) -> dict[str, int]:
    """Stride and dilation of a convolution that the kernels can do."""
    stride_h, stride_w = pair(stride)
    dilation_h, dilation_w = pair(dilation)
    if stride_h != stride_w or dilation_h != dilation_w:
        raise Unsupported("stride or dilation differs between rows and columns")
    if stride_h > 2 or max(kernel) > _LARGEST_KERNEL:
        most = f"{_LARGEST_KERNEL} x {_LARGEST_KERNEL} and stride 2"
        raise Unsupported(f"kernel {kernel[0]} x {kernel[1]}, stride {stride_h}: the kernels go to {most}")
    return {"stride": stride_h, "dilation": dilation_h}


def _batch_norm(
    b: Builder,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> int:
    value = b.map_or_rows(input)
    n, _, height, width = b.graph.shapes[value]
    if training and n * height * width == 1:
        raise Unsupported("one value per channel has no variance")
    attributes: dict[str, Any] = {"gamma": b.weight(weight), "beta": b.weight(bias)}
    attributes |= {
        "running": b.running(running_mean, running_var, training),
        "training": training,
        "momentum": momentum,
        "epsilon": eps,
        "act": "none",
        "slope": 0.0,
    }
    return b.like("norm", value, **attributes)


def _group_norm(
    b: Builder, input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> int:
    attributes = {"gamma": b.weight(weight), "beta": b.weight(bias), "groups": num_groups, "epsilon": eps}
    return b.same("group_norm", input, **attributes, act="none", slope=0.0, slopes=None)


def _instance_norm(
    b: Builder,
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> int:
    if not use_input_stats:
        return _batch_norm(b, input, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None:
        raise Unsupported("running statistics that are means over the items'")
    return _group_norm(b, input, b.shape(input)[1], weight, bias, eps)


def _layer_norm(
    b: Builder,
    input: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> int:
    value = b.rows(input)
    if tuple(normalized_shape) != input.shape[-1:]:
        raise Unsupported("a norm over more than the last axis")
    _check_epsilon(eps)
    return b.like("layer_norm", value, gamma=b.weight(weight), beta=b.weight(bias), epsilon=eps, centred=True)


def _rms_norm(b: Builder, input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> int:
    if tuple(normalized_shape) != input.shape[-1:]:
        raise Unsupported("a norm over more than the last axis")
    value = _pixel_norm(b, input, torch.finfo(torch.float32).eps if eps is None else eps, -1)
    if weight is None:
        return value
    return _on_features(b, value, dataclasses.replace(weight, shape=(*weight.shape, 1, 1, 1)), groups=weight.shape[0])


def _activation(act: str) -> Callable[..., int]:
    def handler(b: Builder, input: Any, inplace: bool = False) -> int:
        return b.each("act", input, act=act, slope=0.0)

    return handler


def _gelu(b: Builder, input: Any, *, approximate: str = "none") -> int:
    return b.each("act", input, act="gelu" if approximate == "none" else "gelu_tanh", slope=0.0)


def _gelu_tanh(b: Builder, x: Any) -> int:
    return b.each("act", x, act="gelu_tanh", slope=0.0)


def _hardtanh(b: Builder, input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> int:
    if (min_val, max_val) != (0, 6):
        raise Unsupported(f"bounds {min_val} and {max_val}: only ReLU6's, 0 and 6")
    return b.each("act", input, act="relu6", slope=0.0)


def _leaky_relu(b: Builder, input: Any, negative_slope: float = 0.01, inplace: bool = False) -> int:
    return b.each("act", input, act="leaky_relu", slope=float(negative_slope))


def _prelu(b: Builder, input: Any, weight: Any) -> int:
    count = math.prod(weight.shape)
    value = b.rows(input) if count > 1 and len(input.shape) == 2 else b.any(input)
    second_axis = len(input.shape) == 2 or not (b.has_rows(input) or b.has_features_last(input))
    if count > 1 and not (second_axis and b.graph.shapes[value][1] == count):
        raise Unsupported("slopes along another axis than the channels or features")
    return b.like("prelu", value, slopes=b.weight(weight))


def _dropout(b: Builder, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> int:
    if training and p > 0:
        raise Unsupported("dropout in training draws random numbers")
    return b.any(input)


def _same_value(b: Builder, input: Any, *, memory_format: Any = None) -> int:
    return b.any(input)


def _cat(b: Builder, tensors: Any, dim: int = 0) -> int:
    if dim not in (1, -3):
        raise Unsupported(f"concatenation along axis {dim}")
    n, _, height, width = b.shape(tensors[0])
    values = [b.map(tensor) for tensor in tensors]
    channels = sum(b.graph.shapes[value][1] for value in values)
    return b.node("cat", values, (n, channels, height, width), interleaved=False)


def _chunk(b: Builder, input: Any, chunks: int, dim: int = 0) -> list[int]:
    side = input.shape[dim]
    each = max(1, -(-side // chunks))
    return _parts(b, input, dim, [min(each, side - first) for first in range(0, side, each)])


def _split(b: Builder, tensor: Any, split_size: Any, dim: int = 0) -> list[int]:
    if isinstance(split_size, (tuple, list)):
        return _parts(b, tensor, dim, split_size)
    side = tensor.shape[dim]
    return _parts(b, tensor, dim, [min(split_size, side - first) for first in range(0, side, split_size)])


def _parts(b: Builder, tensor: Any, dim: int, counts: Sequence[int]) -> list[int]:
    """Consecutive ranges of a map's channels, or of features."""
    behind = b.has_rows(tensor) or b.has_features_last(tensor)
    if dim % len(tensor.shape) != (len(tensor.shape) - 1 if behind else 1):
        raise Unsupported(f"parts along axis {dim}")
    value = b.rows(tensor) if behind else b.map(tensor)
    return [_channels(b, value, which) for which in consecutive(counts)]


def _channels(b: Builder, value: int, which: range) -> int:
    """Some channels of a map, or features of rows."""
    attributes = {"first": which.start, "last": which.stop, "step": which.step}
    n, _, height, width = b.graph.shapes[value]
    if value in b.graph.rows:
        return b.node_of_rows("channels", [value], (height * width, len(which)), **attributes)
    return b.node("channels", [value], (n, len(which), height, width), **attributes)


def _glu(b: Builder, input: Any, dim: int = -1) -> int:
    first, second = _parts(b, input, dim, [input.shape[dim] // 2] * 2)
    return b.like("multiply", first, b.like("act", second, act="sigmoid", slope=0.0))


def _channel_shuffle(b: Builder, input: Any, groups: int) -> int:
    n, channels, height, width = b.shape(input)
    parts = _parts(b, input, 1, [channels // groups] * groups)
    return b.node("cat", parts, (n, channels, height, width), interleaved=True)


def _pool(
    b: Builder,
    input: Any,
    kernel: Any,
    stride: Any,
    padding: Any,
    maximum: bool,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> int:
    n, c, *axes = b.shape(input)
    sides, steps, pads = pair(kernel), pair(kernel if stride is None or stride in ([], ()) else stride), pair(padding)
    if sides[0] != sides[1] or steps[0] != steps[1] or pads[0] != pads[1]:
        raise Unsupported("a window that is not square")
    window = {"kernel": sides[0], "stride": steps[0], "pad": pads[0]}
    out_h, out_w = (_windows(side, **window, ceil_mode=ceil_mode) for side in axes)
    counted = pads[0] if count_include_pad else 0
    return b.node("pool", [b.map(input)], (n, c, out_h, out_w), **window, counted=counted, maximum=maximum)


def _windows(side: int, kernel: int, stride: int, pad: int, ceil_mode: bool) -> int:
    """How many windows torch takes along an axis; the last one starts in the picture or in the padding before it."""
    count = (side + 2 * pad - kernel + (stride - 1 if ceil_mode else 0)) // stride + 1
    return count - 1 if ceil_mode and (count - 1) * stride >= side + pad else count


def _avg_pool2d(
    b: Builder,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> int:
    if divisor_override is not None:
        raise Unsupported("divisor_override")
    return _pool(b, input, kernel_size, stride, padding, False, ceil_mode, count_include_pad)


def _max_pool2d(
    b: Builder,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> int:
    if return_indices or pair(dilation) != (1, 1):
        raise Unsupported("return_indices or dilation")
    return _pool(b, input, kernel_size, stride, padding, True, ceil_mode)


def _adaptive_avg_pool2d(b: Builder, input: Any, output_size: Any) -> int:
    n, c, height, width = b.shape(input)
    down, across = pair(output_size)
    rows, columns = height if down is None else down, width if across is None else across
    if (rows, columns) == (height, width):
        return b.map(input)
    if (rows, columns) == (1, 1):
        return _mean(b, input, (2, 3), True)
    if height % rows or width % columns or height // rows != width // columns:
        return b.node("mean_to", [b.map(input)], (n, c, rows, columns))
    return _pool(b, input, height // rows, None, 0, False)


def _mean(b: Builder, input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> int:
    if keepdim and _is_over_channels(b, input, dim) and dtype is None:
        return _of_channels(b, "channel_mean", input)
    dims = {axis % 4 for axis in dim} if isinstance(dim, (tuple, list)) else set()
    if dims != {2, 3} or dtype is not None:
        raise Unsupported("a mean over anything but height and width, or channels that stay an axis")
    n, c, _, _ = b.shape(input)
    return b.node("mean", [b.map(input)], (n, c, 1, 1))


def _amax(b: Builder, input: Any, dim: Any = (), keepdim: bool = False) -> int:
    if not keepdim or not _is_over_channels(b, input, dim):
        raise Unsupported("the largest over anything but channels that stay an axis")
    return _of_channels(b, "largest", input, shared=True)


def _largest_channel(b: Builder, input: Any, dim: int, keepdim: bool) -> int:
    if not keepdim:
        raise Unsupported("the largest of channels that do not stay an axis")
    return _of_channels(b, "largest", input, shared=False)


def _is_over_channels(b: Builder, input: Any, dim: Any) -> bool:
    axes = [axis % 4 for axis in (dim if isinstance(dim, (tuple, list)) else [dim]) if axis is not None]
    return len(input.shape) == 4 and axes == [3 if b.has_features_last(input) else 1]


def _of_channels(b: Builder, kind: str, input: Any, **attributes: Any) -> int:
    """One number for each pixel, made from its channels."""
    (value,) = _maps(b, input)
    n, _, height, width = b.graph.shapes[value]
    return b.node(kind, [value], (n, 1, height, width), **attributes)


def _maps(b: Builder, *tensors: Any) -> list[int]:
    """The values of maps whose channels all lie before height and width, or all behind."""
    last = [b.has_features_last(tensor) for tensor in tensors]
    if any(last) and not all(last):
        raise Unsupported("maps whose channels lie before and behind")
    return [b.rows(tensor) if all(last) else b.map(tensor) for tensor in tensors]


def _numbers_of_items(b: Builder, *tensors: Any) -> tuple[int, int] | None:
    """The values of tokens or pixels, (items, ..., features), and of rows with a number for each feature of an item,
    (items, 1, ..., features), as a map of one pixel for each; None for other tensors. Rows of features are one map for
    all items, so there must be one item."""
    whole, numbers = sorted(tensors, key=lambda tensor: math.prod(tensor.shape), reverse=True)
    items, *axes, features = whole.shape
    last = b.has_features_last(whole)
    fits = axes and numbers.shape == (items, *[1] * len(axes), features) != whole.shape
    if not fits or b.has_features_last(numbers) or not (last or b.has_rows(whole)):
        return None
    value = b.rows(whole)
    if items != (b.graph.shapes[value][0] if last else 1):
        return None
    if items == 1:
        return value, b.rows(numbers)
    return value, b.node("unflatten", [b.rows(numbers)], (items, features, 1, 1))


def _check_spread(b: Builder, what: str, tensors: Sequence[Any]) -> None:
    """Refuse tensors with the channels behind, of any number of axes, that torch would not align as their maps are."""
    numbers, whole = sorted((tensor.shape for tensor in tensors), key=math.prod)
    of_planes = (whole[0], *[1] * (len(whole) - 2), whole[-1])
    if b.has_features_last(tensors[0]) and numbers not in (whole, of_planes, (*whole[:-1], 1)):
        raise Unsupported(f"the {what} of shapes {whole} and {numbers} (broadcasting)")


def _spread(b: Builder, what: str, values: Sequence[int]) -> list[int]:
    """Two maps in the order in which the second one has a number for each plane or for each pixel of the first."""
    for whole, numbers in itertools.permutations(values):
        n, c, height, width = b.graph.shapes[whole]
        if b.graph.shapes[numbers] in ((n, c, 1, 1), (n, 1, height, width)):
            return [whole, numbers]
    one, other = (b.graph.shapes[value] for value in values)
    raise Unsupported(f"the {what} of shapes {one} and {other} (broadcasting)")


def _permute(b: Builder, input: Any, *dims: Any) -> int:
    """Channels behind height and width, and back: a map stays where it is."""
    order = tuple(axis % 4 for axis in (dims[0] if isinstance(dims[0], (tuple, list)) else dims))
    if b.has_features_last(input) and order == (0, 3, 1, 2):
        return b.rows(input)
    if order != (0, 2, 3, 1):
        raise Unsupported("permuting anything but channels to the end and back")
    return b.map(input)


def _flatten(b: Builder, input: Any, start_dim: int = 0, end_dim: int = -1) -> int:
    if b.has_rows(input):
        return b.rows(input)
    if (start_dim, end_dim % 4) != (1, 3):
        raise Unsupported("flattening anything but channels, height and width")
    return b.flattened(input)


def _reshape(b: Builder, input: Any, *sizes: Any, shape: Any = None) -> int:
    wanted = shape or (sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes)
    if b.has_rows(input):
        return _unflattened(b, input, wanted)
    flat = b.knows(input) and len(input.shape) == 2
    value = b.any(input) if flat else b.flattened(input)
    to_map = flat and len(wanted) == 4
    result: tuple[int, ...] = b.graph.shapes[value] if to_map else b.graph.flat_shape(value)
    if len(wanted) != len(result) or any(size not in (-1, side) for size, side in zip(wanted, result, strict=True)):
        raise Unsupported(f"reshaping to {tuple(wanted)}")
    return value


def _unflattened(b: Builder, rows: Ref, wanted: Sequence[int]) -> int:
    """Rows of features as maps of (channels, height, width) each, where those are the features of one, or as they are;
    whether that has the shape of the result is asked for each call."""
    value, features = b.rows(rows), rows.shape[-1]
    items = math.prod(rows.shape[:-1])
    known = -math.prod(wanted) if -1 in wanted else 1
    sides = [items * features // max(1, known) if side == -1 else side for side in wanted]
    items_alone = len(rows.shape) == 2 and sides[0] == items
    if items_alone and len(sides) == 4 and sides[3] != features and math.prod(sides[1:]) == features:
        return b.node("unflatten", [value], (items, sides[1], sides[2], sides[3]))
    return value


def _unsqueeze(b: Builder, input: Any, dim: int) -> int:
    """A pixel for each plane."""
    axes = len(input.shape)
    if axes not in (2, 3) or dim not in (-1, axes) or not b.knows(input) or (axes == 3 and input.shape[2] != 1):
        raise Unsupported("new axes anywhere but behind the channels")
    if axes == 2 and b.has_rows(input):
        return _unflattened(b, input, (input.shape[0], input.shape[1], 1, 1))
    return b.any(input)


def _squeeze(b: Builder, input: Any, dim: Any = None) -> int:
    if not b.knows(input) or b.has_rows(input) or b.graph.shapes[b.any(input)][2:] != (1, 1):
        raise Unsupported("dropping axes of anything but maps of one pixel")
    return b.any(input)


def _repeat_interleave(
    b: Builder, input: Any, repeats: Any, dim: int | None = None, *, output_size: int | None = None
) -> int:
    """Each item of a map with the channels behind so many times: they lie below each other in one picture."""
    value = b.rows(input)
    n, channels, height, width = b.graph.shapes[value]
    if not b.has_features_last(input) or dim != 0 or input.shape[0] != n or not isinstance(repeats, int):
        raise Unsupported("repeating anything but items of a map with the channels behind")
    rows = Taps(tuple(range(height)) * repeats)
    shape = (n, channels, height * repeats, width)
    return b.node("resample", [value], shape, rows=rows, columns=Taps(tuple(range(width))))


def _expand_as(b: Builder, input: Any, other: Any) -> int:
    n, c, height, width = b.shape(other)
    if b.shape(input) != (n, c, 1, 1):
        raise Unsupported("expanding anything but one pixel")
    rows, columns = Taps((0,) * height), Taps((0,) * width)
    return b.node("resample", [b.map(input)], (n, c, height, width), rows=rows, columns=columns)


def _linear_layer(b: Builder, input: Any, weight: Any, bias: Any = None) -> int:
    _check_linear(b, input, weight)
    return _on_features(b, b.rows(input), dataclasses.replace(weight, shape=(*weight.shape, 1, 1)), bias)


def _matmul(b: Builder, input: Any, other: Any) -> int:
    """A linear layer whose weight is (inputs, outputs): a transposed convolution."""
    if not b.is_parameter(other) or len(other.shape) != 2:
        raise Unsupported("a product with something else than a parameter of two axes")
    _check_linear(b, input, other)
    value = b.rows(input)
    weight = b.weight(dataclasses.replace(other, shape=(*other.shape, 1, 1)))
    return _of_features(
        b, "conv_transpose", value, other.shape[1], weight=weight, **_window((1, 1), 1, 1), pad=(0, 0), groups=1
    )


def _addmm(b: Builder, input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> int:
    outputs = mat2.shape[1:]
    if (beta, alpha) != (1, 1) or not b.is_parameter(input) or input.shape not in (outputs, (1, *outputs)):
        raise Unsupported("a sum with something else than a parameter for each output, or factors")
    return b.like("shift", _matmul(b, mat1, mat2), beta=b.weight(dataclasses.replace(input, shape=outputs)))


def _check_linear(b: Builder, input: Any, weight: Ref) -> None:
    """Refuse linear layers that torch does as fast, and those that are too large."""
    pruned, kept = b.mostly_pruned(weight), b.kept(weight)
    if not (pruned or b.knows(input)):
        raise Unsupported(f"a linear layer with {kept} of {math.prod(weight.shape)} weights: torch is as fast")
    if kept > (_LARGEST_LINEAR if pruned else _LARGEST_DENSE_LINEAR):
        raise Unsupported(f"a linear layer with {kept} weights: too large")


def _on_features(b: Builder, value: int, weight: Ref, bias: Ref | None = None, groups: int = 1) -> int:
    """A convolution of one pixel, on a map or on rows of features."""
    attributes: dict[str, Any] = {"weight": b.weight(weight), "bias": b.weight(bias), "padding_mode": "zeros"}
    attributes |= {"stride": 1, "pad": (0, 0), "dilation": 1, "groups": groups}
    return _of_features(b, "conv", value, weight.shape[0], **attributes)


def _of_features(b: Builder, kind: str, value: int, outputs: int, **attributes: Any) -> int:
    """An operator that makes so many features for each pixel of a map, or row."""
    if value in b.graph.rows:
        return b.node_of_rows(kind, [value], (b.graph.flat_shape(value)[0], outputs), **attributes)
    n, _, height, width = b.graph.shapes[value]
    return b.node(kind, [value], (n, outputs, height, width), **attributes)


def _interpolate(
    b: Builder,
    input: Any,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> int:
    n, c, *sides = b.shape(input)
    if mode not in ("nearest", "bilinear") or antialias:
        raise Unsupported(f"mode {mode}, antialias {antialias}")
    factors: tuple[float | None, float | None] = (None, None)
    if size is not None:
        out = pair(size)
    else:
        down, across = pair(scale_factor)
        out = int(sides[0] * down), int(sides[1] * across)
        factors = (None, None) if recompute_scale_factor else (float(down), float(across))
    shape = (n, c, *out)
    doubles = out == (2 * sides[0], 2 * sides[1]) and factors in ((None, None), (2.0, 2.0))
    if doubles and not align_corners:
        return b.node("upsample2", [b.map(input)], shape, bilinear=mode == "bilinear")
    taps = _nearest_taps if mode == "nearest" else (_corner_taps if align_corners else _bilinear_taps)
    rows, columns = (taps(side, wanted, factor) for side, wanted, factor in zip(sides, out, factors, strict=True))
    return b.node("resample", [b.map(input)], shape, rows=rows, columns=columns)


def _pixel_shuffle(b: Builder, input: Any, upscale_factor: int) -> int:
    n, c, height, width = b.shape(input)
    r = upscale_factor
    return b.node("pixel_shuffle", [b.map(input)], (n, c // r**2, r * height, r * width), factor=r)


def _pixel_unshuffle(b: Builder, input: Any, downscale_factor: int) -> int:
    n, c, height, width = b.shape(input)
    r = downscale_factor
    return b.node("pixel_unshuffle", [b.map(input)], (n, r**2 * c, height // r, width // r), factor=r)


# Positions are computed in float32 and with the short cuts that torch takes, or pixels would differ now and then.
# Source: aten/src/ATen/native/UpSample.h in PyTorch.
def _nearest_taps(side: int, wanted: int, factor: float | None) -> Taps:
    if wanted in (side, 2 * side):
        return Taps(tuple(i * side // wanted for i in range(wanted)))
    at = torch.arange(wanted, dtype=torch.float32) * _step(side, wanted, factor)
    return Taps(tuple(at.int().clamp(max=side - 1).tolist()))


def _bilinear_taps(side: int, wanted: int, factor: float | None) -> Taps:
    if wanted == side:
        return Taps(tuple(range(side)))
    at = (torch.arange(wanted, dtype=torch.float32) + 0.5) * _step(side, wanted, factor) - 0.5
    return _between(at.clamp(min=0), side)


def _corner_taps(side: int, wanted: int, factor: float | None) -> Taps:
    step = torch.tensor(float(side - 1)) / (wanted - 1) if wanted > 1 else torch.tensor(0.0)
    return _between(torch.arange(wanted, dtype=torch.float32) * step, side)


def _step(side: int, wanted: int, factor: float | None) -> Tensor:
    return torch.tensor(float(side)) / wanted if factor is None else torch.tensor(1.0 / factor)


def _between(positions: Tensor, side: int) -> Taps:
    first = positions.int().clamp(max=side - 1)
    weight = (positions - first).clamp(0, 1)
    return Taps(tuple(first.tolist()), tuple((first + 1).clamp(max=side - 1).tolist()), tuple(weight.tolist()))


def _pad(b: Builder, input: Any, pad: Any, mode: str = "constant", value: float | None = None) -> int:
    if not any(pad):
        return b.any(input)
    behind = b.is_map_behind(input) and tuple(pad[:2]) == (0, 0)
    whole = b.rows(input) if behind else b.map(input)
    pad = pad[2:] if behind else pad
    n, c, height, width = b.graph.shapes[whole]
    before_after = [*pad, *[0] * (4 - len(pad))]
    if len(before_after) > 4 or (mode == "constant" and value):
        raise Unsupported("padding of channels, or with a constant other than 0")
    left, right, top, bottom = before_after
    if mode != "constant" and min(before_after) < 0:
        raise Unsupported("negative padding")
    rows, columns = _padded(height, top, bottom, mode), _padded(width, left, right, mode)
    shape = (n, c, len(rows), len(columns))
    amount = (top, left) if (top, left) == (bottom, right) else None
    names = {"constant": "zeros"}
    attributes = {"rows": Taps(tuple(rows)), "columns": Taps(tuple(columns))}
    return b.node("resample", [whole], shape, **attributes, pads=amount, padding_mode=names.get(mode, mode))


def _padded(side: int, before: int, after: int, mode: str) -> list[int]:
    """The source of each position of a padded axis; -1 is zero."""
    positions = range(-before, side + after)
    if mode == "constant":
        return [i if 0 <= i < side else -1 for i in positions]
    if mode == "reflect":
        return [-i if i < 0 else i if i < side else 2 * (side - 1) - i for i in positions]
    if mode == "replicate":
        return [min(max(i, 0), side - 1) for i in positions]
    return [i % side for i in positions]


def _getitem(b: Builder, input: Any, index: Any) -> int:
    entries = list(index) if isinstance(index, tuple) else [index]
    if isinstance(input, Ref) and len(input.shape) == 2 and entries in ([_ALL, _ALL, None, None], [..., None, None]):
        return _unsqueeze(b, input, -1)
    behind = b.is_map_behind(input)
    whole = b.rows(input) if behind else b.map(input)
    shape = b.graph.shapes[whole]
    if Ellipsis in entries:
        at = entries.index(Ellipsis)
        entries[at : at + 1] = [slice(None)] * (5 - len(entries))
    entries += [slice(None)] * (4 - len(entries))
    if len(entries) != 4 or not all(isinstance(entry, slice) for entry in entries):
        raise Unsupported("indexing by anything but slices")
    if behind:
        entries = [entries[0], entries[3], *entries[1:3]]
    batch, channels, rows, columns = (range(*entry.indices(side)) for entry, side in zip(entries, shape, strict=True))
    if len(batch) != shape[0]:
        raise Unsupported("slices of the batch")
    value = whole
    if len(channels) != shape[1]:
        value = _channels(b, value, channels)
    if (len(rows), len(columns)) == shape[2:] and rows.step == columns.step == 1:
        return value
    cropped = (shape[0], len(channels), len(rows), len(columns))
    return b.node("resample", [value], cropped, rows=Taps(tuple(rows)), columns=Taps(tuple(columns)))


def _linear(b: Builder, first: Any, second: Any, first_scale: float, second_scale: float) -> int:
    """first_scale * first + second_scale * second, either of them a map or a number."""
    if not isinstance(first, Ref):
        first, second, first_scale, second_scale = second, first, second_scale, first_scale
    if isinstance(second, (int, float)):
        return b.each("combine", first, a_scale=first_scale, b_scale=0.0, shift=second_scale * second)
    both = (first, second)
    b.beside(first, second)
    b.beside(second, first)
    shifted = _shifted(b, *both) if first_scale == second_scale == 1 else None
    if shifted is not None:
        return shifted
    planes = _numbers_of_items(b, *both) if first_scale == second_scale == 1 else None
    if planes is not None:
        return b.like("offset", *planes)
    last = any(b.has_features_last(tensor) for tensor in both)
    rows = not last and (len(first.shape) != 4 or any(b.has_rows(tensor) for tensor in both))
    values = [b.rows(tensor) for tensor in both] if rows else _maps(b, *both)
    if first.shape == second.shape:
        return b.like("combine", *values, a_scale=first_scale, b_scale=second_scale, shift=0.0)
    scaled = [
        value if scale == 1 else b.like("combine", value, a_scale=scale, b_scale=0.0, shift=0.0)
        for value, scale in zip(values, (first_scale, second_scale), strict=True)
    ]
    if rows:
        raise Unsupported(f"the sum of shapes {first.shape} and {second.shape} (broadcasting)")
    _check_spread(b, "sum", both)
    whole, numbers = _spread(b, "sum", scaled)
    return b.node("offset", [whole, numbers], b.graph.shapes[whole])


def _add(b: Builder, input: Any, other: Any, *, alpha: float = 1) -> int:
    return _linear(b, input, other, 1.0, float(alpha))


def _sub(b: Builder, input: Any, other: Any, *, alpha: float = 1) -> int:
    return _linear(b, input, other, 1.0, -float(alpha))


def _rsub(b: Builder, input: Any, other: Any, *, alpha: float = 1) -> int:
    return _linear(b, other, input, 1.0, -float(alpha))


def _mul(b: Builder, input: Any, other: Any) -> int:
    tensor, factor = (input, other) if isinstance(input, Ref) else (other, input)
    if isinstance(factor, (int, float)):
        return b.each("combine", tensor, a_scale=float(factor), b_scale=0.0, shift=0.0)
    if not (b.makes(tensor) or b.makes(factor)):  # a weight and its mask are maps to look at
        raise Unsupported("the product of two tensors that are not computed in lanes")
    scaled = _scaled(b, tensor, factor)
    if scaled is not None:
        return scaled
    planes = _numbers_of_items(b, tensor, factor)
    if planes is not None:
        return b.like("scale", *planes)
    rows, last = (all(map(has, (tensor, factor))) for has in (b.has_rows, b.has_features_last))
    if (rows or last) and tensor.shape == factor.shape:
        return b.like("multiply", b.rows(tensor), b.rows(factor))
    values = _maps(b, tensor, factor)
    _check_spread(b, "product", (tensor, factor))
    shapes = [b.graph.shapes[value] for value in values]
    if shapes[0] == shapes[1]:
        return b.node("multiply", values, shapes[0])
    whole, numbers = _spread(b, "product", values)
    return b.node("scale", [whole, numbers], b.graph.shapes[whole])


def _scaled(b: Builder, one: Any, other: Any) -> int | None:
    """The product with a parameter that has a number for each feature, or one; None if it is no such product."""
    tensor, factor = (one, other) if b.makes(one) else (other, one)
    if _is_one_number(b, tensor, factor):
        return b.like("gain", b.any(tensor), gamma=b.weight(factor))
    count = _features_of(b, tensor, factor)
    if count is None:
        return None
    return _on_features(b, b.any(tensor), dataclasses.replace(factor, shape=(count, 1, 1, 1)), groups=count)


def _shifted(b: Builder, one: Any, other: Any) -> int | None:
    """The sum with such a parameter; None if it is no such sum."""
    tensor, shift = (one, other) if b.makes(one) else (other, one)
    count = 1 if _is_one_number(b, tensor, shift) else _features_of(b, tensor, shift)
    if count is None:
        return None
    return b.like("shift", b.any(tensor), beta=b.weight(dataclasses.replace(shift, shape=(count,))))


def _is_one_number(b: Builder, tensor: Any, number: Any) -> bool:
    """Whether a parameter is one number for all of a tensor of this segment."""
    known = b.makes(tensor) and b.is_parameter(number)
    return known and math.prod(number.shape) == 1 and len(number.shape) <= len(tensor.shape)


def _square(b: Builder, input: Any) -> int:
    if not b.makes(input):
        raise Unsupported("the square of a tensor that is not computed in lanes")
    value = b.any(input)
    return b.like("multiply", value, value)


def _pow(b: Builder, input: Any, exponent: Any) -> int:
    if not isinstance(exponent, (int, float)) or exponent != 2:
        raise Unsupported("a power other than 2")
    return _square(b, input)


def _features_of(b: Builder, tensor: Any, numbers: Any) -> int | None:
    """The number of channels of a tensor of this segment, if a parameter has one number for each."""
    if not b.makes(tensor) or not b.is_parameter(numbers):
        return None
    count = b.graph.shapes[b.any(tensor)][1]
    behind = b.has_features_last(tensor) or b.has_rows(tensor)
    if not behind and len(tensor.shape) != 4:  # a map without one of its axes, or both: torch aligns the last ones
        return None
    axes = [1] * (len(numbers.shape) - 1)
    wanted = (*axes, count) if behind else (*axes[2:], count, 1, 1)
    fits = numbers.shape == wanted and 0 < len(numbers.shape) <= len(tensor.shape)
    return count if fits else None


def _div(b: Builder, input: Any, other: Any, *, rounding_mode: str | None = None) -> int:
    if not isinstance(input, Ref) or not isinstance(other, (int, float)) or rounding_mode or other == 0:
        raise Unsupported("division by a tensor")
    return b.each("combine", input, a_scale=1.0 / other, b_scale=0.0, shift=0.0)


def _neg(b: Builder, input: Any) -> int:
    return b.each("combine", input, a_scale=-1.0, b_scale=0.0, shift=0.0)


def _check_epsilon(epsilon: float) -> None:
    """Norms of single pixels take those beside the picture, too, which are zeros."""
    if epsilon <= 0:
        raise Unsupported(f"a norm of pixels with epsilon {epsilon}")


def _attention(b: Builder, query: Any, key: Any, value: Any, heads: Heads, factors: Any, *biases: Any) -> int:
    if not any(b.makes(tensor) for tensor in (query, key, value)):
        raise Unsupported("none of its operands comes from lanes")
    operands = query, key, value
    values = [b.map(each) if is_map else b.rows(each) for each, is_map in zip(operands, heads.maps, strict=False)]
    widths = [b.graph.shapes[value][1] for value in values]
    if any(heads.repeats(which, width) for which, width in enumerate(widths)):  # gradients are added side by side
        raise Unsupported("heads of an operand share features")
    for one, other in itertools.combinations(range(3), 2):
        if values[one] == values[other] and heads.overlap(one, other, widths[one]):
            raise Unsupported("heads of different operands share features")
    pixels = [b.pixels(tensor, rows) for tensor, rows in zip(operands, heads.pixels, strict=False)]
    if heads.across:
        _check_whole_pictures(b, heads, values, pixels)
    # The result lies as queries do, which are the layer's input; repeated ones lie as nothing else does. What channels
    # see of each other has the pixels of the values.
    repeated = heads.queries == heads.keys and b.is_repeated(values[0])
    like = 2 if heads.across else 1 if repeated else 0
    order = heads.order_of_result(pixels[like])
    moved = order is not None and not torch.equal(order, torch.arange(len(order)))
    n, _, height, width = b.graph.shapes[values[like]]
    fits = (heads.shape[0], *heads.shape[2:]) == (n, height, width) and not moved and values[like] not in b.graph.rows
    if order is None or (heads.maps[3] and not fits):
        raise Unsupported(f"a result of shape {heads.shape}")
    b.order = order if moved else None
    pixels.append(order[heads.pixels[3].long()].int())
    heads = dataclasses.replace(heads, pixels=tuple(pixels))
    attributes = {"heads": heads, "factors": b.weight(factors), "biases": [b.weight(bias) for bias in biases]}
    kind = "channel_attention" if heads.across else "attention"
    if values[like] in b.graph.rows:
        return b.node_of_rows(kind, values, (len(order), heads.shape[-1]), **attributes)
    channels = heads.shape[1 if heads.maps[3] else -1]
    return b.node(kind, values, (n, channels, height, width), **attributes)


def _check_whole_pictures(b: Builder, heads: Heads, values: Sequence[int], pixels: Sequence[Tensor]) -> None:
    """Refuse attention across channels whose problems are not all pixels of a picture each."""
    forms = {(value in b.graph.rows, b.graph.shapes[value][0], *b.graph.shapes[value][2:]) for value in values}
    n, _, height, width = b.graph.shapes[values[0]]
    pictures = torch.arange(n * height * width).view(n, -1)
    problems = [rows.long().sort(1).values for rows in pixels[::2]]
    whole = len(forms) == 1 and heads.queries == height * width and torch.equal(pixels[0], pixels[1])
    if not whole or not all(torch.equal(rows, pictures[rows[:, 0] // (height * width)]) for rows in problems):
        raise Unsupported("attention of channels over something else than pictures")
    if len(heads.channels[0]) * heads.features * heads.queries != math.prod(heads.shape):
        raise Unsupported("attention of channels, some of which see nothing")


def _response(b: Builder, x: Any, epsilon: float, features_last: bool) -> int:
    _check_epsilon(epsilon)
    if features_last != b.has_features_last(x):
        raise Unsupported("sizes over other axes than height and width")
    (value,) = _maps(b, x)
    return b.node("response", [value], (*b.graph.shapes[value][:2], 1, 1), epsilon=epsilon)


def _pixel_norm(b: Builder, x: Any, epsilon: float, axis: int) -> int:
    _check_epsilon(epsilon)
    return b.like("pixel_norm", b.along(x, axis), epsilon=epsilon)


def _channel_norm(b: Builder, x: Any, epsilon: float, axis: int, centred: bool) -> int:
    _check_epsilon(epsilon)
    return b.like("layer_norm", b.along(x, axis), gamma=None, beta=None, epsilon=epsilon, centred=centred)


def _spellings(handler: Handler, *functions: Any) -> dict[Any, Handler]:
    return dict.fromkeys(functions, handler)


_ALL = slice(None)

# Functions of handlers that do to each row of features the same.
_ROW_BY_ROW_HANDLERS = (
    _linear_layer, _matmul, _addmm, _layer_norm, _rms_norm, _pixel_norm, _channel_norm, _leaky_relu, _gelu, _gelu_tanh,
    _hardtanh, _dropout, _same_value, _chunk, _split, _glu, _add, _sub, _rsub, _mul, _div, _neg, _pad, _prelu, _square,
    _pow, _amax, _largest_channel,
)  # fmt: skip

HANDLERS: dict[Any, Handler] = {
    **_spellings(_conv2d, torch.conv2d, F.conv2d),
    **_spellings(_conv_transpose2d, torch.conv_transpose2d, F.conv_transpose2d),
    **_spellings(_batch_norm, F.batch_norm),
    **_spellings(_group_norm, F.group_norm, torch.group_norm),
    **_spellings(_instance_norm, F.instance_norm, torch.instance_norm),
    **_spellings(_layer_norm, F.layer_norm, torch.layer_norm),
    **_spellings(_rms_norm, F.rms_norm, torch.rms_norm),
    **_spellings(_activation("relu"), F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_),
    **_spellings(_leaky_relu, F.leaky_relu, F.leaky_relu_),
    **_spellings(_activation("sigmoid"), F.sigmoid, torch.sigmoid, Tensor.sigmoid, torch.sigmoid_, Tensor.sigmoid_),
    **_spellings(_activation("tanh"), F.tanh, torch.tanh, Tensor.tanh, torch.tanh_, Tensor.tanh_),
    **_spellings(_activation("silu"), F.silu),
    **_spellings(_activation("relu6"), F.relu6),
    **_spellings(_activation("hardsigmoid"), F.hardsigmoid),
    **_spellings(_activation("hardswish"), F.hardswish),
    **_spellings(_gelu, F.gelu),
    **_spellings(_gelu_tanh, gelu_tanh),
    **_spellings(_prelu, F.prelu, torch.prelu, Tensor.prelu),
    **_spellings(_hardtanh, F.hardtanh, F.hardtanh_),
    **_spellings(_dropout, F.dropout, F.dropout2d),
    **_spellings(_same_value, torch.clone, Tensor.clone, Tensor.contiguous),
    **_spellings(_cat, torch.cat, torch.concat, torch.concatenate),
    **_spellings(_chunk, torch.chunk, Tensor.chunk),
    **_spellings(_split, torch.split, Tensor.split),
    **_spellings(_glu, F.glu),
    **_spellings(_channel_shuffle, torch.channel_shuffle, F.channel_shuffle),
    **_spellings(_avg_pool2d, F.avg_pool2d),
    **_spellings(_max_pool2d, F.max_pool2d, torch.max_pool2d),
    **_spellings(_adaptive_avg_pool2d, F.adaptive_avg_pool2d),
    **_spellings(_mean, torch.mean, Tensor.mean),
    **_spellings(_amax, torch.amax, Tensor.amax),
    **_spellings(_largest_channel, largest_channel),
    **_spellings(_permute, *PERMUTE),
    **_spellings(_flatten, torch.flatten, Tensor.flatten),
    **_spellings(_reshape, torch.reshape, Tensor.reshape, Tensor.view),
    **_spellings(_squeeze, torch.squeeze, Tensor.squeeze),
    **_spellings(_unsqueeze, torch.unsqueeze, Tensor.unsqueeze),
    **_spellings(_expand_as, Tensor.expand_as),
    **_spellings(_repeat_interleave, torch.repeat_interleave, Tensor.repeat_interleave),
    **_spellings(_linear_layer, F.linear, torch._C._nn.linear),
    **_spellings(_matmul, *PRODUCT),
    **_spellings(_addmm, *ADDMM),
    **_spellings(_interpolate, F.interpolate, F.upsample),
    **_spellings(_pixel_shuffle, torch.pixel_shuffle, F.pixel_shuffle),
    **_spellings(_pixel_unshuffle, torch.pixel_unshuffle, F.pixel_unshuffle),
    **_spellings(_pad, F.pad, torch._C._nn.pad),
    **_spellings(_getitem, Tensor.__getitem__),
    **_spellings(_add, torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__),
    **_spellings(_sub, torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__, torch.subtract),
    **_spellings(_rsub, torch.rsub, Tensor.__rsub__),
    **_spellings(_mul, *MULTIPLY_TOO),
    **_spellings(_square, torch.square, Tensor.square),
    **_spellings(_pow, torch.pow, Tensor.pow, Tensor.__pow__),
    **_spellings(_div, torch.div, Tensor.div, Tensor.div_, Tensor.__truediv__, Tensor.__itruediv__),
    **_spellings(_attention, attention),
    **_spellings(_response, response),
    **_spellings(_pixel_norm, pixel_norm),
    **_spellings(_channel_norm, channel_norm),
    **_spellings(_neg, torch.neg, Tensor.neg, Tensor.__neg__),
}

ROW_BY_ROW = {
    function
    for function, handler in HANDLERS.items()
    if handler in _ROW_BY_ROW_HANDLERS or handler.__qualname__.startswith("_activation.")
}
