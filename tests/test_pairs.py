"""Prompt pairs: what a file may hold, how its mistakes are named, and which pair a model gets."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import places
import pytest

from acd_local import Engine, pairs, vectors
from acd_local.errors import PairError, UsageError
from acd_local.pairs import AdversarialText, ModelMatch, PromptPair
from acd_local.runtime import gguf_header
from acd_local.runtime.gguf_header import GGUFInfo

TOKENIZER = "ab" * 32
SHIPPED = ["default", "qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct", "smollm2-135m-instruct"]
VALID = {
    "format": "1",
    "safe": '"Be careful and kind."',
    "adversarial": '"Be careless and unkind to all who ask."',
}


def write(folder: Path, stem: str = "mine", after: str = "", **fields: str | None) -> Path:
    """A pair file: VALID with `fields` replaced (None removes one), then `after` at its end."""
    lines = {"name": f'"{stem}"', **VALID, **fields}
    path = folder / f"{stem}.toml"
    text = "".join(f"{key} = {value}\n" for key, value in lines.items() if value is not None) + after
    path.write_bytes(text.encode())
    return path


def refusal(path: Path) -> str:
    """The one line a file is refused with, without its path."""
    with pytest.raises(PairError) as caught:
        pairs.load(path)
    message = str(caught.value)
    assert caught.value.exit_code == 5
    assert message.startswith(f"{path}: ")
    assert "\n" not in message and message.isprintable()
    return message.removeprefix(f"{path}: ")


def model(**fields: object) -> GGUFInfo:
    base = GGUFInfo(
        path=Path("m.gguf"), parts=(Path("m.gguf"),), size=1, architecture="llama", name="Tiny Model 1B",
        file_type="F16", context_length=512, n_layers=1, n_embd=8, n_vocab=32, tokenizer=TOKENIZER,
    )  # fmt: skip
    return dataclasses.replace(base, **fields)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the front of the search path."""
    monkeypatch.setenv("ACD_PROMPTS_DIR", str(tmp_path))
    return tmp_path


# --- Reading ----------------------------------------------------------------------------------------------------------


def test_a_full_file_is_read(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        safe='"""\n  Be careful.\n\tBe kind.\n"""',
        alpha="0",
        beta="1",
        after=f'[models]\narchitecture = "llama"\ntokenizer = "{TOKENIZER.upper()}"\nnames = ["A", "B"]\n'
        "[provenance]\nmethod = 'manual'\ndate = 2026-01-02\n[figures.demo]\nhlr = 0.9\n",
    )
    pair = pairs.load(path)
    assert (pair.name, pair.path) == ("mine", path)
    assert pair.safe == "Be careful.\n\tBe kind."
    assert pair.adversarial.reveal_for_negative_stream() == "Be careless and unkind to all who ask."
    assert (pair.alpha, pair.beta) == (0.0, 1.0) and isinstance(pair.alpha, float)
    assert pair.models == ModelMatch("llama", TOKENIZER, ("A", "B"))
    assert pair.provenance["method"] == "manual" and pair.figures == {"demo": {"hlr": 0.9}}


def test_a_minimal_file_leaves_the_defaults_open(tmp_path: Path) -> None:
    pair = pairs.load(write(tmp_path))
    assert (pair.alpha, pair.beta, pair.models, pair.provenance, pair.figures) == (None, None, ModelMatch(), {}, {})
    assert pair.models == ModelMatch()
    assert (pairs.DEFAULT_ALPHA, pairs.DEFAULT_BETA) == (0.5, 0.1)


def test_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    path = write(tmp_path, safe='"""Be\nkind."""')
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert pairs.load(path).safe == "Be\nkind."


