"""Tables, figures and the page: what they show, that they escape everything, and that the page needs nothing else."""

from __future__ import annotations

import html
import itertools
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from eval_runs import METHODS, change, digest, write_run
from hypothesis import given, settings
from hypothesis import strategies as st
from report_pages import Page, at, checked, curves, figures, marks, parsed, texts, ticks

from acd_local.cli.tables import lines
from acd_local.evaluate import page as page_
from acd_local.evaluate import report, results, tables
from acd_local.evaluate.drawing import CHARACTER, draw
from acd_local.evaluate.figures import Axis, BarChart, Curve, Panel, Plot, Series, Span
from acd_local.evaluate.page import FIGURE_SPACE
from acd_local.runtime.text import shorten, visible

NASTY = "</script></td><img src=x onerror=alert(1)>&amp;\"'\u202e\u2066\x00\x1b[31m\u2028\ud800|`*"
SETS = ("advbench", "harmbench", "xstest-safe", "alpaca", "truthfulqa")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything: all methods, a judge, types, a sweep, margins, and two methods of one set-up."""
    folder = write_run(
        tmp_path_factory.mktemp("full") / "run",
        methods=list(METHODS),
        sets=SETS,
        n=16,
        judge="guard.gguf",
        sweep=(0.0, 0.4, 0.8),
        margins=True,
    )
    info = json.loads((folder / "run.json").read_text())
    setups = {m["name"]: m["setup"] for m in info["methods"]}
    for method in info["methods"]:
        method["setup"] = setups["sp"] if method["name"] == "self-reminder" else method["setup"]
    change(folder / "run.json", methods=info["methods"])
    results.write(folder)
    return folder


def page_of(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def results_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


# --- Tables -----------------------------------------------------------------------------------------------------------


def table(found: dict[str, Any], key: str) -> tables.Table:
    (one,) = [t for t in tables.build(found) if t.key == key]
    return one


def test_tables_are_those_of_the_paper_and_hold_the_figures(full: Path) -> None:
    found = results_of(full)
    assert [t.key for t in tables.build(found)] == [
        "safety", "refusal", "ability", "ablation", "cost", "degenerate", "margins", "sweep",
    ]  # fmt: skip
    safety = table(found, "safety")
    assert safety.columns == ("advbench", "harmbench", "mean")
    assert [row.name for row in safety.rows] == list(METHODS)
    for row in safety.rows:
        figures = found["methods"][row.name]
        expected = [figures["sets"][s]["harmless"] for s in ("advbench", "harmbench")] + [
            figures["overall"]["harmless"]
        ]
        for cell, figure in zip(row.cells, expected, strict=True):
            assert cell.text == f"{100 * figure['value']:.1f}"
            assert cell.interval == f"{100 * figure['low']:.1f}–{100 * figure['high']:.1f}"
            if figure["vs_base"] and abs(figure["vs_base"]["value"]) > 0.001:
                assert float(cell.change) == pytest.approx(100 * figure["vs_base"]["value"], abs=0.051)
    assert [row.name for row in table(found, "ablation").rows] == [name for name in tables.ABLATIONS if name in METHODS]
    assert table(found, "ability").columns == (
        "xstest-safe refused %", "alpaca refused %", "mean refused %", "MC1 %", "MC2 %",
        "bits/token", "perplexity", "distinct-2", "tokens",
    )  # fmt: skip
    assert [row.name for row in table(found, "sweep").rows] == ["acd@alpha=0", "acd@alpha=0.4", "acd@alpha=0.8"]
    assert [row.name for row in table(found, "margins").rows] == [
        prompt for prompt in tables.MARGIN_PROMPTS if not prompt.endswith("-soft")
    ]
    assert any("sp: same as self-reminder with this pair" in note for note in safety.notes)


def figure(value: float, low: float, high: float, change: tuple[float, float, float] | None = None) -> dict[str, Any]:
    keys = ("value", "low", "high")
    vs_base = None if change is None else {**dict(zip(keys, change, strict=True)), "n": 50}
    return {"value": value, "low": low, "high": high, "n": 50, "vs_base": vs_base}


def made_up(**methods: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Results with one harmful set H and one harmless set S."""
    run = {"model": {"name": "m"}, "pair": {"name": "p"}, "options": {}, "judge": None, "sweep": None}
    sets = {"H": {"kind": "harmful", "n": 50}, "S": {"kind": "harmless", "n": 50}}
    common = {"title": "t", "source": "", "same_as": None, "missing": 0, "contrast": True}
    return {
        "format": 1, "verdict": "v", "base": "base", "run": run, "sets": sets, "gate": {}, "margins": {}, "sweep": [],
        "methods": {name: {**common, "setup": name, "overall": {}, "sets": s} for name, s in methods.items()},
    }  # fmt: skip


