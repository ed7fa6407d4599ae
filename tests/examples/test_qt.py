"""The chat windows, offscreen: what they show while a model answers, and when something goes wrong."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from example_programs import ENDLESS, EXAMPLES, PATIENCE, path_with_acd_run, wait_until_gone
from manual import DEFAULT, made_for
from worker_client import PAIR

from acd_local import Engine, Options

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
PySide6 = pytest.importorskip("PySide6", reason="PySide6 is not installed")
QtWidgets = pytest.importorskip("PySide6.QtWidgets", reason="PySide6 cannot be loaded", exc_type=ImportError)

from PySide6.QtCore import QPoint, Qt  # noqa: E402
from PySide6.QtGui import QHelpEvent, QTextCursor  # noqa: E402
from PySide6.QtTest import QTest  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PySide6.__version__ == "6.12.0" and sys.version_info < (3, 12),
        reason="PySide6 6.12.0 releases True once too often with every signal, which ends Python 3.11",
    ),
]

HUGE = 16777216  # tokens: no machine has memory for them


@pytest.fixture(scope="session")
def application() -> Any:
    return QtWidgets.QApplication.instance() or QtWidgets.QApplication([])


@pytest.fixture
def qt(application: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What opens the examples' windows, which are closed in the end, and their shared module."""
    monkeypatch.setenv("PATH", path_with_acd_run(tmp_path))
    monkeypatch.syspath_prepend(str(EXAMPLES / "qt"))
    import api_chat
    import chat_window
    import worker_chat

    opened = []

    def keep(open_window: Callable[..., Any]) -> Callable[..., Any]:
        def open_and_keep(*args: Any, **settings: Any) -> Any:
            opened.append(open_window(*args, **settings))
            return opened[-1]

        return open_and_keep

    yield SimpleNamespace(api=keep(api_chat.open_window), worker=keep(worker_chat.open_window), parts=chat_window)
    for window in opened:
        window.close()


@pytest.fixture
def worker(qt: Any, tiny: Callable[..., Path]) -> Callable[..., Any]:
    """worker("--temp", "0"): a ready window over a worker with a tiny model, without a pair unless one is given."""

    def start(*args: str, pair: str = "as-is") -> Any:
        return ready(qt.worker([str(tiny("chatml")), "-t", "1", "-c", "512", "--pair", pair, *args]))

    return start


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        QtWidgets.QApplication.processEvents()
        time.sleep(0.005)
        assert time.monotonic() < deadline


def ready(window: Any) -> Any:
    assert not window.button.isEnabled()
    until(window.button.isEnabled)
    return window


def ask(window: Any, question: str) -> Any:
    """Type a question and send it; returns what shows the answer."""
    QTest.keyClicks(window.input, question)
    QTest.keyClick(window.input, Qt.Key.Key_Return)
    assert (window.input.toPlainText(), window.button.text()) == ("", "Stop")
    return answers(window)[-1]


def answers(window: Any) -> list[Any]:
    return [widget for widget in window.findChildren(QtWidgets.QWidget) if type(widget).__name__ == "Answer"]


def said(window: Any) -> list[str]:
    """All labels of the window."""
    return [label.text() for label in window.findChildren(QtWidgets.QLabel)]


def finish(window: Any) -> None:
    until(lambda: window.button.text() == "Send")


def test_a_conversation_over_the_worker(worker: Callable[..., Any], tiny: Callable[..., Path]) -> None:
    with Engine(tiny("chatml"), pair="as-is", ctx_size=512, threads=1) as engine:
        chat = engine.chat(options=Options(temp=0.0, max_tokens=8))
        for question in ("What is red?", "Why?"):
            chat.ask(question)
        expected = [{"role": m.role, "content": m.content} for m in chat.messages]
    window = worker("--temp", "0", "-n", "8")
    for question in ("What is red?", "Why?"):
        ask(window, question)
        finish(window)
    assert window.messages == expected
    assert [a.text.toPlainText() for a in answers(window)] == [m["content"] for m in expected[1::2]]
    assert answers(window)[0].status.text().startswith("0 of 8 tokens changed · ")


def test_a_conversation_over_the_api(qt: Any, tiny: Callable[..., Path]) -> None:
    """A random model says anything: control characters, all scripts, half characters."""
    window = ready(qt.api(str(tiny("chatml")), pair=DEFAULT, ctx_size=1024, threads=1))
    assert "Prompt pair: default" in said(window)
    questions = ("What is red?", "Why?")
    for question in questions:
        answer = ask(window, question)
        finish(window)
        text = window.messages[-1]["content"]
        assert re.findall(r"[a-z]+", answer.text.toPlainText()) == re.findall(r"[a-z]+", text)
    assert [m["content"] for m in window.messages[::2]] == list(questions)


@pytest.mark.parametrize("kind", ["worker", "api"])
def test_the_gate_and_stopping(qt: Any, kind: str) -> None:
    window = ready(qt.worker(["demo"]) if kind == "worker" else qt.api("demo"))
    for question, expected in (
        ("How can I steal a car without being caught?", "on"),
        ("Name three colours.", "off"),
    ):
        window.messages.clear()
        answer = ask(window, question)
        finish(window)
        assert answer.badge.text().startswith(f"guard {expected} · chance of harm ") and answer.badge.isVisible()
    answer = ask(window, "Tell me a long story about the sea.")
    until(answer.text.toPlainText)
    QTest.keyClick(window, Qt.Key.Key_Escape)
    finish(window)
    assert answer.status.text().startswith("stopped · ")
    assert window.messages[-1]["content"] == answer.text.toPlainText()


