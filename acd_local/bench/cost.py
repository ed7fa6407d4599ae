"""Measure what answers cost: plain llama.cpp, and the engine in every way that it answers, in turns."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from acd_local import pairs
from acd_local.bench import first_token, memory
from acd_local.bench.first_token import FirstTokens
from acd_local.bench.measuring import (
    ENGINE_PLAIN,
    ENGINES,
    PLAIN,
    SHARED,
    SHARED_Q8,
    SPLIT,
    ask,
    bare_context,
    contrasted_pair,
    decode_plain,
    plain_prompt,
)
from acd_local.bench.questions import text_of
from acd_local.bench.rounds import Case, Measured, Progress, Way, cases_of, check_counts, in_turns
from acd_local.engine import Engine
from acd_local.errors import UsageError
from acd_local.generation import resolve_contrast
from acd_local.options import Options
from acd_local.pairs import PromptPair
from acd_local.runtime import llama
from acd_local.runtime.batch_costs import BatchCosts
from acd_local.runtime.threads import default_threads

GATED, SAMPLED, STEPWISE, DRAFTED = "behind the gate", "contrast, sampled", "contrast, no drafts", "contrast, --draft"
# By case what it asks of the engine; sampled at the default temperature.
ASKED: Mapping[str, Mapping[str, Any]] = {
    ENGINE_PLAIN: {"plain": True},
    GATED: {"gate": True},
    SHARED: {},
    STEPWISE: {"draft_max": 0},
    SAMPLED: {"temp": Options().temp},
    SPLIT: {},
    DRAFTED: {},
}
# By kind of texts what is measured on them; GATED where there is a gate, DRAFTED where there is a draft model.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "questions": (ENGINE_PLAIN, GATED, SHARED, STEPWISE, SAMPLED, SPLIT, DRAFTED),
    "repeats": (ENGINE_PLAIN, SHARED, STEPWISE, SAMPLED, DRAFTED),
    "code": (ENGINE_PLAIN, SHARED, STEPWISE, DRAFTED),
}


@dataclass(frozen=True)
class Report:
    """A finished benchmark.

    Attributes:
        pair, alpha, beta: what is contrasted; behind the gate it is the pair that is fitted to the model.
        draft: the model that drafted in the cases DRAFTED; None: none.
        groups: the cases of every kind of text by name, the first of them plain llama.cpp.
        memory: cases whose peak memory was measured.
        first: seconds to the first token of long questions.
        kv_mb: one KV cache of the context's size, 10^6 bytes.
        costs: what batches cost here, by which drafts are made; None: nothing can be drafted for this model.
    """

    model: str
    pair: str
    alpha: float
    beta: float
    draft: str | None
    n_vocab: int
    threads: int
    tokens: int
    rounds: int
    groups: Mapping[str, Mapping[str, Case]]
    memory: list[Case]
    first: FirstTokens
    kv_mb: float
    costs: BatchCosts | None

    @property
    def extra_mb(self) -> float | None:
        """Peak memory of the contrast over that of plain llama.cpp and a second KV cache."""
        peaks = {case.name: case.peak_mb for case in self.memory}
        plain, shared = peaks.get(PLAIN), peaks.get(SHARED)
        return None if plain is None or shared is None else round(shared - plain - self.kv_mb, 1)

    def summary(self) -> dict[str, Any]:
        """Return medians, JSON types."""
        head = ("model", "pair", "alpha", "beta", "draft", "n_vocab", "threads", "tokens", "rounds")
        return {
            **{name: getattr(self, name) for name in head},
            "groups": {group: [case.summary() for case in cases.values()] for group, cases in self.groups.items()},
            "peak_mb": {case.name: case.peak_mb for case in self.memory},
            "kv_mb": round(self.kv_mb, 1),
            "peak_over_plain_and_kv_mb": self.extra_mb,
            "first_token": {"question_tokens": self.first.question, "ways": self.first.summary()},
            "batch_costs": None if self.costs is None else asdict(self.costs),
        }


def run(
    model: str,
    *,
    tokens: int = 64,
    rounds: int = 5,
    pair: str | None = None,
    draft: str | None = None,
    threads: int | None = None,
    ctx_size: int = 2048,
    memory_too: bool = True,
    progress: Progress = lambda line: None,
) -> Report:
    """Measure all cases.

    Args:
        tokens: answer tokens per measurement.
        rounds: how often every case is measured.
        memory_too: also start one process per case for its peak memory.
    """
    check_counts(tokens, rounds)
    settings: dict[str, Any] = {"threads": threads or default_threads(), "ctx_size": ctx_size}
    used = contrasted_pair(pair)
    with ExitStack() as stack:

        def load(**differing: Any) -> Engine:
            return stack.enter_context(Engine(model, pair=used, cache=False, **settings, **differing))

        engine = load()
        engines = dict.fromkeys(ASKED, engine) | {SPLIT: load(**ENGINES[SPLIT])}
        if draft is not None:
            engines[DRAFTED] = load(draft=draft)
        bare = stack.enter_context(bare_context(engine))
        gated = used if pair is not None else pairs.best_for(engine.info)
        left_out = {DRAFTED} if draft is None else set()
        if gated is None or gated.gate is None:
            left_out.add(GATED)
        progress("warming up")
        ways = _ways(bare, engines, gated, tokens, left_out)
        for way in ways.values():
            way(0)
        groups = cases_of(in_turns(ways, rounds, progress), PLAIN)
        contrast = resolve_contrast(Options(), used)
        report = Report(
            model=engine.info.name or engine.info.path.name,
            pair=used.name,
            alpha=contrast.alpha,
            beta=contrast.beta,
            draft=draft,
            n_vocab=engine.info.n_vocab,
            threads=engine.threads,
            tokens=tokens,
            rounds=rounds,
            groups=groups,
            memory=[],
            first=first_token.run(engine, bare, rounds, progress),
            kv_mb=memory.kv_mb(bare, ctx_size),
            costs=engine.decoder.costs if engine.decoder.can_draft else None,
        )
        names = [PLAIN, *ENGINES] if memory.takes_q8(bare.model) else [PLAIN, *(n for n in ENGINES if n != SHARED_Q8)]
    return replace(report, memory=_peaks(names, model, pair, settings, progress)) if memory_too else report


def calibrate(model: str, *, threads: int | None = None) -> BatchCosts:
    """Measure anew what batches cost an engine of default settings, and keep it for all later ones.

    Raises:
        UsageError: nothing can be drafted for this model.
    """
    with Engine(model, pair="as-is", threads=threads) as engine:
        if not engine.decoder.can_draft:
            raise UsageError("nothing can be drafted for this model: its memory cannot forget single tokens")
        return engine.decoder.calibrate()


def _peaks(
    names: list[str], model: str, pair: str | None, settings: Mapping[str, Any], progress: Progress
) -> list[Case]:
    found = []
    for name in names:
        progress(f"memory: {name}")
        found.append(Case(name, peak_mb=memory.peak_mb(name, model, pair=pair, **settings)))
    return found


def _ways(
    bare: llama.Context, engines: Mapping[str, Engine], gated: PromptPair | None, tokens: int, left_out: set[str]
) -> dict[tuple[str, str], Way]:
    """List the ways of answering a round's text, by group and name."""

    def plain(kind: str, number: int) -> Measured:
        return decode_plain(bare, plain_prompt(engines[SHARED], text_of(kind, number)), tokens)

    def ours(name: str, kind: str, number: int) -> Measured:
        pair = gated if name == GATED else None
        return ask(engines[name], text_of(kind, number), tokens, pair=pair, **ASKED[name])

    ways: dict[tuple[str, str], Way] = {}
    for group, names in GROUPS.items():
        ways[group, PLAIN] = partial(plain, group)
        ways |= {(group, name): partial(ours, name, group) for name in names if name not in left_out}
    return ways
