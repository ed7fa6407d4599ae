"""What rows cost on a machine: measured, kept, and measured again."""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from manual import DEFAULT
from strategies import PROMPTS, N

from acd_local.engine import Engine
from acd_local.options import Options
from acd_local.runtime import machine, rowcosts
from acd_local.runtime.draft_policy import DraftPolicy, expected
from acd_local.runtime.rowcosts import MAX_DRAFT, MIN_DRAFT, RowClock, RowCosts


def measured(clock: RowClock, *, pair: float, fixed: float, each: float) -> None:
    for _ in range(12):
        clock.note(1, 1, 0.01)
        clock.note(2, 1, 0.01 * pair)
        for k in (4, 8, 12):
            clock.note(1, k, 0.01 * (fixed + each * k))


def test_row_costs_are_measured_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "costs" / "a.json"
    clock = RowClock(path)
    clock.settle()
    assert clock.known is None and not path.exists()
    measured(clock, pair=1.7, fixed=0.8, each=0.35)
    clock.settle()
    assert clock.known == RowCosts(1.7, 0.8, 0.35, 0.01, RowCosts.ahead)
    again = RowClock(path)
    assert again.known == clock.known
    measured(again, pair=3.0, fixed=0.1, each=0.9)
    again.settle()
    assert again.known == clock.known


def test_few_rows_cost_what_was_measured_and_more_lie_on_a_line(tmp_path: Path) -> None:
    clock = RowClock(tmp_path / "a.json")
    measured(clock, pair=1.9, fixed=2.0, each=0.25)
    for _ in range(3):
        clock.note(1, 2, 0.018)
        clock.note(1, 3, 0.024)
    clock.settle()
    costs = RowClock(tmp_path / "a.json").known
    assert costs == clock.known == RowCosts(1.9, 2.0, 0.25, 0.01, few=(1.8, 2.4))
    found = [costs.rows(k) for k in (1, 1.5, 2, 2.5, 3, 3.5, 4, 8)]
    assert found == pytest.approx([1, 1.5, 1.8, 2.1, 2.4, 2.7, 3.0, 4.0])
    assert replace(costs, few=()).rows(2) == 2.5


@pytest.mark.parametrize(("beside", "ahead", "found"), [(1.0, 1.1, 1.1), (1.1, 1.1, 1.0), (1.0, 0.95, 0.95)])
def test_what_running_ahead_takes_is_measured(tmp_path: Path, beside: float, ahead: float, found: float) -> None:
    """Of what batches are reckoned to, beside the same of tokens side by side; and of how many rows were expected."""
    for runs in (0, 23, 24):
        clock = RowClock(tmp_path / f"{runs}.json")
        measured(clock, pair=1.9, fixed=1.0, each=0.5)
        for _ in range(12):
            clock.note_step(0.019 * beside)
        for _ in range(runs):
            clock.note_run([1, 1, 1, 4], 4, 0.06 * ahead, lambda costs: costs.pair - 0.4)
        clock.settle()
        costs = RowCosts(1.9, 1.0, 0.5, 0.01)
        assert clock.known == {0: costs, 23: None, 24: replace(costs, ahead=found)}[runs]


def test_how_many_rows_runs_take_is_measured_beside_what_is_usual(tmp_path: Path) -> None:
    clock = RowClock(tmp_path / "a.json")
    measured(clock, pair=1.9, fixed=1.0, each=0.5)
    for _ in range(12):
        clock.note_step(0.019)
    for _ in range(32):
        clock.note_run([1, 1, 4], 2, 0.05, lambda costs: 2.0)  # 2.5 rows a token, 64 tokens; as many are taken as usual
    clock.settle()
    assert clock.known is not None
    assert (clock.known.ahead, clock.known.typical) == (1.0, 1.12)
    assert DraftPolicy(clock.known, alpha=0.5, greedy=True).cost == pytest.approx(
        1.12 * expected(clock.known, 0.5, greedy=True)
    )


