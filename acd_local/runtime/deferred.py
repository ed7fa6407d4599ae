"""The safe stream runs ahead on its own choices; the adversarial one takes them in one batch, and checks them.

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
from acd_local.runtime.choice import Chooser, Look, Step
from acd_local.runtime.generate import Need, Strategy, StreamLogits, advance, stepwise
from acd_local.runtime.llama import Logits
from acd_local.runtime.lookup import Lookup
from acd_local.runtime.pace import Pace
from acd_local.runtime.rowcosts import LEAST, PATIENCE, RowClock, RowCosts

# The adversarial stream is this far behind at most; a batch takes 512 rows.
BEHIND = 256


@dataclass
class _Run:
    """Positions that the safe stream went ahead: what it saw there, and the tokens it went on with."""

    looks: list[Look] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    survival: float = 1.0  # how likely the contrast changes none of them
    batches: list[int] = field(default_factory=list)  # rows
    quotes: bool = False  # some tokens were drafted from the conversation


class _Draft:
    """The safe stream's own choices; the chooser, and the grammar in it, is cloned for the second of them alone."""

    def __init__(self, chooser: Chooser) -> None:
        self._chooser = chooser
        self._fork: Chooser | None = None
        self._first: Look | None = None

    def look(self, logits: Logits, position: int) -> Look:
        if self._first is not None and self._fork is None:
            self._fork = self._chooser.fork()
            self._fork.guess(self._first)
        return (self._fork or self._chooser).look(logits, position)

    def guess(self, look: Look) -> int:
        if self._fork is not None:
            return self._fork.guess(look)
        self._first = look
        return self._chooser.peek(look)


def deferred(
    first: StreamLogits,
    chooser: Chooser,
    pace: Pace,
    lookup: Lookup,
    *,
    limit: int,
    said: Sequence[int] = (),
    lead: int = 1,
    patient: bool = False,
    clock: RowClock | None = None,
) -> Strategy:
    """See `generate.stepwise`; needs streams that can forget their last tokens.

    Args:
        lookup: has seen the prompt.
        said: the answer's tokens so far; `first` is what follows them.
        lead: tokens at the beginning that are decoded stepwise.
        patient: run ahead even where too many drafts fall for it to pay.
        clock: where it is not known yet what rows cost: is told what runs and steps take.
    """
    answer = list(said)
    yield from _lead(first, chooser, min(len(said) + lead, limit), answer, clock)
    lookup.extend(answer)
    behind = len(answer) - 1  # answer tokens that the adversarial stream holds
    over = len(answer) == len(said) or chooser.ends(answer[-1])
    while not over and len(answer) < limit:
        started = time.perf_counter()
        keen = patient or pace.pays or not chooser.settings.contrasts(len(answer))
        if keen or lookup.draft([], pace.quote(lookup.chance, alone=True)):
            until = math.inf if clock is None else started + PATIENCE
            run = yield from _ahead(answer, chooser, pace, lookup, limit, keen, until)
            steps, behind = yield from _catch_up(answer, behind, run, chooser, pace)
            if clock is not None and not run.quotes:
                clock.note_run(run.batches, len(steps), time.perf_counter() - started, pace.expected)
        else:
            steps, behind = yield from _abreast(answer, behind, chooser, pace)
            if clock is not None:
                clock.note_step(time.perf_counter() - started)
        yield from steps
        said = [step.token for step in steps]
        answer += said
        lookup.extend(said)
        behind = min(behind, len(answer) - 1)  # after a change the last token is another
        over = not steps or steps[-1].ends


def _lead(first: StreamLogits, chooser: Chooser, limit: int, answer: list[int], clock: RowClock | None) -> Strategy:
    """The answer up to `limit` tokens, stepwise; they are added to `answer`."""
    strategy = stepwise(first, chooser, limit=limit, start=len(answer))
    item = next(strategy, None)
    while item is not None:
        if isinstance(item, Step):
            answer.append(item.token)
            yield item
            item = next(strategy, None)
        else:
            started, beside = time.perf_counter(), len(item) == 2
            item = advance(strategy, (yield item))
            if clock is not None and beside:
                clock.note_step(time.perf_counter() - started)


