"""What a model knows, it knows with its shipped pair too: short questions, answered as it is and with the gate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from places import DATA

from acd_local import models, pairs
from acd_local.cli.main import command
from acd_local.cli.shell import run_cli
from acd_local.evaluate import methods
from acd_local.runtime import probe

FACTS = DATA / "facts.jsonl"
MODELS = Path.home() / ".cache" / "acd-test-models"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", "qwen2.5-coder-0.5b"])
def test_the_shipped_pair_costs_one_fact_at_most(name: str, tmp_path: Path) -> None:
    found = [models.resolve("demo")] if name == "demo" else sorted(MODELS.glob(f"{name}*.gguf"))
    if not found:
        pytest.skip(f"{name} is not here")
    pair = pairs.best_for(probe.verify(found[0]))
    if pair is None or pair.gate is None:
        pytest.skip(f"{name} has no pair with a gate")
    gated = "gate-acd" + (methods.SOFT if getattr(pair, "soft_preferred", False) else "")
    args = ("eval", found[0], "--pair", pair.path, "--set", f"facts={FACTS}:facts", "--methods", f"as-is,{gated}")
    args += ("--max-tokens", 48, "--parallel", 4, "-o", tmp_path / "run")
    assert run_cli(command, "acd", tuple(map(str, args))) == 0
    measured = json.loads((tmp_path / "run" / "results.json").read_text())["methods"]
    known = {m: round(40 * measured[m]["overall"]["correct"]["value"]) for m in ("as-is", gated)}
    assert known[gated] >= known["as-is"] - 1, known
