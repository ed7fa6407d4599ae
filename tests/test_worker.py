"""acd-run --jsonl: the protocol as a client in any language sees it."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAIN = "from acd_local.cli.run import main; main()"
PAIR = 'format = 1\nname = "{}"\nsafe = "You are {}."\nadversarial = "A demon answers."\n'
ENDLESS = 'root ::= "a" root'

Event = dict[str, Any]


class Client:
    """A worker process and its events."""

    def __init__(self, *args: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        self.raw: list[bytes] = []
        self._events: queue.Queue[Event | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.raw.append(line)
            self._events.put(json.loads(line))
        self._events.put(None)

    def send(self, *lines: object) -> None:
        """Requests as objects, or raw bytes; all in one write."""
        assert self.process.stdin is not None
        raw = b"".join(x if isinstance(x, bytes) else json.dumps(x).encode() + b"\n" for x in lines)
        self.process.stdin.write(raw)
        self.process.stdin.flush()

    def event(self) -> Event | None:
        """The next event; None when the worker closed its stdout."""
        event = self._events.get(timeout=60)
        if event is None:
            self._events.put(None)
        return event

    def until_last(self, request_id: object) -> list[Event]:
        """Events up to the done or error event of this request."""
        events = []
        while (event := self.event()) is not None:
            events.append(event)
            if event["event"] in ("done", "error") and event["id"] == request_id:
                return events
        raise AssertionError(f"the worker ended: {events}")

    def ask(self, **request: Any) -> Event:
        """Send a request, wait for its last event."""
        self.send({"id": "q", **request})
        return self.until_last("q")[-1]

    def end(self) -> tuple[int, list[Event], bytes]:
        """Close its stdin: exit code, the events that were left, stderr."""
        process = self.process
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.close()
        left = []
        while (event := self.event()) is not None:
            left.append(event)
        return process.wait(30), left, process.stderr.read()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with suppress(OSError):
                    stream.close()


@pytest.fixture(scope="module")
def base(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    pair = tmp_path_factory.mktemp("pairs") / "short.toml"
    pair.write_text(PAIR.format("short", "kind"))
    return (str(tiny("chatml")), "--jsonl", "-t", "1", "-c", "512", "--pair", str(pair))


@pytest.fixture
def start(base: tuple[str, ...]) -> Iterator[Callable[..., Client]]:
    """A worker of the test's own, ready event read."""
    clients = []

    def make(*args: str) -> Client:
        clients.append(Client(*base, *args))
        ready = clients[-1].event()
        assert ready is not None
        assert ready["event"] == "ready"
        return clients[-1]

    yield make
    for client in clients:
        client.kill()


@pytest.fixture(scope="module")
def worker(base: tuple[str, ...]) -> Iterator[Client]:
    """One worker for all tests that leave it as they found it: no defect of a line may end it."""
    client = Client(*base, "--temp", "0", "--max-tokens", "12")
    assert client.event() == {"event": "ready", "protocol": 1, "model": "tiny llama", "pair": "short", "soft": False}
    yield client
    code, left, err = client.end()
    client.kill()
    assert (code, left, err) == (0, [], b"")


# -- answers -----------------------------------------------------------------------------------------------------------


def test_events_of_an_answer(worker: Client) -> None:
    worker.send({"id": "größe ☃", "prompt": "What is water?"})
    *tokens, done = worker.until_last("größe ☃")
    assert tokens
    assert {(t["id"], t["event"]) for t in tokens} == {("größe ☃", "token")}
    assert all(t["text"] for t in tokens)
    assert "".join(t["text"] for t in tokens) == done["text"]
    assert set(done) == {"id", "event", "text", "finish_reason", "usage", "timings", "seed", "contrast"}
    assert done["event"] == "done"
    assert done["finish_reason"] in ("length", "stop")
    assert set(done["usage"]) == {"prompt_tokens", "completion_tokens"}
    assert set(done["timings"]) == {"prompt_decoded", "prompt_ms", "answer_ms", "tokens_per_second"}
    assert set(done["contrast"]) == {"alpha", "beta", "raw", "positions", "compared", "changed_tokens", "mean_kl_nats"}
    assert done["contrast"]["mean_kl_nats"] is None
    assert 0 <= done["seed"] < 2**32 - 1


def test_lines_are_ascii_and_whole(worker: Client) -> None:
    """Characters of several bytes arrive whole, and as escapes that any parser knows."""
    before = len(worker.raw)
    text = "größer ☃ 😀"
    done = worker.ask(prompt="hi", grammar=f'root ::= "{text}"', max_tokens=60)
    assert done["text"] == text
    lines = worker.raw[before:]
    assert all(line.endswith(b"\n") and line.isascii() and line.count(b"\n") == 1 for line in lines)
    pieces = [json.loads(line)["text"] for line in lines[:-1]]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert "😀" in pieces