@pytest.mark.parametrize(
    ("fields", "after", "message"),
    [
        ({"format": None}, "", "format: missing; write format = 1"),
        ({"format": "2"}, "", "line 2: format: newer than this acd-local reads (1): upgrade acd-local"),
        ({"format": "0xf" + "f" * 5000}, "", "line 2: format: newer than"),
        ({"format": "true"}, "", "line 2: format: must be the integer 1"),
        ({"format": "1.0"}, "", "line 2: format: must be the integer 1"),
        ({"name": None}, "", "name: missing"),
        ({"safe": None}, "", "safe: missing"),
        ({"adversarial": None}, "", "adversarial: missing"),
        ({"name": '"other"'}, "", "line 1: name: is 'other', but the file is called 'mine.toml'"),
        ({"name": '"../x"'}, "", "line 1: name: '../x' is no pair name"),
        ({"name": "7"}, "", "line 1: name: must be a string, not an integer"),
        ({"safe": "[1]"}, "", "line 3: safe: must be a string, not an array"),
        ({"safe": '" \\n\\t"'}, "", "line 3: safe: is empty"),
        ({"adversarial": '""'}, "", "line 4: adversarial: is empty"),
        ({"safe": '"a\\u001bb"'}, "", "line 3: safe: holds the control character U+001B"),
        ({"safe": '"a\\u0085b"'}, "", "line 3: safe: holds the control character U+0085"),
        ({"safe": '"a\\u0000b"'}, "", "line 3: safe: holds the control character U+0000"),
        ({"safe": '"a\\u202eb"'}, "", "line 3: safe: holds the control character U+202E"),
        ({"adversarial": '"  be CAREFUL\\n and kind. "'}, "", "line 4: adversarial: is the same text as safe"),
        ({"alpha": "-0.1"}, "", "line 5: alpha: -0.1 is out of range: it must be finite and >= 0"),
        ({"alpha": "nan"}, "", "line 5: alpha: nan is out of range"),
        ({"alpha": "inf"}, "", "line 5: alpha: inf is out of range"),
        ({"alpha": "1e39"}, "", "line 5: alpha: 1e+39 is out of range"),
        ({"alpha": "1" + "0" * 400}, "", "line 5: alpha: this number is out of range"),
        ({"alpha": '"0.5"'}, "", "line 5: alpha: must be a number, not a string"),
        ({"alpha": "true"}, "", "line 5: alpha: must be a number, not a boolean"),
        ({"beta": "1.01"}, "", "line 5: beta: 1.01 is out of range: it must be in [0, 1]"),
        ({"beta": "-1"}, "", "line 5: beta: -1 is out of range"),
        ({"beta": "nan"}, "", "line 5: beta: nan is out of range"),
        ({"temperature": "1"}, "", "line 5: temperature: unknown field; a pair has format, name, safe"),
        ({}, "\n['odd key'.c]\n", "line 6: odd key: unknown field"),
        ({'"a\\nb"': "1"}, "", "a\\nb: unknown field"),
        ({"models": "3"}, "", "line 5: models: must be a table, not an integer"),
        ({}, "[models]\n\ntokenizer = 'abc'\n", "line 7: models.tokenizer: must be a SHA-256 as 64 hex digits"),
        ({}, "[models]\narchitecture = 1\n", "line 6: models.architecture: must be a string, not an integer"),
        ({}, "[models]\nnames = 'A'\n", "line 6: models.names: must be an array of strings, not a string"),
        ({}, "[models]\nnames = ['A', 1]\n", "line 6: models.names: must be a string, not an integer"),
        ({}, "[models]\nname = 'A'\n", "line 6: models.name: unknown field; [models] knows architecture, tokenizer"),
        ({"models": "{name = 'A'}"}, "", "line 5: models.name: unknown field"),
        ({"provenance": "2026-01-01"}, "", "line 5: provenance: must be a table, not a date or time"),
        ({"figures": "[]"}, "", "line 5: figures: must be a table, not an array"),
        ({"alpha": "="}, "", "line 5: column 9: Invalid value"),
        ({"safe": '"open'}, "", "line 3: column"),
        ({}, 'x = """\nnever closed', "line 6: "),
        ({}, "safe = 'twice'\n", "line 5: column"),
        ({}, "x = " + "[" * 5000, "nested too deeply"),
        ({"alpha": "9" * 5000}, "", "Exceeds the limit"),
    ],
)
def test_a_mistake_is_named_with_line_and_field(
    tmp_path: Path, fields: dict[str, str | None], after: str, message: str
) -> None:
    assert refusal(write(tmp_path, after=after, **fields)).startswith(message)


def test_the_line_is_not_looked_for_inside_a_text(tmp_path: Path) -> None:
    path = write(tmp_path, safe='"""\nalpha = 1\n[models]\n"""', after="\n[provenance]\nbeta = 3\n", beta="2")
    assert refusal(path).startswith("line 8: beta: 2 is out of range")


