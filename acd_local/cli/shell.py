"""What all commands share: errors to exit codes, signals to cancellation, text to a terminal or a pipe."""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import click

from acd_local.errors import AcdError, InternalError, OutOfMemoryError, StorageError, UsageError, tells_of_memory
from acd_local.files import is_storage_fault, write_error
from acd_local.runtime.text import disarm

if TYPE_CHECKING:
    from acd_local.runtime.cancel import CancelToken

MAX_MESSAGE = 1000  # characters of a line on stderr that quotes something
EXIT_CODES = """\b
Exit codes:
  0    done (also when the reader of stdout went away)
  1    internal error, or out of memory
  2    usage: bad option, bad grammar, no prompt
  3    model not found or not loadable
  4    the conversation does not fit the context
  5    bad prompt pair
  6    the storage is full or fails
  130  interrupted (Ctrl-C)
  143  terminated (SIGTERM)"""


@dataclass(frozen=True)
class Outcome:
    """The end of a command.

    Attributes:
        code: of the process, where there is no error.
        record: what --json prints.
        error: what went wrong; beside a record it becomes the record's "error".
    """

    code: int = 0
    record: Any = None
    error: AcdError | None = None


def run_cli(command: click.Command, program: str, argv: Sequence[str] | None = None) -> int:
    """Run a click command; every failure becomes one line on stderr and the documented exit code.

    With --json among the arguments one JSON object goes to stdout, here and nowhere else; with --jsonl an error is one
    event line.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    prepare_streams()
    if asked := os.environ.get(variable := completion_variable(program)):
        from click.shell_completion import shell_complete

        return shell_complete(command, {}, program, variable, asked)
    news = _Saying(program)
    logging.getLogger("acd_local.machine").addHandler(news)
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # ggml would attach a debugger to this process when it aborts
    try:
        # Not command.main(): it turns a closed pipe into exit code 1.
        with command.make_context(program, list(args)) as context:
            result = command.invoke(context)
        outcome = result if isinstance(result, Outcome) else Outcome(result if isinstance(result, int) else 0)
    except click.exceptions.Exit as leaving:  # --help, --version
        return leaving.exit_code
    except BrokenPipeError:
        _forget_stdout()
        return 0
    except (KeyboardInterrupt, click.Abort):
        return 130
    except Exception as error:
        if os.environ.get("ACD_DEBUG"):
            raise
        outcome = Outcome(error=as_acd_error(error))
    finally:
        logging.getLogger("acd_local.machine").removeHandler(news)
    return _end(program, args, outcome)


def leave(code: int) -> NoReturn:
    """End the process, without Python's last searches for cycles in all that was imported: they take some 20 ms."""
    gc.freeze()
    sys.exit(code)


def completion_variable(program: str) -> str:
    """Name the variable by which a shell asks a program how a command line goes on, as click names it."""
    return f"_{program.replace('-', '_').upper()}_COMPLETE"


class _Saying(logging.Handler):
    """A listener that says on stderr what is found out about the machine, once ever."""

    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program

    def emit(self, record: logging.LogRecord) -> None:
        say(f"{self._program}: {short_line(record.getMessage())}")


def _end(program: str, args: Sequence[str], outcome: Outcome) -> int:
    error = outcome.error
    try:
        _print_record(args, outcome)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except OSError as problem:
        _forget_stdout()
        if error is None and not isinstance(problem, BrokenPipeError):
            error = as_acd_error(problem)
    if error is None:
        return outcome.code
    say(f"{program}: {short_line(str(error))}")
    return error.exit_code


def _print_record(args: Sequence[str], outcome: Outcome) -> None:
    record, error = outcome.record, outcome.error
    if record is not None and error is not None:
        record = {**record, "error": _error_body(error)}
    elif "--json" in args and error is not None:
        record = error_record(error)
    if record is not None:
        print(as_json(record))
    elif "--jsonl" in args and error is not None:
        print(json.dumps(error_event(None, error, final=False)))


def as_acd_error(error: Exception) -> AcdError:
    """Turn any exception into one of ours: what nobody expected is an internal error."""
    if isinstance(error, AcdError):
        return error
    if isinstance(error, click.ClickException):
        return UsageError(error.format_message())
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM or tells_of_memory(str(error)):
        return OutOfMemoryError("out of memory: close other programs, raise a limit (ulimit), or take a smaller model")
    if is_storage_fault(error):
        return write_error(getattr(error, "filename", None) or "the output", error)
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f": {error.filename}"
        return InternalError(f"{error.strerror}{where}")
    return InternalError(f"internal error: {type(error).__name__}: {error} (ACD_DEBUG=1 shows where)")


