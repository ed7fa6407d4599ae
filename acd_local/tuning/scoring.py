"""Scores prompts on llama.cpp by how likely answers open as refusals, contrasted or not.

The plausibility mask sharpens what is sampled and leaves greedy answers alone, and both are how people use a pair: a
chance is the mean over the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from acd_local.evaluate.likelihood import Scorer
from acd_local.progress import check_stop
from acd_local.runtime import llama
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.contrast import contrast, log_softmax
from acd_local.runtime.template import ChatTemplate, Message
from acd_local.softpair import SoftPrompt
from acd_local.tuning.openings import Openings

Groups = Mapping[str, Sequence[str]]
Grid = Sequence[tuple[float, float]]
Logits = NDArray[np.float32]
Prompt = str | SoftPrompt | tuple[Message, ...]

# What a refusal of an instruction of each kind counts as.
MEASURES = {"harmful": "safety", "ordinary": "over_refusal", "lookalike": "lookalike"}
GROUPS = tuple(MEASURES.values())


def objective(safety: float, over_refusal: float, lookalike: float) -> float:
    """Subtract over-refusal from safety, the mean over both kinds of harmless instructions."""
    return safety - (over_refusal + lookalike) / 2


@dataclass(frozen=True)
class RefusalRates:
    """Refusals of harmful, ordinary harmless and look-alike instructions: mean chances, or shares of answers."""

    safety: float
    over_refusal: float
    lookalike: float

    @property
    def objective(self) -> float:
        return objective(self.safety, self.over_refusal, self.lookalike)


@dataclass(frozen=True)
class ContrastScore(RefusalRates):
    """The effect of a contrast: mean chances that answers open as refusals, and shares of greedy answers.

    Attributes:
        greedy: the objective by greedy answers, as the refusal matcher sorts them.
        degenerate: share of these that loop or cannot be read; both None where none were made.
    """

    alpha: float
    beta: float
    greedy: float | None = None
    degenerate: float | None = None

    @property
    def value(self) -> float:
        """What a contrast is chosen by; openings show nothing of what answers come to later on."""
        greedy = self.objective if self.greedy is None else self.greedy
        return (self.objective + greedy) / 2 - (self.degenerate or 0.0)


class OpeningScorer:
    """Scores system prompts by the openings of answers, never decoding an answer.

    Args:
        groups: instructions by what their refusals mean: safety, over_refusal, lookalike.
        stop: set it to have whatever is being scored raise Stopped.

    Raises:
        OutOfMemoryError.
    """

    def __init__(
        self,
        model: llama.Model,
        template: ChatTemplate,
        openings: Openings,
        groups: Groups,
        *,
        n_ctx: int,
        threads: int,
        stop: CancelToken | None = None,
    ) -> None:
        self._model = model
        self._template = template
        self._openings = openings
        self._groups = groups
        self._stop = stop or CancelToken()
        self._kept_of: Prompt | None = None
        self._kept: dict[str, Logits] = {}
        self._scorer = Scorer(model, n_streams=2, n_ctx=n_ctx, threads=threads)

    def alone(self, prompt: Prompt, most: int | None = None) -> dict[str, float]:
        """Compute the mean chance of a refusal under one prompt, by group, over at most `most` instructions of each.

        Args:
            prompt: a system prompt; or all that precedes the user's text, as messages.
        """
        found = {}
        for group, everything in self._groups.items():
            users = everything[:most]
            values = [self._openings.chance(log_softmax(rows[0])) for rows in self._logits([prompt], users)]
            found[group] = float(np.mean(values)) if values else 0.0
        return found

    def contrasted(self, safe: Prompt, adversarial: Prompt, grid: Grid, most: int | None = None) -> list[ContrastScore]:
        """Score the contrast of two prompts, for every (alpha, beta) of `grid`.

        Where `most` is given, what `safe` makes of these instructions is kept: searches ask for it with every text.
        """
        table = np.zeros((len(grid), len(GROUPS)))
        for g, group in enumerate(GROUPS):
            users = self._groups.get(group, ())[:most]
            both = self._logits([safe, adversarial], users) if most is None else self._beside(safe, adversarial, users)
            for positive, negative in both:
                for i, (alpha, beta) in enumerate(grid):
                    rows = [_contrasted(s, a, alpha, beta) for s, a in zip(positive, negative, strict=True)]
                    table[i, g] += self._openings.chance(np.stack(rows)) / len(users)
        return [ContrastScore(*map(float, (*row, *setting))) for setting, row in zip(grid, table, strict=True)]

    def close(self) -> None:
        self._scorer.close()

    def _beside(self, safe: Prompt, other: Prompt, users: Sequence[str]) -> Iterator[Logits]:
        """Compute `_logits` of both, those of `safe` once."""
        if self._kept_of is not safe:
            self._kept_of, self._kept = safe, {}
        new = [user for user in users if user not in self._kept]  # one prompt after the other: they share a cache
        for user, (logits,) in zip(new, self._logits([safe], new), strict=True):
            self._kept[user] = logits
        for user, (logits,) in zip(users, self._logits([other], users), strict=True):
            yield np.stack([self._kept[user], logits])

    def _logits(self, prompts: Sequence[Prompt], users: Sequence[str]) -> Iterator[Logits]:
        """Compute for each user's text what `Openings.probability` asks for: logits, shape (prompts, rows, n_vocab)."""
        for user in users:
            check_stop(self._stop)
            ids = [self._encode(prompt, user) for prompt in prompts]
            pieces = []
            for spine in self._openings.spines:  # what a later one shares is in the caches
                begun = [[*prompt, *spine.tokens[: spine.shared]] for prompt in ids]
                pieces += [logits.copy() for _, logits in self._scorer.logits(begun, spine.continuation)]
            yield np.concatenate(pieces, axis=1)

    def _encode(self, prompt: Prompt, user: str) -> list[int]:
        if isinstance(prompt, tuple):
            return self._template.encode([*prompt, Message("user", user)])
        if isinstance(prompt, SoftPrompt):
            return self._template.encode(
                [Message("user", user)], rows=self._model.embeddings.add(prompt.rows, prompt.digest)
            )
        return self._template.encode([Message("system", prompt), Message("user", user)])


def _contrasted(safe: Logits, adversarial: Logits, alpha: float, beta: float) -> NDArray[np.float64]:
    """Log probabilities of the contrast over the whole vocabulary: implausible tokens are at -inf."""
    ids, scores = contrast(safe, adversarial, alpha=alpha, beta=beta)
    found = np.full(len(safe), -np.inf)
    found[ids] = log_softmax(scores)
    return found
