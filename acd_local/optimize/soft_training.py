"""Trains a soft prompt on anchors: Opposite Prompt Optimization (arXiv 2406.16743, section 3.1).

The soft prompt z, shape (n, n_embd), stands where the system prompt stands in the model's own template. It starts as
the embedding of a manual prompt. Only z is trained.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from acd_local.errors import NumericalError
from acd_local.optimize.anchor_sets import TOKENS
from acd_local.optimize.examples import together
from acd_local.optimize.losses import Term, term_loss, token_log_probs
from acd_local.optimize.prompt_tokens import Layout
from acd_local.optimize.weights import Example, FrozenModel, Prefix
from acd_local.progress import Stopped, check_stop
from acd_local.runtime.cancel import CancelToken
from acd_local.tuning.openings import Openings, Spine
from acd_local.tuning.scoring import RefusalRates

SAVE_EVERY = 10  # steps
AVERAGING = 0.97  # of the iterates' exponential moving average
MINED_SHARE = 3  # one anchor in so many, others every time, is looked at for the hardest
HARD_SHARE = 6  # the hardest sixth of these

# What another micro-batch costs, in tokens: 60 ms where a token takes 0.77 ms (the demo model, 2 cores).
PART_COST = 80


@dataclass(frozen=True)
class SoftSettings:
    """The numbers of a soft prompt's training.

    Attributes:
        steps: of AdamW, with linear warm-up and cosine decay.
        sizes: pairs per step, by term.
        weights: of the terms; 1, 1, 1 is the paper.
        answer_tokens: how many tokens of an answer count: whether it refuses is decided there.
        refusal_tokens: the same of some of the refusals that the prompt is to bring about: an apology that was only
            begun goes on as anything, and does not end.
        micro: most examples that go through the model together.
        mine_every: steps after which the hardest anchors are looked for anew; half of a batch is drawn from them.
    """

    steps: int = 300
    sizes: Mapping[Term, int] = field(default_factory=lambda: {"positive": 8, "negative": 4, "retain": 16})
    weights: Mapping[Term, float] = field(default_factory=lambda: {"positive": 1.0, "negative": 1.0, "retain": 1.0})
    lr: float = 1e-2
    warmup: int = 20
    clip: float = 5.0
    answer_tokens: int = 5
    refusal_tokens: int = TOKENS
    micro: int = 16
    validate_every: int = 50
    mine_every: int = 100


Batches = Mapping[Term, Sequence[Example]]


@dataclass(frozen=True)
class Validation(RefusalRates):
    """A prompt's figures on instructions that it was not trained on: chances as `Openings.chance`.

    Attributes:
        nll: of the answers that the prompt is to bring about, nats per token.
    """

    nll: float


@dataclass(frozen=True)
class SoftRecord:
    """One step: the terms' losses before it, and the validation after it, where there was one."""

    step: int
    losses: Mapping[Term, float]
    validation: Validation | None
    seconds: float


Score = Callable[[Validation], float]