def test_the_same_request_gives_the_same_answer(worker: Client) -> None:
    worker.ask(prompt="Hi")
    greedy = [worker.ask(prompt="What is red?")["text"] for _ in range(2)]
    assert greedy[0] == greedy[1] != ""
    drawn = [worker.ask(prompt="What is red?", temp=1.5, seed=seed) for seed in (5, 5, 6)]
    assert drawn[0]["text"] == drawn[1]["text"] != drawn[2]["text"]
    assert [d["seed"] for d in drawn] == [5, 5, 6]


def test_a_single_answer_is_deferred_and_the_divergence_is_asked_for(worker: Client) -> None:
    """Side by side every position is compared, deferred only those that the adversarial stream can change."""
    given = {"prompt": "What is red?", "max_tokens": 40, "beta": 0.5}
    beside, ahead, measured = (
        worker.ask(**given, **how)
        for how in ({"strategy": "stepwise"}, {"strategy": "deferred"}, {"strategy": "deferred", "divergence": True})
    )
    assert beside["text"] == ahead["text"] == measured["text"]
    assert ahead["contrast"]["compared"] < beside["contrast"]["compared"] == beside["contrast"]["positions"]
    assert measured["contrast"]["compared"] == measured["contrast"]["positions"]
    assert beside["contrast"]["mean_kl_nats"] is None is ahead["contrast"]["mean_kl_nats"]
    assert measured["contrast"]["mean_kl_nats"] > 0
    assert worker.ask(prompt="hi", divergence=1)["message"] == "divergence must be true or false"


def test_messages_and_system(worker: Client) -> None:
    turns = [
        {"role": "user", "content": "What is red?"},
        {"role": "assistant", "content": "Wine."},
        {"role": "user", "content": "What is blue?"},
    ]
    short = worker.ask(prompt="What is blue?")
    long = worker.ask(messages=turns)
    assert long["usage"]["prompt_tokens"] > short["usage"]["prompt_tokens"] + 10
    with_system = worker.ask(messages=turns, system="Be brief.")
    as_message = worker.ask(messages=[{"role": "system", "content": "Be brief."}, *turns])
    assert with_system["usage"] == as_message["usage"]
    assert with_system["text"] == as_message["text"]
    assert with_system["usage"]["prompt_tokens"] > long["usage"]["prompt_tokens"]
    assert worker.ask(messages=turns[:1], system=None)["usage"] == worker.ask(prompt="What is red?")["usage"]


def test_options_per_request(worker: Client, tmp_path: Path) -> None:
    free = worker.ask(prompt="hi")
    assert worker.ask(prompt="hi", max_tokens=2)["usage"]["completion_tokens"] == 2
    stop = free["text"][3:5]
    for value in (stop, ["never said", stop]):
        cut = worker.ask(prompt="hi", stop=value)
        assert (cut["text"], cut["finish_reason"]) == (free["text"][: free["text"].index(stop)], "stop_string")
    contrast = worker.ask(prompt="hi", alpha=0.25, beta=0.5)["contrast"]
    assert (contrast["alpha"], contrast["beta"]) == (0.25, 0.5)
    plain = worker.ask(prompt="hi", plain=True)
    assert (plain["contrast"]["alpha"], plain["contrast"]["mean_kl_nats"]) == (0, None)
    assert plain["text"] == worker.ask(prompt="hi", alpha=0)["text"]
    assert worker.ask(prompt="hi", raw_contrast=True)["contrast"]["raw"] is True
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    assert json.loads(worker.ask(prompt="hi", json_schema={"enum": ["a\"b\n😀"]})["text"]) == 'a"b\n😀'
    for value in (schema, json.dumps(schema)):
        answer = worker.ask(prompt="hi", json_schema=value, max_tokens=100)
        assert isinstance(json.loads(answer["text"])["ok"], bool)
    assert worker.ask(prompt="hi", grammar='root ::= "yes"')["text"] == "yes"
    other = tmp_path / "other.toml"
    other.write_text(PAIR.format("other", "calm and patient") + "alpha = 0.125\n")
    assert worker.ask(prompt="hi", pair=str(other))["contrast"]["alpha"] == 0.125
    assert worker.ask(prompt="hi")["text"] == free["text"], "nothing of this lasts"


