"""A chat window over the JSON-lines worker: the model lives in a process of its own, which QProcess runs.

python worker_chat.py [MODEL] [options of acd-run]
"""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

from chat_window import Backend, ChatWindow, Done, Messages, Token
from PySide6.QtCore import QProcess
from PySide6.QtWidgets import QApplication

PATIENCE = 3000  # milliseconds that a worker has to end


class WorkerBackend(Backend):
    """Keeps `acd-run MODEL --jsonl` running (docs/worker.md). One that crashes after it was ready is started again."""

    def __init__(self, args: list[str]) -> None:
        super().__init__()
        self.process = QProcess(self)
        self.process.setProgram("acd-run")
        self.process.setArguments([*args, "--jsonl"])
        self.process.setProcessChannelMode(QProcess.ProcessChannelMode.ForwardedErrorChannel)
        self.process.readyReadStandardOutput.connect(self._read)
        self.process.errorOccurred.connect(self._on_error)
        self.process.finished.connect(self._on_finished)
        self._id = 0  # of the last request
        self._is_ready = self._is_answering = self._is_closing = False
        self._failure = ""  # why it could not start

    def start(self) -> None:
        self._is_ready = False
        self.loading.emit("model", 0.0)
        self.process.start()

    def ask(self, messages: Messages) -> None:
        self._id += 1
        self._is_answering = True
        self._send({"id": self._id, "messages": messages, "trace": True})

    def stop(self) -> None:
        self._send({"id": self._id, "cancel": True})

    def close(self) -> None:
        self._is_closing = True
        self.process.closeWriteChannel()
        self.process.terminate()  # it cancels what it does and ends
        if not self.process.waitForFinished(PATIENCE):
            self.process.kill()
            self.process.waitForFinished()

    def _send(self, line: dict[str, Any]) -> None:
        self.process.write(json.dumps(line).encode() + b"\n")

    def _read(self) -> None:
        while self.process.canReadLine():
            event = json.loads(bytes(self.process.readLine().data()))
            if not self._is_closing and event.get("id") in (None, self._id):
                self._on_event(event)

    def _on_event(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "loading":
                self.loading.emit(event["phase"], event["progress"])
            case "ready":
                self._is_ready = True
                self.ready.emit(event["model"]["name"], f"Prompt pair: {event['pair']['name']}")
            case "progress":
                self.reading.emit(event["done"] / event["total"])
            case "gate":
                self.gate.emit(event["probability"], event["decision"], event["position"])
            case "trace":
                self.token.emit(Token(event["text"], event["safe_text"] if event["changed"] else None))
            case "token":
                self.text.emit(event["text"])
            case "done":
                self._is_answering = False
                contrast, rate = event["contrast"], event["timings"]["tokens_per_second"]
                cancelled = event["finish_reason"] == "cancelled"
                self.done.emit(Done(event["text"], cancelled, contrast["positions"], contrast["changed_tokens"], rate))
            case "error" if event["final"]:
                self._is_answering = False
                self.failed.emit(event["message"])
            case "error" if not self._is_ready:
                self._failure = event["message"]  # it ends now

    def _on_error(self, error: QProcess.ProcessError) -> None:
        if error == QProcess.ProcessError.FailedToStart:
            self.down.emit("acd-run cannot be started: is acd_local installed, and its environment active?")

    def _on_finished(self, code: int, status: QProcess.ExitStatus) -> None:
        if self._is_closing:
            return
        how = f"signal {code}" if status == QProcess.ExitStatus.CrashExit else f"exit code {code}"
        if not self._is_ready:
            self.down.emit(self._failure or f"the model's process ended while it started ({how})")
            return
        tell = self.failed if self._is_answering else self.notice
        self._is_answering = False
        tell.emit(f"The model's process ended ({how}). It is started again; the conversation is kept.")
        self.start()


def open_window(args: list[str]) -> ChatWindow:
    """Show the window; `args` are those of acd-run, the model first."""
    window = ChatWindow(WorkerBackend(args or ["demo"]), "Chat over the worker")
    window.show()
    return window


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in a terminal ends it: Qt's event loop runs no Python handler
    application = QApplication(sys.argv[:1])
    window = open_window(sys.argv[1:])
    sys.exit(application.exec())
