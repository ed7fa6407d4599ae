"""Renders the report pages: one HTML file each, which loads nothing, from the templates beside this module.

Whatever a template writes is escaped, and what a text may hide (control and bidirectional characters) is shown. The
page's content security policy forbids it to load or run anything but its own script.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import logging
import math
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from acd_local.evaluate.figures import Figure
from acd_local.evaluate.tables import Table
from acd_local.runtime.text import plain, visible

FIGURE_SPACE = "\u2007"


def render(template: str, title: str, *, script: str = "", **values: Any) -> str:
    """Write the page.

    Args:
        template: a name in the templates folder, of one that extends base.html.
        script: the only one that may run: a name in that folder.
        values: what the template shows; base.html says what every page has.
    """
    code = asset(script) if script else Markup()
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    counts = {"next_figure": itertools.count(1).__next__, "next_table": itertools.count(1).__next__}
    page = _templates.get_template(template)
    return page.render(title=title, style=asset("report.css"), script=code, digest=digest, **counts, **values) + "\n"


def asset(name: str) -> Markup:
    """Read a file of the templates folder, which stands in a page as it is."""
    return Markup(resources.files("acd_local.evaluate").joinpath(f"templates/{name}").read_text(encoding="utf-8"))


def draw(figure: Figure) -> str:
    """Draw the figure as SVG; empty where nothing can be drawn."""
    module = _drawing()
    return module.draw(figure) if module else ""


def can_draw() -> bool:
    return _drawing() is not None


def _drawing() -> Any:
    """Import the module that draws; None where matplotlib (the extra "report") is missing, or cannot be imported."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would tell of the folders that it makes
    try:
        from acd_local.evaluate import drawing
    except ImportError:
        return None
    return drawing


def _compared(table: Table) -> list[bool]:
    """Tell which columns have changes."""
    return [any(row.cells[i].change for row in table.rows) for i in range(len(table.columns))]


def _aligned(table: Table) -> list[list[str]]:
    """Write the cells' texts by row, those of a column in line."""
    widths = [max((len(row.cells[i].text) for row in table.rows), default=0) for i in range(len(table.columns))]
    return [[c.text.rjust(w, FIGURE_SPACE) for c, w in zip(row.cells, widths, strict=True)] for row in table.rows]


# --- Texts and numbers ------------------------------------------------------------------------------------------------


def number(value: object) -> float | None:
    """Return a finite number, or None."""
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


def fact(value: object) -> str:
    """Write a setting as text: numbers short, what belongs together in one line."""
    if isinstance(value, dict):
        known = {plain(k): v for k, v in value.items() if v is not None}
        return ", ".join(f"{k} ({fact(v)})" if isinstance(v, dict) else f"{k} {fact(v)}" for k, v in known.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(fact, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else plain(value)


def token(piece: str) -> str:
    """Write a token's text, its spaces and line breaks shown."""
    return visible(piece.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "␣"), 40)


_templates = jinja2.Environment(
    loader=jinja2.FunctionLoader(asset),
    autoescape=True,
    finalize=lambda value: value if hasattr(value, "__html__") else visible(value),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
_templates.filters |= {"plain": plain, "percent": percent, "decimal": decimal, "fact": fact, "token": token}
_templates.globals |= {"draw": draw, "can_draw": can_draw, "aligned": _aligned, "compared": _compared}
