"""The paper's losses and their gradients against a slow, obvious implementation and against finite differences."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optimizing import Side, frozen, random_examples, slow_terms, torch, whole_logits
from tiny_gguf import write_gemma2

from acd_local.evaluate.likelihood import Scorer
from acd_local.optimize.anchor_sets import Anchor, AnchorSets
from acd_local.optimize.examples import LOOKALIKE_SHARE, WHOLE_SHARE, batches
from acd_local.optimize.losses import MAX_LOG_P, Term, term_loss, token_log_probs
from acd_local.optimize.prompt_tokens import Layout, PromptTokens
from acd_local.optimize.soft_training import (
    PART_COST,
    SoftSettings,
    loss_and_gradient,
    mean_nll,
    micro_batches,
    refusal_probabilities,
)
from acd_local.optimize.text_objective import ObjectiveWeights, TextObjective
from acd_local.optimize.weights import Example, FrozenModel
from acd_local.tuning.anchors import Instruction
from acd_local.tuning.openings import Openings, Spine

ONES: dict[Term, float] = {"positive": 1.0, "negative": 1.0, "retain": 1.0}
OTHERS: dict[Term, float] = {"positive": 0.5, "negative": 2.0, "retain": 3.0}
# float32 against float32 in another order of summation, relative to the largest value.
CLOSE = 2e-5
# Central differences of a float32 loss (about 10, so 1e-6 apart): 0.005 wide, relative to the gradient's length.
WIDTH, DIFFERENCE = 5e-3, 5e-3


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> FrozenModel:
    return frozen(tiny("chatml"))


@pytest.fixture(scope="module")
def layout(tiny: Callable[..., Path]) -> Layout:
    return Side(tiny("chatml")).layout


@pytest.fixture(scope="module")
def z(model: FrozenModel) -> Any:
    return torch.tensor(np.random.default_rng(3).normal(0, 1, (5, model.width)), dtype=torch.float32)


@pytest.fixture(scope="module")
def likely(model: FrozenModel, layout: Layout, z: Any) -> list[Example]:
    """Examples whose answers the model itself would give: their unlikelihood is large, and so is its gradient."""
    found = []
    with torch.no_grad():
        for example in random_examples(11, 6):
            answer: tuple[int, ...] = ()
            for _ in example.answer:
                logits = whole_logits(model, layout, z, Example(example.prompt, (*answer, 0)))
                answer = (*answer, int(logits[-1].argmax()))
            found.append(Example(example.prompt, answer))
    return found


def batch(likely: list[Example], sizes: tuple[int, int, int] = (4, 3, 5)) -> dict[Term, list[Example]]:
    positive, negative, retain = sizes
    found = random_examples(10, positive), likely[:negative], random_examples(12, retain)
    return dict(zip(("positive", "negative", "retain"), found, strict=True))


def fast(model: FrozenModel, layout: Layout, z: Any, given: Any, **settings: Any) -> tuple[dict[Term, float], Any]:
    leaf = z.clone().requires_grad_()
    losses = loss_and_gradient(model, layout, leaf, given, SoftSettings(**({"weights": ONES} | settings)))
    return losses, leaf.grad


def slow(
    model: FrozenModel, layout: Layout, z: Any, given: Any, weights: dict[Term, float]
) -> tuple[dict[Term, float], Any]:
    leaf = z.clone().requires_grad_()
    terms = slow_terms(model, layout, leaf, given)
    total: Any = sum(weights[term] * loss for term, loss in terms.items())
    total.backward()
    return {term: float(loss.detach()) for term, loss in terms.items()}, leaf.grad


# -- values and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [ONES, OTHERS])
def test_losses_and_gradient_are_those_of_the_equations(
    model: FrozenModel, layout: Layout, z: Any, weights: dict[Term, float], likely: list[Example]
) -> None:
    wanted, wanted_gradient = slow(model, layout, z, batch(likely), weights)
    for micro in (1, 4, 16):
        losses, gradient = fast(model, layout, z, batch(likely), weights=weights, micro=micro)
        assert losses == pytest.approx(wanted, rel=CLOSE)
        assert float((gradient - wanted_gradient).abs().max()) < CLOSE * float(wanted_gradient.abs().max())
    assert len(set(wanted.values())) == 3
    assert min(wanted.values()) > 0.1
    assert float(wanted_gradient.norm(dim=1).min()) > 1e-3  # every row of the prompt is reached


def test_the_roles_swap_the_sets(model: FrozenModel, layout: Layout, z: Any, likely: list[Example]) -> None:
    """L_SP brings about D_HR and keeps away D_HA, L_AP the other way round; both retain D_S."""
    sets = {"refused": likely[:3], "complied": likely[3:], "answered": random_examples(3, 4)}
    instructions = {e: Instruction(f"{name} {i}", "harmful") for name, es in sets.items() for i, e in enumerate(es)}
    tails = {i.id: e.prompt for e, i in instructions.items()}
    anchors = AnchorSets(**{name: tuple(Anchor(instructions[e], e.answer) for e in es) for name, es in sets.items()})
    texts = PromptTokens(layout, tails, {}, {}, {}, Openings(()), 0, 0, ())
    for role, terms in (
        ("safe", {"positive": "refused", "negative": "complied", "retain": "answered"}),
        ("adversarial", {"positive": "complied", "negative": "refused", "retain": "answered"}),
    ):
        wanted, wanted_gradient = slow(model, layout, z, {t: sets[name] for t, name in terms.items()}, ONES)
        losses, gradient = fast(model, layout, z, batches(anchors, texts, role, 99, 99))
        assert losses == pytest.approx(wanted, rel=CLOSE)
        assert float((gradient - wanted_gradient).abs().max()) < CLOSE * float(wanted_gradient.abs().max())


def test_some_of_the_refusals_that_are_to_come_about_count_whole() -> None:
    instructions = [Instruction(f"instruction {i}", "harmful") for i in range(200)]
    texts = PromptTokens(
        Layout((), ()), {i.id: (k,) for k, i in enumerate(instructions)}, {}, {}, {}, Openings(()), 0, 0, ()
    )
    pairs = tuple(Anchor(i, tuple(range(9))) for i in instructions)
    anchors = AnchorSets(pairs, pairs, pairs)
    lengths = {}
    for role in ("safe", "adversarial"):
        cut = batches(anchors, texts, role, answer_tokens=2, refusal_tokens=7)
        for term, found in cut.items():
            assert [e.prompt for e in found] == [(k,) for k in range(200)]
            assert all(e.answer == tuple(range(len(e.answer))) for e in found)
            lengths[role, term] = Counter(len(e.answer) for e in found)
    whole = lengths.pop(("safe", "positive"))
    assert set(whole) == {2, 7}
    assert whole[7] / 200 == pytest.approx(1 / WHOLE_SHARE, abs=0.1)
    assert all(found == {2: 200} for found in lengths.values())


@pytest.mark.parametrize(("ordinary", "lookalikes", "times"), [(30, 10, 1), (30, 15, 1), (30, 16, 2), (30, 60, 4)])
def test_ordinary_instructions_come_so_often_that_lookalikes_stay_few(
    ordinary: int, lookalikes: int, times: int
) -> None:
    instructions = [Instruction(f"{k}", "harmless", lookalike=k < lookalikes) for k in range(ordinary + lookalikes)]
    tails = {i.id: (k,) for k, i in enumerate(instructions)}
    texts = PromptTokens(Layout((), ()), tails, {}, {}, {}, Openings(()), 0, 0, ())
    anchors = AnchorSets((), (), tuple(Anchor(i, (1,)) for i in instructions))
    found = batches(anchors, texts, "safe", 9, 9)["retain"]
    counts = Counter(e.prompt[0] for e in found)
    assert [counts[k] for k in range(len(instructions))] == [1] * lookalikes + [times] * ordinary
    assert lookalikes / len(found) <= 1 / LOOKALIKE_SHARE < lookalikes / (len(found) - ordinary)


def test_a_term_counts_by_its_weight_and_its_own_answers(
    model: FrozenModel, layout: Layout, z: Any, likely: list[Example]
) -> None:
    """A term does not depend on the others' sizes."""
    one = batch(likely, (4, 1, 1))
    alone, _ = fast(model, layout, z, {"positive": one["positive"]})
    assert fast(model, layout, z, one)[0]["positive"] == pytest.approx(alone["positive"], rel=CLOSE)
    none = {"positive": 0.0, "negative": 1.0, "retain": 0.0}
    _, gradient = fast(model, layout, z, one, weights=none)
    _, wanted = fast(model, layout, z, {"negative": one["negative"]})
    assert float((gradient - wanted).abs().max()) < CLOSE * float(wanted.abs().max())


