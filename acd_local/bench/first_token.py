"""Measure how long a long question waits for its first token, where the system prompts are decoded before."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

from acd_local.bench.measuring import PLAIN, decode_plain, plain_prompt
from acd_local.bench.questions import long_question
from acd_local.bench.rounds import Progress, in_turns, median
from acd_local.engine import Engine
from acd_local.options import Options
from acd_local.runtime import llama
from acd_local.runtime.prefixes import common_prefix

QUESTION = 512  # tokens
WAYS = {
    PLAIN: None,
    "contrast": Options(gate=False, temp=0.0, max_tokens=1),
    "alpha 0": Options(gate=False, temp=0.0, max_tokens=1, alpha=0.0),
}


@dataclass(frozen=True)
class FirstTokens:
    """Seconds of an answer of one token by way and round, and their ratios to plain llama.cpp's in the same round.

    Attributes:
        question: tokens of each question.
    """

    question: int
    seconds: dict[str, list[float]]

    @property
    def ratios(self) -> dict[str, list[float]]:
        plain = self.seconds[PLAIN]
        return {name: [a / b for a, b in zip(found, plain, strict=True)] for name, found in self.seconds.items()}

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Return medians, JSON types."""
        ratios = self.ratios
        return {
            name: {"seconds": median(seconds), "ratio_to_plain": median(ratios[name])}
            for name, seconds in self.seconds.items()
        }


def run(engine: Engine, bare: llama.Context, rounds: int, progress: Progress = lambda line: None) -> FirstTokens:
    """Ask questions that have nothing in common but the system prompt.

    They have QUESTION tokens, or a quarter of the context's size where that is less.
    """
    length = min(QUESTION, engine.n_ctx // 4)

    def ask(index: int, options: Options | None, number: int) -> float:
        # Cut anew for each way, so that none finds a part of its question decoded.
        text = long_question(engine, len(WAYS) * number + index, length)
        if options is None:
            prompt = plain_prompt(engine, text)
            system = common_prefix(prompt, plain_prompt(engine, "?"))
            return decode_plain(bare, prompt, 1, held=system).first or 0.0
        started = time.perf_counter()
        engine.generate(text, options).run()
        return time.perf_counter() - started

    ways = {name: partial(ask, index, options) for index, (name, options) in enumerate(WAYS.items())}
    return FirstTokens(length, in_turns(ways, rounds, lambda line: progress(f"first token, {line}"), warm_up=True))
