"""Turns messages into token ids through the model's own chat template.

A GGUF carries a Jinja template written by the model's makers. It is untrusted code (see `sandbox`), it may not know a
system role (folded into the first user turn then), and no message may fool it (see `guard`). Rendering follows
transformers' `apply_chat_template`, the BOS rule is llama.cpp's server's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias

import jinja2
import jinja2.nodes

from acd_local.errors import ModelError, PairError, UsageError
from acd_local.runtime import llama
from acd_local.runtime.guard import ControlTokens, Sentinels, TooLong, clean, no_check
from acd_local.runtime.sandbox import MAX_SOURCE, Exhausted, Sandbox

Role: TypeAlias = Literal["system", "user", "assistant"]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# What switches thinking off, by the variables' names. A text is passed only to a template that names it itself.
THINKING_OFF: dict[str, tuple[object, ...]] = {
    "enable_thinking": (False,),
    "thinking": (False,),
    "enable_reasoning": (False,),
    "reasoning": (False,),
    "thinking_budget": (0,),
    "thinking_mode": ("disabled", "off"),
    "reasoning_effort": ("none", "no_think", "minimal"),
}

# Beginnings of user messages that tokenizers like to join with what stands in front of them.
_FIRST_WORDS = ("a", "Z", "7", " x", "  x", "\n", "\n\nx", "\tx", ".", "-", "'s", '"', "(", "<", "é", "中", "🙂")

_MAX_OUTPUT = 4_000_000  # characters, on top of 16 times the messages
_PER_MESSAGE = 16  # characters that a message counts for, beside its own


@dataclass(frozen=True)
class Message:
    """One turn. A conversation has at most one system message, and it comes first."""

    role: Role
    content: str


class ChatTemplate:
    """A model's chat template, probed once at construction for what it can do.

    Args:
        source: Jinja source that overrides the model file's.

    Attributes:
        folded: whether the system prompt is put in front of the first user turn, because the template rejects, drops,
            repeats or moves a system message.
        markers: ids of the tokens that no message yields.
        warning: one line to show when the model file has no usable template and ChatML is used instead, else None.
    """

    def __init__(self, model: llama.Model, *, source: str | None = None) -> None:
        self._vocab = model.vocab
        source = model.chat_template() if source is None else source
        self.warning: str | None = None
        if not source:
            self.warning = "the model file has no chat template: using ChatML, answers may be poor"
            source = CHATML
        try:
            self._renderer = _usable_renderer(source, self._vocab)
        except _Unusable as error:
            self.warning = f"the model's chat template cannot be used ({error}): using ChatML, answers may be poor"
            self._renderer = _Renderer(CHATML, self._vocab)
        self.folded = not self._renderer.knows_system
        self._control = ControlTokens(
            self._vocab, scaffold=self._renderer.scaffold, cut_marks=self._renderer.compared_texts
        )
        self.markers = self._control.ids

    def encode(
        self,
        messages: Sequence[Message],
        *,
        rows: Sequence[int] = (),
        limit: int | None = None,
        check: Callable[[], None] = no_check,
    ) -> list[int]:
        """Encode the whole prompt, with BOS where the model wants it and the opening of the answer at the end.

        No message yields a control token, whatever it says.

        Args:
            rows: ids of embedding rows (negative, see `runtime.embeddings`) which stand at the beginning of the system
                message, as a text would: a system message's text follows them after an empty line; where there is no
                system message, they are all of it.
            limit: tokens that it may have.
            check: asked every few milliseconds, may raise llama.DecodeAborted to end it.

        Raises:
            TooLong: it has more than `limit` tokens; said as soon as it is known.
            UsageError: the messages are in an order that the template refuses, or that makes no sense.
            ModelError: the vocabulary knows nothing of it.
            PairError: the template does not leave the system prompt in one place, so there is none for rows.
        """
        turns = [Message(m.role, clean(m.content)) for m in _checked(messages)]
        sentinels = Sentinels.absent_from(m.content for m in turns)
        turns = self._fold(_with_slot(turns, sentinels.slot) if len(rows) else turns)
        marked = [Message(m.role, self._marked(m, sentinels, check)) for m in turns]
        try:
            text = sentinels.unescaped(self._renderer.render(marked, check))
        except _Unusable as error:
            why = sentinels.remove(str(error))
            raise UsageError(f"the model's chat template refuses this conversation: {why}") from None
        if len(rows) and text.count(sentinels.slot) != 1:
            raise PairError("soft prompts do not work with this model's chat template: it changes the system prompt")
        ids = self._control.tokenize(text, sentinels, rows, limit=limit, check=check)
        if not ids:
            raise ModelError("the model's vocabulary has no token for any of this conversation")
        bos = self._vocab.bos
        if self._vocab.add_bos and bos >= 0 and ids[:1] != [bos]:
            ids.insert(0, bos)
        if limit is not None and len(ids) > limit:
            raise TooLong
        return ids

    def prefix(
        self, opening: Sequence[Message], *, rows: Sequence[int] = (), check: Callable[[], None] = no_check
    ) -> list[int]:
        """Find the tokens that conversations with this opening begin with, whatever the user says next; may be empty.

        `opening` is a system prompt, perhaps followed by whole turns, or nothing; `rows` and `check` as in `encode`.

        Found by trying: the longest common prefix of conversations that differ in the user's text and in length.
        """
        prompts = [self.encode([*opening, Message("user", word)], rows=rows, check=check) for word in _FIRST_WORDS]
        with suppress(UsageError):  # not every template takes a second turn
            turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
            prompts.append(self.encode([*opening, *turns], rows=rows, check=check))
        low, high = min(prompts), max(prompts)  # every other prompt lies between them
        length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
        return low[:length]

    def default_system(self) -> str:
        """Find the system prompt that the template writes into a conversation that has none; empty: it writes none."""
        user, system = Message("user", "user008"), Message("system", "system007")
        try:
            without, given = self._renderer.render([user]), self._renderer.render([system, user])
            before, found, after = given.partition(system.content)
            if self.folded or not found or not (without.startswith(before) and without.endswith(after)):
                return ""
            text = without[len(before) : len(without) - len(after)]
            return text if text and self._renderer.render([Message("system", text), user]) == without else ""
        except _Unusable:
            return ""

    def _marked(self, message: Message, sentinels: Sentinels, check: Callable[[], None]) -> str:
        """Mark a message's text.

        A turn without a text gets a mark all the same: templates leave out such a turn with its role, refuse it, or
        take it for a call of tools.
        """
        text = self._control.mark(message.content, sentinels, answer=message.role == "assistant", check=check)
        return text if text.strip() or message.role == "system" else text + sentinels.broken

    def _fold(self, messages: list[Message]) -> list[Message]:
        if not self.folded or not messages or messages[0].role != "system":
            return messages
        system, *rest = messages
        if not system.content:
            return rest
        if rest and rest[0].role == "user":
            return [Message("user", f"{system.content}\n\n{rest[0].content}"), *rest[1:]]
        return [Message("user", system.content), *rest]


def _checked(messages: Sequence[Message]) -> Sequence[Message]:
    if not messages:
        raise UsageError("a conversation needs at least one message")
    for position, message in enumerate(messages):
        if message.role not in ("system", "user", "assistant"):
            raise UsageError(f"unknown role {message.role!r}: use system, user or assistant")
        if message.role == "system" and position > 0:
            raise UsageError("a conversation has at most one system message, and it comes first")
    return messages


def _with_slot(messages: list[Message], slot: str) -> list[Message]:
    """Write the conversation with the character that stands for rows at the beginning of its system message."""
    if messages[0].role != "system":
        return [Message("system", slot), *messages]
    text = messages[0].content
    return [Message("system", f"{slot}\n\n{text}" if text else slot), *messages[1:]]


# ---------------------------------------------------------------------------------------------------------------------
# Rendering


class _Unusable(Exception):
    """The template cannot render these messages; the text is one line."""


class _Hopeless(_Unusable):
    """It takes too much time or memory: another try would as well."""


class _Blank(jinja2.Undefined):
    """An undefined variable that joins texts as an empty one. Its parts are errors: a template may need them."""

    def __add__(self, other: Any) -> Any:
        return other

    __radd__ = __add__


class _Compiled(NamedTuple):
    """A template, and what stands in it.

    Attributes:
        constants, written: its strings inside and outside of expressions. compared_texts: see `_compared_texts`.
        asked_for: names of variables that it reads.
        sandbox: what it runs in.
    """

    template: jinja2.Template
    sandbox: Sandbox
    constants: frozenset[str]
    written: tuple[str, ...]
    compared_texts: frozenset[str]
    asked_for: frozenset[str]


@lru_cache(maxsize=16)
def _compile(source: str, *, blanks: bool) -> _Compiled:
    if len(source) > MAX_SOURCE:
        raise _Hopeless(f"it has {len(source)} characters")
    nodes, sandbox = jinja2.nodes, Sandbox(datetime.now(), _Blank if blanks else jinja2.Undefined)
    with _one_line_errors(), sandbox.bounded(0, no_check):
        tree = sandbox.parse(source)
        return _Compiled(
            sandbox=sandbox,
            constants=frozenset(c.value for c in tree.find_all(nodes.Const) if isinstance(c.value, str)),
            written=tuple(t.data for t in tree.find_all(nodes.TemplateData)),
            compared_texts=_compared_texts(tree),
            asked_for=frozenset(name.name for name in tree.find_all(nodes.Name) if name.ctx == "load"),
            template=sandbox.compiled(tree),  # last: it changes the tree
        )


def prepare(source: str) -> None:
    """Compile a template that will be wanted, which takes some 10 ms."""
    with suppress(_Unusable):
        _compile(source, blanks=False)


class _Renderer:
    """A compiled template that is known to render at least one user message.

    Attributes:
        knows_system: a system message appears once, in front of the first user turn.
        scaffold: every string constant of the template, and the rendered probes.
        compared_texts: string constants that the template looks for in other texts.

    Args:
        blanks: variables that nobody set, such as `tools`, join texts as empty ones.

    Raises:
        _Unusable: the template cannot be compiled, or cannot render one user message.
    """

    def __init__(self, source: str, vocab: llama.Vocab, *, blanks: bool = False) -> None:
        compiled = _compile(source, blanks=blanks)
        self._template, self._sandbox = compiled.template, compiled.sandbox
        self.compared_texts = compiled.compared_texts
        self._variables: dict[str, object] = {
            "bos_token": vocab.literal(vocab.bos) if vocab.bos >= 0 else "",
            "eos_token": vocab.literal(vocab.eos) if vocab.eos >= 0 else "",
            "add_generation_prompt": True,
        }
        for name, values in THINKING_OFF.items():
            fitting = [v for v in values if not isinstance(v, str) or v in compiled.constants]
            if name in compiled.asked_for and fitting:
                self._variables[name] = fitting[0]
        self._as_parts = False
        probes = self._probe()
        self.scaffold = "\0".join([*compiled.constants, *compiled.written, *probes])

    def render(self, messages: Sequence[Message], check: Callable[[], None] = no_check) -> str:
        """Render the prompt as text.

        Raises:
            _Unusable: the template refuses the messages, or fails on them.
        """
        turns = [{"role": m.role, "content": self._content(m)} for m in messages]
        characters = sum(len(m.content) for m in messages)
        limit = _MAX_OUTPUT + 16 * characters
        pieces: list[str] = []
        with _one_line_errors(), self._sandbox.bounded(characters + _PER_MESSAGE * len(messages), check):
            for piece in self._template.generate(messages=turns, **self._variables):
                check()
                if not isinstance(piece, str):  # jinja2 takes what a filter block gives as it is
                    raise TypeError(f"a filter block gives no text, but a {type(piece).__name__}")
                pieces.append(piece)
                limit -= len(piece)
                if limit < 0:
                    raise Exhausted("its output grows too long")
        return "".join(pieces)

    def _content(self, message: Message) -> object:
        return [{"type": "text", "text": message.content}] if self._as_parts else message.content

    def _probe(self) -> list[str]:
        """Find out what the template can do; returns what it wrote."""
        system, user = Message("system", "system007"), Message("user", "user008")
        more = [Message("assistant", "answer009"), Message("user", "user010")]
        single = self._attempt([user])
        if single is None or user.content not in single:
            self._as_parts = True
            single = self.render([user])
            if user.content not in single:
                raise _Unusable("it drops the user's message")
        several = self._attempt([user, *more])
        # Templates that refuse several turns at all are asked with one.
        full = self._attempt([system, user] if several is None else [system, user, *more])
        self.knows_system = (
            full is not None and full.count(system.content) == 1 and full.find(system.content) < full.find(user.content)
        )
        return [text for text in (single, several, full) if text is not None]

    def _attempt(self, messages: Sequence[Message]) -> str | None:
        try:
            return self.render(messages)
        except _Hopeless:
            raise
        except _Unusable:
            return None


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn whatever goes wrong inside a template into `_Unusable` with one line."""
    try:
        yield
    except (_Unusable, llama.DecodeAborted):
        raise
    except Exhausted as error:
        raise _Hopeless(str(error)) from None
    except Exception as error:  # a template can raise anything, MemoryError and RecursionError included
        text = " ".join(str(error).split()) or type(error).__name__
        raise _Unusable(text[:300]) from None


def _usable_renderer(source: str, vocab: llama.Vocab) -> _Renderer:
    """Compile the template with undefined variables as Jinja has them; if it stumbles over one, with blanks."""
    try:
        return _Renderer(source, vocab)
    except _Hopeless:
        raise
    except _Unusable as error:
        with suppress(_Unusable):
            return _Renderer(source, vocab, blanks=True)
        raise error


def _compared_texts(tree: jinja2.nodes.Template) -> frozenset[str]:
    """List string constants where a template looks into a text: `in`, `==`, arguments of methods and filters.

    Also those that are given a name first (`set think_end = '</think>'`).
    """
    nodes = jinja2.nodes
    found: list[Any] = []
    for node in tree.find_all((nodes.Compare, nodes.Filter, nodes.Test, nodes.Call, nodes.Assign)):
        if isinstance(node, nodes.Compare):
            found += node.find_all(nodes.Const)
        elif isinstance(node, nodes.Assign):
            found.append(node.node)
        elif not isinstance(node, nodes.Call) or isinstance(node.node, nodes.Getattr):
            found += node.args  # type: ignore[attr-defined]
    values = (n.value for n in found if isinstance(n, nodes.Const))
    return frozenset(v for v in values if isinstance(v, str) and v)
