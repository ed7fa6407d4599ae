"""The JSON-lines worker behind `acd-run --jsonl`: how an application in any language embeds the decoder.

One request per line of stdin, one event per line of stdout, both UTF-8 JSON objects. Protocol version 2, see
docs/worker.md. A reader thread takes lines in while answers are being made, so that they can be cancelled.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from acd_local import __version__
from acd_local.cli import flags, memory
from acd_local.cli.shell import Interrupts, as_acd_error, error_event, one_line, say
from acd_local.errors import UsageError
from acd_local.records import answer_record, decision_record, model_record, pair_record, trace_record

if TYPE_CHECKING:
    from acd_local.answers import Answer, AnswerEvent
    from acd_local.dispatch import Job, Told
    from acd_local.engine import Engine
    from acd_local.generation import AnswerStream
    from acd_local.options import Options

PROTOCOL = 2
MAX_LINE = 16_000_000  # bytes
EVERY = 0.25  # seconds between two signs of progress

_ENVELOPE = {"id", "prompt", "messages", "system", "pair", "divergence", "trace", "cancel", "ping"}


def serve(model: str, given: Mapping[str, Any], options: Options, interrupts: Interrupts) -> int:
    """Answer requests until stdin ends or a signal comes; returns the exit code."""
    memory.keep_heaps_small()
    out, throttle = Output(), Throttle()

    def loading(fraction: float) -> None:
        tell("model", fraction)

    def checking(fraction: float) -> None:
        tell("check", fraction)

    def tell(phase: str, fraction: float) -> None:
        if throttle.due():
            out.emit({"event": "loading", "phase": phase, "progress": round(fraction, 3)})
            out.check()

    with flags.load_engine(
        model, given, conversations=given["parallel"], on_progress=loading, on_check=checking
    ) as engine:
        if engine.warning:
            say(f"acd-run: {one_line(engine.warning)}")
        defaults = Defaults(options, given["system"], given["divergence"])
        return Worker(engine, defaults, out, interrupts, parallel=given["parallel"]).run()


@dataclass(frozen=True)
class Defaults:
    """What holds where a request says nothing: from the command line."""

    options: Options
    system: str | None
    divergence: bool


@dataclass(frozen=True)
class Request:
    """What one line asks for."""

    id: str | int
    messages: Any
    system: str | None
    pair: str | None
    options: Options
    divergence: bool
    trace: bool


class Throttle:
    """Lets a sign of progress through now and then: at once, then every EVERY seconds."""

    def __init__(self) -> None:
        self._next = 0.0

    def due(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + EVERY
        return True


class Output:
    """Event lines on stdout, from any thread, until it breaks or is closed.

    Attributes:
        lock: held while a line is written; who takes it first decides what comes next. It may be held for long, where
            nobody reads: what stops the worker must not wait for it.
        broken: what went wrong, once stdout cannot be written any more.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.broken: OSError | None = None
        self._closed = False

    def emit(self, event: Mapping[str, Any]) -> None:
        with self.lock:
            if self._closed or self.broken is not None:
                return
            try:
                sys.stdout.write(json.dumps(event) + "\n")  # ASCII: any id survives, whatever reads it
                sys.stdout.flush()
            except OSError as error:
                self.broken = error

    def check(self) -> None:
        """Raise what went wrong: a closed pipe ends the program quietly, a full disk does not."""
        if self.broken is not None:
            raise self.broken

    def close(self) -> None:
        """Let no line come any more: the reader thread must not be writing when the interpreter ends."""
        with self.lock:
            self._closed = True


