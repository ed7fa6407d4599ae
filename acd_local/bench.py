"""What the contrast costs, measured against plain llama.cpp decoding of the same model in the same process.

The cases take turns within every round, one round forwards and the next backwards, so that a machine whose speed drifts
slows all of them alike; ratios are taken round by round and their median is reported. Peak memory is a process' own
figure, so each case gets a process.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np

from acd_local.engine import Engine, measured_pair
from acd_local.errors import InternalError, UsageError
from acd_local.generation import AnswerStream, resolve_contrast
from acd_local.options import Options
from acd_local.runtime import child, llama
from acd_local.runtime.rowcosts import RowCosts
from acd_local.runtime.streams import LAYOUTS
from acd_local.runtime.template import Message
from acd_local.runtime.threads import default_threads

QUESTIONS = (
    "How do I get red wine out of a carpet?",
    "Write a short story about a lighthouse keeper and his dog.",
    "Explain how a bicycle stays upright when it is moving.",
    "What should I pack for a week of hiking in the mountains?",
    "Describe the water cycle to a curious child, step by step.",
    "Give me a plan for learning to cook in thirty days.",
)
# Answers that repeat their source.
REPEATS = (
    "Copy this text and correct its spelling:\n\n"
    "The libary in our town opens at nine in the morning and closes at six in the evening. On Saturdays it closes at "
    "noon, and on Sundays it stays shut. Everyone who lives here can borow up to ten books for four weeks, and films "
    "and games for one week. If nobody else is waiting for a book, it can be kept for another four weeks. Whoever "
    "brings a book back to late pays twenty cents for each day. Children pay nothing. In the cellar there is a room "
    "where school classes meet, and a large table where old maps are laid out. The oldest of them was drawn by a "
    "surveyer who walked along the river for two summers. Next to the entrance hangs a board with the lectures of the "
    "month. Most of them are about history, some about gardening, and one of them is always about the stars.",
    "Rewrite this text with all numbers as digits and change nothing else:\n\n"
    "Our bakery starts work at three in the morning. Two bakers knead the dough, and a third one heats the oven. By "
    "five the first forty loaves are done, and at six the shop opens. We sell seven kinds of bread and twelve kinds "
    "of rolls, and on Fridays a cake with plums. A loaf weighs one kilogram and keeps for four days. In winter we "
    "bake fifteen loaves more each day, because the school across the street takes them. The flour comes from a mill "
    "that is eight kilometres away, and the salt from a mine that has been open for two hundred years. What is left in "
    "the evening costs half, and what is left after that goes to a farm with thirty pigs. Nothing is thrown away.",
    "Summarise this note by quoting its three most important sentences word for word:\n\n"
    "The pump in the cellar was checked on Monday. Its filter was full of sand and has been replaced. While it was "
    "open we found that the seal of the lower valve is worn and lets a little water through. It will hold for the "
    "summer, but it has to be replaced before the first frost, because water that stands in the pipe can freeze and "
    "burst it. A new seal has been ordered and should be here in three weeks. Until then, please do not switch the "
    "pump off for longer than an hour, and look at the gauge once a day. If it shows less than two bar, close the "
    "main valve and call us. The pressure tank is in good order. The electrical box has been cleaned, and its cover "
    "now closes again. We also replaced the lamp at the foot of the stairs, which had been broken since spring.",
)
PLAIN = "plain llama.cpp"
ENGINE_PLAIN = "acd --plain"
SHARED = "contrast, shared"
SHARED_Q8 = "contrast, q8_0 KV"
WINDOW = 16
TEMP = 0.8  # of sampled answers
STRATEGIES: Mapping[str, Mapping[str, Any]] = {
    "stepwise": {"strategy": "stepwise"},
    "deferred": {"strategy": "deferred"},
    "auto": {"strategy": "auto"},
    f"window {WINDOW}": {"strategy": "auto", "window": WINDOW},
}
WARM_UPS = 12  # answers at most until it is known what rows cost
SAFE, ADVERSARIAL = 0, 1  # sequences of a shared context with one conversation


class Batch(NamedTuple):
    """What one llama_decode was given, each of shape (rows,)."""

    seqs: tuple[int, ...]
    positions: tuple[int, ...]
    wanted: tuple[int, ...]

    def rows(self, seq: int) -> int:
        return self.seqs.count(seq)

    def start(self, seq: int) -> int:
        """The first position of a sequence that has rows here."""
        return min(p for p, s in zip(self.positions, self.seqs, strict=True) if s == seq)


@dataclass(frozen=True)
class Measured:
    """One answer.

    Attributes:
        steps: tokens after the first.
        seconds: from the first token to the last.
        outside: of these, spent outside llama_decode; None: not measured.
        first: seconds to the first token.
        compared: share of the positions where the adversarial stream's logits were taken.
        batches: what was decoded after the prompt, where it was recorded.
    """

    steps: int
    seconds: float
    outside: float | None = None
    first: float | None = None
    compared: float | None = None
    batches: Sequence[Batch] = ()

    def prompt(self, seq: int) -> int:
        """Tokens that a sequence held before the first of the batches."""
        return min((batch.start(seq) for batch in self.batches if seq in batch.seqs), default=0)

    @property
    def accepted(self) -> float | None:
        """Share of the safe stream's rows that became answer tokens: the others were drafts that fell."""
        rows = sum(batch.rows(SAFE) for batch in self.batches)
        return self.steps / rows if rows else None

    @property
    def rows(self) -> float | None:
        """Rows decoded per token, both streams."""
        rows = sum(len(batch.seqs) for batch in self.batches)
        return rows / self.steps if rows else None