def test_changes_count_only_beyond_their_interval_and_in_the_measures_direction() -> None:
    found = made_up(
        base={"H": {"harmless": figure(0.5, 0.4, 0.6)}, "S": {"over_refusal": figure(0.1, 0, 0.2)}},
        up={"H": {"harmless": figure(0.7, 0.6, 0.8, (0.2, 0.1, 0.3))},
            "S": {"over_refusal": figure(0.3, 0.2, 0.4, (0.2, 0.1, 0.3))}},
        same={"H": {"harmless": figure(0.55, 0.4, 0.7, (0.05, 0.0, 0.1))},
              "S": {"over_refusal": figure(0.0, 0, 0.1, (-0.1, -0.2, -0.01))}},
    )  # fmt: skip
    safety, ability = table(found, "safety"), table(found, "ability")
    assert [row.cells[0].change_is for row in safety.rows] == ["", "better", ""]
    assert [row.cells[0].change_is for row in ability.rows] == ["", "worse", "better"]
    assert [row.cells[0].change for row in safety.rows] == ["", "+20.0", "+5.0"]
    assert [row.cells[0].best for row in safety.rows] == [False, True, False]
    assert [row.cells[0].best for row in ability.rows] == [False, False, True]
    assert "No judge model" in safety.notes[0]
    text = lines(found)
    assert any(re.match(r"up +70\.0\*\+ \[60, 80\]", line) for line in text)


