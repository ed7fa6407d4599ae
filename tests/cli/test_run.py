"""acd-run: what goes in, what comes out, and how it ends."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import gguf
import pytest
from manual import made_for
from places import ROOT, child_env

from acd_local.cli import progress, run
from acd_local.cli.progress import StatusLine
from acd_local.cli.run import command
from acd_local.cli.shell import AnswerWriter, Interrupts, run_cli, short_line
from acd_local.engine import Engine
from acd_local.options import Options

MAIN = "from acd_local.cli.run import main; main()"
PAIR = 'format = 1\nname = "short"\nsafe = "You are kind."\nadversarial = "A demon answers."\n'
ENDLESS = 'root ::= "a" root'


class Done(NamedTuple):
    code: int
    out: str
    err: str


class FakeStdin(io.TextIOWrapper):
    """Bytes instead of the test runner's stdin; None is a terminal."""

    def __init__(self, data: bytes | None) -> None:
        super().__init__(io.BytesIO(data or b""))
        self._terminal = data is None

    def isatty(self) -> bool:
        return self._terminal


@pytest.fixture(scope="module")
def pair(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "short.toml"
    path.write_text(PAIR + made_for(tiny("chatml")))
    return path


@pytest.fixture(scope="module")
def base(tiny: Callable[..., Path], pair: Path) -> tuple[str, ...]:
    """MODEL and the flags that make it quick."""
    return (str(tiny("chatml")), "-t", "1", "-c", "512", "--pair", str(pair))


@pytest.fixture(scope="module")
def slow_model(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The same for a model that takes seconds over a long prompt."""
    path = tiny("chatml", n_embd=256, n_layers=4, n_ctx=16384)
    pair = tmp_path_factory.mktemp("slow") / "short.toml"
    pair.write_text(PAIR + made_for(path))
    subprocess_run((str(path), "hi", "-n", "1", "-t", "1", "-c", "512", "--pair", str(pair)))  # it is known to load
    return (str(path), "-t", "1", "-c", "16384", "--pair", str(pair))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """acd-run within this process."""

    def call(*args: str, stdin: bytes | None = None) -> Done:
        monkeypatch.setattr(sys, "stdin", FakeStdin(stdin))
        code = run_cli(command, "acd-run", args)
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return call


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What reaches Engine.generate, which still does its work."""
    calls: list[dict[str, Any]] = []
    generate = Engine.generate

    def spy(self: Engine, messages: Any, options: Options, **more: Any) -> Any:
        calls.append({"engine": self, "messages": messages, "options": options, **more})
        return generate(self, messages, options, **more)

    monkeypatch.setattr(Engine, "generate", spy)
    return calls


def environment() -> dict[str, str]:
    return child_env()


def start(args: tuple[str, ...], *, code: str = MAIN, **how: Any) -> subprocess.Popen[bytes]:
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code, *args], env=environment(), **(streams | how))


def subprocess_run(args: tuple[str, ...], **how: Any) -> Done:
    process = start(args, **how)
    out, err = process.communicate(timeout=120)
    return Done(process.returncode, (out or b"").decode(), (err or b"").decode())


