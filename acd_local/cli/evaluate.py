"""acd eval: measure methods on sets of prompts; show and merge what was measured."""

from __future__ import annotations

import re
import shlex
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from acd_local import __version__
from acd_local.cli import flags, help
from acd_local.cli.progress import ProgressLine
from acd_local.cli.shell import Interrupts, going_on, one_line, say
from acd_local.errors import ContextError, StorageError, UsageError

if TYPE_CHECKING:
    from acd_local.engine import Engine
    from acd_local.evaluate.campaign import Campaign
    from acd_local.evaluate.judge import Judge
    from acd_local.evaluate.methods import Method
    from acd_local.evaluate.sets import EvalSet
    from acd_local.pairs import PromptPair
    from acd_local.runtime.cancel import CancelToken

PROGRAM = "acd eval"
DEFAULT_METHODS = "as-is,base,acd"
DEFAULT_WITH_GATE = "as-is,gate-sp,gate-acd,acd"
SWEEP_OF = "acd"
ARGUMENTS = "acd_local.eval.arguments"  # as they were given, for run.json


class EvalGroup(click.Group):
    """`acd eval MODEL` beside `acd eval show` and `acd eval merge`: what is no subcommand is a model."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = list(args)
        if not args or args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


class RunCommand(help.Command):
    """The command that needs no name of its own."""

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(PROGRAM, "[OPTIONS] [MODEL]")


@click.group("eval", cls=EvalGroup, short_help="Measure how safe, helpful and fast methods are on a model.")
def command() -> None:
    """Measure how safe, how helpful and how fast methods are on a model; `show` and `merge` results."""


@command.command(
    "run",
    cls=RunCommand,
    epilog="acd eval show DIR prints a run's tables; acd eval merge DIR... -o OUT joins shards.\n\n"
    + help.foot(
        "acd eval model.gguf",
        "acd eval model.gguf --methods as-is,gate-acd --limit 60 \\",
        "  --set advbench=advbench.csv:harmful --set alpaca=alpaca.jsonl:harmless",
        "acd eval show eval-model",
    ),
)
@click.argument("model", required=False, type=flags.MODEL)
@click.option(
    "--set",
    "set_specs",
    multiple=True,
    metavar="NAME=FILE:KIND",
    help="A set of prompts, may be repeated: CSV, TXT, JSON or JSONL; KIND is harmful, harmless, labelled (both, by a "
    "label column), choice (TruthfulQA's multiple choice) or facts (questions with known answers). "
    "NAME=FILE:KIND:COLUMN=VALUE takes some rows. "
    "Default: a small built-in set.",
)
@click.option(
    "--methods",
    metavar="NAMES",
    help="Methods to compare, by commas, or 'all'; docs/methods.md describes them. "
    f"Default: {DEFAULT_WITH_GATE} where the pair has a gate, else {DEFAULT_METHODS}.",
)
@click.option("--methods-file", multiple=True, type=flags.FILE, metavar="FILE", help="Methods of your own, TOML.")
@click.option("--sweep", metavar="KEY=X,Y,...", help=f"Also vary alpha, beta or window of {SWEEP_OF}.")
@click.option("--out", "-o", type=flags.FILE, metavar="DIR", help="Folder for all results; default eval-MODEL.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Prompts per set, drawn by --seed; default: all.")
@click.option("--max-tokens", "-n", type=click.IntRange(1), default=64, metavar="N", help="Longest answer; default 64.")
@click.option("--temp", type=float, default=0.0, metavar="X", help="Temperature, 0 is greedy; default 0.")
@click.option("--seed", type=click.IntRange(0), default=0, metavar="N", help="Seed of prompts and answers; default 0.")
@click.option(
    "--parallel",
    type=click.IntRange(1, 128),
    default=8,
    metavar="N",
    help="Prompts answered at once, each in two streams; 1 repeats a run exactly, more may differ in near-ties; "
    "default 8.",
)
@click.option(
    "--judge", type=flags.MODEL, metavar="MODEL", help="A model that calls answers safe or unsafe, such as Llama Guard."
)
@click.option("--shard", metavar="I/N", help="Only this part of every set, for several machines; see merge.")
@click.option(
    "--pair", "-p", type=flags.PAIR, metavar="NAME|FILE", help="Prompt pair; default: the model's own, else 'default'."
)
@click.option("--soft", is_flag=True, help="Methods that use the pair take its soft prompts: acd-soft for acd.")
@click.option("--ctx-size", "-c", type=int, metavar="N", default=1024, help="Tokens per stream; default 1024.")
@flags.threads_flag
@click.option("--gpu-layers", "-ngl", type=int, metavar="N", help="Layers on the GPU; default: all where there is one.")
@flags.ray_flag
def run(model: str | None, **given: Any) -> int:
    """Measure how safe, how helpful and how fast methods are on MODEL, with 95% intervals.

    DIR gets answers.jsonl, scores.jsonl, results.json and report.html. Ctrl-C keeps what is done; the same command goes
    on from there.
    """
    model = flags.resolve_model(model)
    flags.check_engine_flags(given)
    with Interrupts() as interrupts:
        return _run(model, given, interrupts)


def _run(model: str, given: dict[str, Any], interrupts: Interrupts) -> int:
    from acd_local import pairs
    from acd_local.engine import Engine, pair_to_measure
    from acd_local.evaluate import results, sets
    from acd_local.evaluate.journal import Journal
    from acd_local.evaluate.runner import Evaluation, Plan
    from acd_local.evaluate.scoring import MARGIN_PROMPTS
    from acd_local.options import Options
    from acd_local.progress import Listener, Stopped
    from acd_local.runtime.cancel import CancelToken

    whole = _read_sets(given)
    shard = _shard(given["shard"])
    drawn = [sets.sample(s, given["limit"], given["seed"]) for s in whole]
    chosen = [sets.shard(s, *shard) for s in drawn]
    Options(temp=given["temp"], max_tokens=given["max_tokens"], seed=given["seed"])
    with ExitStack() as stack:
        connect = flags.connection(given["ray"], interrupts)
        pair = pair_to_measure(model, given["pair"])
        given["soft"] = given["soft"] or (given["methods"] is None and pair.soft_preferred)
        settings = _settings(given)
        engine = stack.enter_context(Engine(model, pair=pair, **settings))
        progress = stack.enter_context(ProgressLine(PROGRAM))
        if engine.warning:
            say(f"{PROGRAM}: {one_line(engine.warning)}")
        methods, sweep = _methods(engine, pair, given)
        interrupts.cancels(stop := CancelToken())
        try:
            methods = _with_references(engine, pair, methods, stop)
        except Stopped:
            return interrupts.exit_code or 130
        judge = None if given["judge"] is None else stack.enter_context(_judge(given))
        info = _info(engine, pair, given, methods, sweep, list(zip(chosen, drawn, whole, strict=True)), judge)
        directory = given["out"] or Path(f"eval-{_slug(model)}")
        with Journal(directory, info) as journal:
            if given["pair"] is None and pair.name == pairs.DEFAULT:
                say(f"{PROGRAM}: no pair was made for this model: measuring {pairs.DEFAULT!r}; acd fit makes one")
            measured = {item.id for s in drawn for item in sets.sample(s, MARGIN_PROMPTS, given["seed"]).items}
            plan = Plan(pair, methods, chosen, given["temp"], given["max_tokens"], given["seed"], frozenset(measured))
            evaluation: Evaluation | Campaign
            if connect is None:
                evaluation = Evaluation(engine, plan, journal, judge=judge, stop=stop, on_progress=progress.show)
            else:
                from acd_local.evaluate.campaign import Campaign

                listener = Listener(progress.show, progress.line)
                evaluation = Campaign(
                    connect, engine, settings, plan, journal, judge=judge, stop=stop, listener=listener
                )
            try:
                evaluation.run()
            except Stopped:
                progress.close()
                say(f"{PROGRAM}: stopped; everything finished is kept in {directory}, the same command goes on")
                return interrupts.exit_code or 130
            except StorageError as error:
                raise going_on(error) from None
            nothing = not journal.answers() and any(s.kind != "choice" for s in chosen)
        interrupts.cancels(None)
    left_out = list(evaluation.failures.values())
    for line in left_out[:5]:
        say(f"{PROGRAM}: left out: {one_line(line)}")
    if len(left_out) > 5:
        say(f"{PROGRAM}: left out: {len(left_out) - 5} more prompts")
    if nothing and left_out:
        raise ContextError("no prompt fits the context: use a larger --ctx-size")
    try:
        found = results.write(directory)
    except Exception:
        say(f"{PROGRAM}: everything measured is kept; acd eval show {directory} makes the report without the model")
        raise
    _print_tables(found)
    say(f"{PROGRAM}: report: {directory / 'report.html'}")
    return 0


@command.command("show", cls=help.Command, short_help="Print the tables of a run.")
@click.argument("directory", type=flags.FILE, metavar="DIR")
@click.option("--markdown", is_flag=True, help="Tables in Markdown.")
def show(directory: Path, markdown: bool) -> None:
    """Print the tables of a run, finished or not, and write its results.json and report.html anew."""
    from acd_local.evaluate import results, tables

    found = results.write(directory)
    if markdown:
        print(tables.markdown(found))
    else:
        _print_tables(found)


@command.command("merge", cls=help.Command, short_help="Join shards, or runs of other methods and sets.")
@click.argument("directories", type=flags.FILE, nargs=-1, required=True, metavar="DIR...")
@click.option("--out", "-o", type=flags.FILE, required=True, metavar="OUT", help="Folder for the merged run; required.")
def merge(directories: tuple[Path, ...], out: Path) -> None:
    """Join runs of one model: shards from several machines, or other methods and sets."""
    from acd_local.evaluate import results

    _print_tables(results.merge(directories, out))
    say(f"{PROGRAM}: report: {out / 'report.html'}")


def _print_tables(found: dict[str, Any]) -> None:
    from acd_local.cli import tables

    for line in tables.lines(found):
        print(line)


# -- what is asked for -------------------------------------------------------------------------------------------------


def _read_sets(given: dict[str, Any]) -> list[EvalSet]:
    from acd_local.evaluate import sets

    found = [s for spec in given["set_specs"] for s in sets.read(spec)] or sets.smoke()
    names = [s.name for s in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two sets are called {twice!r}: give them different names")
    return found


def _shard(text: str | None) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text or "1/1")
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--shard must be i/n with i from 1 to n, such as 1/3, not {text!r}")
    return int(match[1]), int(match[2])


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the engine besides model and pair."""
    return {
        "ctx_size": given["ctx_size"],
        "conversations": given["parallel"],
        "threads": given["threads"],
        "gpu_layers": given["gpu_layers"],
        "system_apart": True,
        "soft": given["soft"],
    }