Ask: TypeAlias = Callable[[], Measured]


@dataclass
class Case:
    """One way of decoding, measured over all rounds.

    Attributes:
        tokens_per_second: per round.
        ratio: time per token over that of as many tokens of plain llama.cpp in the same round, per round.
        outside_ms: time per token spent outside llama_decode, milliseconds, per round.
        cold_s: time to the first token of a fresh engine, seconds, load excluded.
        warm_s: the same for a new conversation whose system prompts are decoded, per round.
        peak_mb: peak resident memory of a process that does only this, 10^6 bytes.
        compared, accepted, rows: see `Measured`, per round.
    """

    name: str
    tokens_per_second: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    outside_ms: list[float] = field(default_factory=list)
    cold_s: float | None = None
    warm_s: list[float] = field(default_factory=list)
    peak_mb: float | None = None
    compared: list[float] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)

    def add(self, found: Measured, plain_s: float) -> None:
        """A round's answer; plain_s: seconds that plain llama.cpp took for as many tokens. One token is no measure."""
        if found.steps > 0:
            self.tokens_per_second.append(found.steps / found.seconds)
            self.ratio.append(found.seconds / plain_s)
            if found.outside is not None:
                self.outside_ms.append(found.outside / found.steps * 1e3)
        lists = (self.warm_s, self.compared, self.accepted, self.rows)
        for values, value in zip(lists, (found.first, found.compared, found.accepted, found.rows), strict=True):
            if value is not None:
                values.append(value)

    def summary(self) -> dict[str, float | str | None]:
        """Medians, JSON types."""
        return {
            "case": self.name,
            "tokens_per_second": median(self.tokens_per_second),
            "ratio_to_plain": median(self.ratio),
            "outside_decode_ms": median(self.outside_ms),
            "first_token_cold_s": None if self.cold_s is None else round(self.cold_s, 4),
            "first_token_warm_s": median(self.warm_s),
            "peak_mb": None if self.peak_mb is None else round(self.peak_mb, 1),
        }

    def strategy_summary(self) -> dict[str, float | str | None]:
        """The same of an execution strategy."""
        return {
            "case": self.name,
            "tokens_per_second": median(self.tokens_per_second),
            "ratio_to_plain": median(self.ratio),
            "compared_share": median(self.compared),
            "accepted_share": median(self.accepted),
            "rows_per_token": median(self.rows),
        }


