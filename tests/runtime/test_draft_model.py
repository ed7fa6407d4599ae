"""A smaller model that drafts: which one may, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_gguf
from manual import DEFAULT
from reference import fresh_logits

from acd_local.engine import Engine
from acd_local.errors import ModelError, UsageError
from acd_local.options import Options
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.llama import DecodeAborted

SMALL = {"pair": DEFAULT, "ctx_size": 512, "threads": 1}


def load(model: Path, draft: Path, **settings: object) -> Engine:
    return Engine(model, draft=draft, **SMALL | settings)  # type: ignore[arg-type]


def test_it_goes_on_greedily(tiny: Callable[..., Path]) -> None:
    with load(tiny("chatml"), tiny("chatml", seed=9)) as engine:
        conversation = list(range(5, 40))
        _, source = engine.decoder.draft_sources(engine.decoder.slots[0], conversation, CancelToken())
        drafted = list(source.propose(6))
        model = engine.decoder._draft._model  # type: ignore[union-attr]
        for i, token in enumerate(drafted):
            assert token == int(fresh_logits(model, conversation + drafted[:i]).argmax())
        assert len(drafted) == 6
        source.add([drafted[0], 41])  # the rest was wrong
        again = list(source.propose(2))
        assert again[0] == int(fresh_logits(model, [*conversation, drafted[0], 41]).argmax())
        assert 0 < source.cost < 1000


def test_a_conversation_that_fills_the_context_is_not_drafted_for(tiny: Callable[..., Path]) -> None:
    with load(tiny("chatml"), tiny("chatml", seed=9)) as engine:
        _, source = engine.decoder.draft_sources(engine.decoder.slots[0], [5] * 510, CancelToken())
        assert len(source.propose(2)) == 2 and list(source.propose(3)) == []


def test_it_is_cancelled_with_the_answer(tiny: Callable[..., Path]) -> None:
    with load(tiny("chatml"), tiny("chatml", seed=9)) as engine:
        cancel = CancelToken()
        _, source = engine.decoder.draft_sources(engine.decoder.slots[0], [5] * 300, cancel)
        cancel.set()
        with pytest.raises(DecodeAborted):
            source.propose(2)
        assert engine.generate("Hi", Options(temp=0.0, max_tokens=4)).run().tokens  # it goes on for others


def test_another_vocabulary_is_refused_in_one_line(tiny: Callable[..., Path]) -> None:
    other = tiny("llama2")
    with pytest.raises(ModelError, match="another vocabulary; choose a smaller model of the same family") as error:
        load(tiny("chatml"), other)
    assert str(other) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("writer", [tiny_gguf.write_mamba, tiny_gguf.write_gemma3])
def test_a_model_that_cannot_forget_does_not_draft(tiny: Callable[..., Path], writer: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match="cannot draft: its memory cannot forget single tokens"):
        load(tiny("chatml"), tiny("chatml", writer=writer))
    with pytest.raises(UsageError, match=r"nothing can be drafted for .*forget single tokens; leave --draft out"):
        load(tiny("chatml", writer=writer), tiny("chatml"))


def test_many_conversations_are_not_drafted_for(tiny: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="drafts are for 2 conversations at once, not 3"):
        load(tiny("chatml"), tiny("chatml"), conversations=3)


def test_a_missing_file_is_said(tiny: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match="no-such"):
        load(tiny("chatml"), Path("/no-such.gguf"))