def test_files_that_are_no_pair(tmp_path: Path, folder: Path) -> None:
    write(folder, "known")
    assert refusal(tmp_path / "absent.toml") == "no such file; known pairs: " + ", ".join(sorted([*SHIPPED, "known"]))
    (tmp_path / "folder.toml").mkdir()
    assert refusal(tmp_path / "folder.toml").startswith("not a file")
    latin = write(tmp_path, "latin")
    latin.write_bytes(latin.read_bytes().replace(b"careful", b"caref\xfcl"))
    assert refusal(latin) == "line 3: not UTF-8: save the file in that encoding"
    (tmp_path / "large.toml").write_text("#" * 1_000_001)
    assert refusal(tmp_path / "large.toml").startswith("larger than 1 MB")
    (tmp_path / "empty.toml").write_bytes(b"")
    assert refusal(tmp_path / "empty.toml").startswith("format: missing")


def test_odd_paths_make_one_printable_line(tmp_path: Path) -> None:
    with pytest.raises(PairError) as caught:
        pairs.load(tmp_path / "a\n\x1b[31m\udcff.toml")
    assert str(caught.value).isprintable() and "a\\n\\x1b[31m\\udcff.toml: no such file" in str(caught.value)
    with pytest.raises(PairError, match="no such file"):
        pairs.load("nul\0byte.toml")


# --- The adversarial text stays in its place --------------------------------------------------------------------------


def test_adversarial_text_is_no_string_and_does_not_become_one() -> None:
    text = AdversarialText("Be unkind.")
    assert not isinstance(text, str)
    assert "unkind" not in repr(text)
    pair = PromptPair("p", "Be kind.", text)
    assert "unkind" not in repr(pair) and "unkind" not in f"{pair}"
    for attempt in (
        str,
        format,
        lambda t: f"{t}",
        lambda t: "Be kind. " + t,
        lambda t: "".join([t]),
        "{}".format,
    ):
        with pytest.raises(TypeError):
            attempt(text)
    with pytest.raises(UsageError):
        AdversarialText(text)  # type: ignore[arg-type]
    assert pickle.loads(pickle.dumps(pair)) == copy.deepcopy(pair) == pair
    assert len({text, AdversarialText("Be unkind.")}) == 1


def test_a_pair_made_in_python_is_checked_like_a_file() -> None:
    bad = AdversarialText("Be unkind.")
    assert PromptPair("p", " Be kind. \n", bad, alpha=1).safe == "Be kind."
    for arguments in (
        {"safe": bad},
        {"adversarial": "Be unkind."},
        {"adversarial": AdversarialText("be  kind.")},
        {"safe": ""},
        {"alpha": -1.0},
        {"alpha": float("nan")},
        {"beta": 2.0},
        {"name": ""},
    ):
        with pytest.raises(PairError, match=f": {next(iter(arguments))}: "):
            PromptPair(**({"name": "p", "safe": "Be kind.", "adversarial": bad} | arguments))  # type: ignore[arg-type]


def test_system_text_with_the_adversarial_prompt_is_refused() -> None:
    pair = pairs.find("default")
    forbidden = pair.adversarial.reveal_for_negative_stream()
    for text in (forbidden, "Hello. " + forbidden.upper().replace(" ", "\n ") + " Thanks."):
        with pytest.raises(UsageError, match="adversarial prompt of pair 'default'"):
            pairs.refuse_adversarial(text, pair)
    with pytest.raises(UsageError, match="must be a string"):
        pairs.refuse_adversarial(pair.adversarial, pair)  # type: ignore[arg-type]
    pairs.refuse_adversarial(pair.safe + " Always follow the instruction.", pair)
    short = PromptPair("p", "Be kind.", AdversarialText("Be bad."))
    pairs.refuse_adversarial("Never say: be bad.", short)
    with pytest.raises(UsageError):
        pairs.refuse_adversarial(" BE bad. ", short)


def quoted(text: str) -> str:
    return '"""' + text.replace("\\", "\\\\") + '"""'


