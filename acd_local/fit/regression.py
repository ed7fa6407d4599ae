"""Fits logistic regressions on hidden states in numpy, by Newton's method with conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_NEWTON_STEPS = 30
_GRADIENT_STEPS = 60
_TOLERANCE = 1e-4  # of the gradient, as a part of the one at zero
_SCALE = 100.0  # mean square of a standardized row, whatever the width: so one ridge suits all models


@dataclass(frozen=True)
class Linear:
    """Log odds = states @ weight + bias, of raw states."""

    weight: Floats
    bias: float

    def __call__(self, states: Floats) -> Floats:
        """Log odds, shape (n,), of states of shape (n, n_embd)."""
        odds: Floats = states @ self.weight + np.float32(self.bias)
        return odds


def fit(states: Floats, labels: NDArray[np.bool_], weights: Floats, ridge: float) -> Linear:
    """Fit the weighted logistic regression with a ridge on standardized states.

    Args:
        states: shape (n, n_embd), any scale; both labels occur.
        weights: of the rows, at least 0; only their relation to each other counts.
        ridge: strength of the penalty ridge / 2 |w|^2 against the sum of n losses.
    """
    mean, deviation = states.mean(axis=0), states.std(axis=0)
    scale = np.sqrt(_SCALE / states.shape[1]) / np.where(deviation > 1e-6 * (1 + np.abs(mean)), deviation, np.inf)
    rows = ((states - mean) * scale).astype(np.float32)
    share = (weights * (len(weights) / weights.sum())).astype(np.float32)
    w, b = minimize(rows, labels.astype(np.float32), share, ridge)
    weight = (w * scale).astype(np.float32)
    return Linear(weight, float(b - mean @ weight))


def minimize(rows: Floats, targets: Floats, share: Floats, ridge: float) -> tuple[Floats, float]:
    """Find the w and b with the smallest sum of share * loss + ridge / 2 |w|^2; b is free."""
    x = np.zeros(rows.shape[1] + 1, np.float32)  # w, then b
    first = 0.0
    for _ in range(_NEWTON_STEPS):
        chance = sigmoid(_odds(rows, x))
        error = share * (chance - targets)
        gradient = np.append(rows.T @ error + ridge * x[:-1], error.sum()).astype(np.float32)
        size = float(np.linalg.norm(gradient))
        first = first or size
        if size <= _TOLERANCE * first:
            break
        curve = share * chance * (1 - chance)
        step = _solve(lambda v, c=curve: _curved(rows, c, ridge, v), gradient)  # type: ignore[misc]
        value = _loss(rows, targets, share, ridge, x)
        length = 1.0
        while length > 1e-4 and _loss(rows, targets, share, ridge, x - np.float32(length) * step) > value:
            length /= 2
        x = (x - np.float32(length) * step).astype(np.float32)
    return x[:-1], float(x[-1])


def sigmoid(odds: NDArray[np.floating]) -> Floats:
    found: Floats = (1 / (1 + np.exp(-np.clip(odds, -60, 60)))).astype(np.float32)
    return found


def calibrate(scores: Floats, labels: NDArray[np.bool_], weights: Floats) -> tuple[float, float]:
    """Find (slope, shift) that make scores chances (Platt 1999): sigmoid(slope * score + shift); slope > 0."""
    share = (weights * (len(weights) / weights.sum())).astype(np.float32)
    unit = float(scores.std()) or 1.0
    w, b = minimize((scores[:, None] / unit).astype(np.float32), labels.astype(np.float32), share, ridge=1e-3)
    return max(float(w[0]) / unit, 1e-3), b


def _odds(rows: Floats, x: Floats) -> Floats:
    found: Floats = rows @ x[:-1] + x[-1]
    return found


def _loss(rows: Floats, targets: Floats, share: Floats, ridge: float, x: Floats) -> float:
    odds = _odds(rows, x).astype(np.float64)
    losses = np.logaddexp(0, odds) - targets * odds
    return float(share @ losses + ridge / 2 * float(x[:-1] @ x[:-1]))


def _curved(rows: Floats, curve: Floats, ridge: float, v: Floats) -> Floats:
    """Multiply the Hessian by v; a trace of ridge on b keeps it from being singular."""
    moved = curve * _odds(rows, v)
    found: Floats = np.append(rows.T @ moved + ridge * v[:-1], moved.sum() + 1e-4 * v[-1]).astype(np.float32)
    return found


def _solve(product: Callable[[Floats], Floats], target: Floats) -> Floats:
    """Solve product(x) = target by conjugate gradients, to a hundredth."""
    x = np.zeros_like(target)
    rest, direction = target.copy(), target.copy()
    size = first = float(rest @ rest)
    for _ in range(_GRADIENT_STEPS):
        if size <= 1e-4 * first:
            break
        bent = product(direction)
        length = size / max(float(direction @ bent), 1e-30)
        x += np.float32(length) * direction
        rest -= np.float32(length) * bent
        new = float(rest @ rest)
        direction = rest + np.float32(new / size) * direction
        size = new
    return x
