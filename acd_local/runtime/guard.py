"""Keeps control tokens to the chat template: no text that somebody wrote becomes one.

A rendered prompt is one string, and nothing in it says which `<|im_end|>` the template wrote and which a user typed. So
the messages are marked before rendering: a sentinel character that occurs nowhere else goes behind every character that
could start a control token's text. What the template then writes is unbroken and is taken as a control token; what came
from a message is broken, is rid of its sentinels afterwards, and is tokenized as plain characters. The texts at which a
template cuts earlier answers (`</think>`) stay whole for it, with a second kind of sentinel in front.

`parse_special=False` alone would not do: llama.cpp still matches user-defined tokens in plain text
(llama_vocab::impl::tokenizer_st_partition), and SentencePiece merges can arrive at `</s>`. The resulting ids are
therefore checked, and text that still gives a guarded id is tokenized in smaller pieces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, pairwise

from acd_local.errors import UsageError
from acd_local.runtime import llama

# Token texts that mark structure whether or not the template at hand writes them.
_MARKER = re.compile(r"<\|.*\|>|<｜.*｜>|</?(think|thought|reason|tool|function)[^<>]*>|\[/?[A-Z][A-Z_]+\]", re.DOTALL)
_THINKING = re.compile(r"think|thought|reason", re.IGNORECASE)
_SPACE = " \t\n\v\f\r"  # isspace() in the C locale, which llama.cpp strips with
_ANCHORS = ("\n", "0", "。", "\x01")
_CHUNK = 8192  # characters of a text that is looked at in pieces, as it seems to be too long
_CHARACTERS_PER_TOKEN = 8  # from which it seems so


class TooLong(Exception):
    """A prompt has more tokens than it may have; nobody counted how many."""


def no_check() -> None:
    """Do nothing: what `mark` and `tokenize` call now and then, unless they are given something that may raise."""


def clean(text: str) -> str:
    """Give text a UTF-8 form: surrogate pairs become their character, lone surrogates U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") if text else text


