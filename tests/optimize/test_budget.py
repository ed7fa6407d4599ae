"""How the time of an optimization is divided."""

from __future__ import annotations

import time
from typing import Any

import pytest

pytest.importorskip("torch")

from optimize_runs import Asked, optimize

from acd_local import pairs
from acd_local.optimize import budget
from acd_local.optimize.stages import soft_prompt

pytestmark = pytest.mark.usefixtures("no_figures")  # those of pages: see test_report


def test_an_hour_is_divided_as_documented() -> None:
    assert sum(stage.minutes for stage in budget.STAGES.values()) == 60
    shares = budget.divide(3600.0, 600.0)
    assert {name: shares[name] / 60 for name in shares} == pytest.approx(
        {name: stage.minutes for name, stage in budget.STAGES.items() if name != "anchors"}
    )
    assert budget.divide(3600.0, 900.0) == shares, "anchors that keep to their share take nothing from the others"


def test_late_anchors_shorten_the_rest_by_half_at_most() -> None:
    on_time = sum(budget.divide(3600.0, 900.0).values())
    assert sum(budget.divide(3600.0, 1800.0).values()) == pytest.approx(on_time - 900)
    assert sum(budget.divide(3600.0, 7200.0).values()) == pytest.approx(on_time / 2)
    assert sum(budget.divide(7200.0, 1800.0).values()) == pytest.approx(2 * on_time)


@pytest.mark.parametrize(
    ("seconds", "per_step", "validation", "steps"),
    [(780, 2.0, 0.0, 390), (780, 2.0, 50.0, 260), (780, 2.07, 0.0, 370), (1, 2.0, 9.0, 20), (9e9, 0.1, 0.0, 1000)],
)
def test_steps_fill_the_time(seconds: float, per_step: float, validation: float, steps: int) -> None:
    assert budget.steps_for(seconds, per_step, (validation, 50)) == steps
    assert budget.steps_for(seconds, per_step, (validation / 2, 50), (validation, 100)) == steps


def test_what_comes_before_the_first_step_is_taken_from_the_steps_time(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that runs on for an hour while it is computed what answers were drawn from."""

    late = 0.0
    real = soft_prompt.with_targets

    def slow(*given: Any) -> Any:
        nonlocal late
        late += hour
        return real(*given)

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            return time.perf_counter() + late

    monkeypatch.setattr(budget, "MAX_STEPS", 20)
    monkeypatch.setattr(soft_prompt, "with_targets", slow)
    monkeypatch.setattr(soft_prompt, "time", Clock)
    steps = []
    for hour in (0.0, 3600.0):
        request = asked(f"{hour:.0f}.toml", soft_only=True, budget=3600.0, seed=int(hour))
        optimize(request)
        steps.append(pairs.load(request.out).provenance["steps"])
    assert steps == [{"soft_safe_steps": n, "soft_adversarial_steps": n} for n in (20, budget.MIN_STEPS)]


def test_parts_take_half_of_a_texts_time_at_most() -> None:
    counts = budget.rounds_and_steps(660, trial=0.5, gradient=1.5, pieces=25, rounds=5, tries=12)
    assert counts == {"rounds": 5, "steps": (660 - 5 * 13) // 8.5}
    late = budget.rounds_and_steps(660, trial=0.5, gradient=1.5, pieces=25, rounds=5, tries=12, finals=200)
    assert late == {"rounds": 5, "steps": (460 - 5 * 13) // 8.5}
    none = budget.rounds_and_steps(660, trial=0.5, gradient=1.5, pieces=25, rounds=5, tries=12, finals=900)
    assert none == {"rounds": 1, "steps": budget.MIN_TEXT_STEPS}
    short = budget.rounds_and_steps(50, trial=0.5, gradient=1.5, pieces=25, rounds=5, tries=12)
    assert short == {"rounds": 1, "steps": 5}
