"""What a pair's gate reads, what is decided by it, and answers that are looked at again."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gates
import numpy as np
import pytest
import tiny_gguf
from gates import HARMFUL, HARMLESS
from places import child_env

from acd_local import CancelToken, Engine, Options, aio, gating
from acd_local.answers import Answer, GateDecision, GateRecord, PromptProgress
from acd_local.batch import BatchRunner
from acd_local.cli.run import command
from acd_local.cli.shell import run_cli
from acd_local.errors import EngineClosedError, ModelError, PairError, UsageError
from acd_local.gate import WINDOW, Probe
from acd_local.pairs import GateSettings, PromptPair
from acd_local.runtime import llama, reading
from acd_local.runtime.choice import Chooser, ContrastSettings
from acd_local.runtime.prompts import Framing
from acd_local.runtime.sampling import TokenSampler
from acd_local.runtime.streams import DecodeRequest, extend
from acd_local.runtime.template import Message

GREEDY = Options(temp=0.0, max_tokens=12)
SEEDED = Options(temp=0.9, seed=11, max_tokens=12)
PLAIN = {"alpha": 0.0, "beta": 0.0}  # the model's own distribution
AS_IS = Framing(None, None)
LOOKING = GateSettings(0.5, look=4, answer_threshold=0.9)
WRITERS = ("llama", "qwen2vl", "phi3", "gemma2", "gemma3", "mamba", "lfm2", "granite_hybrid")


def tokens(answer: Answer) -> list[int]:
    return [record.token for record in answer.tokens]


def four_layers(tiny: Callable[..., Path], name: str = "llama") -> Path:
    more = {} if name.startswith("gemma") else {"n_layers": 4}
    return tiny("chatml", writer=getattr(tiny_gguf, f"write_{name}"), **more)


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return four_layers(tiny)


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> PromptPair:
    return gates.write_pair(tmp_path_factory.mktemp("pair"), model)


@pytest.fixture(scope="module")
def engine(model: Path, pair: PromptPair) -> Iterator[Engine]:
    with Engine(model, pair=pair, ctx_size=1024, threads=1) as engine:
        yield engine


def constant(
    folder: Path, model: Path, value: float, settings: GateSettings, answer: float | None = None
) -> PromptPair:
    """A pair whose gate says `value` of every request, and `answer` of every answer."""
    gate = gates.between(model, HARMFUL, HARMLESS, answer=None if answer is None else gates.always(model, answer))
    gate = replace(gate, request=gates.always(model, value))
    return gates.write_pair(folder, model, settings=settings, gate=gate, name=f"says-{value}-{answer}")


# --- Reading ----------------------------------------------------------------------------------------------------------


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


@pytest.fixture
def short_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers of 128 tokens."""
    for name in ("READ_TOKENS", "LEAST_TOKENS"):
        monkeypatch.setattr(reading, name, 128)


@pytest.mark.usefixtures("short_sight")
def test_of_a_long_conversation_the_last_turns_are_read(model: Path, pair: PromptPair) -> None:
    past = [Message("user", "Tell me of bread. " * 6), Message("assistant", "Bread is baked. " * 6)]
    with Engine(model, pair=pair, ctx_size=1024, threads=1) as engine:
        for text, decision in ((HARMFUL, "contrast"), (HARMLESS, "as-is")):
            talk = [*past, *past, Message("user", text)]
            answer = engine.generate(talk, GREEDY).run()
            assert answer.gate is not None and answer.gate.decision == decision
            assert answer.gate.probability == pytest.approx(engine.gate_probability(text), abs=1e-4)
            own = engine.generate(talk, GREEDY.replace(PLAIN), framing=AS_IS).run()
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


# --- Deciding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [GREEDY, SEEDED, SEEDED.replace({"strategy": "stepwise"})])
def test_below_the_threshold_the_model_answers_as_it_is(engine: Engine, options: Options) -> None:
    answer = engine.generate(HARMLESS, options).run()
    own = engine.generate(HARMLESS, options.replace(PLAIN), framing=AS_IS).run()
    assert tokens(answer) == tokens(own)
    assert answer.gate is not None and own.gate is None
    assert answer.gate == GateRecord(answer.gate.probability, "as-is", None)
    assert answer.contrast.alpha == 0 and answer.contrast.compared == 0
    assert answer.context_used[1] == 0


