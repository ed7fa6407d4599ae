"""acd-run --jsonl: the protocol as a client in any language sees it."""

from __future__ import annotations

import json
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
from manual import made_for
from places import child_env

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
            env=child_env(),
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

    def ready(self) -> Event:
        """The first event after the signs of loading."""
        while (event := self.event()) is not None and event["event"] == "loading":
            assert set(event) == {"event", "phase", "progress"} and event["phase"] in ("check", "model")
            assert 0 <= event["progress"] <= 1
        assert event is not None
        assert event["event"] == "ready"
        return event

    def until(self, what: str, request_id: object) -> list[Event]:
        """Events up to the first of this kind of this request."""
        events = []
        while (event := self.event()) is not None:
            events.append(event)
            if event["event"] == what and event["id"] == request_id:
                return events
        raise AssertionError(f"the worker ended: {events}")

    def until_last(self, request_id: object) -> list[Event]:
        """Events up to the done or error event of this request."""
        events = []
        while (event := self.event()) is not None:
            events.append(event)
            if event["event"] in ("done", "error") and event["id"] == request_id:
                assert event["final"] or "line" in event
                return events
        raise AssertionError(f"the worker ended: {events}")

    def ask(self, **request: Any) -> Event:
        """Send a request, wait for its last event."""
        self.send(request := {"id": "q", **request})
        return self.until_last(request["id"])[-1]

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
    pair.write_text(PAIR.format("short", "kind") + made_for(tiny("chatml")))
    return (str(tiny("chatml")), "--jsonl", "-t", "1", "-c", "512", "--pair", str(pair))


@pytest.fixture
def start(base: tuple[str, ...]) -> Iterator[Callable[..., Client]]:
    """A worker of the test's own, ready event read."""
    clients = []

    def make(*args: str) -> Client:
        clients.append(Client(*base, *args))
        clients[-1].ready()
        return clients[-1]

    yield make
    for client in clients:
        client.kill()


@pytest.fixture(scope="module")
def worker(base: tuple[str, ...]) -> Iterator[Client]:
    """One worker for all tests that leave it as they found it: no defect of a line may end it."""
    client = Client(*base, "--temp", "0", "--max-tokens", "12")
    client.ready()
    yield client
    code, left, err = client.end()
    client.kill()
    assert (code, left, err) == (0, [], b"")


