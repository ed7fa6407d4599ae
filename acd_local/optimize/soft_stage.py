"""The soft prompts' stages: how long they are trained, on what, and what is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from acd_local.errors import OutOfMemoryError
from acd_local.evaluate.runner import Progress
from acd_local.optimize import anchors, device, soft
from acd_local.optimize.anchoring import Sorted
from acd_local.optimize.job import TITLES, Clock, steps_for
from acd_local.optimize.losses import Term
from acd_local.optimize.report import nearest_words
from acd_local.optimize.soft import SoftSettings, SoftTraining, Validation
from acd_local.optimize.stages import Checkpoint, go_on
from acd_local.optimize.targets import with_targets
from acd_local.optimize.texts import LOOKALIKE_SHARE, TERMS, WHOLE_SHARE, batches, examples
from acd_local.optimize.weights import Example
from acd_local.optimize.workshop import TRYING, Role, Workshop, measures, timed, validation_groups

# What a step takes once hard anchors are mined, over one before: they are longer (demo model: 1.93 and 1.67 s).
HARDER = 1.15
TARGETING = Progress("computing what answers were drawn from", 0, 0, 0.0, None)
# What makes one soft prompt better than another on validation; the higher the better. There is no NLL where no
# instruction that validates was complied with.
SCORES: dict[Role, soft.Score] = {"safe": lambda v: v.objective, "adversarial": lambda v: -v.nll or -v.safety}


class SoftStage:
    """Trains one soft prompt after the other."""

    def __init__(self, shop: Workshop, sorted_: Sorted) -> None:
        self._shop = shop
        self._sorted = sorted_
        self._targets: dict[Example, Example] = {}

    def run(self, role: Role) -> dict[str, Any]:
        """{"z": best soft prompt, "history": records, "kept": its step, "validation": its, "nearest": words, "key"}."""
        settings = self._settings()
        checkpoint = self._shop.checkpoint(
            f"soft-{role}",
            anchors=self._sorted.key,
            settings={k: v for k, v in asdict(settings).items() if k not in ("steps", "micro")},
            lookalikes=LOOKALIKE_SHARE,
            whole=WHOLE_SHARE,
            openings=asdict(self._shop.job.texts.openings),
            hard=[soft.HARD_SHARE, soft.LOOKED_AT],
            targets="what the answers were drawn from",
            averaging=soft.AVERAGING,
            validation="greedy and sampled",
            budget=self._shop.request.budget,
            device=self._shop.job.device,
            dtype=self._shop.dtype,
        )
        reused = checkpoint.done
        if not reused:
            go_on(self._shop.stop)
            checkpoint.begin()
            checkpoint.finish(self._train(role, settings, checkpoint))
        found: dict[str, Any] = checkpoint.result or {}
        self._shop.counts[f"soft_{role}_steps"] = checkpoint.counts["steps"]
        self._shop.micro = min(self._shop.micro, checkpoint.counts["micro"])
        v = found["validation"]
        summary = f"{checkpoint.counts['steps']} steps, best at {found['kept']}: {measures(v)}"
        self._shop.close(checkpoint, summary, reused=reused)
        return found | {"key": checkpoint.key}

    def _settings(self) -> SoftSettings:
        positive, negative, retain = self._shop.request.weights
        return SoftSettings(
            weights={"positive": positive, "negative": negative, "retain": retain}, micro=self._shop.micro
        )

    def _train(self, role: Role, settings: SoftSettings, checkpoint: Checkpoint) -> dict[str, Any]:
        started = time.perf_counter()
        model, texts = self._shop.model, self._shop.job.texts
        start = model.embed(texts.manual[role])
        training_half = self._sorted.anchors.part(validation=False)
        sets = batches(training_half, texts, role, settings.answer_tokens, settings.refusal_tokens)
        pairs_ = {term: self._with_targets(mine) for term, mine in sets.items() if mine}

        def training(settings: SoftSettings) -> soft.SoftTraining:
            return soft.SoftTraining(model, texts.layout, start, pairs_, settings, self._shop.request.seed)

        if not checkpoint.counts and (repeat := self._shop.request.repeat) is not None:
            checkpoint.counts = {"steps": repeat.steps[f"soft_{role}_steps"], "micro": settings.micro}
        if not checkpoint.counts:
            mined = sum(len(soft.distinct(p)) for term, p in pairs_.items() if term != "negative") // soft.LOOKED_AT
            validator = partial(self._validator, role)
            ends = started + self._shop.seconds[checkpoint.stage]
            checkpoint.counts = self._measure(training, validator, mined, settings, ends)
            checkpoint.save({})
        counts = checkpoint.counts  # there may be less memory than there was
        settings = replace(settings, steps=counts["steps"], micro=min(counts["micro"], settings.micro))
        while True:
            try:
                found = self._train_on(role, training(settings), checkpoint)
                break
            except RuntimeError as error:
                settings = _halved(settings, error)
            device.empty_cache()
            checkpoint.counts = checkpoint.counts | {"micro": settings.micro}
            self._shop.listener.line(f"out of memory: going on with {settings.micro} examples at a time")
        tried = [(r.validation, r.step) for r in found.history if r.validation is not None]
        validation, kept = max(tried, key=lambda found: SCORES[role](found[0]))  # of equals the first, as it does
        return {
            "z": found.z.cpu(),
            "history": [asdict(r) for r in found.history],
            "kept": kept,
            "validation": asdict(validation),
            "nearest": self._nearest(found.z),
        }

    def _train_on(self, role: Role, work: SoftTraining, checkpoint: Checkpoint) -> soft.SoftResult:
        """From the checkpoint to the end."""
        openings = self._shop.job.texts.openings
        history: list[soft.SoftRecord] = []
        best = pending = None
        if checkpoint.state:
            work.load(checkpoint.state["training"])
            history, best = soft.restored(checkpoint.state)
            pending = checkpoint.state.get("pending")
        clock = Clock(TITLES[checkpoint.stage], work.step_number, work.settings.steps, self._shop.listener.progress)
        latest = [r.validation for r in history if r.validation]

        def on_step(record: soft.SoftRecord) -> None:
            if record.validation is not None:
                latest.append(record.validation)
            clock.at(record.step, _losses(record.losses) + (f"; {measures(asdict(latest[-1]))}" if latest else ""))

        torch.manual_seed(self._shop.request.seed)
        return soft.train(
            work,
            self._validator(role, work.settings),
            SCORES[role],
            mine=lambda: work.mine(openings, "positive" if role == "safe" else None, self._shop.stop),
            history=history,
            best=best,
            save=checkpoint.save,
            on_step=on_step,
            stop=self._shop.stop,
            pending=pending,
        )

    def _with_targets(self, found: Sequence[Example]) -> list[Example]:
        """Both prompts are trained on the same answers: what these were drawn from is computed once."""
        shop = self._shop
        if new := [e for e in dict.fromkeys(found) if e not in self._targets]:
            shop.listener.progress(TARGETING)
            beginnings = shop.job.texts.beginnings
            done = with_targets(shop.model, new, beginnings, anchors.SAMPLING, shop.micro, shop.stop)
            self._targets |= zip(new, done, strict=True)
        return [self._targets[e] for e in found]

    def _measure(
        self,
        training: Callable[[SoftSettings], SoftTraining],
        validator: Callable[[SoftSettings], Callable[[torch.Tensor], Validation]],
        mined: int,
        settings: SoftSettings,
        ends: float,
    ) -> dict[str, int]:
        """Steps until `ends` (time.perf_counter) and micro-batch, by trying steps that do not count.

        Args:
            mined: anchors that are gone through now and then.
        """
        self._shop.listener.progress(TRYING)
        while True:
            work = training(settings)
            try:
                work.step()
                work.try_mining(self._shop.job.texts.openings)
                per_step = HARDER * _mean([timed(work.step) for _ in range(4)])
                validation = timed(partial(validator(settings), work.average))
                break
            except RuntimeError as error:  # torch.OutOfMemoryError, or the CPU allocator's
                settings = _halved(settings, error)
            del work  # before the smaller ones
            device.empty_cache()
        go_on(self._shop.stop)
        mining = validation * mined / max(1, sum(i.validates for i in self._shop.job.instructions))
        others = (validation, settings.validate_every), (mining, settings.mine_every)
        left = max(0.0, ends - time.perf_counter())
        return {"steps": steps_for(left, per_step, *others), "micro": settings.micro}

    def _validator(self, role: Role, settings: SoftSettings) -> Callable[[torch.Tensor], Validation]:
        """Measures a soft prompt on the instructions that are kept out of training."""
        model, texts = self._shop.model, self._shop.job.texts
        groups = validation_groups(self._shop.job.instructions)
        prompts = [texts.tails[i.id] for group in groups.values() for i in group]
        kept_out = self._sorted.anchors.part(validation=True)
        answers = examples(getattr(kept_out, TERMS[role]["positive"]), texts, settings.answer_tokens)
        many = 2 * settings.micro  # nothing is kept for a backward pass

        def validate(z: torch.Tensor) -> Validation:
            with torch.no_grad():
                prefix = model.prefix(texts.layout.rows(model, z))
            chances = soft.refusal_probabilities(
                model, prefix, prompts, texts.openings, many, self._shop.stop, greedy=True
            )
            found = iter(chances)
            means = {name: _mean([next(found) for _ in group]) for name, group in groups.items()}
            nll = soft.mean_nll(model, prefix, answers, many, self._shop.stop) if answers else 0.0
            return Validation(means["harmful"], means["harmless"], means["lookalike"], nll)

        return validate

    def _nearest(self, z: torch.Tensor) -> list[dict[str, Any]]:
        embeddings = self._shop.model.embeddings.detach().float().cpu().numpy()
        pieces = self._shop.job.texts.pieces
        return nearest_words(z.float().cpu().numpy(), embeddings, lambda t: pieces[t] if t < len(pieces) else "")


def _halved(settings: SoftSettings, error: RuntimeError) -> SoftSettings:
    """With micro-batches of half the size, where `error` is torch.OutOfMemoryError or the CPU allocator's.

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


def _losses(losses: Mapping[Term, float]) -> str:
    return "losses " + ", ".join(f"{term} {value:.3f}" for term, value in losses.items())
