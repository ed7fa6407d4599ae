"""Layout, text space, refusal openings and llama.cpp's scores: torch and llama.cpp see the same tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optimizing import USERS, Side, frozen, torch
from reference import contrast_by_hand

from acd_local import models
from acd_local.errors import AcdError, ContextError
from acd_local.evaluate.likelihood import Scorer
from acd_local.optimize.prompt_tokens import lay_out
from acd_local.optimize.soft_training import refusal_probabilities
from acd_local.optimize.stages.contrast import choose, shortlist
from acd_local.optimize.weights import Example, FrozenModel, Prefix
from acd_local.pairs import AdversarialText, PromptPair
from acd_local.runtime import llama
from acd_local.runtime.template import ChatTemplate, Message
from acd_local.softpair import SoftPrompt
from acd_local.tuning.openings import OPENINGS, SPINES, Openings, Spine, answer_tokens
from acd_local.tuning.scoring import GROUPS, ContrastScore, OpeningScorer

FAMILIES = ("chatml", "qwen3", "llama3", "gemma", "mistral", "llama2", "phi3", "zephyr", "openassistant")
TEXTS = ("You are kind.", "Help me.\nAlways refuse <b>that</b>.", "Please answer the question")
# A probability of about 0.2 from logits that differ by up to 0.03 (llama.cpp keeps keys and values in f16).
TORCH_TOLERANCE = 0.01
# Openings whose tokens a tiny random model gives now and then: those of a real one it never gives.
TINY = Openings(
    (
        Spine((7, 30), 0, (tuple(range(8, 60)), tuple(range(45, 90)), (5, *range(100, 200)))),
        Spine((7, 44, 9), 2, (tuple(range(20, 120)), tuple(range(300)))),
    )
)


@pytest.fixture(scope="module")
def sides(tiny: Callable[..., Path]) -> Iterator[Callable[[str], Side]]:
    made: dict[str, Side] = {}

    def make(family: str) -> Side:
        if family not in made:
            made[family] = Side(tiny(family))
        return made[family]

    yield make
    for side in made.values():
        side.model.close()


@pytest.fixture(scope="module")
def side(sides: Callable[[str], Side]) -> Side:
    return sides("chatml")


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> FrozenModel:
    return frozen(tiny("chatml"))


# -- layout ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_stands_where_the_layout_says(sides: Callable[[str], Side], family: str) -> None:
    side = sides(family)
    for text in TEXTS:
        tokens = side.space.tokens(text)
        assert tokens is not None
        assert side.space.text(tokens) == text
        for user, tail in zip(side.users, side.tails, strict=True):
            assert side.conversation(text, user) == [*side.layout.before, *tokens, *side.layout.after, *tail]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_stand_where_the_layout_says(sides: Callable[[str], Side], family: str) -> None:
    side = sides(family)
    for user, tail in zip(side.users, side.tails, strict=True):
        wanted = [*side.layout.before, -1, -2, *side.layout.after, *tail]
        assert side.template.encode([Message("user", user)], rows=(-1, -2)) == wanted


def test_the_shared_part_is_as_long_as_can_be(side: Side) -> None:
    """Of texts that begin alike, nothing of the texts is taken for the template; and no tail is empty."""
    layout, tails = lay_out(side.template, ["Say red", "Say blue", "Say red"])
    assert layout.before == side.layout.before
    assert layout.after == (*side.layout.after, *side.vocab.tokenize("\n", parse_special=False))
    assert tails[0] == tails[2] != tails[1]
    assert side.space.text(tails[0]).startswith("Say red")
    assert all(tails) and all(lay_out(side.template, [""])[1])


def test_the_layouts_rows_are_embeddings_around_z(side: Side, model: FrozenModel) -> None:
    z = torch.randn(3, model.width)
    rows = side.layout.rows(model, z)
    first = len(side.layout.before)
    assert torch.equal(rows[first : first + 3], z)
    assert torch.equal(rows[:first], model.embed(side.layout.before))
    assert torch.equal(rows[first + 3 :], model.embed(side.layout.after))


# -- text space --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma", "phi3"])
def test_a_text_may_be_changed_to_printable_ascii_alone(sides: Callable[[str], Side], family: str) -> None:
    side = sides(family)
    assert side.space.allowed.shape == (side.vocab.n_tokens,)
    for token in range(side.vocab.n_tokens):
        text = side.vocab.piece(token)
        control = side.vocab.attr(token) & (llama.ATTR_CONTROL | llama.ATTR_UNKNOWN)
        plain = bool(text) and all(32 <= byte < 127 or byte == 10 for byte in text)
        assert bool(side.space.allowed[token]) == (plain and not control), (token, text)
    assert not side.space.allowed[side.vocab.eos]
    assert 0 < int(side.space.allowed.sum()) < side.vocab.n_tokens


def words(side: Side, text: str) -> tuple[int, ...]:
    return tuple(side.vocab.tokenize(text, parse_special=False))


def test_a_stable_text_gives_its_tokens_back(side: Side) -> None:
    space = side.space
    for text in TEXTS:
        tokens = words(side, text)
        assert space.is_stable(tokens)
        assert space.tokens(text) == tokens
        assert space.tokens(space.text(tokens)) == tokens
    assert space.tokens("<|im_end|> is no token here") is not None
    assert not set(space.tokens("<|im_end|>") or ()) & {side.vocab.eos, side.vocab.bos}


def test_what_is_not_stable(side: Side) -> None:
    space, kind = side.space, words(side, "You are kind.")
    spelled = tuple(t for char in "You are kind." for t in words(side, char))
    wide = words(side, "é")
    assert len(spelled) > len(kind)
    assert space.text(spelled) == space.text(kind)
    for wrong in (
        (),
        spelled,  # the same text in other tokens
        (*kind, side.vocab.eos),
        (side.vocab.bos, *kind),
        words(side, " You are kind."),
        words(side, "You are kind. "),
        words(side, "You are kind.\n"),
        words(side, "\nYou"),
        words(side, " "),
        wide[:1],  # half a character
        (*kind, *wide[:1]),
    ):
        assert not space.is_stable(wrong), wrong
    assert space.is_stable(kind)
    for text in ("", " ", " You", "You ", "You\n"):
        assert space.tokens(text) is None


@pytest.mark.parametrize("family", ["llama3", "gemma", "phi3", "mistral"])
def test_a_text_that_the_template_trims_is_refused(sides: Callable[[str], Side], family: str) -> None:
    for text in ("You are kind. ", " You are kind.", "\nYou", "You\n\n"):
        assert sides(family).space.tokens(text) is None


def test_a_stable_text_survives_a_pair_file(side: Side) -> None:
    """What the file's reader would change or refuse is not stable."""
    rng, allowed = np.random.default_rng(0), side.space.allowed.nonzero()[:, 0].tolist()
    stable = [t for t in (tuple(map(int, rng.choice(allowed, 3))) for _ in range(300)) if side.space.is_stable(t)]
    assert len(stable) > 20
    for tokens in stable:
        text = side.space.text(tokens)
        assert PromptPair("x", text, AdversarialText("other")).safe == text
        assert words(side, text) == tokens


