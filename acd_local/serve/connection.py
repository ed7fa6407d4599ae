"""Ends what a client leaves open, and sees it go whatever else it sent: one client's connection."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

UNSENT = 60.0  # seconds that a request may take to come
UNREAD = 30.0  # seconds for which a client may take nothing: its answer holds a place
AHEAD = 65536  # bytes of further requests that are read while one is answered


class Connection(H11Protocol):
    """A connection that ends where its client stops sending in the middle of a request, or stops reading.

    uvicorn waits for both without end, and does not see a client go that sent anything behind its request.
    """

    _unsent: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_request()
        if not self._lacks_request and self.flow.read_paused and len(self.conn.trailing_data[0]) <= AHEAD:
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_request()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(UNREAD, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread = _stopped(self._unread)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unsent, self._unread = _stopped(self._unsent), _stopped(self._unread)

    def send_400_response(self, msg: str) -> None:
        """Say that what came is no HTTP, unless its request is being answered already, and end the connection.

        uvicorn answers a second time: either that or the first answer, which goes on, then fails and is noted down.
        """
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def shutdown(self) -> None:
        """End at once where no request has come as a whole, else behind its answer."""
        if self._lacks_request:
            self.transport.close()
        else:
            super().shutdown()

    @property
    def _lacks_request(self) -> bool:
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def _watch_request(self) -> None:
        if not self._lacks_request:
            self._unsent = _stopped(self._unsent)
        elif self._unsent is None:
            self._unsent = self.loop.call_later(UNSENT, self.transport.abort)


def _stopped(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    if timer is not None:
        timer.cancel()
    return None
