"""What a module consists of: its tensors, and its own and its children's attributes."""

import operator
import weakref
from collections.abc import Iterable
from itertools import chain
from typing import Any

from torch import Tensor, nn

import lipfast._C as _C
from lipfast.engine.runtime import has_hooks, hooks_of
from lipfast.errors import InputError

_ATTRIBUTES = operator.attrgetter("__dict__")
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
        self._record = _record(self.modules)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters, then buffers, by name, each once; where the survey holds."""
        return {name: held[key] for name, held, key in self._places}

    def holds(self) -> bool:
        """Whether all classes, attributes, tensors and children are the same objects still, and nothing has hooks. In a
        twentieth of the time of another survey. What changes within an attribute, a list's entries, is not seen."""
        same_attributes = all(map(operator.is_, map(_ATTRIBUTES, self.modules), self._attributes))
        return same_attributes and [*map(type, self.modules)] == self._classes and _C.same_entries(self._record)


def state_of(module: nn.Module, attributes: dict[str, Any]) -> list[Any]:
    """A module as it is compared with what it was."""
    return [module, type(module), *attributes.values()]


def _record(modules: Iterable[nn.Module]) -> list[Any]:
    """Each dict in which modules keep what a survey finds, and hooks, followed by its keys and values; parameters and
    buffers as weak references."""
    record: list[Any] = []
    for module in modules:
        dicts: tuple[dict[Any, Any], ...] = (vars(module), module._modules, *hooks_of(module))
        for held in dicts:
            record.append(held)
            record.extend(chain.from_iterable(held.items()))
        for tensors in (module._parameters, module._buffers):
            record.append(tensors)
            for name, tensor in tensors.items():
                record += name, None if tensor is None else weakref.ref(tensor)
    return record


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
