"""Checks the server's responses (docs/server.md)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from soaking.checks import FINISHED, Found, check_counts, check_text, check_told, shown
from soaking.load import Asked, Json


def check_error(asked: Asked, status: int, body: bytes) -> list[str]:
    """What is wrong with a response that is an error."""
    try:
        error = json.loads(body)["error"]
        whole = set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    except (ValueError, LookupError, TypeError):
        return [f"status {status} without an error: {body[:200]!r}"]
    problems = [] if whole else [f"an error that is not whole: {shown(error)}"]
    if not (400 <= status < 500) or (error["code"] not in asked.codes and status != 429):
        problems.append(f"status {status}: {shown(error)}")
    return problems


def check_whole(asked: Asked, body: bytes, found: Found) -> list[str]:
    """What is wrong with an answer in one piece."""
    try:
        answer = json.loads(body, parse_constant=_refuse)
        choice, about = answer["choices"][0], answer["acd"]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        likely = (choice["logprobs"] or {}).get("content", [])
        got = _Got(text, choice["finish_reason"], about, about.get("trace", []), likely, answer["usage"])
        return _answer(asked, got, found)
    except (ValueError, LookupError, TypeError) as error:
        return [f"{type(error).__name__}: {error}: {body[:300]!r}"]


def check_stream(asked: Asked, body: bytes, found: Found) -> list[str]:
    """What is wrong with the whole body of a stream."""
    try:
        *events, done, rest = body.decode().split("\n\n")
        if (done, rest) != ("data: [DONE]", ""):
            return [f"the stream ends in {body[-200:]!r}"]
        records = [
            json.loads(event.removeprefix("data: "), parse_constant=_refuse)
            for event in events
            if not event.startswith(":")
        ]
        return _records(asked, records, found)
    except (ValueError, LookupError, TypeError) as error:
        return [f"{type(error).__name__}: {error}: {body[-300:]!r}"]


def _records(asked: Asked, records: Sequence[Json], found: Found) -> list[str]:
    if bad := [record for record in records if "error" in record]:
        # The stream had begun, since a sign of life had to be given, before it was known that there is no answer.
        said = _text(choice for one in records for choice in one.get("choices", ()))
        expected = asked.ends in ("refused", "either") and bad[0]["error"]["code"] in asked.codes
        return [] if expected and bad == records[-1:] and not said else [f"an error in the stream: {shown(bad)}"]
    problems = [] if len({record["id"] for record in records}) == 1 else ["chunks of several ids"]
    choices = [choice for record in records for choice in record["choices"]]
    ends = [choice["finish_reason"] for choice in choices if choice["finish_reason"] is not None]
    last = [record["acd"] for record in records if "finish_reason" in record.get("acd", {})]
    if len(ends) != 1 or len(last) != 1 or choices[-1]["finish_reason"] is None:
        return [*problems, f"{len(ends)} finish reasons, {len(last)} records of the answer"]
    got = _Got(
        text=_text(choices),
        ended=ends[0],
        about=last[0],
        traced=[token for record in records for token in record.get("acd", {}).get("trace", [])],
        likely=[token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]],
        usage=records[-1]["usage"] if (asked.fields.get("stream_options") or {}).get("include_usage") else None,
    )
    return problems + _answer(asked, got, found)


def _text(choices: Iterable[Json]) -> str:
    return "".join(choice["delta"].get("content", "") if "delta" in choice else choice["text"] for choice in choices)


@dataclass(frozen=True)
class _Got:
    """An answer, streamed or not.

    Attributes:
        ended: the finish reason in OpenAI's words. about: the record of the answer.
        traced, likely: its tokens in the trace, and with their log probabilities.
        usage: None where it was not asked for.
    """

    text: str
    ended: str
    about: Json
    traced: list[Json]
    likely: list[Json]
    usage: Json | None


def _answer(asked: Asked, got: _Got, found: Found) -> list[str]:
    text, finish, positions = got.text, got.about["finish_reason"], got.about["contrast"]["positions"]
    problems = [f"answered, and not refused: {shown(asked.fields)}"] if asked.ends == "refused" else []
    if finish not in FINISHED or got.ended != ("length" if finish == "length" else "stop"):
        problems.append(f"finish_reason is {got.ended}, of {finish}")
    usage = got.usage or {"completion_tokens": positions, "prompt_tokens": 0}
    found.answered(got.about, usage)
    problems += found.strangers(asked, text) + check_text(asked, text, finish)
    traced = got.traced if asked.fields.get("trace") else None
    if traced is not None:
        problems += check_told("".join(token["text"] for token in traced), text, finish)
    if asked.fields.get("logprobs"):
        told = b"".join(bytes(token["bytes"]) for token in got.likely).decode("utf-8", "replace")
        problems += check_told(told, text, finish)
    return problems + check_counts(asked, tokens=usage["completion_tokens"], positions=positions, traced=traced)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number")