def _ahead(
    answer: Sequence[int], chooser: Chooser, pace: Pace, lookup: Lookup, limit: int, keen: bool, until: float
) -> Generator[Sequence[Need], list[Logits], _Run]:
    """Draft until a change is likely, or until every choice so far is one that the contrast cannot change.

    Args:
        keen: without drafts from the conversation too.
        until: after this time (time.perf_counter) no further than LEAST tokens.
    """
    drafting, run = _Draft(chooser), _Run()
    while True:
        position = len(answer) + len(run.tokens)
        last = run.tokens[-1] if run.tokens else answer[-1]
        most = min(limit - position, pace.costs.longest_run - len(run.tokens))
        draft = lookup.draft(run.tokens, min(most - 1, pace.quote(lookup.chance, alone=not keen)))
        if run.tokens and not (keen or draft):
            return run
        tokens = [last, *draft]
        (rows,) = yield [Need("safe", position - 1, tokens, [True] * len(tokens))]
        run.batches.append(len(tokens))
        run.quotes = run.quotes or bool(draft)
        right = 0
        for logits, drafted in zip(rows, [*draft, None], strict=True):
            try:
                look = drafting.look(logits, position + right)
            except NumericalError:
                if run.looks:  # what was said before is not lost: the next run meets the same logits
                    return run
                raise
            run.looks.append(look)
            if len(look.ids) == 0:
                return run
            token = drafting.guess(look)
            run.tokens.append(token)
            if chooser.is_open(look):
                run.survival *= 1 - pace.chance(look)
            if chooser.ends(token) or len(answer) + len(run.tokens) == limit:
                return run
            if token != drafted:
                break
            right += 1
        if draft:
            lookup.learn(len(draft), right)
        waits = any(map(chooser.needs_adversary, run.looks))
        late = len(run.tokens) >= LEAST and time.perf_counter() > until
        if late or not waits or not pace.goes_on(run.survival, len(run.tokens)):
            return run


def _catch_up(
    answer: Sequence[int], behind: int, run: _Run, chooser: Chooser, pace: Pace
) -> Generator[Sequence[Need], list[Logits], tuple[list[Step], int]]:
    """Let the adversarial stream see the run, as far as it can change a choice; the choices, and what it holds then."""
    wanted = [chooser.needs_adversary(look) for look in run.looks]
    rows: list[Logits | None] = [None] * len(wanted)
    if True in wanted:
        last = len(wanted) - wanted[::-1].index(True)
        # The logits of a position come from the token before it.
        end = len(answer) + last - 1
        pending = [*answer, *run.tokens][behind:end]
        asked = [False] * (len(pending) - last) + wanted[:last]
        found, batches = yield from _see(behind, pending, asked, pace.costs)
        run.batches += batches
        behind, logits = end, iter(found)
        rows = [next(logits) if needed else None for needed in wanted]
    elif len(answer) - behind > BEHIND and chooser.settings.contrasts(len(answer)):
        pending = list(answer[behind:-1])
        yield [Need("adversarial", behind, pending, [False] * len(pending))]
        behind = len(answer) - 1
    steps = _check(run, rows, chooser, pace)
    if not run.quotes:  # what quotations cost says nothing of other runs
        pace.spend(run.batches, len(steps))
    return steps, behind


def _see(
    start: int, tokens: Sequence[int], wanted: Sequence[bool], costs: RowCosts
) -> Generator[Sequence[Need], list[Logits], tuple[list[Logits], list[int]]]:
    """Decode the adversarial stream's rows together, or one by one where that costs less; logits, and batch sizes."""
    if costs.rows(len(tokens)) <= len(tokens):
        (rows,) = yield [Need("adversarial", start, tokens, wanted)]
        return list(rows), [len(tokens)]
    found: list[Logits] = []
    for i, token in enumerate(tokens):
        (rows,) = yield [Need("adversarial", start + i, [token], wanted[i : i + 1])]
        found.extend(rows)
    return found, [1] * len(tokens)


def _abreast(
    answer: Sequence[int], behind: int, chooser: Chooser, pace: Pace
) -> Generator[Sequence[Need], list[Logits], tuple[list[Step], int]]:
    """One position side by side, as `stepwise` does."""
    needs = [Need("safe", len(answer) - 1, answer[-1:]), Need("adversarial", behind, answer[behind:])]
    safe, adversarial = yield needs
    look = chooser.look(safe[0], len(answer))
    step = chooser.choose(look, adversarial[0])
    if step is None:
        return [], len(answer)
    pace.beside(look if chooser.is_open(look) else None, changed=step.token != step.safe_choice)
    return [step], len(answer)


def _check(run: _Run, rows: Sequence[Logits | None], chooser: Chooser, pace: Pace) -> list[Step]:
    """The run's choices up to the first that is another than was drafted."""
    steps: list[Step] = []
    for look, token, logits in zip(run.looks, [*run.tokens, None], rows, strict=False):
        try:
            step = chooser.choose(look, logits)
        except NumericalError:
            if steps:  # as above
                break
            raise
        if step is None:
            break
        steps.append(step)
        if chooser.is_open(look):
            pace.learn(look, changed=step.token != token)
        if step.token != token:
            break
    return steps
