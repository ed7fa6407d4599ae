"""acd-chat: piped, on a pseudo terminal, and its parts."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from manual import made_for
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from rich.console import Console

from acd_local import Engine, Options, pairs, quickcheck
from acd_local.answers import TokenRecord
from acd_local.cli import chat as chat_cli
from acd_local.cli import main as main_cli
from acd_local.cli.chat_app import ChatApp
from acd_local.cli.chat_commands import COMMANDS, completions
from acd_local.cli.chat_input import LineSource
from acd_local.cli.chat_loop import handle
from acd_local.cli.chat_markdown import MarkdownWriter, finished_length, render
from acd_local.cli.chat_prompt import CommandCompleter, History
from acd_local.cli.chat_rich import RichView
from acd_local.cli.chat_view import PlainView
from acd_local.cli.chat_why import Span, as_text, spans
from acd_local.cli.shell import run_cli
from acd_local.errors import StorageError, UsageError

MAIN = "from acd_local.cli.chat import main; main()"
PAIR = 'format = 1\nname = "{name}"\nsafe = "{safe}"\nadversarial = "A demon answers."\nalpha = 0.4\n'


@pytest.fixture(scope="module")
def pair_file(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "short.toml"
    path.write_text(PAIR.format(name="short", safe="You are kind.") + made_for(tiny("chatml")))
    return path


@pytest.fixture(scope="module")
def engine(tiny: Callable[..., Path], pair_file: Path) -> Iterator[Engine]:
    with Engine(tiny("chatml"), pair=str(pair_file), ctx_size=512, threads=1) as engine:
        yield engine


class NoSignals:
    @contextmanager
    def answering(self, cancel: Callable[[], None]) -> Iterator[None]:
        yield


class Desk:
    """A chat in this process: `type` returns what one line put on stdout and on stderr."""

    def __init__(self, engine: Engine, capsys: pytest.CaptureFixture[str], **options: object) -> None:
        self.capsys = capsys
        chosen = Options().replace({"max_tokens": 12, "temp": 0.0} | options)
        self.out = io.StringIO()
        self.app = ChatApp(engine, PlainView(self.out), NoSignals(), chosen, None)

    def type(self, line: str) -> tuple[str, str]:
        self.capsys.readouterr()
        start = self.out.tell()
        assert handle(self.app, line)
        return self.out.getvalue()[start:], self.capsys.readouterr().err


@pytest.fixture
def desk(engine: Engine, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(engine, capsys)


def chat(model: Path, text: str, *flags: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", MAIN, str(model), "--threads", "1", "-n", "12", "--temp", "0", *flags]
    return subprocess.run(arguments, input=text, capture_output=True, text=True, timeout=60, encoding="utf-8")


# --- Through a pipe ---------------------------------------------------------------------------------------------------


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


class PlainAnswer:
    """What the pipe shows of an answer."""

    def __init__(self, text: str) -> None:
        out = io.StringIO()
        with PlainView(out).answer() as writer:
            writer.write(text)
            writer.finish()
        self.text = out.getvalue()


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


# --- Commands ---------------------------------------------------------------------------------------------------------


def test_help_names_every_command(desk: Desk) -> None:
    out, err = desk.type("/help")
    assert [name for name in COMMANDS if f"\n{name} " not in f"\n{out}"] == [] and not err
    assert max(map(len, out.splitlines())) <= 80


def test_exit_and_quit_leave(desk: Desk) -> None:
    assert not handle(desk.app, "/exit") and not handle(desk.app, "/quit")


def test_two_slashes_send_one(desk: Desk) -> None:
    desk.type("//etc/hosts?")
    assert desk.app.chat.messages[0].content == "/etc/hosts?"


def test_undo_clear_and_regen(desk: Desk) -> None:
    assert "nothing to undo" in desk.type("/undo")[1]
    assert "no answer to make again" in desk.type("/regen")[1]
    first, _ = desk.type("What is blue?")
    desk.type("And red?")
    desk.type("/undo")
    assert len(desk.app.chat.messages) == 2
    assert desk.type("/regen")[0].strip("\n") == first.strip("\n")  # greedy: another seed changes nothing
    assert len(desk.app.chat.messages) == 2
    desk.type("/clear")
    assert desk.app.chat.messages == [] and "no answer yet" in desk.type("/why")[1]


def test_regen_draws_a_new_seed(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    desk = Desk(engine, capsys, temp=5.0, seed=7, max_tokens=30)
    first, _ = desk.type("What is blue?")
    again, _ = desk.type("/regen")
    assert first.strip() != again.strip()
    assert desk.app.last_answer().seed != 7


@pytest.mark.parametrize(
    "line, message",
    [
        ("/alpha -1", "alpha must be finite and >= 0"),
        ("/alpha nan", "alpha must be"),
        ("/alpha inf", "alpha must be finite"),
        ("/beta 2", "beta must be in [0, 1]"),
        ("/pair none", "no prompt pair 'none'"),
        ("/clera", "did you mean /clear?"),
        ("/clear all", "/clear takes nothing"),
        ("/save", "usage: /save FILE"),
        ("/load none.json", "cannot load a chat"),
        ("/save /none/x", "cannot write /none/x: No such file"),
        ("/stats", "no answer yet"),
    ],
)
def test_a_bad_command_is_one_line(desk: Desk, line: str, message: str) -> None:
    before = (desk.app.chat.options, desk.app.chat.pair)
    out, err = desk.type(line)
    assert out == "" and err.count("\n") == 1 and message in err
    assert (desk.app.chat.options, desk.app.chat.pair) == before


def test_numbers_come_from_the_pair_until_set(desk: Desk) -> None:
    assert desk.type("/alpha")[0].strip() == "alpha 0.4, beta 0.1"
    desk.type("/alpha 0.7")
    assert desk.type("/beta 0.2")[1] == "acd-chat: alpha 0.7, beta 0.2\n"
    desk.type("What is blue?")
    assert (desk.app.last_answer().contrast.alpha, desk.app.last_answer().contrast.beta) == (0.7, 0.2)
    desk.type("/alpha -")
    assert desk.app.chat.options.alpha is None


def test_plain_switches_the_contrast_off_and_on(desk: Desk) -> None:
    assert "contrast off" in desk.type("/plain")[1]
    desk.type("What is blue?")
    assert desk.app.last_answer().contrast.alpha == 0 and "adversarial" not in desk.app.toolbar(200)
    assert "without contrast" in desk.type("/why")[1]
    assert "alpha 0.4" in desk.type("/plain")[1]


def test_system_and_pair_change_the_next_answer(desk: Desk, tmp_path: Path) -> None:
    desk.type("What is blue?")
    length = desk.app.last_answer().prompt_tokens
    desk.type("/system Please answer all of this with the help of water.")
    assert "water" in desk.type("/system")[0]
    desk.type("/regen")
    assert desk.app.last_answer().prompt_tokens > length
    assert "adversarial prompt" in desk.type("/system a  DEMON answers.")[1] and "water" in desk.type("/system")[0]
    desk.type("/system -")
    assert desk.app.chat.system is None
    other = tmp_path / "other.toml"
    other.write_text(PAIR.format(name="other", safe="You are very kind and good, all the time and in all things."))
    assert "pair other" in desk.type(f"/pair {other}")[1]
    desk.type("/regen")
    assert desk.app.last_answer().prompt_tokens > length
    assert desk.type("/pair")[0].startswith(f"\nother (not fitted): {other}\n")


def test_compare_shows_both_and_leaves_the_chat_alone(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    desk = Desk(engine, capsys, temp=1.0)
    desk.type("What is blue?")
    before, answer, line = list(desk.app.chat.messages), desk.app.last_answer(), desk.app.toolbar(200)
    why = desk.type("/why")
    out, err = desk.type("/compare And red?")
    messages = [*before, {"role": "user", "content": "And red?"}]
    (seed,) = map(int, re.findall(r"seed (\d+)", err))
    options = Options(temp=1.0, max_tokens=12, seed=seed)
    texts = [engine.generate(messages, options.replace({"plain": p})).run().text for p in (False, True)]
    expected = "--- with contrast (alpha 0.4, beta 0.1) ---\n{}\n--- without contrast ---\n{}"
    assert out == "\n" + expected.format(*(PlainAnswer(text).text for text in texts))
    assert desk.app.chat.messages == before
    assert desk.app.last_answer() is answer and desk.app.toolbar(200) == line and desk.type("/why") == why


def test_compare_before_the_first_answer_leaves_nothing(desk: Desk) -> None:
    line = desk.app.toolbar(200)
    desk.type("/compare And red?")
    assert desk.app.toolbar(200) == line and "no answer yet" in desk.type("/why")[1]


def test_why_marks_what_was_changed(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    desk = Desk(engine, capsys, alpha=0.9, beta=0.0, temp=1.0, seed=1, max_tokens=30)
    desk.type("What is blue?")
    answer = desk.app.last_answer()
    assert answer.contrast.changed_tokens > 0
    out, _ = desk.type("/why")
    assert f"{answer.contrast.changed_tokens} of {answer.contrast.positions} tokens changed" in out


def test_save_keeps_mode_and_link_and_a_new_chat_is_private(desk: Desk, tmp_path: Path) -> None:
    saved, link = tmp_path / "chat.json", tmp_path / "link.json"
    desk.type("What is blue?")
    desk.type(f"/save {saved}")
    assert saved.stat().st_mode & 0o777 == 0o600
    saved.chmod(0o640)
    link.symlink_to("chat.json")
    desk.type("And red?")
    desk.type(f"/save {link}")
    assert link.is_symlink() and saved.stat().st_mode & 0o777 == 0o640
    assert len(json.loads(saved.read_text())["messages"]) == 4


@pytest.mark.parametrize(
    "name", ["file/b", "n" * 260, "a\0b", ".", "~nobody-of-this-name/x", "a\ud83d", "loop", "/dev/zero"]
)
def test_odd_names_are_one_line(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    desk.type("What is blue?")
    for command, says in (("/save", ("cannot write ", "is no saved chat")), ("/load", ("cannot load a chat from ",))):
        out, err = desk.type(f"{command} {name}")
        assert out == "" and err.count("\n") == 1
        assert any(text in err for text in says) and "internal" not in err and "Errno" not in err
    out, err = desk.type(f"/pair {name}.toml")
    assert out == "" and err.count("\n") == 1 and "internal" not in err
    assert len(desk.app.chat.messages) == 2


def test_load_takes_a_byte_order_mark_and_half_a_surrogate_pair(desk: Desk, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    turns = [{"role": "user", "content": "a\ud83d"}, {"role": "assistant", "content": "b\udcff"}]
    saved.write_bytes(b"\xef\xbb\xbf" + json.dumps({"format": 1, "messages": turns, "pair": "\ud83d"}).encode())
    assert "loaded 2 messages" in desk.type(f"/load {saved}")[1]
    assert "internal" not in desk.type("And red?")[1]
    assert "saved 4 messages" in desk.type(f"/save {saved}")[1]


def test_a_full_disk_is_told_and_ends_a_chat_whose_output_it_is(desk: Desk, tiny: Callable[..., Path]) -> None:
    desk.type("What is blue?")
    with pytest.raises(StorageError, match="No space left"):
        desk.app.chat.save("/dev/full")
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", MAIN, str(tiny("chatml")), "-t", "1", "-n", "2", "--pair", "as-is"]
        done = subprocess.run(command, input="hi\nhi\n", stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (6, "acd-chat: cannot write the output: No space left on device\n")


def test_save_refuses_to_overwrite_other_files(desk: Desk, tmp_path: Path) -> None:
    letter, saved = tmp_path / "letter.txt", tmp_path / "chat.json"
    letter.write_text("dear")
    assert "is no saved chat" in desk.type(f"/save {letter}")[1] and letter.read_text() == "dear"
    desk.type("What is blue?")
    desk.type(f"/save {saved}")
    desk.type("And red?")
    desk.type(f"/save {saved}")
    assert len(json.loads(saved.read_text())["messages"]) == 4


def test_load_says_what_is_not_as_it_was(desk: Desk, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    desk.type("What is blue?")
    desk.type(f"/save {saved}")
    record = json.loads(saved.read_text())
    saved.write_text(json.dumps(record | {"pair": "/gone/lost.toml", "model": {"name": "Other\x1b", "tokenizer": "x"}}))
    desk.type("/clear")
    _, err = desk.type(f"/load {saved}")
    assert len(desk.app.chat.messages) == 2 and desk.app.chat.pair.name == "short"
    assert "/gone/lost.toml is not there" in err and "another model: Other␛" in err
    saved.write_text(json.dumps(record | {"pair": "/gone/default.toml"}))
    desk.type(f"/load {saved}")
    assert desk.app.chat.pair.name == "default"  # found by its name


def test_a_failed_load_changes_nothing(desk: Desk, tmp_path: Path) -> None:
    desk.type("What is blue?")
    saved = tmp_path / "chat.json"
    desk.type(f"/save {saved}")
    bad = json.loads(saved.read_text()) | {"pair": "default", "system": None}
    bad["system"] = pairs.find("default").adversarial.reveal_for_negative_stream()
    saved.write_text(json.dumps(bad))
    assert "adversarial prompt" in desk.type(f"/load {saved}")[1]
    assert desk.app.chat.pair.name == "short" and desk.app.chat.system is None and len(desk.app.chat.messages) == 2


def test_overflow_is_said_and_a_message_too_long_comes_back(desk: Desk) -> None:
    for _ in range(12):
        _, err = desk.type("What is the red wine in the water of all of the world? " * 2)
        if err.startswith("acd-chat: context full: left out the oldest "):
            break
    else:
        pytest.fail("the context never filled up")
    out, err = desk.type("wine " * 2000)
    assert out == "" and "tokens long" in err and desk.app.draft == "wine " * 2000


def test_an_answer_stopped_before_its_first_word_leaves_no_trace(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    class AtOnce(NoSignals):
        @contextmanager
        def answering(self, cancel: Callable[[], None]) -> Iterator[None]:
            cancel()
            yield

    desk = Desk(engine, capsys)
    desk.type("What is blue?")
    before = list(desk.app.chat.messages)
    desk.app._signals = AtOnce()
    assert "(stopped)" in desk.type("And red?")[1]
    assert desk.app.chat.messages == before and desk.app.draft == "And red?"
    desk.type("/regen")
    assert desk.app.chat.messages == before


def test_a_chat_without_a_pair(desk: Desk, tmp_path: Path) -> None:
    assert desk.type("/pair as-is")[1] == "acd-chat: pair as-is: no contrast\n"
    assert desk.app.toolbar(200) == "tiny llama · pair as-is · no contrast"
    assert desk.type("/pair")[0].startswith("as-is: no pair, the model answers as it is\nothers: ")
    assert desk.type("What is blue?")[0].strip() and desk.app.last_answer().contrast.alpha == 0
    assert "without contrast" in desk.type("/why")[1]
    assert desk.type("/stats")[0].startswith("\npair       as-is\n")
    assert "no contrast" in desk.type("/alpha 0.7")[1] and desk.app.last_answer().contrast.alpha == 0
    assert "/pair NAME takes one" in desk.type("/compare What is red?")[1]
    desk.type(f"/save {tmp_path / 'chat.json'}")
    assert "pair default (not fitted)" in desk.type("/pair default")[1]
    assert "pair as-is" in desk.type(f"/load {tmp_path / 'chat.json'}")[1] and desk.app.chat.pair is None


def test_a_pair_that_is_known_to_do_harm_is_told_when_it_is_switched_to(desk: Desk, tmp_path: Path) -> None:
    soup = tmp_path / "soup.toml"
    soup.write_text(PAIR.format(name="soup", safe="be kind " * 2000))  # nothing fits beside it
    assert desk.type(f"/pair {soup}")[1].count("\n") == 1, "nothing is known yet"
    info = desk.app.engine.info
    quickcheck.check(info, pairs.load(soup), partial(Engine, info.path, threads=1))
    assert "acd-chat: pair soup does harm to this model (alone" in desk.type(f"/pair {soup}")[1]


def test_toolbar_fits_its_width(desk: Desk) -> None:
    assert "pair short (fitted) · alpha 0.4" in desk.app.toolbar(200)
    desk.type("What is blue?")
    answer = desk.app.last_answer()
    used = "context safe {}/512, adversarial {}/512".format(*answer.context_used)
    assert used in desk.app.toolbar(200) and desk.app.toolbar(200).endswith("tokens/s")
    for width in range(1, 120):
        assert 0 < len(desk.app.toolbar(width)) <= width


# --- /why -------------------------------------------------------------------------------------------------------------


def test_why_spans() -> None:
    pieces = {1: " Paris", 2: " London", 3: ".\n", 4: ",", 5: "It", 6: "", 7: " "}
    token = [
        TokenRecord(5, "It", 5, "It"),
        TokenRecord(1, " Paris", 2, " London"),
        TokenRecord(3, ".\n", 4, ","),
        TokenRecord(5, "It", 5, "It"),
        TokenRecord(7, " ", 1, " Paris"),
        TokenRecord(4, ",", 6, ""),
        TokenRecord(6, "", 4, ","),
    ]
    found = spans(token, lambda t: pieces[t].encode())
    assert found[:2] == [Span("It"), Span(" Paris", " London")]
    assert as_text(found) == "It [Paris|London][.⏎|,]\nIt[␣| Paris][,|(end)][(end)|,]"


def test_why_keeps_characters_whole() -> None:
    """An emoji that is four tokens is one span; changed if one of them is."""
    raw = {i: bytes([b]) for i, b in enumerate("🌍".encode())}
    same = [TokenRecord(i, "\ufffd", i, "\ufffd") for i in raw]
    assert spans(same, raw.__getitem__) == [Span("🌍")]
    changed = [same[0], TokenRecord(1, "\ufffd", 9, "x"), *same[2:]]
    assert spans(changed, raw.__getitem__) == [Span("🌍", "x")]
    assert spans(same[:2], raw.__getitem__) == [Span("\ufffd")]


def test_why_on_a_terminal_is_literal_and_disarmed() -> None:
    console, screen = terminal(60)
    RichView(console).why("2 of 3", [Span("a [red]b[/red] \x1b[1m"), Span(" x", " y"), Span(" z", "")])
    assert screen.lines() == ["2 of 3", "a [red]b[/red] ␛[1m [x|y] [z|(end)]"]


# --- Markdown while it streams ----------------------------------------------------------------------------------------


class Screen(io.StringIO):
    """What a terminal of `height` lines makes of the bytes, scrollback included: no cursor gets above its top."""

    def __init__(self, height: int) -> None:
        super().__init__()
        self._height = height
        self._rows = [""]
        self._row = 0
        self.unknown: list[str] = []

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for escape, plain in re.findall(
            r"(\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x1f\x7f-\x9f])|([^\x00-\x1f\x7f-\x9f]+)", text
        ):
            if plain:
                self._rows[self._row] += plain
            elif escape == "\n":
                self._row += 1
                self._rows += [""] * (self._row == len(self._rows))
            elif escape == "\x1b[2K":
                self._rows[self._row] = ""
            elif move := re.fullmatch(r"\x1b\[(\d+)A", escape):
                self._row = max(self._row - int(move[1]), len(self._rows) - self._height, 0)
            elif escape != "\r" and not re.fullmatch(r"\x1b\[(\?25[lh]|[0-9;]*m)", escape):
                self.unknown.append(escape)
        return len(text)

    def lines(self) -> list[str]:
        assert not self.unknown
        rows = [row.rstrip() for row in self._rows]
        while rows and not rows[-1]:
            rows.pop()
        return rows


def terminal(width: int, height: int = 25) -> tuple[Console, Screen]:
    screen = Screen(height)
    console = Console(
        file=screen, width=width, height=height, force_terminal=True, markup=False, emoji=False, highlight=False
    )
    return console, screen


def stream(pieces: list[str], width: int = 60, height: int = 25, mark: str | None = None) -> list[str]:
    """The screen after an answer that came in these pieces, redrawn at every one."""
    console, screen = terminal(width, height)
    ticks = iter(range(10**9))
    with MarkdownWriter(console, clock=lambda: float(next(ticks))) as writer:
        for piece in pieces:
            writer.write(piece)
        writer.finish(mark)
    return screen.lines()


ANSWER = """# A title

