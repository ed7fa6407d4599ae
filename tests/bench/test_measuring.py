"""One answer and what is recorded of it; a question's first token; other weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from manual import DEFAULT

from acd_local.bench import first_token, measuring
from acd_local.bench.questions import long_question
from acd_local.engine import Engine
from acd_local.errors import ModelError, StorageError, UsageError
from acd_local.options import Options
from acd_local.runtime import llama, probe
from acd_local.runtime.batch_costs import BatchCosts


@pytest.mark.parametrize("options", [{}, {"plain": True}, {"temp": 1.0}])
def test_an_answers_steps_and_batches(engine: Engine, options: dict[str, Any]) -> None:
    found = measuring.ask(engine, "Why is the sky blue?", 12, draft_max=0, **options)
    assert found.steps == 11
    assert found.seconds > found.outside > 0 and found.first > 0  # type: ignore[operator]
    assert found.per_batch == 1.0


def test_accepted_drafts_are_several_tokens_of_a_batch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.decoder, "costs", BatchCosts(0.01, (1.0,) * 5, (1.0,) * 5))
    grammar = 'root ::= "' + "red green blue " * 20 + '"'
    found = measuring.ask(engine, "Colours?", 120, grammar=grammar)
    assert found.per_batch > 1.5


def test_first_tokens_of_long_questions(engine: Engine, tiny: Callable[..., Path]) -> None:
    with (
        Engine(tiny("chatml"), pair=DEFAULT, ctx_size=2048, threads=1) as larger,
        measuring.bare_context(larger) as bare,
    ):
        found = first_token.run(larger, bare, 2)
    assert list(found.seconds) == ["plain llama.cpp", "contrast", "alpha 0"]
    assert all(len(s) == 2 and min(s) > 0 for s in found.seconds.values()) and found.question == 512
    assert found.ratios["plain llama.cpp"] == [1.0, 1.0]
    one, two = (found.seconds[name] for name in ("contrast", "plain llama.cpp"))
    assert found.ratios["contrast"] == [a / b for a, b in zip(one, two, strict=True)]
    with measuring.bare_context(engine) as bare:
        assert first_token.run(engine, bare, 1).question == 256


def test_long_questions_share_nothing_but_the_system_prompt(engine: Engine) -> None:
    texts = [long_question(engine, number, 300) for number in range(6)]
    lengths = [len(engine.vocab.tokenize(text, parse_special=False)) for text in texts]
    assert len({text.split(":")[0] for text in texts}) == 6 and all(abs(n - 300) < 5 for n in lengths)
    before = engine.generate("Hello.", first_token.WAYS["contrast"]).run().prompt_decoded
    decoded = [engine.generate(text, first_token.WAYS["contrast"]).run().prompt_decoded for text in texts]
    assert before > 0 and all(2 * 300 <= n < 2 * 340 for n in decoded)  # both prompts, but no system prompt
    assert 300 <= engine.generate("so: " + texts[0], first_token.WAYS["alpha 0"]).run().prompt_decoded < 340


@pytest.mark.parametrize("kind", ["q4_0", "q4_k_m", "q8_0"])
def test_quantizing_writes_a_file_of_that_type(tiny: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    source, target, again = tiny("chatml"), tmp_path / "a.gguf", tmp_path / "b.gguf"
    llama.quantize(source, target, kind)
    info = probe.verify(target)
    assert info.file_type == kind.upper()
    assert info.tokenizer == probe.verify(source).tokenizer
    assert target.stat().st_size < source.stat().st_size
    llama.quantize(target, again, "q4_0")  # what is quantized already
    assert probe.verify(again).file_type == "Q4_0"
    with Engine(target, pair=DEFAULT, ctx_size=512, threads=1) as engine:
        assert engine.generate("Hello", Options(temp=0.0, max_tokens=3)).run().tokens


def test_quantizing_fails_in_one_line(tiny: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="q3"):
        llama.quantize(tiny("chatml"), tmp_path / "a.gguf", "q3")
    with pytest.raises(ModelError, match="cannot write"):
        llama.quantize(tmp_path / "no.gguf", tmp_path / "a.gguf", "q8_0")
    with pytest.raises(StorageError, match="cannot write"):
        llama.quantize(tiny("chatml"), tmp_path / "no" / "a.gguf", "q8_0")
