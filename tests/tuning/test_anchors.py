"""Instructions of every kind, ours and a user's own."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import SHARED, rows

from acd_local.errors import UsageError
from acd_local.evaluate import refusal
from acd_local.optimize.anchor_sets import (
    refusal_for,
    written_refusals,
)
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
