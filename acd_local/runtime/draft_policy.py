"""Decides whether the safe stream runs ahead of the adversarial one, and how far.

The rule is the marginal value theorem's: go on while one more token promises more than the answer's tokens cost on
average. A token that is drafted now counts only if no choice before it turns out to be another.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np

from acd_local.runtime.choice import SafeCandidates
from acd_local.runtime.rowcosts import RowCosts

# By the gap between the two best plausible tokens, in nats at alpha 0.5: how often the contrast changes the choice,
# greedy and sampled, and as how many observations that counts. Measured on the demo model: docs/speed.md.
EDGES = (0.1, 0.25, 0.5, 0.75, 1.25)
GREEDY = (0.47, 0.29, 0.20, 0.05, 0.01, 0.005)
SAMPLED = (0.53, 0.40, 0.34, 0.29, 0.20, 0.08)
WEIGHT = 12.0
# Share of positions with at most the gaps 0, EDGES and WIDEST; at the others one token alone is plausible.
WIDEST = 2.3
GREEDY_GAPS = (0.0, 0.06, 0.13, 0.22, 0.31, 0.47, 0.65)
SAMPLED_GAPS = (0.0, 0.07, 0.15, 0.29, 0.40, 0.57, 0.79)
TYPICAL = 4000  # positions from which the expected cost is reckoned
PRIOR_TOKENS = 24.0  # as how many tokens it counts at first
MEMORY = 96.0  # tokens: what was seen longer ago fades
# Running ahead begins where it takes less than this much of side by side, and ends where it takes more than that much:
# what is expected is a few percent wrong, and changing over costs as well.
ENTER, LEAVE = 0.95, 1.05


class DraftPolicy:
    """Decides run lengths for one answer, and learns from it alone: the same answer has the same pace.

    Args:
        greedy: the most likely token is taken, at temperature 0.
    """

    def __init__(self, costs: RowCosts, *, alpha: float, greedy: bool) -> None:
        self.costs = costs
        self._scale = _scale(alpha)
        self._seen = [WEIGHT] * (len(EDGES) + 1)
        self._changed = [WEIGHT * chance for chance in (GREEDY if greedy else SAMPLED)]
        self._forecast = Forecast(costs)
        self.expected = partial(expected, alpha=alpha, greedy=greedy)
        self._spent = PRIOR_TOKENS * self.expected(costs) * costs.typical
        self._tokens = PRIOR_TOKENS
        self._pays = False

    @property
    def cost(self) -> float:
        """Of a token where the safe stream runs ahead, in rows, by what is expected and what was seen."""
        return self._spent / self._tokens

    @property
    def pays(self) -> bool:
        """Whether to run ahead: it is clearly cheaper than side by side, or has been and is not clearly dearer."""
        bound = LEAVE if self._pays else ENTER
        self._pays = self.cost * self.costs.ahead < bound * self.costs.pair
        return self._pays

    def chance(self, candidates: SafeCandidates) -> float:
        """Estimate how likely the contrast changes an open choice."""
        i = self._bucket(candidates)
        return self._changed[i] / self._seen[i]

    def goes_on(self, survival: float, drafted: int) -> bool:
        """Decide whether to draft one more token.

        Args:
            survival: how likely none of the open choices so far changes.
        """
        return _worth_it(self.costs, self.cost, survival, drafted)

    def quote(self, chance: float, *, alone: bool) -> int:
        """Decide how many tokens to draft from the conversation; 0: that costs more than it promises.

        Args:
            chance: how likely a token of the draft is right if those before it are.
            alone: the alternative is a position side by side, not a safe row in a run.
        """
        best, most, right = 0, 0.0, 0.0
        for k in range(1, self.costs.longest_run):
            right += chance**k
            saved = 1 + right - self.costs.rows(1 + k)
            if alone:
                saved += (1 + right) * (self.costs.pair - 1) - self.costs.catching_up(1 + right)
            if saved > most:
                best, most = k, saved
        return best

    def learn(self, candidates: SafeCandidates, *, changed: bool) -> None:
        """Take in what the contrast did to an open choice."""
        i = self._bucket(candidates)
        self._seen[i] += 1
        self._changed[i] += changed
        if self._seen[i] > MEMORY:
            self._changed[i] *= MEMORY / self._seen[i]
            self._seen[i] = MEMORY

    def spend(self, batches: Sequence[int], tokens: int) -> None:
        """Take in that a run took batches of so many rows of one stream; `tokens` came out."""
        self._add(sum(map(self.costs.rows, batches)), tokens)

    def beside(self, candidates: SafeCandidates | None, *, changed: bool) -> None:
        """Take in a position decided side by side; `candidates`: None where the contrast could not change it."""
        self._add(self._forecast.see(None if candidates is None else self.chance(candidates), changed, self.cost), 1)
        if candidates is not None:
            self.learn(candidates, changed=changed)

    def _add(self, spent: float, tokens: int) -> None:
        self._spent += spent
        self._tokens += tokens
        if self._tokens > MEMORY:
            self._spent *= MEMORY / self._tokens
            self._tokens = MEMORY

    def _bucket(self, candidates: SafeCandidates) -> int:
        return bisect(EDGES, candidates.gap * self._scale)


class Forecast:
    """Reckons what running ahead would cost at positions that are decided otherwise.

    Runs end where `DraftPolicy` would end them. What is drafted behind a change is in vain: it is counted by the
    positions that follow, which have the same kinds of gaps.
    """

    def __init__(self, costs: RowCosts) -> None:
        self._costs = costs
        self._run: tuple[float, int] | None = None  # survival and length, from the first open position on
        self._vain: list[tuple[float, int]] = []  # the same of what is drafted behind changes
        self._pending = 0  # tokens that the adversarial stream has not seen

    def see(self, chance: float | None, changed: bool, cost: float) -> float:
        """Count the rows that the next position takes.

        Args:
            chance: how likely the contrast changes it; None: it cannot.
            cost: of a token so far, see `DraftPolicy.cost`.
        """
        spent = 1.0
        self._pending += 1
        spent += len(self._vain) * (1 + self._costs.each)
        self._vain = [on for run in self._vain if (on := self._on(run, chance, cost)) is not None]
        if self._run is None and chance is None:
            return spent
        further = self._on(self._run or (1.0, 0), chance, cost)
        self._run = further
        if changed or further is None:
            spent += self._check(further)
        return spent

    def _check(self, further: tuple[float, int] | None) -> float:
        """End the run; return the rows of the adversarial stream.

        Args:
            further: what was drafted behind a change, whose rows are in the same batch.
        """
        k, self._pending, self._run = self._pending, 0, None
        if further is None:
            return self._costs.catching_up(k)
        self._vain.append(further)
        return self._costs.fixed + k * self._costs.each

    def _on(self, run: tuple[float, int], chance: float | None, cost: float) -> tuple[float, int] | None:
        survival, length = run[0] * (1 - (chance or 0.0)), run[1] + 1
        return (survival, length) if _worth_it(self._costs, cost, survival, length) else None


@lru_cache(maxsize=64)
def expected(costs: RowCosts, alpha: float, *, greedy: bool) -> float:
    """Estimate the rows per token where the safe stream runs ahead, over positions like the demo model's."""
    shares, chances = (GREEDY_GAPS, GREEDY) if greedy else (SAMPLED_GAPS, SAMPLED)
    draws, forecast, spent = random.Random(0), Forecast(costs), 0.0
    for i in range(TYPICAL):
        share, luck = draws.random(), draws.random()
        chance = None
        if share < shares[-1]:
            gap = float(np.interp(share, shares, (0.0, *EDGES, WIDEST)))
            chance = chances[bisect(EDGES, gap * _scale(alpha))]
        cost = (100 * costs.pair + spent) / (100 + i)
        spent += forecast.see(chance, chance is not None and luck < chance, cost)
    return spent / TYPICAL


def _scale(alpha: float) -> float:
    """Scale the gap: what the adversary has to add to turn the order around grows with it and falls with alpha."""
    return max(0.1, 1 - alpha) / max(alpha, 1e-6)


def _worth_it(costs: RowCosts, cost: float, survival: float, drafted: int) -> bool:
    return drafted < costs.longest_run and survival * cost > 1 + costs.each
