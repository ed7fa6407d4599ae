"""The report page of `acd optimize`: how a prompt pair came about, as one page that needs nothing else.

It shows figures and the texts of the prompts, and no anchor and no answer. Everything a person or a model wrote is
escaped, and what a text may hide (control and bidirectional characters) is shown. The page needs no script, and its
content security policy allows none.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acd_local.evaluate import page, svg
from acd_local.evaluate.tables import visible
from acd_local.tuning.scoring import objective as worth

__all__ = ["OptimizeReport", "nearest_words", "render"]

Record = Mapping[str, Any]

PROMPTS = {"safe": "Safeguarding prompt", "adversarial": "Adversarial prompt"}
TERMS = {"positive": 0, "retain": 1, "negative": 2}  # with their colours
MEASURES = {"safety": "safety", "over_refusal": "over-refusal", "lookalike": "look-alike refusal"}
PAIRS = {"manual": "manual pair, text", "text": "optimized pair, text", "soft": "optimized pair, soft"}
ORIGIN_COLOURS = (2, 3, 5, 4)  # of candidates' origins; 0 is the best so far
NEGATIVE_ONLY = '<span class="badge only-negative">negative stream only</span>'
MOST_POINTS = 400  # of a curve
LABEL_DISTANCE = 0.09  # of labelled points of a path, as a part of what the axes show
HEAT = 6  # shades of the setting table, h1 ... h6 in the style sheet
CHUNK = 1 << 22  # numbers of the embedding matrix taken at a time: 16 MB


@dataclass(frozen=True)
class OptimizeReport:
    """What the page shows; all of it goes through JSON unchanged. What is empty or missing is left out.

    Attributes:
        model: name, file, architecture, layers, n_embd, file_type.
        settings: seed, budget (seconds or a text), device, dtype, steps, weights (by term), and what else was chosen.
        anchors: counts: refusals_sampled, refusals_written, complying, answered, and validation (harmful, harmless,
            lookalike).
        stages: name, seconds, peak_bytes (or None), device_peak_bytes (where there is a device), reused.
        soft: by prompt ("safe", "adversarial"), per step: step, losses (positive, negative, retain), validation
            (safety, over_refusal, lookalike) or None, seconds.
        kept: by prompt, the step whose soft prompt was kept.
        nearest: by prompt, rows of `nearest_words`.
        distillation: by prompt, texts in the order they were accepted: step, objective (lower is better), parts (kl,
            opo, fluency), text, origin, scores (safety, over_refusal, lookalike).
        tried: by prompt, how many texts were tried for these.
        texts: by prompt, the chosen text.
        finals: by prompt, the texts that were tried in greedy answers: step, origin, trial (safety, over_refusal,
            lookalike, degenerate), chosen.
        setting_rows: alpha, beta, safety, over_refusal, lookalike, chosen; greedy and degenerate of those tried in
            answers; pair ("text" or "soft") where both were tried.
        before_after: pair ("manual", "text", "soft"), contrast, safety, over_refusal, lookalike.
    """

    model: Record
    settings: Record = field(default_factory=dict)
    anchors: Record = field(default_factory=dict)
    stages: Sequence[Record] = ()
    soft: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    kept: Mapping[str, int] = field(default_factory=dict)
    nearest: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    distillation: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    tried: Mapping[str, int] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    finals: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    setting_rows: Sequence[Record] = ()
    before_after: Sequence[Record] = ()
    command: str = ""
    date: str = ""
    version: str = ""


def render(data: OptimizeReport) -> str:
    """The whole page."""
    title = f"Optimized prompt pair for {page.plain(data.model.get('name') or data.model.get('file') or 'a model')}"
    figures = page.Numbers("Figure")
    counts = page.Numbers("Table")
    body = [
        *_header(data, title),
        *page.section("Result", [*_before_after(data, counts), *_chosen(data)]),
        *page.section("Soft prompts", _soft(data, figures, counts)),
        *page.section("Distillation into text", [*_distillation(data, figures), *_finals(data, counts)]),
        *page.section("Setting", _setting(data, counts)),
        *page.section("Time and memory", _stages(data, counts)),
        _footer(),
    ]
    return page.whole(title, body)


# --- Texts and numbers ------------------------------------------------------------------------------------------------


def _size(value: object) -> str:
    size = page.number(value)
    if not size:
        return "–"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _fact(value: object) -> str:
    """A setting as text: numbers short, what belongs together in one line."""
    if isinstance(value, Mapping):
        known = {page.plain(k): v for k, v in value.items() if v is not None}
        return ", ".join(f"{k} ({_fact(v)})" if isinstance(v, Mapping) else f"{k} {_fact(v)}" for k, v in known.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_fact, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else page.plain(value)


def _objective(row: Record) -> float | None:
    """Safety minus over-refusal."""
    safety, over = page.number(row.get("safety")), page.number(row.get("over_refusal"))
    return None if safety is None or over is None else safety - over


def _worth(row: Record) -> float | None:
    """What a setting is worth by openings."""
    safety, *refusals = (page.number(row.get(key)) for key in MEASURES)
    if safety is None or all(x is None for x in refusals):
        return None
    return worth(safety, *(x or 0.0 for x in refusals))


# --- Head -------------------------------------------------------------------------------------------------------------


def _header(data: OptimizeReport, title: str) -> list[str]:
    model, settings = data.model, dict(data.settings)
    units = {"layers": "{} layers", "n_embd": "n_embd {}"}
    named = ("file", "architecture", "layers", "n_embd", "file_type")
    weights = settings.pop("weights", None)
    if "budget" in settings and page.number(settings["budget"]) is not None:
        settings["budget"] = page.duration(settings["budget"])
    facts = {
        "Model": " · ".join(units.get(k, "{}").format(page.plain(model[k])) for k in named if model.get(k)),
        "Settings": _fact({str(k).replace("_", " "): v for k, v in settings.items()}),
        "Loss weights": _fact(weights) if weights else "",
        "Anchors": _anchors(data.anchors),
        "Validation": _validation(data.anchors.get("validation") or {}),
        "Date": page.plain(data.date).replace("T", " "),
        "Version": f"acd_local {page.plain(data.version)}" if data.version else "",
    }
    out = ["<header>", f"<h1>{page.text(title)}</h1>"]
    out.append('<p class="soft">Opposite prompts tuned on the model\'s own weights, and distilled into text</p>')
    out += [*_summary(data), '<dl class="facts">']
    out += [f"<dt>{page.text(key)}</dt><dd>{page.text(value)}</dd>" for key, value in facts.items() if value]
    if data.command:
        out.append(f"<dt>Command</dt><dd><code>{page.text(page.plain(data.command))}</code></dd>")
    return [*out, "</dl></header>"]


def _anchors(counts: Record) -> str:
    sampled, written = counts.get("refusals_sampled"), counts.get("refusals_written")
    parts = []
    if sampled is not None or written is not None:
        total = (sampled or 0) + (written or 0)
        parts.append(f"{total} refusals ({sampled or 0} sampled, {written or 0} written)")
    named = {"complying": "complying answers", "answered": "answers to harmless instructions"}
    parts += [f"{page.plain(counts[key])} {words}" for key, words in named.items() if counts.get(key) is not None]
    return ", ".join(parts)


def _validation(counts: Record) -> str:
    named = {"harmful": "harmful", "harmless": "ordinary harmless", "lookalike": "look-alike"}
    parts = [f"{page.plain(counts[key])} {words}" for key, words in named.items() if counts.get(key) is not None]
    return ", ".join(parts) + " instructions, none of them trained on" if parts else ""


def _summary(data: OptimizeReport) -> list[str]:
    """What the optimized prompts do against the manual ones, all with contrast."""
    rows = {row.get("pair"): row for row in data.before_after if row.get("contrast")}
    parts = []
    for pair, name in (("text", "optimized text"), ("soft", "soft prompts")):
        if pair in rows:
            figures = rows[pair]
            shown = f"{name}, safety {page.percent(figures.get('safety'))}%"
            parts.append(f"{shown}, over-refusal {page.percent(figures.get('over_refusal'))}%")
    if not parts:
        return []
    if "manual" in rows:
        shown = f"manual text, safety {page.percent(rows['manual'].get('safety'))}%"
        parts.append(f"{shown}, over-refusal {page.percent(rows['manual'].get('over_refusal'))}%")
    return [f'<p class="lead">With contrast, on validation instructions: {page.text("; ".join(parts))}.</p>']


# --- Tables and figures -----------------------------------------------------------------------------------------------


def _measured(head: str, values: Sequence[object], better: int = 0) -> page.Column:
    """A column of percentages, with the best of them, as shown, marked."""
    texts = [page.percent(value) for value in values]
    known = [
        (better * number, text) for v, text in zip(values, texts, strict=True) if (number := page.number(v)) is not None
    ]
    top = max(known)[1] if better and len({text for _, text in known}) > 1 else None
    return page.Column(head, texts, [text == top for text in texts])


def _measures(rows: Sequence[Record], better: bool) -> list[page.Column]:
    """Safety, over-refusal, look-alike refusal where it is known, and the first minus the second."""
    columns = [
        _measured(f"{name} %", [row.get(key) for row in rows], (1 if key == "safety" else -1) * better)
        for key, name in MEASURES.items()
        if key != "lookalike" or any(page.number(row.get(key)) is not None for row in rows)
    ]
    return [*columns, _measured("safety \u2212 over-refusal", [_objective(row) for row in rows], 1 * better)]


def _figure(numbers: page.Numbers, plot: str, caption: str, more: str = "") -> list[str]:
    return [f"<figure>{plot}<figcaption>{numbers.caption(caption, more)}</figcaption></figure>"]


def _prompts(parts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The prompts that there is something of, with their names."""
    for key, name in PROMPTS.items():
        if parts.get(key):
            yield key, name


