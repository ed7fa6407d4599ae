"""Samples the model's own answers to the anchors, for the sets that prompts are trained on.

The answers are sampled under the three manual prompts (safe, opposite, none), cut short, and stay in the user's cache
folder. Here alone a manual opposite prompt is answered from: complying answers are what the losses push away from, and
nothing returns or prints them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from acd_local import files
from acd_local.answers import Answer
from acd_local.batch import answer_all
from acd_local.engine import Engine
from acd_local.errors import ModelError, UsageError
from acd_local.evaluate import refusal
from acd_local.evaluate.sets import item_seed
from acd_local.generation import AnswerStream
from acd_local.optimize import anchor_sets, budget
from acd_local.optimize.anchor_sets import PROMPTS, SAMPLING, AnchorSets
from acd_local.optimize.context import StageContext
from acd_local.pairs import AdversarialText, PromptPair
from acd_local.progress import Clock, Stopped
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.prompts import PromptSetup
from acd_local.tuning.anchors import Instruction
from acd_local.tuning.cache import key_of

Task = tuple[Instruction, str]  # what is answered, under which of PROMPTS


def run(context: StageContext) -> AnchorSets:
    """Sample what is missing and sort it; the time of the other stages follows from what it took."""
    job = context.job
    work = tasks(job.instructions)
    wanted = {(i.id, under) for i, under in work}
    sampling = {"tokens": anchor_sets.TOKENS, "temperature": SAMPLING.temp}
    checkpoint = context.checkpoint("anchors", work=sorted(map(list, wanted)), **sampling)
    path = job.folder / f"answers-{job.request.seed}-{key_of(context.base | sampling)[:8]}.jsonl"
    try:
        cache = AnswerCache(path)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UsageError(f"{path} is damaged: remove it to have its answers sampled again") from None
    missing = [key for key in wanted if key not in cache]
    if missing or not checkpoint.done:
        checkpoint.begin()
        clock = Clock("anchors", len(work) - len(missing), len(work), context.listener)
        if missing:
            many, n_ctx, seed = context.conversations, context.n_ctx(), job.request.seed
            with context.engine(pair=job.manual, conversations=many, ctx_size=n_ctx) as engine:
                complete = sample(engine, job.manual, work, cache, seed=seed, stop=context.stop, on_progress=clock.at)
            if not complete:
                checkpoint.save({})
                raise Stopped
    records = [r for r in cache.records() if (r["id"], r["under"]) in wanted]
    records.sort(key=lambda r: (r["id"], r["under"]))  # not the order in which they were finished
    sets = anchor_sets.collect(job.instructions, records, job.tokens.refusals.__getitem__, job.tokens.end)
    if not sets.part(validation=False).answered:
        raise ModelError("the model answered no harmless instruction: it cannot be optimized with these anchors")
    if not checkpoint.reused:
        checkpoint.finish(sets.counts)
    context.seconds = budget.divide(job.request.budget, checkpoint.spent().get("seconds", 0.0))
    summary = f"{len(sets.refused)} refusals ({sets.written} written), {len(sets.complied)} complying, "
    context.close(checkpoint, f"{summary}{len(sets.answered)} answers")
    return sets


def tasks(instructions: Sequence[Instruction]) -> list[Task]:
    """List what is answered under which prompts: harmful instructions under all three, harmless ones under one each.

    The harmless ones are many, and what they have to teach is how ordinary answers begin.
    """
    return [
        (i, under)
        for i in instructions
        for under in PROMPTS
        if i.kind == "harmful" or PROMPTS[i.number % len(PROMPTS)] == under
    ]


class AnswerCache:
    """The answers sampled so far, one record a line: {"id", "under", "label", "answer" (token ids), "matcher"}."""

    def __init__(self, path: Path) -> None:
        self._lines = files.JsonLines(path, mode=files.PRIVATE)
        records = map(json.loads, self._lines.read())
        # What another matcher sorted is sampled anew.
        valid = (r for r in records if r.get("matcher", 1) == refusal.VERSION)
        self._records: dict[tuple[str, str], dict[str, Any]] = {(r["id"], r["under"]): r for r in valid}

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._records

    def records(self) -> list[dict[str, Any]]:
        return list(self._records.values())

    def add(self, record: dict[str, Any]) -> None:
        """Keep an answer; raises UsageError, StorageError."""
        self._records[record["id"], record["under"]] = record
        self._lines.add(record)


def sample(
    engine: Engine,
    manual: PromptPair,
    work: Sequence[Task],
    cache: AnswerCache,
    *,
    seed: int,
    stop: CancelToken,
    on_progress: Callable[[int], None],
) -> bool:
    """Answer what the cache does not hold yet, as many at once as the engine has conversations.

    Returns:
        Whether everything is there; False where `stop` was set.
    """
    missing = [(i, under) for i, under in work if (i.id, under) not in cache]
    done = len(work) - len(missing)

    def begin(task: Task) -> AnswerStream:
        instruction, under = task
        options = replace(SAMPLING, max_tokens=anchor_sets.TOKENS, seed=item_seed(seed, instruction.id))
        pair, prompt_setup = _setup_under(manual, under)
        return engine.generate(instruction.prompt, options, pair=pair, prompt_setup=prompt_setup, cancel=stop)

    for task, answer in answer_all(engine, missing, begin, stop=stop):
        if isinstance(answer, Exception):
            raise answer
        if answer.finish_reason != "cancelled":
            cache.add(_record(*task, answer))
            done += 1
            on_progress(done)
    return not stop.is_set


def _setup_under(manual: PromptPair, under: str) -> tuple[PromptPair, PromptSetup]:
    if under == "opposite":
        swapped = PromptPair("anchors", manual.adversarial.reveal_for_negative_stream(), AdversarialText(manual.safe))
        return swapped, PromptSetup.of(swapped)
    return manual, PromptSetup(manual.safe if under == "safe" else None, None)


def _record(instruction: Instruction, under: str, answer: Answer) -> dict[str, Any]:
    verdict = refusal.classify(answer.text, instruction.prompt, finished=answer.finish_reason != "length")
    ids = [record.token for record in answer.tokens]
    found = {"id": instruction.id, "under": under, "label": verdict.label, "answer": ids}
    return found | {"matcher": refusal.VERSION}
