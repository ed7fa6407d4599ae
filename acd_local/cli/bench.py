"""Offer acd bench, which measures what the contrast costs on this machine."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from acd_local.cli import bench_growth, flags, help
from acd_local.cli.shell import Outcome, one_line, say
from acd_local.errors import AcdError, UsageError

PROGRAM = "acd bench"
# The columns of figures: two lines of heading, format, width.
COLUMNS = {
    "tokens_per_second": ("tokens/s", "", "{:.1f}", 10),
    "ratio_to_plain": ("time ratio", "to plain", "{:.2f}", 12),
    "tokens_per_batch": ("tokens", "per batch", "{:.2f}", 11),
    "outside_decode_ms": ("outside  ", "llama_decode", "{:.2f} ms", 14),
    "first_token_s": ("first", "token", "{:.2f} s", 9),
}
TITLES = {"questions": "ordinary questions", "repeats": "texts that repeat a text", "code": "code"}


@click.command(
    "bench",
    cls=help.Command,
    short_help="Measure what answers cost.",
    epilog=help.foot(
        "acd bench model.gguf", "acd bench model.gguf --parallel 4 --json", "acd bench model.gguf --plot growth.svg"
    ),
)
@click.argument("model", required=False, type=flags.MODEL)
@click.option(
    "--tokens", type=click.IntRange(4), default=64, metavar="N", help="Answer tokens per measurement; default 64."
)
@click.option(
    "--rounds", type=click.IntRange(1), default=5, metavar="N", help="How often each case is measured; default 5."
)
@flags.threads_flag
@click.option(
    "--ctx-size",
    "-c",
    type=click.IntRange(512),
    default=2048,
    metavar="N",
    help="Tokens that each stream holds, 512 or more; default 2048.",
)
@click.option(
    "--pair",
    type=flags.PAIR,
    metavar="NAME|FILE",
    help="Prompt pair whose contrast is measured; default: `default`, since fitted ones refuse what they contrast.",
)
@click.option("--draft", type=flags.MODEL, metavar="MODEL", help="Measure with a smaller model that drafts, too.")
@click.option("--no-memory", is_flag=True, help="Do not measure peak memory (one process per case).")
@click.option(
    "--quantize",
    type=click.Choice(["q4_0", "q4_k_m", "q8_0"]),
    help="Measure a temporary copy of MODEL with these weight types.",
)
@click.option(
    "--plot",
    type=flags.FILE,
    metavar="FILE.svg",
    help="Measure instead how the cost of a token grows with the context (up to 8192 tokens unless --ctx-size says "
    "less), with conversations and with the vocabulary, and draw that; by default 16 tokens and 3 rounds.",
)
@click.option(
    "--also",
    multiple=True,
    type=flags.MODEL,
    metavar="MODEL",
    help="Another model for the --plot against the vocabulary.",
)
@click.option(
    "--parallel",
    type=click.IntRange(2, 128),
    metavar="N",
    help="Measure prompts per minute instead, N at once against one by one.",
)
@click.option(
    "--calibrate",
    is_flag=True,
    help="Only measure anew what batches cost here, by which drafts are made, and keep that.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    model: str | None,
    no_memory: bool,
    quantize: str | None,
    parallel: int | None,
    draft: str | None,
    calibrate: bool,
    as_json: bool,
    **measuring: Any,
) -> Outcome:
    """Measure what answers cost on MODEL, in turns with plain llama.cpp decoding.

    Medians over the rounds; ratios are taken within a round.
    """
    chosen = flags.resolve_model(model)
    plot, also = measuring.pop("plot"), measuring.pop("also")
    if also and plot is None:
        raise UsageError("--also names models for --plot, which is not given")
    if sys.platform == "win32" and not no_memory and not calibrate and parallel is None:
        say(f"{PROGRAM}: peak memory is not measured on Windows")
        no_memory = True
    from acd_local.bench import cost, throughput
    from acd_local.bench.measuring import quantized

    def progress(line: str) -> None:
        say(f"{PROGRAM}: {line}")

    failed: AcdError | None = None
    with quantized(chosen, quantize, measuring["threads"], progress) as file:
        if calibrate:
            found = dataclasses.asdict(cost.calibrate(file, threads=measuring["threads"]))
            lines = iter([_batch_costs(found)])
        elif plot is not None:
            found, failed = bench_growth.run(file, also, plot, progress, measuring)
            lines = bench_growth.lines(found)
        elif parallel is None:
            found = cost.run(file, draft=draft, memory_too=not no_memory, progress=progress, **measuring).summary()
            lines = _cost_lines(found)
        else:
            found = throughput.run(file, parallel, progress=progress, **measuring).summary()
            lines = _throughput_lines(found, measuring["rounds"])
    if as_json:
        return Outcome(record=found, error=failed)
    for line in lines:
        print(line)
    return Outcome(error=failed)


def _cost_lines(found: Mapping[str, Any]) -> Iterator[str]:
    name, pair = one_line(found["model"]), one_line(found["pair"])
    drafting = "" if found["draft"] is None else f"drafts by {one_line(found['draft'])}, "
    yield (
        f"{name}, pair {pair}, alpha {found['alpha']:g}, beta {found['beta']:g}, {drafting}vocabulary "
        f"{found['n_vocab']}, {found['threads']} threads, {found['tokens']} tokens x {found['rounds']} rounds, medians"
    )
    for group, rows in found["groups"].items():
        yield ""
        yield from table(TITLES[group], rows, width=28)
    first = found["first_token"]
    ways = [f"{name} {way['seconds']:.2f} s ({way['ratio_to_plain']:.2f})" for name, way in first["ways"].items()]
    yield f"\nfirst token of a question of {first['question_tokens']} tokens (ratio to plain): {', '.join(ways)}"
    if found["peak_mb"]:
        yield "peak memory: " + ", ".join(f"{name} {peak:.0f} MB" for name, peak in found["peak_mb"].items())
        extra, kv = found["peak_over_plain_and_kv_mb"], found["kv_mb"]
        yield f"contrast over plain + one KV cache of {kv:.0f} MB: {extra:.0f} MB"
    if found["batch_costs"] is not None:
        yield _batch_costs(found["batch_costs"])


def _batch_costs(costs: Mapping[str, Any]) -> str:
    """Write what batches cost in a line."""
    from acd_local.runtime.batch_costs import SIZES

    parts = []
    for name, streams in (("one", "one stream"), ("two", "each of two")):
        rows = ", ".join(f"{size}: {cost:g}" for size, cost in zip(SIZES, costs[name], strict=False))
        parts.append(f"of {streams} {rows}")
    line = f"batches in rows of {costs['seconds'] * 1e3:.1f} ms, by their rows {'; '.join(parts)}"
    if any(costs["delays"]):
        one, two = costs["delays"]
        line += f"; single rows behind a larger batch are late by {one:g} and {two:g}"
    return line


def table(title: str, rows: Sequence[Mapping[str, Any]], *, width: int) -> Iterator[str]:
    """Write a table's lines: COLUMNS of every row behind its "case", which gets `width` columns."""
    columns = [(name, *column) for name, column in COLUMNS.items()]
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
