"""Measure how long acd-run takes for a short answer, over a bare llama.cpp program that loads the same file.

    python benchmarks/start.py MODEL [--rounds 9] [--tokens 1] [--threads N] [--json]

Every start is a new process, of a file that was checked before and lies in the page cache. The bare program (bare.c,
or bare.py where there is no C compiler or no header) reads the same chat prompt with the same parameters, and says as
many tokens. acd-run answers under the model's own pair, with its gate, and under none, both with the system prompts
that it keeps on disk and without. "hi" is a harmless request, so that the prompt under the own pair is the gate's. All
are started in turns; ratios are taken round by round. Where the time goes is told by one more start of each kind, see
start_trace.py. Run it where nothing else runs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp
import script

from acd_local.bench.rounds import Progress, in_turns, median
from acd_local.cli.shell import one_line
from acd_local.engine import Engine
from acd_local.errors import InternalError, UsageError
from acd_local.options import Options
from acd_local.runtime import llama, machine
from acd_local.runtime.prompts import PromptSetup
from acd_local.runtime.template import Message

HERE = Path(__file__).resolve().parent
TEXT = "hi"
BARE = "bare, the same prompt"
PAIRS = ("own pair", "as-is")
ACD_RUN = "import sys; from acd_local.cli.run import main; sys.exit(main())"


@dataclass(frozen=True)
class Report:
    """A finished comparison.

    Attributes:
        seconds: of every start, by pair and program. parts: seconds of the parts of one start each.
        bare: what the bare program is.
    """

    model: str
    threads: int
    tokens: int
    bare: str
    seconds: Mapping[tuple[str, str], Sequence[float]]
    parts: Mapping[tuple[str, str], Mapping[str, float]]

    def summary(self) -> dict[str, Any]:
        """Medians, JSON types."""
        head = {name: getattr(self, name) for name in ("model", "threads", "tokens", "bare")}
        return head | {"rounds": len(self.seconds[PAIRS[0], BARE]), "cases": list(self._cases())}

    def _cases(self) -> Iterator[dict[str, Any]]:
        for (pair, program), found in self.seconds.items():
            yield {
                "pair": pair,
                "program": program,
                "seconds": median(found),
                "ratio_to_bare": median([a / b for a, b in zip(found, self.seconds[pair, BARE], strict=True)]),
                "parts": {part: round(seconds, 4) for part, seconds in self.parts[pair, program].items()},
            }

    def lines(self) -> Iterator[str]:
        found = self.summary()
        work = f"{self.threads} threads, {self.tokens} tokens, {found['rounds']} rounds, medians"
        yield f"{one_line(self.model)}: {work}; bare: {self.bare}"
        yield f"{'':<36}{'seconds':>9}{'over bare':>11}"
        for row in found["cases"]:
            name = f"{row['pair']}, {row['program']}"
            yield f"{name:<36}{row['seconds']:>9.3f}{row['ratio_to_bare']:>11.3f}"
        yield "milliseconds of one start each:"
        for row in found["cases"]:
            parts = ", ".join(f"{part} {1e3 * seconds:.0f}" for part, seconds in row["parts"].items())
            yield f"{row['pair']}, {row['program']}: {parts}"


def run(
    model: str,
    *,
    tokens: int = 1,
    rounds: int = 9,
    threads: int | None = None,
    ctx_size: int = 4096,
    pair: str | None = None,
    progress: Progress = lambda line: None,
) -> Report:
    """Start each program in turns."""
    if tokens < 1 or rounds < 1:
        raise UsageError(f"a start is measured with at least 1 token and 1 round, not {tokens} and {rounds}")
    with Engine(model, pair=pair, ctx_size=ctx_size, threads=threads) as engine:
        path, n, name = engine.info.path, engine.threads, engine.info.name or engine.info.path.name
        gating = engine.gating(engine.pair, Options())
        own = PromptSetup.of(engine.pair) if gating is None else gating.base
        prompts = dict(zip(PAIRS, (prompt_of(engine, setup) for setup in (own, PromptSetup())), strict=True))
    given = [path, TEXT, "--no-stdin", "-c", ctx_size, "-t", n, "-n", tokens, "--temp", 0]
    flags = dict(zip(PAIRS, (["--pair", pair] if pair else [], ["--pair", "as-is"]), strict=True))
    python, trace = [sys.executable, "-c", ACD_RUN], [sys.executable, HERE / "start_trace.py"]
    with tempfile.TemporaryDirectory(prefix="acd-start-") as folder:
        program, what = bare_program(Path(folder))
        layers, extra = -1 if llama.supports_gpu_offload() else 0, int(machine.extra_buffers())
        commands: dict[tuple[str, str], list[object]] = {}
        traced: dict[tuple[str, str], list[object]] = {}
        for case in PAIRS:
            bare = [*program, path, ctx_size, n, layers, extra, tokens, *prompts[case]]
            commands[case, BARE] = traced[case, BARE] = bare
            for kept, shown in (([], "acd-run"), (["--no-cache"], "acd-run --no-cache")):
                commands[case, shown] = [*python, *given, *flags[case], *kept]
                traced[case, shown] = [*trace, *given, *flags[case], *kept]
        ways = {case: partial(seconds_of, command) for case, command in commands.items()}
        seconds = in_turns(ways, rounds, progress, warm_up=True)
        parts = {case: json.loads(start(command).stderr.splitlines()[-1]) for case, command in traced.items()}
    return Report(name, n, tokens, what, seconds, parts)


def prompt_of(engine: Engine, prompt_setup: PromptSetup) -> list[int]:
    turns = [Message("user", TEXT)]
    return engine.prompts.build(prompt_setup, None, turns, contrast=False, max_tokens=1, overflow="error").safe


def bare_program(folder: Path) -> tuple[list[object], str]:
    """Compile bare.c against the installed llama.cpp, or take bare.py; say which."""
    package = Path(llama_cpp.__file__).parent
    include = next((at for at in (package / "include", package.parent / "include") if (at / "llama.h").exists()), None)
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)
    python = [sys.executable, HERE / "bare.py"]
    if compiler is None or include is None:
        return python, f"bare.py, for want of {'a C compiler' if compiler is None else 'llama.h'}"
    libraries, program = package / "lib", folder / "bare"
    flags = ["-O2", f"-I{include}", f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
    done = subprocess.run([compiler, HERE / "bare.c", *flags, "-lllama", "-o", program], capture_output=True, text=True)
    if done.returncode:
        return python, f"bare.py, since {compiler} failed: {done.stderr.strip().splitlines()[-1]}"
    return [program], "bare.c"


def seconds_of(command: Sequence[object], _number: int) -> float:
    started = time.perf_counter()
    start(command)
    return time.perf_counter() - started


def start(command: Sequence[object]) -> subprocess.CompletedProcess[str]:
    # With Python's caches of compiled modules, as an installed program has them.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    env["PYTHONPATH"] = str(HERE.parent)
    done = subprocess.run(
        list(map(str, command)),
        env=env,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise InternalError(f"{command[0]} failed: {done.stderr.strip() or done.returncode}")
    return done


def main(argv: Sequence[str] | None = None) -> int:
    parser = script.arguments(__doc__)
    parser.set_defaults(tokens=1, rounds=9, ctx_size=4096)
    return script.run(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