def test_gradients_add_up_as_torchs_do(model: FrozenModel, layout: Layout, z: Any, likely: list[Example]) -> None:
    _, once = fast(model, layout, z, batch(likely))
    leaf = z.clone().requires_grad_()
    for _ in range(2):
        loss_and_gradient(model, layout, leaf, batch(likely), SoftSettings(weights=ONES))
    assert float((leaf.grad - 2 * once).abs().max()) < CLOSE * float(once.abs().max())


def test_the_gradient_is_the_slope(model: FrozenModel, layout: Layout, z: Any, likely: list[Example]) -> None:
    given = batch(likely, (2, 2, 2))
    _, gradient = fast(model, layout, z, given, weights=OTHERS)
    length = float(gradient.norm())
    rng = np.random.default_rng(0)
    directions = [gradient / length]
    directions += [torch.tensor(rng.normal(0, 1, z.shape), dtype=torch.float32) for _ in range(3)]
    for _ in range(3):
        directions.append(torch.zeros_like(z))
        directions[-1][int(rng.integers(len(z))), int(rng.integers(z.shape[1]))] = 1.0

    def value(at: Any) -> float:
        losses = fast(model, layout, at, given)[0]
        return sum(OTHERS[term] * loss for term, loss in losses.items())

    for direction in directions:
        step = WIDTH * direction / direction.norm()
        slope = (value(z + step) - value(z - step)) / (2 * WIDTH)
        assert slope == pytest.approx(float((gradient * step).sum()) / WIDTH, abs=DIFFERENCE * length)


