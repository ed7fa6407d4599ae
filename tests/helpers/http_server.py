"""Starts acd-serve and asks it, as programs do and as programs should not."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import sys
import time
from typing import Any, NamedTuple

from places import child_env
from processes import kill

MAIN = "from acd_local.cli.serve import main; main()"
CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
ENDLESS = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "string", "minLength": 100_000}}}

Json = dict[str, Any]


class Got(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Json:
        found: Json = json.loads(self.body)
        return found

    @property
    def error(self) -> Json:
        error: Json = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
        return error


class Server:
    """A process of acd-serve; `first` is run there before."""

    def __init__(self, *args: str, wait: bool = True, first: str = "", **how: Any) -> None:
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{first}\n{MAIN}", *args, "--port", "0"], env=child_env(), **(streams | how)
        )
        assert self.process.stdout is not None
        self.told: Json = json.loads(self.process.stdout.readline())
        self.port, self.url = self.told["port"], self.told["url"]
        self.headers = {"authorization": f"Bearer {self.told['token']}"} if self.told["token"] else {}
        if wait:
            self.wait()

    def wait(self) -> None:
        deadline = time.monotonic() + 60
        while self.get("/health").status != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> Got:
        """One request on a connection of its own; `body` is bytes, or becomes JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = (
            self.headers | {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        )
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, data, {k: v for k, v in sent.items() if v})
        response = connection.getresponse()
        got = Got(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        connection.close()
        return got

    def get(self, path: str, **headers: str) -> Got:
        return self.ask("GET", path, **headers)

    def chat(self, content: str = "Hi", **fields: Any) -> Got:
        asked = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0} | fields
        return self.ask("POST", CHAT, asked)

    def answer(self, content: str = "Hi", **fields: Any) -> Json:
        got = self.chat(content, **fields)
        assert got.status == 200, got.body
        return got.json

    def stream(self, content: str = "Hi", **fields: Any) -> list[Json]:
        """The chunks of a stream that ended as it should."""
        got = self.chat(content, stream=True, **fields)
        assert got.status == 200 and got.headers["content-type"] == "text/event-stream", got
        return chunks(got.body)

    def open(self, **fields: Any) -> socket.socket:
        """A request whose response is not read yet."""
        asked = {"messages": HI, "stream": True, "temperature": 0} | fields
        return self.send(json.dumps(asked).encode())

    def send(self, body: bytes, head: str = "") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        head = head or f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return connection

    def metrics(self) -> dict[str, float]:
        lines = self.get("/metrics").body.decode().splitlines()
        return {name: float(value) for name, value in (line.split(" ") for line in lines if not line.startswith("#"))}

    def until(self, name: str, value: float) -> None:
        """Wait until one of the metrics says so."""
        deadline = time.monotonic() + 30
        while (found := self.metrics().get(name, 0)) != value:
            assert time.monotonic() < deadline, f"{name} is {found}, not {value}"
            time.sleep(0.02)

    def end(self) -> tuple[int, bytes]:
        """Its exit code and stderr, once it has ended."""
        code = self.process.wait(60)
        assert self.process.stderr is not None
        return code, self.process.stderr.read()

    def close(self) -> None:
        kill(self.process)


def chunks(body: bytes) -> list[Json]:
    """The events of a whole stream but the last, [DONE]."""
    *events, done, rest = body.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", ""), body
    return [json.loads(event.removeprefix("data: ")) for event in events if not event.startswith(":")]


def read_until(connection: socket.socket, pattern: bytes) -> bytes:
    """What comes up to the first match."""
    found = b""
    while not re.search(pattern, found):
        data = connection.recv(65536)
        assert data, found[-500:]
        found += data
    return found


def text_of(events: list[Json]) -> str:
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(choice["delta"].get("content", "") for choice in choices)