def test_runs_and_steps_of_an_answer_are_timed(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what its reader does in between, and only until it is known what rows cost."""
    now = itertools.count()  # ticks whenever it is asked for
    read = [0]
    monkeypatch.setattr("acd_local.runtime.deferred.time", SimpleNamespace(perf_counter=lambda: next(now) + read[0]))
    with Engine(tiny("chatml", seed=4), pair=DEFAULT, ctx_size=512, threads=1) as engine:
        clock = engine.decoder.row_clock
        monkeypatch.setattr(clock, "settle", lambda: None)
        monkeypatch.setattr("acd_local.runtime.deferred.PATIENCE", 1e12)
        options = Options(temp=0.0, max_tokens=N)
        for _ in engine.generate(PROMPTS[3], options):
            read[0] += 10**6
        assert len(clock._steps) == 15  # the first token comes out of the prompt
        assert len(clock._runs) > 0
        assert 1 <= min(clock._steps) <= max(clock._steps) < 100
        assert 1 <= min(run.seconds for run in clock._runs) <= max(run.seconds for run in clock._runs) < 100
        steps, runs = len(clock._steps), len(clock._runs)
        monkeypatch.setattr(clock, "known", RowCosts())
        engine.generate(PROMPTS[3], options).run()
        assert (len(clock._steps), len(clock._runs)) == (steps, runs)


def test_readers_do_not_wait_for_long_runs_before_it_is_known_what_rows_cost(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DraftPolicy, "goes_on", lambda pace, survival, drafted: drafted < pace.costs.longest_run)
    for patience, longest in ((60.0, MAX_DRAFT), (0.0, MIN_DRAFT)):
        monkeypatch.setattr("acd_local.runtime.deferred.PATIENCE", patience)
        with Engine(tiny("chatml", seed=4), pair=DEFAULT, ctx_size=512, threads=1) as engine:
            monkeypatch.setattr(engine.decoder.row_clock, "settle", lambda: None)
            options = Options(temp=0.0, max_tokens=N, strategy="deferred")
            engine.generate(PROMPTS[3], options, divergence=True).run()  # which every position waits for
            lengths = [len(run.batches) - 1 for run in engine.decoder.row_clock._runs]
        assert max(lengths) == longest


def test_figures_are_collected_and_settled_by_several_threads(tmp_path: Path) -> None:
    clock, wrong, old = RowClock(tmp_path / "a.json"), [], sys.getswitchinterval()
    for _ in range(12):
        clock.note(1, 1, 0.01)
        clock.note(2, 1, 0.02)

    def settle() -> None:
        try:
            for _ in range(300):
                clock.settle()
        except RuntimeError as error:
            wrong.append(error)

    sys.setswitchinterval(1e-6)
    try:
        settling = threading.Thread(target=settle)
        settling.start()
        for rows in itertools.count(100):  # sizes that are no measure: nothing is ever settled
            clock.note(1, rows, 0.1)
            if not settling.is_alive():
                break
    finally:
        sys.setswitchinterval(old)
        settling.join()
    assert wrong == []


def test_old_figures_are_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(asdict(RowCosts())))
    assert RowClock(path).known == RowCosts()
    os.utime(path, (0, time.time() - rowcosts.MAX_AGE - 60))
    assert RowClock(path).known is None


@pytest.mark.parametrize("name", ["identity", "extra_buffers"])
def test_figures_belong_to_a_machine_and_a_llama_cpp(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Path("model.gguf")
    here = rowcosts.file_for(model, threads=1)
    assert here == rowcosts.file_for(model, threads=1) != rowcosts.file_for(model, threads=2)
    monkeypatch.setattr(machine, name, lambda: "another")
    assert rowcosts.file_for(model, threads=1) != here


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"pair": 2, "fixed": 1, "each": 0.4, "seconds": 0.01}',
        '{"pair": "x"}',
        '{"pairs": 1}',
        '{"pair": -1}',
        '{"pair": NaN}',
    ],
)
def test_damaged_figures_are_measured_again(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    assert RowClock(path).known is None


def test_an_engine_measures_and_the_next_one_knows(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACD_CACHE_DIR", str(tmp_path))
    path = tiny("chatml", seed=4)
    with Engine(path, pair=DEFAULT, ctx_size=512, threads=1) as engine:
        for prompt in (*PROMPTS, *PROMPTS):
            engine.generate(prompt, Options(temp=0.0, max_tokens=N)).run()
        known = engine.decoder.row_clock.known
    assert known is not None
    (kept,) = (tmp_path / "rowcosts").iterdir()
    assert json.loads(kept.read_text()) == json.loads(json.dumps(asdict(known)))
    assert len(known.few) == 2
    with Engine(path, pair=DEFAULT, ctx_size=512, threads=1) as engine:
        assert engine.decoder.row_clock.known == known
