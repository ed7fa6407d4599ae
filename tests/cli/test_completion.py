"""Shell completion: in bash itself, in zsh and fish where they are installed, and by what click asks of a program."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import child_env

from acd_local.cli import completion, main
from acd_local.cli.shell import run_cli

MODULES = {"acd": "main", "acd-run": "run", "acd-chat": "chat", "acd-serve": "serve"}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the four commands."""
    folder = tmp_path_factory.mktemp("bin")
    for name, module in MODULES.items():
        code = f"import sys; sys.argv[0] = {name!r}; from acd_local.cli.{module} import main; main()"
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@"\n')
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def env(programs: Path, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "config.toml").write_text('[models]\ncoder = "demo"\ncooking = "demo"\n')
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return child_env(PATH=path, ACD_CONFIG_DIR=str(tmp_path), TERM="dumb", HOME=str(tmp_path))


def asked(env: dict[str, str], words: str, *, shell: str = "zsh") -> list[str]:
    """What a program answers to the words that a shell has; the last one is completed."""
    program = words.split(" ")[0]
    more = {
        f"_{program.upper().replace('-', '_')}_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    done = subprocess.run([program], env=env | more, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == ""
    lines = done.stdout.split("\n")
    return [f"{kind},{value}" for kind, value in zip(lines[::3], lines[1::3], strict=False)]


@pytest.mark.parametrize(
    ("words", "among"),
    [
        ("acd-run --te", {"plain,--temp"}),
        ("acd-run co", {"file,co", "plain,coder", "plain,cooking"}),
        ("acd-run d", {"file,d", "plain,demo"}),
        ("acd-run demo hi --pair as", {"plain,as-is"}),
        ("acd-run demo hi --gate o", {"plain,on", "plain,off"}),
        ("acd-run demo hi --trace x", {"file,x"}),
        ("acd-chat --kv-type ", {"plain,f16", "plain,q8_0"}),
        ("acd-serve --exit", {"plain,--exit-with-stdin"}),
        ("acd co", {"plain,completion", "plain,config"}),
        ("acd config set mo", {"plain,model", "plain,models.coder"}),
        ("acd eval --judge co", {"file,co", "plain,coder"}),
        ("acd fit --keep default", {"plain,default"}),
        ("acd completion f", {"plain,fish"}),
    ],
)
def test_what_is_offered(env: dict[str, str], words: str, among: set[str]) -> None:
    assert among <= set(asked(env, words))


def test_broken_settings_do_not_break_completion(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("threads = ")
    assert "plain,demo" in asked(env, "acd-run d")
    assert "plain,--temp" in asked(env, "acd-run demo --te")


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_command_prints_a_script_for_each_program(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    if shell == "bash" and shutil.which("bash") is None:
        pytest.skip("click asks bash for its version")
    assert run_cli(main.command, "acd", ["completion", shell]) == 0
    script = capsys.readouterr().out
    for program, variable in zip(completion.PROGRAMS, ("_ACD_", "_ACD_RUN_", "_ACD_CHAT_", "_ACD_SERVE_"), strict=True):
        assert f"{variable}COMPLETE={shell}_complete" in script and program in script


def in_shell(shell: str, env: dict[str, str], script: str) -> list[str]:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    done = subprocess.run([shell, "-c", script], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_bash_completes(env: dict[str, str]) -> None:
    script = """
    eval "$(acd completion bash)" && complete -p acd acd-run acd-chat acd-serve >/dev/null || exit 1
    compopt() { :; }
    ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); "_${1//-/_}_completion" "$1"
            echo "${COMPREPLY[@]}"; }
    ask acd-run --max; ask acd-run co; ask acd pairs ch; ask acd-serve demo --l
    """
    assert in_shell("bash", env, script) == ["--max-tokens", "coder", "cooking", "check", "--layout", "--lock"]


def test_zsh_takes_the_script(env: dict[str, str]) -> None:
    script = """
    autoload -Uz compinit && compinit -u -D && eval "$(acd completion zsh)" || exit 1
    print ${_comps[acd]} ${_comps[acd-run]} ${_comps[acd-chat]} ${_comps[acd-serve]}
    """
    functions = ["_acd_completion", "_acd_run_completion", "_acd_chat_completion", "_acd_serve_completion"]
    assert in_shell("zsh", env, script) == functions


def test_fish_completes(env: dict[str, str]) -> None:
    script = "acd completion fish | source; complete -C 'acd-run --max' | cut -f1; complete -C 'acd pairs ch' | cut -f1"
    assert in_shell("fish", env, script) == ["--max-tokens", "check"]
