"""Offers acd config: shows the user's settings and what is in force, and changes them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.types import StringParamType

from acd_local import settings
from acd_local.cli import completion, help
from acd_local.cli.shell import one_line
from acd_local.errors import AcdError, UsageError, shown
from acd_local.options import refuse_unknown

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

# What holds where neither the settings nor the environment say anything.
DEFAULTS = {
    "model": "none: commands need MODEL",
    "pair": "the model's own, else by a quick check",
    "threads": "the physical cores",
    "ctx_size": "4096 or the model's limit",
    "gate": "on where the pair has one",
}
VARIABLES = {"model": "ACD_MODEL", "threads": "ACD_THREADS"}


class KeyType(StringParamType):
    """A setting's key, for completion."""

    name = "key"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            aliases = settings.read().models
        except AcdError:
            aliases = {}
        return completion.items((*settings.KEYS, *(f"{settings.ALIASES}.{name}" for name in aliases)), incomplete)


@click.group(
    "config",
    cls=help.Group,
    invoke_without_command=True,
    no_args_is_help=False,
    short_help="Show and change your settings.",
    epilog=f"""\b
Keys:
  model        MODEL where a command names none
  pair         --pair of acd-run, acd-chat and acd-serve; as-is for none
  threads      --threads of every command
  ctx_size     --ctx-size of acd-run, acd-chat and acd-serve
  gate         off: --gate off of these three; on is the default
  models.NAME  what NAME stands for where MODEL is taken: a file, demo or
               hf:owner/repo/file.gguf

An option wins over an environment variable (ACD_MODEL, ACD_THREADS), and that over the settings.

{
        help.foot(
            "acd config set models.coder ~/models/coder.gguf", "acd config set model coder", "acd config unset model"
        )
    }""",
)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Show your settings: where they are, and what is in force and why; set and unset change them.

    They are a TOML file, whose comments stay when it is changed.
    """
    if ctx.invoked_subcommand is None:
        for line in _lines():
            print(line)


def _lines() -> Iterator[str]:
    found = settings.read()
    there = "" if found.source else " (not there: nothing is set)"
    yield f"file         {one_line(str(found.path or 'none: this user has no configuration folder'))}{there}"
    for key in settings.KEYS:
        value, why = _in_force(found, key)
        yield f"{key:<12} {one_line(value)}  ({one_line(why)})"
    for name, target in found.models.items():
        yield f"{f'models.{name}':<12} {one_line(target)}  ({_line(found, f'models.{name}')})"


def _in_force(found: settings.Settings, key: str) -> tuple[str, str]:
    """Say what holds where no option is given, and who decides it."""
    value = getattr(found, key)
    its = None if value is None else {True: "on", False: "off"}.get(value, str(value)) if key == "gate" else str(value)
    variable = VARIABLES.get(key, "")
    if chosen := os.environ.get(variable, "").strip():
        return chosen, f"${variable}" + ("" if its is None else f"; {_line(found, key)} of the file says {its}")
    return (DEFAULTS[key], "default") if its is None else (its, _line(found, key))


def _line(found: settings.Settings, key: str) -> str:
    return f"line {found.line(key)}"


@command.command("set", short_help="Set a value.")
@click.argument("key", type=KeyType())
@click.argument("value")
def set_value(key: str, value: str) -> None:
    """Set KEY to VALUE: acd config set threads 4, acd config set models.coder ~/models/coder.gguf.

    `acd config --help` lists the keys. Comments in the file stay. A model or a pair that is not there is refused.
    """
    print(f"{one_line(key)} set in {one_line(str(settings.set_value(key, _read(key, value))))}")


@command.command("unset", short_help="Remove a value.")
@click.argument("key", type=KeyType())
def unset(key: str) -> None:
    """Remove KEY from the settings, so that the default holds again."""
    print(f"{one_line(key)} removed from {one_line(str(settings.unset(key)))}")


def _read(key: str, text: str) -> str | int | bool:
    """Read a value from the command line, and look whether what it names is there."""
    from acd_local import models, pairs

    if settings.alias_of(key) is None:
        refuse_unknown([key], settings.KEYS)
    if key == "gate":
        gates = {"on": True, "true": True, "off": False, "false": False}
        if text.lower() not in gates:
            raise UsageError(f"gate must be on or off, not {shown(text, 40)!r}")
        return gates[text.lower()]
    if key in ("threads", "ctx_size"):
        return int(text) if re.fullmatch(r"-?[0-9]{1,9}", text) else text  # the check says what is wrong
    if key == "pair":
        found = None if text == pairs.AS_IS else pairs.find(text)
        return str(Path(text).absolute()) if found and text != found.name else text
    if not text.startswith("hf:"):  # which would be downloaded
        models.resolve(text)
    if (known := settings.alias(text)) is not None:
        return text if key == "model" else known[0]
    return text if text == "demo" or text.startswith(("hf:", "~")) else str(Path(text).absolute())
