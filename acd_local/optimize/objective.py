"""What a text prompt is optimized for: the soft prompt's distributions, the paper's losses, and being ordinary text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from acd_local.optimize.layout import Layout
from acd_local.optimize.losses import Term, term_loss, token_log_probs
from acd_local.optimize.soft import Batches, draw
from acd_local.optimize.weights import Example, FrozenModel, Prefix

TERMS: tuple[Term, ...] = ("positive", "negative", "retain")


@dataclass(frozen=True)
class DistillWeights:
    """Of the three parts: KL to the soft prompt, the paper's losses, and the text's own NLL."""

    kl: float = 1.0
    opo: float = 1.0
    fluency: float = 0.02


@dataclass(frozen=True)
class _Minibatch:
    examples: list[Example]
    tokens: torch.Tensor
    teacher: torch.Tensor  # log probabilities, shape (tokens, n_vocab)
    spans: Mapping[Term, slice]


class TextObjective:
    """kl * KL(soft || text) + opo * (L_p + L_n + L_r) + fluency * NLL(text), on a minibatch of anchors.

    KL is the mean over the answers' tokens of the divergence between the next-token distributions under the soft
    prompt (the teacher) and under the text, in nats.

    Args:
        teacher: the soft prompt, shape (n, n_embd).
        pairs: anchors by term, answers cut to the few tokens that count.
        sizes: anchors of a minibatch, by term.
    """

    def __init__(
        self,
        model: FrozenModel,
        layout: Layout,
        teacher: torch.Tensor,
        pairs: Batches,
        sizes: Mapping[Term, int],
        weights: DistillWeights,
        seed: int,
    ) -> None:
        self._model = model
        self._layout = layout
        self._pairs = pairs
        self._sizes = sizes
        self._weights = weights
        self._seed = seed
        with torch.no_grad():
            self._teacher = model.prefix(layout.rows(model, teacher))
        self._batch = self._minibatch(0)

    def turn_to(self, number: int) -> None:
        """Use minibatch `number` from now on."""
        self._batch = self._minibatch(number)

    def __call__(self, tokens: Sequence[int]) -> dict[str, float]:
        """The parts and their weighted sum "objective", lower is better, for a prompt's token ids."""
        with torch.no_grad():
            parts = self._parts(self._model.embed(tokens).float(), tokens)
        return {name: float(value) for name, value in parts.items()}

    def gradient(self, tokens: Sequence[int]) -> torch.Tensor:
        """What replacing a token by another would change, to first order: shape (len(tokens), n_vocab).

        The gradient with respect to the tokens' one-hot rows (Zou et al. 2023, greedy coordinate gradient).
        """
        rows = self._model.embed(tokens).float().requires_grad_()
        (gradient,) = torch.autograd.grad(self._parts(rows, tokens)["objective"], rows)
        with torch.no_grad():
            return (gradient.to(self._model.dtype) @ self._model.embeddings.T).float()

    def _minibatch(self, number: int) -> _Minibatch:
        examples: list[Example] = []
        spans = {}
        at = 0
        for term in TERMS:
            chosen = draw(self._pairs[term], self._sizes[term], number, self._seed)
            count = sum(len(e.answer) for e in chosen)
            spans[term] = slice(at, at + count)
            at += count
            examples += chosen
        tokens = torch.tensor([t for e in examples for t in e.answer], device=self._model.device)
        with torch.no_grad():
            teacher = self._model.answer_logits(self._teacher, examples).log_softmax(1)
        return _Minibatch(examples, tokens, teacher, spans)

    def _parts(self, rows: torch.Tensor, tokens: Sequence[int]) -> dict[str, torch.Tensor]:
        batch, w = self._batch, self._weights
        prefix = self._model.prefix(self._layout.rows(self._model, rows))
        logits = self._model.answer_logits(prefix, batch.examples)
        student = logits.log_softmax(1)
        kl = (batch.teacher.exp() * (batch.teacher - student)).sum(1).mean()
        log_probs = student.gather(1, batch.tokens[:, None])[:, 0]
        opo = torch.stack([term_loss(t, log_probs[s]) / max(1, s.stop - s.start) for t, s in batch.spans.items()]).sum()
        fluency = self._nll(prefix, tokens)
        return {"objective": w.kl * kl + w.opo * opo + w.fluency * fluency, "kl": kl, "opo": opo, "fluency": fluency}

    def _nll(self, prefix: Prefix, tokens: Sequence[int]) -> torch.Tensor:
        """Nats per token of the prompt's own text."""
        first = len(self._layout.before)
        if first == 0:  # nothing predicts the first token
            first, tokens = 1, tokens[1:]
        if not tokens:
            return torch.zeros((), device=self._model.device)
        logits = self._model.logits(prefix.hidden[first - 1 : first - 1 + len(tokens)])
        return -token_log_probs(logits, torch.tensor(list(tokens), device=self._model.device)).mean()
