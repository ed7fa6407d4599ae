"""Offer acd bench, which measures what the contrast costs on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from acd_local.cli import bench_growth, flags
from acd_local.cli.shell import EXIT_CODES, Outcome, one_line, say
from acd_local.errors import UsageError

PROGRAM = "acd bench"
# The columns of figures: two lines of heading, format, width.
COLUMNS = {
    "tokens_per_second": ("tokens/s", "", "{:.1f}", 10),
    "ratio_to_plain": ("time ratio", "to plain", "{:.2f}", 12),
    "outside_decode_ms": ("outside  ", "llama_decode", "{:.2f} ms", 14),
    "first_token_cold_s": ("", "cold", "{:.2f} s", 9),
    "first_token_warm_s": ("first token", "warm", "{:.2f} s", 11),
    "peak_mb": ("peak", "memory", "{:.0f} MB", 11),
    "compared_share": ("compared", "positions", "{:.0%}", 11),
    "accepted_share": ("accepted", "safe rows", "{:.0%}", 11),
    "rows_per_token": ("rows per", "token", "{:.2f}", 11),
}


@click.command("bench", epilog=EXIT_CODES, context_settings={"max_content_width": 100})
@click.argument("model", required=False)
@click.option("--tokens", type=click.IntRange(4), default=64, show_default=True, help="Answer tokens per measurement.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="How often each case is measured.")
@flags.threads_flag
@click.option("--ctx-size", "-c", type=click.IntRange(512), default=2048, show_default=True, help="Tokens per stream.")
@click.option("--pair", metavar="NAME|FILE", help="Prompt pair; default: the model's own, or `default`.")
@click.option("--no-memory", is_flag=True, help="Do not measure peak memory (one process per case).")
@click.option(
    "--quantize",
    type=click.Choice(["q4_0", "q4_k_m", "q8_0"]),
    help="Measure a temporary copy of MODEL with these weight types.",
)
@click.option(
    "--plot",
    type=flags.file_name,
    metavar="FILE.svg",
    help="Measure instead how the cost of a token grows with the context (up to 8192 tokens unless --ctx-size says "
    "less), with conversations and with the vocabulary, and draw that; by default 16 tokens and 3 rounds.",
)
@click.option("--also", multiple=True, metavar="MODEL", help="Another model for the --plot against the vocabulary.")
@click.option(
    "--parallel",
    type=click.IntRange(2, 128),
    metavar="N",
    help="Measure prompts per minute instead, N at once against one by one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    model: str | None, no_memory: bool, quantize: str | None, parallel: int | None, as_json: bool, **measuring: Any
) -> Outcome | None:
    """Measure what the contrast costs on MODEL, in turns with plain llama.cpp decoding.

    Medians over the rounds; ratios are taken within a round.
    """
    chosen = flags.resolve_model(model)
    plot, also = measuring.pop("plot"), measuring.pop("also")
    if also and plot is None:
        raise UsageError("--also names models for --plot, which is not given")
    from acd_local.bench import cost, throughput
    from acd_local.bench.measuring import quantized

    def progress(line: str) -> None:
        say(f"{PROGRAM}: {line}")

    with quantized(chosen, quantize, measuring["threads"], progress) as file:
        if plot is not None:
            found = bench_growth.run(file, also, plot, progress, measuring)
            lines = bench_growth.lines(found)
        elif parallel is None:
            found = cost.run(file, memory_too=not no_memory, progress=progress, **measuring).summary()
            lines = _cost_lines(found)
        else:
            found = throughput.run(file, parallel, progress=progress, **measuring).summary()
            lines = _throughput_lines(found, measuring["rounds"])
    if as_json:
        return Outcome(record=found)
    for line in lines:
        print(line)
    return None


def _cost_lines(found: Mapping[str, Any]) -> Iterator[str]:
    from acd_local.bench.cost import TEMP

    name, pair = one_line(found["model"]), one_line(found["pair"])
    yield (
        f"{name}, pair {pair}, alpha {found['alpha']:g}, beta {found['beta']:g}: vocabulary {found['n_vocab']}, "
        f"{found['threads']} threads, {found['tokens']} tokens x {found['rounds']} rounds, medians"
    )
    yield from table("", found["cases"], width=20)
    if (extra := found["peak_over_plain_and_kv_mb"]) is not None:
        yield f"peak over plain + one KV cache of {found['kv_mb']:.0f} MB: {extra:.0f} MB"
    titles = {
        "strategies": "the same questions",
        "sampled": f"sampled, temperature {TEMP:g}",
        "repeat": "answers that repeat a text",
    }
    yield from strategy_lines(found, titles)
    first = found["first_token"]
    ways = [f"{name} {way['seconds']:.2f} s ({way['ratio_to_plain']:.2f})" for name, way in first["ways"].items()]
    yield f"\nfirst token of a question of {first['question_tokens']} tokens (ratio to plain): {', '.join(ways)}"
    if (costs := found["row_costs"]) is not None:
        few = "".join(f", {k} {cost:g}" for k, cost in enumerate(costs["few"], start=2))
        yield (
            f"row costs: one of each stream {costs['pair']:g} rows; of one stream{few}, more {costs['fixed']:g} + "
            f"{costs['each']:g} k; running ahead takes {costs['typical']:g} times the usual rows, and "
            f"{costs['ahead']:g} times what these cost"
        )


def strategy_lines(found: Mapping[str, Any], titles: Mapping[str, str]) -> Iterator[str]:
    """Write the tables of execution strategies.

    Args:
        found: see `cost.strategies_summary`. titles: by group.
    """
    for group, title in titles.items():
        yield ""
        yield from table(title, found[group], width=28)
        if (auto := found["auto_against_best"][group]) is not None:
            yield f"auto takes {auto:.3f} times what the better of stepwise and deferred takes"


def table(title: str, rows: Sequence[Mapping[str, Any]], *, width: int) -> Iterator[str]:
    """Write a table's lines: rows of figures behind each one's "case", which gets `width` columns."""
    columns = [(name, *COLUMNS[name]) for name in rows[0] if name != "case"]
    yield f"{title:<{width}}" + "".join(f"{head:>{w}}" for _, head, _, _, w in columns)
    yield " " * width + "".join(f"{head:>{w}}" for _, _, head, _, w in columns)
    for row in rows:
        cells = ("-" if row[name] is None else form.format(row[name]) for name, _, _, form, _ in columns)
        yield f"{row['case']:<{width}}" + "".join(f"{c:>{w}}" for c, (*_, w) in zip(cells, columns, strict=True))


def _throughput_lines(found: Mapping[str, Any], rounds: int) -> Iterator[str]:
    n, speeds = found["parallel"], found["prompts_per_minute"]
    work = f"{found['prompts']} prompts, up to {found['tokens']} tokens"
    yield f"{work}, {found['threads']} threads, {rounds} rounds, medians"
    yield f"one by one {speeds[1]:9.1f} prompts per minute"
    yield f"{n:>3} at once{speeds[n]:9.1f} prompts per minute, {found['gain']:.2f} times as many"
    yield f"texts that differ (near-ties in another batch shape): {found['differing']} of {found['prompts']}"