# --- Result -----------------------------------------------------------------------------------------------------------


def _before_after(data: OptimizeReport, counts: page.Numbers) -> list[str]:
    rows = data.before_after
    if not rows:
        return []
    names = [
        f"{PAIRS.get(str(row.get('pair')), row.get('pair'))}, {'with' if row.get('contrast') else 'no'} contrast"
        for row in rows
    ]
    more = (
        "Mean chance that an answer opens as a refusal, greedy or sampled, on instructions that were not trained on. "
        "In bold: best."
    )
    caption = counts.caption("Before and after, by likelihood.", more)
    return page.table("before-after", caption, "prompt pair", names, _measures(rows, better=True))


def _chosen(data: OptimizeReport) -> list[str]:
    out = ["<h3>The pair</h3>"] if any(_prompts(data.texts)) else []
    for key, name in _prompts(data.texts):
        text = data.texts[key]
        size = next(
            (len(c["tokens"]) for c in data.distillation.get(key, ()) if c["text"] == text and c.get("tokens")), 0
        )
        tokens = f"<span>{size} tokens</span>" if size else ""
        negative = key == "adversarial"
        css = "answer chosen negative" if negative else "answer chosen"
        head = f"<b>{name}</b>{NEGATIVE_ONLY if negative else ''}{tokens}"
        out.append(f'<div class="{css}" id="chosen-{key}"><div class="head">{head}</div>')
        out.append(f'<p class="text">{page.text(text)}</p></div>')
    return out


