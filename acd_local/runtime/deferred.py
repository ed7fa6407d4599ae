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
from acd_local.runtime.rowcosts import MIN_DRAFT, PATIENCE, RowClock, RowCosts
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
    """See `strategy.stepwise`; needs streams that can forget their last tokens.

    Args:
        lookup: has seen the prompt.
        said: the answer's tokens so far; `first` is what follows them.
        lead: tokens at the beginning that are decoded stepwise.
        always_ahead: run ahead even where too many drafts fall for it to pay.
        clock: where it is not known yet what rows cost: is told what runs and single positions take.
    """
    answer = list(said)
    yield from _lead(first, chooser, min(len(said) + lead, limit), answer, clock)
    lookup.extend(answer)
    behind = len(answer) - 1  # answer tokens that the adversarial stream holds
    over = len(answer) == len(said) or chooser.ends(answer[-1])
    while not over and len(answer) < limit:
        started = time.perf_counter()
        runs_ahead = always_ahead or policy.pays or not chooser.settings.contrasts(len(answer))
        if runs_ahead or lookup.draft([], policy.quote(lookup.chance, alone=True)):
            until = math.inf if clock is None else started + PATIENCE
            run = yield from _draft_run(answer, chooser, policy, lookup, limit, runs_ahead, until)
            choices, behind = yield from _catch_up(answer, behind, run, chooser, policy)
            if clock is not None and not run.quotes:
                clock.note_run(run.batches, len(choices), time.perf_counter() - started, policy.expected)
        else:
            choices, behind = yield from _side_by_side(answer, behind, chooser, policy)
            if clock is not None:
                clock.note_step(time.perf_counter() - started)
        yield from choices
        said = [choice.token for choice in choices]
        answer += said
        lookup.extend(said)
        behind = min(behind, len(answer) - 1)  # after a change the last token is another
        over = not choices or choices[-1].ends


def _lead(first: StreamLogits, chooser: Chooser, limit: int, answer: list[int], clock: RowClock | None) -> Strategy:
    """The answer up to `limit` tokens, stepwise; they are added to `answer`."""
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


def _draft_run(
    answer: Sequence[int],
    chooser: Chooser,
    policy: DraftPolicy,
    lookup: Lookup,
    limit: int,
    runs_ahead: bool,
    until: float,
) -> Generator[Sequence[StreamRequest], list[Logits], _Run]:
    """Draft until a change is likely, or until every choice so far is one that the contrast cannot change.

    Args:
        runs_ahead: without drafts from the conversation too.
        until: after this time (time.perf_counter) no further than MIN_DRAFT tokens.
    """
    drafting, run = _Draft(chooser), _Run()
    while True:
        position = len(answer) + len(run.tokens)
        last = run.tokens[-1] if run.tokens else answer[-1]
        most = min(limit - position, policy.costs.longest_run - len(run.tokens))
        draft = lookup.draft(run.tokens, min(most - 1, policy.quote(lookup.chance, alone=not runs_ahead)))
        if run.tokens and not (runs_ahead or draft):
            return run
        tokens = [last, *draft]
        (rows,) = yield [StreamRequest("safe", position - 1, tokens, [True] * len(tokens))]
        run.batches.append(len(tokens))
        run.quotes = run.quotes or bool(draft)
        right = 0
        for logits, drafted in zip(rows, [*draft, None], strict=True):
            try:
                candidates = drafting.candidates(logits, position + right)
            except NumericalError:
                if run.seen:  # what was said before is not lost: the next run meets the same logits
                    return run
                raise
            run.seen.append(candidates)
            if len(candidates.ids) == 0:
                return run
            token = drafting.draft_token(candidates)
            run.tokens.append(token)
            if chooser.is_open(candidates):
                run.survival *= 1 - policy.chance(candidates)
            if chooser.ends(token) or len(answer) + len(run.tokens) == limit:
                return run
            if token != drafted:
                break
            right += 1
        if draft:
            lookup.learn(len(draft), right)
        waits = any(map(chooser.needs_adversary, run.seen))
        late = len(run.tokens) >= MIN_DRAFT and time.perf_counter() > until
        if late or not waits or not policy.goes_on(run.survival, len(run.tokens)):
            return run


