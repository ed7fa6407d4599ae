"""Estimates and their intervals against known values, a slow obvious implementation, and how often they hold."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acd_local.errors import UsageError
from acd_local.evaluate import stats
from acd_local.evaluate.stats import RARE, Estimate

numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30)
bits = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=60)


def obvious_bootstrap(statistic: Callable[[list[int]], float], n: int, resamples: int = 4000) -> tuple[float, float]:
    """Percentile interval of a figure of prompts given by index, one resample at a time."""
    draw = random.Random(5)
    figures = sorted(statistic([draw.randrange(n) for _ in range(n)]) for _ in range(resamples))
    return figures[round(0.025 * resamples)], figures[round(0.975 * resamples)]


def assert_near(found: Estimate, bounds: tuple[float, float]) -> None:
    """Two bootstraps agree up to their own noise: a tenth of the interval's width."""
    slack = 0.1 * (bounds[1] - bounds[0])
    assert slack > 0
    assert abs(found.low - bounds[0]) < slack and abs(found.high - bounds[1]) < slack


# --- Against the obvious implementation -------------------------------------------------------------------------------


def test_mean_of_fractions_and_of_a_rate() -> None:
    rng = np.random.default_rng(0)
    for values in (rng.gamma(2.0, size=40), rng.normal(size=25), (rng.random(80) < 0.3).astype(float)):
        found = stats.mean(values)
        assert found.value == pytest.approx(sum(values) / len(values)) and found.n == len(values)
        assert_near(
            found, obvious_bootstrap(lambda drawn, v=values: float(np.mean([v[i] for i in drawn])), len(values))
        )


def test_difference_is_paired() -> None:
    rng = np.random.default_rng(1)
    difficulty = rng.normal(scale=10, size=50)
    a, b = difficulty + rng.normal(loc=1, size=50), difficulty + rng.normal(size=50)
    found = stats.difference(a, b)
    assert found.value == pytest.approx(a.mean() - b.mean())
    assert_near(found, obvious_bootstrap(lambda drawn: sum(a[i] - b[i] for i in drawn) / 50, 50))
    assert found.low > 0  # unpaired, the spread of the prompts would hide it
    reverse = stats.difference(b, a)
    assert (reverse.value, reverse.low, reverse.high) == pytest.approx((-found.value, -found.high, -found.low))


def test_ratio_is_one_of_sums() -> None:
    rng = np.random.default_rng(2)
    tokens = rng.integers(1, 200, size=40).astype(float)
    bits_ = tokens * rng.uniform(1, 3, size=40)
    found = stats.ratio(bits_, tokens)
    assert found.value == pytest.approx(bits_.sum() / tokens.sum()) and found.n == 40
    assert_near(
        found, obvious_bootstrap(lambda drawn: sum(bits_[i] for i in drawn) / sum(tokens[i] for i in drawn), 40)
    )


def test_of_means_takes_any_figure() -> None:
    rng = np.random.default_rng(3)
    na, ta, nb, tb = rng.uniform(20, 60, size=(4, 30))

    def figure(drawn: list[int]) -> float:
        a, b = (sum(top[i] for i in drawn) / sum(low[i] for i in drawn) for top, low in ((na, ta), (nb, tb)))
        return math.exp(a) - math.exp(b)

    found = stats.of_means([na, ta, nb, tb], lambda a, s, b, t: np.exp(a / s) - np.exp(b / t))
    assert found.value == pytest.approx(figure(list(range(30)))) and found.n == 30
    assert_near(found, obvious_bootstrap(figure, 30))


def test_mean_of_means_resamples_within_groups() -> None:
    rng = np.random.default_rng(4)
    groups = [rng.normal(loc=100, size=10), rng.normal(size=60)]
    found = stats.mean_of_means(groups)
    assert found.value == pytest.approx((groups[0].mean() + groups[1].mean()) / 2) and found.n == 70
    draw = np.random.default_rng(9)
    figures = [sum(g[draw.integers(len(g), size=len(g))].mean() for g in groups) / 2 for _ in range(4000)]
    assert_near(found, tuple(np.quantile(figures, [0.025, 0.975])))