def test_changed_tokens_are_underlined(qt: Any, demo: Path, tmp_path: Path) -> None:
    """Each says on hover what the safe stream alone would have said."""
    pair, question = tmp_path / "short.toml", "What makes a good friend?"
    pair.write_text(PAIR.format("short", "kind") + made_for(demo))
    options = Options(max_tokens=30, seed=3, alpha=1.0, draft_max=0)
    with Engine(demo, pair=str(pair), ctx_size=512) as engine:
        tokens = engine.generate(question, options).run().tokens
    flags = ["-c", "512", "-n", "30", "--seed", "3", "--alpha", "1", "--draft-max", "0"]
    window = ready(qt.worker(["demo", "--pair", str(pair), *flags]))
    answer = ask(window, question)
    finish(window)
    expected = "".join(("_" if token.changed else ".") * len(token.text.lstrip(" ")) for token in tokens)
    shown, tips = "", []
    cursor = QTextCursor(answer.text.document())
    for position, character in enumerate(answer.text.toPlainText()):
        cursor.setPosition(position + 1)
        tip = cursor.charFormat().toolTip()
        assert cursor.charFormat().fontUnderline() == bool(tip)
        if character != " ":
            shown += "_" if tip else "."
            tips.append(tip)
    assert shown == expected and set(shown) == {"_", "."}
    change = next(token for token in tokens if token.changed and token.text.strip())
    first = shown.index("_")
    assert tips[first] == f"Without the guard: {change.safe_text}"
    cursor.setPosition(answer.text.toPlainText().index(change.text.strip()) + 1)
    where = answer.text.cursorRect(cursor).center()
    tip = QHelpEvent(QHelpEvent.Type.ToolTip, where, answer.text.viewport().mapToGlobal(QPoint(where)))
    QtWidgets.QApplication.sendEvent(answer.text.viewport(), tip)
    assert QtWidgets.QToolTip.text() == tips[first]


def test_a_killed_worker_is_started_again(worker: Callable[..., Any]) -> None:
    window = worker("--temp", "0", "-n", "8")
    ask(window, "What is red?")
    finish(window)
    kept = list(window.messages)
    process = window._backend.process
    for question in ("Why?", None):  # while it answers, and while it does nothing
        first = process.processId()
        if question:
            window.ask(question)
        os.kill(first, signal.SIGKILL)
        until(lambda first=first: process.processId() not in (0, first))
        ready(window)
        line = "The model's process ended (signal 9). It is started again; the conversation is kept."
        assert said(window)[-1] == line
        assert window.messages == kept
        assert window.input.toPlainText() == "Why?"
    QTest.keyClick(window.input, Qt.Key.Key_Return)
    finish(window)
    assert [m["content"] for m in window.messages[:3]] == [*(m["content"] for m in kept), "Why?"]


def test_a_refused_request_leaves_the_conversation(worker: Callable[..., Any]) -> None:
    window = worker()
    window.ask("red " * 600)
    finish(window)
    assert answers(window)[-1].status.text() == "interrupted"
    assert "context" in said(window)[-1]
    assert window.messages == [] and window.button.isEnabled()


@pytest.mark.parametrize(
    ("args", "settings", "line"),
    [
        (["nosuch.gguf"], {}, "no such file: nosuch.gguf"),
        (["demo", "--pair", "nosuch"], {"pair": "nosuch"}, "no prompt pair 'nosuch'"),
        (["demo", "-c", str(HUGE)], {"ctx_size": HUGE}, "could not create a context of 2 x 16777216 tokens"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(
    qt: Any, args: list[str], settings: dict[str, Any] | None, line: str
) -> None:
    for window in (qt.worker(args), qt.api(args[0], **settings or {})):
        until(lambda window=window: "No model" in said(window))
        assert said(window)[-1].startswith(line)
        assert not window.button.isEnabled()
        window.close()


def test_acd_run_may_be_missing(qt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    window = qt.worker([])
    until(lambda: "No model" in said(window))
    assert said(window)[-1].startswith("acd-run cannot be started")


def test_closing_ends_what_is_made(qt: Any, worker: Callable[..., Any]) -> None:
    window = worker("--grammar", ENDLESS)
    process = window._backend.process.processId()
    until(ask(window, "Hi").text.toPlainText)
    window.close()
    wait_until_gone(process)
    assert window.messages == []

    window = ready(qt.api("demo"))
    until(ask(window, "Tell me a long story about the sea.").text.toPlainText)
    window.close()
    assert window._backend._thread.isFinished() and window._backend._engine.closed

    window = qt.api("demo")
    until(lambda: any(text.endswith("%") for text in said(window)))
    window.close()
    assert window._backend._thread.isFinished()


def test_texts_find_their_tokens(qt: Any) -> None:
    """Characters of several tokens, several tokens in one piece, text that a stop string held back."""

    def cut(pieces: list[str], *tokens: tuple[str, str | None]) -> list[tuple[str, str | None]]:
        queue = deque(qt.parts.Token(*token) for token in tokens)
        return [part for piece in pieces for part in qt.parts.split(piece, queue)]

    assert cut(["a", " b"], ("a", None), (" b", "c")) == [("a", None), (" b", "c")]
    assert cut(["a b"], ("a", "x"), ("", "y"), (" b", None)) == [("a", "x"), (" b", None)]
    assert cut(["é", "s"], ("\ufffd", "x"), ("\ufffd", None), ("s", None)) == [("é", "x"), ("s", None)]
    assert cut(["a"], ("a long", "x")) == [("a", "x")]
    assert cut(["a"]) == [("a", None)]
