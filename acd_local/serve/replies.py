"""Forms what is sent back: answers, pieces of them, errors, in the shape that clients of OpenAI's interface expect."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from acd_local.answers import Answer, TokenRecord
from acd_local.errors import (
    AcdError,
    ContextError,
    EngineBusyError,
    EngineClosedError,
    InternalError,
    PairError,
    UsageError,
    shown,
)
from acd_local.records import answer_record, trace_record
from acd_local.serve.openai import Asked, Refused

DONE = b"data: [DONE]\n\n"
COMMENT = b": still working\n\n"
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
_OF_SAFE = ("changed", "safe_token", "safe_text", "safe_logprob", "safe_rank")  # what a trace tells of that stream
RETRY = 1  # seconds after which a client that was sent away may come again

Json = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """What all parts of one answer have in common.

    Attributes:
        asked: the request. model: the name of the one that answers. pair: the name of what guards it.
        locked: nothing is told of what the safe stream alone would say. Beside the contrast's log probabilities, or
            many draws, that would tell the adversarial stream's, one token or one bit at a time.
    """

    asked: Asked
    model: str
    pair: str
    locked: bool
    number: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Answer) -> Json:
        """Make the response that is not streamed."""
        if self.asked.chat:
            tokens = None if self.asked.logprobs is None else _logprobs(answer.tokens)
            message = {"role": "assistant", "content": answer.text, "refusal": None}
            choice: Json = {"index": 0, "message": message, "logprobs": tokens}
        else:
            choice = {"index": 0, "text": answer.text, "logprobs": None}
        choice["finish_reason"] = finish_reason(answer)
        kind = "chat.completion" if self.asked.chat else "text_completion"
        more = self.trace(answer.tokens) if self.asked.trace else {}
        return self._head(kind) | {"choices": [choice], "usage": usage(answer), "acd": self.about(answer) | more}

    def first(self) -> Json:
        """Make the chunk before the first text."""
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, text: str, tokens: Sequence[TokenRecord], acd: Json) -> Json:
        """Make a chunk of text, which may be empty.

        Args:
            tokens: whose log probabilities go with it, where these were asked for.
            acd: the members of `acd`, which is left out where there are none.
        """
        return self._chunk({"content": text} if text else {}, tokens=tokens) | ({"acd": acd} if acd else {})

    def last(self, answer: Answer, tokens: Sequence[TokenRecord], acd: Json) -> Json:
        """Make the chunk behind the last text; arguments as of `piece`."""
        about = self.about(answer) | acd
        return self._chunk({}, tokens=tokens, finish=finish_reason(answer)) | {"acd": about}

    def usage(self, answer: Answer) -> Json:
        """Make the chunk behind that, where it was asked for."""
        return self._head(self._chunk_kind) | {"choices": [], "usage": usage(answer)}

    def about(self, answer: Answer) -> Json:
        """What is ours to tell of an answer."""
        record = answer_record(answer)
        if self.locked:
            record["contrast"]["changed_tokens"] = None
        names = ("finish_reason", "seed", "contrast", "gate", "timings")
        more = {"prompt_decoded": answer.prompt_decoded, "dropped": answer.dropped_turns, "pair": self.pair}
        return {name: record[name] for name in names} | more

    def trace(self, tokens: Sequence[TokenRecord]) -> Json:
        """A trace of some tokens, for `acd`."""
        hidden = dict.fromkeys(_OF_SAFE) if self.locked else {}
        return {"trace": [trace_record(token) | hidden for token in tokens]}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.asked.chat else "text_completion"

    def _head(self, kind: str) -> Json:
        number = f"{'chatcmpl' if self.asked.chat else 'cmpl'}-{self.number}"
        return {"id": number, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, delta: Json, *, tokens: Sequence[TokenRecord] = (), finish: str | None = None) -> Json:
        shown = _logprobs(tokens) if tokens and self.asked.logprobs is not None else None
        what: Json = {"delta": delta} if self.asked.chat else {"text": delta.get("content", "")}
        choice = {"index": 0} | what | {"logprobs": shown, "finish_reason": finish}
        return self._head(self._chunk_kind) | {"choices": [choice]} | self._no_usage

    @property
    def _no_usage(self) -> Json:
        return {"usage": None} if self.asked.include_usage else {}


def event(data: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + as_json(data) + b"\n\n"


def as_json(data: Json) -> bytes:
    return _ENCODER.encode(data).encode()


def finish_reason(answer: Answer) -> str:
    return "length" if answer.finish_reason == "length" else "stop"


def usage(answer: Answer) -> Json:
    prompt, completion = answer.prompt_tokens, answer.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _logprobs(tokens: Sequence[TokenRecord]) -> Json:
    """Of the tokens that add text."""
    content = []
    for record in tokens:
        assert record.logprobs is not None
        chosen, *top = [
            {"token": one.text, "logprob": one.logprob, "bytes": list(one.piece)} for one in record.logprobs
        ]
        if record.logprobs[0].piece:
            content.append(chosen | {"top_logprobs": top})
    return {"content": content, "refusal": None}


# --- Errors -----------------------------------------------------------------------------------------------------------

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Failure:
    """An error as it is sent: the status of the response, its body and further headers."""

    status: int
    body: Json
    headers: dict[str, str]


def failure(error: Exception) -> Failure:
    """Return what a client is told of an error: 4xx for its own fault, 5xx for others."""
    if not isinstance(error, AcdError):
        error = InternalError(f"internal error: {type(error).__name__}")
    status, code, param = _status(error)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    body = {"message": shown(error, 1000), "type": kind, "param": param, "code": code}
    return Failure(status, {"error": body}, {"retry-after": str(RETRY)} if status in (429, 503) else {})


def _status(error: AcdError) -> tuple[int, str, str | None]:
    """Status, code and param."""
    if isinstance(error, Refused):
        return error.status, error.kind, error.param
    if isinstance(error, ContextError):
        return 400, "context_length_exceeded", "messages"
    if isinstance(error, UsageError | PairError):
        return 400, error.code, "pair" if isinstance(error, PairError) else None
    if isinstance(error, EngineBusyError):
        return 429, "overloaded", None
    return 503 if isinstance(error, EngineClosedError) else 500, error.code, None
