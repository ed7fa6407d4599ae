"""Answers in the making: events, cancellation, threads, closing."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from asking import SHORT, said
from manual import DEFAULT

import acd_local
from acd_local import CancelToken, Engine, Message, Options, PromptProgress, TokenRecord
from acd_local.answers import AnswerEvent
from acd_local.errors import (
    ContextError,
    EngineBusyError,
    EngineClosedError,
    ModelError,
    NumericalError,
    PairError,
    UsageError,
)

# -- events and names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"layout": "split"}, {"conversations": 2}], ids=str)
def test_progress_of_the_prompt(tiny: Callable[..., Path], settings: dict[str, object]) -> None:
    """Before every batch: how many rows of the prompt are there, those that were kept included."""
    long, rows = "the water is blue and the wine is red " * 60, []
    with Engine(tiny("chatml", n_ctx=4096), pair=DEFAULT, ctx_size=4096, threads=1, **settings) as engine:  # type: ignore[arg-type]
        for text in (long, long + "or white"):
            events: list[AnswerEvent] = []
            answer = engine.generate(text, SHORT, on_event=events.append).run()
            progress = [e for e in events if isinstance(e, PromptProgress)]
            assert len(progress) == len(events)
            assert all(0 <= e.done < e.total for e in progress)
            assert [e.done for e in progress] == sorted(e.done for e in progress)
            assert {e.total for e in progress} == {progress[0].done + answer.prompt_decoded}
            rows.append((progress[0].done, len(progress), answer.prompt_decoded))
        assert rows[0][0] == 0
        assert rows[0][1] >= rows[0][2] / 512 > 2
        assert rows[1][0] > rows[0][2] * 0.9, "what was kept counts as done"
        assert rows[1][2] < 100


def test_decoded_rows_are_told_after_a_cancel_within_the_prompt(tiny: Callable[..., Path]) -> None:
    with Engine(tiny("chatml", n_ctx=4096), pair=DEFAULT, ctx_size=4096, threads=1) as engine:
        cancel, events = CancelToken(), []

        def stop(event: AnswerEvent) -> None:
            events.append(event)
            if len(events) == 3:
                cancel.set()

        long = "the water is blue and the wine is red " * 60
        answer = engine.generate(long, SHORT, on_event=stop, cancel=cancel).run()
        assert answer.finish_reason == "cancelled"
        slot = engine.decoder.slots[0]
        kept = len(slot.safe.tokens) + len(slot.adversarial.tokens)
        assert answer.prompt_decoded == events[2].done == kept > 0


def test_an_error_in_a_callback_ends_the_answer_and_leaves_the_caches_whole(tiny: Callable[..., Path]) -> None:
    with Engine(tiny("chatml", n_ctx=4096), pair=DEFAULT, ctx_size=4096, threads=1) as engine:
        long, alone = "the water is blue and the wine is red " * 60, said("Hi", engine)

        def fail(event: AnswerEvent) -> None:
            if event.done:  # type: ignore[union-attr]
                raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            engine.generate(long, SHORT, on_event=fail).run()
        assert said("Hi", engine) == alone


def test_traced_tokens_are_events_too(engine: Engine) -> None:
    events: list[AnswerEvent] = []
    answer = engine.generate("What is water?", Options(max_tokens=12, seed=5), trace=True, on_event=events.append).run()
    assert tuple(e for e in events if isinstance(e, TokenRecord)) == answer.tokens
    assert all(e.safe_logprob <= 0 < e.safe_rank for e in answer.tokens)
    assert not any("adversarial" in name for name in vars(answer.tokens[0]))
    bare = engine.generate("What is water?", Options(max_tokens=12, seed=5), on_event=events.append).run()
    assert all(e.safe_logprob is e.safe_rank is None for e in bare.tokens)
    assert sum(isinstance(e, TokenRecord) for e in events) == 12


# -- cancellation, threads, closing ------------------------------------------------------------------------------------


def test_cancel_from_another_thread_while_decoding(engine: Engine) -> None:
    stream = engine.generate("Hi", SHORT)
    next(stream)
    said_before = len(stream.generation._records)
    thread = threading.Thread(target=stream.cancel)
    thread.start()
    thread.join()
    answer = stream.run()
    assert answer.finish_reason == "cancelled"
    assert len(answer.tokens) == said_before
    assert answer.text == stream.text
    assert said("Hi", engine)


def test_cancel_during_a_long_prefill(tiny: Callable[..., Path]) -> None:
    path = tiny("chatml", n_embd=256, n_layers=4, n_ctx=16384)
    with Engine(path, pair=DEFAULT, ctx_size=16384, threads=1) as engine:
        prompt = "the water is blue and the wine is red " * 800
        stream = engine.generate(prompt, SHORT)
        cancelled_at = []
        threading.Timer(0.3, lambda: (cancelled_at.append(time.process_time()), stream.cancel())).start()
        answer = stream.run()
        assert answer.finish_reason == "cancelled"
        assert answer.text == ""
        assert time.process_time() - cancelled_at[0] < 2.0
        assert engine.generate("Hi", SHORT).run().finish_reason == "length"


def test_cancelled_before_the_start(engine: Engine) -> None:
    token = CancelToken()
    token.set()
    answer = engine.generate("Hi", SHORT, cancel=token).run()
    assert (answer.finish_reason, answer.text) == ("cancelled", "")


def test_a_cancelled_chat_turn_is_remembered(engine: Engine) -> None:
    chat = engine.chat(options=Options(temp=1.0))
    stream = chat.stream("Hi")
    next(stream)
    chat.cancel()
    assert stream.run().finish_reason == "cancelled"
    assert chat.messages[-1] == Message("assistant", stream.text)
    before = list(chat.messages)
    unheard = chat.stream("Never mind")
    unheard.cancel()
    assert unheard.run().text == ""
    assert chat.messages == before
    abandoned = chat.stream("Again")
    next(abandoned)
    abandoned.close()
    assert chat.messages[-1].content == abandoned.text
    assert said("Hi", engine), "the slot must be free again"


def test_threads_share_an_engine(tiny: Callable[..., Path]) -> None:
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, conversations=2, threads=1) as engine:
        questions = [f"Question number {i}?" for i in range(8)]
        alone = {q: said(q, engine) for q in questions}
        together: dict[str, str] = {}

        def ask(q: str) -> None:
            together[q] = said(q, engine)

        threads = [threading.Thread(target=ask, args=(q,)) for q in questions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert together.keys() == alone.keys()
        assert sum(together[q] == alone[q] for q in questions) >= 7  # near-ties apart


def test_a_thread_cannot_wait_for_itself(engine: Engine) -> None:
    with engine.generate("Hi", SHORT) as first:
        next(first)
        with pytest.raises(EngineBusyError):
            said("Hi", engine)
        chat = engine.chat(options=SHORT)
    with chat.stream("Hi") as one:
        next(one)
        with pytest.raises(EngineBusyError, match="still answering"):
            chat.ask("Hi")


def test_dropped_streams_free_their_slot(engine: Engine) -> None:
    """Without waiting for the garbage collector."""
    gc.disable()
    try:
        for _ in engine.generate("Hi", SHORT):
            break
        assert said("Hi", engine)
        chat = engine.chat(options=SHORT)
        for _ in chat.stream("Hi"):
            break
        assert len(chat.messages) == 2
        assert chat.ask("Hi").text

        def fail(text: str) -> None:
            raise RuntimeError("the window is gone")

        with pytest.raises(RuntimeError):
            chat.ask("Hi", fail)
        assert chat.ask("Hi").text
    finally:
        gc.enable()


def test_conversations_keep_their_caches(tiny: Callable[..., Path]) -> None:
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=768, conversations=2, threads=1) as engine:
        one, two = engine.chat(options=SHORT), engine.chat(options=SHORT)
        for turn in range(3):
            for chat in (one, two):
                rows = chat.ask(f"Question {turn}?").prompt_decoded
                if turn:
                    assert rows < 120, "only the new turn is decoded, in both streams"


def test_a_token_cancels_answers_of_several_engines_and_nothing_else(tiny: Callable[..., Path]) -> None:
    with (
        Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1) as a,
        Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1) as b,
    ):
        token = CancelToken()
        streams = [e.generate("Hi", SHORT, cancel=token) for e in (a, b)]
        for stream in streams:
            next(stream)
        token.set()
        assert [s.run().finish_reason for s in streams] == ["cancelled"] * 2
        assert said("Hi", a)
        assert said("Hi", b)


def test_an_interrupt_does_not_outlive_its_decode() -> None:
    token, calls = CancelToken(), []
    with token.interrupting(lambda: calls.append(1)):
        pass
    token.set()
    assert calls == []
    with token.interrupting(lambda: calls.append(2)):
        token.set()
    assert calls == [2]


def test_a_chat_is_left_alone_while_it_answers(engine: Engine) -> None:
    chat = engine.chat(options=SHORT)
    chat.ask("Hi")
    with chat.stream("More") as stream:
        next(stream)
        for change in (chat.undo, chat.clear, lambda: chat.load("x.json")):
            with pytest.raises(EngineBusyError):
                change()
    assert len(chat.messages) == 4


def test_undo_after_an_overflow_sends_old_turns_again(tiny: Callable[..., Path]) -> None:
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1) as engine:
        chat = engine.chat(options=SHORT)
        for turn in range(6):
            chat.ask(f"Question {turn} about water?")
        assert chat.first_sent > 2
        while len(chat.messages) > 2:
            chat.undo()
        chat.ask("What did I ask?")
        text = b"".join(engine.vocab.piece(t) for t in engine.decoder.slots[0].safe.tokens).decode("utf-8", "replace")
        assert "Question 0" in text


def test_engines_that_are_dropped_free_their_memory(tiny: Callable[..., Path]) -> None:
    engine = Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1)
    said("Hi", engine)
    memory = [engine.decoder.model.owned, *(c.owned for c in engine.decoder.contexts)]
    for owned in memory:
        owned.check()
    del engine
    gc.collect()
    for owned in memory:
        with pytest.raises(EngineClosedError, match="closed"):
            owned.check()


def test_two_conversations_in_one_thread_with_two_slots(tiny: Callable[..., Path]) -> None:
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, conversations=2, threads=1) as engine:
        alone = [said(q, engine) for q in ("What is red?", "What is blue?")]
        streams = [engine.generate(q, SHORT) for q in ("What is red?", "What is blue?")]
        texts = ["", ""]
        running = [0, 1]
        while running:
            for i in list(running):
                piece = next(streams[i], None)
                if piece is None:
                    running.remove(i)
                else:
                    texts[i] += piece
        assert texts == alone


def test_use_after_close(tiny: Callable[..., Path]) -> None:
    engine = Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1)
    running = engine.generate("Hi", Options(temp=1.0))
    next(running)
    engine.close()
    engine.close()
    for use in (lambda: next(running), lambda: said("Hi", engine), lambda: engine.chat().ask("Hi")):
        with pytest.raises(EngineClosedError):
            use()


def test_an_error_leaves_the_chat_as_it_was(engine: Engine) -> None:
    chat = engine.chat(options=SHORT)
    chat.ask("Hi")
    before = list(chat.messages)
    with pytest.raises(ContextError):
        chat.ask("wine " * 5000)
    with pytest.raises(UsageError):
        chat.ask("Hi", grammar="root ::= [")
    with pytest.raises(UsageError):
        chat.ask("Hi", colour="red")
    assert chat.messages == before
    assert chat.ask("Hi again").text


def test_nan_weights_end_with_an_error(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Damage that neither header nor load can show."""
    raw = bytearray(tiny("chatml").read_bytes())
    raw[-64:] = b"\xff" * 64
    broken = tmp_path / "nan.gguf"
    for cut in (64, 4096, 65536):
        raw[-cut:] = b"\xff" * cut
    broken.write_bytes(raw)
    with Engine(broken, ctx_size=512, threads=1) as engine, pytest.raises(NumericalError):
        said("Hi", engine)


