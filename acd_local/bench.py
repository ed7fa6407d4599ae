"""What the contrast costs, measured against plain llama.cpp decoding of the same model in the same process.

The cases take turns within every round, so that a machine whose speed drifts slows all of them alike; ratios are taken
round by round and their median is reported. Peak memory is a process' own figure, so each case gets a process.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from acd_local.answering import AnswerStream
from acd_local.errors import InternalError, UsageError
from acd_local.options import Options
from acd_local.runtime import child, llama
from acd_local.runtime.streams import LAYOUTS
from acd_local.runtime.template import Message
from acd_local.runtime.threads import physical_cores
from acd_local.session import Engine

QUESTIONS = (
    "How do I get red wine out of a carpet?",
    "Write a short story about a lighthouse keeper and his dog.",
    "Explain how a bicycle stays upright when it is moving.",
    "What should I pack for a week of hiking in the mountains?",
    "Describe the water cycle to a curious child, step by step.",
    "Give me a plan for learning to cook in thirty days.",
)
PLAIN = "plain llama.cpp"
ENGINE_PLAIN = "acd --plain"


@dataclass
class Case:
    """One way of decoding, measured over all rounds.

    Attributes:
        tokens_per_second: per round.
        ratio: time per token over plain llama.cpp's in the same round, per round.
        outside_ms: time per token spent outside llama_decode, milliseconds, per round.
        cold_s: time to the first token of a fresh engine, seconds, load excluded.
        warm_s: the same for a new conversation whose system prompts are decoded, per round.
        peak_mb: peak resident memory of a process that does only this, 10^6 bytes.
    """

    name: str
    tokens_per_second: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    outside_ms: list[float] = field(default_factory=list)
    cold_s: float | None = None
    warm_s: list[float] = field(default_factory=list)
    peak_mb: float | None = None

    def summary(self) -> dict[str, float | str | None]:
        """Medians, JSON types."""

        def median(values: list[float]) -> float | None:
            return round(statistics.median(values), 4) if values else None

        return {
            "case": self.name,
            "tokens_per_second": median(self.tokens_per_second),
            "ratio_to_plain": median(self.ratio),
            "outside_decode_ms": median(self.outside_ms),
            "first_token_cold_s": None if self.cold_s is None else round(self.cold_s, 4),
            "first_token_warm_s": median(self.warm_s),
            "peak_mb": None if self.peak_mb is None else round(self.peak_mb, 1),
        }


@dataclass(frozen=True)
class Report:
    """A finished benchmark."""

    model: str
    n_vocab: int
    threads: int
    tokens: int
    rounds: int
    cases: list[Case]


def run(
    model: str,
    *,
    tokens: int = 64,
    rounds: int = 5,
    threads: int | None = None,
    ctx_size: int = 2048,
    memory: bool = True,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Measure plain llama.cpp, the engine without contrast, and the contrast in each layout, in turns.

    Args:
        tokens: answer tokens per measurement.
        rounds: how often every case is measured.
        memory: also start one process per case for its peak memory.
    """
    if tokens < 2 or rounds < 1:
        raise UsageError(f"a benchmark needs at least 2 tokens and 1 round, not {tokens} and {rounds}")
    threads = threads or physical_cores()
    settings: dict[str, Any] = {"threads": threads, "ctx_size": ctx_size}
    with ExitStack() as stack:
        engines = {f"contrast, {layout}": Engine(model, layout=layout, **settings) for layout in LAYOUTS}
        engines = {ENGINE_PLAIN: Engine(model, **settings), **engines}
        for engine in engines.values():
            stack.enter_context(engine)
        first = engines[ENGINE_PLAIN]
        bare = stack.enter_context(llama.Context(first._model, n_ctx=ctx_size, n_seq=1, threads=threads))
        cases = {name: Case(name) for name in (PLAIN, *engines)}
        for number in range(rounds + 1):  # the first round warms caches up; only its cold start counts
            progress(f"round {number} of {rounds}" if number else "warming up")
            question = QUESTIONS[number % len(QUESTIONS)]
            plain_s = _plain(first, bare, question, tokens, cases[PLAIN], counts=number > 0)
            for name, engine in engines.items():
                _engine(engine, question, tokens, cases[name], plain_s, counts=number > 0)
        report = Report(
            model=first.info.name or first.info.path.name,
            n_vocab=first.info.n_vocab,
            threads=threads,
            tokens=tokens,
            rounds=rounds,
            cases=list(cases.values()),
        )
    if memory:
        for case in report.cases:
            progress(f"memory: {case.name}")
            case.peak_mb = _peak_of(case.name, model, settings)
    return report


