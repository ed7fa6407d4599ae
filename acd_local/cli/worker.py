"""The JSON-lines worker behind `acd-run --jsonl`: how an application in any language embeds the decoder.

One request per line of stdin, one event per line of stdout, both UTF-8 JSON objects. Protocol version 1; the README
documents it. A reader thread takes lines in while answers are being made, so that they can be cancelled.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from acd_local.cli import flags
from acd_local.cli.record import answer_record
from acd_local.cli.shell import Interrupts, as_acd_error, error_event, one_line, say
from acd_local.errors import UsageError

if TYPE_CHECKING:
    from acd_local.batch import Batch, Event
    from acd_local.options import Options
    from acd_local.runtime.cancel import CancelToken
    from acd_local.session import Engine

PROTOCOL = 1
MAX_LINE = 16_000_000  # bytes

_ENVELOPE = {"id", "prompt", "messages", "system", "pair", "divergence", "cancel"}


def serve(model: str, given: Mapping[str, Any], options: Options, interrupts: Interrupts) -> int:
    """Answer requests until stdin ends or a signal comes; returns the exit code."""
    with flags.load_engine(model, given, conversations=given["parallel"]) as engine:
        if engine.warning:
            say(f"acd-run: {one_line(engine.warning)}")
        parallel = given["parallel"] > 1
        return Worker(
            engine, options, given["system"], interrupts, parallel=parallel, divergence=given["divergence"]
        ).run()


@dataclass
class Request:
    """One accepted request, waiting or being answered."""

    id: str | int
    messages: Any
    system: str | None
    pair: str | None
    options: Options
    divergence: bool
    cancel: CancelToken = field(repr=False)


class Worker:
    """Requests in, events out; begun in the order of arrival, as many at once as the engine has conversations."""

    def __init__(
        self,
        engine: Engine,
        options: Options,
        system: str | None,
        interrupts: Interrupts,
        *,
        parallel: bool,
        divergence: bool,
    ) -> None:
        self._parallel = parallel
        self._divergence = divergence
        self._engine = engine
        self._options = options
        self._system = system
        self._interrupts = interrupts
        self._queue: queue.Queue[Request | None] = queue.Queue()
        self._pending: dict[str | int, Request] = {}
        self._lock = threading.Lock()
        self._out = threading.Lock()
        self._ended = False  # no further requests will come
        self._broken: OSError | None = None  # stdout cannot be written any more

    def run(self) -> int:
        from acd_local.batch import Batch
        from acd_local.runtime.cancel import CancelToken

        info = self._engine.info
        with (stop := CancelToken()).interrupting(self._stop):
            self._interrupts.cancels(stop)
            model, pair = info.name or str(info.path), self._engine.pair.name
            self._emit(event="ready", protocol=PROTOCOL, model=model, pair=pair, soft=self._engine.soft)
            threading.Thread(target=self._read, name="acd-requests", daemon=True).start()
            with Batch(self._engine) as batch:
                while self._broken is None and self._admit(batch, stop):
                    for event in batch.step():
                        self._report(event)
        if self._broken is not None:
            raise self._broken  # a closed pipe ends quietly, a full disk does not
        return self._interrupts.exit_code or 0

    # -- reading -------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        # A reader of its own: the interpreter closes sys.stdin at exit, and aborts while a thread waits inside it.
        requests = open(sys.stdin.fileno(), "rb", closefd=False)  # noqa: SIM115
        try:
            while line := requests.readline(MAX_LINE + 1):
                if len(line) > MAX_LINE:
                    while line and not line.endswith(b"\n"):
                        line = requests.readline(MAX_LINE)
                    self._error(None, UsageError(f"the line is longer than {MAX_LINE} bytes"))
                elif line.strip():
                    self._take(line)
        except OSError as error:
            say(f"acd-run: cannot read stdin: {error.strerror}")
        finally:
            self._queue.put(None)

    def _take(self, line: bytes) -> None:
        request_id = None
        try:
            raw = _parse(line)
            request_id = _request_id(raw)
            if raw.get("cancel") is not None:
                self._cancel(request_id, raw)
            else:
                self._accept(self._request(request_id, raw))
        except RecursionError:
            self._error(request_id, UsageError("the request is nested too deeply"))
        except Exception as error:  # whatever a line holds, the worker lives on
            self._error(request_id, error)

    def _request(self, request_id: str | int, raw: Mapping[str, Any]) -> Request:
        from acd_local.runtime import grammar
        from acd_local.runtime.cancel import CancelToken
        from acd_local.session import check_messages

        _check_text(raw)
        if ("prompt" in raw) == ("messages" in raw):
            raise UsageError("a request has either a prompt or messages")
        if not isinstance(raw.get("prompt", ""), str) or not isinstance(raw.get("messages", []), list):
            raise UsageError("prompt must be a string, messages a list")
        messages = raw.get("prompt", raw.get("messages"))
        check_messages(messages)
        for name in ("system", "pair"):
            if not isinstance(raw.get(name), (str, type(None))):
                raise UsageError(f"{name} must be a string")
        if not isinstance(divergence := raw.get("divergence", self._divergence), bool):
            raise UsageError("divergence must be true or false")
        own_system = isinstance(messages, list) and messages[0]["role"] == "system"
        changes = {k: v for k, v in raw.items() if k not in _ENVELOPE}
        if isinstance(changes.get("json_schema"), (dict, bool)):
            changes["json_schema"] = json.dumps(changes["json_schema"])
        options = self._options.replace(changes)
        if self._parallel:  # a slow check of a grammar would hold up the other answers
            grammar.from_options(options, self._engine.vocab, self._engine.info.path)
        return Request(
            request_id,
            messages,
            raw.get("system", None if own_system else self._system),
            raw.get("pair"),
            options,
            divergence,
            CancelToken(),
        )

    def _accept(self, request: Request) -> None:
        with self._lock:
            if request.id in self._pending:
                raise UsageError("a request with this id is still being answered")
            self._pending[request.id] = request
        self._queue.put(request)

    def _cancel(self, request_id: str | int, raw: Mapping[str, Any]) -> None:
        if raw["cancel"] is not True:
            raise UsageError("cancel must be true")
        with self._lock:
            request = self._pending.get(request_id)
        if request is None:
            raise UsageError("there is no request with this id to cancel")
        request.cancel.set()

    # -- answering -----------------------------------------------------------------------------------------------------

    def _admit(self, batch: Batch, stop: CancelToken) -> bool:
        """Fill free conversations with waiting requests; waits while there is nothing to do. False: all is done."""
        while batch.room and not self._ended and not stop.is_set:
            try:
                request = self._queue.get(block=len(batch) == 0)
            except queue.Empty:
                break
            if request is None:
                self._ended = True
            elif not stop.is_set:
                self._begin(batch, request)
        return len(batch) > 0

    def _begin(self, batch: Batch, request: Request) -> None:
        try:
            stream = self._engine.generate(
                request.messages,
                request.options,
                system=request.system,
                pair=request.pair,
                cancel=request.cancel,
                divergence=request.divergence,
                on_event=lambda event: self._emit(id=request.id, event="dropped", messages=event.messages),
            )
        except Exception as error:
            self._end(error_event(request.id, as_acd_error(error)))
        else:
            batch.add(request.id, stream)

    def _report(self, event: Event) -> None:
        from acd_local.answers import Answer, Chunk

        key: Any = event.key
        if isinstance(event.what, Chunk):
            self._emit(id=key, event="token", text=event.what.text)
        elif isinstance(event.what, Answer):
            self._end({"id": key, "event": "done"} | answer_record(event.what))
        else:
            self._end(error_event(key, as_acd_error(event.what)))

    def _end(self, last: dict[str, Any]) -> None:
        with self._lock:
            del self._pending[last["id"]]  # first: whoever reads the last event may use the id again
        self._emit(**last)

    def _stop(self) -> None:
        """A signal, or nobody reads: end the running answers and take no further one."""
        with self._lock:
            requests = list(self._pending.values())
        for request in requests:
            request.cancel.set()
        self._queue.put(None)

    def _error(self, request_id: str | int | None, error: Exception) -> None:
        self._emit(**error_event(request_id, as_acd_error(error)))

    def _emit(self, **event: Any) -> None:
        with self._out:
            if self._broken is not None:
                return
            try:
                sys.stdout.write(json.dumps(event) + "\n")  # ASCII: any id survives, whatever reads it
                sys.stdout.flush()
            except OSError as error:
                self._broken = error
        if self._broken is not None:
            self._stop()


def _parse(line: bytes) -> Mapping[str, Any]:
    try:
        raw = json.loads(line)
    except ValueError as error:
        raise UsageError(f"the request is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UsageError("the request is not a JSON object")
    return raw


def _request_id(raw: Mapping[str, Any]) -> str | int:
    request_id = raw.get("id")
    if isinstance(request_id, bool) or not isinstance(request_id, (str, int)):
        raise UsageError("a request needs an id, a string or a whole number")
    return request_id


def _check_text(raw: Mapping[str, Any]) -> None:
    try:
        json.dumps(raw, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError("the request holds half a surrogate pair, which is no text") from None