@pytest.fixture(scope="module")
def slow_base(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """It takes seconds for a prompt or an answer that fills its context."""
    model = tiny("chatml", n_embd=256, n_layers=4, n_ctx=4096)
    pair = tmp_path_factory.mktemp("slow") / "short.toml"
    pair.write_text(PAIR.format("short", "kind") + made_for(model))
    return (str(model), "--jsonl", "-t", "1", "-c", "4096", "--pair", str(pair))


@pytest.fixture(scope="module")
def slow(slow_base: tuple[str, ...]) -> Iterator[Client]:
    client = Client(*slow_base)
    client.ready()
    yield client
    client.kill()


# -- answers -----------------------------------------------------------------------------------------------------------


def test_events_of_an_answer(worker: Client) -> None:
    worker.send({"id": "größe ☃", "prompt": "What is water?"})
    queued, started, *tokens, done = worker.until_last("größe ☃")
    assert queued == {"id": "größe ☃", "event": "queued", "ahead": 0}
    assert started == {"id": "größe ☃", "event": "started"}
    assert tokens
    assert {(t["id"], t["event"]) for t in tokens} == {("größe ☃", "token")}
    assert all(t["text"] for t in tokens)
    assert "".join(t["text"] for t in tokens) == done["text"]
    keys = {"id", "event", "final", "text", "finish_reason", "usage", "timings", "seed", "contrast", "gate"}
    assert set(done) == keys
    assert (done["event"], done["final"]) == ("done", True)
    assert done["finish_reason"] in ("length", "stop")
    assert set(done["usage"]) == {"prompt_tokens", "prompt_decoded", "completion_tokens"}
    assert set(done["timings"]) == {"prompt_seconds", "answer_seconds", "tokens_per_second"}
    assert set(done["contrast"]) == {
        *("alpha", "beta", "raw", "positions", "compared", "changed_tokens", "mean_divergence")
    }
    assert done["contrast"]["mean_divergence"] is None
    assert 0 <= done["seed"] < 2**32 - 1


def test_lines_are_ascii_and_whole(worker: Client) -> None:
    """Characters of several bytes arrive whole, and as escapes that any parser knows."""
    before = len(worker.raw)
    text = "größer ☃ 😀"
    done = worker.ask(prompt="hi", grammar=f'root ::= "{text}"', max_tokens=60)
    assert done["text"] == text
    lines = worker.raw[before:]
    assert all(line.endswith(b"\n") and line.isascii() and line.count(b"\n") == 1 for line in lines)
    pieces = [event["text"] for event in map(json.loads, lines) if event["event"] == "token"]
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
    assert beside["contrast"]["mean_divergence"] is None is ahead["contrast"]["mean_divergence"]
    assert measured["contrast"]["mean_divergence"] > 0
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
    assert lengths(with_system) == lengths(as_message)
    assert with_system["text"] == as_message["text"]
    assert with_system["usage"]["prompt_tokens"] > long["usage"]["prompt_tokens"]
    assert lengths(worker.ask(messages=turns[:1], system=None)) == lengths(worker.ask(prompt="What is red?"))


def lengths(done: Event) -> tuple[int, int]:
    """Of prompt and answer; what had to be decoded for it depends on what was asked before."""
    return done["usage"]["prompt_tokens"], done["usage"]["completion_tokens"]


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
    assert (plain["contrast"]["alpha"], plain["contrast"]["mean_divergence"]) == (0, None)
    assert plain["text"] == worker.ask(prompt="hi", alpha=0)["text"]
    assert worker.ask(prompt="hi", raw_contrast=True)["contrast"]["raw"] is True
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    assert json.loads(worker.ask(prompt="hi", json_schema={"enum": ['a"b\n😀']})["text"]) == 'a"b\n😀'
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
    assert client.ask(prompt="hi")["contrast"]["mean_divergence"] > 0
    assert client.ask(prompt="hi", divergence=False)["contrast"]["mean_divergence"] is None


def test_the_command_line_gives_the_defaults(start: Callable[..., Client]) -> None:
    client = start("--system", "Be brief.", "--max-tokens", "3", "--temp", "0", "--alpha", "0.25")
    told = client.ask(prompt="hi")
    assert (told["contrast"]["alpha"], told["usage"]["completion_tokens"]) == (0.25, 3)
    own = client.ask(prompt="hi", system="Be brief, kind, red and blue.", alpha=0.75, max_tokens=4)
    assert (own["contrast"]["alpha"], own["usage"]["completion_tokens"]) == (0.75, 4)
    none = client.ask(prompt="hi", system="")
    as_message = client.ask(messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}])
    prompts = [x["usage"]["prompt_tokens"] for x in (none, told, own)]
    assert prompts[0] < prompts[1] < prompts[2]
    assert lengths(as_message) == lengths(told), "its own system message takes the place of --system"
    assert client.end() == (0, [], b"")


def test_dropped_turns_are_an_event(worker: Client) -> None:
    turns = []
    for i in range(12):
        turns += [{"role": "user", "content": f"wine {i} " * 8}, {"role": "assistant", "content": "water " * 8}]
    messages = [*turns, {"role": "user", "content": "And?"}]
    worker.send({"id": 1, "messages": messages})
    _, _, first, *_, done = worker.until_last(1)
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
        ({"prompt": "hi", "trace": 1}, "usage", "trace must be"),
        ({"prompt": "hi", "cancel": False}, "usage", "a line of its own"),
        ({"prompt": "hi", "cancel": True}, "usage", "a line of its own"),
        ({"messages": [], "ping": True}, "usage", "a line of its own"),
        ({"prompt": "hi", "temperature": 1}, "usage", "unknown option 'temperature': did you mean temp?"),
        ({"prompt": "hi", "max_new_tokens": 1}, "usage", "did you mean max_tokens?"),
        ({"prompt": "hi", "top-k": 1}, "usage", "did you mean top_k?"),
        ({"prompt": "hi", "num_ctx": 9}, "usage", "ctx_size is set once, when the model is loaded (--ctx-size)"),
    ],
)
def test_bad_requests_end_with_an_error(worker: Client, request_: Event, code: str, problem: str) -> None:
    worker.send({"id": 7, **request_})
    *before, event = worker.until_last(7)
    assert [e["event"] for e in before] in ([], ["queued"], ["queued", "started"])
    assert set(event) == {"id", "event", "final", "code", "message"}
    assert (event["event"], event["final"], event["code"]) == ("error", True, code)
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
    assert set(event) == {"id", "event", "final", "code", "message", "line"}
    assert (event["event"], event["id"], event["final"], event["code"]) == ("error", None, False, "usage")
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
        assert (event["id"], event["final"]) in ((3, True), (None, False))


