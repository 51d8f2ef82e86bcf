"""A ticket's description: the JSON text in the file's metadata, written canonically and read with suspicion."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lipfast.errors import TicketError

FORMAT = "lipfast-ticket"
VERSION = 1  # raise when a reader of the previous version would misread a file

# A description is small and a network has few and modest options; anything beyond is an attack or an accident.
LONGEST_TEXT = 1 << 20
LARGEST_OPTION = 4096
LONGEST_OPTION_LIST = 64
DEEPEST_NEST = 64  # lists and objects in each other; Python's JSON and its callers recurse a few times for each

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "prior": dict,
    "task": dict,
    "target": str,
    "round": int,
    "sparsity": (int, float),
    "pruned": dict,
    "provenance": dict,
    "tensors_sha256": str,
}


def canonical(document: Mapping[str, Any]) -> str:
    """JSON with sorted keys and no spaces: equal documents give equal bytes, so equal tickets are equal files."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)


def as_read(value: Any, levels: int = DEEPEST_NEST) -> Any:
    """``value`` as a file gives it back: lists for tuples. What is nested too deep for a file stays as it is."""
    if levels and isinstance(value, dict):
        return {name: as_read(one, levels - 1) for name, one in value.items()}
    if levels and isinstance(value, list | tuple):
        return [as_read(one, levels - 1) for one in value]
    return value


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over all tensors, by name: each one's name, type, shape and little-endian bytes.

    One sum for all: one a tensor would cost 2 % of a ticket.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].detach().cpu().contiguous().numpy()
        digest.update(f"{name}:{array.dtype.str}{list(array.shape)};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def write(fields: Mapping[str, Any], where: str) -> str:
    """The text of a description: ``fields`` with format, version and a checksum over everything else.

    Args:
        fields: what it says.
        where: the ticket's name, for messages.

    Raises:
        TicketError: a field is not JSON: NaN, a tensor, a key that is no text.
    """
    document = {"format": FORMAT, "version": VERSION, **fields}
    for name, value in document.items():
        _check_json(name, value, where)
    return canonical({**document, "sha256": _digest(document)})


def read(text: str, where: str) -> dict[str, Any]:
    """Parse and check a description that nobody vouches for.

    Args:
        text: what the file's metadata holds.
        where: the file's name, for messages.

    Raises:
        TicketError: not a description, another version, damaged, or a field of the wrong kind.
    """
    if len(text) > LONGEST_TEXT:
        raise TicketError(f"{where}: the description has {len(text)} characters, at most {LONGEST_TEXT} are read")
    try:
        document = json.loads(text)
    except ValueError as error:
        raise TicketError(f"{where}: the description is not JSON ({error}); the file is damaged") from None
    except RecursionError:
        raise _too_deep(where) from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise TicketError(f"{where}: not a lipfast ticket; tickets are written by `lipfast search`")
    if document.get("version") != VERSION:
        raise TicketError(
            f"{where}: ticket format {document.get('version')!r} but this lipfast reads {VERSION}; update lipfast"
        )
    if _is_deeper(document, DEEPEST_NEST):
        raise _too_deep(where)
    found = document.pop("sha256", None)
    try:
        expected = _digest(document)
    except ValueError as error:  # Python reads NaN and infinity, which JSON lacks and canonical text never holds
        raise TicketError(f"{where}: the description is not JSON ({error}); the file is damaged") from None
    if found != expected:
        raise TicketError(f"{where}: the description does not match its checksum; the file is damaged")
    _check_fields(document, where)
    return document


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(document).encode()).hexdigest()


def _check_json(name: str, value: Any, where: str) -> None:
    try:
        text = canonical({name: value})
        same = json.loads(text) == {name: as_read(value)}
    except (TypeError, ValueError) as error:
        raise TicketError(f"{where}: {name!r} cannot be written as JSON ({error})") from None
    except RecursionError:
        raise _too_deep(where) from None
    if not same:  # JSON makes texts of other keys, without a word
        raise TicketError(f"{where}: {name!r} cannot be written as JSON (its keys must be texts): {text[:200]}")


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects lie in each other more than ``levels`` deep."""
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(one, levels - 1) for one in inner)


def _too_deep(where: str) -> TicketError:
    return TicketError(f"{where}: the description is nested more than {DEEPEST_NEST} deep; no ticket needs that")


def _check_fields(document: Mapping[str, Any], where: str) -> None:
    for name, kind in _FIELDS.items():
        if not isinstance(document.get(name), kind) or isinstance(document.get(name), bool):
            raise TicketError(f"{where}: the description's {name!r} is missing or of the wrong kind")
    prior = document["prior"]
    if not isinstance(prior.get("kind"), str) or not isinstance(prior.get("config"), dict):
        raise TicketError(f"{where}: the description's 'prior' must hold a kind and a config")
    if not _is_count(prior.get("seed"), 2**63):
        raise TicketError(f"{where}: the prior's seed must be a whole number below 2^63, got {prior.get('seed')!r}")
    if not _is_count(document["round"], 10**6):
        raise TicketError(f"{where}: round must be a whole number, got {document['round']!r}")
    if document["target"] not in ("degraded", "clean"):
        raise TicketError(f"{where}: target must be degraded or clean, got {document['target']!r}")
    _check_pictures(document["provenance"].get("pictures", []), where)
    for name, value in prior["config"].items():
        _check_option(name, value, where)
    for name, entry in document["pruned"].items():
        _check_pruned(name, entry, where)


def _check_pictures(pictures: Any, where: str) -> None:
    if not isinstance(pictures, list):
        raise TicketError(f"{where}: provenance's pictures must be a list, got {type(pictures).__name__}")
    if any(not isinstance(picture, dict) or not isinstance(picture.get("name"), str) for picture in pictures):
        raise TicketError(f"{where}: each of provenance's pictures must have a name")


def _check_option(name: str, value: Any, where: str) -> None:
    """Keep a hostile config from building a network that fills the memory."""
    values = value if isinstance(value, list) else [value]
    if len(values) > LONGEST_OPTION_LIST:
        raise TicketError(f"{where}: network option {name!r} has {len(values)} entries, at most {LONGEST_OPTION_LIST}")
    for single in values:
        if not isinstance(single, bool | int | float | str | None):
            raise TicketError(f"{where}: network option {name!r} holds a {type(single).__name__}")
        if isinstance(single, int) and abs(single) > LARGEST_OPTION:
            raise TicketError(f"{where}: network option {name!r} is {single}, at most {LARGEST_OPTION} is read")


def _check_pruned(name: str, entry: Any, where: str) -> None:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or not 1 <= len(shape) <= 8 or not all(_is_count(size, 2**31) for size in shape):
        raise TicketError(f"{where}: pruned tensor {name!r} needs a shape of whole numbers, got {shape!r}")
    if not _is_count(entry.get("kept"), 2**62):
        raise TicketError(f"{where}: pruned tensor {name!r} must say how many weights it keeps")


def _is_count(value: Any, below: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below
