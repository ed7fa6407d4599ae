"""What answers were drawn from: against llama.cpp's own samplers, and in the losses against a slow implementation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optimizing import Side, frozen, random_examples, torch, whole_logits

from acd_local.optimize.examples import sampled_from, together, with_targets
from acd_local.optimize.losses import Targets, Term
from acd_local.optimize.prompt_tokens import Layout
from acd_local.optimize.soft_training import SoftSettings, loss_and_gradient
from acd_local.optimize.weights import Example, FrozenModel
from acd_local.options import Options
from acd_local.progress import Stopped
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.sampling import TokenSampler

SAMPLING = Options(temp=0.7)
BEGINNINGS = {"safe": (3, 4, 5, 6, 7), "none": (8, 9)}
DRAWS = 4000


@pytest.fixture(scope="module")
def side(tiny: Callable[..., Path]) -> Side:
    return Side(tiny("chatml"))


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> FrozenModel:
    return frozen(tiny("chatml"))


@pytest.fixture(scope="module")
def sampled() -> list[Example]:
    """Examples under a manual prompt with a beginning, under one without, and written ones."""
    return [replace(e, under=("safe", "opposite", "none", "")[i % 4]) for i, e in enumerate(random_examples(2, 12))]


def with_them(model: FrozenModel, examples: list[Example], micro: int = 3) -> list[Example]:
    return with_targets(model, examples, BEGINNINGS, SAMPLING, micro)


@pytest.mark.parametrize("options", [SAMPLING, Options(temp=1.3, top_k=5, top_p=1.0, min_p=0.0), Options(top_p=0.5)])
def test_llama_draws_from_these(side: Side, options: Options) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (2, 500)).astype(np.float32)
    found = sampled_from(torch.tensor(logits), options)
    sampler = TokenSampler(side.vocab, options, 5, history=())
    ids = np.arange(500, dtype=np.int32)
    for row, tokens, weights in zip(logits, found.tokens, found.weights, strict=True):
        drawn = Counter(sampler.draw(ids, row, position) for position in range(DRAWS))
        wanted = {int(t): float(w) for t, w in zip(tokens, weights, strict=True) if w > 0}
        assert sum(wanted.values()) == pytest.approx(1)
        assert set(drawn) <= set(wanted)
        assert len(wanted) > 1
        for token, p in wanted.items():
            assert drawn[token] / DRAWS == pytest.approx(p, abs=4 * np.sqrt(p / DRAWS))


def test_every_answer_has_the_distributions_of_its_own_conversation(model: FrozenModel, sampled: list[Example]) -> None:
    with torch.no_grad():
        for micro in (1, 3, 50):
            found = with_them(model, sampled, micro)
            assert [(e.prompt, e.answer, e.under) for e in found] == [(e.prompt, e.answer, e.under) for e in sampled]
            assert [e.under for e in found if e.targets is not None] == ["safe", "none"] * 3
            for example in found:
                if example.targets is not None:
                    begun = Layout(BEGINNINGS[example.under], ())
                    wanted = sampled_from(whole_logits(model, begun, model.embed(()), example).float(), SAMPLING)
                    assert dense(example.targets) == pytest.approx(dense(wanted), abs=1e-4)


def dense(targets: Targets) -> Any:
    return torch.zeros(len(targets.tokens), 600).scatter_add_(1, targets.tokens, targets.weights).numpy()


def test_stopping(model: FrozenModel, sampled: list[Example]) -> None:
    stop = CancelToken()
    stop.set()
    with pytest.raises(Stopped):
        with_targets(model, sampled, BEGINNINGS, SAMPLING, 3, stop)


def test_the_losses_are_expectations_over_what_could_have_been_drawn(
    tiny: Callable[..., Path], model: FrozenModel, sampled: list[Example]
) -> None:
    """Token by token: sum over the candidates of their probability times the term for them."""
    layout = Side(tiny("chatml")).layout
    z = torch.tensor(np.random.default_rng(3).normal(0, 1, (5, model.width)), dtype=torch.float32)
    ready = with_them(model, sampled)
    batch: dict[Term, list[Example]] = {"positive": ready[:3], "negative": ready[3:8], "retain": ready[8:]}
    slow, fast = (z.clone().requires_grad_() for _ in range(2))
    wanted: dict[Term, Any] = {}
    for term, examples in batch.items():
        values = []
        for e in examples:
            summed: Any = 0.0
            p = torch.softmax(whole_logits(model, layout, slow, e), dim=1)
            loss = -torch.log(1 - p) if term == "negative" else -torch.log(p)
            for t, token in enumerate(e.answer):
                if e.targets is None:
                    summed = summed + loss[t, token]
                else:
                    pairs = zip(e.targets.tokens[t], e.targets.weights[t], strict=True)
                    summed = summed + sum(w * loss[t, k] for k, w in pairs)
            values.append(summed)
        wanted[term] = torch.stack(values).mean()
    total: Any = sum(wanted.values())
    total.backward()
    for micro in (1, 4, 16):
        fast.grad = None
        losses = loss_and_gradient(model, layout, fast, batch, SoftSettings(micro=micro))
        assert losses == pytest.approx({t: float(v.detach()) for t, v in wanted.items()}, rel=2e-5)
        assert float((fast.grad - slow.grad).abs().max()) < 2e-5 * float(slow.grad.abs().max())
    drawn = {term: [replace(e, targets=None) for e in examples] for term, examples in batch.items()}
    assert loss_and_gradient(model, layout, fast, drawn, SoftSettings()) != pytest.approx(losses, rel=1e-2)


def test_together_pads_with_candidates_that_weigh_nothing() -> None:
    two = Targets(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[0.25, 0.75], [1.0, 0.0]]))
    found = together([Example((1,), (5, 6, 7)), Example((1,), (1, 3), "safe", two)], torch.device("cpu"))
    assert found.tokens.tolist() == [[5, 0], [6, 0], [7, 0], [1, 2], [3, 4]]
    assert found.weights.tolist() == [[1, 0], [1, 0], [1, 0], [0.25, 0.75], [1, 0]]
    assert together([Example((1,), (5, 6))], torch.device("cpu")).tokens.tolist() == [[5], [6]]
