"""Who answers by what the gate reads, in every kind of engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gates
import numpy as np
import pytest
from gated import AS_IS, GREEDY, LOOKING, PLAIN, SEEDED, WRITERS, constant, four_layers, tokens
from gates import HARMFUL, HARMLESS

from acd_local import Engine, Options
from acd_local.answers import Answer, GateDecision, GateRecord
from acd_local.batch import BatchRunner
from acd_local.errors import PairError, UsageError
from acd_local.gate import Probe
from acd_local.pairs import GateSettings, PromptPair
from acd_local.runtime.prompts import PromptSetup
from acd_local.runtime.template import Message

# --- Deciding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [GREEDY, SEEDED, SEEDED.replace({"draft_max": 0})])
def test_below_the_threshold_the_model_answers_as_it_is(engine: Engine, options: Options) -> None:
    answer = engine.generate(HARMLESS, options).run()
    own = engine.generate(HARMLESS, options.replace(PLAIN), prompt_setup=AS_IS).run()
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


def test_the_helpful_text_is_not_the_adversarial_one(tmp_path: Path, model: Path) -> None:
    written = gates.write_pair(tmp_path, model)
    adversarial = written.adversarial.reveal_for_negative_stream()
    pair = gates.write_pair(tmp_path, model, settings=GateSettings(0.5, f"Well. {adversarial}", 0.2))
    with (
        Engine(model, pair=pair, ctx_size=512) as engine,
        pytest.raises(UsageError, match="contains the adversarial prompt"),
    ):
        engine.generate(HARMLESS, GREEDY).run()


@pytest.mark.parametrize(("value", "decision"), [(0.1, "helpful"), (0.3, "as-is"), (0.7, "contrast")])
def test_three_answerers(tmp_path: Path, model: Path, value: float, decision: str) -> None:
    settings = GateSettings(0.5, "Help gladly.", 0.2)
    pair = constant(tmp_path, model, value, settings)
    prompt_setup = {"helpful": PromptSetup("Help gladly.", None), "as-is": AS_IS}.get(decision)
    with Engine(model, pair=pair, ctx_size=512, threads=1) as engine:
        for options in (GREEDY, SEEDED):
            answer = engine.generate(HARMLESS, options, system="Be brief.").run()
            plain = options.replace({"gate": False} if prompt_setup is None else PLAIN)
            assert tokens(answer) == tokens(
                engine.generate(HARMLESS, plain, system="Be brief.", prompt_setup=prompt_setup).run()
            )
            assert answer.gate is not None and answer.gate.decision == decision


def test_a_prompt_setup_is_contrasted_always_unless_the_gate_is_asked_for(engine: Engine) -> None:
    prompt_setup = PromptSetup("Be kind.", "Be unkind.")
    for text in (HARMFUL, HARMLESS):
        assert engine.generate(text, GREEDY, prompt_setup=prompt_setup).run().gate is None
    gated = GREEDY.replace({"gate": True})
    harmful, harmless = (engine.generate(text, gated, prompt_setup=prompt_setup).run() for text in (HARMFUL, HARMLESS))
    assert tokens(harmful) == tokens(engine.generate(HARMFUL, GREEDY, prompt_setup=prompt_setup).run())
    assert tokens(harmless) == tokens(engine.generate(HARMLESS, GREEDY.replace(PLAIN), prompt_setup=AS_IS).run())


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
    given = {"pair": pair, "ctx_size": 512, "threads": 1, "cache": False, **how}
    with Engine(model, **given) as gated, Engine(model, **given) as other:
        talk = [Message("user", HARMLESS)]
        for text in ("And then?", "More."):
            answer = gated.generate(talk, SEEDED).run()
            own = other.generate(talk, SEEDED.replace(PLAIN), prompt_setup=AS_IS).run()
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
                own = other.generate(HARMLESS, options.replace(PLAIN), prompt_setup=AS_IS).run()
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
            alone = engine.generate(text, SEEDED.replace({"draft_max": 0})).run()
            assert tokens(found[key]) == tokens(alone)
            mine, its = found[key].gate, alone.gate
            assert mine is not None and its is not None
            assert (mine.decision, mine.contrast_from) == (its.decision, its.contrast_from)
        assert {key: answer.gate.contrast_from for key, answer in found.items()} == {"a": 4, "b": 0, "c": 4}  # type: ignore[union-attr]


def test_a_contrasted_conversation_is_found_in_its_slot(tmp_path: Path, model: Path) -> None:
    """The slot holds the pair's prompts there, not the one that is read."""
    pair = constant(tmp_path, model, 0.95, GateSettings(0.5))
    with Engine(model, pair=pair, ctx_size=512, threads=1, slots=2) as engine:
        one, other = ([Message("user", f"{text} {HARMLESS * 3}")] for text in ("Red?", "Old kind water?"))
        engine.generate(one, GREEDY).run()
        answer = engine.generate(other, GREEDY).run()
        held = [slot.safe.tokens[:] for slot in engine.decoder.slots]
        other += [Message("assistant", answer.text), Message("user", "And then?")]
        engine.generate(other, GREEDY).run()
        assert [slot.safe.tokens == before for slot, before in zip(engine.decoder.slots, held, strict=True)] == [1, 0]


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
            alone = engine.generate(text, SEEDED.replace({"draft_max": 0})).run()
            assert tokens(alone) == tokens(found[text])
            looks = [found[text].gate.looks, alone.gate.looks]  # type: ignore[union-attr]
            assert [at for at, _ in looks[0]] == [at for at, _ in looks[1]] == [4, 8]
            np.testing.assert_allclose(*([p for _, p in seen] for seen in looks), atol=1e-4)