def one_line_error(done: Done, code: int, *parts: str) -> None:
    assert done.code == code, done
    assert done.out == ""
    assert done.err.startswith("acd-run: ")
    assert done.err.count("\n") == 1
    assert done.err.endswith("\n")
    assert "Traceback" not in done.err
    for part in parts:
        assert part in done.err


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
        done = subprocess.run(["sh", "-c", shell, "sh", *command], capture_output=True, env=environment(), timeout=60)
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
        env=environment(),
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
LONG = "the water is blue and the wine is red " * 150


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
            one_line_error(done, 6, "cannot write the output: No space left on device")
    done = cli(*base, "hi", "-n", "2", "--trace", "/dev/full")
    assert (done.code, done.err) == (6, "acd-run: cannot write /dev/full: No space left on device\n")


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        (("--alpha", "0.3"), "alpha", 0.3),
        (("--beta", "0.25"), "beta", 0.25),
        (("--raw-contrast",), "raw_contrast", True),
        (("--plain",), "plain", True),
        (("--max-tokens", "1"), "max_tokens", 1),
        (("--stop", "x", "--stop", "y z"), "stop", ("x", "y z")),
        (("--overflow", "error"), "overflow", "error"),
        (("--seed", "7"), "seed", 7),
        (("--temp", "0.1"), "temp", 0.1),
        (("--top-k", "3"), "top_k", 3),
        (("--top-p", "0.5"), "top_p", 0.5),
        (("--min-p", "0.2"), "min_p", 0.2),
        (("--typical", "0.9"), "typical", 0.9),
        (("--repeat-last-n", "8"), "repeat_last_n", 8),
        (("--repeat-penalty", "1.1"), "repeat_penalty", 1.1),
        (("--presence-penalty", "-0.5"), "presence_penalty", -0.5),
        (("--frequency-penalty", "0.5"), "frequency_penalty", 0.5),
        (("--dry-multiplier", "0.8"), "dry_multiplier", 0.8),
        (("--dry-base", "1.5"), "dry_base", 1.5),
        (("--dry-allowed-length", "3"), "dry_allowed_length", 3),
        (("--dry-penalty-last-n", "9"), "dry_penalty_last_n", 9),
        (("--xtc-probability", "0.5"), "xtc_probability", 0.5),
        (("--xtc-threshold", "0.2"), "xtc_threshold", 0.2),
        (("--mirostat", "2"), "mirostat", 2),
        (("--mirostat-lr", "0.2"), "mirostat_lr", 0.2),
        (("--mirostat-ent", "4"), "mirostat_ent", 4.0),
    ],
)
def test_options_reach_the_engine(
    cli: Callable[..., Done],
    base: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    name: str,
    value: object,
) -> None:
    seen: list[Options] = []

    def catch(_model: str, _given: object, options: Options, _interrupts: object) -> int:
        seen.append(options)
        return 0

    monkeypatch.setattr("acd_local.cli.worker.serve", catch)  # no model is needed to see what becomes of a flag
    assert cli(*base, *args, "--jsonl").code == 0
    assert seen == [Options().replace({name: value})]


