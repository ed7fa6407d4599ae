"""What the stages of an optimization train on, score, try and choose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from optimize_runs import Asked, optimize

from acd_local import pairs
from acd_local.optimize import anchor_sets, context, prompt_tokens, trial
from acd_local.optimize.checkpoint import Checkpoint
from acd_local.optimize.context import scored_groups
from acd_local.optimize.soft_training import SoftSettings, Validation
from acd_local.optimize.stages import soft_prompt, text_prompt
from acd_local.optimize.stages.soft_prompt import SCORES
from acd_local.optimize.stages.text_prompt import _Progress
from acd_local.runtime import llama
from acd_local.runtime.template import ChatTemplate, Message
from acd_local.tuning import anchors
from acd_local.tuning.anchors import builtin

pytestmark = pytest.mark.usefixtures("no_figures")  # those of pages: see test_report


@dataclass
class Trained:
    """What a stage gave its training or its search."""

    start: Any
    pairs: Any


def note_what_is_trained(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Trained], list[Trained]]:
    """Of the soft prompts, and of the texts; everything is made as ever."""

    trained: list[Trained] = []
    searched: list[Trained] = []

    class Training(soft_prompt.SoftTraining):
        def __init__(self, model: Any, layout: Any, start: Any, pairs: Any, *others: Any) -> None:
            trained.append(Trained(start, pairs))
            super().__init__(model, layout, start, pairs, *others)

    class Objective(text_prompt.TextObjective):
        def __init__(self, model: Any, layout: Any, teacher: Any, pairs: Any, *others: Any) -> None:
            searched.append(Trained(teacher, pairs))
            super().__init__(model, layout, teacher, pairs, *others)

    monkeypatch.setattr(soft_prompt, "SoftTraining", Training)
    monkeypatch.setattr(text_prompt, "TextObjective", Objective)
    return trained, searched


def test_what_the_prompts_are_trained_on(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both retain the same answers, the paper's D_S; refusals count whole for safeguarding prompts."""

    trained, searched = note_what_is_trained(monkeypatch)
    optimize(asked("mine.toml"))
    safe, adversarial = trained[0], trained[-1]
    assert not torch.equal(safe.start, adversarial.start)
    opening = SoftSettings().answer_tokens

    retained = adversarial.pairs["retain"]
    assert len(retained) > 0
    for mine, other in zip(retained, safe.pairs["retain"], strict=True):
        assert (mine.prompt, mine.answer) == (other.prompt, other.answer)
        assert torch.equal(mine.targets.tokens, other.targets.tokens)
        assert torch.equal(mine.targets.weights, other.targets.weights)

    def longest(found: Trained, term: str) -> int:
        return max((len(e.answer) for e in found.pairs.get(term, ())), default=0)

    assert longest(safe, "positive") > opening
    assert {longest(safe, "retain"), longest(adversarial, "negative")} == {opening}
    assert longest(searched[0], "positive") > text_prompt.TOKENS
    assert {longest(searched[0], "retain"), longest(searched[-1], "negative")} == {text_prompt.TOKENS}