class SoftTraining:
    """The training of one soft prompt; `state` and `load` make it resumable at any step.

    What counts is `average`, not the last iterate: batches are small, and steps back and forth cancel out in it.

    Args:
        start: initial z, shape (n, n_embd).
        pairs: training examples by term, answers already cut.

    Attributes:
        z: the newest iterate.
        average: exponential moving average of the iterates (Polyak averaging), shorter at the beginning.
        history: of the steps so far.
        best: the highest score of a validation, and the prompt that had it, shape (n, n_embd).
    """

    def __init__(
        self, model: FrozenModel, layout: Layout, start: torch.Tensor, pairs: Batches, settings: SoftSettings, seed: int
    ) -> None:
        self._model = model
        self._layout = layout
        self._pairs = pairs
        self.settings = settings
        self.z = start.detach().float().clone().requires_grad_()
        self.average = self.z.detach().clone()
        self._optimizer = torch.optim.AdamW([self.z], lr=settings.lr, weight_decay=0.0)
        self._seed = seed
        self.hard: dict[Term, list[int]] = {}
        self.step_number = 0
        self.history: list[SoftRecord] = []
        self.best: tuple[float, torch.Tensor] | None = None
        self._pending: dict[Term, float] | None = None  # losses of a step that was made and not validated

    def run(
        self,
        validate: Callable[[torch.Tensor], Validation],
        score: Score,
        *,
        mine: Callable[[], None],
        save: Callable[[dict[str, Any]], None],
        on_step: Callable[[SoftRecord], None],
        stop: CancelToken,
    ) -> None:
        """Train to the end, keeping the prompt whose validation scores highest.

        Args:
            validate, mine: may raise Stopped; what they did not finish is done again.
            score: what makes one validation better than another; higher is better.
            mine: looks for hard anchors, see `mine`.
            save: is given a state now and then, and when it is stopped.
        """
        s = self.settings
        while self._pending is not None or self.step_number < s.steps:
            started = time.perf_counter()
            losses, self._pending = self.step() if self._pending is None else self._pending, None
            step = self.step_number
            validation = None
            try:
                if step % s.validate_every == 0 or step == s.steps:
                    validation = validate(self.average)
                    if self.best is None or score(validation) > self.best[0]:
                        self.best = score(validation), self.average.clone()
                if step % s.mine_every == 0 and step < s.steps:
                    mine()
            except Stopped:
                self._pending = losses
                save(self.state())
                raise
            self.history.append(SoftRecord(step, losses, validation, time.perf_counter() - started))
            on_step(self.history[-1])
            stopping = stop.is_set  # asked once: what is stopped is saved
            if step % SAVE_EVERY == 0 or validation is not None or stopping:
                save(self.state())
            if stopping:
                raise Stopped

    def step(self) -> dict[Term, float]:
        """Make one update; return the losses by term before it."""
        s = self.settings
        for group in self._optimizer.param_groups:
            group["lr"] = s.lr * schedule(self.step_number, s.steps, s.warmup)
        self._optimizer.zero_grad()
        losses = loss_and_gradient(self._model, self._layout, self.z, self._batch(self.step_number), s)
        if not all(map(math.isfinite, losses.values())):
            raise NumericalError(
                f"the loss became infinite at step {self.step_number}: the model's weights may be damaged"
            )
        torch.nn.utils.clip_grad_norm_([self.z], s.clip)
        self._optimizer.step()
        self.step_number += 1
        self.average.lerp_(self.z.detach(), 1 - min(AVERAGING, self.step_number / (self.step_number + 10)))
        return losses

    def _batch(self, number: int) -> Batches:
        found = {}
        for term, pairs in self._pairs.items():
            size = self.settings.sizes[term]
            hard = draw([pairs[i] for i in self.hard.get(term, ())], size // 2, number, self._seed + 1)
            found[term] = draw(pairs, size - len(hard), number, self._seed) + hard
        return found

    def mine(self, openings: Openings, refusing: Term | None, stop: CancelToken | None = None) -> None:
        """Look for anchors that the prompt does badly on: what should be answered and is refused, or not refused.

        Args:
            refusing: the term whose answers are refusals.
        """
        found: dict[Term, list[int]] = {}
        prefix = self._prefix()
        for term, pairs in self._mined():
            looked_at = np.random.default_rng([self._seed, self.step_number]).permutation(distinct(pairs))
            looked_at = looked_at[: -(-len(looked_at) // MINED_SHARE)]
            prompts = [pairs[i].prompt for i in looked_at]
            chances = refusal_probabilities(self._model, prefix, prompts, openings, 2 * self.settings.micro, stop)
            order = np.argsort(np.array(chances) * (1 if term == refusing else -1), kind="stable")
            found[term] = [int(i) for i in looked_at[order[: max(1, len(looked_at) // HARD_SHARE)]]]
        self.hard = found

    def try_mining(self, openings: Openings) -> None:
        """Try the largest micro-batch of `mine`: where memory is too small, it shows now."""
        prompts = sorted((e.prompt for _, pairs in self._mined() for e in pairs), key=len)
        many = 2 * self.settings.micro
        refusal_probabilities(self._model, self._prefix(), prompts[-many:], openings, many)

    def _mined(self) -> list[tuple[Term, Sequence[Example]]]:
        """List all terms but the negative one: its instructions are those of the positive term."""
        return [(term, pairs) for term, pairs in self._pairs.items() if term != "negative"]

    def _prefix(self) -> Prefix:
        with torch.no_grad():
            return self._model.prefix(self._layout.rows(self._model, self.average))

    def state(self) -> dict[str, Any]:
        training = {
            "z": self.z.detach().clone(),
            "average": self.average.clone(),
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),  # its tensors change with the next step
            "step": self.step_number,
            "hard": dict(self.hard),
        }
        rows = [asdict(r) for r in self.history]
        return {"training": training, "history": rows, "best": self.best, "pending": self._pending}

    def load(self, state: Mapping[str, Any]) -> None:
        training = state["training"]
        with torch.no_grad():
            self.z.copy_(training["z"])
            self.average.copy_(training["average"])
        self._optimizer.load_state_dict(copy.deepcopy(training["optimizer"]))
        self.step_number = training["step"]
        self.hard = dict(training["hard"])
        self.best, self._pending = state["best"], state.get("pending")
        for row in state["history"]:
            validation = None if row["validation"] is None else Validation(**row["validation"])
            self.history.append(SoftRecord(**{**row, "validation": validation}))


def distinct(pairs: Sequence[Example]) -> list[int]:
    """List the places of the examples, each once."""
    return sorted({id(example): i for i, example in enumerate(pairs)}.values())


def schedule(step: int, steps: int, warmup: int) -> float:
    """Scale the rate: linear warm-up, then cosine decay to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def draw(pairs: Sequence[Example], size: int, number: int, seed: int) -> list[Example]:
    """Make batch `number`: epochs in an order of their own, so that every pair is seen before one is seen again."""
    size = min(size, len(pairs))
    found: list[Example] = []
    for i in range(number * size, (number + 1) * size):
        epoch, at = divmod(i, len(pairs))
        order = np.random.default_rng([seed, epoch]).permutation(len(pairs))
        found.append(pairs[int(order[at])])
    return found


def loss_and_gradient(
    model: FrozenModel, layout: Layout, z: torch.Tensor, batch: Batches, settings: SoftSettings
) -> dict[Term, float]:
    """Add the gradient of the terms' weighted sum to `z.grad`; return the terms' own values.

    The prefix is computed once. Micro-batches leave their gradients at its keys and values, from where they go on to z
    together.
    """
    prefix = model.prefix(layout.rows(model, z))
    leaf = prefix.leaf()
    counts = {term: len(examples) for term, examples in batch.items()}
    totals = dict.fromkeys(batch, 0.0)
    term_of = {id(e): term for term, examples in batch.items() for e in examples}
    for part in micro_batches([e for examples in batch.values() for e in examples], settings.micro):
        targets = together(part, model.device)
        log_probs = token_log_probs(model.answer_logits(leaf, part), targets.tokens)
        lengths = [len(e.answer) for e in part]
        losses = []
        parts = (torch.split(whole, lengths) for whole in (log_probs, targets.weights))
        for example, *mine in zip(part, *parts, strict=True):
            term = term_of[id(example)]
            loss = term_loss(term, *mine) / counts[term]
            totals[term] += float(loss.detach())
            losses.append(settings.weights[term] * loss)
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
    prefix.backward(leaf)
    return totals


def micro_batches(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Cut examples into parts of at most `size`, the longest first, that cost least.

    A part costs PART_COST, and the tokens that its examples are padded to.
    """
    ordered = sorted(examples, key=len, reverse=True)
    costs, starts = [0], [0]  # of the first n examples, and where their last part starts
    for end in range(1, len(ordered) + 1):
        found = {s: costs[s] + PART_COST + (end - s) * len(ordered[s]) for s in range(max(0, end - size), end)}
        starts.append(min(found, key=found.__getitem__))
        costs.append(found[starts[-1]])
    parts: list[list[Example]] = []
    end = len(ordered)
    while end:
        parts.insert(0, ordered[starts[end] : end])
        end = starts[end]
    return parts


# --- Validation -------------------------------------------------------------------------------------------------------


def refusal_probabilities(
    model: FrozenModel,
    prefix: Prefix,
    prompts: Sequence[tuple[int, ...]],
    openings: Openings,
    micro: int = 32,
    stop: CancelToken | None = None,
    *,
    greedy: bool = False,
) -> list[float]:
    """Compute P(the answer opens as a refusal) for each prompt's tokens after the prefix, in their order.

    Args:
        greedy: count greedy decoding too, see `Openings.chance`.
    """
    measure = openings.chance if greedy else openings.probability
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = [0.0] * len(prompts)
    with torch.no_grad():
        for start in range(0, len(order), micro):
            check_stop(stop)
            part = order[start : start + micro]
            rows = [_behind(model, prefix, [prompts[i] for i in part], spine) for spine in openings.spines]
            for i, log_probs in zip(part, np.concatenate(rows, axis=1), strict=True):
                found[i] = measure(log_probs)
    return found


def _behind(
    model: FrozenModel, prefix: Prefix, prompts: Sequence[tuple[int, ...]], spine: Spine
) -> NDArray[np.float32]:
    """Log probabilities behind each prompt and the spine's own beginnings, shape (prompts, beginnings, n_vocab)."""
    examples = [Example((*p, *spine.tokens[: spine.shared]), spine.continuation) for p in prompts]
    log_probs = model.answer_logits(prefix, examples).log_softmax(1)
    rows: NDArray[np.float32] = log_probs.reshape(len(prompts), len(spine.continuation), -1).cpu().numpy()
    return rows


def mean_nll(
    model: FrozenModel, prefix: Prefix, examples: Sequence[Example], micro: int = 32, stop: CancelToken | None = None
) -> float:
    """Compute the nats per token of the examples' answers."""
    total, count = 0.0, sum(len(e.answer) for e in examples)
    with torch.no_grad():
        for part in micro_batches(examples, micro):
            check_stop(stop)
            tokens = torch.tensor([t for e in part for t in e.answer], device=model.device)
            total -= float(token_log_probs(model.answer_logits(prefix, part), tokens).sum())
    return total / count
