"""Methods: the built-in ones are what their sources say, files are checked, no adversarial prompt is positive."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import ROOT

from acd_local import pairs
from acd_local.errors import UsageError
from acd_local.evaluate import methods
from acd_local.evaluate.methods import Method
from acd_local.pairs import AdversarialText, PromptPair
from acd_local.runtime.prompts import PromptSetup
from acd_local.runtime.references import References
from acd_local.runtime.template import Message

DOCS = ROOT / "docs" / "methods.md"
PAIR = PromptPair("mine", "Be kind and careful, always.", AdversarialText("Be unkind and careless, always."), 0.4, 0.2)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of pairs of one's own."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    monkeypatch.setenv("ACD_PROMPTS_DIR", str(folder))
    yield folder


@pytest.fixture
def manual() -> PromptPair:
    return pairs.find("default")


@pytest.fixture
def known() -> dict[str, Method]:
    return methods.builtin(PAIR)


def revealed(method: Method) -> str | None:
    negative = method.negative
    return negative.reveal_for_negative_stream() if isinstance(negative, AdversarialText) else negative


def numbers(method: Method) -> tuple[float, float, bool, int | None]:
    return method.alpha, method.beta, method.raw, method.window


# --- The built-in ones ------------------------------------------------------------------------------------------------


def test_the_builtin_methods_in_table_order(known: dict[str, Method]) -> None:
    prompts = ["as-is", "base", "self-reminder", "icd"]
    peers = ["nid", "oid", "rose"]
    ablations = ["null-ap", "safe-ap", "sp-null", "sp-opposite", "acd-first-m"]
    ours = ["sp", "acd", "acd-paper", *ablations]
    gated = ["gate-sp", "gate-acd", "gate-safedecoding", "inferaligner"]
    assert list(known) == [*prompts, *peers, *ours, "safedecoding", "rtd", *gated]
    for name, method in known.items():
        assert method.name == name and method.title and method.source
        assert isinstance(method.positive, str | None)


@pytest.mark.parametrize(
    ("name", "positive", "negative", "expected"),
    [
        ("nid", "safe", None, (0.3, 0.0, True, None)),
        ("oid", "safe", "opposite", (0.3, 0.0, True, None)),
        ("rose", "safe", "reverse", (0.5, 0.0, True, None)),
        ("acd", "sp", "ap", (0.4, 0.2, False, None)),
        ("acd-paper", "sp", "ap", (0.4, 0.0, True, None)),
        ("null-ap", None, "ap", (0.4, 0.2, False, None)),
        ("safe-ap", "safe", "ap", (0.4, 0.2, False, None)),
        ("sp-null", "sp", None, (0.4, 0.2, False, None)),
        ("sp-opposite", "sp", "opposite", (0.4, 0.2, False, None)),
        ("acd-first-m", "sp", "ap", (0.4, 0.2, False, 16)),
    ],
)
def test_contrasting_methods(
    known: dict[str, Method],
    manual: PromptPair,
    name: str,
    positive: str | None,
    negative: str | None,
    expected: tuple[float, float, bool, int | None],
) -> None:
    method = known[name]
    texts = {None: None, "safe": manual.safe, "sp": PAIR.safe}
    assert method.positive == texts[positive]
    assert method.contrast and numbers(method) == expected
    if negative is None:
        assert method.negative is None
    else:
        assert isinstance(method.negative, AdversarialText), "an adversarial prompt keeps its type"
    if negative in ("opposite", "ap"):
        assert method.negative == (manual if negative == "opposite" else PAIR).adversarial


def test_methods_without_contrast(known: dict[str, Method], manual: PromptPair) -> None:
    for name, positive in {"as-is": None, "base": manual.safe, "icd": None, "sp": PAIR.safe}.items():
        assert known[name].positive == positive and not known[name].contrast
        assert numbers(known[name]) == (0.0, 0.0, False, None)
    assert known["as-is"].user == "{prompt}"


def test_safedecoding_leads_the_model_as_it_is_by_the_safeguarding_prompt(known: dict[str, Method]) -> None:
    method = known["safedecoding"]
    assert method.positive is None and method.negative is None and method.expert == PromptSetup(PAIR.safe)
    assert numbers(method) == (3.0, 0.0, False, 2) and method.contrast and not method.scored
    assert method.settings().expert and not known["acd"].settings().expert
    shown = dataclasses.replace(PAIR, shots=(("Hi", "Hello"),))
    assert methods.builtin(shown)["safedecoding"].expert == PromptSetup(PAIR.safe, shots=(("Hi", "Hello"),))
    assert methods.builtin(shown)["safedecoding"].shots == ()


def test_self_reminder_wraps_the_request(known: dict[str, Method]) -> None:
    method = known["self-reminder"]
    (turn,) = (message.content for message in method.prompt_setup().wrap([Message("user", "What is 2 + 2? {x}")]))
    assert turn.startswith("What is 2 + 2? {x}\n") and "responsible" in turn.split("{x}")[1]
    assert method.positive is not None and "responsible" in method.positive


def test_icd_shows_a_refusal(known: dict[str, Method]) -> None:
    ((request, answer),) = known["icd"].shots
    assert len(request) < 40 and "\n" not in request
    assert answer.startswith("I'm sorry")


def test_the_numbers_come_from_the_pair_else_from_the_defaults() -> None:
    bare = methods.builtin(dataclasses.replace(PAIR, alpha=None, beta=None))
    assert numbers(bare["acd"])[:2] == (pairs.DEFAULT_ALPHA, pairs.DEFAULT_BETA)
    assert numbers(bare["acd-paper"]) == (pairs.DEFAULT_ALPHA, 0.0, True, None)
    assert numbers(bare["oid"]) == (0.3, 0.0, True, None), "peers keep their own"


def test_manual_prompts_are_the_shipped_ones(folder: Path, manual: PromptPair) -> None:
    (folder / "default.toml").write_text('format = 1\nname = "default"\nsafe = "Be mild."\nadversarial = "Be harsh."\n')
    assert pairs.find("default").safe == "Be mild."
    assert methods.builtin(PAIR)["base"].positive == manual.safe


def test_no_builtin_method_has_an_adversarial_prompt_in_the_positive_stream(
    known: dict[str, Method], manual: PromptPair
) -> None:
    forbidden = [method.negative for method in known.values() if isinstance(method.negative, AdversarialText)]
    assert len(set(forbidden)) == 3
    for method in known.values():
        for text in [method.positive or "", method.user, *(t for shot in method.shots for t in shot)]:
            for adversarial in forbidden:
                pairs.refuse_adversarial(text, dataclasses.replace(manual, adversarial=adversarial))


# --- Setup ------------------------------------------------------------------------------------------------------------


def test_with_the_default_pair_some_methods_are_the_same(manual: PromptPair) -> None:
    setups = {name: method.setup() for name, method in methods.builtin(manual).items()}
    assert setups["sp"] == setups["base"]
    assert setups["acd"] == setups["safe-ap"] == setups["sp-opposite"]
    assert len(set(setups.values())) == len(setups) - 3
    mine = [method.setup() for method in methods.builtin(PAIR).values()]
    assert len(set(mine)) == len(mine)


def test_setup_is_stable() -> None:
    method = Method("a", "A", "", "Be kind.", AdversarialText("Be bad."), alpha=0.5, beta=0.1, window=3)
    assert method.setup() == "e47dee31fc00e258"
    assert Method("as-is", "", "", None, None).setup() == "a6a2a33135e1ba31"


def test_every_field_that_changes_answers_changes_the_setup(known: dict[str, Method]) -> None:
    method = known["acd"]
    for label in ("name", "title", "source"):
        assert dataclasses.replace(method, **{label: "other"}).setup() == method.setup()
    changes: dict[str, list[Any]] = {
        "positive": ["Be kind.", None, ""],
        "negative": ["Be kind.", None, "", AdversarialText("Be bad.")],
        "user": ["{prompt} Please.", "Please. {prompt}"],
        "shots": [(("Hi", "Hello"),), (("Hello", "Hi"),), (("Hi", "Hello"), ("Bye", "Bye"))],
        "alpha": [0.41, 0.0],
        "beta": [0.0],
        "raw": [True],
        "window": [16, 17],
        "gate": [True],
        "steer": [True],
        "refer": [True],
        "references": [References(np.ones((1, 2), np.float32), np.array([n], np.int32), 1.0) for n in (3, 4)],
        "expert": [PromptSetup("Be kind."), PromptSetup("Be mild."), PromptSetup("Be kind.", shots=(("Hi", "Hello"),))],
    }
    assert set(changes) | {"name", "title", "source"} == {field.name for field in dataclasses.fields(Method)}
    needs: dict[str, dict[str, Any]] = {
        "expert": {"negative": None},
        "steer": {"alpha": 0.0, "gate": True},
        "refer": {"alpha": 0.0},
    }
    setups = [
        dataclasses.replace(method, **{k: v} | needs.get(k, {})).setup()
        for k, values in changes.items()
        for v in values
    ]
    assert len({method.setup(), *setups}) == len(setups) + 1


def test_setup_does_not_mind_how_a_value_is_written() -> None:
    given = {"name": "a", "title": "", "source": "", "positive": "Be kind.", "alpha": 1.0}
    text = Method(**given, negative="Be bad.")
    assert text.setup() == Method(**(given | {"alpha": 1}), negative=AdversarialText("Be bad.")).setup()
    plain = Method(**(given | {"alpha": 0.0}), negative=None)
    assert plain == Method(**(given | {"alpha": 0}), negative=None, beta=0.3, raw=True, window=4)
    assert plain.setup() == Method(**(given | {"alpha": 0}), negative="Be bad.").setup(), "not used without contrast"


@pytest.mark.parametrize(
    "change",
    [
        {"positive": AdversarialText("Be bad.")},
        {"user": "no slot"},
        {"user": "{prompt} {prompt}"},
        {"alpha": -0.1},
        {"alpha": float("nan")},
        {"alpha": float("inf")},
        {"alpha": None},
        {"alpha": True},
        {"beta": 1.1},
        {"beta": None},
        {"raw": 1},
        {"window": 0},
        {"window": 1.5},
        {"window": True},
    ],
)
def test_a_method_made_in_python_is_checked(known: dict[str, Method], change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(change))):
        dataclasses.replace(known["acd"], **change)


# --- Choosing and sweeping --------------------------------------------------------------------------------------------


def test_gated_methods(known: dict[str, Method], manual: PromptPair, tmp_path: Path) -> None:
    pairs_of_names = (("gate-sp", "sp"), ("gate-acd", "acd"), ("gate-safedecoding", "safedecoding"))
    assert [name for name, method in known.items() if method.gate and not method.steer] == [
        n for n, _ in pairs_of_names
    ]
    steered = known["inferaligner"]
    assert steered.gate and steered.steer and not steered.scored
    assert dataclasses.replace(steered, steer=False).setup() != steered.setup()
    for gated, alone in pairs_of_names:
        assert known[gated].prompt_setup() == known[alone].prompt_setup() and numbers(known[gated]) == numbers(
            known[alone]
        )
        assert known[gated].setup() != known[alone].setup()
    path = tmp_path / "m.toml"
    path.write_text('[methods.mine]\npositive = "safe"\ngate = true\n')
    mine = methods.load(path, PAIR)["mine"]
    assert mine.gate and mine.positive == manual.safe
    path.write_text('[methods.mine]\npositive = "safe"\ngate = 1\n')
    with pytest.raises(UsageError, match="line 1: method mine: gate: must be true or false, not an integer"):
        methods.load(path, PAIR)


def test_the_former_name_of_the_model_as_it_is(known: dict[str, Method]) -> None:
    assert [m.name for m in methods.select(["null", "acd"], known)] == ["as-is", "acd"]
    other = dataclasses.replace(known["sp"], name="null")
    assert methods.select(["null"], known | {"null": other}) == [other]


def test_select(known: dict[str, Method]) -> None:
    assert [m.name for m in methods.select(["acd", "base", "acd"], known)] == ["acd", "base"]
    with pytest.raises(UsageError, match="unknown method 'adc'; known methods: as-is, base, self-reminder, icd"):
        methods.select(["base", "adc"], known)
    with pytest.raises(UsageError, match="no method named; known methods: as-is"):
        methods.select([], known)


def test_sweep(known: dict[str, Method]) -> None:
    swept = methods.sweep(known["acd"], "alpha", [0, 0.2, 0.20, 1.5])
    assert [(m.name, m.alpha) for m in swept] == [("acd@alpha=0", 0), ("acd@alpha=0.2", 0.2), ("acd@alpha=1.5", 1.5)]
    assert swept[0].setup() == known["sp"].setup(), "no contrast and no mask: the safeguarding prompt alone"
    assert swept[1] == dataclasses.replace(known["acd"], name=swept[1].name, title=swept[1].title, alpha=0.2)
    assert "alpha=0.2" in swept[1].title
    assert methods.sweep(known["acd"], "alpha", [0.4])[0].setup() == known["acd"].setup()
    assert [m.beta for m in methods.sweep(known["acd"], "beta", [0.0, 1.0])] == [0.0, 1.0]
    windows = methods.sweep(known["acd"], "window", [4, 8.0])
    assert [(m.name, m.window) for m in windows] == [("acd@window=4", 4), ("acd@window=8", 8)]


def test_impossible_sweeps(known: dict[str, Method]) -> None:
    for name, key, values, message in (
        ("base", "alpha", [0.1], "method base has no contrast: there is no alpha to sweep"),
        ("acd", "alpha", [0.1, -1.0], "sweep of acd: alpha must be"),
        ("acd", "beta", [2.0], "sweep of acd: beta must be"),
        ("acd", "window", [0], "sweep of acd: window must be >= 1"),
        ("acd", "window", [1.5], "sweep of acd: window must be a whole number"),
        ("acd", "temp", [1.0], "cannot sweep 'temp'"),
    ):
        with pytest.raises(UsageError, match=message):
            methods.sweep(known[name], key, values)  # type: ignore[arg-type]


# --- Files of one's own -----------------------------------------------------------------------------------------------


def toml(value: object) -> str:
    return json.dumps(value)  # of strings, numbers and arrays of them


def write(path: Path, name: str = "own", before: str = "", **fields: object) -> Path:
    lines = [f"[methods.{name}]", *(f"{key} = {toml(value)}" for key, value in fields.items())]
    path.write_text(before + "\n".join(lines) + "\n")
    return path


def refusal(path: Path, pair: PromptPair = PAIR) -> str:
    """The message of the UsageError without the file's name in front; it must be one line."""
    with pytest.raises(UsageError) as caught:
        methods.load(path, pair)
    message = str(caught.value)
    assert message.isprintable() and message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def test_a_file_with_everything(tmp_path: Path, manual: PromptPair) -> None:
    path = tmp_path / "m.toml"
    path.write_text(
        """
[methods.full]
title = "Full"
source = "ours"
positive_text = '''
Be kind.
Be brief.
'''
negative_text = "Be rude."
user = "  Q: {prompt}\\nA:"
shots = [["Hi", "Hello"], ["Bye", "Goodbye"]]
alpha = 1
beta = 0.3
raw = true
window = 5

[methods."x.1"]
positive = "sp"
negative = "safe"

[methods.plain]
positive = "safe"
"""
    )
    found = methods.load(path, PAIR)
    assert list(found) == ["full", "x.1", "plain"]
    assert found["full"] == Method(
        name="full",
        title="Full",
        source="ours",
        positive="Be kind.\nBe brief.",
        negative=AdversarialText("Be rude."),
        user="  Q: {prompt}\nA:",
        shots=(("Hi", "Hello"), ("Bye", "Goodbye")),
        alpha=1.0,
        beta=0.3,
        raw=True,
        window=5,
    )
    assert found["x.1"] == Method("x.1", "x.1", "", PAIR.safe, manual.safe, alpha=0.4, beta=0.2)
    assert found["plain"].setup() == methods.builtin(PAIR)["base"].setup()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"positive": "none", "gamma": 1}, "gamma: unknown field; a method has title, source"),
        ({"title": "x"}, "positive: give positive (none, safe or sp) or positive_text, one of the two"),
        ({"positive": "sp", "positive_text": "Be kind."}, "positive: give positive (none, safe or sp)"),
        ({"positive": "system"}, "positive: 'system' is no prompt: choose none, safe or sp, or give positive_text"),
        ({"positive": 1}, "positive: must be a string, not an integer"),
        ({"positive": ["sp"]}, "positive: must be a string, not an array"),
        ({"positive_text": " \n"}, "positive_text: is empty"),
        ({"positive_text": "a\u0007b"}, "positive_text: holds the control character U+0007"),
        ({"positive_text": "a\u202eb"}, "positive_text: holds the control character U+202E"),
        ({"positive": "sp", "negative": "bad"}, "negative: 'bad' is no prompt: choose none, safe, sp, opposite or ap"),
        ({"positive": "sp", "negative": "ap", "negative_text": "x"}, "negative: give negative or negative_text"),
        ({"positive": "sp", "negative": "sp"}, "negative: is 'sp' as positive is"),
        ({"positive": "sp", "negative_text": 1.5}, "negative_text: must be a string, not a float"),
        ({"positive": "sp", "alpha": 0.5}, "alpha: there is no negative prompt to contrast with"),
        ({"positive": "sp", "alpha": 0}, "alpha: there is no negative prompt to contrast with"),
        ({"positive": "sp", "window": 4}, "window: there is no negative prompt to contrast with"),
        ({"positive": "sp", "negative": "ap", "alpha": 0}, "alpha: is 0, so the negative prompt is not used"),
        ({"positive": "sp", "negative": "ap", "alpha": -1}, "alpha must be finite and >= 0, not -1"),
        ({"positive": "sp", "negative": "ap", "alpha": 1e39}, "alpha must be finite and >= 0"),
        ({"positive": "sp", "negative": "ap", "alpha": "0.5"}, "alpha: must be a number, not a string"),
        ({"positive": "sp", "negative": "ap", "alpha": True}, "alpha: must be a number, not a boolean"),
        ({"positive": "sp", "negative": "ap", "beta": 1.5}, "beta must be in [0, 1], not 1.5"),
        ({"positive": "sp", "negative": "ap", "raw": 1}, "raw: must be true or false, not an integer"),
        ({"positive": "sp", "negative": "ap", "window": 0}, "window must be >= 1, not 0"),
        ({"positive": "sp", "negative": "ap", "window": 2.0}, "window must be a whole number of tokens, not 2.0"),
        ({"positive": "sp", "user": "Q: {}"}, "user must hold {prompt} exactly once, not 0 times"),
        ({"positive": "sp", "user": "{prompt}{prompt}"}, "user must hold {prompt} exactly once, not 2 times"),
        ({"positive": "sp", "shots": "Hi"}, "shots: must be an array of [user, assistant] arrays, not a string"),
        ({"positive": "sp", "shots": ["Hi", "Hello"]}, "shots: each must be an array of two strings"),
        ({"positive": "sp", "shots": [["Hi"]]}, "shots: each must be an array of two strings"),
        ({"positive": "sp", "shots": [["Hi", 2]]}, "shots: must be a string, not an integer"),
        ({"positive": "sp", "shots": [["Hi", ""]]}, "shots: is empty"),
        ({"positive": "sp", "title": "a\nb"}, "title: must be a single line"),
    ],
)
def test_a_mistake_is_named_with_file_line_method_and_field(
    tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    path = write(tmp_path / "m.toml", before="# a comment\n\n", **fields)
    assert refusal(path).startswith(f"line 3: method own: {message}")


def test_names(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    for name in ("Own", '"a b"', '"-a"', '"a@b"', f'"{"x" * 65}"', '""', '"a\\nb"'):
        assert "is no method name: up to 64 of a-z 0-9 . _ -" in refusal(write(path, name, positive="sp"))
    for name in methods.builtin(PAIR):
        assert refusal(write(path, name, positive="sp")) == (
            f"line 1: method {name}: is known already: choose another name"
        )
    assert list(methods.load(write(path, '"0.a_b-c"', positive="sp"), PAIR)) == ["0.a_b-c"]


def test_the_line_is_not_looked_for_inside_a_text(tmp_path: Path) -> None:
    before = '[methods.a]\npositive_text = """\n[methods.own]\n"""\n'
    assert refusal(write(tmp_path / "m.toml", before=before, positive="x")).startswith("line 5: method own: ")


def test_files_that_hold_no_methods(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    assert refusal(path) == "cannot be read: No such file or directory"
    assert refusal(tmp_path).startswith("not a file")
    for text, message in (
        ("", "holds no method: write a table [methods.NAME]"),
        ("[methods]", "holds no method"),
        ("methods = 3", "holds no method"),
        ("[method.a]\n", "method: unknown field; a method stands in a table [methods.NAME]"),
        ("[methods]\na = 3", "method a: must be a table [methods.a], not an integer"),
        ("[methods.a]\npositive = 'sp'\n[methods.a]", "Cannot declare ('methods', 'a') twice (at line 3"),
        ("[methods.a]\npositive = 'sp", "Expected"),
        ("x = " + "[" * 5000, "nested too deeply"),
    ):
        path.write_text(text)
        assert message in refusal(path), text
    path.write_bytes(b"[methods.a]\ntitle = 'caf\xe9'")
    assert refusal(path) == "line 2: not UTF-8: save the file in that encoding"
    path.write_text("#" * 1_000_001)
    assert refusal(path).startswith("larger than 1 MB")


def test_odd_paths_make_one_printable_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        methods.load(tmp_path / "a\n\x1b[31m.toml", PAIR)
    assert str(caught.value).isprintable() and "a\\n\\x1b[31m.toml: cannot be read" in str(caught.value)
    with pytest.raises(UsageError, match="cannot be read"):
        methods.load("nul\0byte.toml", PAIR)


# --- Adversarial prompts stay in the negative stream ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opposite", "ap"])
def test_an_adversarial_prompt_is_refused_by_name(tmp_path: Path, name: str) -> None:
    for fields in ({"positive": name}, {"positive": name, "negative": "sp"}):
        assert refusal(write(tmp_path / "m.toml", **fields)) == (
            f"line 1: method own: positive: {name!r} is an adversarial prompt, which may only stand in the negative "
            "stream"
        )


def test_an_adversarial_prompt_is_refused_as_a_text(tmp_path: Path, folder: Path, manual: PromptPair) -> None:
    other = "Be the worst assistant that there is."
    (folder / "other.toml").write_text(
        f'format = 1\nname = "other"\nsafe = "Be the best."\nadversarial = "{other}"\n', encoding="utf-8"
    )
    reverse = revealed(methods.builtin(PAIR)["rose"])
    assert reverse is not None
    owners = {
        "pair 'mine'": PAIR.adversarial.reveal_for_negative_stream(),
        "pair 'default'": manual.adversarial.reveal_for_negative_stream(),
        "pair 'other'": other,
        "method 'rose'": reverse,
    }
    path = tmp_path / "m.toml"
    for owner, text in owners.items():
        for place, fields in (
            ("positive", {"positive_text": f"Hello. {text.upper()} Thanks."}),
            ("user", {"positive": "none", "user": text.replace(" ", "\n ") + "\n\n{prompt}"}),
            ("user", {"positive": "none", "user": text.replace(" ", " {prompt} ", 1)}),
            ("shots", {"positive": "sp", "shots": [["Hi", "Hello"], [text, "Yes."]]}),
            ("shots", {"positive": "sp", "shots": [["Hi", text]]}),
        ):
            message = refusal(write(path, **fields))
            assert message.startswith(f"line 1: method own: {place}: holds the adversarial prompt of {owner}"), fields
        first, _, rest = text.partition(" ")
        message = refusal(write(path, positive_text=first, user=rest + " {prompt}"))
        assert "positive, shots and user together: holds" in message
        assert methods.load(write(path, positive="none", negative_text=text), PAIR)["own"].negative == AdversarialText(
            text
        )


def test_a_files_own_negative_is_adversarial_too(tmp_path: Path) -> None:
    text = "Do whatever anybody asks of you, at once."
    path = tmp_path / "m.toml"
    other = f'[methods.other]\npositive_text = "{text}"\n'
    first = f'[methods.first]\npositive = "none"\nnegative_text = "{text}"\nalpha = 0.5\n'
    for source in (other + first, first + other):
        path.write_text(source, encoding="utf-8")
        message = refusal(path)
        assert "method other: positive: holds the adversarial prompt of method 'first'" in message
    path.write_text(first, encoding="utf-8")
    earlier = methods.load(path, PAIR)
    (tmp_path / "n.toml").write_text(other, encoding="utf-8")
    assert methods.load(tmp_path / "n.toml", PAIR)
    with pytest.raises(UsageError, match="method 'first'"):
        methods.load(tmp_path / "n.toml", PAIR, earlier)
    with pytest.raises(UsageError, match="choose another name"):
        methods.load(path, PAIR, earlier)


def test_the_documented_fields_and_example(tmp_path: Path) -> None:
    text = DOCS.read_text("utf-8")
    for key in methods._KEYS:
        assert f"`{key}`" in text or f"\n{key} = " in text, key
    path = tmp_path / "m.toml"
    path.write_text(text.split("```toml\n")[1].split("```")[0])
    method = methods.load(path, PAIR)["kind-null"]
    assert numbers(method) == (0.4, 0.2, False, None) and method.negative is None and method.contrast
