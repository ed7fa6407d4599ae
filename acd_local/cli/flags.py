"""Command line flags that several commands share, and how they become an engine and its options."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from acd_local import files, settings
from acd_local.cli.completion import FileName, ModelType, PairType
from acd_local.cli.help import in_section
from acd_local.errors import ModelError, PairError, UsageError, shown
from acd_local.options import ENGINE_RANGES, OVERFLOWS, Options, check_engine_number

if TYPE_CHECKING:
    from acd_local.cli.shell import Interrupts
    from acd_local.cluster import Cluster
    from acd_local.engine import Engine

F = TypeVar("F", bound=Callable[..., Any])


MODEL, PAIR, FILE = ModelType(), PairType(), FileName()
MAX_TEXT = 16_000_000  # bytes of a grammar's or schema's file
ENGINE_FLAGS = ("pair", "draft", "soft", "ctx_size", "threads", "gpu_layers", "kv_type", "layout", "cache")


# Defaults from the user's settings, which are read only where an option is not given.


def _settings() -> settings.Settings:
    """Read the settings, but not for a shell that completes a line: what is wrong with them is told by the command."""
    completing = click.get_current_context().resilient_parsing
    return settings.Settings(None) if completing else settings.read()


def _default_threads() -> int | None:
    return None if os.environ.get("ACD_THREADS", "").strip() else _settings().threads


def _default_ctx_size() -> int | None:
    return _settings().ctx_size


def _default_gate() -> str | None:
    return "off" if _settings().gate is False else None  # true: on where the pair has one, which is the default


def _default_pair() -> str | None:
    """Return the settings' pair; where it cannot be used, the error names the settings too."""
    from acd_local import pairs

    found = _settings()
    try:
        if found.pair not in (None, pairs.AS_IS):
            pairs.find(found.pair)
    except PairError as error:
        raise PairError(f"{found.place('pair')}: pair: {error}") from None
    return found.pair


threads_flag = click.option(
    "--threads",
    "-t",
    type=click.IntRange(*ENGINE_RANGES["threads"]),
    default=_default_threads,
    metavar="N",
    help="CPU threads; default: $ACD_THREADS or the cores.",
)

ray_flag = click.option(
    "--ray",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    help="Share the work with a Ray cluster at HOST:PORT; without an address, among groups of --threads cores of this "
    "machine; needs the extra 'ray'.",
)

pair_flag = click.option(
    "--pair",
    type=PAIR,
    default=_default_pair,
    metavar="NAME|FILE",
    help="Prompt pair, or as-is for none; default: the one made for the model, else what a quick check finds.",
)
_NUMBERS = {field.name: field for field in dataclasses.fields(Options) if "range" in field.metadata}


def _number(name: str, *short: str) -> Callable[[F], F]:
    """Make the flag of an option that is a number, with the option's own help."""
    field, whole = _NUMBERS[name], "int" in str(_NUMBERS[name].type)
    text = field.metadata["help"] + ("" if field.default is None else f"; default {field.default:g}.")
    kind, metavar = (int, "N") if whole else (float, "X")
    return click.option(f"--{name.replace('_', '-')}", *short, type=kind, metavar=metavar, help=text)


# Help texts name the defaults by hand: None on the command line means "not given", so that a pair can decide.
_DAILY = (_number("max_tokens", "-n"), pair_flag, _number("temp"), _number("seed"))
_CONTRAST = (
    *map(_number, ("alpha", "beta")),
    click.option(
        "--gate",
        type=click.Choice(["on", "off"]),
        default=_default_gate,
        help="Contrast only what the pair's gate finds harmful, or every answer; default: on where the pair has one.",
    ),
    _number("gate_threshold"),
    click.option(
        "--soft/--no-soft",
        default=None,
        help="The pair's soft prompts (NAME.safetensors), or its texts; default: what the pair prefers.",
    ),
    click.option("--plain", is_flag=True, help="The safe prompt alone, no contrast."),
    _number("window"),
    click.option("--raw-contrast", is_flag=True, help="Do not divide by 1 - alpha; with --beta 0 the paper's formula."),
)
_MODEL = (
    threads_flag,
    click.option(
        "--ctx-size",
        "-c",
        type=int,
        default=_default_ctx_size,
        metavar="N",
        help="Tokens that each stream holds; default 4096 or the model's limit.",
    ),
    click.option(
        "--gpu-layers",
        "-ngl",
        type=int,
        metavar="N",
        help="Layers on the GPU, -1 for all; default: all where the build can.",
    ),
    click.option(
        "--draft",
        type=MODEL,
        metavar="MODEL",
        help="A smaller model of the same vocabulary that proposes tokens: the same answers, sooner where they are "
        "easy to guess.",
    ),
    _number("draft_max"),
    click.option("--kv-type", type=click.Choice(["f16", "q8_0"]), default="f16", help="KV cache type; default f16."),
    click.option(
        "--layout",
        type=click.Choice(["shared", "split"]),
        default="shared",
        help="Both streams in one llama_context, or one each; default shared.",
    ),
    click.option(
        "--cache/--no-cache",
        default=None,
        help="Keep what conversations decoded on disk for later starts, or nothing; default: system prompts.",
    ),
)
_FORM = (
    click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; may be repeated."),
    click.option(
        "--overflow",
        type=click.Choice(OVERFLOWS),
        help="Where a conversation outgrows the context: drop its oldest turns, or fail; default drop.",
    ),
    click.option("--json-schema", metavar="JSON", help="JSON schema that the answer must follow."),
    click.option("--json-schema-file", type=FILE, metavar="FILE", help="The same from a file."),
    click.option("--grammar", metavar="GBNF", help="GBNF grammar that the answer must follow."),
    click.option("--grammar-file", type=FILE, metavar="FILE", help="The same from a file."),
)
_ELSEWHERE = ("max_tokens", "temp", "seed", "alpha", "beta", "window", "gate_threshold", "draft_max")
_SAMPLERS = tuple(_number(name) for name in _NUMBERS if name not in _ELSEWHERE)


