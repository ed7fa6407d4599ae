"""Sorts a model's answers to anchors into the paper's three sets; written refusals stand in where it refuses rarely."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from acd_local.options import Options
from acd_local.tuning.anchors import Instruction
from acd_local.tuning.cache import key_of

PROMPTS = ("safe", "opposite", "none")  # manual prompts that answers are sampled under
TOKENS = 64  # of an answer
SAMPLING = Options(plain=True, temp=0.7)

_DATA = Path(__file__).with_name("data")


@dataclass(frozen=True)
class Anchor:
    """An instruction and one answer, as token ids.

    Attributes:
        under: the manual prompt that the answer was sampled under, one of PROMPTS; empty where it was written.
    """

    instruction: Instruction
    answer: tuple[int, ...]
    under: str = ""


@dataclass(frozen=True)
class AnchorSets:
    """The paper's sets.

    Attributes:
        refused: D_HR, harmful instructions with refusing answers.
        complied: D_HA, harmful instructions with complying answers.
        answered: D_S, harmless instructions with their answers.
    """

    refused: tuple[Anchor, ...]
    complied: tuple[Anchor, ...]
    answered: tuple[Anchor, ...]

    @property
    def written(self) -> int:
        """How many of `refused` are written forms, because the model refused too rarely."""
        return sum(not anchor.under for anchor in self.refused)

    @property
    def counts(self) -> dict[str, int]:
        return {
            "refusals_sampled": len(self.refused) - self.written,
            "refusals_written": self.written,
            "complying": len(self.complied),
            "answered": len(self.answered),
        }

    @property
    def key(self) -> str:
        """Hex SHA-256 over all that is in them."""
        return key_of({f.name: [_listed(anchor) for anchor in getattr(self, f.name)] for f in fields(self)})

    def part(self, *, validation: bool) -> AnchorSets:
        """Return the training or the validation half."""

        def keep(found: tuple[Anchor, ...]) -> tuple[Anchor, ...]:
            return tuple(anchor for anchor in found if anchor.instruction.validates == validation)

        return AnchorSets(keep(self.refused), keep(self.complied), keep(self.answered))


def _listed(anchor: Anchor) -> list[Any]:
    i = anchor.instruction
    return [i.id, i.kind, i.lookalike, anchor.under, list(anchor.answer)]


def collect(
    instructions: Sequence[Instruction],
    records: Sequence[dict[str, Any]],
    tokenize: Callable[[str], Sequence[int]],
    end: int,
) -> AnchorSets:
    """Sort the sampled answers into D_HR, D_HA and D_S; where few were refusals, written ones stand in D_HR.

    Args:
        records: {"id", "under", "label", "answer"} of sampled answers.
        tokenize: an answer's text to token ids.
        end: the token that ends an answer.
    """
    by_id = {i.id: i for i in instructions}
    sets: dict[tuple[str, str], list[Anchor]] = {}
    for record in records:
        if (instruction := by_id.get(record["id"])) is not None and record["answer"]:
            key = instruction.kind, record["label"]
            sets.setdefault(key, []).append(Anchor(instruction, tuple(record["answer"]), record["under"]))
    refused = sets.get(("harmful", "refusal"), [])
    harmful = [i for i in instructions if i.kind == "harmful"]
    if len(refused) < len(harmful):
        refused_ids = {anchor.instruction.id for anchor in refused}
        refused += [Anchor(i, (*tokenize(refusal_for(i)), end)) for i in harmful if i.id not in refused_ids]
    complied, answered = sets.get(("harmful", "answer"), []), sets.get(("harmless", "answer"), [])
    return AnchorSets(tuple(refused), tuple(complied), tuple(answered))


def refusal_for(instruction: Instruction) -> str:
    """Write a refusal that names the instruction's concern; the same one for the same instruction."""
    forms, concerns = written_refusals()
    fitting = forms if instruction.category in concerns else [form for form in forms if "{concern}" not in form]
    form = fitting[int(instruction.id[:8], 16) % len(fitting)]
    return form.replace("{concern}", concerns.get(instruction.category, ""))


def written_refusals() -> tuple[list[str], dict[str, str]]:
    """Read the written forms, most with a place for {concern}, and the concern of every category."""
    forms = (_DATA / "refusals.txt").read_text("utf-8").split("\n")
    return [form for form in forms if form], json.loads((_DATA / "concerns.json").read_text("utf-8"))