def test_blank_lines_and_line_ends(worker: Client) -> None:
    worker.send(b'\n  \n\r\n{"id": 5, "prompt": "hi", "max_tokens": 1}\r\n')
    assert [e["event"] for e in worker.until_last(5)][-1] == "done"


# -- queueing and cancelling -------------------------------------------------------------------------------------------


def test_requests_are_answered_in_order(worker: Client) -> None:
    worker.send(*({"id": i, "prompt": f"What is {i}?", "max_tokens": 4} for i in range(5)))
    order = []
    for i in range(5):
        order += [e["id"] for e in worker.until_last(i) if e["event"] != "queued"]
    assert order == sorted(order)
    assert set(order) == set(range(5))


def test_an_id_is_free_again_after_its_last_event(worker: Client) -> None:
    for _ in range(40):
        assert worker.ask(prompt="hi", max_tokens=1)["event"] == "done"
        assert worker.ask(prompt="hi", pair="no-such")["event"] == "error"


def test_an_id_in_use_is_refused_without_touching_its_request(slow: Client) -> None:
    slow.send({"id": 1, "prompt": "hi", "grammar": ENDLESS, "max_tokens": 3000})
    slow.until("token", 1)
    slow.send({"id": 1, "prompt": "again"}, {"id": 1, "prompt": "again", "colour": "red"})
    for problem in ("still being answered", "colour"):
        refused = slow.until("error", 1)[-1]
        assert (refused["final"], problem in refused["message"]) == (False, True)
        assert refused["line"] > 0
    slow.send({"id": 1, "cancel": True})
    done = slow.until_last(1)[-1]
    assert (done["event"], done["final"], done["finish_reason"]) == ("done", True, "cancelled")
    assert done["text"] == "a" * len(done["text"])


def test_a_late_cancel_ends_nothing(worker: Client) -> None:
    """It crosses the end of its request: the client has taken the id off its list, and may have used it again."""
    assert worker.ask(id=1, prompt="hi", max_tokens=1)["final"]
    worker.send({"id": 1, "cancel": True}, {"id": 1, "cancel": "yes"}, {"cancel": True})
    for request_id, problem in ((1, "no request"), (1, "cancel must be true"), (None, "no request")):
        late = worker.until("error", request_id)[-1]
        assert (late["final"], late["code"]) == (False, "usage")
        assert problem in late["message"]


def test_the_line_that_is_refused_is_named(start: Callable[..., Client]) -> None:
    client = start()
    client.send(b"\n", b"nonsense\n", b"{}\n")
    assert [client.until("error", None)[-1]["line"] for _ in range(2)] == [2, 3]


def one_runs_one_waits(slow: Client) -> None:
    """Request a is being answered, b is queued."""
    slow.send({"id": "a", "prompt": "hi", "grammar": ENDLESS, "max_tokens": 3000})
    slow.until("token", "a")
    slow.send({"id": "b", "prompt": "hi", "max_tokens": 2})
    assert slow.until("queued", "b")[-1]["ahead"] == 1


def test_a_cancelled_waiting_request_ends_at_once(slow: Client) -> None:
    one_runs_one_waits(slow)
    slow.send({"id": "b", "cancel": True})
    *others, done = slow.until_last("b")
    assert {(e["id"], e["event"]) for e in others} <= {("a", "token")}, "a runs on"
    assert (done["final"], done["finish_reason"], done["text"]) == (True, "cancelled", "")
    assert done["usage"] == {"prompt_tokens": 0, "prompt_decoded": 0, "completion_tokens": 0}
    slow.send({"id": "b", "prompt": "again", "max_tokens": 2}, {"id": "a", "cancel": True})
    events = slow.until("done", "a")
    assert events[-1]["finish_reason"] == "cancelled"
    assert slow.until_last("b")[-1]["finish_reason"] != "cancelled", "the id was free again"


