"""What clients of OpenAI's interface rely on, each where some local server broke it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from http_server import CHAT, HI, Server, text_of

# -- answers -----------------------------------------------------------------------------------------------------------


def test_an_answer_in_one_piece(server: Server) -> None:
    answer = server.answer(max_tokens=5)
    assert set(answer) == {"id", "object", "created", "model", "choices", "usage", "acd"}
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": choice["message"]["content"], "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    usage = answer["usage"]
    assert usage["completion_tokens"] == 5 and usage["total_tokens"] == usage["prompt_tokens"] + 5
    assert answer["acd"]["pair"] == "short" and answer["acd"]["contrast"]["alpha"] == 0.5


def test_a_stream_begins_with_the_role_and_ends_with_a_reason(server: Server) -> None:
    events = server.stream(max_tokens=6)
    assert len({event["id"] for event in events}) == len({event["created"] for event in events}) == 1
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    first, *between, last = [event["choices"][0] for event in events]
    assert first["delta"] == {"role": "assistant", "content": ""}, "never null"
    assert all(list(choice["delta"]) == ["content"] and choice["delta"]["content"] for choice in between)
    assert [choice["finish_reason"] for choice in (first, *between)] == [None] * (len(between) + 1)
    assert (last["delta"], last["finish_reason"]) == ({}, "length")
    whole = server.answer(max_tokens=6)
    assert text_of(events) == whole["choices"][0]["message"]["content"]
    assert events[-1]["acd"]["contrast"] == whole["acd"]["contrast"]


def test_usage_comes_where_it_is_asked_for_without_choices(server: Server) -> None:
    *others, last = server.stream(stream_options={"include_usage": True})
    assert (last["choices"], last["usage"]) == ([], server.answer()["usage"])
    assert all(event["usage"] is None for event in others)
    for options in ({}, {"stream_options": None}, {"stream_options": {"include_usage": False}}):
        assert all("usage" not in event and event["choices"] for event in server.stream(**options))


def test_reasons_to_finish(server: Server) -> None:
    text = server.answer(max_tokens=20)["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 :][:3]
    found = server.answer(max_tokens=20, stop=[stop])
    assert found["choices"][0]["finish_reason"] == "stop" and found["acd"]["finish_reason"] == "stop_string"
    assert found["choices"][0]["message"]["content"] == text[: text.index(stop)]
    assert found == found | {"choices": server.answer(max_tokens=20, stop=stop)["choices"]}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "hi"}}}
    (choice,) = server.answer(response_format=schema)["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", '"hi"')


def test_null_is_as_if_it_were_not_there(server: Server) -> None:
    names = ("temperature", "top_p", "top_k", "seed", "stop", "n", "stream", "stream_options", "response_format")
    more = ("logprobs", "top_logprobs", "tools", "tool_choice", "logit_bias", "user", "alpha", "pair", "trace", "plain")
    asked = {"messages": HI, "max_completion_tokens": 4} | dict.fromkeys([*names, *more])
    got = server.ask("POST", CHAT, asked)
    assert got.status == 200, got.body
    assert got.json["usage"]["completion_tokens"] == 4


def test_both_names_of_the_limit(server: Server) -> None:
    for fields, n in (
        ({"max_tokens": 3}, 3),
        ({"max_tokens": None, "max_completion_tokens": 4}, 4),
        ({"max_tokens": 9, "max_completion_tokens": 2}, 2),
    ):
        assert server.answer(**fields)["usage"]["completion_tokens"] == n


def test_a_seed_repeats_an_answer(server: Server) -> None:
    def say(seed: int | None) -> dict[str, Any]:
        return server.answer(seed=seed, temperature=1.0, max_tokens=12)

    for seed in (0, 7, -1, 2**63 - 1):
        first, again = say(seed), say(seed)
        assert first["choices"] == again["choices"]
    drawn = say(None)
    assert say(drawn["acd"]["seed"])["choices"] == drawn["choices"]


def test_options_reach_the_sampler(server: Server) -> None:
    def say(**fields: Any) -> str:
        fields = {"seed": 5, "temperature": 1.5, "max_tokens": 16} | fields
        return str(server.answer(**fields)["choices"][0]["message"]["content"])

    usual = say()
    for fields in ({"temperature": 0.1}, {"top_p": 0.1}, {"top_k": 1}, {"min_p": 1.0}, {"frequency_penalty": 2.0}):
        assert say(**fields) != usual, fields
    assert say(presence_penalty=50.0) != usual
    assert say(top_k=1) == say(temperature=0.0)


def test_any_models_name_is_taken_and_the_real_one_told(server: Server) -> None:
    (model,) = server.get("/v1/models").json["data"]
    assert model["object"] == "model" and model["created"] > 0
    for name in ("gpt-4o", "", "../../etc/passwd", model["id"]):
        assert server.answer(model=name)["model"] == model["id"]
    assert server.get(f"/v1/models/{model['id'].replace(' ', '%20')}").json == model
    missing = server.get("/v1/models/gpt-4o")
    assert missing.status == 404 and missing.error["code"] == "model_not_found"


def test_fields_that_others_use_are_ignored(server: Server) -> None:
    ignored = {"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "parallel_tool_calls": True}
    usual = server.answer()["choices"]
    assert server.answer(**ignored, chat_id="x", session_id="y", tools=[], tool_choice="auto")["choices"] == usual


def test_completions_answer_the_prompt_as_a_users_message(server: Server) -> None:
    asked = {"prompt": "Hi", "max_tokens": 6, "temperature": 0}
    found = server.ask("POST", "/v1/completions", asked).json
    (choice,) = found["choices"]
    assert found["object"] == "text_completion" and choice["finish_reason"] == "length"
    assert choice["text"] == server.answer(max_tokens=6)["choices"][0]["message"]["content"]
    events = server.ask("POST", "/v1/completions", asked | {"stream": True, "prompt": ["Hi"]}).body.split(b"\n\n")
    texts = [json.loads(event[6:])["choices"][0]["text"] for event in events if event.startswith(b"data: {")]
    assert "".join(texts) == choice["text"]
    for fields in ({"echo": True}, {"suffix": "x"}, {"best_of": 2}, {"logprobs": 1}, {"prompt": [1, 2]}, {"n": 2}):
        refused = server.ask("POST", "/v1/completions", asked | fields)
        assert (refused.status, refused.error["param"]) == (400, next(iter(fields)))


# -- messages ----------------------------------------------------------------------------------------------------------


def say(server: Server, *messages: tuple[str, Any]) -> tuple[str, int]:
    """The answer to a conversation, and how many tokens that has."""
    turns = [{"role": role, "content": content} for role, content in messages]
    found = server.ask("POST", CHAT, {"messages": turns, "max_tokens": 8, "temperature": 0})
    assert found.status == 200, found.body
    return found.json["choices"][0]["message"]["content"], found.json["usage"]["prompt_tokens"]


def test_developer_and_further_system_messages_are_joined_in_their_order(server: Server) -> None:
    one = say(server, ("system", "Be kind.\n\nBe brief.\n\nBe blue."), ("user", "Hi"))
    assert (
        say(server, ("system", "Be kind."), ("developer", "Be brief."), ("user", "Hi"), ("system", "Be blue.")) == one
    )
    assert say(server, ("user", "Hi"))[1] < one[1]


def test_content_may_be_parts(server: Server) -> None:
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "red?"}]
    assert say(server, ("user", parts)) == say(server, ("user", "What is\nred?"))
    assert say(server, ("system", [{"type": "text", "text": "Be kind."}]), ("user", "Hi")) == say(
        server, ("system", "Be kind."), ("user", "Hi")
    )


def test_neighbours_of_one_role_are_one_turn(server: Server) -> None:
    assert say(server, ("user", "Hi."), ("user", "What is red?")) == say(server, ("user", "Hi.\n\nWhat is red?"))
    assert say(server, ("user", "Hi"), ("assistant", None), ("user", "And?"))


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (None, "messages"),
        ("Hi", "messages"),
        ([{"role": "system", "content": "Be kind."}], "messages"),
        ([*HI, {"role": "assistant", "content": "Sure, here"}], "messages"),
        (["Hi"], "messages[0]"),
        ([{"role": "robot", "content": "Hi"}], "messages[0].role"),
        ([{"content": "Hi"}], "messages[0].role"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user"}], "messages[0].content"),
        ([*HI, {"role": "user", "content": [{"type": "text"}]}], "messages[1].content[0].text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": ["Hi"]}], "messages[0].content[0]"),
        ([{"role": "tool", "content": "5", "tool_call_id": "a"}], "messages[0]"),
        ([*HI, {"role": "assistant", "content": None, "tool_calls": [{}]}, *HI], "messages[1]"),
    ],
    ids=str,
)
def test_messages_that_cannot_be_answered(server: Server, messages: Any, param: str) -> None:
    """Among them the beginning of an answer, which would walk around the guard."""
    refused = server.chat(messages=messages)
    assert (refused.status, refused.error["type"]) == (400, "invalid_request_error")
    assert refused.error["param"] == param


# -- fields ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", 1e39),
        ("temperature", True),
        ("top_p", 2),
        ("top_k", -1),
        ("top_k", 2**40),
        ("min_p", -0.5),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 10**30),
        ("max_tokens", 1.5),
        ("max_completion_tokens", "10"),
        ("presence_penalty", [1]),
        ("frequency_penalty", {}),
        ("stop", ""),
        ("stop", [1]),
        ("seed", 1.5),
        ("seed", 2**70),
        ("seed", "x"),
        ("stream", "yes"),
        ("stream_options", True),
        ("n", 2),
        ("n", 0),
        ("n", True),
        ("logit_bias", {"5": 100}),
        ("tools", [{"type": "function"}]),
        ("functions", [{}]),
        ("tool_choice", "required"),
        ("modalities", ["audio"]),
        ("logprobs", 3),
        ("top_logprobs", 3),
        ("response_format", "json"),
        ("response_format", {"type": "xml"}),
        ("alpha", -1),
        ("alpha", 3.4e38),
        ("beta", 2),
        ("plain", 1),
        ("gate", "off"),
        ("gate_threshold", 2),
        ("window", -1),
        ("pair", 5),
        ("pair", "no-such"),
        ("pair", "../../secret.toml"),
        ("pair", "/etc/passwd"),
        ("trace", "yes"),
        ("divergence", 1),
    ],
)
def test_a_wrong_field_is_the_clients_fault_and_named(server: Server, field: str, value: Any) -> None:
    refused = server.chat(**{field: value})
    assert (refused.status, refused.error["param"]) == (400, field), refused.body
    assert field in refused.error["message"] or field == "pair"


def test_a_schema_is_enforced(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    for seed in range(3):
        text = server.answer(response_format=form, max_tokens=200, seed=seed, temperature=1)["choices"][0]["message"]
        assert set(json.loads(text["content"])) == {"n"}
    assert server.answer(response_format={"type": "json_object"})["choices"][0]["message"]["content"][0] == "{"
    assert server.answer(response_format={"type": "text"})["choices"] == server.answer()["choices"]
    bad = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "nothing"}}}
    refused = server.chat(response_format=bad)
    assert refused.status == 400 and "nothing" in refused.error["message"]
    for form in ({"type": "json_schema"}, {"type": "json_schema", "json_schema": {"schema": 5}}):
        assert server.chat(response_format=form).error["param"].startswith("response_format.json_schema")


def test_logprobs_are_of_what_was_drawn_from(server: Server) -> None:
    (choice,) = server.answer(logprobs=True, top_logprobs=20, max_tokens=6, seed=1, temperature=1)["choices"]
    content = choice["logprobs"]["content"]
    said = b"".join(bytes(item["bytes"]) for item in content)
    assert said.decode("utf-8", "replace") == choice["message"]["content"]
    for item in content:
        assert set(item) == {"token", "logprob", "bytes", "top_logprobs"}
        assert bytes(item["bytes"]).decode("utf-8", "replace") == item["token"]
        total = sum(math.exp(top["logprob"]) for top in item["top_logprobs"])
        assert total <= 1 + 1e-6 and (len(item["top_logprobs"]) == 20 or total > 1 - 1e-6)
    (alone,) = server.answer(logprobs=True, max_tokens=2)["choices"]
    assert [item["top_logprobs"] for item in alone["logprobs"]["content"]] == [[], []]
    streamed = server.stream(logprobs=True, top_logprobs=20, max_tokens=6, seed=1, temperature=1)
    found = [event["choices"][0]["logprobs"] for event in streamed]
    assert [item for logprobs in found if logprobs for item in logprobs["content"]] == content
    assert server.chat(logprobs=True, top_logprobs=21).error["param"] == "top_logprobs"


@pytest.mark.parametrize(
    "other",
    [{"trace": True}, {"alpha": 0.2}, {"plain": True}, {"window": 3}, {"pair": "as-is"}, {"beta": 0.0}],
    ids=str,
)
def test_two_distributions_are_never_told(server: Server, other: dict[str, Any]) -> None:
    """Log probabilities of one prompt under two settings, or beside the safe stream's, would tell the adversary's."""
    refused = server.chat(logprobs=True, **other)
    assert (refused.status, refused.error["param"]) == (400, "logprobs")
    assert next(iter(other)) in refused.error["message"]


def test_a_prompt_that_does_not_fit_is_told_with_a_status(server: Server) -> None:
    for stream in (False, True):
        refused = server.chat("the water is blue " * 1000, stream=stream)
        assert (refused.status, refused.error["code"]) == (400, "context_length_exceeded")


# -- ours --------------------------------------------------------------------------------------------------------------


def test_a_trace_tells_of_every_token(server: Server) -> None:
    events = server.stream("What is red?", temperature=1, seed=3, max_tokens=24, trace=True)
    traces = [token for event in events for token in event.get("acd", {}).get("trace", [])]
    contrast = events[-1]["acd"]["contrast"]
    assert len(traces) == contrast["positions"]
    assert sum(token["changed"] for token in traces) == contrast["changed_tokens"] > 0
    names = {"token", "text", "changed", "safe_token", "safe_text", "safe_logprob", "safe_rank"}
    assert all(set(token) == names and token["safe_logprob"] <= 0 < token["safe_rank"] for token in traces)
    measured = server.stream("What is red?", temperature=1, seed=3, max_tokens=6, trace=True, divergence=True)
    kls = [token["divergence"] for event in measured for token in event.get("acd", {}).get("trace", [])]
    assert sum(kls) / len(kls) == pytest.approx(measured[-1]["acd"]["contrast"]["mean_divergence"], abs=1e-5)
    assert not any("trace" in event.get("acd", {}) for event in server.stream())
    whole = server.answer("What is red?", temperature=1, seed=3, max_tokens=24, trace=True)
    assert [token["token"] for token in whole["acd"]["trace"]] == [token["token"] for token in traces]


def test_the_guards_own_fields(server: Server) -> None:
    contrast = server.answer(alpha=0.25, beta=0.0, window=2, max_tokens=6)["acd"]["contrast"]
    assert (contrast["alpha"], contrast["beta"], contrast["compared"]) == (0.25, 0.0, 2)
    assert server.answer(plain=True)["acd"]["contrast"]["alpha"] == 0
    assert server.answer(pair="as-is")["acd"]["pair"] == "as-is"
    assert server.answer(pair="short")["choices"] == server.answer()["choices"]
    refused = server.chat(gate=True)
    assert refused.status == 400 and "no gate" in refused.error["message"]


def test_props_tell_what_holds(server: Server) -> None:
    props = server.get("/props").json
    assert props["pair"] == {"name": "short", "fitted": True, "soft": False, "gate": False}
    assert props["guard"]["alpha"] == 0.5 and props["guard"]["pair"] == "short"
    assert (props["parallel"], props["slots"], props["ctx_size"], props["locked"]) == (1, 2, 512, False)
    assert {"as-is", "default", "short"} <= set(props["pairs"])
    assert "path" not in props["model"]
    assert props["options"]["temp"] == 0.8


def test_a_title_request_leaves_the_chats_cache_alone(server: Server) -> None:
    chat = [{"role": "user", "content": "the water is blue and the wine is red " * 8}]
    first = server.answer(messages=chat)
    chat += [first["choices"][0]["message"], {"role": "user", "content": "And?"}]
    server.answer("Write a title for: the wine is red and the water is blue")
    again = server.answer(messages=chat)
    assert first["acd"]["prompt_decoded"] > 150 > 100 > again["acd"]["prompt_decoded"]
