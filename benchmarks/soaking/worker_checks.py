"""Holds a worker's events to its protocol (docs/worker.md)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from soaking.checks import FINISHED, Found, check_counts, check_text, check_told, shown
from soaking.load import Asked, Json


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
    """What was sent to a worker, and what it said of it.

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
        cancelled = finish == "cancelled" and one.cancelled
        if asked.ends == "refused" and not cancelled:
            problems.append(f"answered, and not refused: {shown(asked.fields)}")
        if finish not in FINISHED and not cancelled:
            problems.append(f"finish_reason is {finish}")
        if one.text != text:
            problems.append(f"the deltas are {one.text!r}, the text is {text!r}")
        self._found.answered(event, event["usage"])
        problems += self._found.strangers(asked, text) + check_text(asked, text, finish)
        traced = one.traced if asked.fields.get("trace") and finish != "cancelled" else None
        tokens, positions = event["usage"]["completion_tokens"], event["contrast"]["positions"]
        if traced is not None:
            problems += check_told("".join(token["text"] for token in traced), text, finish)
        return problems + check_counts(asked, tokens=tokens, positions=positions, traced=traced)
