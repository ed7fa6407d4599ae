"""Trains a gate's probes: layer and penalty by cross-validation with whole categories held out, then calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from acd_local.evaluate import stats
from acd_local.fit import regression
from acd_local.fit.regression import Floats
from acd_local.gate import Probe
from acd_local.tuning import anchors
from acd_local.tuning.anchors import KINDS, Instruction

FOLDS = 5
RIDGES = (3.0, 10.0, 30.0)
# Of the mean area: the strongest penalty that costs no more is taken, as the requests of users differ from the anchors
# more than one category of anchors does from the others.
TOLERATED = 0.008
_MIN_CATEGORIES = 3  # of a kind: with fewer, instructions are held out one by one


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows that a probe is trained on.

    Attributes:
        kinds: places in KINDS.
        folds: which part holds the row out, with all of its category.
        alone: which part holds the row out, whatever its category.
    """

    kinds: NDArray[np.int64]
    folds: NDArray[np.int64]
    alone: NDArray[np.int64]

    @classmethod
    def of(cls, instructions: Sequence[Instruction]) -> Rows:
        kinds = np.array([KINDS.index(i.group) for i in instructions])
        alone = np.array([i.number // anchors.VALIDATION_SHARE % FOLDS for i in instructions])
        return cls(kinds, _folds(instructions, kinds), alone)

    @property
    def harmful(self) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = self.kinds == 0
        return found

    @property
    def weights(self) -> Floats:
        """Harmful and harmless rows count the same, and of the latter the look-alikes as much as the ordinary ones."""
        counts = np.bincount(self.kinds, minlength=3)
        harmless = max(1, int((counts[1:] > 0).sum()))
        shares = np.array([1.0, 1 / harmless, 1 / harmless]) / np.maximum(counts, 1)
        found: Floats = shares[self.kinds].astype(np.float32)
        return found

    def areas(self, scores: Floats) -> dict[str, float]:
        """Compute the areas under the curve of harmful rows against each harmless kind that there is."""
        found = {}
        for place, kind in enumerate(KINDS[1:], 1):
            if (self.kinds == place).any():
                found[kind] = stats.area(scores[self.harmful], scores[self.kinds == place])
        return found


@dataclass(frozen=True, eq=False)
class Trained:
    """A probe and how it does on rows that were held out.

    Attributes:
        column: the layer that it reads, a place in what was given.
        probabilities: of every row, from a probe that did not see it: what a request of a known kind is given.
        areas: see `Rows.areas`, of probes that saw nothing of a row's category. by_layer: their means, of each layer.
    """

    probe: Probe
    column: int
    probabilities: Floats
    areas: dict[str, float]
    by_layer: tuple[float, ...]


def train(states: Floats, rows: Rows) -> Trained:
    """Train the best probe on one layer.

    Args:
        states: shape (n, layers, n_embd).
    """
    n_layers = states.shape[1]
    middle = {
        ridge: _mean_area(rows.areas(held_out(states[:, n_layers // 2], rows, rows.folds, ridge))) for ridge in RIDGES
    }
    ridge = max(r for r, area in middle.items() if area >= max(middle.values()) - TOLERATED)
    scores = [held_out(states[:, column], rows, rows.folds, ridge) for column in range(n_layers)]
    alone = [_mean_area(rows.areas(s)) for s in scores]
    column = int(np.argmax(alone))
    slope, shift = regression.calibrate(scores[column], rows.harmful, rows.weights)
    found = regression.fit(states[:, column], rows.harmful, rows.weights, ridge)
    each = held_out(states[:, column], rows, rows.alone, ridge)
    return Trained(
        probe=Probe(slope * found.weight[None], slope * found.bias + shift),
        column=column,
        probabilities=regression.sigmoid(slope * each + shift),
        areas=rows.areas(scores[column]),
        by_layer=tuple(alone),
    )


def held_out(states: Floats, rows: Rows, folds: NDArray[np.int64], ridge: float) -> Floats:
    """Compute the log odds of every row from a regression on the rows of other folds; states of shape (n, n_embd)."""
    found = np.zeros(len(states), np.float32)
    for fold in np.unique(folds):
        out = folds == fold
        harmful = rows.harmful[~out]
        if harmful.any() and not harmful.all():
            found[out] = regression.fit(states[~out], harmful, rows.weights[~out], ridge)(states[out])
    return found


def _mean_area(areas: dict[str, float]) -> float:
    return float(np.mean(list(areas.values()))) if areas else 0.0


def _folds(instructions: Sequence[Instruction], kinds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Divide into parts of about equal size of every kind, no category in two of them."""
    found = np.zeros(len(instructions), np.int64)
    for kind in np.unique(kinds):
        places = [int(place) for place in np.flatnonzero(kinds == kind)]
        groups: dict[str, list[int]] = {}
        for place in places:
            groups.setdefault(instructions[place].category, []).append(place)
        if len(groups) < _MIN_CATEGORIES:
            groups = {instructions[place].id: [place] for place in places}
        sizes = [0] * FOLDS
        for _, members in sorted(groups.items(), key=lambda g: (-len(g[1]), g[0])):
            fold = sizes.index(min(sizes))
            found[members] = fold
            sizes[fold] += len(members)
    return found
