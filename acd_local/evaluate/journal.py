"""Writes a run while it is made: run.json, and two files that only ever grow, one finished record per line."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path

from acd_local.errors import UsageError
from acd_local.evaluate import run_folder
from acd_local.evaluate.run_folder import Record
from acd_local.files import JsonLines, is_storage_fault, locked, write_error
from acd_local.runtime.lifetime import Closing

# What may not change between a run and its continuation, or answers of two runs would mix.
_FIXED = ("format", "model", "pair", "judge", "judge_model", "shard")


class Records:
    """Takes a run's records as they are made, and knows which are there."""

    def __init__(self) -> None:
        self._seen: dict[str, set[run_folder.Key]] = {run_folder.ANSWERS: set(), run_folder.SCORES: set()}

    def has_answer(self, setup: str, set_name: str, item: str) -> bool:
        return ("", setup, set_name, item) in self._seen[run_folder.ANSWERS]

    def has_score(self, score: str, setup: str, set_name: str, item: str) -> bool:
        """`setup`: for the score "margin" the prompt's name."""
        return (score, setup, set_name, item) in self._seen[run_folder.SCORES]

    def scores(self) -> frozenset[run_folder.Key]:
        """List what the scores so far are known by."""
        return frozenset(self._seen[run_folder.SCORES])

    def answers(self) -> list[Record]:
        """List all answers so far."""
        raise NotImplementedError

    def add_answer(self, record: Record) -> None:
        self._add(run_folder.ANSWERS, record)

    def add_score(self, record: Record) -> None:
        self._add(run_folder.SCORES, record)

    def _add(self, name: str, record: Record) -> None:
        self._seen[name].add(run_folder.key_of(record))


class Journal(Records, Closing):
    """A run's folder, opened for writing by one process at a time.

    Args:
        directory: made where it is missing.
        info: run.json of what is to be done now. Where the folder holds a run already, this one continues it: methods
            and sets may be added; whatever changes an answer must be the same.

    Attributes:
        info: run.json as it stands now, the earlier part's methods and sets included.

    Raises:
        StorageError: the storage is full or fails; here and when a record is added, which then is not there at all.
        UsageError: the folder cannot be written, is in use, or holds a run that this is no continuation of.
    """

    def __init__(self, directory: Path, info: Record) -> None:
        super().__init__()
        self.directory = directory
        self._lock = ExitStack()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(locked(directory / ".lock", f"{directory} is being written by another acd eval"))
            self.info = _continued(directory / run_folder.INFO, info)
            self._lines = {name: JsonLines(directory / name) for name in (run_folder.ANSWERS, run_folder.SCORES)}
            self._seen = {name: _keys(lines) for name, lines in self._lines.items()}
            run_folder.write_info(directory, self.info)
        except (OSError, ValueError) as error:  # ValueError: a name with a NUL character
            self.close()
            if is_storage_fault(error):
                raise write_error(directory, error) from None
            reason = error.strerror if isinstance(error, OSError) else error
            raise UsageError(f"cannot write {directory}: {reason}: give another folder with -o") from None
        except BaseException:
            self.close()
            raise

    def answers(self) -> list[Record]:
        """List all answers so far."""
        return [json.loads(line) for line in self._lines[run_folder.ANSWERS].read()]

    def close(self) -> None:
        self._lock.close()

    def _add(self, name: str, record: Record) -> None:
        self._lines[name].add(_finite(record))
        super()._add(name, record)


def _keys(lines: JsonLines) -> set[run_folder.Key]:
    seen = set()
    for number, line in enumerate(lines.read(), 1):
        try:
            seen.add(run_folder.key_of(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            message = f"{lines.path}:{number}: is no record: remove the line to have it made again"
            raise UsageError(message) from None
    return seen


def _finite(record: Record) -> Record:
    """Put None for infinity, which JSON lacks: what a token of probability 0 makes infinite was not measured."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def _continued(path: Path, info: Record) -> Record:
    """Unite run.json of this run with what the folder held before."""
    if not path.exists():
        return info
    try:
        return _checked_continuation(path, json.loads(path.read_bytes()), info)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UsageError(f"{path} is no description of a run: give another folder with -o") from None


def _checked_continuation(path: Path, old: Record, info: Record) -> Record:
    previous = {k: old[k] for k in _FIXED} | {k: old["options"][k] for k in run_folder.ANSWER_OPTIONS}
    now = {k: info[k] for k in _FIXED} | {k: info["options"][k] for k in run_folder.ANSWER_OPTIONS}
    for key, value in now.items():
        if json.loads(json.dumps(value)) != previous[key]:
            raise UsageError(f"{path.parent} holds a run with another {key}: give another folder with -o")
    united: Record = info | {"started": old.get("started", info["started"])}
    for key in ("methods", "sets"):
        united[key] = _united(path, key, old[key], info[key])
    other = f"{path.parent} holds a sweep of another method or number: give another folder with -o"
    united["sweep"] = run_folder.united_sweep((old["sweep"], info["sweep"]), other)
    if "merged" in old:
        united["merged"] = old["merged"]
    return united


def _united(path: Path, key: str, old: list[Record], new: list[Record]) -> list[Record]:
    """Unite entries by name: the old ones stay, in their order; one that is there already must be the same."""
    entries = {entry["name"]: entry for entry in old}
    for entry in new:
        before = entries.setdefault(entry["name"], entry)
        if before != json.loads(json.dumps(entry)) and before is not entry:
            what = f"{key[:-1]} {entry['name']!r}"
            raise UsageError(f"{path.parent} holds a run with another {what}: give another folder with -o")
    return list(entries.values())
