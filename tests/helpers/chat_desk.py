"""Chats in this process, as processes and as plain text."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from acd_local import Engine, Options
from acd_local.cli.chat_app import ChatApp
from acd_local.cli.chat_loop import handle
from acd_local.cli.chat_view import PlainView

MAIN = "from acd_local.cli.chat import main; main()"
PAIR = 'format = 1\nname = "{name}"\nsafe = "{safe}"\nadversarial = "A demon answers."\nalpha = 0.4\n'


class NoSignals:
    @contextmanager
    def answering(self, cancel: Callable[[], None]) -> Iterator[None]:
        yield


class Desk:
    """A chat in this process: `type` returns what one line put on stdout and on stderr."""

    def __init__(self, engine: Engine, capsys: pytest.CaptureFixture[str], **options: object) -> None:
        self.capsys = capsys
        chosen = Options().replace({"max_tokens": 12, "temp": 0.0} | options)
        self.out = io.StringIO()
        self.app = ChatApp(engine, PlainView(self.out), NoSignals(), chosen, None)

    def type(self, line: str) -> tuple[str, str]:
        self.capsys.readouterr()
        start = self.out.tell()
        assert handle(self.app, line)
        return self.out.getvalue()[start:], self.capsys.readouterr().err


def chat(model: Path, text: str, *flags: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", MAIN, str(model), "--threads", "1", "-n", "12", "--temp", "0", *flags]
    return subprocess.run(arguments, input=text, capture_output=True, text=True, timeout=60, encoding="utf-8")


class PlainAnswer:
    """What the pipe shows of an answer."""

    def __init__(self, text: str) -> None:
        out = io.StringIO()
        with PlainView(out).answer() as writer:
            writer.write(text)
            writer.finish()
        self.text = out.getvalue()
