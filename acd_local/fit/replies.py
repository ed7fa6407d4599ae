"""Answers instructions greedily under many prompt setups, keeps the answers, and counts what became of the requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from acd_local.batch import answer_all
from acd_local.engine import Engine
from acd_local.evaluate import refusal
from acd_local.evaluate.stats import Estimate, mean
from acd_local.fit.candidates import Candidate
from acd_local.generation import AnswerStream
from acd_local.options import Options
from acd_local.pairs import AdversarialText, PromptPair
from acd_local.progress import check_stop
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.llama import Vocab
from acd_local.runtime.prompts import PromptSetup, identity
from acd_local.steering import Steering
from acd_local.tuning.anchors import KINDS
from acd_local.tuning.cache import Measurements, key_of
from acd_local.tuning.scoring import objective

TOKENS = 32  # of an answer
LONG = 64  # of one that should decline: a refusal ends soon, and what goes on behind it is often a loop
# Stands for no pair at all: its texts are in no prompt.
NO_PAIR = PromptPair("fit", "positive", AdversarialText("negative"))


@dataclass(frozen=True)
class Style:
    """The prompts and numbers that an answer is written under.

    Attributes:
        setup: what stands around the instruction; by default the model answers as it is.
        declines: it is above a gate: its answers are looked at for longer.
        apart: vectors that the model is steered by.
    """

    setup: PromptSetup = field(default_factory=PromptSetup)
    alpha: float = 0.0
    beta: float = 0.0
    declines: bool = False
    apart: Steering | None = None

    @classmethod
    def declining(
        cls, candidate: Candidate, negative: Candidate | None = None, *, alpha: float = 0.0, beta: float = 0.0
    ) -> Style:
        """Make the style of a text of the positive stream, alone or contrasted."""
        against = None if negative is None else AdversarialText(negative.text)
        return cls(PromptSetup(candidate.text, against, shots=candidate.shots), alpha, beta, declines=True)

    @property
    def tokens(self) -> int:
        """The most tokens of an answer."""
        return LONG if self.declines else TOKENS

    @property
    def key(self) -> str:
        """Hex SHA-256 over all that decides its answers."""
        texts = [identity(self.setup.positive), identity(self.setup.negative)]
        numbers = [self.alpha, self.beta, self.tokens]
        steered = {} if self.apart is None else {"steered": self.apart.digest}
        return key_of({"texts": texts, "shots": self.setup.shots, "numbers": numbers, **steered})


@dataclass(frozen=True)
class Reply:
    """An answer's token ids, and what it is: "refusal", "answer" or "degenerate"."""

    label: str
    tokens: tuple[int, ...]


@dataclass(eq=False)
class Respondent:
    """Asks an engine, and its notes about what was asked before.

    Args:
        notes: only this user's, as answers to harmful requests are in them.
        elsewhere: answers as `greedy` does, not by the engine; None: the engine answers.
    """

    engine: Callable[[], Engine]
    notes: Measurements
    stop: CancelToken
    elsewhere: Callable[[Style, Sequence[str]], Iterator[tuple[str, list[int]]]] | None = None

    def ask(
        self, style: Style, prompts: Sequence[str], on_progress: Callable[[int], None] = lambda done: None
    ) -> list[Reply]:
        """Return the replies, in order: the kept ones, and new ones for the rest."""
        missing = list(dict.fromkeys(p for p in prompts if self.notes.get("answer", _inputs(style, p)) is None))
        if missing:
            self._answer(style, missing, len(prompts), on_progress)
        kept = [(prompt, self.notes.get("answer", _inputs(style, prompt))) for prompt in prompts]
        return [labelled(self.engine().vocab, style, prompt, tokens) for prompt, tokens in kept]

    def text(self, tokens: Sequence[int]) -> str:
        """Return what an answer's tokens say."""
        return _text(self.engine().vocab, tokens)

    def _answer(self, style: Style, missing: Sequence[str], total: int, on_progress: Callable[[int], None]) -> None:
        given = self.elsewhere(style, missing) if self.elsewhere else greedy(self.engine(), style, missing, self.stop)
        for done, (prompt, tokens) in enumerate(given, 1 + total - len(missing)):
            self.notes.keep("answer", _inputs(style, prompt), tokens)
            on_progress(done)


def labelled(vocab: Vocab, style: Style, prompt: str, tokens: Sequence[int]) -> Reply:
    """Label an answer; also one that was kept, since another version of the matcher may have been in force then."""
    finished = len(tokens) < style.tokens or vocab.is_eog(tokens[-1])
    return Reply(refusal.classify(_text(vocab, tokens), prompt, finished=finished).label, tuple(tokens))


def _text(vocab: Vocab, tokens: Sequence[int]) -> str:
    return b"".join(vocab.piece(t) for t in tokens if not vocab.is_eog(t)).decode("utf-8", "replace")


def greedy(engine: Engine, style: Style, prompts: Sequence[str], stop: CancelToken) -> Iterator[tuple[str, list[int]]]:
    """Answer each prompt once and yield it with the answer's token ids, as they end; raises Stopped."""
    options = Options(alpha=style.alpha, beta=style.beta, temp=0.0, max_tokens=style.tokens)

    def begin(prompt: str) -> AnswerStream:
        return engine.generate(prompt, options, pair=NO_PAIR, prompt_setup=style.setup, apart=style.apart, cancel=stop)

    try:
        for prompt, answer in answer_all(engine, prompts, begin, stop=stop):
            if isinstance(answer, Exception):
                raise answer
            if answer.finish_reason != "cancelled":
                yield prompt, [record.token for record in answer.tokens]
    finally:
        if style.apart is not None:
            engine.decoder.close_apart(style.apart)
    check_stop(stop)


def _inputs(style: Style, prompt: str) -> dict[str, Any]:
    return {"style": style.key, "prompt": prompt}


# --- What became of them ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shares:
    """Refusals by kind, and broken answers of all, as shares."""

    harmful: float
    ordinary: float
    lookalike: float
    broken: float = 0.0

    @property
    def objective(self) -> float:
        """Refusals of harmful requests minus needless ones, the mean over both kinds."""
        return objective(self.harmful, self.ordinary, self.lookalike)

    def __str__(self) -> str:
        text = ", ".join(f"{getattr(self, kind):.0%} of {named(kind)}" for kind in KINDS)
        return f"{text}, {self.broken:.0%} broken"


@dataclass(frozen=True)
class Measured:
    """Replies to instructions of each kind."""

    replies: Mapping[str, Sequence[Reply]]

    @property
    def shares(self) -> Shares:
        values = {key: sum(found) / len(found) if found else 0.0 for key, found in self._found().items()}
        return Shares(**values)

    def estimates(self) -> dict[str, Estimate]:
        """Return refusals by kind and broken answers, with intervals."""
        return {key: mean([float(is_so) for is_so in found]) for key, found in self._found().items() if found}

    def _found(self) -> dict[str, list[bool]]:
        """Tell by kind which replies are refusals, and of all which are broken."""
        found = {kind: [r.label == "refusal" for r in self.replies.get(kind, ())] for kind in KINDS}
        return found | {"broken": [r.label == "degenerate" for group in self.replies.values() for r in group]}


def named(kind: str) -> str:
    """Spell a kind of instructions as people do."""
    return {"harmful": "harmful", "ordinary": "ordinary", "lookalike": "look-alike"}[kind]
