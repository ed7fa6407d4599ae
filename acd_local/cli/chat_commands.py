"""The slash commands of acd-chat: one function each, with the line that /help shows."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from acd_local import files, pairs, quickcheck
from acd_local.chat import read_saved
from acd_local.cli.chat_app import ChatApp
from acd_local.cli.chat_why import spans
from acd_local.cli.record import pair_line, stats_lines
from acd_local.errors import PairError, UsageError, shown
from acd_local.pairs import PromptPair
from acd_local.records import pair_name

KEYS = """\
Enter sends, Alt-Enter or Ctrl-J begins a new line.
Ctrl-C stops an answer, Ctrl-D leaves, Tab completes.
A message that begins with // is sent with one / less."""


@dataclass(frozen=True)
class Command:
    """`run` returns whether the chat goes on. `choices`: what Tab offers for the argument."""

    run: Callable[[ChatApp, str], bool | None]
    argument: str
    help: str
    choices: Callable[[], Sequence[str]] | str | None = None


def run_command(app: ChatApp, line: str) -> bool:
    """Carry out a line that begins with a slash; False leaves the chat.

    Raises:
        UsageError: no such command, or a bad argument.
    """
    name, *rest = line.split(None, 1)
    command = COMMANDS.get(name)
    if command is None:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else "/help lists the commands"
        raise UsageError(f"no command {name[:40]}: {hint} (to send a message that begins with a slash, type two)")
    argument = rest[0].strip() if rest else ""
    if argument and not command.argument:
        raise UsageError(f"{name} takes nothing after it")
    if not argument and command.argument and not command.argument.startswith("["):
        raise UsageError(f"usage: {name} {command.argument}")
    return command.run(app, argument) is not False


def completions() -> Mapping[str, Callable[[], Sequence[str]] | str | None]:
    return {name: command.choices for name, command in COMMANDS.items()}


# --- The conversation -------------------------------------------------------------------------------------------------


def _help(app: ChatApp, _: str) -> None:
    rows = [(f"{name} {command.argument}".rstrip(), command.help) for name, command in COMMANDS.items()]
    width = max(len(usage) for usage, _ in rows)
    app.view.output("\n".join(f"{usage:<{width}}  {text}" for usage, text in rows) + f"\n\n{KEYS}")


def _exit(_app: ChatApp, _: str) -> bool:
    return False


def _clear(app: ChatApp, _: str) -> None:
    app.chat.clear()
    app.forget_answer()
    app.view.notice("chat cleared")


def _undo(app: ChatApp, _: str) -> None:
    if not app.chat.undo():
        raise UsageError("there is nothing to undo")
    app.forget_answer()
    left = len(app.chat.messages)
    app.view.notice(f"the last message and its answer are forgotten; {_count(left, 'message')} left")


def _regen(app: ChatApp, _: str) -> None:
    app.regenerate()


# --- Prompts and contrast ---------------------------------------------------------------------------------------------


def _system(app: ChatApp, text: str) -> None:
    if not text:
        app.view.output(app.chat.system or "(no system prompt of your own; /system TEXT sets one)")
    elif text == "-":
        app.chat.system = None
        app.view.notice("your system prompt is gone" + ("; the pair's stays" if app.chat.pair else ""))
    else:
        app.chat.use(text, app.chat.pair)
        app.view.notice("your system prompt now follows the pair's" if app.chat.pair else "your system prompt is set")


def _pair(app: ChatApp, name: str) -> None:
    if not name:
        pair = app.chat.pair
        others = [other for other in _pair_names() if other != pair_name(pair)]
        where = "no pair, the model answers as it is" if pair is None else pair.path or "made in Python"
        soft = f"\nsoft prompts in use: {pair.vectors_path}" if pair and app.engine.takes_soft(pair) else ""
        app.view.output(f"{app.pair_label}: {where}{soft}\nothers: {', '.join(others)}")
        return
    _switch_pair(app, None if name == pairs.AS_IS else pairs.find(_expanded(name)))
    app.view.notice(f"pair {app.pair_label}: {app.contrast_label()}")


def _expanded(name: str) -> str:
    try:
        return str(files.expand(name)) if name.startswith("~") else name
    except OSError as error:
        raise PairError(f"cannot read {shown(name)}: {files.reason(error)}") from None


def _switch_pair(app: ChatApp, pair: PromptPair | None) -> None:
    if app.engine.takes_soft(pair):
        app.engine.soft_pair(pair)
    app.chat.use(app.chat.system, pair)
    if pair is None or pairs.fitted(pair, app.engine.info):
        return
    if not pairs.fits(pair, app.engine.info):
        app.view.notice(f"pair {pair.name} was made for another model")
    verdict = quickcheck.kept(app.engine.info, pair, soft=app.engine.soft)
    if verdict is not None and verdict.harms:
        app.view.notice(f"pair {pair.name} does harm to this model ({verdict})")


def _set_number(option: str) -> Callable[[ChatApp, str], None]:
    def run(app: ChatApp, text: str) -> None:
        if not text:
            app.view.output(app.contrast_label(plain=False))
            return
        try:
            value = None if text == "-" else float(text)
        except ValueError:
            raise UsageError(f"{option} must be a number, not {text[:40]!r}") from None
        app.chat.options = app.chat.options.replace({option: value})
        off = " (the contrast is off: /plain turns it on)" if app.chat.options.plain and app.chat.pair else ""
        app.view.notice(app.contrast_label(plain=False) + off)

    return run


