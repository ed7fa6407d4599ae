"""Reads anchors: the instructions that prompts are tuned on, ours (data/*.jsonl) or the user's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from acd_local.errors import UsageError
from acd_local.files import read_bytes

KINDS = ("harmful", "ordinary", "lookalike")
VALIDATION_SHARE = 8  # one instruction in so many validates
MAX_BYTES = 20_000_000

_DATA = Path(__file__).with_name("data")


@dataclass(frozen=True)
class Instruction:
    """A request.

    Attributes:
        category: what it is about; of a harmful one it chooses the concern that refusals name.
        lookalike: harmless, but looks dangerous.
    """

    prompt: str
    kind: Literal["harmful", "harmless"]
    category: str = ""
    lookalike: bool = False

    @property
    def id(self) -> str:
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:16]

    @property
    def number(self) -> int:
        """Decides by the text alone in which part of the instructions this one is."""
        return int(self.id, 16)

    @property
    def validates(self) -> bool:
        """Whether it is kept out of training."""
        return self.number % VALIDATION_SHARE == 0

    @property
    def group(self) -> str:
        """One of KINDS."""
        if self.kind == "harmful":
            return "harmful"
        return "lookalike" if self.lookalike else "ordinary"


def builtin() -> list[Instruction]:
    """Read our own instructions: broad harmless ones, look-alikes, and short harmful requests."""
    found = []
    for name in ("harmless", "lookalike", "harmful"):
        for line in (_DATA / f"{name}.jsonl").read_text("utf-8").splitlines():
            row, kind = json.loads(line), "harmful" if name == "harmful" else "harmless"
            found.append(Instruction(row["prompt"], kind, row["category"], name == "lookalike"))  # type: ignore[arg-type]
    return found


def digest(instructions: Iterable[Instruction]) -> str:
    """Return the hex SHA-256 over all that they say."""
    rows = [[i.prompt, i.kind, i.category, i.lookalike] for i in instructions]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def validation_groups(instructions: Sequence[Instruction]) -> dict[str, list[Instruction]]:
    """List the instructions that validate, by kind; a user's anchors do not always say which ones look dangerous."""
    found = {kind: [i for i in instructions if i.validates and i.group == kind] for kind in KINDS}
    return found | {"lookalike": found["lookalike"] or found["ordinary"]}


def read(path: Path) -> list[Instruction]:
    """Read a user's anchors: JSON lines of {"prompt": text, "kind": "harmful" or "harmless"}, where they like with a
    "category" (text) and, if harmless, "lookalike" (boolean).

    Raises:
        UsageError: one line with file, line and field; or a kind is missing altogether.
    """
    data = read_bytes(path, MAX_BYTES, "anchors are short requests")
    found: dict[str, Instruction] = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            instruction = _instruction(line, f"{path}: line {number}")
            found.setdefault(instruction.prompt, instruction)
    for kind in ("harmful", "harmless"):
        for what, wanted in (("to train on", False), ("to validate with", True)):
            if not any(i.kind == kind and i.validates == wanted and not i.lookalike for i in found.values()):
                raise UsageError(
                    f"{path}: no {kind} instruction {what}: give at least 50 of each kind, look-alikes apart"
                )
    return list(found.values())


def _instruction(line: bytes, place: str) -> Instruction:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise UsageError(f'{place}: not JSON: write {{"prompt": "...", "kind": "harmful" or "harmless"}}') from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise UsageError(f"{place}: prompt: must be a text that is not empty")
    try:
        row["prompt"].encode()
    except UnicodeEncodeError:
        raise UsageError(f"{place}: prompt: holds half a surrogate pair, which is no text") from None
    if row.get("kind") not in ("harmful", "harmless"):
        raise UsageError(f"{place}: kind: must be harmful or harmless")
    category = row.get("category", "")
    if not isinstance(category, str):
        raise UsageError(f"{place}: category: must be a text")
    lookalike = row.get("lookalike", False)
    if not isinstance(lookalike, bool):
        raise UsageError(f"{place}: lookalike: must be true or false")
    if lookalike and row["kind"] == "harmful":
        raise UsageError(f"{place}: lookalike: only a harmless instruction can look dangerous and not be")
    return Instruction(row["prompt"].strip(), row["kind"], category, lookalike)
