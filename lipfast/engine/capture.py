"""What a module does, recorded by running it once on tensors without data.

Running beats tracing here: sizes are known, so Python that depends on them (centre crops, loops over scales) just runs,
and every torch function is seen as the user wrote it. Python that depends on the *values* of tensors fails on tensors
without data, and says so.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import gc
import itertools
import math
import threading
import types
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointFunction

from lipfast.engine.attention import self_attention
from lipfast.errors import InputError
from lipfast.locks import lock
from lipfast.ops._padding import MODES, widest


@dataclasses.dataclass(frozen=True)
class Ref:
    """A tensor of the recording, by number."""

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def refs_in(tree: Any) -> list[Ref]:
    """The tensors of the recording in any structure, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Ref)]


@dataclasses.dataclass
class Call:
    """One torch function as it was called; tensors are replaced by `Ref`."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any  # Refs, in whatever structure the function returned
    grad: bool | None = None  # what the module set gradients to, where that is not what its caller had
    spelled: Sequence["Call"] = ()  # the calls that this one was made of, which can do without it

    @property
    def name(self) -> str:
        """The function's name, for messages."""
        return _name_of(self.function)

    def refs(self) -> list[Ref]:
        """The tensors it reads."""
        return refs_in((self.args, self.kwargs))

    def results(self) -> list[Ref]:
        """The tensors it makes."""
        return refs_in(self.result)


@dataclasses.dataclass
class Recording:
    """Straight-line code of one module at one input size.

    Attributes:
        inputs: the tensors given to the module, in order.
        leaves: number -> name of the parameter or buffer it is.
        constants: number -> tensor made outside torch's functions or captured by the module's code.
        calls: what ran, in order.
        result: what the module returned, with `Ref` for tensors.
        counted: buffers the module adds a number to each time it runs (BatchNorm's batch counter), and that number.
        differentiable: numbers of the tensors that require gradients.
    """

    inputs: list[Ref]
    leaves: dict[int, str]
    constants: dict[int, Tensor]
    calls: list[Call]
    result: Any
    counted: list[tuple[str, int]]
    differentiable: Container[int] = ()

    def unused(self) -> Iterator[int]:
        """Numbers that no tensor has, for further ones."""
        refs = [*self.inputs, *(ref for call in self.calls for ref in (*call.refs(), *call.results()))]
        return itertools.count(1 + max([*self.leaves, *self.constants, *(ref.number for ref in refs)], default=0))


def run_call(call: Call, known: dict[int, Any], device: torch.device) -> None:
    """Call the function with the tensors known by their numbers, and add what it makes."""

    def fill(leaf: Any) -> Any:
        if isinstance(leaf, torch.device) and leaf.type == "meta":  # where it was recorded
            return device
        return known[leaf.number] if isinstance(leaf, Ref) else leaf

    def fill_all(value: Any) -> Any:  # walking a tree takes as long as a small operator does
        return pytree.tree_map(fill, value) if isinstance(value, (tuple, list, dict)) else fill(value)

    kwargs = {name: fill_all(value) for name, value in call.kwargs.items()}
    result = call.function(*map(fill_all, call.args), **kwargs)
    if isinstance(call.result, Ref):
        known[call.result.number] = result
        return
    for ref, tensor in zip(pytree.tree_leaves(call.result), pytree.tree_leaves(result), strict=True):
        if isinstance(ref, Ref):
            known[ref.number] = tensor


def record(function: Callable[..., Any], inputs: Sequence[Tensor], leaves: Mapping[str, Tensor]) -> Recording:
    """Run ``function(leaves on the meta device, *inputs on the meta device)`` and record it.

    Args:
        function: takes a dict of the leaves' stand-ins, then the inputs' stand-ins.
        inputs: example tensors; their values do not count. One that is given twice has one stand-in.
        leaves: parameters and buffers by name.

    Raises:
        InputError: the code depends on the values of tensors, changes one through a view, or asks how tensors lie in
            memory where not all that it was given are contiguous.
    """
    given = (*inputs, *leaves.values())
    device = next((tensor.device for tensor in given if tensor.device.type != "meta"), torch.get_default_device())
    recorder = _Recorder(all(tensor.is_contiguous() for tensor in given), device)
    grad = torch.is_grad_enabled()
    # Tensors made in inference mode count no writes; leaving it enables gradients.
    with torch.inference_mode(False), torch.set_grad_enabled(grad), _functions_noted(recorder):
        stand_ins = {name: recorder.leaf(name, tensor) for name, tensor in leaves.items()}
        refs = [recorder.input(*given) for given in zip(inputs, same_as_before(inputs), strict=True)]
        with recorder, torch.device("meta"):
            try:
                result = function(stand_ins, *recorder.input_tensors)
            except InputError:
                raise
            except (NotImplementedError, RuntimeError) as failure:
                raise InputError(
                    f"engine: the module cannot be recorded on tensors of these shapes without numbers: {failure}"
                ) from failure
    recording = Recording(refs, recorder.leaves, recorder.constants, recorder.calls, None, recorder.counted)
    recording.differentiable = recorder.differentiable
    recording.result = pytree.tree_map(recorder.known, result)
    recording.calls = without_unread(recorder.calls, recorder.answered, recording.result)
    _refuse_hidden(recording.result)
    return recording


def same_as_before(tensors: Sequence[Tensor]) -> list[int | None]:
    """For each tensor the place of the first one that is the same object; None: it is the first."""
    first: dict[int, int] = {}
    places = [first.setdefault(id(tensor), place) for place, tensor in enumerate(tensors)]
    return [None if place == seen else seen for place, seen in enumerate(places)]


