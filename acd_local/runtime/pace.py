"""How far the safe stream runs ahead of the adversarial one.

The rule is the marginal value theorem's: go on while one more token promises more than the answer's tokens cost on
average. A token that is drafted now counts only if no choice before it turns out to be another.
"""

from __future__ import annotations

from bisect import bisect

from acd_local.runtime.choice import Look
from acd_local.runtime.rowcosts import RowCosts

# By the gap between the two best plausible tokens, in nats at alpha 0.5: how often the contrast changes the choice,
# greedy and sampled, and as how many observations that counts. Measured on the demo model: docs/speed.md.
EDGES = (0.1, 0.25, 0.5, 0.75, 1.25)
GREEDY = (0.47, 0.29, 0.20, 0.05, 0.01, 0.005)
SAMPLED = (0.53, 0.40, 0.34, 0.29, 0.20, 0.08)
WEIGHT = 12.0
PRIOR_TOKENS = 24.0  # as how many tokens the expected cost counts at first


class Pace:
    """Decides run lengths for one answer, and learns from it alone: the same answer has the same pace.

    Args:
        greedy: the most likely token is taken, at temperature 0.
    """

    def __init__(self, costs: RowCosts, *, alpha: float, greedy: bool) -> None:
        self.costs = costs
        # What the adversary has to add to turn the scores' order around grows with the gap and falls with alpha.
        self._scale = max(0.1, 1 - alpha) / max(alpha, 1e-6)
        self._seen = [WEIGHT] * (len(EDGES) + 1)
        self._changed = [WEIGHT * chance for chance in (GREEDY if greedy else SAMPLED)]
        self._spent = PRIOR_TOKENS * costs.deferred(greedy=greedy)
        self._tokens = PRIOR_TOKENS

    @property
    def cost(self) -> float:
        """Of a token so far, in rows."""
        return self._spent / self._tokens

    @property
    def pays(self) -> bool:
        """Whether running ahead is cheaper than side by side, by what is expected and what was seen."""
        return self.cost < self.costs.pair

    def chance(self, look: Look) -> float:
        """How likely the contrast changes an open choice."""
        i = self._bucket(look)
        return self._changed[i] / self._seen[i]

    def goes_on(self, survival: float, drafted: int) -> bool:
        """Whether to draft one more token.

        Args:
            survival: how likely none of the open choices so far changes.
        """
        return drafted < self.costs.longest_run and survival * self.cost > 1 + self.costs.each

    def learn(self, look: Look, *, changed: bool) -> None:
        """What the contrast did to an open choice."""
        i = self._bucket(look)
        self._seen[i] += 1
        self._changed[i] += changed

    def spend(self, rows: int, tokens: int) -> None:
        """`rows` were decoded in one batch; `tokens` came out."""
        self._spent += self.costs.rows(rows)
        self._tokens += tokens

    def _bucket(self, look: Look) -> int:
        return bisect(EDGES, look.gap * self._scale)
