"""Lays out --help: daily options first, the rest by section, and the same foot for all commands."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

from acd_local.cli.shell import EXIT_CODES

F = TypeVar("F", bound=Callable[..., Any])

WIDTH = 100  # columns at most, however wide the terminal is
SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": WIDTH}
SECTIONS = ("Server", "Options", "Contrast and gate", "Model", "Limits and form", "Samplers", "For programs")
_COLUMN = 30  # columns for the options' names
_HYPHEN = "\N{NON-BREAKING HYPHEN}"

FOOT = f"""\b
Environment:
  ACD_MODEL        MODEL where none is given
  ACD_THREADS      CPU threads where -t does not say
  ACD_PROMPTS_DIR  a folder with pairs, searched first
  ACD_CONFIG_DIR   folder of your pairs and settings (acd config shows it)
  ACD_CACHE_DIR    folder of what can be made again
  ACD_DEBUG=1      shows the traceback of an internal error

{EXIT_CODES}"""


def foot(*examples: str) -> str:
    """Make the text below the options.

    Args:
        examples: command lines, each of 76 columns at most.
    """
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in examples), "", FOOT])


class HelpText(click.HelpFormatter):
    """A formatter that breaks no line within a word such as gate-acd, which somebody may want to copy."""

    def write_text(self, text: str) -> None:
        super().write_text(text.replace("-", _HYPHEN))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl([(name, text.replace("-", _HYPHEN)) for name, text in rows], col_max, col_spacing)

    def getvalue(self) -> str:
        return super().getvalue().replace(_HYPHEN, "-")


class Context(click.Context):
    """A context whose --help is written by `HelpText`."""

    formatter_class = HelpText


class Command(click.Command):
    """A command whose --help has sections, and says of options what their help texts say, and no more."""

    context_class = Context

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {name: [] for name in SECTIONS}
        for option in self.get_params(ctx):
            if isinstance(option, click.Option) and (row := option.get_help_record(ctx)) is not None:
                sections[getattr(option, "section", "Options")].append((row[0], option.help or ""))
        lengths = [len(flag) for rows in sections.values() for flag, _ in rows]
        widest = max(n for n in lengths if n <= _COLUMN)  # the texts of longer ones go below them
        for name, rows in sections.items():
            if rows:
                with formatter.section(name):
                    formatter.write_dl([(flag.ljust(widest), text) for flag, text in rows], col_max=widest)


class Group(click.Group):
    """A group of commands with the same help."""

    context_class = Context
    command_class = Command
    group_class = type


def in_section(title: str, *options: Callable[[Any], Any]) -> Callable[[F], F]:
    """Return a decorator that gives a command these options, in one section of its --help."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
            function.__click_params__[-1].section = title  # type: ignore[attr-defined]
        return function

    return decorate
