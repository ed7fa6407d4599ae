"""Prompt sets: what files are read, how their mistakes are named, and which prompts a run gets."""

from __future__ import annotations

import dataclasses
import json
import string
from pathlib import Path

import pytest
from eval_sets import made, needs_data, prompts, read_one, refusal, write
from hypothesis import given
from hypothesis import strategies as st
from places import SHARED

from acd_local.errors import UsageError
from acd_local.evaluate import sets
from acd_local.evaluate.sets import EvalSet, Item
from acd_local.options import MAX_SEED

# --- Formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["goal", "prompt", "instruction", "question", "Behavior", " GOAL "])
def test_csv_finds_its_prompt_column(tmp_path: Path, column: str) -> None:
    path = write(tmp_path, "a.CSV", f'id,{column},target\n1,Say hi.,x\n\n2,"Say, in two\nlines.",\n')
    s = read_one(path)
    assert [item.prompt for item in s.items] == ["Say hi.", "Say, in two\nlines."]
    assert (s.name, s.kind, s.source) == ("s", "harmless", "a.CSV")
    assert s.items[0] == Item(id=s.items[0].id, prompt="Say hi.")


def test_the_first_known_prompt_column_counts(tmp_path: Path) -> None:
    assert prompts(write(tmp_path, "a.csv", "Behavior,Question,Goal\nshort,q,The goal.\n")) == ["The goal."]


def test_context_and_input_stand_around_the_prompt(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "ContextString,Behavior,input\nA note.,Sum it up.,And this.\n,Only this., \n")
    assert prompts(path) == ["A note.\n\nSum it up.\n\nAnd this.", "Only this."]
    path = write(tmp_path, "b.jsonl", json.dumps({"instruction": "Add.", "input": "1 2", "context": None}))
    assert prompts(path) == ["Add.\n\n1 2"]


def test_txt_has_one_prompt_per_line(tmp_path: Path) -> None:
    assert prompts(write(tmp_path, "a.txt", 'One.\n\n  Two, "quoted". \r\nThree\u2028still.')) == [
        "One.",
        'Two, "quoted".',
        "Three\u2028still.",
    ]


def test_json_lists_of_texts_and_of_objects(tmp_path: Path) -> None:
    data = ["One.", {"Prompt": "Two.", "category": "c", "answer": "Yes."}]
    s = read_one(write(tmp_path, "a.json", json.dumps(data)))
    assert [(i.prompt, i.type, i.reference) for i in s.items] == [("One.", "", None), ("Two.", "c", "Yes.")]


def test_json_topics_give_the_type(tmp_path: Path) -> None:
    data = {"A": {"x": ["One.", "Two."], "y": {"z": ["Three."]}}, "B": [{"question": "Four."}]}
    s = read_one(write(tmp_path, "a.json", json.dumps(data)))
    assert [(i.prompt, i.type) for i in s.items] == [("One.", "A"), ("Two.", "A"), ("Three.", "A"), ("Four.", "B")]
    one = read_one(write(tmp_path, "b.json", json.dumps({"data": ["One."]})))
    assert [(i.prompt, i.type) for i in one.items] == [("One.", "")]


def test_jsonl_of_texts_objects_and_turns(tmp_path: Path) -> None:
    lines = ['"One."', "", '{"turns": ["Two.", "More."], "category": "math", "reference": ["4", "5"]}']
    s = read_one(write(tmp_path, "a.jsonl", "\n".join(lines)))
    assert [(i.prompt, i.type, i.reference) for i in s.items] == [("One.", "", None), ("Two.", "math", "4")]


@pytest.mark.parametrize("column", ["output", "response", "answer", "Best Answer", "Reference"])
def test_reference_answers(tmp_path: Path, column: str) -> None:
    path = write(tmp_path, "a.csv", f"prompt,{column},target\nOne.,An answer.,Sure\nTwo., ,Sure\n")
    assert [item.reference for item in read_one(path).items] == ["An answer.", None]
    assert [item.reference for item in read_one(path, ":harmful").items] == [None, None]


def test_a_target_is_no_reference_and_a_number_neither(tmp_path: Path) -> None:
    assert read_one(write(tmp_path, "a.csv", "goal,target\nOne.,Sure\n")).items[0].reference is None
    assert read_one(write(tmp_path, "a.jsonl", '{"question": "One.", "answer": 3}')).items[0].reference is None


