"""Means, paired differences and ratios over prompts, each with an interval.

Intervals are percentile bootstraps (Efron 1979) over prompts, the unit that was drawn at random: resample the prompts,
compute the figure again, take the quantiles. The same values give the same interval.

Rates are treated apart where the bootstrap misleads. With fewer than RARE successes or failures it is too narrow, and
at a rate of 0 or 1 it has no width at all, as if 20 refusals out of 20 proved a rate of exactly 1. So 0/1 data with
fewer than RARE of either kind gets Wilson's score interval (Wilson 1927), and a paired difference of 0/1 data in which
all but fewer than RARE pairs agree on one outcome gets the interval of Agresti and Min (2005). Fractional data stays
with the bootstrap: where all values are equal, or there is one prompt, its interval is that point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from acd_local.errors import UsageError

Array = NDArray[np.float64]

RARE = 5  # of one kind in 0/1 data: fewer, and the bootstrap is not used
LEVEL = 0.95
RESAMPLES = 2000
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)  # half an interval's width, in standard errors
_BLOCK = 2**21  # indices drawn at once: 16 MB


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval.

    Attributes:
        value: the figure on all prompts.
        low, high: bounds of the interval; low <= value <= high.
        n: prompts it rests on.
    """

    value: float
    low: float
    high: float
    n: int


def mean(values: Sequence[float] | Array) -> Estimate:
    """Estimate the mean over prompts: a rate if all values are 0 or 1.

    Raises:
        UsageError: no values, or a value that is not finite.
    """
    column = _column("values", values)
    ones = float(column.sum())
    if _is_binary(column) and min(ones, len(column) - ones) < RARE:
        return _wilson(ones, len(column))
    return of_means([column], lambda means: means)


def difference(a: Sequence[float] | Array, b: Sequence[float] | Array) -> Estimate:
    """Estimate the mean of a - b, paired: a[i] and b[i] belong to the same prompt.

    Raises:
        UsageError: as `mean`, or a and b differ in length.
    """
    first, second = _column("a", a), _column("b", b)
    _check_lengths(first, second)
    if _is_binary(first) and _is_binary(second):
        outcomes = [int(np.count_nonzero(first - second == d)) for d in (-1, 0, 1)]
        if len(first) - max(outcomes) < RARE:
            return _agresti_min(outcomes[2], outcomes[0], len(first))
    return of_means([first - second], lambda means: means)


def ratio(numerators: Sequence[float] | Array, denominators: Sequence[float] | Array) -> Estimate:
    """Estimate the ratio of sums over prompts, such as bits per token: sum of numerators / sum of denominators.

    A prompt whose denominator is 0 (an answer without tokens) adds nothing to either sum and is not counted in n.

    Raises:
        UsageError: as `difference`, a negative denominator, a denominator of 0 under another numerator, or all 0.
    """
    top, bottom = _column("numerators", numerators), _column("denominators", denominators)
    _check_lengths(top, bottom)
    counted = bottom > 0
    if bool((bottom < 0).any()) or bool(top[~counted].any()):
        raise UsageError("denominators must be positive, or 0 with a numerator of 0")
    if not counted.any():
        raise UsageError("denominators: all are 0")
    return of_means([top[counted], bottom[counted]], lambda t, b: t / b)


def mean_of_means(groups: Sequence[Sequence[float] | Array]) -> Estimate:
    """Estimate the mean of the groups' means, each group counting the same: a rate over several sets of prompts.

    Prompts are resampled within their group, for the sets were chosen, not drawn. 0/1 data with fewer than RARE of
    either kind in all groups together gets Wilson's interval of the same rate over as many prompts.

    Raises:
        UsageError: as `mean`, or no groups.
    """
    if not groups:
        raise UsageError("groups: there are none")
    columns = [_column("groups", group) for group in groups]
    pooled = np.concatenate(columns)
    value = float(np.mean([column.mean() for column in columns]))
    ones = float(pooled.sum())
    if _is_binary(pooled) and min(ones, len(pooled) - ones) < RARE:
        return _wilson(value * len(pooled), len(pooled))
    draws = [_resampled_means([column], stream)[0] for stream, column in enumerate(columns)]
    return _percentile(value, np.mean(draws, axis=0), len(pooled))


