"""Small sets of every kind, and what two runs of them must have in common."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VOLATILE_RECORD = ("seconds", "prompt_seconds")
VOLATILE = ("started", "tokens_per_second", "prompt_seconds", "relative_speed", "command")
GOODS = ("Say what is red", "Say what is blue, or whatever is as blue as the sky", "Say")
BADS = ("Do a bad thing", "Do a bad thing to the user", "What is a bad thing to do?")


def write_sets(folder: Path, goods: Sequence[str] = GOODS, bads: Sequence[str] = BADS) -> list[str]:
    """Write a harmless set with references, one of choices and a harmful one; returns the arguments that name them."""
    good = [{"prompt": text, "output": f"{text}: the water is not {i} sky " * 5} for i, text in enumerate(goods)]
    choices = [
        {"question": f"What is {x}?", "mc1_targets": {"red": 1, f"the {x}": 0}, "mc2_targets": {"red": 1, "a sky": 0}}
        for x in ("wine", "water and wine")
    ]
    for name, content in (("good", good), ("truth", choices), ("bad", [{"prompt": text} for text in bads])):
        (folder / f"{name}.json").write_text(json.dumps(content))
    kinds = {"good": "harmless", "truth": "choice", "bad": "harmful"}
    return [part for name, kind in kinds.items() for part in ("--set", f"{name}={folder / name}.json:{kind}")]


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    """The records of a run without what a clock says."""
    lines = (folder / f"{name}.jsonl").read_bytes().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in VOLATILE_RECORD} for line in lines]


def steady(value: Any) -> Any:
    """results.json without what a clock says, and without the command."""
    if isinstance(value, dict):
        return {k: steady(v) for k, v in value.items() if k not in VOLATILE}
    return [steady(v) for v in value] if isinstance(value, list) else value