def median(values: Sequence[float]) -> float | None:
    """Rounded for people; None of nothing."""
    return round(statistics.median(values), 4) if values else None


@dataclass(frozen=True)
class Report:
    """A finished benchmark.

    Attributes:
        cases: plain llama.cpp and the engine, without contrast and in each layout, on QUESTIONS; last, where memory was
            measured, the memory with KV caches of another type.
        pair, alpha, beta: what is contrasted.
        strategies, sampled, repeat: execution strategies of the shared layout, on QUESTIONS greedily and at TEMP, and
            on REPEATS greedily.
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
    strategies: list[Case]
    sampled: list[Case]
    repeat: list[Case]
    kv_mb: float
    costs: RowCosts | None

    @property
    def extra_mb(self) -> float | None:
        """Peak memory of the contrast over that of plain llama.cpp and a second KV cache."""
        peaks = {case.name: case.peak_mb for case in self.cases}
        plain, shared = peaks.get(PLAIN), peaks.get(SHARED)
        return None if plain is None or shared is None else round(shared - plain - self.kv_mb, 1)


def auto_against_best(cases: Sequence[Case]) -> float | None:
    """The time of `auto` over that of the better fixed strategy; 1 is what it should be, less is noise."""
    medians = {case.name: statistics.median(case.ratio) for case in cases if case.ratio}
    if not {"auto", "stepwise", "deferred"} <= set(medians):
        return None
    return round(medians["auto"] / min(medians["stepwise"], medians["deferred"]), 4)


# ---------------------------------------------------------------------------------------------------------------------
# The rounds


def run(
    model: str,
    *,
    tokens: int = 64,
    rounds: int = 5,
    pair: str | None = None,
    threads: int | None = None,
    ctx_size: int = 2048,
    memory: bool = True,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Measure plain llama.cpp, the engine without contrast, the contrast in each layout and strategy, in turns.

    Args:
        tokens: answer tokens per measurement.
        rounds: how often every case is measured.
        memory: also start one process per case for its peak memory.
    """
    check_counts(tokens, rounds)
    threads = threads or default_threads()
    used = measured_pair(model, pair)
    settings: dict[str, Any] = {"threads": threads, "ctx_size": ctx_size, "pair": used}
    with ExitStack() as stack:
        engines = {f"contrast, {layout}": Engine(model, layout=layout, **settings) for layout in LAYOUTS}
        engines = {ENGINE_PLAIN: Engine(model, **settings), **engines}
        for engine in engines.values():
            stack.enter_context(engine)
        first, shared = engines[ENGINE_PLAIN], engines[SHARED]
        bare = stack.enter_context(llama.Context(first.decoder.model, n_ctx=ctx_size, n_seq=1, threads=threads))
        cases = {name: Case(name) for name in (PLAIN, *engines)}
        groups = {kind: {name: Case(name) for name in STRATEGIES} for kind in ("strategies", "sampled", "repeat")}
        progress("warming up")
        cases[PLAIN].cold_s = _plain(bare, first, QUESTIONS[0], tokens).first
        cache_mb = kv_mb(bare, ctx_size)
        for name, engine in engines.items():
            cases[name].cold_s = _ask(engine, name, QUESTIONS[0], tokens).first
            if name != ENGINE_PLAIN:
                warm_up(engine, tokens)
        for number in range(1, rounds + 1):
            progress(f"round {number} of {rounds}")
            _round(number, bare, engines, cases, groups, tokens)
        contrast = resolve_contrast(Options(), used)
        report = Report(
            model=first.info.name or first.info.path.name,
            pair=used.name,
            alpha=contrast.alpha,
            beta=contrast.beta,
            n_vocab=first.info.n_vocab,
            threads=threads,
            tokens=tokens,
            rounds=rounds,
            cases=list(cases.values()),
            kv_mb=cache_mb,
            costs=shared.decoder.row_clock.known,
            **{kind: list(group.values()) for kind, group in groups.items()},
        )
        takes_q8 = memory and _takes_q8(first.decoder.model)
    if memory:
        for case in report.cases:
            progress(f"memory: {case.name}")
            case.peak_mb = _peak_of(case.name, model, settings)
        if takes_q8:
            report.cases.append(Case(SHARED_Q8, peak_mb=_peak_of(SHARED_Q8, model, settings)))
    return report