def _plain(app: ChatApp, _: str) -> None:
    app.chat.options = app.chat.options.replace({"plain": not app.chat.options.plain})
    app.view.notice(f"contrast off: {app.contrast_label()}" if app.chat.options.plain else app.contrast_label())


# --- Looking at answers -----------------------------------------------------------------------------------------------


def _compare(app: ChatApp, text: str) -> None:
    app.compare(text)


def _why(app: ChatApp, _: str) -> None:
    answer = app.last_answer()
    c = answer.contrast
    if c.alpha == 0:
        raise UsageError("the last answer was made without contrast")
    header = f"{c.changed_tokens} of {_count(c.positions, 'token')} changed by the contrast"
    if c.changed_tokens:
        header += ": [said|what the safe stream alone would have said]"
    app.view.why(header, spans(answer.tokens, app.engine.vocab.piece))


def _stats(app: ChatApp, _: str) -> None:
    answer = app.last_answer()
    app.view.output("\n".join([pair_line(app.engine, app.chat.pair, app.chat.options), *stats_lines(answer)]))


# --- Files ------------------------------------------------------------------------------------------------------------


def _save(app: ChatApp, name: str) -> None:
    try:
        path = files.expand(name)
        there = path.exists()
    except (OSError, ValueError) as error:
        raise files.write_error(name, error) from None
    if there:
        try:
            read_saved(path)
        except UsageError:
            raise UsageError(f"{shown(path)} exists and is no saved chat: give another name") from None
    app.chat.save(path)
    app.view.notice(f"saved {_count(len(app.chat.messages), 'message')} to {path}")


def _load(app: ChatApp, name: str) -> None:
    load_chat(app, name)


def load_chat(app: ChatApp, name: str, *, keep_pair: bool = False, system: str | None = None) -> None:
    """Go on with a saved chat: its turns, its system prompt, its pair where that can be found.

    Args:
        keep_pair: the pair in use stays. system: taken instead of the file's.

    Raises:
        UsageError: the file cannot be used; the chat is as it was.
    """
    record = read_saved(name)
    before = app.chat.pair, app.chat.system
    missing = None
    if not keep_pair:
        missing = _use_saved_pair(app, record.get("pair"))
    try:
        app.chat.load(name)
        if system is not None:
            app.chat.use(system, app.chat.pair)
    except UsageError:
        app.chat.pair, app.chat.system = before
        raise
    app.forget_answer()
    if app.chat.messages:
        app.view.turn(*(message.content for message in app.chat.messages[-2:]))
    app.view.notice(f"loaded {_count(len(app.chat.messages), 'message')} from {name}; pair {app.pair_label}")
    if missing:
        app.view.notice(missing)
    model = record.get("model")
    if isinstance(model, Mapping) and model.get("tokenizer") != app.engine.info.tokenizer:
        app.view.notice(f"this chat was held with another model: {str(model.get('name') or 'unknown')[:80]}")


def _use_saved_pair(app: ChatApp, saved: object) -> str | None:
    """Switch to the pair of a saved chat, by its path, else by its name; a line if neither is there."""
    if not isinstance(saved, str) or not saved:
        return "the file names no pair: the current one stays"
    if saved == pairs.AS_IS:
        app.chat.pair = None
        return None
    for candidate in (saved, Path(saved).stem):
        try:
            pair = pairs.find(candidate)
            if app.engine.takes_soft(pair):
                app.engine.soft_pair(pair)
        except PairError:
            continue
        app.chat.pair = pair
        return None
    lacking = "there with soft prompts" if app.engine.soft else "there"
    return f"its pair {saved[:200]} is not {lacking}: pair {pair_name(app.chat.pair)} stays"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _pair_names() -> list[str]:
    return [*(pair.name for pair in pairs.available()), pairs.AS_IS]


COMMANDS: dict[str, Command] = {
    "/help": Command(_help, "", "this list"),
    "/exit": Command(_exit, "", "leave"),
    "/quit": Command(_exit, "", "leave"),
    "/clear": Command(_clear, "", "forget the conversation"),
    "/undo": Command(_undo, "", "forget the last message and its answer"),
    "/regen": Command(_regen, "", "answer the last message again, with a new seed"),
    "/system": Command(_system, "[TEXT]", "show or set your system prompt, - removes it"),
    "/pair": Command(_pair, "[NAME|FILE]", "show or change the prompt pair, as-is for none", _pair_names),
    "/alpha": Command(_set_number("alpha"), "[X]", "show or set the contrast's strength, - for the pair's"),
    "/beta": Command(_set_number("beta"), "[X]", "show or set the plausibility limit, - for the pair's"),
    "/plain": Command(_plain, "", "switch the contrast off or on"),
    "/compare": Command(_compare, "TEXT", "answer TEXT with and without contrast, outside the chat"),
    "/why": Command(_why, "", "what the contrast changed in the last answer"),
    "/stats": Command(_stats, "", "figures of the last answer"),
    "/save": Command(_save, "FILE", "write the conversation to FILE", "files"),
    "/load": Command(_load, "FILE", "go on with a saved conversation", "files"),
}
