"""Time one answer: of llama.cpp alone, or of an engine."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from acd_local import pairs
from acd_local.bench.rounds import Measured, Progress
from acd_local.engine import Engine
from acd_local.errors import ContextError
from acd_local.generation import AnswerStream
from acd_local.models import resolve
from acd_local.options import Options
from acd_local.pairs import PromptPair
from acd_local.runtime import llama, probe
from acd_local.runtime.template import Message
from acd_local.runtime.threads import default_threads

PLAIN = "plain llama.cpp"
ENGINE_PLAIN, SHARED, SPLIT, SHARED_Q8 = (
    "acd --plain",
    "contrast",
    "contrast, --layout split",
    "contrast, --kv-type q8_0",
)
ENGINES: Mapping[str, Mapping[str, Any]] = {  # how they differ, apart from `plain`
    ENGINE_PLAIN: {},
    SHARED: {},
    SPLIT: {"layout": "split"},
    SHARED_Q8: {"kv_type": "q8_0"},
}

# ---------------------------------------------------------------------------------------------------------------------
# What is measured


def contrasted_pair(name: str | None = None) -> PromptPair:
    """Find the pair whose contrast is measured: the named one, else `default`, whatever it does to the model.

    A fitted pair will not do: it refuses what it contrasts, in a few words that stand in its prompts.

    Raises:
        PairError: there is no such pair.
    """
    return pairs.find(name or pairs.DEFAULT)


def bare_context(engine: Engine, *, n_seq: int = 1) -> llama.Context:
    """Open a context on an engine's model, with its size and threads, for `decode_plain`."""
    return llama.Context(engine.decoder.model, n_ctx=engine.n_ctx, n_seq=n_seq, threads=engine.threads)


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
    """Do what `decode_plain` does, in a context that holds so many tokens of the prompt, whatever follows them.

    Raises:
        ContextError: the answer does not fit.
    """
    if len(prompt) + tokens > context.n_ctx:
        raise ContextError(
            f"a measured text of {len(prompt)} tokens and {tokens} of its answer do not fit a context of "
            f"{context.n_ctx}: give a larger --ctx-size"
        )
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


def measure(engine: Engine, stream: AnswerStream) -> Measured:
    """Time one answer, text and statistics included."""
    contexts = engine.decoder.contexts
    started, inside = time.perf_counter(), 0.0
    for _ in stream:
        inside = inside or sum(context.seconds for context in contexts)  # once the prompt is decoded
    seconds = time.perf_counter() - started
    inside = sum(context.seconds for context in contexts) - inside
    answer = stream.answer
    seconds -= answer.timings.prompt_seconds
    steps = max(0, len(answer.tokens) - 1)
    return Measured(
        steps=steps,
        seconds=seconds,
        outside=seconds - inside,
        first=answer.timings.prompt_seconds,
        batches=steps - answer.timings.accepted,
    )


def ask(engine: Engine, text: str, tokens: int, *, pair: PromptPair | None = None, **options: Any) -> Measured:
    """Time a new conversation's answer, greedy and with no gate unless `options` say otherwise.

    The caches hold nothing of it but the system prompts.
    """
    chosen = Options(**{"gate": False, "temp": 0.0, "seed": 1, "max_tokens": tokens, **options})
    engine.generate("Hello.", chosen.replace({"max_tokens": 1}), pair=pair).run()
    return measure(engine, engine.generate(text, chosen, pair=pair))


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
