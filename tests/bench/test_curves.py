"""benchmarks/curves.py: run lengths, drafts that stand, and their plot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from xml.dom import minidom

import curves
import pytest

from acd_local.bench.questions import text_of
from acd_local.engine import Engine
from acd_local.generation import AnswerStream
from acd_local.options import Options

Run = Callable[..., tuple[int, str, str]]


def test_runs_have_the_length_that_was_asked_for(engine: Engine) -> None:
    """Beta 0 keeps every choice open; alpha next to 0 changes none."""
    options = Options(temp=0.0, max_tokens=20, beta=0.0, alpha=1e-6)
    plain = engine.generate("Why?", options.replace({"strategy": "stepwise"})).run()
    assert len(plain.tokens) == 20
    for length, runs in ((1, [1] * 19), (4, [4, 4, 4, 4, 3]), (16, [16, 3])):
        found, stood = curves.paced(engine, "Why?", options, length)
        assert found.steps == 19
        assert stood == [(n, False) for n in runs]


def test_runs_end_at_a_change(engine: Engine) -> None:
    work = curves.Paced(engine, text_of("questions", 1), Options(temp=0.0, max_tokens=30), 8)
    answer = AnswerStream(work).run()
    runs = work.pace.runs
    assert sum(changed for _, changed in runs) == sum(record.changed for record in answer.tokens[1:]) > 0
    assert all(0 <= length <= 8 for length, _ in runs)


def test_which_drafts_stand() -> None:
    runs = [(0, True), (2, True), (2, False), (4, False)]
    assert curves.standing(runs, 3) == [(1, 3 / 4, 3 / 4), (2, 1.0, 3 / 4), (3, 1 / 2, 3 / 8)]
    assert curves.standing([], 3) == []


def test_the_plot_is_one_svg_with_three_panels(
    script: Run, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "LENGTHS", (1, 4))
    file = tmp_path / "plot.svg"
    code, out, _ = script(curves.main, tiny("chatml"), "--plot", file, "--json")
    assert code == 0
    found = json.loads(out)
    assert set(found["runs"]) == {"greedy", "sampled"}
    assert set(found["runs"]["greedy"]["ratio_to_plain"]) == {"1", "4"}
    assert found["costs"]["rows"]["1"] == 1.0
    svg = minidom.parse(str(file)).documentElement
    assert svg is not None
    panels = [node for node in svg.childNodes if node.nodeName == "svg"]
    assert len(panels) == 3
    assert [panel.getElementsByTagName("title")[0].firstChild.data for panel in panels] == [
        "Cost of a batch",
        "Cost per token against run length",
        "Drafts that stand",
    ]
    code, out, err = script(curves.main, tiny("chatml"), "--plot", "/dev/full")
    assert (code, out.count("by run length")) == (6, 2)  # what was measured is not lost
    assert err.splitlines()[-1] == "cannot write /dev/full: No space left on device"


@pytest.mark.parametrize("file", ["/no/such/folder/x.svg", "/"])
def test_where_the_plot_goes_is_checked_first(script: Run, tiny: Callable[..., Path], file: str) -> None:
    code, out, err = script(curves.main, tiny("chatml"), "--plot", file)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "cannot write" in err and file in err
