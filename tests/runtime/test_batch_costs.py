"""What batches cost: measured once, kept, used as it is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from manual import DEFAULT

from acd_local import files
from acd_local.engine import Engine
from acd_local.options import Options
from acd_local.runtime import batch_costs, machine
from acd_local.runtime.batch_costs import SIZES, TYPICAL, BatchCosts
from acd_local.runtime.cancel import CancelToken

COSTS = BatchCosts(0.01, (1.0, 1.6, 2.4), (1.6, 2.6), delays=(0.0, 1.5))
NAME = Path("batchcosts", "x.json")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACD_CACHE_DIR", str(tmp_path / "cache"))


def test_every_size_is_measured_in_turns() -> None:
    seen: list[tuple[int, int]] = []

    def decode(streams: int, rows: int) -> None:
        seen.append((streams, rows))
        time.sleep(1e-4)

    found = batch_costs.measure(decode)
    shapes = [(streams, rows) for rows in SIZES for streams in (1, 2)]
    assert seen == [(1, 1), *shapes * batch_costs.ROUNDS]
    assert len(found.one) == len(found.two) == len(SIZES)
    assert found.one[0] == 1.0 and found.seconds > 0
    assert list(found.one) == sorted(found.one) and list(found.two) == sorted(found.two)


def test_the_fastest_of_several_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    calls: list[int] = []

    def decode(streams: int, rows: int) -> None:
        calls.append(1)
        clock[0] += streams * rows * 1e-3 * (1 if len(calls) > 11 else 7)  # others work during the first round

    found = batch_costs.measure(decode)
    assert found == BatchCosts(0.001, tuple(map(float, SIZES)), tuple(2.0 * size for size in SIZES))


def test_steps_that_a_batch_delays_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, recent = [0.0], list[tuple[int, int]]()
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def decode(streams: int, rows: int) -> None:
        recent.append((streams, rows))
        graph_is_there = len(set(recent[-3:])) == 1  # as on CUDA: from the third step of a shape on
        clock[0] += streams * 1e-3 + (0 if graph_is_there else 2e-3)

    found = batch_costs.measure(decode, followers=3)
    assert found == BatchCosts(0.001, (1.0, *[3.0] * 4), (2.0, *[4.0] * 4), delays=(4.0, 4.0))
    assert batch_costs.measure(decode).delays == (0.0, 0.0)


def test_a_slow_model_is_measured_with_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], list[int]()
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def decode(streams: int, rows: int) -> None:
        calls.append(rows)
        clock[0] += 0.3 * rows

    found = batch_costs.measure(decode)
    assert (found.one, found.two) == ((1.0, 2.0, 4.0), (1.0, 2.0, 4.0))
    assert calls == [1, 1, 1, 2, 2, 4, 4], "one round"


def test_costs_are_kept() -> None:
    assert batch_costs.kept(NAME) is None
    assert batch_costs.keep(NAME, COSTS) == COSTS
    assert batch_costs.kept(NAME) == COSTS


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_what_is_no_table_is_not_taken(text: str) -> None:
    files.keep(NAME, text)
    assert batch_costs.kept(NAME) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"seconds": 0},
        {"one": []},
        {"one": [1, -2]},
        {"one": [1, "x"]},
        {"one": [1, float("nan")]},
        {"one": [1] * 6},
        {"two": None},
        {"delays": [0]},
        {"delays": [0, -1]},
    ],
)
def test_what_makes_no_sense_is_not_taken(changed: dict[str, object]) -> None:
    text = json.dumps({"seconds": 1, "one": [1, 2], "two": [1, 2], "delays": [0, 0]} | changed)
    files.keep(NAME, text)
    assert batch_costs.kept(NAME) is None


def test_where_nothing_can_be_kept_every_process_drafts_by_the_same_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ACD_CACHE_DIR", str(tmp_path / "file"))
    name = Path("batchcosts", "nowhere.json")
    assert batch_costs.keep(name, COSTS) == batch_costs.kept(name) == TYPICAL


def test_an_engine_measures_once(tiny: Callable[..., Path], tmp_path: Path) -> None:
    settings = {"pair": DEFAULT, "ctx_size": 512, "threads": 1}
    with Engine(tiny("chatml"), **settings) as engine:  # type: ignore[arg-type]
        (kept,) = (tmp_path / "cache" / "batchcosts").iterdir()
        assert json.loads(kept.read_text())["one"] == list(engine.decoder.costs.one)
        assert engine.decoder.slots[0].safe.tokens == engine.decoder.slots[0].adversarial.tokens == []
        text = engine.generate("Hi", Options(temp=0.0, max_tokens=8)).run().text
    kept.write_text(json.dumps({"seconds": 0.5, "one": [1, 1], "two": [1], "delays": [0, 0]}))
    with Engine(tiny("chatml"), **settings) as engine:  # type: ignore[arg-type]
        assert engine.decoder.costs == BatchCosts(0.5, (1.0, 1.0), (1.0,))
        assert engine.generate("Hi", Options(temp=0.0, max_tokens=8)).run().text == text
        assert engine.decoder.calibrate() == engine.decoder.costs != BatchCosts(0.5, (1.0, 1.0), (1.0,))
        assert json.loads(kept.read_text())["one"] == list(engine.decoder.costs.one)
    with Engine(tiny("chatml"), **settings | {"threads": 2}):  # type: ignore[arg-type]
        assert len(list(kept.parent.iterdir())) == 2


def test_calibrating_forgets_a_conversation_and_no_more(tiny: Callable[..., Path]) -> None:
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1) as engine:
        options = Options(temp=0.0, max_tokens=8)
        before = engine.generate("What is red?", options).run().text
        engine.decoder.calibrate()
        with engine.decoder.slot((), (), CancelToken()) as slot:
            assert slot.safe.tokens == slot.adversarial.tokens == []
        assert engine.generate("What is red?", options).run().text == before


def test_nothing_is_measured_where_nothing_can_be_drafted(tiny: Callable[..., Path], tmp_path: Path) -> None:
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1, conversations=3) as engine:
        assert not engine.decoder.can_draft
        assert engine.decoder.costs == TYPICAL
    assert not (tmp_path / "cache" / "batchcosts").exists()


def test_figures_are_kept_by_what_they_hold_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(b"1")
    first = batch_costs.file_for(model, threads=1)
    assert batch_costs.file_for(model, threads=1) == first
    assert batch_costs.file_for(model, threads=2) != first
    model.write_bytes(b"22")
    assert (changed := batch_costs.file_for(model, threads=1)) != first
    monkeypatch.setattr(machine, "identity", lambda: "another")
    assert batch_costs.file_for(model, threads=1) not in (first, changed)