anchors_flag = click.option(
    "--anchors",
    type=FILE,
    metavar="FILE",
    help='Your own instructions, JSON lines of {"prompt": ..., "kind": "harmful" or "harmless"}, and "lookalike": true '
    "where a harmless one looks dangerous; default: built in.",
)


def answer_flags(function: F) -> F:
    """Give a command the options of a model and of its answers."""
    for title, options in (
        ("Samplers", _SAMPLERS),
        ("Limits and form", _FORM),
        ("Model", _MODEL),
        ("Contrast and gate", _CONTRAST),
        ("Options", _DAILY),
    ):
        function = in_section(title, *options)(function)
    return function


def resolve_model(model: str | None, *, instead: str = "leave it out to use that") -> str:
    """Return the MODEL argument, or the model of ACD_MODEL or the settings where no argument is given at all.

    Args:
        instead: what to write where the argument was meant for that model, {model}; "" if it cannot have been.

    Raises:
        ModelError: there is such a model, and the argument is none.
        UsageError: there is none, or the settings are broken.
    """
    if model is None:
        model = _default_model()
    elif instead and model:
        _check_is_model(model, instead)
    if not model:
        raise UsageError(
            "no model: give a GGUF file, 'demo', 'hf:owner/repo/file.gguf' or an alias, set ACD_MODEL, or a model of "
            "your own by `acd config set model MODEL`"
        )
    return model


def _default_model() -> str | None:
    """Return the model that is set; where the settings' cannot be found, the error names them too."""
    from acd_local import models

    default = settings.default_model()
    if default is None or os.environ.get("ACD_MODEL"):
        return default and default[0]
    try:
        if not default[0].startswith("hf:"):  # which would be downloaded
            models.resolve(default[0])
    except ModelError as error:
        raise ModelError(f"{settings.read().place('model')}: model: {error}") from None
    return default[0]


def _check_is_model(argument: str, instead: str) -> None:
    if argument == "demo" or argument.startswith("hf:") or argument.endswith(".gguf") or settings.alias(argument):
        return
    if (default := settings.default_model()) is None:
        return
    try:
        there = Path(argument).exists() or files.expand(argument).exists()
    except (OSError, ValueError):  # too long for a name, as prompts are
        there = False
    if not there:
        model, why = default
        name = '"$ACD_MODEL"' if os.environ.get("ACD_MODEL") else shown(model)
        raise ModelError(
            f"no such file: {shown(argument, 80)} ({why}, but the first argument is always the MODEL: "
            f"{instead.format(model=name)})"
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
    from acd_local.ahead import open_ahead

    ahead = open_ahead(model, gpu_layers=flags["gpu_layers"], on_progress=on_progress)
    given = {name: flags[name] for name in ENGINE_FLAGS}
    given |= {"conversations": conversations, "slots": slots, "on_progress": on_progress, "on_check": on_check}
    with ahead or nullcontext():
        from acd_local.engine import Engine  # takes some 0.1 s, while the file is loaded

        return Engine(ahead or model, **given)


def connection(address: str | None, interrupts: Interrupts) -> Callable[[], Cluster] | None:
    """Return what connects to the cluster that --ray names, None without --ray.

    Raises:
        UsageError: it names none, or Ray is missing.
    """
    if address is None:
        return None
    if not address:  # Ray would start a cluster of its own
        raise UsageError("--ray needs an address: HOST:PORT, auto, or local")
    from acd_local import cluster

    cluster.check_installed()

    def connect() -> Cluster:
        found = cluster.Cluster(address)
        interrupts.again()
        return found

    return connect