_PLAIN = (type(None), bool, int, float, complex, str, bytes, Tensor, Ref, torch.dtype, torch.device)
_MOST_LOOKED_AT = 10_000  # objects that a result refers to


def _refuse_hidden(result: Any) -> None:
    """Refuse what a recording cannot look into, where it holds tensors or may make some later."""
    for leaf in pytree.tree_leaves(result):
        if not isinstance(leaf, _PLAIN) and _reaches_stand_in(leaf):
            raise InputError(
                f"engine: the module returns tensors in a {type(leaf).__name__}; use tuples, lists, dicts, or register "
                "it with torch.utils._pytree.register_pytree_node"
            )


def _reaches_stand_in(value: Any) -> bool:
    """Whether an object holds a tensor without data, however deep; one whose code is still to run may."""
    seen: set[int] = set()
    found = [value]
    while found and len(seen) < _MOST_LOOKED_AT:
        one = found.pop()
        if isinstance(one, types.GeneratorType) or (isinstance(one, Tensor) and one.device.type == "meta"):
            return True
        if id(one) in seen or isinstance(one, (type, types.ModuleType, *_PLAIN)):
            continue
        seen.add(id(one))
        found += [one.__closure__] if isinstance(one, types.FunctionType) else gc.get_referents(one)
    return False


# They act on something else than their result.
_UNSEEN = (Tensor.data.__set__, Tensor.register_hook, Tensor.retain_grad)  # type: ignore[attr-defined]
_DIFFERENTIATE = {torch.autograd.grad: "torch.autograd.grad", Tensor.backward: "Tensor.backward"}
_SET_GRADIENTS = (Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
# Stand-ins have other answers than the tensors they stand for.
_UNKNOWN = tuple(getattr(Tensor, name).__get__ for name in ("grad_fn", "grad", "is_leaf"))
_NEEDS_NUMBERS = (
    *(Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.item, Tensor.is_nonzero, torch.is_nonzero),
    *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.__contains__),
    *(Tensor.equal, torch.equal, Tensor.allclose, torch.allclose),
)
_OF_DEVICE: dict[Any, Callable[[torch.device], Any]] = {
    Tensor.device.__get__: lambda device: device,
    Tensor.is_cpu.__get__: lambda device: device.type == "cpu",  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: lambda device: device.type == "cuda",  # type: ignore[attr-defined]
    Tensor.is_meta.__get__: lambda device: False,  # type: ignore[attr-defined]
    Tensor.get_device: lambda device: -1 if device.type == "cpu" else device.index or 0,
}
_ASKS_FOR_GRADIENTS = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_ASKS_FOR_LAYOUT = (Tensor.stride, Tensor.is_contiguous, Tensor.as_strided, torch.as_strided)
_FILL = (Tensor.zero_, Tensor.fill_)
_DETACHES = (torch.detach, Tensor.detach, Tensor.detach_, Tensor.data.__get__)  # type: ignore[attr-defined]


