"""The report page of `acd fit`: what was tried, what was chosen, and what it does, as one page that needs nothing else.

It shows figures and texts of prompts, no anchor and no answer, and needs no script.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from acd_local import __version__
from acd_local.evaluate import page, svg
from acd_local.fit.context import FitContext as Lab
from acd_local.fit.result import FitResult as Found
from acd_local.optimize.report import NEGATIVE_ONLY
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
Tables = Mapping[str, Sequence[Mapping[str, Any]]]

_PERCENT = {"openings", "harmful", "ordinary", "lookalike", "broken"}


def render(lab: Lab, found: Found, pair: PairFile) -> str:
    """The whole page."""
    job = lab.job
    title = f"Pair fitted to {job.info.name or job.info.path.name}"
    counts = page.Numbers("Table")
    tables = found.tables
    body = [
        *_header(lab, found, pair, title),
        *page.section("Result", [*_judged(found), *_texts(pair)]),
        *page.section("Gate", _tried("layers", "Layers alone, categories held out.", tables, counts)),
        *page.section("Helpful text", _tried("helpful", "Texts for the base, greedy answers.", tables, counts)),
        *page.section("Positive text", _tried("positive", "The best texts, greedy answers.", tables, counts)),
        *page.section(
            "Contrast",
            [
                *_tried("negative", "Negatives; those that refuse as much are dropped.", tables, counts),
                *_tried("contrast", "The best settings, greedy answers.", tables, counts),
            ],
        ),
        *page.section("Time", _times(lab, counts)),
        "<footer><p>Figures of texts and settings are of instructions that they were chosen on, those of the result "
        "of others. The adversarial prompt is never answered from. This page holds no anchors and no answers.</p>"
        "</footer>",
    ]
    return page.whole(title, body)


def _header(lab: Lab, found: Found, pair: PairFile, title: str) -> list[str]:
    job = lab.job
    info, gate = job.info, pair.gate
    areas = found.gate.areas if found.gate else {}
    facts = {
        "Model": f"{info.path.name} · {info.architecture} · {info.n_layers} layers · n_embd {info.n_embd}",
        "Gate": f"reads layer {' and '.join(map(str, found.layers))}; areas under the curve "
        + ", ".join(f"{page.decimal(area)} against {_KINDS[kind]}" for kind, area in areas.items()),
        "Thresholds": ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in gate.items() if isinstance(v, int | float)),
        "Contrast": f"alpha {found.style.alpha:g}, beta {found.style.beta:g}",
        "Version": f"acd_local {__version__}",
    }
    out = ["<header>", f"<h1>{page.text(title)}</h1>", '<dl class="facts">']
    out += [f"<dt>{page.text(key)}</dt><dd>{page.text(value)}</dd>" for key, value in facts.items()]
    if job.request.command:
        out.append(f"<dt>Command</dt><dd><code>{page.text(job.request.command)}</code></dd>")
    return [*out, "</dl></header>"]


def _judged(found: Found) -> list[str]:
    """Bars of the model as it is and with the pair."""
    as_is, pair = (measured.estimates() for measured in found.judged or ())
    keys = [key for key in _KINDS if key in as_is and key in pair]
    series = [
        svg.Series(name, [svg.Span(e[key].value, e[key].low, e[key].high) for key in keys], colour)
        for colour, (name, e) in enumerate((("as it is", as_is), ("with the pair", pair)))
    ]
    axis = svg.Axis("refused, broken answers below, %", percent=True, low=0.0, high=1.0)
    plot = svg.bars("judged", "Refusals with and without the pair", [_KINDS[k] for k in keys], series, axis)
    sizes = ", ".join(f"{as_is[key].n} {_KINDS[key]}" for key in keys if key != "broken")
    caption = f"<b>Figure 1.</b> Refusals on held-out instructions ({page.text(sizes)}), with intervals of 95%."
    return [f"<figure>{plot}<figcaption>{caption}</figcaption></figure>"]


def _texts(pair: PairFile) -> list[str]:
    out = ["<h3>The pair</h3>"]
    texts = {"Helpful text": pair.gate.get("helpful", ""), "Safeguarding prompt": pair.safe}
    for name, text in {**texts, "Adversarial prompt": pair.adversarial}.items():
        negative = name == "Adversarial prompt"
        if text:
            css, badge = ("answer chosen negative", NEGATIVE_ONLY) if negative else ("answer chosen", "")
            out.append(f'<div class="{css}"><div class="head"><b>{name}</b>{badge}</div>')
            out.append(f'<p class="text">{page.text(text)}</p></div>')
        if name == "Safeguarding prompt" and pair.shots:
            shown = "\n\n".join(f"User: {user}\nAssistant: {assistant}" for user, assistant in pair.shots)
            out.append('<div class="answer"><div class="head"><b>Demonstrations</b><span>turns of the positive stream')
            out.append(f'</span></div><p class="text">{page.text(shown)}</p></div>')
    return out


def _tried(key: str, caption: str, tables: Tables, counts: page.Numbers) -> list[str]:
    rows = tables.get(key) or []
    if not rows:
        return []
    first, *others = [name for name in _HEADS if name in rows[0]]
    columns = [page.Column(_HEADS[name], [_shown(name, row[name]) for row in rows]) for name in others]
    return page.table(key, counts.caption(caption), _HEADS[first], [str(row[first]) for row in rows], columns)


def _shown(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if name in _PERCENT:
        return f"{100 * value:.1f}"
    return f"{value:.4f}" if name == "area" else f"{value:g}" if isinstance(value, float) else str(value)


def _times(lab: Lab, counts: page.Numbers) -> list[str]:
    seconds = {name: s for name, s in lab.notes.seconds.items() if s}
    texts = [page.duration(s) for s in (*seconds.values(), sum(seconds.values()))]
    return page.table("stages", counts.caption("Stages."), "stage", [*seconds, "all"], [page.Column("time", texts)])
