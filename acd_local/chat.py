"""A conversation that remembers its turns."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from acd_local.answers import Answer, Chunk
from acd_local.errors import EngineBusyError, UsageError
from acd_local.options import Options
from acd_local.pairs import PromptPair, refuse_adversarial
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.template import Message

if TYPE_CHECKING:
    from acd_local.session import AnswerStream, Engine, TurnsDropped

FILE_FORMAT = 1


class Chat:
    """One conversation with an engine. Make it with `Engine.chat`.

    Turns that were dropped because the context was full stay in `messages` (and in saved files) but are sent no more.

    Attributes:
        messages: user and assistant turns so far.
        system: the application's system prompt, appended to the pair's.
        options: defaults of every answer.
        pair: the prompt pair in use.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        system: str | None = None,
        options: Options | None = None,
        pair: PromptPair | None = None,
    ) -> None:
        self._engine = engine
        self.pair = pair or engine.pair
        if system:
            refuse_adversarial(system, self.pair)
        self.system = system
        self.options = options or Options()
        self.messages: list[Message] = []
        self._first = 0  # index of the first message that is still sent
        self._cancel: CancelToken | None = None

    def stream(
        self,
        text: str,
        *,
        on_event: Callable[[TurnsDropped], None] | None = None,
        divergence: bool = False,
        trace: bool = False,
        **options: Any,
    ) -> ChatStream:
        """Say something; iterate over the result for the answer.

        The turn joins `messages` when the answer ends, or is cancelled or closed half-way (with what was said until
        then). After an error, or if it was stopped before its first word, the conversation is as it was.

        Args:
            on_event, divergence, trace: as in `Engine.generate`.
            options: changes to the chat's options for this answer, by name (see `Options`).

        Raises:
            UsageError, ContextError, EngineBusyError: from the first `next`.
        """
        return ChatStream(self, text, self.options.replace(options), on_event, divergence=divergence, trace=trace)

    def ask(self, text: str, on_text: Callable[[str], None] | None = None, **options: Any) -> Answer:
        """Say something and wait for the whole answer; `on_text` receives it as it comes."""
        return self.stream(text, **options).run(on_text)

    def regenerate(
        self,
        *,
        on_event: Callable[[TurnsDropped], None] | None = None,
        divergence: bool = False,
        trace: bool = False,
        **options: Any,
    ) -> ChatStream:
        """Answer the last user message again, with a new seed unless one is given. The old answer is replaced."""
        if len(self.messages) < 2:
            raise UsageError("there is no answer to make again")
        options.setdefault("seed", None)
        changed, question = self.options.replace(options), self.messages[-2].content
        return ChatStream(self, question, changed, on_event, divergence=divergence, trace=trace, replace=True)

    def undo(self) -> bool:
        """Forget the last user message and its answer; False if there is none."""
        if not self.messages:
            return False
        del self.messages[-2:]
        self._first = min(self._first, len(self.messages))
        return True

    def clear(self) -> None:
        """Forget all turns."""
        self.messages.clear()
        self._first = 0

    def cancel(self) -> None:
        """Stop the answer that is being made, if any. Safe from any thread."""
        token = self._cancel
        if token is not None:
            token.set()

    def save(self, path: Path | str) -> None:
        """Write the conversation as JSON, whole or not at all.

        Raises:
            UsageError: the file cannot be written.
        """
        path = Path(path).expanduser()
        record = {
            "format": FILE_FORMAT,
            "model": {"name": self._engine.info.name, "tokenizer": self._engine.info.tokenizer},
            "pair": str(self.pair.path or self.pair.name),
            "pair_name": self.pair.name,
            "system": self.system,
            "messages": [{"role": m.role, "content": m.content} for m in self.messages],
        }
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            partial.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
        except (OSError, ValueError) as error:
            partial.unlink(missing_ok=True)
            raise UsageError(f"cannot save the chat to {path}: {_reason(error)}") from None

    def load(self, path: Path | str) -> None:
        """Replace turns and system prompt by a saved conversation's; the pair is the caller's to choose.

        Raises:
            UsageError: the file is missing or no saved chat; this chat is as it was.
        """
        record = read_saved(path)
        if record["system"]:
            refuse_adversarial(record["system"], self.pair)
        self.system = record["system"]
        self.messages = [Message(m["role"], m["content"]) for m in record["messages"]]
        self._first = 0


