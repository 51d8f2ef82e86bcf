"""What configurations share: random streams that follow from a seed, values of the types their fields say, JSON."""

import dataclasses
import functools
import hashlib
import inspect
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from collections.abc import Sequence as AnySequence
from typing import Any, Literal, ParamSpec, TypeVar, Union

import numpy

from lipfast.errors import ConfigError, InputError

P = ParamSpec("P")
R = TypeVar("R")

_SETTINGS = (bool, int, float, str)  # a value that should have been one of these is a wrong setting, else a wrong input


def derive_seed(seed: int, purpose: str) -> int:
    """A 63-bit seed for one random stream. Different purposes and neighbouring seeds give unrelated streams.

    Args:
        seed: the user's.
        purpose: what the stream is for, for example "fit/noise". Changing the text changes all results.
    """
    digest = hashlib.sha256(f"{purpose}/{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def check_seed(name: str, seed: int) -> None:
    """Whether a seed is one that tickets, torch and the noise of a fit can hold.

    Raises:
        ConfigError: it is not.
    """
    if not 0 <= seed < 2**63:
        raise ConfigError(f"{name}={seed} must be a whole number from 0 to 2^63 - 1")


def to_json(document: Any, *, indent: int | None = None) -> str:
    """``document`` as JSON. NaN and infinity, which JSON lacks, become null: no figure."""
    return json.dumps(_finite(document), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value


def check_fields(config: Any) -> None:
    """Check a frozen dataclass's values against its annotations, as :func:`checked`, and put the plain values in.

    Raises:
        ConfigError: a value of another type.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        where = f"{type(config).__name__}.{field.name}"
        value = checked(where, getattr(config, field.name), hints[field.name])
        object.__setattr__(config, field.name, value)


def checks_types(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: arguments are checked against their annotations, as :func:`checked`, before the function sees them."""
    signature = inspect.signature(function)
    extra = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [name for name, parameter in signature.parameters.items() if parameter.kind not in extra]
    where = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(*args, **kwargs)
        hints = _hints(function)
        for name in named:
            if name in given.arguments and name in hints:
                given.arguments[name] = checked(f"{where}: {name}", given.arguments[name], hints[name])
        return function(*given.args, **given.kwargs)

    return call


def checked(where: str, value: Any, wanted: Any) -> Any:
    """``value`` if it has the type ``wanted``, with numpy's numbers as Python's own: what JSON takes.

    A whole number stands for a float, a list for a tuple; True is no number.

    Args:
        where: what a message calls the value.
        value: anything.
        wanted: an annotation made of classes, Any, Literal, unions, tuple, Sequence and Mapping.

    Raises:
        ConfigError: another type where a number, a text or several were wanted.
        InputError: another type where a picture, a ticket or another object was wanted.
    """
    plain = _plain(value)
    if not fits(plain, wanted):
        kind = ConfigError if _is_setting(wanted) else InputError
        raise kind(f"{where} must be {_in_words(wanted)}, got {_shown(plain)}")
    return _as_written(plain, wanted)


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """A function's annotations, looked up at its first call: names it forwards to are known by then."""
    return typing.get_type_hints(function)


def _plain(value: Any) -> Any:
    if isinstance(value, numpy.floating):
        return float(str(value))  # the shortest decimal: float32's 0.2 is 0.2
    if isinstance(value, numpy.generic):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(_plain(one) for one in value)
    if type(value) is dict:
        return {_plain(name): _plain(one) for name, one in value.items()}
    return value


def fits(value: Any, wanted: Any) -> bool:
    """Whether ``value`` has the type ``wanted``, see :func:`checked`."""
    origin, parts = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any or isinstance(wanted, TypeVar):
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is tuple:
        return isinstance(value, tuple | list) and _each_fits(value, parts)
    if origin in (list, AnySequence):
        return isinstance(value, tuple | list) and all(fits(one, parts[0]) for one in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(_each_fits(pair, parts) for pair in value.items())
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if getattr(wanted, "_is_protocol", False):  # what it must have is looked at where it is used
        return True
    return isinstance(value, origin or wanted)


def _each_fits(values: AnySequence[Any], parts: tuple[Any, ...]) -> bool:
    if parts[-1:] == (...,):
        return all(fits(one, parts[0]) for one in values)
    return len(values) == len(parts) and all(map(fits, values, parts))


def _as_written(value: Any, wanted: Any) -> Any:
    """Equal values alike, so that equal configs are equal as JSON too."""
    if wanted is float:
        return float(value)
    if typing.get_origin(wanted) is tuple:
        return tuple(value)
    return value


def _is_setting(wanted: Any) -> bool:
    origin, parts = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Literal:
        return True
    if parts:
        return all(_is_setting(part) for part in parts if part not in (..., types.NoneType, Any))
    return wanted in _SETTINGS


def _in_words(wanted: Any) -> str:
    origin, parts = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_in_words(part) for part in parts))
    if origin is tuple and ... not in parts:
        return "a pair of " + " and ".join(map(_in_words, parts))
    if origin in (tuple, list, AnySequence):
        return f"a list, each entry {_in_words(parts[0])}"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "True or False", types.NoneType: "None"}
    named = origin or wanted
    return names.get(named, "a mapping" if named is Mapping else f"a {named.__name__}")


def _shown(value: Any) -> str:
    plain = (*_SETTINGS, list, tuple, dict, types.NoneType)
    text = repr(value) if isinstance(value, plain) else ""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return text if 0 < len(text) <= 80 else type(value).__name__
