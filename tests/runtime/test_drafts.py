"""Where drafts come from, and how many tokens pay: by numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acd_local.runtime.batch_costs import BatchCosts
from acd_local.runtime.drafts import FIRST, MATCH, REST, Acceptance, Drafter, ModelDrafts, PromptLookup

COSTS = BatchCosts(0.01, (1.0, 1.4, 2.0, 3.6, 6.8), (1.6, 2.6, 4.4, 8.0, 15.2))


def model(says: Sequence[int], cost: float = 0.3) -> ModelDrafts:
    """A model that says the same at all times."""
    return ModelDrafts(lambda tokens, count: list(says[:count]), cost, [1, 2, 3])


# -- acceptance --------------------------------------------------------------------------------------------------------


def test_the_chance_is_what_was_seen_lately() -> None:
    found = Acceptance()
    assert found.rate == FIRST
    found.learn(0, 200)
    assert found.rate < 0.01
    found.learn(200, 200)
    assert found.rate > 0.9


# -- prompt lookup -----------------------------------------------------------------------------------------------------


def test_lookup_proposes_what_followed_the_last_tokens() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 6, 7, 1, 2, 3])
    assert lookup.propose(3) == [4, 5, 6]
    assert (lookup.available(2), lookup.available(99)) == (2, 7)
    lookup.add([9])
    assert (lookup.available(9), list(lookup.propose(9))) == (0, [])


def test_lookup_takes_the_latest_place() -> None:
    assert PromptLookup([1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 1, 2, 3]).propose(1) == [5]


def test_embedding_rows_are_never_proposed() -> None:
    lookup = PromptLookup([1, 2, 3, 4, -1, -2, 8, 1, 2, 3])
    assert lookup.propose(9) == [4]
    assert PromptLookup([1, 2, 3, -4, 5, 1, 2, 3]).available(9) == 0


def test_lookup_learns_also_where_nobody_asked() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3])
    lookup.add([4, 5, 6, 7])
    assert lookup.rate > FIRST
    before = lookup.rate
    lookup.add([99])
    assert lookup.rate < before
    before = lookup.rate
    lookup.add([50, 51, 52])  # nothing that could have been proposed
    assert lookup.rate == before


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 20))
def test_lookup_is_the_definition(history: list[int], most: int) -> None:
    places = [i for i in range(MATCH, len(history)) if history[i - MATCH : i] == history[len(history) - MATCH :]]
    expected = history[places[-1] : places[-1] + most] if places else []
    assert list(PromptLookup(history).propose(most)) == expected


# -- a model -----------------------------------------------------------------------------------------------------------


def test_a_model_is_given_the_conversation_without_embedding_rows() -> None:
    seen: list[tuple[list[int], int]] = []
    source = ModelDrafts(lambda tokens, count: (seen.append((list(tokens), count)), [7, 8])[1], 0.3, [5, -1, -2, 6])
    source.propose(2)
    source.add([7, 9])
    source.propose(4)
    assert seen == [([5, 6], 2), ([5, 6, 7, 9], 4)]


@pytest.mark.parametrize(("came", "right", "seen"), [([7, 8, 9, 1], 3, 3), ([7, 5], 1, 2), ([5], 0, 1)])
def test_a_model_learns_from_what_was_checked(came: list[int], right: int, seen: int) -> None:
    source, expected = model([7, 8, 9]), Acceptance()
    source.propose(3)
    source.add(came)
    expected.learn(right, seen)
    assert source.rate == expected.rate
    source.add([1, 2, 3])  # nothing was proposed
    assert source.rate == expected.rate


def test_a_model_that_was_wrong_gets_another_chance() -> None:
    source = model([7])
    for _ in range(9):
        source.propose(1)
        source.add([8])
    low = source.rate
    source.add([8] * (REST - 2))
    assert source.rate == low < 0.2
    source.add([8])
    assert source.rate == FIRST


# -- how many ----------------------------------------------------------------------------------------------------------


def test_costs_between_the_sizes_lie_on_lines() -> None:
    assert COSTS.table(1)[:4] == pytest.approx((1.0, 1.4, 1.7, 2.0))
    assert COSTS.table(2)[:3] == pytest.approx((1.6, 2.6, 3.5))
    assert len(COSTS.table(1)) == 16
    assert BatchCosts(0.01, (1.0, 1.6), (1.6,)).table(1) == (1.0, 1.6)


@pytest.mark.parametrize("streams", [1, 2])
def test_a_draft_is_as_long_as_promises_most_tokens_per_time(streams: int) -> None:
    source = PromptLookup([*range(30), 0, 1, 2])
    costs, rate = COSTS.table(streams), source.rate
    promises = [sum(rate**i for i in range(k + 1)) / costs[k] for k in range(16)]
    assert len(Drafter([source], COSTS, 15).draft(streams, 15)) == max(range(16), key=promises.__getitem__)


def test_what_always_came_true_is_drafted_as_far_as_allowed() -> None:
    lookup = PromptLookup([*range(30), 0, 1, 2])
    drafter = Drafter([lookup], BatchCosts(0.01, (1.0, 1.1, 1.2, 1.3, 1.4), (1.0,)), 7)
    drafter.add(list(range(3, 20)))
    assert list(drafter.draft(1, 15)) == list(range(20, 27))
    assert list(drafter.draft(1, 2)) == [20, 21]
    assert list(drafter.draft(1, 0)) == []


def test_a_delay_counts_for_the_first_draft_of_several() -> None:
    drafter = Drafter([PromptLookup([*range(30), 0, 1, 2])], replace(COSTS, delays=(3.0, 0.0)), 15)
    assert not drafter.draft(1, 15), "which promises less than it delays"
    drafter.add([3, 4, 5])
    assert list(drafter.draft(2, 1)) == [6], "which delays nothing"
    drafter.add([6, 7])
    assert drafter.draft(1, 3), "it is to come in any case"
    assert not drafter.draft(1, 0)
    drafter.add([10])
    assert not drafter.draft(1, 2)


def test_what_never_came_true_is_not_drafted() -> None:
    source = model([7] * 9)
    drafter = Drafter([source], COSTS, 15)
    for _ in range(4):
        drafter.draft(1, 9)
        drafter.add([8])
    assert list(drafter.draft(1, 9)) == []


def test_the_cheaper_source_goes_first_and_the_other_where_it_has_nothing() -> None:
    lookup, other = PromptLookup([1, 2, 3, 4, 5, 1, 2, 3]), model([7, 7, 7, 7], cost=0.05)
    drafter = Drafter([lookup, other], COSTS, 15)
    assert drafter.draft(1, 9)[0] == 4
    drafter.add([9])
    assert lookup.rate < other.rate
    assert list(drafter.draft(1, 9))[:1] == [7]
    assert list(Drafter([model([7] * 9, cost=5.0)], COSTS, 15).draft(1, 9)) == []  # too slow to help
