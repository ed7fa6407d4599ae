"""Goes through the stages of a fit: the model as it is, a base, the gate, both streams' texts, thresholds, a judgement.

Every figure is kept under what decides it (`notes`), every answer and every state that was read as well. So a fit that
was stopped goes on where it was, by doing the same again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from acd_local.fit import choose, judging, probes, result, texts
from acd_local.fit.found import Found
from acd_local.fit.job import Job
from acd_local.fit.lab import Lab
from acd_local.optimize.job import Listener, duration
from acd_local.optimize.stages import go_on
from acd_local.runtime.cancel import CancelToken

Stage = Callable[[Lab, Found], str]  # adds to what was found, and says it


class Fitting:
    """One run of a job; to be closed."""

    def __init__(self, job: Job, stop: CancelToken, listener: Listener) -> None:
        self._lab = Lab(job, stop, listener)
        self._found = Found()

    def run(self) -> bool:
        """See `job.run`."""
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
        lab = self._lab
        for name, stage in stages.items():
            go_on(lab.stop)
            with lab.notes.timing(name):
                said = stage(lab, self._found)
            if said:
                lab.listener.line(f"{name}: {said}; {duration(lab.notes.seconds[name])}")
        return self._finish()

    def close(self) -> None:
        self._lab.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _finish(self) -> bool:
        assert self._found.judged is not None
        as_is, pair = self._found.judged
        if not choose.refuses_better(as_is.shares, pair.shares):
            self._lab.listener.line(
                "no pair was found that refuses more harmful requests without refusing more harmless ones or breaking "
                "answers: nothing was written, the model is best used as it is"
            )
            return False
        result.write(self._lab, self._found)
        return True


def _plan(lab: Lab, found: Found) -> str:
    found.own = lab.bench.template.default_system()
    lab.plan()
    texts = "a system prompt of its own" if found.own else "no system prompt of its own"
    return f"{len(lab.instructions())} anchors to read, {texts}"
