"""Continuous batching: the same answers as one by one, and nobody suffers for a neighbour."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gates
import pytest
from manual import DEFAULT
from reference import TOLERANCE, fresh_logits

from acd_local import CancelToken, Engine, Message, Options, PromptProgress
from acd_local.answers import Answer, AnswerEvent
from acd_local.batch import BatchRunner, answer_all
from acd_local.errors import ContextError, EngineBusyError, EngineClosedError, UsageError
from acd_local.generation import AnswerStream
from acd_local.runtime import llama
from acd_local.runtime.prompts import PromptSetup
from acd_local.runtime.streams import Layout

SHORT = Options(max_tokens=12, temp=0.0)
QUESTIONS = [f"What is {thing}?" for thing in ("red", "blue wine", "a carpet", "the water of the river", "it", "wine")]


@pytest.fixture(scope="module")
def engine(tiny: Callable[..., Path]) -> Iterator[Engine]:
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, conversations=3, threads=1) as engine:
        yield engine


def run_all(engine: Engine, streams: list[AnswerStream]) -> dict[int, Answer | Exception]:
    """All answers, each added as soon as there is room; checks that the pieces are the text."""
    waiting, texts, ended = dict(enumerate(streams)), [""] * len(streams), {}
    with BatchRunner(engine) as batch:
        while waiting or len(batch):
            while waiting and batch.room:
                key = min(waiting)
                batch.add(key, waiting.pop(key))
            for event in batch.step():
                assert event.key not in ended
                if isinstance(event.what, str):
                    texts[event.key] += event.what  # type: ignore[index]
                else:
                    ended[event.key] = event.what
    for key, what in ended.items():
        assert not isinstance(what, Answer) or what.text == texts[key]  # type: ignore[index]
    return ended  # type: ignore[return-value]


def test_the_same_answers_as_one_by_one(engine: Engine) -> None:
    options = [
        SHORT,
        SHORT.replace({"plain": True}),
        Options(max_tokens=7, seed=3, temp=1.0),
        SHORT.replace({"window": 2}),
        Options(max_tokens=9, seed=4, temp=0.7, repeat_penalty=1.2),
        SHORT.replace({"grammar": "root ::= [a-z ]+"}),
    ]
    alone = [engine.generate(q, o).run() for q, o in zip(QUESTIONS, options, strict=True)]
    together = run_all(engine, [engine.generate(q, o) for q, o in zip(QUESTIONS, options, strict=True)])
    for i, answer in enumerate(alone):
        found = together[i]
        assert isinstance(found, Answer)
        assert (found.text, found.finish_reason, found.contrast, found.context_used) == (
            answer.text,
            answer.finish_reason,
            answer.contrast,
            answer.context_used,
        )


def test_an_answer_whose_prompt_is_there_joins_the_others_at_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so their batch has no gap where it is missing."""
    batches: list[list[int]] = []
    decode = llama.Context.decode
    monkeypatch.setattr(llama.Context, "decode", lambda *a: (batches.append(list(a[2])), decode(*a))[1])
    with BatchRunner(engine) as batch:
        for i in range(2):
            batch.add(i, engine.generate(QUESTIONS[i], SHORT))
        batch.step()
        batch.add(2, engine.generate(QUESTIONS[2], SHORT))
        batch.step()
        assert batches[-1] == [0, 1, 2, 3, 4, 5]


def test_an_ended_answer_makes_room_at_once(engine: Engine) -> None:
    with BatchRunner(engine) as batch:
        assert batch.room == 3
        for i, n in enumerate((2, 6, 6)):
            batch.add(i, engine.generate(QUESTIONS[i], SHORT.replace({"max_tokens": n})))
        assert batch.room == 0
        with pytest.raises(EngineBusyError):
            batch.add(9, engine.generate("Hi", SHORT))
        ended = []
        while batch.room == 0:
            ended += [event.key for event in batch.step() if isinstance(event.what, Answer)]
        assert ended == [0]
        batch.add(3, engine.generate(QUESTIONS[3], SHORT.replace({"max_tokens": 3})))
        while len(batch):
            ended += [event.key for event in batch.step() if isinstance(event.what, Answer)]
        assert ended[1] == 3