def test_every_text_is_scored_by_llama_cpp_and_the_best_again(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that were tried on few instructions, and a shortlist of them on more."""

    score, scored = context.score, []

    def noted(scoring: Any, safe_text: Any, text: str, most: int) -> dict[str, float]:
        found = score(scoring, safe_text, text, most)
        scored.append((safe_text, text, most, found))
        return found

    monkeypatch.setattr(context, "score", noted)
    monkeypatch.setattr(text_prompt, "SHORTLIST", 6)
    monkeypatch.setattr(text_prompt, "FINALISTS", 3)
    optimize(asked("mine.toml"))
    for stage, safe_text in (("text-safe", None), ("text-adversarial", pairs.load(tmp_path / "mine.toml").safe)):
        (path,) = (tmp_path / "cache").glob(f"optimize/*/{stage}-*.pt")
        result = torch.load(path, weights_only=True)["result"]
        tried = result["tried"]
        mine = [(text, most, found) for safe, text, most, found in scored if safe == safe_text]
        few, again = (
            [(text, found) for text, n, found in mine if n == most] for most in (text_prompt.SCORED, text_prompt.AGAIN)
        )
        few, again = few[1:], again[1:]  # without what was timed
        assert few == [(c["text"], c["scores"]) for c in tried]
        texts = {c["text"] for c in tried}
        assert len(texts) > 6
        assert len(again) == len({text for text, _ in again}) == 6
        assert {text for text, _ in again} <= texts
        assert (result["text"], result["scores"]) in again
        assert len(result["finals"]) == 3


@pytest.mark.parametrize(("gain", "kept"), [(0.09, True), (0.11, False)])
def test_a_text_has_to_do_clearly_better_in_its_trial_than_the_manual_one(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gain: float, kept: bool
) -> None:
    def pretended(engine: Any, pair: pairs.PromptPair, groups: Any, **given: Any) -> trial.Trial:
        manual = pairs.find("default")
        new = (pair.safe != manual.safe) + (pair.adversarial != manual.adversarial)
        return trial.Trial(0.3 + gain * new, 0.0, 0.0, 0.1)

    monkeypatch.setattr(trial, "run", pretended)
    optimize(asked())
    found = pairs.load(tmp_path / "a.toml")
    assert (found.safe == pairs.find("default").safe) == kept
    assert (found.provenance["texts"]["safe"]["origin"] == "manual") == kept  # type: ignore[index]


def test_what_plans_a_search_is_not_kept_before_the_plan(tmp_path: Path) -> None:
    """It is timed: found done by a second sitting it would take no time, and the search would be too long."""

    checkpoint = Checkpoint(tmp_path, "text-safe", {})
    progress = _Progress(checkpoint)
    assert progress.score_again(["a text"], lambda texts, most: [{"safety": 0.5} for _ in texts]) == [{"safety": 0.5}]
    assert not checkpoint.path.exists()
    checkpoint.counts = {"rounds": 1, "steps": 2}
    progress.keep()
    assert _Progress(Checkpoint(tmp_path, "text-safe", {})).scores == {"a text": {"safety": 0.5}}


def test_without_complying_answers_to_validate_on_the_adversarial_prompt_is_what_refuses_least() -> None:

    early, late = (Validation(safety, 0.1, 0.1, 0.0) for safety in (0.3, 0.1))
    assert SCORES["adversarial"](late) > SCORES["adversarial"](early)
    early, late = (Validation(0.3, 0.1, 0.1, nll) for nll in (1.5, 1.2))
    assert SCORES["adversarial"](late) > SCORES["adversarial"](early)


def test_the_first_instructions_that_validate_are_of_all_kinds() -> None:
    """What is tried in answers are the first few, and files have their instructions by category."""

    instructions = builtin()
    categories = {i.prompt: i.category for i in instructions}
    groups = scored_groups(instructions)
    for name, most in trial.COUNTS.items():
        group = groups[name]
        seen, everything = ({categories[p] for p in part} for part in (group[:most], group))
        assert len(seen) >= 0.6 * min(most, len(everything)), name


def test_a_template_that_asks_otherwise_without_a_system_prompt_has_no_beginning_for_it(
    asked: Asked, tiny: Callable[..., Path]
) -> None:
    """Answers that were sampled so are then trained on as they were drawn."""

    system = "{% if messages[0]['role'] == 'system' %}"
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
        + system
        + "{{ '<|im_start|>assistant\n' }}{% else %}{{ '<|im_start|>assistant: ' }}{% endif %}"
    )
    model = tiny("chatml", chat_template=template)
    found = prompt_tokens.read(model, pairs.find("default"), anchors.read(asked.anchors))
    assert set(found.beginnings) == {"safe", "opposite"}


def test_texts_stand_where_the_template_puts_them(asked: Asked) -> None:

    instructions, manual = anchors.read(asked.anchors), pairs.find("default")
    found = prompt_tokens.read(asked.model, manual, instructions)
    with llama.Model(asked.model) as opened:
        template = ChatTemplate(opened)
        for i in instructions:
            ids = template.encode([Message("system", manual.safe), Message("user", i.prompt)])
            around = *found.layout.before, *found.manual["safe"], *found.layout.after, *found.tails[i.id]
            assert list(around) == ids
            assert len(ids) + anchor_sets.TOKENS < found.context
            bare = template.encode([Message("user", i.prompt)])
            opposite = manual.adversarial.reveal_for_negative_stream()
            swapped = template.encode([Message("system", opposite), Message("user", i.prompt)])
            for name, whole in (("safe", ids), ("opposite", swapped), ("none", bare)):
                assert [*found.beginnings[name], *found.tails[i.id]] == whole
        assert opened.vocab.is_eog(found.end)
    written = {anchor_sets.refusal_for(i) for i in instructions if i.kind == "harmful"}
    assert set(found.refusals) == written