def _takes_q8(model: llama.Model) -> bool:
    """Whether the model's heads can be kept in q8_0: not every size can."""
    try:
        llama.Context(model, n_ctx=256, n_seq=1, kv_type="q8_0").close()
    except UsageError:
        return False
    return True


def _plain(bare: llama.Context, engine: Engine, text: str, tokens: int) -> Plain:
    return decode_plain(bare, engine.template.encode(conversation(engine, text)), tokens)


def _round(
    number: int,
    bare: llama.Context,
    engines: Mapping[str, Engine],
    cases: Mapping[str, Case],
    groups: Mapping[str, Mapping[str, Case]],
    tokens: int,
) -> None:
    """All cases once: a question greedily and sampled, and a text to repeat."""
    shared = engines[SHARED]

    def plain(text: str) -> Callable[[], Plain]:
        return partial(_plain, bare, engines[ENGINE_PLAIN], text, tokens)

    def ways(text: str, temp: float = 0.0) -> dict[str, Ask]:
        return {name: partial(by_strategy, shared, name, text, tokens, temp) for name in STRATEGIES}

    text = QUESTIONS[number % len(QUESTIONS)]
    asks = {name: partial(_ask_anew, engine, name, text, tokens) for name, engine in engines.items() if name != SHARED}
    base, found = in_turns(number, plain(text), asks | ways(text))
    found[SHARED] = found["auto"]  # what the engine does by default
    found[PLAIN] = base.measured(tokens - 1)
    note(cases, base, found)
    note(groups["strategies"], base, found)
    note(groups["sampled"], *in_turns(number, plain(text), ways(text, TEMP)))
    text = REPEATS[number % len(REPEATS)]
    note(groups["repeat"], *in_turns(number, plain(text), ways(text)))


def check_counts(tokens: int, rounds: int) -> None:
    if tokens < 2 or rounds < 1:
        raise UsageError(f"a benchmark needs at least 2 tokens and 1 round, not {tokens} and {rounds}")


def in_turns(number: int, plain: Callable[[], Plain], others: Mapping[str, Ask]) -> tuple[Plain, dict[str, Measured]]:
    """One round: all of them once, every second time backwards."""
    base = plain() if number % 2 else None
    names = list(others) if number % 2 else list(others)[::-1]
    found = {name: others[name]() for name in names}
    return base or plain(), found


def note(cases: Mapping[str, Case], base: Plain, found: Mapping[str, Measured]) -> None:
    """Add a round's answers to their cases."""
    for name, case in cases.items():
        if name in found:
            case.add(found[name], base.seconds(found[name].steps))


def conversation(engine: Engine, text: str) -> list[Message]:
    """What the safe stream reads."""
    return [*([Message("system", engine.pair.safe)] if engine.pair else []), Message("user", text)]


# ---------------------------------------------------------------------------------------------------------------------
# Plain llama.cpp


@dataclass(frozen=True)
class Plain:
    """Plain decoding: seconds to the first token, seconds of each one after it, seconds outside llama_decode."""

    first: float
    each: Sequence[float]
    outside: float

    def seconds(self, steps: int) -> float:
        """Of the first so many tokens after the first."""
        return list(accumulate(self.each))[min(steps, len(self.each)) - 1] if steps > 0 else 0.0

    def measured(self, steps: int) -> Measured:
        return Measured(steps, self.seconds(steps), self.outside, self.first)