def of_means(columns: Sequence[Sequence[float] | Array], statistic: Callable[..., Array]) -> Estimate:
    """Estimate any figure that is a function of columns' means, the columns holding one value per prompt.

    The difference of two perplexities, from columns of nats and of tokens under each of two methods:
    `of_means([na, ta, nb, tb], lambda na, ta, nb, tb: exp(na / ta) - exp(nb / tb))`.

    Args:
        columns: m columns of n values, the same prompts in the same order.
        statistic: takes m arrays of one shape, the means, and returns an array of that shape.

    Raises:
        UsageError: as `difference`, or the figure is not finite.
    """
    checked = [_column("columns", column) for column in columns]
    for column in checked:
        _check_lengths(checked[0], column)
    means = [np.array([column.mean()]) for column in checked]
    with np.errstate(all="ignore"):
        value = float(statistic(*means)[0])
        draws = statistic(*_resampled_means(checked))
    if not math.isfinite(value):
        raise UsageError("the figure is not finite on these values")
    return _percentile(value, draws, len(checked[0]))


def _resampled_means(columns: Sequence[Array], stream: int = 0) -> list[Array]:
    """Draw columns' means, (RESAMPLES,) each, over n prompts drawn with replacement; the same draws for all columns."""
    n = len(columns[0])
    rng = np.random.default_rng([0, stream])
    means = [np.empty(RESAMPLES) for _ in columns]
    rows = max(1, _BLOCK // n)
    for start in range(0, RESAMPLES, rows):
        drawn = rng.integers(n, size=(min(rows, RESAMPLES - start), n))
        for column, out in zip(columns, means, strict=True):
            out[start : start + rows] = column[drawn].mean(axis=1)
    return means


def _percentile(value: float, draws: Array, n: int) -> Estimate:
    tail = (1 - LEVEL) / 2
    finite = draws[np.isfinite(draws)]
    low, high = np.quantile(finite, [tail, 1 - tail]) if len(finite) else (value, value)
    return Estimate(value, min(float(low), value), max(float(high), value), n)


def _wilson(ones: float, n: int) -> Estimate:
    """Compute Wilson's score interval for a rate of ones / n."""
    z, rate = _Z, ones / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return Estimate(rate, max(0.0, min(centre - half, rate)), min(1.0, max(centre + half, rate)), n)


def _agresti_min(won: int, lost: int, n: int) -> Estimate:
    """Subtract paired rates, `won` pairs being (1, 0) and `lost` (0, 1): Wald with 0.5 added to all four cells."""
    value = (won - lost) / n
    size, disagree, net = n + 2, won + lost + 1, won - lost
    half = _Z * math.sqrt(disagree - net * net / size) / size
    return Estimate(value, max(-1.0, min(net / size - half, value)), min(1.0, max(net / size + half, value)), n)


def _is_binary(column: Array) -> bool:
    return bool(((column == 0) | (column == 1)).all())


def _column(name: str, values: Sequence[float] | Array) -> Array:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1 or not len(column):
        raise UsageError(f"{name}: must be a list of at least one number")
    if not np.isfinite(column).all():
        raise UsageError(f"{name}: holds a number that is not finite")
    return column


def _check_lengths(a: Array, b: Array) -> None:
    if len(a) != len(b):
        raise UsageError(f"lists of different lengths, {len(a)} and {len(b)}: they must hold the same prompts")


def area(above: Sequence[float] | NDArray[np.floating], below: Sequence[float] | NDArray[np.floating]) -> float:
    """Compute the area under the curve: the share of pairs in which the first is above the second; NaN without pairs.

    Equal ones count half.
    """
    if not len(above) or not len(below):
        return math.nan
    lower = np.sort(below)
    won = [np.searchsorted(lower, above, side).mean() for side in ("left", "right")]
    return float(sum(won) / 2 / len(lower))
