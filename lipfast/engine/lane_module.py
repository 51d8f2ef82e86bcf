"""`accelerate`: an ordinary module, pruned or not, as one that runs in lanes."""

import copy
import dataclasses
import types
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, prune
from torch.utils import _pytree as pytree

from lipfast.engine.assigned import assign, shares_memory
from lipfast.engine.builder import Segment
from lipfast.engine.capture import (
    Assigned,
    Call,
    Recording,
    Ref,
    assigns,
    autocast,
    call_with,
    equal,
    record,
    refs_in,
    run_call,
    same_as_before,
    snapshot,
)
from lipfast.engine.heads import ADD, ADDMM, DIVIDE, MULTIPLY, PRODUCT
from lipfast.engine.lower import Lowered, lower
from lipfast.engine.operators import dense_name, lower_to_operators
from lipfast.engine.plan import Options, Weight
from lipfast.engine.products import drop_products, exchange_weights, masks_in_graph, read_in_lanes
from lipfast.engine.runtime import Arrays, Running, hooked_module, layer_weights, pack, unpack, weights_of
from lipfast.engine.survey import Survey, called, hooked, state_of
from lipfast.engine.watch import Derived, Watch
from lipfast.errors import InputError
from lipfast.locks import lock
from lipfast.ops._autograd import has_tangent
from lipfast.ops._once import differentiable_once
from lipfast.ops.masked import PRECISIONS

# A weight with fewer zeros than this, and no mask, is taken to be dense.
FEWEST_ZEROS = 0.05
# Input sizes and modes whose programs are kept.
PLANS_KEPT = 8
CPU = torch.device("cpu")
# Layers whose weights may hold zeros, by name where they are none of torch's.
_WEIGHTS_OF = {(nn.Conv2d, nn.ConvTranspose2d, nn.Linear): "weight", (nn.MultiheadAttention,): "in_proj_weight"}
_OTHERS_WITH_WEIGHTS = {("transformers.pytorch_utils", "Conv1D"): "weight"}
# Functions whose results share no memory with their weights,
_LAYERS = (
    *(torch.conv1d, torch.conv2d, torch.conv3d, F.linear, torch._C._nn.linear),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    *(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu),
    *(*PRODUCT, *ADDMM),
)
# and others whose results share none with any operand.
_MAKE_NEW = (
    *_LAYERS,
    *(*ADD, *MULTIPLY, *DIVIDE, torch.sub, Tensor.sub, Tensor.__sub__),
    *(torch.bmm, Tensor.bmm, F.scaled_dot_product_attention),
)


def accelerate(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    *,
    exact: bool = False,
    precision: str | None = None,
) -> "LaneModule":
    """A copy of ``model`` that computes the same with sparse and fused kernels; ``model`` itself is not changed.

    What is pruned comes from ``masks``, from the hooks of ``torch.nn.utils.prune``, from parametrizations whose result
    holds zeros, and from zeros in the weights of ``Conv2d``, ``ConvTranspose2d``, ``Linear``, ``MultiheadAttention``
    and transformers' ``Conv1D`` (at least 5 %, not all). Pruned parameters hold only their kept values, in row-major
    order, so optimisers and ``.grad`` see only those; ``state_dict`` and ``load_state_dict`` keep the dense names and
    shapes.
    Where forward multiplies a weight by zeros and ones in a buffer, kernels skip what that drops, and the parameter
    stays dense.

    Args:
        model: any module in float32. On the CPU it runs in lanes; operators that the engine does not know run in torch,
            and a warning names them once. On a GPU it runs operator by operator, each pruned convolution in the kernel
            that the rule of docs/gpu.md names. It may be moved between devices afterwards.
        masks: parameter name -> bool tensor of its shape, True where the weight is kept.
        exact: never Winograd, whose rounding error is a few times that of a direct sum; on a GPU precision "ieee".
        precision: what a GPU may round the factors of pruned convolutions to, "ieee", "tf32" or "bf16"; None lets
            ``torch.backends.cudnn.allow_tf32`` decide between the first two.

    Raises:
        InputError: a mask that fits no parameter, hooks on inner modules (they would not run), an unknown precision.
    """
    return LaneModule(model, masks, exact=exact, precision=precision)


