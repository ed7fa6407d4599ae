"""The same contrast through what else one would take today, in turns with this package's own, in one process.

Two `llama_cpp.Llama` objects of one file, the adversarial one asked from a logits processor of the other; and
transformers' classifier-free guidance on the same weights as bf16, with the contrast's weight and without a mask.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from acd_local.bench import QUESTIONS, Ask, Case, Measured, by_strategy, check_counts, median, warm_up
from acd_local.engine import Engine, measured_pair
from acd_local.errors import AcdError, InternalError
from acd_local.generation import resolve_contrast
from acd_local.options import Options
from acd_local.runtime.choice import ContrastSettings
from acd_local.runtime.contrast import MAX_DIVISOR_ALPHA, contrast
from acd_local.runtime.prompts import Framing, Prompt
from acd_local.runtime.template import Message

OURS = "acd, auto"
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
        rows = [
            {"case": c.name, "tokens_per_second": median(c.tokens_per_second), "ratio_to_acd": median(c.ratio)}
            for c in self.cases
        ]
        return head | {"cases": rows}


def run(
    model: str,
    *,
    tokens: int = 64,
    rounds: int = 5,
    pair: str | None = None,
    threads: int | None = None,
    ctx_size: int = 2048,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Answer QUESTIONS greedily by each, with the engine's own prompts, alpha and beta."""
    check_counts(tokens, rounds)
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(model, threads=threads, ctx_size=ctx_size, pair=measured_pair(model, pair)))
        settings = resolve_contrast(Options(), engine.pair)
        peers: dict[str, Peer] = {}
        left_out: dict[str, str] = {}
        for name, load in ((LLAMAS, _llamas), (TRANSFORMERS, _transformers)):
            progress(f"loading: {name}")
            try:
                peers[name] = load(stack, engine, settings, tokens)
            except (AcdError, ValueError, ImportError) as error:
                left_out[name] = " ".join(str(error).split())
        cases = {name: Case(name) for name in (OURS, *peers)}
        progress("warming up")
        warm_up(engine, tokens)
        for number in range(rounds + 1):
            progress(f"round {number} of {rounds}" if number else "a first round that does not count")
            text = QUESTIONS[number % len(QUESTIONS)]
            prompt = _prompt(engine, text, tokens)
            asks: dict[str, Ask] = {OURS: partial(by_strategy, engine, "auto", text, tokens)}
            asks |= {name: partial(ask, prompt) for name, ask in peers.items()}
            found = {name: asks[name]() for name in (asks if number % 2 else list(asks)[::-1])}
            ours = found[OURS]
            if number and ours.steps:
                for name, case in cases.items():
                    case.add(found[name], ours.seconds / ours.steps * found[name].steps)
        return Report(
            model=engine.info.name or engine.info.path.name,
            threads=engine.threads,
            tokens=tokens,
            rounds=rounds,
            cases=list(cases.values()),
            left_out=left_out,
        )


def _prompt(engine: Engine, text: str, tokens: int) -> Prompt:
    return engine.prompts.build(
        Framing.of(engine.pair), None, [Message("user", text)], contrast=True, max_tokens=tokens, overflow="error"
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
    import llama_cpp

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
    """The file's weights as transformers loads them by itself."""
    import torch
    from transformers import AutoModelForCausalLM

    from acd_local.optimize.weights import quiet

    with quiet():
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(path.parent), gguf_file=path.name, dtype=torch.bfloat16
            )
            return model.eval()
        except (ValueError, NotImplementedError, KeyError, OSError) as error:
            raise ImportError(f"transformers cannot load this file: {' '.join(str(error).split())[:200]}") from None
