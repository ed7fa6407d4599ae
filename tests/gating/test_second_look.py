"""Answers that are looked at again and go on contrasted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gated import AS_IS, GREEDY, LOOKING, PLAIN, SEEDED, constant, tokens, turning
from gates import HARMLESS

from acd_local import Engine, Options
from acd_local.answers import GateDecision
from acd_local.pairs import PromptPair
from acd_local.runtime.choice import Chooser, ContrastSettings
from acd_local.runtime.prompts import PromptSetup
from acd_local.runtime.sampling import TokenSampler
from acd_local.runtime.streams import DecodeRequest, extend
from acd_local.runtime.template import Message


@pytest.mark.parametrize("draft_max", [0, None])
@pytest.mark.parametrize("options", [GREEDY, SEEDED, SEEDED.replace({"repeat_penalty": 1.3, "dry_multiplier": 0.5})])
def test_an_answer_that_turns_goes_on_contrasted(
    tmp_path: Path, model: Path, options: Options, draft_max: int | None
) -> None:
    pair = turning(tmp_path, model)
    with Engine(model, pair=pair, ctx_size=512, threads=1) as engine:
        events: list[Any] = []
        answer = engine.generate(HARMLESS, options.replace({"draft_max": draft_max}), on_event=events.append).run()
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
        for f, c in ((AS_IS, False), (PromptSetup.of(pair), True))
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
        step = chooser.choose(logits[0][0], logits[1][0] if len(logits) > 1 else None, position)
        assert step is not None
        said.append(step.token)
    return said


def test_a_window_counts_from_where_the_contrast_begins(tmp_path: Path, model: Path) -> None:
    with Engine(model, pair=turning(tmp_path, model), ctx_size=512, threads=1) as engine:
        whole = engine.generate(HARMLESS, SEEDED.replace({"draft_max": 0}), divergence=True).run()
        answer = engine.generate(HARMLESS, SEEDED.replace({"window": 3, "draft_max": 0}), divergence=True).run()
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
        assert tokens(answer) == tokens(engine.generate(HARMLESS, SEEDED.replace(PLAIN), prompt_setup=AS_IS).run())


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
            own = engine.generate(text, options.replace(PLAIN), prompt_setup=AS_IS).run()
            assert tokens(answer)[:32] == tokens(own)[:32]  # beyond that lie near-ties
            assert answer.gate is not None and len(answer.gate.looks) >= 6
