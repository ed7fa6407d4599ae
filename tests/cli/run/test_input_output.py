"""acd-run: what goes in and what comes out."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from manual import made_for
from places import ROOT, child_env
from run_command import ENDLESS, LONG, MAIN, PAIR, Done, one_line_error, start, subprocess_run

from acd_local.cli import progress, run
from acd_local.cli.progress import StatusLine
from acd_local.cli.run import command
from acd_local.cli.shell import AnswerWriter, run_cli

# -- the prompt --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stdin", "args", "message"),
    [
        (b"one\ntwo\n", ("three",), "one\ntwo\n\nthree"),
        (b"one\r\n", (), "one"),
        (b"\xef\xbb\xbfone", (), "one"),
        (b" \n", ("three",), "three"),
        (None, ("three",), "three"),
        (b"one", ("three", "--no-stdin"), "three"),
        ("größer ☃".encode(), (), "größer ☃"),
    ],
)
def test_stdin_a_blank_line_and_the_prompt(
    cli: Callable[..., Done],
    asked: list[dict[str, Any]],
    base: tuple[str, ...],
    stdin: bytes | None,
    args: tuple[str, ...],
    message: str,
) -> None:
    assert cli(*base, *args, "-n", "1", stdin=stdin).code == 0
    assert asked[0]["messages"] == message


@pytest.mark.parametrize(
    ("stdin", "args", "problem"),
    [
        (None, (), "no prompt"),
        (b"", (), "no prompt"),
        (b"\n\n", ("  ",), "no prompt"),
        (b"one", ("--no-stdin",), "no prompt"),
        (b"ab\xff", ("three",), "stdin is not UTF-8 text (byte 2)"),
        (None, ("a\udcff",), "PROMPT is not UTF-8"),
        (None, ("a", "--system", "\udcff"), "--system is not UTF-8"),
        (None, ("a", "--stop", "\udcff"), "--stop is not UTF-8"),
        (None, ("a", "--grammar", 'root ::= "\udcff"'), "--grammar is not UTF-8"),
    ],
)
def test_no_usable_prompt(
    cli: Callable[..., Done], stdin: bytes | None, args: tuple[str, ...], problem: str, base: tuple[str, ...]
) -> None:
    one_line_error(cli(*base, *args, stdin=stdin), 2, problem)


def test_an_idle_pipe_is_named_and_still_read(
    base: tuple[str, ...],
    asked: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)  # as a parent process may leave it
    monkeypatch.setattr(sys, "stdin", os.fdopen(reader, encoding="utf-8"))
    monkeypatch.setattr(run, "STDIN_PATIENCE", 0.05)

    def late() -> None:
        os.write(writer, b"late")
        os.close(writer)

    threading.Timer(0.3, late).start()
    assert run_cli(command, "acd-run", [*base, "three", "-n", "1"]) == 0
    assert capsys.readouterr().err == "acd-run: waiting for stdin to end (--no-stdin does not read it)\n"
    assert asked[0]["messages"] == "late\n\nthree"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_the_wait_for_stdin(base: tuple[str, ...], signum: int, code: int) -> None:
    process = start((*base, "three"), stdin=subprocess.PIPE)
    started = time.monotonic()
    assert process.stderr is not None
    assert b"waiting for stdin" in process.stderr.readline()
    assert time.monotonic() - started > 1.9
    process.send_signal(signum)
    assert process.wait(5) == code
    assert process.communicate() == (b"", b"")


def test_closed_standard_streams(base: tuple[str, ...]) -> None:
    whole = subprocess_run((*base, "hi", "-n", "8", "--temp", "0"))
    assert whole.code == 0
    command = [sys.executable, "-c", MAIN, *base, "hi", "-n", "8", "--temp", "0"]
    for redirection, out in (("<&-", whole.out), ("<&- 2>&-", whole.out), (">&-", "")):
        shell = f'exec "$@" {redirection}'
        done = subprocess.run(["sh", "-c", shell, "sh", *command], capture_output=True, env=child_env(), timeout=60)
        assert (done.returncode, done.stdout.decode(), done.stderr) == (0, out, b"")


# -- the model ---------------------------------------------------------------------------------------------------------


def test_the_first_argument_is_the_model(
    cli: Callable[..., Done], base: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    one_line_error(cli(), 2, "no model")
    one_line_error(cli("", "hi"), 2, "no model")
    monkeypatch.setenv("ACD_MODEL", base[0])
    assert cli(*base[1:], "-n", "1", stdin=b"hi").code == 0
    hint = 'ACD_MODEL is set, but the first argument is always the MODEL: acd-run "$ACD_MODEL" "my prompt"'
    for prompt in ("What is water?", "water " * 100, "what\nnow", "~nobody-of-this-name"):
        one_line_error(cli(prompt, stdin=b"hi"), 3, f"no such file: {prompt[:4]}", hint)
    for model, asked in (("none.gguf", ()), ("none", ("a prompt",)), ("hf:x", ()), ("/", ())):
        done = cli(model, *asked, stdin=b"hi")
        assert done.code == 3 and "ACD_MODEL" not in done.err
    monkeypatch.setenv("ACD_MODEL", "/no/such.gguf")
    one_line_error(cli(stdin=b"hi"), 3, "/no/such.gguf")
    assert cli(*base, "-n", "1", stdin=b"hi").code == 0


def test_bad_model_files(cli: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "text.gguf").write_text("It was a dark and stormy night.\n" * 100)
    for name in ("missing.gguf", "empty.gguf", "text.gguf", "missing\x1b[31m\nname"):
        one_line_error(cli(str(tmp_path / name), "hi"), 3)
    one_line_error(cli(str(tmp_path), "hi"), 3, "directory")


BATCH = """
import contextlib, io, json, sys
from acd_local.cli.run import command
from acd_local.cli.shell import run_cli
for path in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_cli(command, "acd-run", [path, "hi", "--no-stdin", "-n", "2", "-t", "1", "-c", "512"])
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


