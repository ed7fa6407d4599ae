"""SafeDecoding's combination equals the paper's, step by step, on random logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acd_local.runtime.expert import COMMON, led

ALPHAS = st.sampled_from([0.5, 1.0, 3.0, 10.0])


def of_the_paper(ids: list[int], base: np.ndarray, expert: np.ndarray, alpha: float) -> dict[int, float]:
    """P of every token of the sample space: k grows from 1 until both streams' k likeliest have enough in common."""

    def chances(logits: np.ndarray) -> dict[int, float]:
        weights = [math.exp(float(x) - float(logits.max())) for x in logits]
        return {token: w / math.fsum(weights) for token, w in zip(ids, weights, strict=True)}

    ours, theirs = chances(base), chances(expert[ids])
    by_base = sorted(ids, key=lambda token: (-base[ids.index(token)], token))
    by_expert = sorted(ids, key=lambda token: (-expert[token], token))
    space: set[int] = set()
    for k in range(1, len(ids) + 1):
        space = set(by_base[:k]) & set(by_expert[:k])
        if len(space) >= COMMON:
            break
    return {token: ours[token] + alpha * (theirs[token] - ours[token]) for token in space}


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), ALPHAS, st.floats(0.1, 8.0))
def test_it_is_the_paper_on_random_logits(seed: int, n: int, alpha: float, spread: float) -> None:
    rng = np.random.default_rng(seed)
    ids = np.flatnonzero(rng.random(n) < 0.8).astype(np.int32)
    base, expert = (rng.normal(0, spread, n).astype(np.float32) for _ in range(2))
    found, scores = led(ids, base[ids], expert, alpha=alpha)
    assert found.dtype == np.int32 and scores.dtype == np.float32 and len(found) == len(scores)
    if not len(ids):
        assert not len(found)
        return
    expected = of_the_paper(ids.tolist(), base[ids], expert, alpha)
    possible = {token: p for token, p in expected.items() if p > 1e-12}
    if not possible:
        assert len(found) == 1 and expected[int(found[0])] >= max(expected.values()) - 1e-9
        return
    assert possible.keys() <= set(found.tolist()) <= expected.keys()
    for token, score in zip(found.tolist(), scores.tolist(), strict=True):
        if token in possible and possible[token] > 1e-6:
            assert math.exp(score) == pytest.approx(possible[token], rel=1e-4, abs=1e-7)
    assert found.tolist() == sorted(found.tolist())


def test_an_expert_that_agrees_changes_nothing_but_the_space() -> None:
    base = np.linspace(0, 5, 50).astype(np.float32)
    ids = np.arange(50, dtype=np.int32)
    found, scores = led(ids, base, base, alpha=3.0)
    assert found.tolist() == [45, 46, 47, 48, 49]
    assert np.diff(scores) == pytest.approx(np.diff(base[45:]), abs=1e-4)


def test_the_best_token_is_left_where_the_lead_leaves_none_a_chance() -> None:
    """The expert is sure of a token that the base finds last: of the others the least unlikely one is said."""
    base = np.array([5, 4, 3, 2, 1, 0, -30], np.float32)
    expert = np.array([0, 0, 0, 0, 0, 0, 30], np.float32)
    found, scores = led(np.arange(7, dtype=np.int32), base, expert, alpha=3.0)
    assert found.tolist() == [4] and scores.tolist() == [0.0]
