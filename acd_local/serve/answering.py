"""Answers one request: waits, streams, keeps the line alive, and stops where the client has gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from acd_local.answers import Answer, GateDecision, TokenRecord, TurnsDropped
from acd_local.dispatch import Job, Started
from acd_local.errors import EngineClosedError, NumericalError
from acd_local.records import decision_record
from acd_local.serve.feed import Feed, News
from acd_local.serve.openai import Asked, Refused
from acd_local.serve.replies import COMMENT, DONE, Reply, as_json, event, failure
from acd_local.serve.service import Service


class AnswerResponse(Response):
    """The response to one request, in one piece or as server-sent events.

    What goes wrong before the first event has a status of its own; later it is an event, and the stream ends as always.
    """

    def __init__(self, service: Service, asked: Asked) -> None:
        super().__init__()
        self._service, self._asked = service, asked
        self._feed = Feed()
        self._job: Job | None = None
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if not await _unless_gone(receive, self._answer(send)):
                self._service.count("clients_gone_total")
        finally:
            self._feed.cancel.set()
            if self._job is not None:
                self._service.cancel(self._job)

    async def _answer(self, send: Send) -> None:
        try:
            stream, reply = await asyncio.to_thread(self._service.prepare, self._asked, self._feed)
            self._job = self._service.submit(stream, self._feed)
            await (self._stream(reply, send) if self._asked.stream else self._whole(reply, send))
        except Exception as problem:
            error = self._blamed(problem)
            self._service.count_failure(error)
            if self._begun:
                await _write(send, event(failure(error).body) + DONE, more=False)
            else:
                await send_failure(send, error)

    def _blamed(self, error: Exception) -> Exception:
        if isinstance(error, NumericalError) and "alpha" in self._asked.guard:
            return Refused(str(error), "alpha")  # the model did nothing wrong
        return error

    async def _whole(self, reply: Reply, send: Send) -> None:
        while True:
            for news in await self._take(None):
                if isinstance(self._checked(news), Answer):
                    assert isinstance(news, Answer)
                    await send_json(send, 200, as_json(reply.whole(news)))
                    return

    async def _stream(self, reply: Reply, send: Send) -> None:
        writer, silence = _Writer(reply), _Silence(self._service.settings.keep_alive)
        while not writer.ended:
            found = await self._take(silence.left)
            data, failed = b"", None
            try:
                for news in found:
                    data += writer.write(self._checked(news))
            except Exception as error:  # what was said before is sent first
                failed = error
            if not data and failed is None and silence.left == 0:
                data = COMMENT
            if not self._begun and not data and (failed is not None or list(map(type, found)) == [Started]):
                if failed is not None:
                    raise failed
                continue  # what comes next may be an error with a status
            if not self._begun:
                self._begun = True
                await send(_start(200, b"text/event-stream", (b"cache-control", b"no-cache")))
                data = event(reply.first()) + data
            if data:
                await _write(send, data, more=not writer.ended)
                silence.end()
            if failed is not None:
                raise failed

    async def _take(self, patience: float | None) -> Sequence[News]:
        lagged = self._feed.lags()
        found = await self._feed.take(patience)
        if lagged:
            self._service.caught_up()
        return found

    def _checked(self, news: News) -> News:
        """News that are no error; whatever ended the answer otherwise is raised."""
        if isinstance(news, Exception):
            raise news
        if isinstance(news, Answer):
            self._service.count_answer(news)
            if news.finish_reason == "cancelled":
                raise EngineClosedError("the server is ending")
        return news


class _Silence:
    """How long nothing was sent.

    Args:
        most: seconds that it may last; None: any number.
    """

    def __init__(self, most: float | None) -> None:
        self._most = most
        self.end()

    def end(self) -> None:
        self._since = time.monotonic()

    @property
    def left(self) -> float | None:
        """Seconds until it has lasted long enough."""
        return None if self._most is None else max(0.0, self._since + self._most - time.monotonic())


class _Writer:
    """Turns what happens to an answer into events."""

    def __init__(self, reply: Reply) -> None:
        self.ended = False
        self._reply = reply
        self._tokens: list[TokenRecord] = []  # that were not told of yet

    def write(self, news: News) -> bytes:
        """The events that tell of it, if any do."""
        reply = self._reply
        if isinstance(news, str):
            return event(reply.piece(news, *self._told()))
        if isinstance(news, TokenRecord):
            self._tokens.append(news)
        elif isinstance(news, GateDecision) and reply.asked.trace:
            return event(reply.piece("", (), {"gate": decision_record(news)}))
        elif isinstance(news, TurnsDropped) and reply.asked.trace:
            return event(reply.piece("", (), {"dropped": news.messages}))
        elif isinstance(news, Answer):
            self.ended = True
            last = event(reply.last(news, *self._told()))
            return last + (event(reply.usage(news)) if reply.asked.include_usage else b"") + DONE
        return b""

    def _told(self) -> tuple[Sequence[TokenRecord], dict[str, Any]]:
        """The tokens up to here, for their log probabilities or for a trace, which exclude each other."""
        tokens, self._tokens = self._tokens, []
        if not tokens or not self._reply.asked.trace:
            return tokens, {}
        return (), self._reply.trace(tokens)


# --- Sending ----------------------------------------------------------------------------------------------------------


async def send_json(send: Send, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    """Send a whole response."""
    await send(_start(status, b"application/json", (b"content-length", str(len(body)).encode()), *headers))
    await send({"type": "http.response.body", "body": body})


async def send_failure(send: Send, error: Exception) -> None:
    """Send an error as a whole response."""
    failed = failure(error)
    headers = [(name.encode(), value.encode()) for name, value in failed.headers.items()]
    await send_json(send, failed.status, as_json(failed.body), *headers)


async def _write(send: Send, data: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


def _start(status: int, kind: bytes, *headers: tuple[bytes, bytes]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind), *headers]}


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Do the work, but stop where the client goes away meanwhile; whether it was done."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for one in (task, gone):
            one.cancel()
        results = await asyncio.gather(task, gone, return_exceptions=True)
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0] is None


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
