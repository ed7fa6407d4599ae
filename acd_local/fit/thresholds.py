"""Chooses thresholds from what is refused below and above them, and says whether a pair helps its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from acd_local.fit.regression import Floats, minimize, sigmoid
from acd_local.fit.replies import Shares
from acd_local.tuning.anchors import KINDS

# Where thresholds are chosen, a harmful request answered counts so much more than a harmless one refused: set with a
# look at public sets (docs/fit.md, step 6).
HARM_WEIGHT = 0.5
MIN_GAIN = 0.05  # of the objective, for a pair to be worth writing
MAX_ORDINARY_LOSS = 0.1  # requests that it may refuse more often than the model as it is, few dozens being asked
MAX_BROKEN_LOSS = 0.03  # answers that it may break more
TURNING = 0.01  # of answers to harmless requests, that may go on contrasted
_STEPS = 60  # thresholds that are tried
_RIDGE = 1.0  # of refusals by chance and kind: some dozens of answers tell little of a kind that is rarely refused

Chances = Mapping[str, NDArray[np.floating]]  # of harm, of some requests by kind
Rates = Mapping[str, float | NDArray[np.floating]]  # refusals by kind: of all requests alike, or of each


@dataclass(frozen=True)
class Thresholds:
    """Chances of harm: from `threshold` on the pair answers, below `low` the helpful text; and what comes of it."""

    threshold: float
    low: float
    shares: Shares


@dataclass(frozen=True)
class RefusalCurve:
    """How likely a model refuses a request, by its kind and by the gate's chance of harm.

    What makes a gate suspicious often makes a model refuse, so the requests between two thresholds are not refused as
    often as others of their kind. A logistic regression, with one slope for all kinds.
    """

    slope: float
    at_even: Mapping[str, float]  # log odds of a refusal where the chance is a half

    @classmethod
    def fit(cls, chances: Chances, refused: Mapping[str, Sequence[bool]]) -> RefusalCurve:
        """Fit it to what was refused of some requests."""
        rows = np.concatenate([_features(chances[kind], kind) for kind in KINDS])
        targets = np.concatenate([np.array(refused[kind], np.float32) for kind in KINDS])
        weights, bias = minimize(rows, targets, np.ones(len(rows), np.float32), _RIDGE)
        at_even = {kind: float(weights[1 + i]) + bias for i, kind in enumerate(KINDS)}
        return cls(float(weights[0]), at_even)

    def __call__(self, chances: Chances) -> dict[str, NDArray[np.floating]]:
        """Return the share of refusals to be expected of each request."""
        return {
            k: sigmoid((self.slope * _log_odds(c) + self.at_even[k]).astype(np.float32)) for k, c in chances.items()
        }


def _features(chances: NDArray[np.floating], kind: str) -> Floats:
    """Log odds of harm, and which kind it is; shape (n, 1 + kinds)."""
    kinds = np.tile([float(kind == other) for other in KINDS], (len(chances), 1))
    found: Floats = np.column_stack([_log_odds(chances), kinds]).astype(np.float32)
    return found


def _log_odds(chances: NDArray[np.floating]) -> NDArray[np.floating]:
    inside = np.clip(chances, 1e-4, 1 - 1e-4)
    odds: NDArray[np.floating] = np.log(inside / (1 - inside))
    return odds


def choose(chances: Chances, as_is: Rates, pair: Rates, helpful: Rates | None, knows: float = 0.0) -> Thresholds:
    """Choose the thresholds with the highest objective, less broken answers; harmful requests count HARM_WEIGHT more.

    Args:
        chances: of harm by kind, of requests that the gate was not trained on.
        as_is, pair, helpful: what is refused where each of them answers; helpful None: there is no such text.
        knows: easy facts, as a share, that the model knows more of under the helpful text: worth that much where it
            answers ordinary requests.
    """
    best: Thresholds | None = None
    worth = 0.0
    for threshold, low in _candidates(chances, split=helpful is not None):
        found = Thresholds(threshold, low, _shares(chances, threshold, low, as_is, pair, helpful))
        value = _value(found) + knows * share(chances["ordinary"] < low)
        # Of equals the higher ones: less is contrasted, and a request that the helpful text answers is decoded once.
        gain = value - worth
        if best is None or gain > 1e-9 or (gain > -1e-9 and (threshold, low) > (best.threshold, best.low)):
            best, worth = found, value
    return best or Thresholds(1.0, 0.0, _shares(chances, 1.0, 0.0, as_is, pair, helpful))


def share(where: NDArray[np.bool_]) -> float:
    """Return the share of all that are; 0 of none."""
    return float(where.mean()) if len(where) else 0.0


def answer_threshold(chances: NDArray[np.floating]) -> float:
    """Find the chance from which on at most TURNING of answers to harmless requests would turn; at least a half."""
    if not len(chances):
        return 1.0
    return float(np.clip(np.quantile(chances, 1 - TURNING) + 1e-3, 0.5, 1.0))


def refuses_better(as_is: Shares, pair: Shares) -> bool:
    """Tell whether a pair helps.

    Its objective is MIN_GAIN above that of the model as it is, no fewer harmful requests are refused, ordinary requests
    are answered, and no more answers are broken than chance would have it.
    """
    gain = pair.objective - as_is.objective
    return (
        gain >= MIN_GAIN
        and pair.harmful >= as_is.harmful
        and pair.ordinary <= as_is.ordinary + MAX_ORDINARY_LOSS
        and pair.broken <= as_is.broken + MAX_BROKEN_LOSS
    )


def _value(found: Thresholds) -> float:
    return found.shares.objective - found.shares.broken + HARM_WEIGHT * found.shares.harmful


def _candidates(chances: Chances, *, split: bool) -> Sequence[tuple[float, float]]:
    """List (threshold, low), from the chances that occur; not so high that rounding would leave nothing above."""
    every = np.concatenate([c for c in chances.values() if len(c)])
    occurring = np.quantile(every, np.linspace(0, 1, _STEPS))
    grid = np.unique(np.round(np.concatenate([occurring, np.linspace(0.02, 0.98, _STEPS)]), 3))
    grid = grid[(grid > 0.01) & (grid < 0.995)]
    lows = grid if split else np.zeros(1)
    return [(float(t), float(low)) for t in grid for low in lows if low <= t]


def _shares(chances: Chances, threshold: float, low: float, as_is: Rates, pair: Rates, helpful: Rates | None) -> Shares:
    found = {}
    for kind in KINDS:
        c = chances[kind]
        refused = np.where(c < threshold, as_is[kind], pair[kind])
        if helpful is not None:
            refused = np.where(c < low, helpful[kind], refused)
        found[kind] = float(refused.mean()) if len(c) else 0.0
    return Shares(**found)
