"""acd-chat: a conversation on the terminal, or line by line through a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from acd_local import __version__
from acd_local.cli import flags, help
from acd_local.cli.progress import load_with_status
from acd_local.cli.shell import Interrupts, leave, run_cli, say

if TYPE_CHECKING:
    from acd_local.cli.chat_app import ChatApp
    from acd_local.cli.chat_input import Source
    from acd_local.cli.chat_signals import Signals
    from acd_local.engine import Engine
    from acd_local.options import Options

PROGRAM = "acd-chat"


@click.command(
    cls=help.Command,
    epilog=help.foot(
        "acd-chat demo",
        'acd-chat model.gguf --system "You write for children."',
        "acd-chat model.gguf --load holiday.json",
        'printf "Why is the sky blue?\\nAnd at night?\\n" | acd-chat demo',
    ),
    context_settings=help.SETTINGS,
)
@click.argument("model", required=False, type=flags.MODEL)
@click.option("--system", "-s", metavar="TEXT", help="Your own system prompt; it follows the pair's.")
@flags.answer_flags
@click.option(
    "--load", type=flags.FILE, metavar="FILE", help="Go on with a saved chat; --pair and --system win over its own."
)
@click.option("--no-color", is_flag=True, help="No colours; NO_COLOR does the same.")
@click.version_option(__version__, prog_name=PROGRAM)
def command(model: str | None, **given: Any) -> int:
    """Chat with MODEL, decoded by the contrast of two opposite system prompts.

    MODEL is a GGUF file, demo, hf:owner/repo/file.gguf or an alias of yours; left out, it is $ACD_MODEL, or the model
    of your settings (acd config).

    /help in the chat lists its commands, Ctrl-C stops an answer, and Ctrl-D leaves. Without a terminal each line of
    stdin is one message, and only answers go to stdout.
    """
    model = flags.resolve_model(model)
    flags.check_text("--system", given["system"])
    options = flags.make_options(given)
    with Interrupts() as interrupts:
        engine = load_with_status(model, given)
        if not _is_terminal(sys.stdin):
            from acd_local.cli.chat_signals import PipeSignals

            with engine:
                return _converse(engine, options, given, PipeSignals(interrupts))
    from acd_local.cli.chat_signals import TerminalSignals

    with TerminalSignals() as signals, engine:
        return _converse(engine, options, given, signals)


def _converse(engine: Engine, options: Options, given: dict[str, Any], signals: Signals) -> int:
    from acd_local.cli.chat_app import ChatApp
    from acd_local.cli.chat_commands import load_chat
    from acd_local.cli.chat_loop import run

    if engine.warning:
        say(f"{PROGRAM}: {engine.warning}")
    app = ChatApp(engine, _view(given), signals, options, given["system"])
    if _is_terminal(sys.stdin):
        app.view.notice(f"{app.model_name} · pair {app.pair_label} · /help lists commands, Ctrl-D leaves")
    if given["load"] is not None:
        typed = click.get_current_context().get_parameter_source("pair") is ParameterSource.COMMANDLINE
        load_chat(app, str(given["load"]), keep_pair=typed, system=given["system"])
    if sys.stdin is not None:
        with _source(app, given) as source:
            run(app, source)
    return 0


def _view(given: dict[str, Any]) -> Any:
    if _is_terminal(sys.stdin) and _is_terminal(sys.stdout) and not _is_dumb():
        from acd_local.cli.chat_rich import RichView, open_console

        return RichView(open_console(no_color=given["no_color"]))
    from acd_local.cli.chat_view import PlainView

    return PlainView(sys.stdout)


@contextmanager
def _source(app: ChatApp, given: dict[str, Any]) -> Iterator[Source]:
    """Open the prompt on a terminal that it can draw on: stdout, or stderr where stdout is redirected."""
    at_terminal = _is_terminal(sys.stdin)
    if at_terminal and not _is_dumb() and (_is_terminal(sys.stdout) or _is_terminal(sys.stderr)):
        from acd_local.cli.chat_commands import completions
        from acd_local.cli.chat_prompt import PromptSource, quiet_keyboard

        with quiet_keyboard():
            yield PromptSource(app.toolbar, completions(), no_color=given["no_color"])
    else:
        from acd_local.cli.chat_input import LineSource

        yield LineSource(sys.stdin.buffer, sys.stderr if at_terminal else None)


def _is_terminal(stream: Any) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def _is_dumb() -> bool:
    return os.environ.get("TERM", "") in ("dumb", "unknown")


def main() -> None:
    leave(run_cli(command, PROGRAM))