def test_cancel_a_running_request(slow: Client) -> None:
    slow.send({"id": "a", "prompt": "hi", "grammar": ENDLESS, "max_tokens": 3000})
    slow.until("token", "a")
    slow.send({"id": "a", "cancel": True})
    *tokens, done = slow.until_last("a")
    assert (done["final"], done["finish_reason"]) == (True, "cancelled")
    assert done["text"] == "a" * len(done["text"])
    assert len(done["text"]) == 1 + len(tokens) < 3000
    assert slow.ask(prompt="hi", max_tokens=2)["finish_reason"] != "cancelled"


def test_ping_is_answered_while_an_answer_is_made(slow: Client) -> None:
    slow.send({"ping": True})
    assert slow.event() == {"id": None, "event": "pong", "waiting": 0, "running": 0}
    one_runs_one_waits(slow)
    slow.send({"id": "p", "ping": True}, {"id": "a", "ping": 1})
    assert slow.until("pong", "p")[-1] == {"id": "p", "event": "pong", "waiting": 1, "running": 1}
    assert slow.until("error", "a")[-1]["final"] is False, "a bad ping ends nothing either"
    slow.send({"id": "a", "cancel": True})
    assert slow.until_last("a")[-1]["event"] == "done"
    assert slow.until_last("b")[-1]["event"] == "done"


def test_null_means_the_default(start: Callable[..., Client]) -> None:
    client = start("--system", "Be brief.", "--max-tokens", "3", "--temp", "0", "--divergence")
    told = client.ask(prompt="hi")
    names = ("max_tokens", "temp", "seed", "stop", "top_k", "plain", "grammar", "json_schema", "alpha", "messages")
    more = ("system", "pair", "divergence", "trace", "cancel", "ping", "temperature")
    nothing = client.ask(prompt="hi", **dict.fromkeys([*names, *more]))
    for name in ("text", "finish_reason", "contrast"):
        assert nothing[name] == told[name]
    assert nothing["usage"]["prompt_tokens"] == told["usage"]["prompt_tokens"]


def test_a_trace_tells_of_every_token_what_the_safe_stream_saw(worker: Client) -> None:
    """And nothing of the adversarial one, by which its distribution could be had."""
    worker.send({"id": 1, "prompt": "What is red?", "temp": 1, "seed": 3, "max_tokens": 24, "trace": True})
    events = worker.until_last(1)
    traces, done = [e for e in events if e["event"] == "trace"], events[-1]
    assert len(traces) == done["contrast"]["positions"]
    assert sum(t["changed"] for t in traces) == done["contrast"]["changed_tokens"] > 0
    for trace in traces:
        names = {"token", "text", "changed", "safe_token", "safe_text", "safe_logprob", "safe_rank"}
        assert set(trace) == names | {"id", "event"}
        assert trace["changed"] == (trace["token"] != trace["safe_token"])
        assert trace["safe_logprob"] <= 0 < trace["safe_rank"]
    assert any(t["safe_rank"] > 1 for t in traces)
    assert "final" not in traces[-1]
    assert not [e for e in worker_events(worker, prompt="What is red?") if e["event"] == "trace"]


def worker_events(worker: Client, **request: Any) -> list[Event]:
    worker.send({"id": "q", **request})
    return worker.until_last("q")


# -- what it says of itself --------------------------------------------------------------------------------------------


