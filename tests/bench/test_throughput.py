"""The comparison of one by one and N at once: what it counts, not how fast it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from manual import DEFAULT

from acd_local import Engine, Options
from acd_local.bench import questions, throughput
from acd_local.errors import ContextError


def test_it_counts_prompts_and_differing_texts(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(questions.TEXTS, "instructions", questions.TEXTS["instructions"][:1])
    lines: list[str] = []
    found = throughput.run(str(tiny("chatml")), 3, tokens=3, rounds=2, threads=1, ctx_size=512, progress=lines.append)
    assert lines == ["warming up", "round 1 of 2", "round 2 of 2"]
    assert found.prompts == len(questions.TEXTS["questions"])
    assert set(found.per_minute) == {1, 3}
    assert found.gains == [b / a for a, b in zip(found.per_minute[1], found.per_minute[3], strict=True)]
    assert found.gain == pytest.approx(sum(found.gains) / 2)
    assert found.differing == 0
    assert len({p for n in range(3) for p in questions.many_prompts(n)}) == 3 * found.prompts
    assert questions.many_prompts(1)[0][0] != questions.many_prompts(2)[0][0]  # no round finds another's in the caches


def test_answers_come_in_the_order_of_the_prompts(tiny: Callable[..., Path]) -> None:
    options = Options(temp=0.0, max_tokens=5)
    questions = ["What is red?", "What is a carpet, and why is it blue?", "Wine?", "How?"]
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1, conversations=2) as engine:
        texts = throughput.texts_of(engine, questions, options)
        assert texts == [engine.generate(q, options).run().text for q in questions]
        assert len(set(texts)) > 1
        with pytest.raises(ContextError):
            throughput.texts_of(engine, ["the water " * 600], options)
