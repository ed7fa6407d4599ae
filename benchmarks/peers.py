"""Measure the same contrast through what else one would take today, in turns with this package's own, in one process.

    python benchmarks/peers.py MODEL [--pair NAME|FILE] [--tokens 64] [--rounds 5] [--json]

Two `llama_cpp.Llama` objects of one file, the adversarial one asked from a logits processor of the other; and
transformers' classifier-free guidance on the same weights as bf16, with the contrast's weight and without a mask.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import script

from acd_local.bench.measuring import ask, contrasted_pair
from acd_local.bench.questions import text_of
from acd_local.bench.rounds import Case, Measured, Progress, Way, cases_of, check_counts, in_turns, median
from acd_local.cli.shell import one_line
from acd_local.engine import Engine
from acd_local.errors import AcdError, InternalError
from acd_local.generation import resolve_contrast
from acd_local.options import Options
from acd_local.runtime.choice import ContrastSettings
from acd_local.runtime.contrast import MAX_DIVISOR_ALPHA, contrast
from acd_local.runtime.prompts import Prompt, PromptSetup
from acd_local.runtime.template import Message

OURS = "acd"
LLAMAS = "two llama_cpp.Llama"
TRANSFORMERS = "transformers, bf16"
Peer = Callable[[Prompt], Measured]


@dataclass(frozen=True)
class Report:
    """A finished comparison.

    Attributes:
        cases: OURS, then the peers; ratio: time per token over ours in the same round.
        left_out: peers that could not be had, and why.
    """

    model: str
    threads: int
    tokens: int
    rounds: int
    cases: list[Case]
    left_out: dict[str, str]

    def summary(self) -> dict[str, Any]:
        """Medians, JSON types."""
        head = {name: getattr(self, name) for name in ("model", "threads", "tokens", "rounds", "left_out")}
        return head | {"cases": list(self._rows())}

    def _rows(self) -> Iterator[dict[str, Any]]:
        for case in self.cases:
            yield {
                "case": case.name,
                "tokens_per_second": median(case.tokens_per_second),
                "ratio_to_acd": median(case.ratio),
            }

    def lines(self) -> Iterator[str]:
        work = f"up to {self.tokens} tokens x {self.rounds} rounds"
        yield f"{one_line(self.model)}: {self.threads} threads, {work}, medians"
        yield f"{'':<24}{'tokens/s':>10}{'time over acd':>16}"
        for row in self._rows():
            speed, ratio = ("-" if row[n] is None else f"{row[n]:.2f}" for n in ("tokens_per_second", "ratio_to_acd"))
            yield f"{row['case']:<24}{speed:>10}{ratio:>16}"
        for name, why in self.left_out.items():
            yield f"left out: {name}: {one_line(why)}"


def run(
    model: str,
    *,
    tokens: int = 64,
    rounds: int = 5,
    pair: str | None = None,
    threads: int | None = None,
    ctx_size: int = 2048,
    progress: Progress = lambda line: None,
) -> Report:
    """Answer questions greedily by each, with the engine's own prompts, alpha and beta."""
    check_counts(tokens, rounds)
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(model, threads=threads, ctx_size=ctx_size, pair=contrasted_pair(pair)))
        settings = resolve_contrast(Options(), engine.pair)
        peers: dict[str, Peer] = {}
        left_out: dict[str, str] = {}
        for name, load in ((LLAMAS, _llamas), (TRANSFORMERS, _transformers)):
            progress(f"loading: {name}")
            try:
                peers[name] = load(stack, engine, settings, tokens)
            except (AcdError, ValueError, ImportError) as error:
                left_out[name] = " ".join(str(error).split())

        def ours(number: int) -> Measured:
            return ask(engine, text_of("questions", number), tokens)

        def theirs(peer: Peer, number: int) -> Measured:
            return peer(_prompt(engine, text_of("questions", number), tokens))

        ways: dict[tuple[str, str], Way] = {("", OURS): ours}
        ways |= {("", name): partial(theirs, peer) for name, peer in peers.items()}
        found = in_turns(ways, rounds, progress, warm_up=True)
        return Report(
            model=engine.info.name or engine.info.path.name,
            threads=engine.threads,
            tokens=tokens,
            rounds=rounds,
            cases=list(cases_of(found, OURS)[""].values()),
            left_out=left_out,
        )


