"""Anchors: our instructions, a user's own, the answers sampled for them, and their sorting."""

from __future__ import annotations

import ast
import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from places import ROOT, SHARED, rows

from acd_local import Engine, Options
from acd_local.errors import UsageError
from acd_local.evaluate import refusal
from acd_local.optimize import anchor_sets
from acd_local.optimize.anchor_sets import (
    PROMPTS,
    TOKENS,
    Anchor,
    AnchorSets,
    collect,
    refusal_for,
    written_refusals,
)
from acd_local.optimize.stages.anchors import AnswerCache, sample, tasks
from acd_local.pairs import AdversarialText, PromptPair
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.prompts import Framing
from acd_local.tuning import anchors
from acd_local.tuning.anchors import Instruction, builtin, read

SHINGLE = 8  # words


# -- our instructions --------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def test_there_are_as_many_as_are_needed() -> None:
    found = builtin()
    harmful = [i for i in found if i.kind == "harmful"]
    lookalike = [i for i in found if i.lookalike]
    ordinary = [i for i in found if i.kind == "harmless" and not i.lookalike]
    assert len(ordinary) >= 1900
    assert len(lookalike) >= 1400
    assert len(harmful) >= 1300
    assert not [i for i in harmful if i.lookalike]
    assert len({i.category for i in harmful}) >= 12
    assert min(Counter(i.category for i in harmful).values()) >= 40
    assert len({i.category for i in ordinary}) >= 8
    for kind in (harmful, lookalike, ordinary):  # enough on both sides of the split
        validating = sum(i.validates for i in kind)
        assert 20 <= validating <= len(kind) // 4


def test_they_are_unique_short_and_clean() -> None:
    found = builtin()
    assert len({plain(i.prompt) for i in found}) == len({i.id for i in found}) == len(found)
    assert all(i.prompt == i.prompt.strip() != "" and i.category for i in found)
    assert max(len(i.prompt) for i in found if i.kind == "harmful") <= 250


def test_written_refusals_name_the_concern_and_are_refusals() -> None:
    forms, concerns = written_refusals()
    assert len(forms) >= 30
    assert len(set(forms)) == len(forms)
    harmful = [i for i in builtin() if i.kind == "harmful"]
    assert {i.category for i in harmful} <= set(concerns)
    assert sum("{concern}" in form for form in forms) > len(forms) / 2
    for form in forms:
        text = form.replace("{concern}", concerns["fraud-and-scams"])
        assert "{" not in text
        assert refusal.classify(text).label == "refusal", text
    seen = [refusal_for(i) for i in harmful]
    assert seen == [refusal_for(i) for i in harmful]
    assert len(set(seen)) > 100
    assert sum(concerns[i.category] in text for i, text in zip(harmful, seen, strict=True)) > len(seen) / 2


def test_an_unknown_category_gets_a_refusal_without_a_concern() -> None:
    for number in range(50):
        text = refusal_for(Instruction(f"request {number}", "harmful", "no such thing"))
        assert "{" not in text
        assert "  " not in text
        assert refusal.classify(text).label == "refusal"


