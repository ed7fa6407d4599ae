"""acd bench: what the contrast costs on this machine, and where the time goes."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from acd_local import files
from acd_local.cli import flags
from acd_local.cli.shell import EXIT_CODES, Outcome, one_line, say
from acd_local.errors import AcdError, UsageError

if TYPE_CHECKING:
    from acd_local.bench import Report
    from acd_local.speed import BatchCosts

PROGRAM = "acd bench"


@click.command("bench", epilog=EXIT_CODES, context_settings={"max_content_width": 100})
@click.argument("model", required=False)
@click.option("--tokens", type=click.IntRange(4), default=64, show_default=True, help="Answer tokens per measurement.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="How often each case is measured.")
@click.option("--threads", "-t", type=click.IntRange(1), help="CPU threads; default: $ACD_THREADS or the cores.")
@click.option("--ctx-size", "-c", type=click.IntRange(512), default=2048, show_default=True, help="Tokens per stream.")
@click.option("--pair", metavar="NAME|FILE", help="Prompt pair; default: the model's own, or `default`.")
@click.option("--no-memory", is_flag=True, help="Do not measure peak memory (one process per case).")
@click.option(
    "--quantize",
    type=click.Choice(["q4_0", "q4_k_m", "q8_0"]),
    help="Measure a temporary copy of MODEL with these weight types.",
)
@click.option(
    "--parallel",
    type=click.IntRange(2, 128),
    metavar="N",
    help="Instead: prompts per minute, N at once against one by one.",
)
@click.option("--replay", is_flag=True, help="Instead: MODEL's speed with the batches of the demo model's answers.")
@click.option("--peers", is_flag=True, help="Instead: two llama_cpp.Llama objects, and transformers, against this.")
@click.option(
    "--plot",
    type=flags.file_name,
    metavar="FILE.svg",
    help="Instead: plot what batches and run lengths cost, and which drafts stand.",
)
@click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")
def command(
    model: str | None,
    no_memory: bool,
    quantize: str | None,
    parallel: int | None,
    replay: bool,
    peers: bool,
    plot: Path | None,
    as_json: bool,
    **measuring: Any,
) -> Outcome | None:
    """Measure what the contrast costs on MODEL, in turns with plain llama.cpp decoding.

    Medians over the rounds; ratios are taken within a round.
    """
    instead = {"--parallel": parallel is not None, "--replay": replay, "--peers": peers, "--plot": plot is not None}
    if len(given := [name for name, there in instead.items() if there]) > 1:
        raise UsageError(f"{given[0]} and {given[1]} exclude each other")
    if plot is not None:
        files.check_place(plot)  # before minutes are spent on measuring
    with _weights(flags.resolve_model(model), quantize, measuring["threads"]) as file:
        if parallel is not None:
            done = _parallel(file, parallel, measuring, as_json)
        elif replay:
            done = _replay(file, measuring, as_json)
        elif peers:
            done = _peers(file, measuring, as_json)
        elif plot is not None:
            done = _plot(file, plot, measuring, as_json)
        else:
            done = _cases(file, measuring, not no_memory, as_json)
    return done


def _progress() -> Callable[[str], None]:
    return lambda line: say(f"{PROGRAM}: {line}")


@contextmanager
def _weights(model: str, kind: str | None, threads: int | None) -> Iterator[str]:
    """The model, or a temporary file with other weight types."""
    if kind is None:
        yield model
        return
    from acd_local.models import resolve
    from acd_local.runtime import llama, probe
    from acd_local.runtime.threads import default_threads

    source = probe.verify(resolve(model)).path
    with tempfile.TemporaryDirectory(prefix="acd-bench-") as folder:
        target = Path(folder) / f"{source.stem}-{kind}.gguf"
        say(f"{PROGRAM}: writing a copy as {kind}")
        llama.quantize(source, target, kind, threads=threads or default_threads())
        yield str(target)


# ---------------------------------------------------------------------------------------------------------------------
# The cases


def _cases(model: str, measuring: Mapping[str, Any], memory: bool, as_json: bool) -> Outcome | None:
    from acd_local import bench, latency

    report = bench.run(model, memory=memory, progress=_progress(), **measuring)
    waiting = {key: measuring[key] for key in ("rounds", "pair", "threads", "ctx_size")}
    first = latency.run(model, progress=_progress(), **waiting)
    rows = [case.summary() for case in report.cases]
    groups = {"strategies": report.strategies, "sampled": report.sampled, "repeat": report.repeat}
    if as_json:
        keys = ("model", "pair", "alpha", "beta", "n_vocab", "threads", "tokens", "rounds")
        found: dict[str, Any] = {k: getattr(report, k) for k in keys}
        found["cases"] = rows
        found |= {"kv_mb": round(report.kv_mb, 1), "peak_over_plain_and_kv_mb": report.extra_mb}
        found |= {name: [case.strategy_summary() for case in cases] for name, cases in groups.items()}
        found["auto_against_best"] = {name: bench.auto_against_best(cases) for name, cases in groups.items()}
        found["first_token"] = {"question_tokens": first.question, "ways": first.summary()}
        found["row_costs"] = None if report.costs is None else asdict(report.costs)
        return Outcome(record=found)
    print(_head(report))
    print(f"{'':<20}{'tokens/s':>10}{'time ratio':>12}{'outside':>12}{'first token':>22}{'peak':>11}")
    print(f"{'':<20}{'':>10}{'to plain':>12}{'llama_decode':>14}{'cold':>9}{'warm':>11}{'memory':>11}")
    for row in rows:
        print(_case_line(row))
    if report.extra_mb is not None:
        print(f"peak over plain + one KV cache of {report.kv_mb:.0f} MB: {report.extra_mb:.0f} MB")
    titles = {
        "strategies": "the same questions",
        "sampled": f"sampled, temperature {bench.TEMP:g}",
        "repeat": "answers that repeat a text",
    }
    for name, cases in groups.items():
        print()
        _print_strategies(titles[name], [case.strategy_summary() for case in cases], bench.auto_against_best(cases))
    shown = [f"{name} {way['seconds']:.2f} s ({way['ratio_to_plain']:.2f})" for name, way in first.summary().items()]
    print(f"\nfirst token of a question of {first.question} tokens (ratio to plain): {', '.join(shown)}")
    if report.costs is not None:
        c = report.costs
        few = "".join(f", {k} {cost:g}" for k, cost in enumerate(c.few, start=2))
        several = f"of one stream{few}, more {c.fixed:g} + {c.each:g} k"
        ahead = f"running ahead takes {c.typical:g} times the usual rows, and {c.ahead:g} times what these cost"
        print(f"row costs: one of each stream {c.pair:g} rows; {several}; {ahead}")
    return None


def _head(report: Report) -> str:
    name = one_line(report.model)
    return (
        f"{name}, pair {one_line(report.pair)}, alpha {report.alpha:g}, beta {report.beta:g}: vocabulary "
        f"{report.n_vocab}, {report.threads} threads, {report.tokens} tokens x {report.rounds} rounds, medians"
    )


def _case_line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['case']:<20}"
        + _cell(row["tokens_per_second"], "{:.1f}", 10)
        + _cell(row["ratio_to_plain"], "{:.2f}", 12)
        + _cell(row["outside_decode_ms"], "{:.2f} ms", 14)
        + _cell(row["first_token_cold_s"], "{:.2f} s", 9)
        + _cell(row["first_token_warm_s"], "{:.2f} s", 11)
        + _cell(row["peak_mb"], "{:.0f} MB", 11)
    )


def _print_strategies(title: str, rows: Sequence[Mapping[str, Any]], auto: float | None) -> None:
    print(f"{title:<28}{'tokens/s':>10}{'time ratio':>12}{'compared':>11}{'accepted':>11}{'rows per':>11}")
    print(f"{'':<28}{'':>10}{'to plain':>12}{'positions':>11}{'safe rows':>11}{'token':>11}")
    for row in rows:
        print(
            f"{row['case']:<28}"
            + _cell(row["tokens_per_second"], "{:.1f}", 10)
            + _cell(row["ratio_to_plain"], "{:.2f}", 12)
            + _cell(row["compared_share"], "{:.0%}", 11)
            + _cell(row["accepted_share"], "{:.0%}", 11)
            + _cell(row["rows_per_token"], "{:.2f}", 11)
        )
    if auto is not None:
        print(f"auto takes {auto:.3f} times what the better of stepwise and deferred takes")


def _cell(value: float | None, form: str, width: int) -> str:
    return (form.format(value) if value is not None else "-").rjust(width)


# ---------------------------------------------------------------------------------------------------------------------
# Other measurements


def _parallel(model: str, parallel: int, measuring: Mapping[str, Any], as_json: bool) -> Outcome | None:
    from acd_local import throughput

    found = throughput.run(model, parallel, progress=_progress(), **measuring)
    speeds = {n: statistics.median(values) for n, values in found.per_minute.items()}
    if as_json:
        keys = ("parallel", "prompts", "tokens", "threads", "gains", "gain", "differing")
        return Outcome(record={k: getattr(found, k) for k in keys} | {"prompts_per_minute": speeds})
    rounds = measuring["rounds"]
    print(f"{found.prompts} prompts, up to {found.tokens} tokens, {found.threads} threads, {rounds} rounds, medians")
    print(f"one by one {speeds[1]:9.1f} prompts per minute")
    print(f"{parallel:>3} at once{speeds[parallel]:9.1f} prompts per minute, {found.gain:.2f} times as many")
    print(f"texts that differ (near-ties in another batch shape): {found.differing} of {found.prompts}")
    return None


def _replay(model: str, measuring: Mapping[str, Any], as_json: bool) -> Outcome | None:
    from acd_local import bench, speed

    report = speed.run_replay(model, progress=_progress(), **measuring)
    groups = {"strategies": report.strategies, "repeat": report.repeat}
    if as_json:
        keys = ("model", "source", "n_vocab", "threads", "tokens", "rounds")
        found: dict[str, Any] = {k: getattr(report, k) for k in keys}
        found |= {name: [case.strategy_summary() for case in cases] for name, cases in groups.items()}
        found["auto_against_best"] = {name: bench.auto_against_best(cases) for name, cases in groups.items()}
        return Outcome(record=found | {"costs": report.costs.summary()})
    print(
        f"{one_line(report.model)}, with the batches of answers of {one_line(report.source)}: {report.threads} "
        f"threads, up to {report.tokens} tokens x {report.rounds} rounds, medians, llama_decode alone"
    )
    _print_costs(report.costs)
    titles = {"strategies": "ordinary questions", "repeat": "answers that repeat a text"}
    for name, cases in groups.items():
        print()
        _print_strategies(titles[name], [case.strategy_summary() for case in cases], bench.auto_against_best(cases))
    return None


def _print_costs(costs: BatchCosts) -> None:
    shown = ", ".join(f"{k}: {cost:.2f}" for k, cost in costs.rows.items())
    print(f"a batch of k rows of one stream costs, in single rows of {1e3 * costs.seconds[1]:.2f} ms: {shown}")
    print(f"one row of each stream: {costs.pair:.2f}")


def _peers(model: str, measuring: Mapping[str, Any], as_json: bool) -> Outcome | None:
    from acd_local import peers

    report = peers.run(model, progress=_progress(), **measuring)
    found = report.summary()
    if as_json:
        return Outcome(record=found)
    print(
        f"{one_line(report.model)}: {report.threads} threads, up to {report.tokens} tokens x {report.rounds} rounds, "
        "medians"
    )
    print(f"{'':<24}{'tokens/s':>10}{'time per token':>18}")
    print(f"{'':<24}{'':>10}{'over acd':>18}")
    for row in found["cases"]:
        ratio = _cell(row["ratio_to_acd"], "{:.2f}", 18)
        print(f"{row['case']:<24}{_cell(row['tokens_per_second'], '{:.1f}', 10)}{ratio}")
    for name, why in report.left_out.items():
        print(f"left out: {name}: {one_line(why)}")
    return None


def _plot(model: str, file: Path, measuring: Mapping[str, Any], as_json: bool) -> Outcome | None:
    from acd_local import speed

    curves = speed.run_curves(model, progress=_progress(), **measuring)
    found, failed = curves.summary(), None
    try:
        files.replace_file(file, speed.draw(curves))
    except AcdError as error:  # what was measured is told all the same
        failed = error
    if as_json:
        return Outcome(record=found | {"plot": str(file)}, error=failed)
    print(
        f"{one_line(curves.model)}: {curves.threads} threads, up to {curves.tokens} tokens x {curves.rounds} rounds, "
        "medians"
    )
    _print_costs(curves.costs)
    for name, runs in found["runs"].items():
        shown = ", ".join(f"{n}: {ratio:.2f}" for n, ratio in runs["ratio_to_plain"].items())
        beside = _cell(runs["stepwise_ratio_to_plain"], "{:.2f}", 0)
        print(f"{name}, time over plain by run length: {shown}; side by side: {beside}")
        print(f"{name}, drafts that stand by position: {', '.join(f'{share:.0%}' for share in runs['stands'])}")
    if failed is None:
        print(f"written: {one_line(str(file))}")
    return Outcome(error=failed)
