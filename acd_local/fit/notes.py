"""Keeps what a fit has measured: each figure under all that decides it, so that a stopped fit goes on from there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from acd_local import files
from acd_local.optimize.stages import key_of, private_lines

FORMAT = 1  # of what is measured; a new one measures anew


class Notes:
    """A file of lines {"key", "value"}, only this user's.

    Args:
        path: of the file.
        base: what decides every value, as JSON can hold it.

    Attributes:
        seconds: spent in every stage, over all sittings.
    """

    def __init__(self, path: Path, base: Mapping[str, Any]) -> None:
        self._path = path
        self._base = {"format": FORMAT, **base}
        private_lines(path)
        self._values = dict(_lines(path))
        self.seconds: dict[str, float] = {}

    def get(self, what: str, inputs: Mapping[str, Any]) -> Any:
        """What was kept, or None."""
        return self._values.get(self._key(what, inputs))

    def keep(self, what: str, inputs: Mapping[str, Any], value: Any) -> None:
        """Raises StorageError, UsageError."""
        key = self._key(what, inputs)
        self._values[key] = value
        append(self._path, {"key": key, "value": value})

    def memo(self, what: str, inputs: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """What was kept, else what `make` gives: something that JSON can hold."""
        if (found := self.get(what, inputs)) is None:
            found = make()
            self.keep(what, inputs, found)
        return found

    @contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """Counts the time spent inside as this stage's, also where it is left with an exception."""
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


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Raises StorageError, UsageError."""
    try:
        with path.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
    except OSError as error:
        raise files.write_error(path, error) from None


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """A line that is damaged is passed over: what it held is measured again."""
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
            yield record["key"], record["value"]
        except (ValueError, LookupError, TypeError):
            continue
