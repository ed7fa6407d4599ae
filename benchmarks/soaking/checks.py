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


def check_counts(asked: Asked, *, tokens: int, positions: int, traced: Sequence[Json] | None, text: str) -> list[str]:
    """What is wrong with an answer's counts and its trace; `traced` None: there was none."""
    problems, most = [], asked.fields.get("max_tokens")
    if most is not None and tokens > most:
        problems.append(f"{tokens} tokens, where {most} were the most")
    if traced is None:
        return problems
    if len(traced) != positions:
        problems.append(f"{len(traced)} tokens were traced of {positions}")
    told = "".join(token["text"] for token in traced)
    if "\ufffd" not in told + text and not told.startswith(text):
        problems.append(f"the trace says {told!r}, the text is {text!r}")
    return problems


# --- The worker -------------------------------------------------------------------------------------------------------


@dataclass
class _Open:
    """A request that has not ended."""

    asked: Asked
    events: int = 0
    cancelled: bool = False
    queued: bool = False
    started: bool = False
    text: str = ""
    traced: list[Json] = field(default_factory=list)


@dataclass(frozen=True)
class Told:
    """What an event did: to which request, how many events it had by then, and whether it was its end."""

    asked: Asked
    events: int
    ended: bool


class Ledger:
    """Holds a worker's events to its protocol: docs/worker.md.

    Args:
        found: where faults and counts go.
    """

    def __init__(self, found: Found) -> None:
        self._found = found
        self._open: dict[str | int, _Open] = {}
        self._lines: dict[int, tuple[Asked, bool]] = {}  # lines that an error may speak of, and whether it has to
        self._left: Counter[int] = Counter()  # errors that are still to come, by request

    @property
    def waiting(self) -> int:
        """Requests and lines that something has to be said of."""
        return len(self._open) + sum(must for _, must in self._lines.values())

    def open(self) -> list[Asked]:
        """Requests that have not ended."""
        return [one.asked for one in self._open.values() if one.asked.ends != "pong"]

    def sent(self, asked: Asked, first: int) -> int:
        """Note a request down that is sent as the lines from number `first` on; returns the next line's number."""
        self._found.sent(asked)
        count = b"".join(asked.parts).count(b"\n")
        if asked.ends == "line":
            self._lines |= {first + i: (asked, True) for i in range(count)}
            self._left[asked.number] = count
        else:
            self._open[asked.fields["id"]] = _Open(asked)
            if count > 1:
                self._lines[first + 1] = (asked, True)  # the second line with this id
                self._left[asked.number] = 1
        return first + count

    def cancelled(self, asked: Asked, line: int) -> None:
        """Note a cancel down: where it comes too late there is an error."""
        for one in self._open.values():
            one.cancelled = one.cancelled or one.asked is asked
        self._lines[line] = (asked, False)

    def told(self, event: Json) -> Told | None:
        """Take an event; None: it is no request's."""
        kind, identity = event.get("event"), event.get("id")
        if kind == "error" and event.get("final") is False:
            return self._line(event)
        one = self._open.get(identity) if isinstance(identity, str | int) else None
        if one is None:
            self._found.fault(None, f"an event of no request that is open: {shown(event)}")
            return None
        one.events += 1
        ended = event.get("final") is True or kind == "pong"
        for problem in self._end(one, event) if ended else self._step(one, event):
            self._found.fault(one.asked, problem)
        if ended:
            del self._open[identity]
        return Told(one.asked, one.events, ended)

    def finish(self) -> None:
        """The output has ended: whatever was not ended is a fault."""
        for one in self._open.values():
            self._found.fault(one.asked, f"no final event; {one.events} events, text {one.text[-200:]!r}")
        for line, (asked, must) in self._lines.items():
            if must:
                self._found.fault(asked, f"no error for line {line}")
        self._open.clear()
        self._lines.clear()

    def _line(self, event: Json) -> Told | None:
        asked, _ = self._lines.pop(event.get("line", -1), (None, False))
        if asked is None:
            self._found.fault(None, f"an error of a line that was right, or the second one: {shown(event)}")
            return None
        if event["code"] != "usage":
            self._found.fault(asked, f"a line's error: {shown(event)}")
        self._found.seen["errors of lines"] += 1
        if not self._left[asked.number]:
            return None  # a cancel's
        self._left[asked.number] -= 1
        done = asked.ends == "line" and not self._left[asked.number]
        if done:
            self._found.ended(asked, "error of its line")
        return Told(asked, 1, done)

    def _step(self, one: _Open, event: Json) -> list[str]:
        kind, problems = event["event"], []
        if one.asked.ends == "pong":
            problems.append(f"a ping's event is {shown(event)}")
        if kind == "queued":
            problems += ["queued twice, or late"] if one.events > 1 else []
            one.queued = True
        elif not one.queued:
            problems.append(f"{kind} before queued")
        if kind == "started":
            problems += ["started twice"] if one.started else []
            one.started = True
        elif kind == "token":
            problems += [] if one.started else ["a token before started"]
            problems += [] if event["text"] else ["an empty token"]
            one.text += event["text"]
        elif kind == "trace":
            one.traced.append(event)
        elif kind not in ("queued", "gate", "dropped", "progress"):
            problems.append(f"an unknown event: {shown(event)}")
        return problems

    def _end(self, one: _Open, event: Json) -> list[str]:
        asked, kind = one.asked, event["event"]
        if kind == "pong" or asked.ends == "pong":
            self._found.ended(asked, kind)
            return [] if kind == asked.ends else [f"the end of {asked.kind} is {shown(event)}"]
        if kind == "error":
            self._found.ended(asked, f"error: {event['code']}")
            good = asked.ends in ("refused", "either") and event["code"] in asked.codes and not one.text
            return [] if good else [f"ended in {shown(event)}"]
        if kind != "done":
            return [f"an unknown end: {shown(event)}"]
        self._found.ended(asked, event["finish_reason"])
        return self._done(one, event)

    def _done(self, one: _Open, event: Json) -> list[str]:
        asked, text, finish = one.asked, event["text"], event["finish_reason"]
        problems = [] if one.queued else ["done, but never queued"]
        if asked.ends == "refused":
            problems.append(f"answered, and not refused: {shown(asked.fields)}")
        if finish not in FINISHED and not (finish == "cancelled" and one.cancelled):
            problems.append(f"finish_reason is {finish}")
        if one.text != text:
            problems.append(f"the deltas are {one.text!r}, the text is {text!r}")
        self._found.answered(event, event["usage"])
        problems += self._found.strangers(asked, text) + check_text(asked, text, finish)
        traced = one.traced if asked.fields.get("trace") and finish != "cancelled" else None
        tokens, positions = event["usage"]["completion_tokens"], event["contrast"]["positions"]
        return problems + check_counts(asked, tokens=tokens, positions=positions, traced=traced, text=text)


