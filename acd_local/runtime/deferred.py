"""Lets the safe stream run ahead on its own choices; the adversarial one takes them in one batch, and checks them.

Rows are cheaper together. At the first choice that the contrast changes, both streams go back and on from the right
token. The text is the stepwise loop's: a draft only guesses which logits will be needed (as in speculative decoding,
Leviathan et al. 2023, but with the same draw on both sides instead of rejection sampling).
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from acd_local.errors import NumericalError
from acd_local.runtime.choice import Chooser, SafeCandidates, TokenChoice
from acd_local.runtime.draft_policy import DraftPolicy
from acd_local.runtime.llama import Logits
from acd_local.runtime.lookup import Lookup
from acd_local.runtime.rowcosts import MIN_DRAFT, PATIENCE, RowClock
from acd_local.runtime.strategy import Strategy, StreamLogits, StreamRequest, advance, stepwise

# The adversarial stream is this far behind at most; a batch takes 512 rows.
BEHIND = 256


@dataclass
class _Run:
    """Positions that the safe stream went ahead: what it saw there, and the tokens it went on with."""

    seen: list[SafeCandidates] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    survival: float = 1.0  # how likely the contrast changes none of them
    batches: list[int] = field(default_factory=list)  # rows
    quotes: bool = False  # some tokens were drafted from the conversation


class _Draft:
    """The safe stream's own choices; the chooser, and the grammar in it, is cloned for the second of them alone."""

    def __init__(self, chooser: Chooser) -> None:
        self._chooser = chooser
        self._fork: Chooser | None = None
        self._first: SafeCandidates | None = None

    def candidates(self, logits: Logits, position: int) -> SafeCandidates:
        if self._first is not None and self._fork is None:
            self._fork = self._chooser.fork()
            self._fork.draft_token(self._first)
        return (self._fork or self._chooser).candidates(logits, position)

    def draft_token(self, candidates: SafeCandidates) -> int:
        if self._fork is not None:
            return self._fork.draft_token(candidates)
        self._first = candidates
        return self._chooser.peek_token(candidates)


def deferred(
    first: StreamLogits,
    chooser: Chooser,
    policy: DraftPolicy,
    lookup: Lookup,
    *,
    limit: int,
    said: Sequence[int] = (),
    lead: int = 1,
    always_ahead: bool = False,
    clock: RowClock | None = None,
) -> Strategy:
    """Let the safe stream run ahead; see `strategy.stepwise`. Streams must be able to forget their last tokens.

    Args:
        lookup: has seen the prompt.
        said: the answer's tokens so far; `first` is what follows them.
        lead: tokens at the beginning that are decoded stepwise.
        always_ahead: run ahead even where too many drafts fall for it to pay.
        clock: where it is not known yet what rows cost: is told what runs and single positions take.
    """
    answer = list(said)
    yield from _lead(first, chooser, min(len(said) + lead, limit), answer, clock)
    if len(answer) > len(said) and not chooser.ends(answer[-1]):
        lookup.extend(answer)
        yield from _Deferral(answer, len(answer) - 1, limit, chooser, policy, lookup, clock).rest(always_ahead)


def _lead(first: StreamLogits, chooser: Chooser, limit: int, answer: list[int], clock: RowClock | None) -> Strategy:
    """Choose up to `limit` tokens stepwise; they are added to `answer`."""
    strategy = stepwise(first, chooser, limit=limit, start=len(answer))
    event = next(strategy, None)
    while event is not None:
        if isinstance(event, TokenChoice):
            answer.append(event.token)
            yield event
            event = next(strategy, None)
        else:
            started, beside = time.perf_counter(), len(event) == 2
            event = advance(strategy, (yield event))
            if clock is not None and beside:
                clock.note_step(time.perf_counter() - started)


