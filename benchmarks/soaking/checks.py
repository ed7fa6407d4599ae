"""Checks what came of requests: one end each, a text that is what was streamed, and nothing of others."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from soaking.load import Asked, Json

MARK = re.compile(r"zq[0-9a-f]{10}")
FINISHED = ("stop", "stop_string", "length")


@dataclass(frozen=True)
class Fault:
    """What was not as it should be. `number`, `kind`: of the request; None and "" where it is no request's."""

    number: int | None
    kind: str
    text: str


@dataclass
class Found:
    """What came of a run.

    Attributes:
        ends: of requests, by kind and end.
        seen: counts of whatever else is told.
        faults: in the order in which they were noticed.
        issued: all marks that were sent.
    """

    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    issued: set[str] = field(default_factory=set)

    def fault(self, asked: Asked | None, text: str) -> None:
        self.faults.append(Fault(asked and asked.number, asked.kind if asked else "", text[:600]))

    def sent(self, asked: Asked) -> None:
        self.issued |= asked.marks

    def ended(self, asked: Asked, end: str, problems: Iterable[str] = ()) -> None:
        """Count a request, and what is wrong with its end."""
        self.ends[asked.kind, end] += 1
        for problem in problems:
            self.fault(asked, problem)

    def strangers(self, asked: Asked, text: str) -> list[str]:
        """What of other requests is in a text."""
        others = {one for one in MARK.findall(text) if one in self.issued} - asked.marks
        return [f"the answer holds {', '.join(sorted(others))}, of another request: {text!r}"] if others else []

    def answered(self, record: Mapping[str, Any], usage: Mapping[str, int]) -> None:
        """Count what an answer tells of how it was made: the worker's record, or the server's `acd`."""
        timings, gate = record["timings"], record["gate"]
        self.seen["answer tokens"] += usage["completion_tokens"]
        self.seen["prompt tokens"] += usage["prompt_tokens"]
        self.seen["drafted tokens"] += timings["drafted"]
        self.seen["drafted tokens, right"] += timings["accepted"]
        self.seen["contrasted positions"] += record["contrast"]["compared"]
        self.seen["answers: " + (gate["decision"] + " by the gate" if gate else "no gate")] += 1


def check_text(asked: Asked, text: str, finish: str) -> list[str]:
    """What is wrong with an answer's text by what was asked for. `finish`: in our words."""
    problems = []
    stops = asked.fields.get("stop") or ()
    for stop in (stops,) if isinstance(stops, str) else stops:
        if stop in text:
            problems.append(f"the stop string {stop!r} is in {text!r}")
    if asked.form == "grammar" and not (text.startswith(asked.mark) or asked.mark.startswith(text)):
        problems.append(f"the grammar's answer is {text!r}")
    if asked.form == "schema" and finish == "stop":
        try:
            good = json.loads(text)["mark"] == asked.mark
        except (ValueError, LookupError, TypeError):
            good = False
        if not good:
            problems.append(f"the schema's answer is {text!r}")
    return problems


def check_told(told: str, text: str, finish: str) -> list[str]:
    """What is wrong with the texts of an answer's tokens. `told`: of all of them, joined."""
    same = told.startswith(text) if finish == "stop_string" else told == text
    # A token may hold a part of a character, which is no text on its own.
    return [] if same or "\ufffd" in told + text else [f"the tokens say {told!r}, the text is {text!r}"]


def check_counts(asked: Asked, *, tokens: int, positions: int, traced: Sequence[Json] | None) -> list[str]:
    """What is wrong with an answer's counts; `traced` None: there was no trace."""
    problems, most = [], asked.fields.get("max_tokens")
    if most is not None and tokens > most:
        problems.append(f"{tokens} tokens, where {most} were the most")
    if traced is not None and len(traced) != positions:
        problems.append(f"{len(traced)} tokens were traced of {positions}")
    return problems


def shown(value: object) -> str:
    """As JSON, but not more of it than a line holds."""
    if isinstance(value, dict) and len(str(value.get("id"))) > 40:
        value = value | {"id": f"{value['id'][:10]}..."}
    return json.dumps(value, ensure_ascii=False, default=str)[:300]