# -- openings ----------------------------------------------------------------------------------------------------------


def conditional(vocab_size: int, context: Sequence[int], seed: int = 1) -> np.ndarray:
    """Made-up next-token log probabilities that depend on all of the context."""
    logits = np.random.default_rng([seed, len(context), *context]).normal(0, 4, vocab_size)
    result: np.ndarray = logits - np.log(np.exp(logits).sum())
    return result


def rows_of(openings: Openings, vocab_size: int, seed: int = 1) -> np.ndarray:
    beginnings = [s.tokens[:d] for s in openings.spines for d in range(s.shared, len(s.tokens) + 1)]
    return np.stack([conditional(vocab_size, b, seed) for b in beginnings])


def check_openings(vocab: llama.Vocab, tokenize: Callable[[str], Sequence[int]]) -> list[str]:
    """Compare with adding up the openings one by one; returns those that count."""
    openings = Openings.of(tokenize)
    paths = [tuple(tokenize(text)) for text in SPINES]
    beginnings = {path[:d] for path in paths for d in range(len(path))}
    counted, total = [], 0.0
    for text in OPENINGS:
        tokens = tuple(tokenize(text))
        if tokens[:-1] in beginnings:  # leaves a spine with its last token
            counted.append(text)
            chain = (conditional(vocab.n_tokens, tokens[:i])[token] for i, token in enumerate(tokens))
            total += math.exp(sum(chain))
    assert openings.probability(rows_of(openings, vocab.n_tokens)) == pytest.approx(total, rel=1e-9)
    assert [s.tokens for s in openings.spines] == [path[:-1] for path in paths]
    leaves = [
        b"".join(map(vocab.piece, (*spine.tokens[:d], leaf))).decode().strip()
        for spine in openings.spines
        for d, branch in enumerate(spine.branches, start=spine.shared)
        for leaf in branch
    ]
    assert sorted(leaves) == sorted(counted)
    return counted