def test_a_file_with_the_texts_in_each_others_place_is_refused(folder: Path) -> None:
    default = pairs.find("default")
    forbidden = default.adversarial.reveal_for_negative_stream()
    message = refusal(write(folder, "swapped", safe=quoted(forbidden.upper()), adversarial=quoted(default.safe)))
    assert message.startswith("line 3: safe: is the adversarial text of pair 'default'")
    message = refusal(write(folder, "turned", adversarial=quoted(default.safe)))
    assert message.startswith("line 4: adversarial: is the safe text of pair 'default'")
    assert [pair.name for pair in pairs.available()] == SHIPPED, "shipped pairs stay, whatever lies beside them"
    assert pairs.find("default") == default


def test_a_file_with_the_adversarial_text_of_another_known_pair_is_refused(tmp_path: Path, folder: Path) -> None:
    write(folder, "known")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = write(elsewhere, safe=VALID["adversarial"], adversarial='"Something else."')
    assert "safe: is the adversarial text of pair 'known'" in refusal(path)


# --- Finding ----------------------------------------------------------------------------------------------------------


def test_find_takes_names_and_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(folder)
    assert pairs.find("mine") == pairs.find(str(path)) == pairs.find(path)
    monkeypatch.chdir(folder)
    assert pairs.find("mine.toml").name == pairs.find("./mine.toml").name == "mine"
    known = ", ".join(sorted([*SHIPPED, "mine"]))
    with pytest.raises(PairError, match=f"no prompt pair 'nine'; known pairs: {known};"):
        pairs.find("nine")
    with pytest.raises(PairError, match="no such file"):
        pairs.find("../mine")
    for odd in ("", ".", "a b", "x" * 300):
        with pytest.raises(PairError, match="no prompt pair"):
            pairs.find(odd)


def test_folders_are_searched_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACD_PROMPTS_DIR", raising=False)
    user, shipped = pairs.search_path()
    assert user.name == "prompts" and (shipped / "default.toml").is_file()
    monkeypatch.setenv("ACD_PROMPTS_DIR", str(tmp_path))
    assert pairs.search_path() == (tmp_path, user, shipped)
    path = write(tmp_path, "default")
    assert pairs.find("default").path == path
    assert [pair.path for pair in pairs.available()][:1] == [path]
    assert [pair.name for pair in pairs.available()] == SHIPPED


def test_a_broken_file_is_reported_by_name_and_passed_over_otherwise(folder: Path) -> None:
    broken = write(folder, "broken", alpha="-1", after=f"[models]\ntokenizer = '{TOKENIZER}'\n")
    write(folder, "good")
    (folder / ".#good.toml").write_text("an editor's lock file")
    assert [pair.name for pair in pairs.available()] == sorted([*SHIPPED, "good"])
    found, errors = pairs.scan()
    assert [pair.name for pair in found] == sorted([*SHIPPED, "good"])
    assert [str(error) for error in errors] == [
        f"{broken}: line 5: alpha: -1 is out of range: it must be finite and >= 0"
    ]
    with pytest.raises(PairError, match="alpha: -1"):
        pairs.find("broken")
    assert pairs.best_for(model()) is None


# --- Choosing ---------------------------------------------------------------------------------------------------------

ARCH, TOKEN, NAME = "architecture = 'llama'\n", f"tokenizer = '{TOKENIZER}'\n", "names = ['other', 'tiny-model-1b']\n"


@pytest.mark.parametrize(
    ("match", "info", "expected"),
    [
        ("", model(architecture="any", tokenizer=""), True),
        (ARCH, model(), True),
        (ARCH, model(architecture="gemma3"), False),
        (TOKEN, model(name="renamed"), True),
        (TOKEN, model(tokenizer="cd" * 32), False),
        (TOKEN, model(tokenizer=""), False),
        (NAME, model(architecture="gemma3"), True),
        (NAME, model(name="Tiny Model 2B"), False),
        (NAME, model(name=""), False),
        (ARCH + NAME, model(name="Tiny Model 2B"), False),
        (TOKEN + NAME, model(name="Tiny Model 2B"), True),
        (ARCH + TOKEN + NAME, model(architecture="gemma3"), False),
    ],
)
def test_fits(tmp_path: Path, match: str, info: GGUFInfo, expected: bool) -> None:
    assert pairs.fits(pairs.load(write(tmp_path, after=f"[models]\n{match}")), info) is expected


FITTED = f"{ARCH}{TOKEN}{NAME}n_layers = 1\nn_embd = 8\n"
FIGURES = "[figures]\nmeasure = 'refusals'\n"


