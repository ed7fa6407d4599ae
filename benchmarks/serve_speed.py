"""Measure what HTTP costs: the first text and the tokens per second beside the Python API, on the same requests.

    python benchmarks/serve_speed.py MODEL [--tokens 64] [--rounds 10] [--threads N]

Both have an engine of their own in a process of its own, and are asked in turns; every round has a question of its own.
Times are taken by whoever asks: from the request to its first text, and from there to the last.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from serve_load import start

from acd_local import Engine, Options
from acd_local.bench.questions import text_of
from acd_local.bench.rounds import in_turns

Taken = tuple[float, float]  # seconds to the first text, tokens per second from there on


def taken(started: float, times: list[float], tokens: int) -> Taken:
    return times[0] - started, (tokens - 1) / (times[-1] - times[0])


def by_python(engine: Engine, tokens: int) -> Callable[[int], Taken]:
    def ask(number: int) -> Taken:
        options = Options(max_tokens=tokens, temp=0)
        started, times = time.perf_counter(), []
        stream = engine.generate(f"{number}. {text_of('questions', number)}", options)
        for _ in stream:
            times.append(time.perf_counter())
        return taken(started, times, stream.answer.contrast.positions)

    return ask


def by_http(port: int, tokens: int) -> Callable[[int], Taken]:
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def ask(number: int) -> Taken:
        messages = [{"role": "user", "content": f"{number}. {text_of('questions', number)}"}]
        asked = {"messages": messages, "max_tokens": tokens, "temperature": 0, "stream": True}
        started, times, last = time.perf_counter(), [], b""
        connection.request("POST", "/v1/chat/completions", json.dumps(asked), {"Content-Type": "application/json"})
        response = connection.getresponse()
        for line in response:
            if line.startswith(b"data: {"):
                last = line
                if b'"delta":{"content":"' in line:
                    times.append(time.perf_counter())
        return taken(started, times, json.loads(last[6:])["acd"]["contrast"]["positions"])

    return ask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name, value in (("tokens", 64), ("rounds", 10), ("threads", None)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    threads = [] if given.threads is None else ["--threads", str(given.threads)]
    server, port = start(given.model, "--slots", "1", *threads)
    with Engine(given.model, threads=given.threads) as engine:
        ways = {"python": by_python(engine, given.tokens), "http": by_http(port, given.tokens)}
        found = in_turns(ways, given.rounds, warm_up=True)
    server.communicate()  # it ends with its stdin
    print("          first text   tokens/s")
    for name, rounds in found.items():
        first, speed = (statistics.median(values) for values in zip(*rounds, strict=True))
        print(f"{name:>8}  {1e3 * first:7.1f} ms   {speed:8.1f}")
    pairs = list(zip(found["python"], found["http"], strict=True))
    first = statistics.median(http[0] / python[0] for python, http in pairs)
    speed = statistics.median(http[1] / python[1] for python, http in pairs)
    print(f"http / python, by rounds: first text {first:.3f}, tokens/s {speed:.3f}")


if __name__ == "__main__":
    main()
