"""Knows the chat templates of public model files (tests/data/templates), and vocabularies that hold all their markers.

Each vocabulary serves every template: it has every marker that any of them writes, as a token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gguf import TokenType
from tiny_gguf import write_llama

from acd_local.runtime import llama
from acd_local.runtime.template import ChatTemplate, Message

FOLDER = Path(__file__).parents[1] / "data" / "templates"
TEMPLATES = {path.stem: path.read_bytes().decode() for path in sorted(FOLDER.glob("*.jinja"))}

# Templates that cannot be used, and what the one line about them says.
UNUSABLE = {"gigachat-20b": "'additional_special_tokens' is undefined"}
# They put a rule for judging around the last message and leave the others out.
JUDGES = {"granite-guardian-3.0-2b"}
# What people may write into a system message to switch thinking; the template takes it out.
SWITCHES = ("/no_think", "/think")

_ENDS = ("<s>", "</s>")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
# Texts that have the form of a marker, and those that may be tags of a description just as well.
_MARKER = re.compile(
    r"<\|[^<>|\s'\"{}]{1,60}\|>|<｜[^<>'\"{}]{1,40}｜>|<[A-Z]{2,3}>|</?seed:\w+>|</?role>|<(?:begin|end)\w*_of_\w+>"
    r"|\[\|\w+\|\]|\[/?[A-Z][A-Z_]{2,30}\]|\[gMASK\]|<sop>|<start_of_turn>|<end_of_turn>|</?s>"
)
_TAG = re.compile(r"</?[a-z_]{2,30}>|<</?SYS>>|<image>|<IMPORTANT>")


def markers(source: str) -> set[str]:
    """The markers that a template can write."""
    return set(_MARKER.findall(_COMMENT.sub("", source)))


def tags(source: str) -> set[str]:
    return set(_TAG.findall(_COMMENT.sub("", source)))


MARKERS = sorted({"<|im_start|>", "<|im_end|>", *_ENDS}.union(*map(markers, TEMPLATES.values())))
TAGS = sorted({"<think>", "</think>"}.union(*map(tags, TEMPLATES.values())) - {*MARKERS})


def _tokens(kind: TokenType, texts: Sequence[str]) -> list[tuple[str, TokenType]]:
    return [(text, kind) for text in texts]


_CONTROL, _DEFINED = TokenType.CONTROL, TokenType.USER_DEFINED
_OTHERS = [text for text in MARKERS if text not in _ENDS]

VOCABULARIES: dict[str, dict[str, Any]] = {
    # as Qwen's: markers are control tokens, tags are user-defined ones
    "bpe": {"eot": "<|im_end|>", "extra_tokens": [*_tokens(_CONTROL, MARKERS), *_tokens(_DEFINED, TAGS)]},
    # everything but the ends is user-defined, and there is a BOS
    "bpe-defined": {
        "pre": "llama-bpe",
        "add_bos": True,
        "extra_tokens": [*_tokens(_CONTROL, _ENDS), *_tokens(_DEFINED, [*_OTHERS, *TAGS])],
    },
    # as Gemma's: SentencePiece, whose merges of plain characters arrive at any of the control tokens
    "spm": {
        "vocab": "spm",
        "add_bos": True,
        "add_space_prefix": False,
        "extra_tokens": [*_tokens(_CONTROL, [*_OTHERS, *TAGS])],
    },
    # as Phi-3's: user-defined markers that swallow the white space behind them, and a space in front of every text
    "spm-defined": {
        "vocab": "spm",
        "add_bos": True,
        "name": "Phi-3 tiny",
        "extra_tokens": [("<|endoftext|>", _CONTROL), *_tokens(_DEFINED, [*_OTHERS, *TAGS])],
    },
}


def write_model(path: Path, vocabulary: str, template: str | None = None) -> Path:
    """A tiny model with one of the vocabularies, and the chat template of that name."""
    source = None if template is None else TEMPLATES[template]
    return write_llama(path, bos="<s>", eos="</s>", chat_template=source, **VOCABULARIES[vocabulary])


@dataclass(frozen=True)
class Conversation:
    """Who says what; a system message may come first."""

    roles: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def messages(self) -> list[Message]:
        return [Message(role, text) for role, text in zip(self.roles, self.texts, strict=True)]  # type: ignore[arg-type]

    def harmless(self) -> Conversation:
        """The same conversation with a word of its own in the place of every text."""
        return Conversation(self.roles, tuple(f"{role}{i}word" for i, role in enumerate(self.roles)))


class Reading:
    """What a model is given by one template and one vocabulary, in the tests' own words."""

    def __init__(self, model: llama.Model, vocabulary: str, name: str) -> None:
        self.name, self.vocabulary, self.source = name, vocabulary, TEMPLATES[name]
        self.model, self.vocab = model, model.vocab
        self.template = ChatTemplate(model, source=self.source)
        self.forged = [*markers(self.source), *tags(self.source)]

    @cached_property
    def guarded(self) -> frozenset[int]:
        """Tokens that are the template's alone: control tokens, and whatever it writes itself."""
        always, vocab = llama.ATTR_CONTROL | llama.ATTR_UNKNOWN, self.vocab
        own = {*markers(self.source), *tags(self.source)}
        return frozenset(
            token
            for token in range(vocab.n_tokens)
            if vocab.attr(token) & always or vocab.is_eog(token) or vocab.text(token) in own
        )

    def guarded_in(self, ids: Sequence[int]) -> list[str]:
        return [self.vocab.text(i) for i in ids if i in self.guarded]

    def text(self, ids: Sequence[int]) -> str:
        """All characters of a prompt but white space, of which templates and SentencePiece take and add some."""
        pieces = (self.vocab.literal(i).encode() if i in self.guarded else self.vocab.piece(i) for i in ids)
        return self.bare(b"".join(pieces).decode())

    def bare(self, text: str) -> str:
        return "".join((text.replace("▁", " ") if "spm" in self.vocabulary else text).split())

    def check(self, said: Conversation, ids: Sequence[int]) -> None:
        """Assert that what is said is text in its prompt: nothing guarded, no other role, no character moved or lost.

        The prompt is that of a harmless conversation, with these texts in the places of its words.
        """
        harmless = said.harmless()
        plain = self.template.encode(harmless.messages)
        assert self.guarded_in(ids) == self.guarded_in(plain)
        wanted = self.text(plain)
        assert all(wanted.count(word) == 1 for word in harmless.texts)
        texts = {word: self.bare(text) for word, text in zip(harmless.texts, said.texts, strict=True)}
        assert self.text(ids) == re.sub("|".join(texts), lambda word: texts[word[0]], wanted)
