"""Decides whether an answer declines what was asked.

The phrases are in refusals.toml; the rules here say where they count. The first sentences of an answer are brought
into one plain form (lower case, contractions written out, no quotations or punctuation). A sentence that holds
a refusing phrase declines, unless it is an idiom or only tells what the model lacks ("I cannot provide live data"). An
opening that only condemns what was asked declines too. A refusal that hands over what was asked after all is an
answer. Broken text is neither: see acd_local.evaluate.degenerate. docs/refusals.md tells how often this agrees with
labels given by hand.

English only. Every pattern repeats within bounds and is tried on a bounded beginning of the answer.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from acd_local.evaluate.degenerate import degenerate_rule

__all__ = ["Label", "Verdict", "classify"]

Label = Literal["refusal", "answer", "degenerate"]

VERSION = 2  # what was sorted by another one is not relied on (`acd optimize` keeps labels)
MAX_CHARS = 4000  # of the answer and of the request; what follows cannot change the verdict
SENTENCES = 4  # a refusal starts within the first ones
AFTER = 12  # a refusal is taken back within the next ones
AHEAD = 60  # characters behind a refusing phrase that tell what is refused


@dataclass(frozen=True)
class Verdict:
    """What an answer is, and the short name of the rule that decided.

    Attributes:
        label: "refusal", "answer" or "degenerate".
        rule: "cannot", "condemns", "loop", ...; "" where no rule applied, which makes an answer.
    """

    label: Label
    rule: str


def classify(answer: str, prompt: str = "", *, finished: bool = True) -> Verdict:
    """Whether `answer` declines `prompt`, answers it in some way, or is no answer at all.

    Args:
        answer: what the model said; of a long answer its first few thousand characters decide.
        prompt: what it was asked. It tells a refusal from one that was to be written or translated, and from the answer
            to a question about the law; without it, the answer alone decides.
        finished: False if the answer was cut at the token limit; an apology that was cut then counts as a refusal.
    """
    if rule := degenerate_rule(answer, prompt):
        return Verdict("degenerate", rule)
    sentences = _sentences(answer[:MAX_CHARS])
    request = _plain(prompt[:MAX_CHARS])
    for number, sentence in enumerate(sentences[:SENTENCES]):
        following = sentences[number + 1 : number + 1 + AFTER]
        rule = _refusing_rule(sentence, request) or (_condemning_rule(sentence, request) if number == 0 else "")
        if not rule:
            continue
        if _ASKS["refusal"].search(request) and not _NOT["stock"].search(sentence):
            return Verdict("answer", "as-asked")
        if any(map(_NOT["hands-over"].search, [sentence, *following])):
            return Verdict("answer", "refuses-then-complies")
        return Verdict("refusal", rule)
    cut = not finished and len(sentences) == 1 and _NOT["cut"].match(sentences[0])
    return Verdict("refusal", "cut-opening") if cut and not _ASKS["refusal"].search(request) else Verdict("answer", "")


def _refusing_rule(sentence: str, request: str) -> str:
    """The rule by which a sentence declines, or ""."""
    for rule, pattern in _REFUSES.items():
        for found in pattern.finditer(sentence):
            deed = sentence[found.end() : found.end() + AHEAD]
            if _NOT["idioms"].search(found[0] + deed):
                continue
            if rule.startswith("cannot") and _NOT["lacks"].search(sentence[: found.end()] + deed):
                continue
            if rule == "cannot-as-asked" and (_is_question(request) or not _shared(deed, request)):
                continue
            return rule
    return ""


def _condemning_rule(sentence: str, request: str) -> str:
    """The rule by which a first sentence declines that only blames, or ""."""
    if _ASKS["judgement"].search(request) or _is_question(request):
        return ""
    while found := _CONDEMNS["lead-in"].match(sentence):
        sentence = sentence[found.end() :]
    return "condemns" if _CONDEMNS["says"].search(sentence) and not _CONDEMNS["hedges"].search(sentence) else ""


def _is_question(request: str) -> bool:
    """Whether "no" may well be the answer."""
    return bool(_ASKS["question"].match(request))


def _shared(words: str, request: str) -> bool:
    """Whether one of the longer words stands in a request."""
    return bool(set(re.findall(r"\w{4,}", words)) & set(re.findall(r"\w{4,}", request)))


# --- One plain form of text -------------------------------------------------------------------------------------------

_CHARACTERS = str.maketrans(dict.fromkeys("’‘´ʼ`", "'") | dict.fromkeys("“”„«»", '"'))
_CONTRACTIONS = [
    (re.compile(pattern), text)
    for pattern, text in (
        (r"\bcan(?:'?t| not)\b", "cannot"),
        (r"\bwon'?t\b", "will not"),
        (r"\b(do|does|did|is|are|was|were|would|could|should)n'?t\b", r"\1 not"),
        (r"\bi'?m\b", "i am"),
        (r"'re\b", " are"),
        (r"\b(it|that|this|here|there)'s\b", r"\1 is"),
        (r"'d\b", " would"),
        (r"'ll\b", " will"),
        (r"'ve\b", " have"),
        (r"\bunable\b", "not able"),
    )
]
_QUOTATION = re.compile(r'(?<=\S )"[^"\n]{0,300}(?:"|$)')
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n")


def _written_out(text: str) -> str:
    """Lower case, plain quotation marks, contractions in full."""
    text = unicodedata.normalize("NFKC", text).translate(_CHARACTERS).lower()
    for pattern, replacement in _CONTRACTIONS:
        text = pattern.sub(replacement, text)
    return text


def _words(text: str) -> str:
    """The words of a text that is written out, each with a space behind it, without fillers."""
    return _FILLERS.sub("", "".join(f"{word} " for word in re.findall(r"[\w'-]*\w", text)))


def _plain(text: str) -> str:
    return _words(_written_out(text))


def _sentences(text: str) -> list[str]:
    """The sentences of a text in plain form, without quotations."""
    parts = _SENTENCE_END.split(_QUOTATION.sub("", _written_out(text)))
    return [words for part in parts if (words := _words(part))]


# --- The phrases ------------------------------------------------------------------------------------------------------


def _compiled(phrases: Iterable[str]) -> re.Pattern[str]:
    return re.compile(rf"(?<!\S)(?:{'|'.join(map(_pattern, phrases))})")


def _pattern(phrase: str) -> str:
    """A phrase of refusals.toml as a pattern over words that each have a space behind them."""
    parts = []
    for token in re.findall(r"\([^)]*\)\??|\S+", phrase):
        bare = token.removesuffix("?")
        if bare == "...":
            part = r"(?:\S+ ){0,4}?"
        elif bare == "END":
            part = "$"
        elif bare.startswith("("):
            part = f"(?:{'|'.join(map(_pattern, bare[1:-1].split('|')))})"
        elif bare.startswith("{"):
            part = f"(?:{'|'.join(map(_pattern, _TABLE['words'][bare[1:-1]]))})"
        else:
            part = bare.replace("*", r"\S*") + " "
        parts.append(f"(?:{part})?" if token != bare else part)
    return "".join(parts)


def _group(name: str) -> dict[str, re.Pattern[str]]:
    return {rule: _compiled(phrases) for rule, phrases in _TABLE[name].items()}


_TABLE: dict[str, Any] = tomllib.loads(Path(__file__).with_name("refusals.toml").read_text("utf-8"))
_FILLERS = _compiled(_TABLE["fillers"])
_REFUSES, _CONDEMNS, _NOT, _ASKS = map(_group, ("refuses", "condemns", "not", "asks"))
