"""Holds a running chat: sends what is said, and shows what comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from acd_local.answers import Answer, AnswerEvent, PromptProgress, TurnsDropped
from acd_local.chat import ChatStream
from acd_local.cli.progress import reading_text
from acd_local.cli.record import pair_label
from acd_local.engine import Engine
from acd_local.errors import UsageError
from acd_local.generation import AnswerStream, resolve_contrast
from acd_local.options import Options
from acd_local.pairs import AS_IS
from acd_local.records import pair_name
from acd_local.runtime.llama import BATCH_ROWS

if TYPE_CHECKING:
    from acd_local.cli.chat_signals import Signals
    from acd_local.cli.chat_view import View

STOPPED = "(stopped)"
CUT = "(cut off: token limit)"


class ChatApp:
    """One conversation with its view.

    What /compare says is no part of it: the bottom line, /why and /stats stay with the chat's own last answer.

    Attributes:
        draft: a message that could not be answered, for the user to try again.
    """

    def __init__(self, engine: Engine, view: View, signals: Signals, options: Options, system: str | None) -> None:
        self.engine = engine
        self.view = view
        self.chat = engine.chat(system=system, options=options)
        self.draft = ""
        self._signals = signals
        self._wait: Callable[[str], None] = lambda _: None
        self._last: Answer | None = None

    # -- answers ------------------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        self._answer(lambda: self.chat.stream(text, on_event=self._on_event), text)

    def regenerate(self) -> None:
        self._answer(lambda: self.chat.regenerate(on_event=self._on_event), "")

    def _answer(self, start: Callable[[], ChatStream], text: str) -> None:
        before = list(self.chat.messages)
        stream = start()
        with self.view.answer() as writer, self._signals.answering(stream.cancel), stream:
            self._wait = writer.wait
            for piece in stream:
                writer.write(piece)
            answer = stream.answer
            writer.finish(_mark(answer))
        if answer.finish_reason == "cancelled" and not answer.text:
            self.chat.messages[:] = before  # nothing was said: as if it had not been asked
            self.draft = text
        else:
            self._last = answer

    def compare(self, text: str) -> None:
        """Answer with and without contrast, with one seed; the chat stays as it is."""
        if self.chat.pair is None:
            raise UsageError("there is no prompt pair to contrast: /pair NAME takes one")
        options = self.chat.options.replace({"plain": False})
        first = self._aside(text, options)
        second = self._aside(text, options.replace({"plain": True, "seed": first.seed}))
        answers: list[Answer] = []
        labels = [f"with contrast ({self.contrast_label(plain=False)})", "without contrast"]
        with self.view.compare(labels) as writer:
            self._wait = writer.wait
            for column, stream in enumerate((first, second)):
                with self._signals.answering(stream.cancel), stream:
                    for piece in stream:
                        writer.write(column, piece)
                    answers.append(stream.answer)
                if answers[-1].finish_reason == "cancelled":
                    break
            writer.finish(_comparison(answers))

    def _aside(self, text: str, options: Options) -> AnswerStream:
        messages: list[Any] = [*self.chat.messages, {"role": "user", "content": text}]
        return self.engine.generate(
            messages, options, system=self.chat.system, pair=self.chat.pair or AS_IS, on_event=self._on_event
        )

    def _on_event(self, event: AnswerEvent) -> None:
        if isinstance(event, TurnsDropped):
            self.view.notice(f"context full: left out the oldest {event.messages} messages")
        elif isinstance(event, PromptProgress) and event.total - event.done > BATCH_ROWS:
            self._wait(reading_text(event))

    def last_answer(self) -> Answer:
        if self._last is None:
            raise UsageError("there is no answer yet")
        return self._last

    def forget_answer(self) -> None:
        self._last = None

    # -- state in words -----------------------------------------------------------------------------------------------

    def contrast_label(self, *, plain: bool | None = None) -> str:
        """Name the settings in force; `plain` asks for those that would be."""
        options = self.chat.options if plain is None else self.chat.options.replace({"plain": plain})
        if self.chat.pair is None:
            return "no contrast"
        settings = resolve_contrast(options, self.chat.pair, soft=self.engine.takes_soft(self.chat.pair))
        if options.plain:
            return "plain"
        return f"alpha {settings.alpha:g}, beta {settings.beta:g}{', raw' if settings.raw else ''}"

    @property
    def pair_label(self) -> str:
        """The pair's name, whether it is fitted to the model, its soft prompts and its gate where they are in use."""
        return pair_label(self.engine, self.chat.pair, self.chat.options)

    @property
    def model_name(self) -> str:
        return self.engine.info.name or self.engine.info.path.stem

    def toolbar(self, width: int) -> str:
        """Write model, pair, contrast, context per stream, speed: in short forms where the window is narrow."""
        alpha = self.contrast_label().partition(",")[0]
        pair, name = pair_name(self.chat.pair), self.model_name
        context, short_context, speed = self._figures()
        long = " · ".join([name, f"pair {self.pair_label}", alpha, *context, *speed])
        if len(long) <= width:
            return long
        rest = "".join(f" · {part}" for part in [pair, alpha, *short_context, *speed])
        room = width - len(rest)
        if room >= 4:
            return (name if len(name) <= room else f"{name[: room - 1]}…") + rest
        return rest.removeprefix(" · ")[:width]

    def _figures(self) -> tuple[list[str], list[str], list[str]]:
        """Write the context used per stream, the same in short, and speed; empty before the first answer."""
        answer, n = self._last, self.engine.n_ctx
        if answer is None:
            return [], [], []
        streams = answer.context_used[: 1 if answer.contrast.alpha == 0 else 2]
        named = [f"{stream} {used}/{n}" for stream, used in zip(("safe", "adversarial"), streams, strict=False)]
        short = " ".join(f"{used}/{n}" for used in streams)
        return [f"context {', '.join(named)}"], [short], [f"{answer.timings.tokens_per_second:.1f} tokens/s"]


def _mark(answer: Answer) -> str | None:
    """Say why the answer ends, where that is not the model's own doing."""
    return {"cancelled": STOPPED, "length": CUT}.get(answer.finish_reason)


def _comparison(answers: list[Answer]) -> str:
    if answers[-1].finish_reason == "cancelled":
        return STOPPED
    with_contrast, without = answers
    same = ", both answers are the same" if with_contrast.text == without.text else ""
    return f"seed {with_contrast.seed}{same}"
