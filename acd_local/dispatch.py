"""Lets one thread make all the answers that a program is asked for, whatever the way by which it is asked.

Jobs wait in the order in which they come, as many as the engine has conversations are decoded together, and each tells
its asker what happens to it. The worker, `aio` and the HTTP server are such ways.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, cast

from acd_local.answers import Answer
from acd_local.batch import BatchRunner
from acd_local.errors import EngineBusyError, EngineClosedError, InternalError
from acd_local.generation import Answerer, AnswerStream
from acd_local.runtime.cancel import CancelToken

PATIENCE = 0.1  # seconds: while all readers are behind, a cancel or the engine's end comes without notice


@dataclass(frozen=True)
class Started:
    """A job's answer is begun."""


# The last two end a job: exactly one of them comes, and nothing after it.
Told: TypeAlias = Started | str | Answer | Exception


class Job:
    """One answer that somebody waits for.

    Args:
        begin: makes the answer, which nobody has begun to read; called once. What it raises ends the job.
        tell: told what happens, by whichever thread decodes or cancels; it should return soon.
        cancel: of that answer.
        lags: whether the reader is so far behind that the answer should rest.
    """

    def __init__(
        self,
        begin: Callable[[], AnswerStream],
        tell: Callable[[Told], object],
        cancel: CancelToken,
        lags: Callable[[], bool] = lambda: False,
    ) -> None:
        self.begin, self.tell, self.cancel, self.lags = begin, tell, cancel, lags


class Dispatcher:
    """An engine's queue, and the one thread that decodes. Safe to use from several threads.

    Args:
        most_waiting: jobs that may wait; None: any number.
        threaded: a thread of its own decodes, which is there only while there are jobs. Otherwise whoever calls `run`
            does.
    """

    def __init__(self, engine: Answerer, *, most_waiting: int | None = None, threaded: bool = False) -> None:
        self._engine = engine
        self._most = None if most_waiting is None else most_waiting + engine.decoder.conversations
        self._threaded = threaded
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()  # guards what follows; never held while a job is told something
        self._waiting: deque[Job] = deque()
        self._running: set[Job] = set()
        self._finished = False  # no further job will come
        self._stopped = False

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs that have begun and not ended."""
        return len(self._running)

    def check_open(self) -> None:
        """Refuse where the engine is closed; never waits.

        Raises:
            EngineClosedError: it is. In a forked child there is no thread, and locks may be held for ever.
        """
        self._engine.decoder.check_open()

    def submit(self, job: Job) -> None:
        """Take a job in.

        Raises:
            EngineBusyError: too many are waiting.
            EngineClosedError: the engine is closed, or no jobs are taken any more.
        """
        self.check_open()
        with self._changed:
            if self._finished or self._stopped:
                raise EngineClosedError("no further requests are taken: the program is ending")
            if self._most is not None and len(self._waiting) + len(self._running) >= self._most:
                raise EngineBusyError(f"{len(self._waiting)} requests are waiting already: ask again later")
            self._waiting.append(job)
            self._changed.notify()
            if self._threaded and self._thread is None:
                self._thread = threading.Thread(target=self.run, name="acd-decoder", daemon=True)
                self._thread.start()

    def cancel(self, job: Job) -> None:
        """End a job as cancelled: a waiting one now, told by this thread; a running one within a decoding step."""
        job.cancel.set()
        with self._changed:
            if job not in self._waiting:
                return
            self._waiting.remove(job)
        _skip(job)

    def wake(self) -> None:
        """Look at the readers that were behind again."""
        with self._changed:
            self._changed.notify()

    def finish(self) -> None:
        """Take no further jobs; `run` returns once all have ended."""
        with self._changed:
            self._finished = True
            self._changed.notify()

    def stop(self) -> None:
        """Take no further jobs, and end what waits and what runs as cancelled. Returns at once."""
        with self._changed:
            self._stopped = True
            running = list(self._running)
            self._changed.notify()
        for job in running:
            job.cancel.set()

    def run(self) -> None:
        """Decode, until all jobs have ended and no further ones will come.

        An error of the decoding itself ends all jobs; it is raised here where this is not the dispatcher's own thread.
        """
        try:
            with BatchRunner(self._engine) as batch:
                while self._admit(batch):
                    for event in batch.step(resting=self._resting()):
                        self._deliver(cast(Job, event.key), event.what)
        except Exception as error:
            self._fail(InternalError(f"internal error: {type(error).__name__}: {error}"))
            if not self._threaded:
                raise

    def _admit(self, batch: BatchRunner) -> bool:
        """Begin jobs while there is room; waits while there is nothing to decode. False: all is done."""
        while True:
            with self._changed:
                if self._stopped:
                    skipped = list(self._waiting)
                    self._waiting.clear()
                    break
                if self._waiting and batch.room:
                    job = self._waiting.popleft()
                    self._running.add(job)
                elif self._running:
                    if len(self._resting()) < len(self._running):
                        return True
                    self._changed.wait(PATIENCE)
                    continue
                elif self._finished or self._threaded:
                    self._thread = None
                    return False
                else:
                    self._changed.wait()
                    continue
            self._begin(batch, job)
        for job in skipped:
            _skip(job)
        return len(self._running) > 0

    def _begin(self, batch: BatchRunner, job: Job) -> None:
        try:
            batch.add(job, job.begin())
        except Exception as error:
            self._deliver(job, error)
        else:
            job.tell(Started())

    def _resting(self) -> set[Job]:
        """Jobs whose readers are too far behind."""
        if self._engine.decoder.closed:
            return set()
        return {job for job in self._running if job.lags() and not job.cancel.is_set}

    def _deliver(self, job: Job, what: str | Answer | Exception) -> None:
        if not isinstance(what, str):
            with self._changed:
                self._running.discard(job)
        job.tell(what)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            jobs = [*self._running, *self._waiting]
            self._running.clear()
            self._waiting.clear()
            self._thread = None
        for job in jobs:
            job.tell(error)


def _skip(job: Job) -> None:
    """End a job that never begins."""
    what: Answer | Exception
    try:
        what = job.begin().skip()
    except Exception as error:
        what = error
    job.tell(what)
