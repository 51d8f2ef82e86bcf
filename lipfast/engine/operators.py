"""Networks operator by operator, as a GPU runs them: torch's calls as recorded, but for what our kernels do better.

A recording becomes a list of calls in which each convolution with a pruned weight is a `PrunedConv` and, where the
device has kernels for them, each BatchNorm with its activation a `Normalisation` and each bilinear enlargement an
`Enlargement`. Nothing here asks for a GPU: the same calls run on CPU tensors, which is how they are tested without one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lipfast.engine.capture import Call, Recording, Ref, pair, refs_in
from lipfast.engine.lower import Lowered
from lipfast.errors import BackendError
from lipfast.ops import _dispatch, pruned_conv
from lipfast.ops.batch_norm import batch_norm_activate
from lipfast.ops.masked import normalise_activate
from lipfast.ops.pruned_conv import Pattern, PrunedForm
from lipfast.ops.upsample import upsample_bilinear

_CONVOLUTIONS = (torch.conv2d, F.conv2d)
_PADS = (F.pad, torch._C._nn.pad)
_SLOPES = {F.leaky_relu: None, F.relu: 0.0, torch.relu: 0.0}  # of the negative side; None: as called
_MODES = {"constant": "zeros", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def lower_to_operators(
    recording: Recording,
    masks: Mapping[str, Tensor],
    device: torch.device,
    *,
    precision: str | None = None,
) -> Lowered:
    """The recording with its pruned convolutions, the padding before them, and its normalisations replaced.

    Args:
        recording: its pruned weights are leaves, given packed when it runs.
        masks: leaf name -> bool tensor of the dense weight's shape, True where a weight is kept.
        device: where it will run.
        precision: what factors of pruned convolutions may be rounded to: "ieee", "tf32" or "bf16"; None is "tf32" where
            ``torch.backends.cudnn.allow_tf32`` lets torch's own convolutions do so, else "ieee".
    """
    lowering = _Lowering(recording, masks, device, precision)
    items = [lowering.item(call) for call in recording.calls]
    return Lowered(recording, [item for item in items if id(item) not in lowering.taken_in], [])


class _Lowering:
    """Turns calls into what runs them, in order.

    Attributes:
        taken_in: ids of the calls that run as a part of another.
    """

    def __init__(
        self, recording: Recording, masks: Mapping[str, Tensor], device: torch.device, precision: str | None
    ) -> None:
        self.taken_in: set[int] = set()
        self._recording, self._masks, self._device, self._precision = recording, masks, device, precision
        self._readers = _readers(recording)
        self._makers = {call.result.number: call for call in recording.calls if isinstance(call.result, Ref)}
        self._activations = {call.refs()[0].number: call for call in recording.calls if call.function in _SLOPES}
        self._patterns: dict[str, Pattern] = {}
        self._convolutions: dict[int, PrunedConv] = {}  # by the tensor that they make

    def item(self, call: Call) -> Any:
        """The call itself where torch does it best."""
        if call.function in _CONVOLUTIONS:
            return self._convolution(call) or call
        if call.function is F.batch_norm:
            return self._normalisation(call) or call
        if call.function is F.interpolate:
            return _enlargement(call, self._device) or call
        return call

    def _convolution(self, call: Call) -> "PrunedConv | None":
        name, form = _pruned_weight(call, self._recording, self._masks), _form(call)
        if name is None or form is None:
            return None
        source, form, pad = _with_padding(call, form, self._makers)
        if pad is not None:
            self._readers[pad.result.number] -= 1
            self.taken_in |= {id(pad)} if self._readers[pad.result.number] == 0 else set()
        if name not in self._patterns:
            self._patterns[name] = Pattern.of(self._masks[name], self._device)
        conv = PrunedConv(call, source, name, form, self._patterns[name], self._device, self._precision)
        self._convolutions[conv.result.number] = conv
        return conv

    def _normalisation(self, call: Call) -> "Normalisation | None":
        arguments = _norm_arguments(*call.args, **call.kwargs)
        source = arguments["input"].number
        if arguments["training"] and source in self._convolutions and self._readers[source] == 1:
            self._convolutions[source].bias_cancels = True
        if not _can_normalise(arguments, self._device):
            return None
        activation = self._activations.get(call.result.number) if self._readers.get(call.result.number) == 1 else None
        if activation is not None:
            self.taken_in.add(id(activation))
        return Normalisation(call, activation)


class PrunedConv:
    """A recorded convolution with a pruned weight.

    Attributes:
        name: of its weight.
        inputs: the tensors it reads beside its weight.
        result: the tensor it makes.
        form, pattern, bias_cancels: see `lipfast.ops.pruned_conv`.
    """

    def __init__(
        self,
        call: Call,
        source: Ref,
        name: str,
        form: PrunedForm,
        pattern: Pattern,
        device: torch.device,
        precision: str | None,
    ) -> None:
        self.grad = call.grad
        self.name, self.form, self.pattern = name, form, pattern
        self.result: Ref = call.result
        self.bias_cancels = False
        self._source = source
        arguments = _arguments(*call.args, **call.kwargs)
        self._bias: Ref | None = arguments["bias"]
        self.inputs = [source] if self._bias is None else [source, self._bias]
        self._device, self._precision = device, precision
        self._chosen: dict[str, dict[str, str]] = {}

    def run(self, known: dict[int, Any], tensors: Mapping[str, Tensor]) -> None:
        """Compute the result into ``known``; ``tensors`` holds the weight's kept values.

        Where it holds the dense weight as well, under `dense_name`, that is not made again.
        """
        x, values = known[self._source.number], tensors[self.name]
        bias = None if self._bias is None else known[self._bias.number]
        if x.dtype == values.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type):
            y = pruned_conv.pruned_conv2d(
                x,
                values,
                bias,
                self.pattern,
                self.form,
                self.kernels(self.precision),
                precision=self.precision,
                dense=tensors.get(dense_name(self.name)),
                bias_cancels=self.bias_cancels,
            )
        else:  # torch's rules for types hold
            y = pruned_conv.dense_pruned_conv2d(x, values, bias, self.pattern, self.form)
        known[self.result.number] = y

    @property
    def precision(self) -> str:
        """What factors may be rounded to, at present."""
        return self._precision or ("tf32" if torch.backends.cudnn.allow_tf32 else "ieee")

    def kernels(self, precision: str) -> dict[str, str]:
        """What runs each direction; see `lipfast.ops.pruned_conv.choose_kernels`."""
        if precision not in self._chosen:
            self._chosen[precision] = pruned_conv.choose_kernels(
                self.pattern, self.form, torch.Size(self.result.shape), device=self._device, precision=precision
            )
        return self._chosen[precision]


def dense_name(weight: str) -> str:
    """Where calls look for the dense form of a weight beside its kept values."""
    return f"{weight} (dense)"


class Normalisation:
    """A recorded BatchNorm and the activation behind it, in one kernel each way.

    Attributes:
        inputs: the tensors it reads.
    """

    def __init__(self, call: Call, activation: Call | None) -> None:
        self.grad = call.grad
        self._slope = 1.0 if activation is None else _slope(activation)
        self._arguments = _norm_arguments(*call.args, **call.kwargs)
        self._result: Ref = (activation or call).result
        self.inputs = call.refs()

    def run(self, known: dict[int, Any], tensors: Mapping[str, Tensor]) -> None:
        """Compute the result into ``known``."""
        given = {name: known[v.number] if isinstance(v, Ref) else v for name, v in self._arguments.items()}
        x, mean, variance, weight, bias, training, momentum, eps = given.values()
        if x.dtype != torch.float32 or not x.is_contiguous() or torch.is_autocast_enabled(x.device.type):
            y = F.leaky_relu(F.batch_norm(x, mean, variance, weight, bias, training, momentum, eps), self._slope)
        elif training:
            y = batch_norm_activate(x, mean, variance, weight, bias, momentum, eps, self._slope)
        else:
            y = normalise_activate(x, mean, variance, weight, bias, eps, self._slope)
        known[self._result.number] = y


def _can_normalise(arguments: Mapping[str, Any], device: torch.device) -> bool:
    """Whether a kernel does a BatchNorm of maps."""
    a = arguments
    pairs = [a["running_mean"], a["running_var"]], [a["weight"], a["bias"]]
    given = [all(isinstance(part, Ref) for part in both) for both in pairs]
    whole = all(g or (a["training"] and both == [None, None]) for g, both in zip(given, pairs, strict=True))
    maps = isinstance(a["input"], Ref) and len(a["input"].shape) == 4 and a["momentum"] is not None
    return whole and maps and _has_kernel("batch_norm_activate", device)


def _has_kernel(op: str, device: torch.device) -> bool:
    try:
        return _dispatch.pick(op, device)[0] != "reference"
    except BackendError:  # LIPFAST_BACKEND names one without it
        return False


def _norm_arguments(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> dict[str, Any]:
    """``F.batch_norm``'s arguments by name, however they were given."""
    return locals()