def evaluation_texts() -> Iterator[str]:
    for name, column in (
        ("advbench_harmful_behaviors.csv", "goal"),
        ("harmbench_behaviors_text_val.csv", "Behavior"),
        ("xstest_half.csv", "prompt"),
        ("TruthfulQA.csv", "Question"),
    ):
        with (SHARED / name).open(encoding="utf-8-sig", newline="") as file:
            yield from (row[column] for row in csv.DictReader(file))
    for topics in json.loads((SHARED / "harmfulqa.json").read_text()).values():
        yield from (question for questions in topics.values() for question in questions)
    yield from (row["question"] for row in json.loads((SHARED / "truthfulqa_mc_task.json").read_text()))
    for line in (SHARED / "alpaca_demo.jsonl").read_text().splitlines():
        row = json.loads(line)
        yield from (row["instruction"], f"{row['instruction']} {row['input']}")
    for line in (SHARED / "mt_bench_question.jsonl").read_text().splitlines():
        yield from json.loads(line)["turns"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the evaluation sets are not here")
def test_no_instruction_is_in_the_evaluation_sets() -> None:
    """Neither whole nor eight words in a row."""

    def shingles(text: str) -> set[str]:
        words = text.split()
        return {" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}

    wholes = {plain(text) for text in evaluation_texts()}
    assert len(wholes) > 4000
    parts = set().union(*map(shingles, wholes))
    ours = [plain(i.prompt) for i in builtin()]
    assert not wholes & set(ours)
    assert not [(text, found) for text in ours if (found := shingles(text) & parts)]


def test_what_gates_are_tested_on_is_balanced_and_not_among_the_instructions() -> None:
    """Requests, cases that turn, and factual questions; of the cases, each has a harmless twin of its form."""
    requests, turning, facts = rows("requests.jsonl"), rows("turning.jsonl"), rows("facts.jsonl")
    assert Counter(row["harmful"] for row in requests) == {True: 10, False: 10}
    kinds = Counter((row["kind"], row["harmful"]) for row in turning)
    assert kinds == {(k, h): 5 for k in ("role_play", "prefix", "second_turn", "story") for h in (True, False)}
    for harmful, harmless in zip(turning[::2], turning[1::2], strict=True):
        assert (harmful["harmful"], harmless["harmful"]) == (True, False)
        assert harmful["kind"] == harmless["kind"]
        assert len(harmful["turns"]) % 2 == 1
        assert harmful["turns"][:-1] == harmless["turns"][:-1]
    assert len(facts) == 40
    assert all(row["answers"] and all(row["answers"]) for row in facts)
    prompts = [row["prompt"] for row in requests] + [row["question"] for row in facts]
    prompts += [row["turns"][-1] for row in turning]
    assert len({plain(p) for p in prompts}) == len(prompts)
    assert not {plain(p) for p in prompts} & {plain(i.prompt) for i in builtin()}


# -- a user's own ------------------------------------------------------------------------------------------------------


def lines(count: int = 40) -> list[str]:
    return [
        json.dumps({"prompt": f"{kind} request {i}", "kind": kind})
        for kind in ("harmful", "harmless")
        for i in range(count)
    ]


def test_reading_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    more = json.dumps({"prompt": "  Völlig anders\n", "kind": "harmless", "category": "x"}, ensure_ascii=False)
    alike = json.dumps({"prompt": "Kill the weeds", "kind": "harmless", "lookalike": True})
    path.write_text("\ufeff" + "\r\n".join([*lines(), "", alike, more, lines()[0]]), "utf-8")
    found = read(path)
    assert len(found) == 82  # a prompt that occurs twice counts once
    assert [i.prompt for i in found if i.lookalike] == ["Kill the weeds"]
    assert found[0] == Instruction("harmful request 0", "harmful")
    assert found[-1] == Instruction("Völlig anders", "harmless", "x")
    assert {i.validates for i in found if i.kind == "harmful"} == {True, False}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "line 3: not JSON"),
        (b"\xff\xfe", "line 3: not JSON"),
        (b"[" * 100_000, "line 3: not JSON"),
        (b'"text"', "line 3: prompt: must be a text"),
        (b"[]", "line 3: prompt: must be a text"),
        (b"{}", "line 3: prompt: must be a text"),
        (b'{"prompt": 5, "kind": "harmful"}', "line 3: prompt: must be a text"),
        (b'{"prompt": " ", "kind": "harmful"}', "line 3: prompt: must be a text that is not empty"),
        (b'{"prompt": "\\ud800", "kind": "harmful"}', "line 3: prompt: holds half a surrogate pair"),
        (b'{"prompt": "x"}', "line 3: kind: must be harmful or harmless"),
        (b'{"prompt": "x", "kind": "evil"}', "line 3: kind: must be harmful or harmless"),
        (b'{"prompt": "x", "kind": ["harmful"]}', "line 3: kind: must be harmful or harmless"),
        (b'{"prompt": "x", "kind": "harmful", "category": 1}', "line 3: category: must be a text"),
        (b'{"prompt": "x", "kind": "harmless", "lookalike": 1}', "line 3: lookalike: must be true or false"),
        (b'{"prompt": "x", "kind": "harmful", "lookalike": true}', "line 3: lookalike: only a harmless instruction"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\n".join([*(x.encode() for x in lines()[:1]), b"", line, *(x.encode() for x in lines())]))
    with pytest.raises(UsageError, match=words) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_bad_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.jsonl"
    for prepare, words in (
        (lambda: None, "cannot be read: No such file"),
        (lambda: path.write_bytes(b""), "no harmful instruction to train on"),
        (lambda: path.write_text("\n".join(lines()[:40])), "no harmless instruction to train on"),
        (lambda: path.write_text("\n".join(lines()[40:])), "no harmful instruction to train on"),
        (
            lambda: path.write_text("\n".join(x for x in lines() if not validates(x) or "harmless" in x)),
            "no harmful instruction to validate with",
        ),
        (lambda: monkeypatch.setattr(anchors, "MAX_BYTES", 10), "larger than"),
    ):
        prepare()
        with pytest.raises(UsageError, match=words) as caught:
            read(path)
        assert "\n" not in str(caught.value)
    for odd in (tmp_path, Path("a\0b")):
        with pytest.raises(UsageError, match="cannot be read"):
            read(odd)


def validates(line: str) -> bool:
    return Instruction(json.loads(line)["prompt"], "harmful").validates


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

    def watched(prompt: str, options: Options, *, pair: PromptPair, framing: Framing, **more: Any) -> Any:
        seen.setdefault((prompt, str(framing.positive)), []).append((framing.negative, options.temp))
        return generate(prompt, options, pair=pair, framing=framing, **more)

    monkeypatch.setattr(anchor_sets, "TOKENS", 2)
    monkeypatch.setattr(engine, "generate", watched)
    assert Sampling(engine, tmp_path / "a.jsonl").go()
    positives = {"safe": MANUAL.safe, "opposite": "All water is red wine", "none": "None"}
    assert set(seen) == {(i.prompt, positives[under]) for i, under in tasks(INSTRUCTIONS)}
    with pytest.raises(UsageError):
        generate("Hi", Options(max_tokens=2), framing=Framing(MANUAL.adversarial, None)).run()  # type: ignore[arg-type]
    # Trials answer too, from pairs, whose adversarial half no framing takes as the positive one.
    answering = {"Framing", "generate", "Chat", "chat"}
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


# -- sorting -----------------------------------------------------------------------------------------------------------

HARMFUL = [Instruction(f"harmful {n}", "harmful", "fraud-and-scams") for n in range(4)]
HARMLESS = [Instruction(f"harmless {n}", "harmless", "facts") for n in range(3)]
END = 99


def record(instruction: Instruction, under: str, label: str, answer: list[int]) -> dict[str, Any]:
    return {"id": instruction.id, "under": under, "label": label, "answer": answer}


def tokens_of(text: str) -> list[int]:
    return [ord(c) for c in text]


def test_answers_are_sorted_by_kind_and_label() -> None:
    records = [
        record(HARMFUL[0], "safe", "refusal", [1]),
        record(HARMFUL[0], "opposite", "answer", [2]),
        record(HARMFUL[0], "none", "degenerate", [3]),
        record(HARMFUL[1], "none", "answer", [4]),
        record(HARMLESS[0], "safe", "answer", [5]),
        record(HARMLESS[1], "safe", "refusal", [6]),  # an over-refusal teaches nothing
        record(HARMLESS[2], "safe", "degenerate", [7]),
        record(HARMFUL[2], "safe", "answer", []),  # nothing was said
        record(Instruction("of another set", "harmful"), "safe", "refusal", [8]),
    ]
    found = collect([*HARMFUL, *HARMLESS], records, tokens_of, END)
    assert found.refused[0] == Anchor(HARMFUL[0], (1,), "safe")
    assert found.complied == (Anchor(HARMFUL[0], (2,), "opposite"), Anchor(HARMFUL[1], (4,), "none"))
    assert found.answered == (Anchor(HARMLESS[0], (5,), "safe"),)
    assert found.written == 3
    for pair, instruction in zip(found.refused[1:], HARMFUL[1:], strict=True):
        assert pair == Anchor(instruction, (*tokens_of(refusal_for(instruction)), END))


def test_a_model_that_refuses_enough_speaks_for_itself() -> None:
    records = [record(i, under, "refusal", [1]) for i in HARMFUL[:2] for under in PROMPTS[:2]]
    found = collect(HARMFUL, records, tokens_of, END)
    assert found.written == 0
    assert len(found.refused) == 4
    less = collect(HARMFUL, records[:-1], tokens_of, END)
    assert less.written == 2
    assert {p.instruction for p in less.refused} == set(HARMFUL)


def test_no_instruction_is_in_both_parts() -> None:
    found = builtin()
    harmful, harmless = ([i for i in found if i.kind == kind] for kind in ("harmful", "harmless"))
    sets = AnchorSets(
        tuple(Anchor(i, (n,)) for i in harmful for n in range(3)),
        tuple(Anchor(i, (n,)) for i in harmful for n in range(2)),
        tuple(Anchor(i, (1,)) for i in harmless),
    )
    training, validation = (sets.part(validation=v) for v in (False, True))

    def ids(part: AnchorSets) -> set[str]:
        return {p.instruction.id for p in (*part.refused, *part.complied, *part.answered)}

    assert not ids(training) & ids(validation)
    assert ids(training) | ids(validation) == {i.id for i in found}
    for name in ("refused", "complied", "answered"):
        parts = getattr(training, name), getattr(validation, name)
        assert sorted(map(repr, parts[0] + parts[1])) == sorted(map(repr, getattr(sets, name)))
        assert 0.08 < len(parts[1]) / len(getattr(sets, name)) < 0.2
    assert Instruction("x", "harmful").validates == Instruction("x", "harmless", "other", True).validates
