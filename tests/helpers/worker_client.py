"""Starts workers and talks to them as a client would."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from typing import Any

from places import child_env
from processes import kill

MAIN = "from acd_local.cli.run import main; main()"
PAIR = 'format = 1\nname = "{}"\nsafe = "You are {}."\nadversarial = "A demon answers."\n'
ENDLESS = 'root ::= "a" root'

Event = dict[str, Any]


class Client:
    """A worker process and its events."""

    def __init__(self, *args: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=child_env(),
        )
        self.raw: list[bytes] = []
        self._events: queue.Queue[Event | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.raw.append(line)
            self._events.put(json.loads(line))
        self._events.put(None)

    def send(self, *lines: object) -> None:
        """Requests as objects, or raw bytes; all in one write."""
        assert self.process.stdin is not None
        raw = b"".join(x if isinstance(x, bytes) else json.dumps(x).encode() + b"\n" for x in lines)
        self.process.stdin.write(raw)
        self.process.stdin.flush()

    def event(self) -> Event | None:
        """The next event; None when the worker closed its stdout."""
        event = self._events.get(timeout=60)
        if event is None:
            self._events.put(None)
        return event

    def ready(self) -> Event:
        """The first event after the signs of loading."""
        while (event := self.event()) is not None and event["event"] == "loading":
            assert set(event) == {"event", "phase", "progress"} and event["phase"] in ("check", "model")
            assert 0 <= event["progress"] <= 1
        assert event is not None
        assert event["event"] == "ready"
        return event

    def until(self, what: str, request_id: object) -> list[Event]:
        """Events up to the first of this kind of this request."""
        events = []
        while (event := self.event()) is not None:
            events.append(event)
            if event["event"] == what and event["id"] == request_id:
                return events
        raise AssertionError(f"the worker ended: {events}")

    def until_last(self, request_id: object) -> list[Event]:
        """Events up to the done or error event of this request."""
        events = []
        while (event := self.event()) is not None:
            events.append(event)
            if event["event"] in ("done", "error") and event["id"] == request_id:
                assert event["final"] or "line" in event
                return events
        raise AssertionError(f"the worker ended: {events}")

    def ask(self, **request: Any) -> Event:
        """Send a request, wait for its last event."""
        self.send(request := {"id": "q", **request})
        return self.until_last(request["id"])[-1]

    def end(self) -> tuple[int, list[Event], bytes]:
        """Close its stdin: exit code, the events that were left, stderr."""
        process = self.process
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.close()
        left = []
        while (event := self.event()) is not None:
            left.append(event)
        return process.wait(30), left, process.stderr.read()

    def kill(self) -> None:
        kill(self.process)
