"""A worker ends with its input, by a signal and with its reader."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from places import child_env
from worker_client import ENDLESS, MAIN, Client


def test_end_of_input_finishes_what_is_queued(start: Callable[..., Client]) -> None:
    client = start("--temp", "0", "--max-tokens", "8")
    client.send(*({"id": i, "prompt": "hi"} for i in range(3)))
    client.send(b'{"id": 3, "prompt": "no newline at the end", "max_tokens": 2}')
    code, events, err = client.end()
    assert (code, err) == (0, b"")
    assert [e["id"] for e in events if e["event"] == "done"] == [0, 1, 2, 3]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_answer_and_the_worker(slow_base: tuple[str, ...], signum: int, code: int) -> None:
    client = Client(*slow_base)
    client.ready()
    client.send(*({"id": i, "prompt": "hi", "grammar": ENDLESS, "max_tokens": 3000} for i in range(3)))
    for i in range(3):
        client.until("queued", i)
    client.until("token", 0)
    sent = time.monotonic()
    client.process.send_signal(signum)  # its stdin stays open
    last = {}
    while (event := client.event()) is not None:
        if event.get("final"):
            assert event["id"] not in last
            last[event["id"]] = event
    assert {i: e["finish_reason"] for i, e in last.items()} == dict.fromkeys(range(3), "cancelled")
    assert last[0]["text"].startswith("a")
    assert last[1]["text"] == last[2]["text"] == ""
    assert client.process.wait(10) == code
    assert time.monotonic() - sent < 10
    assert client.end()[2] == b""


def test_a_signal_ends_an_idle_worker(start: Callable[..., Client]) -> None:
    client = start()
    client.process.send_signal(signal.SIGTERM)
    assert client.process.wait(10) == 143
    assert client.end() == (143, [], b"")


def test_a_reader_that_goes_away_ends_the_worker(base: tuple[str, ...]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, *base],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=child_env(),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    while b"ready" not in process.stdout.readline():
        pass
    process.stdin.write(json.dumps({"id": 1, "prompt": "hi", "grammar": ENDLESS}).encode() + b"\n")
    process.stdin.flush()
    while b'"token"' not in process.stdout.readline():
        pass
    process.stdout.close()
    assert process.wait(20) == 0  # its stdin is still open
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stdin.close()
    process.stderr.close()


def test_a_worker_whose_reader_stalls_is_ended_by_a_second_signal(base: tuple[str, ...]) -> None:
    """It waits for the pipe within a write: what a signal does must not wait for it as well."""
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, *base],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=child_env(),
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        while b"ready" not in process.stdout.readline():
            pass
        request = {"prompt": "hi", "grammar": ENDLESS, "max_tokens": 400, "trace": True}
        process.stdin.write(b"".join(json.dumps({"id": i, **request}).encode() + b"\n" for i in range(20)))
        process.stdin.flush()
        time.sleep(2)  # 64 kB of events are there long before
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.6)
        assert process.wait(5) == 143


def test_no_stdin_at_all_is_the_end_of_input(base: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-c", MAIN, *base],
        capture_output=True,
        env=child_env(),
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert {json.loads(line)["event"] for line in done.stdout.splitlines()} == {"loading", "ready"}


@pytest.mark.parametrize(
    ("args", "exit_code", "code"),
    [
        (("/no/such.gguf", "--jsonl"), 3, "model"),
        (("/no/such.gguf", "--jsonl", "--alpha", "-1"), 2, "usage"),
        (("/no/such.gguf", "--jsonl", "PROMPT"), 2, "usage"),
        (("/no/such.gguf", "--jsonl", "--json"), 2, "usage"),
        (("/no/such.gguf", "--jsonl", "--no-stdin"), 2, "usage"),
        (("/no/such.gguf", "--jsonl", "--stats"), 2, "usage"),
        (("/no/such.gguf", "--jsonl", "--trace", "x"), 2, "usage"),
    ],
)
def test_a_worker_that_cannot_start_says_so_on_both_sides(
    capsys: pytest.CaptureFixture[str], args: tuple[str, ...], exit_code: int, code: str
) -> None:
    from acd_local.cli.run import command
    from acd_local.cli.shell import run_cli

    assert run_cli(command, "acd-run", args) == exit_code
    captured = capsys.readouterr()
    assert captured.err.startswith("acd-run: ")
    assert captured.err.count("\n") == 1
    event = json.loads(captured.out)
    if "--json" not in args:
        assert event == {
            "id": None, "event": "error", "final": False, "code": code, "message": captured.err[9:-1],
        }  # fmt: skip
    assert captured.out.count("\n") == 1
