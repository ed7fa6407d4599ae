"""Fixtures: the demo model's vocabulary, and what a schema makes of texts in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from acd_local.runtime import llama
from acd_local.runtime.schema_guard import SchemaGuard


@pytest.fixture(scope="module")
def vocab(demo: Path) -> Iterator[llama.Vocab]:
    with llama.Model(demo) as model:
        yield model.vocab


@pytest.fixture(scope="module")
def accepts(vocab: llama.Vocab) -> Callable[[object, str], bool]:
    """Whether an answer under a schema may be a text, token by token, and end there."""
    flat, eog = np.zeros(vocab.n_tokens, np.float32), sorted(vocab.eog_tokens())

    def accepts(given: object, text: str) -> bool:
        guard = SchemaGuard(vocab, given if isinstance(given, str) else json.dumps(given))
        for token in vocab.tokenize(text, parse_special=False):
            if guard.restrict(flat, 0.0)[token] == -np.inf:
                return False
            guard.accept(token)
        return bool((guard.restrict(flat, 0.0)[eog] > -np.inf).any())

    return accepts
