"""report.html: the figures of results.json and the answers behind them as one page that needs nothing else.

Tables and figures stand in the page as they are; only the browser of answers needs JavaScript. Everything a person or a
model wrote is escaped, in markup and in the embedded data, and what a text may hide in it (control and bidirectional
characters) is shown. The page's content security policy forbids it to load or run anything but itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from acd_local.evaluate import page, svg, tables
from acd_local.evaluate.tables import visible

__all__ = ["render"]

Results = Mapping[str, Any]

PER_TYPE = ("as-is", "base", "acd", "gate-acd")  # methods whose rates are drawn per prompt type, where there are such
MOST_TYPES = 24
NO_JUDGE = "none: refusals are told by their words, and refusing counts as harmless"
FAMILIES = ("one stream", "contrast", "ACD", "ablation")


def render(results: Results, answers: Iterable[Mapping[str, Any]]) -> str:
    """The whole page.

    Args:
        results: results.json, as `results.compute` gives it.
        answers: records of answers.jsonl.
    """
    model = results["run"]["model"]
    title = f"Evaluation of {page.plain(model.get('name') or model.get('file') or 'a model')}"
    built = tables.build(results)
    body = [
        *_header(results, title),
        *_body(results, built),
        *_methods(results),
        *_browser(results, answers),
        _footer(results),
    ]
    return page.whole(title, body, page.asset("report.js"))


# --- Head -------------------------------------------------------------------------------------------------------------


def _header(results: Results, title: str) -> list[str]:
    run = results["run"]
    model, pair = run["model"], run["pair"]
    facts = {
        "Model": " · ".join(page.plain(model[k]) for k in ("file", "architecture", "file_type") if model.get(k)),
        "Prompt pair": page.plain(f"{pair.get('name', '?')} (alpha {pair.get('alpha')}, beta {pair.get('beta')})"),
        "Sets": ", ".join(_set_fact(name, info) for name, info in results["sets"].items()),
        "Judge": page.plain(run.get("judge") or NO_JUDGE),
        "Options": ", ".join(f"{page.plain(k)} {page.plain(v)}" for k, v in run["options"].items() if v is not None),
        "Date": page.plain(run.get("started", "")).replace("T", " "),
        "Version": f"acd_local {page.plain(run['version'])}" if run.get("version") else "",
    }
    if run.get("shard") not in (None, "", "1/1"):
        facts["Shard"] = page.plain(run["shard"])
    out = ["<header>", f"<h1>{page.text(title)}</h1>"]
    out.append('<p class="soft">Safety, general ability and cost of adversarial contrastive decoding and its peers</p>')
    out.append(f'<p class="lead">{page.text(page.plain(results["verdict"]))}</p>')
    out.append('<dl class="facts">')
    out += [f"<dt>{page.text(key)}</dt><dd>{page.text(value)}</dd>" for key, value in facts.items() if value]
    if run.get("command"):
        out.append(f"<dt>Command</dt><dd><code>{page.text(run['command'])}</code></dd>")
    return [*out, "</dl></header>"]


def _set_fact(name: str, info: Mapping[str, Any]) -> str:
    n, total = info.get("n"), info.get("total")
    size = f"{n} of {total}" if isinstance(total, int) and total != n else f"{n}"
    return f"{page.plain(name)} ({page.plain(info['kind'])}, {size})"


# --- Tables and figures -----------------------------------------------------------------------------------------------


def _body(results: Results, built: Sequence[tables.Table]) -> list[str]:
    base = results["base"]
    by_key = {table.key: _table(table, base) for table in built}
    figures = iter(range(1, 1000))

    def figure(plot: str, caption: str, more: str = "") -> list[str]:
        if not plot:
            return []
        rest = f' <span class="more">{page.text(more)}</span>' if more else ""
        text = f"<b>Figure {next(figures)}.</b> {page.text(caption)}{rest}"
        return [f"<figure>{plot}<figcaption>{text}</figcaption></figure>"]

    out = ["<section><h2>Safety</h2>", *by_key.pop("safety", []), *by_key.pop("refusal", [])]
    out += figure(_overview(results), "Methods at a glance.", "Means over sets with 95% intervals.")
    out += figure(
        _trade_off(results, "over_refusal"),
        "Safety against over-refusal.",
        "Means over sets, 95% intervals both ways. The best methods stand at the top left.",
    )
    out += [*by_key.pop("gated", []), *by_key.pop("areas", [])]
    out += by_key.pop("ablation", [])
    out += figure(*_sweep(results))
    out += by_key.pop("sweep", [])
    out += by_key.pop("degenerate", [])
    for name in results["sets"]:
        out += figure(*_types(results, name))
    out.append("</section>")
    if "ability" in by_key:
        out += ["<section><h2>General ability</h2>", *by_key.pop("ability"), "</section>"]
    if "cost" in by_key:
        out += ["<section><h2>Cost</h2>", *by_key.pop("cost")]
        caption = f"Tokens per second while decoding, relative to {base} on the same prompts."
        out += [*figure(_trade_off(results, "relative_speed"), "Safety against speed.", caption), "</section>"]
    if "margins" in by_key:
        out += ["<section><h2>Strength of the prompts</h2>", *by_key.pop("margins")]
        caption = "Likelihood margin between complying and refusing openings under each system prompt."
        out += [*figure(_margins(results), caption, "Left of 0 the model leans to refuse."), "</section>"]
    return out


def _table(table: tables.Table, base: str) -> list[str]:
    more = ""
    if any(cell.change for row in table.rows for cell in row.cells):
        against = "no system prompt" if table.key == "margins" else base
        more = f"95% intervals; small: change against {against}, * where its interval excludes 0."
        more = f' <span class="more">{more}</span>'
    caption = f"<caption><b>{page.text(table.title)}.</b>{more}</caption>"
    out = [f'<div class="table"><table id="table-{table.key}">{caption}']
    heads = "".join(f'<th scope="col">{page.text(head)}</th>' for head in table.columns)
    out.append(f'<thead><tr><th scope="col">{page.text(table.head)}</th>{heads}</tr></thead><tbody>')
    compared = [any(row.cells[i].change for row in table.rows) for i in range(len(table.columns))]
    widths = [max(len(row.cells[i].text) for row in table.rows) for i in range(len(table.columns))]
    for row in table.rows:
        cells = "".join(map(_cell, row.cells, widths, compared))
        label, title = (row.title, "") if table.key == "margins" else (row.name, row.title)
        told = title.casefold() in ("", label.casefold()) or table.key != "safety"
        more = "" if told else f'<span class="more">{page.text(title)}</span>'
        mine = ' class="mine"' if row.name in ("acd", "gate-acd") else ""
        out.append(f'<tr{mine}><th scope="row">{page.text(label)}{more}</th>{cells}</tr>')
    out.append("</tbody></table></div>")
    return out + [f'<p class="notes">{page.text(note)}</p>' for note in table.notes]


def _cell(cell: tables.Cell, width: int, compared: bool) -> str:
    """width: characters of the column's widest figure, compared: whether it has changes; both keep it in line."""
    css = " ".join(filter(None, ("best" if cell.best else "", cell.change_is)))
    mark = "*" if cell.change_is else ""
    change = f'<span class="change">{page.text(cell.change)}{mark}</span>' if compared else ""
    note = f' <span title="{page.text(cell.note)}">†</span>' if cell.note else ""
    spread = f'<span class="range">{page.text(cell.interval)}</span>' if cell.interval else ""
    value = f'<span class="value">{page.text(cell.text.rjust(width, page.FIGURE_SPACE))}</span>'
    return f'<td class="{css}">{value}{note}{change}{spread}</td>'