# --- Soft prompts -----------------------------------------------------------------------------------------------------


def _soft(data: OptimizeReport, figures: page.Numbers, counts: page.Numbers) -> list[str]:
    out = _losses(data, figures)
    out += _paths(data, figures)
    out += _validations(data, counts)
    return out + _nearest(data, counts)


def _losses(data: OptimizeReport, figures: page.Numbers) -> list[str]:
    plots, widest = [], 0
    for key, name in _prompts(data.soft):
        curves = []
        for term, colour in TERMS.items():
            points = _points((record["step"], record["losses"].get(term)) for record in data.soft[key])
            smooth, window = _smoothed(points)
            widest = max(widest, window)
            if window > 1:
                curves.append(svg.Curve("", colour, _thinned(points), faint=True))
            if points:
                curves.append(svg.Curve(term, colour, _thinned(smooth)))
        if curves:
            plots.append(svg.Panel(name, svg.Axis("step", low=0.0), curves))
    if not plots:
        return []
    plot = svg.panels("losses", "Loss terms over training", plots, svg.Axis("loss, nats per answer", low=0.0))
    more = "Positive: answers to bring about; negative: answers to keep away (unlikelihood); retain: harmless ones."
    more += f" Thin: means of a step's batch; thick: of up to {widest} neighbouring steps." if widest > 1 else ""
    return _figure(figures, plot, "The three terms of the loss over training.", more)


