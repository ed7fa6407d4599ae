"""Makes small but complete vocabularies: byte-level BPE ("gpt2") and SentencePiece ("llama")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gguf import TokenType

ExtraTokens = Sequence[tuple[str, TokenType]]

# Words whose prefixes become pieces, so that ordinary English takes a few characters per token.
_ENGLISH = """
the and of to in is that it for you are with on as this have be not what how do can a I at or an my your me all will
from was there use water red wine carpet sky blue system user assistant model hello world please answer question help
"""
_COMMON = "th he in er an re on at en nd ing ion tion ed es st or ar le ly 's 't ... .. -- == ** ## ``` ``"
_WORDS = _ENGLISH.split()
_BITS = _COMMON.split()
_WIDE = "éüñäöß“”’—…中文日本語русский"


@dataclass
class Vocab:
    """What goes under `tokenizer.ggml.*`. `ids` of named tokens come from `index`."""

    model: str
    pre: str
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)

    def add(self, text: str, kind: TokenType, score: float = 0.0) -> None:
        """Appends a token unless the text is there already (llama.cpp aborts on duplicates)."""
        if text not in self._seen:
            self._seen.add(text)
            self.tokens.append(text)
            self.types.append(int(kind))
            self.scores.append(score)

    def __post_init__(self) -> None:
        self._seen: set[str] = set(self.tokens)

    def index(self, text: str) -> int:
        return self.tokens.index(text)


def _byte_alphabet() -> list[str]:
    """The printable stand-in of each byte in GPT-2's byte-level BPE, indexed by byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [b for b in range(256) if b not in plain]
    table = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(shifted)}
    return [table[b] for b in range(256)]


ENGLISH = (*_BITS, "\n\n", "  ", "    ", *_WORDS, *(" " + w for w in _WORDS))


def bpe_vocab(pre: str = "smollm", extra_tokens: ExtraTokens = (), words: Sequence[str] = ENGLISH) -> Vocab:
    """256 byte tokens, merges for `words`, then `extra_tokens`."""
    alphabet = _byte_alphabet()
    vocab = Vocab("gpt2", pre)
    for char in alphabet:
        vocab.add(char, TokenType.NORMAL)
    merged: set[tuple[str, str]] = set()
    for word in words:
        chars = [alphabet[b] for b in word.encode()]
        for end in range(1, len(chars)):
            left, right = "".join(chars[:end]), chars[end]
            if (left, right) not in merged:
                merged.add((left, right))
                vocab.merges.append(f"{left} {right}")
                vocab.add(left + right, TokenType.NORMAL)
    for text, kind in extra_tokens:
        vocab.add(text, kind)
    return vocab


def spm_vocab(
    extra_tokens: ExtraTokens = (), specials: Sequence[str] = ("<unk>", "<s>", "</s>"), forgeable: bool = True
) -> Vocab:
    """`specials`, 256 byte tokens, characters and pieces with scores, then `extra_tokens`.

    With `forgeable` the pieces include every prefix of every special and extra text, so that SentencePiece merging
    plain characters arrives at the control token itself, as real vocabularies allow for `</s>` ("</" + "s>").
    """
    vocab = Vocab("llama", "default")
    for text in specials:
        vocab.add(text, TokenType.UNKNOWN if text == "<unk>" else TokenType.CONTROL)
    for byte in range(256):
        vocab.add(f"<0x{byte:02X}>", TokenType.BYTE)
    for text, kind in extra_tokens:
        vocab.add(text, kind)
    pieces = [*_BITS, "\n\n", "▁▁", "▁▁▁▁", *(f"▁{w}" for w in _WORDS), *_WORDS, "</", "s>"]
    if forgeable:
        pieces += [text[:-1].replace(" ", "▁") for text in [*specials, *(t for t, _ in extra_tokens)]]
    for piece in pieces:  # every prefix, so that merging one character at a time gets there
        for end in range(2, len(piece) + 1):
            vocab.add(piece[:end], TokenType.NORMAL, -float(len(vocab.tokens)))
    for char in ["▁", *(chr(c) for c in range(33, 127)), *_WIDE]:
        vocab.add(char, TokenType.NORMAL, -float(len(vocab.tokens)))
    return vocab


def make_vocab(
    vocab: str = "bpe",
    *,
    pre: str = "smollm",
    extra_tokens: ExtraTokens = (),
    specials: Sequence[str] = ("<unk>", "<s>", "</s>"),
    n_vocab: int | None = None,
    words: Sequence[str] = ENGLISH,
) -> Vocab:
    """`vocab` is "bpe" or "spm"; `n_vocab` pads the list with unreachable ordinary tokens up to that length."""
    made = bpe_vocab(pre, extra_tokens, words) if vocab == "bpe" else spm_vocab(extra_tokens, specials)
    space = "Ġ" if vocab == "bpe" else "▁"
    for i in range(len(made.tokens), n_vocab or 0):
        made.add(f"{space}pad{i}", TokenType.NORMAL, -float(i))
    return made
