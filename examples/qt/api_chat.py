"""A chat window over the Python API: the model lives in this process, in a QThread.

python api_chat.py [MODEL]
"""

from __future__ import annotations

import signal
import sys
from functools import partial
from typing import Any

from chat_window import Backend, ChatWindow, Done, Messages, Token
from PySide6.QtCore import QThread, Signal, Slot
from PySide6.QtWidgets import QApplication

import acd_local
from acd_local import CancelToken, GateDecision, PromptProgress, TokenRecord


class Closing(Exception):
    """Ends the loading of a model that nobody wants any more."""


class ApiBackend(Backend):
    """Loads the model and decodes in a thread of its own; whoever calls its methods never waits for them."""

    _asked = Signal(list, CancelToken)

    def __init__(self, model: str, **settings: Any) -> None:
        super().__init__()
        self._model = model
        self._settings = settings
        self._engine: acd_local.Engine | None = None
        self._cancel = CancelToken()
        self._is_closing = False
        self._thread = QThread()
        self.moveToThread(self._thread)  # where the slots below run
        self._thread.started.connect(self._load)
        self._asked.connect(self._answer)

    # -- in the window's thread ----------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def ask(self, messages: Messages) -> None:
        self._cancel = CancelToken()  # made here: a stop may come before the thread has begun
        self._asked.emit(messages, self._cancel)

    def stop(self) -> None:
        self._cancel.set()

    def close(self) -> None:
        self._is_closing = True
        self._cancel.set()
        self._thread.quit()
        self._thread.wait()
        if self._engine is not None:
            self._engine.close()

    # -- in the backend's thread ---------------------------------------------------------------------------------------

    @Slot()
    def _load(self) -> None:
        reading, checking = partial(self._on_loading, "model"), partial(self._on_loading, "check")
        try:
            engine = acd_local.load(self._model, on_progress=reading, on_check=checking, **self._settings)
        except Closing:
            return
        except acd_local.AcdError as error:  # no such model, out of memory, a bad pair, ...
            self.down.emit(str(error))
            return
        self._engine = engine
        pair = "as-is" if engine.pair is None else engine.pair.name
        self.ready.emit(engine.info.name, f"Prompt pair: {pair}")
        if engine.warning:
            self.notice.emit(engine.warning)

    def _on_loading(self, phase: str, fraction: float) -> None:
        if self._is_closing:
            raise Closing
        self.loading.emit(phase, fraction)

    @Slot(list, CancelToken)
    def _answer(self, messages: Messages, cancel: CancelToken) -> None:
        assert self._engine is not None
        try:
            stream = self._engine.generate(messages, trace=True, cancel=cancel, on_event=self._on_event)
            answer = stream.run(self.text.emit)
        except acd_local.AcdError as error:
            self.failed.emit(str(error))
        else:
            cancelled, contrast = answer.finish_reason == "cancelled", answer.contrast
            rate = answer.timings.tokens_per_second
            self.done.emit(Done(answer.text, cancelled, contrast.positions, contrast.changed_tokens, rate))

    def _on_event(self, event: object) -> None:
        if isinstance(event, PromptProgress):
            self.reading.emit(event.done / event.total)
        elif isinstance(event, GateDecision):
            self.gate.emit(event.probability, event.decision, event.position)
        elif isinstance(event, TokenRecord):
            self.token.emit(Token(event.text, event.safe_text if event.changed else None))


def open_window(model: str, **settings: Any) -> ChatWindow:
    """Show the window; `settings` are those of `acd_local.load`."""
    window = ChatWindow(ApiBackend(model, **settings), "Chat over the Python API")
    window.show()
    return window


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in a terminal ends it: Qt's event loop runs no Python handler
    application = QApplication(sys.argv[:1])
    window = open_window(sys.argv[1] if len(sys.argv) > 1 else "demo")
    sys.exit(application.exec())
