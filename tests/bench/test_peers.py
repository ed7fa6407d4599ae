"""benchmarks/peers.py: what the others see, and who is left out; errors of all scripts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import pytest
from reference import TOLERANCE, fresh_logits

from acd_local.bench.questions import text_of
from acd_local.engine import Engine
from acd_local.runtime.contrast import contrast

Run = Callable[..., tuple[int, str, str]]


def test_two_llamas_see_what_the_streams_see(
    engine: Engine, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, Any, int]] = []

    def noting(safe: Any, adversarial: Any, **settings: float) -> Any:
        ids, scores = contrast(safe, adversarial, **settings)
        seen.append((safe.copy(), adversarial.copy(), int(ids[scores.argmax()])))
        return ids, scores

    monkeypatch.setattr(peers, "contrast", noting)
    monkeypatch.setattr(peers, "_transformers", _missing)
    report = peers.run(str(tiny("chatml")), tokens=8, rounds=1, threads=1, ctx_size=512)
    assert [case.name for case in report.cases] == ["acd", "two llama_cpp.Llama"]
    assert report.cases[0].ratio == pytest.approx([1.0])
    assert report.cases[1].ratio[0] > 0
    assert report.left_out == {"transformers, bf16": "not installed"}
    prompt = peers._prompt(engine, text_of("questions", 0), 8)
    assert prompt.adversarial is not None
    said = [token for _, _, token in seen[:8]]
    for i, (safe, adversarial, _) in enumerate(seen[:8]):
        assert abs(safe - fresh_logits(engine.decoder.model, prompt.safe + said[:i])).max() < TOLERANCE
        assert abs(adversarial - fresh_logits(engine.decoder.model, prompt.adversarial + said[:i])).max() < TOLERANCE


def _missing(*_: object) -> Any:
    raise ImportError("not installed")


def test_without_the_extra_transformers_are_left_out(
    script: Run, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    code, out, _ = script(peers.main, tiny("chatml"))
    assert code == 0
    assert "two llama_cpp.Llama" in out
    assert "left out: transformers, bf16: not installed" in out


@pytest.mark.slow
def test_transformers_answer_too(script: Run, tiny: Callable[..., Path]) -> None:
    pytest.importorskip("transformers")
    code, out, _ = script(peers.main, tiny("chatml"), "--json")
    assert code == 0
    found = json.loads(out)
    assert found["left_out"] == {}
    assert [case["case"] for case in found["cases"]][2] == "transformers, bf16"
    assert all(case["ratio_to_acd"] > 0 for case in found["cases"])


def test_what_is_missing_is_one_line(script: Run, tiny: Callable[..., Path]) -> None:
    code, out, err = script(peers.main, "/no/such.gguf")
    assert (code, out, err.count("\n")) == (3, "", 1)
    code, out, err = script(peers.main, tiny("chatml"), "--pair", "no-such-pair")
    assert (code, out) == (5, "")
    assert "no-such-pair" in err.splitlines()[-1]
