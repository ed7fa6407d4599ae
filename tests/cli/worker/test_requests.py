"""acd-run --jsonl: the protocol as a client in any language sees it."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import resident_mb
from worker_client import PAIR, Client, Event

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
    assert set(done["timings"]) == {"prompt_seconds", "answer_seconds", "tokens_per_second", "drafted", "accepted"}
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


def test_drafts_change_no_text_and_the_divergence_is_asked_for(worker: Client) -> None:
    given = {"prompt": "What is red?", "max_tokens": 40, "beta": 0.5}
    stepwise, drafted, measured = (
        worker.ask(**given, **how) for how in ({"draft_max": 0}, {"draft_max": 15}, {"divergence": True})
    )
    assert stepwise["text"] == drafted["text"] == measured["text"]
    assert stepwise["contrast"]["mean_divergence"] is None is drafted["contrast"]["mean_divergence"]
    assert measured["contrast"]["mean_divergence"] > 0
    assert worker.ask(prompt="hi", divergence=1)["message"] == "divergence must be true or false"
    assert worker.ask(prompt="hi", draft_max=16)["message"] == "draft_max must be in [0, 15], not 16"


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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries do as they like")
def test_long_lines_leave_no_memory_behind(worker: Client) -> None:
    """Neither the last one, while the next is awaited, nor holes of their size in glibc's heap."""
    worker.ask(prompt="Hi")
    before = resident_mb(worker.process.pid)
    for _ in range(6):
        worker.send(b'{"id": 1, "prompt": "' + b"a" * 15_000_000 + b'"]\n', {"ping": True})
        refused, pong = worker.event(), worker.event()
        assert refused is not None and "not JSON" in refused["message"] and pong is not None
    assert resident_mb(worker.process.pid) < before + 8


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