class ChatStream:
    """An answer being made within a chat; see `AnswerStream` for what it offers."""

    def __init__(
        self,
        chat: Chat,
        text: str,
        options: Options,
        on_event: Callable[[TurnsDropped], None] | None,
        *,
        divergence: bool,
        trace: bool,
        replace: bool = False,
    ) -> None:
        self._chat = chat
        self._question = Message("user", text)
        self._replace = replace
        self._on_event = on_event
        self._inner: AnswerStream = chat._engine.generate(
            self._sent_messages(),
            options,
            system=chat.system,
            pair=chat.pair,
            divergence=divergence,
            trace=trace,
            on_event=self._dropped,
        )
        self._dropped_now = 0
        self._chunks = self._run()

    def _sent_messages(self) -> list[Message]:
        chat = self._chat
        past = chat.messages[chat._first : len(chat.messages) - 2 * self._replace]
        return [*past, self._question]

    def _dropped(self, event: TurnsDropped) -> None:
        self._dropped_now = event.messages
        if self._on_event is not None:
            self._on_event(event)

    def _run(self) -> Generator[Chunk, None, None]:
        chat = self._chat
        if chat._cancel is not None:
            raise EngineBusyError("this chat is still answering: wait for it or cancel it")
        chat._cancel = self._inner._cancel
        failed = False
        try:
            yield from self._inner
        except GeneratorExit:
            raise
        except BaseException:
            failed = True
            raise
        finally:
            chat._cancel = None
            self._inner.close()
            if not failed:
                self._remember()

    def _remember(self) -> None:
        chat = self._chat
        if not self._inner.text and not self._inner.complete:
            return  # stopped before the first word: as if it had not been asked
        if self._replace:
            del chat.messages[-2:]
        chat.messages += [self._question, Message("assistant", self._inner.text)]
        chat._first += self._dropped_now

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def run(self, on_text: Callable[[str], None] | None = None) -> Answer:
        """Decode to the end, handing text to `on_text` as it comes."""
        for chunk in self:
            if on_text is not None:
                on_text(chunk.text)
        return self.answer

    @property
    def answer(self) -> Answer:
        """The finished answer; raises UsageError before the end."""
        return self._inner.answer

    @property
    def text(self) -> str:
        """The text so far."""
        return self._inner.text

    def cancel(self) -> None:
        """End the answer within one decoding step. Safe from any thread."""
        self._inner.cancel()

    def close(self) -> None:
        self._chunks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_saved(path: Path | str) -> Mapping[str, Any]:
    """A saved conversation's record, checked: system, messages, pair, model.

    Raises:
        UsageError: one line that says what is wrong with the file.
    """
    path = Path(path).expanduser()
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot load a chat from {path}: {_reason(error)}") from None
    if not isinstance(record, dict) or not isinstance(record.get("format"), int):
        raise UsageError(f"{path} is no saved chat: it has no format number")
    if record["format"] > FILE_FORMAT:
        raise UsageError(f"{path} was saved by a newer version (format {record['format']})")
    messages, system = record.get("messages"), record.get("system")
    if not (system is None or isinstance(system, str)) or not isinstance(messages, list):
        raise UsageError(f"{path} is no saved chat: system or messages are missing")
    for i, m in enumerate(messages):
        role = ("user", "assistant")[i % 2]
        if not isinstance(m, dict) or m.get("role") != role or not isinstance(m.get("content"), str):
            raise UsageError(f"{path} is no saved chat: message {i + 1} must be a text of role {role}")
    if len(messages) % 2:
        raise UsageError(f"{path} is no saved chat: the last message has no answer")
    return {"system": system, "messages": messages, "pair": record.get("pair"), "model": record.get("model")}


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
