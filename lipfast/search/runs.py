"""Run folders: a search's files, written so that a killed process continues where it was.

A folder is named by everything that decides the result. A file that exists is whole: each is written under a temporary
name and renamed. The log alone grows in place; a checkpoint knows how long it was, and continuing cuts it there.
"""

import datetime
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from lipfast import images
from lipfast.config import fits, to_json
from lipfast.errors import ConfigError, InputError

IDENTITY = "run.json"
LOG = "log.jsonl"
_LOCK = ".lock"


def name_of(identity: Mapping[str, Any]) -> str:
    """Folder name of a search: ``imp-`` and 12 hex digits over every field of its identity, defaults included."""
    text = json.dumps(identity, sort_keys=True, allow_nan=False)
    return "imp-" + hashlib.sha256(text.encode()).hexdigest()[:12]


class Run:
    """One search's folder, locked against a second process while it is open.

    Args:
        out: the folder that holds run folders; made if missing.
        identity: everything that decides the result, JSON-able. Equal identities share a folder.

    Raises:
        ConfigError: the folder belongs to another search, or another process works in it.
        InputError: the folder cannot be made or written.
    """

    def __init__(self, out: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        self.folder = make_folder(Path(out) / name_of(identity))
        self._lock = _lock(self.folder)
        try:
            self._claim(identity)
        except BaseException:
            self._lock.close()
            raise

    def _claim(self, identity: Mapping[str, Any]) -> None:
        for unfinished in self.folder.glob(".*.part"):
            unfinished.unlink()
        if self.exists(IDENTITY):
            _check_same(identity, self.read(IDENTITY), self.folder)
        else:
            self.write(IDENTITY, identity)

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()  # gives the lock back, as does the end of the process

    def path(self, name: str) -> Path:
        """Where the run's file ``name`` lies."""
        return self.folder / name

    def exists(self, name: str) -> bool:
        """Whether the file is there, and so is whole."""
        return self.path(name).exists()

    def write(self, name: str, document: Mapping[str, Any]) -> None:
        """Write a JSON file, whole or not at all."""
        images.write_atomically(self.path(name), (to_json(document, indent=1) + "\n").encode())

    def read(self, name: str, **kinds: Any) -> dict[str, Any]:
        """Read a JSON file of this run. ``kinds`` are the fields it must have and their types.

        Raises:
            InputError: it is not what a run writes; somebody changed it.
        """
        path = self.path(name)
        try:
            document = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot read this file of the run ({error}); move the folder away") from None
        if not isinstance(document, dict):
            raise InputError(f"{path}: expected a JSON object; move the folder away")
        check_kinds(path, document, kinds)
        return document

    def remove(self, name: str) -> None:
        """Delete a file if it is there."""
        self.path(name).unlink(missing_ok=True)

    def log(self, event: str, **fields: Any) -> None:
        """Append one line of JSON with the time in UTC."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        line = to_json({"time": now, "event": event, **fields}) + "\n"
        try:
            with self.path(LOG).open("ab") as file:
                file.write(line.encode())
        except OSError as error:
            raise InputError(
                f"{self.path(LOG)}: cannot write the log: {error.strerror}; free space, run again"
            ) from None

    def log_length(self) -> int:
        """Bytes of the log so far."""
        return self.path(LOG).stat().st_size if self.exists(LOG) else 0

    def cut_log(self, length: int) -> None:
        """Forget what was logged after the log had ``length`` bytes: those steps are taken again."""
        if self.log_length() > length:
            os.truncate(self.path(LOG), length)


def make_folder(path: Path) -> Path:
    """Make a folder with its parents and check that it can be written.

    Raises:
        InputError: it cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot make this folder: {error.strerror}; choose another --out") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"{path}: this folder is not writable; change its permissions or choose another --out")
    return path


def check_kinds(path: Path, document: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Check that a file of a run has these fields, of these types.

    Raises:
        InputError: it has not; somebody changed it.
    """
    for field, kind in kinds.items():
        if field not in document or not fits(document[field], kind):
            raise InputError(f"{path}: {field!r} is missing or of the wrong kind; move the folder away")


def folders(out: Path) -> Iterator[Path]:
    """The run folders in ``out``, by name."""
    yield from sorted(path.parent for path in out.glob(f"imp-*/{IDENTITY}"))


def _lock(folder: Path) -> Any:
    try:
        handle = (folder / _LOCK).open("w")
    except OSError as error:
        raise InputError(f"{folder}: cannot write here: {error.strerror}; choose another --out") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise ConfigError(
            f"{folder}: another process works on this search; wait for it or choose another --out"
        ) from None
    return handle


def _check_same(asked: Mapping[str, Any], found: Mapping[str, Any], folder: Path) -> None:
    asked = json.loads(json.dumps(asked))
    for key in sorted({*asked, *found}):
        if asked.get(key) != found.get(key):
            raise ConfigError(
                f"{folder}: this folder belongs to another search ({key} is {found.get(key)!r} there, "
                f"{asked.get(key)!r} here); move it away or choose another --out"
            )
