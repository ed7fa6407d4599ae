"""Runs the stages of a fit: the model as it is, a base, the gate, both streams' texts, thresholds, a judgement.

Every figure, every answer and every state that was read is kept under what decides it. So a fit that was stopped goes
on where it was, by doing the same again.
"""

from __future__ import annotations

from collections.abc import Callable

from acd_local.fit import choose, judging, probes, result, texts
from acd_local.fit.found import Found
from acd_local.fit.job import Job
from acd_local.fit.lab import Lab
from acd_local.runtime.cancel import CancelToken
from acd_local.tuning.cache import locked
from acd_local.tuning.progress import Listener, check_stop, duration

Stage = Callable[[Lab, Found], str]  # adds to what was found, and says it


def run(job: Job, *, stop: CancelToken, listener: Listener) -> bool:
    """All stages, then the files.

    Returns:
        Whether a pair was written: False where none was found that is better than the model as it is.

    Raises:
        Stopped: `stop` was set; the same job goes on from where it was.
    """
    with locked(job.folder, "acd fit"):
        lab, found = Lab(job, stop, listener), Found()
        try:
            _stages(lab, found)
            return _finish(lab, found)
        finally:
            lab.close()


def _stages(lab: Lab, found: Found) -> None:
    stages: dict[str, Stage] = {
        "plan": _plan,
        "as it is": texts.as_is,
        "helpful text": texts.helpful,
        "gate": probes.gate,
        "positive text": texts.positive,
        "contrast": texts.contrast,
        "thresholds": judging.thresholds,
        "second look": probes.second_look,
        "judgement": judging.judge,
    }
    for name, stage in stages.items():
        check_stop(lab.stop)
        with lab.notes.timing(name):
            said = stage(lab, found)
        if said:
            lab.listener.line(f"{name}: {said}; {duration(lab.notes.seconds[name])}")


def _plan(lab: Lab, found: Found) -> str:
    found.own = lab.bench.template.default_system()
    lab.plan()
    own = "a system prompt of its own" if found.own else "no system prompt of its own"
    return f"{len(lab.instructions())} anchors to read, {own}"


def _finish(lab: Lab, found: Found) -> bool:
    assert found.judged is not None
    as_is, pair = found.judged
    if not choose.refuses_better(as_is.shares, pair.shares):
        lab.listener.line(
            "no pair was found that refuses more harmful requests without refusing more harmless ones or breaking "
            "answers: nothing was written, the model is best used as it is"
        )
        return False
    result.write(lab, found)
    return True