def test_groups_of_the_same_size_are_drawn_independently() -> None:
    values = np.random.default_rng(5).normal(size=50)
    one, two = stats.mean(values), stats.mean_of_means([values, values])
    assert (two.high - two.low) / (one.high - one.low) == pytest.approx(1 / math.sqrt(2), rel=0.1)


def test_many_prompts_are_drawn_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(6).normal(size=50)
    whole = stats.mean(values)
    monkeypatch.setattr(stats, "_BLOCK", 777)
    assert stats.mean(values) == whole
    monkeypatch.setattr(stats, "_BLOCK", 1)
    assert stats.mean(values) == whole


# --- Rates near 0 and 1 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ones", "n", "low", "high"),  # Wilson's interval at 95%, from its formula by hand and published tables
    [(0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0), (1, 10, 0.0179, 0.4042), (4, 100, 0.0157, 0.0984), (0, 1, 0, 0.7935)],
)
def test_rare_outcomes_get_wilsons_interval(ones: int, n: int, low: float, high: float) -> None:
    found = stats.mean([1.0] * ones + [0.0] * (n - ones))
    assert found.value == ones / n and found.n == n
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


def test_wilson_solves_its_equation() -> None:
    found = stats.mean([1] * 3 + [0] * 40)
    for bound in (found.low, found.high):
        assert abs(3 / 43 - bound) / math.sqrt(bound * (1 - bound) / 43) == pytest.approx(1.9599640, abs=1e-6)


def test_the_bootstrap_takes_over_from_wilson() -> None:
    last, first = (stats.mean([1] * k + [0] * (100 - k)) for k in (RARE - 1, RARE))
    assert (
        last.low < first.value < last.high and abs(first.low - last.low) < 0.02 and abs(first.high - last.high) < 0.02
    )
    assert first.low == pytest.approx(0.01, abs=0.011)  # binomial quantiles: multiples of 1 / n
    assert round(first.low * 100, 9).is_integer() and not round(last.low * 100, 9).is_integer()


def test_pairs_that_nearly_all_agree() -> None:
    """By hand: n = 20 with 0.5 in each cell; 3 won, none lost: (3.5 - 0.5) / 22 +- 1.96 sqrt(4 - 9 / 22) / 22."""
    found = stats.difference([1] * 5 + [0] * 15, [1] * 2 + [0] * 18)
    assert (found.value, found.n) == (0.15, 20)
    assert (found.low, found.high) == pytest.approx((-0.0324, 0.3052), abs=2e-4)
    same = stats.difference([0, 1] * 10, [0, 1] * 10)
    assert same.value == 0 and same.high == -same.low == pytest.approx(1.959964 / 22)
    all_won = stats.difference([1] * 20, [0] * 20)
    assert (all_won.value, all_won.high) == (1, 1) and 0.7 < all_won.low < 0.8


def test_pairs_that_disagree_are_bootstrapped() -> None:
    a, b = [1, 1, 0, 0] * 10, [1, 0, 1, 0] * 10
    found = stats.difference(a, b)
    assert found.value == 0
    assert_near(found, obvious_bootstrap(lambda drawn: sum(a[i] - b[i] for i in drawn) / 40, 40))


def test_mean_of_means_at_the_edge_has_width() -> None:
    assert stats.mean_of_means([[1] * 12, [1] * 8]) == stats.mean([1] * 20)
    assert stats.mean_of_means([[0] * 12, [0] * 8]) == stats.mean([0] * 20)
    found = stats.mean_of_means([[1] + [0] * 9, [0] * 30])
    assert found.value == pytest.approx(0.05) and found.low < 0.05 < found.high and found.n == 40


def test_fractions_that_are_all_equal_are_a_point() -> None:
    assert stats.mean([0.5] * 9) == Estimate(0.5, 0.5, 0.5, 9)
    assert stats.mean([0.25]) == Estimate(0.25, 0.25, 0.25, 1)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3, 0.5, 0.95])
