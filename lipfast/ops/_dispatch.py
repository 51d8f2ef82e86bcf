"""Which implementation of an op runs. The only file that names the backends."""

import functools
import importlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch

from lipfast.errors import BackendError

# name -> (device type it needs, None for any; module). Fastest first.
BACKENDS: dict[str, tuple[str | None, str]] = {
    "cuda": ("cuda", "lipfast.ops.cuda"),
    "triton": ("cuda", "lipfast.ops.triton"),
    "cpu": ("cpu", "lipfast.ops.cpu"),
    "reference": (None, "lipfast.ops.reference"),
}


@functools.cache
def load(name: str) -> ModuleType | ModuleNotFoundError:
    """Import a backend. Absent is a reason (returned); a broken build raises ImportError and stays loud."""
    try:
        return importlib.import_module(BACKENDS[name][1])
    except ModuleNotFoundError as missing:
        return missing


def pick(op: str, device: torch.device, asked: str | None = None) -> tuple[str, Callable[..., Any]]:
    """Return ``(backend name, function)`` for an op on a device.

    An explicit choice (the argument, else ``LIPFAST_BACKEND``) that cannot run raises; the automatic choice takes the
    first backend that runs on the device and has the op. Benchmarks record the name, so no row is anonymous. The
    function makes ``device`` the current one while it runs, see `on`.

    Raises:
        BackendError: nothing that was asked for can run, with a reason for each backend.
    """
    asked = asked or os.environ.get("LIPFAST_BACKEND")
    if asked and asked not in BACKENDS:
        raise BackendError(f"unknown backend {asked!r}; known: {', '.join(BACKENDS)}")
    if device.type == "meta":
        raise BackendError(f"{op} cannot run on meta tensors, which hold no numbers")
    refused = []
    for name in [asked] if asked else BACKENDS:
        needs = BACKENDS[name][0]
        if needs not in (None, device.type):
            refused.append(f"{name} runs on {needs}")
        elif isinstance(loaded := load(name), ModuleNotFoundError):
            refused.append(f"{name} is not installed ({loaded})")
        elif (function := getattr(loaded, op, None)) is None:
            refused.append(f"{name} has no {op}")
        else:
            return name, function if device.type == "cpu" else _guarded(function, device)
    raise BackendError(f"{op} cannot run on {device}: {'; '.join(refused)}")


def kernel(op: str, device: torch.device) -> Callable[..., Any]:
    """What runs behind an op, for callers that want neither autograd nor ``torch.compile``: it takes the op's arguments
    without ``backend``, all of them, and checks none. When a process first calls an operator defined in Python, torch
    imports its compiler, which takes seconds.
    """
    return pick(op, device)[1]


def on(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one inside: Triton launches there, whatever GPU its tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _guarded(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with on(device):
            return function(*args, **kwargs)

    return call