def answers_or_one_line(paths: list[Path]) -> int:
    """Runs acd-run on every file, in one process that must live through all of them; how many were refused."""
    done = subprocess.run(
        [sys.executable, "-c", BATCH],
        input=json.dumps([str(p) for p in paths]),
        capture_output=True,
        text=True,
        env=child_env(),
        timeout=1800,
    )
    assert (done.returncode, done.stderr) == (0, "")
    results = [Done(*json.loads(line)) for line in done.stdout.splitlines()]
    assert len(results) == len(paths)
    refused = [result for result in results if result.code != 0]
    for result in refused:
        if "NaN" in result.err or "logits" in result.err:
            one_line_error(result, 1)  # damage that only the numbers show
        else:
            one_line_error(result, 3)
    assert all(result.out.endswith("\n") for result in results if result.code == 0)
    return len(refused)


def truncated(model: Path, folder: Path, count: int) -> list[Path]:
    data = model.read_bytes()
    header = int(gguf.GGUFReader(model).data_offset)
    cuts = [header * i // (count // 2) for i in range(count // 2)]
    cuts += [header + (len(data) - header) * i // (count - len(cuts)) for i in range(count - len(cuts))]
    paths = [folder / f"cut-{cut}.gguf" for cut in cuts]
    for path, cut in zip(paths, cuts, strict=True):
        path.write_bytes(data[:cut])
    return paths


def mutated(model: Path, folder: Path, count: int) -> list[Path]:
    data = model.read_bytes()
    header = int(gguf.GGUFReader(model).data_offset)
    dice = random.Random(7)
    paths = []
    for i in range(count):
        changed = bytearray(data)
        # Most of a header is the vocabulary: half of the hits go to what comes before and after it.
        at = dice.randrange(header) if i % 2 else dice.choice([dice.randrange(600), header - 1 - dice.randrange(1500)])
        changed[at] = dice.choice([0, 0xFF, changed[at] ^ (1 << dice.randrange(8)), dice.randrange(256)])
        paths.append(folder / f"byte-{i}-{at}.gguf")
        paths[-1].write_bytes(changed)
    return paths


def test_a_few_damaged_models(tiny: Callable[..., Path], tmp_path: Path) -> None:
    assert answers_or_one_line(truncated(tiny("chatml"), tmp_path, 8)) == 8
    answers_or_one_line(mutated(tiny("chatml"), tmp_path, 4))


@pytest.mark.slow
def test_damaged_models(tiny: Callable[..., Path], tmp_path: Path) -> None:
    assert answers_or_one_line(truncated(tiny("chatml"), tmp_path, 50)) == 50
    assert answers_or_one_line(mutated(tiny("chatml"), tmp_path, 300)) > 50


# -- stdout ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grammar", "out"),
    [
        ('root ::= "red"', "red\n"),
        ('root ::= "red\\n"', "red\n"),
        ('root ::= "\\n\\nred\\n\\nwine\\n\\n\\n"', "\n\nred\n\nwine\n"),
        ('root ::= "\\n\\n"', "\n"),
        ('root ::= ""', "\n"),
        ('root ::= "\\x1b[31mred"', "\x1b[31mred\n"),
    ],
)
def test_the_answer_and_one_newline(cli: Callable[..., Done], base: tuple[str, ...], grammar: str, out: str) -> None:
    assert cli(*base, "hi", "--grammar", grammar) == Done(0, out, "")


def read_terminal(master: int) -> bytes:
    """What the programs at the other side of a pseudo-terminal write, until the last of them closes it."""
    seen = b""
    try:
        while piece := os.read(master, 4096):
            seen += piece
    except OSError:  # the other side is closed
        pass
    os.close(master)
    return seen


def test_a_terminal_gets_no_escape_sequences(base: tuple[str, ...]) -> None:
    for extra, expected in (((), "␛[31mred\r\n␛]0;x␇\r\n"), (("--json",), '"text": "\\u001b[31mred\\n')):
        master, slave = os.openpty()
        process = start((*base, "hi", "--grammar", r'root ::= "\x1b[31mred\n\x1b]0;x\x07\n"', *extra), stdout=slave)
        os.close(slave)
        out = read_terminal(master)
        assert process.wait(30) == 0
        assert expected in out.decode()
        assert b"\x1b" not in out
        assert b"\x07" not in out
        assert process.communicate()[1] == b""


IMPATIENT = f"from acd_local.cli import progress; progress.PATIENCE = 0.01; {MAIN}"


def test_a_terminal_is_told_how_far_it_is(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """On stderr, on one line that is gone when the answer comes; elsewhere nothing is said."""
    model = tiny("chatml", n_embd=256, n_layers=4, n_ctx=4096, seed=5)  # new: it is checked first
    (pair := tmp_path / "short.toml").write_text(PAIR + made_for(model))
    args = (str(model), LONG, "-n", "3", "-t", "1", "-c", "4096", "--pair", str(pair), "--temp", "0")
    master, slave = os.openpty()
    process = start(args, stderr=slave, code=IMPATIENT)
    os.close(slave)
    err = read_terminal(master)
    out, _ = process.communicate(timeout=60)
    shown = [part.rstrip() for part in err.decode().split("\r")]
    assert f"loading {model.name}" in shown
    percents = [int(part[19:-1]) for part in shown if part.startswith("reading the prompt ")]
    assert len(percents) >= 2
    assert percents == sorted(set(percents))
    assert all(0 <= percent < 100 for percent in percents)
    assert shown[-1] == "" and "\n" not in err.decode(), "no trace is left"
    assert b"\x1b" not in err
    done = subprocess_run(args, code=IMPATIENT)
    assert done == Done(0, out.decode(), "")


def test_a_short_wait_is_not_spoken_of(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with StatusLine() as status:
        for i in range(100):
            status.show(f"reading the prompt {i}%")
    assert screen.getvalue() == ""
    monkeypatch.setattr(progress, "PATIENCE", 0.01)
    with StatusLine() as status:
        status.show("reading " + "x" * 500)
        deadline = time.monotonic() + 10
        while not (shown := screen.getvalue()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert shown.startswith("\rreading xxx")
    assert screen.getvalue() == shown + f"\r{' ' * (len(shown) - 1)}\r"
    time.sleep(0.05)
    assert screen.getvalue().endswith(" \r"), "nothing comes afterwards"


def test_text_is_flushed_as_it_comes() -> None:
    class Pipe(io.StringIO):
        flushed = ""

        def flush(self) -> None:
            self.flushed = self.getvalue()

    out = Pipe()
    writer = AnswerWriter(out)
    seen = []
    for piece in ("a\n", "\nb", "\n"):
        writer.write(piece)
        seen.append(out.flushed)
    writer.finish()
    assert seen == ["a", "a\n\nb", "a\n\nb"]
    assert out.flushed == "a\n\nb\n"


def test_a_closed_pipe_ends_quietly(base: tuple[str, ...]) -> None:
    process = start((*base, "hi", "--grammar", ENDLESS, "--stats"))
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(5) == b"aaaaa"
    process.stdout.close()
    assert process.wait(30) == 0
    assert process.stderr.read() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(base: tuple[str, ...], cli: Callable[..., Done]) -> None:
    with Path("/dev/full").open("wb") as full:
        for more in ((), ("--json",)):
            done = subprocess_run((*base, "hi", "-n", "4", *more), stdout=full)
            one_line_error(done, 6, "cannot write the output: No space left on device: make room there")
    done = cli(*base, "hi", "-n", "2", "--trace", "/dev/full")
    assert (done.code, done.err) == (6, "acd-run: cannot write /dev/full: No space left on device: make room there\n")


# -- the demo model ----------------------------------------------------------------------------------------------------


def test_the_demo_model_answers(demo: Path) -> None:
    """README's first question."""
    asked = "Give three tips for a good night's sleep."
    with subprocess.Popen(["echo", asked], stdout=subprocess.PIPE) as question:
        done = subprocess_run(("demo", "-n", "12", "--temp", "0", "-t", "1"), stdin=question.stdout)
    assert demo.exists() and asked in (ROOT / "README.md").read_text("utf-8")
    assert (done.code, done.err) == (0, "")
    assert "bedtime" in done.out
