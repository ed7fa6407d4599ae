"""One queue and one decoding thread for whoever asks; conversations that are kept apart from those that are decoded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from manual import DEFAULT

from acd_local import CancelToken, Engine, Options
from acd_local.answers import Answer
from acd_local.dispatch import Dispatcher, Job, Started, Told
from acd_local.errors import EngineBusyError, EngineClosedError, InternalError, PairError, UsageError

SHORT = Options(max_tokens=4, temp=0.0)
ENDLESS = Options(max_tokens=600, grammar='root ::= "a" root')


class Asker:
    """One job and all that it is told."""

    def __init__(self, engine: Engine, options: Options = SHORT, prompt: str = "Hi", **how: Any) -> None:
        self.told: list[Told] = []
        self.ended, self.said = threading.Event(), threading.Event()
        self.behind = False
        cancel = CancelToken()
        self.job = Job(
            lambda: engine.generate(prompt, options, cancel=cancel, **how), self.tell, cancel, lambda: self.behind
        )

    def tell(self, what: Told) -> None:
        assert not self.ended.is_set(), "nothing comes after the end"
        self.told.append(what)
        if isinstance(what, str):
            self.said.set()
        if isinstance(what, Answer | Exception):
            self.ended.set()

    def end(self) -> Answer | Exception:
        assert self.ended.wait(30)
        last = self.told[-1]
        assert isinstance(last, Answer | Exception)
        return last

    def answer(self) -> Answer:
        last = self.end()
        assert isinstance(last, Answer)
        return last


@pytest.fixture(scope="module")
def engine(tiny: Callable[..., Path]) -> Iterator[Engine]:
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=1024, threads=1, conversations=2) as engine:
        yield engine


def test_jobs_are_answered_in_their_order_and_told_of_it(engine: Engine) -> None:
    dispatcher, order = Dispatcher(engine), []
    askers = [Asker(engine, prompt=f"What is {i}?") for i in range(5)]
    for asker in askers:
        dispatcher.submit(asker.job)
    assert (dispatcher.waiting, dispatcher.running) == (5, 0)
    dispatcher.finish()
    for i, asker in enumerate(askers):
        asker.job.tell = lambda what, i=i, tell=asker.tell: (order.append((i, what)), tell(what))  # type: ignore[misc]
    dispatcher.run()
    assert [i for i, what in order if isinstance(what, Started)] == [*range(5)]
    for i, asker in enumerate(askers):
        assert isinstance(asker.told[0], Started)
        assert asker.answer().text == "".join(what for what in asker.told if isinstance(what, str))
        assert asker.answer().text == engine.generate(f"What is {i}?", SHORT).run().text
    with pytest.raises(EngineClosedError):
        dispatcher.submit(Asker(engine).job)


def test_its_own_thread_is_there_while_there_are_jobs(engine: Engine) -> None:
    dispatcher = Dispatcher(engine, threaded=True)
    for _ in range(3):
        asker = Asker(engine)
        dispatcher.submit(asker.job)
        assert asker.answer().finish_reason == "length"
    for thread in [t for t in threading.enumerate() if t.name == "acd-decoder"]:
        thread.join(5)
        assert not thread.is_alive()


def test_the_queue_is_bounded_where_it_should_be(engine: Engine) -> None:
    dispatcher = Dispatcher(engine, most_waiting=1, threaded=True)
    running = [Asker(engine, ENDLESS) for _ in range(2)]
    for asker in running:
        dispatcher.submit(asker.job)
        assert asker.said.wait(30)
    waiting = Asker(engine)
    dispatcher.submit(waiting.job)
    with pytest.raises(EngineBusyError, match="1 requests are waiting"):
        dispatcher.submit(Asker(engine).job)
    dispatcher.cancel(waiting.job)
    assert waiting.ended.is_set(), "a waiting job ends at once"
    assert waiting.answer().finish_reason == "cancelled"
    assert [type(what) for what in waiting.told] == [Answer]
    dispatcher.submit((again := Asker(engine)).job)
    dispatcher.cancel(running[0].job)
    assert running[0].answer().finish_reason == "cancelled"
    assert again.answer().finish_reason == "length"
    dispatcher.cancel(running[1].job)
    dispatcher.cancel(running[1].job)
    assert running[1].answer().text.startswith("a")


def test_stopping_ends_what_runs_and_what_waits(engine: Engine) -> None:
    dispatcher = Dispatcher(engine, threaded=True)
    askers = [Asker(engine, ENDLESS) for _ in range(4)]
    askers[0].behind = True
    for asker in askers:
        dispatcher.submit(asker.job)
    assert askers[1].said.wait(30)
    dispatcher.stop()
    assert {asker.answer().finish_reason for asker in askers} == {"cancelled"}
    with pytest.raises(EngineClosedError):
        dispatcher.submit(Asker(engine).job)


def test_a_reader_that_is_behind_is_waited_for_and_holds_up_nobody(engine: Engine) -> None:
    dispatcher = Dispatcher(engine, threaded=True)
    slow, other = Asker(engine, ENDLESS), Asker(engine, Options(max_tokens=50, grammar='root ::= "b" root'))
    dispatcher.submit(slow.job)
    assert slow.said.wait(30)
    slow.behind = True
    dispatcher.submit(other.job)
    assert other.answer().text == "b" * 50
    told = len(slow.told)
    assert told < 600
    slow.behind = False
    dispatcher.wake()
    assert slow.answer().text == "a" * 600


def test_an_error_ends_its_own_job_alone(engine: Engine) -> None:
    dispatcher = Dispatcher(engine, threaded=True)
    jobs = [Asker(engine, pair="no-such"), Asker(engine, Options(grammar="root ::= (")), Asker(engine)]
    for asker in jobs:
        dispatcher.submit(asker.job)
    assert isinstance(jobs[0].end(), PairError) and isinstance(jobs[1].end(), UsageError)
    assert jobs[2].answer().text


@pytest.mark.parametrize("threaded", [True, False])
def test_an_error_of_the_thread_ends_all_jobs(engine: Engine, threaded: bool) -> None:
    def lags() -> bool:
        raise ZeroDivisionError("the asker's fault")

    dispatcher = Dispatcher(engine, threaded=threaded)
    jobs = [Asker(engine, ENDLESS), Asker(engine), Asker(engine)]
    jobs[1].job.lags = lags
    for asker in jobs:
        dispatcher.submit(asker.job)
    if not threaded:
        with pytest.raises(ZeroDivisionError):
            dispatcher.run()
    assert all(isinstance(asker.end(), InternalError) for asker in jobs)
    dispatcher.submit((again := Asker(engine)).job)
    dispatcher.finish()
    if not threaded:
        dispatcher.run()
    assert again.answer().text, "and the next are answered"


# -- conversations that are kept ---------------------------------------------------------------------------------------


TALK = "the water is blue and the wine is red " * 20


def talk(engine: Engine, chats: list[str]) -> list[int]:
    """Rows that were decoded for the prompt of each of these answers; a chat's name is its first word."""
    spoken: dict[str, list[dict[str, str]]] = {}
    rows = []
    for name in chats:
        turns = spoken.setdefault(name, [])
        turns.append({"role": "user", "content": f"{name} {TALK if not turns else 'And?'}"})
        answer = engine.generate(turns, SHORT).run()
        turns.append({"role": "assistant", "content": answer.text})
        rows.append(answer.prompt_decoded)
    return rows


