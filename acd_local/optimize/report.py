"""The report page of `acd optimize`: how a prompt pair came about, as one page that needs nothing else.

It shows figures and the texts of the prompts, and no anchor and no answer, and needs no script.
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

from acd_local.evaluate import page
from acd_local.evaluate.figures import Axis, Curve, Panel, Plot
from acd_local.evaluate.tables import Cell, Row, Table
from acd_local.runtime.text import plain
from acd_local.tuning.scoring import objective as worth

Record = Mapping[str, Any]

PROMPTS = {"safe": "Safeguarding prompt", "adversarial": "Adversarial prompt"}
TERMS = {"positive": 0, "retain": 1, "negative": 2}  # with their colours
MEASURES = {"safety": "safety", "over_refusal": "over-refusal", "lookalike": "look-alike refusal"}
PAIRS = {"manual": "manual pair, text", "text": "optimized pair, text", "soft": "optimized pair, soft"}
ORIGIN_COLOURS = (2, 3, 5, 4)  # of candidates' origins; 0 is the best so far
MOST_POINTS = 400  # of a curve
LABEL_DISTANCE = 0.09  # of labelled points of a path, as a part of what the axes show
HEAT = 6  # shades of the setting table, h1 ... h6 in the style sheet
CHUNK = 1 << 22  # numbers of the embedding matrix taken at a time: 16 MB


@dataclass(frozen=True)
class OptimizeReport:
    """The page's contents. What is empty is left out; a number that is None or not finite is shown as a dash.

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
    """Write the whole page."""
    return page.render(
        "optimization.html",
        f"Optimized prompt pair for {plain(data.model['name'] or data.model['file'])}",
        lead=_summary(data),
        facts=_facts(data),
        command=data.command,
        before_after=_before_after(data),
        chosen=_chosen(data),
        losses=_losses(data),
        path=_path(data),
        validations=_validations(data),
        nearest=[(key, name, data.nearest[key]) for key, name in _prompts(data.nearest)],
        search=_search(data),
        improvements=_improvements(data),
        finals=_finals(data),
        settings=_settings(data),
        stages=_stages(data),
        reused=any(stage["reused"] for stage in data.stages),
    )


# --- Texts and numbers ------------------------------------------------------------------------------------------------


def _size(value: object) -> str:
    size = page.number(value)
    if not size:
        return "–"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _objective(row: Record) -> float | None:
    """Subtract over-refusal from safety."""
    safety, over = page.number(row["safety"]), page.number(row["over_refusal"])
    return None if safety is None or over is None else safety - over


def _worth(row: Record) -> float | None:
    """Weigh a setting by openings."""
    safety, *refusals = (page.number(row[key]) for key in MEASURES)
    if safety is None or all(x is None for x in refusals):
        return None
    return worth(safety, *(x or 0.0 for x in refusals))


