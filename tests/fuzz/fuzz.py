"""Makes hostile files and opens them, in child processes that may die of it: `python tests/fuzz/fuzz.py --help`.

    python tests/fuzz/fuzz.py --seed 1 --count 10000    # all kinds; a find is printed with the command that repeats it
    python tests/fuzz/fuzz.py --again metadata:1:207    # one file again, by its name

A file is known by kind, seed and number: these alone decide what is in it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# How many of 100 files are of a kind.
SHARES = {
    "header": 13, "tensors": 13, "metadata": 17, "tokenizer": 14, "split": 6,
    "template": 12, "vectors": 7, "pair": 6, "chat": 4, "run": 4, "sets": 2, "states": 2,
}  # fmt: skip
MODELS = ("header", "tensors", "metadata", "tokenizer", "split")
PATIENCE = 150  # seconds without a word from the child


def names(seed: int, count: int, kinds: Sequence[str] = tuple(SHARES)) -> list[str]:
    """The names of `count` files, as many of each kind as SHARES says; kind by kind."""
    total = sum(SHARES[kind] for kind in kinds)
    edges = [count * sum(SHARES[k] for k in kinds[:i]) // total for i in range(len(kinds) + 1)]
    return [f"{kind}:{seed}:{n}" for i, kind in enumerate(kinds) for n in range(edges[i + 1] - edges[i])]


@dataclass
class Report:
    """What became of many files.

    Attributes:
        counts: (kind of file, kind of outcome) -> how many.
        checks: (kind of file, where it was refused) -> how many.
        finds: (name, what happened).
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    checks: Counter[tuple[str, str]] = field(default_factory=Counter)
    finds: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, name: str, outcome: dict[str, str]) -> None:
        kind = name.split(":")[0]
        self.counts[kind, outcome["kind"]] += 1
        if outcome["kind"] == "refused":
            self.checks[kind, outcome["by"]] += 1
        if outcome["kind"] == "find":
            self.finds.append((name, outcome["said"]))

    def lines(self) -> Iterator[str]:
        for kind in dict.fromkeys(kind for kind, _ in self.counts):
            told = {what: self.counts[kind, what] for what in ("opened", "refused", "find")}
            yield f"{kind:10} {sum(told.values()):6} files: " + ", ".join(f"{n} {what}" for what, n in told.items())
            for (_, by), n in self.checks.most_common():
                if _ == kind:
                    yield f"{'':12}{n:5} by {by}"
        yield f"{sum(self.counts.values())} files, {len(self.finds)} finds, {self.seconds:.0f} s"


def fuzz(wanted: Sequence[str], *, verbose: bool = False) -> Report:
    """Make files by name and open them."""
    report, started = Report(), time.monotonic()
    left = {"models": [n for n in wanted if n.split(":")[0] in MODELS]}
    left["documents"] = [n for n in wanted if n.split(":")[0] not in MODELS]
    for todo in left.values():
        while todo:
            done = _batch(todo[:500], report, verbose)
            del todo[:done]
    report.seconds = time.monotonic() - started
    return report


def search_path() -> str:
    """Return PYTHONPATH for a child process."""
    ours = [str(ROOT), str(ROOT / "tests" / "helpers"), str(HERE)]
    return os.pathsep.join([*ours, *filter(None, [os.environ.get("PYTHONPATH")])])


