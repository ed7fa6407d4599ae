"""The model's own answers to the instructions."""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from acd_local import Engine, Options
from acd_local.errors import UsageError
from acd_local.evaluate import refusal
from acd_local.optimize import anchor_sets
from acd_local.optimize.anchor_sets import (
    PROMPTS,
    TOKENS,
    collect,
)
from acd_local.optimize.stages.anchors import AnswerCache, sample, tasks
from acd_local.pairs import AdversarialText, PromptPair
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.prompts import PromptSetup
from acd_local.tuning.anchors import Instruction, builtin

# -- what is answered under which prompt -------------------------------------------------------------------------------


def test_harmful_ones_are_answered_under_all_prompts_harmless_ones_under_one() -> None:
    found = builtin()
    work = tasks(found)
    counts = Counter((i.id, i.kind) for i, _ in work)
    assert {n for (_, kind), n in counts.items() if kind == "harmful"} == {3}
    assert {n for (_, kind), n in counts.items() if kind == "harmless"} == {1}
    assert len(counts) == len(found)
    assert len({(i.id, under) for i, under in work}) == len(work)
    per_prompt = Counter(under for i, under in work if i.kind == "harmless")
    assert set(per_prompt) == set(PROMPTS)
    assert min(per_prompt.values()) > 0.25 * sum(per_prompt.values())
    assert tasks(found) == work


# -- sampling ----------------------------------------------------------------------------------------------------------

MANUAL = PromptPair("manual", "You are kind.", AdversarialText("All water is red wine"))
INSTRUCTIONS = [
    *(Instruction(f"Is this red wine {n}?", "harmful", "fraud-and-scams") for n in range(3)),
    *(Instruction(f"What is water {n}?", "harmless", "facts") for n in range(6)),
]


@pytest.fixture(scope="module")
def engine(tiny: Callable[..., Path]) -> Iterator[Engine]:
    with Engine(tiny("chatml"), pair=MANUAL, ctx_size=256, conversations=3, threads=1) as engine:
        yield engine


class Sampling:
    def __init__(self, engine: Engine, path: Path, *, seed: int = 0, stop_at: int | None = None) -> None:
        self.engine, self.path, self.seed = engine, path, seed
        self.stop, self.stop_at = CancelToken(), stop_at
        self.progress: list[int] = []

    def on_progress(self, done: int) -> None:
        self.progress.append(done)
        if done == self.stop_at:
            self.stop.set()

    def go(self) -> bool:
        return sample(
            self.engine,
            MANUAL,
            tasks(INSTRUCTIONS),
            AnswerCache(self.path),
            seed=self.seed,
            stop=self.stop,
            on_progress=self.on_progress,
        )

    @property
    def records(self) -> dict[tuple[str, str], dict[str, Any]]:
        found = [json.loads(line) for line in self.path.read_text().splitlines()]
        keyed = {(r["id"], r["under"]): r for r in found}
        assert len(keyed) == len(found)
        return keyed


