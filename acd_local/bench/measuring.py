"""Time one answer: of llama.cpp alone, of an engine, of an engine with what it decoded."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from acd_local.bench.questions import text_of
from acd_local.bench.rounds import SAFE, BatchShape, Measured, Progress
from acd_local.engine import Engine
from acd_local.generation import AnswerStream
from acd_local.models import resolve
from acd_local.options import Options
from acd_local.runtime import llama, probe
from acd_local.runtime.rowcosts import RowCosts
from acd_local.runtime.template import Message
from acd_local.runtime.threads import default_threads

PLAIN = "plain llama.cpp"
ENGINE_PLAIN, SHARED, SPLIT, SHARED_Q8 = "acd --plain", "contrast, shared", "contrast, split", "contrast, q8_0 KV"
ENGINES: Mapping[str, Mapping[str, Any]] = {  # how they differ, apart from `plain`
    ENGINE_PLAIN: {},
    SHARED: {"layout": "shared"},
    SPLIT: {"layout": "split"},
    SHARED_Q8: {"layout": "shared", "kv_type": "q8_0"},
}
WINDOW = 16
STRATEGIES: Mapping[str, Mapping[str, Any]] = {
    "stepwise": {"strategy": "stepwise"},
    "deferred": {"strategy": "deferred"},
    "auto": {"strategy": "auto"},
    f"window {WINDOW}": {"strategy": "auto", "window": WINDOW},
}
WARM_UPS = 12  # answers at most until it is known what rows cost

# ---------------------------------------------------------------------------------------------------------------------
# What measurements use of an engine's inside


def bare_context(engine: Engine, *, n_seq: int = 1) -> llama.Context:
    """Open a context on an engine's model, with its size and threads, for `decode_plain`."""
    return llama.Context(engine.decoder.model, n_ctx=engine.n_ctx, n_seq=n_seq, threads=engine.threads)


def contexts_of(engine: Engine) -> Sequence[llama.Context]:
    """List the contexts that an engine decodes in; of the shared layout one."""
    return engine.decoder.contexts


def row_costs(engine: Engine) -> RowCosts | None:
    """Return what rows cost as the engine measured it; None: not known yet."""
    return engine.decoder.row_clock.known


# ---------------------------------------------------------------------------------------------------------------------
# Plain llama.cpp


def plain_prompt(engine: Engine, text: str) -> list[int]:
    """Encode what the safe stream reads of a conversation that begins with `text`."""
    system = [Message("system", engine.pair.safe)] if engine.pair else []
    return engine.template.encode([*system, Message("user", text)])


def decode_plain(context: llama.Context, prompt: Sequence[int], tokens: int, *, held: int = 0) -> Measured:
    """Answer with llama_decode and argmax, nothing else; an end of the answer is no reason to stop.

    Args:
        held: tokens at the prompt's beginning that are decoded before the clock is started.
    """
    context.truncate(0, 0)
    if held:
        decode_rows(context, prompt[:held], 0)
    return go_on_plain(context, prompt, tokens, held)


def go_on_plain(context: llama.Context, prompt: Sequence[int], tokens: int, held: int) -> Measured:
    """Do what `decode_plain` does, in a context that holds so many tokens of the prompt, whatever follows them."""
    if not context.truncate(0, held):  # this memory cannot forget its last tokens alone
        context.truncate(0, 0)
        decode_rows(context, prompt[:held], 0)
    started = time.perf_counter()
    token = int(decode_rows(context, prompt[held:], held).argmax())
    first, inside, each = time.perf_counter() - started, context.seconds, []
    for position in range(len(prompt), len(prompt) + tokens - 1):
        started = time.perf_counter()
        token = int(decode_rows(context, [token], position).argmax())
        each.append(time.perf_counter() - started)
    seconds = sum(each)
    return Measured(len(each), seconds, seconds - (context.seconds - inside), first, each=each)


def decode_rows(context: llama.Context, tokens: Sequence[int], start: int) -> llama.Logits:
    """Decode tokens into sequence 0; return the logits behind the last, shape (n_vocab,)."""
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
    """Keeps the shapes of what a context is given to decode, between entry and exit."""

    def __init__(self, context: llama.Context) -> None:
        self._context = context
        self.batches: list[BatchShape] = []

    def __enter__(self) -> Self:
        decode = self._context.decode

        def recording(tokens: llama.Row, seqs: llama.Row, positions: llama.Row, outputs: llama.Row) -> None:
            self.batches.append(BatchShape(tuple(seqs), tuple(positions), tuple(outputs)))
            decode(tokens, seqs, positions, outputs)

        self._context.decode = recording  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *_: object) -> None:
        del self._context.decode  # the class' own is back

    def after(self, prompt: int) -> list[BatchShape]:
        """List those that followed a prompt of so many tokens in the safe stream."""
        starts = (i for i, b in enumerate(self.batches) if SAFE in b.seqs and b.start(SAFE) >= prompt)
        return self.batches[next(starts, len(self.batches)) :]


def measure(engine: Engine, stream: AnswerStream) -> Measured:
    """Time one answer, text and statistics included."""
    contexts = contexts_of(engine)
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


def ask(engine: Engine, text: str, tokens: int, *, plain: bool = False) -> Measured:
    """Time a greedy answer with no gate."""
    return measure(engine, engine.generate(text, Options(gate=False, temp=0.0, max_tokens=tokens, plain=plain)))


def forget(engine: Engine, *, plain: bool = False) -> None:
    """Answer something else, so that the caches hold nothing of the next conversation but its system prompts."""
    engine.generate("Hello.", Options(gate=False, temp=0.0, max_tokens=1, plain=plain)).run()


def by_strategy(engine: Engine, name: str, text: str, tokens: int, temp: float = 0.0) -> Measured:
    """Time a new conversation's answer by one of STRATEGIES, and record what is decoded for it.

    Args:
        engine: of the shared layout, with one conversation.
    """
    forget(engine)
    options = Options(gate=False, temp=temp, seed=1, max_tokens=tokens, **STRATEGIES[name])
    stream = engine.generate(text, options)
    with Recorder(contexts_of(engine)[0]) as recorder:
        found = measure(engine, stream)
    return replace(found, batches=recorder.after(stream.answer.prompt_tokens))


def warm_up(engine: Engine, tokens: int) -> None:
    """Answer until the engine knows what rows cost, where it wants to know."""
    for number in range(WARM_UPS):
        if row_costs(engine) is not None or not engine.can_defer:
            return
        ask(engine, text_of("questions", number), max(tokens, 64))


# ---------------------------------------------------------------------------------------------------------------------
# Other weights


@contextmanager
def quantized(model: str, kind: str | None, threads: int | None, progress: Progress) -> Iterator[str]:
    """Lend the model, or a temporary copy of it with other weight types; None: as it is."""
    if kind is None:
        yield model
        return
    source = probe.verify(resolve(model)).path
    with tempfile.TemporaryDirectory(prefix="acd-bench-") as folder:
        target = Path(folder) / f"{source.stem}-{kind}.gguf"
        progress(f"writing a copy as {kind}")
        llama.quantize(source, target, kind, threads=threads or default_threads())
        yield str(target)
