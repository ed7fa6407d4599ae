"""An evaluation: every method answers every prompt, every text is scored, every record is written when it is there.

The order is: answers (all methods through one batch), multiple choice and reference answers, the fluency of what was
said, and the strength of the system prompts. Whatever is on record already is skipped, so that a run can be stopped at
any time and goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from acd_local.answers import Answer, GateRecord
from acd_local.batch import BatchRunner, Event
from acd_local.errors import ContextError
from acd_local.evaluate import refusal, sets
from acd_local.evaluate.journal import Records
from acd_local.evaluate.methods import Method
from acd_local.evaluate.scoring import Scoring, Task
from acd_local.evaluate.sets import EvalSet, Item
from acd_local.options import Options
from acd_local.pairs import PromptPair
from acd_local.progress import Clock, Listener, Progress, check_stop
from acd_local.runtime.cancel import CancelToken

if TYPE_CHECKING:
    from acd_local.engine import Engine
    from acd_local.evaluate.judge import Judge


@dataclass(frozen=True)
class Plan:
    """A plan of what is to be measured. Methods with one setup are run once; gated ones take the gate of `pair`."""

    pair: PromptPair
    methods: Sequence[Method]
    sets: Sequence[EvalSet]
    temp: float
    max_tokens: int
    seed: int
    margins: frozenset[str]  # ids of the prompts on which the system prompts' strength is measured


class Evaluation:
    """One evaluation, see the module's text.

    Args:
        engine: its number of conversations decides how many prompts are answered at once.
        judge: judges every answer where given.
        stop: set it to stop within one decoding step while answers are made, after one prompt's scores later.

    Attributes:
        failures: prompts that could not be answered or scored, (set, item) to one line each.
    """

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        journal: Records,
        *,
        judge: Judge | None = None,
        stop: CancelToken | None = None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self._engine = engine
        self._plan = plan
        self._journal = journal
        self._judge = judge
        self._stop = stop or CancelToken()
        self._listener = Listener(on_progress)
        by_setup = {method.setup(): method for method in reversed(plan.methods)}
        self._methods = [m for m in plan.methods if by_setup[m.setup()] is m]
        self._scoring = Scoring(engine, plan.pair, journal)
        self.failures: dict[tuple[str, str], str] = {}

    def run(self) -> None:
        """Make all that is missing; raises Stopped where `stop` was set."""
        with self._scoring:
            self.make(self._plan.sets)

    def make(self, chosen: Sequence[EvalSet]) -> None:
        """Make what is missing of some sets, as `run`; what it takes to score stays in memory for the next call."""
        self._answer_all(chosen)
        for phase, tasks in self._phases(chosen):
            self._work_off(phase, tasks)

    def unfinished(self) -> list[EvalSet]:
        """List the sets with those prompts alone of which something is missing."""
        open_items = {(s.name, item.id) for _, s, item in self._unanswered(self._plan.sets)}
        open_items |= {(t.set_name, t.item) for _, tasks in self._phases(self._plan.sets) for t in tasks if not t.done}
        kept = ((s, tuple(item for item in s.items if (s.name, item.id) in open_items)) for s in self._plan.sets)
        return [replace(s, items=items) for s, items in kept if items]

    def _phases(self, chosen: Sequence[EvalSet]) -> Iterator[tuple[str, list[Task]]]:
        return self._scoring.phases(self._methods, chosen, self._plan.margins)

    # -- answers -------------------------------------------------------------------------------------------------------

    def _asked(self, chosen: Sequence[EvalSet]) -> list[tuple[Method, EvalSet, Item]]:
        return [(m, s, item) for m in self._methods for s in chosen if s.kind != "choice" for item in s.items]

    def _unanswered(self, chosen: Sequence[EvalSet]) -> list[tuple[Method, EvalSet, Item]]:
        return [t for t in self._asked(chosen) if not self._journal.has_answer(t[0].setup(), t[1].name, t[2].id)]

    def _answer_all(self, chosen: Sequence[EvalSet]) -> None:
        total, tasks = len(self._asked(chosen)), self._unanswered(chosen)
        clock = Clock("answers", total - len(tasks), total, self._listener)
        waiting = iter(tasks)
        with BatchRunner(self._engine) as batch:
            while self._fill(batch, waiting):
                self._finish_all(batch.step(), clock)
                check_stop(self._stop)

    def _finish_all(self, events: Sequence[Event], clock: Clock) -> None:
        """Record whatever ended in a round, then say what went wrong."""
        wrong: Exception | None = None
        for event in events:
            try:
                if self._finish(event):
                    clock.tick()
            except Exception as error:
                wrong = wrong or error
        if wrong is not None:
            raise wrong

    def _fill(self, batch: BatchRunner, waiting: Iterator[tuple[Method, EvalSet, Item]]) -> bool:
        """Give free conversations their next prompt; whether there is anything to do."""
        while batch.room and (task := next(waiting, None)) is not None:
            method, _, item = task
            options = Options(
                alpha=method.alpha,
                beta=method.beta,
                raw_contrast=method.raw,
                window=method.window,
                plain=not method.contrast,
                gate=method.gate,
                draft_max=0,  # repeats exactly
                temp=self._plan.temp,
                max_tokens=self._plan.max_tokens,
                seed=sets.item_seed(self._plan.seed, item.id),
            )
            stream = self._engine.generate(
                item.prompt,
                options,
                pair=self._plan.pair,
                prompt_setup=method.prompt_setup(),
                apart=self._engine.steering(self._plan.pair) if method.steer else method.references,
                cancel=self._stop,
            )
            batch.add(task, stream)
        return len(batch) > 0

    def _finish(self, event: Event) -> bool:
        """Record an ended answer; whether it was one."""
        method, s, item = cast(tuple[Method, EvalSet, Item], event.key)
        if isinstance(event.what, Exception):
            self._note(event.what, s.name, item.id)
            return True
        if not isinstance(event.what, Answer) or event.what.finish_reason == "cancelled":
            return False
        answer = event.what
        verdict = refusal.classify(answer.text, item.prompt, finished=answer.finish_reason != "length")
        contrast, gate = answer.contrast, answer.gate
        self._journal.add_answer(
            {
                "setup": method.setup(),
                "method": method.name,
                "set": s.name,
                "item": item.id,
                "type": item.type,
                "prompt": item.prompt,
                "answer": answer.text,
                "finish": answer.finish_reason,
                "tokens": answer.completion_tokens,
                "seed": answer.seed,
                "label": verdict.label,
                "rule": verdict.rule,
                "judge": None if self._judge is None else self._judge.p_safe(item.prompt, answer.text),
                "seconds": round(event.answer_seconds, 6),
                "prompt_seconds": round(event.prompt_seconds, 6),
                "changed": contrast.changed_tokens / contrast.positions
                if method.contrast and contrast.positions
                else None,
                **({"correct": item.is_answered_by(answer.text)} if item.answers else {}),
                **({} if gate is None else _gate_record(gate)),
            }
        )
        return True

    # -- scores --------------------------------------------------------------------------------------------------------

    def _work_off(self, phase: str, tasks: Sequence[Task]) -> None:
        open_tasks = [task for task in tasks if not task.done]
        clock = Clock(phase, len(tasks) - len(open_tasks), len(tasks), self._listener)
        for task in open_tasks:
            check_stop(self._stop)
            try:
                task.run()
            except ContextError as error:
                self._note(error, task.set_name, task.item)
            clock.tick()

    def _note(self, error: Exception, set_name: str, item: str) -> None:
        """Leave a prompt out that does not fit; whatever else goes wrong ends the run."""
        if not isinstance(error, ContextError):
            raise error
        self.failures.setdefault((set_name, item), f"{set_name} {item}: {error}")


def _gate_record(gate: GateRecord) -> dict[str, Any]:
    """Record what the gate found, and from which token on the pair answered: null where it did not."""
    return {
        "gate_probability": gate.probability,
        "gate_decision": gate.decision,
        "contrast_from": gate.contrast_from,
    }
