"""Command line flags that several commands share, and how they become an engine and its options."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from acd_local import files
from acd_local.errors import ModelError, UsageError, shown
from acd_local.options import ENGINE_RANGES, OVERFLOWS, Options, check_engine_number

if TYPE_CHECKING:
    from acd_local.cli.shell import Interrupts
    from acd_local.cluster import Cluster
    from acd_local.engine import Engine

F = TypeVar("F", bound=Callable[..., Any])


def file_name(text: str) -> Path:
    """Read an option that names a file. click.Path asks the disk at once, and fails on names no file can have."""
    if not text:
        raise UsageError("the name of a file or folder is empty")
    return Path(text)


MAX_TEXT = 16_000_000  # bytes of a grammar's or schema's file
ENGINE_FLAGS = ("pair", "draft", "soft", "ctx_size", "threads", "gpu_layers", "kv_type", "layout")

threads_flag = click.option(
    "--threads",
    "-t",
    type=click.IntRange(*ENGINE_RANGES["threads"]),
    metavar="N",
    help="CPU threads; default: $ACD_THREADS or the cores.",
)

ray_flag = click.option(
    "--ray",
    metavar="ADDRESS",
    help="Share the work with a Ray cluster: HOST:PORT, or 'local' for groups of --threads cores of this machine; "
    "needs the extra 'ray'.",
)

# Help texts name the defaults by hand: None on the command line means "not given", so that a pair can decide.
_ENGINE = (
    click.option(
        "--pair",
        metavar="NAME|FILE",
        help="Prompt pair, or as-is for none; default: the one made for the model, else what a quick check finds.",
    ),
    click.option(
        "--draft",
        metavar="MODEL",
        help="A smaller model of the same vocabulary that proposes tokens: the same answers, sooner where they are "
        "easy to guess.",
    ),
    click.option(
        "--soft/--no-soft",
        default=None,
        help="The pair's soft prompts (NAME.safetensors), or its texts; default: what the pair prefers.",
    ),
    click.option(
        "--ctx-size",
        "-c",
        type=int,
        metavar="N",
        help="Tokens that each stream holds; default 4096 or the model's limit.",
    ),
    threads_flag,
    click.option(
        "--gpu-layers",
        "-ngl",
        type=int,
        metavar="N",
        help="Layers on the GPU, -1 for all; default: all where the build can.",
    ),
    click.option("--kv-type", type=click.Choice(["f16", "q8_0"]), default="f16", help="KV cache type; default f16."),
    click.option(
        "--layout",
        type=click.Choice(["shared", "split"]),
        default="shared",
        help="Both streams in one llama_context, or one each; default shared.",
    ),
)

_NUMBERS = {field.name: field for field in dataclasses.fields(Options) if "range" in field.metadata}
_SAMPLERS = [
    name for name in _NUMBERS if name not in ("alpha", "beta", "window", "gate_threshold", "draft_max", "max_tokens")
]


def _number(name: str, *short: str) -> Callable[[F], F]:
    """Make the flag of an option that is a number, with the option's own help."""
    field, whole = _NUMBERS[name], "int" in str(_NUMBERS[name].type)
    text = field.metadata["help"] + ("" if field.default is None else f"; default {field.default:g}.")
    kind, metavar = (int, "N") if whole else (float, "X")
    return click.option(f"--{name.replace('_', '-')}", *short, type=kind, metavar=metavar, help=text)


_CONTRAST = (
    *map(_number, ("alpha", "beta", "window")),
    click.option("--raw-contrast", is_flag=True, help="Do not divide by 1 - alpha; with --beta 0 the paper's formula."),
    click.option("--plain", is_flag=True, help="The safe prompt alone, no contrast."),
    click.option(
        "--gate",
        type=click.Choice(["on", "off"]),
        help="Contrast only what the pair's gate finds harmful, or every answer; default: on where the pair has one.",
    ),
    _number("gate_threshold"),
)

_LIMITS = (
    _number("draft_max"),
    _number("max_tokens", "-n"),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; may be repeated."),
    click.option(
        "--overflow",
        type=click.Choice(OVERFLOWS),
        help="Where a conversation outgrows the context: drop its oldest turns, or fail; default drop.",
    ),
)

_SAMPLING = (
    *map(_number, _SAMPLERS),
    click.option("--grammar", metavar="GBNF", help="GBNF grammar that the answer must follow."),
    click.option("--grammar-file", type=file_name, metavar="FILE", help="The same from a file."),
    click.option("--json-schema", metavar="JSON", help="JSON schema that the answer must follow."),
    click.option("--json-schema-file", type=file_name, metavar="FILE", help="The same from a file."),
)


