"""The ticket itself: what it holds, how it becomes a file and a network again."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lipfast import images, masks, priors
from lipfast.errors import ConfigError, InputError, TicketError
from lipfast.masks import Masks
from lipfast.tickets import description, packing

METADATA_KEY = "lipfast"  # one key: safetensors does not fix the order of several, and equal tickets are equal files
_UNSAVED = "this ticket"  # what messages call one that is no file yet
VALUES, BITS = ":values", ":mask"  # suffixes of the two tensors of a pruned parameter


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """A sparse subnetwork: mask, rewound weights and everything needed to build the network again.

    What goes into JSON has lists in the place of tuples, as a file gives it back.

    Attributes:
        prior: the network's kind in ``lipfast.priors``.
        config: its keyword arguments, JSON-able.
        seed: drew its initial weights and the input z.
        state: every entry of ``network.state_dict()``, rewound. Dead weights are exactly 0.0 (set so on creation).
        masks: name of a pruned parameter -> bool tensor of its shape, True lives.
        task: the ``config`` of the task it was searched on: its name and options.
        target: what the search fitted, "degraded" (all a user has) or "clean" (an oracle, as in the authors' code).
        round: pruning rounds behind it.
        provenance: images, settings, versions; JSON-able, for people and for reports.
    """

    prior: str
    config: dict[str, Any]
    seed: int
    state: dict[str, Tensor] = field(repr=False)
    masks: Masks = field(repr=False)
    task: dict[str, Any]
    target: str
    round: int
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        masks.validate(self.masks, self.state)
        object.__setattr__(self, "state", masks.apply(self.masks, self.state))
        for name in ("config", "task", "provenance"):
            object.__setattr__(self, name, description.as_read(getattr(self, name)))

    @property
    def kept(self) -> int:
        """Living weights of the pruned parameters."""
        return masks.living(self.masks)

    @property
    def total(self) -> int:
        """All weights of the pruned parameters."""
        return masks.total(self.masks)

    @property
    def sparsity(self) -> float:
        """Share of dead weights in the pruned parameters: counted in the mask, not nominal."""
        return masks.sparsity(self.masks)

    def to_bytes(self) -> bytes:
        """The file's content. Equal tickets give equal bytes.

        Raises:
            TicketError: :meth:`load` would refuse it, for example because config and state are of two networks, or
                a field such as provenance is not JSON.
        """
        tensors: dict[str, Tensor] = {}
        for name, value in self.state.items():
            if name in self.masks:
                tensors[name + VALUES], tensors[name + BITS] = packing.pack(value.cpu(), self.masks[name])
            else:
                tensors[name] = value.cpu().contiguous()
        _check_types(tensors, _UNSAVED)
        text = description.write(
            {
                "prior": {"kind": self.prior, "config": self.config, "seed": self.seed},
                "task": self.task,
                "target": self.target,
                "round": self.round,
                "sparsity": self.sparsity,
                "pruned": {
                    name: {"shape": list(mask.shape), "kept": int(mask.sum())} for name, mask in self.masks.items()
                },
                "provenance": self.provenance,
                "tensors_sha256": description.checksum(tensors),
            },
            _UNSAVED,
        )
        _checked(description.read(text, _UNSAVED), tensors, _UNSAVED)
        return safetensors.torch.save(tensors, metadata={METADATA_KEY: text})

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write one safetensors file under a temporary name and rename it; returns its size in bytes.

        Raises:
            InputError: the folder is missing or not writable, or the disk is full.
            TicketError: as :meth:`to_bytes`.
        """
        content = self.to_bytes()
        images.write_atomically(path, content)
        return len(content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Ticket":
        """Read a ticket file and check all of it: lengths, counts, checksums, and that it fits its network.

        Nothing in the file is executed, and no memory is taken beyond what its own bytes stand for (one bit of mask
        is one weight).

        Raises:
            TicketError: the file is missing, damaged, foreign, or its tensors belong to another network.
        """
        where = str(path)
        document, tensors = _open(Path(path))
        _check_types(tensors, where)
        state, found = _checked(document, tensors, where)
        return cls(
            prior=document["prior"]["kind"],
            config=document["prior"]["config"],
            seed=document["prior"]["seed"],
            state=state,
            masks=found,
            task=document["task"],
            target=document["target"],
            round=document["round"],
            provenance=document["provenance"],
        )

    def to_model(self) -> nn.Module:
        """The network with the ticket's weights: an ordinary dense module, dead weights exactly zero.

        To train it as a ticket pass ``masks`` to ``lipfast.fit.fit``; plain training would bring dead weights back.

        Raises:
            TicketError: config and state are of two networks.
        """
        network = priors.build(self.prior, self.config, self.seed)
        try:
            network.load_state_dict(self.state)
        except RuntimeError:  # torch's own words take a line for each tensor
            _check_network({"kind": self.prior, "config": self.config}, self.state, _UNSAVED)
            raise
        return network


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and raw tensors of a file; safetensors itself checks that the lengths cover the file exactly."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise TicketError(f"{path}: not a regular file; a ticket cannot be read from a pipe: save it first")
    try:
        with path.open("rb") as probe:  # gives clearer reasons than the library for what is no file at all
            probe.read(1)
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if METADATA_KEY not in metadata:
                raise TicketError(f"{path}: a safetensors file but no lipfast ticket; it carries no description")
            document = description.read(metadata[METADATA_KEY], str(path))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except OSError as error:
        raise TicketError(f"{path}: cannot read this ticket: {error.strerror or error}") from None
    except safetensors.SafetensorError as error:
        raise TicketError(f"{path}: not a whole safetensors file ({error}); is it truncated?") from None
    return document, tensors


def _checked(document: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], Masks]:
    """State and masks of a file, in the network's own order, if all its parts agree with each other."""
    _check_tensors(document["tensors_sha256"], tensors, where)
    state, found = _decode(document["pruned"], tensors, where)
    order = _check_network(document["prior"], state, where)
    _check_sparsity(document["sparsity"], found, where)
    return {name: state[name] for name in order}, {name: found[name] for name in order if name in found}


def _check_types(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.uint8, torch.int64):
            raise TicketError(f"{where}: tensor {name!r} has type {tensor.dtype}, expected float32, uint8 or int64")


def _check_tensors(checksum: str, tensors: Mapping[str, Tensor], where: str) -> None:
    if description.checksum(tensors) != checksum:
        raise TicketError(f"{where}: the tensors do not match their checksum; the file is damaged")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise TicketError(f"{where}: tensor {name!r} holds NaN or infinity")


def _decode(pruned: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], Masks]:
    """Dense state and masks from the raw tensors."""
    state, found = {}, {}
    rest = dict(tensors)
    for name, entry in pruned.items():
        values, bits = rest.pop(name + VALUES, None), rest.pop(name + BITS, None)
        if values is None or bits is None or name in rest:
            raise TicketError(f"{where}: pruned tensor {name!r} needs {name + VALUES!r} and {name + BITS!r}, no more")
        state[name], found[name] = packing.unpack(values, bits, tuple(entry["shape"]), f"{where}: {name}")
        if entry["kept"] != values.numel():
            raise TicketError(f"{where}: {name!r} keeps {values.numel()} weights, its description says {entry['kept']}")
    return {**rest, **state}, found


def _check_sparsity(stated: float, found: Masks, where: str) -> None:
    """The stated share is the counted one to the last bit: both are made by one function, and JSON keeps a float."""
    counted = masks.sparsity(found)
    if stated != counted:
        raise TicketError(f"{where}: the description says sparsity {stated!r}, its masks have {counted!r}")


def _check_network(prior: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> list[str]:
    """Build the described network without memory, compare every name, shape and type with the file's tensors, and
    return the names in the network's own order (ties between weights fall by it)."""
    try:
        with torch.device("meta"):
            expected = priors.build(prior["kind"], prior["config"]).state_dict()
    except (ConfigError, InputError) as error:
        raise TicketError(f"{where}: the network it describes cannot be built: {error}") from None
    if odd := sorted(expected.keys() ^ state.keys()):
        side = "lacks" if odd[0] in expected else "has an extra"
        raise TicketError(f"{where}: belongs to another network: it {side} tensor {odd[0]!r}")
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape or tensor.dtype != state[name].dtype:
            raise TicketError(
                f"{where}: belongs to another network: {name!r} must be {tuple(tensor.shape)} {tensor.dtype}, "
                f"got {tuple(state[name].shape)} {state[name].dtype}"
            )
    return list(expected)
