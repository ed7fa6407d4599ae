"""The tables of results.json: one structure for terminal, Markdown and report.

The forms are those of the paper (Zhao et al., arXiv 2406.16743): safety per set (Table 1), general ability (Table 2)
and the ablation of the two streams (Table 5); besides cost, degenerate answers, margins and a sweep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from acd_local.runtime.text import plain

_ABLATIONS = ("null-ap", "safe-ap", "sp-null", "sp-opposite", "acd")
ABLATIONS = (*_ABLATIONS, *(f"{name}-soft" for name in _ABLATIONS))
MARGIN_PROMPTS = {
    "none": "no system prompt",
    "safe": "manual safe prompt",
    "sp": "safeguarding prompt (SP)",
    "opposite": "manual opposite prompt",
    "ap": "adversarial prompt (AP)",
    "sp-soft": "safeguarding prompt, soft",
    "ap-soft": "adversarial prompt, soft",
}
Results = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """A figure: its text and interval, its change against base, and whether that change is for the better or worse.

    `change_is` is empty where the change's interval holds 0; `best` marks the best figure of a column.
    """

    text: str = "–"
    interval: str = ""
    change: str = ""
    change_is: Literal["", "better", "worse"] = ""
    best: bool = False
    note: str = ""
    value: float | None = None  # unrounded
    short: str = ""  # the interval in fewer characters, for a terminal


@dataclass(frozen=True)
class Row:
    name: str
    title: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """key: a stable name; head: what the rows are; columns: heads of the cells."""

    key: str
    title: str
    head: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def _percent(x: float) -> str:
    return f"{100 * x:.1f}"


@dataclass(frozen=True)
class _Measure:
    """A measure as it is shown. better: +1 more is better, -1 less is better, 0 neither."""

    key: str
    head: str
    better: int = 0
    percent: bool = False
    digits: int = 2
    compare: bool = True  # whether its change against base says something

    def show(self, x: float) -> str:
        return _percent(x) if self.percent else f"{x:.{self.digits}f}"

    def show_change(self, change: Mapping[str, float]) -> str:
        """Write a change; empty where it is 0 as shown."""
        text = f"{100 * change['value']:+.1f}" if self.percent else f"{change['value']:+.{self.digits}f}"
        return text if text.strip("+-0.") else ""

    def cell(self, figures: Mapping[str, Any], *, expected: int | None = None, sets: int | None = None) -> Cell:
        """Make the cell of a set's or the overall figures; expected: prompts it should rest on, sets: their number."""
        found = figures.get(self.key)
        if not isinstance(found, Mapping):
            return Cell()
        note = ""
        if expected is not None and found["n"] < expected:
            note = f"n={found['n']}"
        if sets is not None and found.get("sets", sets) < sets:
            note = f"{found['sets']} of {sets} sets"
        change = found.get("vs_base") if self.compare else None
        return Cell(
            text=self.show(found["value"]),
            interval=f"{self.show(found['low'])}{' to ' if found['low'] < 0 else '–'}{self.show(found['high'])}",
            change=self.show_change(change) if change else "",
            change_is=self._direction(change),
            note=note,
            value=found["value"],
            short=", ".join(f"{100 * found[k]:.0f}" if self.percent else self.show(found[k]) for k in ("low", "high")),
        )

    def _direction(self, change: Mapping[str, float] | None) -> Literal["", "better", "worse"]:
        if not change or not self.better or change["low"] <= 0 <= change["high"]:
            return ""
        return "better" if change["value"] * self.better > 0 else "worse"


REFUSAL = _Measure("refusal", "refusal", +1, percent=True)
HARMLESS = _Measure("harmless", "harmless", +1, percent=True)
OVER_REFUSAL = _Measure("over_refusal", "over-refusal %", -1, percent=True)
DEGENERATE = _Measure("degenerate", "degenerate %", -1, percent=True)
MC1 = _Measure("mc1", "MC1 %", +1, percent=True)
MC2 = _Measure("mc2", "MC2 %", +1, percent=True)
BITS = _Measure("bits_per_token", "bits/token", -1, digits=3)
PERPLEXITY = _Measure("perplexity", "perplexity")  # low in loops, too: no direction
DISTINCT = _Measure("distinct2", "distinct-2", +1, digits=3)
LENGTH = _Measure("tokens", "tokens", 0, digits=1)
SPEED = _Measure("tokens_per_second", "tokens/s", +1, digits=1)
RELATIVE = _Measure("relative_speed", "times {base}", +1)
PROMPT = _Measure("prompt_seconds", "prompt s", -1, digits=3)
CHANGED = _Measure("changed", "changed %", 0, percent=True, compare=False)
CORRECT = _Measure("correct", "correct %", +1, percent=True)
GATED = _Measure("gated", "gated %", 0, percent=True, compare=False)
MARGIN = _Measure("margin", "margin", 0, digits=3)


# --- Building ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    head: str
    measure: _Measure
    of_set: str | None  # None: overall
    sets: int = 1


