"""Holds a conversation that remembers its turns."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

from acd_local import files
from acd_local.answers import Answer, AnswerEvent, OnEvent, TurnsDropped
from acd_local.errors import EngineBusyError, UsageError, shown
from acd_local.generation import Answerer, AnswerStream, BaseStream
from acd_local.options import Options
from acd_local.pairs import AS_IS, PromptPair, refuse_adversarial
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.template import Message

FILE_FORMAT = 1


class Chat:
    """One conversation with an engine. Make it with `Engine.chat`.

    Turns that were dropped because the context was full stay in `messages` (and in saved files) but are sent no more.

    Attributes:
        messages: user and assistant turns so far.
        system: the application's system prompt, appended to the pair's.
        options: defaults of every answer.
        pair: the prompt pair in use; None: none, the model answers as it is.
        first_sent: index of the first message that is still sent.
        answering: what cancels the answer that is being made; None while there is none.
    """

    def __init__(
        self,
        engine: Answerer,
        *,
        system: str | None = None,
        options: Options | None = None,
        pair: PromptPair | None = None,
    ) -> None:
        self.engine = engine
        self.use(system, pair)
        self.options = options or Options()
        self.messages: list[Message] = []
        self.first_sent = 0
        self.answering: CancelToken | None = None

    def use(self, system: str | None, pair: PromptPair | None) -> None:
        """Take this system prompt and this pair for what is asked from now on.

        Raises:
            UsageError: the one holds the other's adversarial prompt; this chat is as it was.
        """
        if system:
            refuse_adversarial(system, pair)
        self.system, self.pair = system, pair

    def stream(
        self,
        text: str,
        *,
        on_event: OnEvent | None = None,
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
        if not isinstance(text, str):
            raise UsageError(f"a message must be a text, not {type(text).__name__}")
        changed = self.options.replace(options)
        return ChatStream(Turn(self, text, changed, on_event, divergence=divergence, trace=trace))

    def ask(self, text: str, on_text: Callable[[str], None] | None = None, **options: Any) -> Answer:
        """Say something and wait for the whole answer; `on_text` receives it as it comes."""
        return self.stream(text, **options).run(on_text)

    def regenerate(
        self,
        *,
        on_event: OnEvent | None = None,
        divergence: bool = False,
        trace: bool = False,
        **options: Any,
    ) -> ChatStream:
        """Answer the last user message again, with a new seed unless one is given. The old answer is replaced."""
        if len(self.messages) < 2:
            raise UsageError("there is no answer to make again")
        options.setdefault("seed", None)
        changed = self.options.replace(options)
        return ChatStream(Turn(self, None, changed, on_event, divergence=divergence, trace=trace))

    def undo(self) -> bool:
        """Forget the last user message and its answer; False if there is none."""
        self.check_idle()
        if not self.messages:
            return False
        del self.messages[-2:]
        self.first_sent = 0  # there may be room again for turns that were dropped
        return True

    def clear(self) -> None:
        """Forget all turns."""
        self.check_idle()
        self.messages.clear()
        self.first_sent = 0

    def cancel(self) -> None:
        """Stop the answer that is being made, if any. Safe from any thread."""
        token = self.answering
        if token is not None:
            token.set()

    def check_idle(self) -> None:
        """Raise EngineBusyError while an answer of this chat is being made."""
        if self.answering is not None:
            raise EngineBusyError("this chat is still answering: wait for it or cancel it")

    def save(self, path: Path | str) -> None:
        """Write the conversation as JSON, whole or not at all.

        A new file is for the user's eyes alone; one that is there keeps its mode.

        Raises:
            UsageError: the file cannot be written.
            StorageError: the disk is full.
        """
        record = {
            "format": FILE_FORMAT,
            "model": {"name": self.engine.info.name, "tokenizer": self.engine.info.tokenizer},
            "pair": AS_IS if self.pair is None else str(self.pair.path or self.pair.name),
            "pair_name": AS_IS if self.pair is None else self.pair.name,
            "system": self.system,
            "messages": [{"role": m.role, "content": m.content} for m in self.messages],
        }
        text = json.dumps(record, ensure_ascii=False, indent=1) + "\n"
        try:
            target = files.expand(path)
        except OSError as error:
            raise files.write_error(path, error) from None
        files.replace_file(target, text, mode=files.PRIVATE)

    def load(self, path: Path | str) -> None:
        """Replace turns and system prompt by a saved conversation's; the pair is the caller's to choose.

        Raises:
            UsageError: the file is missing or no saved chat; this chat is as it was.
        """
        self.check_idle()
        record = read_saved(path)
        self.use(record["system"], self.pair)
        self.messages = [Message(m["role"], m["content"]) for m in record["messages"]]
        self.first_sent = 0


class ChatStream(BaseStream):
    """An answer being made within a chat."""

    def __init__(self, turn: Turn) -> None:
        super().__init__(turn)
        self.turn = turn


class Turn:
    """One question and its answer in the making: `pieces` drives it, or whoever calls `begin` and `end`."""

    def __init__(
        self,
        chat: Chat,
        question: str | None,
        options: Options,
        on_event: OnEvent | None,
        *,
        divergence: bool,
        trace: bool,
    ) -> None:
        self._chat = chat
        self._question = question  # None: the last one again
        self._options = options
        self._on_event = on_event
        self._divergence = divergence
        self._trace = trace
        self._inner: AnswerStream | None = None
        self._past: list[Message] = []
        self._asked = Message("user", "")
        self._dropped = 0
        self.cancel = CancelToken()
        self.result: Answer | None = None

    @property
    def text(self) -> str:
        return self._inner.text if self._inner is not None else ""

    def pieces(self) -> Generator[str, None, None]:
        stream = self.begin()
        ended: Answer | BaseException | None = None
        try:
            yield from stream
            ended = stream.answer
        except GeneratorExit:
            raise
        except BaseException as error:
            ended = error
            raise
        finally:
            stream.close()
            self.end(ended)

    def begin(self) -> AnswerStream:
        """Return the answer that is to be decoded; until `end` the chat is not idle.

        Raises:
            EngineBusyError: it is not idle now.
        """
        chat = self._chat
        chat.check_idle()
        self._past = chat.messages if self._question is not None else chat.messages[:-2]
        self._asked = Message("user", self._question if self._question is not None else chat.messages[-2].content)
        self._inner = chat.engine.generate(
            [*self._past[chat.first_sent :], self._asked],
            self._options,
            system=chat.system,
            pair=chat.pair or AS_IS,
            on_event=self._note,
            cancel=self.cancel,
            divergence=self._divergence,
            trace=self._trace,
        )
        chat.answering = self.cancel
        return self._inner

    def end(self, ended: Answer | BaseException | None) -> None:
        """Add what was said to the chat, unless there was an error or it was stopped before the first word.

        Args:
            ended: the answer, or what went wrong; None: it was closed half-way.
        """
        chat = self._chat
        chat.answering = None
        if isinstance(ended, BaseException):
            return
        self.result = ended
        if self.text or (ended is not None and ended.finish_reason != "cancelled"):
            chat.messages[len(self._past) :] = [self._asked, Message("assistant", self.text)]
            chat.first_sent += self._dropped

    def _note(self, event: AnswerEvent) -> None:
        if isinstance(event, TurnsDropped):
            self._dropped = event.messages
        if self._on_event is not None:
            self._on_event(event)


def read_saved(path: Path | str) -> Mapping[str, Any]:
    """Check a saved conversation's record and return it: system, messages, pair, model.

    Raises:
        UsageError: one line that says what is wrong with the file.
    """
    name = shown(path)
    try:
        file = files.expand(path)
        if file.exists() and not file.is_file() and not file.is_dir():
            raise UsageError(f"cannot load a chat from {name}: not a regular file")  # a device may never end
        record = json.loads(file.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise UsageError(f"cannot load a chat from {name}: it is no saved chat, which is JSON in UTF-8") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load a chat from {name}: {files.reason(error)}") from None
    if not isinstance(record, dict) or not isinstance(record.get("format"), int):
        raise UsageError(f"{name} is no saved chat: it has no format number")
    if record["format"] > FILE_FORMAT:
        raise UsageError(f"{name} was saved by a newer version (format {record['format']})")
    messages, system = record.get("messages"), record.get("system")
    if not (system is None or isinstance(system, str)) or not isinstance(messages, list):
        raise UsageError(f"{name} is no saved chat: system or messages are missing")
    for i, m in enumerate(messages):
        role = ("user", "assistant")[i % 2]
        if not isinstance(m, dict) or m.get("role") != role or not isinstance(m.get("content"), str):
            raise UsageError(f"{name} is no saved chat: message {i + 1} must be a text of role {role}")
    if len(messages) % 2:
        raise UsageError(f"{name} is no saved chat: the last message has no answer")
    return {"system": system, "messages": messages, "pair": record.get("pair"), "model": record.get("model")}