@pytest.mark.parametrize("options", [GREEDY, SEEDED])
def test_above_the_threshold_the_pair_answers(engine: Engine, options: Options) -> None:
    events: list[Any] = []
    answer = engine.generate(HARMFUL, options, on_event=events.append).run()
    paper = engine.generate(HARMFUL, options.replace({"gate": False})).run()
    assert tokens(answer) == tokens(paper)
    assert paper.gate is None and answer.gate is not None
    assert (answer.gate.decision, answer.gate.contrast_from) == ("contrast", 0)
    assert answer.contrast.alpha == 0.5
    (decision,) = [event for event in events if isinstance(event, GateDecision)]
    assert decision == GateDecision(answer.gate.probability, "contrast", 0)


def test_the_threshold_can_be_chosen(engine: Engine) -> None:
    for threshold, text, decision in ((0.0, HARMLESS, "contrast"), (0.99, HARMFUL, "as-is"), (1.0, HARMFUL, "as-is")):
        answer = engine.generate(text, GREEDY.replace({"gate_threshold": threshold})).run()
        assert answer.gate is not None and answer.gate.decision == decision


@pytest.mark.parametrize(("value", "decision"), [(0.1, "helpful"), (0.3, "as-is"), (0.7, "contrast")])
def test_three_answerers(tmp_path: Path, model: Path, value: float, decision: str) -> None:
    settings = GateSettings(0.5, "Help gladly.", 0.2)
    pair = constant(tmp_path, model, value, settings)
    framing = {"helpful": Framing("Help gladly.", None), "as-is": AS_IS}.get(decision)
    with Engine(model, pair=pair, ctx_size=512, threads=1) as engine:
        for options in (GREEDY, SEEDED):
            answer = engine.generate(HARMLESS, options, system="Be brief.").run()
            plain = options.replace({"gate": False} if framing is None else PLAIN)
            assert tokens(answer) == tokens(engine.generate(HARMLESS, plain, system="Be brief.", framing=framing).run())
            assert answer.gate is not None and answer.gate.decision == decision


def test_a_framing_is_contrasted_always_unless_the_gate_is_asked_for(engine: Engine) -> None:
    framing = Framing("Be kind.", "Be unkind.")
    for text in (HARMFUL, HARMLESS):
        assert engine.generate(text, GREEDY, framing=framing).run().gate is None
    gated = GREEDY.replace({"gate": True})
    harmful, harmless = (engine.generate(text, gated, framing=framing).run() for text in (HARMFUL, HARMLESS))
    assert tokens(harmful) == tokens(engine.generate(HARMFUL, GREEDY, framing=framing).run())
    assert tokens(harmless) == tokens(engine.generate(HARMLESS, GREEDY.replace(PLAIN), framing=AS_IS).run())


def test_a_gate_that_is_not_there(tmp_path: Path, model: Path, pair: PromptPair) -> None:
    bare = replace(pair, gate=None)
    with Engine(model, pair=bare, ctx_size=512, threads=1) as engine:
        assert engine.generate(HARMLESS, GREEDY).run().gate is None
        for call in (
            lambda: engine.generate(HARMLESS, GREEDY.replace({"gate": True})),
            lambda: engine.gate_probability(HARMLESS),
        ):
            with pytest.raises(PairError, match=r"^pair 'gated' has no gate: "):
                call()


@pytest.mark.parametrize("bad", [{"gate": 1}, {"gate_threshold": 1.5}, {"gate_threshold": "x"}])
def test_bad_options(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"^{next(iter(bad))} must be"):
        Options(**bad)


# --- Every kind of engine ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("how", [{}, {"layout": "split"}, {"system_apart": True}, {"conversations": 2}])
def test_conversations_go_on_as_without_a_gate(
    tmp_path: Path, tiny: Callable[..., Path], writer: str, how: dict[str, Any]
) -> None:
    model = four_layers(tiny, writer)
    pair = constant(tmp_path, model, 0.1, LOOKING, 0.2)
    given = {"pair": pair, "ctx_size": 512, "threads": 1, **how}
    with Engine(model, **given) as gated, Engine(model, **given) as other:
        talk = [Message("user", HARMLESS)]
        for text in ("And then?", "More."):
            answer = gated.generate(talk, SEEDED).run()
            own = other.generate(talk, SEEDED.replace(PLAIN), framing=AS_IS).run()
            assert tokens(answer) == tokens(own)
            assert answer.gate is not None and answer.gate.contrast_from is None
            assert [at for at, _ in answer.gate.looks] == [at for at in (4, 8) if at < len(answer.tokens)]
            assert answer.prompt_decoded == own.prompt_decoded  # it is decoded once, and what is kept is kept
            talk += [Message("assistant", answer.text), Message("user", text)]


