"""The stages of an optimization in their order: anchors, soft prompts, text prompts, setting, files."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from acd_local import __version__, pairs
from acd_local.errors import ModelError, OutOfMemoryError, UsageError
from acd_local.evaluate.runner import Progress
from acd_local.optimize import anchors, device, distill, memory, result, soft, trial
from acd_local.optimize.anchors import Anchors, AnswerCache, Instruction
from acd_local.optimize.distill import Candidate, DistillSettings
from acd_local.optimize.job import TITLES, Clock, Job, Listener, divide, duration, rounds_and_steps, steps_for
from acd_local.optimize.losses import Term
from acd_local.optimize.memory import Fit, Lengths, gb
from acd_local.optimize.objective import DistillWeights, TextObjective
from acd_local.optimize.report import OptimizeReport, nearest_words, render
from acd_local.optimize.scoring import GROUPS, OpeningScorer, SettingRow, candidates, choose, worth
from acd_local.optimize.soft import SoftSettings, SoftTraining, Validation
from acd_local.optimize.stages import Checkpoint, Stopped, key_of, private_lines
from acd_local.optimize.targets import with_targets
from acd_local.optimize.texts import LOOKALIKE_SHARE, TERMS, batches, examples
from acd_local.optimize.textspace import TextSpace
from acd_local.optimize.trial import Trial
from acd_local.optimize.weights import Example, FrozenModel
from acd_local.pairs import AdversarialText, PromptPair
from acd_local.runtime import llama
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.prompts import Framing
from acd_local.runtime.template import ChatTemplate
from acd_local.session import Engine
from acd_local.softpair import AdversarialRows, SoftPair, SoftPrompt

Role = Literal["safe", "adversarial"]
ROLES: tuple[Role, Role] = ("safe", "adversarial")

CONVERSATIONS = (32, 16, 8, 4, 2, 1)
CONTEXT = 512  # of a conversation while anchors are answered, tokens
# What makes one soft prompt better than another on validation; the higher the better.
SOFT_SCORES: dict[Role, soft.Score] = {"safe": lambda v: v.objective, "adversarial": lambda v: -v.nll}
DISTILL_SIZES: dict[Term, int] = {"positive": 6, "negative": 2, "retain": 10}  # anchors of a minibatch
DISTILL_TOKENS = 4  # of their answers: openings decide
SCORED = 12  # validation instructions of a kind that score a text on the way
TARGETING = Progress("computing what answers were drawn from", 0, 0, 0.0, None)
TRYING = Progress("trying how long a step takes", 0, 0, 0.0, None)
GRID = [(a, b) for a in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.8) for b in (0.05, 0.1, 0.2, 0.3, 0.5)]  # alpha, beta


class Optimization:
    """One run of a job; the methods are its stages."""

    def __init__(self, job: Job, stop: CancelToken, listener: Listener) -> None:
        self._job = job
        self._request = job.request
        self._stop = stop
        self._listener = listener
        self._frozen: FrozenModel | None = None
        self._anchors: Anchors | None = None
        self._targets: dict[Example, Example] = {}
        self._stages: list[dict[str, Any]] = []
        manual = job.manual.safe, job.manual.adversarial.reveal_for_negative_stream()
        self._manual: dict[Role, str] = dict(zip(ROLES, manual, strict=True))
        self._keys: dict[str, str] = {}
        self._counts: dict[str, int] = {}
        self._base = {
            "model": job.digest,
            "seed": job.request.seed,
            "manual": list(manual),
        }
        if job.request.repeat is not None:
            self._base["repeat"] = asdict(job.request.repeat)

    def run(self) -> None:
        torch.set_num_threads(self._job.threads)
        device.keep_freed_memory()
        self._fit = self._plan()
        self._micro = self._fit.micro  # less where training found less memory
        counts = self._sample_anchors()
        soft = {role: self._soft(role) for role in ROLES}
        distilled: dict[Role, dict[str, Any]] = {}
        if not self._request.soft_only:
            distilled["safe"] = self._distill("safe", soft["safe"], None)
            distilled["adversarial"] = self._distill("adversarial", soft["adversarial"], distilled["safe"]["text"])
        self._frozen = None  # from here on only llama.cpp is needed
        device.empty_cache()
        texts = {role: str(found["text"]) for role, found in distilled.items()}
        pair = self._soft_pair(soft)
        setting = self._setting(pair, texts)
        self._write(counts, soft, distilled, texts, pair, setting)

    # -- what all stages need ------------------------------------------------------------------------------------------

    def _checkpoint(self, stage: str, **inputs: Any) -> Checkpoint:
        found = Checkpoint(self._job.folder, stage, self._base | inputs)
        if found.damaged:
            self._listener.line(f"{found.path} is damaged: this stage is done again")
        return found

    def _close(self, checkpoint: Checkpoint, summary: str, *, reused: bool) -> None:
        """A stage ended: say so, and note what it took."""
        spent = checkpoint.spent()
        seconds, peak = spent.get("seconds", 0.0), spent.get("peak", 0.0)
        title = TITLES[checkpoint.stage]
        took = f"{duration(seconds)}, {gb(peak)}" + (
            f", {gb(d)} on the device" if (d := spent.get("device_peak")) else ""
        )
        self._listener.line(f"{title}: {summary}; {f'done before ({took})' if reused else took}")
        self._stages.append(
            {"stage": checkpoint.stage, "name": title, "seconds": seconds, "peak_bytes": peak, "reused": reused}
            | ({"device_peak_bytes": d} if d else {})
        )

    def _go_on(self) -> None:
        if self._stop.is_set:
            raise Stopped

    def _plan(self) -> Fit:
        """dtype, micro-batch and conversations at once, chosen once for a model on a device; the first and the last are
        kept, so that another run is the same."""
        request, texts, repeat = self._request, self._job.texts, self._request.repeat
        checkpoint = self._checkpoint("plan", device=self._job.device, dtype=request.dtype)
        answer = SoftSettings().answer_tokens
        lengths = Lengths(texts.shared, max(map(len, texts.tails.values())) + answer, answer)
        if checkpoint.result is not None:
            dtypes: Sequence[str] = [checkpoint.result["dtype"]]
        else:
            dtypes = device.dtypes_by_speed(self._job.device) if request.dtype == "auto" else [request.dtype]
        fit = memory.choose(
            memory.sizes(self._job.info),
            lengths,
            dtypes,
            host=memory.available(),
            device=device.free_memory(self._job.device),
            most=SoftSettings().micro if repeat is None else repeat.micro,
        )
        if not checkpoint.done:
            at_once = self._at_once(self._context) if repeat is None else repeat.conversations
            checkpoint.finish({"dtype": fit.dtype, "conversations": at_once})
        self._conversations = int((checkpoint.result or {})["conversations"])
        name, needed = self._job.info.name or self._job.info.path.name, max(fit.needs.host, fit.needs.training)
        how = f"in {fit.dtype} on {self._job.device}, {fit.micro} examples at a time"
        self._listener.line(f"{name} {how}: about {gb(needed)} of memory")
        return fit

    @property
    def _context(self) -> int:
        """Tokens of a conversation while anchors are answered."""
        return max(CONTEXT, -(-self._job.texts.context // 64) * 64)

    def _at_once(self, context: int) -> int:
        """How many conversations of `context` tokens llama.cpp is given."""
        size, device_free = memory.sizes(self._job.info), device.free_memory(self._job.device)
        return memory.conversations(size, context, memory.available(), CONVERSATIONS, device=device_free)

    def _engine(self, **given: Any) -> Engine:
        gpu_layers = 0 if self._job.device == "cpu" else None
        path = self._job.info.path
        return Engine(path, threads=self._job.threads, gpu_layers=gpu_layers, system_apart=True, **given)

    @property
    def _model(self) -> FrozenModel:
        """The weights in torch, loaded when a stage first needs them."""
        if self._frozen is None:
            self._listener.progress(Progress("loading the weights into torch", 0, 0, 0.0, None))
            self._frozen = FrozenModel(
                self._job.info.path, device=self._job.device, dtype=getattr(torch, self._fit.dtype)
            )
            self._go_on()
        return self._frozen

    # -- anchors -------------------------------------------------------------------------------------------------------

    def _sample_anchors(self) -> dict[str, int]:
        """Sample what is missing, sort it, and return the sets' sizes."""
        job = self._job
        work = anchors.tasks(job.instructions)
        wanted = {(i.id, under) for i, under in work}
        sampling = {"tokens": anchors.TOKENS, "temperature": anchors.SAMPLING.temp}
        checkpoint = self._checkpoint("anchors", work=sorted(map(list, wanted)), **sampling)
        path = job.folder / f"answers-{self._request.seed}-{key_of(self._base | sampling)[:8]}.jsonl"
        cache = _answers(path)
        reused = checkpoint.done and all(key in cache for key in wanted)
        if not reused:
            checkpoint.begin()
            complete = self._answer_all(work, cache)
            if not complete:
                checkpoint.save({})
                raise Stopped
        records = [r for r in cache.records() if (r["id"], r["under"]) in wanted]
        records.sort(key=lambda r: (r["id"], r["under"]))  # not the order in which they were finished
        found = anchors.collect(job.instructions, records, job.texts.tokenize_refusal, job.texts.end)
        counts = {
            "refusals_sampled": len(found.refused) - found.written,
            "refusals_written": found.written,
            "complying": len(found.complied),
            "answered": len(found.answered),
        }
        if not found.part(validation=False).answered:
            raise ModelError("the model answered no harmless instruction: it cannot be optimized with these anchors")
        self._anchors = found
        self._anchors_key = key_of(
            {name: _listed(getattr(found, name)) for name in ("refused", "complied", "answered")}
        )
        if not reused:
            checkpoint.finish(counts)
        self._seconds = divide(self._request.budget, checkpoint.spent().get("seconds", 0.0))
        summary = f"{len(found.refused)} refusals ({found.written} written), {len(found.complied)} complying, "
        self._close(checkpoint, f"{summary}{len(found.answered)} answers", reused=reused)
        return counts

    def _answer_all(self, work: list[tuple[Instruction, str]], cache: AnswerCache) -> bool:
        job = self._job
        done = sum((i.id, under) in cache for i, under in work)
        clock = Clock(TITLES["anchors"], done, len(work), self._listener.progress)
        if done == len(work):
            return True
        with self._engine(pair=job.manual, conversations=self._conversations, ctx_size=self._context) as engine:
            return anchors.sample(
                engine,
                job.manual,
                work,
                cache,
                seed=self._request.seed,
                stop=self._stop,
                on_progress=lambda done, total: clock.at(done),
            )

    # -- soft prompts --------------------------------------------------------------------------------------------------

    def _soft(self, role: Role) -> dict[str, Any]:
        """{"z": best soft prompt, "history": records, "kept": its step, "validation": its}."""
        settings = self._soft_settings()
        checkpoint = self._checkpoint(
            f"soft-{role}",
            anchors=self._anchors_key,
            settings={k: v for k, v in asdict(settings).items() if k not in ("steps", "micro")},
            lookalikes=LOOKALIKE_SHARE,
            openings=asdict(self._job.texts.openings),
            hard=[soft.HARD_SHARE, soft.LOOKED_AT],
            targets="what the answers were drawn from",
            averaging=soft.AVERAGING,
            validation="greedy and sampled",
            budget=self._request.budget,
            device=self._job.device,
            dtype=self._fit.dtype,
        )
        reused = checkpoint.done
        if not reused:
            self._go_on()
            checkpoint.begin()
            checkpoint.finish(self._train(role, settings, checkpoint))
        found: dict[str, Any] = checkpoint.result or {}
        self._keys[role] = checkpoint.key
        self._counts[f"soft_{role}_steps"] = checkpoint.counts["steps"]
        self._micro = min(self._micro, checkpoint.counts["micro"])
        v = found["validation"]
        summary = f"{checkpoint.counts['steps']} steps, best at {found['kept']}: {_measures(v)}"
        self._close(checkpoint, summary, reused=reused)
        return found

    def _soft_settings(self) -> SoftSettings:
        positive, negative, retain = self._request.weights
        return SoftSettings(weights={"positive": positive, "negative": negative, "retain": retain}, micro=self._micro)

    def _train(self, role: Role, settings: SoftSettings, checkpoint: Checkpoint) -> dict[str, Any]:
        model, texts = self._model, self._job.texts
        start = model.embed(texts.manual[role])
        sets = self._pairs(role, settings.answer_tokens)
        pairs_ = {term: self._with_targets(mine) for term, mine in sets.items() if mine}

        def training(settings: SoftSettings) -> soft.SoftTraining:
            return soft.SoftTraining(model, texts.layout, start, pairs_, settings, self._request.seed)

        if not checkpoint.counts and (repeat := self._request.repeat) is not None:
            checkpoint.counts = {"steps": repeat.steps[f"soft_{role}_steps"], "micro": settings.micro}
        if not checkpoint.counts:
            mined = sum(len(found) for term, found in pairs_.items() if term != "negative") // soft.LOOKED_AT
            validator = partial(self._validator, role)
            checkpoint.counts = self._measure(training, validator, mined, settings, self._seconds[checkpoint.stage])
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
            self._listener.line(f"out of memory: going on with {settings.micro} examples at a time")
        tried = [(r.validation, r.step) for r in found.history if r.validation is not None]
        validation, kept = max(tried, key=lambda found: SOFT_SCORES[role](found[0]))  # of equals the first, as it does
        return {
            "z": found.z.cpu(),
            "history": [asdict(r) for r in found.history],
            "kept": kept,
            "validation": asdict(validation),
            "nearest": self._nearest(found.z),
        }

    def _train_on(self, role: Role, work: SoftTraining, checkpoint: Checkpoint) -> soft.SoftResult:
        """From the checkpoint to the end."""
        openings = self._job.texts.openings
        history: list[soft.SoftRecord] = []
        best = pending = None
        if checkpoint.state:
            work.load(checkpoint.state["training"])
            history, best = soft.restored(checkpoint.state)
            pending = checkpoint.state.get("pending")
        clock = Clock(TITLES[checkpoint.stage], work.step_number, work.settings.steps, self._listener.progress)
        latest = [r.validation for r in history if r.validation]

        def on_step(record: soft.SoftRecord) -> None:
            if record.validation is not None:
                latest.append(record.validation)
            clock.at(record.step, _losses(record.losses) + (f"; {_measures(asdict(latest[-1]))}" if latest else ""))

        torch.manual_seed(self._request.seed)
        return soft.train(
            work,
            self._validator(role, work.settings),
            SOFT_SCORES[role],
            mine=lambda: work.mine(openings, "positive" if role == "safe" else None, self._stop),
            history=history,
            best=best,
            save=checkpoint.save,
            on_step=on_step,
            stop=self._stop,
            pending=pending,
        )

    def _pairs(self, role: Role, answer_tokens: int) -> dict[Term, list[Example]]:
        assert self._anchors is not None
        return batches(self._anchors.part(validation=False), self._job.texts, role, answer_tokens)

    def _with_targets(self, found: Sequence[Example]) -> list[Example]:
        """Both prompts are trained on the same answers: what these were drawn from is computed once."""
        self._listener.progress(TARGETING)
        new = [e for e in found if e not in self._targets]
        done = with_targets(self._model, new, self._job.texts.beginnings, anchors.SAMPLING, self._micro, self._stop)
        self._targets |= zip(new, done, strict=True)
        return [self._targets[e] for e in found]

    def _measure(
        self,
        training: Callable[[SoftSettings], SoftTraining],
        validator: Callable[[SoftSettings], Callable[[torch.Tensor], Validation]],
        mined: int,
        settings: SoftSettings,
        seconds: float,
    ) -> dict[str, int]:
        """Steps and micro-batch, by trying steps that do not count; `mined` anchors are gone through now and then."""
        self._listener.progress(TRYING)
        while True:
            work = training(settings)
            try:
                work.step()
                work.try_mining(self._job.texts.openings)
                per_step = _mean([_timed(work.step) for _ in range(4)])
                validation = _timed(partial(validator(settings), work.average))
                break
            except RuntimeError as error:  # torch.OutOfMemoryError, or the CPU allocator's
                settings = _halved(settings, error)
            del work  # before the smaller ones
            device.empty_cache()
        self._go_on()
        mining = validation * mined / max(1, sum(i.validates for i in self._job.instructions))
        others = (validation, settings.validate_every), (mining, settings.mine_every)
        return {"steps": steps_for(seconds, per_step, *others), "micro": settings.micro}

    def _validator(self, role: Role, settings: SoftSettings) -> Callable[[torch.Tensor], Validation]:
        """Measures a soft prompt on the instructions that are kept out of training."""
        assert self._anchors is not None
        model, texts = self._model, self._job.texts
        groups = _validation_groups(self._job.instructions)
        prompts = [texts.tails[i.id] for group in groups.values() for i in group]
        wanted = getattr(self._anchors.part(validation=True), TERMS[role]["positive"])
        answers = examples(wanted, texts, settings.answer_tokens)
        many = 2 * settings.micro  # nothing is kept for a backward pass

        def validate(z: torch.Tensor) -> Validation:
            with torch.no_grad():
                prefix = model.prefix(texts.layout.rows(model, z))
            chances = soft.refusal_probabilities(model, prefix, prompts, texts.openings, many, self._stop, greedy=True)
            found = iter(chances)
            means = {name: _mean([next(found) for _ in group]) for name, group in groups.items()}
            nll = soft.mean_nll(model, prefix, answers, many, self._stop) if answers else 0.0
            return Validation(means["harmful"], means["harmless"], means["lookalike"], nll)

        return validate

    def _nearest(self, z: torch.Tensor) -> list[dict[str, Any]]:
        embeddings = self._model.embeddings.detach().float().cpu().numpy()
        pieces = self._job.texts.pieces
        return nearest_words(z.float().cpu().numpy(), embeddings, lambda t: pieces[t] if t < len(pieces) else "")

    # -- text prompts --------------------------------------------------------------------------------------------------

    @property
    def _groups(self) -> dict[str, list[str]]:
        """Validation instructions by what a refusal of theirs counts as."""
        named = {"harmful": "safety", "harmless": "over_refusal", "lookalike": "lookalike"}
        found = _validation_groups(self._job.instructions)
        return {named[kind]: [i.prompt for i in group] for kind, group in found.items()}

    @contextmanager
    def _on_llama(self) -> Iterator[tuple[OpeningScorer, TextSpace]]:
        """The file as it runs, to score prompts with on the validation instructions."""
        job, texts = self._job, self._job.texts
        n_ctx = texts.context + self._request.max_tokens
        with llama.Model(job.info.path, gpu_layers=0 if job.device == "cpu" else None) as model:
            template = ChatTemplate(model)
            scorer = OpeningScorer(
                model, template, texts.openings, self._groups, n_ctx=n_ctx, threads=job.threads, stop=self._stop
            )
            try:
                yield scorer, TextSpace(template, model.vocab, texts.layout, model.n_vocab)
            finally:
                scorer.close()

    def _distill(self, role: Role, soft: Mapping[str, Any], safe_text: str | None) -> dict[str, Any]:
        """{"text": the chosen one, "history": candidates, "scores": its}."""
        settings = DistillSettings(max_tokens=self._request.max_tokens)
        checkpoint = self._checkpoint(
            f"text-{role}",
            soft=self._keys[role],
            settings={k: v for k, v in asdict(settings).items() if k not in ("rounds", "steps")},
            objective=[DISTILL_SIZES, DISTILL_TOKENS, asdict(DistillWeights()), SCORED],
            pieces=distill.parts(role),
            safe=safe_text,
            trial=[trial.TOKENS, trial.COUNTS, distill.FINALISTS],
        )
        reused = checkpoint.done
        if not reused:
            self._go_on()
            checkpoint.begin()
            checkpoint.finish(self._search(role, soft, safe_text, settings, checkpoint))
        found: dict[str, Any] = checkpoint.result or {}
        self._counts[f"text_{role}_rounds"] = checkpoint.counts["rounds"]
        self._counts[f"text_{role}_steps"] = checkpoint.counts["rounds"] + checkpoint.counts["steps"]
        kept = "the manual text is the best" if found["origin"] == "manual" else f"best at step {found['kept']}"
        summary = f"{len(found['history'])} texts accepted, {kept}: {_measures(found['scores'])}"
        self._close(checkpoint, summary, reused=reused)
        return found

    def _search(
        self,
        role: Role,
        soft: Mapping[str, Any],
        safe_text: str | None,
        settings: DistillSettings,
        checkpoint: Checkpoint,
    ) -> dict[str, Any]:
        model, texts, pieces = self._model, self._job.texts, distill.parts(role)
        teacher = soft["z"].to(model.device)
        pairs_ = {term: _short(found) for term, found in self._pairs(role, DISTILL_TOKENS).items()}
        objective = TextObjective(
            model, texts.layout, teacher, pairs_, DISTILL_SIZES, DistillWeights(), self._request.seed, self._micro
        )
        start = self._manual[role]
        # Where the search is, and what came of texts in full: of the manual one first, which tells how long that takes.
        notes: dict[str, Any] = checkpoint.state or {"search": None, "scores": {}, "trials": {}}
        trying = 0.0
        if not checkpoint.counts:
            self._listener.progress(TRYING)
            trying = _timed(lambda: self._trials([start], safe_text, notes["trials"]))

        def keep() -> None:
            checkpoint.save(notes)

        with self._on_llama() as (scoring, space):

            def score(text: str, most: int | None = SCORED) -> dict[str, float]:
                """The safeguarding text alone, the adversarial one by what its contrast does."""
                if safe_text is None:
                    return scoring.alone(text, most)
                (row,) = scoring.contrasted(safe_text, text, [(pairs.DEFAULT_ALPHA, pairs.DEFAULT_BETA)], most)
                return {name: getattr(row, name) for name in GROUPS}

            def score_all(text: str) -> None:
                if text not in notes["scores"]:
                    notes["scores"][text] = score(text, None)

            if not checkpoint.counts:
                scored = _timed(lambda: score(start)), _timed(lambda: score_all(start))
                checkpoint.counts = self._search_counts(role, objective, settings, trying, *scored)
                keep()
                self._go_on()
            settings = replace(settings, **checkpoint.counts)
            state = distill.DistillState.load(notes["search"]) if notes["search"] else distill.DistillState()
            total = settings.rounds + settings.steps
            clock = Clock(TITLES[checkpoint.stage], state.step, total, self._listener.progress)

            def on_step(done: int, _total: int, newest: Candidate) -> None:
                note = f"objective {newest.objective:.3f}"
                clock.at(done, f"{note}; {_measures(newest.scores)}" if newest.scores else note)

            def save(state: distill.DistillState) -> None:
                notes["search"] = state.dump()
                keep()

            distill.Distillation(
                objective,
                space,
                score,
                settings,
                state,
                seed=self._request.seed,
                save=save,
                on_step=on_step,
                stop=self._stop,
            ).run(start, pieces, _text_objective)
            # Few instructions chose these: all of them choose among the best.
            finals = distill.finalists(state.history, _text_objective)
            for c in finals:
                score_all(c.text)
                keep()
        self._trials([c.text for c in finals], safe_text, notes["trials"], keep)
        return _best_of(finals, state.history, notes["scores"], notes["trials"])

    def _search_counts(
        self,
        role: Role,
        objective: TextObjective,
        settings: DistillSettings,
        trying: float,
        scoring: float,
        scoring_all: float,
    ) -> dict[str, int]:
        """Rounds and steps; the others are seconds of one text's trial, and of its scores on the way and in full."""
        if self._request.repeat is not None:  # what was timed has left the caches as it did then
            return self._request.repeat.search(role)
        tokens = self._job.texts.manual[role]
        return rounds_and_steps(
            self._seconds[f"text-{role}"],
            _timed(lambda: objective(tokens)),
            _timed(lambda: objective.gradient(tokens)),
            scoring,
            len(distill.parts(role)),
            settings.rounds,
            settings.tries,
            finals=distill.FINALISTS * (trying + scoring_all),
        )

    def _trials(
        self,
        texts: Sequence[str],
        safe_text: str | None,
        known: dict[str, dict[str, float]],
        keep: Callable[[], None] = lambda: None,
    ) -> None:
        """Add to `known` what comes of texts in greedy answers, as safeguarding prompts or as the negative ones of
        `safe_text`; `keep` is called after each."""
        manual = self._manual["adversarial"]
        tried = {
            text: PromptPair("trial", text, AdversarialText(manual))
            if safe_text is None
            else PromptPair("trial", safe_text, AdversarialText(text))
            for text in texts
            if text not in known
        }
        if not tried:
            return
        clock = Clock("trying the best texts", 0, len(tried), self._listener.progress)
        with self._trial_engine(next(iter(tried.values()))) as engine:
            for number, (text, pair) in enumerate(tried.items(), start=1):
                found = trial.run(engine, pair, self._groups, plain=safe_text is None, stop=self._stop)
                known[text] = asdict(found)
                keep()
                clock.at(number)

    def _trial_engine(self, pair: PromptPair) -> Engine:
        context = max(CONTEXT, -(-(self._job.texts.context + self._request.max_tokens) // 64) * 64)
        return self._engine(pair=pair, conversations=min(self._conversations, self._at_once(context)), ctx_size=context)

    # -- setting -------------------------------------------------------------------------------------------------------

    def _setting(self, soft: SoftPair, texts: Mapping[Role, str]) -> dict[str, Any]:
        """{"soft", "text": {"alpha", "beta"} of either pair, "rows": all that were tried, "before_after": figures}."""
        adversarial = soft.adversarial.reveal_for_negative_stream()
        digests = [soft.safe.digest, adversarial.digest]
        checkpoint = self._checkpoint(
            "setting",
            soft=digests,
            texts=dict(texts),
            grid=GRID,
            trial=[trial.TOKENS, trial.COUNTS],
            worth="safety minus mean over-refusal",
            openings=asdict(self._job.texts.openings),
        )
        if checkpoint.result is not None:
            self._close(checkpoint, _chosen(checkpoint.result), reused=True)
            return checkpoint.result
        self._go_on()
        checkpoint.begin()
        manual = self._manual["safe"], self._manual["adversarial"]
        ways: dict[str, tuple[Any, Any]] = {"soft": (soft.safe, adversarial)}
        if texts:
            ways["text"] = texts["safe"], texts["adversarial"]
        found: dict[str, Any] = checkpoint.state or {
            "grids": {},
            "tried": {name: [] for name in ways},
            "rows": [],
            "before_after": [],
        }
        before = len(found["before_after"])
        clock = Clock(TITLES["setting"], before, 2 * len(ways) + 2, self._listener.progress)
        done = itertools.count(1 + before)

        def note(pair: str, contrast: bool, figures: Mapping[str, float]) -> None:
            measured = {name: figures[name] for name in GROUPS}
            found["before_after"].append({"pair": pair, "contrast": contrast, **measured})
            clock.at(next(done), _measures(measured))

        def keep() -> None:
            checkpoint.save(found)
            self._go_on()

        with self._on_llama() as (scoring, _):
            if not found["before_after"]:
                note("manual", False, scoring.alone(manual[0]))
                note("manual", True, asdict(scoring.contrasted(*manual, [self._usual])[0]))
                keep()
            for name, (safe, opposite) in ways.items():
                if name not in found["grids"]:
                    note(name, False, scoring.alone(safe))
                    found["grids"][name] = [asdict(row) for row in scoring.contrasted(safe, opposite, GRID)]
                    keep()
        for name in ways:
            if name not in found:
                rows_ = [SettingRow(**row) for row in found["grids"][name]]
                rows_here = soft if name == "soft" else None
                tried = self._tried(candidates(rows_, self._usual), texts, rows_here, found["tried"][name], keep)
                chosen = choose(tried, self._usual)
                found[name] = {"alpha": chosen.alpha, "beta": chosen.beta}
                known = {(row.alpha, row.beta): row for row in (*rows_, *tried)}
                found["rows"] += [asdict(r) | {"pair": name, "chosen": r is chosen} for r in known.values()]
                note(name, True, asdict(chosen))
                keep()
        self._close(checkpoint, _chosen(checkpoint.finish(found)), reused=False)
        return found

    @property
    def _usual(self) -> tuple[float, float]:
        """The manual pair's alpha and beta."""
        return self._job.manual.alpha or pairs.DEFAULT_ALPHA, self._job.manual.beta or pairs.DEFAULT_BETA

    def _tried(
        self,
        rows_: Sequence[SettingRow],
        texts: Mapping[Role, str],
        soft: SoftPair | None,
        known: list[float],
        keep: Callable[[], None],
    ) -> list[SettingRow]:
        """Settings with the share of greedy answers that break under them: `known` of the first ones, to which the
        others' are added; `keep` is called after each."""
        clock = Clock("trying the best settings", len(known), len(rows_), self._listener.progress)
        safe, adversarial = (texts or self._manual)["safe"], AdversarialText((texts or self._manual)["adversarial"])
        with self._trial_engine(self._job.manual) as engine:
            for row in rows_[len(known) :]:
                pair = PromptPair("trial", safe, adversarial, alpha=row.alpha, beta=row.beta)
                framing = None if soft is None else Framing.of(pair, soft)
                made = trial.run(engine, pair, self._groups, plain=False, stop=self._stop, framing=framing)
                known.append(made.degenerate)
                clock.at(len(known))
                keep()
        return [replace(row, degenerate=share) for row, share in zip(rows_, known, strict=True)]

    # -- the files -----------------------------------------------------------------------------------------------------

    def _soft_pair(self, soft: Mapping[Role, Mapping[str, Any]]) -> SoftPair:
        """As it will be read back: rounded to float16."""
        info = self._job.info
        safe, adversarial = (soft[role]["z"].half().float().numpy() for role in ROLES)
        return SoftPair(
            SoftPrompt(safe),
            AdversarialRows(adversarial),
            info.architecture,
            info.tokenizer,
            info.n_embd,
            info.n_layers,
            info.name,
        )

    def _write(
        self,
        counts: Mapping[str, int],
        soft: Mapping[Role, Mapping[str, Any]],
        distilled: Mapping[Role, Mapping[str, Any]],
        texts: Mapping[Role, str],
        rows_: SoftPair,
        setting: Mapping[str, Any],
    ) -> None:
        job, request, info = self._job, self._request, self._job.info
        chosen = texts or self._manual
        text_numbers = setting.get("text") or {"alpha": job.manual.alpha, "beta": job.manual.beta}
        figures = {"measure": "mean chance that an answer to a validation instruction opens as a refusal"}
        pair = result.PairFile(
            name=request.out.stem,
            safe=chosen["safe"],
            adversarial=chosen["adversarial"],
            **text_numbers,
            soft=setting["soft"],
            models={
                "architecture": info.architecture,
                "tokenizer": info.tokenizer,
                "names": [info.name] if info.name.strip() else [],
            },
            provenance=self._provenance(counts, distilled),
            figures=figures | {_row_name(row): _figures(row) for row in setting["before_after"]},
        )
        page = OptimizeReport(
            model={
                "name": info.name,
                "file": info.path.name,
                "architecture": info.architecture,
                "layers": info.n_layers,
                "n_embd": info.n_embd,
                "file_type": info.file_type,
            },
            settings={
                "seed": request.seed,
                "budget": request.budget,
                "device": job.device,
                "dtype": self._fit.dtype,
                **self._counts,
                "weights": dict(zip(("positive", "negative", "retain"), request.weights, strict=True)),
            },
            anchors=dict(counts) | {"validation": {k: len(v) for k, v in _validation_groups(job.instructions).items()}},
            stages=self._stages,
            soft={role: soft[role]["history"] for role in ROLES},
            kept={role: soft[role]["kept"] for role in ROLES},
            nearest={role: soft[role]["nearest"] for role in ROLES},
            distillation={role: found["history"] for role, found in distilled.items()},
            texts={str(role): text for role, text in texts.items()},
            finals={role: found["finals"] for role, found in distilled.items()},
            setting_rows=setting["rows"],
            before_after=setting["before_after"],
            command=request.command,
            date=datetime.now(UTC).date().isoformat(),
            version=__version__,
        )
        result.write(request.out, pair, rows_, render(page))

    def _provenance(self, counts: Mapping[str, int], distilled: Mapping[Role, Mapping[str, Any]]) -> dict[str, Any]:
        job, request = self._job, self._request
        return {
            "method": "acd optimize"
            + (" (soft prompts only; the texts are the manual pair's)" if request.soft_only else ""),
            "date": datetime.now(UTC).date(),
            "version": __version__,
            "libraries": {name: metadata.version(name) for name in ("torch", "transformers", "llama-cpp-python")},
            "model": job.info.path.name,
            "model_sha256": job.digest,
            "seed": request.seed,
            "budget_seconds": request.budget,
            "device": job.device,
            "dtype": self._fit.dtype,
            "micro": self._micro,
            "conversations": self._conversations,
            "weights": list(request.weights),
            "texts": {role: {"origin": found["origin"]} | found["trial"] for role, found in distilled.items()} or None,
            "max_tokens": None if request.soft_only else request.max_tokens,
            "anchors": dict(counts),
            "steps": dict(self._counts),
            "stage_seconds": {s["stage"]: round(s["seconds"], 1) for s in self._stages},
            "stage_peak_mb": {s["stage"]: round(s["peak_bytes"] / 1e6) for s in self._stages},
            "stage_device_peak_mb": {
                s["stage"]: round(s["device_peak_bytes"] / 1e6) for s in self._stages if "device_peak_bytes" in s
            }
            or None,
        }


def _short(found: Sequence[Example]) -> list[Example]:
    """The shorter half: texts are tried hundreds of times, and one long request would pad its whole minibatch."""
    return sorted(found, key=len)[: -(-len(found) // 2)]


def _best_of(
    finals: Sequence[Candidate],
    history: Sequence[Candidate],
    scores: Mapping[str, Mapping[str, float]],
    trials: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """The result of a text's stage; `scores` and `trials` by text."""

    def rank(c: Candidate) -> tuple[float, float]:
        return round(Trial(**trials[c.text]).worth, 6), _text_objective(scores[c.text])

    best = max(finals, key=rank)
    return {
        "text": best.text,
        "kept": best.step,
        "origin": best.origin,
        "scores": scores[best.text],
        "trial": trials[best.text],
        "finals": [{"step": c.step, "origin": c.origin, "trial": trials[c.text], "chosen": c is best} for c in finals],
        "history": [asdict(c) | {"tokens": list(c.tokens)} for c in history],
    }


def _halved(settings: SoftSettings, error: RuntimeError) -> SoftSettings:
    """With micro-batches of half the size, where `error` is torch.OutOfMemoryError or the CPU allocator's.

    Raises:
        OutOfMemoryError: they cannot be smaller.
    """
    if "memory" not in str(error):
        raise error
    if settings.micro == 1:
        raise OutOfMemoryError("not enough memory for a training step") from None
    return replace(settings, micro=settings.micro // 2)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _row_name(row: Mapping[str, Any]) -> str:
    return f"{row['pair']}_contrast" if row["contrast"] else str(row["pair"])


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: round(row[name], 4) for name in GROUPS}


def _chosen(setting: Mapping[str, Any]) -> str:
    names = [name for name in ("text", "soft") if name in setting]
    return ", ".join(f"{name} pair alpha {setting[name]['alpha']:g}, beta {setting[name]['beta']:g}" for name in names)


def _text_objective(scores: Mapping[str, float]) -> float:
    return worth(*(scores[name] for name in GROUPS))


def _measures(scores: Mapping[str, float]) -> str:
    named = (("safety", "safety"), ("over-refusal", "over_refusal"), ("look-alike", "lookalike"))
    return ", ".join(f"{title} {scores[name]:.3f}" for title, name in named)


def _validation_groups(instructions: Sequence[Instruction]) -> dict[str, list[Instruction]]:
    """The instructions that validate: harmful, harmless (the ordinary ones), lookalike."""
    groups: dict[str, list[Instruction]] = {"harmful": [], "harmless": [], "lookalike": []}
    for i in instructions:
        if i.validates:
            groups["lookalike" if i.lookalike else i.kind].append(i)
    groups["lookalike"] = groups["lookalike"] or groups["harmless"]  # a user's anchors do not say which look dangerous
    return groups


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _losses(losses: Mapping[Term, float]) -> str:
    return "losses " + ", ".join(f"{term} {value:.3f}" for term, value in losses.items())


def _answers(path: Path) -> AnswerCache:
    private_lines(path)
    try:
        return AnswerCache(path)
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} is damaged: remove it to have its answers sampled again") from None


def _listed(found: Sequence[anchors.Pair]) -> list[list[Any]]:
    return [[p.instruction.id, p.instruction.kind, p.instruction.lookalike, list(p.answer)] for p in found]