class _Recorder(TorchFunctionMode):
    """Notes each torch function; tensors are known by identity, so they are kept alive.

    Args:
        contiguous: whether all that the module is given is; stand-ins always are.
        device: where what the module is given lies; stand-ins lie nowhere.
    """

    def __init__(self, contiguous: bool, device: torch.device) -> None:
        super().__init__()
        self._contiguous, self._device = contiguous, device
        self._autocast = autocast()
        self._perhaps_one: set[int] = set()  # ids of tensors that may be copies, or copied, or neither
        self.calls: list[Call] = []
        self.leaves: dict[int, str] = {}
        self.constants: dict[int, Tensor] = {}
        self.counted: list[tuple[str, int]] = []
        self.input_tensors: list[Tensor] = []
        self._refs: dict[int, Ref] = {}
        self.differentiable: set[int] = set()  # numbers of tensors that require gradients, whatever stand-ins do
        self._alive: list[Tensor] = []
        self._stand_ins: dict[int, Tensor] = {}  # of tensors that have numbers, by their id
        self._stood_for: dict[int, Tensor] = {}  # and those tensors by their stand-ins' ids
        self._overwritten: dict[int, list[Tensor]] = {}  # id of a tensor -> those through which its memory was written
        self._count = 0
        self._grad: bool | None = None
        self._outside = torch.is_grad_enabled()
        self.answered: set[int] = set()  # ids of calls on whose numbers a question was answered
        self.inside = False  # a function that is noted as one call

    def leaf(self, name: str, tensor: Tensor) -> Tensor:
        stand_in = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        if isinstance(tensor, torch.nn.Parameter):
            stand_in = torch.nn.Parameter(stand_in, requires_grad=tensor.requires_grad)
        self.leaves[self._given(tensor, stand_in).number] = name
        return stand_in

    def input(self, tensor: Tensor, same: int | None) -> Ref:
        """The next input; ``same``: the number of the input that it is again."""
        if same is not None:
            stand_in = self.input_tensors[same]
            self.input_tensors.append(stand_in)
            return self._refs[id(stand_in)]
        stand_in = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        self.input_tensors.append(stand_in)
        return self._given(tensor, stand_in)

    def _given(self, tensor: Tensor, stand_in: Tensor) -> Ref:
        ref = self._new(stand_in)
        if tensor.requires_grad:
            self.differentiable.add(ref.number)
        return ref

    def known(self, value: Any) -> Any:
        """The Ref of a tensor; anything else unchanged."""
        if not isinstance(value, Tensor):
            return value
        if id(value) in self._overwritten:
            raise InputError(
                "engine: the module changes a tensor in place, and then reads another one that shares its memory; "
                "assign to a part of the tensor that it reads"
            )
        if id(value) in self._refs:
            return self._refs[id(value)]
        if value.device.type == "meta":
            raise InputError("engine: the module made a tensor in a way that cannot be recorded")
        ref = self._new(value)
        self.constants[ref.number] = value
        return ref

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        if func is Tensor.detach_:
            return self._detached(args[0])
        if func is Tensor.__setitem__:
            func = assign_
            self._put_back(*args)
        if func in _FILL and self._fill_part(*args, **kwargs):
            return args[0]
        if func == _ASKS_FOR_GRADIENTS and id(args[0]) in self._refs:
            return self._refs[id(args[0])].number in self.differentiable
        if func in _OF_DEVICE and id(args[0]) in self._refs:
            return _OF_DEVICE[func](self._device)
        if func in _NEEDS_NUMBERS:
            answer = self._answer(func, args, kwargs)
            if answer is not None:
                return answer[0]
        if func in _SET_GRADIENTS and not self._requires(args[0], *args[1:], **kwargs):
            raise InputError("engine: the module's forward changes requires_grad of a tensor, which cannot be recorded")
        if func is torch._C._set_grad_enabled:
            self._grad = None if args[0] == self._outside else args[0]
            return func(*args)
        if func is F.multi_head_attention_forward:
            with self:
                attended = self_attention(*args, **kwargs)
            if attended is not None:
                return attended
        return self.note(func, args, kwargs)

    def note(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function on stand-ins and note the call."""
        if autocast() != self._autocast:
            raise InputError("engine: the module's forward changes autocast, which is recorded for a whole call only")
        noted = pytree.tree_map(self.known, (args, kwargs))
        counts = func is Tensor.add_ and not kwargs and self._is_counter(noted[0])
        if not counts:
            self._check_reads(func, noted)
        args, kwargs = pytree.tree_map(self._on_meta, (args, kwargs))
        versions = {id(leaf): leaf._version for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = _stand_in(func, args, kwargs)
        result = _undrawn(func, args, kwargs) if result is None else result
        if not self._contiguous and _changes_layout(func, kwargs):
            given = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            result = result.clone() if result is given else result
            self._perhaps_one |= {id(given), id(result)}
        written = [t for t in self._alive if id(t) in versions and t._version != versions[id(t)]]
        results = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if counts:
            self.counted.append((self.leaves[noted[0][0].number], noted[0][1]))
            return result
        self._check_writes(func, written, results)
        if all(id(leaf) in versions and not written for leaf in results):
            return pytree.tree_map(self._with_numbers, result)  # no tensor, or the very tensor it was given, unchanged
        call = Call(func, noted[0], noted[1], pytree.tree_map(self._written, result), self._grad)
        self._append(call)
        return result

    def _append(self, call: Call) -> None:
        self.calls.append(call)
        if self._differentiates(call):
            self.differentiable |= {ref.number for ref in call.results() if ref.dtype.is_floating_point}

    def _answer(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any] | None:
        """What a function says of numbers that the code makes of none that it is given, a range's or a mask's: it says
        the same in each run. None where there are others."""
        noted_args, noted_kwargs = pytree.tree_map(self.known, (args, kwargs))
        asks = Call(func, noted_args, noted_kwargs, None)
        calls = [*made_by(self.calls, {ref.number for ref in asks.refs()}), asks]
        made = {ref.number for call in calls for ref in call.results()}
        if any(ref.number not in made for call in calls for ref in call.refs()):
            return None
        rounds = self._device.type != "cpu" and any(
            ref.dtype.is_floating_point for call in calls for ref in call.refs()
        )
        if rounds or any(isinstance(call.function, functools.partial) for call in calls):  # code of the user's
            return None
        known: dict[int, Any] = {}
        try:
            with torch.no_grad(), _NothingUnknown():  # type: ignore[no-untyped-call]
                for call in calls[:-1]:
                    run_call(call, known, torch.device("cpu"))
                args, kwargs = pytree.tree_map(
                    lambda leaf: known[leaf.number] if isinstance(leaf, Ref) else leaf, (asks.args, asks.kwargs)
                )
                answer = func(*args, **kwargs)
        except _UnknownNumbersError:
            return None
        self.answered.update(map(id, calls))
        return (answer,)

    def _requires(self, tensor: Tensor, requires_grad: bool = True) -> bool:
        """Whether a tensor requires gradients, or does not, already."""
        required: bool = self.known(tensor).number in self.differentiable
        return required == requires_grad

    def _differentiates(self, call: Call) -> bool:
        given = any(ref.number in self.differentiable for ref in call.refs())
        return given and torch.is_grad_enabled() and call.function not in _DETACHES

    def _is_counter(self, args: tuple[Any, ...]) -> bool:
        target, amount = args[0], args[1]
        whole_number = isinstance(target, Ref) and target.shape == () and not target.dtype.is_floating_point
        return whole_number and target.number in self.leaves and isinstance(amount, int)

    def _check_reads(self, func: Callable[..., Any], noted: Any) -> None:
        """Counters move at the end of a run, and what a function does to anything but its result is not repeated."""
        if func in _UNSEEN:
            raise InputError(f"engine: the module's forward uses {_name_of(func)}, which cannot be recorded")
        if func in _DIFFERENTIATE:
            raise InputError(
                f"engine: the module's forward differentiates ({_DIFFERENTIATE[func]}), which cannot be recorded; "
                "accelerate the module whose derivative it takes"
            )
        if func in _ASKS_FOR_LAYOUT and not self._contiguous:
            raise InputError(
                f"engine: the module's forward asks for {func.__name__} of a tensor, which is recorded for contiguous "
                "inputs, parameters and buffers only"
            )
        if any(isinstance(leaf, slice) and _has_tensors(leaf) for leaf in pytree.tree_leaves(noted)):
            raise InputError("engine: the module's forward slices by the number of a tensor, which cannot be recorded")
        counted = {name for name, _ in self.counted}
        if counted and any(self.leaves.get(ref.number) in counted for ref in refs_in(noted)):
            raise InputError(
                "engine: the module reads a counter that it changed while it runs, as BatchNorm with momentum=None does"
            )
        if func in (*_UNKNOWN, *_NEEDS_NUMBERS) and refs_in(noted):
            what = "the numbers" if func in _NEEDS_NUMBERS else "the history"
            raise InputError(
                f"engine: the module's forward asks for {what} of a tensor ({_name_of(func)}), which cannot be recorded"
            )

    def _written(self, value: Any) -> Any:
        return self._new(value) if isinstance(value, Tensor) else value

    def _check_writes(self, func: Callable[..., Any], written: list[Tensor], results: list[Tensor]) -> None:
        """A tensor written in place and returned gets a new number. That is not enough if it is not returned; and what
        shares its memory has none, and may not be read again."""
        returned = [tensor for tensor in written if any(tensor is result for result in results)]
        memories = {_memory_of(tensor) for tensor in returned}
        if any(_memory_of(tensor) not in memories for tensor in written):
            raise InputError(f"engine: the module writes into a tensor that {_name_of(func)} does not return")
        for tensor in returned:
            sharing = [other for other in self._alive if _memory_of(other) == _memory_of(tensor)]
            if any(id(other) in self._perhaps_one for other in sharing):
                raise InputError(
                    "engine: the module changes a tensor in place that contiguous(), reshape() or a memory format may "
                    "have copied; give it contiguous tensors"
                )
            if any(self._refs[id(other)].number in self.leaves for other in sharing):
                raise InputError("engine: the module changes one of its own parameters or buffers while it runs")
            if any(other is stand_in for other in sharing for stand_in in self._stand_ins.values()):
                raise InputError(
                    "engine: the module writes into a tensor that it keeps as a plain attribute, or made on a device "
                    "that it named"
                )
            for other in sharing:
                if other is not tensor:
                    self._overwritten.setdefault(id(other), []).append(tensor)

    def _detached(self, tensor: Tensor) -> Tensor:
        """``tensor.detach_()``, which leaves its numbers alone: from here on it is another one, detached."""
        self.calls.append(Call(Tensor.detach, (self.known(tensor),), {}, self._new(tensor), self._grad))
        return tensor

    def _fill_part(self, part: Tensor, value: Any = 0) -> bool:
        """``tensor[index].fill_(value)`` as ``tensor[index] = value``, so that the tensor may be read again, and the
        part as one that is taken afterwards. False where ``part`` is none of a tensor."""
        ref = self.known(part)
        taken = next((call for call in self.calls if call.function is Tensor.__getitem__ and call.result == ref), None)
        if taken is None or refs_in(taken.args[1]):
            return False
        index = taken.args[1]
        whole = next((tensor for tensor in self._alive if self._refs[id(tensor)] == taken.args[0]), None)
        if whole is None or _lies(whole[index]) != _lies(part):
            return False
        self.note(assign_, (whole, index, value), {})
        self._overwritten.pop(id(part))
        self._append(Call(Tensor.__getitem__, (self.known(whole), index), {}, self._new(part), self._grad))
        return True

    def _put_back(self, tensor: Tensor, index: Any, value: Any) -> None:
        """``tensor[index] += 1`` writes into a part, and then assigns that to where it lies already: so the tensor may
        be read again."""
        writers = self._overwritten.get(id(tensor), [])
        if writers and all(writer is value for writer in writers) and _lies(tensor[index]) == _lies(value):
            del self._overwritten[id(tensor)]

    def _on_meta(self, value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("meta") if value == self._device else value
        return self._without_numbers(value) if isinstance(value, Tensor) else value

    def _without_numbers(self, tensor: Tensor) -> Tensor:
        """A tensor's stand-in: always the same one, so that writes to parts of it are seen."""
        if tensor.device.type == "meta":
            return tensor
        if id(tensor) not in self._stand_ins:
            stand_in = self._stand_ins[id(tensor)] = tensor.to("meta")
            self._refs[id(stand_in)] = self._refs[id(tensor)]
            self._alive.append(stand_in)
            self._stood_for[id(stand_in)] = tensor
        return self._stand_ins[id(tensor)]

    def _with_numbers(self, value: Any) -> Any:
        return self._stood_for.get(id(value), value)

    def _new(self, tensor: Tensor) -> Ref:
        if id(tensor) not in self._refs:
            self._alive.append(tensor)
        ref = Ref(self._count, tuple(tensor.shape), tensor.dtype)
        self._count += 1
        self._refs[id(tensor)] = ref
        return ref


def made_by(calls: Sequence[Call], wanted: Iterable[int]) -> list[Call]:
    """Those of a recording's calls that these tensors are made by, in order."""
    numbers = set(wanted)
    found: list[Call] = []
    for call in reversed(calls):
        if not numbers.isdisjoint(ref.number for ref in call.results()):
            numbers.update(ref.number for ref in call.refs())
            found.append(call)
    return found[::-1]


def without_unread(calls: list[Call], inner: set[int], result: Any) -> list[Call]:
    """The calls without those of ``inner`` whose results nothing reads any more."""
    read = {ref.number for ref in refs_in(result)}
    kept = []
    for call in reversed(calls):
        if id(call) not in inner or any(ref.number in read for ref in call.results()):
            kept.append(call)
            read.update(ref.number for ref in call.refs())
    return kept[::-1]


class _UnknownNumbersError(Exception):
    """What is computed is not the same in each run."""


class _NothingUnknown(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses random numbers, memory that nobody wrote, and other devices, whose last digits may differ."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        random = torch.Tag.nondeterministic_seeded in func.tags
        if random or any(word in func.__name__ for word in ("empty", "resize", "set_")):
            raise _UnknownNumbersError
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) and leaf.device.type != "cpu" for leaf in pytree.tree_leaves(result)):
            raise _UnknownNumbersError
        return result