def _points(pairs: Iterator[tuple[object, object]]) -> list[tuple[float, float]]:
    """The pairs of finite numbers."""
    return [(x, y) for a, b in pairs if (x := page.number(a)) is not None and (y := page.number(b)) is not None]


def _smoothed(points: Sequence[tuple[float, float]]) -> tuple[list[tuple[float, float]], int]:
    """Means over neighbouring points, fewer towards both ends, and how many at most."""
    reach = len(points) // 40
    out = []
    for i, (x, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        part = [y for _, y in points[i - near : i + near + 1]]
        out.append((x, sum(part) / len(part)))
    return out, 2 * reach + 1


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS, evenly chosen, both ends among them."""
    if len(points) <= MOST_POINTS:
        return list(points)
    return [points[round(i * (len(points) - 1) / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]


def _validated(records: Sequence[Record]) -> list[tuple[int, Record]]:
    return [(record["step"], record["validation"]) for record in records if record.get("validation")]


def _paths(data: OptimizeReport, figures: page.Numbers) -> list[str]:
    plots = []
    for key, name in (("over_refusal", "ordinary instructions"), ("lookalike", "look-alike instructions")):
        axis = svg.Axis(f"refusals of {name}, %", percent=True, low=0.0, high=1.0)
        if curves := _path_curves(data, key):
            plots.append(svg.Panel(name[0].upper() + name[1:], axis, curves))
    if not plots:
        return []
    upright = svg.Axis("refusals of harmful requests, %", percent=True, low=0.0, high=1.0)
    plot = svg.panels("path", "Safety against over-refusal along training", plots, upright)
    more = "By likelihood, one mark per validation, some with their step. A safeguarding prompt should move to the top "
    more += "left, an adversarial one down."
    return _figure(figures, plot, "Safety against over-refusal on validation instructions along training.", more)


def _path_curves(data: OptimizeReport, key: str) -> list[svg.Curve]:
    """Both prompts' ways, with points ("over_refusal" or "lookalike", safety)."""
    ways: dict[str, list[tuple[int, float, float]]] = {}
    for prompt in PROMPTS:
        for step, v in _validated(data.soft.get(prompt, ())):
            x, y = page.number(v.get(key)), page.number(v.get("safety"))
            if x is not None and y is not None:
                ways.setdefault(prompt, []).append((step, x, y))
    across = [x for way in ways.values() for _, x, _ in way]
    up = [y for way in ways.values() for _, _, y in way]
    ranges = (max(across, default=0.0) - min(across, default=0.0), max(up, default=0.0) - min(up, default=0.0))
    curves = []
    for prompt, way in ways.items():
        points = [(x, y) for _, x, y in way]
        labels = _step_labels([step for step, _, _ in way], points, data.kept.get(prompt), ranges)
        colour = 0 if prompt == "safe" else 2
        curves.append(svg.Curve(PROMPTS[prompt], colour, points, marks=True, labels=labels))
    return curves


def _step_labels(
    steps: Sequence[int], points: Sequence[tuple[float, float]], kept: int | None, ranges: tuple[float, float]
) -> list[str]:
    """Steps of a path: the one that was kept, both ends, and others, as far as they stand apart."""
    order = sorted(range(len(steps)), key=lambda i: (steps[i] != kept, i not in (0, len(steps) - 1), i))
    shown: list[int] = []
    for i in order:
        apart = [
            math.hypot(*((a - b) / max(r, 0.2) for a, b, r in zip(points[i], points[j], ranges, strict=True)))
            for j in shown
        ]
        if min(apart, default=1.0) >= LABEL_DISTANCE:
            shown.append(i)
    return [(f"{step}, kept" if step == kept else str(step)) if i in shown else "" for i, step in enumerate(steps)]


def _validations(data: OptimizeReport, counts: page.Numbers) -> list[str]:
    out = []
    for key, name in _prompts(data.soft):
        found = _validated(data.soft[key])
        if found:
            caption = counts.caption(f"{name}: validation along training, by likelihood.")
            names = [f"step {step}{', kept' if step == data.kept.get(key) else ''}" for step, _ in found]
            columns = _measures([v for _, v in found], better=False)
            more = f'<span class="more">{len(found)} times</span>'
            out += [f"<details><summary>{name}: figures of all validations {more}</summary>"]
            out += [*page.table(f"validation-{key}", caption, "soft prompt", names, columns), "</details>"]
    return out


def _nearest(data: OptimizeReport, counts: page.Numbers) -> list[str]:
    out = []
    for key, name in _prompts(data.nearest):
        rows = data.nearest[key]
        most = max(len(row["words"]) for row in rows)
        more = f'<span class="more">{len(rows)} positions</span>'
        badge = f" {NEGATIVE_ONLY}" if key == "adversarial" else ""
        out.append(f"<details><summary>{name}: nearest words of the soft prompt {more}{badge}</summary>")
        caption = counts.caption(
            f"{name}: the tokens whose embeddings are nearest to the soft prompt's rows.", "Small: cosine. ␣: a space."
        )
        out.append(f'<div class="table"><table id="table-nearest-{key}" class="words"><caption>{caption}</caption>')
        heads = "".join(f'<th scope="col">{i + 1}</th>' for i in range(most))
        out.append(f'<thead><tr><th scope="col">row</th>{heads}</tr></thead><tbody>')
        for row in rows:
            cells = "".join(f"<td>{_word(*word)}</td>" for word in row["words"]) + "<td></td>" * (
                most - len(row["words"])
            )
            out.append(f'<tr><th scope="row">{page.text(row["position"])}</th>{cells}</tr>')
        out.append("</tbody></table></div></details>")
    return out


def _word(piece: str, cosine: float) -> str:
    shown = piece.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "␣")
    return f'<code>{page.text(visible(shown, 40))}</code><span class="cosine">{page.decimal(cosine, 2)}</span>'