def test_openings_of_the_demo_model() -> None:
    try:
        path = models.resolve("demo")
    except AcdError:
        pytest.skip("the demo model is not installed")
    with llama.Model(path, gpu_layers=0) as model:
        tokenize = partial(answer_tokens, ChatTemplate(model), model.vocab)
        counted = check_openings(model.vocab, tokenize)
        assert {"I'm sorry", "I'm unable", "I cannot", "I can't", "I won", "Sorry", "Unfortunately"} <= set(counted)


@pytest.mark.parametrize("family", ["chatml", "gemma", "llama2"])
def test_openings_of_a_small_vocabulary(sides: Callable[[str], Side], family: str) -> None:
    """Words of many tokens leave the spines before their last one: they do not count."""
    side = sides(family)
    counted = check_openings(side.vocab, partial(answer_tokens, side.template, side.vocab))
    assert {"I'm sorry", "I can't"} <= set(counted)


TABLE = {
    "I'm sorry": (1, 2, 3),
    "I'm unable": (1, 2, 4),
    "I cannot": (1, 5),
    "I can't": (1, 11, 12),
    "I can’t": (1, 11, 13),
    "I can’": (1, 11, 0),
    "I won": (1, 6, 7),  # leaves the spines before its last token
    "Sorry": (8,),
    "Unfortunately": (9, 10),
}


def test_openings_by_hand() -> None:
    found = Openings.of(TABLE.__getitem__)
    assert found == Openings((Spine((1, 2), 0, ((8,), (5,), (3, 4))), Spine((1, 11), 2, ((0, 12, 13),))))
    table = np.zeros((4, 14))
    table[0, [1, 8]] = 0.5, 0.25
    table[1, [2, 5, 11]] = 0.5, 0.1, 0.25
    table[2, [3, 4]] = 0.2, 0.3
    table[3, [12, 13]] = 0.3, 0.5
    with np.errstate(divide="ignore"):
        rows = np.log(table)
    wanted = 0.25 + 0.5 * 0.1 + 0.5 * 0.5 * 0.5 + 0.5 * 0.25 * 0.8
    assert found.probability(rows) == pytest.approx(wanted)


def test_a_spine_without_a_beginning_of_its_own_is_not_decoded() -> None:
    found = Openings.of((TABLE | {"I can't": (1, 11), "I can’t": (1, 2, 13), "I can’": (7,)}).__getitem__)
    assert found == Openings((Spine((1, 2), 0, ((7, 8), (5, 11), (3, 4, 13))),))