def test_engine_flags_reach_the_engine(
    cli: Callable[..., Done], asked: list[dict[str, Any]], base: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []
    create = Engine.__init__

    def spy(self: Engine, model: str, **kw: Any) -> None:
        given.append({"model": model, **kw})
        create(self, model, **kw)

    monkeypatch.setattr(Engine, "__init__", spy)
    flags = ("-ngl", "0", "--kv-type", "q8_0", "--layout", "split", "-c", "300", "-n", "1")
    one_line_error(cli(*base, "hi", *flags), 2, "q8_0", "--kv-type f16")  # heads of 16 cannot be quantized
    assert callable(given[0].pop("on_progress")) and callable(given[0].pop("on_check"))
    assert given[0] == {
        "model": base[0],
        "pair": base[-1],
        "soft": None,
        "ctx_size": 300,
        "threads": 1,
        "gpu_layers": 0,
        "kv_type": "q8_0",
        "layout": "split",
        "conversations": 1,
    }
    assert cli(*base, "hi", "-c", "300", "-n", "1").code == 0
    assert asked[-1]["engine"].n_ctx == 300


def test_both_layouts_say_the_same(cli: Callable[..., Done], base: tuple[str, ...]) -> None:
    greedy = [cli(*base, "What is water?", "-n", "24", "--temp", "0", "--layout", x) for x in ("shared", "split")]
    assert greedy[0].code == 0
    assert len(greedy[0].out) > 10
    assert greedy[0] == greedy[1]


def test_a_seed_repeats_and_is_reported(cli: Callable[..., Done], base: tuple[str, ...]) -> None:
    free = json.loads(cli(*base, "hi", "-n", "20", "--temp", "1.5", "--json").out)
    again = cli(*base, "hi", "-n", "20", "--temp", "1.5", "--seed", str(free["seed"])).out
    other = cli(*base, "hi", "-n", "20", "--temp", "1.5", "--seed", str(free["seed"] // 2 + 1)).out
    assert free["text"].rstrip("\n") + "\n" == again != other


def test_alpha_zero_and_plain_are_the_safe_stream_alone(cli: Callable[..., Done], base: tuple[str, ...]) -> None:
    def run_json(*args: str) -> dict[str, Any]:
        done = cli(*base, "What is water?", "-n", "16", "--temp", "0", "--json", *args)
        assert done.code == 0
        return dict(json.loads(done.out))

    plain, zero, contrast = run_json("--plain"), run_json("--alpha", "0"), run_json("--divergence")
    raw = run_json("--raw-contrast", "--beta", "0", "--alpha", "0.9")
    assert plain["text"] == zero["text"] != contrast["text"]
    assert (plain["contrast"]["alpha"], plain["contrast"]["changed_tokens"]) == (0, 0)
    assert plain["contrast"]["mean_divergence"] is None
    assert contrast["contrast"]["changed_tokens"] > 0
    assert contrast["contrast"]["mean_divergence"] > 0
    assert (raw["contrast"]["raw"], raw["contrast"]["beta"], raw["contrast"]["alpha"]) == (True, 0, 0.9)
    assert raw["text"] != contrast["text"]


def test_stop_max_tokens_and_system(
    cli: Callable[..., Done], asked: list[dict[str, Any]], base: tuple[str, ...]
) -> None:
    whole = cli(*base, "hi", "-n", "20", "--temp", "0").out[:-1]
    stop = whole[6:9]
    cut = json.loads(cli(*base, "hi", "-n", "20", "--temp", "0", "--stop", stop, "--json").out)
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop_string"
    short = json.loads(cli(*base, "hi", "-n", "3", "--temp", "0", "--json").out)
    assert short["finish_reason"] == "length"
    assert short["usage"]["completion_tokens"] == 3
    assert whole.startswith(short["text"].rstrip("�"))
    told = json.loads(cli(*base, "hi", "-n", "3", "--system", "Be brief and red.", "--json").out)
    assert asked[-1]["system"] == "Be brief and red."
    assert told["usage"]["prompt_tokens"] > short["usage"]["prompt_tokens"] + 3


def test_grammars_and_schemas(cli: Callable[..., Done], base: tuple[str, ...], tmp_path: Path) -> None:
    schema = '{"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}'
    (tmp_path / "schema.json").write_text(schema)
    (tmp_path / "yes.gbnf").write_text('\ufeffroot ::= "yes"\n')
    for args in (("--json-schema", schema), ("--json-schema-file", str(tmp_path / "schema.json"))):
        done = cli(*base, "hi", *args, "-n", "100")
        assert isinstance(json.loads(done.out)["ok"], bool), done
    assert cli(*base, "hi", "--grammar-file", str(tmp_path / "yes.gbnf")) == Done(0, "yes\n", "")
    (tmp_path / "latin.gbnf").write_bytes(b'root ::= "\xff"')
    for args, problem in (
        (("--grammar", "root ::= ["), "bad grammar"),
        (("--grammar", "root ::= nothing"), "bad grammar"),
        (("--json-schema", "{"), "JSON"),
        (("--json-schema", '{"items": {"uniqueItems": true}}'), "'uniqueItems' at /items"),
        (("--json-schema", r'{"pattern": "\ud83d"}'), "'pattern' at the root (it holds half a surrogate pair"),
        (("--grammar-file", "/no/such"), "cannot read /no/such"),
        (("--grammar-file", str(tmp_path)), "directory"),
        (("--grammar-file", str(tmp_path / "latin.gbnf")), "not UTF-8"),
        (("--grammar", 'root ::= "x"', "--grammar-file", str(tmp_path / "yes.gbnf")), "exclude each other"),
        (("--grammar", 'root ::= "x"', "--json-schema", "{}"), "exclude each other"),
    ):
        one_line_error(cli(*base, "hi", *args), 2, problem)


@pytest.mark.parametrize(
    "args",
    [
        ("--alpha=-1",),
        ("--alpha", "-1"),
        ("--alpha", "nan"),
        ("--alpha", "inf"),
        ("--alpha", "much"),
        ("--beta", "2"),
        ("--beta", "-0.1"),
        ("--temp", "-1"),
        ("--seed", "-1"),
        ("--seed", "1.5"),
        ("--max-tokens", "0"),
        ("--stop", ""),
        ("--ctx-size", "0"),
        ("--ctx-size", "99999999999"),
        ("--threads", "0"),
        ("--threads", "100000"),
        ("--gpu-layers", "-2"),
        ("--kv-type", "q4"),
        ("--layout", "none"),
        ("--overflow", "maybe"),
        ("--mirostat", "3"),
        ("--no-such-option",),
        ("--plain=3",),
        ("third",),
        ("--max-tokens",),
    ],
)
def test_usage_errors_are_one_line(cli: Callable[..., Done], args: tuple[str, ...]) -> None:
    """They come first: the model is not even looked for."""
    one_line_error(cli("/no/such.gguf", "hi", *args), 2)
    done = cli("/no/such.gguf", "hi", "--json", *args)
    assert done.code == 2
    assert json.loads(done.out)["error"]["code"] == "usage"


def test_pairs(cli: Callable[..., Done], asked: list[dict[str, Any]], base: tuple[str, ...], tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(PAIR.replace("short", "own") + "alpha = 0.25\n")
    record = json.loads(cli(*base[:5], "hi", "-n", "1", "--pair", str(own), "--json").out)
    assert (record["pair"], record["contrast"]["alpha"]) == ("own", 0.25)
    record = json.loads(cli(*base[:5], "hi", "-n", "1", "--pair", str(own), "--alpha", "0.75", "--json").out)
    assert record["contrast"]["alpha"] == 0.75
    assert json.loads(cli(*base[:5], "hi", "-n", "1", "--pair", "default", "--json").out)["pair"] == "default"
    own.write_text(PAIR.replace("short", "own") + "alpha = -1\n")
    one_line_error(cli(*base[:5], "hi", "--pair", str(own)), 5, "own.toml", "alpha", "5")
    one_line_error(cli(*base[:5], "hi", "--pair", "no-such"), 5, "no-such")


def test_what_does_not_fit_the_context(cli: Callable[..., Done], base: tuple[str, ...]) -> None:
    one_line_error(cli(*base, "wine " * 2000), 4, "tokens long", "512")
    one_line_error(cli(*base, "hi", "-n", "600", "--overflow", "error"), 4, "--overflow")
    assert cli(*base, "hi", "-n", "600", "--grammar", 'root ::= "a"').code == 0


# -- reports -----------------------------------------------------------------------------------------------------------


def test_json_record(cli: Callable[..., Done], base: tuple[str, ...]) -> None:
    done = cli(*base, "größer?", "-n", "12", "--seed", "3", "--json")
    assert (done.code, done.err, done.out.count("\n")) == (0, "", 1)
    record = json.loads(done.out)
    names = ("text", "finish_reason", "usage", "timings", "seed", "contrast", "gate")
    assert list(record) == ["model", "pair", "fitted", "soft", *names]
    assert (record["fitted"], record["soft"]) == (True, False)
    assert (record["model"], record["pair"], record["seed"]) == ("tiny llama", "short", 3)
    assert record["finish_reason"] in ("length", "stop")
    assert record["usage"]["prompt_tokens"] > 20
    assert 0 < record["usage"]["completion_tokens"] <= 12
    assert set(record["usage"]) == {"prompt_tokens", "prompt_decoded", "completion_tokens"}
    assert record["usage"]["prompt_decoded"] > record["usage"]["prompt_tokens"]
    assert set(record["timings"]) == {"prompt_seconds", "answer_seconds", "tokens_per_second"}
    contrast = record["contrast"]
    assert set(contrast) == {"alpha", "beta", "raw", "positions", "compared", "changed_tokens", "mean_divergence"}
    assert 0 <= contrast["changed_tokens"] <= contrast["positions"]
    assert contrast["mean_divergence"] is None


def test_the_divergence_is_measured_where_it_is_asked_for(
    cli: Callable[..., Done], base: tuple[str, ...], tmp_path: Path
) -> None:
    """It takes the adversarial logits of every position; without it the statistics say where they were taken."""
    given = (*base, "hi", "-n", "40", "--temp", "0", "--beta", "0.5", "--strategy", "deferred", "--json")
    free, asked, traced = (
        json.loads(cli(*given, *more).out)["contrast"]
        for more in ((), ("--divergence",), ("--trace", str(tmp_path / "trace.jsonl")))
    )
    assert free["mean_divergence"] is None
    assert free["compared"] < free["positions"]
    assert traced == free, "a trace needs the safe stream alone"
    assert asked["mean_divergence"] > 0
    assert asked["compared"] == asked["positions"]


@pytest.mark.parametrize(
    ("args", "exit_code", "code"),
    [
        (("/no/such.gguf", "hi"), 3, "model"),
        (("MODEL", "wine " * 2000), 4, "context"),
        (("MODEL", "hi", "--pair", "no-such"), 5, "pair"),
        (("MODEL", "hi", "--grammar", "root ::= ["), 2, "usage"),
        (("MODEL",), 2, "usage"),
    ],
)
def test_json_on_error(
    cli: Callable[..., Done], base: tuple[str, ...], args: tuple[str, ...], exit_code: int, code: str
) -> None:
    done = cli(*base[1:], "--json", *(base[0] if arg == "MODEL" else arg for arg in args))
    assert done.code == exit_code
    record = json.loads(done.out)
    assert record["text"] == ""
    assert record["finish_reason"] == "error"
    assert record["error"]["code"] == code
    assert done.err == f"acd-run: {record['error']['message']}\n"


def test_an_error_after_some_text(
    cli: Callable[..., Done], base: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was said stays, ended by a newline."""
    from acd_local.errors import NumericalError
    from acd_local.runtime import choice, contrast

    left = 0

    def failing(*args: Any, **kw: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise NumericalError("the safe stream produced nan logits")
        return contrast.apply_contrast(*args, **kw)

    monkeypatch.setattr(choice, "apply_contrast", failing)
    left = 3
    done = cli(*base, "hi", "--grammar", ENDLESS, "--strategy", "stepwise")
    assert done == Done(1, "aaa\n", "acd-run: the safe stream produced nan logits\n")
    left = 3
    done = cli(*base, "hi", "--grammar", ENDLESS, "--strategy", "stepwise", "--json")
    assert json.loads(done.out) == {
        "text": "aaa",
        "finish_reason": "error",
        "error": {"code": "numerical", "message": "the safe stream produced nan logits"},
    }
    assert done.code == 1


def test_stats_on_stderr(cli: Callable[..., Done], base: tuple[str, ...]) -> None:
    done = cli(*base, "hi", "-n", "8", "--seed", "5", "--stats")
    assert done.code == 0
    for part in (
        r"seed 5$",
        r"\d+ prompt, \d+ answer",
        r"alpha 0\.5, beta 0\.1: \d+ of \d+ tokens changed, compared at \d+%$",
    ):
        assert re.search(part, done.err, re.MULTILINE), part
    assert "tokens/s" not in done.out
    assert "mean KL" in cli(*base, "hi", "-n", "8", "--stats", "--divergence").err
    plain = cli(*base, "hi", "-n", "8", "--plain", "--stats")
    assert "plain (no contrast)" in plain.err
    assert "KL" not in plain.err


def test_trace(cli: Callable[..., Done], base: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("an older and much longer trace\n" * 1000)
    done = cli(*base, "hi", "-n", "12", "--seed", "1", "--temp", "1", "--trace", str(path), "--json")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    record = json.loads(done.out)
    assert len(lines) == record["contrast"]["positions"]
    for line in lines:
        assert set(line) == {"token", "text", "changed", "safe_token", "safe_text", "safe_logprob", "safe_rank"}
        assert line["safe_logprob"] <= 0
        assert line["safe_rank"] >= 1
        assert line["changed"] == (line["safe_token"] != line["token"])
    assert sum(line["changed"] for line in lines) == record["contrast"]["changed_tokens"] > 0
    ascii_text = "".join(line["text"] for line in lines)
    if "�" not in ascii_text:
        assert ascii_text == record["text"]
    cli(*base, "hi", "-n", "4", "--plain", "--trace", str(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 4
    assert all(line["safe_logprob"] <= 0 and not line["changed"] for line in lines)


def test_a_trace_file_is_checked_early_and_kept_on_errors(
    cli: Callable[..., Done], base: tuple[str, ...], tmp_path: Path
) -> None:
    one_line_error(cli("/no/such.gguf", "hi", "--trace", str(tmp_path / "missing" / "trace")), 2, "cannot write")
    one_line_error(cli("/no/such.gguf", "hi", "--trace", str(tmp_path)), 2, "cannot write")
    old = tmp_path / "trace.jsonl"
    old.write_text("precious\n")
    for args in (
        (*base, "hi", "--alpha", "-1"),
        base,
        ("/no/such.gguf", "hi"),
        (*base, "hi", "--grammar", "root ::= ["),
        (*base, "wine " * 2000),
    ):
        assert cli(*args, "--trace", str(old)).code in (2, 3, 4)
        assert old.read_text() == "precious\n"


@pytest.mark.parametrize("more", [(), ("--stats",)])
def test_an_answer_outlives_a_trace_that_cannot_be_written(
    cli: Callable[..., Done], base: tuple[str, ...], more: tuple[str, ...]
) -> None:
    """--json prints one object: the answer, with the error beside it."""
    asked = (*base, "hi", "-n", "4", "--seed", "1", "--strategy", "stepwise", *more)
    good = cli(*asked, "--json")
    done = cli(*asked, "--trace", "/dev/full", "--json")
    record, whole = json.loads(done.out), json.loads(good.out)
    assert (done.code, done.out.count("\n")) == (6, 1)
    assert record.pop("error") == {"code": "storage", "message": "cannot write /dev/full: No space left on device"}
    assert {key: record[key] for key in ("text", "finish_reason", "usage", "seed")} == {
        key: whole[key] for key in ("text", "finish_reason", "usage", "seed")
    }
    assert done.err.splitlines()[-1] == "acd-run: cannot write /dev/full: No space left on device"
    assert ("tokens/s" in done.err) == bool(more)
    plain = cli(*asked, "--trace", "/dev/full")
    assert (plain.code, plain.out) == (6, f"{whole['text'].rstrip()}\n") or whole["text"] != whole["text"].rstrip()


@pytest.mark.parametrize("args", [("--trace", "/"), ("--trace", "no/such/folder"), ("--ctx-size", "0")])
def test_json_is_one_object_where_nothing_was_answered(
    cli: Callable[..., Done], base: tuple[str, ...], args: tuple[str, ...]
) -> None:
    done = cli(*base, "hi", "--json", *args)
    assert (done.code, done.out.count("\n")) == (2, 1)
    assert json.loads(done.out)["finish_reason"] == "error"
    done = cli(*base, "--jsonl", "--ctx-size", "0")
    assert (done.code, done.out.count("\n")) == (2, 1)
    assert json.loads(done.out)["event"] == "error"


def test_a_trace_keeps_mode_and_link(cli: Callable[..., Done], base: tuple[str, ...], tmp_path: Path) -> None:
    path, link = tmp_path / "trace", tmp_path / "link"
    path.write_text("old\n")
    path.chmod(0o600)
    link.symlink_to("trace")
    assert cli(*base, "hi", "-n", "2", "--trace", str(link)).code == 0
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o600
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_warnings_go_to_stderr(cli: Callable[..., Done], base: tuple[str, ...], tiny: Callable[..., Path]) -> None:
    small = str(tiny("chatml", n_ctx=512))
    done = cli(small, *base[1:], "-c", "600", "hi", "--grammar", 'root ::= "red"')
    assert done == Done(0, "red\n", "acd-run: the model was trained for 512 tokens, not 600\n")


def test_an_abort_inside_ggml_starts_no_debugger(cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GGML_NO_BACKTRACE", raising=False)
    cli("--version")
    assert os.environ["GGML_NO_BACKTRACE"] == "1"


def test_endless_messages_are_cut() -> None:
    assert short_line("a\nb\x1b") == "a b␛"
    assert len(short_line("x" * 100_000)) < 1100


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_decoding(slow_model: tuple[str, ...], signum: int, code: int) -> None:
    """Also proves that text is streamed. `timeout` and terminals send the signal twice: it counts once."""
    process = start((*slow_model, "hi", "--grammar", ENDLESS))
    assert process.stdout is not None
    text = process.stdout.read(3)
    sent = time.monotonic()
    process.send_signal(signum)
    process.send_signal(signum)
    rest, err = process.communicate(timeout=30)
    assert time.monotonic() - sent < 10
    assert process.returncode == code
    assert re.fullmatch(b"a{3,}\n", text + rest)
    assert err == b""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_a_long_prompt(slow_model: tuple[str, ...], signum: int, code: int) -> None:
    process = start((*slow_model, "--json", "--threads", "1"), stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(b"the water is blue and the wine is red " * 800 + b"\n" * 200_000)  # more than a pipe holds
    process.stdin.close()
    process.stdin = None
    time.sleep(0.8)  # it was read: from here on only the model is loaded, which is quick
    sent = time.monotonic()
    process.send_signal(signum)
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - sent < 10
    assert (process.returncode, err) == (code, b"")
    if out:  # loaded within the time given
        record = json.loads(out)
        assert (record["text"], record["finish_reason"]) == ("", "cancelled")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_process_where_nothing_can_be_cancelled(signum: int, code: int) -> None:
    """As while a model is loaded: the main thread sits in C and runs no Python handler."""
    script = (
        "import ctypes\nfrom acd_local.cli.shell import Interrupts\n"
        "with Interrupts():\n  print('ready', flush=True)\n  ctypes.CDLL(None).pause()\n"
        "  [ctypes.CDLL(None).sleep(60) for _ in range(9)]"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signum)
    assert process.wait(5) == code
    assert process.communicate() == (b"", b"")


def test_a_second_signal_ends_the_process() -> None:
    """Where an answer cannot be stopped, as on a device in the middle of a long batch."""
    script = (
        "import ctypes\nfrom acd_local.cli.shell import Interrupts\nfrom acd_local.runtime.cancel import CancelToken\n"
        "with Interrupts() as i:\n  i.cancels(CancelToken())\n  print('ready', flush=True)\n"
        "  while True: ctypes.CDLL(None).sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment())
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(Interrupts.ECHO + 0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130
    process.stdout.close()


def test_interrupts_leave_the_handlers_as_they_were() -> None:
    from acd_local.runtime.cancel import CancelToken

    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with Interrupts() as interrupts:
        token = CancelToken()
        interrupts.cancels(token)
        assert interrupts.exit_code is None
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 5
        while not token.is_set and time.monotonic() < deadline:
            time.sleep(0.01)
        assert token.is_set
        assert interrupts.exit_code == 143
        later = CancelToken()
        interrupts.cancels(later)
        assert later.is_set, "a signal also counts for the answer that starts after it"
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


# -- help --------------------------------------------------------------------------------------------------------------


def test_help_loads_little_and_says_much() -> None:
    code = (
        "import sys\nsys.argv = ['acd-run', '--help']\n"
        "from acd_local.cli.run import main\n"
        "try: main()\n"
        "finally: print([m for m in ('numpy', 'llama_cpp', 'rich', 'jinja2') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment() | {"COLUMNS": "80"}, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert done.stdout.startswith("Usage: acd-run MODEL [PROMPT] [OPTIONS]\n")
    assert max(map(len, done.stdout.splitlines())) <= 80
    for section in ("Options:", "Model:", "Contrast:", "Limits:", "Sampling:", "Exit codes:"):
        assert f"{section}\n" in done.stdout
    assert re.search(r"^  --json +One JSON object", done.stdout, re.MULTILINE)  # beside each other
    for exit_code in ("0", "1", "2", "3", "4", "5", "6", "130", "143"):
        assert re.search(rf"^    {exit_code} +\w", done.stdout, re.MULTILINE)
    options = set(re.findall(r"--[a-z-]+", done.stdout))
    for name in Options.names() - {"dry_sequence_breakers"}:
        assert f"--{name.replace('_', '-')}" in options


def test_help_names_the_true_defaults() -> None:
    defaults = Options()
    named = 0
    for parameter in command.params:
        text = (parameter.help or "") if isinstance(parameter, click.Option) else ""
        match = re.search(r"default ([\w.-]+?)\.?$", text)
        if match and parameter.name in Options.names():
            assert match[1] == f"{getattr(defaults, parameter.name)}".removesuffix(".0"), parameter.name
            named += 1
    assert named == 19


def test_version(cli: Callable[..., Done]) -> None:
    from acd_local import __version__

    done = cli("--version")
    assert done.code == 0
    assert done.out == f"acd-run, version {__version__}\n"


# -- the demo model ----------------------------------------------------------------------------------------------------


def test_the_demo_model_answers(demo: Path) -> None:
    """README's first question."""
    asked = "Explain in two sentences why leaves turn yellow in autumn."
    with subprocess.Popen(["echo", asked], stdout=subprocess.PIPE) as question:
        done = subprocess_run(("demo", "-n", "12", "--temp", "0", "-t", "1"), stdin=question.stdout)
    assert demo.exists() and asked in (ROOT / "README.md").read_text("utf-8")
    assert (done.code, done.err) == (0, "")
    assert "leaves" in done.out


@pytest.fixture(autouse=True)
def _no_debugging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("ACD_DEBUG", raising=False)
    yield
