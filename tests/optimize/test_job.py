"""What an optimization is asked for, what cannot be optimized, and the files of a prompt pair."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from hashlib import sha256
from pathlib import Path

import pytest
import tiny_gguf

pytest.importorskip("torch")

import torch
from optimize_runs import MANUAL

from acd_local import pairfile, pairs, softpair, vectors
from acd_local.errors import InternalError, ModelError, PairError, UsageError
from acd_local.optimize import job, weights
from acd_local.runtime.gguf_header import read_header
from acd_local.vectors import Vectors

# --- Repeating --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("seed = 0", "has no seed"),
        ("conversations = 8", "has no conversations"),
        ("soft_safe_steps = 12", "has no soft_safe_steps"),
        ("text_safe_rounds = 2", "has no text_safe_rounds"),
        ("weights = [1.0, 1.0, 1.0]", "has no weights"),
        ("max_tokens = 96", "has no max_tokens"),
        ('anchors_sha256 = "1"', "has no anchors_sha256"),
    ],
)
def test_what_cannot_be_repeated_is_refused_in_one_line(tmp_path: Path, line: str, says: str) -> None:
    steps = "soft_safe_steps = 12\nsoft_adversarial_steps = 12\ntext_safe_rounds = 2\ntext_safe_steps = 14\n"
    steps += "text_adversarial_rounds = 1\ntext_adversarial_steps = 13\n"
    said = 'seed = 0\nbudget_seconds = 60.0\nweights = [1.0, 1.0, 1.0]\ndtype = "bfloat16"\nmax_tokens = 96\n'
    said += (
        f'model_sha256 = "{"0" * 64}"\nanchors_sha256 = "1"\nconversations = 8\nmicro = 16\n[provenance.steps]\n{steps}'
    )
    path = tmp_path / "x.toml"
    path.write_text(MANUAL.replace("default", "x") + f"[provenance]\n{said}")
    _, rest = job.read_repeat(path)
    assert rest.search("safe") == {"rounds": 2, "steps": 12}
    assert rest.search("adversarial") == {"rounds": 1, "steps": 12}
    path.write_text(path.read_text().replace(f"{line}\n", ""))
    with pytest.raises(UsageError, match=says) as caught:
        job.read_repeat(path)
    assert "\n" not in str(caught.value)


# --- The files --------------------------------------------------------------------------------------------------------

AWKWARD = 'He said "no" and """no""", C:\\new\\temp\n\n  indented\ttab, \\u0041, é 中文 \U0001f600 \u200b end"'


def pair_file(**given: object) -> pairfile.PairFile:
    plain = pairfile.PairFile("mine", "Be kind.", "Be mean.", 0.5, 0.1, {"alpha": 0.4, "beta": 0.1}, {}, {}, {})
    return replace(plain, **given)  # type: ignore[arg-type]


def test_toml_holds_any_text() -> None:
    provenance = {
        "text": 'a "quoted" \\ path\n\x01\x7f',
        "seed": 3,
        "soft": True,
        "ratio": 1e-7,
        "when": date(2026, 11, 24),
        "weights": [1.0, 2.5],
        "table": {"a b": 1, "none": None},
        "nothing": None,
    }
    shots = (("one\r\ntwo", "\u202ethree"),)
    file = pair_file(safe=AWKWARD, adversarial="x\\", alpha=None, provenance=provenance, shots=shots)
    text = pairfile.as_toml(file)
    assert not [c for c in text if c != "\n" and not c.isprintable()]
    table = tomllib.loads(text)
    assert table["shots"] == [{"user": "one\r\ntwo", "assistant": "\u202ethree"}]
    assert table["safe"] == AWKWARD
    assert table["adversarial"] == "x\\"
    assert "alpha" not in table
    assert table["provenance"] == {
        "text": 'a "quoted" \\ path\n\x01\x7f',
        "seed": 3,
        "soft": True,
        "ratio": 0.0,
        "when": date(2026, 11, 24),
        "weights": [1.0, 2.5],
        "table": {"a b": 1},
    }


@pytest.fixture
def soft() -> Iterator[softpair.SoftPair]:
    rows = torch.arange(12.0).reshape(3, 4).numpy()
    of = {"architecture": "llama", "tokenizer": "ab" * 32, "n_embd": 4, "n_layer": 2, "name": "tiny"}
    yield softpair.SoftPair(softpair.SoftPrompt(rows), softpair.AdversarialRows(rows + 1), **of)


@pytest.mark.parametrize(
    "gate",
    [
        pairs.GateSettings(0.5),
        pairs.GateSettings(0.5, "Be helpful.", 0.2, 64, 0.9),
        pairs.GateSettings(0.5, "Be helpful."),  # requests are read under that text, whoever answers them
    ],
)
def test_a_gates_settings_are_read_back_as_they_were(gate: pairs.GateSettings, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(pairfile.as_toml(pair_file(gate=pairfile.gate_table(gate))))
    assert pairs.load(tmp_path / "mine.toml").gate == gate
    assert pairfile.gate_table(None) == {}


def test_written_files_are_whole_and_nothing_else_is_left(soft: softpair.SoftPair, tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "mine.toml"
    pairfile.write(target, pair_file(safe=AWKWARD), Vectors(soft, None), "<p>é")
    assert pairs.load(target).safe == AWKWARD.strip()
    assert sorted(p.name for p in target.parent.iterdir()) == ["mine.report.html", "mine.safetensors", "mine.toml"]
    assert vectors.load(target.with_suffix(".safetensors")).soft.safe == soft.safe


def test_a_new_result_keeps_modes_and_links(soft: softpair.SoftPair, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "mine.toml", tmp_path / "elsewhere.toml"
    pairfile.write(target, pair_file(), Vectors(soft, None), "first")
    target.replace(elsewhere)
    target.symlink_to("elsewhere.toml")
    for path in pairfile.outputs(target):
        path.chmod(0o640)
    pairfile.write(target, pair_file(safe="Be very kind."), Vectors(soft, None), "second")
    assert target.is_symlink() and pairs.load(target).safe == "Be very kind."
    assert {path.stat().st_mode & 0o777 for path in pairfile.outputs(target)} == {0o640}
    assert len(list(tmp_path.iterdir())) == 4


def test_a_crash_between_two_files_pairs_no_rows_with_anothers_text(
    soft: softpair.SoftPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "mine.toml"
    pairfile.write(target, pair_file(), Vectors(soft, None), "first")
    assert pairs.load(target).sha256 == sha256((tmp_path / "mine.safetensors").read_bytes()).hexdigest()
    whole, done = Path.replace, []

    def replace_once(self: Path, other: Path) -> Path:
        if other.parent == tmp_path:
            if done:
                raise OSError("power cut")
            done.append(other)
        return whole(self, other)

    newer = replace(soft, safe=softpair.SoftPrompt(soft.safe.rows + 5))
    monkeypatch.setattr(Path, "replace", replace_once)
    with pytest.raises(UsageError, match="power cut"):
        pairfile.write(target, pair_file(safe="Be very kind."), Vectors(newer, None), "second")
    found = pairs.load(target)
    assert found.vectors_path is not None
    with pytest.raises(PairError, match=r"not the vectors that mine\.toml was written with") as caught:
        vectors.load(found.vectors_path, sha256=found.sha256)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    pairfile.write(target, pair_file(), Vectors(newer, None), "second")
    assert vectors.load(found.vectors_path, sha256=pairs.load(target).sha256).soft.safe == newer.safe


def test_a_result_that_is_no_pair_replaces_nothing(soft: softpair.SoftPair, tmp_path: Path) -> None:
    target = tmp_path / "mine.toml"
    pairfile.write(target, pair_file(), Vectors(soft, None), "first")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for wrong in ({"safe": " "}, {"safe": "a\u202eb"}, {"adversarial": "be  KIND."}, {"alpha": -1.0}):
        with pytest.raises(InternalError, match="no valid pair"):
            pairfile.write(target, pair_file(**wrong), Vectors(soft, None), "second")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_targets_are_checked_first(tmp_path: Path) -> None:
    pairfile.check_target(tmp_path / "new" / "mine.toml", force=False)
    assert not list(tmp_path.iterdir())
    for name in ("mine", "mine.tom", "a b.toml", "-a.toml", "x" * 70 + ".toml", ".toml"):
        with pytest.raises(UsageError, match="-o"):
            pairfile.check_target(tmp_path / name, force=True)
    for taken in ("mine.toml", "mine.safetensors", "mine.report.html"):
        (tmp_path / taken).write_text("x")
        with pytest.raises(UsageError, match="--force"):
            pairfile.check_target(tmp_path / "mine.toml", force=False)
        pairfile.check_target(tmp_path / "mine.toml", force=True)
        (tmp_path / taken).unlink()
    (tmp_path / "mine.toml").mkdir()
    with pytest.raises(UsageError, match="no file"):
        pairfile.check_target(tmp_path / "mine.toml", force=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot write"):
        pairfile.check_target(tmp_path / "file" / "mine.toml", force=False)


# --- What cannot be optimized -----------------------------------------------------------------------------------------


def test_models_that_torch_cannot_have_are_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    info = read_header(tiny("chatml"))
    weights.check_file(info)
    for architecture, says in (
        ("mamba", "cannot train mamba models; it can train .*llama"),
        ("qwen2vl", "cannot train qwen2vl models"),
        ("tokenizer", "cannot train"),
    ):
        with pytest.raises(ModelError, match=says):
            weights.check_file(replace(info, architecture=architecture))
    with pytest.raises(ModelError, match="join the parts"):
        weights.check_file(replace(info, parts=(info.path, info.path)))


def test_models_with_scaled_positions_are_refused(tiny: Callable[..., Path]) -> None:
    """transformers leaves these out of what it reads."""
    long_rope = tiny("phi3", writer=tiny_gguf.write_phi3)
    for path in (long_rope, tiny("chatml", rope_scaling="linear")):
        with pytest.raises(ModelError, match=r"with scaled rotary positions \((long rope|linear)\)") as caught:
            weights.check_file(read_header(path))
        assert "\n" not in str(caught.value)
    weights.check_file(read_header(tiny("chatml", rope_scaling="none")))