class Worker:
    """Requests in, events out; begun in the order of arrival, as many at once as the engine has conversations.

    A request is pending from the line that is accepted to its final event. Both happen under the output's lock, so that
    for whoever reads the events in order an id is never in use twice.
    """

    def __init__(
        self, engine: Engine, defaults: Defaults, out: Output, interrupts: Interrupts, *, parallel: int
    ) -> None:
        from acd_local.dispatch import Dispatcher

        self._engine = engine
        self._defaults = defaults
        self._out = out
        self._interrupts = interrupts
        self._parallel = parallel
        self._dispatcher = Dispatcher(engine)
        self._pending: dict[str | int, Job] = {}  # guarded by the output's lock

    def run(self) -> int:
        from acd_local.runtime.cancel import CancelToken

        with (stop := CancelToken()).interrupting(self._dispatcher.stop):
            self._interrupts.cancels(stop)
            self._emit(ready_record(self._engine, self._defaults, parallel=self._parallel))
            threading.Thread(target=self._read, name="acd-requests", daemon=True).start()
            self._dispatcher.run()
        self._out.close()
        self._out.check()
        return self._interrupts.exit_code or 0

    # -- reading -------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        # A reader of its own: the interpreter closes sys.stdin at exit, and aborts while a thread waits inside it.
        requests = open(sys.stdin.fileno(), "rb", closefd=False)  # noqa: SIM115
        number = 0
        try:
            while self._read_line(requests, number := number + 1):
                pass  # a line must not be held while the next one is awaited: it may be long
        except OSError as error:
            say(f"acd-run: cannot read stdin: {error.strerror}")
        finally:
            self._dispatcher.finish()

    def _read_line(self, requests: BinaryIO, number: int) -> bool:
        """Take the next line; False: there is none."""
        line = requests.readline(MAX_LINE + 1)
        more = bool(line)
        if len(line) > MAX_LINE:
            while line and not line.endswith(b"\n"):
                line = requests.readline(MAX_LINE)
            self._refuse(number, None, UsageError(f"the line is longer than {MAX_LINE} bytes"))
        elif line.strip():
            self._take(number, line)
        return more

    def _take(self, number: int, line: bytes) -> None:
        request_id, asks = None, False
        try:
            raw = _parse(line)
            asks = "prompt" in raw or "messages" in raw
            request_id = _request_id(raw)
            if asks and not raw.keys().isdisjoint(("ping", "cancel")):
                raise UsageError("a ping or a cancel is a line of its own, without a prompt or messages")
            elif "ping" in raw:
                self._pong(request_id, raw)
            elif "cancel" in raw:
                self._cancel(request_id, raw)
            else:
                asks = True
                self._accept(self._request(request_id, raw))
        except RecursionError:
            self._refuse(number, request_id, UsageError("the request is nested too deeply"), ends=asks)
        except Exception as error:  # whatever a line holds, the worker lives on
            self._refuse(number, request_id, error, ends=asks)

    def _request(self, request_id: str | int | None, raw: Mapping[str, Any]) -> Request:
        from acd_local.engine import check_messages
        from acd_local.options import check_unicode
        from acd_local.runtime import grammar

        if request_id is None:
            raise UsageError("a request needs an id, a string or a whole number")
        check_unicode("the request", json.dumps(raw, ensure_ascii=False))
        if ("prompt" in raw) == ("messages" in raw):
            raise UsageError("a request has either a prompt or messages")
        if not isinstance(raw.get("prompt", ""), str) or not isinstance(raw.get("messages", []), list):
            raise UsageError("prompt must be a string, messages a list")
        messages = raw.get("prompt", raw.get("messages"))
        check_messages(messages)
        for name in ("system", "pair"):
            if not isinstance(raw.get(name, ""), str):
                raise UsageError(f"{name} must be a string")
        for name in ("divergence", "trace"):
            if not isinstance(raw.get(name, False), bool):
                raise UsageError(f"{name} must be true or false")
        own_system = isinstance(messages, list) and messages[0]["role"] == "system"
        changes = {k: v for k, v in raw.items() if k not in _ENVELOPE}
        if isinstance(changes.get("json_schema"), (dict, bool)):
            changes["json_schema"] = json.dumps(changes["json_schema"])
        options = self._defaults.options.replace(changes)
        if self._parallel > 1:  # a slow check of a grammar would hold up the other answers
            grammar.from_options(options, self._engine.vocab, self._engine.info.path)
        return Request(
            id=request_id,
            messages=messages,
            system=raw.get("system", None if own_system else self._defaults.system),
            pair=raw.get("pair"),
            options=options,
            divergence=raw.get("divergence", self._defaults.divergence),
            trace=raw.get("trace", False),
        )

    def _accept(self, request: Request) -> None:
        with self._out.lock:
            if request.id in self._pending:
                raise UsageError("a request with this id is still being answered")
            job, ahead = self._job(request), len(self._pending)
            self._dispatcher.submit(job)
            self._pending[request.id] = job
            self._emit({"id": request.id, "event": "queued", "ahead": ahead})

    def _cancel(self, request_id: str | int | None, raw: Mapping[str, Any]) -> None:
        if raw["cancel"] is not True:
            raise UsageError("cancel must be true")
        with self._out.lock:
            if request_id not in self._pending:
                raise UsageError("there is no request with this id to cancel")
            self._dispatcher.cancel(self._pending[request_id])

    def _pong(self, request_id: str | int | None, raw: Mapping[str, Any]) -> None:
        if raw["ping"] is not True:
            raise UsageError("ping must be true")
        counts = {"waiting": self._dispatcher.waiting, "running": self._dispatcher.running}
        self._emit({"id": request_id, "event": "pong", **counts})

    def _refuse(self, number: int, request_id: str | int | None, error: Exception, *, ends: bool = False) -> None:
        """Say what is wrong with a line. That ends what the line asked for, but never a request that is pending."""
        known = as_acd_error(error)
        with self._out.lock:
            final = ends and request_id is not None and request_id not in self._pending
            self._emit(error_event(request_id, known, final=final) | ({} if final else {"line": number}))

    # -- answering -----------------------------------------------------------------------------------------------------

    def _job(self, request: Request) -> Job:
        from acd_local.dispatch import Job
        from acd_local.runtime.cancel import CancelToken

        cancel = CancelToken()

        def begin() -> AnswerStream:
            return self._engine.generate(
                request.messages,
                request.options,
                system=request.system,
                pair=request.pair,
                cancel=cancel,
                divergence=request.divergence,
                trace=request.trace,
                on_event=Reporter(request.id, self._emit),
            )

        return Job(begin, lambda what: self._report(request.id, what), cancel)

    def _report(self, request_id: str | int, what: Told) -> None:
        from acd_local.answers import Answer

        if isinstance(what, str):
            self._emit({"id": request_id, "event": "token", "text": what})
        elif isinstance(what, Answer):
            self._end(done_event(request_id, what))
        elif isinstance(what, Exception):
            self._end(error_event(request_id, as_acd_error(what), final=True))
        else:
            self._emit({"id": request_id, "event": "started"})

    def _end(self, last: dict[str, Any]) -> None:
        with self._out.lock:
            del self._pending[last["id"]]
            self._emit(last)

    def _emit(self, event: Mapping[str, Any]) -> None:
        self._out.emit(event)
        if self._out.broken is not None:
            self._dispatcher.stop()  # nobody reads


