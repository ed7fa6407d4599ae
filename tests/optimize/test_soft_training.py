"""Training of a soft prompt: batches, schedule, checkpoints, what is kept, and what stops it."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optimizing import Side, frozen, random_examples, torch

from acd_local.errors import NumericalError
from acd_local.optimize import soft_training as soft
from acd_local.optimize.losses import Term
from acd_local.optimize.prompt_tokens import Layout
from acd_local.optimize.soft_training import (
    HARD_SHARE,
    MINED_SHARE,
    SoftSettings,
    SoftTraining,
    Validation,
    draw,
    refusal_probabilities,
    schedule,
)
from acd_local.optimize.weights import Example, FrozenModel
from acd_local.progress import Stopped
from acd_local.runtime.cancel import CancelToken
from acd_local.tuning.openings import Openings, Spine

SETTINGS = SoftSettings(
    steps=8,
    sizes={"positive": 2, "negative": 2, "retain": 3},
    lr=0.05,
    warmup=2,
    micro=4,
    validate_every=2,
    mine_every=3,
)
PAIRS: dict[Term, list[Example]] = {
    "positive": random_examples(20, 6, 4),
    "negative": random_examples(21, 5, 4),
    "retain": random_examples(22, 13, 4),
}
OPENINGS = Openings((Spine((7,), 0, ((1, 2, 3), (5, 6))),))


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> FrozenModel:
    return frozen(tiny("chatml"))


@pytest.fixture(scope="module")
def layout(tiny: Callable[..., Path]) -> Layout:
    return Side(tiny("chatml")).layout


def training(model: FrozenModel, layout: Layout, *, seed: int = 0, **settings: Any) -> SoftTraining:
    start = model.embed((3, 4, 5, 6))
    return SoftTraining(model, layout, start, PAIRS, replace(SETTINGS, **settings), seed)


def on_disk(state: Any) -> Any:
    """As torch writes and reads a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# -- batches and schedule ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(10, 3), (12, 4), (7, 7), (5, 1)])
def test_every_pair_is_drawn_once_per_epoch(count: int, size: int) -> None:
    pairs = random_examples(1, count)
    drawn = [id(e) for number in range(count * 3) for e in draw(pairs, size, number, seed=4)]
    epochs = [drawn[i : i + count] for i in range(0, len(drawn) - count + 1, count)]
    assert len(epochs) >= 3
    assert all(sorted(epoch) == sorted(map(id, pairs)) for epoch in epochs)
    assert count == 1 or len({tuple(epoch) for epoch in epochs}) > 1


def test_fewer_pairs_than_a_batch_are_drawn_once_each() -> None:
    pairs = random_examples(2, 3)
    for number in range(5):
        assert sorted(map(id, draw(pairs, 5, number, seed=0))) == sorted(map(id, pairs))
    assert draw([], 5, 3, seed=0) == []
    assert draw(pairs, 0, 3, seed=0) == []


def test_a_draw_follows_from_its_number_and_seed() -> None:
    pairs = random_examples(3, 20)
    assert draw(pairs, 6, 7, seed=1) == draw(pairs, 6, 7, seed=1) != draw(pairs, 6, 7, seed=2)
    assert draw(pairs, 6, 7, seed=1) != draw(pairs, 6, 8, seed=1)