def test_a_title_request_leaves_the_chats_cache_alone(tiny: Callable[..., Path]) -> None:
    """Answers are decoded one by one, and yet two conversations are kept."""
    chats = ["chat", "title", "chat"]
    rows = []
    for slots in (1, 2):
        with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=1024, threads=1, slots=slots) as engine:
            assert len(engine.decoder.slots) == slots
            assert engine.decoder.can_draft
            rows.append(talk(engine, chats)[2])
    assert rows[0] > 300 > 100 > rows[1]


def test_the_longest_unused_conversation_gives_way(tiny: Callable[..., Path]) -> None:
    """However long it is; and one that begins with the same word is another conversation."""
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=1024, threads=1, slots=2) as engine:
        rows = talk(engine, ["old", "new", "title", "new", "title", "new"])
        assert min(rows[:3]) > 300, "each of them is new"
        assert max(rows[3:]) < 100
        word = engine.generate("new carpet", SHORT).run()
        assert word.prompt_decoded < 100
        assert talk(engine, ["other"])[0] > 300


def test_fewer_slots_than_answers_at_once_are_refused(tiny: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="slots must be at least the 2"):
        Engine(tiny("chatml"), conversations=2, slots=1)
    with pytest.raises(UsageError, match="slots must be a whole number from 1"):
        Engine(tiny("chatml"), slots=0)
