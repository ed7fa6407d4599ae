"""What the chooser leaves out of its looks at the vocabulary changes no choice."""

from __future__ import annotations

import math

import numpy as np
import pytest

from acd_local.options import Options
from acd_local.runtime import llama
from acd_local.runtime.choice import NO_CONTRAST, Chooser, ContrastSettings, SpecialTokens
from acd_local.runtime.contrast import apply_contrast, plausible
from acd_local.runtime.sampling import TokenSampler

CONTROL = llama.ATTR_CONTROL
SAMPLERS = [
    Options(),
    Options(temp=0.0),
    Options(temp=0.0, typical=0.5),
    Options(temp=1.5, top_k=5, top_p=1.0, min_p=0.0),
    Options(top_k=2000),
    Options(top_k=0),
    Options(top_k=100_000),
    Options(typical=0.8),
    Options(xtc_probability=0.5, xtc_threshold=0.05),
    Options(repeat_penalty=1.3),
    Options(mirostat=2),
]
SPREADS = [0.5, 2.0, 6.0, 40.0]  # from logits that all count to logits of which few do


def logits_of(vocab: llama.Vocab, spread: float, number: int, *, control_first: bool) -> np.ndarray:
    rng = np.random.default_rng(number)
    logits = (spread * rng.normal(size=vocab.n_tokens)).astype(np.float32)
    if control_first:
        logits[SpecialTokens(vocab, CONTROL).banned] = logits.max() + np.float32(1.0)
    return logits


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("options", SAMPLERS, ids=lambda options: str(SAMPLERS.index(options)))
def test_a_draw_is_that_among_all_tokens(vocab: llama.Vocab, options: Options, spread: float) -> None:
    special = SpecialTokens(vocab, CONTROL)
    for settings in (NO_CONTRAST, ContrastSettings(0.0, 0.1), ContrastSettings(0.5, 0.1, window=0)):
        chooser = Chooser(TokenSampler(vocab, options, 5), special, settings)
        sampler = TokenSampler(vocab, options, 5)
        for position in range(6):
            logits = logits_of(vocab, spread, position, control_first=position % 3 == 2)
            legal = logits.copy()
            legal[special.banned] = -np.inf
            expected = sampler.draw(*plausible(legal, settings.beta), position)
            sampler.accept(expected)
            choice = chooser.choose(logits, None, position)
            assert choice is not None
            assert choice.token == expected


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("beta", [1.0, 0.1, 0.001, 0.0])
def test_the_contrast_is_taken_over_all_plausible_tokens(vocab: llama.Vocab, beta: float, spread: float) -> None:
    special, settings = SpecialTokens(vocab, CONTROL), ContrastSettings(0.5, beta)
    for options in (Options(temp=0.0), Options()):
        chooser, sampler = (
            Chooser(TokenSampler(vocab, options, 5), special, settings),
            TokenSampler(vocab, options, 5),
        )
        for position in range(6):
            safe = logits_of(vocab, spread, position, control_first=position % 3 == 2)
            adversarial = logits_of(vocab, spread, 100 + position, control_first=False)
            legal = safe.copy()
            legal[special.banned] = -np.inf
            ids, scores = plausible(legal, beta)
            choice = chooser.choose(safe, adversarial, position)
            assert choice is not None and choice.compared
            assert choice.safe_choice == sampler.draw(ids, scores, position, dry_run=True)
            assert choice.token == sampler.draw(*apply_contrast(ids, scores, adversarial, alpha=0.5), position)


def test_probabilities_are_those_among_all_tokens(vocab: llama.Vocab) -> None:
    special = SpecialTokens(vocab, CONTROL)
    chooser = Chooser(TokenSampler(vocab, Options(), 5), special, NO_CONTRAST, logprobs=3)
    logits = logits_of(vocab, 2.0, 1, control_first=True)
    legal = np.setdiff1d(np.arange(vocab.n_tokens), special.banned)
    total = np.log(np.exp(logits[legal].astype(np.float64)).sum())
    expected = {int(i): float(logits[i] - total) for i in legal}
    choice = chooser.choose(logits.copy(), None, 0)
    assert choice is not None and choice.logprobs is not None and len(choice.logprobs) == 4
    assert all(math.isclose(logprob, expected[token], abs_tol=1e-4) for token, logprob in choice.logprobs)


def test_nothing_can_be_said_where_nothing_is_legal(vocab: llama.Vocab) -> None:
    special = SpecialTokens(vocab, CONTROL)
    logits = np.full(vocab.n_tokens, -np.inf, np.float32)
    logits[special.banned] = 1.0
    for options in (Options(), Options(temp=0.0)):
        for settings in (NO_CONTRAST, ContrastSettings(0.5, 0.1)):
            chooser = Chooser(TokenSampler(vocab, options, 5), special, settings)
            assert chooser.choose(logits.copy(), None, 0) is None
