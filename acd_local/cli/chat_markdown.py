"""A model's markdown on a terminal, while it is being written.

Finished blocks are printed for good; only the block in progress is live. Where that one outgrows the screen its upper
lines are printed for good too, so nothing is cut off and the terminal's own scrollback holds the whole answer.
What a model writes stays text: no escape sequence, rich markup, HTML, hidden link target or entity takes effect.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Self

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import CodeBlock, Heading, Markdown
from rich.padding import Padding
from rich.segment import Segment
from rich.style import Style
from rich.syntax import Syntax
from rich.text import Text

from acd_local.runtime.text import disarm

REFRESH = 0.08  # seconds between two redraws
WAITING_SEGMENT = Segment("…")

Lines = list[list[Segment]]


class _Heading(Heading):
    """Left-aligned, and told apart from bold text by its # marks where there is no colour."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text.assemble(("#" * int(self.tag[1:]) + " ", "dim"), self.text)


class _Code(CodeBlock):
    """Indented, in the terminal's own colours and without padding, so that it can be copied."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        syntax = Syntax(
            str(self.text).rstrip(), self.lexer_name, theme="ansi_dark", word_wrap=True, background_color="default"
        )
        yield Padding(syntax, (0, 0, 0, 2))


class AnswerMarkdown(Markdown):
    """Markdown in which everything the model wrote stays visible and a newline is a newline."""

    elements = Markdown.elements | {"heading_open": _Heading, "fence": _Code, "code_block": _Code}

    def __init__(self, text: str) -> None:
        super().__init__("", hyperlinks=False)
        self.markup = text
        self.parsed = _parser().parse(text)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"


@cache
def _parser() -> MarkdownIt:
    """Make a parser without what hides text: HTML, entities (also of control characters), images, definitions."""
    parser = MarkdownIt("commonmark", {"html": False, "maxNesting": 100}).enable(["strikethrough", "table"])
    return parser.disable(["entity", "image", "reference", "autolink", "html_block", "html_inline"])


def _block_starts(text: str) -> list[int]:
    """Find the offsets at which the top-level blocks begin; what precedes the first is blank."""
    blocks = [token.map for token in _parser().parse(text) if token.level == 0 and token.nesting >= 0 and token.map]
    lines = [0, *accumulate(len(line) + 1 for line in text.split("\n"))]
    return [lines[first] for first, _ in blocks]


def finished_length(text: str) -> int:
    """Measure the leading blocks that no further text can change; only whole lines decide."""
    starts = _block_starts(text[: text.rfind("\n") + 1])
    return starts[-1] if len(starts) > 1 else 0


def render(console: Console, text: str, width: int | None = None) -> Lines:
    """Render the lines of a piece of markdown, an empty one between two blocks."""
    lines: Lines = []
    starts = _block_starts(text)
    for start, end in pairwise([*starts, len(text)]):
        block = _render_block(console, text[start:end], width or console.width)
        lines += [[], *block] if lines and block else block
    return lines


def _render_block(console: Console, text: str, width: int) -> Lines:
    """Render one block; as it stands where it is nested too deeply for the width, or rich cannot lay it out."""
    try:
        markdown = AnswerMarkdown(text)
        if 4 * max(token.level for token in markdown.parsed) < width - 8:
            return clean_lines(console, markdown, width)
    except Exception:  # whatever rich makes of odd markdown, the answer is shown
        pass
    return clean_lines(console, Text(text), width)


def clean_lines(console: Console, renderable: RenderableType, width: int | None = None) -> Lines:
    """Strip rendered lines of control segments, trailing spaces, and empty lines around them."""
    options = console.options if width is None else console.options.update_width(width)
    lines = [list(_clean(line)) for line in console.render_lines(renderable, options, pad=False)]
    while lines and not lines[-1]:
        lines.pop()
    while lines and not lines[0]:
        lines.pop(0)
    return lines


def _clean(line: Iterable[Segment]) -> Sequence[Segment]:
    kept = [Segment(disarm(part.text), part.style) for part in line if not part.control]
    while kept and not kept[-1].text.strip():
        kept.pop()
    if kept:
        kept[-1] = Segment(kept[-1].text.rstrip(), kept[-1].style)
    return kept


class Block:
    """Rendered lines as something that rich can print."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self._lines:
            yield from line
            yield Segment.line()


class LiveRegion:
    """The lower end of the screen, redrawn at most every REFRESH seconds. Not a thread: it moves when told to."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self._clock = clock
        self._drawn = float("-inf")
        self._live = Live(
            console=console,
            auto_refresh=False,
            transient=True,
            vertical_overflow="crop",
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> Self:
        self._live.start()
        self._live.update(Block([[WAITING_SEGMENT]]), refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()  # once more does nothing

    @property
    def rows(self) -> int:
        """How many lines fit."""
        return max(self.console.size.height - 2, 1)

    @property
    def due(self) -> bool:
        return self._clock() - self._drawn >= REFRESH

    def draw(self, lines: Lines) -> None:
        """Replace the region; what does not fit is left out at the top."""
        self._live.update(Block(lines[-self.rows :]), refresh=True)
        self._drawn = self._clock()

    def print(self, lines: Lines) -> None:
        """Print lines above the region, for good."""
        if lines:
            self._live.update(Text(), refresh=False)  # shown again by the next `draw`
            self.console.print(Block(lines))


class MarkdownWriter:
    """Streams one answer. Use as a context manager; `finish` prints what is left."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._region = LiveRegion(console, clock)
        self._tail = ""  # text from the first unfinished block on
        self._done = 0  # lines of its rendering that are printed already
        self._printed = False  # whether earlier blocks are printed
        self._closed = False

    def __enter__(self) -> Self:
        self._region.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def wait(self, text: str) -> None:
        """Say what is going on before the first text comes."""
        self._region.draw([[Segment(text, Style(dim=True))]])

    def write(self, text: str) -> None:
        self._tail += disarm(text)
        if not self._printed and not self._done:
            self._tail = self._tail.lstrip("\n")
        length = finished_length(self._tail) if "\n" in text else 0
        if length:
            self._print(self._lines(self._tail[:length]), ends=True)
            self._tail = self._tail[length:]
        if length or self._region.due:
            self._draw()

    def finish(self, mark: str | None = None) -> None:
        """Print the rest, and `mark` (why the answer ends here) below it."""
        self._close()
        if mark is not None:
            self._console.print(Text(mark, style="yellow"))

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self._region.__exit__()
            self._print(self._lines(self._tail), ends=True)

    def _draw(self) -> None:
        lines = self._lines(self._tail)
        over = len(lines) - self._region.rows
        if over > 0:
            self._print(lines[:over], ends=False)
            lines = lines[over:]
        self._region.draw(lines or [[WAITING_SEGMENT]])

    def _lines(self, text: str) -> Lines:
        """Return what is still to be printed of `text`, with an empty line between it and earlier blocks."""
        lines = render(self._console, text)
        gap: Lines = [[]] if self._printed and lines else []
        return (gap + lines)[self._done :]

    def _print(self, lines: Lines, *, ends: bool) -> None:
        self._region.print(lines)
        self._done += len(lines)
        if ends:
            self._printed = self._printed or self._done > 0
            self._done = 0