def decode_plain(context: llama.Context, prompt: Sequence[int], tokens: int, *, held: int = 0) -> Plain:
    """llama_decode and argmax, nothing else; an end of the answer is no reason to stop.

    Args:
        held: tokens at the prompt's beginning that are decoded before the clock is started.
    """
    context.truncate(0, 0)
    if held:
        decode_rows(context, prompt[:held], 0)
    started = time.perf_counter()
    token = int(decode_rows(context, prompt[held:], held).argmax())
    first, inside, each = time.perf_counter() - started, context.seconds, []
    for position in range(len(prompt), len(prompt) + tokens - 1):
        started = time.perf_counter()
        token = int(decode_rows(context, [token], position).argmax())
        each.append(time.perf_counter() - started)
    return Plain(first, each, sum(each) - (context.seconds - inside))


def decode_rows(context: llama.Context, tokens: Sequence[int], start: int) -> llama.Logits:
    """Logits behind the last of some tokens of sequence 0, shape (n_vocab,)."""
    rows = np.array(tokens, np.int32)
    for at in range(0, len(rows), context.n_batch):
        part = rows[at : at + context.n_batch]
        wanted = np.zeros(len(part), np.int8)
        wanted[-1] = 1
        positions = np.arange(start + at, start + at + len(part), dtype=np.int32)
        context.decode(part, np.zeros(len(part), np.int32), positions, wanted)
    logits: llama.Logits = context.logits(1)[0]
    return logits


# ---------------------------------------------------------------------------------------------------------------------
# The engine


class Recorder:
    """Keeps what a context is given to decode, between entry and exit."""

    def __init__(self, context: llama.Context) -> None:
        self._context = context
        self.batches: list[Batch] = []

    def __enter__(self) -> Self:
        decode = self._context.decode

        def recording(tokens: llama.Row, seqs: llama.Row, positions: llama.Row, outputs: llama.Row) -> None:
            self.batches.append(Batch(tuple(seqs), tuple(positions), tuple(outputs)))
            decode(tokens, seqs, positions, outputs)

        self._context.decode = recording  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *_: object) -> None:
        del self._context.decode  # the class' own is back

    def after(self, prompt: int) -> list[Batch]:
        """Those that followed a prompt of so many tokens in the safe stream."""
        starts = (i for i, b in enumerate(self.batches) if SAFE in b.seqs and b.start(SAFE) >= prompt)
        return self.batches[next(starts, len(self.batches)) :]


def measure(engine: Engine, stream: AnswerStream) -> Measured:
    """One answer, text and statistics included."""
    contexts = engine.decoder.contexts
    started, inside = time.perf_counter(), 0.0
    for _ in stream:
        inside = inside or sum(context.seconds for context in contexts)  # once the prompt is decoded
    seconds = time.perf_counter() - started
    inside = sum(context.seconds for context in contexts) - inside
    answer = stream.answer
    seconds -= answer.timings.prompt_seconds
    positions = answer.contrast.positions
    return Measured(
        steps=max(0, len(answer.tokens) - 1),
        seconds=seconds,
        outside=seconds - inside,
        first=answer.timings.prompt_seconds,
        compared=answer.contrast.compared / positions if positions else None,
    )


def measure_rows(engine: Engine, stream: AnswerStream) -> Measured:
    """The same with its batches; of an engine with the shared layout and one conversation."""
    with Recorder(engine.decoder.contexts[0]) as recorder:
        found = measure(engine, stream)
    return replace(found, batches=recorder.after(stream.answer.prompt_tokens))