def going_on(error: StorageError) -> StorageError:
    """Add what a command says that keeps what it has done."""
    return StorageError(f"{error}; what is finished is kept, and the same command goes on")


def error_record(error: AcdError, text: str = "") -> dict[str, Any]:
    """Make the JSON form of a failed answer."""
    return {"text": text, "finish_reason": "error", "error": _error_body(error)}


def _error_body(error: AcdError) -> dict[str, str]:
    return {"code": error.code, "message": short_line(str(error))}


def error_event(request_id: str | int | None, error: AcdError, *, final: bool) -> dict[str, Any]:
    """Make the worker's form of an error; `final`: it ends the request with this id."""
    return {"id": request_id, "event": "error", "final": final, **_error_body(error)}


def as_json(record: object) -> str:
    """Write one line of JSON; pure ASCII for a terminal, so that an answer's control characters stay escaped."""
    return json.dumps(record, ensure_ascii=sys.stdout.isatty())


def one_line(text: str) -> str:
    """Make text one line without control characters: file names and model metadata may hold anything."""
    return disarm(" ".join(text.split()))


def short_line(text: str) -> str:
    """Make text one such line, cut where a message quotes something endless."""
    line = one_line(text)
    return line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]} ..."


def say(line: str) -> None:
    """Write one line to stderr; silently nothing if stderr is gone."""
    with suppress(OSError, ValueError, AttributeError):
        print(line, file=sys.stderr, flush=True)


def prepare_streams() -> None:
    """Make the standard streams be there, wait when they must, and write UTF-8 whatever the locale says."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us: no other file may take its place
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, PTH123
        stream = getattr(sys, name)
        with suppress(OSError, ValueError, AttributeError):
            os.set_blocking(stream.fileno(), True)  # the flag belongs to the file: others may have left it off
        if mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")


def _forget_stdout() -> None:
    """Let the interpreter flush stdout at exit without meeting the broken pipe again."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class AnswerWriter:
    """Streams an answer to a text file: exactly one newline at the end, controls disarmed on a terminal."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._disarm = out.isatty()
        self._held = ""  # newlines that may turn out to be the last

    def write(self, text: str) -> None:
        if self._disarm:
            text = disarm(text)
        text = self._held + text
        body = text.rstrip("\n")
        self._held = text[len(body) :]
        if body:
            self._out.write(body)
            self._out.flush()

    def finish(self) -> None:
        self._out.write("\n")
        self._out.flush()


class Interrupts:
    """SIGINT and SIGTERM cancel the current answer, or end the process at once where there is none.

    Python runs its signal handlers on the main thread between bytecodes, and a prefill inside llama.cpp can take a
    minute. The wake-up descriptor is written by the C-level handler, so a watching thread hears of the signal at once.
    A second signal ends the process, unless it comes with the first: `timeout` and terminals signal process and group.
    """

    ECHO = 0.5  # seconds in which a second signal is the same wish

    def __init__(self) -> None:
        self.signum: int | None = None
        self._since = 0.0
        self._token: CancelToken | None = None
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)

    def __enter__(self) -> Interrupts:
        self._old = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="acd-signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._old_fd)
        for signum, handler in self._old.items():
            signal.signal(signum, handler)
        self._writer.close()

    def again(self) -> None:
        """Take the signals back from a library that set handlers of its own."""
        for signum in self._old:
            signal.signal(signum, self._on_signal)

    def cancels(self, token: CancelToken | None) -> None:
        """Make signals cancel `token` from now on; None: they end the process."""
        self._token = token
        if token is not None and self.signum is not None:
            token.set()

    @property
    def exit_code(self) -> int | None:
        """128 + the signal that came, None if none did."""
        return None if self.signum is None else 128 + self.signum

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        """Do nothing: it is there so that the C-level handler is installed; the watcher does the work."""

    def _watch(self) -> None:
        while data := self._receive():
            for signum in data:
                if signum in (signal.SIGINT, signal.SIGTERM):
                    self._handle(signum)
        self._reader.close()

    def _receive(self) -> bytes:
        try:
            return self._reader.recv(16)
        except OSError:
            return b""

    def _handle(self, signum: int) -> None:
        token, now = self._token, time.monotonic()
        if self.signum is None:
            self.signum, self._since = signum, now
        if token is None or now - self._since > self.ECHO:
            os._exit(128 + signum)
        token.set()
