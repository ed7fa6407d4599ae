"""acd bench: what is measured and printed, not how fast it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peers
import pytest
import tiny_gguf

from acd_local.bench import cost, measuring, memory, questions
from acd_local.bench.first_token import FirstTokens
from acd_local.bench.rounds import Case
from acd_local.errors import ContextError, InternalError, UsageError
from acd_local.runtime import llama
from acd_local.runtime.batch_costs import BatchCosts

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--tokens", "8", "--rounds", "1", "-t", "1")


ORDINARY = ["plain llama.cpp", "acd --plain", "contrast", "contrast, no drafts", "contrast, sampled"]


def test_every_case_is_measured(tiny: Callable[..., Path]) -> None:
    lines: list[str] = []
    settings: dict[str, Any] = {"tokens": 12, "rounds": 2, "threads": 1, "ctx_size": 1024}
    model = str(tiny("chatml"))
    report = cost.run(model, draft=model, memory_too=False, progress=lines.append, **settings)
    assert lines[:3] == ["warming up", "round 1 of 2", "round 2 of 2"]
    assert (report.pair, report.alpha, report.beta, report.draft) == ("default", 0.5, 0.1, model)
    assert {group: list(cases) for group, cases in report.groups.items()} == {
        "questions": [*ORDINARY, "contrast, --layout split", "contrast, --draft"],
        "repeats": [*ORDINARY, "contrast, --draft"],
        "code": [*ORDINARY[:4], "contrast, --draft"],
    }
    for cases in report.groups.values():
        assert cases["plain llama.cpp"].ratio == [1.0, 1.0]
        assert set(cases["contrast, no drafts"].each("per_batch")) == {1.0}
        for name, case in cases.items():
            assert case.name == name
            assert len(case.ratio) == len(case.tokens_per_second) == len(case.each("first")) == 2
    assert report.costs is not None and report.memory == []


def test_a_gate_is_measured_where_there_is_one(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "GROUPS", {"questions": cost.GROUPS["questions"]})
    report = cost.run(str(demo), memory_too=False, tokens=4, rounds=1)
    assert list(report.groups["questions"])[:3] == ["plain llama.cpp", "acd --plain", "behind the gate"]


def test_memory_over_plain_and_a_cache(tiny: Callable[..., Path]) -> None:
    with llama.Model(tiny("chatml")) as model:
        for kv_type, n_ctx, cells in (("f16", 512, 512), ("f16", 600, 768)):
            with llama.Context(model, n_ctx=n_ctx, n_seq=1, kv_type=kv_type) as context:
                measuring.decode_rows(context, list(range(5, 45)), 0)
                values = 2 * 2 * 2 * 16  # two layers, keys and values, two heads of 16
                assert memory.kv_mb(context, n_ctx) == pytest.approx(cells * values * 2 / 1e6, rel=0.2)
    cases = [Case("plain llama.cpp", peak_mb=100.0), Case("contrast", peak_mb=140.0)]
    first = FirstTokens(512, {})
    report = cost.Report("m", "p", 0.5, 0.1, None, 9, 1, 8, 1, {}, cases, first, kv_mb=25.0, costs=None)
    assert report.extra_mb == 15.0
    assert replace(report, memory=cases[:1]).extra_mb is None


def test_memory_is_measured_with_the_pair_that_was_asked_for(tiny: Callable[..., Path]) -> None:
    with pytest.raises(InternalError, match="no-such-pair"):
        memory.peak_mb(measuring.SHARED, str(tiny("chatml")), pair="no-such-pair", threads=1, ctx_size=512)


def test_models_that_cannot_be_drafted_for_are_measured_too(tiny: Callable[..., Path]) -> None:
    path = tiny("chatml", writer=tiny_gguf.write_mamba)
    report = cost.run(str(path), memory_too=False, tokens=6, rounds=1, threads=1, ctx_size=1024)
    ours = [case for cases in report.groups.values() for name, case in cases.items() if name != "plain llama.cpp"]
    assert all(case.ratio and set(case.each("per_batch")) == {1.0} for case in ours)
    assert report.costs is None
    with pytest.raises(UsageError, match="nothing can be drafted"):
        cost.calibrate(str(path), threads=1)


@pytest.mark.parametrize(("tokens", "rounds"), [(1, 1), (2, 0)])
def test_too_little_to_measure_is_refused(tokens: int, rounds: int) -> None:
    for measurement in (cost.run, peers.run):
        with pytest.raises(UsageError, match="at least 2 tokens"):
            measurement("demo", tokens=tokens, rounds=rounds)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_table_has_all_groups(acd: Run, tiny: Callable[..., Path]) -> None:
    code, out, err = acd("bench", str(tiny("chatml")), *SMALL)
    assert code == 0
    lines = out.splitlines()
    assert "round 1 of 1" in err
    assert "pair default, alpha 0.5, beta 0.1, vocabulary" in lines[0]
    for title in ("ordinary questions", "texts that repeat a text", "code"):
        assert sum(line.startswith(f"{title} ") for line in lines) == 1
    for name in ORDINARY[:4]:
        assert sum(line.startswith(name + "  ") for line in lines) == 3
    assert not any("--draft" in line for line in lines)
    assert sum("first token of a question of" in line for line in lines) == 1
    (peaks,) = (line for line in lines if line.startswith("peak memory: plain llama.cpp "))
    assert peaks.count(" MB") == len(peaks.split(", contrast")) + 1
    assert lines[-2].startswith("contrast over plain + one KV cache of ")
    assert lines[-1].startswith("batches in rows of ") and "of one stream 1: 1, 2: " in lines[-1]


def test_json_holds_all_groups(acd: Run, tiny: Callable[..., Path], tmp_path: Path) -> None:
    pair = tmp_path / "calm.toml"
    pair.write_text('format = 1\nname = "calm"\nsafe = "Be kind."\nadversarial = "Be rude."\nalpha = 0.0\nbeta = 0.2\n')
    given = ("--quantize", "q8_0", "--no-memory", "--json", "--pair", str(pair))
    code, out, err = acd("bench", str(tiny("chatml")), *given, *SMALL)
    assert code == 0
    assert "q8_0" in err
    found = json.loads(out)
    assert (found["pair"], found["alpha"], found["beta"], found["draft"]) == ("calm", 0.0, 0.2, None)
    assert list(found["groups"]) == ["questions", "repeats", "code"]
    for cases in found["groups"].values():
        assert cases[0]["case"] == "plain llama.cpp"
        assert all(case["ratio_to_plain"] > 0 for case in cases)
    assert found["first_token"]["ways"]["plain llama.cpp"]["ratio_to_plain"] == 1
    assert found["batch_costs"]["one"][0] == 1


def test_what_a_batch_delays_is_told(acd: Run, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    costs = BatchCosts(0.01, (1.0, 2.0), (1.5, 2.5), delays=(4.5, 5.0))
    monkeypatch.setattr(cost, "calibrate", lambda *args, **given: costs)
    code, out, _ = acd("bench", str(tiny("chatml")), "--calibrate", "-t", "1")
    assert code == 0
    assert out.rstrip().endswith(
        "of each of two 1: 1.5, 2: 2.5; single rows behind a larger batch are late by 4.5 and 5"
    )


def test_calibrating_measures_anew_and_keeps_it(
    acd: Run, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACD_CACHE_DIR", str(tmp_path))
    code, out, _ = acd("bench", str(tiny("chatml")), "--calibrate", "-t", "1")
    assert code == 0 and out.startswith("batches in rows of ") and out.count("\n") == 1
    (kept,) = (tmp_path / "batchcosts").iterdir()
    kept.write_text("{}")
    code, out, _ = acd("bench", str(tiny("chatml")), "--calibrate", "-t", "1", "--json")
    assert code == 0 and json.loads(out) == json.loads(kept.read_text())


@pytest.mark.parametrize("mode", [(), ("--parallel", "2")])
def test_a_missing_pair_is_said_in_one_line(acd: Run, tiny: Callable[..., Path], mode: tuple[str, ...]) -> None:
    code, out, err = acd("bench", str(tiny("chatml")), *mode, "--pair", "no-such-pair", *SMALL)
    assert (code, out) == (5, "")
    assert "no-such-pair" in err.splitlines()[-1]


def test_prompts_per_minute(acd: Run, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(questions.TEXTS, "instructions", [""])
    args = ("bench", str(tiny("chatml")), "--parallel", "3", "-c", "512", *SMALL)
    code, out, _ = acd(*args)
    assert code == 0
    assert [line[:10] for line in out.splitlines()] == ["6 prompts,", "one by one", "  3 at onc", "texts that"]
    code, out, _ = acd(*args, "--json")
    assert code == 0 and set(json.loads(out)["prompts_per_minute"]) == {"1", "3"}


def test_temporary_weights_are_removed(
    acd: Run, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen: list[list[Path]] = []

    def failing(model: str, **_: object) -> Any:
        seen.append(list(tmp_path.rglob("*.gguf")))
        raise UsageError("no")

    monkeypatch.setattr(cost, "run", failing)
    code, _, _ = acd("bench", str(tiny("chatml")), "--quantize", "q4_0")
    assert code == 2
    assert [len(files) for files in seen] == [1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("flag", "value"), [("--quantize", "q3_k"), ("--tokens", "1"), ("--parallel", "1")])
def test_bad_input_is_one_line(acd: Run, tiny: Callable[..., Path], flag: str, value: str) -> None:
    got, out, err = acd("bench", str(tiny("chatml")), flag, value)
    assert (got, out) == (2, "")
    assert err.startswith("acd: ")
    assert err.count("\n") == 1
    assert flag in err and value in err


@pytest.mark.parametrize("mode", [(), ("--parallel", "2"), ("--quantize", "q8_0")])
def test_a_missing_model_is_one_line(acd: Run, mode: tuple[str, ...]) -> None:
    got, out, err = acd("bench", "/no/such.gguf", *mode)
    assert (got, out) == (3, "")
    assert err.count("\n") == 1


def test_a_context_too_small_for_the_texts_is_one_line(tiny: Callable[..., Path]) -> None:
    with pytest.raises(ContextError, match=r"do not fit a context of 512: give a larger --ctx-size"):
        cost.run(str(tiny("chatml")), memory_too=False, tokens=64, rounds=1, threads=1, ctx_size=512)
