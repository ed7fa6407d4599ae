"""The report page of `acd fit`: what was tried, what was chosen, and what it does, as one page that needs nothing else.

It shows figures and texts of prompts, no anchor and no answer, and needs no script.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from acd_local import __version__
from acd_local.evaluate import page
from acd_local.evaluate.figures import Axis, BarChart, Series, Span
from acd_local.evaluate.tables import Cell, Row, Table
from acd_local.fit.context import FitContext
from acd_local.fit.result import FitResult
from acd_local.pairfile import PairFile

_KINDS = {"harmful": "harmful", "ordinary": "ordinary", "lookalike": "look-alike", "broken": "broken answers"}
_HEADS = {
    "text": "text",
    "negative": "minus",
    "alpha": "alpha",
    "beta": "beta",
    "openings": "refusing openings %",
    "harmful": "harmful refused %",
    "ordinary": "ordinary refused %",
    "lookalike": "look-alike refused %",
    "broken": "broken %",
    "facts": "facts right",
    "facts_as_is": "facts right as it is",
    "dropped": "dropped",
    "layer": "layer",
    "area": "area under the curve",
}
_CAPTIONS = {
    "layers": "Layers alone, categories held out",
    "helpful": "Texts for the base, greedy answers",
    "positive": "The best texts, greedy answers",
    "negative": "Negatives; those that refuse as much are dropped",
    "contrast": "The best settings, greedy answers",
}
_PERCENT = {"openings", "harmful", "ordinary", "lookalike", "broken"}


def render(context: FitContext, found: FitResult, pair: PairFile) -> str:
    """Write the whole page."""
    job = context.job
    return page.render(
        "fit.html",
        f"Pair fitted to {job.info.name or job.info.path.name}",
        lead="",
        facts=_facts(context, found, pair),
        command=job.request.command,
        judged=_judged(found),
        helpful=pair.gate.get("helpful", ""),
        shots="\n\n".join(f"User: {user}\nAssistant: {assistant}" for user, assistant in pair.shots),
        pair=pair,
        tried={key: _tried(key, found.tables.get(key) or []) for key in _CAPTIONS},
        times=_times(context),
    )


def _facts(context: FitContext, found: FitResult, pair: PairFile) -> dict[str, str]:
    info, gate = context.job.info, pair.gate
    return {
        "Model": f"{info.path.name} · {info.architecture} · {info.n_layers} layers · n_embd {info.n_embd}",
        "Gate": f"reads layer {' and '.join(map(str, found.layers))}; areas under the curve "
        + ", ".join(f"{page.decimal(area)} against {_KINDS[kind]}" for kind, area in found.gate.areas.items()),
        "Thresholds": ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in gate.items() if isinstance(v, int | float)),
        "Contrast": f"alpha {found.style.alpha:g}, beta {found.style.beta:g}",
        "Version": f"acd_local {__version__}",
    }


def _judged(found: FitResult) -> BarChart:
    """Draw bars of the model as it is and with the pair."""
    as_is, pair = (measured.estimates() for measured in found.judged)
    keys = [key for key in _KINDS if key in as_is and key in pair]
    series = [
        Series(name, [Span(e[key].value, e[key].low, e[key].high) for key in keys], colour)
        for colour, (name, e) in enumerate((("as it is", as_is), ("with the pair", pair)))
    ]
    axis = Axis("refused, broken answers below, %", percent=True, low=0.0, high=1.0)
    sizes = ", ".join(f"{as_is[key].n} {_KINDS[key]}" for key in keys if key != "broken")
    title = f"Refusals on held-out instructions ({sizes}), with intervals of 95%"
    return BarChart("judged", title, [_KINDS[k] for k in keys], series, axis)


def _tried(key: str, rows: Sequence[Mapping[str, Any]]) -> Table | None:
    if not rows:
        return None
    first, *others = [name for name in _HEADS if name in rows[0]]
    cells = [tuple(Cell(_shown(name, row[name])) for name in others) for row in rows]
    made = tuple(Row(str(row[first]), "", c) for row, c in zip(rows, cells, strict=True))
    return Table(key, _CAPTIONS[key], _HEADS[first], tuple(_HEADS[name] for name in others), made)


def _shown(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if name in _PERCENT:
        return f"{100 * value:.1f}"
    return f"{value:.4f}" if name == "area" else f"{value:g}" if isinstance(value, float) else str(value)


def _times(context: FitContext) -> Table:
    seconds = {name: s for name, s in context.notes.seconds.items() if s}
    rows = tuple(
        Row(name, "", (Cell(page.duration(s)),)) for name, s in {**seconds, "all": sum(seconds.values())}.items()
    )
    return Table("stages", "Stages", "stage", ("time",), rows)
