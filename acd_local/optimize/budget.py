"""Divides the time that an optimization is given among its stages."""

from __future__ import annotations

TITLES = {
    "anchors": "anchors",
    "soft-safe": "soft safeguarding prompt",
    "soft-adversarial": "soft adversarial prompt",
    "text-safe": "safeguarding text",
    "text-adversarial": "adversarial text",
    "setting": "setting",
}
SHARES = dict(zip(TITLES, (15.0, 16.0, 4.0, 14.0, 6.0, 5.0), strict=True))  # minutes of an hour
MIN_STEPS, MAX_STEPS = 20, 1000  # of a soft prompt's training
MIN_TEXT_STEPS = 5


def divide(budget: float, anchors_took: float) -> dict[str, float]:
    """Seconds for each stage after the anchors, from the whole budget in seconds.

    Anchors take as long as they take. What they take beyond their share is taken from the others, up to half of theirs.
    """
    whole = sum(SHARES.values())
    late = max(0.0, anchors_took / budget - SHARES["anchors"] / whole)
    rest = 1 - SHARES["anchors"] / whole
    factor = max(0.5, (rest - late) / rest)
    return {name: budget * share / whole * factor for name, share in SHARES.items() if name != "anchors"}


def steps_for(seconds: float, per_step: float, *others: tuple[float, int]) -> int:
    """How many training steps fit, in tens.

    Args:
        per_step: seconds.
        others: seconds of what is done now and then besides, and every how many steps that is.
    """
    each = per_step + sum(took / every for took, every in others)
    steps = int(seconds / max(1e-9, each)) // 10 * 10
    return min(MAX_STEPS, max(MIN_STEPS, steps))


def rounds_and_steps(
    seconds: float, trial: float, gradient: float, pieces: int, rounds: int, tries: int, finals: float = 0.0
) -> dict[str, int]:
    """How long a text is searched for: rounds over `pieces` readable parts, at most `rounds` of them and in half of the
    time, then steps of `tries` texts each; `trial` and `gradient` are seconds of one text's.

    Args:
        finals: seconds that choosing among the best takes afterwards.
    """
    seconds = max(0.0, seconds - finals)
    per_round = max(1e-9, (pieces + 1) * trial)
    rounds = max(1, min(rounds, int(seconds / 2 / per_round)))
    per_step = max(1e-9, (tries + 2) * trial + gradient)
    steps = int((seconds - rounds * per_round) / per_step)
    return {"rounds": rounds, "steps": min(MAX_STEPS, max(MIN_TEXT_STEPS, steps))}
