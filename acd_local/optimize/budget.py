"""Divides the time that an optimization is given among its stages."""

from __future__ import annotations

from typing import NamedTuple


class Stage(NamedTuple):
    """A stage's title, and the minutes of an hour that it is given."""

    title: str
    minutes: float


# The keys stand in the checkpoints' names: another one makes every user's stage anew.
STAGES = {
    "anchors": Stage("anchors", 15.0),
    "soft-safe": Stage("soft safeguarding prompt", 16.0),
    "soft-adversarial": Stage("soft adversarial prompt", 4.0),
    "text-safe": Stage("safeguarding text", 14.0),
    "text-adversarial": Stage("adversarial text", 6.0),
    "setting": Stage("contrast", 5.0),
}
MIN_STEPS, MAX_STEPS = 20, 1000  # of a soft prompt's training
MIN_TEXT_STEPS = 5


def divide(budget: float, anchors_took: float) -> dict[str, float]:
    """Return the seconds of each stage after the anchors, from the whole budget in seconds.

    Anchors take as long as they take. What they take beyond their share is taken from the others, up to half of theirs.
    """
    shares = {name: stage.minutes / 60 for name, stage in STAGES.items()}
    on_time = shares.pop("anchors")
    late = max(0.0, anchors_took / budget - on_time)
    factor = max(0.5, 1 - late / (1 - on_time))
    return {name: budget * share * factor for name, share in shares.items()}


def steps_for(seconds: float, per_step: float, *others: tuple[float, int]) -> int:
    """Count the training steps that fit, in tens.

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
    """Divide the time that a text is searched for into rounds, then steps.

    Args:
        trial, gradient: seconds of one text's.
        pieces: readable parts; a round goes over all.
        rounds: at most so many, and in half of the time.
        tries: texts of one step.
        finals: seconds that choosing among the best takes afterwards.
    """
    seconds = max(0.0, seconds - finals)
    per_round = max(1e-9, (pieces + 1) * trial)
    rounds = max(1, min(rounds, int(seconds / 2 / per_round)))
    per_step = max(1e-9, (tries + 2) * trial + gradient)
    steps = int((seconds - rounds * per_round) / per_step)
    return {"rounds": rounds, "steps": min(MAX_STEPS, max(MIN_TEXT_STEPS, steps))}