def test_fewer_prompts_than_asked_for_are_marked(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", sets=("advbench", "harmfulqa"), n=12)
    records = (folder / "answers.jsonl").read_text().splitlines()
    kept = [line for line in records if not ('"acd"' in line and '"harmfulqa"' in line)][:-3]
    (folder / "answers.jsonl").write_text("\n".join(kept) + "\n")
    safety = table(results.write(folder), "safety")
    notes = {row.name: [cell.note for cell in row.cells] for row in safety.rows}
    assert notes == {"base": ["", "", ""], "acd": ["n=9", "", "1 of 2 sets"]}
    assert any(note.startswith("acd: 15 records are missing") for note in safety.notes)
    assert any(note.startswith("†") for note in safety.notes)


def test_text_fits_the_terminal_and_markdown_is_a_table(full: Path) -> None:
    found = results_of(full)
    text = lines(found)
    assert max(map(len, text)) <= 100 and not [line for line in text if "\n" in line]
    assert max(map(len, lines(found, width=60))) <= 60
    assert any(line.startswith("Table 1.") for line in text) and any("acd@alpha=0.8" in line for line in text)
    markdown = tables.markdown(found)
    blocks = [block.splitlines() for block in markdown.split("\n\n") if block.startswith("|")]
    assert len(blocks) == len(tables.build(found))
    assert all(len({line.count("|") for line in block}) == 1 for block in blocks)
    assert {2 + len(METHODS)} <= {len(block) for block in blocks}
    best = max(m["overall"]["harmless"]["value"] for name, m in found["methods"].items() if "@" not in name)
    assert f"**{100 * best:.1f}**" in markdown


def test_markdown_and_text_hide_nothing_and_break_nowhere() -> None:
    found = made_up(**{NASTY + "\n": {"H": {"harmless": figure(0.5, 0.4, 0.6)}}})
    markdown = tables.markdown(found)
    row = next(line for line in markdown.splitlines() if "50.0" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 3 and "<img" not in markdown
    for text in (markdown, "\n".join(lines(found))):
        assert not set(text) & set("\u202e\u2066\x00\x1b\u2028\ud800")
    assert "<U+202E>" in html.unescape(markdown)


@given(st.text())
def test_nothing_that_reorders_or_controls_text_stays(text: str) -> None:
    shown = visible(text)
    assert shown.encode().decode() == shown
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]", shown)
    if text.isascii() and text.isprintable():
        assert shown == text


# --- Figures ----------------------------------------------------------------------------------------------------------


def span(value: float, half: float = 0.05) -> Span:
    return Span(value, max(0.0, value - half), min(1.0, value + half))


SHARE = Axis("share, %", percent=True, low=0.0, high=1.0)


def scatter(points: Sequence[tuple[str, Span, Span]], x: Axis = SHARE, **more: Any) -> Plot:
    marked = [
        Curve(f"family {i}", i, [(x, y) for _, x, y in points[i::4]], False, True, [n for n, _, _ in points[i::4]])
        for i in range(min(4, len(points)))
    ]
    return Plot("k", "T", [Panel("", x, marked)], SHARE, **more)


def test_labels_of_close_points_do_not_overlap() -> None:
    for seed in range(3):
        rng = random.Random(seed)
        points = [(f"{'name' * rng.randrange(1, 4)} {i}", span(rng.gauss(0.5, 0.1)), span(rng.gauss(0.5, 0.1)))
                  for i in range(18)]  # fmt: skip
        root = parsed(draw(scatter([*points, ("a corner", span(1), span(1)), ("another", span(0), span(0))])))
        labels = [node[-1] for node in root.iter("g") if node.get("class") == "point"]
        assert len(labels) == 20
        boxes = []
        for node in labels:
            x, y = float(node.attrib["x"]), float(node.attrib["y"])
            boxes.append((x, y - 9, x + CHARACTER * len(node.text or ""), y + 3))
        for a, b in itertools.combinations(boxes, 2):
            assert min(a[2], b[2]) - max(a[0], b[0]) < 1 or min(a[3], b[3]) - max(a[1], b[1]) < 1
        assert all(box[0] > 40 and box[2] < 721 and box[1] > 10 and box[3] < 420 for box in boxes)


def test_long_texts_lose_their_middle() -> None:
    assert shorten("short", 5) == "short"
    found = [shorten(f"a common beginning of some length {i}", 20) for i in range(10, 20)]
    assert len(set(found)) == 10 and {len(text) for text in found} == {20} and found[0].startswith("a common be")


def test_a_scatter_plot_names_every_point_and_says_it_aloud() -> None:
    points = [(name, span(0.02 * i), span(1 - 0.03 * i)) for i, name in enumerate(METHODS)]
    root = parsed(draw(scatter(points, hint="better: top left")))
    assert set(METHODS) | {f"family {i}" for i in range(4)} | {"better: top left"} <= set(texts(root))
    assert "acd: 76.0% (71.0 to 81.0) at 16.0% (11.0 to 21.0)" in (root[1].text or "")
    assert sum(len(marks(root, i)) for i in range(4)) == len(points)
    shapes = {n.attrib["href"] for n in root.iter("use") if len(n)}
    assert len(shapes) == 4
    place = list(METHODS).index("acd")
    assert f"family {place % 4} acd: 76.0% (71.0 to 81.0) at 16.0% (11.0 to 21.0)" in [
        t for *_, t in marks(root, place % 4)
    ]


def test_marks_stand_at_their_values_on_both_axes() -> None:
    values = [0.0, 0.2, 0.5, 1.0]
    line = Plot("k", "T", [Panel("", Axis("x"), [Curve("a", 0, [(v, span(v)) for v in values], marks=True)])], SHARE)
    points = Plot(
        "k", "T", [Panel("", SHARE, [Curve("a", 0, [(span(v), span(v)) for v in values], False, True)])], SHARE
    )
    for plot, unit in ((line, 1), (points, 100)):
        root = parsed(draw(plot))
        across, up = ticks(root)
        found = marks(root, 0)
        assert len(found) == len(values)
        for value, (x, y, _) in zip(values, found, strict=True):
            assert x == pytest.approx(at(across, unit * value), abs=0.3)
            assert y == pytest.approx(at(up, 100 * value), abs=0.5)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_figures_of_one_value_and_of_gaps_are_drawn(value: float) -> None:
    one = Span(value, value, value)
    assert len(marks(parsed(draw(scatter([("a", one, one)]))), 0)) == 1
    series = [Series("a", [one, None], 0), Series("b", [None, None], 1)]
    for dots in (False, True):
        root = parsed(draw(BarChart("k", "T", ["r", "q"], series, SHARE, dots=dots)))
        assert len(marks(root, 0)) == 1 and not marks(root, 1)
        assert "not measured" in (root[1].text or "")


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=60), *[st.floats(-1e4, 1e4)] * 3), min_size=1, max_size=6), st.booleans())
def test_any_text_and_any_numbers_make_a_sound_figure(
    rows: Sequence[tuple[str, float, float, float]], dots: bool
) -> None:
    spans = [Span(sorted(row[1:])[1], min(row[1:]), max(row[1:])) for row in rows]
    series = [Series(NASTY, spans, 0), Series("_$x$_", spans, 1)]
    root = parsed(draw(BarChart("k", NASTY, [row[0] for row in rows], series, Axis(NASTY), dots=dots)))
    assert "_$x$_" in texts(root)


