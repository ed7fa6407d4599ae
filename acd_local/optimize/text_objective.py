"""Computes what a text prompt is searched for: the soft prompt's distributions, the paper's losses, ordinary text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from acd_local.optimize.losses import Term, term_loss, token_log_probs
from acd_local.optimize.prompt_tokens import Layout
from acd_local.optimize.soft_training import Batches, draw
from acd_local.optimize.weights import Example, FrozenModel, Prefix

TERMS: tuple[Term, ...] = ("positive", "negative", "retain")


@dataclass(frozen=True)
class ObjectiveWeights:
    """Of the three parts: KL to the soft prompt, the paper's losses, and the text's own NLL."""

    kl: float = 1.0
    opo: float = 1.0
    fluency: float = 0.1


@dataclass(frozen=True)
class _Minibatch:
    examples: list[Example]
    tokens: torch.Tensor
    teacher: torch.Tensor  # log probabilities, shape (tokens, n_vocab)
    spans: Mapping[Term, slice]
    counts: Mapping[Term, int]  # of answers


@dataclass(eq=False)
class TextObjective:
    """kl * KL(soft || text) + opo * (L_p + L_n + L_r) + fluency * NLL(text), on a minibatch of anchors.

    KL is the divergence between the next-token distributions under the soft prompt (the teacher) and under the text,
    in nats: like the losses a mean over the answers of the sum over their tokens. NLL is a mean over the text's tokens.

    Args:
        teacher: the soft prompt, shape (n, n_embd).
        pairs: anchors by term, answers cut to the tokens that count.
        sizes: anchors of a minibatch, by term.
        micro: most anchors that go through the model together with gradients; without, twice as many.
    """

    model: FrozenModel
    layout: Layout
    teacher: torch.Tensor
    pairs: Batches
    sizes: Mapping[Term, int]
    weights: ObjectiveWeights
    seed: int
    micro: int = 16

    def __post_init__(self) -> None:
        with torch.no_grad():
            self._teacher = self.model.prefix(self.layout.rows(self.model, self.teacher))
        self._batch = self._minibatch(0)

    def turn_to(self, number: int) -> None:
        """Use minibatch `number` from now on."""
        self._batch = self._minibatch(number)

    def __call__(self, tokens: Sequence[int]) -> dict[str, float]:
        """Compute the parts and their weighted sum "objective", lower is better, for a prompt's token ids."""
        w = self.weights
        with torch.no_grad():
            prefix = self.model.prefix(self.layout.rows(self.model, self.model.embed(tokens).float()))
            sums = [self._sums(prefix, *part) for part in self._split(2 * self.micro)]
            kl, opo = (float(torch.stack(values).sum()) for values in zip(*sums, strict=True))
            fluency = float(self._nll(prefix, tokens))
        return {"objective": w.kl * kl + w.opo * opo + w.fluency * fluency, "kl": kl, "opo": opo, "fluency": fluency}

    def gradient(self, tokens: Sequence[int]) -> torch.Tensor:
        """Estimate what replacing a token by another would change, to first order: shape (len(tokens), n_vocab).

        The gradient with respect to the tokens' one-hot rows (Zou et al. 2023, greedy coordinate gradient). As in
        `soft_training.loss_and_gradient`, micro-batches leave theirs at the prefix's keys and values.
        """
        w = self.weights
        rows = self.model.embed(tokens).float().requires_grad_()
        prefix = self.model.prefix(self.layout.rows(self.model, rows))
        leaf = prefix.leaf()
        for part in self._split(self.micro):
            kl, opo = self._sums(leaf, *part)
            (w.kl * kl + w.opo * opo).backward()  # type: ignore[no-untyped-call]
        fluency = self._nll(prefix, tokens)
        if fluency.requires_grad:
            (w.fluency * fluency).backward(retain_graph=True)  # type: ignore[no-untyped-call]
        prefix.backward(leaf)
        assert rows.grad is not None
        with torch.no_grad():
            return (rows.grad.to(self.model.dtype) @ self.model.embeddings.T).float()

    def _minibatch(self, number: int) -> _Minibatch:
        examples: list[Example] = []
        spans, counts = {}, {}
        at = 0
        for term in TERMS:
            chosen = draw(self.pairs[term], self.sizes[term], number, self.seed)
            count = sum(len(e.answer) for e in chosen)
            spans[term] = slice(at, at + count)
            at += count
            counts[term] = len(chosen)
            examples += chosen
        tokens = torch.tensor([t for e in examples for t in e.answer], device=self.model.device)
        with torch.no_grad():
            parts = [examples[at] for at in _even(len(examples), 2 * self.micro)]
            logits = [self.model.answer_logits(self._teacher, part).log_softmax(1) for part in parts]
        return _Minibatch(examples, tokens, torch.cat(logits), spans, counts)

    def _split(self, micro: int) -> Iterator[tuple[list[Example], slice]]:
        """Cut the minibatch into parts of at most `micro` anchors, each with the place of its answers' tokens."""
        end = 0
        for at in _even(len(self._batch.examples), micro):
            part = self._batch.examples[at]
            start, end = end, end + sum(len(e.answer) for e in part)
            yield part, slice(start, end)

    def _sums(self, prefix: Prefix, examples: list[Example], here: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum what some of the minibatch's anchors add to KL and to the paper's losses."""
        batch = self._batch
        student = self.model.answer_logits(prefix, examples).log_softmax(1)
        teacher = batch.teacher[here]
        kl = (teacher.exp() * (teacher - student)).sum() / len(batch.examples)
        log_probs = student.gather(1, batch.tokens[here][:, None])[:, 0]
        losses = []
        for term, span in batch.spans.items():
            mine = log_probs[max(0, span.start - here.start) : max(0, span.stop - here.start)]
            losses.append(term_loss(term, mine) / max(1, batch.counts[term]))
        return kl, torch.stack(losses).sum()

    def _nll(self, prefix: Prefix, tokens: Sequence[int]) -> torch.Tensor:
        """Compute the nats per token of the prompt's own text."""
        first = len(self.layout.before)
        if first == 0:  # nothing predicts the first token
            first, tokens = 1, tokens[1:]
        if not tokens:
            return torch.zeros((), device=self.model.device)
        logits = self.model.logits(prefix.hidden[first - 1 : first - 1 + len(tokens)])
        return -token_log_probs(logits, torch.tensor(list(tokens), device=self.model.device)).mean()


def _even(count: int, most: int) -> list[slice]:
    """Divide into the fewest parts of at most `most`, of about one size."""
    parts = -(-count // most)
    return [slice(i * count // parts, (i + 1) * count // parts) for i in range(parts)]
