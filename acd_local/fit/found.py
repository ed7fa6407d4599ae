"""Holds what the stages of a fit have found so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from acd_local.evaluate.stats import Estimate, mean
from acd_local.fit.answers import Reply, Style
from acd_local.fit.candidates import Candidate
from acd_local.fit.choose import Shares, Thresholds
from acd_local.fit.training import Trained
from acd_local.pairs import GateSettings
from acd_local.tuning.anchors import KINDS

LOOK = 64  # answer tokens between two looks: at 32 they cost 8% of the time per token, here 3%


@dataclass(frozen=True)
class Measured:
    """Replies to instructions of each kind, and their shares."""

    replies: Mapping[str, Sequence[Reply]]

    @property
    def shares(self) -> Shares:
        every = [reply for group in self.replies.values() for reply in group]
        return Shares(
            **{kind: share(self.replies.get(kind, ()), "refusal") for kind in KINDS}, broken=share(every, "degenerate")
        )

    def estimates(self) -> dict[str, Estimate]:
        """Refusals by kind and broken answers, with intervals."""
        every = [reply for group in self.replies.values() for reply in group]
        labels = {kind: ("refusal", self.replies.get(kind, ())) for kind in KINDS} | {"broken": ("degenerate", every)}
        return {key: mean([float(r.label == label) for r in group]) for key, (label, group) in labels.items() if group}


@dataclass
class Found:
    """What the stages have found so far."""

    own: str = ""
    rates: dict[str, Shares] = field(default_factory=dict)  # as_is, and helpful where there is such a text
    helpful: Candidate | None = None
    gate: Trained | None = None
    layers: tuple[int, ...] = ()
    chances: dict[str, float] = field(default_factory=dict)  # of harm, by instruction
    positives: list[tuple[Candidate, dict[str, Any]]] = field(default_factory=list)  # the best, with their figures
    positive: Candidate | None = None
    negative: Candidate | None = None
    style: Style = field(default_factory=Style)
    thresholds: Thresholds | None = None
    look: Trained | None = None
    answer_threshold: float = 1.0
    judged: tuple[Measured, Measured] | None = None  # as it is, and with the pair
    figures: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # for the page

    @property
    def gate_settings(self) -> GateSettings:
        """How the gate decides. The helpful text is in it wherever requests are read under it."""
        assert self.thresholds is not None
        chosen = self.thresholds
        return GateSettings(chosen.threshold, self.base, chosen.low, LOOK if self.look else 0, self.answer_threshold)

    @property
    def base(self) -> str | None:
        """The system prompt under which requests are read."""
        return self.helpful.text if self.helpful else None


def share(replies: Sequence[Reply], label: str) -> float:
    """Of the replies, how many are this; 0 of none."""
    return sum(reply.label == label for reply in replies) / len(replies) if replies else 0.0


def said(shares: Shares) -> str:
    """The shares in words."""
    text = ", ".join(f"{getattr(shares, kind):.0%} of {named(kind)}" for kind in KINDS)
    return f"{text}, {shares.broken:.0%} broken"


def named(kind: str) -> str:
    return {"harmful": "harmful", "ordinary": "ordinary", "lookalike": "look-alike"}[kind]