def test_the_weights_stay_frozen(model: FrozenModel, layout: Layout, z: Any, likely: list[Example]) -> None:
    before = model.embeddings.clone()
    fast(model, layout, z, batch(likely))
    assert torch.equal(model.embeddings, before)
    assert not [name for name, p in model.model.named_parameters() if p.requires_grad or p.grad is not None]


def test_loading_the_weights_prints_nothing(tiny: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    FrozenModel(tiny("chatml"))
    assert capfd.readouterr() == ("", "")


def test_answer_logits_are_those_of_the_whole_conversation(model: FrozenModel, layout: Layout, z: Any) -> None:
    """Shared prefix, right padding, examples of all lengths together: no answer sees another's tokens."""
    examples = random_examples(5, 6)
    with torch.no_grad():
        found = model.answer_logits(model.prefix(layout.rows(model, z)), examples)
        wanted = torch.cat([whole_logits(model, layout, z, e) for e in examples])
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) < 1e-4
    assert float(wanted.std()) > 1


def test_capped_logits_are_transformers_and_llamas(tiny: Callable[..., Path]) -> None:
    """Gemma 2 squeezes its logits with a tanh."""
    side = Side(tiny("gemma", writer=write_gemma2, window=512, head_dim=256))  # transformers knows no other
    model = frozen(side.path)
    prompt = side.conversation("You are kind.", "What is red?")
    answer = tuple(side.vocab.tokenize("water and wine", parse_special=False))
    with torch.no_grad():
        found = model.answer_logits(model.prefix(model.embed(prompt[:5]).float()), [Example(tuple(prompt[5:]), answer)])
        wanted = model.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].float()
    assert float((found - wanted).abs().max()) < 1e-4
    uncapped = 30 * torch.atanh(found / 30)
    assert float((uncapped - found).abs().max()) > 0.1
    with Scorer(side.model, n_streams=1, n_ctx=128, threads=1) as scorer:
        pieces = [logits.copy() for _, logits in scorer.logits([prompt], answer)]
    assert np.abs(np.concatenate(pieces, axis=1)[0] - found.numpy()).max() < 0.05  # llama.cpp's keys are f16


