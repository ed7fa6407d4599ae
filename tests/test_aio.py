"""The asyncio interface: answers are awaited, and the event loop never waits."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from manual import DEFAULT

from acd_local import Answer, Engine, Options, PromptProgress, aio
from acd_local.answers import AnswerEvent
from acd_local.errors import ContextError, EngineBusyError, EngineClosedError, ModelError, UsageError

SHORT = Options(max_tokens=12, temp=0.0)
ENDLESS = Options(max_tokens=400, grammar='root ::= "a" root')
LONG = "the water is blue and the wine is red " * 150
QUESTIONS = ["What is red?", "What is blue?", "Why?", "And wine?", "Hi"]


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("chatml")


@pytest.fixture(scope="module")
def slow_model(tiny: Callable[..., Path]) -> Path:
    """It takes seconds for LONG."""
    return tiny("chatml", n_embd=256, n_layers=4, n_ctx=4096)


def with_engine(model: Path, use: Callable[[aio.AsyncEngine], Coroutine[Any, Any, None]], **settings: Any) -> None:
    async def main() -> None:
        async with await aio.load(model, pair=DEFAULT, **{"ctx_size": 1024, "threads": 1} | settings) as engine:
            await use(engine)

    asyncio.run(main())
    assert decoding() == []


def decoding() -> list[threading.Thread]:
    """The threads that are there only while there is something to decode."""
    deadline = time.monotonic() + 5
    while (found := [t for t in threading.enumerate() if t.name == "acd-decoder"]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


async def first(stream: aio.AsyncStream) -> str:
    return await anext(aiter(stream))


def test_answers_are_those_of_the_plain_api(model: Path) -> None:
    with Engine(model, pair=DEFAULT, ctx_size=1024, threads=1) as engine:
        chat = engine.chat(system="Be brief.", options=SHORT)
        expected = [chat.ask(q).text for q in QUESTIONS[:2]]
        again = chat.regenerate(seed=4, temp=1.0).run().text
        alone = engine.generate("Hi", SHORT, divergence=True).run()

    async def use(engine: aio.AsyncEngine) -> None:
        chat = engine.chat(system="Be brief.", options=SHORT)
        stream = chat.stream(QUESTIONS[0])
        with pytest.raises(UsageError, match="not finished"):
            _ = stream.answer
        pieces = [text async for text in stream]
        assert all(isinstance(text, str) and text for text in pieces)
        assert "".join(pieces) == stream.answer.text == expected[0]
        seen: list[str] = []
        answer = await chat.ask(QUESTIONS[1], seen.append)
        assert "".join(seen) == answer.text == expected[1]
        assert (await chat.regenerate(seed=4, temp=1.0).run()).text == again
        assert [m.content for m in chat.chat.messages] == [QUESTIONS[0], expected[0], QUESTIONS[1], again]
        other = await engine.generate("Hi", SHORT, divergence=True).run()
        assert (other.text, other.contrast) == (alone.text, alone.contrast)

    with_engine(model, use)


@pytest.mark.parametrize("conversations", [1, 3])
def test_many_at_once(model: Path, conversations: int) -> None:
    """Together, or in turns: each gets what it gets alone, and its callbacks run in the event loop."""
    with Engine(model, pair=DEFAULT, ctx_size=1024, threads=1) as engine:
        expected = [engine.generate(q, SHORT).run().text for q in QUESTIONS]

    async def use(engine: aio.AsyncEngine) -> None:
        threads, order = set(), []

        async def ask(i: int) -> Answer:
            def note(text: str) -> None:
                threads.add(threading.current_thread())
                order.append(i)

            events: list[object] = []
            answer = await engine.chat(options=SHORT).ask(QUESTIONS[i], note, on_event=events.append)
            assert events and isinstance(events[0], PromptProgress)
            return answer

        answers = await asyncio.gather(*(ask(i) for i in range(len(QUESTIONS))))
        assert [answer.text for answer in answers] == expected
        assert threads == {threading.current_thread()}
        interleaved = order != sorted(order, key=order.index)
        assert interleaved == (conversations > 1)

    with_engine(model, use, conversations=conversations)


def test_the_event_loop_runs_on(slow_model: Path) -> None:
    """While the model is loaded, while a long prompt is decoded, while the engine is closed."""

    async def main() -> None:
        gaps, done = [], asyncio.Event()

        async def tick() -> None:
            while not done.is_set():
                before = time.perf_counter()
                await asyncio.sleep(0.005)
                gaps.append(time.perf_counter() - before)

        ticking = asyncio.create_task(tick())
        loading: list[float] = []
        engine = await aio.load(slow_model, pair=DEFAULT, ctx_size=4096, threads=1, on_progress=loading.append)
        began = time.perf_counter()
        answer = await engine.chat(options=SHORT).ask(LONG)
        took = time.perf_counter() - began
        await engine.close()
        done.set()
        await ticking
        assert answer.finish_reason == "length"
        assert loading[0] == 0 and loading[-1] == 1
        assert took > 0.5
        assert max(gaps) < 0.7 * took, "never for as long as it takes to read the prompt"
        assert len(gaps) > 20

    asyncio.run(main())


def test_cancelling_a_task_cancels_its_answer(model: Path) -> None:
    async def use(engine: aio.AsyncEngine) -> None:
        chat, said = engine.chat(options=ENDLESS), []
        task = asyncio.create_task(chat.ask("Hi", said.append))
        while len(said) < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # It has ended: the chat is idle, the slot free, and what was said has joined the chat.
        (_, answer) = chat.chat.messages
        assert set(answer.content) == {"a"} and 3 <= len(answer.content) < 100
        assert (await chat.ask("Again", max_tokens=2)).finish_reason == "length"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await engine.chat(options=ENDLESS).ask("Hi")
        assert (await engine.generate("Hi", SHORT).run()).finish_reason == "length"

    with_engine(model, use)


def test_cancelling_within_a_long_prompt(slow_model: Path) -> None:
    async def use(engine: aio.AsyncEngine) -> None:
        batches: list[AnswerEvent] = []
        chat = engine.chat(options=SHORT)
        task = asyncio.create_task(chat.ask(LONG, on_event=batches.append))
        while not batches:
            await asyncio.sleep(0.001)
        waiting = asyncio.create_task(engine.generate("Hi", SHORT).run())
        await asyncio.sleep(0.05)
        cancelled, begun = time.perf_counter(), len(batches)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(batches) <= begun + 2, "the batch at hand is the last one"
        assert time.perf_counter() - cancelled < 10
        assert chat.chat.messages == []
        assert (await waiting).finish_reason == "length"
        assert time.perf_counter() - cancelled < 20

    with_engine(slow_model, use, ctx_size=4096)


def test_a_waiting_answer_is_cancelled_at_once(model: Path) -> None:
    async def use(engine: aio.AsyncEngine) -> None:
        running = engine.generate("Hi", ENDLESS)
        await first(running)
        chat = engine.chat(options=SHORT)
        stream = chat.stream("Hi")
        waiting = asyncio.create_task(stream.run())
        task = asyncio.create_task(engine.generate("Hi", SHORT).run())
        await asyncio.sleep(0.01)
        stream.cancel()
        answer = await waiting
        assert (answer.finish_reason, answer.text, answer.prompt_decoded) == ("cancelled", "", 0)
        assert chat.chat.messages == []
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        running.cancel()
        assert set(await rest(running)) == {"a"}
        assert running.answer.finish_reason == "cancelled"
        assert (await chat.ask("Hi")).finish_reason == "length"

    with_engine(model, use)


async def rest(stream: aio.AsyncStream) -> str:
    return "".join([text async for text in stream])


def test_leaving_and_dropping_a_stream_frees_its_slot(model: Path) -> None:
    async def use(engine: aio.AsyncEngine) -> None:
        chat = engine.chat(options=ENDLESS)
        async with chat.stream("Hi") as stream:
            async for _ in stream:
                break
        assert len(chat.chat.messages) == 2, "as it was closed half-way"
        async for _ in engine.generate("Hi", ENDLESS):
            break
        gc.collect()
        assert (await asyncio.wait_for(engine.generate("Hi", SHORT).run(), 5)).text

    with_engine(model, use)


def test_a_stream_closed_by_another_task_ends_for_its_reader(model: Path) -> None:
    async def use(engine: aio.AsyncEngine) -> None:
        stream = engine.generate("Hi", ENDLESS)
        await first(stream)
        readers = [asyncio.create_task(rest(stream)) for _ in range(2)]
        await asyncio.sleep(0.05)
        await asyncio.wait_for(stream.aclose(), 5)
        await asyncio.wait_for(asyncio.gather(*readers), 5)

    with_engine(model, use)


def test_a_slow_reader_is_waited_for_and_holds_up_nobody(model: Path) -> None:
    async def use(engine: aio.AsyncEngine) -> None:
        slow = engine.generate("Hi", ENDLESS)
        await first(slow)
        other = engine.generate("Hi", Options(max_tokens=300, grammar='root ::= "b" root'))
        assert await rest(other) == "b" * 300
        await asyncio.sleep(0.1)
        ahead = slow._job.unread
        assert ahead <= aio.AHEAD + 1
        assert len(await rest(slow)) == 399

    with_engine(model, use, conversations=2)


def test_errors_come_out(model: Path, tmp_path: Path) -> None:
    async def use(engine: aio.AsyncEngine) -> None:
        chat = engine.chat(options=SHORT)
        with pytest.raises(ContextError):
            await chat.ask("wine " * 3000)
        assert chat.chat.messages == []
        with pytest.raises(UsageError, match="did you mean temp"):
            await chat.ask("Hi", temperature=1)
        with pytest.raises(UsageError, match="messages"):
            engine.generate([])
        stream = chat.stream("Hi", max_tokens=1000, grammar='root ::= "a" root')
        await first(stream)
        with pytest.raises(EngineBusyError, match="still answering"):
            await chat.ask("Me too")
        await stream.aclose()
        assert [text async for text in stream] == []

    with_engine(model, use)
    with pytest.raises(ModelError):
        asyncio.run(aio.load(tmp_path / "none.gguf"))
    with pytest.raises(UsageError, match="did you mean ctx_size"):
        asyncio.run(aio.load(model, ctx=5))


def test_closing_ends_what_runs_waits_and_rests(model: Path) -> None:
    async def main() -> None:
        engine = await aio.load(model, pair=DEFAULT, ctx_size=1024, threads=1, conversations=2)
        resting = engine.generate("Hi", ENDLESS)
        await first(resting)
        await asyncio.sleep(0.3)
        tasks = [asyncio.create_task(engine.generate("Hi", ENDLESS).run()) for _ in range(3)]
        await asyncio.sleep(0.02)
        await engine.close()
        for ended in await asyncio.gather(*tasks, rest(resting), return_exceptions=True):
            assert isinstance(ended, EngineClosedError)
        chat = engine.chat()
        for _ in range(2):  # it is not busy afterwards
            with pytest.raises(EngineClosedError):
                await chat.ask("Hi")

    asyncio.run(main())
    assert decoding() == []


def test_a_cancelled_load_stops_and_leaves_nothing(slow_model: Path) -> None:
    from acd_local.runtime import lifetime

    async def main() -> None:
        before, begun = set(lifetime._owned), asyncio.Event()
        task = asyncio.create_task(aio.load(slow_model, pair=DEFAULT, on_progress=lambda _: begun.set()))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.get_running_loop().shutdown_default_executor()
        gc.collect()
        assert set(lifetime._owned) == before

    asyncio.run(main())


@pytest.mark.parametrize("patience", [0, 0.5], ids=["running", "resting"])
def test_a_loop_that_ends_takes_its_answers_with_it(model: Path, patience: float) -> None:
    kept: list[aio.AsyncStream] = []

    async def main(engine: aio.AsyncEngine) -> None:
        kept.append(engine.generate("Hi", Options(max_tokens=900, grammar='root ::= "a" root')))
        await first(kept[0])
        await asyncio.sleep(patience)

    with Engine(model, pair=DEFAULT, ctx_size=1024, threads=1) as engine:
        asyncio.run(main(aio.AsyncEngine(engine)))
        assert decoding() == []
        assert engine.generate("Hi", SHORT).run().finish_reason == "length"