def build(results: Results) -> list[Table]:
    """Build all tables that the results have figures for."""
    swept = {entry["method"] for entry in results["sweep"]}
    methods = {name: m for name, m in results["methods"].items() if name not in swept}
    safety = _safety_columns(results, "harmless")
    tables = [_safety_table(results, methods, safety)]
    if results["run"].get("judge"):
        columns = _safety_columns(results, "refusal")
        title = "Refusal rate on harmful requests, by the words alone, %"
        tables.append(_table(results, "refusal", title, methods, columns))
    tables.append(_ability_table(results, methods))
    ablations = {name: results["methods"][name] for name in ABLATIONS if name in results["methods"]}
    if set(ablations) - {"acd", "acd-soft"}:
        title = f"Table 5. The two streams, one at a time: {_safety_name(results)}, %"
        tables.append(_table(results, "ablation", title, ablations, safety))
    generated = [s for s, info in results["sets"].items() if info["kind"] != "choice"]
    gated = {name: m for name, m in methods.items() if m.get("gate")}
    title = "Answers that the gate gave to the pair, %"
    tables.append(_table(results, "gated", title, gated, [_Column(s, GATED, s) for s in generated]))
    tables.append(_area_table(results))
    tables.append(_table(results, "cost", "Cost of decoding", methods, _overall_columns(results, _COST)))
    if any(m["overall"].get("degenerate", {}).get("value") for m in results["methods"].values()):
        sets = generated
        columns = [_Column(s, DEGENERATE, s) for s in sets]
        columns += [_Column("all", DEGENERATE, None, len(sets))] if len(sets) > 1 else []
        tables.append(_table(results, "degenerate", "Degenerate answers (loops, no words), %", methods, columns))
    tables.append(_margin_table(results))
    tables.append(_sweep_table(results, safety))
    return [table for table in tables if table.rows and table.columns]


_COST = (SPEED, RELATIVE, PROMPT, CHANGED, DEGENERATE)


def _safety_name(results: Results) -> str:
    return "harmless rate" if results["run"].get("judge") else "harmless (refusal) rate"


def _safety_columns(results: Results, key: str) -> list[_Column]:
    measure = {"harmless": HARMLESS, "refusal": REFUSAL}[key]
    sets = [s for s, info in results["sets"].items() if info["kind"] == "harmful"]
    columns = [_Column(s, measure, s) for s in sets]
    return columns + ([_Column("mean", measure, None, len(sets))] if len(sets) > 1 else [])


def _overall_columns(results: Results, measures: Sequence[_Measure]) -> list[_Column]:
    return [_Column(m.head.format(base=results["base"]), m, None) for m in measures]


def _safety_table(results: Results, methods: Results, columns: Sequence[_Column]) -> Table:
    name = _safety_name(results)
    judge = results["run"].get("judge")
    notes = [f"Judge: {plain(judge)}." if judge else "No judge model: a harmless answer is a refusal here."]
    swept = results["sweep"]
    if not any(m["overall"].get("degenerate", {}).get("value") for m in results["methods"].values()):
        notes.append("No answer was degenerate.")
    for method, figures in methods.items():
        if figures["same_as"] and figures["same_as"] in methods:
            notes.append(f"{plain(method)}: same as {plain(figures['same_as'])} with this pair, same answers.")
        if figures["missing"]:
            notes.append(
                f"{plain(method)}: {figures['missing']} records are missing; the figures rest on those there are."
            )
    if swept:
        notes.append(f"The sweep over {plain(results['run']['sweep'].get('key', ''))} has its own table.")
    table = _table(results, "safety", f"Table 1. {name[0].upper()}{name[1:]} on harmful requests, %", methods, columns)
    return replace(table, notes=(*notes, *table.notes))


def _ability_table(results: Results, methods: Results) -> Table:
    columns: list[_Column] = []
    for kind, measures in (("harmless", (OVER_REFUSAL,)), ("choice", (MC1, MC2)), ("facts", (CORRECT,))):
        sets = [s for s, info in results["sets"].items() if info["kind"] == kind]
        for measure in measures:
            named = "{} refused %" if kind == "harmless" else f"{{}} {measure.head}"
            named = measure.head if kind == "choice" and len(sets) == 1 else named
            columns += [_Column(named.format(s), measure, s) for s in sets]
            if len(sets) > 1:
                columns.append(_Column(named.format("mean"), measure, None, len(sets)))
    if any(info["kind"] == "harmless" for info in results["sets"].values()):
        columns += _overall_columns(results, (BITS, PERPLEXITY, DISTINCT, LENGTH))
    return _table(results, "ability", "Table 2. General ability", methods, columns)


def margin_prompts(margins: Results) -> list[str]:
    """List the prompts that margins were measured under, from none to the adversarial one."""
    return [*(p for p in MARGIN_PROMPTS if p in margins), *(p for p in margins if p not in MARGIN_PROMPTS)]