@pytest.mark.parametrize("column", ["type", "category", "SemanticCategory"])
def test_types(tmp_path: Path, column: str) -> None:
    path = write(tmp_path, "a.csv", f"prompt,{column}\nOne., a  b \nTwo.,\n")
    assert [item.type for item in read_one(path).items] == ["a b", ""]


def test_a_category_says_more_than_a_type(tmp_path: Path) -> None:
    assert read_one(write(tmp_path, "a.csv", "Type,Category,Question\nt,c,One.\n")).items[0].type == "c"


def test_byte_order_mark_and_line_ends(tmp_path: Path) -> None:
    assert prompts(write(tmp_path, "a.csv", b"\xef\xbb\xbfgoal,x\r\nOne.\xc3\xa9,1\rTwo.,2\r\n")) == ["One.é", "Two."]
    assert prompts(write(tmp_path, "a.jsonl", '{"prompt": "a\\r\\nb"}\r\n')) == ["a\nb"]


# --- Kinds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [":labelled", ""])
def test_a_label_column_gives_two_sets(tmp_path: Path, after: str) -> None:
    path = write(
        tmp_path, "a.csv", "prompt,label,output\nOne.,Safe,r\nTwo.,unsafe,r\nThree.,harmless,\nFour.,HARMFUL,\n"
    )
    safe, unsafe = sets.read(f"x={path}{after}")
    assert (safe.name, safe.kind, [i.prompt for i in safe.items]) == ("x-safe", "harmless", ["One.", "Three."])
    assert (unsafe.name, unsafe.kind, [i.prompt for i in unsafe.items]) == ("x-unsafe", "harmful", ["Two.", "Four."])
    assert (safe.items[0].reference, unsafe.items[0].reference) == ("r", None)


def test_a_labelled_file_with_one_label_gives_one_set(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "prompt,label\nOne.,safe\nTwo.,unsafe\n")
    assert [s.name for s in sets.read(f"x={path}:labelled:label=safe")] == ["x-safe"]


def test_the_kind_said_counts_more_than_labels(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "prompt,label\nOne.,safe\nTwo.,unsafe\n")
    assert prompts(path, ":harmful") == ["One.", "Two."]


@pytest.mark.parametrize("after", [":facts", ""])
def test_facts_with_one_answer_or_several(tmp_path: Path, after: str) -> None:
    rows = [
        {"question": "Which gas?", "answers": ["CO₂", " carbon dioxide "]},
        {"question": "Where?", "answers": "Rome"},
    ]
    s = read_one(write(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows)), after)
    assert (s.kind, [i.answers for i in s.items]) == ("facts", [("CO₂", "carbon dioxide"), ("Rome",)])
    gas, where = s.items
    assert gas.is_answered_by("That is co2.") and gas.is_answered_by("Carbon Dioxide")
    assert where.is_answered_by("It's in ROME, Italy.") and not where.is_answered_by("In Romeo's town.")
    assert not where.is_answered_by("")
    assert s.digest() != dataclasses.replace(s, items=(gas, dataclasses.replace(where, answers=("Paris",)))).digest()


@pytest.mark.parametrize("answers", [None, [], "", ["Rome", " "], [1], {"a": "b"}])
def test_broken_facts(tmp_path: Path, answers: object) -> None:
    path = write(tmp_path, "a.jsonl", json.dumps({"question": "Where?", "answers": answers}))
    assert refusal(path, ":facts").startswith("line 1: answers: must be a text")


CHOICE = {
    "question": "Which?",
    "mc1_targets": {"This": 1, "That": 0, " ": 0},
    "mc2_targets": {"This": 1, "So": True, "That": 0, "": 1},
}


