"""Drives `acd-serve MODEL`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
from dataclasses import dataclass, field

from soaking.load import FIRST, Asked
from soaking.server_checks import check_error, check_stream, check_whole
from soaking.server_load import ServerLoad, first
from soaking.soak import Settings, Soak, Stopped

BETWEEN = 0.02  # seconds between the parts of a request
CONNECTIONS = 4096  # bytes that a slow reader's socket holds


@dataclass
class Response:
    """What came back on a connection. `whole`: to its end, as HTTP has it."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False

    @classmethod
    def of(cls, raw: bytes) -> tuple[Response, bytes]:
        """Read the first response of what came on a connection; returns what is left behind it too."""
        head, found, body = raw.partition(b"\r\n\r\n")
        if not found:
            return cls(body=raw), b""
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if headers.get("transfer-encoding") == "chunked":
            body, whole, rest = unchunked(body)
        elif "content-length" in headers:
            length = int(headers["content-length"])
            body, whole, rest = body[:length], length <= len(body), body[length:]
        else:  # uvicorn's own 400, which ends with its connection
            whole, rest = True, b""
        return cls(int(first.split()[1]), headers, body, whole), rest


def unchunked(body: bytes) -> tuple[bytes, bool, bytes]:
    """A body in HTTP's chunks, whether it is there to its end, and what is left behind it."""
    found, at = bytearray(), 0
    while (line := body.find(b"\r\n", at)) >= 0:
        length, at = int(body[at:line], 16), line + 2
        data, end = body[at : at + length], body[at + length : at + length + 2]
        if end != b"\r\n":
            return bytes(found + data), False, b""
        found += data
        at += length + 2
        if not length:
            return bytes(found), True, body[at:]
    return bytes(found), False, b""


class ServerSoak(Soak):
    """A server under load; arguments as of `Soak`."""

    program, module = "acd-serve", "acd_local.cli.serve"
    leaves = True

    def __init__(self, settings: Settings, name: str, together: int) -> None:
        super().__init__(settings, name, together)
        self.load = ServerLoad(settings.seed, name, settings.pairs)
        self._port = 0

    def options(self) -> list[str]:
        return [
            *super().options(),
            "--port",
            "0",
            "--queue",
            str(self.settings.clients - self.together),
            "--keep-alive",
            "1",
        ]

    async def start(self) -> None:
        assert self.process.stdout is not None
        told = await self.process.stdout.readline()
        if not told:
            raise ConnectionError("the server does not start")
        self._port = json.loads(told)["port"]
        while (await self._get("/health")).status != 200:
            await asyncio.sleep(0.1)

    async def warm_up(self) -> None:
        await self.ask(first())
        self.load.tokens = self.found.seen["prompt tokens"] / FIRST

    async def ask(self, asked: Asked) -> None:
        self.found.sent(asked)
        try:
            raw = await self._exchange(asked)
        except ConnectionRefusedError:
            self.dead = True
            return
        except Stopped:
            self.found.ended(asked, "left")
            return
        except TimeoutError as error:
            self.found.ended(asked, "hung", [str(error)])
            return
        if asked.ends == "left":
            self.found.ended(asked, "left")
            return
        for number in range(asked.times):
            try:
                response, rest = Response.of(raw)
            except ValueError as error:
                self.found.ended(asked, "no HTTP", [f"{error}: {raw[:200]!r}"])
                return
            if rest and number == asked.times - 1:
                self.found.fault(asked, f"behind the response came {rest[:200]!r}")
            await self._judge(asked, response, raw)
            raw = rest

    async def drained(self) -> bool:
        metrics = (await self._get("/metrics")).body.decode()
        numbers = dict(re.findall(r"^(acd_\S+) (\S+)$", metrics, re.M))
        for name, value in numbers.items():
            if re.match(r'acd_failures_total\{status="5', name) and float(value) != self.found.seen[name]:
                self.found.fault(None, f"the server counts {name} {value}")
                self.found.seen[name] = int(value)
        return {numbers.get("acd_requests_running"), numbers.get("acd_requests_waiting")} == {"0"}

    async def end(self) -> int:
        self.process.terminate()
        return 128 + signal.SIGTERM

    # -- one request --------------------------------------------------------------------------------------------------

    async def _judge(self, asked: Asked, response: Response, raw: bytes) -> None:
        status, body = response.status, response.body
        if asked.ends == "closed":
            good = raw == b"" or 400 <= status < 500
            self.found.ended(asked, f"status {status or 'none'}", [] if good else [f"answered: {raw[:200]!r}"])
            return
        problems = [] if response.status and response.whole else [f"the response is not whole: {raw[-200:]!r}"]
        if asked.ends == "look":
            problems += [] if status == 200 else [f"status {status}"]
        elif status != 200:
            problems += check_error(asked, status, body)
            if status == 429 and "retry-after" not in response.headers:
                problems.append("429 without Retry-After")
        elif response.headers.get("content-type") == "text/event-stream":
            problems += check_stream(asked, body, self.found)
        else:
            problems += check_whole(asked, body, self.found)
        self.found.ended(asked, f"status {status}", problems)
        if status == 429:
            await self._wait(1)

    async def _exchange(self, asked: Asked) -> bytes:
        """Send a request, and read what comes until the server closes the connection or this client leaves it."""
        reader, writer = await self._open(small=asked.pause > 0)
        raw = bytearray()
        try:
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # refused before all of it was sent
                for i, part in enumerate(asked.parts):
                    if i:
                        await asyncio.sleep(BETWEEN)
                    writer.write(part)
                    await writer.drain()
            with contextlib.suppress(ConnectionResetError):
                while asked.at is None or len(raw) < asked.at:
                    data = await self.patient(asyncio.ensure_future(reader.read(1000 if asked.pause else 65536)))
                    if not data:
                        break
                    raw += data
                    if asked.pause:
                        await self._wait(asked.pause)
                if asked.at == 0:
                    await self._wait(asked.pause)
        finally:
            writer.transport.abort() if asked.ends == "left" and asked.number % 2 else writer.close()
        return bytes(raw)

    async def _wait(self, seconds: float) -> None:
        """Sleep, but not on when the run is to end, and not for long in a short run."""
        seconds = min(seconds, self.settings.seconds / 10)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), seconds)

    async def _open(self, *, small: bool = False) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        connection = socket.socket()
        connection.setblocking(False)
        if small:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, CONNECTIONS)
        try:
            await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self._port))
        except BaseException:
            connection.close()
            raise
        return await asyncio.open_connection(sock=connection, limit=CONNECTIONS if small else 65536)

    async def _get(self, path: str) -> Response:
        reader, writer = await self._open()
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        raw = await self.patient(asyncio.ensure_future(reader.read()))
        writer.close()
        return Response.of(raw)[0]
