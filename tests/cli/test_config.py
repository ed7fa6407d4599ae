"""acd config, and what the commands take from the settings: below options and environment, above the defaults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from run_command import Done, subprocess_run

from acd_local import settings
from acd_local.cli import chat, main, run
from acd_local.cli.shell import run_cli

CHAT = "from acd_local.cli.chat import main; main()"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ACD_CONFIG_DIR", str(tmp_path / "config"))
    (tmp_path / "config").mkdir()
    return tmp_path / "config" / "config.toml"


@pytest.fixture
def acd(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def call(*args: str) -> Done:
        return Done(run_cli(main.command, "acd", args), *capsys.readouterr())

    return call


def test_shown_is_what_is_in_force_and_why(
    config: Path, acd: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACD_THREADS", raising=False)
    assert acd("config").out == (
        f"file         {config} (not there: nothing is set)\n"
        "model        none: commands need MODEL  (default)\n"
        "pair         the model's own, else by a quick check  (default)\n"
        "threads      the physical cores  (default)\n"
        "ctx_size     4096 or the model's limit  (default)\n"
        "gate         on where the pair has one  (default)\n"
    )
    for key, value in (("models.small", "demo"), ("model", "small"), ("threads", "2"), ("gate", "off")):
        assert acd("config", "set", key, value).out == f"{key} set in {config}\n"
    monkeypatch.setenv("ACD_THREADS", "1")
    lines = acd("config").out.splitlines()
    assert lines[1:4:2] == ["model        small  (line 2)", "threads      1  ($ACD_THREADS; line 3 of the file says 2)"]
    assert lines[5:] == ["gate         off  (line 4)", "models.small demo  (line 7)"]
    assert acd("config", "unset", "gate").code == 0 and "gate" not in config.read_text()
    config.write_text("threads = 0\n")
    done = acd("config")
    assert (done.code, done.out) == (2, "")
    assert done.err == f"acd: {config}: line 1: threads must be a whole number from 1 to 512, not 0\n"


def test_set_refuses_what_is_not_there(config: Path, acd: Callable[..., Done]) -> None:
    for code, key, value, says in (
        (3, "model", "none.gguf", "no such file: none.gguf"),
        (3, "models.x", "none.gguf", "no such file"),
        (5, "pair", "none", "no prompt pair 'none'"),
        (2, "threads", "many", "threads must be a whole number from 1 to 512, not 'many'"),
        (2, "threads", "-1", "threads must be"),
        (2, "gate", "maybe", "gate must be on or off, not 'maybe'"),
        (2, "model.x", "demo", "unknown option 'model.x'"),
        (2, "n_ctx", "512", "did you mean ctx_size?"),
    ):
        done = acd("config", "set", "--", key, value)
        assert done.code == code and says in done.err and done.err.count("\n") == 1, done
    assert not config.exists()


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="file names are Unicode there")
def test_a_name_that_toml_cannot_hold_is_refused(config: Path, acd: Callable[..., Done], tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.gguf")
    path.touch()
    for key in ("model", "models.x"):
        done = acd("config", "set", key, str(path))
        assert done.code == 2 and "half a surrogate pair" in done.err
    assert not config.exists()


def test_sets_at_once_lose_nothing(config: Path) -> None:
    program = "import sys; from acd_local.cli.main import main; main()"
    names = [f"m{number}" for number in range(6)]
    started = [
        subprocess.Popen([sys.executable, "-c", program, "config", "set", f"models.{name}", "demo"]) for name in names
    ]
    assert [process.wait(60) for process in started] == [0] * len(names)
    assert sorted(settings.read().models) == names


def test_paths_are_kept_whole(
    config: Path, acd: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.gguf").touch()
    Path("p.toml").write_text('format = 1\nname = "p"\nsafe = "Be kind."\nadversarial = "Be rude."\n')
    acd("config", "set", "models.own", "own.gguf")
    acd("config", "set", "model", "own")
    acd("config", "set", "pair", "./p.toml")
    acd("config", "set", "models.other", "own")  # an alias of an alias stands for the file
    found = settings.read()
    own = str(tmp_path / "own.gguf")
    assert (found.model, found.pair, found.models) == ("own", str(tmp_path / "p.toml"), {"own": own, "other": own})


def test_options_win_over_the_environment_and_that_over_the_settings(
    config: Path, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}
    monkeypatch.setattr(run.flags, "load_engine", lambda model, given, **_: seen.update(given, model=model) or 1 / 0)
    monkeypatch.delenv("ACD_THREADS", raising=False)
    config.write_text('model = "t"\npair = "as-is"\nthreads = 3\nctx_size = 300\ngate = false\n[models]\nt = "demo"\n')

    def taken(*args: str) -> tuple[object, ...]:
        seen.clear()
        run_cli(run.command, "acd-run", ["--jsonl", *args])
        return tuple(seen[name] for name in ("model", "pair", "threads", "ctx_size", "gate"))

    assert taken() == ("t", "as-is", 3, 300, "off")
    monkeypatch.setenv("ACD_THREADS", "2")
    monkeypatch.setenv("ACD_MODEL", "demo")
    assert taken() == ("demo", "as-is", None, 300, "off")
    assert taken("-t", "1", "--pair", "default", "-c", "400", "--gate", "on", "t") == ("t", "default", 1, 400, "on")
    config.write_text("gate = true\n")  # the default, and no wish for a gate where there is none
    assert taken() == ("demo", None, None, None, None)


def test_answers_under_the_settings(config: Path, tiny: Callable[..., Path]) -> None:
    config.write_text(f'model = "t"\npair = "as-is"\nctx_size = 300\n[models]\nt = "{tiny("chatml")}"\n')
    done = subprocess_run(("--json", "-n", "4", "t", "hi"))
    assert done.code == 0 and json.loads(done.out)["pair"] == "as-is"
    done = subprocess_run(("-n", "4", "hi you"))
    assert done.code == 3 and f"{config} sets a model, but the first argument is always the MODEL" in done.err
    assert 'acd-run t "my prompt"' in done.err


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ('pair = "none"', 5, "line 1: pair: no prompt pair 'none'"),
        ('model = "none"', 3, "line 1: model: no such file: none"),
        ("threads = 0", 2, "line 1: threads must be"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(
    config: Path, capsys: pytest.CaptureFixture[str], text: str, code: int, says: str
) -> None:
    config.write_text(text)
    assert run_cli(chat.command, "acd-chat", []) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"acd-chat: {config}: {says}")
    for args in (["--help"], ["--version"]):
        assert run_cli(chat.command, "acd-chat", args) == 0


def test_a_saved_chat_keeps_its_pair_against_the_settings(
    config: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model, saved = str(tiny("chatml")), tmp_path / "saved.json"
    pair = tmp_path / "short.toml"
    pair.write_text('format = 1\nname = "short"\nsafe = "You are kind."\nadversarial = "A demon answers."\n')

    def talk(text: str, *args: str) -> Done:
        asked = tmp_path / "asked"
        asked.write_text(text)
        with asked.open("rb") as file:
            return subprocess_run((model, "-n", "4", "-c", "512", *args), code=CHAT, stdin=file)

    assert talk(f"hi\n/save {saved}\n", "--pair", str(pair)).code == 0
    config.write_text('pair = "as-is"\n')
    assert "pair short" in talk("", "--load", str(saved)).err
    assert "pair as-is" in talk("", "--load", str(saved), "--pair", "as-is").err