def test_the_command_line_asks_for_the_divergence(start: Callable[..., Client]) -> None:
    client = start("--max-tokens", "4", "--divergence")
    assert client.ask(prompt="hi")["contrast"]["mean_kl_nats"] > 0
    assert client.ask(prompt="hi", divergence=False)["contrast"]["mean_kl_nats"] is None


def test_the_command_line_gives_the_defaults(start: Callable[..., Client]) -> None:
    client = start("--system", "Be brief.", "--max-tokens", "3", "--temp", "0", "--alpha", "0.25")
    told = client.ask(prompt="hi")
    assert (told["contrast"]["alpha"], told["usage"]["completion_tokens"]) == (0.25, 3)
    own = client.ask(prompt="hi", system="Be brief, kind, red and blue.", alpha=0.75, max_tokens=4)
    assert (own["contrast"]["alpha"], own["usage"]["completion_tokens"]) == (0.75, 4)
    none = client.ask(prompt="hi", system=None)
    as_message = client.ask(messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}])
    prompts = [x["usage"]["prompt_tokens"] for x in (none, told, own)]
    assert prompts[0] < prompts[1] < prompts[2]
    assert as_message["usage"] == told["usage"], "its own system message takes the place of --system"
    assert client.end() == (0, [], b"")


def test_dropped_turns_are_an_event(worker: Client) -> None:
    turns = []
    for i in range(12):
        turns += [{"role": "user", "content": f"wine {i} " * 8}, {"role": "assistant", "content": "water " * 8}]
    messages = [*turns, {"role": "user", "content": "And?"}]
    worker.send({"id": 1, "messages": messages})
    first, *_, done = worker.until_last(1)
    assert (first["event"], first["id"]) == ("dropped", 1)
    assert first["messages"] % 2 == 0
    assert 0 < first["messages"] < 24
    assert done["event"] == "done"
    refused = worker.ask(messages=messages, overflow="error")
    assert (refused["event"], refused["code"]) == ("error", "context")


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "code", "problem"),
    [
        ({"prompt": "hi", "colour": "red"}, "usage", "colour"),
        ({"prompt": "hi", "ctx_size": 5}, "usage", "ctx_size"),
        ({"prompt": "hi", "temp": "hot"}, "usage", "temp"),
        ({"prompt": "hi", "temp": True}, "usage", "temp"),
        ({"prompt": "hi", "temp": -1}, "usage", "temp"),
        ({"prompt": "hi", "alpha": -1}, "usage", "alpha"),
        ({"prompt": "hi", "alpha": 10**400}, "usage", "alpha"),
        ({"prompt": "hi", "alpha": float("nan")}, "usage", "alpha"),
        ({"prompt": "hi", "beta": 2}, "usage", "beta"),
        ({"prompt": "hi", "max_tokens": 0}, "usage", "max_tokens"),
        ({"prompt": "hi", "max_tokens": 1.5}, "usage", "max_tokens"),
        ({"prompt": "hi", "plain": "yes"}, "usage", "plain"),
        ({"prompt": "hi", "stop": [1]}, "usage", "stop"),
        ({"prompt": "hi", "stop": ""}, "usage", "stop"),
        ({"prompt": "hi", "seed": -1}, "usage", "seed"),
        ({"prompt": "hi", "top_k": None}, "usage", "top_k"),
        ({"prompt": "hi", "overflow": "maybe"}, "usage", "overflow"),
        ({"prompt": "hi", "grammar": "root ::= ["}, "usage", "grammar"),
        ({"prompt": "hi", "json_schema": 5}, "usage", "json_schema"),
        ({"prompt": "hi", "json_schema": "{"}, "usage", "JSON"),
        ({"prompt": "hi", "json_schema": {"contains": {}}}, "usage", "'contains' at the root"),
        ({"prompt": "hi", "json_schema": False}, "usage", "no finite text"),
        ({"prompt": "hi", "grammar": 'root ::= "a"', "json_schema": {}}, "usage", "exclude"),
        ({"prompt": "hi", "system": 5}, "usage", "system"),
        ({"prompt": "hi", "pair": 5}, "usage", "pair"),
        ({"prompt": "hi", "pair": "no-such"}, "pair", "no-such"),
        ({"prompt": "wine " * 2000}, "context", "tokens long"),
        ({"prompt": 5}, "usage", "prompt"),
        ({"prompt": None}, "usage", "prompt"),
        ({"prompt": "hi", "messages": []}, "usage", "either"),
        ({}, "usage", "either"),
        ({"messages": []}, "usage", "messages"),
        ({"messages": "hi"}, "usage", "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "usage", "role"),
        ({"messages": [{"role": "user", "content": 5}]}, "usage", "content"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "usage", "user"),
        (
            {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}], "system": "z"},
            "usage",
            "system",
        ),
        ({"prompt": "half a pair: \ud83d"}, "usage", "surrogate"),
        ({"cancel": True}, "usage", "no request"),
        ({"cancel": "yes"}, "usage", "cancel"),
    ],
)
def test_bad_requests_keep_their_id(worker: Client, request_: Event, code: str, problem: str) -> None:
    worker.send({"id": 7, **request_})
    [event] = worker.until_last(7)
    assert set(event) == {"id", "event", "code", "message"}
    assert (event["event"], event["code"]) == ("error", code)
    assert problem in event["message"]
    assert "\n" not in event["message"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"What is water?\n", "not JSON"),
        (b'{"id": 1, "prompt": "hi"\n', "not JSON"),
        (b"[1, 2]\n", "not a JSON object"),
        (b"null\n", "not a JSON object"),
        (b'{"prompt": "hi"}\n', "id"),
        (b'{"id": null, "prompt": "hi"}\n', "id"),
        (b'{"id": true, "prompt": "hi"}\n', "id"),
        (b'{"id": 1.5, "prompt": "hi"}\n', "id"),
        (b'{"id": [1], "prompt": "hi"}\n', "id"),
        (b'{"id": 1, "prompt": "\xff"}\n', "not JSON"),
        (b'{"id": 1, "prompt": ' + b"9" * 5000 + b"}\n", "not JSON"),
        (b"[" * 100_000 + b"\n", "nested"),
        (b'{"id": 1, "prompt": "' + b"x" * 16_000_000 + b'"}\n', "longer than"),
        (b"\0\0\0\n", "not JSON"),
    ],
    ids=str,
)
def test_lines_that_are_no_request(worker: Client, line: bytes, problem: str) -> None:
    worker.send(line)
    [event] = worker.until_last(None)
    assert (event["event"], event["id"], event["code"]) == ("error", None, "usage")
    assert problem in event["message"]
    assert len(event["message"]) < 1100
    assert worker.ask(prompt="hi", max_tokens=1)["event"] == "done"


