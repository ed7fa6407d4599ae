"""Trains the soft prompts: decides how long and on what, and keeps the best on validation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from acd_local.errors import OutOfMemoryError
from acd_local.optimize import anchor_sets, budget, device, soft_training
from acd_local.optimize.anchor_sets import AnchorSets
from acd_local.optimize.checkpoint import Checkpoint
from acd_local.optimize.context import TRYING, Role, StageContext, in_words
from acd_local.optimize.examples import LOOKALIKE_SHARE, TERMS, WHOLE_SHARE, batches, examples, with_targets
from acd_local.optimize.losses import Term
from acd_local.optimize.report import nearest_words
from acd_local.optimize.soft_training import SoftSettings, SoftTraining, Validation
from acd_local.optimize.weights import Example
from acd_local.progress import Clock, check_stop, seconds_of
from acd_local.tuning.anchors import validation_groups
from acd_local.tuning.scoring import MEASURES

# What a step takes once hard anchors are mined, over one before: they are longer (demo model: 1.93 and 1.67 s).
HARDER = 1.15
# What makes one soft prompt better than another on validation; the higher the better. There is no NLL where no
# instruction that validates was complied with.
SCORES: dict[Role, soft_training.Score] = {"safe": lambda v: v.objective, "adversarial": lambda v: -v.nll or -v.safety}


@dataclass(frozen=True, eq=False)
class SoftPromptResult:
    """A trained soft prompt.

    Attributes:
        z: the best one, shape (n, n_embd).
        history: records of the steps, see `SoftRecord`.
        kept: the step of the best one.
        validation: its `Validation`.
        nearest: words near its rows, see `report.nearest_words`.
        key: of all that decided it.
    """

    z: torch.Tensor
    history: list[dict[str, Any]]
    kept: int
    validation: dict[str, float]
    nearest: list[dict[str, Any]]
    key: str


class SoftPromptStage:
    """Trains one soft prompt after the other, on the same answers."""

    def __init__(self, context: StageContext, sets: AnchorSets) -> None:
        self._context = context
        self._training, self._validating = (sets.part(validation=validation) for validation in (False, True))
        self._sets_key = sets.key
        self._targets: dict[Example, Example] = {}

    def run(self, role: Role) -> SoftPromptResult:
        context = self._context
        positive, negative, retain = context.request.weights
        settings = SoftSettings(
            weights={"positive": positive, "negative": negative, "retain": retain}, micro=context.micro
        )
        checkpoint = context.checkpoint(
            f"soft-{role}",
            anchors=self._sets_key,
            settings={k: v for k, v in asdict(settings).items() if k not in ("steps", "micro")},
            lookalikes=LOOKALIKE_SHARE,
            whole=WHOLE_SHARE,
            openings=asdict(context.job.tokens.openings),
            hard=[soft_training.HARD_SHARE, soft_training.MINED_SHARE],
            targets="what the answers were drawn from",
            averaging=soft_training.AVERAGING,
            validation="greedy and sampled",
            budget=context.request.budget,
            device=context.job.device,
            dtype=context.dtype,
        )
        found = context.result(checkpoint, partial(self._train, role, settings))
        result = SoftPromptResult(**found, key=checkpoint.key)
        steps = checkpoint.counts["steps"]
        context.counts[f"soft_{role}_steps"] = steps
        context.micro = min(context.micro, checkpoint.counts["micro"])
        context.close(checkpoint, f"{steps} steps, best at {result.kept}: {in_words(result.validation)}")
        return result

    def _train(self, role: Role, settings: SoftSettings, checkpoint: Checkpoint) -> dict[str, Any]:
        started = time.perf_counter()
        context, model, tokens = self._context, self._context.model, self._context.job.tokens
        sets = batches(self._training, tokens, role, settings.answer_tokens, settings.refusal_tokens)
        by_term = {term: self._with_targets(mine) for term, mine in sets.items() if mine}

        def training(settings: SoftSettings) -> SoftTraining:
            start = model.embed(tokens.manual[role])
            return SoftTraining(model, tokens.layout, start, by_term, settings, context.request.seed)

        if not checkpoint.counts and (repeat := context.request.repeat) is not None:
            checkpoint.counts = {"steps": repeat.steps[f"soft_{role}_steps"], "micro": settings.micro}
        if not checkpoint.counts:
            ends = started + context.seconds[checkpoint.stage]
            checkpoint.counts = self._plan(training, partial(self._validator, role), by_term, settings, ends)
            checkpoint.save({})
        counts = checkpoint.counts  # there may be less memory than there was
        settings = replace(settings, steps=counts["steps"], micro=min(counts["micro"], settings.micro))
        while True:
            try:
                trained = training(settings)
                self._train_on(role, trained, checkpoint)
                break
            except RuntimeError as error:
                settings = _halved(settings, error)
            device.empty_cache()
            checkpoint.counts = checkpoint.counts | {"micro": settings.micro}
            context.listener.line(f"out of memory: going on with {settings.micro} examples at a time")
        tried = [(r.validation, r.step) for r in trained.history if r.validation is not None]
        validation, kept = max(tried, key=lambda row: SCORES[role](row[0]))  # of equals the first, as it does
        assert trained.best is not None
        _, z = trained.best
        return {
            "z": z.cpu(),
            "history": [asdict(r) for r in trained.history],
            "kept": kept,
            "validation": asdict(validation),
            "nearest": self._nearest(z),
        }

    def _train_on(self, role: Role, training: SoftTraining, checkpoint: Checkpoint) -> None:
        """Train from the checkpoint to the end."""
        context, openings = self._context, self._context.job.tokens.openings
        if checkpoint.state:
            training.load(checkpoint.state)
        total = training.settings.steps
        clock = Clock(budget.STAGES[checkpoint.stage].title, training.step_number, total, context.listener)
        latest = [r.validation for r in training.history if r.validation]

        def on_step(record: soft_training.SoftRecord) -> None:
            if record.validation is not None:
                latest.append(record.validation)
            losses = ", ".join(f"{term} {value:.3f}" for term, value in record.losses.items())
            clock.at(record.step, f"losses {losses}" + (f"; {in_words(asdict(latest[-1]))}" if latest else ""))

        torch.manual_seed(context.request.seed)
        training.run(
            self._validator(role, training.settings),
            SCORES[role],
            mine=lambda: training.mine(openings, "positive" if role == "safe" else None, context.stop),
            save=checkpoint.save,
            on_step=on_step,
            stop=context.stop,
        )

    def _with_targets(self, found: Sequence[Example]) -> list[Example]:
        """Compute once what the answers were drawn from: both prompts are trained on them."""
        context = self._context
        if new := [e for e in dict.fromkeys(found) if e not in self._targets]:
            context.listener.phase("computing what answers were drawn from")
            beginnings = context.job.tokens.beginnings
            done = with_targets(context.model, new, beginnings, anchor_sets.SAMPLING, context.micro, context.stop)
            self._targets |= zip(new, done, strict=True)
        return [self._targets[e] for e in found]

    def _plan(
        self,
        training: Callable[[SoftSettings], SoftTraining],
        validator: Callable[[SoftSettings], Callable[[torch.Tensor], Validation]],
        by_term: Mapping[Term, Sequence[Example]],
        settings: SoftSettings,
        ends: float,
    ) -> dict[str, int]:
        """Count the steps until `ends` (time.perf_counter) and micro-batch, by trying steps that do not count."""
        context = self._context
        context.listener.phase(TRYING)
        while True:
            tried = training(settings)
            try:
                tried.step()
                tried.try_mining(context.job.tokens.openings)
                per_step = HARDER * _mean([seconds_of(tried.step) for _ in range(4)])
                validation = seconds_of(partial(validator(settings), tried.average))
                break
            except RuntimeError as error:  # torch.OutOfMemoryError, or the CPU allocator's
                settings = _halved(settings, error)
            del tried  # before the smaller ones
            device.empty_cache()
        check_stop(context.stop)
        mined = sum(len(soft_training.distinct(p)) for term, p in by_term.items() if term != "negative")
        mining = validation * (mined // soft_training.MINED_SHARE)
        mining /= max(1, sum(i.validates for i in context.job.instructions))
        others = (validation, settings.validate_every), (mining, settings.mine_every)
        left = max(0.0, ends - time.perf_counter())
        return {"steps": budget.steps_for(left, per_step, *others), "micro": settings.micro}

    def _validator(self, role: Role, settings: SoftSettings) -> Callable[[torch.Tensor], Validation]:
        """Measure a soft prompt on the instructions that are kept out of training."""
        context, model, tokens = self._context, self._context.model, self._context.job.tokens
        groups = validation_groups(context.job.instructions)
        prompts = [tokens.tails[i.id] for group in groups.values() for i in group]
        answers = examples(getattr(self._validating, TERMS[role]["positive"]), tokens, settings.answer_tokens)
        many = 2 * settings.micro  # nothing is kept for a backward pass

        def validate(z: torch.Tensor) -> Validation:
            with torch.no_grad():
                prefix = model.prefix(tokens.layout.rows(model, z))
            found = iter(
                soft_training.refusal_probabilities(
                    model, prefix, prompts, tokens.openings, many, context.stop, greedy=True
                )
            )
            rates = {MEASURES[kind]: _mean([next(found) for _ in group]) for kind, group in groups.items()}
            nll = soft_training.mean_nll(model, prefix, answers, many, context.stop) if answers else 0.0
            return Validation(**rates, nll=nll)

        return validate

    def _nearest(self, z: torch.Tensor) -> list[dict[str, Any]]:
        embeddings = self._context.model.embeddings.detach().float().cpu().numpy()
        pieces = self._context.job.tokens.pieces
        return nearest_words(z.float().cpu().numpy(), embeddings, lambda t: pieces[t] if t < len(pieces) else "")


def _halved(settings: SoftSettings, error: RuntimeError) -> SoftSettings:
    """Go on with micro-batches of half the size, where `error` is torch.OutOfMemoryError or the CPU allocator's.

    Raises:
        OutOfMemoryError: they cannot be smaller.
    """
    if not any(words in str(error) for words in ("out of memory", "allocate memory")):  # not any word of memory
        raise error
    if settings.micro == 1:
        raise OutOfMemoryError("not enough memory for a training step") from None
    return replace(settings, micro=settings.micro // 2)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
