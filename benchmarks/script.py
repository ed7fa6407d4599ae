"""Run a measurement as a script: its arguments, its result as lines or as JSON, errors as one line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acd_local.bench.measuring import quantized
from acd_local.cli.shell import one_line, say
from acd_local.errors import AcdError


class Report(Protocol):
    def summary(self) -> dict[str, Any]:
        """JSON types."""

    def lines(self) -> Iterable[str]:
        """The same for people."""


R = TypeVar("R", bound=Report)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The arguments of all measurements; `doc`: what --help says."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pair", metavar="NAME|FILE")
    for name, value in (("tokens", 64), ("rounds", 5), ("threads", None), ("ctx-size", 2048)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--quantize", choices=("q4_0", "q4_k_m", "q8_0"), help="measure a copy with these weight types")
    parser.add_argument("--json", action="store_true")
    return parser


def run(
    measure: Callable[..., R],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    *,
    finish: Callable[[R, argparse.Namespace], object] = lambda report, given: None,
) -> int:
    """Measure, print, and finish; returns the exit code.

    Args:
        measure: given the model, the arguments by name and `progress`.
        finish: given what was printed, and the arguments.
    """
    parsed = parser.parse_args(argv)
    given = dict(vars(parsed))
    model, kind, as_json = (given.pop(name) for name in ("model", "quantize", "json"))
    try:
        with quantized(model, kind, given["threads"], say) as file:
            report = measure(file, progress=say, **given)
        print(json.dumps(report.summary()) if as_json else "\n".join(report.lines()), flush=True)
        finish(report, parsed)
    except AcdError as error:
        say(one_line(str(error)))
        return error.exit_code
    return 0
