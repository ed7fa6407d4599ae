"""Owns what the server answers with: the engine, once it is loaded, its queue and the counts of what was done."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from acd_local import __version__, pairs
from acd_local.answers import Answer
from acd_local.dispatch import Dispatcher, Job
from acd_local.engine import Engine
from acd_local.errors import EngineClosedError
from acd_local.generation import AnswerStream, resolve_contrast
from acd_local.options import Options
from acd_local.records import model_record, pair_name, pair_record
from acd_local.runtime import grammar
from acd_local.serve.feed import Feed
from acd_local.serve.openai import Asked
from acd_local.serve.policy import GuardPolicy
from acd_local.serve.replies import Reply, failure


@dataclasses.dataclass(frozen=True)
class Settings:
    """What holds for every answer of a server.

    Attributes:
        options, system: where a request says nothing.
        locked: see `GuardPolicy`.
        most_waiting: requests that may wait.
        keep_alive: seconds of silence after which a stream's client is told that it still comes; None: never.
    """

    options: Options
    system: str | None = None
    locked: bool = False
    most_waiting: int = 32
    keep_alive: float | None = 10.0


class Service:
    """One engine for all requests. It is there at once, and answers once `load` has returned.

    Attributes:
        loading: how far that is, from 0 to 1, and what is being done.
        draining: no new answers are begun.
        started: when, in seconds since 1970.
        counts: what was done, by name and labels.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.loading: tuple[str, float] = ("check", 0.0)
        self.draining = False
        self.started = int(time.time())
        self.counts: defaultdict[str, float] = defaultdict(float)
        self.engine: Engine | None = None
        self._dispatcher: Dispatcher | None = None
        self._stopped = False

    def load(self, make: Callable[..., Engine]) -> None:
        """Make the engine; blocks. `make` takes `on_progress` and `on_check`, see `Engine`."""

        def progress(phase: str) -> Callable[[float], None]:
            def tell(fraction: float) -> None:
                self.loading = (phase, fraction)
                if self.draining:
                    raise EngineClosedError("the server is ending")

            return tell

        engine = make(on_progress=progress("model"), on_check=progress("check"))
        self._guard = self._guard_of(engine)
        self._dispatcher = Dispatcher(engine, most_waiting=self.settings.most_waiting)
        threading.Thread(target=self._decode, args=(self._dispatcher,), name="acd-decoder", daemon=True).start()
        self.engine = engine

    def _decode(self, dispatcher: Dispatcher) -> None:
        """Decode until `stop`: a thread that stays spares every answer the start of llama.cpp's own threads."""
        while not self._stopped:
            with suppress(Exception):  # all jobs were told of it
                dispatcher.run()

    def ready(self) -> Engine:
        """Return the engine.

        Raises:
            EngineClosedError: it is being loaded, or the server is ending.
        """
        if self.draining:
            raise EngineClosedError("the server is ending")
        if self.engine is None:
            raise EngineClosedError("the model is being loaded")
        return self.engine

    @property
    def name(self) -> str:
        """The model's."""
        assert self.engine is not None
        return self.engine.info.name or self.engine.info.path.stem

    @property
    def queue(self) -> tuple[int, int]:
        """Requests that wait, and that are answered."""
        at = self._dispatcher
        return (0, 0) if at is None else (at.waiting, at.running)

    # -- answering -----------------------------------------------------------------------------------------------------

    def prepare(self, asked: Asked, feed: Feed) -> tuple[AnswerStream, Reply]:
        """Make the answer to a request, which nobody has begun; blocks while a schema is compiled or a file is read.

        Raises:
            AcdError: it cannot be answered.
        """
        engine, settings = self.ready(), self.settings
        pair = self._guard.check(asked.guard)
        grammar.from_options(asked.options, engine.vocab, engine.info.path)
        stream = engine.generate(
            asked.turns,
            asked.options,
            system=settings.system if asked.system is None else asked.system,
            pair=None if pair == self._guard.holds["pair"] else pair,  # the server's may have no place by its name
            divergence=asked.divergence,
            trace=asked.trace,
            logprobs=asked.logprobs,
            on_event=feed.tell,
            cancel=feed.cancel,
        )
        return stream, Reply(asked, self.name, pair_name(stream.pair), settings.locked)

    def submit(self, stream: AnswerStream, feed: Feed) -> Job:
        """Queue an answer; what happens to it comes through its feed.

        Raises:
            EngineBusyError, EngineClosedError.
        """
        assert self._dispatcher is not None
        job = Job(lambda: stream, feed.tell, feed.cancel, feed.lags)
        self._dispatcher.submit(job)
        return job

    def cancel(self, job: Job) -> None:
        """End an answer that nobody wants any more."""
        assert self._dispatcher is not None
        self._dispatcher.cancel(job)

    def caught_up(self) -> None:
        """Look again at a reader that was behind."""
        assert self._dispatcher is not None
        self._dispatcher.wake()

    def stop(self) -> None:
        """End all answers, and take no more."""
        self.draining = self._stopped = True
        if self._dispatcher is not None:
            self._dispatcher.stop()

    def close(self) -> None:
        """Free the model."""
        self.stop()
        if self.engine is not None:
            self.engine.close()

    # -- what is told --------------------------------------------------------------------------------------------------

    def count(self, name: str, by: float = 1) -> None:
        self.counts[name] += by

    def count_answer(self, answer: Answer) -> None:
        """Count a finished answer."""
        self.count(f'answers_total{{finish_reason="{answer.finish_reason}"}}')
        self.count("prompt_tokens_total", answer.prompt_tokens)
        self.count("prompt_rows_decoded_total", answer.prompt_decoded)
        self.count("completion_tokens_total", answer.completion_tokens)
        if not self.settings.locked:  # see `Reply`
            self.count("changed_tokens_total", answer.contrast.changed_tokens)
        self.count("prompt_seconds_total", answer.timings.prompt_seconds)
        self.count("answer_seconds_total", answer.timings.answer_seconds)
        if answer.gate is not None:
            self.count(f'gate_decisions_total{{decision="{answer.gate.decision}"}}')

    def count_failure(self, error: Exception) -> None:
        """Count a request that ended in an error."""
        self.count(f'failures_total{{status="{failure(error).status}"}}')

    def metrics(self) -> str:
        """Write the counts in Prometheus' text format."""
        waiting, running = self.queue
        loaded = int(self.engine is not None)
        gauges = {"requests_waiting": waiting, "requests_running": running, "model_loaded": loaded}
        lines = [line for name, value in gauges.items() for line in (f"# TYPE acd_{name} gauge", f"acd_{name} {value}")]
        told = set()
        for name, value in sorted(self.counts.items()):
            kind = name.partition("{")[0]
            lines += [f"# TYPE acd_{kind} counter"] if kind not in told else []
            lines.append(f"acd_{name} {value:.15g}")
            told.add(kind)
        return "\n".join(lines) + "\n"

    def props(self) -> dict[str, Any]:
        """Say what a client wants to know before it asks."""
        engine, settings = self.ready(), self.settings
        decoder = engine.decoder
        return {
            "version": __version__,
            "model": model_record(engine) | {"id": self.name},
            "pair": pair_record(engine, engine.pair, settings.options),
            "pairs": list(self._guard.pairs),
            "guard": dict(self._guard.holds),
            "locked": settings.locked,
            "ctx_size": engine.n_ctx,
            "parallel": decoder.conversations,
            "slots": len(decoder.slots),
            "options": dataclasses.asdict(settings.options) | {"system": settings.system},
            "warning": engine.warning,
        }

    def _guard_of(self, engine: Engine) -> GuardPolicy:
        options, pair = self.settings.options, engine.pair
        contrast = resolve_contrast(options, pair, soft=engine.takes_soft(pair))
        gating = engine.gating(pair, options)
        holds = {
            "alpha": contrast.alpha,
            "beta": contrast.beta,
            "plain": options.plain,
            "gate": gating is not None,
            "gate_threshold": None if gating is None else gating.settings.threshold,
            "window": contrast.window,
            "pair": pair_name(pair),
        }
        names = (pairs.AS_IS, *(one.name for one in pairs.available()), pair_name(pair))
        return GuardPolicy(self.settings.locked, holds, tuple(dict.fromkeys(names)))