# --- The server -------------------------------------------------------------------------------------------------------


def check_error(asked: Asked, status: int, body: bytes) -> list[str]:
    """What is wrong with a response that is an error."""
    try:
        error = json.loads(body)["error"]
        whole = set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    except (ValueError, LookupError, TypeError):
        return [f"status {status} without an error: {body[:200]!r}"]
    problems = [] if whole else [f"an error that is not whole: {shown(error)}"]
    if not (400 <= status < 500) or (error["code"] not in asked.codes and status != 429):
        problems.append(f"status {status}: {shown(error)}")
    return problems


def check_whole(asked: Asked, body: bytes, found: Found) -> list[str]:
    """What is wrong with an answer in one piece."""
    try:
        answer = json.loads(body, parse_constant=_refuse)
        choice, about, usage = answer["choices"][0], answer["acd"], answer["usage"]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        return _answer(asked, text, choice["finish_reason"], about, about.get("trace"), usage, found)
    except (ValueError, LookupError, TypeError) as error:
        return [f"{type(error).__name__}: {error}: {body[:300]!r}"]


def check_stream(asked: Asked, body: bytes, found: Found) -> list[str]:
    """What is wrong with the whole body of a stream."""
    try:
        *events, done, rest = body.decode().split("\n\n")
        if (done, rest) != ("data: [DONE]", ""):
            return [f"the stream ends in {body[-200:]!r}"]
        records = [
            json.loads(event.removeprefix("data: "), parse_constant=_refuse)
            for event in events
            if not event.startswith(":")
        ]
        return _records(asked, records, found)
    except (ValueError, LookupError, TypeError) as error:
        return [f"{type(error).__name__}: {error}: {body[-300:]!r}"]


def _records(asked: Asked, records: Sequence[Json], found: Found) -> list[str]:
    if bad := [record for record in records if "error" in record]:
        return [f"an error in the stream: {shown(bad[0])}"]
    problems = []
    if len({record["id"] for record in records}) != 1:
        problems.append("chunks of several ids")
    usage = records[-1]["usage"] if (asked.fields.get("stream_options") or {}).get("include_usage") else None
    choices = [choice for record in records for choice in record["choices"]]
    said = "".join(choice["delta"].get("content", "") if "delta" in choice else choice["text"] for choice in choices)
    ends = [choice["finish_reason"] for choice in choices if choice["finish_reason"] is not None]
    last = [record["acd"] for record in records if "finish_reason" in record.get("acd", {})]
    if len(ends) != 1 or len(last) != 1 or choices[-1]["finish_reason"] is None:
        return [*problems, f"{len(ends)} finish reasons, {len(last)} records of the answer"]
    traced = [token for record in records for token in record.get("acd", {}).get("trace", [])]
    return problems + _answer(
        asked, said, ends[0], last[0], traced if asked.fields.get("trace") else None, usage, found
    )


def _answer(
    asked: Asked, text: str, ended: str, about: Json, traced: list[Json] | None, usage: Json | None, found: Found
) -> list[str]:
    """`ended`: the finish reason in OpenAI's words. `usage`: None where it was not asked for."""
    finish, positions = about["finish_reason"], about["contrast"]["positions"]
    problems = [f"answered, and not refused: {shown(asked.fields)}"] if asked.ends == "refused" else []
    if finish not in FINISHED or ended != ("length" if finish == "length" else "stop"):
        problems.append(f"finish_reason is {ended}, of {finish}")
    found.answered(about, usage or {"completion_tokens": positions, "prompt_tokens": 0})
    tokens = positions if usage is None else usage["completion_tokens"]
    problems += found.strangers(asked, text) + check_text(asked, text, finish)
    return problems + check_counts(asked, tokens=tokens, positions=positions, traced=traced, text=text)


def shown(value: object) -> str:
    """As JSON, but not more of it than a line holds."""
    if isinstance(value, dict) and len(str(value.get("id"))) > 40:
        value = value | {"id": f"{value['id'][:10]}..."}
    return json.dumps(value, ensure_ascii=False, default=str)[:300]


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number")