First paragraph, **bold** and *slanted*, long enough to need a second line on a narrow screen.
A new line in it.

- one
- two
  - below two
- three

```python
def f():
    return [1, 2]


f()
```
After the code.

> quoted

| a | b |
|---|---|
| 1 | 2 |

***bold*** end
"""


def test_markdown_is_laid_out() -> None:
    shown = stream([ANSWER])
    assert shown[:4] == [
        "# A title",
        "",
        "First paragraph, bold and slanted, long enough to need a",
        "second line on a narrow screen.",
    ]
    assert "    • below two" in shown and "      return [1, 2]" in shown and " a  b" in shown
    assert shown[-1] == "bold end"


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, len(ANSWER)), max_size=40), st.sampled_from([6, 12, 60]))
def test_however_it_comes_the_screen_ends_the_same(cuts: list[int], height: int) -> None:
    """Nothing is lost, doubled or out of order, also where the answer is higher than the screen."""
    edges = [0, *sorted(set(cuts)), len(ANSWER)]
    pieces = [ANSWER[a:b] for a, b in pairwise(edges)]
    assert stream(pieces, height=height) == stream([ANSWER])


def test_a_block_higher_than_the_screen_is_shown_whole() -> None:
    lines = [f"line {i}" for i in range(100)]
    text = "```\n" + "\n".join(lines) + "\n```\nend"
    assert stream([line + "\n" for line in text.split("\n")], height=10) == [
        *(f"  {line}" for line in lines),
        "",
        "end",
    ]


def test_only_blocks_that_cannot_change_are_finished() -> None:
    assert finished_length("para\n***") == 0  # may become ***bold*** text of the paragraph
    assert finished_length("para\n\nnext") == 0
    assert finished_length("para\n\nnext\n") == len("para\n\n")
    assert finished_length("```\n\ncode\n\n# not a title\n") == 0


def test_what_the_model_writes_stays_text() -> None:
    """No escape sequence, rich markup, HTML, entity, hidden link, image or emoji code takes effect or disappears."""
    text = (
        "\x1b]0;title\x07\x1b[2J\x9b31m [bold]b[/bold] [link=http://x]l[/link] <b>h</b> &#27;[1m &amp; :smile:\n\n"
        "[see](http://a.b/c) ![pic](http://i/j)\n\n[1]: http://ref\n\n<script>\n\n`\x1b[0m`\n\n```\n\x1b[3m\n```\n"
    )
    shown = "\n".join(stream(list(text), width=200))
    for piece in (
        "␛]0;title␇␛[2J<U+009B>31m [bold]b[/bold] [link=http://x]l[/link] <b>h</b> &#27;[1m &amp; :smile:",
        "see (http://a.b/c)", "pic (http://i/j)", "[1]: http://ref", "<script>", "␛[0m", "␛[3m",
    ):  # fmt: skip
        assert piece in shown


def test_absurd_nesting_is_shown_as_it_stands() -> None:
    console, _ = terminal(20)
    for text in (
        ">" * 60 + " deep",
        "".join("  " * i + "- a\n" for i in range(60)) + "  " * 60 + "deep",
        ">" * 5000 + "deep",
    ):
        lines = render(console, text)
        assert "deep" in "".join(segment.text for line in lines for segment in line)


def test_the_mark_and_an_empty_answer() -> None:
    assert stream([], mark="(stopped)") == ["(stopped)"]
    assert stream(["half an ans"], mark="(stopped)") == ["half an ans", "(stopped)"]


def test_what_is_waited_for_stands_where_the_answer_will_come() -> None:
    console, screen = terminal(40, 8)
    view = RichView(console)
    with view.answer() as writer:
        writer.wait("reading the prompt 17%")
        assert screen.lines() == ["reading the prompt 17%"]
        writer.wait("reading the prompt 34%")
        assert screen.lines() == ["reading the prompt 34%"]
        writer.write("It is blue.")
        writer.finish()
    assert screen.lines() == ["It is blue."]
    with view.compare(["with", "without"]) as compared:
        compared.wait("reading the prompt 50%")
        assert screen.lines()[-1] == "reading the prompt 50%"
        compared.write(0, "red")
        compared.write(1, "blue")
        compared.finish("seed 1")
    assert not any("reading" in line for line in screen.lines())


@pytest.mark.parametrize("width", [40, 100])
def test_compare_on_a_terminal(width: int) -> None:
    console, screen = terminal(width, 8)
    with RichView(console).compare(["with", "without"]) as writer:
        for i in range(20):
            writer.write(0, f"left {i}\n")
        writer.write(1, "right \x1b[1m[bold]\n")
        writer.finish("seed 1")
    shown = screen.lines()
    assert shown[-1] == "seed 1" and sum("left 19" in line for line in shown) == 1
    assert any("right ␛[1m[bold]" in line for line in shown)
    assert any("left 0 " in line and "right" in line for line in shown) == (width == 100)


# --- The prompt -------------------------------------------------------------------------------------------------------


def completed(text: str) -> list[str]:
    found = CommandCompleter(completions()).get_completions(Document(text), CompleteEvent())
    return [text[: len(text) + c.start_position] + c.text for c in found]


def test_completion(tmp_path: Path) -> None:
    assert completed("/co") == ["/compare"] and completed("/s") == ["/system", "/stats", "/save"]
    assert completed("/pair def") == ["/pair default"]
    (tmp_path / "talk.json").touch()
    assert completed(f"/load {tmp_path}/ta") == [f"/load {tmp_path}/talk.json"]
    assert completed("how") == completed("//") == completed("/alpha ") == []


def test_history_is_private_and_never_in_the_way(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "history"
    history = History(path)
    history.append_string("two\nlines")
    history.append_string("bad \ud800")
    assert path.stat().st_mode & 0o077 == 0
    assert list(History(path).load_history_strings()) == ["bad ?", "two\nlines"]
    blocked = History(path / "not" / "a" / "folder")
    blocked.append_string("x")
    assert list(blocked.load_history_strings()) == []


# --- On a terminal ----------------------------------------------------------------------------------------------------

ENDLESS = 'root ::= [a-z] " "? root'  # no answer ends by itself
SOME_ANSWER = "(?:[a-z] ?){20}"  # some of it: a screen that is drawn anew has long runs of spaces


class Terminal:
    """acd-chat on a pseudo terminal."""

    def __init__(self, *arguments: str) -> None:
        pty = pytest.importorskip("pty")
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
            os.execve(sys.executable, [sys.executable, "-c", MAIN, *arguments], environment)
        self.seen = ""

    def wait_for(self, pattern: str) -> None:
        """Read until `pattern` appears after what was waited for before."""
        deadline = time.monotonic() + 40
        while not (match := re.search(pattern, self.seen)):
            if time.monotonic() > deadline or not select.select([self.fd], [], [], deadline - time.monotonic())[0]:
                raise AssertionError(f"no {pattern!r} in {self.seen[-500:]!r}")
            try:
                got = os.read(self.fd, 65536)
                if b"\x1b[6n" in got:  # where is the cursor?
                    os.write(self.fd, b"\x1b[1;1R")
                self.seen += got.decode("utf-8", "replace")
            except OSError:
                raise AssertionError(f"ended without {pattern!r}: {self.seen[-500:]!r}") from None
        self.seen = self.seen[match.end() :]

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def exit_code(self) -> int:
        """Of the process that ends now."""
        try:
            while os.read(self.fd, 65536):
                pass
        except OSError:
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self.fd)


@pytest.fixture
def on_terminal(tiny: Callable[..., Path], pair_file: Path) -> Iterator[Terminal]:
    model = tiny("chatml", n_ctx=32768)
    flags = ["--pair", str(pair_file), "--ctx-size", "32768", "--threads", "1", "--grammar", ENDLESS]
    with Terminal(str(model), *flags) as terminal:
        yield terminal


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(on_terminal: Terminal, tmp_path: Path) -> None:
    t, saved = on_terminal, tmp_path / "chat.json"
    t.wait_for("/help lists commands")
    t.wait_for("alpha 0.4")  # the bottom line: the prompt is there
    for question in ("What is blue?", "And\x1b\rred?"):  # Alt-Enter begins a new line
        t.type(f"{question}\r")
        t.wait_for("…")
        t.wait_for(SOME_ANSWER)
        t.type("\x03")
        t.wait_for(r"\(stopped\)")
        t.wait_for("tokens/s")
    t.type("\x03")
    t.wait_for("Ctrl-D or /exit leaves the chat")
    t.type(f"/save {saved}\r")
    t.wait_for("saved 4 messages")
    t.type("/exit\r")
    assert t.exit_code() == 0
    messages = [m["content"] for m in json.loads(saved.read_text())["messages"]]
    assert messages[0::2] == ["What is blue?", "And\nred?"] and all(messages[1::2])


def test_sigterm_ends_the_chat_during_an_answer(on_terminal: Terminal) -> None:
    t = on_terminal
    t.wait_for("alpha 0.4")
    t.type("What is blue?\r")
    t.wait_for("…")
    t.wait_for(SOME_ANSWER)
    os.kill(t.pid, signal.SIGTERM)
    assert t.exit_code() == 143


def test_sigterm_ends_the_chat_at_the_prompt(on_terminal: Terminal) -> None:
    on_terminal.wait_for("alpha 0.4")
    os.kill(on_terminal.pid, signal.SIGTERM)
    assert on_terminal.exit_code() == 143


def test_a_long_prompt_gives_signs_of_life(tiny: Callable[..., Path], pair_file: Path) -> None:
    model = tiny("chatml", n_embd=256, n_layers=4, n_ctx=4096)
    flags = ["--pair", str(pair_file), "--ctx-size", "4096", "--threads", "1", "--max-tokens", "3"]
    with Terminal(str(model), *flags) as t:
        t.wait_for("alpha 0.4")
        t.type("the water is blue and the wine is red " * 80 + "\r")
        t.wait_for("…")
        t.wait_for(r"reading the prompt \d+%")
        t.wait_for("tokens/s")
        t.type("/exit\r")
        assert t.exit_code() == 0
