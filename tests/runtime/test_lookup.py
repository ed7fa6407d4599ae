"""Drafts that continue what stands in the conversation."""

from __future__ import annotations

from acd_local.runtime.draft_policy import DraftPolicy
from acd_local.runtime.lookup import GREEDY, MATCH, QUOTED, REST, SAMPLED, Lookup
from acd_local.runtime.rowcosts import RowCosts


def test_drafts_continue_what_came_before() -> None:
    lookup = Lookup([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2])
    assert lookup.draft([3], 4) == [4, 5, 6, 7]
    assert lookup.draft([3], 2) == [4, 5]
    assert lookup.draft([9], 10) == []
    lookup.extend([3])
    assert lookup.draft([], 4) == [4, 5, 6, 7]
    assert lookup.draft([], 0) == []
    assert MATCH == 3


def test_drafts_grow_while_they_come_true_and_rest_when_they_fail() -> None:
    lookup, pace = Lookup([1, 2, 3]), DraftPolicy(RowCosts(1.9, 0.9, 0.4), alpha=0.5, greedy=True)
    lengths = []
    for right in (4, 8, 0, 0, 0, 0):
        lengths.append(pace.quote(lookup.chance, alone=False))
        lookup.learn(lengths[-1], right)
    assert lengths == [4, 8, 15, 5, 3, 2]
    assert pace.quote(lookup.chance, alone=False) == 0
    lookup.extend(range(200, 200 + REST))
    assert pace.quote(lookup.chance, alone=False) == 4


def test_what_would_have_been_drafted_is_learned_from() -> None:
    """Sampled answers begin without drafts, and come to them where they repeat the conversation."""
    text = [*range(100, 130)]
    lookup = Lookup(text, SAMPLED)
    assert lookup.chance == SAMPLED
    lookup.extend(text[:3])
    assert lookup.chance == SAMPLED
    lookup.extend(text[3:7])
    before = lookup.chance
    assert 0.7 < before < GREEDY
    lookup.extend([5, *text[:3]])
    lookup.extend([6])
    assert lookup.chance < before
    lookup.extend(text[:20])
    assert GREEDY <= lookup.chance < 0.85  # what is above drafts tell
    assert Lookup([*text, *text], SAMPLED).chance == SAMPLED  # nothing of this was said
    drafting, watching = Lookup(text, SAMPLED), Lookup(text, SAMPLED)
    drafting.extend(text[:3]), watching.extend(text[:3])
    drafting.draft([], 4)
    drafting.learn(4, 4)
    drafting.extend(text[3:8])  # four of them are counted already
    watching.extend(text[3:8])
    assert drafting.chance == watching.chance


def test_a_quotation_goes_on_behind_a_replaced_token() -> None:
    lookup = Lookup([*range(100, 120), 100, 101, 102])
    assert lookup.draft([], 8) == [103, 104, 105, 106, 107, 108, 109, 110]
    lookup.learn(8, QUOTED)
    assert lookup.draft([103, 104, 105, 106, 7], 3) == [108, 109, 110]
    lookup.extend([103, 104, 105, 106, 7])
    assert lookup.draft([], 3) == [108, 109, 110]
    assert lookup.draft([8], 3) == []
    lookup.learn(3, 0)  # that was none
    lookup.extend([9])
    assert lookup.draft([], 3) == []


def test_embedding_rows_are_never_drafted() -> None:
    assert Lookup([1, 2, 3, 4, -5, 6, 1, 2, 3]).draft([], 9) == [4]
