"""How long a long question waits for its first token, against plain llama.cpp, system prompts decoded before."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from acd_local.bench import PLAIN, REPEATS, check_counts, conversation, decode_plain
from acd_local.engine import Engine, measured_pair
from acd_local.options import Options
from acd_local.runtime import llama
from acd_local.runtime.prefixes import common_prefix
from acd_local.runtime.threads import default_threads

QUESTION = 512  # tokens
WAYS = {
    PLAIN: None,
    "contrast": Options(gate=False, temp=0.0, max_tokens=1),
    "alpha 0": Options(gate=False, temp=0.0, max_tokens=1, alpha=0.0),
}


@dataclass(frozen=True)
class FirstTokens:
    """Seconds of an answer of one token by way and round, and their ratios to plain llama.cpp's in the same round."""

    question: int
    seconds: dict[str, list[float]]

    @property
    def ratios(self) -> dict[str, list[float]]:
        plain = self.seconds[PLAIN]
        return {name: [a / b for a, b in zip(found, plain, strict=True)] for name, found in self.seconds.items()}

    def summary(self) -> dict[str, dict[str, float]]:
        """Medians, JSON types."""
        return {
            name: {"seconds": round(statistics.median(s), 4), "ratio_to_plain": round(statistics.median(r), 4)}
            for (name, s), r in zip(self.seconds.items(), self.ratios.values(), strict=True)
        }


def run(
    model: str,
    *,
    rounds: int = 5,
    pair: str | None = None,
    threads: int | None = None,
    ctx_size: int = 2048,
    progress: Callable[[str], None] = lambda line: None,
) -> FirstTokens:
    """Ask questions that have nothing in common but the system prompt, the ways in turns.

    They have QUESTION tokens, or a quarter of `ctx_size` where that is less.
    """
    check_counts(2, rounds)
    threads = threads or default_threads()
    settings: dict[str, Any] = {"threads": threads, "ctx_size": ctx_size, "pair": measured_pair(model, pair)}
    with Engine(model, **settings) as engine:
        question = min(QUESTION, ctx_size // 4)
        with llama.Context(engine.decoder.model, n_ctx=ctx_size, n_seq=1, threads=threads) as bare:
            seconds: dict[str, list[float]] = {name: [] for name in WAYS}
            for number in range(rounds + 1):  # the first round decodes the system prompts and does not count
                progress(f"first token, round {number} of {rounds}" if number else "first token: warming up")
                for name in list(WAYS) if number % 2 else list(WAYS)[::-1]:
                    # Cut anew for each, so that no way finds a part of its question decoded.
                    text = long_question(engine, len(WAYS) * number + list(WAYS).index(name), question)
                    took = _first(engine, bare, name, text)
                    if number:
                        seconds[name].append(took)
    return FirstTokens(question, seconds)


def long_question(engine: Engine, number: int, length: int) -> str:
    """Words of REPEATS from another place each time, so many tokens of them."""
    words = " ".join(REPEATS).split()
    start = 37 * number % len(words)
    text = " ".join([f"{number}:", *(words[start:] + words[:start]) * 3])
    tokens = engine.vocab.tokenize(text, parse_special=False)[:length]
    return b"".join(map(engine.vocab.piece, tokens)).decode("utf-8", "replace")


def _first(engine: Engine, bare: llama.Context, name: str, text: str) -> float:
    options = WAYS[name]
    if options is not None:
        started = time.perf_counter()
        engine.generate(text, options).run()
        return time.perf_counter() - started
    prompt = engine.template.encode(conversation(engine, text))
    system = common_prefix(prompt, engine.template.encode(conversation(engine, "?")))
    return decode_plain(bare, prompt, 1, held=system).first
