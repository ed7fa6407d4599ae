"""The anchors' stage: the model's answers to them, sampled and sorted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acd_local.errors import ModelError, UsageError
from acd_local.optimize import anchors
from acd_local.optimize.anchors import Anchors, AnswerCache, Instruction
from acd_local.optimize.job import TITLES, Clock, divide
from acd_local.optimize.stages import Stopped, key_of, private_lines
from acd_local.optimize.workshop import Workshop


@dataclass(frozen=True)
class Sorted:
    """The sets, a key over all that is in them, and their sizes."""

    anchors: Anchors
    key: str
    counts: dict[str, int]


def sample_anchors(shop: Workshop) -> Sorted:
    """Sample what is missing and sort it; the time of the other stages follows from what it took."""
    job = shop.job
    work = anchors.tasks(job.instructions)
    wanted = {(i.id, under) for i, under in work}
    sampling = {"tokens": anchors.TOKENS, "temperature": anchors.SAMPLING.temp}
    checkpoint = shop.checkpoint("anchors", work=sorted(map(list, wanted)), **sampling)
    path = job.folder / f"answers-{shop.request.seed}-{key_of(shop.base | sampling)[:8]}.jsonl"
    cache = _answers(path)
    reused = checkpoint.done and all(key in cache for key in wanted)
    if not reused:
        checkpoint.begin()
        complete = _answer_all(shop, work, cache)
        if not complete:
            checkpoint.save({})
            raise Stopped
    records = [r for r in cache.records() if (r["id"], r["under"]) in wanted]
    records.sort(key=lambda r: (r["id"], r["under"]))  # not the order in which they were finished
    found = anchors.collect(job.instructions, records, job.texts.tokenize_refusal, job.texts.end)
    counts = {
        "refusals_sampled": len(found.refused) - found.written,
        "refusals_written": found.written,
        "complying": len(found.complied),
        "answered": len(found.answered),
    }
    if not found.part(validation=False).answered:
        raise ModelError("the model answered no harmless instruction: it cannot be optimized with these anchors")
    key = key_of({name: _listed(getattr(found, name)) for name in ("refused", "complied", "answered")})
    if not reused:
        checkpoint.finish(counts)
    shop.seconds = divide(shop.request.budget, checkpoint.spent().get("seconds", 0.0))
    summary = f"{len(found.refused)} refusals ({found.written} written), {len(found.complied)} complying, "
    shop.close(checkpoint, f"{summary}{len(found.answered)} answers", reused=reused)
    return Sorted(found, key, counts)


def _answer_all(shop: Workshop, work: list[tuple[Instruction, str]], cache: AnswerCache) -> bool:
    job = shop.job
    done = sum((i.id, under) in cache for i, under in work)
    clock = Clock(TITLES["anchors"], done, len(work), shop.listener.progress)
    if done == len(work):
        return True
    with shop.engine(pair=job.manual, conversations=shop.conversations, ctx_size=shop.context()) as engine:
        return anchors.sample(
            engine,
            job.manual,
            work,
            cache,
            seed=shop.request.seed,
            stop=shop.stop,
            on_progress=lambda done, total: clock.at(done),
        )


def _answers(path: Path) -> AnswerCache:
    private_lines(path)
    try:
        return AnswerCache(path)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UsageError(f"{path} is damaged: remove it to have its answers sampled again") from None


def _listed(found: Sequence[anchors.Pair]) -> list[list[Any]]:
    return [[p.instruction.id, p.instruction.kind, p.instruction.lookalike, p.under, list(p.answer)] for p in found]
