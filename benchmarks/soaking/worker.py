"""Drives `acd-run MODEL --jsonl`."""

from __future__ import annotations

import asyncio
import contextlib
import json

from soaking.load import FIRST, Asked, as_bytes, first_text
from soaking.soak import Settings, Soak
from soaking.worker_checks import Ledger
from soaking.worker_load import WorkerLoad

PAUSE = 0.05  # seconds between the parts of a line


class WorkerSoak(Soak):
    """A worker under load; arguments as of `Soak`."""

    program, module = "acd-run", "acd_local.cli.run"

    def __init__(self, settings: Settings, name: str, together: int) -> None:
        super().__init__(settings, name, together)
        self.load = WorkerLoad(settings.seed, name, settings.pairs)
        self._ledger = Ledger(self.found)
        self._line = 1  # number of the next one
        self._writing = asyncio.Lock()
        self._ends: dict[int, asyncio.Future[bytes]] = {}  # by request
        self._tasks: set[asyncio.Task[None]] = set()
        self._free = asyncio.Event()  # cleared while nothing is read
        self._free.set()

    def options(self) -> list[str]:
        return [*super().options(), "--jsonl"]

    async def start(self) -> None:
        self._ready: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._reading = asyncio.create_task(self._read())
        await self._ready

    async def warm_up(self) -> None:
        fields = {"id": "first", "prompt": first_text(), "max_tokens": 4, "pair": "as-is"}
        await self.ask(Asked(-1, "first", fields, (as_bytes(fields) + b"\n",)))
        self.load.tokens = self.found.seen["prompt tokens"] / FIRST

    async def ask(self, asked: Asked) -> None:
        if asked.pause:
            self._free.clear()
        end = self._ends[asked.number] = asyncio.get_running_loop().create_future()
        async with self._writing:
            self._line = self._ledger.sent(asked, self._line)
            writing = asyncio.create_task(self._write(asked.parts))
            if asked.pause:
                await asyncio.sleep(asked.pause)
                self._free.set()
            await writing
        if asked.at == 0:
            await self._cancel(asked)
        with contextlib.suppress(ConnectionError):
            await self.patient(end)
        del self._ends[asked.number]

    async def drained(self) -> bool:
        return not self._ledger.waiting

    async def end(self) -> int:
        """Half a line, and then nothing: it is refused, what waits is answered, and the worker ends."""
        last = Asked(-2, "half a line", parts=(b'{"id": 1, "prompt": "Hi', b"\n"), ends="line")
        async with self._writing:
            self._ledger.sent(last, self._line)
            await self._write(last.parts[:1])
            assert self.process.stdin is not None
            self.process.stdin.close()
        await self._reading
        return 0

    def close(self) -> None:
        self._ledger.finish()

    def stop(self) -> None:
        super().stop()
        for asked in self._ledger.open():
            self._cancel_soon(asked)

    # -- reading and writing ------------------------------------------------------------------------------------------

    async def _write(self, parts: tuple[bytes, ...]) -> None:
        stdin = self.process.stdin
        assert stdin is not None
        with contextlib.suppress(ConnectionError):
            for i, part in enumerate(parts):
                if i:
                    await asyncio.sleep(PAUSE)
                stdin.write(part)
                await stdin.drain()

    def _cancel_soon(self, asked: Asked) -> None:
        task = asyncio.create_task(self._cancel(asked))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _cancel(self, asked: Asked) -> None:
        async with self._writing:
            self._ledger.cancelled(asked, self._line)
            self._line += 1
            await self._write((as_bytes({"id": asked.fields["id"], "cancel": True}) + b"\n",))

    async def _read(self) -> None:
        stdout = self.process.stdout
        assert stdout is not None
        rest = b""
        while data := await stdout.read(65536):
            self.heard()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._take(line)
            await self._free.wait()
        if rest:
            self.found.fault(None, f"the output ends in half a line: {rest[-200:]!r}")
        self.dead = True
        for end in self._ends.values():
            if not end.done():
                end.set_exception(ConnectionError("the worker has ended"))
        if not self._ready.done():
            self._ready.set_exception(ConnectionError(f"the worker does not start: {self.said}"))

    def _take(self, line: bytes) -> None:
        """Take an event in."""
        try:
            event = json.loads(line)
        except ValueError:
            self.found.fault(None, f"not JSON: {line[:200]!r}")
            return
        if event.get("event") in ("loading", "ready"):
            if event["event"] == "ready" and not self._ready.done():
                self._ready.set_result(b"")
            return
        told = self._ledger.told(event)
        if told is None:
            return
        number = told.asked.number
        if told.ended:
            end = self._ends.get(number)
            if end is not None and not end.done():
                end.set_result(b"")
        elif told.asked.at == told.events:
            self._cancel_soon(told.asked)
