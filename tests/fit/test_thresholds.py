"""Thresholds refuse harmful requests without needless refusals; a pair that does no good is refused."""

from __future__ import annotations

import numpy as np
import pytest

from acd_local.fit import thresholds
from acd_local.fit.replies import Shares

REFUSES = {"harmful": 1.0, "ordinary": 1.0, "lookalike": 1.0}
ANSWERS = {"harmful": 0.0, "ordinary": 0.0, "lookalike": 0.0}


def chances(seed: int = 0, n: int = 400, harmful: float = 3.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    odds = {"harmful": harmful, "ordinary": -4.0, "lookalike": -2.5}
    return {kind: 1 / (1 + np.exp(-(mean + 1.5 * rng.standard_normal(n)))) for kind, mean in odds.items()}


def test_a_gate_lets_harm_pass_and_little_else() -> None:
    found = thresholds.choose(chances(), ANSWERS, REFUSES, None)
    assert 0.1 < found.threshold < 0.9
    assert found.low == 0
    assert found.shares.harmful > 0.9
    assert found.shares.ordinary < 0.03
    assert found.shares.lookalike < 0.15


def test_a_pair_that_tells_harmless_requests_apart_may_be_asked_more_often() -> None:
    near = chances(harmful=1.0)
    strict = thresholds.choose(near, ANSWERS, REFUSES, None)
    tells = {"harmful": 1.0, "ordinary": 0.0, "lookalike": 0.1}
    lenient = thresholds.choose(near, ANSWERS, tells, None)
    assert lenient.threshold < strict.threshold
    assert lenient.shares.harmful > strict.shares.harmful


def test_a_model_that_refuses_needlessly_is_helped_below_low() -> None:
    as_is = {"harmful": 0.7, "ordinary": 0.1, "lookalike": 0.6}
    helpful = {"harmful": 0.1, "ordinary": 0.0, "lookalike": 0.05}
    without = thresholds.choose(chances(), as_is, REFUSES, None)
    found = thresholds.choose(chances(), as_is, REFUSES, helpful)
    assert 0 < found.low <= found.threshold
    assert found.shares.lookalike < 0.3 < without.shares.lookalike
    assert found.shares.objective > without.shares.objective


def test_a_text_under_which_a_model_knows_more_answers_ordinary_requests() -> None:
    helpful = {"harmful": 0.0, "ordinary": 0.02, "lookalike": 0.02}
    without = thresholds.choose(chances(), ANSWERS, REFUSES, helpful)
    found = thresholds.choose(chances(), ANSWERS, REFUSES, helpful, 0.1)
    ordinary = chances()["ordinary"]
    assert (ordinary < found.low).mean() > 0.9 > (ordinary < without.low).mean()


def test_a_pair_that_refuses_no_more_is_asked_for_nothing() -> None:
    found = thresholds.choose(chances(), {**ANSWERS, "harmful": 0.9}, {**REFUSES, "harmful": 0.5}, None)
    assert (chances()["harmful"] >= found.threshold).mean() < 0.2


def test_requests_are_refused_by_kind_and_chance() -> None:
    rng = np.random.default_rng(1)
    given = chances(n=40)
    odds = {kind: np.log(c / (1 - c)) for kind, c in given.items()}
    base = {"harmful": 0.5, "ordinary": -1.0, "lookalike": 1.0}
    refused = {k: list(rng.random(40) < 1 / (1 + np.exp(-(o + base[k])))) for k, o in odds.items()}
    curve = thresholds.RefusalCurve.fit(given, refused)
    assert 0.4 < curve.slope < 1.6
    for kind, found in curve(given).items():
        assert found.mean() == pytest.approx(np.mean(refused[kind]), abs=0.06)
        assert (np.diff(found[np.argsort(given[kind])]) >= 0).all()


def test_a_kind_that_nobody_asked_of_and_refusals_of_one_sort_are_no_fault() -> None:
    given = chances(n=20) | {"lookalike": np.array([])}
    curve = thresholds.RefusalCurve.fit(given, {"harmful": [True] * 20, "ordinary": [False] * 20, "lookalike": []})
    found = curve(given | {"lookalike": np.array([0.2])})
    assert found["harmful"].mean() > 0.8 > 0.2 > found["ordinary"].mean()
    never = thresholds.RefusalCurve.fit(given, {"harmful": [False] * 20, "ordinary": [False] * 20, "lookalike": []})
    assert all(np.isfinite(rates).all() and (rates < 0.2).all() for rates in never(given).values())


def test_where_a_model_refuses_what_looks_bad_it_is_helped_further_up() -> None:
    """Look-alikes near the threshold are those that the model refuses: the helpful text answers them."""
    helpful = {"harmful": 0.3, "ordinary": 0.0, "lookalike": 0.05}
    odds = {kind: np.log(c / (1 - c)) for kind, c in chances().items()}
    shift = {"harmful": 0.5, "ordinary": 0.0, "lookalike": 0.5}
    by_chance = {kind: 1 / (1 + np.exp(-(2 * o + shift[kind]))) for kind, o in odds.items()}
    alike = {kind: float(rates.mean()) for kind, rates in by_chance.items()}
    flat = thresholds.choose(chances(), alike, REFUSES, helpful)
    found = thresholds.choose(chances(), by_chance, REFUSES, helpful)
    assert found.low > flat.low


def test_a_kind_that_is_missing_does_not_count() -> None:
    found = thresholds.choose(chances() | {"lookalike": np.array([])}, ANSWERS, REFUSES, None)
    assert found.shares.lookalike == 0
    assert found.shares.harmful > 0.9


def test_few_answers_to_harmless_requests_turn() -> None:
    harmless = np.linspace(0, 0.7, 1000)
    assert thresholds.answer_threshold(harmless) == pytest.approx(0.693, abs=0.01)
    assert (harmless >= thresholds.answer_threshold(harmless)).mean() <= 0.01
    assert thresholds.answer_threshold(np.linspace(0, 0.1, 100)) == 0.5
    assert thresholds.answer_threshold(np.array([])) == 1.0


@pytest.mark.parametrize(
    ("pair", "helps"),
    [
        (Shares(0.9, 0.0, 0.1), True),
        (Shares(0.3, 0.0, 0.0), False),  # refuses no more
        (Shares(0.9, 0.2, 0.1), False),  # refuses ordinary requests
        (Shares(0.6, 0.0, 0.6), False),  # refuses look-alikes as well
        (Shares(0.5, 0.0, 0.0, broken=0.3), False),  # breaks answers
    ],
)
def test_whether_a_pair_helps(pair: Shares, helps: bool) -> None:
    assert thresholds.refuses_better(Shares(0.3, 0.0, 0.0), pair) == helps


def test_fewer_needless_refusals_are_help_as_well() -> None:
    assert thresholds.refuses_better(Shares(0.7, 0.1, 0.6), Shares(0.72, 0.0, 0.2))
