"""A chat for a person at a terminal: markdown, colours, a live region."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from acd_local.cli.chat_markdown import Block, LiveRegion, MarkdownWriter, clean_lines, render
from acd_local.cli.chat_view import CompareWriter, Writer
from acd_local.cli.chat_why import Span
from acd_local.cli.shell import one_line
from acd_local.runtime.text import disarm

SIDE_BY_SIDE = 64  # columns from which two answers stand next to each other


def open_console(*, no_color: bool = False) -> Console:
    """Open a console that takes text literally; rich itself follows NO_COLOR, TERM and COLUMNS."""
    return Console(file=sys.stdout, no_color=no_color or None, markup=False, emoji=False, highlight=False)


class RichView:
    """See `chat_view.View`."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def notice(self, line: str) -> None:
        self._console.print(Text(one_line(line), style="yellow"))

    def output(self, text: str) -> None:
        self._show(Text(disarm(text).rstrip("\n")))

    def why(self, header: str, found: Sequence[Span]) -> None:
        text = Text()
        for span in found:
            if span.instead is None:
                text.append(disarm(span.text))
            else:
                before, said, instead, after = map(disarm, span.parts())
                text.append(before).append("[", "dim").append(said, "bold green")
                text.append("|", "dim").append(instead, "red").append("]", "dim").append(after)
        text.rstrip()
        self._show(Text(header, style="dim"), text)

    def turn(self, question: str, answer: str) -> None:
        quoted = "> " + disarm(question).replace("\n", "\n  ")
        self._show(Text(quoted, style="dim"))
        self._console.print(Block(render(self._console, disarm(answer))))
        self._console.print()

    def answer(self) -> Writer:
        return _RichWriter(self._console)

    def compare(self, labels: Sequence[str]) -> CompareWriter:
        return _RichCompare(self._console, labels)

    def _show(self, *parts: RenderableType) -> None:
        self._console.print(*parts, "", sep="\n")


class _RichWriter:
    """Streamed markdown, an empty line below it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._inner = MarkdownWriter(console)

    def __enter__(self) -> Self:
        self._inner.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._inner.__exit__()

    def wait(self, text: str) -> None:
        self._inner.wait(text)

    def write(self, text: str) -> None:
        self._inner.write(text)

    def finish(self, mark: str | None = None) -> None:
        self._inner.finish(mark)
        self._console.print()


class _RichCompare:
    """Two columns, or one above the other where the window is narrow. While they grow their lower end is shown."""

    def __init__(self, console: Console, labels: Sequence[str]) -> None:
        self._console = console
        self._labels = labels
        self._texts = ["" for _ in labels]
        self._region = LiveRegion(console)

    def __enter__(self) -> Self:
        self._region.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._region.__exit__()

    def wait(self, text: str) -> None:
        status: list[list[Segment]] = [[Segment(text, Style(dim=True))]]
        self._region.draw([*self._lines(), *status] if any(self._texts) else status)

    def write(self, column: int, text: str) -> None:
        self._texts[column] += disarm(text)
        if self._region.due:
            self._region.draw(self._lines())

    def finish(self, note: str) -> None:
        self._region.__exit__()
        self._console.print(Block(self._lines()))
        self._console.print(Text(one_line(note), style="dim"), "", sep="\n")

    def _lines(self) -> list[list[Segment]]:
        return clean_lines(self._console, self._layout())

    def _layout(self) -> RenderableType:
        texts = [text.strip("\n") for text in self._texts]
        width = self._console.width
        if width < SIDE_BY_SIDE:
            parts: list[RenderableType] = []
            for label, text in zip(self._labels, texts, strict=True):
                parts += [Text(f"--- {label} ---", style="bold"), Block(render(self._console, text)), Text()]
            return Group(*parts[:-1])
        table = Table(box=box.MINIMAL, border_style="dim", show_edge=False, pad_edge=False)
        column = (width - 3) // 2
        for label in self._labels:
            table.add_column(Text(label), width=column, overflow="fold")
        table.add_row(*(Block(render(self._console, text, column)) for text in texts))
        return table