def test_a_repeated_answer_is_read_anew(engine: Engine) -> None:
    first, again = (engine.generate(HARMLESS, SEEDED).run() for _ in range(2))
    assert tokens(first) == tokens(again)
    assert first.gate is not None and again.gate is not None
    assert again.gate.probability == pytest.approx(first.gate.probability, abs=1e-4)


def test_answers_are_repeatable_bit_for_bit(model: Path, pair: PromptPair) -> None:
    with Engine(model, pair=pair, ctx_size=512, threads=1, system_apart=True) as engine:
        first = engine.generate(HARMLESS, SEEDED, system="Be brief.", trace=True).run()
        engine.generate(f"{HARMLESS} Tell me more.", SEEDED, system="Be brief.").run()
        engine.generate(HARMFUL, SEEDED).run()
        again = engine.generate(HARMLESS, SEEDED, system="Be brief.", trace=True).run()
    assert again.tokens == first.tokens and again.gate == first.gate  # with the tokens' probabilities


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_the_demo_answers_as_it_is(tmp_path: Path, demo: Path, kv_type: str) -> None:
    pair = gates.write_pair(tmp_path, demo, layer=18, answer=gates.always(demo, 0.2), settings=LOOKING)
    with Engine(demo, pair=pair, kv_type=kv_type, ctx_size=1024) as engine:
        for options in (GREEDY, SEEDED):
            answer = engine.generate(HARMLESS, options).run()
            with Engine(demo, pair=pair, kv_type=kv_type, ctx_size=1024) as other:
                own = other.generate(HARMLESS, options.replace(PLAIN), framing=AS_IS).run()
            assert tokens(answer) == tokens(own)
            assert answer.gate is not None and answer.gate.decision == "as-is"
        assert engine.generate(HARMFUL, GREEDY).run().gate.decision == "contrast"  # type: ignore[union-attr]


def test_a_batch_decides_for_every_answer(tmp_path: Path, model: Path) -> None:
    pair = gates.write_pair(tmp_path, model, answer=gates.always(model, 0.95), settings=LOOKING)
    with Engine(model, pair=pair, ctx_size=512, threads=1, conversations=3) as engine, BatchRunner(engine) as batch:
        asked = {"a": HARMLESS, "b": HARMFUL, "c": f"{HARMLESS} Please."}
        for key, text in asked.items():
            batch.add(key, engine.generate(text, SEEDED))
        found: dict[Any, Answer] = {}
        while len(batch):
            found |= {event.key: event.what for event in batch.step() if isinstance(event.what, Answer)}
        for key, text in asked.items():
            alone = engine.generate(text, SEEDED.replace({"strategy": "stepwise"})).run()
            assert tokens(found[key]) == tokens(alone)
            mine, its = found[key].gate, alone.gate
            assert mine is not None and its is not None
            assert (mine.decision, mine.contrast_from) == (its.decision, its.contrast_from)
        assert {key: answer.gate.contrast_from for key, answer in found.items()} == {"a": 4, "b": 0, "c": 4}  # type: ignore[union-attr]


def test_looks_of_answers_that_take_turns(tmp_path: Path, model: Path) -> None:
    """The reader holds one of them at a time; a look reads what it would read of an answer alone."""
    rng = np.random.default_rng(4)
    base = gates.between(model, HARMFUL, HARMLESS)
    answer = Probe(rng.normal(0, 0.1, base.request.weight.shape), 0.0)
    gate = replace(base, request=gates.always(model, 0.1), answer=answer)
    pair = gates.write_pair(tmp_path, model, gate=gate, settings=replace(LOOKING, answer_threshold=1.0))
    with Engine(model, pair=pair, ctx_size=512, threads=1, conversations=2) as engine, BatchRunner(engine) as batch:
        texts = [HARMLESS, HARMFUL]
        for text in texts:
            batch.add(text, engine.generate(text, SEEDED))
        found: dict[Any, Answer] = {}
        while len(batch):
            found |= {event.key: event.what for event in batch.step() if isinstance(event.what, Answer)}
        for text in texts:
            alone = engine.generate(text, SEEDED.replace({"strategy": "stepwise"})).run()
            assert tokens(alone) == tokens(found[text])
            looks = [found[text].gate.looks, alone.gate.looks]  # type: ignore[union-attr]
            assert [at for at, _ in looks[0]] == [at for at, _ in looks[1]] == [4, 8]
            np.testing.assert_allclose(*([p for _, p in seen] for seen in looks), atol=1e-4)