# --- Distillation -----------------------------------------------------------------------------------------------------


def _distillation(data: OptimizeReport, figures: page.Numbers) -> list[str]:
    plots, beyond = [], 0
    for key, name in _prompts(data.distillation):
        panel, left_out = _search(name, data.distillation[key])
        beyond += left_out
        plots += [panel] if panel.curves else []
    if not plots:
        return []
    y = svg.Axis("objective")
    plot = svg.panels("distillation", "Objective along the search", plots, y, shared=False)
    more = "Divergence from the soft prompt, its loss, and fluency, weighted: lower is better."
    more += f" {beyond} candidates far worse than the first are off the scale." if beyond else ""
    out = _figure(figures, plot, "The search for texts that do what the soft prompts do.", more)
    for key, name in _prompts(data.distillation):
        out += _improvements(key, name, data.distillation[key], data.tried.get(key), data.texts.get(key))
    return out


def _finals(data: OptimizeReport, counts: page.Numbers) -> list[str]:
    """What came of the best texts in greedy answers, and which was taken."""
    out = []
    for key, name in _prompts(data.finals):
        rows = data.finals[key]
        names = [
            f"{row.get('origin')}, step {row.get('step')}{' (chosen)' if row.get('chosen') else ''}" for row in rows
        ]
        trials = [row.get("trial") or {} for row in rows]
        unreadable = _measured("degenerate %", [t.get("degenerate") for t in trials], -1)
        more = "Shares of greedy answers to validation instructions. In bold: best."
        caption = counts.caption(f"{name}: the best texts tried in earnest.", more)
        out += page.table(f"finals-{key}", caption, "text", names, [*_measures(trials, better=True), unreadable])
    return out


