"""Measure how the cost of a token grows: with the context, with conversations at once, with the vocabulary."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from acd_local.answers import Answer
from acd_local.batch import BatchRunner, Event
from acd_local.bench.measuring import (
    ENGINE_PLAIN,
    PLAIN,
    bare_context,
    contrasted_pair,
    decode_plain,
    go_on_plain,
    measure,
    plain_prompt,
)
from acd_local.bench.questions import story, text_of
from acd_local.bench.rounds import Measured, Progress, check_counts, in_turns, median
from acd_local.engine import Engine
from acd_local.generation import AnswerStream
from acd_local.options import Options
from acd_local.runtime import llama
from acd_local.runtime.prefixes import common_prefix
from acd_local.runtime.threads import default_threads

CONTRAST = "contrast"
WAYS = (ENGINE_PLAIN, CONTRAST)  # of the engine
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
CONVERSATIONS = (1, 2, 4, 8, 16)
SHORT = 512  # tokens per stream where the context's length is not what is measured
ROOM = 256  # for the answer, and for what the adversarial prompt is longer than the safe one


@dataclass(frozen=True)
class Point:
    """What was measured at one place of an axis.

    Attributes:
        at: tokens of the context, conversations, or tokens of the vocabulary.
        answers: by way and round. Steps and seconds of several conversations are added up.
        prompt: seconds that a further token of the prompt took, by way; both streams' rows count as one token.
        model: whose vocabulary it is.
    """

    at: int
    answers: Mapping[str, Sequence[Measured]]
    prompt: Mapping[str, float] = field(default_factory=dict)
    model: str = ""

    def milliseconds(self, way: str) -> float | None:
        """Return the median cost of a token, milliseconds; None: no answer had a second one."""
        return median([a.seconds / a.steps * 1e3 for a in self.answers[way] if a.steps])

    def outside(self, way: str) -> float | None:
        """Return the median of what a token cost outside llama_decode, milliseconds; None: not measured."""
        return median([a.outside / a.steps * 1e3 for a in self.answers[way] if a.steps and a.outside is not None])

    def ratio(self, way: str) -> float | None:
        """Return the median over the rounds of the cost of a token, over plain llama.cpp's in the same round."""
        pairs = zip(self.answers[way], self.answers[PLAIN], strict=True)
        return median([a.seconds / a.steps / (p.seconds / p.steps) for a, p in pairs if a.steps and p.steps])

    def rows(self) -> Iterator[dict[str, Any]]:
        """Give the medians of each way, JSON types."""
        for way, answers in self.answers.items():
            first = median([a.first for a in answers if a.first is not None])
            yield {
                "at": self.at,
                "model": self.model,
                "case": way,
                "ms_per_token": self.milliseconds(way),
                "ratio_to_plain": self.ratio(way),
                "outside_decode_ms": self.outside(way),
                "first_token_ms": None if first is None else round(first * 1e3, 4),
                "prompt_ms_per_token": round(self.prompt[way] * 1e3, 4) if way in self.prompt else None,
            }


@dataclass(frozen=True)
class Growth:
    """A finished measurement; points in the order of their axes."""

    model: str
    pair: str
    threads: int
    tokens: int
    rounds: int
    lengths: Sequence[Point]
    conversations: Sequence[Point]
    vocabularies: Sequence[Point]

    def summary(self) -> dict[str, Any]:
        """Return medians, JSON types."""
        found = {name: getattr(self, name) for name in ("model", "pair", "threads", "tokens", "rounds")}
        for name in ("lengths", "conversations", "vocabularies"):
            found[name] = [row for point in getattr(self, name) for row in point.rows()]
        return found


def run(
    model: str,
    also: Sequence[str] = (),
    *,
    tokens: int = 16,
    rounds: int = 3,
    pair: str | None = None,
    threads: int | None = None,
    ctx_size: int = max(LENGTHS) + ROOM,
    progress: Progress = lambda line: None,
) -> Growth:
    """Measure plain llama.cpp, the engine without a contrast and with it at every step, in turns at every point.

    Args:
        also: other models, for the cost against the vocabulary alone.
        tokens: answer tokens per measurement.
        rounds: how often each is measured.
        ctx_size: tokens per stream; bounds the lengths of contexts.
    """
    check_counts(tokens, rounds)
    settings: dict[str, Any] = {"threads": threads or default_threads(), "pair": contrasted_pair(pair), "cache": False}
    vocabularies = []
    for file in [model, *also]:
        progress(f"vocabulary: {file}")
        vocabularies.append(_vocabulary(file, settings, tokens, rounds))
    with Engine(model, ctx_size=ctx_size, **settings) as engine:
        name = engine.info.name or engine.info.path.name
        lengths = _lengths(engine, tokens, rounds, progress)
    conversations = []
    for n in CONVERSATIONS:
        progress(f"conversations: {n}")
        conversations.append(_conversations(model, n, settings, tokens, rounds))
    return Growth(
        name,
        settings["pair"].name,
        settings["threads"],
        tokens,
        rounds,
        lengths,
        conversations,
        sorted(vocabularies, key=lambda point: point.at),
    )