@pytest.mark.parametrize("n", [20, 100])
def test_intervals_of_rates_hold_as_often_as_they_say(rate: float, n: int) -> None:
    """Exact: over all outcomes with their binomial probabilities. Intervals of counts hold 90% at the worst rates."""
    held = 0.0
    for ones in range(n + 1):
        probability = math.comb(n, ones) * rate**ones * (1 - rate) ** (n - ones)
        found = stats.mean([1] * ones + [0] * (n - ones)) if probability > 1e-6 else None
        held += probability * bool(found and found.low <= rate <= found.high)
    assert held > 0.9


def test_intervals_of_paired_differences_and_ratios_hold_as_often_as_they_say() -> None:
    rng = np.random.default_rng(7)
    held = {"rates": 0, "ratio": 0}
    for _ in range(400):
        cells = rng.choice(4, p=[0.05, 0.15, 0.2, 0.6], size=60)  # (0,1), (1,0), (1,1), (0,0): a - b is 0.1
        found = stats.difference((cells == 1) | (cells == 2), (cells == 0) | (cells == 2))
        held["rates"] += found.low <= 0.1 <= found.high
        tokens = rng.integers(5, 100, size=60)
        found = stats.ratio(tokens * rng.gamma(4, 0.5, size=60), tokens)
        held["ratio"] += found.low <= 2.0 <= found.high
    assert all(0.90 < count / 400 < 0.985 for count in held.values()), held


# --- Properties -------------------------------------------------------------------------------------------------------


@given(values=numbers)
def test_an_estimate_lies_in_its_interval_and_within_the_values(values: list[float]) -> None:
    found = stats.mean(values)
    slack = 1e-9 * max(map(abs, values))
    assert found.low <= found.value <= found.high
    if not set(values) <= {0.0, 1.0}:
        assert min(values) - slack <= found.low and found.high <= max(values) + slack


@given(values=bits)
def test_rates_stay_within_0_and_1_and_always_have_width(values: list[float]) -> None:
    found = stats.mean(values)
    assert 0 <= found.low <= found.value <= found.high <= 1 and found.low < found.high
    other = stats.difference(values, values[::-1])
    assert -1 <= other.low <= other.value <= other.high <= 1 and other.low < other.high


@given(values=numbers)
def test_a_difference_from_zero_is_a_mean(values: list[float]) -> None:
    if not set(values) <= {0.0, 1.0}:
        assert stats.difference(values, [0.0] * len(values)) == stats.mean(values)


@given(values=numbers)
def test_a_ratio_to_ones_is_a_mean(values: list[float]) -> None:
    if not set(values) <= {0.0, 1.0}:
        assert stats.ratio(values, [1.0] * len(values)) == stats.mean(values)


def test_prompts_without_tokens_add_nothing_to_a_ratio() -> None:
    assert stats.ratio([3, 0, 5, 0], [1, 0, 2, 0]) == stats.ratio([3, 5], [1, 2])


def test_the_same_values_give_the_same_interval() -> None:
    values = list(np.random.default_rng(8).normal(size=40))
    assert stats.mean(values) == stats.mean(values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.mean([]), "values: must be a list of at least one number"),
        (lambda: stats.mean(np.ones((2, 2))), "values: must be a list of at least one number"),
        (lambda: stats.mean([1.0, math.nan]), "values: holds a number that is not finite"),
        (lambda: stats.difference([1, 2], [1]), "lists of different lengths, 2 and 1: they must hold the same prompts"),
        (lambda: stats.ratio([1, 2], [1]), "lists of different lengths"),
        (lambda: stats.ratio([1, 2], [1, -1]), "denominators must be positive, or 0 with a numerator of 0"),
        (lambda: stats.ratio([1, 2], [1, 0]), "denominators must be positive, or 0 with a numerator of 0"),
        (lambda: stats.ratio([0, 0], [0, 0]), "denominators: all are 0"),
        (lambda: stats.mean_of_means([]), "groups: there are none"),
        (lambda: stats.mean_of_means([[0.5], []]), "groups: must be a list of at least one number"),
        (lambda: stats.of_means([[1.0], [0.0]], lambda a, b: a / b), "the figure is not finite on these values"),
    ],
)
def test_what_has_no_estimate(call: Callable[[], Estimate], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        call()
    assert str(caught.value).startswith(message)
