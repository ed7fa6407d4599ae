"""Which tokens a schema allows."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from acd_local.runtime import llama
from acd_local.runtime.schema_guard import SchemaGuard, _tokenizer


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma", "phi3"])
def test_legal_tokens_are_exact(tiny: Callable[..., Path], family: str) -> None:
    """Against all tokens and all texts, in vocabularies with byte tokens, equal and empty pieces, several ends."""
    texts = [json.dumps(text, ensure_ascii=False).encode() for text in ("abc", "a water", "é😀", "", "<|im_end|>\n")]
    given = json.dumps({"enum": [json.loads(text) for text in texts]})
    with llama.Model(tiny(family)) as model:
        vocab, rng = model.vocab, np.random.default_rng(0)
        eog, control = vocab.eog_tokens(), {t.id for t in vocab.special.values() if t.attr & llama.ATTR_CONTROL}
        flat = np.zeros(vocab.n_tokens, np.float32)
        for _ in range(12):
            guard, said = SchemaGuard(vocab, given), b""
            while True:
                expected = {
                    t
                    for t in set(range(vocab.n_tokens)) - control - eog
                    if vocab.piece(t) and any(text.startswith(said + vocab.piece(t)) for text in texts)
                } | (set(eog) if said in texts else set())
                assert set(np.flatnonzero(guard.restrict(flat, 0.5) > -np.inf)) == expected
                token = int(rng.choice(sorted(expected)))
                if token in eog:
                    break
                said += vocab.piece(token)
                guard.accept(token)
    if family in ("gemma", "phi3"):
        assert len({vocab._pieces[t] for t in range(vocab.n_tokens)}) < vocab.n_tokens  # some are equal


def test_legal_logits_stay_as_they_are(vocab: llama.Vocab) -> None:
    logits = np.random.default_rng(0).normal(size=vocab.n_tokens).astype(np.float32)
    logits[5:500] = -np.inf
    before = logits.copy()
    guard = SchemaGuard(vocab, '{"type": "string"}')
    guard.accept(vocab.tokenize('"', parse_special=False)[0])
    restricted = guard.restrict(logits, 0.1)
    assert (logits == before).all()
    assert restricted.dtype == np.float32
    kept = restricted > -np.inf
    assert 10_000 < kept.sum() < vocab.n_tokens - 495
    assert (restricted[kept] == logits[kept]).all()


def test_the_vocabulary_is_read_once_and_forgotten_with_it(tiny: Callable[..., Path]) -> None:
    with llama.Model(tiny("chatml")) as model:
        assert _tokenizer(model.vocab) is _tokenizer(model.vocab)
        known = weakref.ref(model.vocab)
    del model
    gc.collect()
    assert known() is None
