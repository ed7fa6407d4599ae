"""Where a chat's messages come from. Here: lines of a pipe; chat_prompt.py has the prompt with editing and history."""

from __future__ import annotations

from typing import IO, Protocol, TextIO

from acd_local.errors import UsageError

PROMPT = "> "


class Source(Protocol):
    def read(self, draft: str = "") -> str | None:
        """Return the next message, None at the end.

        Args:
            draft: text to begin with, where it can be edited.

        Raises:
            KeyboardInterrupt: Ctrl-C with nothing typed.
            UsageError: what came is no text.
        """


class LineSource:
    """One message per line of a pipe, a file, or a terminal too simple to edit on."""

    def __init__(self, stream: IO[bytes], prompt_on: TextIO | None = None) -> None:
        self._stream = stream
        self._prompt_on = prompt_on
        self._number = 0

    def read(self, draft: str = "") -> str | None:
        if self._prompt_on is not None:
            self._prompt_on.write(PROMPT)
            self._prompt_on.flush()
        try:
            line = self._stream.readline()
        except KeyboardInterrupt:
            if self._prompt_on is not None:
                self._prompt_on.write("\n")
            raise
        if not line:
            return None
        self._number += 1
        try:
            return line.decode("utf-8-sig" if self._number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise UsageError(f"line {self._number} of the input is not UTF-8 text: left out") from None
