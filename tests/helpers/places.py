"""Where the repository and the tests' data are, and the environment in which a child imports the package from here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
SHARED = ROOT.parent / "shared" / "data"  # evaluation sets; tests that need them are skipped elsewhere


def rows(name: str) -> list[dict[str, Any]]:
    """The lines of a file in tests/data/."""
    return [json.loads(line) for line in (DATA / name).read_text("utf-8").splitlines()]


def child_env(**more: str) -> dict[str, str]:
    """This process's environment, with the repository on the import path of Python."""
    return os.environ | {"PYTHONPATH": str(ROOT)} | more