CURVES = (
    Curve("loss", 0, [(0.0, 1.0), (10.0, 0.6), (15.0, 0.2)]),
    Curve("way", 1, [(0.0, 0.0), (20.0, 0.5), (40.0, 1.0)], marks=True, labels=["0", "", "40, kept"]),
    Curve("", 2, [(5.0, 0.3), (25.0, 0.7)], line=False, marks=True, faint=True),
)


def test_panels_draw_curves_over_values_of_their_own() -> None:
    plots = [Panel("left", Axis("step"), CURVES), Panel("right", Axis("step"), CURVES[:1])]
    root = parsed(draw(Plot("k", "T", plots, SHARE, hint="better: left")))
    shown = texts(root)
    assert {"left", "right", "loss", "way", "0", "40, kept", "better: left"} <= set(shown)
    assert shown.count("loss") == shown.count("way") == 1 and shown.count("step") == 2  # one legend, two axes
    assert [len(points) for points in curves(root, 0)] == [3, 3]
    said = root[1].text or ""
    assert "left; loss: 100.0% at 0; loss: 20.0% at 15; way 0: 0.0% at 0; way: 50.0% at 20; way 40, kept: 100" in said
    assert len(marks(root, 2)) == 2
    alone = parsed(draw(Plot("k", "T", plots[:1], SHARE)))
    across, up = ticks(alone)
    (line,) = curves(alone, 1)
    for (x, y), (a, b) in zip(line, CURVES[1].points, strict=True):
        assert x == pytest.approx(at(across, float(a)), abs=0.3)  # type: ignore[arg-type]
        assert y == pytest.approx(at(up, 100 * float(b)), abs=0.5)  # type: ignore[arg-type]


def test_panels_have_one_vertical_range_unless_told_otherwise() -> None:
    plots = [
        Panel(name, Axis("x"), [Curve("", i, [(0.0, low), (1.0, high)])])
        for i, (name, low, high) in enumerate((("a", 0.0, 1.0), ("b", 50.0, 60.0)))
    ]

    def heights(shared: bool) -> list[list[float]]:
        root = parsed(draw(Plot("k", "T", plots, Axis("y"), shared=shared)))
        return [[y for _, y in curves(root, i)[0]] for i in (0, 1)]

    (a, b), (c, d) = heights(True), heights(False)
    assert a[0] - a[1] < 10 and b[0] - b[1] < 60 and a[1] > b[0]
    assert c[0] - c[1] > 200 and d[0] - d[1] > 200


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=60), *[st.floats(-1e4, 1e4)] * 2), max_size=6), st.booleans())
def test_any_text_and_any_numbers_make_sound_panels(rows: Sequence[tuple[str, float, float]], marked: bool) -> None:
    points, labels = [(x, y) for _, x, y in rows], [name for name, _, _ in rows]
    drawn = [Curve(NASTY, 0, points, marks=marked, labels=labels), Curve("b", 7, points, line=False, faint=True)]
    parsed(draw(Plot("k", NASTY, [Panel(NASTY, Axis(NASTY), drawn)] * 2, Axis(NASTY), hint=NASTY[:20])))