def test_ready_says_what_there_is(base: tuple[str, ...]) -> None:
    from acd_local import __version__

    client = Client(*base, "--temp", "0.5", "--stop", "x", "--system", "Be brief.", "--parallel", "2")
    try:
        loading, ready = client.event(), client.ready()
        assert loading == {"event": "loading", "phase": "model", "progress": 0.0}
        assert (ready["protocol"], ready["version"]) == (2, __version__)
        model = ready["model"]
        assert (model["name"], model["path"], model["architecture"]) == ("tiny llama", base[0], "llama")
        assert model["size"] == Path(base[0]).stat().st_size
        assert model["n_params"] > 1000 and model["n_vocab"] > 100 and model["context_length"] > 100
        assert model["quantization"] == "F32"
        numbers = {"alpha": 0.5, "beta": 0.1}
        assert ready["pair"] == {"name": "short", "fitted": True, "soft": False, "gate": False} | numbers
        assert (ready["ctx_size"], ready["parallel"]) == (512, 2)
        options = ready["options"]
        assert (options["temp"], options["stop"], options["top_k"]) == (0.5, ["x"], 40)
        assert (options["system"], options["divergence"], options["trace"]) == ("Be brief.", False, False)
        # All of it may be said in a request.
        assert client.ask(prompt="hi", **options | {"max_tokens": 2})["event"] == "done"
    finally:
        client.kill()


LONG = "the water is blue and the wine is red " * 150


def test_progress_of_a_long_prompt(slow: Client) -> None:
    slow.send({"id": 1, "prompt": LONG, "max_tokens": 2}, {"id": 2, "prompt": "hi", "max_tokens": 2})
    events = [e for e in slow.until_last(1) if e["event"] != "queued"]
    assert events[0]["event"] == "started"
    progress = [e for e in events if e["event"] == "progress"]
    usage = events[-1]["usage"]
    assert len(progress) >= 2
    for event in progress:
        assert set(event) == {"id", "event", "phase", "done", "total"}
        assert (event["phase"], event["done"] < event["total"]) == ("prompt", True)
    assert [e["done"] for e in progress] == sorted({e["done"] for e in progress})
    kept = progress[0]["done"]  # from the answers before
    assert {e["total"] for e in progress} == {kept + usage["prompt_decoded"]}
    assert progress[0]["total"] > 2 * usage["prompt_tokens"] - 100
    seconds = events[-1]["timings"]["prompt_seconds"]
    assert len(progress) <= 2 + seconds / 0.25, "a few per second at most"
    short = slow.until_last(2)
    assert not [e for e in short if e["event"] == "progress"], "a prompt of one batch needs no sign"


def test_what_was_decoded_is_told_after_a_cancel_within_the_prompt(slow: Client) -> None:
    slow.send({"id": 1, "prompt": "a " + LONG, "max_tokens": 2})
    first, progress = slow.until("progress", 1)[-1], slow.until("progress", 1)[-1]
    slow.send({"id": 1, "cancel": True})
    done = slow.until_last(1)[-1]
    assert (done["finish_reason"], done["text"]) == ("cancelled", "")
    decoded = done["usage"]["prompt_decoded"]
    assert 0 < progress["done"] - first["done"] <= decoded < progress["total"] - first["done"]
    assert done["usage"]["prompt_tokens"] > 1000
    rest = slow.ask(prompt="a " + LONG, max_tokens=2)["usage"]["prompt_decoded"]
    assert rest == progress["total"] - first["done"] - decoded, "what was decoded is still there"


# -- the end -----------------------------------------------------------------------------------------------------------


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
        client.ready()
        client.send(*requests)
        code, events, _ = client.end()
        assert code == 0
        done = {e["id"]: e for e in events if e["event"] == "done"}
        assert sorted(done) == [0, 1, 2, 3, 4]
        for i, last in done.items():
            assert "".join(e["text"] for e in events if e["id"] == i and e["event"] == "token") == last["text"]
        texts.append({i: (e["text"], e["finish_reason"]) for i, e in done.items()})
    assert texts[0] == texts[1]
    order = [e["id"] for e in events if e["event"] == "token"]
    assert order.index(2) < len(order) - 1 - order[::-1].index(1)  # the third began before the second ended
    assert order.index(3) > order.index(0)


def test_parallel_requests_are_cancelled_one_by_one(slow_base: tuple[str, ...]) -> None:
    client = Client(*slow_base, "--parallel", "2")
    client.ready()
    endless = {"prompt": "Hi", "grammar": ENDLESS, "max_tokens": 3000}
    client.send({"id": "a", **endless}, {"id": "b", **endless}, {"id": "waits", "prompt": "Hi", "max_tokens": 2})
    client.until("token", "b")
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
        env=child_env(),
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert b"--jsonl" in done.stderr