def _ask(engine: Engine, text: str, tokens: int, way: str) -> AnswerStream:
    options = Options(gate=False, temp=0.0, draft_max=0, max_tokens=tokens, plain=way == ENGINE_PLAIN)
    return engine.generate(text, options)


# ---------------------------------------------------------------------------------------------------------------------
# Context


def _lengths(engine: Engine, tokens: int, rounds: int, progress: Progress) -> list[Point]:
    """Let the caches grow from one length to the next, and answer behind each."""
    points: list[Point] = []
    before: list[int] = []
    with bare_context(engine) as bare:
        decode_plain(bare, plain_prompt(engine, "Hello."), 2)  # the first decodes of a context are slow
        measure(engine, _ask(engine, "Hello.", 2, CONTRAST))
        bare.truncate(0, 0)
        for length in LENGTHS:
            if length + ROOM > engine.n_ctx:
                break
            progress(f"context: {length}")
            room = length - len(plain_prompt(engine, story(engine, 0)))
            text = story(engine, max(0, room))
            prompt = plain_prompt(engine, text)
            held = common_prefix(before, prompt)
            grown = {
                PLAIN: go_on_plain(bare, prompt, 1, held),
                CONTRAST: measure(engine, _ask(engine, text, 1, CONTRAST)),
            }
            ways = {PLAIN: partial(_behind, bare, prompt, tokens)}
            ways |= {way: partial(_answer, engine, text, tokens, way) for way in WAYS}
            answers = in_turns(ways, rounds)
            seconds = {way: (found.first or 0.0) / (len(prompt) - held) for way, found in grown.items()}
            points.append(Point(len(prompt), answers, seconds))
            before = prompt
    return points


def _behind(bare: llama.Context, prompt: Sequence[int], tokens: int, _number: int) -> Measured:
    return go_on_plain(bare, prompt, tokens, len(prompt) - 1)


def _answer(engine: Engine, text: str, tokens: int, way: str, _number: int) -> Measured:
    return measure(engine, _ask(engine, text, tokens, way))


# ---------------------------------------------------------------------------------------------------------------------
# Conversations


def _conversations(model: str, n: int, settings: Mapping[str, Any], tokens: int, rounds: int) -> Point:
    """Answer n conversations at once, each with another question."""
    with (
        Engine(model, ctx_size=SHORT, conversations=n, **settings) as engine,
        bare_context(engine, n_seq=n) as bare,
    ):

        def plain(number: int) -> Measured:
            prompts = [plain_prompt(engine, _question(number, i)) for i in range(n)]
            return decode_plain_together(bare, prompts, tokens)

        ways = {PLAIN: plain} | {way: partial(_together, engine, n, tokens, way) for way in WAYS}
        return Point(n, in_turns(ways, rounds, warm_up=True))


def _question(number: int, place: int) -> str:
    return f"{number}.{place}. {text_of('questions', 1)}"


def _together(engine: Engine, n: int, tokens: int, way: str, number: int) -> Measured:
    """Answer n questions in one batch; what their prompts took is not counted."""
    ended: list[Event] = []
    with BatchRunner(engine) as batch:
        for place in range(n):
            batch.add(place, _ask(engine, _question(number, place), tokens, way))
        while len(batch):
            ended += [event for event in batch.step() if not isinstance(event.what, str)]
    steps = 0
    for event in ended:
        if isinstance(event.what, Exception):
            raise event.what
        assert isinstance(event.what, Answer)
        steps += max(0, len(event.what.tokens) - 1)
    return Measured(steps, sum(event.answer_seconds for event in ended))


def decode_plain_together(context: llama.Context, prompts: Sequence[Sequence[int]], tokens: int) -> Measured:
    """Answer prompts, one per sequence, with llama_decode and argmax, one row of each at a time."""
    n = len(prompts)
    last: list[int] = []
    for seq, prompt in enumerate(prompts):
        context.truncate(seq, 0)
        context.decode(prompt, [seq] * len(prompt), range(len(prompt)), [0] * (len(prompt) - 1) + [1])
        last.append(int(context.logits(1)[0].argmax()))
    started, inside = time.perf_counter(), context.seconds
    for step in range(tokens - 1):
        context.decode(last, range(n), [len(prompt) + step for prompt in prompts], [1] * n)
        last = context.logits(n).argmax(axis=1).tolist()
    seconds = time.perf_counter() - started
    return Measured(n * (tokens - 1), seconds, seconds - (context.seconds - inside))


# ---------------------------------------------------------------------------------------------------------------------
# Vocabulary


def _vocabulary(model: str, settings: Mapping[str, Any], tokens: int, rounds: int) -> Point:
    with Engine(model, ctx_size=SHORT, **settings) as engine, bare_context(engine) as bare:

        def plain(number: int) -> Measured:
            return decode_plain(bare, plain_prompt(engine, text_of("questions", number)), tokens)

        def ours(way: str, number: int) -> Measured:
            return measure(engine, _ask(engine, text_of("questions", number), tokens, way))

        ways = {PLAIN: plain} | {way: partial(ours, way) for way in WAYS}
        answers = in_turns(ways, rounds, warm_up=True)
        return Point(engine.info.n_vocab, answers, model=engine.info.path.name)