def _span(figure: Mapping[str, Any] | None) -> svg.Span | None:
    return svg.Span(figure["value"], figure["low"], figure["high"]) if figure else None


def _shown(results: Results) -> dict[str, Mapping[str, Any]]:
    """Methods by label, those of a sweep left out, those with one set-up in one."""
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


def _overview(results: Results) -> str:
    shown = _shown(results)
    series = []
    names = {"harmless": _harmless_label(results), "over_refusal": "refusals of harmless requests"}
    for colour, (key, name) in enumerate(names.items()):
        spans = [_span(method["overall"].get(key)) for method in shown.values()]
        if any(spans):
            series.append(svg.Series(name, spans, colour))
    if len(shown) < 2 or not series:
        return ""
    axis = svg.Axis("share of answers, %", percent=True, low=0.0, high=1.0)
    return svg.dots("overview", "Methods at a glance", list(shown), series, axis)


def _trade_off(results: Results, key: str) -> str:
    points = []
    for label, method in _shown(results).items():
        x, y = _span(method["overall"].get(key)), _span(method["overall"].get("harmless"))
        if key == "relative_speed" and results["base"] in label.split(" = "):
            x = svg.Span(1.0, 1.0, 1.0)
        if x and y:
            points.append(svg.Point(label, x, y, _family(label, method)))
    if len(points) < 2:
        return ""
    y_axis = svg.Axis(_harmless_label(results) + ", %", percent=True, low=0.0, high=1.0)
    if key == "over_refusal":
        x_axis = svg.Axis("refusals of harmless requests, %", percent=True, low=0.0, high=1.0)
        return svg.scatter(key, "Safety against over-refusal", points, x_axis, y_axis, FAMILIES, "top left")
    x_axis = svg.Axis(f"tokens per second, times {results['base']}", low=0.0)
    return svg.scatter(key, "Safety against speed", points, x_axis, y_axis, FAMILIES, "top right")


