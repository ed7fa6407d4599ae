"""Run acd-run, and tell at the end of stderr how many seconds its parts took, as a line of JSON.

python benchmarks/start_trace.py ARGUMENTS OF acd-run
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

started = time.perf_counter()
parts: dict[str, float] = {}


def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Add what calls take to a part."""

    @wraps(call)
    def measured(*args: Any, **given: Any) -> Any:
        begun = time.perf_counter()
        try:
            return call(*args, **given)
        finally:
            parts[part] = parts.get(part, 0.0) + time.perf_counter() - begun

    return measured


def main() -> int:
    from acd_local.cli import run

    begun = time.perf_counter()
    from acd_local import engine, model_pairs
    from acd_local.runtime import llama, reading

    parts["imports"] = time.perf_counter() - started
    for part, holder, name in (
        ("check of the verdict", engine.probe, "verify"),
        ("choice of the pair", model_pairs.ModelPairs, "choose"),
        ("load", llama.C, "llama_model_load_from_file"),
        ("vocabulary", llama, "Vocab"),
        ("template", engine, "ChatTemplate"),
        ("special tokens", engine, "SpecialTokens"),
        ("contexts", llama.C, "llama_init_from_model"),
        ("prompt", llama.C, "llama_decode"),
    ):
        setattr(holder, name, timed(part, getattr(holder, name)))
    del begun, reading
    code = run.run_cli(run.command, run.PROGRAM)
    parts["all"] = time.perf_counter() - started
    print(json.dumps(parts), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
