"""Takes the lines of a chat, and sends them or carries them out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from acd_local.cli.chat_app import ChatApp
from acd_local.cli.chat_commands import run_command
from acd_local.errors import AcdError, UsageError

if TYPE_CHECKING:
    from acd_local.cli.chat_input import Source


def run(app: ChatApp, source: Source) -> None:
    """Chat until the end of the input or /exit."""
    while True:
        draft, app.draft = app.draft, ""
        try:
            line = source.read(draft)
            if line is None or not handle(app, line):
                return
        except UsageError as error:
            app.view.notice(str(error))
        except KeyboardInterrupt:
            app.view.notice("Ctrl-D or /exit leaves the chat")


def handle(app: ChatApp, line: str) -> bool:
    """Carry out a command or send a message; False after /exit. Errors are shown, and the chat goes on."""
    if not line.strip():
        return True
    is_command = line.startswith("/") and not line.startswith("//")
    try:
        if is_command:
            return run_command(app, line)
        app.say(line[1:] if line.startswith("//") else line)
        return True
    except AcdError as error:
        app.view.notice(str(error))
    except OSError:  # nobody reads, or the disk that stdout goes to is full
        raise
    except Exception as error:
        app.view.notice(f"internal error: {type(error).__name__}: {error}")
    if not is_command:
        app.draft = line
    return True
