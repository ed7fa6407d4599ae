"""Measure the demo's tokens per second by threads and by how long OpenMP's threads spin, beside other programs.

    python benchmarks/busy_threads.py [--threads 1,2,4] [--spins package,300000,0] [--load 0,2] [--turns 3] [--tokens N]

`package` is what acd_local sets by itself, 300000 libgomp's own. All cases are loaded first and asked in turns, in
random order; a load is so many programs that only compute, each a session of its own (Linux shares the CPUs among
sessions first). Ratios are to the package's two threads, turn by turn. Run it where nothing else runs.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ANSWER = """
import sys
import acd_local
engine = acd_local.load("demo", ctx_size=512, threads=int(sys.argv[1]), pair="default")
options = acd_local.Options(max_tokens=int(sys.argv[2]), temp=0, draft_max=0)
engine.generate("Tell me about the sea.", options).run()
print("ready", flush=True)
for _ in sys.stdin:
    print(engine.generate("Tell me about the sea.", options).run().timings.tokens_per_second, flush=True)
"""
Case = tuple[str, str]  # spins, threads


def start(spins: str, threads: str, tokens: str) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    env["PYTHONPATH"] = str(ROOT)
    if spins != "package":
        env["GOMP_SPINCOUNT"] = spins
    command = [sys.executable, "-c", ANSWER, threads, tokens]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, env=env, text=True, start_new_session=True, **pipes)


def ask(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def measure(cases: dict[Case, subprocess.Popen[str]], load: int, turns: int) -> None:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True) for _ in range(load)]
    try:
        time.sleep(0.3)
        speeds: dict[Case, list[float]] = {case: [] for case in cases}
        for _ in range(turns):
            for case in random.sample(list(cases), len(cases)):
                speeds[case].append(ask(cases[case]))
    finally:
        for process in busy:
            process.kill()
            process.wait()
    print(f"beside {load} other programs   tokens/s  ratio")
    base = speeds.get(("package", "2"))
    for (spins, threads), found in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(found, base, strict=True)) if base else float("nan")
        print(f"  {threads} threads, spins {spins:>8}  {statistics.median(found):8.1f}  {ratio:5.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("threads", "1,2,4"), ("spins", "package,300000,0"), ("load", "0,2"), ("tokens", "32")):
        parser.add_argument(f"--{name}", default=value)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    spins, threads = given.spins.split(","), given.threads.split(",")
    wanted = [(s, t) for s in spins for t in threads if t != "1" or s == spins[0]]  # one thread waits for nobody
    cases = {case: start(*case, given.tokens) for case in wanted}
    for process in cases.values():
        assert process.stdout is not None and process.stdout.readline().strip() == "ready"
    for load in map(int, given.load.split(",")):
        measure(cases, load, given.turns)
    for process in cases.values():  # they end when their stdin does
        process.communicate()


if __name__ == "__main__":
    main()
