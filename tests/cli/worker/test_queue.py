"""Requests wait, run, are cancelled and tell how far they are."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from places import child_env
from worker_client import ENDLESS, MAIN, Client, Event

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
