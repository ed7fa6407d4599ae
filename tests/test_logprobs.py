"""Log probabilities of the distribution that tokens are drawn from, which never come with the safe stream's."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from manual import DEFAULT
from reference import TOLERANCE, fresh_logits

from acd_local import Engine, Options
from acd_local.answers import Answer
from acd_local.engine import MAX_LOGPROBS
from acd_local.errors import UsageError
from acd_local.runtime.contrast import contrast, log_softmax
from acd_local.runtime.prompts import PromptSetup

QUESTION = "What is red?"


def ask(engine: Engine, top: int, **options: object) -> Answer:
    return engine.generate(QUESTION, Options(max_tokens=8, seed=3).replace(options), logprobs=top).run()


def test_they_are_those_of_the_contrasted_distribution(engine: Engine) -> None:
    pair = dataclasses.replace(DEFAULT, beta=0.2)
    answer = engine.generate(QUESTION, Options(max_tokens=8, seed=3, temp=1.0), pair=pair, logprobs=20).run()
    prompts = engine.decoder.slots[0]
    first = answer.tokens[0]
    said = len(answer.tokens) - 1
    logits = [
        fresh_logits(engine.decoder.model, cache.tokens[: len(cache.tokens) - said], n_ctx=1024)
        for cache in (prompts.safe, prompts.adversarial)
    ]
    logits[0][engine.special_tokens.banned] = -np.inf
    ids, scores = contrast(*logits, alpha=DEFAULT.alpha or 0.5, beta=0.2)
    expected = dict(zip(ids.tolist(), log_softmax(scores).tolist(), strict=True))
    assert first.logprobs is not None
    chosen, *top = first.logprobs
    assert chosen.token == first.token
    assert len(top) == min(20, len(ids))
    for one in first.logprobs:
        assert one.logprob == pytest.approx(expected[one.token], abs=4 * TOLERANCE)
        assert one.piece == engine.vocab.piece(one.token)
    assert [one.logprob for one in top] == sorted((one.logprob for one in top), reverse=True)


@pytest.mark.parametrize("draft_max", [0, None])
@pytest.mark.parametrize("options", [{"temp": 0.0}, {"temp": 1.0}], ids=str)
def test_probabilities_add_up_to_one_at_most(engine: Engine, options: dict[str, object], draft_max: int | None) -> None:
    """And to one where the plausible tokens are all told; the same text comes out as without them."""
    answer = ask(engine, MAX_LOGPROBS, draft_max=draft_max, **options)
    assert answer.text == engine.generate(QUESTION, Options(max_tokens=8, seed=3).replace(options)).run().text
    whole = 0
    for record in answer.tokens:
        assert record.logprobs is not None
        chosen, *top = record.logprobs
        total = sum(math.exp(one.logprob) for one in top)
        assert total <= 1 + 1e-6
        assert len({one.token for one in top}) == len(top)
        if len(top) < MAX_LOGPROBS:
            assert total == pytest.approx(1, abs=1e-6)
            whole += 1
        if options["temp"] == 0:
            assert chosen == top[0]
        assert record.safe_logprob is None and record.safe_rank is None
    assert whole


def test_zero_tells_the_chosen_one_alone(engine: Engine) -> None:
    for record in ask(engine, 0).tokens:
        assert record.logprobs is not None and [one.token for one in record.logprobs] == [record.token]
    assert all(record.logprobs is None for record in engine.generate(QUESTION, Options(max_tokens=2)).run().tokens)


def test_a_schema_narrows_what_they_add_up_over(engine: Engine) -> None:
    answer = ask(engine, 20, json_schema='{"enum": ["a", "b"]}')
    for record in answer.tokens:
        assert record.logprobs is not None
        assert sum(math.exp(one.logprob) for one in record.logprobs[1:]) == pytest.approx(1, abs=1e-6)


def test_never_both_distributions(engine: Engine) -> None:
    for given in ({"logprobs": 3, "trace": True}, {"logprobs": -1}, {"logprobs": 21}):
        with pytest.raises(UsageError, match="logprobs"):
            engine.generate(QUESTION, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"alpha": 0.2}, {"beta": 0.2}, {"plain": True}, {"window": 1}], ids=str)
def test_nor_two_of_one_prompt(engine: Engine, options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"leave {next(iter(options))} out"):
        ask(engine, 3, **options)
    with pytest.raises(UsageError, match="leave prompt_setup out"):
        engine.generate(QUESTION, prompt_setup=PromptSetup("Be kind."), logprobs=3)


def test_the_model_as_it_is_has_one_distribution(engine: Engine) -> None:
    answer = engine.generate(QUESTION, Options(max_tokens=3, temp=0.0, plain=True), pair="as-is", logprobs=1).run()
    assert all(record.logprobs is not None for record in answer.tokens)
