"""Networks operator by operator, as a GPU runs them: torch's calls as recorded, pruned convolutions by our kernels.

A recording becomes a list of calls in which each convolution with a pruned weight is a `PrunedConv`. Nothing here asks
for a GPU: the same calls run on CPU tensors, which is how they are tested without one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from lipfast.engine.capture import Call, Recording, Ref
from lipfast.engine.lower import Lowered
from lipfast.ops import pruned_conv
from lipfast.ops.pruned_conv import Pattern, PrunedForm

_CONVOLUTIONS = (torch.conv2d, F.conv2d)
_PADS = (F.pad, torch._C._nn.pad)
_MODES = {"constant": "zeros", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def lower_to_operators(
    recording: Recording,
    masks: Mapping[str, Tensor],
    device: torch.device,
    *,
    precision: str | None = None,
) -> Lowered:
    """The recording with its pruned convolutions, and the padding before them, replaced.

    Args:
        recording: its pruned weights are leaves, given packed when it runs.
        masks: leaf name -> bool tensor of the dense weight's shape, True where a weight is kept.
        device: where it will run.
        precision: what factors of pruned convolutions may be rounded to: "ieee", "tf32" or "bf16"; None is "tf32" where
            ``torch.backends.cudnn.allow_tf32`` lets torch's own convolutions do so, else "ieee".
    """
    patterns: dict[str, Pattern] = {}
    readers = _readers(recording)
    makers = {call.result.number: call for call in recording.calls if isinstance(call.result, Ref)}
    items: list[Any] = []
    fused: set[int] = set()
    for call in recording.calls:
        name = _pruned_weight(call, recording, masks)
        form = _form(call) if name is not None else None
        if name is None or form is None:
            items.append(call)
            continue
        source, form, pad = _with_padding(call, form, makers)
        if pad is not None:
            readers[pad.result.number] -= 1
            fused |= {id(pad)} if readers[pad.result.number] == 0 else set()
        if name not in patterns:
            patterns[name] = Pattern.of(masks[name], device)
        items.append(PrunedConv(call, source, name, form, patterns[name], device, precision))
    return Lowered(recording, [item for item in items if id(item) not in fused], [])


class PrunedConv:
    """A recorded convolution with a pruned weight.

    Attributes:
        inputs: the tensors it reads beside its weight.
        form, pattern: see `lipfast.ops.pruned_conv`.
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
        self.form, self.pattern = form, pattern
        self._source, self._name, self._result = source, name, call.result
        arguments = _arguments(*call.args, **call.kwargs)
        self._bias: Ref | None = arguments["bias"]
        self.inputs = [source] if self._bias is None else [source, self._bias]
        self._device, self._precision = device, precision
        self._chosen: dict[str, dict[str, str]] = {}

    def run(self, known: dict[int, Any], tensors: Mapping[str, Tensor]) -> None:
        """Compute the result into ``known``; ``tensors`` holds the weight's kept values."""
        x, values = known[self._source.number], tensors[self._name]
        bias = None if self._bias is None else known[self._bias.number]
        if x.dtype == values.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type):
            kernels, precision = self.kernels(self.precision), self.precision
            y = pruned_conv.pruned_conv2d(x, values, bias, self.pattern, self.form, kernels, precision=precision)
        else:  # torch's rules for types hold
            y = pruned_conv.dense_pruned_conv2d(x, values, bias, self.pattern, self.form)
        known[self._result.number] = y

    @property
    def precision(self) -> str:
        """What factors may be rounded to, at present."""
        return self._precision or ("tf32" if torch.backends.cudnn.allow_tf32 else "ieee")

    def kernels(self, precision: str) -> dict[str, str]:
        """What runs each direction; see `lipfast.ops.pruned_conv.choose_kernels`."""
        if precision not in self._chosen:
            self._chosen[precision] = pruned_conv.choose_kernels(
                self.pattern, self.form, torch.Size(self._result.shape), device=self._device, precision=precision
            )
        return self._chosen[precision]


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
    results = [leaf for leaf in pytree.tree_leaves(recording.result) if isinstance(leaf, Ref)]
    for ref in [*results, *(ref for call in recording.calls for ref in call.refs())]:
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
    stride, dilation = _pair(a["stride"]), _pair(a["dilation"])
    padding = (0, 0) if a["padding"] == "valid" else _pair(a["padding"])
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


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    return (pair[0], pair[-1])