def test_an_error_ends_its_own_answer_alone(engine: Engine) -> None:
    too_long = "the water is blue and the wine is red " * 200
    bad = engine.generate("Hi", SHORT.replace({"grammar": "root ::= ("}))
    found = run_all(engine, [engine.generate(QUESTIONS[0], SHORT), engine.generate(too_long, SHORT), bad])
    assert isinstance(found[0], Answer)
    assert found[0].text == engine.generate(QUESTIONS[0], SHORT).run().text
    assert isinstance(found[1], ContextError)
    assert isinstance(found[2], UsageError)


def test_tasks_are_answered_as_room_comes_until_asked_to_stop(engine: Engine) -> None:
    tasks = [(n, QUESTIONS[n % len(QUESTIONS)]) for n in range(7)]  # more than the engine's conversations
    begun = []

    def begin(task: tuple[int, str]) -> AnswerStream:
        begun.append(task)
        return engine.generate(task[1], SHORT.replace({"grammar": "root ::= ("} if task[0] == 2 else {}))

    found = dict(answer_all(engine, tasks, begin))
    assert begun == tasks and found.keys() == {*tasks}
    assert [task[0] for task, what in found.items() if isinstance(what, Exception)] == [2]
    begun.clear()
    stop = CancelToken()
    for _ in answer_all(engine, tasks, begin, stop=stop):
        stop.set()
    assert 0 < len(begun) < len(tasks)
    assert engine.generate(QUESTIONS[0], SHORT).run().text  # the slots are free again


def test_cancelling_one_leaves_the_others(engine: Engine) -> None:
    alone = [engine.generate(q, SHORT).run().text for q in QUESTIONS[:3]]
    streams = [engine.generate(q, SHORT) for q in QUESTIONS[:3]]
    with BatchRunner(engine) as batch:
        for i, stream in enumerate(streams):
            batch.add(i, stream)
        batch.step()
        batch.step()
        streams[1].cancel()
        ended = {}
        while len(batch):
            ended |= {e.key: e.what for e in batch.step() if isinstance(e.what, Answer)}
    assert [ended[i].finish_reason for i in range(3)] == ["length", "cancelled", "length"]
    assert [ended[0].text, ended[2].text] == [alone[0], alone[2]]
    assert alone[1].startswith(ended[1].text)
    assert len(ended[1].tokens) == 2


def test_cancelling_during_a_neighbours_long_prompt(tiny: Callable[..., Path]) -> None:
    path = tiny("chatml", n_embd=256, n_layers=4, n_ctx=4096)
    long = "the water is blue and the wine is red " * 150
    with Engine(path, pair=DEFAULT, ctx_size=4096, conversations=3, threads=1) as engine:
        plain = SHORT.replace({"plain": True})
        with BatchRunner(engine) as batch:
            streams = [engine.generate(text, plain) for text in (QUESTIONS[0], "a " + long, long)]
            batch.add(0, streams[0])
            for _ in range(3):
                batch.step()
            for i in (1, 2):
                batch.add(i, streams[i])
            threading.Timer(0.1, streams[1].cancel).start()
            ended = {}
            while len(batch):
                ended |= {e.key: e.what for e in batch.step() if isinstance(e.what, Answer)}
        assert ended[1].finish_reason == "cancelled"
        assert ended[1].text == ""
        for i, text in ((0, QUESTIONS[0]), (2, long)):
            prompt = engine.template.encode([Message("system", engine.pair.safe), Message("user", text)])
            said = [record.token for record in ended[i].tokens]
            assert len(said) == 12
            for n in (0, 4, 11):
                logits = fresh_logits(engine.decoder.model, prompt + said[:n], n_ctx=4096)
                assert logits[said[n]] >= logits.max() - TOLERANCE


