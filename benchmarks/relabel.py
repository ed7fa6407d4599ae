"""Count how an evaluation's refusals change when its recorded answers are labelled anew.

    python benchmarks/relabel.py EVAL-FOLDER [...]

Reads answers.jsonl of each folder and prints, for every method and set, how many answers were recorded as refusals and
how many are now, and how many labels changed each way. Prints no answers.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acd_local.evaluate.refusal import classify


def changes(path: Path) -> dict[tuple[str, str], Counter[tuple[str, str]]]:
    """How often (label recorded, label now) occurs, by (method, set)."""
    found: dict[tuple[str, str], Counter[tuple[str, str]]] = defaultdict(Counter)
    for line in path.read_text("utf-8").splitlines():
        r = json.loads(line)
        now = classify(r["answer"], r["prompt"], finished=r["finish"] != "length").label
        found[r["method"], r["set"]][r["label"], now] += 1
    return found


def main(folders: list[str]) -> None:
    for folder in folders:
        print(f"\n{folder}\n\n| method | set | answers | refused, recorded | refused, now | changed |")
        print("|---|---|--:|--:|--:|---|")
        for (method, name), counts in sorted(changes(Path(folder, "answers.jsonl")).items()):
            before, after = (sum(n for pair, n in counts.items() if pair[i] == "refusal") for i in (0, 1))
            changed = ", ".join(f"{n} {a} -> {b}" for (a, b), n in sorted(counts.items()) if a != b)
            print(f"| {method} | {name} | {counts.total()} | {before} | {after} | {changed} |")


if __name__ == "__main__":
    main(sys.argv[1:])