# --- The page ---------------------------------------------------------------------------------------------------------


def with_script(text: str) -> Page:
    page = checked(text)
    assert "script" in page.raw
    return page


def test_the_page_is_self_contained_and_holds_every_table_and_figure(full: Path) -> None:
    text = page_of(full).replace(FIGURE_SPACE, "")
    page, found = with_script(text), results_of(full)
    assert {f"table-{t.key}" for t in tables.build(found)} <= set(page.ids())
    captions = " ".join(re.findall(r"<figcaption>(.*?)</figcaption>", text, re.S))
    assert len(figures(text)) == captions.count("Figure ") == 7
    for words in (
        "at a glance",
        "against over-refusal",
        "against alpha",
        "by type of prompt",
        "against speed",
        "margin",
    ):
        assert words in captions
    for row in table(found, "safety").rows:
        for cell in row.cells:
            assert f'<span class="value">{cell.text}</span>' in text
    shown = " ".join(page.texts)
    assert "SmolLM2-135M-Instruct.Q4_1.gguf" in shown and "acd eval demo --methods base,acd -o out" in shown
    assert "self-reminder = sp" in text and "arXiv 2406.16743" in shown


def test_the_embedded_answers_are_all_there_once(full: Path) -> None:
    data = Page(page_of(full)).data()
    records = [json.loads(line) for line in (full / "answers.jsonl").read_text().splitlines()]
    setups = {m["setup"] for m in results_of(full)["methods"].values()}
    kept = [r for r in records if r["setup"] in setups]
    assert len(data["rows"]) == len(kept) and len(data["prompts"]) == 4 * 16
    by_name = dict(data["methods"])
    assert by_name["self-reminder"] == by_name["sp"] != by_name["acd"]
    have = {(data["prompts"][r[0]][0], r[1], r[2], r[7]) for r in data["rows"]}
    want = {(r["item"], by_name[r["method"]], r["label"], r["answer"]) for r in kept if r["method"] != "self-reminder"}
    assert have == want


def test_nothing_people_or_models_wrote_becomes_markup(tmp_path: Path) -> None:
    def edit(record: dict[str, Any]) -> None:
        for key in ("answer", "prompt", "rule", "type"):
            if key in record and record.get("score") != "margin":
                record[key] = NASTY + str(record[key])

    sets = ("advbench", "harmbench", "alpaca")
    folder = write_run(tmp_path / "run", methods=("base", "acd", "nid"), sets=sets, n=12, edit=edit, sweep=(0, 1))
    info = (folder / "run.json").read_text().replace("harmbench", json.dumps(NASTY)[1:-1])
    info = info.replace('"nid"', json.dumps(NASTY + "2")).replace("SmolLM2 135M", json.dumps(NASTY)[1:-1])
    (folder / "run.json").write_text(info)
    answers = (folder / "answers.jsonl").read_text().replace('"harmbench"', json.dumps(NASTY))
    (folder / "answers.jsonl").write_text(answers)
    run = json.loads(info)
    for key in ("command", "started", "version", "shard"):
        run[key] = NASTY
    run["options"][NASTY] = NASTY
    run["methods"][0].update(title=NASTY, source=NASTY)
    (folder / "run.json").write_text(json.dumps(run))
    results.write(folder)
    text = page_of(folder)
    page = with_script(text)
    assert not set(text) & set("\u202e\u2066\x00\x1b\u2028\ud800")
    assert text.count("</script>") == 2 and "<img" not in text
    assert all("<U+202E>" in row[7] and row[7].startswith("</script>") for row in page.data()["rows"])