@pytest.mark.parametrize("layout", ["shared", "split"])
def test_a_neighbours_long_prompt_gives_way_to_a_cancel(tiny: Callable[..., Path], layout: Layout) -> None:
    """And goes on where it was: the same answer, every row counted once. In split contexts the cancel waits for it."""
    prompt = "the water is blue and the wine is red " * 150

    def load() -> Engine:
        return Engine(
            tiny("chatml", n_ctx=4096), pair=DEFAULT, ctx_size=4096, conversations=2, threads=1, layout=layout
        )

    with load() as engine:
        engine.generate("Hi", SHORT).run()
        alone = engine.generate(prompt, SHORT).run()
    with load() as engine:
        first = engine.generate("Hi", Options(max_tokens=300, grammar='root ::= "a" root'))
        seen: list[int] = []

        def progress(event: AnswerEvent) -> None:
            if isinstance(event, PromptProgress):
                seen.append(event.done)
                if len(seen) == 4:
                    first.cancel()

        with BatchRunner(engine) as batch:
            batch.add(1, first)
            batch.step()
            batch.add(2, engine.generate(prompt, SHORT, on_event=progress))
            while len(batch) == 2:
                events = batch.step()
            [ended] = [e for e in events if isinstance(e.what, Answer)]
            at = len(seen)
            assert (ended.key, ended.what.finish_reason) == (1, "cancelled")
            while len(batch):
                events = batch.step()
        assert (at < len(seen)) == (layout == "shared")
        assert seen == sorted(seen), "nothing is lost"
        answer = events[-1].what
        assert isinstance(answer, Answer)
        assert answer.text == alone.text
        assert answer.prompt_decoded == alone.prompt_decoded


def test_a_long_prompt_lets_the_others_go_on(tiny: Callable[..., Path]) -> None:
    """A batch of it per round, the batches that it has alone: the same answer, and every row counted once."""
    prompts = ["the water is blue and the wine is red " * 150, "a carpet is red " * 150]

    def load() -> Engine:
        return Engine(tiny("chatml", n_ctx=4096), pair=DEFAULT, ctx_size=4096, conversations=3, threads=1)

    with load() as engine:
        engine.generate("Hi", SHORT).run()
        alone = [engine.generate(prompt, SHORT).run() for prompt in prompts]
    with load() as engine, BatchRunner(engine) as batch:
        batch.add("first", engine.generate("Hi", Options(max_tokens=300, grammar='root ::= "a" root')))
        batch.step()
        seen: list[PromptProgress] = []
        batch.add(0, engine.generate(prompts[0], SHORT, on_event=lambda e: seen.append(e)))  # type: ignore[arg-type]
        batch.add(1, engine.generate(prompts[1], SHORT))
        rounds, spoke, ended = 0, {}, {}
        while len(ended) < 2:
            rounds += 1
            events = batch.step()
            assert [e.what for e in events if e.key == "first"] == ["a"], "one token in every round"
            spoke = {e.key: rounds for e in events} | spoke
            ended |= {e.key: e.what for e in events if isinstance(e.what, Answer)}
        assert spoke[1] > spoke[0] > alone[0].prompt_decoded // 512 > 4, "a batch has 512 rows at most"
        assert [event.done for event in seen] == sorted({event.done for event in seen})
        for key, answer in enumerate(alone):
            found = ended[key]
            assert (found.text, found.prompt_decoded) == (answer.text, answer.prompt_decoded)
            assert found.prompt_tokens > 1000


def test_closing_the_engine_ends_all(tiny: Callable[..., Path]) -> None:
    engine = Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, conversations=2, threads=1)
    with BatchRunner(engine) as batch:
        for i in range(2):
            batch.add(i, engine.generate(QUESTIONS[i], SHORT))
        batch.step()
        engine.close()
        events = batch.step()
        assert {e.key for e in events} == {0, 1}
        assert all(isinstance(e.what, EngineClosedError) for e in events)
        assert len(batch) == 0


def test_two_batches_share_an_engine(engine: Engine) -> None:
    """Neither waits for a slot that the other holds."""
    ended: list[int] = []

    def work(first: int) -> None:
        streams = [engine.generate(q, SHORT.replace({"max_tokens": 3})) for q in QUESTIONS[:3]]
        ended.extend(first + key for key in run_all(engine, streams))

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(ended) == [0, 1, 2, 10, 11, 12]


