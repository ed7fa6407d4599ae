"""A server starts before its model is there, and ends with a signal, or with the program that started it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from http_server import CHAT, ENDLESS, HI, MAIN, Server, chunks, read_until
from places import child_env

TYPED = "Host: localhost\r\nContent-Type: application/json\r\n"


def test_it_listens_before_the_model_is_there(slow_base: tuple[str, ...], start: Callable[..., Server]) -> None:
    server = start(*slow_base, wait=False)
    seen = []
    while (health := server.get("/health")).status != 200:
        assert health.status == 503 and "retry-after" in health.headers
        seen.append(health.json)
        loading = server.chat()
        if loading.status == 503:
            assert loading.error["message"] == "the model is being loaded" and loading.headers["retry-after"]
    assert seen, "it was asked too late"
    assert {health["status"] for health in seen} == {"loading"}
    assert {health["phase"] for health in seen} <= {"check", "model"}
    assert health.json == {"status": "ok"}


def test_a_signal_lets_answers_end(slow_base: tuple[str, ...], start: Callable[..., Server]) -> None:
    server = start(*slow_base)
    running = server.open(max_tokens=150, response_format=ENDLESS)
    read_until(running, rb'"content":"[^"]')
    waiting = server.open(max_tokens=3)
    server.until("acd_requests_waiting", 1)
    server.process.send_signal(signal.SIGTERM)
    for connection in (running, waiting):
        assert b'"finish_reason":"length"' in read_until(connection, rb"data: \[DONE\]\n\n")
    code, err = server.end()
    assert code == 143
    assert b"Traceback" not in err


def test_a_second_signal_ends_answers_with_an_error_and_done(
    slow_base: tuple[str, ...], start: Callable[..., Server]
) -> None:
    server = start(*slow_base)
    running = server.open(response_format=ENDLESS)
    begun = read_until(running, rb'"content":"[^"]')
    whole = server.open(response_format=ENDLESS, stream=False)
    server.until("acd_requests_waiting", 1)
    server.process.send_signal(signal.SIGINT)
    time.sleep(0.8)  # sooner, the second one would be taken for the same wish
    server.process.send_signal(signal.SIGINT)
    body = begun + read_until(running, rb"data: \[DONE\]\n\n")
    *_, last = chunks_of(body)
    assert last["error"]["type"] == "server_error" and "ending" in last["error"]["message"]
    assert read_until(whole, rb"}}").startswith(b"HTTP/1.1 503")
    assert server.end()[0] == 130


def chunks_of(response: bytes) -> list[dict]:  # type: ignore[type-arg]
    """The events of a response as it came, in chunks."""
    body, rest = b"", response.partition(b"\r\n\r\n")[2]
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return chunks(body)


def test_an_idle_server_ends_at_once(base: tuple[str, ...], start: Callable[..., Server]) -> None:
    server = start(*base)
    server.process.send_signal(signal.SIGTERM)
    code, err = server.end()
    assert code == 143
    lines = err.decode().splitlines()
    assert lines[0] == f"acd-serve: {server.url}/"
    assert lines[1].endswith("is ready") and len(lines) == 2


@pytest.mark.parametrize(
    "sent", [b"POST /v1/cha", f"POST {CHAT} HTTP/1.1\r\n{TYPED}Content-Length: 9\r\n\r\n{{".encode()]
)
def test_a_request_that_never_comes_holds_up_no_end(
    base: tuple[str, ...], start: Callable[..., Server], sent: bytes
) -> None:
    server = start(*base)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(sent)
        server.get("/health")
        signalled = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        code, err = server.end()
    assert code == 143 and time.monotonic() - signalled < 25
    assert len(err.splitlines()) == 2


def test_a_client_that_takes_nothing_does_not_hold_up_the_end_of_the_program_that_started_it(
    slow_base: tuple[str, ...], start: Callable[..., Server]
) -> None:
    server = start(*slow_base, "--exit-with-stdin", stdin=subprocess.PIPE)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    body = json.dumps({"stream": True, "trace": True, "messages": HI, "response_format": ENDLESS}).encode()
    connection.sendall(f"POST {CHAT} HTTP/1.1\r\n{TYPED}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    server.until("acd_requests_running", 1)
    assert server.process.stdin is not None
    server.process.stdin.close()
    code, err = server.end()
    connection.close()
    assert code == 0 and len(err.splitlines()) == 2


def test_a_signal_while_the_model_is_loaded(slow_base: tuple[str, ...], start: Callable[..., Server]) -> None:
    server = start(*slow_base, wait=False)
    server.process.send_signal(signal.SIGTERM)
    code, err = server.end()
    assert code == 143 and b"Traceback" not in err


def test_it_ends_with_its_stdin_while_the_model_is_loaded(
    slow_base: tuple[str, ...], start: Callable[..., Server]
) -> None:
    server = start(*slow_base, "--exit-with-stdin", wait=False, stdin=subprocess.PIPE)
    assert server.process.stdin is not None
    server.process.stdin.close()
    code, err = server.end()
    assert code == 0 and err.decode().splitlines()[0] == f"acd-serve: {server.url}/"


@pytest.mark.parametrize("busy", [False, True])
def test_it_ends_with_its_stdin(base: tuple[str, ...], start: Callable[..., Server], busy: bool) -> None:
    """Also while it answers: the program that started it is gone."""
    server = start(*base, "--exit-with-stdin", stdin=subprocess.PIPE)
    if busy:
        connection = server.open(response_format=ENDLESS)
        read_until(connection, rb'"content":"[^"]')
    assert server.process.stdin is not None
    server.process.stdin.close()
    assert server.end()[0] == 0


def test_its_stdin_is_left_alone_otherwise(base: tuple[str, ...], start: Callable[..., Server]) -> None:
    server = start(*base)  # which is at its end from the beginning
    assert server.ask("POST", CHAT, {"messages": HI, "max_tokens": 1}).status == 200


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("/no/such.gguf",), 3, "no such"),
        (("demo", "--temp", "-1"), 2, "temp"),
        (("demo", "--port", "70000"), 2, "port"),
        (("demo", "--host", "no.such.host.invalid"), 2, "cannot listen"),
        (("demo", "--host", "203.0.113.1"), 2, "cannot listen"),
        (("demo", "--pair", "no-such"), 5, "no-such"),
        (("demo", "--parallel", "2", "--slots", "1"), 2, "slots"),
    ],
)
def test_a_server_that_cannot_start_says_so_in_one_line(args: tuple[str, ...], code: int, words: str) -> None:
    done = subprocess.run([sys.executable, "-c", MAIN, *args], env=child_env(), capture_output=True, timeout=60)
    assert done.returncode == code, done
    *_, last = done.stderr.decode().splitlines()
    assert last.startswith("acd-serve: ") and words in last.lower()
    assert b"Traceback" not in done.stderr


def test_a_port_that_is_taken_is_named(base: tuple[str, ...], start: Callable[..., Server]) -> None:
    port = str(start(*base).port)
    done = subprocess.run([sys.executable, "-c", MAIN, *base, "--port", port], env=child_env(), capture_output=True)
    assert done.returncode == 2 and f"port {port}".encode() in done.stderr


def test_an_installation_without_the_extra_names_it(base: tuple[str, ...], tmp_path: Path) -> None:
    code = f"import sys; sys.modules['starlette'] = None; {MAIN}"
    done = subprocess.run([sys.executable, "-c", code, *base], env=child_env(), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "acd-serve: acd-serve needs starlette: pip install 'acd-local[serve]'\n"