class Enlargement:
    """A recorded bilinear upsampling.

    Attributes:
        inputs: the map it reads.
    """

    def __init__(self, call: Call, align_corners: bool, scales: list[float] | None) -> None:
        self.grad = call.grad
        self.inputs = call.refs()
        self._result: Ref = call.result
        self._align_corners, self._scales = align_corners, scales

    def run(self, known: dict[int, Any], tensors: Mapping[str, Tensor]) -> None:
        """Compute the result into ``known``."""
        x, size = known[self.inputs[0].number], self._result.shape[2:]
        known[self._result.number] = upsample_bilinear(x, size, align_corners=self._align_corners, scales=self._scales)


def _enlargement(call: Call, device: torch.device) -> Enlargement | None:
    """What runs an upsampling; None leaves it to torch."""
    source, scales, mode, align_corners = _interpolate_arguments(*call.args, **call.kwargs)
    larger = [after >= before for before, after in zip(source.shape[2:], call.result.shape[2:], strict=True)]
    if mode != "bilinear" or not all(larger) or not _has_kernel("upsample_bilinear", device):
        return None
    return Enlargement(call, bool(align_corners), scales)


def _interpolate_arguments(
    input: Any,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> tuple[Ref, list[float] | None, str, bool | None]:
    """``F.interpolate``'s map, scales (of rows, columns) where they place pixels, mode, and whether corners align."""
    placing = scale_factor is not None and not recompute_scale_factor
    return input, list(pair(scale_factor)) if placing else None, "antialiased" if antialias else mode, align_corners


def _slope(activation: Call) -> float:
    fixed = _SLOPES[activation.function]
    return _leaky_arguments(*activation.args, **activation.kwargs) if fixed is None else fixed


def _leaky_arguments(input: Any, negative_slope: float = 0.01, inplace: bool = False) -> float:
    return negative_slope


def _arguments(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> dict[str, Any]:
    """``torch.conv2d``'s arguments by name, however they were given."""
    return locals()


def _readers(recording: Recording) -> dict[int, int]:
    """Tensor number -> how often it is read; the module's result counts."""
    found: dict[int, int] = {}
    for ref in [*refs_in(recording.result), *(ref for call in recording.calls for ref in call.refs())]:
        found[ref.number] = found.get(ref.number, 0) + 1
    return found


def _pruned_weight(call: Call, recording: Recording, masks: Mapping[str, Tensor]) -> str | None:
    """The name of the pruned leaf that a convolution reads as its weight."""
    if call.function not in _CONVOLUTIONS:
        return None
    weight = _arguments(*call.args, **call.kwargs)["weight"]
    name = recording.leaves.get(weight.number) if isinstance(weight, Ref) else None
    return name if name in masks else None


def _form(call: Call) -> PrunedForm | None:
    """What a call convolves like; None for what stays a call of torch's."""
    a = _arguments(*call.args, **call.kwargs)
    if isinstance(a["padding"], str) and a["padding"] != "valid":
        return None
    stride, dilation = pair(a["stride"]), pair(a["dilation"])
    padding = (0, 0) if a["padding"] == "valid" else pair(a["padding"])
    if dilation[0] != dilation[1] or not isinstance(a["input"], Ref) or len(a["input"].shape) != 4:
        return None
    return PrunedForm(stride, padding, "zeros", dilation[0], a["groups"])


def _with_padding(call: Call, form: PrunedForm, makers: Mapping[int, Call]) -> tuple[Ref, PrunedForm, Call | None]:
    """The convolution's source and form with a padding call before it taken in, and that call, if there is one."""
    source: Ref = _arguments(*call.args, **call.kwargs)["input"]
    pad = makers.get(source.number)
    if pad is None or pad.function not in _PADS or form.padding != (0, 0):
        return source, form, None
    widths, mode, value = _pad_arguments(*pad.args, **pad.kwargs)
    even = len(widths) == 4 and widths[0] == widths[1] == widths[2] == widths[3] >= 0
    if not even or mode not in _MODES or (mode == "constant" and value):
        return source, form, None
    inner: Ref = pad.refs()[0]
    joined = PrunedForm(form.stride, (widths[0], widths[0]), _MODES[mode], form.dilation, form.groups)
    return inner, joined, pad


def _pad_arguments(
    input: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> tuple[Sequence[int], str, float | None]:
    return pad, mode, value
