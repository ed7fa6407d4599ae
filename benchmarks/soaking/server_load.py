"""Makes what the server is asked."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any

from soaking.load import CONTEXT, Asked, Json, Load, as_bytes, first_text, length, schema

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]
WRONG: tuple[Json, ...] = (  # in place of, or beside, a good request's fields
    {"messages": []},
    {"messages": "hello"},
    {"messages": [5]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "king", "content": "Hi"}]},
    {"messages": [*HI, {"role": "assistant", "content": "Sure, "}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    {"max_tokens": "many"},
    {"max_tokens": 0},
    {"max_tokens": 10**30},
    {"max_completion_tokens": -1},
    {"temperature": -1},
    {"temperature": True},
    {"top_p": 1e400},
    {"seed": 2**64},
    {"seed": 1.5},
    {"n": 2},
    {"tools": [{"type": "function"}]},
    {"logit_bias": {"5": 100}},
    {"stop": [1]},
    {"stop": ""},
    {"stream": "yes"},
    {"stream": True, "stream_options": []},
    {"top_logprobs": 5},
    {"logprobs": True, "top_logprobs": 21},
    {"logprobs": True, "alpha": 0.5},
    {"logprobs": True, "trace": True},
    {"alpha": -1},
    {"beta": 2},
    {"gate": 1},
    {"gate_threshold": 7},
    {"window": 0.5},
    {"plain": "no"},
    {"pair": 5},
    {"pair": "../../etc/passwd"},
    {"trace": 1},
    {"response_format": {"type": "poem"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"frobnicate": 1}}}},
    {"messages": [{"role": "user", "content": "\ud800"}]},
)
BAD_BODIES = (
    b"",
    b"{",
    b"hello",
    b"[]",
    b"null",
    b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": NaN}',
    b"[" * 50_000,
    b'{"a":' * 50_000,
    b'{"max_tokens": ' + b"9" * 5000 + b"}",
    b'{"messages": ' + b"[" * 100 + b"]" * 100 + b"}",
)
GARBAGE = (
    b"hello\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 60 + b"\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: many\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000,
)
TOO_LONG = 16_000_100  # bytes of a body that is not read
JSON_ERRORS = frozenset({"invalid_json", "invalid_value"})

Dice = random.Random


class ServerLoad(Load):
    def kinds(self) -> Mapping[str, tuple[float, Callable[[Dice, int, str], Asked]]]:
        return {
            "stream": (30, self._stream),
            "whole": (10, self._whole),
            "completion": (6, self._completion),
            "log probabilities": (4, self._logprobs),
            "schema": (6, self._schema),
            "slow reader": (4, self._slow),
            "reader that stops": (0.5, self._stopped),
            "left in the stream": (12, self._left),
            "left at once": (5, self._left_at_once),
            "left in the body": (4, self._left_in_body),
            "long prompt": (2, self._long),
            "overlong prompt": (4, self._overlong),
            "other's pair": (3, self._foreign),
            "wrong field": (10, self._wrong),
            "bad body": (5, self._bad_body),
            "huge body": (0.2, self._huge),
            "wrong door": (3, self._door),
            "no HTTP": (2, self._garbage),
            "look": (4, self._look),
            "in one connection": (4, self._in_one),
        }

    def _fields(self, dice: Dice, number: int) -> tuple[Json, frozenset[str]]:
        messages, marks = self.talk(dice, number)
        fields: Json = {"messages": messages, "max_tokens": length(dice), **self.guard(dice)}
        for name, values, chance in (
            ("temperature", (0, 0.3, 1.5), 0.5),
            ("seed", (1, -1, 2**63), 0.4),
            ("stop", ("\n\n", [".", "!"], ["the "]), 0.15),
            ("trace", (True,), 0.4),
            ("divergence", (True,), 0.1),
            ("top_p", (0.5, 1), 0.1),
            ("top_k", (0, 1, 40), 0.1),
            ("presence_penalty", (0.5,), 0.1),
            ("frequency_penalty", (0.5,), 0.1),
            ("user", ("somebody",), 0.1),
            ("temperature", (None,), 0.02),
        ):
            if dice.random() < chance:
                fields[name] = dice.choice(values)
        return fields, marks

    def _stream(self, dice: Dice, number: int, kind: str, more: Json | None = None, **how: Any) -> Asked:
        fields, marks = self._fields(dice, number)
        fields |= {"stream": True, **({"stream_options": {"include_usage": True}} if dice.random() < 0.5 else {})}
        return _post(number, kind, fields | (more or {}), marks=marks, **how)

    def _whole(self, dice: Dice, number: int, kind: str) -> Asked:
        fields, marks = self._fields(dice, number)
        return _post(number, kind, fields, marks=marks)

    def _completion(self, dice: Dice, number: int, kind: str) -> Asked:
        fields, marks = self._fields(dice, number)
        prompt = fields.pop("messages")[-1]["content"]
        fields |= {"prompt": prompt, "stream": dice.random() < 0.5}
        return _post(number, kind, fields, COMPLETIONS, marks=marks)

    def _logprobs(self, dice: Dice, number: int, kind: str) -> Asked:
        fields, marks = self._fields(dice, number)
        for name in ("alpha", "beta", "plain", "gate", "gate_threshold", "window", "pair", "trace"):
            fields.pop(name, None)
        fields |= {"logprobs": True, "top_logprobs": dice.choice((0, 5, 20)), "stream": dice.random() < 0.5}
        return _post(number, kind, fields, marks=marks)

    def _schema(self, dice: Dice, number: int, kind: str) -> Asked:
        fields, marks = self._fields(dice, number)
        fields.pop("stop", None)
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema(_post(number, kind, {}).mark)}}
        fields |= {"response_format": form, "stream": dice.random() < 0.5}
        return _post(number, kind, fields, marks=marks, form="schema")

    def _slow(self, dice: Dice, number: int, kind: str) -> Asked:
        return self._stream(dice, number, kind, {"trace": True}, pause=dice.uniform(0.1, 1))

    def _stopped(self, dice: Dice, number: int, kind: str) -> Asked:
        """A client that reads nothing for longer than the server waits, and goes away."""
        more = {"trace": True, "divergence": True, "max_tokens": 600}
        return self._stream(dice, number, kind, more, pause=40, at=0, ends="left")

    def _left(self, dice: Dice, number: int, kind: str) -> Asked:
        at = dice.choice((1, 100, 1000, 3000, 10_000, 30_000))
        return self._stream(dice, number, kind, at=at, ends="left", pause=dice.choice((0, 0, 0.2)))

    def _left_at_once(self, dice: Dice, number: int, kind: str) -> Asked:
        fields, marks = self._fields(dice, number)
        fields |= {"stream": dice.random() < 0.5}
        return _post(number, kind, fields, marks=marks, at=0, ends="left", pause=dice.choice((0, 0, 0.3, 2)))

    def _left_in_body(self, dice: Dice, number: int, kind: str) -> Asked:
        whole = self._stream(dice, number, kind)
        sent = b"".join(whole.parts)
        cut = dice.randrange(1, len(sent))
        return Asked(
            number, kind, whole.fields, (sent[: cut // 2], sent[cut // 2 : cut]), "left", marks=whole.marks, at=0
        )

    def _long(self, dice: Dice, number: int, kind: str) -> Asked:
        text = f"{_post(number, kind, {}).mark}: {self.long(dice, 0.7 * CONTEXT)}"
        return self._stream(dice, number, kind, {"messages": [{"role": "user", "content": text}], "max_tokens": 8})

    def _overlong(self, dice: Dice, number: int, kind: str) -> Asked:
        text = self.long(dice, dice.choice((1.5, 3, 20)) * CONTEXT)
        more = {"messages": [{"role": "user", "content": text}], "stream": dice.random() < 0.5}
        return self._stream(dice, number, kind, more, ends="refused", codes=frozenset({"context_length_exceeded"}))

    def _foreign(self, dice: Dice, number: int, kind: str) -> Asked:
        more = {"pair": dice.choice(self._pairs.foreign)}
        return self._stream(dice, number, kind, more, ends="either", codes=frozenset({"pair", "invalid_value"}))

    def _wrong(self, dice: Dice, number: int, kind: str) -> Asked:
        fields = {"messages": HI, "max_tokens": 3, **dice.choice(WRONG)}
        codes = frozenset({"invalid_value", "unsupported_parameter", "invalid_json", "usage"})
        return _post(number, kind, fields, ends="refused", codes=codes)

    def _bad_body(self, dice: Dice, number: int, kind: str) -> Asked:
        body = dice.choice((*BAD_BODIES, dice.randbytes(200)))
        return Asked(number, kind, parts=_parts(body, CHAT), ends="refused", codes=JSON_ERRORS)

    def _huge(self, dice: Dice, number: int, kind: str) -> Asked:
        body = b'{"messages": "' + b"a" * TOO_LONG + b'"}'
        return Asked(number, kind, parts=_parts(body, CHAT), ends="refused", codes=frozenset({"too_large"}))

    def _door(self, dice: Dice, number: int, kind: str) -> Asked:
        body = as_bytes({"messages": HI, "max_tokens": 1})
        parts = dice.choice(
            (
                _parts(body, "/v1/nothing"),
                _parts(body, CHAT, method="GET"),
                _parts(body, "/health", method="DELETE"),
                _parts(body, CHAT, more="Content-Type: text/plain\r\n"),
                _parts(body, CHAT, more="Origin: http://elsewhere.example\r\nContent-Type: application/json\r\n"),
                _parts(body, CHAT, host="elsewhere.example"),
                _parts(b"", "/v1/models/none", method="GET"),
            )
        )
        codes = frozenset({"http", "host", "origin", "content_type", "model_not_found"})
        return Asked(number, kind, parts=parts, ends="refused", codes=codes)

    def _garbage(self, dice: Dice, number: int, kind: str) -> Asked:
        return Asked(number, kind, parts=(dice.choice(GARBAGE),), ends="closed")

    def _in_one(self, dice: Dice, number: int, kind: str) -> Asked:
        """The same request several times, in advance or not, before the connection is closed."""
        fields, marks = self._fields(dice, number)
        last = _post(number, kind, fields | {"max_tokens": dice.randint(1, 20), "stream": dice.random() < 0.5})
        again = b"".join(last.parts).replace(b"Connection: close\r\n", b"", 1)
        times = dice.randint(2, 4)
        parts = (*(again,) * (times - 1), b"".join(last.parts))
        return Asked(number, kind, last.fields, parts, marks=marks, times=times)

    def _look(self, dice: Dice, number: int, kind: str) -> Asked:
        path = dice.choice(("/", "/health", "/props", "/metrics", "/v1/models", "//v1//models"))
        return Asked(number, kind, parts=_parts(b"", path, method="GET"), ends="look")


def first() -> Asked:
    """The request that comes before all others."""
    messages = [{"role": "user", "content": first_text()}]
    return _post(-1, "first", {"messages": messages, "max_tokens": 4, "pair": "as-is"})


def _post(number: int, kind: str, fields: Json, path: str = CHAT, **more: Any) -> Asked:
    return Asked(number, kind, fields, _parts(json.dumps(fields).encode(), path), **more)


def _parts(
    body: bytes, path: str, *, method: str = "POST", host: str = "localhost", more: str | None = None
) -> tuple[bytes, ...]:
    more = "Content-Type: application/json\r\n" if more is None else more
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return (head.encode(), body)