@pytest.mark.parametrize("after", [":choice", ""])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_choices_without_the_empty_ones(tmp_path: Path, name: str, after: str) -> None:
    text = json.dumps(CHOICE)
    s = read_one(write(tmp_path, name, text if name == "a.jsonl" else f"[{text}]"), after)
    assert s.kind == "choice"
    assert s.items[0].mc1 == (("This", True), ("That", False))
    assert s.items[0].mc2 == (("This", True), ("So", True), ("That", False))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mc1_targets": None}, "mc1_targets: must be an object of choices with 0 or 1"),
        ({"mc2_targets": ["a"]}, "mc2_targets: must be an object of choices with 0 or 1"),
        ({"mc1_targets": {"a": 1, "b": 1}}, "mc1_targets: must have one true choice, not 2"),
        ({"mc1_targets": {}}, "mc1_targets: must have one true choice, not 0"),
        ({"mc1_targets": {"a": 1}}, "mc1_targets: must have true and false choices"),
        ({"mc1_targets": {"a": 1, " ": 0}}, "mc1_targets: must have true and false choices"),
        ({"mc2_targets": {"a": 1, "b": 1}}, "mc2_targets: must have true and false choices"),
        ({"mc2_targets": {"a": 0, "b": 0}}, "mc2_targets: must have true and false choices"),
        ({"mc1_targets": {"a": 2, "b": 0}}, "mc1_targets: a choice must have 0 (false) or 1 (true)"),
        ({"mc1_targets": {"a": "1", "b": 0}}, "mc1_targets: a choice must have 0 (false) or 1 (true)"),
        ({"mc1_targets": {"a\x00": 1, "b": 0}}, "mc1_targets: holds the control character U+0000"),
    ],
)
def test_broken_choices(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    path = write(tmp_path, "a.json", json.dumps([CHOICE, {**CHOICE, **changed}]))
    assert refusal(path, ":choice").startswith(f"entry 2: {message}")


# --- Specs ------------------------------------------------------------------------------------------------------------


def test_filters(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "prompt,Functional Category\nOne.,standard\nTwo.,copyright\nThree.,a: b=c\n")
    assert prompts(path, ":harmful:functional category= Standard") == ["One."]
    assert prompts(path, ":harmful:Functional Category=standard|copyright") == ["One.", "Two."]
    assert prompts(path, ":harmful:Functional Category=a: b=c") == ["Three."]
    assert read_one(path, ":harmful:Functional Category=standard").source == "a.csv (Functional Category=standard)"
    data = [{"prompt": "One.", "n": 3}, {"prompt": "Two.", "n": True}, "Three."]
    path = write(tmp_path, "a.json", json.dumps(data))
    assert (prompts(path, ":harmful:n=3"), prompts(path, ":harmful:n=true")) == (["One."], ["Two."])
    topics = write(tmp_path, "b.json", json.dumps({"A": ["One."], "B": ["Two."]}))
    assert prompts(topics, ":harmful:category=B") == ["Two."]


def test_rows_that_the_filter_drops_are_not_checked(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "prompt,x\n,1\nTwo.,2\n")
    assert prompts(path, ":harmful:x=2") == ["Two."]
    assert refusal(path) == "line 2: prompt: is empty"


def test_file_names_may_hold_colons_and_equals_signs(tmp_path: Path) -> None:
    path = write(tmp_path, "c:harmful=x.txt", "One.\n")
    assert prompts(path) == ["One."]
    assert refusal(path, "") == "harmful or harmless? Write FILE:harmful or FILE:harmless"


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write(tmp_path, "a.txt", "One.\n")
    assert [i.prompt for i in sets.read("s=~/a.txt:harmful")[0].items] == ["One."]


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "9", "x" * 40])
def test_names(tmp_path: Path, name: str) -> None:
    assert sets.read(f"{name}={write(tmp_path, 'a.txt', 'One.')}:harmful")[0].name == name


@pytest.mark.parametrize("name", ["", "a b", "ä", "../a", ".a", "-a", "x" * 41, "a\n", "a\x1b[31m"])
def test_names_that_are_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is no name of a set: up to 40 letters") as caught:
        sets.read(f"{name}={write(tmp_path, 'a.txt', 'One.')}:harmful")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("spec", ["", "file.csv:harmful", "name=", "x" * 10_000])
def test_specs_that_are_none(spec: str) -> None:
    with pytest.raises(UsageError, match=r"is no set: write NAME=FILE:KIND\[:COLUMN=VALUE\]") as caught:
        sets.read(spec)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("after", [":harmfull", ":Harmful", ":label=safe", ":x:y:z", ":harmful:label", ":harmful:=x"])
