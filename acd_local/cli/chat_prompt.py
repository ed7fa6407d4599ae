"""The prompt of a chat at a terminal: several lines, history, completion, a bottom line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth, create_output
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.styles import Style

from acd_local import files
from acd_local.cli.chat_input import PROMPT

Choices = Callable[[], Sequence[str]]
STYLE = Style.from_dict({"prompt": "bold", "bottom-toolbar": "noreverse ansibrightblack", "bottom-toolbar.text": ""})


class PromptSource:
    """Enter sends, Alt-Enter or Ctrl-J begins a new line, pasted lines stay together, Tab completes commands.

    Args:
        toolbar: the bottom line for a width in columns.
        commands: every command, and what its argument may be: some words, "files", or None where nothing is known.
    """

    def __init__(
        self, toolbar: Callable[[int], str], commands: Mapping[str, Choices | str | None], *, no_color: bool = False
    ) -> None:
        output = create_output(stdout=sys.stdout if sys.stdout.isatty() else sys.stderr)
        self._session: PromptSession[str] = PromptSession(
            [("class:prompt", PROMPT)],
            multiline=True,
            prompt_continuation=" " * len(PROMPT),
            history=history(),
            key_bindings=_key_bindings(),
            completer=CommandCompleter(commands),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            bottom_toolbar=lambda: toolbar(output.get_size().columns),
            style=STYLE,
            color_depth=ColorDepth.MONOCHROME if no_color else None,
            output=output,
        )

    def read(self, draft: str = "") -> str | None:
        """See `chat_input.Source`."""
        try:
            return self._session.prompt(default=draft)
        except EOFError:
            return None


def history() -> FileHistory | InMemoryHistory:
    """Return the typed messages, remembered between chats where the user has a folder for them."""
    folder = files.data_dir()
    return InMemoryHistory() if folder is None else History(folder / "history")


class History(FileHistory):
    """For the user's eyes alone; a folder that cannot be written just means no memory."""

    def __init__(self, path: Path) -> None:
        with suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_APPEND, 0o600))
        super().__init__(path)

    def load_history_strings(self) -> Iterable[str]:
        with suppress(OSError):
            return list(super().load_history_strings())
        return []

    def store_string(self, string: str) -> None:
        with suppress(OSError, ValueError):
            super().store_string(string)


class CommandCompleter(Completer):
    """/commands, and their arguments."""

    def __init__(self, commands: Mapping[str, Choices | str | None]) -> None:
        self._commands = commands
        self._files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/"):
            return
        name, space, argument = text.partition(" ")
        if not space:
            yield from _matching(text, [*self._commands])
            return
        choices = self._commands.get(name)
        if choices == "files":
            yield from self._files.get_completions(Document(argument), complete_event)
        elif callable(choices):
            yield from _matching(argument, choices())


def _matching(start: str, words: Iterable[str]) -> Iterable[Completion]:
    return (Completion(word, start_position=-len(start)) for word in words if word.startswith(start))


def _key_bindings() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    @keys.add("<sigint>")
    def give_up(event: KeyPressEvent) -> None:
        """Forget the text, if there is any (the history does not); without, the chat says how to leave."""
        if event.current_buffer.text:
            event.current_buffer.reset(append_to_history=True)
        else:
            event.app.exit(exception=KeyboardInterrupt)

    return keys


@contextmanager
def quiet_keyboard() -> Iterator[None]:
    """Make keys wait, between prompts, for the next one instead of being echoed into an answer; Ctrl-C still works."""
    restore = _silence()
    try:
        yield
    finally:
        restore()


def _silence() -> Callable[[], None]:
    """Silence the terminal; return what undoes it."""

    def nothing() -> None:
        pass

    if sys.platform == "win32":
        return nothing
    import termios

    try:
        fd = sys.stdin.fileno()
        old = termios.tcgetattr(fd)
        quiet = [old[0] & ~termios.ICRNL, *old[1:3], old[3] & ~(termios.ECHO | termios.ICANON), *old[4:]]
        termios.tcsetattr(fd, termios.TCSADRAIN, quiet)
    except (termios.error, OSError, ValueError):
        return nothing

    def restore() -> None:
        with suppress(termios.error, OSError):
            termios.tcsetattr(fd, termios.TCSADRAIN, old)

    return restore
