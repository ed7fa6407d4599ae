"""What an answer is: its pieces while it streams, and the finished record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from acd_local.pairs import Decision

FinishReason = Literal["stop", "stop_string", "length", "cancelled", "error"]


@dataclass(frozen=True)
class TurnsDropped:
    """Event: the context was full, so the oldest `messages` of the conversation were left out of both streams."""

    messages: int


@dataclass(frozen=True)
class PromptProgress:
    """Event: `done` of the prompt's `total` rows are there, over both streams; those that were kept count as done.

    It comes before the first batch of a prompt and after every further one. A batch has 512 rows at most. Where a gate
    reads the request, another prompt may follow, with a total of its own.
    """

    done: int
    total: int


@dataclass(frozen=True)
class LikelyToken:
    """A token, its text, the bytes that it adds to the answer (none, where it ends it), its natural-log probability."""

    token: int
    text: str
    piece: bytes
    logprob: float


@dataclass(frozen=True)
class TokenRecord:
    """One sampled token.

    Attributes:
        token, text: its id and text (U+FFFD where it holds part of a character; "" for a token that ends the answer).
        safe_token, safe_text: what the same draw on the safe stream alone (alpha 0, same beta) would have given.
        safe_logprob, safe_rank: of `token` in the safe stream alone (natural log; 1 is the first), where a trace was
            asked for. Nothing tells the adversarial stream's.
        logprobs: of `token`, then of the likeliest tokens, in the distribution that it was drawn from: the contrasted
            one over the plausible tokens, before temperature and samplers. None where not asked for.
        divergence: KL(S || A) in nats, where asked for and there was a second stream.
    """

    token: int
    text: str
    safe_token: int
    safe_text: str
    safe_logprob: float | None = None
    safe_rank: int | None = None
    logprobs: tuple[LikelyToken, ...] | None = None
    divergence: float | None = None

    @property
    def changed(self) -> bool:
        """Whether the contrast made a difference here."""
        return self.token != self.safe_token


@dataclass(frozen=True)
class GateDecision:
    """Event: a pair's gate has decided who answers, or that an answer goes on under the pair.

    Attributes:
        probability: that the request, or the answer, is about doing harm.
        decision: "helpful": the pair's helpful text; "as-is": the model with its own prompt; "contrast": the pair.
        position: the answer token from which on that holds.
    """

    probability: float
    decision: Decision
    position: int = 0


@dataclass(frozen=True)
class GateRecord:
    """The readings and decisions of a pair's gate over one answer.

    Attributes:
        probability: that the request asks for harm. decision: who answered it, see `GateDecision`.
        contrast_from: answer token from which on the pair's two streams were decoded; 0: all; None: none.
        looks: (answer token, probability) of every later reading, which saw the tokens before it.
    """

    probability: float
    decision: Decision
    contrast_from: int | None
    looks: tuple[tuple[int, float], ...] = ()


# TokenRecord: a token was sampled; where a trace or logprobs were asked for.
AnswerEvent: TypeAlias = TurnsDropped | PromptProgress | GateDecision | TokenRecord
OnEvent = Callable[[AnswerEvent], None]


@dataclass(frozen=True)
class ContrastStats:
    """The contrast's numbers and effect over one answer.

    Attributes:
        alpha, beta, raw: the settings in force, at the end where a gate changed them.
        positions: sampled positions, the one that ended the answer included.
        changed_tokens: positions where the same draw on the safe stream alone (alpha 0, same beta) would have given
            another token.
        compared: positions where the adversarial stream's logits were taken; elsewhere they could not change the
            choice, or lay beyond the window.
        mean_divergence: mean KL(S || A) over positions, nats; None where it was not asked for.
    """

    alpha: float
    beta: float
    raw: bool
    positions: int = 0
    changed_tokens: int = 0
    compared: int = 0
    mean_divergence: float | None = None


@dataclass(frozen=True)
class Timings:
    """The times that an answer took.

    Attributes:
        prompt_seconds: from the call to the first logits, tokenization included.
        answer_seconds: from there to the last token.
        tokens_per_second: answer tokens over answer_seconds; 0.0 for answers of at most one token.
        drafted, accepted: tokens that were drafted, and how many of them the answer took.
    """

    prompt_seconds: float = 0.0
    answer_seconds: float = 0.0
    tokens_per_second: float = 0.0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
        prompt_tokens: length of the safe stream's prompt; 0 where it was cancelled before that was known.
        prompt_decoded: rows that were decoded for the prompt, over both streams; what was cached costs nothing.
        completion_tokens: sampled tokens that added text.
        context_used: tokens that prompt and answer take in the (safe, adversarial) stream.
        seed: the seed that repeats it.
        gate: what the pair's gate decided; None: none was asked.
        dropped_turns: messages left out at the front because the context was full.
        tokens: one record per sampled token.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    prompt_decoded: int
    completion_tokens: int
    seed: int
    contrast: ContrastStats
    timings: Timings
    context_used: tuple[int, int] = (0, 0)
    gate: GateRecord | None = None
    dropped_turns: int = 0
    tokens: tuple[TokenRecord, ...] = field(default=(), repr=False)
