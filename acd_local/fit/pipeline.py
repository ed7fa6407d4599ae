"""Runs the stages of a fit: the model as it is, a base, the gate, both streams' texts, thresholds, steering, judgement.

Every figure, every answer and every state that was read is kept under what decides it. So a fit that was stopped goes
on where it was, by doing the same again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import TypeVar

from acd_local import pairfile
from acd_local.cluster import Cluster
from acd_local.fit import result, thresholds
from acd_local.fit.context import FitContext
from acd_local.fit.job import Job
from acd_local.fit.report import render
from acd_local.fit.result import FitResult
from acd_local.fit.stages import gate, judgement, steering, texts
from acd_local.pairs import GateSettings
from acd_local.progress import Listener, check_stop, duration
from acd_local.runtime.cancel import CancelToken
from acd_local.tuning.cache import locked
from acd_local.vectors import Vectors

Result = TypeVar("Result")


def run(job: Job, *, stop: CancelToken, listener: Listener, connect: Callable[[], Cluster] | None = None) -> bool:
    """Run all stages, then write the files.

    Args:
        connect: connects to a cluster that measures what it can; None: everything is measured here.

    Returns:
        Whether a pair was written: False where none was found that is better than the model as it is.

    Raises:
        Stopped: `stop` was set; the same job goes on from where it was.
    """
    with locked(job.folder, "acd fit"), closing(FitContext(job, stop, listener, connect)) as context:
        found = _stages(context)
        as_is, pair = (measured.shares for measured in found.judged)
        if not thresholds.refuses_better(as_is, pair):
            listener.line(
                "no pair was found that refuses more harmful requests without refusing more harmless ones or breaking "
                "answers: nothing was written, the model is best used as it is"
            )
            return False
        file = result.make_pair_file(context, found)
        vectors = Vectors(job.soft, result.make_gate(context, found), found.steering)
        pairfile.write(job.out, file, vectors, render(context, found, file))
        return True


def _stages(context: FitContext) -> FitResult:
    def stage(name: str, make: Callable[[], tuple[Result, str]]) -> Result:
        """Run and time one stage, and say in a line what it came to."""
        check_stop(context.stop)
        with context.notes.timing(name):
            found, said = make()
        context.listener.line(f"{name}: {said}; {duration(context.notes.seconds[name])}")
        return found

    stage("plan", lambda: _plan(context))
    as_is = stage("as it is", lambda: texts.measure_as_is(context)).shares
    helpful = stage("helpful text", lambda: texts.choose_helpful(context, as_is))
    gate_result = stage("gate", lambda: gate.train_gate(context, helpful.base))
    if (kept := context.job.kept) is not None:
        pair = stage("kept pair", lambda: texts.keep_pair(context, kept))
    else:
        positives = stage("positive text", lambda: texts.choose_positives(context, gate_result))
        pair = stage("contrast", lambda: texts.choose_contrast(context, as_is, helpful, gate_result, positives))
    chosen = stage("thresholds", lambda: judgement.choose_thresholds(context, helpful, gate_result, pair.style))
    look = stage("second look", lambda: gate.train_second_look(context, helpful.base, gate_result.layer))
    added = stage("steering vectors", lambda: steering.extract(context))
    every = gate.LOOK if look.trained else 0
    settings = GateSettings(chosen.threshold, helpful.base, chosen.low, every, look.threshold)
    judged = stage("judgement", lambda: judgement.judge(context, settings, gate_result.chances, pair.style))
    return FitResult(
        gate=gate_result.trained,
        layers=(gate_result.layer,),
        look=look.trained,
        steering=added,
        settings=settings,
        style=pair.style,
        helpful=helpful.candidate,
        positive=pair.positive,
        negative=pair.negative,
        judged=judged,
        figures=context.figures,
        tables=context.tables,
    )


def _plan(context: FitContext) -> tuple[None, str]:
    own = "a system prompt of its own" if context.own else "no system prompt of its own"
    context.plan()
    return None, f"{len(context.instructions())} anchors to read, {own}"