# --- The second look --------------------------------------------------------------------------------------------------


def turning(folder: Path, model: Path, **settings: Any) -> PromptPair:
    """A pair whose answers turn at the first look, after 4 tokens."""
    return constant(folder, model, 0.1, replace(LOOKING, **settings), 0.95)


@pytest.mark.parametrize("strategy", ["stepwise", "deferred"])
@pytest.mark.parametrize("options", [GREEDY, SEEDED, SEEDED.replace({"repeat_penalty": 1.3, "dry_multiplier": 0.5})])
def test_an_answer_that_turns_goes_on_contrasted(tmp_path: Path, model: Path, options: Options, strategy: str) -> None:
    pair = turning(tmp_path, model)
    with Engine(model, pair=pair, ctx_size=512, threads=1) as engine:
        events: list[Any] = []
        answer = engine.generate(HARMLESS, options.replace({"strategy": strategy}), on_event=events.append).run()
        assert answer.gate is not None
        assert (answer.gate.decision, answer.gate.contrast_from) == ("as-is", 4)
        assert answer.gate.looks == ((4, pytest.approx(0.95, abs=1e-4)),)
        assert [e.position for e in events if isinstance(e, GateDecision)] == [0, 4]
        assert tokens(answer) == by_hand(engine, pair, options, 4)
        assert answer.contrast.alpha == 0.5 and 0 < answer.contrast.compared <= 8
        assert len(answer.tokens) == options.max_tokens


def by_hand(engine: Engine, pair: PromptPair, options: Options, turn: int) -> list[int]:
    """An answer's tokens, one by one: the model's own, from `turn` on contrasted, as if both prompts had held them."""
    turns, slot = [Message("user", HARMLESS)], engine.decoder.slots[0]
    base, both = (
        engine.prompts.build(f, None, turns, contrast=c, max_tokens=12, overflow="drop")
        for f, c in ((AS_IS, False), (Framing.of(pair), True))
    )
    sampler = TokenSampler(engine.vocab, options, options.seed or 0, base.safe, n_ctx=engine.n_ctx)
    chooser = Chooser(sampler, engine.special_tokens, ContrastSettings(0.0, 0.0))
    said: list[int] = []
    for position in range(12):
        streams = [(slot.safe, base.safe)]
        if position >= turn:
            chooser.settings = ContrastSettings(0.5, 0.1, begin=turn)
            streams = [(slot.safe, both.safe), (slot.adversarial, both.adversarial or [])]
        for cache, _ in streams if position in (0, turn) else ():
            cache.clear()
        logits = extend([DecodeRequest(cache, [*prompt, *said][len(cache.tokens) :]) for cache, prompt in streams])
        step = chooser.choose(chooser.candidates(logits[0][0], position), logits[1][0] if len(logits) > 1 else None)
        assert step is not None
        said.append(step.token)
    return said


def test_a_window_counts_from_where_the_contrast_begins(tmp_path: Path, model: Path) -> None:
    with Engine(model, pair=turning(tmp_path, model), ctx_size=512, threads=1) as engine:
        whole = engine.generate(HARMLESS, SEEDED.replace({"strategy": "stepwise"}), divergence=True).run()
        answer = engine.generate(HARMLESS, SEEDED.replace({"window": 3, "strategy": "stepwise"}), divergence=True).run()
    assert whole.contrast.compared == 8
    assert answer.contrast.compared == 3
    assert tokens(answer)[:7] == tokens(whole)[:7]
    assert answer.context_used[1] == whole.context_used[1] - 5


