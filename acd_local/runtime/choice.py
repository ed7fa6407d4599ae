"""Chooses what is said at one position: legal tokens, the contrast over the plausible ones, the draw.

Whatever is decoded when asks here, so that drafts and batches never change what is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from acd_local.runtime.contrast import Divergence, apply_contrast, check_stream, log_softmax, logprob, plausible
from acd_local.runtime.expert import led
from acd_local.runtime.llama import Logits, TokenIds, Vocab
from acd_local.runtime.sampling import Guard, TokenSampler


@dataclass(frozen=True)
class ContrastSettings:
    """The contrast's numbers for one answer, see `contrast.contrast`.

    `begin`: the answer token from which on the contrast is taken. `window`: for so many tokens; None: for all of them.
    `expert`: the second stream is an expert, which the first is led by instead, see `expert.led`.
    """

    alpha: float
    beta: float
    raw: bool = False
    window: int | None = None
    begin: int = 0
    expert: bool = False

    def contrasts(self, position: int) -> bool:
        """Tell whether the contrast is taken at answer position `position` (from 0)."""
        end = math.inf if self.window is None else self.begin + self.window
        return self.alpha > 0 and self.begin <= position < end

    def same_until(self, position: int, limit: int) -> int:
        """Return the first position after this one where `contrasts` tells something else, at most `limit`."""
        borders = (self.begin, limit if self.window is None else self.begin + self.window)
        return min([limit, *(border for border in borders if self.alpha > 0 and border > position)])


NO_CONTRAST = ContrastSettings(0.0, 0.0)
NEAR = (8.0, 12.0, 16.0)  # logits below the best, down to which a draw's candidates are looked for, in turn


@dataclass(frozen=True)
class TokenTrace:
    """One token as the safe stream saw it: its natural-log probability and rank (1 = first).

    Never as the adversarial one did: with alpha, both would give away its distribution.
    """

    safe_logprob: float
    safe_rank: int


@dataclass(frozen=True)
class TokenChoice:
    """One choice of the loop.

    Attributes:
        token: what was sampled.
        safe_choice: what the same draw gives on the safe stream's scores alone.
        divergence: KL(S || A) in nats at this position, where asked for and there is a second stream.
        ends: the token ends the answer and adds no text.
        trace: filled where asked for.
        compared: whether the adversarial stream's logits were taken here.
        logprobs: (token, natural-log probability) of `token`, then of the likeliest, among the contrasted candidates
            as they came to the sampler; None where not asked for.
    """

    token: int
    safe_choice: int
    divergence: float | None
    ends: bool
    trace: TokenTrace | None
    compared: bool
    logprobs: tuple[tuple[int, float], ...] | None = None


class SpecialTokens:
    """The tokens of a vocabulary that end an answer, and those that may never be said.

    The latter are control tokens that end nothing, and those the model file itself suppresses.

    Args:
        markers: tokens that mark structure though they may be said. Under a grammar or a schema, whose texts others
            write, they may not: they are spelled.

    Attributes:
        eog: ids that end an answer. banned, banned_in_form: ids that may not be said, without and under a grammar.
        legal: whether a token may be said without one, shape (n_vocab,).
    """

    def __init__(self, vocab: Vocab, control_mask: int, markers: Collection[int] = ()) -> None:
        self.eog = vocab.eog_tokens()
        control = {token.id for token in vocab.special.values() if token.attr & control_mask and not token.ends}
        banned = control | vocab.suppressed_tokens()
        self.banned = np.array(sorted(banned), np.int32)
        self.banned_in_form = np.array(sorted(banned | set(markers) - set(self.eog)), np.int32)
        self.legal = np.ones(vocab.n_tokens, np.bool_)
        self.legal[self.banned] = False


class Chooser:
    """Chooses an answer's tokens in order; remembers what samplers and a grammar remember.

    Args:
        divergence, trace: fill these fields of the choices; each takes a few passes over the vocabulary.
        logprobs: fill that field, with so many of the likeliest tokens; None: do not. Never with `trace`: of one token
            the probabilities in both would tell the adversarial stream's.
    """

    def __init__(
        self,
        sampler: TokenSampler,
        special: SpecialTokens,
        settings: ContrastSettings,
        *,
        grammar: Guard | None = None,
        divergence: bool = False,
        trace: bool = False,
        logprobs: int | None = None,
    ) -> None:
        assert not (trace and logprobs is not None)
        self.settings = settings
        self._sampler = sampler
        self._special = special
        self._grammar = grammar
        self._divergence = divergence
        self._trace = trace
        self._logprobs = logprobs
        self._measure: Divergence | None = None

    def choose(self, safe: Logits, adversarial: Logits | None, position: int) -> TokenChoice | None:
        """Choose the token of the next position; None where there is nothing to say.

        Args:
            safe: the safe stream's logits, shape (n_vocab,); the banned tokens' may be set to -inf in place.
            adversarial: the adversarial stream's, or an expert's, of the same shape; None where no contrast is taken.

        Raises:
            NumericalError: a stream produced NaN.
        """
        kept = safe.copy() if self._trace or self._divergence else None
        safe_ids, safe_scores = self._plausible(safe, position)
        if len(safe_ids) == 0:
            return None
        ids, scores, safe_choice, s = safe_ids, safe_scores, None, self.settings
        if adversarial is not None:
            check_stream(adversarial, "expert" if s.expert else "adversarial")
            if s.expert:
                ids, scores = led(ids, scores, adversarial, alpha=s.alpha)
            else:
                ids, scores = apply_contrast(ids, scores, adversarial, alpha=s.alpha, raw=s.raw)
            safe_choice = self._sampler.draw(safe_ids, safe_scores, position, dry_run=True)
        token = self._sampler.draw(ids, scores, position)
        self._accept(token)
        return TokenChoice(
            token=token,
            safe_choice=token if safe_choice is None else safe_choice,
            divergence=self._kl(kept, adversarial),
            ends=token in self._special.eog,
            trace=_trace(token, kept) if self._trace and kept is not None else None,
            compared=adversarial is not None,
            logprobs=None if self._logprobs is None else _likely(token, ids, scores, self._logprobs),
        )

    def _plausible(self, safe: Logits, position: int) -> tuple[TokenIds, Logits]:
        """Find the plausible legal tokens, ascending, and their logits, both of shape (k,).

        k is 0 where the grammar is complete and the vocabulary has no token to say so.
        """
        if self._needs_best_alone(position):
            return self._best(safe)
        top = check_stream(safe, "safe")
        beta = 1.0 if self._takes_best(position) else self.settings.beta
        if self._grammar is None and (found := self._near_the_top(safe, top, beta, position)) is not None:
            return found
        # Control tokens that do not end the answer are never said; a grammar narrows further.
        safe[self._special.banned if self._grammar is None else self._special.banned_in_form] = -np.inf
        return plausible(safe if self._grammar is None else self._grammar.restrict(safe, beta), beta)

    def _near_the_top(self, safe: Logits, top: float, beta: float, position: int) -> tuple[TokenIds, Logits] | None:
        """Find the plausible tokens without a grammar, by few looks at the vocabulary; None where these do not do.

        Where every token is plausible, those that a draw looks at are enough.
        """
        most, depths = 1, (-math.log(beta),) if beta > 0 else NEAR
        if beta == 0:
            if self._sampler.most is None or self._logprobs is not None or self.settings.contrasts(position):
                return None
            most = self._sampler.most
        for depth in depths:
            near = safe >= np.float32(top - depth)
            if most > 1 and np.count_nonzero(near) < most:
                continue
            ids = near.nonzero()[0].astype(np.int32)
            if not (legal := self._special.legal[ids]).all():
                ids = ids[legal]
            scores = safe[ids]
            if len(ids) >= most and scores.max() == top:
                return ids, scores
        return None

    def _takes_best(self, position: int) -> bool:
        """Tell whether the safe stream's best token is the choice, so that no other need be looked at."""
        return self._sampler.takes_best and self._logprobs is None and not self.settings.contrasts(position)

    def _needs_best_alone(self, position: int) -> bool:
        looked_at = self._grammar is not None or self._trace or self._divergence
        return self._takes_best(position) and not looked_at

    def _best(self, safe: Logits) -> tuple[TokenIds, Logits]:
        """Find the best token that may be said in one pass, which plain greedy answers spend most of their time on."""
        best = int(safe.argmax())  # NaN counts as the largest
        if not safe[best] < np.inf:
            check_stream(safe, "safe")
        if not self._special.legal[best]:
            safe[self._special.banned] = -np.inf
            best = int(safe.argmax())
        ids = np.array([best] if safe[best] > -np.inf else [], np.int32)
        return ids, safe[ids]

    def _accept(self, token: int) -> None:
        self._sampler.accept(token)
        if self._grammar is not None and token not in self._special.eog:
            self._grammar.accept(token)

    def _kl(self, safe: Logits | None, adversarial: Logits | None) -> float | None:
        if not self._divergence or adversarial is None or safe is None:
            return None
        if self._measure is None:
            self._measure = Divergence(len(adversarial))
        return self._measure(safe, adversarial)


def _trace(token: int, safe: Logits) -> TokenTrace:
    return TokenTrace(safe_logprob=logprob(safe, token), safe_rank=1 + int((safe > safe[token]).sum()))


def _likely(token: int, ids: TokenIds, scores: Logits, top: int) -> tuple[tuple[int, float], ...]:
    """`token` and its log probability among the candidates, then the likeliest ones and theirs."""
    logprobs = log_softmax(scores)
    best = np.argsort(-logprobs, kind="stable")[:top]
    chosen = int(np.flatnonzero(ids == token)[0])
    return tuple((int(ids[i]), float(logprobs[i])) for i in (chosen, *best))