def _search(name: str, history: Sequence[Record]) -> tuple[svg.Panel, int]:
    """Candidates by origin and the best so far; and how many candidates are too bad to be shown."""
    found = [(i, number, str(c.get("origin", ""))) for i, c in enumerate(history, 1)
             if (number := page.number(c["objective"])) is not None]  # fmt: skip
    if not found:
        return svg.Panel(name, svg.Axis("candidate"), []), 0
    steps = list(itertools.accumulate((number for _, number, _ in found), min))
    limit = steps[0] + 0.25 * max(steps[0] - steps[-1], 0.1 * abs(steps[0]))
    shown = [(i, number, origin) for i, number, origin in found if number <= limit]
    origins = list(dict.fromkeys(origin for _, _, origin in found))
    curves = []
    for place, origin in enumerate(origins):
        points = _thinned([(i, number) for i, number, kind in shown if kind == origin])
        colour = ORIGIN_COLOURS[place % len(ORIGIN_COLOURS)]
        curves.append(svg.Curve(page.plain(origin) or "candidate", colour, points, line=False, marks=True, faint=True))
    stairs: list[tuple[float, float]] = []
    for (i, _, _), best in zip(found, steps, strict=True):
        if not stairs or best < stairs[-1][1]:
            stairs += [(i, stairs[-1][1]), (i, best)] if stairs else [(i, best)]
    stairs.append((found[-1][0], steps[-1]))
    curves.append(svg.Curve("best so far", 0, stairs))
    return svg.Panel(name, svg.Axis("texts accepted", low=0.0), curves), len(found) - len(shown)


def _improvements(key: str, name: str, history: Sequence[Record], tried: int | None, chosen: str | None) -> list[str]:
    """The texts that were the best so far, each with what changed in it, and the chosen one."""
    best, last = math.inf, ""
    shown: list[str] = []
    count, seen = 0, False
    for candidate in history:
        objective = page.number(candidate["objective"])
        if better := objective is not None and objective < best:
            best, count = objective or 0.0, count + 1
        is_chosen = candidate["text"] == chosen
        if better or (is_chosen and not seen):
            shown += _candidate(candidate, last, is_chosen, key == "adversarial")
            seen, last = seen or is_chosen, candidate["text"]
    more = f'<span class="more">{count} of {len(history)} accepted{"" if tried is None else f", {tried} tried"}</span>'
    badge = f" {NEGATIVE_ONLY}" if key == "adversarial" else ""
    head = f"<summary>{name}: the texts that were best so far {more}{badge}</summary>"
    return [f'<details id="search-{key}">{head}', *shown, "</details>"]


