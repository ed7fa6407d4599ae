"""Measure peak memory, which is a process' own figure: each case gets a process (`python -m` of this module)."""

from __future__ import annotations

import sys
from pathlib import Path

from acd_local.bench.measuring import ENGINE_PLAIN, ENGINES, PLAIN, contrasted_pair, decode_plain
from acd_local.bench.questions import text_of
from acd_local.engine import Engine
from acd_local.errors import InternalError, UsageError
from acd_local.models import resolve
from acd_local.options import Options
from acd_local.runtime import child, llama

TOKENS = 64  # of the answer whose peak memory is taken


def peak_mb(case: str, model: str, *, pair: str | None, threads: int, ctx_size: int) -> float:
    """Answer one question in a process of its own and return its peak resident memory, 10^6 bytes.

    Args:
        case: PLAIN or one of ENGINES.
        pair: as `contrasted_pair` takes it.

    Raises:
        InternalError: the process failed.
    """
    done = child.run_module("acd_local.bench.memory", case, model, str(threads), str(ctx_size), pair or "")
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip()[-300:]
        raise InternalError(f"measuring the memory of {case!r} failed: {said}")
    return float(done.stdout)


def kv_mb(context: llama.Context, n_ctx: int) -> float:
    """Measure one KV cache of `n_ctx` tokens, 10^6 bytes, by what sequence 0 holds, which is forgotten."""
    sizes = []
    for length in (16, 8):
        context.truncate(0, length)
        sizes.append(len(context.save_sequence(0)))
    return -(-n_ctx // 256) * 256 * (sizes[0] - sizes[1]) / 8 / 1e6


def takes_q8(model: llama.Model) -> bool:
    """Tell whether the model's heads can be kept in q8_0: not every size can."""
    try:
        llama.Context(model, n_ctx=256, n_seq=1, kv_type="q8_0").close()
    except UsageError:
        return False
    return True


def _answer(case: str, model: str, threads: int, ctx_size: int, pair: str | None) -> None:
    question = text_of("questions", 0)
    if case == PLAIN:
        with (
            llama.Model(resolve(model)) as loaded,
            llama.Context(loaded, n_ctx=ctx_size, n_seq=1, threads=threads) as context,
        ):
            decode_plain(context, loaded.vocab.tokenize(question * 12, parse_special=False), TOKENS + 1)
        return
    used = contrasted_pair(pair)
    with Engine(model, threads=threads, ctx_size=ctx_size, pair=used, cache=False, **ENGINES[case]) as engine:
        plain = case == ENGINE_PLAIN
        options = Options(gate=False, temp=0.0, max_tokens=TOKENS, plain=plain)
        engine.generate(question, options).run()


def _high_water_mark() -> float:
    """Read the peak resident memory of this process, 10^6 bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count the parent's memory at the time of the fork
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


if __name__ == "__main__":
    case, model, threads, ctx_size, pair = sys.argv[1:]
    _answer(case, model, int(threads), int(ctx_size), pair or None)
    sys.stdout.write(f"{_high_water_mark()}\n")