@dataclass
class _Deferral:
    """An answer in the making, of which the safe stream holds all but the last token, the adversarial one less.

    Attributes:
        answer: its tokens so far, at least one. behind: how many of them the adversarial stream holds.
        limit: tokens at most.
    """

    answer: list[int]
    behind: int
    limit: int
    chooser: Chooser
    policy: DraftPolicy
    lookup: Lookup
    clock: RowClock | None

    def rest(self, always_ahead: bool) -> Strategy:
        """Choose the rest of the answer."""
        answer, policy = self.answer, self.policy
        choices: list[TokenChoice] = []
        while len(answer) < self.limit:
            started = time.perf_counter()
            alone = not (always_ahead or policy.pays) and self.chooser.settings.contrasts(len(answer))
            if alone and not self.lookup.draft([], policy.quote(self.lookup.chance, alone=True)):
                choices = yield from self._side_by_side()
                if self.clock is not None:
                    self.clock.note_step(time.perf_counter() - started)
            else:
                run = yield from self._run_ahead(alone, math.inf if self.clock is None else started + PATIENCE)
                choices = yield from self._catch_up(run)
                if self.clock is not None and not run.quotes:
                    self.clock.note_run(run.batches, len(choices), time.perf_counter() - started, policy.expected)
            yield from choices
            if not choices:
                return
            said = [choice.token for choice in choices]
            answer += said
            self.lookup.extend(said)
            self.behind = min(self.behind, len(answer) - 1)  # after a change the last token is another
            if choices[-1].ends:
                return

    def _side_by_side(self) -> Generator[Sequence[StreamRequest], list[Logits], list[TokenChoice]]:
        """Decide one position as `stepwise` does."""
        answer, behind = self.answer, self.behind
        safe, adversarial = yield [
            StreamRequest("safe", len(answer) - 1, answer[-1:]),
            StreamRequest("adversarial", behind, answer[behind:]),
        ]
        self.behind = len(answer)
        candidates = self.chooser.candidates(safe[0], len(answer))
        choice = self.chooser.choose(candidates, adversarial[0])
        if choice is None:
            return []
        is_open = self.chooser.is_open(candidates)
        self.policy.beside(candidates if is_open else None, changed=choice.token != choice.safe_choice)
        return [choice]

    def _run_ahead(self, quoting: bool, until: float) -> Generator[Sequence[StreamRequest], list[Logits], _Run]:
        """Draft until a change is likely, or until every choice so far is one that the contrast cannot change.

        Args:
            quoting: only as long as there are drafts from the conversation.
            until: after this time (time.perf_counter) no further than MIN_DRAFT tokens.
        """
        drafting, run, policy, lookup = _Draft(self.chooser), _Run(), self.policy, self.lookup
        while True:
            position = len(self.answer) + len(run.tokens)
            last = run.tokens[-1] if run.tokens else self.answer[-1]
            most = min(self.limit - position, policy.costs.longest_run - len(run.tokens))
            draft = lookup.draft(run.tokens, min(most - 1, policy.quote(lookup.chance, alone=quoting)))
            if run.tokens and quoting and not draft:
                return run
            tokens = [last, *draft]
            (rows,) = yield [StreamRequest("safe", position - 1, tokens, [True] * len(tokens))]
            run.batches.append(len(tokens))
            run.quotes = run.quotes or bool(draft)
            right = self._follow(run, drafting, rows, draft)
            if right is None:
                return run
            if draft:
                lookup.learn(len(draft), right)
            waits = any(map(self.chooser.needs_adversary, run.seen))
            late = len(run.tokens) >= MIN_DRAFT and time.perf_counter() > until
            if late or not waits or not policy.goes_on(run.survival, len(run.tokens)):
                return run

    def _follow(self, run: _Run, drafting: _Draft, rows: Logits, draft: Sequence[int]) -> int | None:
        """Go on with the safe stream's own choices; how many tokens of the draft were right, None: the run ends."""
        for right, (logits, drafted) in enumerate(zip(rows, [*draft, None], strict=True)):
            position = len(self.answer) + len(run.tokens)
            try:
                candidates = drafting.candidates(logits, position)
            except NumericalError:
                if run.seen:  # what was said before is not lost: the next run meets the same logits
                    return None
                raise
            run.seen.append(candidates)
            if len(candidates.ids) == 0:
                return None
            token = drafting.draft_token(candidates)
            run.tokens.append(token)
            if self.chooser.is_open(candidates):
                run.survival *= 1 - self.policy.chance(candidates)
            if self.chooser.ends(token) or position + 1 == self.limit:
                return None
            if token != drafted:
                return right
        return len(draft)

    def _catch_up(self, run: _Run) -> Generator[Sequence[StreamRequest], list[Logits], list[TokenChoice]]:
        """Let the adversarial stream see the run, as far as it can change a choice; return the choices."""
        answer, behind = self.answer, self.behind
        wanted = [self.chooser.needs_adversary(candidates) for candidates in run.seen]
        rows: list[Logits | None] = [None] * len(wanted)
        if True in wanted:
            last = len(wanted) - wanted[::-1].index(True)
            # The logits of a position come from the token before it.
            self.behind = len(answer) + last - 1
            pending = [*answer, *run.tokens][behind : self.behind]
            found = yield from self._see(behind, pending, [False] * (len(pending) - last) + wanted[:last], run)
            logits = iter(found)
            rows = [next(logits) if needed else None for needed in wanted]
        elif len(answer) - behind > BEHIND and self.chooser.settings.contrasts(len(answer)):
            self.behind = len(answer) - 1
            pending = answer[behind:-1]
            yield [StreamRequest("adversarial", behind, pending, [False] * len(pending))]
        choices = self._check(run, rows)
        if not run.quotes:  # what quotations cost says nothing of other runs
            self.policy.spend(run.batches, len(choices))
        return choices

    def _see(
        self, start: int, tokens: Sequence[int], wanted: Sequence[bool], run: _Run
    ) -> Generator[Sequence[StreamRequest], list[Logits], list[Logits]]:
        """Decode the adversarial stream's rows together, or one by one where that costs less; the wanted logits."""
        if self.policy.costs.rows(len(tokens)) <= len(tokens):
            run.batches.append(len(tokens))
            (rows,) = yield [StreamRequest("adversarial", start, tokens, wanted)]
            return list(rows)
        found: list[Logits] = []
        for i, token in enumerate(tokens):
            run.batches.append(1)
            (rows,) = yield [StreamRequest("adversarial", start + i, [token], wanted[i : i + 1])]
            found.extend(rows)
        return found

    def _check(self, run: _Run, rows: Sequence[Logits | None]) -> list[TokenChoice]:
        """Choose the run's tokens up to the first that is another than was drafted."""
        choices: list[TokenChoice] = []
        for candidates, token, logits in zip(run.seen, [*run.tokens, None], rows, strict=False):
            try:
                choice = self.chooser.choose(candidates, logits)
            except NumericalError:
                if choices:  # as above
                    break
                raise
            if choice is None:
                break
            choices.append(choice)
            if self.chooser.is_open(candidates):
                self.policy.learn(candidates, changed=choice.token != token)
            if choice.token != token:
                break
        return choices