def _types(results: Results, name: str) -> tuple[str, str, str]:
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
        return "", "", ""
    largest = sorted(sizes, key=lambda t: (-sizes[t], t))[:MOST_TYPES]
    rows = sorted(largest)
    colours = iter((0, 1, 3, 4, 5))
    series = [
        svg.Series(
            label,
            [_span(cells[label].get(row, {}).get(measure)) for row in rows],
            2 if "acd" in label.split(" = ") else next(colours, 4),
        )
        for label in wanted
    ]
    what = _harmless_label(results) if kind == "harmful" else "refusals of harmless requests"
    axis = svg.Axis(f"{what}, %", percent=True, low=0.0, high=1.0)
    caption = f"{what[0].upper()}{what[1:]} in {page.plain(name)} by type of prompt."
    more = f"The {MOST_TYPES} largest of {len(sizes)} types." if len(sizes) > MOST_TYPES else "In brackets: prompts."
    plot = svg.bars(
        f"types-{list(results['sets']).index(name)}", caption, [f"{row} ({sizes[row]})" for row in rows], series, axis
    )
    return plot, caption, more


def _sweep(results: Results) -> tuple[str, str, str]:
    entries = [e for e in results["sweep"] if isinstance(e["value"], int | float)]
    entries.sort(key=lambda entry: float(entry["value"]))
    if len(entries) < 2:
        return "", "", ""
    series = []
    names = {"harmless": "harmless", "over_refusal": "over-refusal", "degenerate": "degenerate"}
    for colour, (key, name) in enumerate(names.items()):
        spans = [_span(results["methods"][e["method"]]["overall"].get(key)) for e in entries]
        if any(spans):
            series.append(svg.Series(name, spans, colour))
    if not series:
        return "", "", ""
    sweep = results["run"]["sweep"]
    key = page.plain(sweep.get("key", "value"))
    x, y = svg.Axis(key), svg.Axis("share of answers, %", percent=True, low=0.0, high=1.0)
    title = f"Harmless rate against {key} ({page.plain(sweep.get('method', ''))})."
    values = [float(e["value"]) for e in entries]
    more = "Means over sets. Harmless: of answers to harmful requests; over-refusal: of refusals of harmless ones."
    return svg.lines("sweep", title, values, series, x, y), title, more


def _margins(results: Results) -> str:
    margins = results["margins"]
    prompts = tables.margin_prompts(margins)
    sets = [name for name in results["sets"] if any(name in margins[p] for p in prompts)]
    series = [svg.Series(name, [_span(margins[p].get(name)) for p in prompts], i) for i, name in enumerate(sets)]
    rows = [tables.MARGIN_PROMPTS.get(p, p) for p in prompts]
    return svg.dots("margins", "Likelihood margins", rows, series, svg.Axis("margin, nats per token")) if series else ""


