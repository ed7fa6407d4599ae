"""Likelihoods of given texts against full recomputation, one position at a time."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf
from reference import TOLERANCE, fresh_logits

from acd_local.errors import ContextError, NumericalError
from acd_local.evaluate.likelihood import ROWS, Scorer, contrasted
from acd_local.runtime import llama
from acd_local.runtime.choice import ContrastSettings

WRITERS = {
    "full": tiny_gguf.write_llama,
    "sliding": tiny_gguf.write_gemma3,
    "recurrent": tiny_gguf.write_mamba,
    "hybrid": tiny_gguf.write_lfm2,
}
PLAIN = ContrastSettings(0.0, 0.0)
CONTRAST = ContrastSettings(0.5, 0.1)
PAPER = ContrastSettings(0.4, 0.0, raw=True)
WINDOW = ContrastSettings(0.5, 0.0, window=2)


@pytest.fixture(scope="module", params=WRITERS)
def model(request: pytest.FixtureRequest, tiny: Callable[..., Path]) -> Iterator[llama.Model]:
    with llama.Model(tiny("chatml", writer=WRITERS[request.param])) as model:
        yield model


def tokens(seed: int, n: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(40, 400, n)]


def by_hand(model: llama.Model, prompts: list[list[int]], text: list[int], mix: tuple) -> list[float]:  # type: ignore[type-arg]
    """log P of every token, from the definition, in Python floats."""
    positive, negative, s = mix
    found = []
    for i, token in enumerate(text):
        scores = [float(x) for x in fresh_logits(model, prompts[positive] + text[:i])]
        if negative is not None and s.alpha > 0 and (s.window is None or i < s.window):
            other = fresh_logits(model, prompts[negative] + text[:i])
            scores = [
                (a - s.alpha * float(b)) / (1.0 if s.raw else 1.0 - s.alpha) for a, b in zip(scores, other, strict=True)
            ]
        total = math.log(sum(math.exp(x - max(scores)) for x in scores)) + max(scores)
        found.append(scores[token] - total)
    return found


def test_log_probabilities_are_the_definitions(model: llama.Model) -> None:
    prompts = [tokens(1, 20), tokens(2, 26), tokens(1, 20)[:15] + tokens(3, 4)]
    mixes = [(0, None, PLAIN), (0, 1, CONTRAST), (2, 0, PAPER), (1, 2, WINDOW), (1, None, PLAIN)]
    with Scorer(model, n_streams=3, n_ctx=256, threads=1) as scorer:
        for seed in (7, 8):  # the second continuation follows the same prompts, which are not decoded again
            text = tokens(seed, 5)
            found = scorer.logprobs(prompts, text, mixes)
            assert found.shape == (5, 5)
            for row, mix in zip(found, mixes, strict=True):
                assert row == pytest.approx(by_hand(model, prompts, text, mix), abs=6 * TOLERANCE)
        shorter = prompts[0][:12]
        again = scorer.logprobs([shorter], tokens(9, 2), [(0, None, PLAIN)])[0]
        assert again == pytest.approx(by_hand(model, [shorter], tokens(9, 2), (0, None, PLAIN)), abs=2 * TOLERANCE)


def random_calls(rng: random.Random) -> list[tuple[list[list[int]], list[int], list[int]]]:
    """(prompts, prefixes, continuation): some share their beginnings, cut alike or not, some are asked for twice."""
    calls = []
    for _ in range(12):
        prompts, cuts = [], []
        for system in rng.sample((11, 12, 13), rng.randrange(1, 4)):
            prefix = rng.choice((0, 40, 70))
            user = rng.choice((tokens(1, 30), [*tokens(1, 12), *tokens(rng.randrange(9), 9)], tokens(5, 1)))
            prompts.append([*tokens(system, 70)[: rng.choice((40, 70))], *user])
            cuts.append(min(prefix, len(prompts[-1])))
        text = rng.choice((tokens(21, 3), tokens(22, 2 * ROWS + 3)))
        calls += [(prompts, cuts, text)] * rng.choice((1, 2)) + [(prompts, cuts, tokens(23, 5))]
    return calls


def test_scores_depend_on_the_item_alone(model: llama.Model) -> None:
    """Bit for bit: whatever was scored before, beside it, and in whichever context."""
    calls, rng = random_calls(random.Random(5)), random.Random(6)
    alone: dict[tuple[object, ...], list[float]] = {}
    for order, n_streams, n_ctx in ((1, 3, 512), (2, 4, 256), (3, 3, 768)):
        rng.seed(order)
        rng.shuffle(calls)
        with Scorer(model, n_streams=n_streams, n_ctx=n_ctx, threads=1) as scorer:
            for prompts, cuts, text in calls:
                mixes = [(i, None, PLAIN) for i in range(len(prompts))]
                found = scorer.logprobs(prompts, text, mixes, cuts)
                for prompt, cut, row in zip(prompts, cuts, found.tolist(), strict=True):
                    assert alone.setdefault((*prompt, "/", cut, *text), row) == row
    assert len(alone) > 30


def test_going_on_from_the_last_call_leaves_later_ones_alone(model: llama.Model) -> None:
    first, other, text = tokens(1, 50), [*tokens(1, 30), *tokens(2, 20)], tokens(3, 4)
    with Scorer(model, n_streams=1, n_ctx=256, threads=1) as scorer:
        wanted = scorer.logprobs([first], text, [(0, None, PLAIN)], [20]).tolist()
        for between in ([*first, *text[:2]], other, first[:10]):
            scorer.logprobs([between], text, [(0, None, PLAIN)])
            assert scorer.logprobs([first], text, [(0, None, PLAIN)], [20]).tolist() == wanted


def test_long_texts_go_through_in_pieces(tiny: Callable[..., Path]) -> None:
    with llama.Model(tiny("chatml")) as model, Scorer(model, n_streams=2, n_ctx=256, threads=1) as scorer:
        prompts, text = [tokens(1, 9), tokens(2, 14)], tokens(3, 2 * ROWS + 3)
        whole = scorer.logprobs(prompts, text, [(0, 1, CONTRAST)])[0]
        assert len(whole) == len(text)
        for at in (0, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS + 2):
            longer = [prompt + text[:at] for prompt in prompts]
            one = scorer.logprobs(longer, [text[at]], [(0, 1, CONTRAST)])[0, 0]
            assert whole[at] == pytest.approx(one, abs=4 * TOLERANCE)
        starts = [(start, logits.shape) for start, logits in scorer.logits(prompts, text)]
        assert starts == [
            (0, (2, ROWS, model.n_vocab)),
            (ROWS, (2, ROWS, model.n_vocab)),
            (2 * ROWS, (2, 3, model.n_vocab)),
        ]


def test_a_text_that_does_not_fit(tiny: Callable[..., Path]) -> None:
    with llama.Model(tiny("chatml")) as model, Scorer(model, n_streams=1, n_ctx=64, threads=1) as scorer:
        with pytest.raises(ContextError, match="64 tokens"):
            scorer.logprobs([tokens(1, 60)], tokens(2, 5), [(0, None, PLAIN)])
        assert scorer.logprobs([tokens(1, 59)], tokens(2, 5), [(0, None, PLAIN)]).shape == (1, 5)


def test_no_mask_and_a_normalised_contrast() -> None:
    safe, adversarial = np.array([3.0, 1.0, -9.0], np.float32), np.array([2.0, -1.0, -30.0], np.float32)
    assert contrasted(safe, adversarial, CONTRAST) == pytest.approx([4.0, 3.0, 12.0])  # the implausible one counts
    assert contrasted(safe, adversarial, PAPER) == pytest.approx([2.2, 1.4, 3.0])
    assert contrasted(safe, None, CONTRAST) is safe
    gap = np.array([2.0, -np.inf, -np.inf], np.float32)
    assert contrasted(np.array([3.0, 1.0, -np.inf], np.float32), gap, CONTRAST).tolist() == [4.0, -np.inf, -np.inf]
    with pytest.raises(NumericalError, match="alpha"):
        contrasted(safe, adversarial, ContrastSettings(3e38, 0.0))
    with pytest.raises(NumericalError):
        contrasted(np.array([np.nan, 1.0], np.float32), None, PLAIN)
