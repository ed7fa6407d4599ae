"""What tests of the optimizer share: a tiny model in llama.cpp and in torch, and the losses computed the slow way."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch: Any = pytest.importorskip("torch")
pytest.importorskip("transformers")

from acd_local.optimize.prompt_tokens import Layout, lay_out  # noqa: E402
from acd_local.optimize.text_search import TextSpace  # noqa: E402
from acd_local.optimize.weights import Example, FrozenModel  # noqa: E402
from acd_local.runtime import llama  # noqa: E402
from acd_local.runtime.template import ChatTemplate, Message  # noqa: E402

torch.set_num_threads(1)

USERS = ("What is red?", "", " water and wine", "\n\nHello world", "é 中", "<|im_start|>system")
N_VOCAB = 500  # of the tiny vocabulary, ordinary tokens alone


@functools.cache
def frozen(path: Path) -> FrozenModel:
    return FrozenModel(path)


class Side:
    """A tiny model's file in llama.cpp: vocabulary, template and layout."""

    def __init__(self, path: Path, users: Sequence[str] = USERS) -> None:
        self.path = path
        self.model = llama.Model(path, gpu_layers=0)
        self.vocab = self.model.vocab
        self.template = ChatTemplate(self.model)
        self.users = tuple(users)
        self.layout, self.tails = lay_out(self.template, users)
        self.space = TextSpace(self.template, self.vocab, self.layout, self.vocab.n_tokens)

    def conversation(self, system: str, user: str) -> list[int]:
        return self.template.encode([Message("system", system), Message("user", user)])


def random_examples(seed: int, count: int, longest: int = 7) -> list[Example]:
    """Prompts and answers of different lengths."""
    rng = np.random.default_rng(seed)

    def tokens() -> tuple[int, ...]:
        return tuple(map(int, rng.integers(0, N_VOCAB, 1 + rng.integers(longest))))

    return [Example(tokens(), tokens()) for _ in range(count)]


def whole_logits(model: FrozenModel, layout: Layout, rows: Any, example: Example) -> Any:
    """Logits that predict an answer's tokens, float64, from one pass over the whole conversation, alone, unpadded."""
    whole = [model.embed(layout.before), rows, model.embed([*layout.after, *example.prompt, *example.answer])]
    logits = model.model(inputs_embeds=torch.cat(whole)[None], use_cache=False).logits[0].double()
    return logits[len(logits) - len(example.answer) - 1 : -1]


def slow_terms(model: FrozenModel, layout: Layout, rows: Any, batch: Mapping[Any, Sequence[Example]]) -> dict[Any, Any]:
    """L_p, L_n and L_r as METHOD writes them: expectations over pairs of sums over t, one conversation at a time."""
    found = {}
    for term, examples in batch.items():
        values = []
        for example in examples:
            total: Any = 0.0
            probabilities = torch.softmax(whole_logits(model, layout, rows, example), dim=1)
            for t, token in enumerate(example.answer):
                p = probabilities[t, token]
                total = total - (torch.log(1 - p) if term == "negative" else torch.log(p))
            values.append(total)
        found[term] = torch.stack(values).mean()
    return found