anchors_flag = click.option(
    "--anchors",
    type=file_name,
    metavar="FILE",
    help='Your own instructions, JSON lines of {"prompt": ..., "kind": "harmful" or "harmless"}, and "lookalike": true '
    "where a harmless one looks dangerous; default: built in.",
)

_HELP_COLUMN = 30  # columns for the options' names in --help


class Command(click.Command):
    """A command whose --help shows its own options first, then the shared ones by section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (row := parameter.get_help_record(ctx)) is not None:
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(row)
        lengths = [len(flag) for rows in sections.values() for flag, _ in rows]
        widest = max(n for n in lengths if n <= _HELP_COLUMN)  # the texts of longer ones go below them
        for name, rows in sections.items():
            with formatter.section(name):
                formatter.write_dl([(flag.ljust(widest), text) for flag, text in rows], col_max=widest)


def engine_flags(function: F) -> F:
    return _apply("Model", _ENGINE, function)


def answer_flags(function: F) -> F:
    for section, options in (("Sampling", _SAMPLING), ("Limits", _LIMITS), ("Contrast", _CONTRAST)):
        function = _apply(section, options, function)
    return function


def _apply(section: str, decorators: tuple[Callable[[Any], Any], ...], function: F) -> F:
    for decorate in reversed(decorators):
        function = decorate(function)
        function.__click_params__[-1].section = section  # type: ignore[attr-defined]
    return function


def resolve_model(model: str | None, *, instead: str = "leave it out to use that") -> str:
    """Return the MODEL argument, or ACD_MODEL where no argument is given at all.

    Args:
        instead: what to write where the argument was meant for ACD_MODEL's model; "" if it cannot have been.

    Raises:
        ModelError: ACD_MODEL is set, and the argument is no model.
    """
    chosen = os.environ.get("ACD_MODEL")
    if model is None:
        model = chosen
    elif chosen and instead and model:
        _check_is_model(model, instead)
    if not model:
        raise UsageError("no model: give a GGUF file, 'demo' or 'hf:owner/repo/file.gguf', or set ACD_MODEL")
    return model


def _check_is_model(argument: str, instead: str) -> None:
    if argument == "demo" or argument.startswith("hf:") or argument.endswith(".gguf"):
        return
    try:
        there = Path(argument).exists() or files.expand(argument).exists()
    except (OSError, ValueError):  # too long for a name, as prompts are
        there = False
    if not there:
        raise ModelError(
            f"no such file: {shown(argument, 80)} (ACD_MODEL is set, but the first argument is always the MODEL: "
            f"{instead})"
        )


def make_options(flags: Mapping[str, Any]) -> Options:
    """Make options of the flags that were given; the others keep their defaults."""
    flags = dict(flags)
    for name in ("grammar", "json_schema"):
        path = flags.pop(f"{name}_file", None)
        if path is not None:
            if flags.get(name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} and its -file form exclude each other")
            flags[name] = files.read_text(path, MAX_TEXT, "this is no grammar or schema")
    if flags.get("gate") is not None:
        flags["gate"] = flags["gate"] == "on"
    given = {k: v for k, v in flags.items() if k in Options.names() and v is not None and v != ()}
    for name in ("grammar", "json_schema", "stop"):
        check_text(f"--{name.replace('_', '-')}", "".join(given.get(name, "")))
    return Options().replace(given)


def check_text(name: str, text: str | None) -> None:
    """Refuse arguments that are no UTF-8: they would reach the model as question marks."""
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{name} is not UTF-8 text") from None


def check_engine_flags(flags: Mapping[str, Any]) -> None:
    """Refuse numbers that llama.cpp would overflow or abort on."""
    for name in ENGINE_RANGES:
        check_engine_number(name, flags.get(name), f"--{name.replace('_', '-')}")


def load_engine(
    model: str,
    flags: Mapping[str, Any],
    *,
    conversations: int = 1,
    slots: int | None = None,
    on_progress: Callable[[float], object] | None = None,
    on_check: Callable[[float], object] | None = None,
) -> Engine:
    check_engine_flags(flags)
    # numpy's own threads are of no use here, take 40 MB of addresses each, and their failure raises SIGINT.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from acd_local.engine import Engine

    given = {name: flags[name] for name in ENGINE_FLAGS}
    return Engine(model, **given, conversations=conversations, slots=slots, on_progress=on_progress, on_check=on_check)


def connection(address: str | None, interrupts: Interrupts) -> Callable[[], Cluster] | None:
    """Return what connects to the cluster that --ray names, None without --ray. Raises UsageError: Ray is missing."""
    if address is None:
        return None
    from acd_local import cluster

    cluster.check_installed()

    def connect() -> Cluster:
        found = cluster.Cluster(address)
        interrupts.again()
        return found

    return connect