def test_a_look_that_finds_nothing_changes_nothing(tmp_path: Path, model: Path, engine: Engine) -> None:
    for value, name in ((0.1, "calm"), (None, "unread")):
        pair = constant(tmp_path, model, 0.1, LOOKING, value)
        answer = engine.generate(HARMLESS, SEEDED, pair=pair).run()
        assert answer.gate is not None and answer.gate.contrast_from is None, name
        assert [at for at, _ in answer.gate.looks] == ([] if value is None else [4, 8])
        assert tokens(answer) == tokens(engine.generate(HARMLESS, SEEDED.replace(PLAIN), framing=AS_IS).run())


def test_limits_grammar_and_stop_strings_hold_beyond_the_turn(tmp_path: Path, model: Path) -> None:
    with Engine(model, pair=turning(tmp_path, model), ctx_size=512, threads=1) as engine:
        answer = engine.generate(HARMLESS, GREEDY.replace({"grammar": 'root ::= [a-z]{9} "." [0-9]+'})).run()
        assert answer.gate is not None and answer.gate.contrast_from
        assert answer.text[:9].isalpha() and (len(answer.text) < 10 or answer.text[9] == ".")
        schema = (
            '{"type": "object", "properties": {"answer": {"enum": ["a long enough text"]}}, "required": ["answer"]}'
        )
        answer = engine.generate(HARMLESS, GREEDY.replace({"json_schema": schema, "max_tokens": 60})).run()
        assert json.loads(answer.text) == {"answer": "a long enough text"}
        assert answer.gate is not None and answer.gate.contrast_from and answer.finish_reason == "stop"
        free = engine.generate(HARMLESS, SEEDED).run()
        stop = free.text[-3:]
        answer = engine.generate(HARMLESS, SEEDED.replace({"stop": (stop,)})).run()
        assert answer.text == free.text[: free.text.index(stop)]


def test_an_answer_ends_where_the_pair_has_no_room(tmp_path: Path, model: Path) -> None:
    with Engine(model, pair=turning(tmp_path, model), ctx_size=64, threads=1) as engine:
        answer = engine.generate("Hi. " * 5, Options(temp=0.0)).run()
    assert answer.gate is not None and answer.gate.contrast_from == 4
    assert (answer.finish_reason, len(answer.tokens)) == ("length", 4)


@pytest.mark.usefixtures("short_sight")
def test_answers_beyond_what_is_read_at_once_are_looked_at_too(tmp_path: Path, model: Path) -> None:
    pair = constant(tmp_path, model, 0.1, replace(LOOKING, look=16), 0.2)
    with Engine(model, pair=pair, ctx_size=1024, threads=1) as engine:
        for text in (HARMLESS, "Bread is baked at home. " * 30):
            options = SEEDED.replace({"max_tokens": 200, "grammar": "root ::= [a-z ]{600}"})
            answer = engine.generate(text, options).run()
            own = engine.generate(text, options.replace(PLAIN), framing=AS_IS).run()
            assert tokens(answer)[:32] == tokens(own)[:32]  # beyond that lie near-ties
            assert answer.gate is not None and len(answer.gate.looks) >= 6


# --- Cancelling, closing, progress ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow_model(tiny: Callable[..., Path]) -> Path:
    return tiny("chatml", n_embd=512, n_layers=6, n_ctx=4096)


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
        alone = engine.generate(text, GREEDY.replace({"strategy": "stepwise"})).run()
        assert tokens(ended[1][1]) == tokens(alone)


def test_progress_is_told_of_what_is_read(model: Path, pair: PromptPair) -> None:
    with Engine(model, pair=pair, ctx_size=1024, threads=1) as engine:
        events: list[Any] = []
        answer = engine.generate("Bread is baked. " * 60, GREEDY, on_event=events.append).run()
        first = events[0]
        assert isinstance(first, PromptProgress) and first.done == 0
        assert first.total >= answer.prompt_tokens - 60


# --- Broken gates, through the command line ---------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = run_cli(command, "acd-run", [*args, "--no-stdin", "-t", "1", "-c", "512"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, str]], None]) -> None:
    from safetensors.numpy import load, save

    data = path.read_bytes()
    tensors = dict(load(data))
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    change(tensors, metadata)
    path.write_bytes(save(tensors, metadata=metadata))


