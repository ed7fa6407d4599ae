"""--help as a user reads it: every command, on a terminal of 80 columns and of 100."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest

from acd_local.cli import chat, main, run, serve
from acd_local.cli.shell import run_cli

PROGRAMS = {"acd": main.command, "acd-run": run.command, "acd-chat": chat.command, "acd-serve": serve.command}
ANSWERING = ("acd-run", "acd-chat", "acd-serve")


def subcommands(group: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Paths of a command and of all below it, as they are typed."""
    yield path
    for name, command in getattr(group, "commands", {}).items():
        if (*path, name) != ("acd", "eval", "run"):  # which needs no name
            yield from subcommands(command, (*path, name))


COMMANDS = [path for name, command in PROGRAMS.items() for path in subcommands(command, (name,))]


def help_of(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    assert run_cli(PROGRAMS[path[0]], path[0], [*path[1:], "--help"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_fits_and_says_what_each_option_is(
    path: tuple[str, ...], columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = help_of(path, capsys)
    assert text.startswith(f"Usage: {' '.join(path)} ")
    assert max(map(len, text.splitlines())) < columns
    assert not re.search(r"INTEGER|FLOAT|<=x|x>=|[a-z]\.\.\.$|\N{NON-BREAKING HYPHEN}", text, re.MULTILINE), "noise"
    assert not re.search(r"\w-$", text, re.MULTILINE), "a word is broken at its hyphen"
    for line in text.splitlines():  # an option has a text, beside it or below
        if re.match(r"  -", line) and not re.search(r"\S  +\S", line.strip()):
            below = text.splitlines()[text.splitlines().index(line) + 1]
            assert below.startswith(" " * 20), line


@pytest.mark.parametrize("program", ANSWERING)
def test_daily_options_come_first_and_samplers_have_a_section(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of((program,), capsys)
    sections = dict(re.findall(r"^(\w[\w ]*):\n((?:  .*\n)+)", text, re.MULTILINE))
    named = {title: re.findall(r"^  (?:-\w+, )?(--[a-z-]+)", body, re.MULTILINE) for title, body in sections.items()}
    assert named["Options"][:5] == ["--system", "--max-tokens", "--pair", "--temp", "--seed"]
    order = [title for title in named if title != "Server"]
    assert order[:5] == ["Options", "Contrast and gate", "Model", "Limits and form", "Samplers"]
    assert {"--top-k", "--mirostat-ent", "--dry-base"} < {*named["Samplers"]}
    assert not {"--grammar", "--temp", "--seed", "--alpha"} & {*named["Samplers"]}
    if program == "acd-serve":
        assert next(iter(named)) == "Server" and named["Server"][:4] == ["--host", "--port", "--token", "--lock"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_ends_with_examples_variables_and_exit_codes(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of((program,), capsys)
    places = [text.index(f"\n  {title}:\n") for title in ("Examples", "Environment", "Exit codes")]
    assert places == sorted(places)


def test_every_example_is_a_command_line_that_the_parser_takes() -> None:
    """Options in examples exist: a text that is never run grows old."""
    for path in COMMANDS:
        command = PROGRAMS[path[0]]
        for name in path[1:]:
            command = command.commands[name]  # type: ignore[attr-defined]
        found = re.search(r"\x08\nExamples:\n((?:  .*\n)+)", f"{command.epilog}\n")
        for line in found[1].splitlines() if found else ():
            program = next((word for word in re.findall(r"\bacd[\w-]*", line)), None)
            known = {"--help"}
            if program in PROGRAMS:
                known |= _options(PROGRAMS[program])
            else:
                known |= _options(command)
            assert set(re.findall(r" (--[a-z-]+)", line)) <= known | {"--set"}, line


def _options(command: click.Command) -> set[str]:
    own = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return own.union(*(_options(below) for below in getattr(command, "commands", {}).values()))
