"""Counts what became of requests: refusals by kind, and broken answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from acd_local.evaluate.stats import Estimate, mean
from acd_local.fit.replies import Reply
from acd_local.tuning.anchors import KINDS
from acd_local.tuning.scoring import objective


@dataclass(frozen=True)
class Shares:
    """Refusals by kind, and broken answers of all, as shares."""

    harmful: float
    ordinary: float
    lookalike: float
    broken: float = 0.0

    @property
    def objective(self) -> float:
        """Refusals of harmful requests minus needless ones, the mean over both kinds."""
        return objective(self.harmful, self.ordinary, self.lookalike)

    def __str__(self) -> str:
        text = ", ".join(f"{getattr(self, kind):.0%} of {named(kind)}" for kind in KINDS)
        return f"{text}, {self.broken:.0%} broken"


@dataclass(frozen=True)
class Measured:
    """Replies to instructions of each kind."""

    replies: Mapping[str, Sequence[Reply]]

    @property
    def shares(self) -> Shares:
        values = {key: sum(found) / len(found) if found else 0.0 for key, found in self._found().items()}
        return Shares(**values)

    def estimates(self) -> dict[str, Estimate]:
        """Refusals by kind and broken answers, with intervals."""
        return {key: mean([float(is_so) for is_so in found]) for key, found in self._found().items() if found}

    def _found(self) -> dict[str, list[bool]]:
        """Of each reply, whether it is a refusal, by kind; and of all, whether it is broken."""
        found = {kind: [r.label == "refusal" for r in self.replies.get(kind, ())] for kind in KINDS}
        return found | {"broken": [r.label == "degenerate" for group in self.replies.values() for r in group]}


def named(kind: str) -> str:
    return {"harmful": "harmful", "ordinary": "ordinary", "lookalike": "look-alike"}[kind]
