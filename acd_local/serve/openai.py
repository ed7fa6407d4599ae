"""Reads requests of OpenAI's interface: what is asked for, or which field is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from acd_local.errors import UsageError, shown
from acd_local.options import MAX_SEED, Options, check_unicode
from acd_local.runtime.template import Message

MAX_DEPTH = 64  # levels of a body's objects and lists
MAX_LOGPROBS = 20
GUARD = ("alpha", "beta", "plain", "gate", "gate_threshold", "window", "pair")  # ours: how an answer is guarded

_SAMPLING = {
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",  # the newer name counts
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "stop": "stop",
}


class Refused(UsageError):
    """A request cannot be answered as it is.

    Attributes:
        status: of the response. param: the field that is wrong. kind: the error's code.
    """

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, kind: str = "invalid_value"):
        super().__init__(message)
        self.status, self.param, self.kind = status, param, kind


@dataclass(frozen=True)
class Asked:
    """What one request asks for.

    Attributes:
        turns: user and assistant messages in turns, a user's last. system: None: none was given.
        guard: the fields of `GUARD` that were given, as they were.
        logprobs: so many of the likeliest tokens; None: no log probabilities.
        chat: in which of the two forms it is answered.
    """

    turns: list[Message]
    system: str | None
    options: Options
    guard: Mapping[str, Any]
    chat: bool
    stream: bool = False
    include_usage: bool = False
    trace: bool = False
    divergence: bool = False
    logprobs: int | None = None


def parse_body(body: bytes) -> dict[str, Any]:
    """Return a body's object, without the members that are null.

    Raises:
        Refused: it is no JSON object, holds NaN or half a character, or is nested too deeply.
    """
    try:
        raw = json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise Refused(f"the body is not JSON: {shown(error, 100)}", kind="invalid_json") from None
    if not isinstance(raw, dict):
        raise Refused("the body is not a JSON object", kind="invalid_json")
    _check_values(raw)
    return {name: value for name, value in raw.items() if value is not None}


def parse_chat(raw: Mapping[str, Any], defaults: Options) -> Asked:
    """Read a request of /v1/chat/completions.

    Raises:
        Refused: a field is wrong or asks for what cannot be done.
    """
    _refuse_unsupported(raw)
    turns, system = _turns(_take(raw, "messages", list, "a list of messages"))
    wanted = _take(raw, "logprobs", bool, "true or false", False)
    top = _take(raw, "top_logprobs", int, "a whole number", 0)
    if not 0 <= top <= MAX_LOGPROBS:
        raise Refused(f"top_logprobs must be from 0 to {MAX_LOGPROBS}, not {shown(top, 40)}", "top_logprobs")
    if "top_logprobs" in raw and not wanted:
        raise Refused("top_logprobs goes with logprobs true", "top_logprobs")
    return _asked(raw, defaults, turns, system, chat=True, logprobs=top if wanted else None)


def parse_completion(raw: Mapping[str, Any], defaults: Options) -> Asked:
    """Read a request of /v1/completions: its prompt is answered as a user's message, under the guard.

    Raises:
        Refused: see `parse_chat`.
    """
    _refuse_unsupported(raw)
    prompt = raw.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise Refused("prompt must be one text", "prompt")
    if raw.get("logprobs") not in (None, False):
        raise Refused("logprobs are given by /v1/chat/completions alone", "logprobs", kind="unsupported_parameter")
    return _asked(raw, defaults, [Message("user", prompt)], None, chat=False, logprobs=None)


def _asked(
    raw: Mapping[str, Any],
    defaults: Options,
    turns: list[Message],
    system: str | None,
    *,
    chat: bool,
    logprobs: int | None,
) -> Asked:
    stream = _take(raw, "stream", bool, "true or false", False)
    about = _take(raw, "stream_options", dict, "an object", {})
    asked = Asked(
        turns=turns,
        system=system,
        options=_options(raw, defaults),
        guard={name: raw[name] for name in GUARD if name in raw},
        chat=chat,
        stream=stream,
        include_usage=stream and _take(about, "include_usage", bool, "true or false", False, of="stream_options."),
        trace=_take(raw, "trace", bool, "true or false", False),
        divergence=_take(raw, "divergence", bool, "true or false", False),
        logprobs=logprobs,
    )
    _take(raw, "pair", str, "the name of a pair", "")
    if logprobs is not None and (asked.trace or asked.guard):
        # Two distributions of one prompt and the contrast's numbers would tell the adversarial stream's.
        other = "trace" if asked.trace else next(iter(asked.guard))
        raise Refused(f"logprobs are given for the server's own settings alone: leave {other} out", "logprobs")
    return asked


# --- Fields -----------------------------------------------------------------------------------------------------------


def _take(raw: Mapping[str, Any], name: str, kind: type, words: str, default: Any = None, *, of: str = "") -> Any:
    """Read a field of one type; null and absent are the same."""
    value = raw.get(name)
    if value is None:
        value = default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        problem = f"must be {words}" if name in raw else f"is missing: it must be {words}"
        raise Refused(f"{of}{name} {problem}", f"{of}{name}")
    return value


def _options(raw: Mapping[str, Any], options: Options) -> Options:
    changes = [(name, ours, raw[name]) for name, ours in _SAMPLING.items() if name in raw]
    changes += [(name, name, raw[name]) for name in GUARD if name in raw and name != "pair"]
    if (seed := raw.get("seed")) is not None:
        if isinstance(seed, bool) or not isinstance(seed, int) or abs(seed) >= 2**64:
            raise Refused("seed must be a whole number of 64 bits", "seed")
        changes.append(("seed", "seed", seed % (MAX_SEED + 1)))  # clients draw longer ones, and -1
    for name, ours, value in changes:
        try:
            options = options.replace({ours: value})
        except UsageError as error:
            raise Refused(shown(str(error).replace(ours, name, 1), 200), name) from None
    if (schema := _schema(raw.get("response_format"))) is not None:
        options = options.replace({"json_schema": schema, "grammar": None})
    return options


def _schema(form: Any) -> str | None:
    """Find the JSON schema that a response_format asks for; None: any text."""
    name = "response_format"
    if form is None:
        return None
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return json.dumps(_take(form, "schema", dict, "an object", {"type": "object"}, of=f"{name}."))
    if kind != "json_schema":
        raise Refused(f"{name} must be an object whose type is text, json_object or json_schema", name)
    about = _take(form, "json_schema", dict, "an object", of=f"{name}.")
    schema = about.get("schema", {"type": "object"})
    if not isinstance(schema, dict | bool):
        raise Refused(f"{name}.json_schema.schema must be a JSON schema", f"{name}.json_schema.schema")
    return json.dumps(schema)


@dataclass(frozen=True)
class _Unsupported:
    """A field that changes an answer and cannot be followed; `harmless`: values that ask for nothing."""

    words: str
    harmless: Callable[[Any], bool] = field(default=lambda value: not value)


_ONE = _Unsupported("one answer is given per request", lambda value: type(value) is int and value == 1)
_TOOLS = _Unsupported("tools are not supported: the model answers in text")
_UNSUPPORTED = {
    "n": _ONE,
    "best_of": _ONE,
    "logit_bias": _Unsupported("logit_bias is not supported: it would walk around the guard"),
    "tools": _TOOLS,
    "functions": _TOOLS,
    "tool_choice": _Unsupported(_TOOLS.words, lambda value: value in ("none", "auto")),
    "function_call": _Unsupported(_TOOLS.words, lambda value: value in ("none", "auto")),
    "audio": _Unsupported("audio is not supported: the model answers in text"),
    "modalities": _Unsupported("the model answers in text", lambda value: value == ["text"]),
    "web_search_options": _Unsupported("web search is not supported"),
    "echo": _Unsupported("echo is not supported"),
    "suffix": _Unsupported("suffix is not supported: the prompt is answered, not completed"),
}


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    for name, unsupported in _UNSUPPORTED.items():
        if name in raw and not unsupported.harmless(raw[name]):
            raise Refused(f"{name}: {unsupported.words}", name, kind="unsupported_parameter")


# --- Messages ---------------------------------------------------------------------------------------------------------


def _turns(messages: list[Any]) -> tuple[list[Message], str | None]:
    """Turns, neighbours of one role joined, and the system's and developer's texts in their order."""
    turns: list[Message] = []
    system: list[str] = []
    for i, raw in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(raw, dict):
            raise Refused(f"{where} must be an object with a role and a content", where)
        role, text = raw.get("role"), _content(raw, where)
        if role in ("system", "developer"):
            system.append(text)
        elif role not in ("user", "assistant"):
            raise Refused(f"{where}.role must be system, developer, user or assistant", f"{where}.role")
        elif turns and turns[-1].role == role:
            turns[-1] = Message(role, f"{turns[-1].content}\n\n{text}")
        else:
            turns.append(Message(role, text))
    if not turns or turns[-1].role != "user":
        # An answer that goes on from given words would not be the guard's.
        raise Refused("the last message must be the user's: the beginning of an answer cannot be given", "messages")
    return turns, "\n\n".join(system) if system else None


def _content(raw: Mapping[str, Any], where: str) -> str:
    content = raw.get("content")
    if raw.get("tool_calls") or raw.get("function_call") or raw.get("role") in ("tool", "function"):
        raise Refused(f"{where}: {_TOOLS.words}", where, kind="unsupported_parameter")
    if content is None and raw.get("role") == "assistant":
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refused(f"{where}.content must be a text or a list of text parts", f"{where}.content")
    return "\n".join(_part(part, f"{where}.content[{k}]") for k, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "refusal"):
        words = "images, audio and files are not supported" if isinstance(kind, str) else "a part is an object"
        raise Refused(f"{where}: {words}; a part's type is text", where, kind="unsupported_parameter")
    if not isinstance(part.get(kind), str):
        raise Refused(f"{where}.{kind} must be a text", f"{where}.{kind}")
    return str(part[kind])


# --- JSON -------------------------------------------------------------------------------------------------------------


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _too_deep() -> Refused:
    return Refused(f"the body is nested too deeply: at most {MAX_DEPTH} levels", kind="invalid_json")


def _check_values(raw: object) -> None:
    level: list[object] = [raw]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for value in level:
            if isinstance(value, dict):
                inner += [*value, *value.values()]
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str):
                try:
                    check_unicode("the body", value)
                except UsageError as error:
                    raise Refused(str(error), kind="invalid_json") from None
        if not inner:
            return
        level = inner
    if any(isinstance(value, dict | list) for value in level):
        raise _too_deep()
