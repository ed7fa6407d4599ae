"""What a chat shows, and its plain form for pipes and simple terminals (chat_rich.py has the other one)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self, TextIO

from acd_local.cli.chat_why import Span, as_text
from acd_local.cli.progress import StatusLine
from acd_local.cli.shell import one_line, say
from acd_local.runtime.text import disarm

PROGRAM = "acd-chat"


class Writer(Protocol):
    """One answer while it is streamed. Leaving it without `finish` (an error) shows what there was."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def wait(self, text: str) -> None:
        """Say what is going on before the first text comes; it takes no room afterwards."""

    def write(self, text: str) -> None: ...
    def finish(self, mark: str | None = None) -> None: ...


class CompareWriter(Protocol):
    """Two answers to one question, streamed one after the other."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def wait(self, text: str) -> None: ...
    def write(self, column: int, text: str) -> None: ...
    def finish(self, note: str) -> None: ...


class View(Protocol):
    """Everything that a chat prints goes through here and is disarmed here."""

    def notice(self, line: str) -> None:
        """Show one line that is no part of the conversation: what a command did, an error."""

    def output(self, text: str) -> None:
        """Show the text that a command was asked for."""

    def why(self, header: str, found: Sequence[Span]) -> None:
        """Show an answer with its changed tokens marked."""

    def turn(self, question: str, answer: str) -> None:
        """Show an earlier question and its answer, where somebody looks at the screen."""

    def answer(self) -> Writer: ...

    def compare(self, labels: Sequence[str]) -> CompareWriter: ...


class PlainView:
    """Answers and what commands were asked for on `out`, an empty line between them; notices on stderr."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._first = True

    def notice(self, line: str) -> None:
        say(f"{PROGRAM}: {one_line(line)}")

    def output(self, text: str) -> None:
        self.begin()
        self.put(disarm(text).rstrip("\n") + "\n")

    def why(self, header: str, found: Sequence[Span]) -> None:
        self.output(f"{header}\n{as_text(found)}")

    def turn(self, question: str, answer: str) -> None:
        pass

    def answer(self) -> Writer:
        return _PlainWriter(self)

    def compare(self, labels: Sequence[str]) -> CompareWriter:
        return _PlainCompare(self, labels)

    def begin(self) -> None:
        if not self._first:
            self.put("\n")
        self._first = False

    def put(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


class _PlainWriter:
    """Exactly one newline after the answer, whatever the model wrote there."""

    def __init__(self, view: PlainView, label: str = "") -> None:
        self._view = view
        self._label = label
        self._held = ""
        self._begun = False
        self._status = StatusLine()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._status.clear()
        if self._begun:
            self._begun = False
            self._view.put("\n")

    def wait(self, text: str) -> None:
        self._status.show(text)

    def write(self, text: str) -> None:
        text = self._held + disarm(text)
        body = text.rstrip("\n")
        self._held = text[len(body) :]
        if body:
            self._begin()
            self._view.put(body)

    def finish(self, mark: str | None = None) -> None:
        self._begin()
        self.__exit__()
        if mark is not None:
            self._view.notice(mark)

    def _begin(self) -> None:
        self._status.clear()
        if not self._begun:
            self._begun = True
            self._view.begin()
            self._view.put(self._label)


class _PlainCompare:
    def __init__(self, view: PlainView, labels: Sequence[str]) -> None:
        self._view = view
        self._writers = [_PlainWriter(view, f"--- {label} ---\n") for label in labels]
        self._current: _PlainWriter | None = None
        self._status = StatusLine()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._status.clear()
        if self._current is not None:
            self._current.__exit__()

    def wait(self, text: str) -> None:
        self._status.show(text)

    def write(self, column: int, text: str) -> None:
        self._status.clear()
        writer = self._writers[column]
        if writer is not self._current:
            if self._current is not None:
                self._current.finish()
            self._current = writer
        writer.write(text)

    def finish(self, note: str) -> None:
        self._status.clear()
        if self._current is not None:
            self._current.finish()
            self._current = None
        self._view.notice(note)