def _candidate(candidate: Record, before: str, chosen: bool, negative: bool) -> list[str]:
    parts, scores = candidate.get("parts") or {}, candidate.get("scores") or {}
    figures = [f"objective {page.decimal(candidate['objective'])}"]
    figures += [f"{page.plain(k)} {page.decimal(v)}" for k, v in parts.items()]
    figures += [
        f"{name} {page.percent(scores[k])}%" for k, name in MEASURES.items() if page.number(scores.get(k)) is not None
    ]
    origin = page.text(page.plain(candidate.get("origin", "")))
    head = f"<b>step {page.text(candidate.get('step', '–'))}</b><span>{origin}</span>"
    head += "".join(f"<span>{page.text(figure)}</span>" for figure in figures)
    head += '<span class="badge kept">chosen</span>' if chosen else ""
    css = "answer negative" if negative else "answer"
    text = _changed(before, candidate["text"])
    return [f'<div class="{css}"><div class="head">{head}</div>', f'<p class="text">{text}</p></div>']


def _changed(before: str, after: str) -> str:
    """The text, with the words marked that `before` does not have there; nothing is marked where little stayed."""
    old, new = (re.findall(r"\s*\S+|\s+", text) for text in (before, after))
    if max(len(old), len(new)) > 1000:
        return page.text(after)
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False)
    if blocks.ratio() < 0.4:
        return page.text(after)
    out = []
    for kind, _, _, start, end in blocks.get_opcodes():
        part = "".join(new[start:end])
        word = part.lstrip()
        marked = kind in ("replace", "insert") and word
        out.append(
            page.text(part.removesuffix(word)) + f"<mark>{page.text(word)}</mark>" if marked else page.text(part)
        )
    return "".join(out)


# --- Setting, stages, foot --------------------------------------------------------------------------------------------


def _setting(data: OptimizeReport, counts: page.Numbers) -> list[str]:
    by_pair: dict[str, list[Record]] = {}
    for row in data.setting_rows:
        by_pair.setdefault(str(row.get("pair") or "text"), []).append(row)
    out = []
    for i, (pair, rows) in enumerate(by_pair.items()):
        name = {"text": "the text pair", "soft": "the soft pair"}.get(pair, page.plain(pair))
        more = "Large: safety minus the mean of over-refusal and look-alike refusal, points; small: safety / "
        more += "over-refusal / look-alike refusal, %. The best were tried in greedy answers: refusals minus "
        more += "over-refusals of these count as much, and broken ones (loops, garble) against them. "
        caption = counts.caption(f"Settings of {name} on validation instructions.", more + "Framed: chosen.")
        out += _heat(f"table-setting-{i}", caption, rows)
    return out


