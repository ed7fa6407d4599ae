"""Signals, help and version of acd-run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import click
import pytest
from places import child_env
from run_command import ENDLESS, Done, start

from acd_local.cli.run import command
from acd_local.cli.shell import Interrupts
from acd_local.options import Options

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
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=child_env()
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
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=child_env())
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
        [sys.executable, "-c", code], capture_output=True, text=True, env=child_env() | {"COLUMNS": "80"}, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert done.stdout.startswith("Usage: acd-run MODEL [PROMPT] [OPTIONS]\n")
    assert max(map(len, done.stdout.splitlines())) <= 80
    for section in ("Options:", "Contrast and gate:", "Model:", "Limits and form:", "Samplers:", "Exit codes:"):
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