def warm_up(engine: Engine, tokens: int) -> None:
    """Answer until the engine knows what rows cost, where it wants to know."""
    for text in (QUESTIONS * WARM_UPS)[:WARM_UPS]:
        if engine.decoder.row_clock.known is not None or not engine.can_defer:
            return
        engine.generate(text, Options(gate=False, temp=0.0, max_tokens=max(tokens, 64))).run()


def by_strategy(engine: Engine, name: str, text: str, tokens: int, temp: float = 0.0) -> Measured:
    """A new conversation's answer by one of STRATEGIES; the system prompts are decoded."""
    _forget(engine, Options(gate=False, temp=0.0, max_tokens=1))
    options = Options(gate=False, temp=temp, seed=1, max_tokens=tokens, **STRATEGIES[name])
    return measure_rows(engine, engine.generate(text, options))


def _ask(engine: Engine, name: str, text: str, tokens: int) -> Measured:
    return measure(
        engine, engine.generate(text, Options(gate=False, temp=0.0, max_tokens=tokens, plain=name == ENGINE_PLAIN))
    )


def _ask_anew(engine: Engine, name: str, text: str, tokens: int) -> Measured:
    _forget(engine, Options(gate=False, temp=0.0, max_tokens=1, plain=name == ENGINE_PLAIN))
    return _ask(engine, name, text, tokens)


def _forget(engine: Engine, options: Options) -> None:
    """Answer something else, so that the caches hold nothing of the next conversation but its system prompts."""
    engine.generate("Hello.", options).run()


# ---------------------------------------------------------------------------------------------------------------------
# Peak memory, one process per case


MEMORY_TOKENS = 64  # of the answer whose peak memory is taken


def kv_mb(context: llama.Context, n_ctx: int) -> float:
    """One KV cache of `n_ctx` tokens, 10^6 bytes, by the size of what sequence 0 holds; it is forgotten."""
    sizes = []
    for length in (16, 8):
        context.truncate(0, length)
        sizes.append(len(context.save_sequence(0)))
    return -(-n_ctx // 256) * 256 * (sizes[0] - sizes[1]) / 8 / 1e6


def _peak_of(case: str, model: str, settings: Mapping[str, Any]) -> float:
    given = (str(settings["threads"]), str(settings["ctx_size"]), settings["pair"] or "")
    done = child.run_module("acd_local.bench", case, model, *given)
    if done.returncode != 0:
        raise InternalError(
            f"measuring the memory of {case!r} failed: {done.stderr.decode('utf-8', 'replace').strip()[-300:]}"
        )
    return float(done.stdout)


def _peak_here(case: str, model: str, threads: int, ctx_size: int, pair: str | None) -> float:
    """Answer one question in this process and return its peak resident memory, 10^6 bytes."""
    if case == PLAIN:
        from acd_local.models import resolve

        with (
            llama.Model(resolve(model)) as loaded,
            llama.Context(loaded, n_ctx=ctx_size, n_seq=1, threads=threads) as context,
        ):
            prompt = loaded.vocab.tokenize(QUESTIONS[0] * 12, parse_special=False)
            token = int(decode_rows(context, prompt, 0).argmax())
            for position in range(len(prompt), len(prompt) + MEMORY_TOKENS):
                token = int(decode_rows(context, [token], position).argmax())
    else:
        given: dict[str, Any] = {"layout": "split" if "split" in case else "shared", "pair": measured_pair(model, pair)}
        if case == SHARED_Q8:
            given["kv_type"] = "q8_0"
        with Engine(model, threads=threads, ctx_size=ctx_size, **given) as engine:
            options = Options(
                gate=False, temp=0.0, max_tokens=MEMORY_TOKENS, strategy="deferred", plain=case == ENGINE_PLAIN
            )
            engine.generate(QUESTIONS[0], options).run()
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
    case, model, threads, ctx_size, pair = sys.argv[1:]
    sys.stdout.write(f"{_peak_here(case, model, int(threads), int(ctx_size), pair or None)}\n")