def _catch_up(
    answer: Sequence[int], behind: int, run: _Run, chooser: Chooser, policy: DraftPolicy
) -> Generator[Sequence[StreamRequest], list[Logits], tuple[list[TokenChoice], int]]:
    """Let the adversarial stream see the run, as far as it can change a choice; the choices, and what it holds then."""
    wanted = [chooser.needs_adversary(candidates) for candidates in run.seen]
    rows: list[Logits | None] = [None] * len(wanted)
    if True in wanted:
        last = len(wanted) - wanted[::-1].index(True)
        # The logits of a position come from the token before it.
        end = len(answer) + last - 1
        pending = [*answer, *run.tokens][behind:end]
        asked = [False] * (len(pending) - last) + wanted[:last]
        found, batches = yield from _decode_adversarial(behind, pending, asked, policy.costs)
        run.batches += batches
        behind, logits = end, iter(found)
        rows = [next(logits) if needed else None for needed in wanted]
    elif len(answer) - behind > BEHIND and chooser.settings.contrasts(len(answer)):
        pending = list(answer[behind:-1])
        yield [StreamRequest("adversarial", behind, pending, [False] * len(pending))]
        behind = len(answer) - 1
    choices = _check(run, rows, chooser, policy)
    if not run.quotes:  # what quotations cost says nothing of other runs
        policy.spend(run.batches, len(choices))
    return choices, behind


def _decode_adversarial(
    start: int, tokens: Sequence[int], wanted: Sequence[bool], costs: RowCosts
) -> Generator[Sequence[StreamRequest], list[Logits], tuple[list[Logits], list[int]]]:
    """Decode the adversarial stream's rows together, or one by one where that costs less; logits, and batch sizes."""
    if costs.rows(len(tokens)) <= len(tokens):
        (rows,) = yield [StreamRequest("adversarial", start, tokens, wanted)]
        return list(rows), [len(tokens)]
    found: list[Logits] = []
    for i, token in enumerate(tokens):
        (rows,) = yield [StreamRequest("adversarial", start + i, [token], wanted[i : i + 1])]
        found.extend(rows)
    return found, [1] * len(tokens)


def _side_by_side(
    answer: Sequence[int], behind: int, chooser: Chooser, policy: DraftPolicy
) -> Generator[Sequence[StreamRequest], list[Logits], tuple[list[TokenChoice], int]]:
    """One position side by side, as `stepwise` does."""
    requests = [
        StreamRequest("safe", len(answer) - 1, answer[-1:]),
        StreamRequest("adversarial", behind, answer[behind:]),
    ]
    safe, adversarial = yield requests
    candidates = chooser.candidates(safe[0], len(answer))
    choice = chooser.choose(candidates, adversarial[0])
    if choice is None:
        return [], len(answer)
    policy.beside(candidates if chooser.is_open(candidates) else None, changed=choice.token != choice.safe_choice)
    return [choice], len(answer)


def _check(run: _Run, rows: Sequence[Logits | None], chooser: Chooser, policy: DraftPolicy) -> list[TokenChoice]:
    """The run's choices up to the first that is another than was drafted."""
    choices: list[TokenChoice] = []
    for candidates, token, logits in zip(run.seen, [*run.tokens, None], rows, strict=False):
        try:
            choice = chooser.choose(candidates, logits)
        except NumericalError:
            if choices:  # as above
                break
            raise
        if choice is None:
            break
        choices.append(choice)
        if chooser.is_open(candidates):
            policy.learn(candidates, changed=choice.token != token)
        if choice.token != token:
            break
    return choices