def test_deep_nesting_within_a_request(worker: Client) -> None:
    """However the parser's and the checks' limits compare: an error, and the worker lives."""
    for depth in (300, 900, 990, 5000):
        worker.send(b'{"id": 3, "prompt": "hi", "stop": ' + b"[" * depth + b"]" * depth + b"}\n")
        event = worker.event()
        assert event is not None
        assert (event["event"], event["code"]) == ("error", "usage")
        assert event["id"] in (3, None)


def test_blank_lines_and_line_ends(worker: Client) -> None:
    worker.send(b'\n  \n\r\n{"id": 5, "prompt": "hi", "max_tokens": 1}\r\n')
    assert [e["event"] for e in worker.until_last(5)][-1] == "done"


# -- queueing and cancelling -------------------------------------------------------------------------------------------


def test_requests_are_answered_in_order(worker: Client) -> None:
    worker.send(*({"id": i, "prompt": f"What is {i}?", "max_tokens": 4} for i in range(5)))
    order = []
    for i in range(5):
        order += [e["id"] for e in worker.until_last(i)]
    assert order == sorted(order)
    assert set(order) == set(range(5))


def test_an_id_is_free_again_after_its_last_event(worker: Client) -> None:
    for _ in range(40):
        assert worker.ask(prompt="hi", max_tokens=1)["event"] == "done"
        assert worker.ask(prompt="hi", pair="no-such")["event"] == "error"


def test_an_id_in_use_is_refused(worker: Client) -> None:
    worker.send({"id": 1, "prompt": "hi", "grammar": ENDLESS, "max_tokens": 400}, {"id": 1, "prompt": "again"})
    events = worker.until_last(1)
    assert events[-1]["event"] == "error"
    assert "still being answered" in events[-1]["message"]
    worker.send({"id": 1, "cancel": True})
    assert worker.until_last(1)[-1]["event"] == "done"


def test_cancel_a_running_and_a_waiting_request(worker: Client) -> None:
    worker.send({"id": "a", "prompt": "hi", "grammar": ENDLESS, "max_tokens": 400}, {"id": "b", "prompt": "hi"})
    first = worker.event()
    assert first is not None
    assert (first["id"], first["event"]) == ("a", "token")
    worker.send({"id": "b", "cancel": True}, {"id": "a", "cancel": True})
    *tokens, done = worker.until_last("a")
    assert done["finish_reason"] == "cancelled"
    assert done["text"] == "a" * len(done["text"])
    assert len(done["text"]) == 1 + len(tokens) < 400
    *tokens, done = worker.until_last("b")
    assert (done["finish_reason"], done["text"], tokens) == ("cancelled", "", [])
    assert worker.ask(prompt="hi")["finish_reason"] != "cancelled"


