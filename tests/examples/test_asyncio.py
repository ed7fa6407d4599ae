"""The asyncio example: several answers at once, a timeout, Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
from example_programs import EXAMPLES, Program

QUESTIONS = ["What is the capital of France?", "Name a colour."]


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    programs = []

    def make(*args: str) -> Program:
        programs.append(Program([sys.executable, str(EXAMPLES / "asyncio" / "answers.py"), *args]))
        return programs[-1]

    yield make
    for program in programs:
        program.kill()


def test_it_answers_all_questions(start: Callable[..., Program]) -> None:
    code, out, err = start("demo", *QUESTIONS, "--max-tokens", "4").end()
    assert (code, err[-14:]) == (0, "\rloading 100%\n")
    first, _, second = out.partition(f"\n{QUESTIONS[1]}\n")
    assert first.startswith(QUESTIONS[0]) and first.removeprefix(QUESTIONS[0]).strip() and second.strip()


def test_a_slow_answer_is_stopped(start: Callable[..., Program]) -> None:
    code, out, _ = start("demo", *QUESTIONS, "--timeout", "0.05").end()
    assert (code, out.count("... (stopped after 0.05 s)\n")) == (0, 2)


def test_ctrl_c_ends_it(start: Callable[..., Program]) -> None:
    program = start("demo", *QUESTIONS * 3)
    program.until("err", "loading 100%\n")
    program.interrupt()
    code, out, err = program.end()
    assert (code, out, "Traceback" in err) == (130, "", False)


def test_errors_are_one_line(start: Callable[..., Program]) -> None:
    code, out, err = start("nosuch.gguf").end()
    assert (code, out, err.count("\n")) == (1, "", 1) and err.startswith("answers.py: no such file: nosuch.gguf")