def test_micro_batches_hold_every_example_once() -> None:
    examples = random_examples(6, 23, longest=30)
    for size in (1, 4, 50):
        parts = micro_batches(examples, size)
        assert max(map(len, parts)) <= size
        assert sorted(map(id, examples)) == sorted(id(e) for part in parts for e in part)
    assert micro_batches([], 4) == []


def test_micro_batches_are_the_cheapest() -> None:
    """All ways to cut the examples, ordered by length, into parts."""
    rng = np.random.default_rng(0)
    for spread in (20, 300):
        examples = [Example(tuple(range(int(n))), (0,)) for n in rng.integers(5, 5 + spread, 9)]
        ordered = sorted(map(len, examples), reverse=True)
        cheapest = {}
        for cuts in itertools.product((False, True), repeat=len(ordered) - 1):
            ends = [i + 1 for i, cut in enumerate(cuts) if cut]
            parts = [ordered[a:b] for a, b in itertools.pairwise([0, *ends, len(ordered)])]
            cost = sum(PART_COST + len(part) * part[0] for part in parts)
            if max(map(len, parts)) <= 4:
                cheapest[cost] = parts
        assert [list(map(len, part)) for part in micro_batches(examples, 4)] == cheapest[min(cheapest)]


# -- the terms ---------------------------------------------------------------------------------------------------------


def test_token_log_probs_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [1000.0, 0.0]])
    assert token_log_probs(logits, torch.tensor([1, 0])).tolist() == pytest.approx([math.log(0.75), 0.0])
    assert float(token_log_probs(logits, torch.tensor([0, 1]))[1]) == -1000.0


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.99, 0.999])
def test_unlikelihood_by_hand(p: float) -> None:
    log_p = torch.tensor([math.log(p)], requires_grad=True)
    loss: Any = term_loss("negative", log_p)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-math.log1p(-p), rel=1e-3, abs=1e-6)
    assert float(log_p.grad) == pytest.approx(p / (1 - p), rel=1e-3, abs=1e-6)
    assert float(term_loss("positive", log_p.detach())) == pytest.approx(-math.log(p))
    assert float(term_loss("retain", log_p.detach())) == pytest.approx(-math.log(p))


def test_unlikelihood_stays_finite_where_the_token_is_certain() -> None:
    for value in (0.0, -1e-12, -1e-8, MAX_LOG_P / 2, MAX_LOG_P, 1e-7):
        log_p = torch.tensor([value, -1.0], requires_grad=True)
        loss: Any = term_loss("negative", log_p)
        loss.backward()
        assert 9 < float(loss.detach()) < 10
        assert bool(torch.isfinite(log_p.grad).all())
        assert float(log_p.grad[1]) > 0


# -- validation figures ------------------------------------------------------------------------------------------------