def _batch(todo: Sequence[str], report: Report, verbose: bool) -> int:
    """Let one child open files until it dies or is done; returns how many it had."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        reading, writing = os.pipe()
        env = os.environ | {
            "PYTHONPATH": search_path(),
            "ACD_CACHE_DIR": f"{folder}/cache",
            "ACD_PROMPTS_DIR": f"{folder}/prompts",
            "XDG_CONFIG_HOME": f"{folder}/config",
            "ACD_THREADS": "1",
            "GGML_NO_BACKTRACE": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        child = subprocess.Popen(
            [sys.executable, __file__, "--worker", folder, str(writing)],
            stdin=subprocess.PIPE, stdout=log, stderr=log, env=env, pass_fds=(writing,), start_new_session=True,
        )  # fmt: skip
        os.close(writing)
        assert child.stdin is not None
        child.stdin.write("\n".join(todo).encode())
        child.stdin.close()
        done = 0
        try:
            with os.fdopen(reading, "rb") as answers:
                while (line := _line(answers)) is not None and line:
                    report.add(todo[done], told := json.loads(line))
                    if verbose:
                        print(todo[done], told, flush=True)
                    done += 1
            late = line is None
        finally:
            os.killpg(child.pid, signal.SIGKILL) if child.poll() is None and late else None
            code = child.wait()
        if done < len(todo):
            log.seek(0)
            said = log.read()[-1500:].decode("utf-8", "replace")
            how = f"no answer within {PATIENCE} s" if late else f"the process ended with {code}"
            how = "more than 10 s of processor time" if code == -signal.SIGPROF else how
            report.add(todo[done], {"kind": "find", "said": f"{how}: {said}"})
            done += 1
        return done


def _line(answers: IO[bytes]) -> bytes | None:
    """The next answer, b"" at the end; None where none comes. While this process is stopped no time passes."""
    if not any(select.select([answers], [], [], 1)[0] for _ in range(PATIENCE)):
        return None
    return answers.readline()


# --- The child's side -------------------------------------------------------------------------------------------------


def make(name: str, folder: Path, model: Path | None) -> Path:
    """Write the file of a name into a folder."""
    import hostile_documents
    import hostile_models
    from hostile_templates import template_text

    kind = name.split(":")[0]
    rng = random.Random(name)
    if kind in hostile_models.KINDS:
        return hostile_models.KINDS[kind](rng, folder)
    if kind == "template":
        path = folder / "template.jinja"
        path.write_text(template_text(rng), "utf-8", "surrogatepass")
        return path
    assert model is not None
    return hostile_documents.KINDS[kind](rng, folder, model)


def work(folder: Path, todo: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Open files one after the other."""
    import shutil

    import doors
    import tiny_gguf

    model = tiny_gguf.write_family(folder / "good.gguf", "chatml")
    if todo[0].split(":")[0] in MODELS:
        documents = None
        doors.prepare_forks()
    else:
        documents = doors.Documents(model)
        doors.limit_memory(4 * doors.MEMORY)
    for name in todo:
        place = folder / "case"
        place.mkdir()
        path = make(name, place, model)
        signal.setitimer(signal.ITIMER_PROF, doors.SECONDS)  # SIGPROF ends this process
        kind = name.split(":")[0]
        outcome = doors.open_model(path) if documents is None else documents.open(kind, path)
        signal.setitimer(signal.ITIMER_PROF, 0)
        shutil.rmtree(place)
        yield vars(outcome)


def _worker(folder: str, answers: int) -> None:
    todo = sys.stdin.read().split()
    with os.fdopen(answers, "w") as out:
        for outcome in work(Path(folder), todo):
            print(json.dumps(outcome), file=out, flush=True)


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        _worker(sys.argv[2], int(sys.argv[3]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--kinds", default=",".join(SHARES), help="some of " + ", ".join(SHARES))
    parser.add_argument("--again", metavar="NAME", help="make and open this one file")
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="with --again: only write the file there")
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args()
    if given.keep:
        sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]
        import tiny_gguf

        given.keep.mkdir(parents=True, exist_ok=True)
        print(make(given.again, given.keep, tiny_gguf.write_family(given.keep / "good.gguf", "chatml")))
        return 0
    wanted = [given.again] if given.again else names(given.seed, given.count, given.kinds.split(","))
    report = fuzz(wanted, verbose=given.verbose or bool(given.again))
    for line in report.lines():
        print(line)
    for name, said in report.finds:
        print(f"\nfind: python tests/fuzz/fuzz.py --again {name}\n{said.strip()}")
    return bool(report.finds)


if __name__ == "__main__":
    sys.exit(main())
