"""Run acd-run, and tell at the end of stderr how many seconds its parts took, as a line of JSON.

    python benchmarks/start_trace.py ARGUMENTS OF acd-run

The file is loaded beside imports, so that the parts can be more than all.
"""

from __future__ import annotations

import builtins
import json
import sys
import threading
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


class Imports:
    """Times the main thread's imports, and what else is of interest once it is there."""

    def __init__(self) -> None:
        self._import, self._depth = builtins.__import__, 0
        self._waiting = [
            ("check of the verdict", "acd_local.runtime.probe", "remembered"),
            ("choice of the pair", "acd_local.pairs", "best_for"),
            ("load", "acd_local.runtime.binding", "load"),
            ("wait for the load", "acd_local.runtime.llama", "Model"),
            ("template and vocabulary", "acd_local.engine", "ChatTemplate"),
            ("template and vocabulary", "acd_local.engine", "SpecialTokens"),
            ("contexts", "acd_local.runtime.llama", "Context"),
            ("prompt", "acd_local.runtime.llama", "Context.decode"),
            ("end", "acd_local.engine", "Engine.close"),
        ]

    def __call__(self, *args: Any, **given: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return self._import(*args, **given)
        self._depth += 1
        begun = time.perf_counter()
        try:
            return self._import(*args, **given)
        finally:
            self._depth -= 1
            if self._depth == 0:
                parts["imports"] = parts.get("imports", 0.0) + time.perf_counter() - begun
                self._wrap()

    def _wrap(self) -> None:
        for one in list(self._waiting):
            part, module, name = one
            if (holder := sys.modules.get(module)) is None:
                continue
            self._waiting.remove(one)
            *outer, name = name.split(".")
            for step in outer:
                holder = getattr(holder, step)
            if isinstance(found := getattr(holder, name), type):
                holder, found, name = found, found.__init__, "__init__"
            setattr(holder, name, timed(part, found))


def main() -> int:
    builtins.__import__ = Imports()
    from acd_local.cli import run

    code = run.run_cli(run.command, run.PROGRAM)
    parts["all"] = time.perf_counter() - started
    print(json.dumps(parts), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