def _methods(engine: Engine, pair: PromptPair, given: dict[str, Any]) -> tuple[list[Method], dict[str, Any] | None]:
    """List the methods in table order, those of a sweep last; and run.json's description of the sweep."""
    from acd_local.evaluate import methods
    from acd_local.options import Options

    asked = given["methods"] or (DEFAULT_METHODS if pair.gate is None else DEFAULT_WITH_GATE)
    names = [name.strip() for name in asked.split(",") if name.strip()]
    soft = engine.soft_pair(pair) if given["soft"] or _may_be_soft(names, pair) else None
    known = methods.builtin(pair, soft)
    for path in given["methods_file"]:
        known |= methods.load(path, pair, known, soft)
    if any(name not in known and name.removesuffix(methods.SOFT) in known for name in names) and soft is None:
        engine.soft_pair(pair)  # says what is missing
    if names == ["all"]:
        steers = _holds(pair, "steering")
        # Without references, which take minutes to read, and which not every model and pair has.
        every = [m for m in known.values() if not m.refer]
        names = [m.name for m in every if (pair.gate is not None or not m.gate) and (steers or not m.steer)]
    swept_name = SWEEP_OF
    if given["soft"]:
        *names, swept_name = [n + methods.SOFT if n + methods.SOFT in known else n for n in [*names, SWEEP_OF]]
    chosen = methods.select(names, known)
    methods.check_gates(chosen, pair)
    if any(method.gate for method in chosen):
        engine.gating(pair, Options(gate=True))  # says what is wrong with it
    if any(method.steer for method in chosen):
        engine.decoder.open_apart(engine.steering(pair))  # says what is wrong, or that llama.cpp cannot
    if given["sweep"] is None:
        return chosen, None
    key, numbers = _sweep(given["sweep"])
    swept = methods.sweep(known[swept_name], key, numbers)  # type: ignore[arg-type]
    values = [getattr(m, key) for m in swept]  # equal ones count once
    return [*chosen, *swept], {"method": swept_name, "key": key, "values": values, "names": [m.name for m in swept]}


