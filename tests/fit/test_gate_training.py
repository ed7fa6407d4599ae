"""Probes are trained with whole categories held out, on the layer that tells most."""

from __future__ import annotations

import numpy as np
import pytest

from acd_local.fit import gate_training as training
from acd_local.fit.gate_training import FOLDS, Rows
from acd_local.tuning import anchors
from acd_local.tuning.anchors import Instruction


def instructions(n: int = 240) -> list[Instruction]:
    kinds = [("harmful", False), ("harmless", False), ("harmless", True)]
    return [
        Instruction(f"request {i}", kinds[i % 3][0], f"{i % 3}-{i // 3 % 10}", kinds[i % 3][1])  # type: ignore[arg-type]
        for i in range(n)
    ]


def test_no_category_is_on_both_sides_and_all_kinds_are_in_every_part() -> None:
    every = anchors.builtin()
    rows = Rows.of(every)
    of: dict[tuple[int, str], set[int]] = {}
    for i, kind, fold in zip(every, rows.kinds, rows.folds, strict=True):
        of.setdefault((int(kind), i.category), set()).add(int(fold))
    assert all(len(folds) == 1 for folds in of.values())
    counts = np.array([[((rows.kinds == k) & (rows.folds == f)).sum() for f in range(FOLDS)] for k in range(3)])
    assert (counts > 0.1 * counts.sum(axis=1, keepdims=True)).all()


def test_instructions_without_categories_are_held_out_one_by_one() -> None:
    rows = Rows.of([Instruction(f"request {i}", "harmful" if i % 2 else "harmless") for i in range(40)])
    assert set(np.bincount(rows.folds)) == {8}


def test_harmful_and_harmless_weigh_the_same_and_lookalikes_as_much_as_ordinary_ones() -> None:
    rows = Rows.of(anchors.builtin())
    weight = [rows.weights[rows.kinds == kind].sum() for kind in range(3)]
    assert weight == pytest.approx([1.0, 0.5, 0.5], rel=1e-3)
    alone = Rows.of([i for i in anchors.builtin() if not i.lookalike])
    assert [alone.weights[alone.kinds == k].sum() for k in range(2)] == pytest.approx([1.0, 1.0], rel=1e-3)


def test_the_layer_that_tells_is_chosen_and_its_probe_gives_the_chances() -> None:
    every = instructions()
    rows = Rows.of(every)
    rng = np.random.default_rng(0)
    states = rng.standard_normal((len(every), 3, 20)).astype(np.float32)
    states[rows.harmful, 1, :4] += 1.0
    found = training.train(states, rows)
    assert found.column == 1
    assert found.by_layer[1] > 0.85 > max(found.by_layer[0], found.by_layer[2])
    assert set(found.areas) == {"ordinary", "lookalike"}
    assert min(found.areas.values()) > 0.85
    chances = np.array([found.probe.probability(states[i, 1:2]) for i in range(len(every))])
    assert np.corrcoef(chances, found.probabilities)[0, 1] > 0.9
    assert chances[rows.harmful].mean() > 0.7 > 0.3 > chances[~rows.harmful].mean()


def test_a_category_that_was_held_out_was_not_learned() -> None:
    """Every category has a mark of its own and nothing else: no other category tells of it."""
    every = instructions()
    rows = Rows.of(every)
    categories = sorted({i.category for i in every})
    states = np.zeros((len(every), len(categories)), np.float32)
    for row, i in enumerate(every):
        states[row, categories.index(i.category)] = 1.0
    scores = training.held_out(states, rows, rows.folds, 3.0)
    assert abs(np.mean(list(rows.areas(scores).values())) - 0.5) < 0.2
    others = training.held_out(states, rows, rows.alone, 3.0)  # while others of its category tell all
    assert np.mean(list(rows.areas(others).values())) > 0.99