BROKEN: dict[str, tuple[Callable[[dict[str, Any], dict[str, str]], None], str]] = {
    "missing": (lambda t, m: t.pop("gate.request.bias"), "must hold soft prompts .* or a gate"),
    "shape": (lambda t, m: t.update({"gate.request.weight": np.zeros(64, np.float32)}), "gate.request: a probe has"),
    "rows": (lambda t, m: t.update({"gate.request.weight": np.zeros((2, 64), np.float32)}), "request: the probe has"),
    "width": (lambda t, m: t.update({"gate.request.weight": np.zeros((1, 32), np.float32)}), "request: the probe has"),
    "bias": (lambda t, m: t.update({"gate.request.bias": np.zeros(2, np.float32)}), "the bias of a probe is one"),
    "infinite": (lambda t, m: t.update({"gate.request.bias": np.array([np.inf], np.float32)}), "not finite"),
    "layer": (lambda t, m: m.update(layers="3"), r"the layers \(3,\) are none that can be read of 4"),
    "layers": (lambda t, m: m.update(layers="x"), "metadata layers: must be a whole number"),
    "model": (lambda t, m: m.update(tokenizer="0" * 64), "gate: made for another model .*: tokenizer"),
    "size": (lambda t, m: m.update(n_layer="9"), "gate: made for another model .*: number of layers 9"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_gate_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, case: str) -> None:
    pair = gates.write_pair(tmp_path, model)
    assert pair.path is not None
    change, problem = BROKEN[case]
    rewrite(pair.path.with_suffix(".safetensors"), change)
    code, out, err = run(capsys, str(model), "Hi.", "-n", "2", "--pair", str(pair.path))
    assert (code, out, err.count("\n")) == (5, "", 1)
    assert re.search(problem, err), err


def test_a_gate_without_its_file_or_with_another(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path
) -> None:
    pair = gates.write_pair(tmp_path, model)
    assert pair.path is not None
    toml = pair.path.read_text()
    pair.path.write_text(toml.replace("[gate]", f'sha256 = "{"0" * 64}"\n[gate]'))
    code, out, err = run(capsys, str(model), "Hi.", "-n", "2", "--pair", str(pair.path))
    assert (code, out, err.count("\n")) == (5, "", 1) and "not the vectors that gated.toml was written with" in err
    pair.path.write_text(toml)
    pair.path.with_suffix(".safetensors").unlink()
    code, out, err = run(capsys, str(model), "Hi.", "-n", "2", "--pair", str(pair.path))
    assert (code, out, err.count("\n")) == (5, "", 1) and "has a [gate], but no gated.safetensors" in err
    code, out, err = run(capsys, str(model), "Hi.", "-n", "2", "--pair", str(pair.path), "--gate", "off")
    assert code == 0


def test_layers_that_cannot_be_read_are_said_with_a_way_out(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    original = llama._Capture.__init__

    def unnamed(self: Any, layers: Any, n_embd: int) -> None:
        original(self, [layer + 90 for layer in layers], n_embd)  # names that no graph has

    monkeypatch.setattr(llama._Capture, "__init__", unnamed)
    with Engine(engine.info.path, pair=engine.pair, ctx_size=512, threads=1) as other:
        with pytest.raises(ModelError, match=r"does not name the layers .* --gate off"):
            other.generate(HARMLESS, GREEDY).run()
        assert other.generate(HARMLESS, GREEDY.replace({"gate": False})).run().text


# --- What is told -----------------------------------------------------------------------------------------------------


def test_json_stats_and_trace(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path) -> None:
    pair = turning(tmp_path, model)
    trace = tmp_path / "trace.jsonl"
    given = (
        str(model),
        HARMLESS,
        "-n",
        "12",
        "--seed",
        "11",
        "--pair",
        str(pair.path),
        "--trace",
        str(trace),
        "--stats",
    )
    code, out, err = run(capsys, *given, "--json")
    assert code == 0
    record = json.loads(out)["gate"]
    assert record == {"probability": 0.1, "decision": "as-is", "contrast_from": 4, "looks": [[4, 0.95]]}
    assert "gate       chance of harm 0.100: the model as it is; " in err and ", the pair from token 4 on" in err
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    assert lines[0] == {"gate": {"probability": 0.1, "decision": "as-is", "position": 0}}
    assert lines[5] == {"gate": {"probability": 0.95, "decision": "contrast", "position": 4}}
    assert sum("token" in line for line in lines) == 12 == len(lines) - 2
    code, out, err = run(capsys, *given, "--json", "--gate", "off")
    assert json.loads(out)["gate"] is None and "chance of harm" not in err
    code, out, err = run(capsys, *given, "--json", "--gate-threshold", "0.05")
    assert json.loads(out)["gate"]["decision"] == "contrast"
    code, out, err = run(capsys, *given, "--gate-threshold", "2")
    assert code == 2 and "gate_threshold must be in [0, 1]" in err


def test_the_worker_tells_and_takes_what_the_gate_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path
) -> None:
    pair = turning(tmp_path, model)
    requests = [
        {"id": 1, "prompt": HARMLESS},
        {"id": 2, "prompt": HARMLESS, "gate": False},
        {"id": 3, "prompt": HARMLESS, "gate_threshold": 0.05},
        {"id": 4, "prompt": HARMLESS, "gate": "on"},
    ]
    code = "import sys; from acd_local.cli.run import main; sys.argv[0] = 'acd-run'; main()"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            str(model),
            "--jsonl",
            "-t",
            "1",
            "-c",
            "512",
            "-n",
            "8",
            "--pair",
            str(pair.path),
        ],
        input="\n".join(map(json.dumps, requests)),
        capture_output=True,
        text=True,
        env=child_env(),
        check=True,
    )
    events = [json.loads(line) for line in done.stdout.splitlines()]
    ready = next(event for event in events if event["event"] == "ready")
    assert ready["options"]["gate"] is None and ready["options"]["gate_threshold"] is None
    told = [(e["id"], e["decision"], e["position"]) for e in events if e["event"] == "gate"]
    assert told == [(1, "as-is", 0), (1, "contrast", 4), (3, "contrast", 0)]
    ends = {event["id"]: event for event in events if event.get("final")}
    assert ends[1]["gate"]["contrast_from"] == 4 and ends[1]["gate"]["looks"] == [[4, 0.95]]
    assert ends[2]["gate"] is None
    assert ends[3]["gate"]["decision"] == "contrast"
    assert ends[4]["event"] == "error" and ends[4]["message"] == "gate must be true or false, not 'on'"