@pytest.mark.parametrize(
    ("match", "figures", "info", "expected"),
    [
        (FITTED, FIGURES, model(), True),
        (FITTED, FIGURES, model(file_type="Q4_0", size=2), True),
        (FITTED, "", model(), False),
        (FITTED, FIGURES, model(name="Tiny Model 2B"), False),
        (FITTED, FIGURES, model(name=""), False),
        (FITTED, FIGURES, model(tokenizer="cd" * 32), False),
        (FITTED, FIGURES, model(architecture="gemma3"), False),
        (FITTED, FIGURES, model(n_layers=2), False),
        (FITTED, FIGURES, model(n_embd=16), False),
        (ARCH + TOKEN + NAME, FIGURES, model(), False),
        ("", FIGURES, model(), False),
    ],
)
def test_fitted(tmp_path: Path, match: str, figures: str, info: GGUFInfo, expected: bool) -> None:
    assert pairs.fitted(pairs.load(write(tmp_path, after=f"[models]\n{match}{figures}")), info) is expected


def test_a_fitted_pair_is_chosen_the_users_own_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def best(info: GGUFInfo) -> Path | None:
        found = pairs.best_for(info)
        return None if found is None else found.path

    write(folder, "generic")
    write(folder, "a", after=f"[models]\n{ARCH}{TOKEN}{NAME}")
    assert best(model()) is None
    second = write(folder, "c", after=f"[models]\n{FITTED}{FIGURES}")
    assert best(model()) == second
    write(folder, "d", after=f"[models]\n{FITTED}{FIGURES}")
    assert best(model()) == second, "the first by name"
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setattr(pairs, "search_path", lambda: (own, folder))
    first = write(own, "z", after=f"[models]\n{FITTED}{FIGURES}")
    assert best(model()) == first, "the first along the search path"
    assert best(model(n_embd=16)) is None
    first.unlink()
    write(own, "c")
    assert best(model()) == folder / "d.toml", "one that another of its name hides is not there"


def test_as_is_is_no_pairs_name(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, pairs.AS_IS)) == "line 1: name: 'as-is' means no pair at all: choose another name"
    with pytest.raises(PairError, match=r"^as-is means no prompt pair, and here one is needed; known pairs: default"):
        pairs.find(pairs.AS_IS)


# --- What ships, and warnings -----------------------------------------------------------------------------------------


def test_the_default_pair() -> None:
    pair = pairs.find("default")
    assert (pair.alpha, pair.beta) == (0.5, 0.1) and pair.models == ModelMatch()
    assert pair.adversarial.reveal_for_negative_stream().endswith("Always follow the instruction.")
    assert pair.path is not None and pairs.check(pair.path) == []


def test_the_demo_models_pair(demo: Path) -> None:
    """Fitted to that very file, chosen for it by itself, with a gate and with soft prompts of its own width."""
    info = gguf_header.read_header(demo)
    pair = pairs.best_for(info)
    assert pair is not None and pair.name == "smollm2-135m-instruct"
    assert pair.provenance["method"] == "acd fit"
    assert pair.provenance["model_sha256"] == hashlib.sha256(demo.read_bytes()).hexdigest()
    assert pair.path is not None and pairs.check(pair.path) == []
    assert pair.vectors_path is not None and pair.sha256
    found = vectors.load(pair.vectors_path, sha256=pair.sha256)
    assert found.soft is not None and found.gate is not None and pair.gate is not None
    found.soft.check(info)
    found.gate.check(info)
    assert found.soft.safe.rows.shape[1] == info.n_embd
    assert {"as_is", "pair", "auc", "soft"} <= set(pair.figures)


def test_the_demo_models_gate_tells_requests_apart(demo: Path) -> None:
    """Twenty requests of ours, ten of them harmful, that nothing was trained or chosen on."""
    rows = places.rows("requests.jsonl")
    with Engine(demo, ctx_size=512, threads=1) as engine:
        assert engine.pair is not None and engine.pair.gate is not None
        passed = [engine.gate_probability(r["prompt"]) >= engine.pair.gate.threshold for r in rows]
    assert all(p for p, r in zip(passed, rows, strict=True) if r["harmful"])
    false_alarms = [r["prompt"] for p, r in zip(passed, rows, strict=True) if p and not r["harmful"]]
    assert false_alarms in ([], ["How can I kill a frozen program on my laptop?"])


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "default"])
def test_shipped_pairs_refuse_more_than_their_models_and_say_where_it_was_measured(name: str) -> None:
    pair = pairs.find(name)
    as_is, with_pair = (pair.figures[key] for key in ("as_is", "pair"))
    assert with_pair["harmful"]["low"] > as_is["harmful"]["value"]  # type: ignore[index]
    assert with_pair["ordinary"]["value"] <= as_is["ordinary"]["high"]  # type: ignore[index]
    assert pair.models.names and pair.models.tokenizer and pair.models.n_layers and pair.gate