def test_bad_arguments(tiny: Callable[..., Path]) -> None:
    path = tiny("chatml")
    with pytest.raises(ModelError):
        acd_local.load("/nonexistent.gguf")
    with pytest.raises(PairError):
        acd_local.load(path, pair="no-such-pair")
    for bad in (
        {"ctx_size": 0},
        {"ctx_size": 1.5},
        {"ctx_size": 2**31},
        {"ctx_size": 2**40},
        {"conversations": 0},
        {"conversations": 129},
        {"threads": -1},
        {"layout": "x"},
    ):
        with pytest.raises(UsageError):
            acd_local.load(path, **bad)


def test_save_and_load(engine: Engine, tmp_path: Path) -> None:
    chat = engine.chat(system="Be brief.", options=SHORT)
    chat.ask("Hi ☃")
    chat.save(tmp_path / "chat.json")
    other = engine.chat(options=SHORT)
    other.load(tmp_path / "chat.json")
    assert (other.messages, other.system) == (chat.messages, "Be brief.")
    assert other.ask("More?").text == chat.ask("More?").text
    for content in ("", "[]", "{}", '{"format": 99, "messages": []}', '{"format": 1, "messages": [{"role": "x"}]}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UsageError, match=r"bad\.json"):
            other.load(tmp_path / "bad.json")
    for place in (tmp_path / "missing" / "chat.json", "", "/", "~nobody-of-this-name/x"):
        with pytest.raises(UsageError, match="cannot write"):
            chat.save(place)
    with pytest.raises(UsageError, match="cannot load"):
        other.load("~nobody-of-this-name/x")
