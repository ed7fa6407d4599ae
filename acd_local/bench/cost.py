"""Measure what the contrast costs: plain llama.cpp, the engine without it, and every layout and strategy, in turns."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from acd_local.bench import first_token, memory
from acd_local.bench.first_token import FirstTokens
from acd_local.bench.measuring import (
    ENGINE_PLAIN,
    ENGINES,
    PLAIN,
    SHARED,
    SHARED_Q8,
    SPLIT,
    STRATEGIES,
    ask,
    bare_context,
    by_strategy,
    decode_plain,
    forget,
    plain_prompt,
    row_costs,
    warm_up,
)
from acd_local.bench.questions import text_of
from acd_local.bench.rounds import Case, Measured, Progress, Way, auto_against_best, cases_of, check_counts, in_turns
from acd_local.engine import Engine, pair_to_measure
from acd_local.generation import resolve_contrast
from acd_local.options import Options
from acd_local.runtime import llama
from acd_local.runtime.rowcosts import RowCosts
from acd_local.runtime.threads import default_threads

TEMP = 0.8  # of sampled answers
GROUPS = {"strategies": ("questions", 0.0), "sampled": ("questions", TEMP), "repeat": ("repeats", 0.0)}
CASE_FIGURES = (
    "tokens_per_second",
    "ratio_to_plain",
    "outside_decode_ms",
    "first_token_cold_s",
    "first_token_warm_s",
    "peak_mb",
)
STRATEGY_FIGURES = ("tokens_per_second", "ratio_to_plain", "compared_share", "accepted_share", "rows_per_token")


@dataclass(frozen=True)
class Report:
    """A finished benchmark.

    Attributes:
        pair, alpha, beta: what is contrasted.
        cases: plain llama.cpp and the engine, without contrast and in each layout, on questions; last, where memory was
            measured, the memory with KV caches of another type.
        groups: the execution strategies of the shared layout by name, on questions greedily ("strategies") and at TEMP
            ("sampled"), and on texts to repeat, greedily ("repeat").
        first: seconds to the first token of long questions.
        kv_mb: one KV cache of the context's size, 10^6 bytes.
        costs: what rows cost here, as the engine measured it; None where it could not.
    """

    model: str
    pair: str
    alpha: float
    beta: float
    n_vocab: int
    threads: int
    tokens: int
    rounds: int
    cases: list[Case]
    groups: Mapping[str, Mapping[str, Case]]
    first: FirstTokens
    kv_mb: float
    costs: RowCosts | None

    @property
    def extra_mb(self) -> float | None:
        """Peak memory of the contrast over that of plain llama.cpp and a second KV cache."""
        peaks = {case.name: case.peak_mb for case in self.cases}
        plain, shared = peaks.get(PLAIN), peaks.get(SHARED)
        return None if plain is None or shared is None else round(shared - plain - self.kv_mb, 1)

    def summary(self) -> dict[str, Any]:
        """Return medians, JSON types."""
        head = ("model", "pair", "alpha", "beta", "n_vocab", "threads", "tokens", "rounds")
        return {
            **{name: getattr(self, name) for name in head},
            "cases": [case.summary(CASE_FIGURES) for case in self.cases],
            "kv_mb": round(self.kv_mb, 1),
            "peak_over_plain_and_kv_mb": self.extra_mb,
            **strategies_summary(self.groups),
            "first_token": {"question_tokens": self.first.question, "ways": self.first.summary()},
            "row_costs": None if self.costs is None else asdict(self.costs),
        }


def strategies_summary(groups: Mapping[str, Mapping[str, Case]]) -> dict[str, Any]:
    """Return the medians of each group of strategies, JSON types."""
    found: dict[str, Any] = {
        group: [case.summary(STRATEGY_FIGURES) for case in cases.values()] for group, cases in groups.items()
    }
    return found | {"auto_against_best": {group: auto_against_best(cases) for group, cases in groups.items()}}


def run(
    model: str,
    *,
    tokens: int = 64,
    rounds: int = 5,
    pair: str | None = None,
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
    settings: dict[str, Any] = {"threads": threads or default_threads(), "ctx_size": ctx_size, "cache": False}
    used = pair_to_measure(model, pair)
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(Engine(model, pair=used, **settings, **ENGINES[name]))
            for name in (ENGINE_PLAIN, SHARED, SPLIT)
        }
        shared = engines[SHARED]
        bare = stack.enter_context(bare_context(shared))
        progress("warming up")
        cold = _cold(bare, engines, tokens)
        groups = cases_of(in_turns(_ways(bare, engines, tokens), rounds, progress), PLAIN)
        ordinary = groups["strategies"]
        cases = {name: ordinary[name] for name in (PLAIN, ENGINE_PLAIN)}
        cases |= {SHARED: ordinary["auto"], SPLIT: ordinary[SPLIT]}  # auto is what the engine does by default
        contrast = resolve_contrast(Options(), used)
        report = Report(
            model=shared.info.name or shared.info.path.name,
            pair=used.name,
            alpha=contrast.alpha,
            beta=contrast.beta,
            n_vocab=shared.info.n_vocab,
            threads=shared.threads,
            tokens=tokens,
            rounds=rounds,
            cases=[replace(case, name=name, cold_s=cold[name]) for name, case in cases.items()],
            groups={group: {name: found[name] for name in STRATEGIES} for group, found in groups.items()},
            first=first_token.run(shared, bare, rounds, progress),
            kv_mb=memory.kv_mb(bare, ctx_size),
            costs=row_costs(shared),
        )
        q8 = [Case(SHARED_Q8)] if memory.takes_q8(bare.model) else []
    if not memory_too:
        return report
    with_memory = []
    for case in report.cases + q8:
        progress(f"memory: {case.name}")
        with_memory.append(replace(case, peak_mb=memory.peak_mb(case.name, model, pair=pair, **settings)))
    return replace(report, cases=with_memory)


def _cold(bare: llama.Context, engines: Mapping[str, Engine], tokens: int) -> dict[str, float | None]:
    """Time the first token of the first answers; then the engines learn what rows cost."""
    text = text_of("questions", 0)
    cold = {PLAIN: decode_plain(bare, plain_prompt(engines[SHARED], text), tokens).first}
    for name, engine in engines.items():
        cold[name] = ask(engine, text, tokens, plain=name == ENGINE_PLAIN).first
        if name != ENGINE_PLAIN:
            warm_up(engine, tokens)
    return cold


def _ways(bare: llama.Context, engines: Mapping[str, Engine], tokens: int) -> dict[tuple[str, str], Way]:
    """List the ways of answering a round's text, by group and name."""
    shared = engines[SHARED]

    def plain(kind: str, number: int) -> Measured:
        return decode_plain(bare, plain_prompt(shared, text_of(kind, number)), tokens)

    def anew(name: str, number: int) -> Measured:
        forget(engines[name], plain=name == ENGINE_PLAIN)
        return ask(engines[name], text_of("questions", number), tokens, plain=name == ENGINE_PLAIN)

    def strategy(name: str, kind: str, temp: float, number: int) -> Measured:
        return by_strategy(shared, name, text_of(kind, number), tokens, temp)

    ways: dict[tuple[str, str], Way] = {}
    for group, (kind, temp) in GROUPS.items():
        ways[group, PLAIN] = partial(plain, kind)
        if group == "strategies":
            ways |= {(group, name): partial(anew, name) for name in (ENGINE_PLAIN, SPLIT)}
        ways |= {(group, name): partial(strategy, name, kind, temp) for name in STRATEGIES}
    return ways
