"""Keeps an evaluation's run as a folder of three files: reads it, and says what its records are known by.

run.json says what was asked; answers.jsonl and scores.jsonl hold what was measured, one object per line. docs/eval.md
describes them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acd_local.errors import UsageError
from acd_local.files import replace_file

FORMAT = 1
INFO, ANSWERS, SCORES = "run.json", "answers.jsonl", "scores.jsonl"
ANSWER_OPTIONS = ("temp", "max_tokens", "seed", "limit", "ctx_size")  # decide which answers which prompts get

Record = dict[str, Any]
Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Run:
    """The contents of a run's folder.

    Attributes:
        info: run.json.
        answers: one record per (setup, set, item).
        scores: one record per (score, setup or prompt, set, item).
    """

    directory: Path
    info: Record
    answers: tuple[Record, ...]
    scores: tuple[Record, ...]


def load(directory: str | Path) -> Run:
    """Read a run's folder.

    A last line that a crash cut short is ignored; of records with one identity the last one counts; NaN and infinite
    numbers count as not measured.

    Raises:
        UsageError: the folder holds no run, a newer format, or a broken line (named with file and line number).
    """
    folder = Path(directory)
    path = folder / INFO
    try:
        text = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = (
            "no run.json there"
            if isinstance(error, FileNotFoundError | NotADirectoryError)
            else getattr(error, "strerror", "") or error
        )
        raise UsageError(f"{folder}: no folder of an evaluation ({reason}): give what `acd eval -o` wrote") from None
    info = _parsed(text)
    if info is None:
        raise UsageError(f"{path}: is no JSON object: the run's description is damaged")
    version = info.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise UsageError(f"{path}: has format {version}, this version reads up to {FORMAT}: update acd_local")
    _check_info(path, info)
    answers = {key_of(r): r for r in _lines(folder / ANSWERS, _answer_fault)}
    scores = {key_of(r): r for r in _lines(folder / SCORES, _score_fault)}
    return Run(folder, info, tuple(answers.values()), tuple(scores.values()))


def write_info(directory: Path, info: Record) -> None:
    """Write run.json; raises UsageError, StorageError."""
    replace_file(directory / INFO, json.dumps(info, ensure_ascii=False, indent=1) + "\n")


def key_of(record: Record) -> Key:
    """Tell what an answer or a score is of; of a score, it begins with the score's name.

    Raises:
        KeyError: it is no record of either kind.
    """
    score = record.get("score", "")
    return score, record["prompt" if score == "margin" else "setup"], record["set"], record["item"]


def united_sweep(sweeps: Iterable[Record | None], otherwise: str) -> Record | None:
    """Unite sweeps into one with the values of all, in ascending order; one alone is as it is, and none is None.

    Raises:
        UsageError: `otherwise`, as they sweep different things.
    """
    known = [sweep for sweep in sweeps if sweep]
    if len(known) < 2:
        return known[0] if known else None
    if len({(sweep.get("method"), sweep.get("key")) for sweep in known}) > 1:
        raise UsageError(otherwise)
    values = {name: value for s in known for name, value in zip(s["names"], s["values"], strict=True)}
    names = sorted(values, key=lambda name: float(values[name]))
    return {**known[0], "names": names, "values": [values[name] for name in names]}


def _parsed(line: bytes) -> Record | None:
    try:
        found = json.loads(line.decode("utf-8", "surrogatepass"), parse_constant=lambda _: None, parse_float=_finite)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    return found if isinstance(found, dict) else None


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _check_info(path: Path, info: Record) -> None:
    def check(good: bool, what: str) -> None:
        if not good:
            raise UsageError(f"{path}: {what}: the run's description is damaged")

    check(info.get("format") == FORMAT, f"format is not {FORMAT}")
    for key in ("model", "pair", "options"):
        check(isinstance(info.get(key), dict), f"{key} is missing")
    for key, fields in (("methods", ("name", "setup")), ("sets", ("name", "kind"))):
        entries = info.get(key)
        check(isinstance(entries, list), f"{key} is missing")
        assert isinstance(entries, list)
        for entry in entries:
            good = isinstance(entry, dict) and all(isinstance(entry.get(name), str) for name in fields)
            check(good, f"an entry of {key} has no {' and '.join(fields)}")
        names = [entry["name"] for entry in entries]
        check(len(set(names)) == len(names), f"{key} names one twice")
    for entry in info["sets"]:
        check(isinstance(entry.get("n"), int | None), f"set {entry['name']!r} has no number of prompts")
    sweep = info.get("sweep")
    if sweep is not None:
        parts = sweep if isinstance(sweep, dict) else {}
        swept, values = parts.get("names"), parts.get("values")
        listed = isinstance(swept, list) and isinstance(values, list) and len(swept) == len(values)
        check(listed, "sweep has no names and values")
        assert isinstance(swept, list) and isinstance(values, list)
        good = all(isinstance(n, str) and isinstance(v, int | float) for n, v in zip(swept, values, strict=True))
        check(good, "sweep's names and values are not texts and numbers")


def _lines(path: Path, fault: Callable[[Record], str]) -> Iterator[Record]:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            record = _parsed(line)
            if record is None and not line.endswith(b"\n"):
                return  # the last line, cut short
            wrong = "is no JSON object" if record is None else fault(record)
            if wrong:
                raise UsageError(f"{path}:{number}: {wrong}: remove the line, then run the evaluation again to fill it")
            assert record is not None
            yield record


def _answer_fault(record: Record) -> str:
    return _field_fault(record, ("setup", "set", "item", "prompt", "answer", "label"))


def _score_fault(record: Record) -> str:
    kind = record.get("score")
    if kind not in ("choice", "reference", "fluency", "margin"):
        return f"unknown score {str(kind)[:40]!r}"
    return _field_fault(record, ("prompt" if kind == "margin" else "setup", "set", "item"))


def _field_fault(record: Record, names: Sequence[str]) -> str:
    return next((f"{name} is missing" for name in names if not isinstance(record.get(name), str)), "")