# --- Methods, answers, foot -------------------------------------------------------------------------------------------


def _methods(results: Results) -> list[str]:
    heads = "".join(f'<th scope="col">{h}</th>' for h in ("alpha", "beta", "scale", "window"))
    out = ['<section><h2>Methods</h2><div class="table"><table id="methods"><thead><tr><th scope="col">method</th>']
    out.append(
        f'{heads}<th scope="col" class="text">what</th><th scope="col" class="text">source</th></tr></thead><tbody>'
    )
    for name, method in results["methods"].items():
        contrast = bool(method.get("contrast"))
        numbers = [
            method.get("alpha"),
            method.get("beta"),
            "raw" if method.get("raw") else "scaled",
            method.get("window"),
        ]
        shown = ["–" if x is None or not contrast else x for x in numbers]
        same = f" (same as {page.plain(method['same_as'])})" if method["same_as"] else ""
        cells = "".join(f"<td>{page.text(f'{x:g}' if isinstance(x, float) else x)}</td>" for x in shown)
        texts = (str(method.get("title") or "") + same, method.get("source") or "")
        rest = "".join(f'<td class="text">{page.text(page.plain(text))}</td>' for text in texts)
        out.append(f'<tr><th scope="row">{page.text(page.plain(name))}</th>{cells}{rest}</tr>')
    return [*out, "</tbody></table></div></section>"]


def _browser(results: Results, answers: Iterable[Mapping[str, Any]]) -> list[str]:
    data = _data(results, answers)
    if not data["rows"]:
        return ['<section id="answers"><h2>Answers</h2><p class="soft">This run holds no answers.</p></section>',
                '<script type="application/json" id="data">null</script>']  # fmt: skip
    verdicts = {"": "all", "refusal": "refusal", "answer": "answer", "degenerate": "degenerate"}
    if results["run"].get("judge"):
        verdicts.update(safe="judged safe", unsafe="judged unsafe")
    if results["base"] is not None:
        verdicts["changed"] = f"other than {results['base']}'s"
    names = {"": "all"}
    fields = [
        _select("method", {**names, **{name: page.plain(name) for name, _ in data["methods"]}}),
        _select("set", {**names, **{name: page.plain(name) for name, _ in data["sets"]}}),
        _select("verdict", verdicts),
        '<label>search<input name="q" type="search" autocomplete="off" placeholder="in prompts and answers"></label>',
        '<button type="button" id="reset">clear</button>',
    ]
    pager = '<button type="button" data-step="-1">previous</button><button type="button" data-step="1">next</button>'
    return [
        '<section id="answers"><h2>Answers</h2>',
        "<p>All answers with their verdicts. Answers to harmful requests are folded: they are what the models said, "
        "not advice, and may be offensive or dangerous; open them to check a verdict.</p>",
        '<noscript><p class="soft">The list of answers needs JavaScript; they also stand in answers.jsonl.</p>',
        "</noscript>",
        f'<div id="browser" hidden><form id="filters">{"".join(fields)}</form>',
        f'<div class="pager"><span id="count" role="status"></span>{pager}</div><div id="list"></div>',
        f'<div class="pager">{pager}</div></div>',
        f'<script type="application/json" id="data">{_embedded(data)}</script></section>',
    ]


def _select(name: str, options: Mapping[str, str]) -> str:
    inner = "".join(f'<option value="{page.text(value)}">{page.text(text)}</option>' for value, text in options.items())
    return f'<label>{name}<select name="{name}">{inner}</select></label>'


def _data(results: Results, answers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What the browser of answers reads: every prompt once, answers as rows in the order of sets, prompts, methods."""
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


def _embedded(data: object) -> str:
    """JSON that may stand in a script element: ASCII, no character that markup knows."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _footer(results: Results) -> str:
    return (
        "<footer><p>Intervals are 95%, by bootstrap over prompts; means over sets count every set alike and resample "
        "prompts within sets. Changes against a method are paired: the same prompts with the same seeds. "
        "Table forms after Zhao et al., Safety Alignment of Large Language Models via Contrasting Safe and Harmful "
        "Distributions (arXiv 2406.16743). The figures are in results.json beside this page.</p></footer>"
    )
