"""acd-chat through a pipe."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_desk import PlainAnswer, chat

from acd_local import Engine, Options
from acd_local.cli import chat as chat_cli
from acd_local.cli import main as main_cli
from acd_local.cli.chat_input import LineSource
from acd_local.cli.chat_view import PlainView
from acd_local.cli.shell import run_cli
from acd_local.errors import UsageError


def test_piped_chat_prints_answers_and_nothing_else(
    tiny: Callable[..., Path], engine: Engine, pair_file: Path, tmp_path: Path
) -> None:
    """Commands, errors and end of input; and a saved chat goes on in another process as if it had not stopped."""
    model, saved = tiny("chatml"), tmp_path / "chat.json"
    lines = ["What is blue?", "", "And red?", "/nonsense", "/alpha much", f"/save {saved}", "And wine?", "/stats"]
    done = chat(model, "\n".join(lines), "--pair", str(pair_file), "--ctx-size", "512")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr

    same = engine.chat(options=Options(temp=0, max_tokens=12))
    answers = [same.ask(question).text for question in ("What is blue?", "And red?", "And wine?")]
    shown = [PlainAnswer(answer).text for answer in answers]
    assert done.stdout.startswith("\n".join(shown) + "\npair ")
    assert "no command /nonsense" in done.stderr and "alpha must be a number, not 'much'" in done.stderr
    assert [m["content"] for m in json.loads(saved.read_text())["messages"]][1::2] == answers[:2]

    again = chat(model, f"/load {saved}\nAnd wine?\n", "--ctx-size", "512")
    assert again.returncode == 0 and again.stdout == shown[2]
    assert "loaded 4 messages" in again.stderr and "pair short" in again.stderr


def test_an_argument_that_was_meant_for_the_model_of_the_environment(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACD_MODEL", str(tiny("chatml")))
    for program, command, args in (
        ("acd-chat", chat_cli.command, ["hello there"]),
        ("acd", main_cli.command, ["eval", "hello there"]),
        ("acd", main_cli.command, ["bench", "hello there"]),
    ):
        assert run_cli(command, program, args) == 3
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert "no such file: hello there (ACD_MODEL is set, but" in captured.err and "leave it out" in captured.err


def test_bad_arguments_end_with_the_documented_codes(tiny: Callable[..., Path], tmp_path: Path) -> None:
    assert chat(tmp_path / "none.gguf", "").returncode == 3
    missing = chat(tiny("chatml"), "", "--pair", "as-is", "--load", str(tmp_path / "none.json"))
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1


def test_help_is_quick_to_import() -> None:
    code = (
        "import sys; from acd_local.cli import chat; "
        "print(sorted({'rich','prompt_toolkit','numpy','llama_cpp'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_plain_answer_ends_with_one_newline_and_is_disarmed(capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainView(sys.stdout)
    for text in ("one\n\n", "", "\x1b[2Jtwo"):
        with view.answer() as writer:
            for character in text:
                writer.write(character)
            writer.finish("(stopped)" if not text else None)
    view.notice("line\nwith \x1b[31mcolour")
    shown = capsys.readouterr()
    assert shown.out == "one\n\n\n\n␛[2Jtwo\n"
    assert shown.err == "acd-chat: (stopped)\nacd-chat: line with ␛[31mcolour\n"


def test_lines_that_are_no_text_are_refused_and_the_rest_is_read() -> None:
    source = LineSource(io.BytesIO(b"\xef\xbb\xbffirst\r\n\xff\nlast"))
    assert source.read() == "first"
    with pytest.raises(UsageError, match="line 2"):
        source.read()
    assert (source.read(), source.read()) == ("last", None)