@pytest.mark.parametrize("seed", range(5))
def test_the_probability_is_that_of_all_answers_with_such_an_opening(seed: int) -> None:
    """Against all answers of three tokens of a small vocabulary."""
    found, size = Openings.of(TABLE.__getitem__), 14
    starts = {TABLE[text] for text in OPENINGS} - {TABLE["I won"], TABLE["Unfortunately"]}
    first = np.exp(conditional(size, (), seed))
    second = np.exp([conditional(size, (a,), seed) for a in range(size)])
    wanted = 0.0
    for a, b in itertools.product(range(size), repeat=2):
        third = np.exp(conditional(size, (a, b), seed))
        refusals = [c for c in range(size) if any((a, b, c)[: len(s)] == s for s in starts)]
        wanted += first[a] * second[a, b] * third[refusals].sum()
    assert found.probability(rows_of(found, size, seed)) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answers_tokens_are_those_behind_the_template(sides: Callable[[str], Side], family: str) -> None:
    """As the model would have to say them: behind a line break SentencePiece puts no space of its own."""
    side = sides(family)
    asked = side.template.encode([Message("user", "a")])
    for text in (*OPENINGS, "water and wine."):
        tokens = answer_tokens(side.template, side.vocab, text)
        written = b"".join(map(side.vocab.piece, tokens)).decode()
        # Two templates write a space there, and behind Phi-3's markers line breaks are dropped.
        space = " " if family in ("mistral", "llama2", "phi3") else ""
        assert written == space + text
        # Qwen3's newest answer alone has thoughts; llama.cpp adds a space to the one that Mistral's template writes.
        if family not in ("qwen3", "mistral"):
            turns = [Message("user", "a"), Message("assistant", text), Message("user", "c")]
            assert side.template.encode(turns)[: len(asked) + len(tokens)] == [*asked, *tokens]


# -- scores ------------------------------------------------------------------------------------------------------------

SAFE, OTHER = "You are kind.", "All water is red wine"
QUESTIONS = {"safety": USERS[:3], "over_refusal": USERS[3:5], "lookalike": USERS[5:]}


@pytest.fixture(scope="module")
def scorer(side: Side) -> Iterator[OpeningScorer]:
    found = OpeningScorer(side.model, side.template, TINY, QUESTIONS, n_ctx=256, threads=1)
    yield found
    found.close()


def in_torch(model: FrozenModel, side: Side, z: Any) -> dict[str, float]:
    with torch.no_grad():
        prefix = model.prefix(side.layout.rows(model, z))
        sampled = dict(zip(USERS, refusal_probabilities(model, prefix, side.tails, TINY), strict=True))
        greedy = {user: greedily(model, prefix, tail) for user, tail in zip(USERS, side.tails, strict=True)}
        both = refusal_probabilities(model, prefix, side.tails, TINY, greedy=True)
    assert both == pytest.approx([(sampled[user] + greedy[user]) / 2 for user in USERS])
    return {g: float(np.mean([(sampled[u] + greedy[u]) / 2 for u in users])) for g, users in QUESTIONS.items()}


def greedily(model: FrozenModel, prefix: Prefix, tail: tuple[int, ...]) -> float:
    """1 where a greedy answer opens as a refusal, token by token."""
    answer: tuple[int, ...] = ()
    while True:
        token = int(model.answer_logits(prefix, [Example(tail, (*answer, 0))])[-1].argmax())
        spines = [s for s in TINY.spines if s.tokens[: len(answer)] == answer]
        if any(len(answer) >= s.shared and token in s.branches[len(answer) - s.shared] for s in spines):
            return 1.0
        answer = (*answer, token)
        if not any(s.tokens[: len(answer)] == answer for s in TINY.spines):
            return 0.0


def test_llama_and_torch_agree_on_texts_and_rows(side: Side, model: FrozenModel, scorer: OpeningScorer) -> None:
    rows = SoftPrompt(np.random.default_rng(1).normal(0, 1, (6, model.width)).astype(np.float32))
    seen = []
    for prompt, z in (
        (SAFE, model.embed(words(side, SAFE))),
        (OTHER, model.embed(words(side, OTHER))),
        (rows, torch.tensor(rows.rows)),
        (SoftPrompt(model.embed(words(side, SAFE)).numpy()), model.embed(words(side, SAFE))),
    ):
        found, wanted = scorer.alone(prompt), in_torch(model, side, z)
        assert found == pytest.approx(wanted, abs=TORCH_TOLERANCE)
        seen += list(wanted.values())
    assert 0.01 < min(seen) < max(seen) < 0.95
    assert max(seen) - min(seen) > 10 * TORCH_TOLERANCE