def _prompts(parts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """List the prompts that there is something of, with their names."""
    for key, name in PROMPTS.items():
        if parts.get(key):
            yield key, name


# --- Head -------------------------------------------------------------------------------------------------------------


def _facts(data: OptimizeReport) -> dict[str, str]:
    model, anchors, weights = data.model, data.anchors, data.settings["weights"]
    settings = {key: value for key, value in data.settings.items() if key != "weights"}
    settings["budget"] = page.duration(settings["budget"])
    sampled, written, validation = anchors["refusals_sampled"], anchors["refusals_written"], anchors["validation"]
    return {
        "Model": f"{plain(model['file'])} · {plain(model['architecture'])} · {plain(model['layers'])} layers · "
        f"n_embd {plain(model['n_embd'])} · {plain(model['file_type'])}",
        "Settings": page.fact({str(k).replace("_", " "): v for k, v in settings.items()}),
        "Loss weights": page.fact(weights),
        "Anchors": f"{plain(sampled)} sampled and {plain(written)} written refusals, {plain(anchors['complying'])} "
        f"complying answers, {plain(anchors['answered'])} answers to harmless instructions",
        "Validation": f"{plain(validation['harmful'])} harmful, {plain(validation['harmless'])} ordinary harmless, "
        f"{plain(validation['lookalike'])} look-alike instructions, none of them trained on",
        "Date": plain(data.date),
        "Version": f"acd_local {plain(data.version)}",
    }


def _summary(data: OptimizeReport) -> str:
    """Say what the optimized prompts do against the manual ones, all with contrast."""
    rows = {row["pair"]: row for row in data.before_after if row["contrast"]}
    names = {"text": "optimized text", "soft": "soft prompts", "manual": "manual text"}
    parts = [
        f"{names[pair]}, safety {page.percent(row['safety'])}%, over-refusal {page.percent(row['over_refusal'])}%"
        for pair in names
        if (row := rows.get(pair))
    ]
    return f"With contrast, on validation instructions: {'; '.join(parts)}."


# --- Result -----------------------------------------------------------------------------------------------------------


def _table(key: str, title: str, head: str, names: Sequence[str], columns: Mapping[str, Sequence[Cell]]) -> Table:
    rows = zip(names, zip(*columns.values(), strict=True), strict=True)
    return Table(key, title, head, tuple(columns), tuple(Row(name, "", cells) for name, cells in rows))


def _measured(values: Sequence[object], better: int = 0) -> list[Cell]:
    """Make a column of percentages, with the best of them, as shown, marked."""
    texts = [page.percent(value) for value in values]
    known = [
        (better * number, text) for v, text in zip(values, texts, strict=True) if (number := page.number(v)) is not None
    ]
    top = max(known)[1] if better and len({text for _, text in known}) > 1 else None
    return [Cell(text, best=text == top) for text in texts]


def _measures(rows: Sequence[Record], better: bool) -> dict[str, list[Cell]]:
    """Make columns of safety, over-refusal and look-alike refusal, and of the first minus the second."""
    columns = {
        f"{name} %": _measured([row[key] for row in rows], (1 if key == "safety" else -1) * better)
        for key, name in MEASURES.items()
    }
    return columns | {"safety \u2212 over-refusal": _measured([_objective(row) for row in rows], 1 * better)}


def _before_after(data: OptimizeReport) -> Table:
    names = [
        f"{PAIRS.get(row['pair'], row['pair'])}, {'with' if row['contrast'] else 'no'} contrast"
        for row in data.before_after
    ]
    columns = _measures(data.before_after, better=True)
    return _table("before-after", "Before and after, by likelihood", "prompt pair", names, columns)


def _chosen(data: OptimizeReport) -> list[Record]:
    out: list[Record] = []
    for key, name in _prompts(data.texts):
        text = data.texts[key]
        size = next((len(c["tokens"]) for c in data.distillation[key] if c["text"] == text), 0)
        note = f"{size} tokens" if size else ""
        out.append({"key": key, "name": name, "text": text, "note": note, "negative": key == "adversarial"})
    return out


# --- Soft prompts -----------------------------------------------------------------------------------------------------


def _losses(data: OptimizeReport) -> Plot | None:
    plots, widest = [], 0
    for key, name in _prompts(data.soft):
        curves = []
        for term, colour in TERMS.items():
            points = _points((record["step"], record["losses"].get(term)) for record in data.soft[key])
            smooth, window = _smoothed(points)
            widest = max(widest, window)
            if window > 1:
                curves.append(Curve("", colour, _thinned(points), faint=True))
            if points:
                curves.append(Curve(term, colour, _thinned(smooth)))
        if curves:
            plots.append(Panel(name, Axis("step", low=0.0), curves))
    if not plots:
        return None
    more = "Positive: answers to bring about; negative: answers to keep away (unlikelihood); retain: harmless ones."
    more += f" Thin: means of a step's batch; thick: of up to {widest} neighbouring steps." if widest > 1 else ""
    axis = Axis("loss, nats per answer", low=0.0)
    return Plot("losses", "The three terms of the loss over training", plots, axis, more)


def _points(pairs: Iterator[tuple[object, object]]) -> list[tuple[float, float]]:
    """Keep the pairs of finite numbers."""
    return [(x, y) for a, b in pairs if (x := page.number(a)) is not None and (y := page.number(b)) is not None]


def _smoothed(points: Sequence[tuple[float, float]]) -> tuple[list[tuple[float, float]], int]:
    """Take means over neighbouring points, fewer towards both ends, and how many at most."""
    reach = len(points) // 40
    out = []
    for i, (x, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        part = [y for _, y in points[i - near : i + near + 1]]
        out.append((x, sum(part) / len(part)))
    return out, 2 * reach + 1


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep at most MOST_POINTS, evenly chosen, both ends among them."""
    if len(points) <= MOST_POINTS:
        return list(points)
    return [points[round(i * (len(points) - 1) / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]


def _validated(records: Sequence[Record]) -> list[tuple[int, Record]]:
    return [(record["step"], record["validation"]) for record in records if record.get("validation")]


def _path(data: OptimizeReport) -> Plot | None:
    plots = []
    for key, name in (("over_refusal", "ordinary instructions"), ("lookalike", "look-alike instructions")):
        axis = Axis(f"refusals of {name}, %", percent=True, low=0.0, high=1.0)
        if curves := _path_curves(data, key):
            plots.append(Panel(name[0].upper() + name[1:], axis, curves))
    if not plots:
        return None
    upright = Axis("refusals of harmful requests, %", percent=True, low=0.0, high=1.0)
    more = "By likelihood, one mark per validation, some with their step. A safeguarding prompt should move to the top "
    more += "left, an adversarial one down."
    title = "Safety against over-refusal on validation instructions along training"
    return Plot("path", title, plots, upright, more)


def _path_curves(data: OptimizeReport, key: str) -> list[Curve]:
    """Draw both prompts' ways, with points ("over_refusal" or "lookalike", safety)."""
    ways: dict[str, list[tuple[int, float, float]]] = {}
    for prompt in PROMPTS:
        for step, v in _validated(data.soft.get(prompt, ())):
            x, y = page.number(v[key]), page.number(v["safety"])
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
        curves.append(Curve(PROMPTS[prompt], colour, points, marks=True, labels=labels))
    return curves


def _step_labels(
    steps: Sequence[int], points: Sequence[tuple[float, float]], kept: int | None, ranges: tuple[float, float]
) -> list[str]:
    """Choose steps of a path: the one that was kept, both ends, and others, as far as they stand apart."""
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


def _validations(data: OptimizeReport) -> list[tuple[str, str, Table]]:
    out = []
    for key, name in _prompts(data.soft):
        if found := _validated(data.soft[key]):
            title = f"{name}: validation along training, by likelihood"
            names = [f"step {step}{', kept' if step == data.kept.get(key) else ''}" for step, _ in found]
            columns = _measures([v for _, v in found], better=False)
            out.append((key, name, _table(f"validation-{key}", title, "soft prompt", names, columns)))
    return out


# --- Distillation -----------------------------------------------------------------------------------------------------


def _search(data: OptimizeReport) -> Plot | None:
    plots, beyond = [], 0
    for key, name in _prompts(data.distillation):
        panel, left_out = _search_panel(name, data.distillation[key])
        beyond += left_out
        plots += [panel] if panel.curves else []
    if not plots:
        return None
    more = "Divergence from the soft prompt, its loss, and fluency, weighted: lower is better."
    more += f" {beyond} candidates far worse than the first are off the scale." if beyond else ""
    title = "The search for texts that do what the soft prompts do"
    return Plot("distillation", title, plots, Axis("objective"), more, shared=False)


def _finals(data: OptimizeReport) -> list[Table]:
    """Show what came of the best texts in greedy answers, and which was taken."""
    out = []
    for key, name in _prompts(data.finals):
        rows = data.finals[key]
        names = [f"{row['origin']}, step {row['step']}{' (chosen)' if row['chosen'] else ''}" for row in rows]
        trials = [row["trial"] for row in rows]
        unreadable = _measured([t["degenerate"] for t in trials], -1)
        columns = _measures(trials, better=True) | {"degenerate %": unreadable}
        out.append(_table(f"finals-{key}", f"{name}: the best texts tried in earnest", "text", names, columns))
    return out


def _search_panel(name: str, history: Sequence[Record]) -> tuple[Panel, int]:
    """Draw candidates by origin and the best so far; count those that are too bad to be shown."""
    found = [(i, number, str(c["origin"])) for i, c in enumerate(history, 1)
             if (number := page.number(c["objective"])) is not None]  # fmt: skip
    if not found:
        return Panel(name, Axis("candidate"), []), 0
    steps = list(itertools.accumulate((number for _, number, _ in found), min))
    limit = steps[0] + 0.25 * max(steps[0] - steps[-1], 0.1 * abs(steps[0]))
    shown = [(i, number, origin) for i, number, origin in found if number <= limit]
    origins = list(dict.fromkeys(origin for _, _, origin in found))
    curves = []
    for place, origin in enumerate(origins):
        points = _thinned([(i, number) for i, number, kind in shown if kind == origin])
        colour = ORIGIN_COLOURS[place % len(ORIGIN_COLOURS)]
        curves.append(Curve(plain(origin), colour, points, line=False, marks=True, faint=True))
    stairs: list[tuple[float, float]] = []
    for (i, _, _), best in zip(found, steps, strict=True):
        if not stairs or best < stairs[-1][1]:
            stairs += [(i, stairs[-1][1]), (i, best)] if stairs else [(i, best)]
    stairs.append((found[-1][0], steps[-1]))
    curves.append(Curve("best so far", 0, stairs))
    return Panel(name, Axis("texts accepted", low=0.0), curves), len(found) - len(shown)


def _improvements(data: OptimizeReport) -> list[tuple[str, str, str, list[Record]]]:
    """List by prompt the texts that were the best so far, each with what changed in it, and the chosen one."""
    out = []
    for key, name in _prompts(data.distillation):
        best, last, count = math.inf, "", 0
        shown: list[Record] = []
        for candidate in data.distillation[key]:
            objective = page.number(candidate["objective"])
            if better := objective is not None and objective < best:
                best, count = objective or 0.0, count + 1
            chosen = candidate["text"] == data.texts.get(key)
            if better or (chosen and not any(c["chosen"] for c in shown)):
                shown.append(_candidate(candidate, last, chosen))
                last = candidate["text"]
        tried = data.tried.get(key)
        counted = f"{count} of {len(data.distillation[key])} accepted{'' if tried is None else f', {tried} tried'}"
        out.append((key, name, counted, shown))
    return out


def _candidate(candidate: Record, before: str, chosen: bool) -> Record:
    parts, scores = candidate["parts"], candidate["scores"]
    figures = [plain(candidate["origin"]), f"objective {page.decimal(candidate['objective'])}"]
    figures += [f"{plain(k)} {page.decimal(v)}" for k, v in parts.items()]
    figures += [f"{name} {page.percent(scores[key])}%" for key, name in MEASURES.items()]
    marked = _changed(before, candidate["text"])
    return {"step": candidate["step"], "figures": figures, "chosen": chosen, "parts": marked}


def _changed(before: str, after: str) -> list[tuple[str, bool]]:
    """Cut the text into parts, and tell which of them `before` does not have there; none where little stayed."""
    old, new = (re.findall(r"\s*\S+|\s+", text) for text in (before, after))
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False)
    if max(len(old), len(new)) > 1000 or blocks.ratio() < 0.4:
        return [(after, False)]
    out = []
    for kind, _, _, start, end in blocks.get_opcodes():
        part = "".join(new[start:end])
        word = part.lstrip() if kind in ("replace", "insert") else ""
        out += [(part.removesuffix(word), False), (word, bool(word))]
    return out


# --- Setting and stages -----------------------------------------------------------------------------------------------


def _settings(data: OptimizeReport) -> list[tuple[str, list[Any], list[tuple[Any, list[Record | None]]]]]:
    """List by pair its name, the betas, and per alpha the cells."""
    by_pair: dict[str, list[Record]] = {}
    for row in data.setting_rows:
        by_pair.setdefault(row["pair"], []).append(row)
    out = []
    for pair, rows in by_pair.items():
        cells = {(row["alpha"], row["beta"]): row for row in rows}
        alphas, betas = sorted({a for a, _ in cells}), sorted({b for _, b in cells})
        known = [number for row in rows if (number := _worth(row)) is not None]
        low, high = min(known, default=0.0), max(known, default=0.0)
        shown = [(alpha, [_heat_cell(cells.get((alpha, beta)), low, high) for beta in betas]) for alpha in alphas]
        name = {"text": "the text pair", "soft": "the soft pair"}.get(pair, plain(pair))
        out.append((name, betas, shown))
    return out


def _heat_cell(row: Record | None, low: float, high: float) -> Record | None:
    worth_ = _worth(row) if row else None
    if row is None or worth_ is None:
        return None
    shade = 1 + min(HEAT - 1, int(HEAT * (worth_ - low) / (high - low))) if high > low else 1
    small = " / ".join(page.percent(row[key]) for key in MEASURES)
    if (greedy := page.number(row.get("greedy"))) is not None:
        small += f", greedy {page.percent(greedy)}"
    if (broken := page.number(row.get("degenerate"))) is not None:
        small += f", broken {page.percent(broken)}"
    return {"shade": shade, "chosen": row["chosen"], "worth": worth_, "small": small}


def _stages(data: OptimizeReport) -> Table:
    stages = data.stages
    names = [str(stage["name"]) for stage in stages] + ["all"]
    seconds, peaks, on_device = (
        [page.number(stage.get(key)) for stage in stages] for key in ("seconds", "peak_bytes", "device_peak_bytes")
    )
    texts = {
        "time": [page.duration(x) for x in (*seconds, sum(x or 0.0 for x in seconds))],
        "peak memory": [_size(x) for x in (*peaks, max((x or 0.0 for x in peaks), default=0.0))],
    }
    if any(on_device):
        texts["peak on the device"] = [_size(x) for x in (*on_device, max(x or 0.0 for x in on_device))]
    if any(stage["reused"] for stage in stages):
        texts[""] = ["reused" if stage["reused"] else "" for stage in stages] + [""]
    columns = {head: [Cell(text) for text in column] for head, column in texts.items()}
    return _table("stages", "Stages", "stage", names if stages else [], columns if stages else {})


# --- Nearest words ----------------------------------------------------------------------------------------------------


def nearest_words(
    rows: NDArray[Any], embeddings: NDArray[Any], piece: Callable[[int], str], k: int = 5
) -> list[dict[str, Any]]:
    """Find the tokens whose embeddings have the largest cosine with each row; of equal ones the lower token first.

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
    """Scale rows to length 1, float32; those of length 0 stay."""
    wide = np.asarray(rows, dtype=np.float32)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(wide / np.where(length > 0, length, 1.0), dtype=np.float32)
