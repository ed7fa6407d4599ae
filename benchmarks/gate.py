"""Measure what a pair's gate costs ordinary requests: first token and time per token, over plain llama.cpp.

    python benchmarks/gate.py MODEL [--pair NAME|FILE] [--rounds 5] [--tokens 64] [--threads N]

Requests of about 12, 100 and 1,000 tokens are answered greedily by llama_decode and argmax alone, by the engine as it
is (no pair, gate off) and with the gate, in turns, every second round backwards; system prompts are decoded before.
Ratios are to plain llama.cpp in the same round, their medians are printed. Rounds in which the gate gives the request
to the pair do not count: it is no ordinary one to it. Run it where nothing else runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acd_local import models, pairs
from acd_local.bench.measuring import PLAIN, bare_context, decode_plain, measure
from acd_local.bench.questions import long_question, text_of
from acd_local.bench.rounds import Measured, in_turns
from acd_local.engine import Engine
from acd_local.errors import AcdError
from acd_local.options import Options
from acd_local.pairs import PromptPair
from acd_local.runtime import probe
from acd_local.runtime.prefixes import common_prefix
from acd_local.runtime.prompts import PromptSetup
from acd_local.runtime.template import Message

LENGTHS = {"short": 0, "medium": 100, "long": 1000}  # tokens; 0: the questions as they are
CTX_SIZE = 2048
AS_IS, GATED = "as is, gate off", "gated"


def chosen_pair(model: str, name: str | None) -> PromptPair:
    pair = pairs.find(name) if name else pairs.best_for(probe.verify(models.resolve(model)))
    if pair is None or pair.gate is None:
        sys.exit("no pair with a gate for this model: give one with --pair, or make one with acd fit")
    return pair


def request(engine: Engine, length: int, number: int) -> str:
    """Another one for each number."""
    return long_question(engine, number, length) if length else text_of("questions", number)


def tokens_of(engine: Engine, text: str) -> tuple[list[int], int]:
    """The prompt as the model is asked without any pair, and how many tokens of it come before the user's."""
    prompt, other = (engine.template.encode([Message("user", words)]) for words in (text, "?"))
    return prompt, common_prefix(prompt, other)


class Ways:
    """The engines, and what the gate said."""

    def __init__(self, model: str, pair: PromptPair, tokens: int, threads: int | None) -> None:
        self.engines = {n: Engine(model, pair=pair, ctx_size=CTX_SIZE, threads=threads) for n in (AS_IS, GATED)}
        self.pair, self.tokens = pair, tokens
        self.bare = bare_context(self.engines[AS_IS])
        self.decisions: list[str] = []

    def plain(self, texts: Sequence[str], number: int) -> tuple[Measured, str]:
        prompt, held = tokens_of(self.engines[AS_IS], texts[number])
        return decode_plain(self.bare, prompt, self.tokens, held=held), ""

    def ask(self, name: str, texts: Sequence[str], number: int) -> tuple[Measured, str]:
        """An answer, and what the gate decided; empty: it was not asked."""
        options = Options(temp=0, max_tokens=self.tokens, gate=name == GATED, plain=name == AS_IS)
        prompt_setup = PromptSetup(None, None) if name == AS_IS else None
        stream = self.engines[name].generate(texts[number], options, prompt_setup=prompt_setup)
        found = measure(self.engines[name], stream)
        gate = stream.answer.gate
        decision = "" if gate is None else "contrast" if gate.contrast_from is not None else gate.decision
        self.decisions += [decision] if decision else []
        return found, decision

    def rounds(self, texts: Sequence[str]) -> list[dict[str, tuple[float, float]]]:
        """Per text but the first, where the gate let it pass: (first token, time per token) over plain's, by way."""
        ways = {PLAIN: partial(self.plain, texts)}
        ways |= {name: partial(self.ask, name, texts) for name in self.engines}
        # The first round decodes the system prompts.
        found = in_turns(ways, len(texts) - 1, warm_up=True)
        counted = [i for i, (_, decision) in enumerate(found[GATED]) if decision != "contrast"]
        return [{n: self._over(found[n][i][0], found[PLAIN][i][0]) for n in self.engines} for i in counted]

    def _over(self, answer: Measured, plain: Measured) -> tuple[float, float]:
        each = answer.seconds / plain.seconds_of(answer.steps) if answer.steps else float("nan")
        return (answer.first or 0.0) / (plain.first or 1.0), each


def show(kind: str, tokens: Sequence[int], rounds: Sequence[dict[str, tuple[float, float]]]) -> None:
    head = f"{kind}, {statistics.median(tokens):.0f} tokens with the template"
    print(f"{head}, {len(rounds)} of {len(tokens)} ordinary")
    for name in (AS_IS, GATED):
        firsts, each = ([found[name][i] for found in rounds if found[name][i] == found[name][i]] for i in (0, 1))
        if firsts and each:
            print(
                f"  {name:<16} first token {statistics.median(firsts):5.2f}   per token {statistics.median(each):5.3f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pair")
    for name, value in (("rounds", 5), ("tokens", 64), ("threads", None)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    try:
        ways = Ways(given.model, chosen_pair(given.model, given.pair), given.tokens, given.threads)
        print(f"ratios to {PLAIN}, pair {ways.pair.name}, {ways.engines[GATED].threads} threads")
        for kind, length in LENGTHS.items():
            texts = [request(ways.engines[AS_IS], length, number) for number in range(given.rounds + 1)]
            lengths = [len(tokens_of(ways.engines[AS_IS], text)[0]) for text in texts]
            show(kind, lengths[1:], ways.rounds(texts))
        print("decided:", ", ".join(f"{d} {ways.decisions.count(d)}" for d in dict.fromkeys(ways.decisions)))
    except AcdError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