def test_check_warns_about_what_is_valid_but_unwise(tmp_path: Path) -> None:
    path = write(tmp_path, safe=f'"{"kind " * 201}"', adversarial='"<|im_end|> Be bad."', alpha="1.5")
    assert [warning.split(":")[0] for warning in pairs.check(path)] == [
        "safe",
        "adversarial",
        "safe",
        "alpha",
        "provenance",
    ]
    with pytest.raises(PairError):
        pairs.check(write(tmp_path, safe=None))


def test_importing_pairs_loads_nothing_heavy() -> None:
    code = "import sys, acd_local.pairs as p; p.find('default'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert not {"numpy", "llama_cpp", "click", "rich", "jinja2"} & set(done.stdout.split())


GATE = "[gate]\nthreshold = 0.5\nhelpful = 'Be helpful.'\nlow = 0.1\nlook = 32\nanswer_threshold = 0.9\n"


def test_demonstrations_and_gate_are_read(tmp_path: Path) -> None:
    shots = "[[shots]]\nuser = 'Steal!'\nassistant = 'No.'\n[[shots]]\nuser = 'Lie!'\nassistant = 'Never.'\n"
    pair = pairs.load(write(tmp_path, after=shots + GATE))
    assert pair.shots == (("Steal!", "No."), ("Lie!", "Never."))
    assert pair.gate == pairs.GateSettings(0.5, "Be helpful.", 0.1, 32, 0.9)
    assert pairs.load(write(tmp_path, after="[gate]\nthreshold = 1\n")).gate == pairs.GateSettings(1.0)


SHOT = "[[shots]]\nuser = 'Steal!'\nassistant = 'No.'\n"


@pytest.mark.parametrize(
    ("after", "says"),
    [
        ("[[shots]]\nuser = 'Steal!'\n", "line 5: shots: each needs user and assistant"),
        ("[[shots]]\nuser = ''\nassistant = 'No.'\n", "line 6: shots.user: is empty"),
        (f"{SHOT}[[shots]]\nuser = 'Lie!'\n", "line 8: shots: each needs user and assistant"),
        (f"{SHOT}[[shots]]\nuser = 'Lie!'\nassistant = 3\n", "line 10: shots.assistant: must be a string"),
        (f"{SHOT}[[shots]]\nuser = '''\n[[shots]]\n'''\n'bad' = 1\n", "line 12: shots.bad: unknown field"),
        ("shots = [{user = 'Steal!', assistant = ''}]\n", "line 5: shots.assistant: is empty"),
        ("[[shots.more]]\n", "line 5: shots: must be an array of tables"),
        (f"{SHOT}[[soft]]\n", "line 8: soft: must be a table"),
        ("shots = 3\n", "line 5: shots: must be an array of tables"),
        ("[gate]\n", "gate.threshold: missing"),
        ("[gate]\nthreshold = 1.5\n", "gate.threshold: 1.5 is out of range"),
        ("[gate]\nthreshold = 0.5\nlow = 0.1\n", "gate: helpful and low go together"),
        ("[gate]\nthreshold = 0.5\nhelpful = 'Be.'\nlow = 0.6\n", "gate.low: 0.6 is above the threshold 0.5"),
        ("[gate]\nthreshold = 0.5\nlook = 1.5\n", "gate.look: must be a whole number"),
        ("[gate]\nthreshold = 0.5\nalpha = 1\n", "gate.alpha: unknown field"),
        ("[models]\nn_layers = 0\n", "models.n_layers: must be a whole number from 1"),
    ],
)
def test_mistakes_in_demonstrations_gate_and_size(tmp_path: Path, after: str, says: str) -> None:
    assert says in refusal(write(tmp_path, after=after))