def test_no_contrast_is_the_prompt_alone(scorer: OpeningScorer) -> None:
    alone = scorer.alone(SAFE)
    (row,) = scorer.contrasted(SAFE, OTHER, [(0.0, 0.0)])
    assert {name: getattr(row, name) for name in GROUPS} == pytest.approx(alone, abs=TORCH_TOLERANCE)
    assert (row.alpha, row.beta) == (0.0, 0.0)


def by_hand(raw: Scorer, ids: list[list[int]], spine: Spine, alpha: float, beta: float) -> float:
    """P(one of a spine's own leaves), from the whole spine, the mean of sampled and greedy answers."""
    pieces = [logits.copy() for _, logits in raw.logits(ids, (*spine.tokens, 0))]
    safe, adversarial = np.concatenate(pieces, axis=1)
    found, reached, greedy = 0.0, 1.0, True
    for depth in range(len(spine.tokens) + 1):
        scores = contrast_by_hand(safe[depth].tolist(), adversarial[depth].tolist(), alpha, beta, set())
        top = max(scores.values())
        total = sum(math.exp(s - top) for s in scores.values())
        p = {t: math.exp(s - top) / total for t, s in scores.items()}
        if depth >= spine.shared:
            leaves = spine.branches[depth - spine.shared]
            found += reached * sum(p.get(t, 0.0) for t in leaves) / 2
            found += 0.5 * (greedy and max(p, key=p.__getitem__) in leaves)
        if depth < len(spine.tokens):
            reached *= p.get(spine.tokens[depth], 0.0)
            greedy = greedy and max(p, key=p.__getitem__) == spine.tokens[depth]
    return found


def test_contrasted_scores_by_hand(side: Side) -> None:
    grid = [(0.0, 0.0), (0.5, 0.0), (0.5, 0.1), (1.0, 0.3)]
    wanted = np.zeros((len(grid), len(GROUPS)))
    with Scorer(side.model, n_streams=2, n_ctx=256, threads=1) as raw:
        for g, group in enumerate(GROUPS):
            for user in QUESTIONS[group]:
                ids = [side.conversation(text, user) for text in (SAFE, OTHER)]
                for i, (alpha, beta) in enumerate(grid):
                    for spine in TINY.spines:
                        wanted[i, g] += by_hand(raw, ids, spine, alpha, beta) / len(QUESTIONS[group])
    scorer = OpeningScorer(side.model, side.template, TINY, QUESTIONS, n_ctx=256, threads=1)
    try:
        rows = scorer.contrasted(SAFE, OTHER, grid)
    finally:
        scorer.close()
    assert [(r.alpha, r.beta) for r in rows] == grid
    found = np.array([[getattr(r, name) for name in GROUPS] for r in rows])
    assert found == pytest.approx(wanted, abs=1e-5)
    assert np.abs(found[0] - found[1]).max() > 0.01 < np.abs(found[1] - found[2]).max()


