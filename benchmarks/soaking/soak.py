"""Drives one process for a time: rounds of load, a rest after each, figures all the while, an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from soaking.checks import Found
from soaking.figures import Sample, look
from soaking.load import CONTEXT, Asked, Load, Pairs

ROOT = Path(__file__).resolve().parents[2]
SILENCE = 300  # ticks of a second without a sign of life; there are none while this process stands still
ENDLESS = 1800  # ticks after which a request is given up, whatever came
ENDING = 120  # ticks that a process may take to end


@dataclass(frozen=True)
class Settings:
    """What holds for a whole run.

    Attributes:
        model, draft: as for acd-run. pairs: the model's. threads: of each process.
        seed: of what is asked. seconds: how long.
        clients: how many requests are on their way at once, for each process.
        again: the number of the one request that is sent; None: all.
    """

    model: str
    draft: str
    pairs: Pairs
    threads: int
    seed: int
    seconds: float
    clients: int = 6
    again: int | None = None

    @property
    def rounds(self) -> int:
        """Of at least five minutes where there is time for two."""
        return max(2, min(12, int(self.seconds // 300)))

    @property
    def every(self) -> float:
        """Seconds between two samples."""
        return min(5.0, max(0.1, self.seconds / 100))


class Stopped(Exception):
    """The run is to end early."""


class Soak:
    """One process under load.

    Args:
        name: of the process, in the report.
        together: answers that it makes at once; where it is one, it drafts.

    Attributes:
        found: what came of it. samples: its figures. sent: requests.
    """

    program: str
    module: str
    load: Load
    leaves = False  # whether a request is over when nobody waits for it

    def __init__(self, settings: Settings, name: str, together: int) -> None:
        self.settings, self.name, self.together = settings, name, together
        self.found = Found()
        self.samples: list[Sample] = []
        self.sent = 0
        self.process: asyncio.subprocess.Process
        self.stopping = asyncio.Event()  # no further request is sent
        self.dead = False
        self.said: list[str] = []  # on stderr
        self._ticks = self._heard = 0.0

    async def run(self) -> None:
        """Start the process, ask it all that there is time for, and end it."""
        self.process = await spawn(self.module, self.options())
        errors, sampling, ticking = map(asyncio.create_task, (self._read_errors(), self._sample(), self._tick()))
        try:
            await self.start()
            await self.warm_up()
            self._say("under load")
            await self._rounds()
            sampling.cancel()
            await self._end()
        except Exception as error:  # a client of ours failed: the figures so far are still told
            self.found.fault(None, f"{type(error).__name__}: {error}")
        finally:
            await self._kill()
            sampling.cancel()
            ticking.cancel()
            await asyncio.gather(errors, sampling, ticking, return_exceptions=True)
            self.close()
        self._check_errors()

    def options(self) -> list[str]:
        given = self.settings
        drafts = ["--draft", given.draft, "--cache"] if self.together == 1 else []
        some = ["--threads", str(given.threads), "--ctx-size", str(CONTEXT), "--parallel", str(self.together)]
        return [given.model, *some, *drafts]

    async def start(self) -> None:
        """Wait until the process is ready."""
        raise NotImplementedError

    async def warm_up(self) -> None:
        """Ask once, so that what is made at the first request is there."""

    async def ask(self, asked: Asked) -> None:
        """Send a request and stay until it has ended."""
        raise NotImplementedError

    async def drained(self) -> bool:
        """Whether nothing is being answered."""
        raise NotImplementedError

    async def end(self) -> int:
        """Have the process end; returns the exit code that it should have."""
        raise NotImplementedError

    def close(self) -> None:
        """The process has ended: look at what is still open."""

    def stop(self) -> None:
        """End the run early."""
        self.stopping.set()

    # -- rounds -------------------------------------------------------------------------------------------------------

    async def _rounds(self) -> None:
        given = self.settings
        began = time.monotonic()
        if given.again is not None:
            await self._ask(self.load.request(given.again))
            self.sent += 1
        for number in range(given.rounds if given.again is None else 0):
            until = began + given.seconds * (number + 1) / given.rounds
            await asyncio.gather(*(self._client(until) for _ in range(given.clients)))
            if self.stopping.is_set() or self.dead:
                break
            await self._rest()
            about = f"{self.sent} requests, {len(self.found.faults)} faults, {self.samples[-1].private:.1f} MB private"
            self._say(f"round {number + 1} of {given.rounds}: {about}")

    def _say(self, what: str) -> None:
        print(f"{self.name}: {what}", file=sys.stderr, flush=True)

    async def _client(self, until: float) -> None:
        while time.monotonic() < until and not self.stopping.is_set() and not self.dead:
            number, self.sent = self.sent, self.sent + 1
            await self._ask(self.load.request(number))

    async def _ask(self, asked: Asked) -> None:
        asking, begun = asyncio.create_task(self.ask(asked)), self._ticks
        while not asking.done() and self._ticks - begun < ENDLESS:
            await asyncio.wait([asking], timeout=1)
        if not asking.done():
            self.found.fault(asked, f"it has not ended in {ENDLESS} s")
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking

    async def _rest(self) -> None:
        """Wait until nothing is answered any more, and look at what is still held."""
        begun = self._ticks
        with contextlib.suppress(Stopped):
            while not await self.drained():
                if self.dead or self._ticks - begun > SILENCE:
                    self.found.fault(None, "requests are still open though all clients have gone")
                    return
                await asyncio.sleep(0.1)
        await asyncio.sleep(0.5)  # connections are closed, children reaped
        if (sample := look(self.process.pid, time.monotonic(), rest=True)) is not None:
            self.samples.append(sample)

    # -- watching -----------------------------------------------------------------------------------------------------

    def heard(self) -> None:
        """Something came from the process."""
        self._heard = self._ticks

    async def patient(self, what: asyncio.Future[bytes]) -> bytes:
        """Wait for something, as long as there are signs of life.

        Raises:
            TimeoutError: there were none for SILENCE.
            Stopped: the run is to end, and what is not awaited any more `leaves` nothing behind.
        """
        while not what.done():
            if self.leaves and self.stopping.is_set():
                what.cancel()
                raise Stopped
            if self._ticks - self._heard > SILENCE:
                what.cancel()
                raise TimeoutError(f"nothing came for {SILENCE} s")
            await asyncio.wait([what], timeout=1)
        self.heard()
        return what.result()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(1)
            self._ticks += 1

    async def _sample(self) -> None:
        while (sample := look(self.process.pid, time.monotonic())) is not None:
            self.samples.append(sample)
            await asyncio.sleep(self.settings.every)

    async def _read_errors(self) -> None:
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            self.said.append(line.decode("utf-8", "replace").rstrip())

    def _check_errors(self) -> None:
        strange = [line for line in self.said if not line.startswith(f"{self.program}: ") or "rror" in line]
        if strange:
            self.found.fault(None, f"{len(strange)} lines on stderr, the last ones: " + " / ".join(strange[-6:]))

    # -- its end ------------------------------------------------------------------------------------------------------

    async def _end(self) -> None:
        if self.dead:
            self.found.fault(None, f"the process ended by itself: exit code {await self.process.wait()}")
            return
        expected, begun = await self.end(), self._ticks
        while self.process.returncode is None and self._ticks - begun < ENDING:
            await asyncio.sleep(0.1)
        if self.process.returncode != expected:
            self.found.fault(None, f"the exit code is {self.process.returncode}, not {expected}")

    async def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()


async def spawn(module: str, options: Sequence[str]) -> asyncio.subprocess.Process:
    """Start one of the package's commands, out of reach of this terminal's Ctrl-C."""
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        f"from {module} import main; main()",
        *options,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


async def run_all(soaks: Sequence[Soak]) -> bool:
    """Run all at once; returns whether Ctrl-C or SIGTERM ended that early. A second one ends this process."""
    loop, interrupted = asyncio.get_running_loop(), False

    def stop() -> None:
        nonlocal interrupted
        interrupted = True
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(signum)
        for soak in soaks:
            soak.stop()

    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stop)
    await asyncio.gather(*(soak.run() for soak in soaks))
    return interrupted
