"""JSON schemas: what is enforced is enforced to the letter, and what cannot be is refused by name.

`schemas.jsonl` holds schemas of all kinds, each with texts that satisfy it and texts that violate it.
"""

from __future__ import annotations

import gc
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tiny_gguf
from jsonschema.validators import validator_for

from acd_local import Options
from acd_local.errors import UsageError
from acd_local.runtime import grammar, llama, patterns, schema
from acd_local.runtime.schema_guard import SchemaGuard, _tokenizer

CASES = [json.loads(line) for line in (Path(__file__).parent / "schemas.jsonl").read_text("utf-8").splitlines()]
QWEN = Path(os.environ.get("ACD_TEST_MODELS", Path.home() / ".cache" / "acd-test-models"))
QWEN /= "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
LONG = 40  # tokens, after which a walk looks for its end
MOST = 1500


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


def refusal(given: object) -> str:
    with pytest.raises(UsageError) as caught:
        schema.read(given if isinstance(given, str) else json.dumps(given))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    return str(caught.value)


def is_valid(given: Any, text: str) -> bool:
    kind = validator_for(given, default=jsonschema.Draft202012Validator)
    return bool(kind(given, format_checker=kind.FORMAT_CHECKER).is_valid(json.loads(text)))


# -- what is enforced --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_texts_that_satisfy_are_allowed_and_others_are_not(
    accepts: Callable[[object, str], bool], case: dict[str, Any]
) -> None:
    assert case["good"] and case["bad"]
    for text in case["good"]:
        assert accepts(case["schema"], text), text
        assert is_valid(case["schema"], text), text
    for text in case["bad"]:
        assert not accepts(case["schema"], text), text


def test_there_is_a_violation_of_every_keyword() -> None:
    """Formats and drafts included."""
    everything = " ".join(json.dumps(case["schema"]) for case in CASES)
    for keyword in [*schema._KEYWORDS, *patterns.FORMATS]:
        if keyword not in ("uniqueItems",):
            assert f'"{keyword}"' in everything, keyword


class Walk:
    """Random legal tokens; a long text is closed as soon as it may be."""

    def __init__(self, vocab: llama.Vocab, seed: int) -> None:
        self._vocab, self._eog = vocab, vocab.eog_tokens()
        self._rng = np.random.default_rng(seed)
        pieces = [vocab.piece(i) for i in range(vocab.n_tokens)]
        self._quote = np.array([p == b'"' for p in pieces])
        self._brackets = np.array([bool(p) and set(p) <= set(b"}]") for p in pieces])
        self._ends = np.array([i in self._eog for i in range(vocab.n_tokens)])
        self._plain = np.array([len(p) < 3 and bool(p) for p in pieces])
        banned = np.array([bool(attr & llama.ATTR_CONTROL) for attr in vocab.attrs()]) & ~self._ends
        self._scores = np.where(banned, -np.inf, 0).astype(np.float32)

    def text(self, guard: SchemaGuard, examples: Sequence[str]) -> str:
        """Args: examples: texts whose tokens lead to an end, where a pattern asks for certain ones."""
        said, likely = b"", np.zeros(self._vocab.n_tokens, np.bool_)
        likely[[t for text in examples for t in self._vocab.tokenize(text, parse_special=False)]] = True
        for n in range(MOST):
            legal = guard.restrict(self._scores, 0.1) > -np.inf
            choices = [legal]
            if n > LONG:
                inside = re.sub(rb"\\.", b"", said).count(b'"') % 2
                closing = self._quote if inside else self._brackets
                choices = [legal & self._ends, legal & closing, legal & likely, legal & self._plain, legal]
                if self._rng.random() < 0.2:
                    del choices[2]
            elif self._rng.random() < 0.3:
                choices = [legal & self._plain, legal]
            ids = next(found for mask in choices if len(found := np.flatnonzero(mask)))
            token = int(self._rng.choice(ids))
            if token in self._eog:
                return said.decode("utf-8")
            said += self._vocab.piece(token)
            guard.accept(token)
        raise AssertionError(f"no end within {MOST} tokens: {said[-200:]!r}")


def walk_all(vocab: llama.Vocab, walks: int) -> None:
    walk = Walk(vocab, seed=1)
    for case in CASES:
        guard = SchemaGuard(vocab, json.dumps(case["schema"]))
        for _ in range(walks):
            text = walk.text(guard.clone(), case["good"])
            assert is_valid(case["schema"], text), (case["name"], text)


def test_random_legal_texts_are_valid(vocab: llama.Vocab) -> None:
    assert len(CASES) >= 60
    walk_all(vocab, walks=2)


@pytest.mark.slow
@pytest.mark.skipif(not QWEN.is_file(), reason="needs qwen2.5-coder-0.5b in ~/.cache/acd-test-models")
def test_random_legal_texts_are_valid_with_a_large_vocabulary() -> None:
    with llama.Model(QWEN) as model:
        walk_all(model.vocab, walks=10)
