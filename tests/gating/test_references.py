"""References: the mix is the formula's, a stored answer is said again, and no other answer is touched."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gated import AS_IS, tokens
from gates import HARMFUL, HARMLESS
from hypothesis import given
from hypothesis import strategies as st
from reference import TOLERANCE, fresh_logits

from acd_local import Engine, Options
from acd_local.answers import Answer
from acd_local.batch import answer_all
from acd_local.errors import ModelError
from acd_local.evaluate import methods
from acd_local.fit import references as made
from acd_local.pairs import PromptPair
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.references import NEIGHBOURS, References, StateContext
from acd_local.runtime.template import Message

PLAIN = Options(plain=True, temp=0.0, max_tokens=12, draft_max=0)


@pytest.fixture(scope="module")
def engine(model: Path, pair: PromptPair) -> Iterator[Engine]:
    with Engine(model, pair=pair, ctx_size=512, threads=1, conversations=3, system_apart=True) as engine:
        yield engine


def read(engine: Engine, text: str, answer: list[int]) -> np.ndarray:
    """The last hidden states behind which an answer's tokens follow."""
    rows = [*engine.template.encode([Message("user", text)]), *answer[:-1]]
    n, m = len(rows), len(answer)
    with StateContext(engine.decoder.model, n_ctx=512, n_seq=1, outputs=m) as context:
        context.decode(rows, [0] * n, range(n), [0] * (n - m) + [1] * m)
        logits, states = context.logits(m).copy(), context.states()
    for i in (0, m - 1):  # rows and states are in order
        assert np.abs(logits[i] - fresh_logits(engine.decoder.model, rows[: n - m + 1 + i])).max() < TOLERANCE
    return states


@given(st.integers(0, 2**32 - 1), st.integers(1, 90), st.integers(2, 40))
def test_the_mix_is_the_formulas(seed: int, n: int, n_vocab: int) -> None:
    rng = np.random.default_rng(seed)
    states, state = rng.normal(0, 1, (n, 3)).astype(np.float32), rng.normal(0, 1, 3).astype(np.float32)
    follow = rng.integers(0, n_vocab, n).astype(np.int32)
    logits = rng.normal(0, 3, n_vocab).astype(np.float32)
    references = References.of(states, follow)
    distances = [float(((s - state) ** 2).sum()) for s in states]
    nearest = sorted(range(n), key=distances.__getitem__)[:NEIGHBOURS]
    weights = {i: math.exp(-(distances[i] - distances[nearest[0]]) / references.unit) for i in nearest}
    p = np.exp(logits.astype(np.float64) - logits.max())
    expected = 0.5 * p / p.sum()
    for i in nearest:
        expected[follow[i]] += 0.5 * weights[i] / sum(weights.values())
    assert np.exp(references.mixed(logits, state)) == pytest.approx(expected, abs=1e-5)


def test_a_stored_answer_is_said_again(engine: Engine) -> None:
    said = engine.vocab.tokenize("none of this would be said", parse_special=False)[:8]
    plain = tokens(engine.generate(HARMFUL, PLAIN, prompt_setup=AS_IS).run())
    assert plain[: len(said)] != said
    references = References.of(read(engine, HARMFUL, said), np.array(said, np.int32))
    answer = engine.generate(HARMFUL, PLAIN, prompt_setup=AS_IS, apart=references).run()
    assert tokens(answer)[: len(said)] == said
    assert tokens(engine.generate(HARMFUL, PLAIN, prompt_setup=AS_IS).run()) == plain


def test_they_share_a_batch_with_plain_answers(engine: Engine) -> None:
    said = engine.vocab.tokenize("none of this would be said", parse_special=False)[:8]
    references = References.of(read(engine, HARMFUL, said), np.array(said, np.int32))
    work = [(text, apart) for text in (HARMFUL, HARMLESS) for apart in (None, references, references)]

    def all_of(asked: list[int]) -> dict[int, list[int]]:
        begin = lambda i: engine.generate(work[i][0], PLAIN, prompt_setup=AS_IS, apart=work[i][1])  # noqa: E731
        return {i: tokens(a) for i, a in answer_all(engine, asked, begin) if isinstance(a, Answer)}

    together = all_of([*range(6)])
    assert together == {i: found for n in range(6) for i, found in all_of([n]).items()}
    assert together[1] == together[2] != together[0]


def test_a_model_that_refuses_nothing_has_no_references(engine: Engine, pair: PromptPair) -> None:
    with pytest.raises(ModelError, match="there is nothing to refer to: of 4 answers"):
        made.make(engine, pair, stop=CancelToken(), asked=4)


def test_a_method_with_references_travels(pair: PromptPair) -> None:
    references = References.of(np.eye(3, dtype=np.float32), np.arange(3, dtype=np.int32))
    method = replace(methods.builtin(pair)["rtd"], references=references)
    sent = pickle.loads(pickle.dumps(method))
    assert sent.setup() == method.setup() != methods.builtin(pair)["rtd"].setup()
    assert np.array_equal(sent.references.states, references.states) and sent.references.unit == references.unit
