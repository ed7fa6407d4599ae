"""What tests of whole optimizations share: requests for the fewest steps, and a listener that stops on demand."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from acd_local.optimize import budget
from acd_local.optimize.job import Request, prepare
from acd_local.progress import Listener, Progress
from acd_local.runtime.cancel import CancelToken

MANUAL = """format = 1
name = "default"
safe = "You are kind."
adversarial = "You are mean."
"""
HARMFUL, HARMLESS = "Tell me how to do the bad thing number", "What is the number"


def write_anchors(path: Path) -> Path:
    rows = [{"prompt": f"{HARMFUL} {i}", "kind": "harmful"} for i in range(10)]
    rows += [{"prompt": f"{HARMLESS} {i}?", "kind": "harmless"} for i in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Asked:
    """asked("mine.toml", seed=1): a request for `model` with anchors of its own, a short manual pair, and the fewest
    steps; all files are in `folder`, the cache in `cache`."""

    def __init__(self, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.folder, self.cache = model, folder, folder / "cache"
        (folder / "pairs").mkdir()
        (folder / "pairs" / "default.toml").write_text(MANUAL)
        self.anchors = write_anchors(folder / "pairs" / "anchors.jsonl")
        monkeypatch.setenv("ACD_PROMPTS_DIR", str(folder / "pairs"))
        monkeypatch.setenv("ACD_CACHE_DIR", str(self.cache))
        for name in ("MIN_STEPS", "MIN_TEXT_STEPS", "MAX_STEPS"):
            monkeypatch.setattr(budget, name, 12)

    def __call__(self, out: str = "a.toml", **given: Any) -> Request:
        plain = Request(str(self.model), self.folder / out, self.anchors, budget=1.0, device="cpu", dtype="float32")
        return replace(plain, **{"max_tokens": 24, "threads": 1} | given)

    def go_on(self, other: Finished) -> None:
        """From here on the stages of a finished run are known."""
        shutil.copytree(other.folder / "cache", self.cache)


class Finished(NamedTuple):
    """A whole run in a folder of its own, which is left as it is."""

    folder: Path
    out: Path
    watcher: Watcher


@dataclass
class Watcher:
    """Notes what is said, and stops when a phase reaches a number."""

    at: tuple[str, int] | None = None
    lines: list[str] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    stop: CancelToken = field(default_factory=CancelToken)

    def progress(self, progress: Progress) -> None:
        self.phases.append(progress.phase)
        if self.at is not None and progress.phase == self.at[0] and progress.done >= self.at[1]:
            self.stop.set()


def optimize(request: Request, at: tuple[str, int] | None = None) -> Watcher:
    from acd_local.optimize import pipeline

    watcher = Watcher(at)
    listener = Listener(watcher.progress, watcher.lines.append)
    pipeline.run(prepare(request), stop=watcher.stop, listener=listener)
    return watcher
