"""Conversations far longer than the context: what is dropped, what that costs, and that it can be stopped."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from asking import SHORT
from manual import DEFAULT
from reference import TOLERANCE, extend, fresh_logits

from acd_local import CancelToken, Engine, Message, Options, TurnsDropped
from acd_local.answers import AnswerEvent
from acd_local.errors import (
    AcdError,
    ContextError,
    EngineClosedError,
    UsageError,
)
from acd_local.runtime import llama
from acd_local.runtime.prompts import PromptBuilder, PromptSetup
from acd_local.runtime.template import ChatTemplate

SENTENCE = "The quick brown fox jumps over the lazy dog, and then <it> goes home again to sleep. "
# Folds the system prompt; cuts earlier thinking; refuses wrong orders; knows no system prompt; runs of SentencePiece.
FAMILIES = ("chatml", "gemma", "qwen3", "llama2", "openassistant", "phi3")
LAST_TWO = (
    "{% for m in messages[-3:] %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Short conversations cost more than long ones.
BACKWARD = (
    "{% if messages | length < 9 %}{{ 'read all of this with care, please ' * 40 }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Counted(ChatTemplate):
    """The real template, which also counts what it is asked for."""

    encodings = 0

    def encode(self, messages: Sequence[Message], **how: Any) -> list[int]:
        self.encodings += 1
        return super().encode(messages, **how)


def talk(turns: int, repeat: int = 4) -> list[Message]:
    """An odd number of turns, the last from the user."""
    return [Message("user" if i % 2 == 0 else "assistant", f"{i} " + SENTENCE * repeat) for i in range(turns | 1)]


def prompt_setup(engine: Engine) -> PromptSetup:
    return PromptSetup.of(engine.pair)


def linear(
    template: ChatTemplate, turns: Sequence[Message], prompt_setup: PromptSetup, n_ctx: int, room: int
) -> int | None:
    """What is dropped, by the definition: the first start that leaves half the context free; None: nothing fits."""
    preambles = prompt_setup.preambles(None, contrast=True)

    def longest(start: int) -> int:
        return max(len(template.encode([*o.messages, *turns[start:]])) for o in preambles)

    if longest(0) + min(room, n_ctx // 2) <= n_ctx:
        return 0
    starts = [i for i, turn in enumerate(turns) if turn.role == "user" and i > 0]
    chosen = next((s for s in starts if longest(s) <= n_ctx // 2), starts[-1] if starts else 0)
    return chosen if longest(chosen) < n_ctx else None


def random_talk(rng: random.Random) -> list[Message]:
    turns = []
    for i in range(rng.randrange(1, 40) | 1):
        words = " ".join(rng.choice(("water", "wine", "<it>", "é", "the", "blue\n")) for _ in range(rng.randrange(60)))
        thought = "<think>" + words + "</think>" if rng.random() < 0.3 and i % 2 else ""
        turns.append(Message("user" if i % 2 == 0 else "assistant", f"{thought}{i} {words}"))
    return turns


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_dropped_is_as_little_as_leaves_half_free(tiny: Callable[..., Path], family: str) -> None:
    rng, dropped = random.Random(family), 0
    with llama.Model(tiny(family)) as model:
        template = ChatTemplate(model)
        builder = PromptBuilder(template, 700, model.embeddings)
        around = PromptSetup("Be kind to everybody.", "Be rude.", "{prompt} Think.")
        for _ in range(60):
            turns, room = random_talk(rng), rng.choice((12, 200, 5000))
            expected = linear(template, around.wrap(turns), around, 700, room)

            def build(turns: Sequence[Message] = turns, room: int = room) -> int:
                prompt = builder.build(around, None, turns, contrast=True, max_tokens=room, overflow="drop")
                assert max(len(prompt.safe), len(prompt.adversarial or ())) < 700
                assert prompt.safe == template.encode(
                    [Message("system", "Be kind to everybody."), *around.wrap(turns)[prompt.dropped :]]
                )
                return prompt.dropped

            if expected is None:
                with pytest.raises(ContextError, match="leaves no room"):
                    build()
            else:
                assert build() == expected
                dropped += expected > 0
    assert dropped > 5


@pytest.mark.parametrize("source", [LAST_TWO, BACKWARD], ids=["last two", "backward"])
def test_templates_with_ideas_of_their_own_still_fit(tiny: Callable[..., Path], source: str) -> None:
    with llama.Model(tiny("chatml")) as model:
        builder = PromptBuilder(template := ChatTemplate(model, source=source), 700, model.embeddings)
        assert template.warning is None
        for turns in (1, 3, 5, 9, 21, 101):
            try:
                prompt = builder.build(
                    PromptSetup("Be kind.", None), None, talk(turns, 1), contrast=False, max_tokens=50, overflow="drop"
                )
            except ContextError as error:
                assert "leaves no room" in str(error)  # only where the template adds that much
                assert source == BACKWARD
            else:
                assert len(prompt.safe) <= 650
                if source == LAST_TWO:
                    assert prompt.dropped == 0


@pytest.mark.parametrize("turns", [61, 401, 1001, 4001])
def test_the_cut_is_found_in_about_log_n_renderings(demo: Path, turns: int) -> None:
    with Engine(demo, pair=DEFAULT, threads=1, ctx_size=4096) as engine:
        template = Counted(engine.decoder.model)
        builder = PromptBuilder(template, 4096, engine.decoder.model.embeddings)
        builder.build(
            prompt_setup(engine), None, talk(1), contrast=True, max_tokens=64, overflow="drop"
        )  # the prefixes
        template.encodings, started = 0, time.thread_time()
        prompt = builder.build(prompt_setup(engine), None, talk(turns), contrast=True, max_tokens=64, overflow="drop")
        assert template.encodings <= 2 * (2 * math.log2(turns) + 3)  # of both streams
        assert time.thread_time() - started < 2
        assert 0 < prompt.dropped < turns
        assert 1800 < max(len(prompt.safe), len(prompt.adversarial or ())) <= 2048


def test_a_long_history_is_cancelled_at_once(demo: Path) -> None:
    with Engine(demo, pair=DEFAULT, threads=1, ctx_size=4096) as engine:
        for wait in (0.0, 0.02, 0.1, 0.3, 1.0):  # while the cut is looked for, and in the prompt
            stream, at = engine.generate(talk(1001), Options(max_tokens=5)), []

            def stop(stream: Any = stream, at: list[float] = at) -> None:
                at.append(time.perf_counter())
                stream.cancel()

            timer = threading.Timer(wait, stop)
            timer.start()
            assert stream.run().finish_reason == "cancelled"
            assert time.perf_counter() - at[0] < 0.5  # 0.2 s, and as much again for other programs
            timer.join()


@pytest.mark.parametrize("overflow", ["drop", "error"])
@pytest.mark.parametrize(
    "text", [SENTENCE * 25_000, "a" * 2_000_000, "<" * 2_000_000, "🙂" * 500_000, " \n" * 1_000_000]
)
def test_a_message_that_is_far_too_long_is_refused_at_once(demo: Path, text: str, overflow: str) -> None:
    with Engine(demo, pair=DEFAULT, threads=1) as engine:
        for history in ([], talk(20)):
            started = time.thread_time()  # other programs may have the processor
            with pytest.raises(ContextError, match=r"over \d+ tokens"):
                engine.generate([*history, Message("user", text)], Options(max_tokens=5, overflow=overflow)).run()
            assert time.thread_time() - started < 5


def test_the_error_counts_what_is_quickly_counted(tiny: Callable[..., Path]) -> None:
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1) as engine:
        turns = talk(21)
        opening = prompt_setup(engine).preambles(None, contrast=True)
        longest = max(len(engine.template.encode([*o.messages, *turns])) for o in opening)
        with pytest.raises(ContextError, match=rf"the conversation \({longest} tokens\) and its answer \(5\)"):
            engine.generate(turns, Options(max_tokens=5, overflow="error")).run()
        single = [Message("user", SENTENCE * 60)]
        longest = max(len(engine.template.encode([*o.messages, *single])) for o in opening)
        with pytest.raises(ContextError, match=f"the message is {longest} tokens long"):
            engine.generate(single, Options(max_tokens=5)).run()


# -- stopping ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopping(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Engine, CancelToken, list]]:
    """An engine whose third encoding sets the token, and what was encoded."""
    token, seen = CancelToken(), []
    encode = ChatTemplate.encode

    def watched(self: ChatTemplate, messages: Sequence[Message], **how: Any) -> list[int]:
        seen.append(len(messages))
        if len(seen) == 3:
            token.set()
        return encode(self, messages, **how)

    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=1024, threads=1) as engine:
        monkeypatch.setattr(ChatTemplate, "encode", watched)
        yield engine, token, seen


def test_the_token_is_asked_between_renderings(stopping: tuple[Engine, CancelToken, list[int]]) -> None:
    engine, token, seen = stopping
    answer = engine.generate(talk(1001), Options(max_tokens=5), cancel=token).run()
    assert (answer.finish_reason, answer.text, answer.dropped_turns) == ("cancelled", "", 0)
    assert len(seen) == 3
    assert engine.generate("Hi", Options(max_tokens=5, temp=0)).run().text, "nothing is left of it"


def test_a_chat_is_as_it_was_when_its_search_is_cancelled(stopping: tuple[Engine, CancelToken, list[int]]) -> None:
    engine, token, _ = stopping
    chat = engine.chat(options=Options(max_tokens=5, temp=0))
    chat.messages = talk(1000)[:-1]
    stream = chat.stream("Hi")
    with token.interrupting(stream.cancel):
        assert stream.run().finish_reason == "cancelled"
    assert (len(chat.messages), chat.first_sent) == (1000, 0)


def test_the_next_turn_does_not_search_again(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    encode = ChatTemplate.encode

    def watched(self: ChatTemplate, messages: Sequence[Message], **how: Any) -> list[int]:
        seen.append(len(messages))
        return encode(self, messages, **how)

    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=1024, threads=1) as engine:
        chat = engine.chat(options=Options(max_tokens=5, temp=0))
        chat.messages = talk(1000, 1)[:-1]
        chat.ask("Hi")
        assert chat.first_sent > 900
        monkeypatch.setattr(ChatTemplate, "encode", watched)
        chat.ask("And now?")
        assert len(seen) == 2  # one for each stream


@pytest.mark.parametrize("text", [SENTENCE * 25_000, "<" * 2_000_000, "a" * 2_000_000])
def test_cancel_is_heard_while_one_message_is_rendered(demo: Path, text: str) -> None:
    with Engine(demo, pair=DEFAULT, threads=1, ctx_size=8192) as engine:
        for wait in (0.0, 0.02, 0.1):
            stream, at = engine.generate(text, Options(max_tokens=5)), []

            def stop(stream: Any = stream, at: list[float] = at) -> None:
                at.append(time.process_time())
                stream.cancel()

            timer = threading.Timer(wait, stop)
            timer.start()
            try:
                assert stream.run().finish_reason == "cancelled"
            except ContextError:  # it was quicker
                timer.cancel()
            else:
                assert time.process_time() - at[0] < 0.5
            timer.join()


def test_rendering_waits_for_nobody_who_decodes(tiny: Callable[..., Path]) -> None:
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=1024, conversations=2, threads=1) as engine:
        stream, built = engine.generate(talk(1001), Options(max_tokens=5)), []
        thread = threading.Thread(
            target=lambda: built.append(stream.generation._build(stream.generation.request.prompt_setup))
        )
        with engine.decoder.open():  # as a prompt of another answer does for minutes
            thread.start()
            thread.join(10)
            assert built
            assert built[0].dropped > 900


def test_closing_the_engine_ends_the_search(tiny: Callable[..., Path]) -> None:
    """The vocabulary is freed only when nobody reads in it."""
    for wait in (0.0, 0.005, 0.02, 0.05):
        engine = Engine(tiny("llama2"), pair=DEFAULT, ctx_size=4096, threads=1)
        errors: list[AcdError] = []

        def ask(engine: Engine = engine, errors: list[AcdError] = errors) -> None:
            try:
                while True:
                    engine.prompts.build(
                        prompt_setup(engine), None, talk(101, 9), contrast=True, max_tokens=5, overflow="drop"
                    )
            except AcdError as closed:
                errors.append(closed)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(wait)
        engine.close()
        for thread in threads:
            thread.join(30)
        assert [type(error) for error in errors] == [EngineClosedError] * 3


# -- conversations -----------------------------------------------------------------------------------------------------


def test_a_chat_remembers_and_redecodes_only_what_is_new(engine: Engine) -> None:
    chat = engine.chat(options=SHORT)
    first = chat.ask("What is the sky?")
    second = chat.ask("And the water?")
    assert [m.role for m in chat.messages] == ["user", "assistant", "user", "assistant"]
    assert chat.messages[1].content == first.text
    assert second.prompt_tokens > first.prompt_tokens
    assert second.prompt_decoded < second.prompt_tokens
    assert chat.undo()
    assert len(chat.messages) == 2
    again = chat.ask("And the water?")
    assert again.prompt_tokens == second.prompt_tokens
    chat.clear()
    assert chat.messages == []
    assert not chat.undo()


def test_regenerate_replaces_the_answer_with_another_seed(engine: Engine) -> None:
    chat = engine.chat(options=Options(max_tokens=12, temp=2.0, seed=3))
    first = chat.ask("Tell me about wine.")
    other = chat.regenerate().run()
    assert other.seed != first.seed
    assert len(chat.messages) == 2
    assert chat.messages[1].content == other.text
    same = chat.regenerate(seed=3).run()
    assert same.seed == 3
    with pytest.raises(UsageError):
        engine.chat().regenerate()


@pytest.mark.parametrize("writer", [tiny_gguf.write_llama, tiny_gguf.write_gemma3, tiny_gguf.write_mamba])
def test_caches_stay_true_through_turns_overflow_and_undo(
    tiny: Callable[..., Path], writer: Callable[..., Path]
) -> None:
    """Whatever was reused, rolled back or dropped: the next logits are those of a fresh evaluation."""
    with Engine(tiny("chatml", writer=writer), pair=DEFAULT, ctx_size=768, threads=1) as engine:
        chat, events = engine.chat(options=Options(max_tokens=40, temp=1.0, seed=1)), []
        for turn in range(9):
            chat.stream(f"Question {turn}: " + "tell me about the water. " * 6, on_event=events.append).run()
            if turn == 3:
                chat.undo()
            slot = engine.decoder.slots[0]
            for cache in (slot.safe, slot.adversarial):
                assert len(cache.tokens) <= 768
                expected = fresh_logits(engine.decoder.model, [*cache.tokens, 65], 1024)
                tokens = list(cache.tokens)
                (row,) = extend([(cache, [65])])
                np.testing.assert_allclose(row, expected, atol=TOLERANCE)
                assert cache.tokens == [*tokens, 65]
        dropped = [e.messages for e in events if isinstance(e, TurnsDropped)]
        assert dropped
        assert all(messages % 2 == 0 for messages in dropped)


def test_overflow_drops_old_turns_until_half_is_free(tiny: Callable[..., Path]) -> None:
    with Engine(tiny("chatml", n_ctx=4096), pair=DEFAULT, ctx_size=1500, threads=1) as engine:
        turns = []
        for i in range(14):
            turns += [Message("user", f"q{i} " + "water " * 60), Message("assistant", "sky " * 20)]
        turns.append(Message("user", "LAST question"))
        events: list[AnswerEvent] = []
        answer = engine.generate(turns, SHORT, on_event=events.append).run()
        (event,) = [e for e in events if isinstance(e, TurnsDropped)]
        assert answer.dropped_turns == event.messages > 0
        assert answer.prompt_tokens <= 750
        slot = engine.decoder.slots[0]
        for cache, prompt in (
            (slot.safe, engine.pair.safe),
            (slot.adversarial, engine.pair.adversarial.reveal_for_negative_stream()),
        ):
            text = b"".join(engine.vocab.piece(t) for t in cache.tokens).decode("utf-8", "replace")
            assert prompt in text
            assert "LAST question" in text
            assert "q0 " not in text
            assert f"q{event.messages // 2} " in text
        with pytest.raises(ContextError, match="overflow"):
            engine.generate(turns, SHORT.replace({"overflow": "error"})).run()


def test_a_long_answer_limit_does_not_cost_the_conversation(tiny: Callable[..., Path]) -> None:
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=1024, threads=1) as engine:
        turns = [Message("user", "water"), Message("assistant", "sky"), Message("user", "wine")]
        with engine.generate(turns, Options(max_tokens=5000, temp=0.0)) as stream:
            next(stream)
            assert engine.decoder.slots[0].safe.tokens.count(engine.vocab.bos) == 5  # nothing was dropped
        with pytest.raises(ContextError, match="overflow"):
            engine.generate(turns, Options(max_tokens=5000, overflow="error")).run()


def test_warnings_about_model_and_pair(tiny: Callable[..., Path], tmp_path: Path) -> None:
    with Engine(tiny("chatml", n_ctx=512), pair=DEFAULT, ctx_size=1024, threads=1) as engine:
        assert engine.warning == "the model was trained for 512 tokens, not 1024"
    (tmp_path / "other.toml").write_text(
        'format = 1\nname = "other"\nsafe = "Be kind."\nadversarial = "Be rude."\n[models]\narchitecture = "falcon"\n'
    )
    with Engine(tiny("chatml"), pair=str(tmp_path / "other.toml"), ctx_size=512, threads=1) as engine:
        assert engine.warning == "the prompt pair 'other' was made for another model"
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1) as engine:
        assert engine.warning is None


def test_a_message_that_can_never_fit(tiny: Callable[..., Path]) -> None:
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1) as engine:
        with pytest.raises(ContextError, match=r"\d+ tokens long.* 512 ") as caught:
            engine.generate("wine " * 2000, SHORT).run()
        assert caught.value.exit_code == 4
        assert engine.decoder.slots[0].safe.tokens == [], "nothing may be decoded for it"
        assert engine.generate("Hi", SHORT).run().text


def test_the_context_limits_an_answer(tiny: Callable[..., Path]) -> None:
    with Engine(tiny("chatml", n_ctx=4096), pair=DEFAULT, ctx_size=300, threads=1) as engine:
        answer = engine.generate("Hi", Options(temp=1.0, seed=1)).run()
        if answer.finish_reason == "length":
            assert max(answer.context_used) <= 300
            assert max(answer.context_used) >= 299
        assert engine.n_ctx == 300


def test_default_context_is_4096_or_the_models_own_limit(tiny: Callable[..., Path]) -> None:
    for n_ctx, expected in ((8192, 4096), (1024, 1024)):
        with Engine(tiny("chatml", n_ctx=n_ctx), pair=DEFAULT, threads=1) as engine:
            assert engine.n_ctx == expected