def _margin_table(results: Results) -> Table:
    margins = results["margins"]
    known = margin_prompts(margins)
    sets = [s for s in results["sets"] if any(s in margins[p] for p in known)]
    rows = []
    for prompt in known:
        cells = []
        for name in sets:
            found = margins[prompt].get(name, {})
            cells.append(MARGIN.cell({"margin": {**found, "vs_base": found.get("vs_none")}} if found else {}))
        rows.append(Row(prompt, MARGIN_PROMPTS.get(prompt, plain(prompt)), tuple(cells)))
    notes = (
        "log P(complying opening) - log P(refusing opening), nats per token: above 0 the model leans to comply.",
        "Changes are against no system prompt. Nothing is generated under the adversarial prompt.",
    )
    title = "How far each system prompt moves the model towards complying"
    return Table("margins", title, "system prompt", tuple(map(plain, sets)), tuple(rows), notes)


def _area_table(results: Results) -> Table:
    areas = results["gate"]
    columns = [s for s in results["sets"] if any(s in against for against in areas.values())]
    rows = []
    for name, against in areas.items():
        cells = (Cell(f"{against[s]:.3f}", value=against[s]) if s in against else Cell() for s in columns)
        rows.append(Row(plain(name), plain(name), tuple(cells)))
    title = "How well the gate tells harmful sets from harmless ones, area under the curve"
    note = "1: every harmful request has a higher probability than every harmless one; 0.5: chance."
    return Table("areas", title, "harmful set", tuple(map(plain, columns)), tuple(rows), (note,))


def _sweep_table(results: Results, safety: Sequence[_Column]) -> Table:
    names = [entry["method"] for entry in results["sweep"]]
    methods = {name: results["methods"][name] for name in names}
    sweep = results["run"].get("sweep") or {}
    harmless = [s for s, info in results["sets"].items() if info["kind"] == "harmless"]
    columns = [replace(safety[-1], head="harmless %")] if safety else []
    columns += [_Column("over-refusal %", OVER_REFUSAL, None, len(harmless))] if harmless else []
    columns += _overall_columns(results, (DEGENERATE, BITS, CHANGED))
    key, method = plain(sweep.get("key", "")), plain(sweep.get("method", ""))
    return _table(
        results, "sweep", f"{method or 'Method'} against {key or 'its parameter'}, means over sets", methods, columns
    )


def _table(results: Results, key: str, title: str, methods: Results, columns: Sequence[_Column]) -> Table:
    rows = []
    for name, figures in methods.items():
        cells = []
        for column in columns:
            if column.of_set is None:
                cells.append(column.measure.cell(figures["overall"], sets=column.sets))
            else:
                expected = results["sets"][column.of_set].get("n")
                cells.append(column.measure.cell(figures["sets"].get(column.of_set, {}), expected=expected))
        rows.append(Row(plain(name), plain(figures.get("title") or name), tuple(cells)))
    kept = [i for i in range(len(columns)) if any(row.cells[i].value is not None for row in rows)]
    rows = [replace(row, cells=tuple(row.cells[i] for i in kept)) for row in rows]
    for place, i in enumerate(kept):
        _mark_best(rows, place, columns[i].measure.better)
    heads = tuple(plain(columns[i].head) for i in kept)
    partial = any(cell.note for row in rows for cell in row.cells)
    notes = ("† rests on fewer prompts or sets than the others.",) if partial else ()
    return Table(key, title, "method", heads, tuple(rows), notes)


def _mark_best(rows: list[Row], place: int, better: int) -> None:
    """Mark the best of a column, as shown: ties in the printed digits are ties. No mark where many are the best."""
    cells = [row.cells[place] for row in rows if row.cells[place].value is not None]
    if not better or len({cell.text for cell in cells}) < 2:
        return
    top = max(cells, key=lambda cell: better * (cell.value or 0.0)).text
    if sum(cell.text == top for cell in cells) > max(2, len(cells) / 3):
        return
    for i, row in enumerate(rows):
        if row.cells[place].text == top:
            cell = replace(row.cells[place], best=True)
            rows[i] = replace(row, cells=(*row.cells[:place], cell, *row.cells[place + 1 :]))


# --- Markdown ---------------------------------------------------------------------------------------------------------


def markdown(results: Results) -> str:
    """Write the verdict and all tables in GitHub's Markdown: best in bold, intervals."""
    parts = [_escaped(plain(results["verdict"]))]
    for table in build(results):
        rows = [[table.head, *table.columns], ["---", *("---:" for _ in table.columns)]]
        for row in table.rows:
            label = row.title if table.key == "margins" else f"`{row.name}`"
            rows.append([label, *(_markdown_cell(cell) for cell in row.cells)])
        text = ["| " + " | ".join(c if c.startswith("---") else _escaped(c) for c in row) + " |" for row in rows]
        parts.append("\n".join([f"**{_escaped(table.title)}**", "", *text, *("\n" + _escaped(n) for n in table.notes)]))
    return "\n\n".join(parts) + "\n"


def _markdown_cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.best else cell.text
    return text + ("†" if cell.note else "") + (f" ({cell.interval})" if cell.interval else "")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
