"""Who may ask: what web pages, other machines and clumsy clients try."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from http_server import CHAT, HI, MAIN, Server, read_until
from places import child_env

ASKED = {"messages": HI, "max_tokens": 2}


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "192.168.1.5",
        "",
        "[",
        "[::1",
        "evil.example@localhost",
        "localhost/evil.example",
        "localhost:1:2",
        "localhost:evil",
        "localhost.",
        "127.0.0.1?x",
        ":80",
    ],
)
def test_another_name_of_this_machine_is_refused(server: Server, host: str) -> None:
    """A page whose name was made to point here sends its own name, and no Origin."""
    for path in ("/", "/health", "/v1/models", CHAT):
        with server.send(b"", f"GET {path} HTTP/1.1\r\nHost: {host}\r\n") as connection:
            assert read_until(connection, rb"}$").startswith(b"HTTP/1.1 403")


def test_the_names_of_loopback_are_known(server: Server) -> None:
    for host in ("localhost", f"localhost:{server.port}", "127.0.0.1:1", "[::1]", "LOCALHOST"):
        with server.send(b"", f"GET /health HTTP/1.1\r\nHost: {host}\r\n") as connection:
            assert read_until(connection, rb"}$").startswith(b"HTTP/1.1 200"), host


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "https://evil.example",
        "http://localhost:1",
        "file://",
        "http://127.0.0.1",
        "http://[",
        "http://[::1",
        "//",
        "x",
        " ",
    ],
)
def test_other_origins_are_refused(server: Server, origin: str) -> None:
    for method, path in (("GET", "/v1/models"), ("POST", CHAT), ("OPTIONS", CHAT), ("GET", "/health")):
        refused = server.ask(method, path, ASKED, origin=origin)
        assert (refused.status, refused.error["code"]) == (403, "origin")
        assert not any(name.startswith("access-control") for name in refused.headers)


def test_the_page_itself_may_ask(server: Server) -> None:
    found = server.ask("POST", CHAT, ASKED, origin=server.url)
    assert found.status == 200
    assert not any(name.startswith("access-control") for name in found.headers)
    assert server.ask("OPTIONS", CHAT).status == 405
    assert server.ask("POST", CHAT, ASKED, origin=f"https://127.0.0.1:{server.port}").status == 200, "behind a proxy"


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded", "application/jsonp"])
def test_what_a_page_may_send_unasked_is_refused(server: Server, kind: str) -> None:
    refused = server.ask("POST", CHAT, ASKED, content_type=kind)
    assert (refused.status, refused.error["code"]) == (415, "content_type")
    assert server.ask("POST", CHAT, ASKED, content_type="Application/JSON; charset=utf-8").status == 200


def test_slashes_are_joined_and_paths_stay_off_the_disk(server: Server) -> None:
    assert server.get("//v1///models").status == 200
    assert server.ask("POST", f"/{CHAT}", ASKED).status == 200
    for path in (
        "/../../etc/passwd",
        "/v1/models/../../etc/passwd",
        "/%2e%2e/page.html",
        "/page.html",
        "/v1",
        "/x" * 999,
    ):
        missing = server.get(path)
        assert missing.status == 404 and missing.error["type"] == "not_found_error"
    assert server.ask("DELETE", "/v1/models").status == 405


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b'"Hi"',
        b"\xff\xfe",
        b'{"messages": NaN}',
        b'{"temperature": ' + b"9" * 5000 + b"}",
        b'{"a": ' * 65 + b"1" + b"}" * 65,
        b"[" * 200_000,
        b'{"messages": ' + b"[" * 200_000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "Hi"}], "stop": "\\udfff"}',
    ],
    ids=lambda body: repr(body[:20]),
)
def test_bodies_that_are_no_request(server: Server, body: bytes) -> None:
    refused = server.ask("POST", CHAT, body)
    assert (refused.status, refused.error["code"]) == (400, "invalid_json")


def test_the_depth_of_a_body_is_counted(server: Server) -> None:
    def nested(depth: int) -> bytes:
        inner = "[" * (depth - 1) + "]" * (depth - 1)
        return f'{{"messages": {json.dumps(HI)}, "max_tokens": 1, "metadata": {inner}}}'.encode()

    assert server.ask("POST", CHAT, nested(64)).status == 200
    assert server.ask("POST", CHAT, nested(65)).error["code"] == "invalid_json"


def test_a_body_that_is_too_large_is_refused_before_it_has_come(server: Server) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nX-A: b\r\n"
    with server.send(b" " * 16_000_001, head) as connection:
        assert read_until(connection, rb"too_large").startswith(b"HTTP/1.1 413")
    assert server.chat().status == 200


def test_requests_that_are_no_http_end_nothing(server: Server) -> None:
    for junk in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"A" * 100_000):
        with server.send(junk, "junk" if junk[0] else "x") as connection:
            connection.settimeout(5)
            connection.recv(1000)
    assert server.chat().status == 200


def test_the_pages_headers(server: Server) -> None:
    page = server.get("/")
    assert page.status == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert "unsafe" not in page.headers["content-security-policy"]
    for name in ("/", "/health", "/nothing"):
        assert server.get(name).headers["x-content-type-options"] == "nosniff"


def test_scripts_and_styles_are_allowed_by_what_they_say() -> None:
    from acd_local.serve.app import content_policy

    policy = content_policy(b"<style>a</style><script>b</script><script type='module'>c</script>")
    assert policy.count("'sha256-") == 3
    assert "script-src 'sha256-PiPoFgA5WUoziU9lZOGxNIu9egCI1CxKy3PurtWcAJ0=' 'sha256-" in policy


# -- a server that others reach ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def public(gated_base: tuple[str, ...]) -> Iterator[Server]:
    made = Server(*gated_base, "--host", "0.0.0.0", "--allow-host", "My.Server:8080")
    yield made
    made.close()


def test_beyond_loopback_a_token_is_needed(public: Server) -> None:
    token = public.told["token"]
    assert len(token) >= 32
    for authorization in ("", "Bearer", "Bearer x", f"Basic {token}", f"Bearer {token}x", "Bearer \u00fc", token):
        for method, path in (("GET", "/v1/models"), ("POST", CHAT), ("GET", "/metrics"), ("GET", "//props")):
            refused = public.ask(method, path, ASKED, authorization=authorization)
            assert (refused.status, refused.error["code"]) == (401, "token")
    assert public.chat().status == 200
    for path in ("/", "/health"):
        assert public.get(path, authorization="").status == 200


def test_beyond_loopback_addresses_are_known_and_names_that_were_given(public: Server) -> None:
    for host, status in (("192.168.1.5:80", 200), ("my.server", 200), ("[fe80::1]", 200), ("other.server", 403)):
        with public.send(b"", f"GET /health HTTP/1.1\r\nHost: {host}\r\n") as connection:
            assert read_until(connection, rb"}$").startswith(f"HTTP/1.1 {status}".encode()), host


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("plain", True),
        ("alpha", 0),
        ("alpha", 0.01),
        ("beta", 1.0),
        ("gate", False),
        ("gate_threshold", 1.0),
        ("window", 0),
        ("pair", "as-is"),
        ("pair", "default"),
    ],
)
def test_a_locked_guard_is_not_changed(public: Server, field: str, value: object) -> None:
    refused = public.chat(**{field: value})
    assert (refused.status, refused.error["param"], refused.error["code"]) == (403, field, "locked")


def test_what_holds_anyway_may_be_said(public: Server) -> None:
    props = public.get("/props").json
    assert props["locked"]
    assert public.chat(**props["guard"]).status == 200
    assert props["guard"] | {"gate": True, "plain": False, "window": None} == props["guard"]


def test_a_locked_server_tells_one_distribution(public: Server) -> None:
    """That of the contrast: with the safe stream's choices too, many answers would tell the adversary's."""
    events = public.stream("Hi", trace=True, divergence=True)
    whole = public.answer("Hi", trace=True)["acd"]
    for acd in ({"trace": [t for e in events for t in e.get("acd", {}).get("trace", [])]}, whole):
        assert len(acd["trace"]) == 8
        for token in acd["trace"]:
            assert [name for name, value in token.items() if value is not None and name != "divergence"] == [
                "token",
                "text",
            ]
    assert events[1]["acd"]["gate"]["decision"] in ("contrast", "as-is")
    assert events[-1]["acd"]["contrast"]["changed_tokens"] is whole["contrast"]["changed_tokens"] is None
    assert public.answer(logprobs=True)["choices"][0]["logprobs"]["content"]
    assert "changed" not in public.get("/metrics").body.decode()


def test_a_lock_can_be_asked_for_or_left_out(gated_base: tuple[str, ...], start: Callable[..., Server]) -> None:
    locked = start(*gated_base, "--lock", "--token", "a b")
    assert locked.told["token"] == "a b" and locked.chat(gate=False).status == 403
    unlocked = start(*gated_base)
    assert unlocked.told["token"] is None and unlocked.chat(gate=False, gate_threshold=0.9).status == 200


@pytest.mark.parametrize("token", ["", " ", " a", "a ", "\u00fc", "a\nb"])
def test_a_token_that_no_header_can_carry_is_refused(base: tuple[str, ...], token: str) -> None:
    done = subprocess.run([sys.executable, "-c", MAIN, *base, "--token", token], env=child_env(), capture_output=True)
    assert done.returncode == 2 and b"--token" in done.stderr
