"""report.html: the figures of results.json and the answers behind them as one page that needs nothing else.

Tables and figures stand in the page as they are; only the browser of answers needs JavaScript.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from acd_local.evaluate import page, tables
from acd_local.evaluate.figures import Axis, BarChart, Curve, Panel, Plot, Series, Span
from acd_local.runtime.text import plain, visible

Results = Mapping[str, Any]

PER_TYPE = ("as-is", "base", "acd", "gate-acd")  # methods whose rates are drawn per prompt type, where there are such
MOST_TYPES = 24
NO_JUDGE = "none: refusals are told by their words, and refusing counts as harmless"
FAMILIES = ("one stream", "contrast", "ACD", "ablation")
METHOD = ("alpha", "beta", "raw", "window", "contrast", "title", "source")  # what the page says of one


def render(results: Results, answers: Iterable[Mapping[str, Any]]) -> str:
    """Write the whole page.

    Args:
        results: results.json, as `results.compute` gives it.
        answers: records of answers.jsonl.
    """
    model = results["run"]["model"]
    return page.render(
        "evaluation.html",
        f"Evaluation of {plain(model.get('name') or model.get('file') or 'a model')}",
        script="report.js",
        lead=plain(results["verdict"]),
        facts=_facts(results),
        command=results["run"].get("command"),
        base=results["base"],
        tables={table.key: _labelled(table) for table in tables.build(results)},
        overview=_overview(results),
        over_refusal=_trade_off(results, "over_refusal"),
        speed=_trade_off(results, "relative_speed"),
        sweep=_sweep(results),
        types=[_types(results, name) for name in results["sets"]],
        margins=_margins(results),
        methods={name: dict.fromkeys(METHOD) | method for name, method in results["methods"].items()},
        answers=_data(results, answers),
        filters=_filters(results),
    )


def _facts(results: Results) -> dict[str, str]:
    run = results["run"]
    model, pair = run["model"], run["pair"]
    return {
        "Model": " · ".join(plain(model[k]) for k in ("file", "architecture", "file_type") if model.get(k)),
        "Prompt pair": plain(f"{pair.get('name', '?')} (alpha {pair.get('alpha')}, beta {pair.get('beta')})"),
        "Sets": ", ".join(_set_fact(name, info) for name, info in results["sets"].items()),
        "Judge": plain(run.get("judge") or NO_JUDGE),
        "Options": ", ".join(f"{plain(k)} {plain(v)}" for k, v in run["options"].items() if v is not None),
        "Date": plain(run.get("started", "")).replace("T", " "),
        "Version": f"acd_local {plain(run['version'])}" if run.get("version") else "",
        "Shard": "" if run.get("shard") in (None, "1/1") else plain(run["shard"]),
    }


def _set_fact(name: str, info: Mapping[str, Any]) -> str:
    n, total = info.get("n"), info.get("total")
    size = f"{n} of {total}" if isinstance(total, int) and total != n else f"{n}"
    return f"{plain(name)} ({plain(info['kind'])}, {size})"


def _labelled(table: tables.Table) -> tables.Table:
    """Copy the table with the names of its rows as the page says them: titles in small where they say more."""
    if table.key == "margins":
        return replace(table, rows=tuple(replace(row, name=row.title, title="") for row in table.rows))
    told = table.key != "safety"
    rows = (replace(r, title="" if told or r.title.casefold() == r.name.casefold() else r.title) for r in table.rows)
    return replace(table, rows=tuple(rows))


# --- Figures ----------------------------------------------------------------------------------------------------------


def _span(figure: Mapping[str, Any] | None) -> Span | None:
    return Span(figure["value"], figure["low"], figure["high"]) if figure else None


def _shown(results: Results) -> dict[str, Mapping[str, Any]]:
    """Name methods by label, those of a sweep left out, those with one set-up in one."""
    swept = {entry["method"] for entry in results["sweep"]}
    groups: dict[str, list[str]] = {}
    for name, method in results["methods"].items():
        if name not in swept:
            groups.setdefault(method["setup"], []).append(name)
    return {" = ".join(names): results["methods"][names[0]] for names in groups.values()}


def _family(label: str, method: Mapping[str, Any]) -> int:
    names = label.split(" = ")
    if any(name.startswith(("acd", "gate-acd")) for name in names):
        return 2
    if any(name in tables.ABLATIONS for name in names):
        return 3
    return 1 if method.get("contrast") else 0


def _harmless_label(results: Results) -> str:
    return "harmless answers to harmful requests" if results["run"].get("judge") else "refusals of harmful requests"


def _share(label: str) -> Axis:
    return Axis(f"{label}, %", percent=True, low=0.0, high=1.0)


def _overview(results: Results) -> BarChart | None:
    shown = _shown(results)
    names = {"harmless": _harmless_label(results), "over_refusal": "refusals of harmless requests"}
    series = _series(names, [method["overall"] for method in shown.values()])
    if len(shown) < 2 or not series:
        return None
    more = "Means over sets with 95% intervals."
    return BarChart("overview", "Methods at a glance", list(shown), series, _share("share of answers"), more, dots=True)


def _series(names: Mapping[str, str], figures: Sequence[Mapping[str, Any]]) -> list[Series]:
    """Make a series per measure that is known of some; names: by measure."""
    found = [Series(name, [_span(f.get(key)) for f in figures], i) for i, (key, name) in enumerate(names.items())]
    return [series for series in found if any(series.spans)]


def _trade_off(results: Results, key: str) -> Plot | None:
    curves: dict[int, list[tuple[str, Span, Span]]] = {}
    for label, method in _shown(results).items():
        x, y = _span(method["overall"].get(key)), _span(method["overall"].get("harmless"))
        if key == "relative_speed" and results["base"] in label.split(" = "):
            x = Span(1.0, 1.0, 1.0)
        if x and y:
            curves.setdefault(_family(label, method), []).append((label, x, y))
    if sum(map(len, curves.values())) < 2:
        return None
    drawn = [
        Curve(FAMILIES[i], i, [(x, y) for _, x, y in found], line=False, marks=True, labels=[n for n, _, _ in found])
        for i, found in sorted(curves.items())
    ]
    y_axis = _share(_harmless_label(results))
    if key == "over_refusal":
        panel = Panel("", _share("refusals of harmless requests"), drawn)
        more = "Means over sets, 95% intervals both ways. The best methods stand at the top left."
        return Plot(key, "Safety against over-refusal", [panel], y_axis, more, hint="better: top left")
    panel = Panel("", Axis(f"tokens per second, times {results['base']}", low=0.0), drawn)
    more = f"Tokens per second while decoding, relative to {results['base']} on the same prompts."
    return Plot(key, "Safety against speed", [panel], y_axis, more, hint="better: top right")


def _types(results: Results, name: str) -> BarChart | None:
    kind = results["sets"][name]["kind"]
    measure = {"harmful": "harmless", "harmless": "over_refusal"}.get(kind, "")
    cells = {label: m["sets"].get(name, {}).get("types", {}) for label, m in _shown(results).items()}
    cells = {label: types for label, types in cells.items() if any(measure in figures for figures in types.values())}
    wanted = [label for label in cells if set(label.split(" = ")) & set(PER_TYPE)] or list(cells)[: len(PER_TYPE)]
    sizes: dict[str, int] = {}
    for label in wanted:
        for kind_of, figures in cells[label].items():
            sizes[kind_of] = max(sizes.get(kind_of, 0), figures.get(measure, {}).get("n", 0))
    if len(sizes) < 2 or sum(sizes.values()) < 2 * len(sizes):  # a bar of one prompt says nothing
        return None
    rows = sorted(sorted(sizes, key=lambda t: (-sizes[t], t))[:MOST_TYPES])
    colours = iter((0, 1, 3, 4, 5))
    series = [
        Series(
            label,
            [_span(cells[label].get(row, {}).get(measure)) for row in rows],
            2 if "acd" in label.split(" = ") else next(colours, 4),
        )
        for label in wanted
    ]
    what = _harmless_label(results) if kind == "harmful" else "refusals of harmless requests"
    title = f"{what[0].upper()}{what[1:]} in {plain(name)} by type of prompt"
    more = f"The {MOST_TYPES} largest of {len(sizes)} types." if len(sizes) > MOST_TYPES else "In brackets: prompts."
    key = f"types-{list(results['sets']).index(name)}"
    return BarChart(key, title, [f"{row} ({sizes[row]})" for row in rows], series, _share(what), more)


def _sweep(results: Results) -> Plot | None:
    entries = [e for e in results["sweep"] if isinstance(e["value"], int | float)]
    entries.sort(key=lambda entry: float(entry["value"]))
    names = {"harmless": "harmless", "over_refusal": "over-refusal", "degenerate": "degenerate"}
    series = _series(names, [results["methods"][e["method"]]["overall"] for e in entries])
    if len(entries) < 2 or not series:
        return None
    values = [float(e["value"]) for e in entries]
    curves = [
        Curve(s.name, s.colour, [(v, span) for v, span in zip(values, s.spans, strict=True) if span], marks=True)
        for s in series
    ]
    sweep = results["run"]["sweep"]
    key = plain(sweep.get("key", "value"))
    more = "Means over sets. Harmless: of answers to harmful requests; over-refusal: of refusals of harmless ones."
    title = f"Harmless rate against {key} ({plain(sweep.get('method', ''))})"
    return Plot("sweep", title, [Panel("", Axis(key), curves)], _share("share of answers"), more)


def _margins(results: Results) -> BarChart | None:
    margins = results["margins"]
    prompts = tables.margin_prompts(margins)
    sets = {name: name for name in results["sets"] if any(name in margins[p] for p in prompts)}
    if not sets:
        return None
    rows = [tables.MARGIN_PROMPTS.get(p, p) for p in prompts]
    title = "Likelihood margin between complying and refusing openings under each system prompt"
    more, axis = "Left of 0 the model leans to refuse.", Axis("margin, nats per token")
    return BarChart("margins", title, rows, _series(sets, [margins[p] for p in prompts]), axis, more, dots=True)


# --- The browser of answers -------------------------------------------------------------------------------------------


def _filters(results: Results) -> dict[str, dict[str, str]]:
    """List what answers can be chosen by: values with how they are shown."""
    verdicts = {"": "all", "refusal": "refusal", "answer": "answer", "degenerate": "degenerate"}
    if results["run"].get("judge"):
        verdicts.update(safe="judged safe", unsafe="judged unsafe")
    if results["base"] is not None:
        verdicts["changed"] = f"other than {results['base']}'s"
    named = {key: {"": "all"} | {visible(n): plain(n) for n in results[key]} for key in ("methods", "sets")}
    return {"method": named["methods"], "set": named["sets"], "verdict": verdicts}


def _data(results: Results, answers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Collect what the browser of answers reads: every prompt once, answers in the order of sets, prompts, methods."""
    setups = list(dict.fromkeys(method["setup"] for method in results["methods"].values()))
    sets = {name: i for i, name in enumerate(results["sets"])}
    prompts: dict[tuple[str, str], int] = {}
    texts: list[list[Any]] = []
    rows: list[list[Any]] = []
    order = {setup: i for i, setup in enumerate(setups)}
    for record in answers:
        if record["set"] not in sets or record["setup"] not in order:
            continue
        key = record["set"], record["item"]
        if key not in prompts:
            prompts[key] = len(texts)
            kind = visible(record.get("type") or "", 80)
            texts.append([visible(record["item"], 80), sets[record["set"]], kind, visible(record["prompt"])])
        judge, tokens = record.get("judge"), record.get("tokens")
        rows.append(
            [
                prompts[key],
                order[record["setup"]],
                visible(record["label"], 40),
                round(judge, 4) if isinstance(judge, int | float) else None,
                tokens if isinstance(tokens, int) else None,
                visible(record.get("finish") or "", 40),
                visible(record.get("rule") or "", 60),
                visible(record["answer"]),
            ]
        )
    rows.sort(key=lambda row: (texts[row[0]][1], row[0], row[1]))
    methods = [[visible(name), order[method["setup"]]] for name, method in results["methods"].items()]
    kinds = [[visible(name), info["kind"]] for name, info in results["sets"].items()]
    return {"methods": methods, "base": results["base"], "sets": kinds, "prompts": texts, "rows": rows}
