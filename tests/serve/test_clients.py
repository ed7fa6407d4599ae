"""Real clients get answers: those that are installed here, and what Open WebUI sends."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from http_server import ENDLESS, Server

HI: Any = [{"role": "user", "content": "Hi"}]
SHORT: dict[str, Any] = {"model": "any", "messages": HI, "max_tokens": 8, "temperature": 0}


@pytest.fixture
def openai(server: Server) -> Any:
    """The `openai` package's client."""
    package = pytest.importorskip("openai")
    with package.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai_answers_and_streams(openai: Any, server: Server) -> None:
    whole = openai.chat.completions.create(**SHORT)
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 8
    stream = openai.chat.completions.create(**SHORT, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage
    assert openai.models.list().data[0].id == whole.model == openai.models.retrieve(whole.model).id
    assert openai.completions.create(model="any", prompt="Hi", max_tokens=4).choices[0].finish_reason == "length"


def test_openai_reads_logprobs_and_our_own_members(openai: Any) -> None:
    choice = openai.chat.completions.create(**SHORT, logprobs=True, top_logprobs=2).choices[0]
    assert all(1 <= len(item.top_logprobs) <= 2 and item.logprob <= 0 for item in choice.logprobs.content)
    traced = openai.chat.completions.create(**SHORT, extra_body={"trace": True, "alpha": 0.3})
    assert traced.acd["contrast"]["alpha"] == 0.3 and len(traced.acd["trace"]) == 8


def test_openai_parses_what_a_schema_enforces(openai: Any) -> None:
    pydantic = pytest.importorskip("pydantic")
    Colour = pydantic.create_model("Colour", name=(Literal["red", "blue"], ...), light=(bool, ...))
    asked = SHORT | {"max_tokens": 400, "temperature": 1, "seed": 1}
    parsed = openai.chat.completions.parse(**asked, response_format=Colour).choices[0].message.parsed
    assert parsed.name in ("red", "blue") and parsed.light in (True, False)
    with openai.chat.completions.stream(**asked, response_format=Colour) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Colour)


def test_openai_raises_what_it_knows(openai: Any) -> None:
    import openai as package

    with pytest.raises(package.BadRequestError) as refused:
        openai.chat.completions.create(**SHORT, n=2)
    assert (refused.value.param, refused.value.code) == ("n", "unsupported_parameter")
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(package.BadRequestError, match="tools"):
        openai.chat.completions.create(**SHORT, tools=[tool])
    with pytest.raises(package.NotFoundError):
        openai.models.retrieve("gpt-4o")


def test_openai_under_asyncio_leaves_early(openai: Any, server: Server) -> None:
    import openai as package

    async def main() -> str:
        async with package.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            asked = SHORT | {"max_tokens": None, "response_format": ENDLESS, "stream": True}
            async with await client.chat.completions.create(**asked) as stream:
                async for chunk in stream:
                    if chunk.choices[0].delta.content:
                        break
            answers = await asyncio.gather(*(client.chat.completions.create(**SHORT) for _ in range(4)))
            (text,) = {answer.choices[0].message.content for answer in answers}
            return str(text)

    assert asyncio.run(main()) == server.answer()["choices"][0]["message"]["content"]
    server.until("acd_requests_running", 0)


def test_langchain_invokes_streams_and_structures(server: Server) -> None:
    package = pytest.importorskip("langchain_openai")
    model = package.ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model="any", max_tokens=8, temperature=0)
    expected = server.answer()["choices"][0]["message"]["content"]
    whole = model.invoke([("system", ""), ("user", "Hi")])
    assert whole.response_metadata["finish_reason"] == "length" and whole.usage_metadata["output_tokens"] == 8
    assert model.invoke("Hi").content == expected
    assert "".join(chunk.content for chunk in model.stream("Hi")) == expected
    schema = {"title": "Colour", "type": "object", "properties": {"red": {"type": "boolean"}}, "required": ["red"]}
    longer = package.ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model="any", max_tokens=100)
    structured = longer.with_structured_output(schema | {"additionalProperties": False}, method="json_schema")
    found = structured.invoke("Hi")
    assert found["red"] in (True, False)


def test_llm_prompts_streams_and_takes_a_schema(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    model = {"model_id": "here", "model_name": "any", "api_base": f"{server.url}/v1", "supports_schema": True}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))  # which is YAML too
    env = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}

    def llm(*args: str) -> str:
        command = [sys.executable, "-m", "llm", "-m", "here", "-o", "temperature", "0", *args]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        return done.stdout.removesuffix("\n")

    expected = server.answer()["choices"][0]["message"]["content"]
    assert llm("Hi", "-o", "max_tokens", "8").strip() == expected.strip()
    assert llm("Hi", "-o", "max_tokens", "8", "--no-stream").strip() == expected.strip()
    assert set(json.loads(llm("Hi", "--schema", "red bool", "-o", "max_tokens", "300"))) == {"red"}


def test_open_webui(server: Server) -> None:
    """Its model list, a chat, and the title that it asks for meanwhile (backend/open_webui/routers)."""
    headers = {"authorization": "Bearer none", "X-OpenWebUI-User-Name": "me", "HTTP-Referer": "https://openwebui.com/"}
    (model,) = server.get("/v1/models", **headers).json["data"]
    chat = {
        "stream": True,
        "model": model["id"],
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is red?"}],
        "stream_options": {"include_usage": True},
        "max_tokens": 12,
        "seed": 1,
        "logit_bias": {},
        "stop": ["</end>"],
    }
    events = server.ask("POST", "/v1/chat/completions", chat, **headers).body
    assert events.endswith(b"data: [DONE]\n\n") and b'"usage":{"prompt_tokens"' in events
    task = {
        "model": model["id"],
        "messages": [{"role": "user", "content": "### Task:\nWrite a title.\n<chat_history>USER: Hi</chat_history>"}],
        "stream": False,
        "max_completion_tokens": 10,
    }
    answer = server.ask("POST", "/v1/chat/completions", task, **headers).json
    assert isinstance(answer["choices"][0]["message"]["content"], str)
