"""What a module consists of: its tensors, and its own and its children's attributes."""

import operator
import weakref
from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch._C._dynamo.guards import TensorGuards

import lipfast._C as _C
from lipfast.engine.runtime import has_hooks, hooks_of
from lipfast.errors import InputError

_ATTRIBUTES = operator.attrgetter("__dict__")
_MODE = operator.attrgetter("training")
_SHAPE_AND_KIND = operator.attrgetter("shape", "dtype", "device", "requires_grad")
_Place = tuple[str, dict[str, Any], str]  # a tensor's name, and a module's dict with its key there


class Survey:
    """The tensors and attributes of a module and its children, as they were found. Keeps no parameter or buffer alive.

    Raises:
        InputError: one of the modules has hooks.
    """

    modules: list[nn.Module]
    states: list[list[Any]]  # each module with its class and attributes

    def __init__(self, module: nn.Module) -> None:
        parameters: list[_Place] = []
        buffers: list[_Place] = []
        self.modules = []
        _visit(module, "", self.modules, parameters, buffers, set())
        self.states = [state_of(module, vars(module)) for module in self.modules]
        self._places = parameters + buffers
        self._attributes, self._classes = [*map(_ATTRIBUTES, self.modules)], [*map(type, self.modules)]
        self._record, dicts = _record(self.modules)
        self._versions = np.zeros(dicts, np.uint64)
        self._modes = tuple(map(_MODE, self.modules))
        self._modes_are_attributes = all("training" in attributes for attributes in self._attributes)
        self._forms: Forms | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters, then buffers, by name, each once; where the survey holds."""
        return {name: held[key] for name, held, key in self._places}

    @property
    def modes(self) -> tuple[bool, ...]:
        """Whether each module trains; where the survey holds."""
        return self._modes if self._modes_are_attributes else tuple(map(_MODE, self.modules))

    def forms(self, tensors: Mapping[str, Tensor]) -> "Forms":
        """The forms of the survey's tensors as they are now: the same object while they stay the same."""
        self._forms = Forms.of(tensors.values(), self._forms)
        return self._forms

    def holds(self) -> bool:
        """Whether all classes, attributes, tensors and children are the same objects still, and nothing has hooks. In a
        twentieth of the time of another survey. What changes within an attribute, a list's entries, is not seen."""
        same_attributes = all(map(operator.is_, map(_ATTRIBUTES, self.modules), self._attributes))
        same_classes = [*map(type, self.modules)] == self._classes
        return same_attributes and same_classes and _C.same_entries(self._record, self._versions)


class Forms:
    """Shapes, dtypes, devices and ``requires_grad`` of tensors, as a part of a key. A network has hundreds, so they are
    hashed once, and torch compares them, in a third of the time that it takes to ask for them."""

    def __init__(self, tensors: Collection[Tensor]) -> None:
        self._forms = tuple(map(_SHAPE_AND_KIND, tensors))
        self._hash = hash(self._forms)
        sizes, strides = [[*t.shape] for t in tensors], [[*t.stride()] for t in tensors]
        fixed: Any = {"dynamic_dims_sizes": sizes, "dynamic_dims_strides": strides}  # torch's stub has other types
        self._guards = TensorGuards(*tensors, **fixed)

    @classmethod
    def of(cls, tensors: Collection[Tensor], known: "Forms | None") -> "Forms":
        """The forms of these tensors: ``known`` where it says the same. They are new ones, but equal, where torch is in
        another mode since, or strides changed."""
        return known if known is not None and known._guards.check(*tensors) else cls(tensors)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Forms) and self._forms == other._forms


def state_of(module: nn.Module, attributes: dict[str, Any]) -> list[Any]:
    """A module as it is compared with what it was."""
    return [module, type(module), *attributes.values()]


def _record(modules: Iterable[nn.Module]) -> tuple[list[Any], int]:
    """Each dict in which modules keep what a survey finds, and hooks, followed by its keys and values; parameters and
    buffers as weak references. Also the number of dicts."""
    record: list[Any] = []
    count = 0
    for module in modules:
        strong: tuple[dict[Any, Any], ...] = (vars(module), module._modules, *hooks_of(module))
        for held in strong:
            record.append(held)
            record.extend(chain.from_iterable(held.items()))
        weak = module._parameters, module._buffers
        for tensors in weak:
            record.append(tensors)
            for name, tensor in tensors.items():
                record += name, None if tensor is None else weakref.ref(tensor)
        count += len(strong) + len(weak)
    return record, count


def _visit(
    module: nn.Module,
    prefix: str,
    modules: list[nn.Module],
    parameters: list[_Place],
    buffers: list[_Place],
    seen: set[int],
) -> None:
    """Collect a module and where its tensors are, each once, and its children's; what ``named_parameters`` and the like
    give, in a tenth of their time."""
    if has_hooks(module):
        raise hooked(prefix[:-1])
    modules.append(module)
    for found, own in (parameters, module._parameters), (buffers, module._buffers):
        for name, tensor in own.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                found.append((prefix + name, own, name))
    for name, child in module._modules.items():
        if child is not None:
            _visit(child, f"{prefix}{name}.", modules, parameters, buffers, seen)


def called(name: str) -> str:
    """How a message names a module."""
    return f"module {name!r}" if name else "the model"


def hooked(name: str) -> InputError:
    """A module has hooks."""
    return InputError(f"accelerate: {called(name)} has hooks, which would not run; remove them")
