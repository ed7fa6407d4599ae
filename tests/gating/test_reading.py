"""What a gate reads of conversations, how far it is told, and how it is stopped."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import gates
import numpy as np
import pytest
from gated import AS_IS, GREEDY, PLAIN, tokens
from gates import HARMFUL, HARMLESS

from acd_local import CancelToken, Engine, gating
from acd_local.answers import Answer, PromptProgress
from acd_local.batch import BatchRunner
from acd_local.errors import EngineClosedError
from acd_local.gate import WINDOW, Probe
from acd_local.pairs import PromptPair
from acd_local.runtime.template import Message


def test_a_gate_tells_requests_apart(engine: Engine) -> None:
    assert engine.gate_probability(HARMFUL) == pytest.approx(0.982, abs=2e-3)
    assert engine.gate_probability(HARMLESS) == pytest.approx(0.018, abs=2e-3)


def test_the_last_message_is_read_in_its_conversation(engine: Engine) -> None:
    talk = [Message("user", HARMFUL), Message("assistant", "No."), Message("user", "And step 2?")]
    alone, within = engine.gate_probability("And step 2?"), engine.gate_probability(talk)
    assert within != pytest.approx(alone, abs=1e-6)
    assert engine.gate_probability(talk, system="Be brief.") != pytest.approx(within, abs=1e-6)
    # What was said before and after does not change what is read.
    assert engine.gate_probability(talk) == pytest.approx(within, abs=1e-4)


def test_an_answer_says_what_was_read(engine: Engine) -> None:
    for text in (HARMFUL, HARMLESS):
        answer = engine.generate(text, GREEDY).run()
        assert answer.gate is not None
        assert answer.gate.probability == pytest.approx(engine.gate_probability(text), abs=1e-4)


def test_the_worst_stretch_of_a_long_message_counts() -> None:
    probe = Probe(np.ones((2, 3), np.float32), -1.0)
    calm = np.zeros((2, 4 * WINDOW + 7, 3), np.float32)
    assert probe.highest(calm) == pytest.approx(probe.probability(np.zeros((2, 3), np.float32)))
    for at in (0, 2 * WINDOW, 4 * WINDOW + 7 - WINDOW // 2):  # stretches are half of one apart
        states = calm.copy()
        states[:, at : at + WINDOW // 2] = 1
        mean = probe.probability(states.mean(axis=1))
        worst = probe.probability(np.full((2, 3), 0.5, np.float32))
        assert probe.highest(states) == pytest.approx(worst, abs=1e-6)
        assert mean < worst
    short = np.random.default_rng(0).normal(size=(2, WINDOW, 3)).astype(np.float32)
    assert probe.highest(short) == probe.probability(short.mean(axis=1))


def test_a_message_too_long_to_be_read_whole_is_read_in_places() -> None:
    prefix, message, tail = list(range(10)), list(range(1000, 6000)), [7, 8]
    parts = gating._excerpts([*prefix, *message, *tail], prefix, 10, 5010, 1024)
    assert len(parts) == gating.EXCERPTS
    assert all(start == 10 and part[:10] == prefix and part[-2:] == tail for part, start in parts)
    read = [part[10:-2] for part, _ in parts]
    assert all(len(piece) == gating.EXCERPT for piece in read)
    assert read[0][0] == message[0] and read[-1][-1] == message[-1]
    ((whole, _),) = gating._excerpts([*range(5000), *message[:300], *tail], range(5000), 5000, 5300, 1024)
    assert whole[-302:] == [*message[:300], *tail] and len(whole) <= 1024  # the system prompt is what is cut


@pytest.mark.usefixtures("short_sight")
def test_of_a_long_conversation_the_last_turns_are_read(model: Path, pair: PromptPair) -> None:
    past = [Message("user", "Tell me of bread. " * 6), Message("assistant", "Bread is baked. " * 6)]
    with Engine(model, pair=pair, ctx_size=1024, threads=1) as engine:
        for text, decision in ((HARMFUL, "contrast"), (HARMLESS, "as-is")):
            talk = [*past, *past, Message("user", text)]
            answer = engine.generate(talk, GREEDY).run()
            assert answer.gate is not None and answer.gate.decision == decision
            assert answer.gate.probability == pytest.approx(engine.gate_probability(text), abs=1e-4)
            own = engine.generate(talk, GREEDY.replace(PLAIN), prompt_setup=AS_IS).run()
            assert (tokens(answer) == tokens(own)) == (decision == "as-is")


@pytest.mark.usefixtures("short_sight")
def test_of_a_long_message_the_worst_part_counts(model: Path, pair: PromptPair) -> None:
    filler = "Bread is baked at home. " * 60
    with Engine(model, pair=pair, ctx_size=2048, threads=1) as engine:
        calm = engine.gate_probability(filler)
        for text in (f"{HARMFUL * 8} {filler}", f"{filler} {HARMFUL * 8}"):
            assert engine.gate_probability(text) > calm
        assert engine.gate_probability("Hi.", system=filler) == pytest.approx(
            engine.generate("Hi.", GREEDY, system=filler).run().gate.probability,
            abs=1e-4,  # type: ignore[union-attr]
        )


def test_cancel_and_close_while_reading(tmp_path: Path, slow_model: Path) -> None:
    pair = gates.write_pair(tmp_path, slow_model)
    text = "Bread is baked at home. " * 55
    with Engine(slow_model, pair=pair, ctx_size=2048, threads=1) as engine:
        cancel = CancelToken()
        stops = lambda event: cancel.set() if isinstance(event, PromptProgress) and event.done > 100 else None  # noqa: E731
        answer = engine.generate(text, GREEDY, cancel=cancel, on_event=stops).run()
        assert answer.finish_reason == "cancelled" and answer.gate is None and answer.prompt_decoded > 0
        events: list[Any] = []
        assert engine.generate(text, GREEDY, on_event=events.append).run().finish_reason == "length"
        shown = [event.done for event in events if isinstance(event, PromptProgress)]
        assert shown == sorted(shown)
        stream = engine.generate(f"Now. {text}", GREEDY)
        threading.Timer(0.1, engine.close).start()
        started = time.perf_counter()
        with pytest.raises(EngineClosedError):
            stream.run()
            stream = engine.generate(text, GREEDY)
            stream.run()
        assert time.perf_counter() - started < 30


def test_another_answers_cancel_does_not_wait_for_a_reading(tmp_path: Path, slow_model: Path) -> None:
    pair = gates.write_pair(tmp_path, slow_model)
    with (
        Engine(slow_model, pair=pair, ctx_size=1024, threads=1, conversations=2) as engine,
        BatchRunner(engine) as batch,
    ):
        cancel, seen = CancelToken(), []

        def stop_the_other(event: Any) -> None:
            if isinstance(event, PromptProgress):
                seen.append(event.done)
                cancel.set()

        batch.add("short", engine.generate(HARMLESS, GREEDY.replace({"max_tokens": 400}), cancel=cancel))
        batch.step()
        text = "Bread is baked at home. " * 30
        batch.add("long", engine.generate(text, GREEDY, on_event=stop_the_other))
        ended: list[Any] = []
        while len(batch):
            ended += [(event.key, event.what) for event in batch.step() if isinstance(event.what, Answer)]
        assert [(key, answer.finish_reason) for key, answer in ended] == [("short", "cancelled"), ("long", "length")]
        assert seen.count(seen[0]) == 2  # it began again
        alone = engine.generate(text, GREEDY.replace({"draft_max": 0})).run()
        assert tokens(ended[1][1]) == tokens(alone)


def test_progress_is_told_of_what_is_read(model: Path, pair: PromptPair) -> None:
    with Engine(model, pair=pair, ctx_size=1024, threads=1) as engine:
        events: list[Any] = []
        answer = engine.generate("Bread is baked. " * 60, GREEDY, on_event=events.append).run()
        first = events[0]
        assert isinstance(first, PromptProgress) and first.done == 0
        assert first.total >= answer.prompt_tokens - 60
