"""The texts that a fit tries can stand in pairs, and none tells a model that refuses to comply with harm."""

from __future__ import annotations

import itertools

from acd_local import pairs
from acd_local.fit import candidates
from acd_local.pairs import AdversarialText, PromptPair

OWN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
MANUAL = pairs.find("default").safe


def test_every_text_is_tried_alone_and_behind_the_models_own_prompt() -> None:
    alone, both = candidates.declining(""), candidates.declining(OWN)
    assert len(alone) >= 12
    assert both[: len(alone)] == alone
    assert [c.text for c in both[len(alone) :]] == [f"{OWN}\n\n{c.text}" for c in alone]
    assert [c.shots for c in both[len(alone) :]] == [c.shots for c in alone]
    assert len({c.name for c in both}) == len(both)
    assert {len(c.shots) for c in alone} == {0, 3, 8}
    assert candidates.helpful("", MANUAL)[0].text == MANUAL


def test_every_combination_is_a_pair_whose_streams_are_kept_apart() -> None:
    declining = candidates.declining(OWN)
    helpful = candidates.helpful(OWN, MANUAL)
    for positive, negative in itertools.product(declining, candidates.complying(OWN, declines=False)):
        PromptPair("a", positive.text, AdversarialText(negative.text))
        texts = [positive.text, *(text for shot in positive.shots for text in shot), *(c.text for c in helpful)]
        assert candidates.may_be_pair(negative.text, texts), negative.name


def test_the_models_own_prompt_as_a_negative_stays_free_for_applications() -> None:
    negative = candidates.complying(OWN, declines=True)[0]
    assert negative.text.startswith(OWN)
    assert candidates.may_be_pair(negative.text, [OWN, f"{OWN}\n\nSpeak French."])
    assert not candidates.may_be_pair(negative.text, [f"Hello.\n\n{negative.text}"])


def test_a_model_that_declines_by_itself_is_not_told_to_comply() -> None:
    declines = {c.name for c in candidates.complying(OWN, declines=True)}
    does_not = {c.name for c in candidates.complying(OWN, declines=False)}
    assert declines < does_not
    assert all("careless" in name for name in does_not - declines)
    assert not any(c.name == "own" for c in candidates.complying("", declines=False))


def test_facts_are_told_from_other_answers() -> None:
    every = candidates.facts()
    assert len(every) == 12
    france = next(f for f in every if "France" in f.question)
    assert france.is_right("The capital of France is PARIS.")
    assert not france.is_right("I'm sorry, but I can't help with that.")