@pytest.fixture(scope="module")
def sampled(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Sampling:
    run = Sampling(engine, tmp_path_factory.mktemp("answers") / "answers.jsonl")
    assert run.go()
    return run


def test_every_task_is_answered_within_the_limit(sampled: Sampling, engine: Engine) -> None:
    records = sampled.records
    assert set(records) == {(i.id, under) for i, under in tasks(INSTRUCTIONS)}
    assert sampled.progress == list(range(1, 16))
    for record in records.values():
        assert set(record) == {"id", "under", "label", "answer", "matcher"}
        assert record["label"] in ("refusal", "answer", "degenerate")
        assert 0 < len(record["answer"]) <= TOKENS
        assert all(isinstance(token, int) and 0 <= token < engine.vocab.n_tokens for token in record["answer"])
    assert max(len(r["answer"]) for r in records.values()) == TOKENS == 64


def test_the_seed_repeats_the_answers(sampled: Sampling, engine: Engine, tmp_path: Path) -> None:
    again, other = (Sampling(engine, tmp_path / f"{seed}.jsonl", seed=seed) for seed in (0, 1))
    assert again.go()
    assert again.records == sampled.records
    assert other.go()
    same = sum(other.records[key] == record for key, record in sampled.records.items())
    assert same < 3


def test_sampling_goes_on_where_it_was(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchor_sets, "TOKENS", 6)
    first = Sampling(engine, tmp_path / "a.jsonl", stop_at=5)
    assert not first.go()
    kept = first.records
    assert 5 <= len(kept) < 15
    with first.path.open("ab") as file:  # a crash in the middle of a line
        file.write(b'{"id": "half')
    second = Sampling(engine, first.path)
    assert second.go()
    assert second.progress[0] == len(kept) + 1
    assert len(second.records) == 15
    assert {key: second.records[key] for key in kept} == kept
    assert max(len(r["answer"]) for r in second.records.values()) == 6
    third = Sampling(engine, first.path)
    assert third.go()
    assert third.progress == []


def test_an_answer_whose_line_was_cut_is_made_again(sampled: Sampling, engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_bytes(sampled.path.read_bytes()[:-20])
    run = Sampling(engine, path)
    assert run.go()
    assert run.progress == [15]
    assert set(run.records) == set(sampled.records)


def test_what_is_stopped_before_it_began_answers_nothing(engine: Engine, tmp_path: Path) -> None:
    run = Sampling(engine, tmp_path / "a.jsonl")
    run.stop.set()
    assert not run.go()
    assert run.records == {}


def test_the_opposite_prompt_leads_an_answer_here_alone(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text is the positive prompt under "opposite", and nowhere else; outside of anchors it cannot be one."""
    seen: dict[tuple[str, str], list[object]] = {}
    generate = engine.generate

    def watched(prompt: str, options: Options, *, pair: PromptPair, prompt_setup: PromptSetup, **more: Any) -> Any:
        seen.setdefault((prompt, str(prompt_setup.positive)), []).append((prompt_setup.negative, options.temp))
        return generate(prompt, options, pair=pair, prompt_setup=prompt_setup, **more)

    monkeypatch.setattr(anchor_sets, "TOKENS", 2)
    monkeypatch.setattr(engine, "generate", watched)
    assert Sampling(engine, tmp_path / "a.jsonl").go()
    positives = {"safe": MANUAL.safe, "opposite": "All water is red wine", "none": "None"}
    assert set(seen) == {(i.prompt, positives[under]) for i, under in tasks(INSTRUCTIONS)}
    with pytest.raises(UsageError):
        generate("Hi", Options(max_tokens=2), prompt_setup=PromptSetup(MANUAL.adversarial, None)).run()  # type: ignore[arg-type]
    # Trials answer too, from pairs, whose adversarial half no prompt setup takes as the positive one.
    answering = {"PromptSetup", "generate", "Chat", "chat"}
    allowed = {"anchors.py": answering, "trial.py": {"generate"}}
    for path in sorted((ROOT / "acd_local" / "optimize").rglob("*.py")):
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        called = [(c, c.func.id if isinstance(c.func, ast.Name) else getattr(c.func, "attr", "")) for c in calls]
        assert {name for _, name in called} & answering <= allowed.get(path.name, set()), path.name


def test_no_answers_text_is_kept_shown_or_given_back(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = []
    classify = refusal.classify

    def watched(answer: str, *given: Any, **more: Any) -> Any:
        texts.append(answer)
        return classify(answer, *given, **more)

    monkeypatch.setattr(refusal, "classify", watched)
    monkeypatch.setattr(anchor_sets, "TOKENS", 12)
    run = Sampling(engine, tmp_path / "a.jsonl")
    assert run.go() is True
    assert capfd.readouterr() == ("", "")
    assert len(texts) == 15
    written = run.path.read_text()
    assert not [text for text in texts if len(text) > 8 and (text in written or json.dumps(text)[1:-1] in written)]
    assert run.path.stat().st_mode & 0o077 == 0
    cached = AnswerCache(run.path).records()
    assert all(isinstance(r["answer"], list) and set(map(type, r["answer"])) == {int} for r in cached)
    found = collect(INSTRUCTIONS, cached, lambda text: [1], end=2)
    for pair in (*found.refused, *found.complied, *found.answered):
        assert set(map(type, pair.answer)) == {int}


def test_nothing_in_the_optimizer_prints() -> None:
    for path in sorted((ROOT / "acd_local" / "optimize").rglob("*.py")):
        tree = ast.parse(path.read_text())
        called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert not called & {"print", "open_console"}, path.name
        read_from = {
            (n.value.id, n.attr)
            for n in ast.walk(tree)
            if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
        }
        assert not read_from & {("sys", "stdout"), ("sys", "stderr"), ("logging", "getLogger"), ("warnings", "warn")}
