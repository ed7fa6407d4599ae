"""What the report pages share: one HTML page that loads nothing, texts and numbers as they stand in it, tables."""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from acd_local.evaluate.tables import visible

FIGURE_SPACE = "\u2007"


def whole(title: str, body: Sequence[str], script: str = "") -> str:
    """The page.

    Args:
        title: as text. body: HTML.
        script: the only one that may run.
    """
    allowed = ""
    if script:
        allowed = f" script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}';"
    policy = f"default-src 'none'; style-src 'unsafe-inline';{allowed} base-uri 'none'; form-action 'none'"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{text(title)}</title><style>{asset('report.css')}</style></head><body><main>",
        *body,
        f"</main>{f'<script>{script}</script>' if script else ''}</body></html>",
    ]
    return "\n".join(parts) + "\n"


def asset(name: str) -> str:
    return resources.files("acd_local.evaluate").joinpath(name).read_text(encoding="utf-8")


class Numbers:
    """Captions, numbered in their order."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._next = itertools.count(1)

    def caption(self, words: str, more: str = "") -> str:
        rest = f' <span class="more">{text(more)}</span>' if more else ""
        return f"<b>{self._kind} {next(self._next)}.</b> {text(words)}{rest}"


def section(title: str, content: Sequence[str]) -> list[str]:
    return [f"<section><h2>{title}</h2>", *content, "</section>"] if content else []


def plain(value: object) -> str:
    return visible(" ".join(str(value).split()))


def text(value: object) -> str:
    return html.escape(visible(value))


def number(value: object) -> float | None:
    """A finite number, or None."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None  # type: ignore[arg-type]


def percent(value: object) -> str:
    known = number(value)
    return "–" if known is None else f"{100 * known + 0.0:.1f}".replace("-", "\u2212")


def decimal(value: object, digits: int = 3) -> str:
    known = number(value)
    return "–" if known is None else f"{known:.{digits}f}".replace("-", "\u2212")


def duration(value: object) -> str:
    seconds = number(value)
    if seconds is None:
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@dataclass(frozen=True)
class Column:
    head: str
    texts: Sequence[str]
    best: Sequence[bool] = ()
    figures: bool = True  # of one unit, kept in line


def table(key: str, caption: str, head: str, names: Sequence[str], columns: Sequence[Column]) -> list[str]:
    out = [f'<div class="table"><table id="table-{key}"><caption>{caption}</caption>']
    heads = "".join(f'<th scope="col">{text(column.head)}</th>' for column in columns)
    out.append(f'<thead><tr><th scope="col">{text(head)}</th>{heads}</tr></thead><tbody>')
    widths = [max(map(len, column.texts), default=0) if column.figures else 0 for column in columns]
    for i, name in enumerate(names):
        cells = ""
        for column, width in zip(columns, widths, strict=True):
            best = ' class="best"' if column.best and column.best[i] else ""
            cells += f'<td{best}><span class="value">{text(column.texts[i].rjust(width, FIGURE_SPACE))}</span></td>'
        out.append(f'<tr><th scope="row">{text(plain(name))}</th>{cells}</tr>')
    return [*out, "</tbody></table></div>"]