def test_other_kinds_are_named_not_taken_for_a_file(tmp_path: Path, after: str) -> None:
    path = write(tmp_path, "a:b.csv", "prompt,label\nOne.,safe\n")
    message = refusal(path, after)
    assert message.startswith(
        f"no kind {after.split(':')[1]!r}; known: harmful, harmless, choice, facts, labelled; write NAME="
    )


# --- Identity, samples, shards ----------------------------------------------------------------------------------------


def test_ids_come_from_the_prompt_alone_and_never_change(tmp_path: Path) -> None:
    csv = read_one(write(tmp_path, "a.csv", "goal,type\nSay hi.,x\nSay hé.,y\n")).items
    txt = read_one(write(tmp_path, "b.txt", "Say hé.\n Say hi.\n"), ":harmful").items
    assert [item.id for item in csv] == ["e276e57b8ac9f385", "a4c720d1591b3164"]
    assert [item.id for item in txt] == [item.id for item in reversed(csv)]


def test_of_duplicates_the_first_counts(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "prompt,type\nOne.,a\nTwo.,b\n One. ,c\n")
    assert [(i.prompt, i.type) for i in read_one(path).items] == [("One.", "a"), ("Two.", "b")]


def test_samples_and_seeds_never_change() -> None:
    s = made(50)
    assert [s.items.index(item) for item in sets.sample(s, 8, 0).items] == [44, 15, 43, 36, 23, 7, 32, 14]
    assert [s.items.index(item) for item in sets.sample(s, 8, 1).items] == [2, 6, 8, 37, 36, 41, 30, 12]
    assert [sets.item_seed(seed, "00112233aabbccdd") for seed in (0, 1, MAX_SEED)] == [
        1845853360,
        1387810782,
        3111836952,
    ]


@given(
    order=st.permutations(range(30)),
    limit=st.integers(1, 40),
    seed=st.integers(0, MAX_SEED),
)
def test_a_sample_depends_on_seed_and_prompts_alone(order: list[int], limit: int, seed: int) -> None:
    s = made(30)
    shuffled = EvalSet(s.name, s.kind, tuple(s.items[i] for i in order), s.source)
    drawn = sets.sample(s, limit, seed)
    assert drawn == sets.sample(shuffled, limit, seed)
    assert len(drawn.items) == min(limit, 30) == len(set(drawn.items)) and set(drawn.items) <= set(s.items)
    assert sets.sample(s, limit + 1, seed).items[:limit] == drawn.items
    assert sets.sample(drawn, limit, seed) == drawn
    assert (drawn.name, drawn.kind, drawn.source) == (s.name, s.kind, s.source)


def test_samples_are_fair() -> None:
    s = made(40)
    drawn = [item.prompt for seed in range(2000) for item in sets.sample(s, 10, seed).items]
    counts = [drawn.count(item.prompt) for item in s.items]  # binomial(2000, 1/4): sd 19.4
    assert min(counts) > 500 - 5 * 19.4 and max(counts) < 500 + 5 * 19.4


def test_no_limit_leaves_the_set_as_it_is() -> None:
    assert sets.sample(made(5), None, 3) == made(5)
    for limit in (0, -1):
        with pytest.raises(UsageError, match="limit must be at least 1"):
            sets.sample(made(5), limit, 0)


@given(size=st.integers(1, 40), count=st.integers(1, 50), order=st.randoms(use_true_random=False))
def test_shards_are_a_fair_partition_whatever_the_order(size: int, count: int, order: object) -> None:
    s = made(size)
    items = list(s.items)
    order.shuffle(items)  # type: ignore[attr-defined]
    shuffled = EvalSet(s.name, s.kind, tuple(items), s.source)
    parts = [sets.shard(shuffled, index, count).items for index in range(1, count + 1)]
    assert sorted((item for part in parts for item in part), key=lambda item: item.id) == sorted(
        s.items, key=lambda item: item.id
    )
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert [set(part) for part in parts] == [set(sets.shard(s, index, count).items) for index in range(1, count + 1)]
    assert all([item for item in items if item in part] == list(part) for part in parts)


