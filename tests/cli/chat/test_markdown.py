"""Answers on a terminal: Markdown while it streams, and what /why marks."""

from __future__ import annotations

import io
import re
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from acd_local.answers import TokenRecord
from acd_local.cli.chat_markdown import MarkdownWriter, finished_length, render
from acd_local.cli.chat_rich import RichView
from acd_local.cli.chat_why import Span, as_text, spans

# --- /why -------------------------------------------------------------------------------------------------------------


def test_why_spans() -> None:
    pieces = {1: " Paris", 2: " London", 3: ".\n", 4: ",", 5: "It", 6: "", 7: " "}
    token = [
        TokenRecord(5, "It", 5, "It"),
        TokenRecord(1, " Paris", 2, " London"),
        TokenRecord(3, ".\n", 4, ","),
        TokenRecord(5, "It", 5, "It"),
        TokenRecord(7, " ", 1, " Paris"),
        TokenRecord(4, ",", 6, ""),
        TokenRecord(6, "", 4, ","),
    ]
    found = spans(token, lambda t: pieces[t].encode())
    assert found[:2] == [Span("It"), Span(" Paris", " London")]
    assert as_text(found) == "It [Paris|London][.⏎|,]\nIt[␣| Paris][,|(end)][(end)|,]"


def test_why_keeps_characters_whole() -> None:
    """An emoji that is four tokens is one span; changed if one of them is."""
    raw = {i: bytes([b]) for i, b in enumerate("🌍".encode())}
    same = [TokenRecord(i, "\ufffd", i, "\ufffd") for i in raw]
    assert spans(same, raw.__getitem__) == [Span("🌍")]
    changed = [same[0], TokenRecord(1, "\ufffd", 9, "x"), *same[2:]]
    assert spans(changed, raw.__getitem__) == [Span("🌍", "x")]
    assert spans(same[:2], raw.__getitem__) == [Span("\ufffd")]


def test_why_on_a_terminal_is_literal_and_disarmed() -> None:
    console, screen = terminal(60)
    RichView(console).why("2 of 3", [Span("a [red]b[/red] \x1b[1m"), Span(" x", " y"), Span(" z", "")])
    assert screen.lines() == ["2 of 3", "a [red]b[/red] ␛[1m [x|y] [z|(end)]"]


# --- Markdown while it streams ----------------------------------------------------------------------------------------


class Screen(io.StringIO):
    """What a terminal of `height` lines makes of the bytes, scrollback included: no cursor gets above its top."""

    def __init__(self, height: int) -> None:
        super().__init__()
        self._height = height
        self._rows = [""]
        self._row = 0
        self.unknown: list[str] = []

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for escape, plain in re.findall(
            r"(\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x1f\x7f-\x9f])|([^\x00-\x1f\x7f-\x9f]+)", text
        ):
            if plain:
                self._rows[self._row] += plain
            elif escape == "\n":
                self._row += 1
                self._rows += [""] * (self._row == len(self._rows))
            elif escape == "\x1b[2K":
                self._rows[self._row] = ""
            elif move := re.fullmatch(r"\x1b\[(\d+)A", escape):
                self._row = max(self._row - int(move[1]), len(self._rows) - self._height, 0)
            elif escape != "\r" and not re.fullmatch(r"\x1b\[(\?25[lh]|[0-9;]*m)", escape):
                self.unknown.append(escape)
        return len(text)

    def lines(self) -> list[str]:
        assert not self.unknown
        rows = [row.rstrip() for row in self._rows]
        while rows and not rows[-1]:
            rows.pop()
        return rows


def terminal(width: int, height: int = 25) -> tuple[Console, Screen]:
    screen = Screen(height)
    console = Console(
        file=screen, width=width, height=height, force_terminal=True, markup=False, emoji=False, highlight=False
    )
    return console, screen


def stream(pieces: list[str], width: int = 60, height: int = 25, mark: str | None = None) -> list[str]:
    """The screen after an answer that came in these pieces, redrawn at every one."""
    console, screen = terminal(width, height)
    ticks = iter(range(10**9))
    with MarkdownWriter(console, clock=lambda: float(next(ticks))) as writer:
        for piece in pieces:
            writer.write(piece)
        writer.finish(mark)
    return screen.lines()


ANSWER = """# A title

First paragraph, **bold** and *slanted*, long enough to need a second line on a narrow screen.
A new line in it.

- one
- two
  - below two
- three

```python
def f():
    return [1, 2]


f()
```
After the code.

> quoted

| a | b |
|---|---|
| 1 | 2 |

***bold*** end
"""


