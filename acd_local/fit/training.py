"""Trains a gate's probes: layers and penalty by cross-validation with whole categories held out, then calibration."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from acd_local.fit import regression
from acd_local.fit.regression import Floats
from acd_local.gate import Probe
from acd_local.optimize.anchors import Instruction

KINDS = ("harmful", "ordinary", "lookalike")
FOLDS = 5
RIDGES = (3.0, 10.0, 30.0, 100.0)
PAIR_GAIN = 0.002  # of the mean area: less, and one layer is enough
_MIN_CATEGORIES = 3  # of a kind: with fewer, instructions are held out one by one


@dataclass(frozen=True, eq=False)
class Rows:
    """What a probe is trained on, row for row.

    Attributes:
        kinds: places in KINDS. folds: which part holds the row out.
    """

    kinds: NDArray[np.int64]
    folds: NDArray[np.int64]

    @classmethod
    def of(cls, instructions: Sequence[Instruction]) -> Rows:
        kinds = np.array([KINDS.index(kind_of(i)) for i in instructions])
        return cls(kinds, _folds(instructions, kinds))

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
        """The areas under the curve of harmful rows against each harmless kind that there is."""
        found = {}
        for place, kind in enumerate(KINDS[1:], 1):
            if (self.kinds == place).any():
                part = self.harmful | (self.kinds == place)
                found[kind] = regression.auc(scores[part], self.harmful[part])
        return found


@dataclass(frozen=True, eq=False)
class Trained:
    """A probe and how it does on rows that were held out.

    Attributes:
        columns: which of the layers it reads, places in what was given.
        probabilities: of every row, from a probe that saw nothing of its category.
        areas: see `Rows.areas`. ridge: the penalty. by_layer: mean area of each layer alone.
    """

    probe: Probe
    columns: tuple[int, ...]
    probabilities: Floats
    areas: dict[str, float]
    ridge: float
    by_layer: tuple[float, ...]


def kind_of(instruction: Instruction) -> str:
    """One of KINDS."""
    if instruction.kind == "harmful":
        return "harmful"
    return "lookalike" if instruction.lookalike else "ordinary"


def train(states: Floats, rows: Rows, *, columns: Sequence[int] | None = None) -> Trained:
    """The best probe on one or two layers.

    Args:
        states: shape (n, layers, n_embd).
        columns: the layers that it is to read; None: the best one or two.
    """
    n_layers = states.shape[1]
    wanted = range(n_layers) if columns is None else columns
    middle = wanted[len(wanted) // 2]
    ridge = max(RIDGES, key=lambda r: _worth(rows.areas(held_out(states[:, middle], rows, r))))
    scores = {c: held_out(states[:, c], rows, ridge) for c in wanted}
    alone = {c: _worth(rows.areas(scores[c])) for c in wanted}
    chosen = tuple(wanted) if columns is not None else _choose(scores, alone, rows)
    combined = _mean([scores[c] for c in chosen])
    slope, shift = regression.calibrate(combined, rows.harmful, rows.weights)
    parts = [regression.fit(states[:, c], rows.harmful, rows.weights, ridge) for c in chosen]
    factor = slope / len(parts)
    return Trained(
        probe=Probe(np.stack([p.weight * factor for p in parts]), factor * sum(p.bias for p in parts) + shift),
        columns=chosen,
        probabilities=regression.sigmoid(slope * combined + shift),
        areas=rows.areas(combined),
        ridge=ridge,
        by_layer=tuple(alone.values()),
    )


def held_out(states: Floats, rows: Rows, ridge: float) -> Floats:
    """The log odds of every row from a regression on the rows of other folds; states of shape (n, n_embd)."""
    found = np.zeros(len(states), np.float32)
    for fold in np.unique(rows.folds):
        out = rows.folds == fold
        harmful = rows.harmful[~out]
        if harmful.any() and not harmful.all():
            found[out] = regression.fit(states[~out], harmful, rows.weights[~out], ridge)(states[out])
    return found


def _choose(scores: dict[int, Floats], alone: dict[int, float], rows: Rows) -> tuple[int, ...]:
    """The best layer; two where their mean is better."""
    best = max(alone, key=lambda c: alone[c])
    pairs = {p: _worth(rows.areas(_mean([scores[c] for c in p]))) for p in itertools.combinations(alone, 2)}
    if pairs and max(pairs.values()) > alone[best] + PAIR_GAIN:
        return max(pairs, key=lambda p: pairs[p])
    return (best,)


def _mean(scores: Sequence[Floats]) -> Floats:
    found: Floats = np.stack(scores).mean(axis=0)
    return found


def _worth(areas: dict[str, float]) -> float:
    return float(np.mean(list(areas.values()))) if areas else 0.0


def _folds(instructions: Sequence[Instruction], kinds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Parts of about equal size of every kind, no category in two of them."""
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