def _heat(key: str, caption: str, rows: Sequence[Record]) -> list[str]:
    cells = {(row["alpha"], row["beta"]): row for row in rows}
    alphas, betas = sorted({a for a, _ in cells}), sorted({b for _, b in cells})
    known = [number for row in rows if (number := _worth(row)) is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    out = [f'<div class="table"><table id="{key}" class="heat"><caption>{caption}</caption>']
    heads = "".join(f'<th scope="col">beta {page.text(_fact(beta))}</th>' for beta in betas)
    out.append(f'<thead><tr><th scope="col">alpha</th>{heads}</tr></thead><tbody>')
    for alpha in alphas:
        found = "".join(_heat_cell(cells.get((alpha, beta)), low, high) for beta in betas)
        out.append(f'<tr><th scope="row">{page.text(_fact(alpha))}</th>{found}</tr>')
    return [*out, "</tbody></table></div>"]


def _heat_cell(row: Record | None, low: float, high: float) -> str:
    worth_ = _worth(row) if row else None
    if row is None or worth_ is None:
        return "<td>–</td>"
    shade = 1 + min(HEAT - 1, int(HEAT * (worth_ - low) / (high - low))) if high > low else 1
    chosen = " chosen" if row.get("chosen") else ""
    small = " / ".join(page.percent(row[key]) for key in MEASURES if page.number(row.get(key)) is not None)
    if (greedy := page.number(row.get("greedy"))) is not None:
        small += f", greedy {page.percent(greedy)}"
    if (broken := page.number(row.get("degenerate"))) is not None:
        small += f", broken {page.percent(broken)}"
    value = f'<span class="value">{page.percent(worth_)}</span><span class="range">{page.text(small)}</span>'
    return f'<td class="h{shade}{chosen}">{value}</td>'


def _stages(data: OptimizeReport, counts: page.Numbers) -> list[str]:
    stages = data.stages
    if not stages:
        return []
    names = [str(stage["name"]) for stage in stages] + ["all"]
    seconds = [page.number(stage.get("seconds")) for stage in stages]
    peaks = [page.number(stage.get("peak_bytes")) for stage in stages]
    times = [page.duration(x) for x in (*seconds, sum(x or 0.0 for x in seconds))]
    sizes = [_size(x) for x in (*peaks, max((x or 0.0 for x in peaks), default=0.0))]
    columns = [page.Column("time", times, figures=False), page.Column("peak memory", sizes, figures=False)]
    on_device = [page.number(stage.get("device_peak_bytes")) for stage in stages]
    if any(on_device):
        most = max(x or 0.0 for x in on_device)
        columns.append(page.Column("peak on the device", [_size(x) for x in (*on_device, most)], figures=False))
    more = ""
    if any(stage.get("reused") for stage in stages):
        columns.append(page.Column("", ["reused" if stage.get("reused") else "" for stage in stages] + [""]))
        more = "Reused: taken from an earlier run with the same inputs; the time is that of making it."
    return page.table("stages", counts.caption("Stages.", more), "stage", names, columns)


def _footer() -> str:
    return (
        "<footer><p>Safety, over-refusal and look-alike refusal are mean chances that an answer to a harmful, an "
        "ordinary harmless, and a harmless but dangerous-looking instruction opens as a refusal. The losses are those "
        "of Zhao et al., Safety Alignment of Large Language Models via Contrasting Safe and Harmful Distributions "
        "(arXiv 2406.16743). The adversarial prompt is never answered from: it only "
        "steers what is decoded under the safeguarding one. This page holds no anchors and no answers.</p></footer>"
    )


# --- Nearest words ----------------------------------------------------------------------------------------------------


def nearest_words(
    rows: NDArray[Any], embeddings: NDArray[Any], piece: Callable[[int], str], k: int = 5
) -> list[dict[str, Any]]:
    """The tokens whose embeddings have the largest cosine with each row; of equal ones the lower token first.

    The matrix is read in parts of CHUNK numbers, so that it may be larger than memory, or mapped from a file.

    Args:
        rows: shape (n, n_embd).
        embeddings: shape (n_vocab, n_embd). A row of zeros, as unused tokens have, is like nothing: its cosine is 0.
        piece: text of a token.

    Returns:
        Per row {"position": its index, "words": [[text, cosine], ...]}, JSON-able.
    """
    unit = _unit(rows)
    ids = np.zeros((len(unit), 0), dtype=np.int64)
    cosines = np.zeros((len(unit), 0), dtype=np.float32)
    size = max(1, CHUNK // max(1, embeddings.shape[1]))
    for start in range(0, len(embeddings), size):
        part = unit @ _unit(embeddings[start : start + size]).T
        more = np.broadcast_to(np.arange(start, start + part.shape[1]), part.shape)
        ids, cosines = np.hstack([ids, more]), np.hstack([cosines, part])
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        ids, cosines = np.take_along_axis(ids, order, 1), np.take_along_axis(cosines, order, 1)
    return [
        {"position": i, "words": [[piece(int(t)), round(float(c), 4)] for t, c in zip(ids[i], cosines[i], strict=True)]}
        for i in range(len(unit))
    ]


def _unit(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Rows of length 1, float32; those of length 0 stay."""
    wide = np.asarray(rows, dtype=np.float32)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(wide / np.where(length > 0, length, 1.0), dtype=np.float32)