def test_a_chat_reads_every_turn_and_regenerates(engine: Engine) -> None:
    chat = engine.chat(options=SEEDED)
    chat.ask(HARMLESS)
    answer = chat.ask(HARMFUL)
    again = chat.regenerate().run()
    read = engine.gate_probability([*chat.messages][:-1])
    for gate in (answer.gate, again.gate):
        assert gate is not None and gate.probability == pytest.approx(read, abs=1e-4)


def test_a_conversation_under_the_pair_is_decoded_once(model: Path, pair: PromptPair) -> None:
    """Every turn is read under the model's own prompt, and both streams keep what they hold."""
    options = GREEDY.replace({"gate_threshold": 0.0})
    with Engine(model, pair=pair, ctx_size=1024, threads=1) as gated, Engine(model, pair=pair, ctx_size=1024) as other:
        talk, beyond = [Message("user", HARMFUL)], []
        for text in ("And then?", "And then?", "More."):
            answer = gated.generate(talk, options).run()
            paper = other.generate(talk, options.replace({"gate": False})).run()
            beyond.append(answer.prompt_decoded - paper.prompt_decoded)
            talk += [Message("assistant", "First this."), Message("user", text)]
    assert max(beyond[1:]) < 40  # rows of the last turn, which are read


def test_under_asyncio_the_decision_is_an_event(engine: Engine) -> None:
    async def ask() -> tuple[list[Any], Answer]:
        events: list[Any] = []
        stream = aio.AsyncEngine(engine).generate(HARMFUL, GREEDY, on_event=events.append)
        return events, await stream.run()

    events, answer = asyncio.run(ask())
    assert answer.gate is not None
    assert GateDecision(answer.gate.probability, "contrast", 0) in events


def test_what_reads_is_freed_with_the_engine(model: Path, pair: PromptPair) -> None:
    engine = Engine(model, pair=pair, ctx_size=512, threads=1)
    assert engine.decoder._reader is None
    engine.gate_probability(HARMLESS)
    reader = engine.decoder._reader
    assert reader is not None
    engine.close()
    with pytest.raises(EngineClosedError):
        reader.read([1, 2, 3], 0)
    with pytest.raises(EngineClosedError):
        engine.gate_probability(HARMLESS)