# -- the end -----------------------------------------------------------------------------------------------------------


def test_end_of_input_finishes_what_is_queued(start: Callable[..., Client]) -> None:
    client = start("--temp", "0", "--max-tokens", "8")
    client.send(*({"id": i, "prompt": "hi"} for i in range(3)))
    client.send(b'{"id": 3, "prompt": "no newline at the end", "max_tokens": 2}')
    code, events, err = client.end()
    assert (code, err) == (0, b"")
    assert [e["id"] for e in events if e["event"] == "done"] == [0, 1, 2, 3]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_answer_and_the_worker(start: Callable[..., Client], signum: int, code: int) -> None:
    client = start()
    client.send({"id": 1, "prompt": "hi", "grammar": ENDLESS, "max_tokens": 400}, {"id": 2, "prompt": "hi"})
    assert client.event() is not None
    sent = time.monotonic()
    client.process.send_signal(signum)  # its stdin stays open
    done = client.until_last(1)[-1]
    assert done["finish_reason"] == "cancelled"
    assert done["text"].startswith("a")
    assert client.event() is None
    assert client.process.wait(10) == code
    assert time.monotonic() - sent < 3
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
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert b"ready" in process.stdout.readline()
    process.stdin.write(json.dumps({"id": 1, "prompt": "hi", "grammar": ENDLESS}).encode() + b"\n")
    process.stdin.flush()
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(20) == 0  # its stdin is still open
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stdin.close()
    process.stderr.close()


def test_no_stdin_at_all_is_the_end_of_input(base: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-c", MAIN, *base],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    assert (done.returncode, done.stderr, done.stdout.count(b"\n")) == (0, b"", 1)


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
        assert event == {"id": None, "event": "error", "code": code, "message": captured.err[9:-1]}
    assert captured.out.count("\n") == 1


# -- several at once ---------------------------------------------------------------------------------------------------


def test_parallel_requests_get_the_answers_that_they_get_alone(tiny: Callable[..., Path]) -> None:
    requests = [
        {"id": i, "prompt": f"What is {thing}?", "max_tokens": 6 + 4 * i, "seed": i}
        for i, thing in enumerate(("red", "blue", "wine", "water", "a carpet"))
    ]
    clients = [
        Client(str(tiny("chatml")), "--jsonl", "-c", "512", "-t", "1", *more) for more in ([], ["--parallel", "3"])
    ]
    texts = []
    for client in clients:
        client.event()
        client.send(*requests)
        code, events, _ = client.end()
        assert code == 0
        done = {e["id"]: e for e in events if e["event"] == "done"}
        assert sorted(done) == [0, 1, 2, 3, 4]
        for i, last in done.items():
            assert "".join(e["text"] for e in events if e["id"] == i and e["event"] == "token") == last["text"]
        texts.append({i: (e["text"], e["finish_reason"]) for i, e in done.items()})
    assert texts[0] == texts[1]
    order = [e["id"] for e in events]
    assert order.index(2) < len(order) - 1 - order[::-1].index(1)  # the third began before the second ended
    assert order.index(3) > order.index(0)


def test_parallel_requests_are_cancelled_one_by_one(tiny: Callable[..., Path]) -> None:
    client = Client(str(tiny("chatml")), "--jsonl", "-c", "1024", "-t", "1", "--parallel", "2")
    client.event()
    endless = {"prompt": "Hi", "grammar": ENDLESS, "max_tokens": 900}
    client.send({"id": "a", **endless}, {"id": "b", **endless}, {"id": "waits", "prompt": "Hi", "max_tokens": 2})
    while (event := client.event()) is not None and event["id"] != "b":
        pass
    client.send({"id": "a", "cancel": True})
    assert client.until_last("a")[-1]["finish_reason"] == "cancelled"
    assert client.until_last("waits")[-1]["finish_reason"] == "length"
    client.send({"id": "b", "cancel": True})
    assert client.until_last("b")[-1]["finish_reason"] == "cancelled"
    code, left, _ = client.end()
    assert (code, left) == (0, [])


def test_parallel_is_for_the_worker(tiny: Callable[..., Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MAIN, str(tiny("chatml")), "Hi", "--parallel", "2", "--no-stdin"],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert b"--jsonl" in done.stderr
