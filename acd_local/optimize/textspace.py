"""The texts a distillation may find: tokens that stay as they are when their text is tokenized where it will stand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from acd_local.optimize.layout import Layout
from acd_local.runtime import llama
from acd_local.runtime.template import ChatTemplate, Message

Tokens = tuple[int, ...]

_PLAIN = frozenset(map(chr, range(32, 127))) | {"\n"}


class TextSpace:
    """Texts in the system position of a model's template.

    Args:
        layout: as `layout.lay_out` gives it.

    Attributes:
        allowed: which tokens a text may be changed to, shape (n_vocab,): printable ASCII, no control tokens.
    """

    def __init__(self, template: ChatTemplate, vocab: llama.Vocab, layout: Layout, n_vocab: int) -> None:
        self._template = template
        self._vocab = vocab
        self._layout = layout
        ids = template.encode([Message("user", "a")], rows=(-1,))
        self._tail = ids[ids.index(-1) + 1 :]
        # SentencePiece puts a space before a text that begins a run: it is none of the text's own.
        self._adds_space = b"".join(map(vocab.piece, vocab.tokenize("x", parse_special=False))) == b" x"
        self.allowed = torch.zeros(n_vocab, dtype=torch.bool)
        for token in range(min(n_vocab, vocab.n_tokens)):
            special = vocab.attr(token) & (llama.ATTR_CONTROL | llama.ATTR_UNKNOWN | llama.ATTR_UNUSED)
            text = vocab.piece(token).decode("utf-8", "replace")
            self.allowed[token] = bool(text) and not special and _PLAIN.issuperset(text)

    def text(self, tokens: Sequence[int]) -> str:
        text = b"".join(map(self._vocab.piece, tokens)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._adds_space else text

    def tokens(self, text: str) -> Tokens | None:
        """The text's tokens in its place; None where the template or a pair file would change it."""
        ids = self._encoded(text)
        tokens = tuple(ids[len(self._layout.before) : len(ids) - len(self._tail)])
        return tokens if self.text(tokens) == text and self.is_stable(tokens) else None

    def is_stable(self, tokens: Sequence[int]) -> bool:
        """Whether a prompt file with this text gives these tokens, and no others, at run time."""
        text = self.text(tokens)
        if not text or text != text.strip() or "\ufffd" in text:
            return False
        return self._encoded(text) == [*self._layout.before, *tokens, *self._tail]

    def _encoded(self, text: str) -> list[int]:
        return self._template.encode([Message("system", text), Message("user", "a")])