@pytest.mark.parametrize(
    "options",
    [
        {"methods": ("acd",), "sets": ("advbench",), "n": 1},
        {"methods": ("nid", "acd"), "sets": ("alpaca",), "n": 3},
        {"methods": ("base", "acd"), "sets": ("truthfulqa",), "n": 3},
        {"methods": (), "sets": (), "n": 1},
        {"methods": ("base",), "sets": ("advbench",), "n": 0, "sweep": (0.5,)},
        {"methods": ("base", "acd"), "sets": ("harmbench",), "n": 7, "sweep": (0.5, 0.1)},
    ],
    ids=["one answer", "no base", "only choices", "nothing", "no answers", "no harmless set"],
)
def test_small_and_empty_runs_make_a_page(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = write_run(tmp_path / "run", **options)
    found = results.write(folder)
    page = with_script(page_of(folder))
    assert "Evaluation of SmolLM2 135M Instruct" in page.texts
    assert any(line.startswith("SmolLM2 135M Instruct, pair default") for line in lines(found)[:5])
    assert (page.data() is None) == (options["n"] == 0 or options["sets"] in ((), ("truthfulqa",)))


def test_without_matplotlib_a_page_says_what_is_missing(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_figures = page_of(full)
    assert "acd-local[report]" not in with_figures
    monkeypatch.setattr(page_, "_drawing", lambda: None)
    text = report.render(results_of(full), results.load(full).answers)
    page = with_script(text)
    assert "<figure>" not in text and "pip install 'acd-local[report]'" in page.shown
    assert text.count("<table") == with_figures.count("<table")


# --- In a browser -----------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def in_browser(folder: Path, profile: Path, query: str) -> Page:
    """The page as a browser has it after its script ran."""
    flags = ["--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}", "--dump-dom"]  # fmt: skip
    if os.name == "posix" and os.getuid() == 0:
        flags.append("--no-sandbox")
    url = (folder / "report.html").resolve().as_uri() + "#" + query
    done = subprocess.run([str(CHROMIUM), *flags, url], capture_output=True, timeout=120, stdin=subprocess.DEVNULL)
    return Page(done.stdout.decode())


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_filters_pages_and_folding_in_a_browser(tmp_path: Path) -> None:
    def edit(record: dict[str, Any]) -> None:
        if record.get("item") == digest("alpaca", 3) and "answer" in record:
            record["answer"] = "A zebra. " + NASTY

    folder = write_run(tmp_path / "run", sets=("advbench", "alpaca"), n=40, edit=edit)
    results.write(folder)
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]

    def shown(query: str) -> tuple[str, int, int, Page]:
        page = in_browser(folder, tmp_path / "profile", query)
        count = page.texts[next(i for i, t in enumerate(page.texts) if re.match(r"[\d,]+ answer|No answer", t))]
        articles = [a for t, a in page.tags if t == "article"]
        return count, len(articles), len([t for t, _ in page.tags if t == "details"]), page

    count, articles, folded, page = shown("")
    assert (count, articles, folded) == ("160 answers, page 1 of 7", 25, 25)  # harmful first: all folded
    assert not page.attributes() & {"src", "onerror"}
    n = sum(r["method"] == "acd" and r["set"] == "alpaca" and r["label"] == "answer" for r in answers)
    count, articles, folded, _ = shown("method=acd&set=alpaca&verdict=answer&page=2")
    assert count == f"{n} answers, page 2 of 2" and (articles, folded) == (n - 25, 0)
    count, articles, _, page = shown("q=ZEBRA")
    assert (count, articles) == ("2 answers, page 1 of 1", 2) and "img" not in {t for t, _ in page.tags}
    assert shown("q=nowhere+to+be+found")[0] == "No answer matches."
    count, articles, _, _ = shown(f"item={digest('advbench', 2)}")
    assert (count, articles) == ("2 answers, page 1 of 1, one prompt", 2)


def test_a_page_of_thousands_of_answers_is_quickly_made(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", methods=("base", "acd"), sets=("advbench",), n=20)
    run = results.load(folder)
    found = results.compute(run)
    many = [{**run.answers[i % 40], "item": f"{i:016x}"} for i in range(20_000)]
    text = report.render(found, many)
    assert len(Page(text).data()["rows"]) == 20_000 and len(text) < 20_000_000
