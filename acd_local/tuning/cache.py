"""Keeps in the user's cache folder what was computed, so that a run that was stopped goes on from there.

What is kept stands under a key, a hash over all that decides it. The files are only this user's: they hold what a model
answers to harmful requests.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

from acd_local import files

FORMAT = 1  # of what is measured; a new one measures anew


def key_of(inputs: Mapping[str, Any]) -> str:
    """Return the hex SHA-256 over values that JSON can hold."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def model_folder(command: str, digest: str) -> Path:
    """Make the folder of one command and one model's file; raises UsageError, StorageError."""
    folder = files.work_dir() / command
    for path in (folder, folder / digest[:16]):
        try:
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(0o700)
        except OSError as error:
            raise files.write_error(path, error) from None
    return folder / digest[:16]


def locked(folder: Path, command: str) -> AbstractContextManager[None]:
    """Hold a model's folder for this command alone; raises UsageError where another process has it."""
    taken = f"another {command} works on this model: wait for it, or stop it"
    return files.locked(folder / "lock", taken, private=True)


def open_private(path: Path, mode: str) -> IO[bytes]:
    """Open a file that only this user can read; raises OSError."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags, files.PRIVATE))


class Measurements:
    """The figures that a fit has measured, each under all that decides it; lines {"key", "value"}.

    Args:
        base: what decides every value, as JSON can hold it.

    Attributes:
        seconds: spent in every stage, over all sittings.
    """

    def __init__(self, path: Path, base: Mapping[str, Any]) -> None:
        self._base = {"format": FORMAT, **base}
        self._lines = files.JsonLines(path, mode=files.PRIVATE)
        self._values: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        for line in self._lines.read():
            try:
                record = json.loads(line)
                self._values[record["key"]] = record["value"]
            except (ValueError, LookupError, TypeError):  # damaged: what it held is measured again
                continue

    def get(self, what: str, inputs: Mapping[str, Any]) -> Any:
        """Return what was kept, or None."""
        return self._values.get(self._key(what, inputs))

    def keep(self, what: str, inputs: Mapping[str, Any], value: Any) -> None:
        """Keep a value; raises StorageError, UsageError."""
        key = self._key(what, inputs)
        self._values[key] = value
        self._lines.add({"key": key, "value": value})

    def memo(self, what: str, inputs: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """Return what was kept, else what `make` gives: something that JSON can hold."""
        if (found := self.get(what, inputs)) is None:
            found = make()
            self.keep(what, inputs, found)
        return found

    @contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """Count the time spent inside as this stage's, also where it is left with an exception."""
        before, started = float(self.get("seconds", {"stage": stage}) or 0.0), time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[stage] = before + spent if spent > 1 else before  # reading what was kept is no work
            if spent > 1:
                self.keep("seconds", {"stage": stage}, self.seconds[stage])

    def _key(self, what: str, inputs: Mapping[str, Any]) -> str:
        return key_of({"what": what, **self._base, **inputs})[:32]
