"""Mistakes in files of prompts are named in one line."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
from eval_sets import refusal, write
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from acd_local.errors import UsageError
from acd_local.evaluate import sets

NAMES = "goal, prompt, instruction, question, behavior"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "\ufeff\n \n", "is empty"),
        ("a.csv", "goal,target\n", "has no prompts"),
        ("a.csv", "goal,target\n,\n\n", "has no prompts"),
        ("a.csv", "id,text\n1,One.\n", f"line 1: no prompt column ({NAMES}); found: 'id', 'text'"),
        ("a.csv", "\nid;prompt\n1;One.\n", "line 2: no prompt column (goal, "),
        ("a.csv", "goal,Goal\na,b\n", "line 1: two columns named 'goal'"),
        ("a.csv", "goal,x\na,b\nOne, two, three.,x\n", "line 3: 4 fields under 2 columns: quote a field that "),
        ("a.csv", 'goal,x\n"a\nb",b\n"never closed,\nx,y\n', "line 4: a quote opened here is never closed"),
        ("a.csv", 'goal,x\n"a" b,c\n', "line 2: broken CSV: "),
        ("a.csv", 'goal\n"' + "a\n" * 100_000, "line 2: a field of over 131,072 characters: a quote before it"),
        ("a.csv", "goal\n" + "a" * 10_000_000, "line 2: longer than 1,000,000 characters: this is no prompt"),
        ("a.csv", "goal,x\n ,1\n", "line 2: goal: is empty"),
        ("a.csv", "goal,x\nOne.\x1b,1\n", "line 2: goal: holds the control character U+001B: remove it"),
        ("a.txt", "One.\nT\x08wo.\n", "line 2: prompt: holds the control character U+0008: remove it"),
        ("a.txt", "One.\n" + "b" * 10_000_000, "line 2: longer than 1,000,000 characters: this is no prompt"),
        ("a.txt", b"One.\nf\xfcr\n", "line 2: not UTF-8: save the file in that encoding"),
        ("a.txt", "One.\n".encode("utf-16"), "UTF-16, not UTF-8: save the file in that encoding"),
        ("a.txt", "One.\n".encode("utf-16-le"), "line 1: holds a NUL byte: UTF-16, or no text; save the file"),
        ("a.txt", b"One.\nTw\0o.\n", "line 2: holds a NUL byte"),
        ("a.json", "[1, 2", "line 1: column 6: broken JSON: "),
        ("a.json", '[\n"One.",\n]', "line 3: column 1: broken JSON: "),
        ("a.json", '"One."\n"Two."', "line 2: column 1: broken JSON: Extra data; one value per line is .jsonl"),
        ("a.json", "[" * 100_000, "nested too deeply: these are no prompts"),
        ("a.json", "[" + "9" * 5000 + "]", "broken JSON: Exceeds the limit"),
        ("a.json", "3", "must be a list of prompts or an object of topics, not a number"),
        ("a.json", "null", "must be a list of prompts or an object of topics, not nothing"),
        ("a.json", "[]", "has no prompts"),
        ("a.json", "{}", "has no prompts"),
        ("a.json", '{"a": {}}', "has no prompts"),
        ("a.json", '["One.", 2]', "entry 2: must be a text or an object, not a number"),
        ("a.json", '["One.", ["Two."]]', "entry 2: must be a text or an object, not a list"),
        ("a.json", '["One.", " "]', "entry 2: prompt: is empty"),
        ("a.json", '[{"text": "One."}]', f"entry 1: no prompt field ({NAMES}, turns); found: 'text'"),
        ("a.json", '[{"prompt": null}]', "entry 1: no prompt field (goal, "),
        ("a.json", '[{"prompt": 5}]', "entry 1: prompt: must be a text, not a number"),
        ("a.json", '[{"turns": []}]', "entry 1: turns: must be a text, not a list"),
        ("a.json", '[{"prompt": "a", "input": {}}]', "entry 1: input: must be a text, not an object"),
        ("a.json", '["\\ud800"]', "entry 1: prompt: holds half a character, U+D800: remove it"),
        ("a.json", '[{"\\ud800\\n": "a"}]', "entry 1: no prompt field"),
        ("a.json", '["a\\u0000"]', "entry 1: prompt: holds the control character U+0000: remove it"),
        ("a.json", '["' + "a" * 10_000_000 + '"]', "entry 1: prompt: longer than 1,000,000 characters"),
        ("a.json", '{"A": {"b": {"c": {"d": {"e": []}}}}}', "topic 'A': nested too deeply: topics may have 4 levels"),
        ("a.json", '{"A\\n": "One."}', "topic 'A\\n': must hold a list of prompts, not a text"),
        ("a.json", '{"prompt": ["One."], "label": ["safe"]}', "an object of columns, 'prompt', 'label': write a list"),
        ("a.jsonl", '"One."\n{"prompt": \n', "line 2: column 12: broken JSON: Expecting value"),
        ("a.jsonl", '"One."\n[' + "[" * 100_000, "line 2: nested too deeply: these are no prompts"),
        ("a.jsonl", '"One."\n"' + "a" * 10_000_000 + '"', "line 2: longer than 1,000,000 characters"),
        ("a.jsonl", '"One."\n["Two."]', "line 2: must be a text or an object, not a list"),
        ("a.jsonl", '"One."\n\n{"id": 1}', "line 3: no prompt field (goal, "),
        ("a.tsv", "prompt\nOne.\n", "files of this kind are not read; a set is one of .csv, .txt, .json, .jsonl"),
        ("a", "One.\n", "files of this kind are not read"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "bytes",
)  # fmt: skip
def test_a_mistake_is_named_with_its_place(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    assert refusal(write(tmp_path, name, content)).startswith(message)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.csv") == "no such file"
    (tmp_path / "folder.csv").mkdir()
    assert refusal(tmp_path / "folder.csv") == "is a folder, not a file"
    assert refusal(tmp_path / "no" / "folder.csv") == "no such file"
    for odd in ("nul\0.csv", "x" * 5000 + ".csv", "a\n\x1b[31m\udcff.csv"):
        with pytest.raises(UsageError) as caught:
            sets.read(f"s={odd}:harmful")
        assert str(caught.value).isprintable()


def test_labels_that_are_none(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "prompt,label\nOne.,safe\nTwo.,maybe\n")
    known = "it must be one of safe, harmless, unsafe, harmful"
    assert refusal(path, ":labelled") == f"line 3: label: 'maybe' is no label: {known}"
    assert refusal(path, "") == "harmful or harmless? Write FILE:harmful or FILE:harmless"
    path = write(tmp_path, "b.csv", "prompt\nOne.\n")
    assert refusal(path, ":labelled") == "line 2: no label field; found: 'prompt'"
    assert refusal(path, ":choice").startswith("line 2: mc1_targets: must be an object")


def test_filters_that_fit_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "prompt,x\n" + "".join(f"p{i},v{i}\n" for i in range(20)))
    assert refusal(path, ":harmful:y=1") == "no column 'y' to choose rows by; found: 'prompt', 'x'"
    shown = ", ".join(f"'v{i}'" for i in range(12))
    assert refusal(path, ":harmful:x=w") == f"no row has 'x=w'; values there: {shown} and 8 more"


def test_a_file_larger_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "MAX_FILE", 2_000_000)
    assert refusal(write(tmp_path, "a.txt", "One.\n" * 400_001)) == "larger than 2 MB: split it"


pieces = st.sampled_from(
    [*'",\n\r[]{}:\\\0\x1b\ud800\ufeff\u2028é 01', "null", "prompt", "label", "safe", "turns", "goal", "mc1_targets",
     "input", "question", "{}", "[]", '"prompt": "a"', "prompt,label\n", "goal\n", "\\ud800", "1e999",
     '{"question": "q", "mc1_targets": {"a": 1, "b": 0}}']
)  # fmt: skip
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["prompt", "turns", "label", "type", "mc1_targets", "a", ""]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
contents = (
    st.lists(pieces, max_size=12).map(lambda parts: "".join(parts).encode("utf-8", "surrogatepass"))
    | st.binary(max_size=40)
    | values.map(lambda value: json.dumps(value).encode())
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=contents,
    suffix=st.sampled_from([".csv", ".txt", ".json", ".jsonl"]),
    after=st.sampled_from(
        ["", ":harmful", ":labelled", ":choice", ":facts", ":harmful:label=safe", ":harmless:type=a|b"]
    ),
)
@example(content=b'"prompt"\n\r\n"a', suffix=".csv", after=":harmful")
def test_any_file_is_read_or_refused_in_one_line(tmp_path: Path, content: bytes, suffix: str, after: str) -> None:
    path = write(tmp_path, f"f{suffix}", content)
    try:
        found = sets.read(f"s={path}{after}")
    except UsageError as error:
        assert str(error).isprintable() and str(error).startswith(f"{path}: ")
    else:
        assert found and all(s.items for s in found)
        for s in found:
            assert len({item.id for item in s.items}) == len(s.items)
            for item in s.items:
                assert item.prompt == item.prompt.strip() != "" and item.prompt.encode()


@given(spec=st.text(alphabet=string.printable + ":=\0\ud800", max_size=30))
def test_any_spec_is_refused_in_one_line(spec: str) -> None:
    with pytest.raises(UsageError) as caught:
        sets.read(spec)
    assert str(caught.value).isprintable()