def _with_references(engine: Engine, pair: PromptPair, methods: list[Method], stop: CancelToken) -> list[Method]:
    """Give the methods that refer to stored answers these, which takes some minutes for a new model or pair."""
    if not any(method.refer for method in methods):
        return methods
    from acd_local.fit import references

    say(f"{PROGRAM}: reading the answers that are referred to")
    found = references.make(engine, pair, stop=stop)
    return [replace(method, references=found) if method.refer else method for method in methods]


def _may_be_soft(names: list[str], pair: PromptPair) -> bool:
    from acd_local.evaluate import methods

    if names == ["all"]:
        return _holds(pair, "soft")
    return pair.vectors_path is not None and any(name.endswith(methods.SOFT) for name in names)


def _holds(pair: PromptPair, part: str) -> bool:
    """Tell whether a part of `vectors.Vectors` stands beside a pair."""
    from acd_local import vectors

    path = pair.vectors_path
    return path is not None and getattr(vectors.load(path, sha256=pair.sha256), part) is not None


def _sweep(text: str) -> tuple[str, list[float]]:
    key, _, numbers = text.partition("=")
    try:
        values = [float(number) for number in numbers.split(",")]
    except ValueError:
        raise UsageError(f"--sweep must look like alpha=0,0.2,0.4, not {text!r}") from None
    return key.strip(), values


