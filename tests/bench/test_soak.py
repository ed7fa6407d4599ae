"""benchmarks/soak.py: a short run of all it starts; its checks notice what would be wrong."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
if sys.platform != "linux":
    pytest.skip("it reads /proc", allow_module_level=True)

from soaking.checks import Found
from soaking.figures import Sample, grown, growth, look
from soaking.load import Asked, Pairs, mark
from soaking.server import Response, unchunked
from soaking.server_checks import check_error, check_stream, check_whole
from soaking.server_load import ServerLoad
from soaking.worker_checks import Ledger
from soaking.worker_load import WorkerLoad

Json = dict[str, Any]
PAIRS = Pairs(("as-is", "default", "fitted"), ("fitted",), ("foreign", "nobody's"), "fitted")


def soak(*args: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_short_run_finds_no_fault(tiny: Callable[..., Path]) -> None:
    run = soak(tiny("chatml"), "--minutes", 0.1)
    told, _ = run.communicate(timeout=1800)
    assert run.returncode == 0, told
    assert re.search(r"^\d+ requests, 0 faults$", told, re.M)
    for name in ("worker together", "worker drafts", "server together", "server drafts"):
        assert re.search(rf"^{name}: \d+ requests", told, re.M)
    assert int(re.findall(r"drafted tokens, right: (\d+)", told)[1]) > 0
    assert "AMD" in told or "cores of" in told


@pytest.mark.slow
def test_ctrl_c_ends_a_run_with_its_report(tiny: Callable[..., Path]) -> None:
    run = soak(tiny("chatml"), "--minutes", 30, "--worker")
    assert run.stdout is not None
    while not (line := run.stdout.readline()).startswith("worker drafts: under load"):
        assert line, "it ended"
    run.send_signal(signal.SIGINT)
    told, _ = run.communicate(timeout=1800)
    assert run.returncode == 130 and re.search(r"^\d+ requests, 0 faults$", told, re.M), told


@pytest.mark.slow
def test_one_request_is_asked_again(tiny: Callable[..., Path]) -> None:
    run = soak(tiny("chatml"), "--worker", "--again", 5)
    told, _ = run.communicate(timeout=1800)
    assert run.returncode == 0 and "worker together: 1 requests" in told, told


@pytest.mark.parametrize("load", [WorkerLoad, ServerLoad])
def test_a_request_follows_from_seed_and_number(load: type[WorkerLoad | ServerLoad]) -> None:
    first, again, other = (load(seed, "here", PAIRS) for seed in (1, 1, 2))
    requests = [first.request(i) for i in range(300)]
    assert requests == [again.request(i) for i in reversed(range(300))][::-1]
    assert requests != [other.request(i) for i in range(300)]
    lengths = {asked.fields["max_tokens"] for asked in requests if len(asked.marks) > 0 and asked.ends == "answer"}
    assert min(lengths) == 1 and 500 < max(lengths) <= 600
    assert {asked.fields.get("pair") for asked in requests} >= set(PAIRS.usable) | set(PAIRS.foreign)


# --- Figures ----------------------------------------------------------------------------------------------------------


def series(slope: float, noise: float, count: int = 600) -> tuple[Sequence[float], Sequence[float]]:
    """MB over an hour, `slope` MB of them more at its end."""
    dice = random.Random(5)
    times = [3600 * i / count for i in range(count)]
    return times, [300 + slope * t / 3600 + dice.gauss(0, noise) for t in times]


def test_memory_that_grows_is_told_from_memory_that_does_not() -> None:
    for slope, noise, verdict in (
        (0, 0, "flat"),
        (0, 3, "flat"),
        (2, 0.1, "flat"),
        (8, 0.5, "grows"),
        (40, 3, "grows"),
    ):
        found = growth(*series(slope, noise))
        assert found is not None and found.verdict == verdict, (slope, noise, found)
        assert found.grown == pytest.approx(slope / 2, abs=max(0.1, found.noise))
    assert growth([], []) is None and growth(*series(0, 1, count=20)) is None


def test_the_first_half_may_warm_up_and_peaks_pass() -> None:
    times, values = series(0, 0.2)
    warming = [value - max(0.0, 100 - time / 10) for time, value in zip(times, values, strict=True)]
    peaks = [value + (80 if i % 40 == 0 else 0) for i, value in enumerate(warming)]
    found = growth(times, peaks)
    assert found is not None and found.verdict == "flat"


def test_noise_in_which_growth_would_drown_is_no_flat_memory() -> None:
    found = growth(*series(30, 60))
    assert found is not None and found.verdict == "unclear"


def test_handles_count_at_rest() -> None:
    def samples(*rests: int) -> list[Sample]:
        return [sample for n in rests for sample in (Sample(0, 1, 1, 50 + n, 4), Sample(0, 1, 1, n, 4, rest=True))]

    assert grown(samples(5, 6, 5, 6), "handles") == []
    assert grown(samples(5, 5, 6, 7), "handles") == ["handles at rest went from 5 to 7"]
    assert grown(samples(5), "handles") == []


def test_a_pool_of_threads_may_fill() -> None:
    samples = [Sample(0, 1, 1, 5, n, rest=True) for n in (7, 7, 8, 13)]
    assert grown(samples, "threads", spare=6) == []
    assert grown(samples, "threads", spare=5) == ["threads at rest went from 7 to 13"]


def test_a_look_sees_memory_handles_and_children() -> None:
    code = "import subprocess, sys; print(flush=True); sys.stdin.read(1) and subprocess.run(['cat'])"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdout.readline()
        alone = look(process.pid, 1.0)
        assert alone is not None and alone.rss > alone.private > 1 and alone.threads == 1 and alone.handles >= 3
        process.stdin.write(b"x")
        process.stdin.flush()
        while (both := look(process.pid, 2.0)) is None or both.threads < 2:
            pass
        assert both.handles > alone.handles
    finally:
        process.kill()
        process.communicate()
    assert look(process.pid, 3.0) is None


# --- The worker's events ----------------------------------------------------------------------------------------------


def worker_faults(asked: Asked, *events: Json, first: int = 1) -> list[str]:
    """What the ledger says of these events, after the request was sent as the only one."""
    found = Found()
    found.issued.add(mark("request", 77))
    ledger = Ledger(found)
    ledger.sent(asked, first)
    for event in events:
        ledger.told(event)
    ledger.finish()
    return [fault.text for fault in found.faults]


ANSWER = Asked(7, "answer", {"id": "a", "max_tokens": 3}, (b"...\n",), marks=frozenset({mark("request", 7)}))
TIMES = {"drafted": 0, "accepted": 0}


def queued(**more: Any) -> Json:
    return {"id": "a", "event": "queued", "ahead": 0} | more


def token(text: str) -> Json:
    return {"id": "a", "event": "token", "text": text}


def done(text: str, tokens: int = 2, **more: Any) -> Json:
    made = {"contrast": {"positions": tokens, "compared": 0}, "gate": None, "timings": TIMES}
    usage = {"completion_tokens": tokens, "prompt_tokens": 9}
    return (
        {"id": "a", "event": "done", "final": True, "text": text, "finish_reason": "stop", "usage": usage} | made | more
    )


STARTED = {"id": "a", "event": "started"}
GOOD = (queued(), STARTED, token("He"), token("llo"), done("Hello"))


def error(code: str = "usage", **more: Any) -> Json:
    return {"id": "a", "event": "error", "code": code, "message": "no", "final": True} | more


def test_a_good_answer_has_no_fault() -> None:
    assert worker_faults(ANSWER, *GOOD) == []


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ((*GOOD, done("Hello")), "no request that is open"),
        ((*GOOD, token("more")), "no request that is open"),
        (GOOD[:-1], "no final event"),
        ((), "no final event"),
        ((queued(), STARTED, token("He"), done("Hello")), "the deltas are 'He'"),
        ((*GOOD[:4], token("!"), done("Hello")), "the deltas are 'Hello!'"),
        ((STARTED, *GOOD[2:]), "never queued"),
        ((queued(), *GOOD), "queued twice"),
        ((queued(), token("Hello"), done("Hello")), "a token before started"),
        ((*GOOD[:-1], done("Hello", tokens=4)), "4 tokens, where 3 were the most"),
        ((*GOOD[:-1], done("Hello", finish_reason="cancelled")), "finish_reason is cancelled"),
        ((queued(), error("internal")), "ended in"),
        ((error(),), "ended in"),
        ((queued(), STARTED, token(mark("request", 77)), done(mark("request", 77))), "of another request"),
        ((*GOOD, error(final=False, line=1)), "an error of a line that was right"),
        (({"id": "b", "event": "token", "text": "?"}, *GOOD), "no request that is open"),
    ],
)
def test_what_is_wrong_with_an_answer_is_noticed(events: tuple[Json, ...], words: str) -> None:
    assert words in " | ".join(worker_faults(ANSWER, *events))


def test_its_own_mark_and_a_word_like_a_mark_are_no_strangers() -> None:
    text = mark("request", 7) + " zq0123456789"
    assert worker_faults(ANSWER, queued(), STARTED, token(text), done(text)) == []


def test_a_trace_is_held_to_the_text() -> None:
    asked = Asked(7, "answer", ANSWER.fields | {"trace": True}, ANSWER.parts)
    traces = [{"id": "a", "event": "trace", "text": text} for text in ("He", "llo")]
    assert worker_faults(asked, *GOOD[:-1], *traces, done("Hello")) == []
    lost = worker_faults(asked, *GOOD[:-1], traces[0], done("Hello"))
    assert "1 tokens were traced of 2" in lost and any("the tokens say 'He'" in fault for fault in lost)


def test_a_refused_request_has_one_error() -> None:
    asked = Asked(7, "wrong field", {"id": "a"}, (b"...\n",), "refused", frozenset({"usage"}))
    assert worker_faults(asked, error()) == []
    assert worker_faults(asked, error("internal")) != []
    assert worker_faults(asked, error(), error()) != []
    assert worker_faults(asked, *GOOD) != []
    assert worker_faults(asked) != []


def test_every_bad_line_has_one_error_with_its_number() -> None:
    asked = Asked(7, "burst", parts=(b"?\n?\n",), ends="line", codes=frozenset({"usage"}))
    errors = [error(id=None, final=False, line=line) for line in (4, 5)]
    assert worker_faults(asked, *errors, first=4) == []
    assert worker_faults(asked, *errors[:1], first=4) == ["no error for line 5"]
    assert worker_faults(asked, *errors, errors[1], first=4) != []
    assert worker_faults(asked, errors[0], error("internal", id=None, final=False, line=5), first=4) != []


def test_a_cancel_may_come_too_late_and_then_has_one_error() -> None:
    def faults(*events: Json) -> list[str]:
        found = Found()
        ledger = Ledger(found)
        ledger.sent(ANSWER, 1)
        for event in GOOD[:-1]:
            ledger.told(event)
        ledger.cancelled(ANSWER, 2)
        for event in events:
            ledger.told(event)
        ledger.finish()
        return [fault.text for fault in found.faults]

    late = error(final=False, line=2)
    assert faults(done("Hello", finish_reason="cancelled")) == []
    assert faults(done("Hello"), late) == []
    assert faults(done("Hello"), late, late) != []


# --- The server's responses -------------------------------------------------------------------------------------------

STREAM = Asked(3, "stream", {"max_tokens": 5, "stream": True}, marks=frozenset({mark("request", 3)}))
TRACED = Asked(3, "stream", STREAM.fields | {"trace": True}, marks=STREAM.marks)


def chunk(text: str = "", finish: str | None = None, **acd: Any) -> Json:
    delta = {"content": text} if text else {}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {"id": "c1", "choices": [choice]} | ({"acd": acd} if acd else {})


def last(positions: int = 2, **acd: Any) -> Json:
    about = {"finish_reason": "stop", "contrast": {"positions": positions, "compared": 0}, "gate": None}
    return chunk("", "stop", **about, timings=TIMES, **acd)


def stream_faults(asked: Asked, *records: Json, end: bytes = b"data: [DONE]\n\n") -> list[str]:
    found = Found()
    found.issued.add(mark("request", 77))
    return check_stream(asked, b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in records) + end, found)


def test_a_good_stream_has_no_fault() -> None:
    assert stream_faults(STREAM, chunk(), chunk("He"), chunk("llo"), last()) == []
    traced = chunk("Hello", trace=[{"text": "He"}, {"text": "llo"}])
    assert stream_faults(TRACED, chunk(), traced, last()) == []


@pytest.mark.parametrize(
    ("asked", "records", "end", "words"),
    [
        (STREAM, (chunk("Hello"), last()), b"", "the stream ends in"),
        (STREAM, (chunk("Hello"), last()), b"data: [DONE]\n\ndata: [DONE]\n\n", "JSONDecodeError"),
        (STREAM, (chunk("Hello"), last(), last()), None, "2 finish reasons"),
        (STREAM, (chunk("Hello"),), None, "0 finish reasons"),
        (STREAM, (chunk("Hello"), last(), chunk("late")), None, "1 finish reasons"),
        (STREAM, (chunk("Hello"), last() | {"id": "c2"}), None, "several ids"),
        (STREAM, (chunk(mark("request", 77)), last()), None, "of another request"),
        (STREAM, (chunk("Hello"), last(positions=6)), None, "6 tokens, where 5"),
        (STREAM, (chunk("Hello"), {"error": {"code": "internal"}}), None, "an error in the stream"),
        (TRACED, (chunk("He", trace=[{"text": "He"}, {"text": "llo"}]), last()), None, "the tokens say 'Hello'"),
        (TRACED, (chunk("Hello", trace=[{"text": "Hello"}]), last()), None, "1 tokens were traced of 2"),
    ],
)
def test_what_is_wrong_with_a_stream_is_noticed(
    asked: Asked, records: tuple[Json, ...], end: bytes | None, words: str
) -> None:
    found = stream_faults(asked, *records, **({} if end is None else {"end": end}))
    assert words in " | ".join(found)


def test_a_stream_that_had_begun_may_end_in_the_refusal() -> None:
    asked = Asked(3, "overlong prompt", STREAM.fields, ends="refused", codes=frozenset({"context_length_exceeded"}))
    refusal = {"error": {"code": "context_length_exceeded"}}
    assert stream_faults(asked, chunk(), refusal) == []
    assert stream_faults(asked, chunk(), refusal, refusal) != []
    assert stream_faults(asked, chunk("Hello"), refusal) != []


def test_an_answer_in_one_piece_is_held_to_its_tokens() -> None:
    asked = Asked(3, "log probabilities", {"max_tokens": 5, "logprobs": True})

    def faults(text: str) -> list[str]:
        told = {"content": [{"bytes": list(b"He")}, {"bytes": list(b"llo")}]}
        choice = {"message": {"content": text}, "finish_reason": "stop", "logprobs": told}
        answer = last() | {"choices": [choice], "usage": {"completion_tokens": 2, "prompt_tokens": 1}}
        return check_whole(asked, json.dumps(answer).encode(), Found())

    assert faults("Hello") == []
    assert "the tokens say 'Hello'" in faults("Hell")[0]
    assert check_whole(asked, b"{}", Found()) != []


def test_an_error_is_the_clients_and_whole() -> None:
    asked = Asked(3, "wrong field", ends="refused", codes=frozenset({"invalid_value"}))

    def body(**more: Any) -> bytes:
        return json.dumps(
            {"error": {"message": "no", "type": "t", "param": None, "code": "invalid_value"} | more}
        ).encode()

    assert check_error(asked, 400, body()) == []
    assert check_error(asked, 429, body(code="overloaded")) == []
    assert check_error(asked, 500, body()) != []
    assert check_error(asked, 400, body(code="internal")) != []
    assert check_error(asked, 400, body(message="two\nlines")) != []
    assert check_error(asked, 400, b"Bad Request") != []


def test_responses_have_to_be_whole() -> None:
    assert unchunked(b"5\r\nHello\r\n0\r\n\r\n") == (b"Hello", True, b"")
    assert unchunked(b"5\r\nHello\r\n0\r\n\r\nmore") == (b"Hello", True, b"more")
    for cut in range(1, 21):
        whole = b"5\r\nHello\r\n2\r\n, \r\n0\r\n\r\n"
        assert not unchunked(whole[:-cut])[1]
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
    first, rest = Response.of(head + b"Hello" + head + b"Hel")
    second, none = Response.of(rest)
    assert (first.status, first.body, first.whole) == (200, b"Hello", True)
    assert (second.whole, none) == (False, b"")