def test_refusal_probabilities_keep_the_order_of_the_prompts(model: FrozenModel, layout: Layout, z: Any) -> None:
    first, other = Spine((7, 30), 0, ((1, 2, 3), tuple(range(40, 90)), (5,))), Spine((7, 31, 8), 2, ((4,), (9, 10)))
    openings = Openings((first, other))
    prompts = [e.prompt for e in random_examples(8, 7, longest=12)]
    with torch.no_grad():
        prefix = model.prefix(layout.rows(model, z))
        wanted = []
        for prompt in prompts:
            p = torch.softmax(whole_logits(model, layout, z, Example(prompt, (7, 30, 0))), dim=1).numpy()
            wanted.append(p[0, [1, 2, 3]].sum() + p[0, 7] * p[1, 40:90].sum() + p[0, 7] * p[1, 30] * p[2, 5])
            q = torch.softmax(whole_logits(model, layout, z, Example(prompt, (7, 31, 8, 0))), dim=1).numpy()
            wanted[-1] += q[0, 7] * q[1, 31] * (q[2, 4] + q[2, 8] * q[3, [9, 10]].sum())
    for micro in (1, 3, 32):
        assert refusal_probabilities(model, prefix, prompts, openings, micro) == pytest.approx(wanted, rel=1e-3)
    assert len({round(float(p), 6) for p in wanted}) > 3


def test_mean_nll_is_per_token(model: FrozenModel, layout: Layout, z: Any) -> None:
    examples = random_examples(9, 5)
    with torch.no_grad():
        answers = float(slow_terms(model, layout, z, {"positive": examples})["positive"])
        wanted = answers * len(examples) / sum(len(e.answer) for e in examples)
        assert mean_nll(model, model.prefix(layout.rows(model, z)), examples, micro=2) == pytest.approx(
            wanted, rel=CLOSE
        )


# -- the objective of a text -------------------------------------------------------------------------------------------

TEXT = (34, 120, 7, 301, 44)
WEIGHTS = ObjectiveWeights(kl=1.0, opo=0.7, fluency=0.3)
SIZES: dict[Term, int] = {"positive": 2, "negative": 2, "retain": 3}


def objective(
    model: FrozenModel,
    layout: Layout,
    likely: list[Example],
    teacher: Any,
    *,
    seed: int = 0,
    sizes: dict[Term, int] = SIZES,
    many: int = 6,
    micro: int = 16,
) -> TextObjective:
    return TextObjective(model, layout, teacher, batch(likely, (many, many, many)), sizes, WEIGHTS, seed, micro)


def slow_objective(
    model: FrozenModel, layout: Layout, likely: list[Example], teacher: Any, rows: Any
) -> dict[str, Any]:
    """Over all of two pairs per term: KL by its definition, the losses above, and the text's own likelihood."""
    given = batch(likely, (2, 2, 2))
    divergences = []
    for example in (e for examples in given.values() for e in examples):
        p = torch.softmax(whole_logits(model, layout, teacher, example), dim=1)
        q = torch.softmax(whole_logits(model, layout, rows, example), dim=1)
        divergences.append((p * torch.log(p / q)).sum())
    kl, opo = torch.stack(divergences).mean(), sum(slow_terms(model, layout, rows, given).values())
    whole = torch.cat([model.embed(layout.before), rows])[None]
    own = torch.softmax(model.model(inputs_embeds=whole).logits[0, len(layout.before) - 1 : -1].double(), dim=1)
    fluency = -torch.log(own[range(len(TEXT)), list(TEXT)]).mean()
    total = WEIGHTS.kl * kl + WEIGHTS.opo * opo + WEIGHTS.fluency * fluency
    return {"objective": total, "kl": kl, "opo": opo, "fluency": fluency}