def test_a_batch_takes_new_answers_of_its_own_engine(engine: Engine, tiny: Callable[..., Path]) -> None:
    begun = engine.generate("Hi", SHORT)
    next(begun)
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1) as other, BatchRunner(engine) as batch:
        for stream in (begun, other.generate("Hi", SHORT)):
            with pytest.raises(UsageError, match="new answers of its own engine"):
                batch.add(0, stream)
        assert len(batch) == 0
    begun.close()


def test_closing_the_batch_frees_the_slots(engine: Engine) -> None:
    with BatchRunner(engine) as batch:
        for i in range(3):
            batch.add(i, engine.generate(QUESTIONS[i], SHORT))
        batch.step()
    assert engine.generate(QUESTIONS[0], SHORT).run().finish_reason == "length"


def test_the_shares_of_time_add_up(engine: Engine) -> None:
    started = time.perf_counter()
    ended = []
    with BatchRunner(engine) as batch:
        for i in range(3):
            batch.add(i, engine.generate(QUESTIONS[i], SHORT))
        while len(batch):
            ended += [e for e in batch.step() if isinstance(e.what, Answer)]
    spent = sum(e.prompt_seconds + e.answer_seconds for e in ended)
    assert 0 < spent <= time.perf_counter() - started
    assert all(e.prompt_seconds > 0 and e.answer_seconds > 0 for e in ended)
    slowest = max(e.what.timings.answer_seconds for e in ended)  # type: ignore[union-attr]
    assert sum(e.answer_seconds for e in ended) == pytest.approx(slowest, rel=0.5)


def test_a_prompt_setup_stands_in_both_streams(engine: Engine) -> None:
    pair = engine.pair
    own = PromptSetup.of(pair)
    assert engine.generate("Hi", SHORT, prompt_setup=own).run().text == engine.generate("Hi", SHORT).run().text
    prompt_setup = PromptSetup("Be kind.", None, "Please: {prompt}", (("What is red?", "A colour."),))
    stream = engine.generate("Hi", SHORT, prompt_setup=prompt_setup)
    stream.run()
    safe, adversarial = ("".join(map(engine.vocab.literal, c.tokens)) for c in _slot_of(engine))
    assert "Be kind." in safe
    assert "A colour." in safe
    assert "Please: Hi" in safe
    assert "Please: Hi" in adversarial
    assert "kind" not in adversarial
    assert "colour" not in adversarial


def test_an_adversarial_text_stays_negative(engine: Engine) -> None:
    adversarial = engine.pair.adversarial
    for bad in ((adversarial, None), (None, None, adversarial), (None, None, "{prompt}", ((adversarial, "Hi"),))):
        with pytest.raises((UsageError, TypeError)):
            PromptSetup(*bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="adversarial prompt"):
        engine.generate(
            "Hi", SHORT, prompt_setup=PromptSetup(f"Now: {adversarial.reveal_for_negative_stream()}", None)
        ).run()
    for wrapper in ("no place", "{prompt} {prompt}"):
        with pytest.raises(UsageError):
            PromptSetup(None, None, wrapper)


def _slot_of(engine: Engine) -> list:  # type: ignore[type-arg]
    slot = engine.decoder._idle[-1]  # the one that was used last
    return [slot.safe, slot.adversarial]


def test_the_first_word_behind_a_gates_reading_is_told_at_once(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """The reading has decoded the prompt: the word does not wait for the row behind it."""
    model = tiny("chatml", n_layers=4)
    pair = gates.write_pair(tmp_path, model)
    with Engine(model, pair=pair, ctx_size=512, threads=1) as engine, BatchRunner(engine) as batch:
        batch.add(0, engine.generate(gates.HARMLESS, Options(max_tokens=3, grammar='root ::= "a" root')))
        assert [event.what for event in batch.step()] == ["a"]
        held = len(engine.decoder.slots[0].safe.tokens)
        while len(batch):
            events = batch.step()
        answer = events[-1].what
        assert isinstance(answer, Answer)
        assert (answer.text, answer.prompt_tokens) == ("aaa", held)
