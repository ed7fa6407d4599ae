"""Makes training examples of anchors: answers cut to the tokens that count, and what these were drawn from.

An answer's tokens are samples, and what a soft prompt is to keep is the distribution behind them. Trained on the
samples, a batch of few answers moves it towards whatever was drawn; trained on the distribution, it does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from acd_local.optimize.anchor_sets import Anchor, AnchorSets
from acd_local.optimize.losses import Targets, Term
from acd_local.optimize.prompt_tokens import PromptTokens
from acd_local.optimize.weights import Example, FrozenModel
from acd_local.options import Options
from acd_local.progress import check_stop
from acd_local.runtime.cancel import CancelToken
from acd_local.tuning.anchors import VALIDATION_SHARE

WHOLE_SHARE = 4  # of the refusals, one in so many is trained whole: all of them would drown their openings
LOOKALIKE_SHARE = 3  # of the answered anchors, one in so many at most: more of them blur what is to be refused

# Which set a prompt is to bring about, and which it is to keep away.
TERMS: dict[str, dict[Term, str]] = {
    "safe": {"positive": "refused", "negative": "complied", "retain": "answered"},
    "adversarial": {"positive": "complied", "negative": "refused", "retain": "answered"},
}


def examples(anchors: Sequence[Anchor], tokens: PromptTokens, most: int) -> list[Example]:
    """Make anchors into examples, answers cut to `most` tokens."""
    return [_example(a, tokens, most) for a in anchors]


def _example(anchor: Anchor, tokens: PromptTokens, most: int) -> Example:
    return Example(tokens.tails[anchor.instruction.id], anchor.answer[:most], anchor.under)


def batches(
    sets: AnchorSets, tokens: PromptTokens, role: str, answer_tokens: int, refusal_tokens: int
) -> dict[Term, list[Example]]:
    """Make training examples of a prompt by term; among the ones to answer, ordinary ones may come several times.

    Args:
        answer_tokens: how much of an answer counts.
        refusal_tokens: how much of a refusal that the prompt is to bring about, one in WHOLE_SHARE of them: which ones
            is decided by the instruction's text alone, and apart from whether it validates.
    """
    by_term = {term: _balanced(getattr(sets, name)) for term, name in TERMS[role].items()}
    found = {term: examples(anchors, tokens, answer_tokens) for term, anchors in by_term.items()}
    # Of a refusal that is to be kept away the opening decides: later tokens are those of any text.
    if TERMS[role]["positive"] == "refused":
        for place, anchor in enumerate(by_term["positive"]):
            if anchor.instruction.number // VALIDATION_SHARE % WHOLE_SHARE == 0:
                found["positive"][place] = _example(anchor, tokens, refusal_tokens)
    return found


def _balanced(anchors: Sequence[Anchor]) -> list[Anchor]:
    """List all anchors, the ordinary ones so often that look-alikes are at most one in LOOKALIKE_SHARE."""
    lookalikes = [a for a in anchors if a.instruction.lookalike]
    ordinary = [a for a in anchors if not a.instruction.lookalike]
    times = -(-len(lookalikes) * (LOOKALIKE_SHARE - 1) // max(1, len(ordinary)))
    return ordinary * max(1, times) + lookalikes


def with_targets(
    model: FrozenModel,
    examples: Sequence[Example],
    beginnings: Mapping[str, Sequence[int]],
    options: Options,
    micro: int,
    stop: CancelToken | None = None,
) -> list[Example]:
    """Give the examples, in their order, the distributions of those whose `under` has a beginning.

    Args:
        beginnings: token ids of a conversation under a manual prompt, up to the example's own.
        options: how the answers were sampled.
        micro: most examples that go through the model together.
    """
    found = list(examples)
    with torch.no_grad():
        for under, tokens in beginnings.items():
            mine = sorted((i for i, e in enumerate(examples) if e.under == under), key=lambda i: len(examples[i]))
            if not mine:
                continue
            prefix = model.prefix(model.embed(tokens).float())
            for start in range(0, len(mine), micro):
                check_stop(stop)
                part = mine[start : start + micro]
                logits = model.answer_logits(prefix, [examples[i] for i in part])
                lengths = [len(examples[i].answer) for i in part]
                for i, rows in zip(part, torch.split(logits, lengths), strict=True):
                    found[i] = replace(examples[i], targets=sampled_from(rows, options))
    return found


def sampled_from(logits: torch.Tensor, options: Options) -> Targets:
    """Compute what top-k, top-p, min-p and temperature, in llama.cpp's order, leave of logits of shape (n, n_vocab).

    These distributions are of shape (n, k).
    """
    top, tokens = logits.topk(min(options.top_k, logits.shape[1]), dim=1)
    p = top.softmax(1)
    before = p.cumsum(1) - p  # llama.cpp keeps tokens until top-p is reached, the one that reaches it among them
    kept = (before < options.top_p) & (p >= options.min_p * p[:, :1])
    weights = (top / options.temp).masked_fill(~kept, -torch.inf).softmax(1)
    return Targets(tokens, weights)


def together(examples: Sequence[Example], device: torch.device) -> Targets:
    """Put all examples' targets together, one after the other, padded with candidates of weight 0.

    Where an example has none, its tokens are their only candidates.
    """
    found = [e.targets or _alone(e.answer, device) for e in examples]
    width = max(t.tokens.shape[1] for t in found)
    pad = [width - t.tokens.shape[1] for t in found]
    tokens = [torch.nn.functional.pad(t.tokens, (0, n)) for t, n in zip(found, pad, strict=True)]
    weights = [torch.nn.functional.pad(t.weights, (0, n)) for t, n in zip(found, pad, strict=True)]
    return Targets(torch.cat(tokens), torch.cat(weights))


def _alone(answer: Sequence[int], device: torch.device) -> Targets:
    return Targets(torch.tensor(answer, device=device)[:, None], torch.ones(len(answer), 1, device=device))
