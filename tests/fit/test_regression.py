"""The logistic regression of gates against known answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acd_local.evaluate import stats
from acd_local.fit import regression


def sample(n: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Standard normal rows, labels drawn from a known model, that model."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, width)).astype(np.float32)
    weight, bias = rng.standard_normal(width) / np.sqrt(width) * 2, 0.5
    labels = rng.random(n) < 1 / (1 + np.exp(-(rows @ weight + bias)))
    return rows, labels, weight, bias


def test_the_gradient_is_zero_at_what_is_found() -> None:
    rows, labels, _, _ = sample(400, 30)
    share = np.linspace(0.5, 1.5, 400).astype(np.float32)
    w, b = regression.minimize(rows, labels.astype(np.float32), share, ridge=3.0)
    error = share * (1 / (1 + np.exp(-(rows.astype(float) @ w + b))) - labels)
    assert np.abs(rows.T @ error + 3.0 * w).max() < 0.02
    assert abs(error.sum()) < 0.02


def test_the_model_that_labels_were_drawn_from_is_found_again() -> None:
    rows, labels, weight, bias = sample(20_000, 5)
    found = regression.fit(rows, labels, np.ones(20_000, np.float32), ridge=1e-3)
    assert np.abs(found.weight - weight).max() < 0.1
    assert abs(found.bias - bias) < 0.1


def test_two_points_have_the_solution_that_can_be_worked_out() -> None:
    # Minimum of 2 log(1 + exp(-w)) + ridge / 2 w^2: at w = 1, ridge = 2 / (1 + e).
    rows = np.array([[1.0], [-1.0]], np.float32)
    ridge = 2 / (1 + np.e)
    w, b = regression.minimize(rows, np.array([1.0, 0.0], np.float32), np.ones(2, np.float32), ridge)
    assert w[0] == pytest.approx(1.0, abs=1e-3)
    assert b == pytest.approx(0.0, abs=1e-3)


def test_scale_and_place_of_states_do_not_matter() -> None:
    rows, labels, _, _ = sample(300, 12, seed=1)
    moved = rows * np.geomspace(1e-2, 1e3, 12).astype(np.float32) + np.arange(12, dtype=np.float32) * 50
    ones = np.ones(300, np.float32)
    a, b = (regression.fit(x, labels, ones, ridge=10.0)(x) for x in (rows, moved))
    assert np.abs(a - b).max() < 0.05


def test_more_features_than_rows_and_one_that_never_changes() -> None:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((60, 400)).astype(np.float32)
    rows[:, 7] = 5.0
    labels = rows[:, 0] > 0
    found = regression.fit(rows, labels, np.ones(60, np.float32), ridge=3.0)
    assert np.isfinite(found.weight).all()
    assert found.weight[7] == 0
    assert stats.area(found(rows)[labels], found(rows)[~labels]) == 1.0


def test_weights_count_as_copies_would() -> None:
    rows, labels, _, _ = sample(100, 4, seed=4)
    twice = np.where(np.arange(100) < 50, 2.0, 1.0).astype(np.float32)
    copies = np.r_[np.arange(50), np.arange(100)]
    scale = 100 / 150  # weights are made to sum to the number of rows
    weighted = regression.minimize(rows, labels.astype(np.float32), twice * np.float32(scale), ridge=2.0 * scale)
    copied = regression.minimize(rows[copies], labels[copies].astype(np.float32), np.ones(150, np.float32), ridge=2.0)
    assert np.abs(weighted[0] - copied[0]).max() < 1e-2


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=30))
def test_the_area_is_the_share_of_pairs_in_order(rows: list[tuple[int, bool]]) -> None:
    scores, labels = np.array([r[0] for r in rows], float), np.array([r[1] for r in rows])
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels] for n in scores[~labels]]
    found = stats.area(scores[labels], scores[~labels])
    assert np.isnan(found) if not pairs else found == pytest.approx(np.mean(pairs))


def test_scores_are_calibrated_to_the_chances_they_were_drawn_with() -> None:
    rng = np.random.default_rng(5)
    scores = (4 * rng.standard_normal(20_000)).astype(np.float32)
    labels = rng.random(20_000) < 1 / (1 + np.exp(-(0.7 * scores - 1)))
    slope, shift = regression.calibrate(scores, labels, np.ones(20_000, np.float32))
    assert slope == pytest.approx(0.7, abs=0.05)
    assert shift == pytest.approx(-1.0, abs=0.1)