def test_what_the_safeguarding_prompt_does_is_computed_once_for_a_search(
    side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On few questions: what comes of them is the same as where both prompts are decoded together."""
    asked: list[tuple[str, str]] = []
    logits = OpeningScorer._logits

    def noted(self: OpeningScorer, prompts: Sequence[Any], users: Sequence[str]) -> Iterator[Any]:
        asked.extend((prompt, user) for prompt in prompts for user in users)
        return logits(self, prompts, users)

    monkeypatch.setattr(OpeningScorer, "_logits", noted)
    scorer = OpeningScorer(side.model, side.template, TINY, QUESTIONS, n_ctx=256, threads=1)
    count, many = sum(map(len, QUESTIONS.values())), max(map(len, QUESTIONS.values()))
    try:
        for safe, other, computed in ((SAFE, OTHER, count), (SAFE, "Help me.", 0), (OTHER, SAFE, count)):
            asked.clear()
            (few,) = scorer.contrasted(safe, other, [(0.5, 0.1)], many)
            assert [prompt for prompt, _ in asked].count(safe) == computed
            assert [prompt for prompt, _ in asked].count(other) == count
            (whole,) = scorer.contrasted(safe, other, [(0.5, 0.1)])
            for name in GROUPS:
                assert getattr(few, name) == pytest.approx(getattr(whole, name), abs=TORCH_TOLERANCE)
    finally:
        scorer.close()


def test_the_order_of_questions_does_not_matter(side: Side, scorer: OpeningScorer) -> None:
    """What one question left in the caches is not seen by the next."""
    turned = {name: tuple(reversed(QUESTIONS[name])) for name in reversed(GROUPS)}
    other = OpeningScorer(side.model, side.template, TINY, turned, n_ctx=256, threads=1)
    try:
        assert other.alone(SAFE) == pytest.approx(scorer.alone(SAFE), abs=TORCH_TOLERANCE)
    finally:
        other.close()


def test_a_group_may_be_empty_and_a_question_too_long(side: Side) -> None:
    groups = {"safety": ("red",), "over_refusal": (), "lookalike": ()}
    found = OpeningScorer(side.model, side.template, TINY, groups, n_ctx=256, threads=1)
    try:
        assert found.alone(SAFE)["lookalike"] == 0.0
        (row,) = found.contrasted(SAFE, OTHER, [(0.5, 0.1)])
        assert (row.over_refusal, row.lookalike) == (0.0, 0.0)
        with pytest.raises(ContextError):
            found.alone("red " * 300)
    finally:
        found.close()


USUAL = (0.5, 0.1)


def setting(alpha: float, beta: float, safety: float, harmless: float = 0.0, **more: float) -> ContrastScore:
    return ContrastScore(safety, harmless, harmless / 2, alpha, beta, **more)


def test_the_best_setting_is_chosen_with_the_least_contrast() -> None:
    assert setting(0, 0, 0.9, 0.2).value == pytest.approx(0.9 - 0.15)
    best = setting(0.8, 0.1, 0.95)
    assert choose([setting(0.1, 0.1, 0.5), best, setting(0.4, 0.1, 0.9)], USUAL) is best
    assert choose([best, setting(0.2, 0.05, 0.99, 0.4)], USUAL) is best
    close = setting(0.3, 0.1, 0.945)
    assert choose([best, setting(0.4, 0.1, 0.945), close], USUAL) is close
    tie = setting(0.3, 0.3, 0.941)
    assert choose([best, close, tie, setting(0.3, 0.2, 0.95)], USUAL) is tie
    assert choose([setting(0.1, 0.3, 0.939), best], USUAL) is best


def test_of_equals_the_usual_setting_is_chosen() -> None:
    usual = setting(0.5, 0.1, 0.942)
    assert choose([setting(0.1, 0.1, 0.95), usual], USUAL) is usual
    assert choose([setting(0.1, 0.1, 0.96), usual], USUAL).alpha == 0.1


def test_broken_answers_count_against_a_setting() -> None:
    broken, whole = setting(0.8, 0.05, 0.95, degenerate=0.2), setting(0.3, 0.1, 0.8, degenerate=0.0)
    assert choose([broken, whole], USUAL) is whole
    assert broken.value == pytest.approx(0.75)


def test_greedy_answers_count_as_much_as_openings() -> None:
    opening, refusing = setting(0.8, 0.05, 0.95, greedy=0.3), setting(0.3, 0.1, 0.8, greedy=0.6)
    assert choose([opening, refusing], USUAL) is refusing
    assert replace(refusing, degenerate=0.1).value == pytest.approx((0.8 + 0.6) / 2 - 0.1)


def test_the_best_of_a_few_alphas_and_the_usual_setting_are_tried() -> None:
    rows = [setting(a / 10, b / 10, a / 10 + b / 100) for a in range(7) for b in (1, 2)]
    found = [(r.alpha, r.beta) for r in shortlist(rows, USUAL)]
    assert found == [(0.6, 0.2), (0.5, 0.2), (0.4, 0.2), (0.3, 0.2), (0.5, 0.1)]
    assert len(shortlist(rows, (0.4, 0.2))) == 4