class LaneModule(nn.Module):
    """What `accelerate` returns. Called like the original; ``to_dense()`` gives an ordinary module back."""

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor] | None = None,
        *,
        exact: bool = False,
        precision: str | None = None,
    ) -> None:
        super().__init__()
        if precision not in (None, *PRECISIONS):
            raise InputError(f"accelerate: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        _refuse_accelerated(model)
        source = _copy(model)
        found = {**_strip_pruning(source), **_given(source, masks or {})}
        _refuse_hooks(source)
        for name in _zeroed(source):
            found.setdefault(name, source.get_parameter(name).detach() != 0)
        self._other_names = _tied(source, found)
        found = {name: mask.cpu() for name, mask in found.items()}  # wherever the module may be moved
        self._strides = {name: source.get_parameter(name).stride() for name in found}
        for name, mask in found.items():
            parameter = source.get_parameter(name)
            _replace(source, name, pack(parameter, mask.to(parameter.device)))
        # The same dicts: parameters keep their names, and the source's code finds what optimisers change.
        self._parameters, self._buffers, self._modules = source._parameters, source._buffers, source._modules
        self._non_persistent_buffers_set = source._non_persistent_buffers_set
        self._state_dict_hooks = OrderedDict({-1: _make_dense, **source._state_dict_hooks})
        for hooks in "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks":
            setattr(self, hooks, getattr(source, hooks))
        self.training = source.training
        self._masks: dict[str, Tensor] = found
        self._exact = exact
        self._precision = "ieee" if exact else precision
        self._names = [name for name, _ in self.named_parameters()]
        self._warned: set[str] = set()
        self._forget_plans()
        self._hidden = (source,)  # in a tuple, so that it is not a child; last, as from here on attributes are its own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's result."""
        if getattr(torch.compiler, "is_exporting", bool)():  # since torch 2.7
            raise _unseen("torch.export")
        if torch.compiler.is_compiling():  # a module around this one; no decorator: it loads the compiler, in seconds
            return torch.compiler.disable(self._forward)(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self._forward(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        _refuse_transforms(args, kwargs)
        if not kwargs and all(isinstance(arg, Tensor) for arg in args):  # as nearly always; a tree takes its time
            compiled, tensors = self._compiled_for(args, None)
            return compiled.run(args, tensors)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        compiled, tensors = self._compiled_for(leaves, structure)
        return compiled.run([leaf for leaf in leaves if isinstance(leaf, Tensor)], tensors)

    def to_dense(self) -> nn.Module:
        """The ordinary module with the current weights, pruned ones exactly 0; it shares no memory with this one."""
        self._source().training = self.training
        dense = _copy(self._source())
        for name, mask in self._masks.items():
            _replace(dense, name, _scatter(dense.get_parameter(name).detach(), mask))
        return dense

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> which of its weights live, for the pruned parameters."""
        return {name: mask.clone() for name, mask in self._masks.items()}

    def __getattr__(self, name: str) -> Any:
        """Also the original's attributes; its methods would compute with packed weights."""
        try:
            return super().__getattr__(name)
        except AttributeError as missing:
            source = self.__dict__.get("_hidden", (None,))[0]
            if not hasattr(source, name) or isinstance(getattr(source, name), types.MethodType):
                raise AttributeError(
                    f"{missing}; only the call of a module is accelerated, to_dense() has all"
                ) from None
            return getattr(source, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """All but our own are the original's: its code may read them."""
        own = self.__dict__
        if name not in own and "_hidden" in own:
            setattr(own["_hidden"][0], name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """Likewise."""
        if name not in self.__dict__ and name in self._source().__dict__:
            delattr(self._source(), name)
        else:
            super().__delattr__(name)

    def _save_to_state_dict(self, *args: Any) -> None:
        self._source()._save_to_state_dict(*args)  # with its extra state

    def _all_masks(self) -> dict[str, Tensor]:
        """By every name of a parameter; one that several modules share has several."""
        return self._masks | {other: self._masks[name] for other, name in self._other_names.items()}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, mask in self._all_masks().items():
            given = state_dict.get(prefix + name)
            if given is None or given.shape == self.get_parameter(name).shape:
                continue
            if given.shape != mask.shape:
                raise InputError(f"load_state_dict: {name} must be {tuple(mask.shape)}, got {tuple(given.shape)}")
            if bool((given[~mask] != 0).any()):
                raise InputError(
                    f"load_state_dict: {name} has weights where this module is pruned; accelerate() their model"
                )
            state_dict[prefix + name] = given[mask]
        self._source()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        """Without programs: copies and pickles plan their own."""
        kept = ("_compiled", "_lane_survey", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget_plans()

    def _source(self) -> nn.Module:
        """The module whose code is recorded; its parameters are this module's."""
        return self._hidden[0]

    def _forget_plans(self) -> None:
        own: dict[str, Any] = {"_compiled": OrderedDict(), "_lane_survey": None, "_lock": lock()}
        self.__dict__.update(own)  # whatever the original calls so is another matter

    def _surveyed(self) -> Survey:
        """The module as it is now."""
        known: Survey | None = self.__dict__["_lane_survey"]
        if known is None or not known.holds():
            known = self.__dict__["_lane_survey"] = Survey(self._source())
        return known

    def _compiled_for(self, leaves: Sequence[Any], structure: Any) -> "tuple[Compiled, dict[str, Tensor]]":
        """What runs such a call, and the tensors to run it with."""
        if self._source().training != self.training:
            self._source().training = self.training
        given = tuple(_form(leaf) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves)
        with self._lock:  # while another thread records, parameters are exchanged for stand-ins
            survey = self._surveyed()
            tensors = survey.tensors
            modes = (torch.is_grad_enabled(), autocast(), survey.modes)
            key = (given, _repeated(leaves), str(structure), modes, survey.forms(tensors))
            try:
                known = self._compiled.get(key)
            except TypeError as failure:
                raise InputError(f"accelerate: an argument is neither a tensor nor hashable: {failure}") from failure
            if known is None or not known.is_of(survey) or not known.multiplied.holds(tensors):
                known = self._compiled[key] = self._compile(leaves, structure)
                known.states = [state_of(module, snapshot(module)) for module in survey.modules]
                if len(self._compiled) > PLANS_KEPT:
                    self._say(f"more than {PLANS_KEPT} input sizes and modes: those used longest ago are planned anew")
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(key)
            return known, tensors if torch.is_grad_enabled() else known.multiplied.packed(tensors)

    def _compile(self, leaves: Sequence[Any], structure: Any) -> "Compiled":
        """``structure``: the tree that the leaves are of; None: they are the arguments."""
        if [name for name, _ in self.named_parameters()] != self._names:
            raise InputError("accelerate: the module's parameters changed; call accelerate() after pruning, not before")
        tensors = self._surveyed().tensors
        for name, mask in self._masks.items():
            if tensors[name].shape != (int(mask.count_nonzero()),):
                raise InputError(f"accelerate: parameter {name!r} was replaced; call accelerate() on the new model")
        device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), CPU)
        recording = self._record(leaves, structure, device)
        if not runs_in_lanes(device):
            lowered = lower_to_operators(recording, self._masks, device, precision=self._precision)
            self._warn(lowered)
            return Compiled(lowered, self._masks, self._exact, device=device)
        masks, sources, products = masks_in_graph(recording, tensors, self._masks)
        lowered = lower(recording, self._masks | masks)
        exchange_weights((item for item in lowered.items if isinstance(item, Call)), products)
        masks = read_in_lanes(lowered, masks)
        drop_products(lowered, products.values())
        self._warn(lowered)
        compiled = Compiled(lowered, self._masks | masks, self._exact, packed=self._masks, device=device)
        read_dense = {recording.leaves[number] for number in compiled.leaves_read}
        in_lanes = {name: mask for name, mask in masks.items() if name not in read_dense}
        compiled.multiplied = Multiplied(in_lanes, sorted(set(sources.values())), tensors)
        return compiled

    def _record(self, leaves: Sequence[Any], structure: Any, device: torch.device) -> Recording:
        """The code of a call with these leaves. What it keeps in attributes for the next one is there afterwards."""
        assigned: list[Assigned] = []
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        dense = self._dense_stand_ins()

        def call(stand_ins: dict[str, Tensor], *tensors: Tensor, found: list[Assigned] | None = None) -> Any:
            remaining = iter(tensors)
            filled = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = (tuple(filled), {}) if structure is None else pytree.tree_unflatten(filled, structure)
            return call_with(self._source(), stand_ins, args, kwargs, found)

        def first(*tensors: Any) -> Any:
            result = call(*tensors, found=assigned)
            return result, [one.value for one in assigned]

        recording = record(first, inputs, dense)
        recording.result, values = recording.result
        if not assigned:
            return recording
        found = [dataclasses.replace(one, value=value) for one, value in zip(assigned, values, strict=True)]

        def run(calls: Sequence[Call], wanted: set[int]) -> Mapping[int, Any]:
            tensors, numbers = self._surveyed().tensors, {ref.number for made in calls for ref in made.refs()}
            known: dict[int, Any] = dict(recording.constants)
            known.update((ref.number, tensor) for ref, tensor in zip(recording.inputs, inputs, strict=True))
            own = {number: name for number, name in recording.leaves.items() if number in numbers}
            known.update((number, _dense(name, tensors, self._masks)) for number, name in own.items())
            for made in calls:
                with torch.set_grad_enabled(torch.is_grad_enabled() if made.grad is None else made.grad):
                    run_call(made, known, device)
            unpacked = [known[number] for number, name in own.items() if name in self._masks]
            if any(shares_memory(known[number], unpacked) for number in wanted):
                raise assigns(found)  # a view of a parameter, whose dense form is a copy
            return known

        return assign(self._source(), found, recording, lambda: record(call, inputs, dense), run)

    def _dense_stand_ins(self) -> dict[str, Tensor]:
        """Parameters and buffers; the pruned ones as tensors without memory, of the form that they had."""
        tensors = self._surveyed().tensors
        for name, mask in self._masks.items():
            packed = tensors[name]
            dense = torch.empty_strided(mask.shape, self._strides[name], dtype=packed.dtype, device="meta")
            tensors[name] = nn.Parameter(dense, requires_grad=packed.requires_grad)
        return tensors

    def _warn(self, lowered: Lowered) -> None:
        for reason in lowered.refused:
            self._say(f"{reason}; it runs in torch, and maps are converted to torch's layout and back around it")

    def _say(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"lipfast: {reason}", stacklevel=6)


def runs_in_lanes(device: torch.device) -> bool:
    """Whether networks on a device run in lanes; on others they run operator by operator."""
    return device.type == "cpu"


class Multiplied:
    """Weights that forward multiplies by masks, which are not packed: parameters stay as the module has them.

    Args:
        masks: parameter -> which of its weights live, for those that only segments read.
        sources: the buffers that say which live.
        tensors: all of them, by name.
    """

    def __init__(self, masks: Mapping[str, Tensor], sources: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        self._masks, self._sources = masks, sources
        self._watch = Watch([tensors[name] for name in self._sources])
        self._packed = Derived(self._pack)

    def holds(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the masks are what they were."""
        return not self._sources or self._watch.unchanged([tensors[name] for name in self._sources])

    def packed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, those weights as their kept values, which are the same tensors while nothing was written."""
        return tensors | self._packed.of([tensors[name] for name in self._masks]) if self._masks else tensors

    def _pack(self, weights: Sequence[Tensor]) -> dict[str, Tensor]:
        return {name: pack(weight, mask) for (name, mask), weight in zip(self._masks.items(), weights, strict=True)}


class Compiled:
    """One recording with the programs of its segments.

    Args:
        lowered: what to run.
        masks: leaf name -> which of its weights live.
        exact: never Winograd.
        packed: the masks of those leaves that are given as their kept values, not as dense tensors; None: all.
        device: where calls that make tensors of their own put them.
        reads: parameters' numbers in each call, instead of asking torch for writes.
    """

    def __init__(
        self,
        lowered: Lowered,
        masks: Mapping[str, Tensor],
        exact: bool,
        packed: Mapping[str, Tensor] | None = None,
        device: torch.device = CPU,
        reads: bool = False,
    ) -> None:
        packed = masks if packed is None else packed
        self.multiplied = Multiplied({}, [], {})
        self.states: list[list[Any]] = []  # of the modules, as they were recorded
        self._survey: Survey | None = None  # that they were compared with last,
        self._copied: tuple[list[Any], list[Any]] = [], []  # and what of them is equal there, but not the same
        self._device = device
        self._recording = lowered.recording
        self._given_packed = packed
        self._items = [
            SegmentRunner(item, lowered.recording, masks, exact, packed, reads) if isinstance(item, Segment) else item
            for item in lowered.items
        ]
        self._order = _Order(self._items, lowered.recording)
        self.leaves_read = self._order.leaves
        self._kept = _ComputedOnce(lowered, self._items, packed, reads)
        self._order_beside_kept = _Order(self._kept.rest, lowered.recording)
        self._read_dense = [name for name in self._order_beside_kept.read_by_layers() if name in packed]
        self._unpacked = Derived(self._unpack, reads=reads)
        self._counters = _by_amount(lowered.recording.counted)

    def is_of(self, survey: Survey) -> bool:
        """Whether the modules' attributes are what they were when they were recorded."""
        if self._survey is not survey:
            if not equal(self.states, survey.states):
                return False
            pairs = zip(chain.from_iterable(self.states), chain.from_iterable(survey.states), strict=True)
            copied = [(known, found) for known, found in pairs if known is not found]
            self._survey, self._copied = survey, ([known for known, _ in copied], [found for _, found in copied])
        return equal(*self._copied)

    def run(self, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Any:
        """The module's result for these inputs and these parameters and buffers.

        ``tensors`` may hold pruned leaves dense as well, under `lipfast.engine.operators.dense_name`.
        """
        known: dict[int, Any] = dict(self._recording.constants)
        known.update({ref.number: tensor for ref, tensor in zip(self._recording.inputs, inputs, strict=True)})
        keeps = not torch.is_grad_enabled() and self._device == CPU
        order = self._order_beside_kept if keeps else self._order
        unpacked = self._unpacked_leaves(tensors) if keeps else {}
        if keeps:
            known.update(self._kept.of(tensors))
        for number in order.leaves:
            name = self._recording.leaves[number]
            known[number] = unpacked[name] if name in unpacked else _dense(name, tensors, self._given_packed)
        for item, spent in zip(order.items, order.spent, strict=True):
            if item.grad is None:
                self._run_item(item, known, tensors)
            else:
                with torch.set_grad_enabled(item.grad):
                    self._run_item(item, known, tensors)
            for number in spent:
                del known[number]
        with torch.no_grad():
            for amount, names in self._counters.items():  # on a GPU each call is a launch
                torch._foreach_add_([tensors[name] for name in names], amount)
        result = self._recording.result
        if isinstance(result, Ref):
            return known[result.number]
        return pytree.tree_map(lambda leaf: known[leaf.number] if isinstance(leaf, Ref) else leaf, result)

    def _unpacked_leaves(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The pruned leaves that torch's layers read: the same tensors while nothing was written."""
        return self._unpacked.of([tensors[name] for name in self._read_dense]) if self._read_dense else {}

    def _unpack(self, packed: Sequence[Tensor]) -> dict[str, Tensor]:
        pairs = zip(self._read_dense, packed, strict=True)
        return {name: _scatter(values, self._given_packed[name]) for name, values in pairs}

    def _run_item(self, item: "Call | SegmentRunner", known: dict[int, Any], tensors: Mapping[str, Tensor]) -> None:
        if isinstance(item, Call):
            run_call(item, known, self._device)
        else:
            item.run(known, tensors)


class _Order:
    """Items in the order in which they run.

    Attributes:
        items: as given.
        leaves: those that torch calls read; segments take theirs packed.
        spent: for each item the tensors that nothing reads after it: torch may use their memory again, while it is
            still in the cache.
    """

    def __init__(self, items: "Sequence[Call | SegmentRunner]", recording: Recording) -> None:
        self.items, self._recording = items, recording
        self._results = {ref.number for ref in refs_in(recording.result)}
        read = {ref.number for item in items for ref in _tensors_of(item)} | self._results
        self.leaves = [number for number in recording.leaves if number in read]
        self.spent = self._read_last()

    def read_by_layers(self) -> list[str]:
        """The leaves that only layers read: what the module returns shares no memory with them, so nobody else can
        write to them."""
        others = [item for item in self.items if isinstance(item, Call) and item.function not in _LAYERS]
        shared = {ref.number for call in others for ref in call.refs()} | self._results
        return [self._recording.leaves[number] for number in self.leaves if number not in shared]

    def _read_last(self) -> list[list[int]]:
        last: dict[int, int] = {}
        for position, item in enumerate(self.items):
            last.update(dict.fromkeys((ref.number for ref in _tensors_of(item)), position))
        spent: list[list[int]] = [[] for _ in self.items]
        for number, position in last.items():
            if number not in self._results:
                spent[position].append(number)
        return spent


class _ComputedOnce:
    """What calls make of parameters alone (a standardised weight, a table of positions' biases), kept while those hold
    the same numbers, where nothing but the items at hand can write to it.

    Attributes:
        rest: the items without those calls.
    """

    def __init__(
        self,
        lowered: Lowered,
        items: "Sequence[Call | SegmentRunner]",
        packed: Mapping[str, Tensor],
        reads: bool,
    ) -> None:
        self._leaves, self._packed = lowered.recording.leaves, packed
        first = {id(call) for call in lowered.of_parameters}
        exposed = {ref.number for ref in refs_in(lowered.recording.result)}
        for item in items:
            makes_new = isinstance(item, Call) and item.function in _MAKE_NEW and "out" not in item.kwargs
            if isinstance(item, Call) and id(item) not in first and not makes_new:
                exposed.update(ref.number for ref in item.refs())
        kept: set[int] = set()
        for call in reversed(lowered.of_parameters):  # what is made of an exposed tensor's memory may be that memory
            if call.grad is None and exposed.isdisjoint(ref.number for ref in call.results()):
                kept.add(id(call))
            else:
                exposed.update(ref.number for ref in call.refs())
        self.rest = [item for item in items if id(item) not in kept]
        made = {ref.number for call in lowered.of_parameters if id(call) in kept for ref in call.results()}
        self._wanted = made & {ref.number for item in self.rest for ref in _tensors_of(item)}
        needed = set(self._wanted)
        self._calls: list[Call] = []
        for call in reversed(lowered.of_parameters):
            if not needed.isdisjoint(ref.number for ref in call.results()):
                needed.update(ref.number for ref in call.refs())
                self._calls.insert(0, call)
        self._read = [number for number in self._leaves if number in needed]
        given = pytree.tree_leaves([(call.args, call.kwargs) for call in self._calls])
        self._arrays = [leaf for leaf in given if isinstance(leaf, np.ndarray)]  # who has them may write to them
        self._reads = reads
        self._begin()

    def _begin(self) -> None:
        """Forget what was computed."""
        seen = [array.copy() for array in self._arrays]
        self._computed = Derived(self._compute, reads=self._reads)
        self._seen = seen  # last: another thread finds what is of these numbers, or begins anew

    def of(self, tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """The tensors by their numbers: the same while nothing was written."""
        if not all(map(np.array_equal, self._arrays, self._seen)):
            self._begin()
        return self._computed.of([tensors[self._leaves[number]] for number in self._read]) if self._wanted else {}

    def _compute(self, tensors: Sequence[Tensor]) -> dict[int, Tensor]:
        given = dict(zip((self._leaves[number] for number in self._read), tensors, strict=True))
        known: dict[int, Any] = {n: _dense(self._leaves[n], given, self._packed) for n in self._read}
        for call in self._calls:
            run_call(call, known, CPU)
        return {number: known[number] for number in self._wanted}


def _dense(name: str, tensors: Mapping[str, Tensor], packed: Mapping[str, Tensor]) -> Tensor:
    """A leaf as torch reads it; ``packed``: the masks of those that are given as their kept values."""
    if name not in packed:
        return tensors[name]
    dense = tensors.get(dense_name(name))
    return _scatter(tensors[name], packed[name]) if dense is None else dense


def _tensors_of(item: Any) -> list[Ref]:
    """What an item of a recording reads from the tensors known so far, and what a call adds to them."""
    return [*item.refs(), *item.results()] if isinstance(item, Call) else item.inputs


def _by_amount(counted: Sequence[tuple[str, int]]) -> dict[int, list[str]]:
    """What to add -> the counters it is added to, each of them once."""
    totals: dict[str, int] = {}
    for name, amount in counted:
        totals[name] = totals.get(name, 0) + amount
    return {total: [name for name in totals if totals[name] == total] for total in set(totals.values())}


@dataclasses.dataclass(frozen=True)
class _Use:
    """What a program was built for: which gradients are wanted (none: inference)."""

    inputs: tuple[bool, ...]
    weights: tuple[bool, ...]


class SegmentRunner:
    """A segment and its programs; each forward pass that awaits its backward pass holds one."""

    def __init__(
        self,
        segment: Segment,
        recording: Recording,
        masks: Mapping[str, Tensor],
        exact: bool,
        packed: Mapping[str, Tensor],
        reads: bool = False,
    ) -> None:
        self._reads = reads
        self._segment, self._leaves, self._masks, self._exact = segment, recording.leaves, masks, exact
        self.graph, self.grad = segment.graph, segment.grad
        self._of_layers = layer_weights(segment)
        self._given_packed = packed
        self._kept = {name: mask for name, mask in masks.items() if name not in packed}
        self._as_given = [self._name_of_given(number, ref) for number, ref in enumerate(segment.weights)]
        self._statistics = [recording.leaves[ref.number] for pair in segment.statistics for ref in pair]
        norms = [node for node in segment.graph.nodes if node.kind == "norm"]
        self._changed_statistics = {n.running for n in norms if n.training and n.running is not None}
        self._arrays = Arrays()
        self._free: dict[_Use, list[Running]] = defaultdict(list)  # threads share it: atomic steps only

    def run(self, known: dict[int, Any], tensors: Mapping[str, Tensor]) -> None:
        """Compute the segment's outputs into ``known``."""
        inputs = [known[ref.number] for ref in self._segment.inputs]
        inputs = [tensor if tensor.dtype == torch.float32 else tensor.float() for tensor in inputs]  # of an autocast
        weights = [
            self._weight(number, known, tensors) if name is None else tensors[name]
            for number, name in enumerate(self._as_given)
        ]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in [*inputs, *weights]):
            outputs = _SegmentFunction.apply(self, tensors, len(inputs), *inputs, *weights)  # type: ignore[no-untyped-call]
        else:
            outputs = self._infer(inputs, weights, tensors)
        for ref, output in zip(self._segment.outputs, outputs, strict=True):
            known[ref.number] = output

    def _infer(self, inputs: list[Tensor], weights: list[Tensor], tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs, by a program without a backward pass: its maps share memory."""
        use = _Use((False,) * len(inputs), (False,) * len(weights))
        lease = self.lease(use)
        running = lease.running
        if self._changed_statistics or self._must_load(running, weights, tensors):
            self.load(running, weights, tensors)
        outputs = running.forward(inputs, torch.get_num_threads())
        self.save_statistics(running, tensors)
        return outputs

    def _must_load(self, running: Running, weights: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> bool:
        """Whether numbers were written since they were loaded; from now on they are watched."""
        numbers = [*weights, *(tensors[name] for name in self._statistics)]
        if running.loaded is not None and running.loaded.unchanged(numbers):
            return False
        running.loaded = Watch(numbers, reads=self._reads)  # before they are loaded, so that no write falls in between
        return True

    def _name_of_given(self, number: int, ref: Ref) -> str | None:
        """The leaf whose tensor is a weight just as it is given; None where it is computed."""
        name = self._leaves.get(ref.number)
        return None if name in (self._kept if number in self._of_layers else self._given_packed) else name

    def _weight(self, number: int, known: Mapping[int, Any], tensors: Mapping[str, Tensor]) -> Tensor:
        ref = self._segment.weights[number]
        name = self._leaves.get(ref.number)
        if name is None:
            weight: Tensor = known[ref.number]
            return weight
        if number not in self._of_layers:
            return _dense(name, tensors, self._given_packed)
        return _gather(tensors[name], self._kept[name]) if tensors[name].dim() > 1 else tensors[name]

    @property
    def inputs(self) -> list[Ref]:
        """The tensors it reads beside parameters: its maps, and weights that the recording computes."""
        computed = [ref for ref in self._segment.weights if ref.number not in self._leaves]
        return [*self._segment.inputs, *computed]

    def lease(self, use: _Use) -> "_Lease":
        """A program that nobody else uses."""
        try:
            running = self._free[use].pop()
        except IndexError:
            running = self._build(use)
        return _Lease(running, self, use)

    def give_back(self, running: Running, use: _Use) -> None:
        """The end of a lease."""
        self._free[use].append(running)

    def _build(self, use: _Use) -> Running:
        listed = weights_of(self._segment, self._leaves, self._masks, trained=False)
        backward = any(use.inputs) or any(use.weights)
        weights = [Weight(w.shape, w.mask, trained) for w, trained in zip(listed, use.weights, strict=True)]
        return Running(self._segment, weights, Options(backward, use.inputs, exact=self._exact))

    def load(self, running: Running, weights: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Copy weights and running statistics in."""
        arrays = [self._arrays.of(place, weight) for place, weight in enumerate(weights)]
        arrays += [self._arrays.of(name, tensors[name]) for name in self._statistics]
        running.load(arrays, torch.get_num_threads())

    def save_statistics(self, running: Running, tensors: Mapping[str, Tensor]) -> None:
        """Copy running statistics out, where the segment changes them."""
        for number in self._changed_statistics:
            for view, ref in zip(running.statistics[number], self._segment.statistics[number], strict=True):
                tensors[self._leaves[ref.number]].data.copy_(view)  # as torch does, unseen by its version counter


class _Lease:
    """Holds a program until the last reference goes, which is when autograd drops the forward pass."""

    def __init__(self, running: Running, runner: SegmentRunner, use: _Use) -> None:
        self.running, self._runner, self._use = running, runner, use

    def __del__(self) -> None:
        self._runner.give_back(self.running, self._use)


class _SegmentFunction(torch.autograd.Function):
    """A segment for autograd: one call forward, one backward."""

    @staticmethod
    def forward(ctx: Any, runner: SegmentRunner, tensors: Mapping[str, Tensor], count: int, *operands: Tensor) -> Any:
        needs = ctx.needs_input_grad[3:]
        lease = runner.lease(_Use(tuple(needs[:count]), tuple(needs[count:])))
        threads = torch.get_num_threads()
        runner.load(lease.running, operands[count:], tensors)
        outputs = lease.running.forward(operands[:count], threads)
        runner.save_statistics(lease.running, tensors)
        if any(needs):
            _keep(ctx, lease)
            ctx.graph, ctx.count = runner.graph, count
            ctx.shapes = [operand.shape for operand in operands[count:]]
            ctx.set_materialize_grads(False)
            reached = lease.running.plan.output_gradients
            ctx.mark_non_differentiable(*(y for number, y in enumerate(outputs) if number not in reached))
        return tuple(outputs)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *output_gradients: Tensor | None) -> Any:
        running = _kept(ctx).running
        given = [None if g is None else g.float() for g in output_gradients]
        found = running.backward(given, torch.get_num_threads())
        graph = ctx.graph
        values, weights = graph.behind(y for y, g in zip(graph.outputs, given, strict=True) if g is not None)
        inputs: list[Tensor | None] = [None] * ctx.count
        for number, gradient in zip(running.plan.input_gradients, found, strict=True):
            if graph.inputs[number] in values:
                inputs[number] = gradient
        copied = running.gradients.clone()  # the program's own are overwritten by its next run
        parts = [copied[part].reshape(shape) for part, shape in zip(running.plan.values, ctx.shapes, strict=True)]
        wanted = [need and n in weights for n, need in enumerate(ctx.needs_input_grad[3 + ctx.count :])]
        return (None, None, None, *inputs, *(part if want else None for part, want in zip(parts, wanted, strict=True)))


def _keep(ctx: Any, lease: "_Lease") -> None:
    """Let autograd hold a program as it holds tensors: until the backward pass, or for another with ``retain_graph``.

    Hooks on saved tensors may put others in their place, so there the graph holds the program while it lives.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        ctx.lease = lease
        return
    token = torch.empty(0, device="cpu")
    token.lease = lease  # type: ignore[attr-defined]
    ctx.lease = None
    ctx.save_for_backward(token)


def _kept(ctx: Any) -> "_Lease":
    """What `_keep` kept; torch's error where the graph was gone through before."""
    lease: _Lease = ctx.lease or ctx.saved_tensors[0].lease
    return lease


def _form(tensor: Tensor) -> tuple[Any, ...]:
    """What a recording may depend on of a tensor that it is given."""
    return tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad, tensor.is_contiguous()


def _repeated(leaves: Sequence[Any]) -> Any:
    """Which arguments are the same tensor."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return None if len(tensors) < 2 else tuple(same_as_before(tensors))


def _make_dense(module: LaneModule, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook of state dicts: dense names and shapes, before any hook of the original's."""
    for name, mask in module._all_masks().items():
        state[prefix + name] = _scatter(state[prefix + name], mask)


def _scatter(packed: Tensor, mask: Tensor) -> Tensor:
    """The dense tensor of packed values; differentiable."""
    if packed.device == CPU and packed.dtype == torch.float32:
        dense: Tensor = _Scatter.apply(packed, mask)  # type: ignore[no-untyped-call]
        return dense
    return packed.new_zeros(mask.shape).masked_scatter(mask.to(packed.device), packed)


def _gather(dense: Tensor, mask: Tensor) -> Tensor:
    """The living entries in row-major order; differentiable."""
    if dense.device == CPU and dense.dtype == torch.float32:
        packed: Tensor = _Gather.apply(dense, mask)  # type: ignore[no-untyped-call]
        return packed
    return dense[mask]


class _Scatter(torch.autograd.Function):
    """Packed values to a dense tensor, by a kernel that takes a third of masked_scatter's time."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, mask: Tensor) -> Tensor:
        ctx.mask = mask
        ctx.set_materialize_grads(False)  # what the loss does not reach gets none
        return unpack(packed, mask.shape, mask)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None]:
        return None if gradient is None else _gather(gradient, ctx.mask), None


class _Gather(torch.autograd.Function):
    """The other way, so that derivatives of any order are there."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, mask: Tensor) -> Tensor:
        ctx.mask = mask
        ctx.set_materialize_grads(False)
        return pack(dense, mask)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None]:
        return None if gradient is None else _scatter(gradient, ctx.mask), None


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter another tensor, and so another shape, in all modules that share it."""
    old = module.get_parameter(name)
    new = nn.Parameter(value.clone(), requires_grad=old.requires_grad)
    for owner in module.modules():
        for own, parameter in owner._parameters.items():
            if parameter is old:
                owner._parameters[own] = new


def _tied(model: nn.Module, masks: dict[str, Tensor]) -> dict[str, str]:
    """Leave each mask under the first name of its parameter; the other names -> that one."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    for name in list(masks):
        mask, own = masks.pop(name), names[name]
        if own in masks and not torch.equal(masks[own], mask):
            raise InputError(f"accelerate: {name!r} and {own!r} are one parameter with two masks")
        masks[own] = mask
    return {other: name for other, name in names.items() if name in masks and other != name}


def _strip_pruning(model: nn.Module) -> dict[str, Tensor]:
    """Undo pruning hooks and pruning parametrizations in place; the masks by parameter name."""
    masks = {}
    _refuse_partly_pruned(model)
    for prefix, module in model.named_modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                name = hook._tensor_name
                masks[_join(prefix, name)] = getattr(module, f"{name}_mask").bool()
                prune.remove(module, name)  # type: ignore[no-untyped-call]
    for prefix, module in list(model.named_modules()):
        if parametrize.is_parametrized(module):
            values = {name: getattr(module, name) for name in module.parametrizations}
            alive = {name: value != 0 for name, value in values.items()}
            if all(is_pruned(mask) for mask in alive.values()):  # not weight norm and the like: they stay
                _unparametrize(module, values)
                masks.update({_join(prefix, name): mask for name, mask in alive.items()})
    return masks


def _refuse_partly_pruned(model: nn.Module) -> None:
    """A parameter that several modules share must be pruned by each of them, and alike: it is packed once."""
    masks: dict[int, list[Tensor]] = {}
    uses: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            uses.setdefault(id(parameter), []).append(_join(prefix, name))
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                own = module._parameters[f"{hook._tensor_name}_orig"]
                masks.setdefault(id(own), []).append(getattr(module, f"{hook._tensor_name}_mask"))
    for number, found in masks.items():
        if len(found) != len(uses[number]) or any(not torch.equal(mask, found[0]) for mask in found):
            raise InputError(f"accelerate: {' and '.join(uses[number])} are one parameter, but not pruned alike")


def _unparametrize(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """As ``parametrize.remove_parametrizations``, which would change the class that the original shares."""
    module.__class__ = type(module).__bases__[0]
    del module._modules["parametrizations"]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad))


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy. Pruning hooks leave a computed tensor as an attribute, which torch refuses to copy."""
    known: dict[int, Any] = {}
    for module in model.modules():
        for value in pytree.tree_leaves(vars(module)):
            if isinstance(value, Tensor) and not value.is_leaf:
                known[id(value)] = value.detach().clone()
    return copy.deepcopy(model, known)


def is_pruned(alive: Tensor) -> bool:
    """Whether enough weights are dead, and not all."""
    return 0 < int(alive.count_nonzero()) <= (1 - FEWEST_ZEROS) * alive.numel()


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _zeroed(model: nn.Module) -> Iterator[str]:
    """Weights that hold zeros without saying why. One that is all zeros is an initialisation, not a mask."""
    for prefix, module in model.named_modules():
        own = [name for layers, name in _WEIGHTS_OF.items() if isinstance(module, layers)]
        bases = [(base.__module__, base.__name__) for base in type(module).__mro__]
        own += [_OTHERS_WITH_WEIGHTS[base] for base in bases if base in _OTHERS_WITH_WEIGHTS]
        for name in own:
            weight = module._parameters.get(name)
            if weight is not None and is_pruned(weight.detach() != 0):
                yield _join(prefix, name)


def _given(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    checked = {}
    for name, mask in masks.items():
        if name not in parameters:
            raise InputError(f"accelerate: the model has no parameter {name!r}")
        if mask.dtype != torch.bool or mask.shape != parameters[name].shape:
            raise InputError(
                f"accelerate: the mask of {name!r} must be bool {tuple(parameters[name].shape)}, "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
        checked[name] = mask.view(torch.uint8) != 0  # torch takes any byte but 0 for True
    return checked


def _refuse_hooks(model: nn.Module) -> None:
    name = hooked_module(model)
    if name is not None:
        raise hooked(name)


def _refuse_accelerated(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, LaneModule):
            raise InputError(f"accelerate: {called(name)} is accelerated already; give its to_dense()")


def _refuse_transforms(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse what looks into the module's code: a segment is one function to it."""
    if torch._C._functorch.maybe_current_level() is not None:
        transform = "a function of torch.func"
    elif torch._C._is_tracing():
        transform = "torch.jit.trace"
    elif forward_ad._current_level >= 0 and any(has_tangent(leaf) for leaf in pytree.tree_leaves((args, kwargs))):
        transform = "forward-mode differentiation"
    else:
        return
    raise _unseen(transform)


def _unseen(transform: str) -> InputError:
    return InputError(f"accelerate: {transform} sees no code of an accelerated module; use its to_dense()")