def assign_(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """``tensor[index] = value`` as torch's functions in place are: it returns what it writes."""
    tensor[index] = value
    return tensor


def with_part(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """A tensor in which ``tensor[index] = value``, and which is another one."""
    return assign_(tensor.clone(), index, value)


def _lies(tensor: Tensor) -> tuple[Any, ...]:
    """The part of a memory that a tensor is."""
    return _memory_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()


def _memory_of(tensor: Tensor) -> int:
    memory: int = tensor.untyped_storage()._cdata
    return memory


def _name_of(func: Callable[..., Any]) -> str:
    """A function's name for messages, an attribute's for what reads or writes it."""
    described = getattr(func, "__self__", func)
    name = str(getattr(described, "__qualname__", None) or getattr(func, "__name__", func))
    return name.replace("TensorBase", "Tensor")


def autocast() -> tuple[torch.dtype | None, ...]:
    """What torch turns float32 operands to now, on the CPU and on GPUs; None: nothing."""
    kinds = ("cpu", "cuda")
    return tuple(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in kinds)


def _changes_layout(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function copies a tensor or not, as that happens to lie in memory."""
    shaped = func in (Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten)
    return shaped or func is Tensor.contiguous or (func is Tensor.to and "memory_format" in kwargs)


_one_at_a_time = lock(rank=1)


@contextlib.contextmanager
def _functions_noted(recorder: _Recorder) -> Iterator[None]:
    """Let each ``torch.autograd.Function`` of this thread be one call: torch does not show it to function modes, and of
    what it runs inside only the forward pass would be seen."""
    thread = threading.get_ident()

    def noted(cls: Any, *args: Any, **kwargs: Any) -> Any:
        run = original.__get__(None, cls)
        if threading.get_ident() != thread or recorder.inside:
            return run(*args, **kwargs)
        if cls is CheckpointFunction:  # it runs a function with or without keeping what lies inside
            function, _, *inputs = args
            return function(*inputs)
        if any(isinstance(arg, nn.Module) for arg in (*args, *kwargs.values())):
            raise InputError(f"engine: {cls.__name__}.apply is given a module, whose parameters it would not get")
        function = functools.partial(run)
        function.__qualname__ = f"{cls.__name__}.apply"  # type: ignore[attr-defined]
        recorder.inside = True
        try:
            return recorder.note(function, args, kwargs)
        finally:
            recorder.inside = False

    with _one_at_a_time:
        original = torch.autograd.Function.__dict__["apply"]
        torch.autograd.Function.apply = classmethod(noted)  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            torch.autograd.Function.apply = original  # type: ignore[method-assign]


def _has_tensors(part: slice) -> bool:
    return any(isinstance(bound, Tensor) for bound in (part.start, part.stop, part.step))


@dataclasses.dataclass(frozen=True)
class Assigned:
    """An attribute that a module's forward assigned, or changed the entries of."""

    path: str  # of the module
    name: str
    value: Any
    entries: bool  # it is the same object as before
    plain: bool  # no parameter, buffer or module

    def can_be_kept(self) -> bool:
        """Whether it is made of tensors and plain values."""
        leaves = pytree.tree_leaves(self.value)
        known = not self.entries or type(self.value) in (dict, list)
        return self.plain and known and all(isinstance(leaf, (torch.Size, *_PLAIN)) for leaf in leaves)

    def __str__(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name


def assigns(changed: Sequence[Assigned]) -> InputError:
    """What a module's forward assigns cannot be recorded."""
    names = ", ".join(sorted(map(str, changed)))
    return InputError(f"engine: the module's forward assigns {names}; only what it returns can be recorded")


def call_with(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    assigned: list[Assigned] | None = None,
) -> Any:
    """The module's result with other tensors in place of parameters and buffers, given by the first name of each.

    `torch.func.functional_call`, but for two things. A module that stands in two places of another has its tensors
    exchanged once: torch puts the second stand-in back as the original. And what forward assigns to attributes and
    buffers, which would be lost, is refused, or handed out in ``assigned``.
    """
    first = {id(tensor): name for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    own = dict(module.named_modules())
    with left_as_it_was(module):
        for owner in own.values():
            for held in (owner._parameters, owner._buffers):
                for name, tensor in held.items():
                    if tensor is not None and first[id(tensor)] in tensors:
                        held[name] = tensors[first[id(tensor)]]
            if isinstance(owner, nn.RNNBase):  # it reads its parameters from a list, which it makes anew for others
                weights = [getattr(owner, name, None) for name in owner._flat_weights_names]
                owner._flat_weights = weights
                owner._flat_weight_refs = [None if weight is None else weakref.ref(weight) for weight in weights]
        given = {path: (_state(owner), snapshot(owner)) for path, owner in own.items()}
        result = module(*args, **(kwargs or {}))
        changed = [
            _assigned(path, name, owner, given[path][0])
            for path, owner in own.items()
            for name in _changes(owner, *given[path])
        ]
    if changed and (assigned is None or not all(one.can_be_kept() for one in changed)):
        raise assigns(changed)
    if assigned is not None:
        assigned += changed
    return result


def _assigned(path: str, name: str, owner: nn.Module, before: Mapping[str, Any]) -> Assigned:
    """An attribute as it is now."""
    value = _state(owner)[name]
    plain = name in vars(owner) and name not in _OF_EVERY_MODULE
    entries = name in before and value is before[name]
    return Assigned(path, name, pytree.tree_map(lambda leaf: leaf, value) if plain else value, entries, plain)


@contextlib.contextmanager
def left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Restore the attributes of a module and of those in it, and the entries of their dicts, lists and sets."""
    states = [(owner, _state(owner)) for owner in module.modules()]
    entries: list[tuple[Any, Any]] = []
    for owner, _ in states:
        for name, value in vars(owner).items():
            if name not in _OF_EVERY_MODULE:
                _note_entries(value, entries)
    try:
        yield
    finally:
        for owner, state in states:
            _restore(owner, state)
        for held, before in entries:
            if not _same_entries(held, before):
                held.clear()
                held.extend(before) if isinstance(held, list) else held.update(before)


def _same_entries(held: Any, before: Any) -> bool:
    pairs = [zip(held, before, strict=False)]
    pairs += [zip(held.values(), before.values(), strict=False)] if isinstance(held, dict) else []
    return len(held) == len(before) and all(one is other for both in pairs for one, other in both)


def _note_entries(value: Any, found: list[tuple[Any, Any]]) -> None:
    if type(value) in (dict, list, set):
        found.append((value, copy.copy(value)))
    if type(value) in (dict, list, tuple):
        for entry in value.values() if isinstance(value, dict) else value:
            _note_entries(entry, found)


def _state(module: nn.Module) -> dict[str, Any]:
    """What an assignment to an attribute of the module changes."""
    plain = {name: value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")}
    return {**plain, **module._parameters, **module._buffers}


def _changes(module: nn.Module, state: Mapping[str, Any], inside: Mapping[str, Any]) -> Iterator[str]:
    """Attributes that were assigned since, or whose entries were."""
    for name, value in _state(module).items():
        kept = name in state and value is state[name]
        if not kept or (name in inside and not equal([inside[name]], [value])):
            yield name


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def snapshot(module: nn.Module) -> dict[str, Any]:
    """The module's attributes as they are now: those that hold entries are unequal once an entry changed."""
    return {name: value if name in _OF_EVERY_MODULE else _frozen(value) for name, value in vars(module).items()}


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _frozen(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_frozen, value))
    if isinstance(value, (list, set, bytearray)):
        return copy.copy(value)
    if isinstance(value, (types.SimpleNamespace, argparse.Namespace)) or _compares_fields(value):
        frozen = copy.copy(value)
        for name, entry in vars(value).items():
            object.__setattr__(frozen, name, _frozen(entry))
        return frozen
    return value


def _compares_fields(value: Any) -> bool:
    compares = dataclasses.is_dataclass(value) and type(value).__eq__ is not object.__eq__
    return compares and not isinstance(value, type) and hasattr(value, "__dict__")


def equal(known: Any, found: Any) -> bool:
    """Whether attributes are those of before."""
    try:
        return bool(known == found)
    except (RuntimeError, ValueError):  # tensors and arrays that differ
        return False


def _restore(module: nn.Module, state: Mapping[str, Any]) -> None:
    for name in _state(module).keys() - state.keys():
        delattr(module, name)
    for name, value in state.items():
        held = next((held for held in (module._parameters, module._buffers) if name in held), vars(module))
        held[name] = value


def _undrawn(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The function's result. What it draws on a device or from a generator that the code names is left to the run."""
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Generator)]
    generators = [torch.default_generator, *given]
    states = [generator.get_state() for generator in generators]
    result = func(*args, **kwargs)
    real = any(isinstance(leaf, Tensor) and leaf.device.type != "meta" for leaf in pytree.tree_leaves(result))
    if real or given:
        for generator, state in zip(generators, states, strict=True):
            if not torch.equal(generator.get_state(), state):
                generator.set_state(state)
    return result


def _stand_in(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | tuple[Tensor, ...] | None:
    """The result of a function of stand-ins, where shapes alone plainly tell it; None to ask the function.

    torch runs many of them through Python, which takes milliseconds a call and, for the first, seconds of imports; a
    network has dozens.
    """
    rule = _RULES.get(func)
    try:
        return None if rule is None else rule(*args, **kwargs)
    except (TypeError, ValueError, IndexError):  # torch says what is wrong
        return None


def _normalised(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    given = [value for value in (running_mean, running_var, weight, bias) if value is not None]
    sound = input.is_floating_point() and input.dim() > 1 and all(value.shape == input.shape[1:2] for value in given)
    known = running_mean is not None and running_var is not None
    enough = input.numel() > input.shape[1] if training else known
    return input.new_empty(input.shape) if sound and enough else None


def _normalised_by_item(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if use_input_stats and math.prod(input.shape[2:]) == 1:
        return None
    return _normalised(input, running_mean, running_var, weight, bias, use_input_stats)


def _normalised_by_group(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor | None:
    if num_groups < 1 or input.shape[1] % num_groups != 0:
        return None
    return _normalised(input, None, None, weight, bias, True)


def _normalised_by_place(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    axes = len(normalized_shape)
    given = [tensor for tensor in (weight, bias) if tensor is not None]
    if axes == 0 or tuple(input.shape[-axes:]) != tuple(normalized_shape) or not input.is_floating_point():
        return None
    if any(tensor.shape != tuple(normalized_shape) or tensor.dtype != input.dtype for tensor in given):
        return None
    return input.new_empty(input.shape)


def _activated(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor | None:
    if not input.is_floating_point():
        return None
    return _overwritten(input) if inplace else input.new_empty(input.shape)


def _overwritten(input: Tensor) -> Tensor:
    """The very tensor, newer by a write; which one does not matter here."""
    return torch.relu_(input)


def _rectified(input: Tensor, inplace: bool = False) -> Tensor | None:
    return _activated(input, inplace=inplace)


def _convolved(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor | None:
    if isinstance(padding, str) or not input.dim() == weight.dim() == 4 or min(input.shape) < 1:
        return None
    out, per_group, *kernel = weight.shape
    axes = zip(input.shape[2:], kernel, *(pair(v) for v in (stride, padding, dilation)), strict=True)
    size = [(side + 2 * pad - spread * (taps - 1) - 1) // step + 1 for side, taps, step, pad, spread in axes]
    whole = input.shape[1] == per_group * groups and out % groups == 0 and min(size) > 0
    return input.new_empty(len(input), out, *size) if whole and _weighs(input, weight, bias, out) else None


def _weighs(input: Tensor, weight: Tensor, bias: Tensor | None, outputs: int) -> bool:
    """Whether types and the bias are such that a layer takes them."""
    alike = {tensor.dtype for tensor in (input, weight, bias) if tensor is not None} == {input.dtype}
    return alike and input.is_floating_point() and (bias is None or bias.shape == (outputs,))


def _transposed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor | None:
    if not input.dim() == weight.dim() == 4 or min(input.shape) < 1 or len(weight) != input.shape[1]:
        return None
    _, per_group, *kernel = weight.shape
    axes = list(
        zip(input.shape[2:], kernel, *(pair(v) for v in (stride, padding, output_padding, dilation)), strict=True)
    )
    size = [
        (side - 1) * step - 2 * pad + spread * (taps - 1) + more + 1 for side, taps, step, pad, more, spread in axes
    ]
    sound = all(0 <= more < max(step, spread) and pad >= 0 for _, _, step, pad, more, spread in axes)
    whole = groups >= 1 and len(weight) % groups == 0 and min(size) > 0
    out = per_group * groups
    good = sound and whole and _weighs(input, weight, bias, out)
    return input.new_empty(len(input), out, *size) if good else None


def _maxima(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    return None if return_indices else _pooled(input, kernel_size, stride, padding, dilation, ceil_mode)


def _averages(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor | None:
    return None if divisor_override == 0 else _pooled(input, kernel_size, stride, padding, 1, ceil_mode)


def _pooled(input: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Tensor | None:
    if ceil_mode or input.dim() != 4 or min(input.shape) < 1 or not input.is_floating_point():
        return None
    steps = kernel if stride is None or stride in ((), []) else stride
    axes = list(zip(input.shape[2:], *(pair(v) for v in (kernel, steps, padding, dilation)), strict=True))
    if any(min(taps, step, spread) < 1 or not 0 <= 2 * pad <= taps for _, taps, step, pad, spread in axes):
        return None
    size = [(side + 2 * pad - spread * (taps - 1) - 1) // step + 1 for side, taps, step, pad, spread in axes]
    return input.new_empty(*input.shape[:2], *size) if min(size) > 0 else None


def _pooled_to(input: Tensor, output_size: Any) -> Tensor | None:
    size = pair(output_size)
    if input.dim() != 4 or min(input.shape) < 1 or not input.is_floating_point() or min(size) < 1:
        return None
    return input.new_empty(*input.shape[:2], *size)


def _averaged(input: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor | None:
    axes = [dim] if isinstance(dim, int) else list(dim or ())
    if dtype is not None or not axes or not input.is_floating_point() or not all(_is_axis(a, input) for a in axes):
        return None
    dropped = {axis % input.dim() for axis in axes}
    if len(dropped) != len(axes):
        return None
    sides = [(axis in dropped, side) for axis, side in enumerate(input.shape)]
    return input.new_empty([1 if drop else side for drop, side in sides if keepdim or not drop])


def _is_axis(axis: int, input: Tensor) -> bool:
    return -input.dim() <= axis < input.dim()


def _shared_out(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor | None:
    known = dim is not None and dtype is None and input.is_floating_point() and _is_axis(dim, input)
    return input.new_empty(input.shape) if known else None


def _thinned(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor | None:
    known = training and not inplace and 0 < p <= 1 and input.is_floating_point()  # with 0 it is its input
    return input.new_empty(input.shape) if known else None


def _shuffled(input: Tensor, upscale_factor: int) -> Tensor | None:
    r, (n, c, height, width) = upscale_factor, input.shape
    return input.new_empty(n, c // r**2, r * height, r * width) if r > 0 and c % r**2 == 0 else None


def _unshuffled(input: Tensor, downscale_factor: int) -> Tensor | None:
    r, (n, c, height, width) = downscale_factor, input.shape
    whole = r > 0 and height % r == width % r == 0
    return input.new_empty(n, c * r**2, height // r, width // r) if whole else None


def _element_by_element(*args: Any, inplace: bool = False, **kwargs: Any) -> Tensor | None:
    """Of functions of the elements of tensors that are broadcast to one shape."""
    given = [*args, *kwargs.values()]
    tensors = [value for value in given if isinstance(value, Tensor)]
    first = tensors[0]
    plain = all(isinstance(value, (Tensor, int, float, str, type(None))) and value is not True for value in given)
    alike = all(tensor.dtype == first.dtype for tensor in tensors)
    if not plain or not alike or not first.is_floating_point() or "dtype" in kwargs or "out" in kwargs:
        return None
    if inplace:
        return _overwritten(first) if len(tensors) == 1 else None
    return first.new_empty(_broadcast([tensor.shape for tensor in tensors]))


def _broadcast(shapes: Sequence[Sequence[int]]) -> list[int]:
    sides = []
    for column in itertools.zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1):
        sizes = {size for size in column if size != 1}
        if len(sizes) > 1:
            raise ValueError("shapes that do not broadcast")
        sides.append(sizes.pop() if sizes else 1)
    return sides[::-1]


def _transformed(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if input.dim() < 1 or weight.dim() != 2 or input.shape[-1] != weight.shape[1]:
        return None
    fits = _weighs(input, weight, bias, len(weight))
    return input.new_empty(*input.shape[:-1], len(weight)) if fits else None


def _resized(
    input: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,  # like the one before, changes what pixels are, not how many there are
) -> Tensor | None:
    plain = (mode, align_corners) == ("nearest", None) or mode == "bilinear"
    if not plain or input.dim() != 4 or not input.is_floating_point() or (size is None) == (scale_factor is None):
        return None
    given = size if scale_factor is None else scale_factor
    if isinstance(given, (tuple, list)) and len(given) != 2:  # here torch takes no sequence of one
        return None
    if size is None:
        size = [math.floor(float(side) * scale) for side, scale in zip(input.shape[2:], pair(given), strict=True)]
    sizes = [int(side) for side in pair(size)]
    return input.new_empty(*input.shape[:2], *sizes) if min(*sizes, *input.shape) > 0 else None


def _padded(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor | None:
    if input.dim() != 4 or len(pad) != 4 or min(pad) < 0:
        return None
    rows, columns = input.shape[2:]
    if mode not in MODES.values() or min(input.shape) < 1:
        return None
    if max(pad[:2]) > widest(columns, mode) or max(pad[2:]) > widest(rows, mode):
        return None
    return input.new_empty(*input.shape[:2], rows + pad[2] + pad[3], columns + pad[0] + pad[1])


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    first = tensors[0]
    shapes = [list(tensor.shape) for tensor in tensors]
    total = sum(shape.pop(dim) for shape in shapes)
    if any(shape != shapes[0] for shape in shapes) or any(t.dtype != first.dtype for t in tensors) or first.dim() < 2:
        return None
    size = list(first.shape)
    size[dim] = total
    return first.new_empty(size)


def _recurred(
    input: Tensor,
    state: Any,
    weights: Any,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...] | None:
    """Of recurrent layers, whose steps torch would take one by one."""
    states = state if isinstance(state, tuple) else (state,)
    tensors = [input, *states, *weights]
    alike = all(tensor.dtype == input.dtype for tensor in tensors) and input.is_floating_point()
    directions, features = 2 if bidirectional else 1, weights[0].shape[-1]
    items = input.shape[0 if batch_first else 1]
    fits = all(tensor.shape[:-1] == (directions * num_layers, items) for tensor in states)
    if not alike or not fits or input.dim() != 3 or 0 in input.shape or input.shape[-1] != features:
        return None
    output = input.new_empty(*input.shape[:-1], directions * states[0].shape[-1])
    return output, *(tensor.new_empty(tensor.shape) for tensor in states)


def pair(value: Any) -> tuple[Any, Any]:
    """What torch makes of a number for both axes, alone or in a sequence, or of one for each."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    down, across = values * 2 if len(values) == 1 else values
    return down, across


# By name, in torch and as methods.
_ELEMENT_BY_ELEMENT = (
    "add", "sub", "mul", "div", "neg", "square", "sqrt", "rsqrt", "pow", "exp", "log", "abs", "clamp", "clip",
    "sigmoid", "tanh", "relu", "minimum", "maximum",
)  # fmt: skip

_RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.batch_norm: _normalised,
    F.instance_norm: _normalised_by_item,
    F.group_norm: _normalised_by_group,
    F.layer_norm: _normalised_by_place,
    F.leaky_relu: _activated,
    F.relu: _rectified,
    F.silu: _rectified,
    torch.conv2d: _convolved,
    torch.conv_transpose2d: _transposed,
    F.linear: _transformed,
    F.interpolate: _resized,
    F.pad: _padded,
    torch.cat: _joined,
    F.max_pool2d: _maxima,
    torch.max_pool2d: _maxima,
    F.avg_pool2d: _averages,
    F.adaptive_avg_pool2d: _pooled_to,
    torch.mean: _averaged,
    Tensor.mean: _averaged,
    F.softmax: _shared_out,
    F.log_softmax: _shared_out,
    Tensor.softmax: _shared_out,
    Tensor.log_softmax: _shared_out,
    F.dropout: _thinned,
    F.dropout2d: _thinned,
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _recurred),
    torch.pixel_shuffle: _shuffled,
    torch.pixel_unshuffle: _unshuffled,
    **dict.fromkeys(
        (F.hardtanh, F.relu6, F.hardswish, F.hardsigmoid, F.gelu, F.elu, F.mish, F.softplus), _element_by_element
    ),
    **{getattr(owner, name): _element_by_element for owner in (torch, Tensor) for name in _ELEMENT_BY_ELEMENT},
    Tensor.__rsub__: _element_by_element,
    Tensor.__rdiv__: _element_by_element,
}
