"""Completes commands in a shell: what may stand for a model, a pair or a file, and the command that says how.

click does the work: a shell asks a program by its variable, _ACD_RUN_COMPLETE for acd-run.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.types import StringParamType

from acd_local.cli.help import Command
from acd_local.cli.shell import completion_variable
from acd_local.errors import AcdError, UsageError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

PROGRAMS = ("acd", "acd-run", "acd-chat", "acd-serve")
SHELLS = ("bash", "zsh", "fish")


def items(names: Iterable[str], incomplete: str, *, files: bool = False) -> list[CompletionItem]:
    """Offer the names that begin as what is there, and files where the shell may offer its own."""
    from click.shell_completion import CompletionItem

    found = [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return [CompletionItem(incomplete, type="file"), *found] if files else found


class ModelType(StringParamType):
    """MODEL: a file, demo, or an alias."""

    name = "model"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from acd_local import settings

        try:
            aliases = list(settings.read().models)
        except AcdError:  # the command will say so
            aliases = []
        return items(["demo", *aliases], incomplete, files=True)


class PairType(StringParamType):
    """A pair's name or file."""

    name = "pair"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from acd_local import pairs

        names = [pairs.AS_IS, *(pair.name for pair in pairs.available())]
        return items(names, incomplete, files=True)


class FileName(click.ParamType):  # type: ignore[type-arg] # generic from click 8.4 on
    """The name of a file or folder. click.Path asks the disk at once, and fails on names that no file can have."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if isinstance(value, Path):
            return value
        if not value:
            raise UsageError("the name of a file or folder is empty")
        return Path(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return items((), incomplete, files=True)


@click.command(
    "completion",
    cls=Command,
    short_help="Print what completes the commands in your shell.",
    epilog="""\b
Put this into a file that your shell reads at its start:
  bash  ~/.bashrc                   eval "$(acd completion bash)"
  zsh   ~/.zshrc, below compinit    eval "$(acd completion zsh)"
  fish  ~/.config/fish/config.fish  acd completion fish | source""",
)
@click.argument("shell", type=click.Choice(SHELLS))
def command(shell: str) -> None:
    """Print what makes SHELL complete acd, acd-run, acd-chat and acd-serve.

    Completed are commands, options, their values, names of pairs, and models: files, demo, and your aliases.
    """
    from click.shell_completion import get_completion_class

    of = get_completion_class(shell)
    assert of is not None
    for program in PROGRAMS:
        print(of(command, {}, program, completion_variable(program)).source())
