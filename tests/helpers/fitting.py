"""What tests of acd fit share."""

from __future__ import annotations

import json
from pathlib import Path

from acd_local.tuning import anchors


def few_anchors(path: Path, each: int = 24) -> Path:
    """Some of our own instructions, of every kind."""
    found = []
    for kind, lookalike in (("harmful", False), ("harmless", False), ("harmless", True)):
        found += [i for i in anchors.builtin() if (i.kind, i.lookalike) == (kind, lookalike)][:each]
    rows = [{"prompt": i.prompt, "kind": i.kind, "category": i.category, "lookalike": i.lookalike} for i in found]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