def _plain(engine: Engine, context: llama.Context, question: str, tokens: int, case: Case, *, counts: bool) -> float:
    """llama_decode and argmax, nothing else; returns seconds per token."""
    prompt = engine.template.encode([Message("system", engine.pair.safe), Message("user", question)])
    context.truncate(0, 0)
    started = time.perf_counter()
    token = int(_decode(context, prompt, 0).argmax())
    first = time.perf_counter() - started
    inside, started = context.seconds, time.perf_counter()
    for position in range(len(prompt), len(prompt) + tokens - 1):
        token = int(_decode(context, [token], position).argmax())
    per_token = (time.perf_counter() - started) / (tokens - 1)
    if counts:
        case.tokens_per_second.append(1 / per_token)
        case.ratio.append(1.0)
        case.outside_ms.append((per_token - (context.seconds - inside) / (tokens - 1)) * 1e3)
        case.warm_s.append(first)
    else:
        case.cold_s = first
    return per_token


def _decode(context: llama.Context, tokens: list[int], start: int) -> llama.Logits:
    rows = np.array(tokens, np.int32)
    for at in range(0, len(rows), context.n_batch):
        part = rows[at : at + context.n_batch]
        wanted = np.zeros(len(part), np.int8)
        wanted[-1] = 1
        positions = np.arange(start + at, start + at + len(part), dtype=np.int32)
        context.decode(part, np.zeros(len(part), np.int32), positions, wanted)
    logits: llama.Logits = context.logits(1)[0]
    return logits


def _engine(engine: Engine, question: str, tokens: int, case: Case, plain_s: float, *, counts: bool) -> None:
    """The whole engine, text and statistics included."""
    stream, contexts = _ask(engine, question, tokens, plain=case.name == ENGINE_PLAIN), engine._streams.contexts
    started, inside = time.perf_counter(), 0.0
    for _ in stream:
        inside = inside or sum(context.seconds for context in contexts)  # once the prompt is decoded
    seconds = time.perf_counter() - started
    inside = sum(context.seconds for context in contexts) - inside
    timings, steps = stream.answer.timings, max(1, len(stream.answer.tokens) - 1)
    first, seconds = timings.prompt_seconds, seconds - timings.prompt_seconds
    per_token = seconds / steps
    if counts:
        case.tokens_per_second.append(1 / per_token)
        case.ratio.append(per_token / plain_s)
        case.outside_ms.append((seconds - inside) / steps * 1e3)
        case.warm_s.append(first)
    else:
        case.cold_s = first


def _ask(engine: Engine, question: str, tokens: int, *, plain: bool) -> AnswerStream:
    return engine.generate(question, Options(temp=0.0, max_tokens=tokens, plain=plain))


# ---------------------------------------------------------------------------------------------------------------------
# Peak memory, one process per case


def _peak_of(case: str, model: str, settings: Mapping[str, Any]) -> float:
    done = child.run_module("acd_local.bench", case, model, str(settings["threads"]), str(settings["ctx_size"]))
    if done.returncode != 0:
        raise InternalError(
            f"measuring the memory of {case!r} failed: {done.stderr.decode('utf-8', 'replace').strip()[-300:]}"
        )
    return float(done.stdout)


def _peak_here(case: str, model: str, threads: int, ctx_size: int) -> float:
    """Answer one question in this process and return its peak resident memory, 10^6 bytes."""
    if case == PLAIN:
        from acd_local.models import resolve

        with (
            llama.Model(resolve(model)) as loaded,
            llama.Context(loaded, n_ctx=ctx_size, n_seq=1, threads=threads) as context,
        ):
            prompt = loaded.vocab.tokenize(QUESTIONS[0] * 12, parse_special=False)
            token = int(_decode(context, prompt, 0).argmax())
            for position in range(len(prompt), len(prompt) + 16):
                token = int(_decode(context, [token], position).argmax())
    else:
        layout = "split" if "split" in case else "shared"
        with Engine(model, threads=threads, ctx_size=ctx_size, layout=layout) as engine:  # type: ignore[arg-type]
            _ask(engine, QUESTIONS[0], 16, plain=case == ENGINE_PLAIN).run()
    return _high_water_mark()


def _high_water_mark() -> float:
    """Peak resident memory of this process, 10^6 bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count the parent's memory at the time of the fork
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


if __name__ == "__main__":
    sys.stdout.write(f"{_peak_here(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))}\n")