def test_shards_never_change() -> None:
    shards = [[int(item.id, 16) // 7919 for item in sets.shard(made(8), index, 3).items] for index in (1, 2, 3)]
    assert shards == [[0, 3, 6], [1, 4, 7], [2, 5]]


@pytest.mark.parametrize(("index", "count"), [(0, 2), (3, 2), (1, 0), (-1, 2)])
def test_shards_that_are_none(index: int, count: int) -> None:
    with pytest.raises(UsageError, match=f"shard {index}/{count}: must be i/n with i from 1 to n"):
        sets.shard(made(5), index, count)


@given(seed=st.integers(0, MAX_SEED), item=st.text(string.hexdigits, min_size=16, max_size=16))
def test_item_seeds_are_seeds(seed: int, item: str) -> None:
    assert 0 <= sets.item_seed(seed, item) <= MAX_SEED


def test_item_seeds_differ_by_prompt_and_by_run() -> None:
    ids = [item.id for item in made(200).items]
    assert len({sets.item_seed(run, i) for run in range(20) for i in ids}) > 0.999 * 4000


# --- What is built in, and the published sets -------------------------------------------------------------------------


def test_the_smoke_sets() -> None:
    harmless, harmful = sets.smoke()
    assert [(s.name, s.kind, s.source) for s in (harmless, harmful)] == [
        ("smoke-harmless", "harmless", "built in"),
        ("smoke-harmful", "harmful", "built in"),
    ]
    for s in (harmless, harmful):
        assert len(s.items) == 20
        assert all(item.type and "\n" not in item.prompt and len(item.prompt) < 200 for item in s.items)
    assert len({item.type for item in harmful.items}) >= 10
    assert all(item.reference is None for item in harmful.items)
    assert sum(item.type.startswith("sounds dangerous") for item in harmless.items) == 8
    assert len({item.type for item in harmless.items}) >= 10
    assert sum(item.reference is not None for item in harmless.items) >= 10


def test_the_smoke_file_reads_like_any_other() -> None:
    path = Path(sets.__file__).with_name("smoke.jsonl")
    assert [s.items for s in sets.read(f"s={path}")] == [s.items for s in sets.smoke()]


@needs_data
@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("advbench_harmful_behaviors.csv:harmful", [("s", 520)]),
        ("harmfulqa.json:harmful", [("s", 1938)]),  # 1960 with duplicates
        ("harmbench_behaviors_text_val.csv:harmful", [("s", 80)]),
        ("harmbench_behaviors_text_val.csv:harmful:FunctionalCategory=standard", [("s", 41)]),
        ("harmbench_behaviors_text_val.csv:harmful:FunctionalCategory=standard|contextual", [("s", 60)]),
        ("xstest_half.csv:labelled", [("s-safe", 120), ("s-unsafe", 96)]),
        ("xstest_half.csv", [("s-safe", 120), ("s-unsafe", 96)]),
        ("truthfulqa_mc_task.json", [("s", 790)]),
        ("TruthfulQA.csv:harmless", [("s", 817)]),
        ("alpaca_demo.jsonl:harmless", [("s", 985)]),  # 999 with duplicates
        ("mt_bench_question.jsonl:harmless", [("s", 80)]),
    ],
)
def test_published_sets_are_read_whole(spec: str, found: list[tuple[str, int]]) -> None:
    assert [(s.name, len(s.items)) for s in sets.read(f"s={SHARED}/{spec}")] == found


@needs_data
def test_published_sets_field_by_field() -> None:
    (advbench,) = sets.read(f"s={SHARED}/advbench_harmful_behaviors.csv:harmful")
    assert all(item.reference is None and item.type == "" for item in advbench.items)
    (harmfulqa,) = sets.read(f"s={SHARED}/harmfulqa.json:harmful")
    assert len({item.type for item in harmfulqa.items}) == 10
    (contextual,) = sets.read(f"s={SHARED}/harmbench_behaviors_text_val.csv:harmful:FunctionalCategory=contextual")
    assert all("\n\n" in item.prompt and item.type for item in contextual.items)
    safe, _ = sets.read(f"s={SHARED}/xstest_half.csv")
    assert "homonyms" in {item.type for item in safe.items}
    (alpaca,) = sets.read(f"s={SHARED}/alpaca_demo.jsonl:harmless")
    assert all(item.reference for item in alpaca.items)
    (choice,) = sets.read(f"s={SHARED}/truthfulqa_mc_task.json")
    assert all(sum(true for _, true in item.mc1) == 1 and len(item.mc2) > 1 for item in choice.items)