def _judge(given: dict[str, Any]) -> Judge:
    from acd_local.evaluate.judge import Judge

    judge = Judge(given["judge"], threads=given["threads"])
    if judge.warning:
        say(f"{PROGRAM}: judge: {one_line(judge.warning)}")
    return judge


def _info(
    engine: Engine,
    pair: PromptPair,
    given: dict[str, Any],
    methods: list[Method],
    sweep: dict[str, Any] | None,
    sets: list[tuple[EvalSet, EvalSet, EvalSet]],
    judge: Judge | None,
) -> dict[str, Any]:
    """Put together what run.json says."""
    from acd_local.evaluate.methods import gate_digest
    from acd_local.evaluate.run_folder import FORMAT
    from acd_local.generation import resolve_contrast
    from acd_local.options import Options

    model, numbers = engine.info, resolve_contrast(Options(), pair)
    gate = {} if pair.gate is None else {"gate": gate_digest(pair)}
    options = ("temp", "max_tokens", "seed", "limit", "parallel", "ctx_size")
    return {
        "format": FORMAT,
        "model": {"file": model.path.name, **_fields(model, "name architecture file_type size tokenizer")},
        "pair": {"name": pair.name, "alpha": numbers.alpha, "beta": numbers.beta, **gate},
        "options": {key: given[key] for key in options} | {"threads": engine.threads},
        "methods": [
            _fields(m, "name title source alpha beta raw window contrast")
            | {"setup": m.setup(), **({"gate": True} if m.gate else {}), **({} if m.scored else {"scored": False})}
            for m in methods
        ],
        "sweep": sweep,
        "sets": [
            _fields(s, "name kind source") | {"n": len(s.items), "total": len(whole.items), "digest": drawn.digest()}
            for s, drawn, whole in sets
        ],
        "judge": None if judge is None else judge.info.path.name,
        "judge_model": None if judge is None else {"tokenizer": judge.info.tokenizer, "size": judge.info.size},
        "shard": given["shard"] or "1/1",
        "version": __version__,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["acd", "eval", *click.get_current_context().meta[ARGUMENTS]]),
    }


def _fields(value: object, names: str) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names.split()}


def _slug(model: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).stem)[:60].strip("-.") or "model"
