"""acd bench: what is measured and printed, not how fast it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import curves
import peers
import pytest
import replay
import tiny_gguf

from acd_local.bench import cost, measuring, memory, questions
from acd_local.bench.first_token import FirstTokens
from acd_local.bench.rounds import Case
from acd_local.errors import InternalError, UsageError
from acd_local.runtime import llama

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--tokens", "8", "--rounds", "1", "-t", "1")


def test_every_strategy_is_measured(tiny: Callable[..., Path]) -> None:
    lines: list[str] = []
    settings: dict[str, Any] = {"tokens": 12, "rounds": 2, "threads": 1, "ctx_size": 1024}
    report = cost.run(str(tiny("chatml")), memory_too=False, progress=lines.append, **settings)
    assert lines[:3] == ["warming up", "round 1 of 2", "round 2 of 2"]
    assert [case.name for case in report.cases] == [
        "plain llama.cpp",
        "acd --plain",
        "contrast, shared",
        "contrast, split",
    ]
    assert (report.pair, report.alpha, report.beta) == ("default", 0.5, 0.1)
    assert list(report.groups) == ["strategies", "sampled", "repeat"]
    for cases in report.groups.values():
        assert list(cases) == [case.name for case in cases.values()] == ["stepwise", "deferred", "auto", "window 16"]
        for case in cases.values():
            assert len(case.ratio) == len(case.tokens_per_second) == len(case.each("first")) == 2
            assert all(0 < share <= 1 for share in case.each("compared") + case.each("accepted"))
            assert all(rows > 0 for rows in case.each("rows"))
        stepwise = cases["stepwise"]  # every position, nothing lost
        assert set(stepwise.each("compared")) == set(stepwise.each("accepted")) == {1.0}
        assert set(stepwise.each("rows")) == {2.0}
    assert report.cases[2].ratio == report.groups["strategies"]["auto"].ratio
    assert report.cases[0].ratio == [1.0, 1.0]
    assert all(case.cold_s for case in report.cases)


def test_memory_over_plain_and_a_cache(tiny: Callable[..., Path]) -> None:
    with llama.Model(tiny("chatml")) as model:
        for kv_type, n_ctx, cells in (("f16", 512, 512), ("f16", 600, 768)):
            with llama.Context(model, n_ctx=n_ctx, n_seq=1, kv_type=kv_type) as context:
                measuring.decode_rows(context, list(range(5, 45)), 0)
                values = 2 * 2 * 2 * 16  # two layers, keys and values, two heads of 16
                assert memory.kv_mb(context, n_ctx) == pytest.approx(cells * values * 2 / 1e6, rel=0.2)
    cases = [Case("plain llama.cpp", peak_mb=100.0), Case("contrast, shared", peak_mb=140.0)]
    first = FirstTokens(512, {})
    report = cost.Report("m", "p", 0.5, 0.1, 9, 1, 8, 1, cases, {}, first, kv_mb=25.0, costs=None)
    assert report.extra_mb == 15.0
    assert replace(report, cases=cases[:1]).extra_mb is None


def test_memory_is_measured_with_the_pair_that_was_asked_for(tiny: Callable[..., Path]) -> None:
    with pytest.raises(InternalError, match="no-such-pair"):
        memory.peak_mb(measuring.SHARED, str(tiny("chatml")), pair="no-such-pair", threads=1, ctx_size=512)


def test_models_that_cannot_run_ahead_are_measured_too(tiny: Callable[..., Path]) -> None:
    path = tiny("chatml", writer=tiny_gguf.write_mamba)
    report = cost.run(str(path), memory_too=False, tokens=6, rounds=1, threads=1, ctx_size=1024)
    strategies = report.groups["strategies"].values()
    assert all(case.ratio for case in strategies)
    assert all(set(case.each("accepted")) == {1.0} for case in strategies)
    assert report.costs is None


@pytest.mark.parametrize(("tokens", "rounds"), [(1, 1), (2, 0)])
def test_too_little_to_measure_is_refused(tokens: int, rounds: int) -> None:
    for measurement in (cost.run, replay.measure, curves.run, peers.run):
        with pytest.raises(UsageError, match="at least 2 tokens"):
            measurement("demo", tokens=tokens, rounds=rounds)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_table_has_all_groups(acd: Run, tiny: Callable[..., Path]) -> None:
    code, out, err = acd("bench", str(tiny("chatml")), *SMALL)
    assert code == 0
    lines = out.splitlines()
    assert "round 1 of 1" in err
    assert lines[3].startswith("plain llama.cpp")
    for line in lines[3:7]:  # peak memory, 10^6 bytes
        assert line.endswith(" MB") and float(line.split()[-2]) > 10
    assert lines[7].startswith("peak over plain + one KV cache of ")
    for name in measuring.STRATEGIES:
        assert sum(line.startswith(name + " ") for line in lines) >= 3
    assert "pair default, alpha 0.5, beta 0.1" in lines[0]
    assert sum(line.startswith("sampled, temperature 0.8") for line in lines) == 1
    assert sum("times what the better" in line for line in lines) == 3
    assert sum("first token of a question of" in line for line in lines) == 1


def test_json_holds_all_groups(acd: Run, tiny: Callable[..., Path], tmp_path: Path) -> None:
    pair = tmp_path / "calm.toml"
    pair.write_text('format = 1\nname = "calm"\nsafe = "Be kind."\nadversarial = "Be rude."\nalpha = 0.0\nbeta = 0.2\n')
    given = ("--quantize", "q8_0", "--no-memory", "--json", "--pair", str(pair))
    code, out, err = acd("bench", str(tiny("chatml")), *given, *SMALL)
    assert code == 0
    assert "q8_0" in err
    found = json.loads(out)
    assert found["cases"][0]["case"] == "plain llama.cpp"
    assert set(found["cases"][0]) >= {"case", "ratio_to_plain"}
    assert (found["pair"], found["alpha"], found["beta"]) == ("calm", 0.0, 0.2)
    for group in ("strategies", "sampled", "repeat"):
        assert [case["case"] for case in found[group]] == list(measuring.STRATEGIES)
        assert all(case["ratio_to_plain"] > 0 for case in found[group])
        assert found[group][0]["compared_share"] == 0  # alpha 0: nothing is contrasted
        assert found["auto_against_best"][group] > 0
    assert found["first_token"]["ways"]["plain llama.cpp"]["ratio_to_plain"] == 1


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
