"""acd-chat on a pseudo terminal, and its prompt."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chat_desk import MAIN
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from acd_local.cli.chat_commands import completions
from acd_local.cli.chat_prompt import CommandCompleter, History

# --- The prompt -------------------------------------------------------------------------------------------------------


def completed(text: str) -> list[str]:
    found = CommandCompleter(completions()).get_completions(Document(text), CompleteEvent())
    return [text[: len(text) + c.start_position] + c.text for c in found]


def test_completion(tmp_path: Path) -> None:
    assert completed("/co") == ["/compare"] and completed("/s") == ["/system", "/stats", "/save"]
    assert completed("/pair def") == ["/pair default"]
    (tmp_path / "talk.json").touch()
    assert completed(f"/load {tmp_path}/ta") == [f"/load {tmp_path}/talk.json"]
    assert completed("how") == completed("//") == completed("/alpha ") == []


def test_history_is_private_and_never_in_the_way(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "history"
    history = History(path)
    history.append_string("two\nlines")
    history.append_string("bad \ud800")
    assert path.stat().st_mode & 0o077 == 0
    assert list(History(path).load_history_strings()) == ["bad ?", "two\nlines"]
    blocked = History(path / "not" / "a" / "folder")
    blocked.append_string("x")
    assert list(blocked.load_history_strings()) == []


# --- On a terminal ----------------------------------------------------------------------------------------------------

ENDLESS = 'root ::= [a-z] " "? root'  # no answer ends by itself
SOME_ANSWER = "(?:[a-z] ?){20}"  # some of it: a screen that is drawn anew has long runs of spaces


class Terminal:
    """acd-chat on a pseudo terminal."""

    def __init__(self, *arguments: str) -> None:
        pty = pytest.importorskip("pty")
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
            os.execve(sys.executable, [sys.executable, "-c", MAIN, *arguments], environment)
        self.seen = ""

    def wait_for(self, pattern: str) -> None:
        """Read until `pattern` appears after what was waited for before."""
        deadline = time.monotonic() + 40
        while not (match := re.search(pattern, self.seen)):
            if time.monotonic() > deadline or not select.select([self.fd], [], [], deadline - time.monotonic())[0]:
                raise AssertionError(f"no {pattern!r} in {self.seen[-500:]!r}")
            try:
                got = os.read(self.fd, 65536)
                if b"\x1b[6n" in got:  # where is the cursor?
                    os.write(self.fd, b"\x1b[1;1R")
                self.seen += got.decode("utf-8", "replace")
            except OSError:
                raise AssertionError(f"ended without {pattern!r}: {self.seen[-500:]!r}") from None
        self.seen = self.seen[match.end() :]

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def exit_code(self) -> int:
        """Of the process that ends now."""
        try:
            while os.read(self.fd, 65536):
                pass
        except OSError:
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self.fd)


@pytest.fixture
def on_terminal(tiny: Callable[..., Path], pair_file: Path) -> Iterator[Terminal]:
    model = tiny("chatml", n_ctx=32768)
    flags = ["--pair", str(pair_file), "--ctx-size", "32768", "--threads", "1", "--grammar", ENDLESS]
    with Terminal(str(model), *flags) as terminal:
        yield terminal


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(on_terminal: Terminal, tmp_path: Path) -> None:
    t, saved = on_terminal, tmp_path / "chat.json"
    t.wait_for("/help lists commands")
    t.wait_for("alpha 0.4")  # the bottom line: the prompt is there
    for question in ("What is blue?", "And\x1b\rred?"):  # Alt-Enter begins a new line
        t.type(f"{question}\r")
        t.wait_for("…")
        t.wait_for(SOME_ANSWER)
        t.type("\x03")
        t.wait_for(r"\(stopped\)")
        t.wait_for("tokens/s")
    t.type("\x03")
    t.wait_for("Ctrl-D or /exit leaves the chat")
    t.type(f"/save {saved}\r")
    t.wait_for("saved 4 messages")
    t.type("/exit\r")
    assert t.exit_code() == 0
    messages = [m["content"] for m in json.loads(saved.read_text())["messages"]]
    assert messages[0::2] == ["What is blue?", "And\nred?"] and all(messages[1::2])


def test_sigterm_ends_the_chat_during_an_answer(on_terminal: Terminal) -> None:
    t = on_terminal
    t.wait_for("alpha 0.4")
    t.type("What is blue?\r")
    t.wait_for("…")
    t.wait_for(SOME_ANSWER)
    os.kill(t.pid, signal.SIGTERM)
    assert t.exit_code() == 143


def test_sigterm_ends_the_chat_at_the_prompt(on_terminal: Terminal) -> None:
    on_terminal.wait_for("alpha 0.4")
    os.kill(on_terminal.pid, signal.SIGTERM)
    assert on_terminal.exit_code() == 143


def test_a_long_prompt_gives_signs_of_life(tiny: Callable[..., Path], pair_file: Path) -> None:
    model = tiny("chatml", n_embd=256, n_layers=4, n_ctx=4096)
    flags = ["--pair", str(pair_file), "--ctx-size", "4096", "--threads", "1", "--max-tokens", "3"]
    with Terminal(str(model), *flags) as t:
        t.wait_for("alpha 0.4")
        t.type("the water is blue and the wine is red " * 80 + "\r")
        t.wait_for("…")
        t.wait_for(r"reading the prompt \d+%")
        t.wait_for("tokens/s")
        t.type("/exit\r")
        assert t.exit_code() == 0
