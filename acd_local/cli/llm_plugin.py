"""Offers models to the command line tool `llm`: `llm -m acd/demo "Hi"`, `llm -m acd -o model FILE "Hi"`.

The entry point `llm` of the package names this module, which nothing else imports.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator
from typing import Any

import llm
from pydantic import Field, create_model

from acd_local import settings
from acd_local.engine import Engine
from acd_local.errors import AcdError, UsageError
from acd_local.options import Options
from acd_local.records import answer_record


@llm.hookimpl  # type: ignore[untyped-decorator]
def register_models(register: Any) -> None:
    """Register `acd`, which takes any MODEL, and `acd/demo`."""
    register(AcdModel("acd", None))
    register(AcdModel("acd/demo", "demo"))


def _llm_options() -> Any:
    """Make llm's class of options: those of an answer, and the model and pair; None: not given."""
    hints = typing.get_type_hints(Options)
    fields: dict[str, Any] = {
        "model": (str | None, Field(None, description="A GGUF file, demo or hf:owner/repo/file.gguf; else $ACD_MODEL")),
        "pair": (str | None, Field(None, description="Prompt pair, or as-is for none; default: the model's own")),
    }
    for field in dataclasses.fields(Options):
        hint = hints[field.name]
        if typing.get_origin(hint) is tuple:
            hint = str | hint
        fields[field.name] = (hint | None, Field(None, description=field.metadata.get("help")))
    return create_model("Options", __base__=llm.Options, **fields)


class AcdModel(llm.Model):  # type: ignore[misc]
    """A model as `llm` sees it; loaded by the first prompt and kept.

    Attributes:
        fixed: what it loads; None: what the option `model` names.
    """

    can_stream = True
    supports_schema = True
    Options = _llm_options()

    def __init__(self, model_id: str, fixed: str | None) -> None:
        self.model_id = model_id
        self.fixed = fixed
        self._engine: Engine | None = None
        self._loaded = ""

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Iterator[str]:
        """Answer a prompt, with the conversation before it; yields pieces of text."""
        del stream, conversation  # pieces serve both, and the prompt has all messages
        given = {name: value for name, value in prompt.options.model_dump().items() if value is not None}
        model, pair = given.pop("model", None), given.pop("pair", None)
        if prompt.schema is not None:
            given["json_schema"] = json.dumps(prompt.schema)
        try:
            messages, options = _messages(prompt), Options(**given)
            with self._load(model).generate(messages, options, pair=pair) as answering:
                yield from answering
        except AcdError as error:
            raise llm.ModelError(str(error)) from None
        answer = answering.answer
        response.set_usage(input=answer.prompt_tokens, output=answer.completion_tokens)
        response.response_json = {name: value for name, value in answer_record(answer).items() if name != "text"}

    def _load(self, model: str | None) -> Engine:
        wanted = self.fixed or model
        if not wanted:
            default = settings.default_model()
            if default is None:
                raise UsageError("no model: give -o model FILE, set ACD_MODEL, or take acd/demo")
            wanted = default[0]
        if self._engine is None or wanted != self._loaded:
            if self._engine is not None:
                self._engine.close()
            self._engine = None
            self._engine, self._loaded = Engine(wanted), wanted
        return self._engine


def _messages(prompt: Any) -> list[dict[str, str]]:
    """Return a prompt's messages in our form: one system prompt in front (the latest), text alone."""
    turns = [
        {"role": str(message.role), "content": "".join(getattr(part, "text", "") for part in message.parts)}
        for message in prompt.messages
    ]
    system = [turn for turn in turns if turn["role"] == "system"][-1:]
    return system + [turn for turn in turns if turn["role"] != "system"]
