"""The state of a fit between two steps, as plain tensors and numbers, and its file."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from lipfast import images
from lipfast.errors import InputError

_VERSION = 2  # raise when an entry's meaning changes
_METADATA_KEY = "lipfast_fit"


@dataclass(frozen=True)
class FitState:
    """Everything that decides the rest of a fit; ``fit(state=...)`` goes on to the same bits.

    Attributes:
        tensors: name -> tensor, names with dots (``trainer.``, ``good.``, ``rule.``, ``weights.<step>.``, ...).
        scalars: JSON-able numbers, texts and None, among them the configuration it belongs to.
    """

    tensors: dict[str, Tensor]
    scalars: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.scalars["step"])

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under ``prefix.``, without it."""
        return {name[len(prefix) + 1 :]: t for name, t in self.tensors.items() if name.startswith(prefix + ".")}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, to a temporary name first; the scalars become its metadata.

        Raises:
            InputError: the file cannot be written.
        """
        metadata = {_METADATA_KEY: json.dumps({"version": _VERSION, **self.scalars})}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.tensors.items()}
        images.write_atomically(path, safetensors.torch.save(tensors, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FitState":
        """Read what :meth:`save` wrote.

        Raises:
            InputError: the file is missing, damaged, or no fit state of this version.
        """
        path = Path(path)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                scalars = _scalars(file.metadata() or {}, path)
                names = list(file.keys())
                tensors = {name: file.get_tensor(name) for name in names}
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except (OSError, SafetensorError) as problem:
            raise InputError(f"{path}: not a readable fit state ({problem}); delete it to start anew") from None
        return cls(tensors, scalars)


def grouped(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with ``prefix.`` before each name."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _scalars(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    try:
        scalars = json.loads(metadata[_METADATA_KEY])
        version = scalars.pop("version")
    except (KeyError, ValueError, AttributeError, TypeError, RecursionError):
        raise InputError(f"{path}: a safetensors file, but not the state of a fit") from None
    if version != _VERSION:
        raise InputError(f"{path}: fit state version {version}, this lipfast reads version {_VERSION}; start anew")
    return dict(scalars)
