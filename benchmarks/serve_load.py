"""Ask acd-serve from many clients at once, and check that no event is lost or doubled and that its memory is flat.

    python benchmarks/serve_load.py MODEL [--clients 32] [--minutes 10] [--parallel 4] [OPTIONS OF THE SERVER]

Each client asks one thing after the other: streams with a trace, answers in one piece, and streams that it leaves in
the middle. A stream is whole where its tokens are those that its last event counts, and their texts are its text; what
the server counted has to be what was asked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
THINGS = ("the sea", "bread", "a bridge", "music", "the moon", "glass", "a garden", "salt", "paper", "winter")
HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
)


@dataclass
class Found:
    """What came of a run. `counts`: answers by how they were asked for; `faults`: what was not as it should be."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)  # MB, a sample every few seconds
    first: list[float] = field(default_factory=list)  # seconds to the first text
    tokens: int = 0

    def summary(self, seconds: float) -> dict[str, Any]:
        """JSON types."""
        early = self.memory[len(self.memory) // 3 :][: max(1, len(self.memory) // 3)]
        late = self.memory[-max(1, len(self.memory) // 3) :]
        return {
            "seconds": round(seconds),
            "asked": dict(self.counts),
            "faults": len(self.faults),
            "some": self.faults[:5],
            "tokens_per_second": round(self.tokens / seconds, 1),
            "first_text_seconds": round(statistics.median(self.first), 2) if self.first else None,
            "memory_mb": [round(statistics.mean(part), 1) for part in (early, late)],  # second and last third
        }


class Client:
    """One of the clients; asks until the time is over."""

    def __init__(self, port: int, number: int, found: Found) -> None:
        self._port, self._random, self._found = port, random.Random(number), found

    async def run(self, until: float) -> None:
        while time.monotonic() < until:
            how = self._random.choices(("stream", "whole", "left"), (6, 2, 2))[0]
            try:
                await getattr(self, f"_{how}")()
            except Exception as error:
                self._found.faults.append(f"{how}: {type(error).__name__}: {error}")

    async def _ask(self, **fields: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, str]:
        number = self._random.randrange(10**6)
        text = f"{number}: Say something about {self._random.choice(THINGS)}."
        asked = {"messages": [{"role": "user", "content": text}], "max_tokens": 24, "seed": number} | fields
        body = json.dumps(asked).encode()
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            writer.write(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            if " 200 " in head.partition("\r\n")[0]:
                return reader, writer, head
            writer.close()
            if " 429 " not in head:
                raise ValueError(head.partition("\r\n")[0])
            self._found.counts["sent away"] += 1
            await asyncio.sleep(self._random.random() + 0.5)

    async def _stream(self) -> None:
        started = time.monotonic()
        reader, writer, _ = await self._ask(stream=True, trace=True)
        body = b""
        first = None
        while chunk := await reader.read(65536):
            body += chunk
            if first is None and b'"content":"' in body.partition(b'"content":""')[2]:
                first = time.monotonic() - started
        writer.close()
        if first is not None:
            self._found.first.append(first)
        *events, done, rest = unchunked(body).decode().split("\n\n")
        records = [json.loads(event.removeprefix("data: ")) for event in events if not event.startswith(":")]
        traces = [token for record in records for token in record.get("acd", {}).get("trace", [])]
        said = "".join(choice["delta"].get("content", "") for record in records for choice in record["choices"])
        traced = "".join(token["text"] for token in traces)
        about = records[-1]["acd"]
        good = (done, rest) == ("data: [DONE]", "") and len(traces) == about["contrast"]["positions"]
        if not good or (said != traced and "\ufffd" not in traced):
            raise ValueError(f"{len(traces)} tokens of {about['contrast']['positions']}, {said!r} beside {traced!r}")
        self._found.counts["stream"] += 1
        self._found.tokens += len(traces)

    async def _whole(self) -> None:
        reader, writer, _ = await self._ask()
        answer = json.loads(await reader.read())
        writer.close()
        if not answer["choices"][0]["finish_reason"]:
            raise ValueError("no finish_reason")
        self._found.counts["whole"] += 1
        self._found.tokens += answer["usage"]["completion_tokens"]

    async def _left(self) -> None:
        reader, writer, _ = await self._ask(stream=True, max_tokens=1000)
        await reader.readuntil(b'"content":"')
        await asyncio.sleep(self._random.random())
        writer.close()
        self._found.counts["left"] += 1


def unchunked(body: bytes) -> bytes:
    """The body of a response in HTTP's chunks."""
    found = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        found, body = found + body[:length], body[length + 2 :]
    return found


async def watch(pid: int, found: Found, until: float) -> None:
    """Note the server's memory down now and then."""
    while time.monotonic() < until:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        found.memory.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
        await asyncio.sleep(1)


async def drive(port: int, pid: int, clients: int, seconds: float) -> Found:
    found = Found()
    until = time.monotonic() + seconds
    asking = [Client(port, number, found).run(until) for number in range(clients)]
    await asyncio.gather(watch(pid, found, until), *asking)
    return found


def start(model: str, *options: str) -> tuple[subprocess.Popen[bytes], int]:
    """A server that answers, and its port."""
    code = "from acd_local.cli.serve import main; main()"
    command = [sys.executable, "-c", code, model, "--port", "0", "--exit-with-stdin", *options]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes)
    assert server.stdout is not None
    port = int(json.loads(server.stdout.readline())["port"])
    while get(port, "/health").partition(b" ")[2][:3] != b"200":
        time.sleep(0.1)
    return server, port


def get(port: int, path: str) -> bytes:
    """A whole response."""
    import socket

    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--parallel", default="4")
    given, options = parser.parse_known_args()
    server, port = start(given.model, "--parallel", given.parallel, "--ctx-size", "1024", *options)
    started = time.monotonic()
    found = asyncio.run(drive(port, server.pid, given.clients, 60 * given.minutes))
    seconds = time.monotonic() - started
    time.sleep(1)
    counted = get(port, "/metrics").decode()
    left = [line for line in counted.splitlines() if line.startswith(("acd_requests", "acd_answers", "acd_failures"))]
    server.communicate()  # it ends with its stdin
    print(json.dumps(found.summary(seconds) | {"server": left}, indent=1))
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
