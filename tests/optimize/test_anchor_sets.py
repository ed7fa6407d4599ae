"""Answers are sorted into what is trained and what is validated on."""

from __future__ import annotations

from typing import Any

from acd_local.optimize.anchor_sets import (
    PROMPTS,
    Anchor,
    AnchorSets,
    collect,
    refusal_for,
)
from acd_local.tuning.anchors import Instruction, builtin

HARMFUL = [Instruction(f"harmful {n}", "harmful", "fraud-and-scams") for n in range(4)]
HARMLESS = [Instruction(f"harmless {n}", "harmless", "facts") for n in range(3)]
END = 99


def record(instruction: Instruction, under: str, label: str, answer: list[int]) -> dict[str, Any]:
    return {"id": instruction.id, "under": under, "label": label, "answer": answer}


def tokens_of(text: str) -> list[int]:
    return [ord(c) for c in text]


def test_answers_are_sorted_by_kind_and_label() -> None:
    records = [
        record(HARMFUL[0], "safe", "refusal", [1]),
        record(HARMFUL[0], "opposite", "answer", [2]),
        record(HARMFUL[0], "none", "degenerate", [3]),
        record(HARMFUL[1], "none", "answer", [4]),
        record(HARMLESS[0], "safe", "answer", [5]),
        record(HARMLESS[1], "safe", "refusal", [6]),  # an over-refusal teaches nothing
        record(HARMLESS[2], "safe", "degenerate", [7]),
        record(HARMFUL[2], "safe", "answer", []),  # nothing was said
        record(Instruction("of another set", "harmful"), "safe", "refusal", [8]),
    ]
    found = collect([*HARMFUL, *HARMLESS], records, tokens_of, END)
    assert found.refused[0] == Anchor(HARMFUL[0], (1,), "safe")
    assert found.complied == (Anchor(HARMFUL[0], (2,), "opposite"), Anchor(HARMFUL[1], (4,), "none"))
    assert found.answered == (Anchor(HARMLESS[0], (5,), "safe"),)
    assert found.written == 3
    for pair, instruction in zip(found.refused[1:], HARMFUL[1:], strict=True):
        assert pair == Anchor(instruction, (*tokens_of(refusal_for(instruction)), END))


def test_a_model_that_refuses_enough_speaks_for_itself() -> None:
    records = [record(i, under, "refusal", [1]) for i in HARMFUL[:2] for under in PROMPTS[:2]]
    found = collect(HARMFUL, records, tokens_of, END)
    assert found.written == 0
    assert len(found.refused) == 4
    less = collect(HARMFUL, records[:-1], tokens_of, END)
    assert less.written == 2
    assert {p.instruction for p in less.refused} == set(HARMFUL)


def test_no_instruction_is_in_both_parts() -> None:
    found = builtin()
    harmful, harmless = ([i for i in found if i.kind == kind] for kind in ("harmful", "harmless"))
    sets = AnchorSets(
        tuple(Anchor(i, (n,)) for i in harmful for n in range(3)),
        tuple(Anchor(i, (n,)) for i in harmful for n in range(2)),
        tuple(Anchor(i, (1,)) for i in harmless),
    )
    training, validation = (sets.part(validation=v) for v in (False, True))

    def ids(part: AnchorSets) -> set[str]:
        return {p.instruction.id for p in (*part.refused, *part.complied, *part.answered)}

    assert not ids(training) & ids(validation)
    assert ids(training) | ids(validation) == {i.id for i in found}
    for name in ("refused", "complied", "answered"):
        parts = getattr(training, name), getattr(validation, name)
        assert sorted(map(repr, parts[0] + parts[1])) == sorted(map(repr, getattr(sets, name)))
        assert 0.08 < len(parts[1]) / len(getattr(sets, name)) < 0.2
    assert Instruction("x", "harmful").validates == Instruction("x", "harmless", "other", True).validates