def test_the_learning_rate_warms_up_and_decays() -> None:
    found = [schedule(step, 30, 10) for step in range(30)]
    assert found[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert found[10] == 1.0
    assert found[20] == pytest.approx(0.5)
    assert all(a > b for a, b in itertools.pairwise(found[10:]))
    assert 0 < found[-1] < 0.01
    assert schedule(0, 5, 0) == 1.0
    assert math.isfinite(schedule(9, 9, 9))


def test_a_step_moves_by_the_schedule(model: FrozenModel, layout: Layout) -> None:
    """Adam's first step is the learning rate in every place: here the first of two warm-up steps."""
    work = training(model, layout)
    before = work.z.detach().clone()
    losses = work.step()
    moved = (work.z.detach() - before).abs()
    assert float(moved.max()) == pytest.approx(0.025, rel=1e-2)
    assert float(moved.median()) == pytest.approx(0.025, rel=1e-2)
    assert set(losses) == set(PAIRS)
    assert work.step_number == 1


def test_the_average_follows_the_iterates(model: FrozenModel, layout: Layout) -> None:
    """A plain mean at first, whose memory grows up to that of a decay of 0.97."""
    work = training(model, layout, steps=400)
    start = expected = work.z.detach().clone()
    for number in range(1, 5):
        work.step()
        keep = number / (number + 10)
        expected = keep * expected + (1 - keep) * work.z.detach()
        assert torch.allclose(work.average, expected, atol=1e-6)
    work.step_number = 399  # late
    before = work.average.clone()
    work.step()
    assert torch.allclose(work.average, 0.97 * before + 0.03 * work.z.detach(), atol=1e-6)
    assert not torch.equal(work.average, start)


def test_training_lowers_the_loss(model: FrozenModel, layout: Layout) -> None:
    everything: dict[Term, int] = {term: len(pairs) for term, pairs in PAIRS.items()}
    work = training(model, layout, steps=12, sizes=everything, micro=16)
    losses = [sum(work.step().values()) for _ in range(12)]
    assert losses[-1] < losses[0] - 1
    assert work.z.shape == (4, model.width)


# -- hard anchors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refusing", ["positive", None])
def test_mining_finds_what_the_prompt_does_worst_on(model: FrozenModel, layout: Layout, refusing: Term | None) -> None:
    """Of those it looks at, other ones every time: the best one is never the worst of several."""
    work = training(model, layout)
    with torch.no_grad():
        prefix = model.prefix(layout.rows(model, work.average))
    mined: dict[Term, list[list[int]]] = {"positive": [], "retain": []}
    for work.step_number in range(40):
        work.mine(OPENINGS, refusing)
        assert set(work.hard) == set(mined)
        for term, found in work.hard.items():
            mined[term].append(found)
    for term, every in mined.items():
        chances = refusal_probabilities(model, prefix, [e.prompt for e in PAIRS[term]], OPENINGS)
        order = sorted(range(len(chances)), key=lambda i: chances[i] * (-1 if term != refusing else 1))
        assert {len(found) for found in every} == {max(1, -(-len(chances) // MINED_SHARE) // HARD_SHARE)}
        seen = {i for found in every for i in found}
        assert order[0] in seen
        assert order[-1] not in seen
        assert len(seen) > 2


def test_mining_looks_once_at_examples_that_come_several_times(
    model: FrozenModel, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[int] = []
    chances = soft.refusal_probabilities

    def counted(model: FrozenModel, prefix: Any, prompts: Sequence[Any], *args: Any) -> list[float]:
        looked_at.append(len(prompts))
        return chances(model, prefix, prompts, *args)

    monkeypatch.setattr(soft, "refusal_probabilities", counted)
    work = training(model, layout)
    work._pairs = {"retain": [*PAIRS["retain"] * 3, *PAIRS["positive"]]}
    for work.step_number in range(10):
        work.mine(OPENINGS, "positive")
        hard = [id(work._pairs["retain"][i]) for i in work.hard["retain"]]
        assert len(set(hard)) == len(hard)
    different = len(PAIRS["retain"]) + len(PAIRS["positive"])
    assert set(looked_at) == {-(-different // MINED_SHARE)}


def test_mining_keeps_to_twice_the_micro_batch_and_tries_it_first(
    model: FrozenModel, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[list[int]] = []
    answer_logits = FrozenModel.answer_logits

    def counted(self: FrozenModel, prefix: Any, examples: Sequence[Example]) -> Any:
        sizes.append([len(e.prompt) for e in examples])
        return answer_logits(self, prefix, examples)

    monkeypatch.setattr(FrozenModel, "answer_logits", counted)
    work = training(model, layout, micro=2)
    work.try_mining(OPENINGS)
    longest = sorted(len(e.prompt) for term in ("positive", "retain") for e in PAIRS[term])[-4:]
    assert sizes == [longest]
    work.mine(OPENINGS, "positive")
    assert max(map(len, sizes)) == 4


def test_stopped_mining_leaves_the_hard_anchors(model: FrozenModel, layout: Layout) -> None:
    work, stop = training(model, layout, micro=1), CancelToken()
    work.hard = {"positive": [1]}
    stop.set()
    with pytest.raises(Stopped):
        work.mine(OPENINGS, "positive", stop)
    assert work.hard == {"positive": [1]}


def test_half_of_a_batch_is_hard(model: FrozenModel, layout: Layout) -> None:
    work = training(model, layout, sizes={"positive": 4, "negative": 2, "retain": 4})
    assert [len(b) for b in work._batch(0).values()] == [4, 2, 4]
    work.hard = {"positive": [0, 1], "retain": [4, 7, 9]}
    for number in range(4):
        batch = work._batch(number)
        assert [len(b) for b in batch.values()] == [4, 2, 4]
        for term, hard in work.hard.items():
            assert {id(PAIRS[term][i]) for i in hard} >= {id(e) for e in batch[term][2:]}


# -- interrupted and resumed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through_file", [True, False])
def test_a_resumed_training_is_the_uninterrupted_one(model: FrozenModel, layout: Layout, through_file: bool) -> None:
    whole = training(model, layout)
    for step in range(8):
        if step == 2:
            whole.mine(OPENINGS, "positive")
        if step == 4:
            state = on_disk(whole.state()) if through_file else whole.state()
        whole.step()
    for _ in range(2):  # a state can be used again
        other = training(model, layout)
        other.load(state)
        assert other.step_number == 4
        assert other.hard == whole.hard != {}
        for _ in range(4):
            other.step()
        assert torch.equal(other.z, whole.z)
        assert torch.equal(other.average, whole.average)
    assert other.step_number == whole.step_number == 8
    different = training(model, layout, seed=1)
    for _ in range(8):
        different.step()
    assert not torch.equal(different.z, whole.z)


# -- the training as a whole -------------------------------------------------------------------------------------------


class Run:
    """Trains with made-up validations, by the step they are asked at."""

    def __init__(self, work: SoftTraining, safety: dict[int, float], stop_at: int | None = None) -> None:
        self.work = work
        self.safety = safety
        self.seen: dict[int, Any] = {}
        self.saved: list[dict[str, Any]] = []
        self.steps: list[int] = []
        self.mined: list[int] = []
        self.stop, self.stop_at = CancelToken(), stop_at

    def validate(self, z: Any) -> Validation:
        assert not z.requires_grad
        self.seen[self.work.step_number] = z.clone()
        return Validation(self.safety[self.work.step_number], 0.1, 0.3, 2.0)

    def on_step(self, record: Any) -> None:
        self.steps.append(record.step)

    def mine(self) -> None:
        self.mined.append(self.work.step_number)
        self.work.mine(OPENINGS, "positive")

    def save(self, state: dict[str, Any]) -> None:
        self.saved.append(on_disk(state))

    def go(self, checkpoint: dict[str, Any] | None = None) -> Run:
        if checkpoint:
            self.work.load(checkpoint)

        def on_step(record: Any) -> None:
            self.on_step(record)
            if self.work.step_number == self.stop_at:
                self.stop.set()

        self.work.run(
            self.validate, lambda v: v.objective, mine=self.mine, save=self.save, on_step=on_step, stop=self.stop
        )
        return self

    @property
    def history(self) -> list[Any]:
        return self.work.history

    @property
    def z(self) -> Any:
        assert self.work.best is not None
        return self.work.best[1]


SAFETY = {2: 0.3, 4: 0.9, 6: 0.9, 8: 0.5}


def test_the_objective_weighs_both_kinds_of_harmless_instructions() -> None:
    assert Validation(0.9, 0.1, 0.3, 5.0).objective == pytest.approx(0.7)


def test_the_best_validation_is_kept_not_the_last(model: FrozenModel, layout: Layout) -> None:
    run = Run(training(model, layout), SAFETY)
    found = run.go()
    assert list(run.seen) == [2, 4, 6, 8]
    assert torch.equal(found.z, run.seen[4])  # of equals the first
    assert not torch.equal(found.z, run.seen[8])
    assert [r.step for r in found.history] == run.steps == list(range(1, 9))
    assert [r.step for r in found.history if r.validation] == [2, 4, 6, 8]
    assert [r.validation.safety for r in found.history if r.validation] == list(SAFETY.values())
    assert all(set(r.losses) == set(PAIRS) and r.seconds > 0 for r in found.history)
    assert run.mined == [3, 6]


def test_the_last_step_validates_whenever_it_comes(model: FrozenModel, layout: Layout) -> None:
    run = Run(training(model, layout, steps=3, validate_every=100, mine_every=3), {3: 0.5})
    assert torch.equal(run.go().z, run.work.average)
    assert not torch.equal(run.work.average, run.work.z)
    assert list(run.seen) == [3]
    assert run.mined == []  # nothing is trained after it


@pytest.mark.parametrize("stop_at", [3, 4, 6, 7])
def test_a_stopped_training_goes_on_from_its_checkpoint(model: FrozenModel, layout: Layout, stop_at: int) -> None:
    whole = Run(training(model, layout), SAFETY)
    wanted = whole.go()
    first = Run(training(model, layout), SAFETY, stop_at)
    with pytest.raises(Stopped):
        first.go()
    checkpoint = first.saved[-1]
    assert checkpoint["training"]["step"] == first.steps[-1] == stop_at
    json.dumps(checkpoint["history"])
    second = Run(training(model, layout), SAFETY)
    found = second.go(checkpoint)
    assert second.steps == list(range(stop_at + 1, 9))
    assert torch.equal(found.z, wanted.z)
    assert torch.equal(second.work.z, whole.work.z)
    assert [(r.step, r.losses, r.validation) for r in found.history] == [
        (r.step, r.losses, r.validation) for r in wanted.history
    ]
    assert first.mined + second.mined == whole.mined


def stopping(*args: Any) -> Any:
    raise Stopped


@pytest.mark.parametrize(
    ("what", "step"), [("validate", 2), ("mine", 3), ("validate", 6), ("mine", 6), ("validate", 8)]
)
def test_a_stop_within_validation_or_mining_keeps_the_step(
    model: FrozenModel, layout: Layout, what: str, step: int
) -> None:
    """The step is in the checkpoint, and what was stopped is done again."""
    whole = Run(training(model, layout), SAFETY)
    wanted = whole.go()
    first = Run(training(model, layout), SAFETY)
    method = getattr(first, what)
    setattr(first, what, lambda *args: stopping() if first.work.step_number == step else method(*args))
    with pytest.raises(Stopped):
        first.go()
    checkpoint = first.saved[-1]
    assert checkpoint["training"]["step"] == step == len(checkpoint["history"]) + 1
    second = Run(training(model, layout), SAFETY)
    found = second.go(checkpoint)
    assert first.steps + second.steps == whole.steps
    assert torch.equal(found.z, wanted.z)
    assert torch.equal(second.work.z, whole.work.z)
    assert [(r.step, r.losses, r.validation) for r in found.history] == [
        (r.step, r.losses, r.validation) for r in wanted.history
    ]


def test_a_finished_training_has_its_result_in_the_checkpoint(model: FrozenModel, layout: Layout) -> None:
    run = Run(training(model, layout), SAFETY)
    wanted = run.go()
    again = Run(training(model, layout), {})
    assert torch.equal(again.go(run.saved[-1]).z, wanted.z)
    assert again.steps == []


def test_checkpoints_are_saved_now_and_then(model: FrozenModel, layout: Layout) -> None:
    run = Run(training(model, layout, steps=13, validate_every=6), dict.fromkeys((6, 12, 13), 0.5))
    run.go()
    assert [s["training"]["step"] for s in run.saved] == [6, 10, 12, 13]


def not_a_number(work: SoftTraining) -> None:
    with torch.no_grad():
        work.z[1, 2] = math.nan


def test_a_loss_that_is_no_number_ends_the_training(model: FrozenModel, layout: Layout) -> None:
    run = Run(training(model, layout), SAFETY)
    run.on_step = lambda record: not_a_number(run.work) if record.step == 5 else None  # type: ignore[method-assign]
    with pytest.raises(NumericalError, match="at step 5") as caught:
        run.go()
    assert "\n" not in str(caught.value)
    assert run.work.step_number == 5
    assert Counter(s["training"]["step"] for s in run.saved) == {2: 1, 4: 1}
    assert all(bool(torch.isfinite(s["training"]["z"]).all()) for s in run.saved)


def test_a_term_may_be_missing(model: FrozenModel, layout: Layout) -> None:
    """A model that never complies has no D_HA."""
    pairs: dict[Term, Sequence[Example]] = {term: PAIRS[term] for term in ("positive", "retain")}
    work = SoftTraining(model, layout, model.embed((3, 4)), pairs, SETTINGS, 0)
    assert set(work.step()) == {"positive", "retain"}
