"""The search for a text: what is accepted, what is kept, and that it repeats and resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optimizing import Side, frozen, random_examples, torch

from acd_local.errors import ModelError
from acd_local.optimize import text_search
from acd_local.optimize.losses import Term
from acd_local.optimize.text_objective import ObjectiveWeights, TextObjective
from acd_local.optimize.text_search import Candidate, SearchSettings, SearchState, TextSearch
from acd_local.optimize.weights import FrozenModel
from acd_local.progress import Stopped
from acd_local.runtime.cancel import CancelToken

START = "You are kind."
PIECES = ("Please answer the question.", "Help me.", "What is red?", "User: the sky\nAssistant: blue")
SETTINGS = SearchSettings(max_tokens=24, rounds=3, steps=9, tries=8, top_k=12, hold=3)
SIZES: dict[Term, int] = {"positive": 1, "negative": 1, "retain": 2}


@pytest.fixture(scope="module")
def side(tiny: Callable[..., Path]) -> Iterator[Side]:
    side = Side(tiny("chatml"))
    yield side
    side.model.close()


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> FrozenModel:
    return frozen(tiny("chatml"))


def made_up(text: str) -> dict[str, float]:
    """Scores that have nothing to do with the objective."""
    digest = hashlib.sha256(text.encode()).digest()
    return {"safety": digest[0] / 255, "over_refusal": digest[1] / 255, "lookalike": digest[2] / 255}


class Run:
    def __init__(
        self,
        side: Side,
        model: FrozenModel,
        *,
        seed: int = 0,
        state: SearchState | None = None,
        stop_at: int | None = None,
        start: str = START,
        pieces: tuple[str, ...] = PIECES,
        **settings: Any,
    ) -> None:
        teacher = torch.tensor(np.random.default_rng(5).normal(0, 1, (6, model.width)), dtype=torch.float32)
        pairs = {term: random_examples(30 + i, 6, 4) for i, term in enumerate(SIZES)}
        self.objective = TextObjective(model, side.layout, teacher, pairs, SIZES, ObjectiveWeights(), seed)
        self.side = side
        self.stop, self.stop_at = CancelToken(), stop_at
        self.saved: list[dict[str, Any]] = []
        self.told: list[tuple[int, Candidate]] = []
        self.scored: list[str] = []
        self.start, self.pieces = start, pieces
        self.work = TextSearch(
            self.objective,
            side.space,
            self.count,
            replace(SETTINGS, **settings),
            state or SearchState(),
            seed=seed,
            save=lambda state: self.saved.append(json.loads(json.dumps(state.dump()))),
            on_step=self.on_step,
            stop=self.stop,
        )

    def count(self, texts: Sequence[str]) -> list[dict[str, float]]:
        self.scored += texts
        return list(map(made_up, texts))

    def on_step(self, done: int, newest: Candidate) -> None:
        self.told.append((done, newest))
        if done == self.stop_at:
            self.stop.set()

    def go(self) -> None:
        self.work.run(self.start, self.pieces)

    @property
    def history(self) -> list[Candidate]:
        return self.work.state.history


def timeless(history: list[Candidate]) -> list[Candidate]:
    return [replace(c, seconds=0.0) for c in history]


@pytest.fixture(scope="module")
def whole(side: Side, model: FrozenModel) -> Run:
    run = Run(side, model)
    run.go()
    return run


def test_the_search_finds_something_in_both_phases(whole: Run) -> None:
    history = whole.history
    origins = [c.origin for c in history]
    assert origins[:2] == ["manual", "parts"]
    assert history[0].text == START
    assert set(origins[2:]) >= {"swap"}
    assert set(origins) <= {"manual", "parts", "swap", "insert", "delete", "merge"}
    assert all(c.text in (START, *PIECES) or "\n" in c.text for c in history if c.origin == "parts")


def test_on_one_minibatch_the_objective_never_rises(whole: Run) -> None:
    history = whole.history
    last: dict[int, float] = {}
    for c in history:
        minibatch = 0 if c.step < SETTINGS.rounds else 1 + (c.step - SETTINGS.rounds) // SETTINGS.hold
        assert c.objective <= last.get(minibatch, float("inf"))
        last[minibatch] = c.objective
    assert len(last) > 2


def test_a_candidate_is_recorded_with_what_it_was_accepted_for(whole: Run) -> None:
    """Objective and parts are those of its tokens on the minibatch of its step, and lower than what it replaced."""
    previous = None
    for c in whole.history:
        number = 0 if c.step < SETTINGS.rounds else 1 + (c.step - SETTINGS.rounds) // SETTINGS.hold
        whole.objective.turn_to(number)
        found = whole.objective(c.tokens)
        assert c.objective == pytest.approx(found.pop("objective"), rel=1e-5)
        assert c.parts == pytest.approx(found, rel=1e-5)
        if previous is not None and c.origin != "parts":
            assert c.objective < whole.objective(previous)["objective"]
        previous = c.tokens
        assert c.seconds > 0


def test_every_accepted_text_survives_and_keeps_the_limit(whole: Run, side: Side) -> None:
    for c in whole.history:
        assert len(c.tokens) <= SETTINGS.max_tokens
        assert side.space.is_stable(c.tokens)
        assert side.space.text(c.tokens) == c.text
        assert tuple(side.vocab.tokenize(c.text, parse_special=False)) == c.tokens
        assert c.origin in ("manual", "parts") or c.text.isascii()


def test_every_text_that_is_tried_is_scored(whole: Run) -> None:
    """Accepted or not, once each time it is tried."""
    tried = whole.work.state.tried
    assert whole.scored == [c.text for c in tried]
    assert all(c.scores == made_up(c.text) for c in tried)
    assert len(whole.history) < len(tried) / 2


def test_every_text_that_is_tried_survives_and_has_no_control_tokens(whole: Run, side: Side) -> None:
    for c in whole.work.state.tried:
        assert side.space.is_stable(c.tokens)
        assert side.space.text(c.tokens) == c.text
        assert all(side.space.allowed[token] for token in c.tokens)


def test_steps_are_told_and_saved(whole: Run) -> None:
    total = SETTINGS.rounds + SETTINGS.steps
    assert [done for done, _ in whole.told] == list(range(1, total + 1))
    assert [s["step"] for s in whole.saved] == list(range(1, total + 1))
    assert whole.told[-1][1] == whole.history[-1]
    assert whole.saved[-1]["accepted"][-1] == whole.work.state.tried.index(whole.history[-1])


def test_the_seed_repeats_the_search(side: Side, model: FrozenModel, whole: Run) -> None:
    again, other = Run(side, model), Run(side, model, seed=1)
    again.go()
    assert timeless(again.history) == timeless(whole.history)
    other.go()
    assert [c.tokens for c in other.history] != [c.tokens for c in whole.history]


@pytest.mark.parametrize("stop_at", [1, 3, 7])
def test_a_stopped_search_goes_on_where_it_was(side: Side, model: FrozenModel, whole: Run, stop_at: int) -> None:
    first = Run(side, model, stop_at=stop_at)
    with pytest.raises(Stopped):
        first.go()
    assert first.saved[-1]["step"] == stop_at
    second = Run(side, model, state=SearchState.load(first.saved[-1]))
    second.go()
    assert timeless(second.history) == timeless(whole.history)
    assert [done for done, _ in second.told] == list(range(stop_at + 1, SETTINGS.rounds + SETTINGS.steps + 1))


def test_a_finished_search_has_its_result_in_the_state(side: Side, model: FrozenModel, whole: Run) -> None:
    again = Run(side, model, state=SearchState.load(whole.saved[-1]))
    again.go()
    assert again.told == []
    assert asdict(again.work.state) == asdict(whole.work.state)


def test_all_that_was_tried_is_kept(whole: Run) -> None:
    """Every part that fits, a step's tries, and their objectives; accepted was the best of a step, if it was better."""
    state = whole.work.state
    for step in range(SETTINGS.rounds, SETTINGS.rounds + SETTINGS.steps):
        tried = [t for t in state.tried if t.step == step]
        assert 0 < len(tried) <= SETTINGS.tries + 1
        whole.objective.turn_to(1 + (step - SETTINGS.rounds) // SETTINGS.hold)
        for t in tried[:2]:
            assert t.objective == pytest.approx(whole.objective(t.tokens)["objective"], rel=1e-5)
    first = [t.origin for t in state.tried if t.step == 0]
    assert first == ["manual"] + ["parts"] * len(PIECES)
    assert {t.origin for t in state.tried if 0 < t.step < SETTINGS.rounds} == {"parts"}
    for c in whole.history[1:]:
        assert c.objective == min(t.objective for t in state.tried if t.step == c.step and t.origin != "manual")
    assert whole.saved[-1]["tried"] == json.loads(json.dumps(state.dump()["tried"]))


def test_the_limit_holds_for_the_manual_prompt_too(side: Side, model: FrozenModel) -> None:
    long = " ".join(["Please answer the question."] * 9)
    tokens = side.space.tokens(long)
    assert tokens is not None
    assert len(tokens) > SETTINGS.max_tokens
    run = Run(side, model, start=long, rounds=2, steps=2)
    run.go()
    assert all(c.text != long for c in run.history)
    assert all(len(c.tokens) <= SETTINGS.max_tokens for c in run.history)
    assert run.history[0].origin == "parts"


def test_texts_that_all_change_are_one_line(side: Side, model: FrozenModel) -> None:
    run = Run(side, model, start=" spaces ", pieces=("\nnew line", "x" * 200))
    with pytest.raises(ModelError, match="--soft-only") as caught:
        run.go()
    assert "\n" not in str(caught.value)


def test_parts_come_one_per_round_and_none_twice(side: Side, model: FrozenModel) -> None:
    run = Run(side, model, rounds=6, steps=0, max_tokens=200)
    run.go()
    last = run.history[-1].text
    assert sum(c.origin == "parts" for c in run.history) <= 6
    assert all(last.count(piece) <= 1 for piece in (START, *PIECES))
    for before, after in zip(run.history[1:], run.history[2:], strict=False):
        assert after.text.startswith(before.text + "\n")


def test_merging_by_hand() -> None:
    current = (1, 2, 3, 4)
    assert text_search._merge(current, []) is None
    assert text_search._merge(current, [(9, 2, 3, 4)]) is None
    assert text_search._merge(current, [(9, 2, 3, 4), (1, 2, 8, 4)]) == (9, 2, 8, 4)
    assert text_search._merge(current, [(9, 2, 3, 4), (7, 2, 3, 6)]) == (9, 2, 3, 6)  # the better one wins a place
    assert text_search._merge(current, [(7, 2, 3, 6), (9, 5, 3, 4), (1, 2, 0, 4)]) == (7, 5, 0, 6)


@pytest.mark.parametrize("place", ["safe", "adversarial"])
def test_the_readable_parts(place: Any) -> None:
    found = text_search.parts(place)
    assert len(found) >= 10
    assert len(set(found)) == len(found)
    assert all(part == part.strip() and part.isascii() for part in found)
    assert any("\n" in part for part in found)  # demonstrations
    assert not set(found) & set(text_search.parts("adversarial" if place == "safe" else "safe"))
