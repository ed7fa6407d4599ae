"""What a fit has measured is kept under all that decides it."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest

from acd_local.tuning.cache import Measurements


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> list[int]:
        made.append(1)
        return [len(made)]

    path = tmp_path / "notes.jsonl"
    notes = Measurements(path, {"model": "a"})
    assert notes.memo("figure", {"n": 1}, make) == [1]
    assert notes.memo("figure", {"n": 1}, make) == [1]
    assert Measurements(path, {"model": "a"}).memo("figure", {"n": 1}, make) == [1]
    assert Measurements(path, {"model": "a"}).memo("figure", {"n": 2}, make) == [2]
    assert Measurements(path, {"model": "b"}).memo("figure", {"n": 1}, make) == [3]
    assert Measurements(path, {"model": "a"}).get("other", {"n": 1}) is None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_damage_costs_what_it_hit(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    notes = Measurements(path, {})
    for n in range(3):
        notes.keep("figure", {"n": n}, n)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\xff{]\n" + lines[2][:10])  # a line overwritten, the last one cut
    again = Measurements(path, {})
    assert [again.get("figure", {"n": n}) for n in range(3)] == [0, None, None]
    again.keep("figure", {"n": 2}, 2)
    assert Measurements(path, {}).get("figure", {"n": 2}) == 2


def test_time_counts_over_all_sittings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    path = tmp_path / "notes.jsonl"
    with pytest.raises(KeyboardInterrupt), Measurements(path, {}).timing("gate"):
        now[0] += 20
        raise KeyboardInterrupt
    notes = Measurements(path, {})
    with notes.timing("gate"):
        now[0] += 30
    assert notes.seconds == {"gate": 50}
    with notes.timing("gate"):  # all of it was there
        now[0] += 0.1
    assert notes.seconds == {"gate": 50}
