"""Writes the files of evaluations of any shape, with made-up records."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# name -> (refusal rate on harmful sets, on harmless sets, share of degenerate answers, relative speed, contrast)
METHODS = {
    "null": (0.30, 0.02, 0.00, 1.00, False),
    "base": (0.55, 0.05, 0.00, 1.00, False),
    "self-reminder": (0.60, 0.07, 0.00, 0.98, False),
    "icd": (0.70, 0.16, 0.00, 0.97, False),
    "nid": (0.72, 0.09, 0.02, 0.61, True),
    "oid": (0.78, 0.11, 0.02, 0.60, True),
    "rose": (0.76, 0.12, 0.06, 0.60, True),
    "sp": (0.74, 0.08, 0.00, 1.00, False),
    "acd": (0.93, 0.12, 0.01, 0.62, True),
    "acd-paper": (0.90, 0.18, 0.09, 0.59, True),
    "null-ap": (0.45, 0.04, 0.01, 0.63, True),
    "safe-ap": (0.80, 0.09, 0.01, 0.61, True),
    "sp-null": (0.83, 0.10, 0.01, 0.61, True),
    "sp-opposite": (0.87, 0.10, 0.01, 0.61, True),
    "acd-first-m": (0.89, 0.09, 0.00, 0.85, True),
}
SETS = {
    "advbench": ("harmful", 0),
    "harmfulqa": ("harmful", 10),
    "harmbench": ("harmful", 6),
    "xstest-unsafe": ("harmful", 8),
    "xstest-safe": ("harmless", 8),
    "alpaca": ("harmless", 0),
    "truthfulqa": ("choice", 0),
    "facts": ("facts", 0),
}
WORDS = "the small green boat waits near an old harbour while two people talk about rain and bread".split()  # noqa: SIM905


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def write_run(
    folder: Path,
    *,
    methods: Sequence[str] = ("base", "acd"),
    sets: Sequence[str] = ("advbench", "alpaca"),
    n: int = 20,
    judge: str | None = None,
    sweep: Sequence[float] = (),
    margins: bool = False,
    seed: int = 0,
    edit: Callable[[dict[str, Any]], None] = lambda record: None,
    info: dict[str, Any] | None = None,
) -> Path:
    """A run's three files with made-up records; `edit` may change each record before it is written."""
    folder.mkdir(parents=True, exist_ok=True)
    known: dict[str, Any] = {name: METHODS.get(name, METHODS["acd"]) for name in methods}
    known |= {"as-is": METHODS["null"]} if "as-is" in known else {}
    for value in sweep:
        rate = 0.74 + 0.5 * value - 0.45 * value**2
        known[f"acd@alpha={value:g}"] = (rate, 0.08 + 0.15 * value, 0.2 * value**3, 0.62, value > 0)
    run: dict[str, Any] = {
        "format": 1,
        "model": {"name": "SmolLM2 135M Instruct", "file": "SmolLM2-135M-Instruct.Q4_1.gguf", "tokenizer": "ab" * 32,
                  "architecture": "llama", "file_type": "Q4_1", "size": 98_000_000},
        "pair": {"name": "default", "alpha": 0.5, "beta": 0.1},
        "options": {"temp": 0.0, "max_tokens": 128, "seed": 7, "limit": n, "parallel": 8, "threads": 2},
        "methods": [
            {"name": name, "title": f"The {name} method", "source": "Some et al., arXiv 0000.00000",
             "setup": digest(name), "alpha": 0.5, "beta": 0.1, "raw": False, "window": None, "contrast": numbers[4]}
            for name, numbers in known.items()
        ],
        "sweep": {"method": "acd", "key": "alpha", "values": list(sweep),
                  "names": [f"acd@alpha={v:g}" for v in sweep]} if sweep else None,
        "sets": [{"name": s, "kind": SETS[s][0], "source": f"{s}.csv", "n": n, "total": 5 * n} for s in sets],
        "judge": judge,
        "shard": "1/1",
        "version": "0.1.0",
        "started": "2026-01-02T03:04:05+00:00",
        "command": "acd eval demo --methods base,acd -o out",
    }  # fmt: skip
    run.update(info or {})
    answers, scores = [], []
    for name, numbers in known.items():
        setup = next((m["setup"] for m in run["methods"] if m["name"] == name), digest(name))
        for s in sets:
            kind, n_types = SETS[s]
            for i in range(n):
                rng = random.Random(f"{seed} {name} {s} {i}")
                ease = random.Random(f"{seed} {s} {i}").gauss(0, 0.15)
                base = {"setup": setup, "method": name, "set": s, "item": digest(s, i)}
                if kind == "choice":
                    good = rng.random() < 0.3 + 0.05 * numbers[0]
                    scores.append({"score": "choice", **base, "mc1": int(good), "mc2": min(1.0, rng.uniform(0.1, 0.7))})
                    continue
                answers.append({**base, **_answer(rng, numbers, kind, n_types, i, s, ease, judge)})
                if kind == "harmless":
                    tokens = rng.randint(20, 80)
                    bits = tokens * rng.uniform(2.2, 3.0) * (1.05 if numbers[4] else 1)
                    scores.append({"score": "reference", **base, "bits": bits, "tokens": tokens, "bytes": 4 * tokens})
                nats = answers[-1]["tokens"] * rng.uniform(0.8, 1.3)
                scores.append({"score": "fluency", **base, "nats": nats, "tokens": answers[-1]["tokens"]})
    if margins:
        for prompt, mean in (("none", 0.4), ("safe", -0.3), ("sp", -0.9), ("opposite", 1.0), ("ap", 1.4)):
            for s in sets:
                for i in range(n if SETS[s][0] == "harmful" else 0):
                    rng = random.Random(f"{prompt} {s} {i}")
                    record = {"score": "margin", "prompt": prompt, "set": s, "item": digest(s, i)}
                    scores.append({**record, "margin": rng.gauss(mean, 0.6)})
    for record in (*answers, *scores):
        edit(record)
    (folder / "run.json").write_text(json.dumps(run))
    for file, records in (("answers", answers), ("scores", scores)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{file}.jsonl").write_text(text)
    return folder


def _answer(
    rng: random.Random, numbers: Any, kind: str, n_types: int, i: int, s: str, ease: float, judge: str | None
) -> dict[str, Any]:
    refusal, over, degenerate, speed, contrast = numbers
    rate = refusal + ease if kind == "harmful" else over
    label = "degenerate" if rng.random() < degenerate else "refusal" if rng.random() < rate else "answer"
    tokens = rng.randint(12, 30) if label == "refusal" else rng.randint(40, 128)
    text = {
        "refusal": "I'm sorry, but I can't help with that. " + " ".join(rng.choices(WORDS, k=8)) + ".",
        "degenerate": "the the the " * 12,
        "answer": " ".join(rng.choices(WORDS, k=tokens)).capitalize() + ".",
    }[label]
    return {
        "type": f"{s} topic {i % n_types + 1}" if n_types else "",
        "prompt": f"{'A harmful' if kind == 'harmful' else 'An ordinary'} request, number {i}, of {s}",
        "answer": text,
        "finish": "length" if tokens > 120 else "stop",
        "tokens": tokens,
        "seed": rng.randrange(2**31),
        "label": label,
        "rule": {"refusal": "cannot-help", "degenerate": "loop", "answer": ""}[label],
        "judge": None if judge is None else rng.betavariate(8, 1) if label == "refusal" else rng.betavariate(1, 2),
        "seconds": tokens / (40 * speed) * rng.uniform(0.9, 1.1),
        "prompt_seconds": rng.uniform(0.02, 0.05),
        "changed": rng.uniform(0.02, 0.2) if contrast else 0.0,
    }


def change(path: Path, **fields: Any) -> None:
    """Set fields of a run.json."""
    info = json.loads(path.read_text())
    info.update(fields)
    path.write_text(json.dumps(info))


def records(folder: Path, name: str = "answers") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
