"""Makes several answers at once: continuous batching of one engine's conversations.

Every round decodes the next token of all running answers in one llama_decode and lets each go on with its logits; an
answer that ends makes room for the next. A long prompt is decoded a batch per round, so that the others go on
meanwhile. What an answer says does not depend on its neighbours but for near-ties: llama.cpp's logits differ slightly
with the shape of a batch. Where there is room for one answer only, it is decoded as if it were alone, drafts included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar, cast

from acd_local.answers import Answer
from acd_local.errors import EngineBusyError, UsageError
from acd_local.generation import Answerer, AnswerStream, Generation, StepEvent, Steps, abort
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.llama import BATCH_ROWS, DecodeAborted
from acd_local.runtime.speculative import advance
from acd_local.runtime.streams import DecodeBatch, first_part

Task = TypeVar("Task", bound=Hashable)


@dataclass(frozen=True)
class Event:
    """Something that happened to one answer.

    Attributes:
        key: what `BatchRunner.add` was given.
        what: a piece of text; the finished answer, or the error that ended it (nothing comes after these two).
        prompt_seconds, answer_seconds: of an ended answer, its part of the rounds it took part in, by its share of
            their rows: these add up to the time spent, unlike `Answer.timings`, which say how long somebody waited.
    """

    key: Hashable
    what: str | Answer | Exception
    prompt_seconds: float = 0.0
    answer_seconds: float = 0.0


@dataclass
class _Member:
    key: Hashable
    work: Generation
    steps: Steps
    rows: DecodeBatch = ()
    prompt_seconds: float = 0.0
    answer_seconds: float = 0.0
    answering: bool = False

    @property
    def long(self) -> bool:
        """Whether more than a token per stream is to be decoded: a prompt, or a run of a single answer."""
        return any(len(request.tokens) > 1 for request in self.rows)

    def go_on(self, whole: Sequence[Sequence[int]], started: float, decoded: int = 0) -> None:
        """Expect what is left of the rows of a prompt.

        Args:
            whole: what the caches are to hold in the end.
            started: when the decoding of these rows began.
            decoded: rows that were decoded to the end.
        """
        self.rows = [
            request._replace(tokens=tokens[len(request.cache.tokens) :])
            for request, tokens in zip(self.rows, whole, strict=True)
        ]
        if self.work.meter is not None:
            self.work.meter.pause(decoded)
        self.spend(time.perf_counter() - started)

    def spend(self, seconds: float) -> None:
        """Count time for the prompt until its logits were there, for the answer from then on."""
        if self.answering:
            self.answer_seconds += seconds
        else:
            self.prompt_seconds += seconds


class BatchRunner:
    """Runs up to `engine`'s number of conversations together. To be used from one thread, which holds their slots."""

    def __init__(self, engine: Answerer) -> None:
        self._decoder = engine.decoder
        self._capacity = self._decoder.conversations
        self._members: list[_Member] = []
        self._new: list[_Member] = []

    def __len__(self) -> int:
        """Answers that have not ended."""
        return len(self._members) + len(self._new)

    @property
    def room(self) -> int:
        """How many answers may be added now."""
        return self._capacity - len(self)

    def add(self, key: Hashable, stream: AnswerStream) -> None:
        """Take over an answer that `Engine.generate` gave and nobody has begun to read.

        Raises:
            EngineBusyError: there is no room.
            UsageError: the answer is another engine's, or has begun.
        """
        work = stream.generation
        if work.decoder is not self._decoder or stream.begun:
            raise UsageError("a batch takes new answers of its own engine")
        if self.room <= 0:
            raise EngineBusyError(f"this batch holds {self._capacity} answers already: load with more conversations")
        self._new.append(_Member(key, work, work.steps(beside=self._beside if self._capacity > 1 else None)))

    def step(self, *, resting: Container[Hashable] = ()) -> list[Event]:
        """Decode one round: what every running answer needs next, and one batch of the prompts of new ones.

        Prompts are decoded in the order in which they came, each in the batches in which it would be alone. In split
        layouts the others wait for a whole prompt.

        Args:
            resting: keys of answers that are left as they are.
        """
        events: list[Event] = []
        # While others wait for their next token, a slot that another thread holds is not waited for.
        while self._new and (not self._members or self._decoder.has_free_slot):
            member = self._new.pop(0)
            self._members.append(member)
            self._resume(member, lambda steps: next(steps, None), events)
        for member in [m for m in self._members if m.work.cancel.is_set]:
            self._resume(member, lambda steps: abort(steps, DecodeAborted()), events)
        if events:
            return events  # a gate's reading may have decoded a prompt: its first word does not wait for the next ones
        members = [member for member in self._members if member.key not in resting]
        decoded = 0
        for member in [member for member in members if member.long]:
            part = first_part(member.rows) if len(members) > 1 else None
            rows = sum(len(request.tokens) for request in part or member.rows)
            if decoded and decoded + rows > BATCH_ROWS:
                break
            decoded += rows
            self._try_round([member], events, part)
        # An answer whose prompt is there takes part at once: without it the others' batch would be cut, see `streams`.
        self._try_round([member for member in members if member in self._members and not member.long], events)
        return events

    def close(self) -> None:
        """Drop all answers where they are."""
        members, self._members, self._new = self._members + self._new, [], []
        for member in members:
            member.steps.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _try_round(self, members: list[_Member], events: list[Event], part: DecodeBatch | None = None) -> None:
        """Decode the rows of some members together and let them go on.

        Args:
            part: of a single member's rows, all that is decoded of them now.
        """
        if not members:
            return
        try:
            with self._decoder.open():
                self._round(members, events, part)
        except Exception as error:  # of the decode itself: nobody in it can go on
            for member in members:
                self._end(member, error, events)

    def _round(self, members: list[_Member], events: list[Event], part: DecodeBatch | None) -> None:
        started = time.perf_counter()
        rows = [row for member in members for row in member.rows]
        cancels = self._cancels(members)
        whole = [[*request.cache.tokens, *request.tokens] for request in rows] if cancels else []
        try:
            # Single rows are short: a cancel waits for them. A prompt is decoded alone, so that it can be cancelled,
            # and because llama.cpp cuts a batch of sequences with different numbers of rows into small pieces.
            meter = members[0].work.meter if len(members) == 1 else None
            logits = self._decoder.extend(part or rows, cancels, meter)
            if part is not None:
                members[0].go_on(whole, started, sum(len(request.tokens) for request in part))
                return
        except DecodeAborted:
            if any(c.is_set for c in cancels) and not members[0].work.cancel.is_set:
                # Another answer's cancel: the prompt goes on in the next step, in the same batches.
                members[0].go_on(whole, started)
                return
            for member in members:
                self._resume(member, lambda steps: abort(steps, DecodeAborted()), events)
            return
        share = (time.perf_counter() - started) / max(1, sum(len(request.tokens) for request in rows))
        at = 0
        for member in members:
            mine = logits[at : at + len(member.rows)]
            at += len(mine)
            member.spend(share * sum(len(request.tokens) for request in member.rows))
            member.answering = member.answering or bool(mine)
            self._resume(member, lambda steps, mine=mine: advance(steps, mine), events)  # type: ignore[misc]

    def _beside(self) -> list[CancelToken]:
        return [member.work.cancel for member in self._members]

    def _cancels(self, members: list[_Member]) -> list[CancelToken]:
        """What stops the decoding: of a prompt its own cancel, and any answer's where it can go on afterwards."""
        if not any(member.long for member in members):
            return []
        return [m.work.cancel for m in (self._members if self._decoder.resumes_prompts else members)]

    def _resume(self, member: _Member, how: Callable[[Steps], StepEvent | None], events: list[Event]) -> None:
        """Let an answer go on until it needs rows, or ends."""
        started = time.perf_counter()
        try:
            event = how(member.steps)
            while isinstance(event, str):
                events.append(Event(member.key, event))
                event = next(member.steps, None)
        except Exception as error:  # of this answer alone
            self._end(member, error, events)
            return
        member.spend(time.perf_counter() - started)
        if event is None:
            assert member.work.result is not None
            self._end(member, member.work.result, events)
        else:
            member.rows = event

    def _end(self, member: _Member, what: Answer | Exception, events: list[Event]) -> None:
        self._members.remove(member)
        member.steps.close()
        events.append(Event(member.key, what, member.prompt_seconds, member.answer_seconds))


def answer_all(
    engine: Answerer, tasks: Iterable[Task], begin: Callable[[Task], AnswerStream], *, stop: CancelToken | None = None
) -> Iterator[tuple[Task, Answer | Exception]]:
    """Answer tasks, as many at once as the engine has conversations, and give each with what came of it as it ends.

    Args:
        tasks: each of them once.
        begin: an answer of `Engine.generate`.
        stop: where it is set nothing more is begun, and answers that have not ended are dropped.
    """
    waiting = iter(tasks)
    with BatchRunner(engine) as batch:
        while True:
            while batch.room and (task := next(waiting, None)) is not None:
                batch.add(task, begin(task))
            if not len(batch):
                return
            for event in batch.step():
                if not isinstance(event.what, str):
                    yield cast(Task, event.key), event.what
            if stop is not None and stop.is_set:
                return
