"""How far the safe stream runs ahead."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from acd_local.runtime.choice import SafeCandidates
from acd_local.runtime.draft_policy import DraftPolicy, expected
from acd_local.runtime.lookup import GREEDY
from acd_local.runtime.rowcosts import RowCosts


def look(*scores: float) -> SafeCandidates:
    return SafeCandidates(0, np.arange(len(scores), dtype=np.int32), np.array(scores, np.float32), None)


def test_the_gap_is_between_the_two_best() -> None:
    assert look(1.0, 3.0, 2.5).gap == 0.5
    assert look(1.0).gap == float("inf")


def test_a_run_ends_where_a_change_is_likely() -> None:
    pace = DraftPolicy(RowCosts(pair=1.8, fixed=0.7, each=0.45), alpha=0.5, greedy=True)
    assert pace.goes_on(1.0, 1)
    assert pace.goes_on(1 - pace.chance(look(3.0, 1.0)), 1)
    assert not pace.goes_on(1 - pace.chance(look(3.0, 2.95)), 1)
    assert not pace.goes_on(1.0, 16)
    weak = DraftPolicy(RowCosts(), alpha=0.1, greedy=True)
    assert weak.chance(look(3.0, 2.8)) < pace.chance(look(3.0, 2.8))


def test_readers_of_slow_models_do_not_wait_long_for_the_next_words() -> None:
    assert RowCosts(seconds=0.007).longest_run == 16
    assert RowCosts(seconds=0.05).longest_run == 8
    slow = DraftPolicy(RowCosts(seconds=0.2), alpha=0.5, greedy=True)
    assert slow.goes_on(1.0, 3)
    assert not slow.goes_on(1.0, 4)


def test_a_pace_learns_from_its_answer() -> None:
    pace = DraftPolicy(RowCosts(pair=1.9, fixed=0.7, each=0.45), alpha=0.5, greedy=True)
    before = pace.chance(look(3.0, 2.0))
    for _ in range(40):
        pace.learn(look(3.0, 2.0), changed=True)
    assert pace.chance(look(3.0, 2.0)) > 0.7 > before
    assert pace.pays
    for _ in range(40):  # five rows a token
        pace.spend([2, 3], 1)
    assert not pace.pays


def test_what_is_about_as_dear_goes_on_as_it_was() -> None:
    pace, ways = DraftPolicy(RowCosts(pair=2.0, fixed=0.7, each=0.45, ahead=1.0), alpha=0.5, greedy=True), []
    for rows in (18, 20, 22, 20):
        for _ in range(100):
            pace.spend([1] * rows, 10)
        ways.append(pace.pays)
    assert ways == [True, True, False, False]


@pytest.mark.parametrize("rare", [True, False])
def test_a_pace_learns_from_positions_side_by_side(rare: bool) -> None:
    pace = DraftPolicy(RowCosts(pair=1.9, fixed=0.7, each=0.45), alpha=0.5, greedy=rare)
    assert pace.pays == rare  # greedy answers change less
    for _ in range(3):
        for i in range(400):
            pace.beside(look(3.0, 2.6), changed=rare or i % 100 == 0)
        assert pace.pays != rare
        rare = not rare


def test_the_expected_cost_knows_of_alpha_and_temperature() -> None:
    costs = RowCosts(pair=1.9, fixed=0.9, each=0.4)
    weak, usual, strong = (expected(costs, alpha, greedy=True) for alpha in (0.1, 0.5, 0.9))
    assert weak < usual < strong
    assert usual == pytest.approx(1.65, abs=0.05)  # measured: docs/speed.md
    assert usual < expected(costs, 0.5, greedy=False) == pytest.approx(1.9, abs=0.05)


def test_quotations_are_as_long_as_rows_are_cheap() -> None:
    usual, dear = (
        DraftPolicy(RowCosts(1.9, fixed, each), alpha=0.5, greedy=True) for fixed, each in ((0.9, 0.4), (0.0, 1.0))
    )
    assert usual.quote(GREEDY, alone=False) == 4
    assert usual.quote(0.3, alone=False) == 0
    assert usual.quote(1.0, alone=False) == 15
    assert dear.quote(0.99, alone=False) == dear.quote(0.99, alone=True) == 0
    gpu = DraftPolicy(RowCosts(pair=1.05, fixed=0.95, each=0.05), alpha=0.5, greedy=True)
    assert gpu.quote(0.5, alone=True) == 0 < gpu.quote(GREEDY, alone=True)
    assert DraftPolicy(RowCosts(seconds=0.2), alpha=0.5, greedy=True).quote(1.0, alone=False) == 3


def test_cheap_batches_make_running_ahead_pay_and_dear_ones_do_not() -> None:
    assert DraftPolicy(RowCosts(pair=2.0, fixed=0.8, each=0.3), alpha=0.5, greedy=False).pays
    assert not DraftPolicy(RowCosts(pair=1.8, fixed=0.3, each=0.8), alpha=0.5, greedy=True).pays
    assert not DraftPolicy(RowCosts(pair=1.05, fixed=0.9, each=0.05), alpha=0.5, greedy=True).pays  # a GPU


def test_running_ahead_does_not_pay_where_what_its_batches_save_goes_into_handling_them() -> None:
    near, clear = (RowCosts(pair=pair, fixed=0.7, each=0.45) for pair in (1.75, 1.85))
    assert near.pair > expected(near, 0.5, greedy=True)
    assert not DraftPolicy(near, alpha=0.5, greedy=True).pays
    assert DraftPolicy(clear, alpha=0.5, greedy=True).pays
    assert DraftPolicy(replace(near, ahead=1.0), alpha=0.5, greedy=True).pays
    assert not DraftPolicy(replace(clear, ahead=1.3), alpha=0.5, greedy=True).pays
