"""benchmarks/replay.py and batches.py: answers of one model as batches of another, and what batches cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import batches
import curves
import pytest
import replay
import tiny_gguf

from acd_local.bench.measuring import STRATEGIES, Recorder, by_strategy
from acd_local.bench.questions import text_of
from acd_local.engine import Engine
from acd_local.errors import UsageError
from acd_local.runtime import llama

FEW: dict[str, Any] = {"tokens": 12, "rounds": 2, "threads": 1, "ctx_size": 1024}
Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("name", ["stepwise", "deferred", "window 16"])
def test_a_replay_decodes_the_recorded_shapes(engine: Engine, tiny: Callable[..., Path], name: str) -> None:
    recorded = by_strategy(engine, name, text_of("questions", 0), 24)
    assert len(recorded.batches) > 10
    with llama.Model(tiny("chatml", seed=9)) as model, batches.pair_context(model, 1024, 1) as context:
        with Recorder(context) as recorder:
            found = replay.replay(context, recorded)
        ranges = [context.position_range(seq) for seq in (0, 1)]
    assert recorder.batches[-len(recorded.batches) :] == list(recorded.batches)
    prompts = recorder.batches[: -len(recorded.batches)]
    assert not any(sum(b.wanted) for b in prompts)
    assert [sum(b.rows(seq) for b in prompts) for seq in (0, 1)] == [recorded.prompt(seq) for seq in (0, 1)]
    assert min(recorded.prompt(seq) for seq in (0, 1)) > 20
    ends = [
        max(p for p, s in zip(b.positions, b.seqs, strict=True) if s == seq)
        for seq in (0, 1)
        for b in [b for b in recorded.batches if seq in b.seqs][-1:]
    ]
    assert ranges == [(0, end) for end in ends]
    assert found.steps == recorded.steps
    assert found.seconds > 0
    assert (found.rows, found.accepted, found.compared) == (recorded.rows, recorded.accepted, recorded.compared)
    assert found.outside is None


def test_a_replay_report(tiny: Callable[..., Path]) -> None:
    lines: list[str] = []
    source = str(tiny("chatml"))
    report = replay.measure(str(tiny("chatml", seed=9)), source=source, progress=lines.append, **FEW)
    assert lines == ["measuring batches", f"recording answers of {source}", "round 1 of 2", "round 2 of 2"]
    for cases in report.groups.values():
        assert list(cases) == list(STRATEGIES)
        assert all(len(case.ratio) == 2 for case in cases.values())
        assert set(cases["stepwise"].each("rows")) == {2.0}
    assert report.costs.rows[1] == 1.0
    assert set(report.costs.rows) == set(batches.SIZES)


def test_models_that_cannot_forget_replay_nothing(tiny: Callable[..., Path]) -> None:
    recurrent, model = str(tiny("chatml", writer=tiny_gguf.write_mamba)), str(tiny("chatml"))
    with pytest.raises(UsageError, match="stepwise"):
        replay.measure(model, source=recurrent, **FEW)
    for measurement in (replay.measure, curves.run):
        with pytest.raises(UsageError, match="stepwise"):
            measurement(recurrent, **FEW)


def test_the_script_prints_lines_or_json(script: Run, tiny: Callable[..., Path]) -> None:
    source = tiny("chatml")
    args = (replay.main, tiny("chatml", seed=9), "--source", source)
    code, out, _ = script(*args, "--quantize", "q8_0")
    assert code == 0
    for name in STRATEGIES:
        assert out.count(f"\n{name:<28}") == 2
    code, out, _ = script(*args, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["source"] == str(source)
    assert found["costs"]["rows"]["1"] == 1.0
    assert [case["case"] for case in found["strategies"]] == list(STRATEGIES)


def test_batches_of_all_sizes_are_measured(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "REPEATED", 13)
    with (
        llama.Model(tiny("chatml")) as model,
        batches.pair_context(model, 512, 1) as context,
        Recorder(context) as recorder,
    ):
        costs = batches.batch_costs(context)
    shapes = [(b.rows(0), b.rows(1), sum(b.wanted)) for b in recorder.batches[2:]]
    assert {(k, 0, k) for k in batches.SIZES} | {(1, 1, 2)} == set(shapes)
    assert len(shapes) == 14 * (len(batches.SIZES) + 1)
    assert costs.fit is not None
    assert costs.fit.pair == pytest.approx(costs.pair, abs=0.01)
    assert costs.summary()["rows"][1] == 1.0