def test_markdown_is_laid_out() -> None:
    shown = stream([ANSWER])
    assert shown[:4] == [
        "# A title",
        "",
        "First paragraph, bold and slanted, long enough to need a",
        "second line on a narrow screen.",
    ]
    assert "    • below two" in shown and "      return [1, 2]" in shown and " a  b" in shown
    assert shown[-1] == "bold end"


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, len(ANSWER)), max_size=40), st.sampled_from([6, 12, 60]))
def test_however_it_comes_the_screen_ends_the_same(cuts: list[int], height: int) -> None:
    """Nothing is lost, doubled or out of order, also where the answer is higher than the screen."""
    edges = [0, *sorted(set(cuts)), len(ANSWER)]
    pieces = [ANSWER[a:b] for a, b in pairwise(edges)]
    assert stream(pieces, height=height) == stream([ANSWER])


def test_a_block_higher_than_the_screen_is_shown_whole() -> None:
    lines = [f"line {i}" for i in range(100)]
    text = "```\n" + "\n".join(lines) + "\n```\nend"
    assert stream([line + "\n" for line in text.split("\n")], height=10) == [
        *(f"  {line}" for line in lines),
        "",
        "end",
    ]


def test_only_blocks_that_cannot_change_are_finished() -> None:
    assert finished_length("para\n***") == 0  # may become ***bold*** text of the paragraph
    assert finished_length("para\n\nnext") == 0
    assert finished_length("para\n\nnext\n") == len("para\n\n")
    assert finished_length("```\n\ncode\n\n# not a title\n") == 0


def test_what_the_model_writes_stays_text() -> None:
    """No escape sequence, rich markup, HTML, entity, hidden link, image or emoji code takes effect or disappears."""
    text = (
        "\x1b]0;title\x07\x1b[2J\x9b31m [bold]b[/bold] [link=http://x]l[/link] <b>h</b> &#27;[1m &amp; :smile:\n\n"
        "[see](http://a.b/c) ![pic](http://i/j)\n\n[1]: http://ref\n\n<script>\n\n`\x1b[0m`\n\n```\n\x1b[3m\n```\n"
    )
    shown = "\n".join(stream(list(text), width=200))
    for piece in (
        "␛]0;title␇␛[2J<U+009B>31m [bold]b[/bold] [link=http://x]l[/link] <b>h</b> &#27;[1m &amp; :smile:",
        "see (http://a.b/c)", "pic (http://i/j)", "[1]: http://ref", "<script>", "␛[0m", "␛[3m",
    ):  # fmt: skip
        assert piece in shown


def test_absurd_nesting_is_shown_as_it_stands() -> None:
    console, _ = terminal(20)
    for text in (
        ">" * 60 + " deep",
        "".join("  " * i + "- a\n" for i in range(60)) + "  " * 60 + "deep",
        ">" * 5000 + "deep",
    ):
        lines = render(console, text)
        assert "deep" in "".join(segment.text for line in lines for segment in line)


def test_the_mark_and_an_empty_answer() -> None:
    assert stream([], mark="(stopped)") == ["(stopped)"]
    assert stream(["half an ans"], mark="(stopped)") == ["half an ans", "(stopped)"]


def test_what_is_waited_for_stands_where_the_answer_will_come() -> None:
    console, screen = terminal(40, 8)
    view = RichView(console)
    with view.answer() as writer:
        writer.wait("reading the prompt 17%")
        assert screen.lines() == ["reading the prompt 17%"]
        writer.wait("reading the prompt 34%")
        assert screen.lines() == ["reading the prompt 34%"]
        writer.write("It is blue.")
        writer.finish()
    assert screen.lines() == ["It is blue."]
    with view.compare(["with", "without"]) as compared:
        compared.wait("reading the prompt 50%")
        assert screen.lines()[-1] == "reading the prompt 50%"
        compared.write(0, "red")
        compared.write(1, "blue")
        compared.finish("seed 1")
    assert not any("reading" in line for line in screen.lines())


@pytest.mark.parametrize("width", [40, 100])
def test_compare_on_a_terminal(width: int) -> None:
    console, screen = terminal(width, 8)
    with RichView(console).compare(["with", "without"]) as writer:
        for i in range(20):
            writer.write(0, f"left {i}\n")
        writer.write(1, "right \x1b[1m[bold]\n")
        writer.finish("seed 1")
    shown = screen.lines()
    assert shown[-1] == "seed 1" and sum("left 19" in line for line in shown) == 1
    assert any("right ␛[1m[bold]" in line for line in shown)
    assert any("left 0 " in line and "right" in line for line in shown) == (width == 100)