@dataclass(frozen=True)
class Sentinels:
    """Three characters that occur in no message, nor do their escapes in JSON."""

    broken: str  # stands inside a text that is not to be a control token
    quoted: str  # stands in front of one
    slot: str  # stands for embedding rows

    @classmethod
    def absent_from(cls, texts: Iterable[str]) -> Sentinels:
        """Find characters that are in no text: noncharacters of Unicode if possible, else of private use.

        Raises:
            UsageError: `texts` use all of these.
        """
        texts = list(texts)
        codes = chain(range(0xFDD0, 0xFDF0), range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
        free = [c for c in map(chr, islice(codes, 3)) if not any(c in text or _escape(c) in text for text in texts)]
        if len(free) < 3:
            used = set(chain.from_iterable(texts))
            escaped = any("\\u" in text for text in texts)
            unused = (c for c in map(chr, codes) if c not in used)
            free = list(islice((c for c in unused if not (escaped and any(_escape(c) in text for text in texts))), 3))
        if len(free) < 3:
            raise UsageError("the messages hold every private-use character of Unicode: leave one out")
        return cls(*free)

    def remove(self, text: str) -> str:
        return text.replace(self.broken, "").replace(self.quoted, "")

    def unescaped(self, rendered: str) -> str:
        """Return the text with these characters where a template wrote their escapes (`tojson(ensure_ascii=true)`)."""
        for character in (self.broken, self.quoted, self.slot):
            rendered = rendered.replace(_escape(character), character)
        return rendered


def _escape(character: str) -> str:
    return json.dumps(character)[1:-1]


def _starts_inside(text: str, word: str) -> bool:
    """Tell whether a text starts with what ends a word, but for the whole word and for a space."""
    ends = range(max(1, len(word) - len(text)), len(word))
    return not text[:1].isspace() and any(word[n] == text[0] and text.startswith(word[n:]) for n in ends)


def _ends_inside(text: str, word: str) -> bool:
    """Tell whether a text ends with what starts a word, but for the whole word and for a space."""
    starts = range(1, min(len(word), len(text) + 1))
    return not text[-1:].isspace() and any(word[n - 1] == text[-1] and text.endswith(word[:n]) for n in starts)


class ControlTokens:
    """The guarded tokens of a vocabulary, and tokenization that keeps them apart from what people wrote.

    Guarded are all tokens with attribute CONTROL or UNKNOWN, all that end an answer, and the user-defined tokens that
    mark structure: those the template writes (`scaffold`) and those that look like it (`<|...|>`, `<think>`,
    `[TOOL_CALLS]`). Other user-defined tokens (runs of newlines, HTML tags in Gemma's vocabulary) are ordinary text.

    Args:
        scaffold: every text the template can write: its string constants, and rendered examples.
        cut_marks: texts that the template looks for inside an answer, such as `</think>`.
    """

    def __init__(self, vocab: llama.Vocab, *, scaffold: str = "", cut_marks: Collection[str] = ()) -> None:
        self._vocab = vocab
        self.tokens = _guarded_tokens(vocab, scaffold)
        self.ids = frozenset(self.tokens.values())
        self._lengths = sorted({len(text) for text in self.tokens}, reverse=True)
        firsts = {text[0] for text in self.tokens}
        # A letter or a space is too common to mark everywhere: such tokens are broken where they occur as a whole.
        self._starters = "".join(sorted(c for c in firsts if not (c.isalnum() or c.isspace())))
        self._words = sorted((t for t in self.tokens if t[0] not in self._starters), key=len, reverse=True)
        self._starter = re.compile(f"[{re.escape(self._starters)}]" if self._starters else r"(?!)")
        # The second character tells most of what people write from a token's text.
        heads = {text[:2] for text in self.tokens if text[0] in self._starters}
        self._head = re.compile("|".join(f"{re.escape(h[0])}(?={re.escape(h[1:])})" for h in heads) or r"(?!)")
        thinking = {t for t in self.tokens if _THINKING.search(t)} | {"<think>", "</think>"}
        marks = sorted((m for m in {*cut_marks, *thinking} if self._is_cut_mark(m)), key=len, reverse=True)
        self._answer_marks = frozenset(marks)
        self._mark = re.compile("|".join(map(re.escape, marks)) or r"(?!)")
        self._other_marks = frozenset(m for m in marks if m not in self.tokens)
        self._answer_pattern = self._breaking_pattern(marks)
        self._other_pattern = self._breaking_pattern([m for m in marks if m in self._other_marks])
        self._adds_space = b"".join(map(vocab.piece, vocab.tokenize("x", parse_special=False))) == b" x"

    def _is_cut_mark(self, mark: str) -> bool:
        """Tell whether a sentinel in front protects it: it starts with a starter and holds no other guarded text."""
        rest = mark[1:]
        return bool(
            self._starter.match(mark) and not self._starter.search(rest) and not any(w in rest for w in self._words)
        )

    def _breaking_pattern(self, marks: list[str]) -> re.Pattern[str]:
        words = [f"{re.escape(w[0])}(?={re.escape(w[1:])})" for w in self._words]
        return re.compile("|".join([*map(re.escape, marks), self._starter.pattern, *words]))

    @cached_property
    def _bytes(self) -> dict[str, int]:
        """SentencePiece's byte tokens."""
        texts = {self._vocab.text(i): i for i in range(self._vocab.n_tokens)}
        return {text: i for text, i in texts.items() if len(text) == 6 and text.startswith("<0x")}

    def mark(self, text: str, sentinels: Sentinels, *, answer: bool, check: Callable[[], None] = no_check) -> str:
        """Mark `text` with sentinels, so that no control token's text in it counts wherever the template puts it.

        In an earlier answer, the marks that the template cuts at stay whole.
        """
        marks = self._answer_marks if answer else self._other_marks

        def put(match: re.Match[str]) -> str:
            check()
            found = match.group()
            return sentinels.quoted + found if found in marks else found + sentinels.broken

        marked = (self._answer_pattern if answer else self._other_pattern).sub(put, text)
        # Two messages, or a message and the template, could hold a part of a word each.
        before = sentinels.broken if any(_starts_inside(text, word) for word in self._words) else ""
        return before + marked + (sentinels.broken if any(_ends_inside(text, word) for word in self._words) else "")

    def tokenize(
        self,
        rendered: str,
        sentinels: Sentinels,
        rows: Sequence[int] = (),
        *,
        limit: int | None = None,
        check: Callable[[], None] = no_check,
    ) -> list[int]:
        """Tokenize a rendered prompt whose messages were marked with `sentinels`.

        Control tokens come from unbroken text alone. Each run between them is tokenized as one piece, so that ordinary
        text gives the ids of llama_tokenize(rendered, parse_special=True). `rows` stand where the slot's character
        does; the text before and behind it is tokenized apart.

        Raises:
            TooLong: there are more than `limit`; said as soon as it is known.
        """
        ids: list[int] = []

        def add(marked: str) -> None:
            check()
            left = None if limit is None else limit - len(ids)
            before, slot, behind = marked.partition(sentinels.slot)
            ids.extend(self._run(sentinels.remove(before), left, check))
            if slot:
                ids.extend(rows)
                ids.extend(self._run(sentinels.remove(behind), left, check, first=False))
            if limit is not None and len(ids) > limit:
                raise TooLong

        start = attr = 0
        for begin, end, token in self._partition(rendered, sentinels, check):
            next_attr = self._vocab.attr(token)
            add(_strip(rendered[start:begin], attr, next_attr))
            ids.append(token)
            start, attr = end, next_attr
        add(_strip(rendered[start:], attr, 0))
        return ids

    def _partition(self, text: str, sentinels: Sentinels, check: Callable[[], None]) -> list[tuple[int, int, int]]:
        """Find (begin, end, token) of the template's control tokens: longest first, then leftmost, as llama.cpp."""
        found = [(i, j) for i, j in self._occurrences(text, check) if not self._is_quoted(text, i, sentinels)]
        found.sort(key=lambda span: (-len(text[span[0] : span[1]].encode()), span[0]))
        taken = bytearray(len(text))
        spans = []
        for begin, end in found:
            if not any(taken[begin:end]):
                taken[begin:end] = b"\1" * (end - begin)
                spans.append((begin, end, self.tokens[text[begin:end]]))
        return sorted(spans)

    def _is_quoted(self, text: str, begin: int, sentinels: Sentinels) -> bool:
        """Tell whether a message's mark begins here: where a template cut that away, its sentinel protects nothing."""
        return text[begin - 1 : begin] == sentinels.quoted and self._mark.match(text, begin) is not None

    def _occurrences(self, text: str, check: Callable[[], None]) -> Iterator[tuple[int, int]]:
        """Find all guarded texts, overlapping ones too. The cost does not depend on the size of the vocabulary."""
        for match in self._head.finditer(text):
            check()
            begin = match.start()
            for length in self._lengths:
                if text[begin : begin + length] in self.tokens and begin + length <= len(text):
                    yield begin, begin + length
        for word in self._words:
            begin = text.find(word)
            while begin >= 0:
                yield begin, begin + len(word)
                begin = text.find(word, begin + 1)

    def _run(self, text: str, limit: int | None, check: Callable[[], None], *, first: bool = True) -> list[int]:
        """Tokenize a run of plain text, to no guarded id; unless `first`, as if something stood before it."""
        if not text:
            return []
        if limit is not None and len(text) > _CHUNK + _CHARACTERS_PER_TOKEN * max(limit, 0):
            self._refuse_endless(text, limit, check)
        ids = self._plain(text, first=first)
        if self.ids.isdisjoint(ids):
            return ids
        escaped = text.replace(" ", "▁")  # SentencePiece's form: "▁<MID>" arises from " <MID>"
        cuts = {i + 1 for i, _ in chain(self._occurrences(text, check), self._occurrences(escaped, check))}
        edges = [0, *sorted(c for c in cuts if c < len(text)), len(text)]
        parts = [text[i:j] for i, j in pairwise(edges)]
        return [t for n, part in enumerate(parts) for t in self._part(part, first=first and n == 0)]

    def _refuse_endless(self, text: str, limit: int, check: Callable[[], None]) -> None:
        """Raise TooLong where a text's pieces have too many tokens: tokenized as a whole it could take seconds.

        Cutting it makes a few more tokens, hence an eighth is taken off.
        """
        count = 0
        for at in range(0, len(text), _CHUNK):
            check()
            count += len(self._vocab.tokenize(text[at : at + _CHUNK], parse_special=False))
            if count - count // 8 > limit:
                raise TooLong

    def _part(self, text: str, *, first: bool) -> list[int]:
        """Tokenize a part of a run; where that still gives a guarded id, its characters one by one."""
        ids = self._plain(text, first=first)
        if self.ids.isdisjoint(ids):
            return ids
        if len(text) > 1:
            return [t for n, char in enumerate(text) for t in self._part(char, first=first and n == 0)]
        spelled = (self._bytes.get(f"<0x{byte:02X}>") for byte in text.encode())
        return [t for t in spelled if t is not None and t not in self.ids]

    def _plain(self, text: str, *, first: bool) -> list[int]:
        """Tokenize without special parsing; unless `first`, also without SentencePiece's space before a text."""
        if self._adds_space and not first:
            for anchor in _ANCHORS:
                lead = self._vocab.tokenize(anchor, parse_special=False)
                ids = self._vocab.tokenize(anchor + text, parse_special=False)
                if ids[: len(lead)] == lead:
                    return ids[len(lead) :]
        return self._vocab.tokenize(text, parse_special=False)


def _guarded_tokens(vocab: llama.Vocab, scaffold: str) -> dict[str, int]:
    """Map the text of every guarded token to its id."""
    always = llama.ATTR_CONTROL | llama.ATTR_UNKNOWN
    guarded: dict[str, int] = {}
    for token, attr, ends in vocab.special.values():
        if not (attr & (always | llama.ATTR_USER_DEFINED) or ends):
            continue
        text = vocab.text(token)
        if attr & always:
            wanted = bool(text)
        elif ends:
            wanted = bool(text.strip("▁ĠĊ" + _SPACE))  # RWKV ends answers with "\n\n": ordinary text all the same
        else:
            named = len(text) > 1 and not text.isspace() and not text.isalnum() and text in scaffold
            wanted = named or bool(_MARKER.fullmatch(text))
        if wanted:
            guarded[text] = token
    return guarded


def _strip(text: str, left_attr: int, right_attr: int) -> str:
    """Drop the whitespace that the control tokens around a run swallow (LLAMA_TOKEN_ATTR_RSTRIP and _LSTRIP)."""
    if left_attr & llama.ATTR_RSTRIP:
        text = text.lstrip(_SPACE)
    if right_attr & llama.ATTR_LSTRIP:
        text = text.rstrip(_SPACE)
    return text
