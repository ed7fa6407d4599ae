"""Clients that go away, take nothing or are too many; long silences."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from http_server import CHAT, ENDLESS, HI, Server, read_until

LONG = "the water is blue and the wine is red " * 150


@pytest.fixture(scope="module")
def slow(slow_base: tuple[str, ...]) -> Iterator[Server]:
    """It is asked for answers without end, of which one at a time is made."""
    made = Server(*slow_base, "--queue", "1", "--keep-alive", "0.1")
    yield made
    made.close()


def idle(server: Server) -> None:
    server.until("acd_requests_running", 0)
    assert server.metrics()["acd_requests_waiting"] == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_answer(slow: Server, stream: bool) -> None:
    gone = slow.metrics().get("acd_clients_gone_total", 0)
    connection = slow.open(response_format=ENDLESS, stream=stream)
    slow.until("acd_requests_running", 1)
    if stream:
        read_until(connection, rb'"content":"[^"]')
    connection.close()
    idle(slow)
    assert slow.metrics()["acd_clients_gone_total"] == gone + 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("more", [b"\r\n", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"], ids=["line", "request"])
def test_a_client_that_sent_more_and_goes_away_ends_its_answer(slow: Server, stream: bool, more: bytes) -> None:
    """Also where what it sent comes while it is answered."""
    connection = slow.open(response_format=ENDLESS, stream=stream)
    slow.until("acd_requests_running", 1)
    connection.sendall(more)
    slow.get("/health")  # it was read
    connection.close()
    deadline = time.monotonic() + 3
    while slow.metrics()["acd_requests_running"]:
        assert time.monotonic() < deadline, "its answer takes much longer"
        time.sleep(0.05)


def test_requests_that_are_sent_in_advance_are_answered_in_their_order(slow: Server) -> None:
    one = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    connection = slow.open(max_tokens=2, stream=False)
    connection.sendall(one * 2)
    found = read_until(connection, rb'(?s)("status":"ok".*){2}')
    assert re.findall(rb"chat.completion|owned_by|status", found) == [b"chat.completion", *[b"owned_by", b"status"] * 2]
    connection.close()


def test_what_clients_leave_open_is_ended(base: tuple[str, ...], start: Callable[..., Server]) -> None:
    """Connections without a request, or with a part of one."""
    server = start(*base, first="import acd_local.serve.connection as c; c.UNSENT = 0.3")
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    typed = head + b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
    health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for sent in (b"", head, typed, health + head):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(sent)
            found = b""
            with suppress(ConnectionResetError):
                while data := connection.recv(65536):
                    found += data
            assert (b'"ok"' in found) == sent.startswith(health)
    assert server.answer(max_tokens=40)["usage"]["completion_tokens"] == 40


def test_a_client_that_takes_nothing_is_given_up(slow_base: tuple[str, ...], start: Callable[..., Server]) -> None:
    server = start(*slow_base, first="import acd_local.serve.connection as c; c.UNREAD = 0.3")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    body = json.dumps({"stream": True, "trace": True, "messages": HI, "response_format": ENDLESS}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    server.until("acd_clients_gone_total", 1)
    idle(server)
    connection.close()


@pytest.mark.parametrize("apart", [False, True])
def test_a_body_that_is_no_http_is_refused_once(
    base: tuple[str, ...], start: Callable[..., Server], apart: bool
) -> None:
    """Whether the request was refused already, for its content type, or not."""
    server = start(*base)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(head if apart else head + b"zz\r\n")
        got = read_until(connection, b"\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 415 " if apart else b"HTTP/1.1 400 ")
        if apart:
            connection.sendall(b"zz\r\n")
        while data := connection.recv(65536):
            got += data
        assert got.count(b"HTTP/1.1") == 1
    assert server.chat().status == 200
    server.process.terminate()
    code, err = server.end()
    assert code == 143 and b"Traceback" not in err


def test_a_client_that_resets_its_connection_ends_its_answer(slow: Server) -> None:
    connection = slow.open(response_format=ENDLESS)
    read_until(connection, rb'"content":"[^"]')
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()
    idle(slow)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_in_a_long_prompt_ends_it(slow: Server, stream: bool) -> None:
    """And before its turn has come."""
    before = slow.metrics().get("acd_prompt_rows_decoded_total", 0)
    connection = slow.open(messages=[{"role": "user", "content": LONG}], stream=stream)
    slow.until("acd_requests_running", 1)
    waiting = slow.open(messages=[{"role": "user", "content": LONG}], stream=stream)
    slow.until("acd_requests_waiting", 1)
    waiting.close()
    slow.until("acd_requests_waiting", 0)
    connection.close()
    idle(slow)
    assert slow.metrics().get("acd_prompt_rows_decoded_total", 0) == before, "no answer came of it"
    assert slow.answer("Hi")["acd"]["prompt_decoded"] < 500


def test_silence_is_broken_by_comments(slow: Server) -> None:
    """Also where the prompt gets on meanwhile, and while other requests are answered first."""
    connection = slow.open(response_format=ENDLESS)
    read_until(connection, rb'"content":"[^"]')
    asked = {"messages": [{"role": "user", "content": "b " + LONG}], "max_tokens": 2}
    waiting = slow.open(**asked)
    assert read_until(waiting, rb": still working\n\n").startswith(b"HTTP/1.1 200")
    connection.close()
    rest = read_until(waiting, rb"data: \[DONE\]")
    assert b": still working\n\n" in rest.partition(b'"content":"')[0], "while the prompt is read"
    assert slow.stream(**asked)[0]["choices"][0]["delta"]["role"] == "assistant"


def test_comments_can_be_left_out(slow_base: tuple[str, ...], start: Callable[..., Server]) -> None:
    server = start(*slow_base, "--keep-alive", "0")
    started = time.monotonic()
    events = server.chat("b " + LONG, stream=True, max_tokens=2).body
    assert time.monotonic() - started > 0.5 and b": still" not in events


def test_too_many_are_sent_away_and_told_when_to_come_again(slow: Server) -> None:
    connections = [slow.open(response_format=ENDLESS)]
    slow.until("acd_requests_running", 1)
    connections.append(slow.open(response_format=ENDLESS))
    slow.until("acd_requests_waiting", 1)
    for stream in (False, True):
        refused = slow.chat(stream=stream)
        assert (refused.status, refused.error["code"]) == (429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
    for connection in connections:
        connection.close()
    idle(slow)
    assert slow.chat().status == 200


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_a_client_that_takes_nothing_holds_up_nobody(
    tiny: Callable[..., Path], base: tuple[str, ...], start: Callable[..., Server]
) -> None:
    """Its answer rests, so that nothing piles up, and goes on when it reads."""
    server = start(str(tiny("chatml", n_ctx=4096)), *base[1:], "-c", "4096", "--parallel", "2")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    connection.settimeout(60)
    asked = {"stream": True, "trace": True, "messages": HI, "max_tokens": 2000, "response_format": ENDLESS}
    body = json.dumps(asked).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    server.until("acd_requests_running", 1)
    spent = -1
    while spent != (spent := ticks(server)):
        time.sleep(0.5)
    assert server.metrics()["acd_requests_running"] == 1, "it waits for its reader"
    assert server.answer(max_tokens=30)["usage"]["completion_tokens"] == 30
    found = read_until(connection, rb"data: \[DONE\]")
    assert found.count(b'"safe_token"') == 2000
    assert b'"finish_reason":"length"' in found
    connection.close()


def ticks(server: Server) -> int:
    """Processor time that a server has spent."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_an_answer_under_way_goes_on_beside_a_long_prompt(
    slow_base: tuple[str, ...], start: Callable[..., Server]
) -> None:
    server = start(*slow_base, "--parallel", "2")
    connection = server.open(response_format=ENDLESS)
    read_until(connection, rb'"content":"[^"]')
    other = server.open(messages=[{"role": "user", "content": LONG}], max_tokens=2)
    server.until("acd_requests_running", 2)
    read_until(connection, rb'(?s)("content":"[^"]*".*){3}')
    assert server.metrics()["acd_requests_running"] == 2, "the prompt is still being read"
    read_until(other, rb"data: \[DONE\]")
    for one in (connection, other):
        one.close()


def test_answers_that_are_made_together_are_whole(server: Server) -> None:
    import concurrent.futures

    questions = [f"What is {thing}?" for thing in ("red", "blue", "wine", "water", "it", "a carpet")]
    alone = [server.stream(q, max_tokens=12) for q in questions]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda q: server.stream(q, max_tokens=12), questions))
    for one, other in zip(alone, together, strict=True):
        assert [e["choices"][0]["delta"] for e in one] == [e["choices"][0]["delta"] for e in other]