def _prompt(engine: Engine, text: str, tokens: int) -> Prompt:
    return engine.prompts.build(
        PromptSetup.of(engine.pair), None, [Message("user", text)], contrast=True, max_tokens=tokens, overflow="error"
    )


class _Clock:
    """Times a peer from its first token to its last."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._at: list[float] = []

    def tick(self) -> None:
        """The scores of one more token are there."""
        self._at.append(time.perf_counter())

    def measured(self) -> Measured:
        if not self._at:
            raise InternalError("the peer chose no token")
        return Measured(len(self._at) - 1, self._at[-1] - self._at[0], first=self._at[0] - self._started)


# ---------------------------------------------------------------------------------------------------------------------
# Two Llama objects


def _llamas(stack: ExitStack, engine: Engine, settings: ContrastSettings, tokens: int) -> Peer:
    def load() -> Any:
        n = engine.threads
        llama = llama_cpp.Llama(
            str(engine.info.path), n_ctx=engine.n_ctx, n_threads=n, n_threads_batch=n, no_perf=True, verbose=False
        )
        stack.callback(llama.close)
        return llama

    safe, adversarial = load(), load()

    def ask(prompt: Prompt) -> Measured:
        clock, pending = _Clock(), list(prompt.adversarial or ())
        adversarial.reset()

        def against(ids: Any, logits: Any) -> Any:
            adversarial.eval(pending or [int(ids[-1])])
            pending.clear()
            seen = np.ctypeslib.as_array(llama_cpp.llama_get_logits(adversarial.ctx), (adversarial.n_vocab(),))
            kept, scores = contrast(logits, seen, alpha=settings.alpha, beta=settings.beta)
            logits = np.full_like(logits, -np.inf)
            logits[kept] = scores
            clock.tick()
            return logits

        processors = llama_cpp.LogitsProcessorList([against])
        safe.create_completion(list(prompt.safe), max_tokens=tokens, temperature=0.0, logits_processor=processors)
        return clock.measured()

    return ask


# ---------------------------------------------------------------------------------------------------------------------
# transformers


def _transformers(stack: ExitStack, engine: Engine, settings: ContrastSettings, tokens: int) -> Peer:
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers", "gguf")):
        raise ImportError("not installed: pip install 'acd-local[optimize]'")
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    before = torch.get_num_threads()
    torch.set_num_threads(engine.threads)
    stack.callback(torch.set_num_threads, before)
    model = _load_bf16(engine.info.path)
    ends = sorted(engine.vocab.eog_tokens())

    def ask(prompt: Prompt) -> Measured:
        clock = _Clock()

        class Ticking(LogitsProcessor):
            def __call__(self, input_ids: Any, scores: Any) -> Any:
                clock.tick()
                return scores

        ids = torch.tensor([prompt.safe])
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                negative_prompt_ids=torch.tensor([prompt.adversarial]),
                guidance_scale=1 / (1 - min(settings.alpha, MAX_DIVISOR_ALPHA)),
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=ends[0] if ends else 0,
                logits_processor=LogitsProcessorList([Ticking()]),
            )
        return clock.measured()

    return ask


def _load_bf16(path: Path) -> Any:
    """The file's weights as transformers loads them by itself, but none left in GGUF blocks, which takes longer."""
    import torch
    import transformers

    how: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # where there is none, weights are always unpacked
        how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(str(path.parent), **how)
        return model.eval()
    except (ValueError, NotImplementedError, KeyError, OSError) as error:
        raise ImportError(f"transformers cannot load this file: {' '.join(str(error).split())[:200]}") from None


def main(argv: Sequence[str] | None = None) -> int:
    return script.run(run, script.arguments(__doc__), argv)


if __name__ == "__main__":
    sys.exit(main())
