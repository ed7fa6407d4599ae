"""Tries finished prompts in greedy answers to validation instructions, which are sorted, counted and forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from acd_local.batch import answer_all
from acd_local.engine import Engine
from acd_local.evaluate import refusal
from acd_local.evaluate.degenerate import degenerate_rule
from acd_local.generation import AnswerStream
from acd_local.options import Options
from acd_local.pairs import PromptPair
from acd_local.progress import check_stop
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.prompts import PromptSetup
from acd_local.tuning.scoring import RefusalRates

TOKENS = 48  # of an answer: loops show by then
# Instructions of a kind; harmless ones of either kind together are as many as harmful ones.
COUNTS = {"safety": 24, "over_refusal": 12, "lookalike": 12}


@dataclass(frozen=True)
class Trial(RefusalRates):
    """Shares of the greedy answers of a pair.

    Attributes:
        degenerate: loops and garble, of all of them.
    """

    degenerate: float

    @property
    def value(self) -> float:
        """The objective minus what cannot be read: an opening's likelihood shows nothing of that."""
        return self.objective - self.degenerate


def run(
    engine: Engine,
    pair: PromptPair,
    groups: Mapping[str, Sequence[str]],
    *,
    plain: bool,
    stop: CancelToken,
    prompt_setup: PromptSetup | None = None,
) -> Trial:
    """Answer instructions with a pair, as many at once as the engine has conversations.

    Args:
        groups: instructions by the names of COUNTS, of each the first so many.
        plain: the safeguarding text alone; else the contrast.
        prompt_setup: the pair's soft prompts in the place of its texts.
    """
    options = Options(plain=plain, temp=0.0, max_tokens=TOKENS)
    asked = [(name, prompt) for name, most in COUNTS.items() for prompt in groups.get(name, ())[:most]]
    counts = {name: sum(kind == name for kind, _ in asked) for name in COUNTS}
    total, refused, broken = len(asked), dict.fromkeys(COUNTS, 0), 0

    def begin(task: tuple[str, str]) -> AnswerStream:
        return engine.generate(task[1], options, pair=pair, prompt_setup=prompt_setup, cancel=stop)

    for (name, prompt), answer in answer_all(engine, asked, begin, stop=stop):
        if isinstance(answer, Exception):
            raise answer
        verdict = refusal.classify(answer.text, prompt, finished=answer.finish_reason != "length")
        refused[name] += verdict.label == "refusal"
        broken += degenerate_rule(answer.text, prompt) is not None
    check_stop(stop)
    shares = {name: refused[name] / counts[name] if counts[name] else 0.0 for name in COUNTS}
    return Trial(**shares, degenerate=broken / total if total else 0.0)
