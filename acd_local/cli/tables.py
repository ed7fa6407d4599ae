"""Lays out the tables of results.json for a terminal, in blocks of columns that fit its width."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Column
from rich.table import Table as Grid
from rich.text import Text

from acd_local.evaluate.tables import Cell, Table, build
from acd_local.runtime.text import plain, shorten

WIDTH = 100
RULE = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)  # under the heads


def lines(results: Mapping[str, Any], width: int = WIDTH) -> list[str]:
    """Write the verdict and all tables as plain text."""
    info = results["run"]
    n = sum(s.get("n") or 0 for s in results["sets"].values())
    model = info["model"].get("name") or info["model"].get("file") or "model"
    counts = f"{len(results['methods'])} methods, {len(results['sets'])} sets, {n} prompts"
    parts: list[RenderableType] = [_line(results["verdict"]), ""]
    parts.append(_line(f"{model}, pair {info['pair'].get('name')}, {counts}"))
    console = Console(file=StringIO(), width=width, color_system=None)
    tables = build(results)
    for table in tables:
        parts += ["", _line(table.title), *_blocks(table, width), *map(_line, table.notes)]
    if any(cell.change for table in tables for row in table.rows for cell in row.cells):
        legend = f"* best of its column; + better, - worse than {results['base']} beyond the 95% interval of the"
        parts += ["", _line(f"{legend} paired difference")]
    with console.capture() as captured:
        console.print(Group(*parts))
    return [line.rstrip() for line in captured.get().splitlines()]


def _line(text: object) -> Text:
    return Text(plain(text))


def _blocks(table: Table, width: int) -> Iterator[Grid]:
    """Cut the table between columns where it is too wide."""
    start, count = 0, len(table.columns)
    while start < count:
        end = start + 1
        while end < count and _width(_block(table, start, end + 1)) <= width:
            end += 1
        yield _block(table, start, end)
        start = end


def _width(block: Grid) -> int:
    """Measure how wide it is where there is room."""
    console = Console(width=10_000)
    return Measurement.get(console, console.options, block).maximum


def _block(table: Table, start: int, end: int) -> Grid:
    heads = [table.head, *(shorten(head, 24) for head in table.columns[start:end])]
    grid = Grid(
        *(Column(Text(head)) for head in heads), box=RULE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )
    names = [Text(shorten(row.name if table.key != "margins" else row.title, 28)) for row in table.rows]
    for row in zip(names, *(_column([r.cells[i] for r in table.rows]) for i in range(start, end)), strict=True):
        grid.add_row(*row)
    return grid


def _column(cells: Sequence[Cell]) -> list[Text]:
    """Align a column of cells: figures to the right, then their marks, then their intervals."""
    marks = [_marks(cell) for cell in cells]
    figures, wide = max(len(cell.text) for cell in cells), max(map(len, marks))
    intervals = [f" [{cell.short}]" if cell.interval else "" for cell in cells]
    rows = zip(cells, marks, intervals, strict=True)
    return [Text(f"{cell.text:>{figures}}{mark:<{wide}}{interval}", no_wrap=True) for cell, mark, interval in rows]


def _marks(cell: Cell) -> str:
    change = {"": "", "better": "+", "worse": "-"}[cell.change_is]
    return ("*" if cell.best else "") + change + ("†" if cell.note else "")