def test_the_objective_and_its_parts_are_the_slow_ones(
    model: FrozenModel, layout: Layout, z: Any, likely: list[Example]
) -> None:
    found = objective(model, layout, likely, z, sizes={"positive": 2, "negative": 2, "retain": 2}, many=2)(TEXT)
    with torch.no_grad():
        wanted = slow_objective(model, layout, likely, z, model.embed(TEXT))
    assert found == pytest.approx({name: float(value) for name, value in wanted.items()}, rel=CLOSE)
    assert found["objective"] == pytest.approx(found["kl"] + 0.7 * found["opo"] + 0.3 * found["fluency"], rel=CLOSE)
    assert min(found.values()) > 0.01


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_a_minibatch_in_parts_is_the_whole_one(
    model: FrozenModel, layout: Layout, z: Any, likely: list[Example], monkeypatch: pytest.MonkeyPatch, micro: int
) -> None:
    whole = objective(model, layout, likely, z)
    value, gradient = whole(TEXT), whole.gradient(TEXT)
    most: list[tuple[bool, int]] = []
    answer_logits = FrozenModel.answer_logits

    def counted(self: FrozenModel, prefix: Any, examples: list[Example]) -> Any:
        most.append((torch.is_grad_enabled(), len(examples)))
        return answer_logits(self, prefix, examples)

    monkeypatch.setattr(FrozenModel, "answer_logits", counted)
    parts = objective(model, layout, likely, z, micro=micro)
    assert parts(TEXT) == pytest.approx(value, rel=CLOSE)
    assert float((parts.gradient(TEXT) - gradient).abs().max()) < CLOSE * float(gradient.abs().max())
    assert max(n for graded, n in most if graded) <= micro
    assert micro < max(n for graded, n in most if not graded) <= 2 * micro


def test_the_text_that_the_teacher_is_has_no_divergence(
    model: FrozenModel, layout: Layout, likely: list[Example]
) -> None:
    known = objective(model, layout, likely, model.embed(TEXT))
    assert abs(known(TEXT)["kl"]) < 1e-5
    assert known((*TEXT[:-1], 45))["kl"] > 0.01


def test_the_objectives_gradient_is_the_slope_of_mixing_a_token_in(
    model: FrozenModel, layout: Layout, z: Any, likely: list[Example]
) -> None:
    found = objective(model, layout, likely, z, sizes={"positive": 2, "negative": 2, "retain": 2}, many=2).gradient(
        TEXT
    )
    assert found.shape == (len(TEXT), len(model.embeddings))
    rows, size = model.embed(TEXT), float(found.abs().max())
    with torch.no_grad():
        for place, token in ((0, 5), (2, 300), (4, 44), (4, int(found[4].argmin()))):
            step = torch.zeros_like(rows)
            step[place] = 1e-3 * model.embeddings[token]
            ends = [
                float(slow_objective(model, layout, likely, z, at)["objective"]) for at in (rows + step, rows - step)
            ]
            assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(float(found[place, token]), abs=0.01 * size)


def test_minibatches_have_numbers(model: FrozenModel, layout: Layout, z: Any, likely: list[Example]) -> None:
    one, two, other = (objective(model, layout, likely, z, seed=seed) for seed in (0, 0, 1))
    values: dict[int, dict[str, float]] = {}
    for number in (0, 1, 2, 1, 0):
        for each in (one, two):
            each.turn_to(number)
            assert values.setdefault(number, each(TEXT)) == each(TEXT)
    assert len({value["objective"] for value in values.values()}) == 3
    assert objective(model, layout, likely, z)(TEXT) == values[0]
    assert other(TEXT) != values[0]


def test_a_text_that_nothing_stands_before_counts_from_its_second_token(
    model: FrozenModel, z: Any, likely: list[Example]
) -> None:
    bare = Layout((), (3, 4))
    found = objective(model, bare, likely, z)(TEXT)
    with torch.no_grad():
        p = torch.softmax(model.model(torch.tensor([TEXT])).logits[0].double(), dim=1)
    wanted = -np.mean([math.log(p[i, t]) for i, t in enumerate(TEXT[1:])])
    assert found["fluency"] == pytest.approx(wanted, rel=CLOSE)
    assert objective(model, bare, likely, z)(TEXT[:1])["fluency"] == 0.0