class Reporter:
    """Turns what happens to one answer into events."""

    def __init__(self, request_id: str | int, emit: Callable[[Mapping[str, Any]], None]) -> None:
        self._id = request_id
        self._emit = emit
        self._throttle = Throttle()
        self._total, self._long = 0, False  # rows of the prompt, and whether it takes several batches

    def __call__(self, event: AnswerEvent) -> None:
        from acd_local.answers import GateDecision, PromptProgress, TurnsDropped
        from acd_local.runtime.llama import BATCH_ROWS

        if isinstance(event, TurnsDropped):
            self._emit({"id": self._id, "event": "dropped", "messages": event.messages})
        elif isinstance(event, GateDecision):
            self._emit({"id": self._id, "event": "gate"} | decision_record(event))
        elif not isinstance(event, PromptProgress):
            self._emit({"id": self._id, "event": "trace"} | trace_record(event))
        else:
            if event.total != self._total:
                self._total, self._long = event.total, event.total - event.done > BATCH_ROWS
            if self._long and self._throttle.due():
                progress = {"phase": "prompt", "done": event.done, "total": event.total}
                self._emit({"id": self._id, "event": "progress"} | progress)


def ready_record(engine: Engine, defaults: Defaults, *, parallel: int) -> dict[str, Any]:
    """Say what a client wants to know before it asks. `options`: what a request can say, and what holds otherwise."""
    from acd_local.generation import resolve_contrast
    from acd_local.options import Options

    pair = engine.pair
    contrast = resolve_contrast(Options(), pair, soft=engine.takes_soft(pair))
    more = {"system": defaults.system, "divergence": defaults.divergence, "trace": False}
    return {
        "event": "ready",
        "protocol": PROTOCOL,
        "version": __version__,
        "model": model_record(engine) | {"path": str(engine.info.path)},
        "pair": pair_record(engine, pair, defaults.options) | {"alpha": contrast.alpha, "beta": contrast.beta},
        "ctx_size": engine.n_ctx,
        "parallel": parallel,
        "options": dataclasses.asdict(defaults.options) | more,
    }


def done_event(request_id: str | int, answer: Answer) -> dict[str, Any]:
    return {"id": request_id, "event": "done", "final": True} | answer_record(answer)


def _parse(line: bytes) -> Mapping[str, Any]:
    try:
        raw = json.loads(line)
    except ValueError as error:
        raise UsageError(f"the request is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UsageError("the request is not a JSON object")
    return {name: value for name, value in raw.items() if value is not None}  # null: as if it were not there


def _request_id(raw: Mapping[str, Any]) -> str | int | None:
    request_id = raw.get("id")
    if isinstance(request_id, bool) or not isinstance(request_id, (str, int, type(None))):
        raise UsageError("an id is a string or a whole number")
    return request_id
