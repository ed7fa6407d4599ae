"""Rounds, ratios and shares, by numbers alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from acd_local.bench.rounds import Case, Measured, in_turns


def test_ratios_are_to_as_many_plain_tokens() -> None:
    plain = Measured(3, 0.5, outside=0.06, first=1.0, each=[0.1, 0.1, 0.3])
    assert plain.seconds_of(0) == 0
    assert plain.seconds_of(2) == pytest.approx(0.2)
    assert plain.seconds_of(3) == plain.seconds_of(9) == pytest.approx(0.5)
    answers = [Measured(2, 0.4, outside=0.01, first=0.7), Measured(0, 0.0, outside=0.0, first=0.9)]
    case = Case("x", answers, [plain, plain])
    assert case.ratio == [pytest.approx(2.0)]  # one token is no measure
    assert case.tokens_per_second == [pytest.approx(5.0)]
    assert case.outside_ms == [pytest.approx(5.0)]
    assert case.each("first") == [0.7, 0.9]
    assert Measured(4, 2.0).seconds_of(3) == pytest.approx(1.5)


def test_tokens_of_a_batch() -> None:
    assert Measured(6, 1.0, batches=4).per_batch == 1.5
    assert Measured(6, 1.0).per_batch is None
    case = Case("x", [Measured(6, 1.0, batches=4), Measured(6, 1.0, batches=6)], [Measured(6, 0.5)] * 2, peak_mb=9.87)
    assert case.summary() == {
        "case": "x",
        "tokens_per_second": 6.0,
        "ratio_to_plain": 2.0,
        "tokens_per_batch": 1.25,
        "outside_decode_ms": None,
        "first_token_s": None,
        "peak_mb": 9.9,
    }


def test_rounds_go_forwards_and_backwards() -> None:
    order: list[str] = []

    def ask(name: str) -> Callable[[int], Any]:
        return lambda number: order.append(name) or f"{name}{number}"

    ways = {name: ask(name) for name in ("plain", "a", "b")}
    assert in_turns(ways, 2) == {name: [f"{name}1", f"{name}2"] for name in ways}
    assert order == ["plain", "a", "b", "b", "a", "plain"]
    lines: list[str] = []
    assert in_turns(ways, 1, lines.append, warm_up=True)["a"] == ["a1"]
    assert lines == ["warming up", "round 1 of 1"] and len(order) == 12
