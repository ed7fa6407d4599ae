"""The text prompts' stages: a search for the text that comes closest to the soft prompt, and trials of the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from acd_local import pairs
from acd_local.optimize import anchors, distill, trial
from acd_local.optimize.anchors import Anchors
from acd_local.optimize.distill import Candidate, DistillSettings
from acd_local.optimize.job import TITLES, Clock, rounds_and_steps
from acd_local.optimize.losses import Term
from acd_local.optimize.objective import DistillWeights, TextObjective
from acd_local.optimize.scoring import GROUPS, worth
from acd_local.optimize.stages import Checkpoint, go_on
from acd_local.optimize.texts import batches
from acd_local.optimize.trial import Trial
from acd_local.optimize.weights import Example
from acd_local.optimize.workshop import ORDER, TRYING, Role, Workshop, measures, timed
from acd_local.pairs import AdversarialText, PromptPair

SIZES: dict[Term, int] = {"positive": 6, "negative": 2, "retain": 10}  # anchors of a minibatch
# Tokens of their answers: openings decide. Of some refusals all: a text that only brings their openings about loops.
TOKENS, REFUSAL_TOKENS = 4, anchors.TOKENS
# So much better than the manual text a text has to be in its trial: 48 answers differ by less than this by chance.
MARGIN = 0.1
SCORED = 12  # validation instructions of a kind that score a text on the way


class TextStage:
    """Searches one text after the other."""

    def __init__(self, shop: Workshop, sets: Anchors) -> None:
        self._shop = shop
        self._sets = sets

    def run(self, role: Role, soft: Mapping[str, Any], safe_text: str | None) -> dict[str, Any]:
        """{"text": the chosen one, "scores": its, "history": texts that were accepted, "tried": all of them}."""
        settings = DistillSettings(max_tokens=self._shop.request.max_tokens)
        checkpoint = self._shop.checkpoint(
            f"text-{role}",
            soft=soft["key"],
            settings={k: v for k, v in asdict(settings).items() if k not in ("rounds", "steps")},
            objective=[SIZES, TOKENS, REFUSAL_TOKENS, asdict(DistillWeights()), SCORED],
            pieces=distill.parts(role),
            safe=safe_text,
            trial=[trial.TOKENS, trial.COUNTS, distill.FINALISTS, MARGIN],
            order=ORDER,
        )
        reused = checkpoint.done
        if not reused:
            go_on(self._shop.stop)
            checkpoint.begin()
            checkpoint.finish(self._search(role, soft, safe_text, settings, checkpoint))
        found: dict[str, Any] = checkpoint.result or {}
        self._shop.counts[f"text_{role}_rounds"] = checkpoint.counts["rounds"]
        self._shop.counts[f"text_{role}_steps"] = checkpoint.counts["rounds"] + checkpoint.counts["steps"]
        kept = "the manual text is the best" if found["origin"] == "manual" else f"best at step {found['kept']}"
        counts = f"{len(found['tried'])} texts tried, {len(found['history'])} accepted"
        summary = f"{counts}, {kept}: {measures(found['scores'])}"
        self._shop.close(checkpoint, summary, reused=reused)
        return found

    def _search(
        self,
        role: Role,
        soft: Mapping[str, Any],
        safe_text: str | None,
        settings: DistillSettings,
        checkpoint: Checkpoint,
    ) -> dict[str, Any]:
        model, texts, pieces = self._shop.model, self._shop.job.texts, distill.parts(role)
        teacher = soft["z"].to(model.device)
        pairs_ = self._pairs(role)
        objective = TextObjective(
            model, texts.layout, teacher, pairs_, SIZES, DistillWeights(), self._shop.request.seed, self._shop.micro
        )
        start = self._shop.manual[role]
        # Where the search is, and what came of texts in full: of the manual one first, which tells how long that takes.
        notes: dict[str, Any] = checkpoint.state or {"search": None, "scores": {}, "trials": {}}
        trying = 0.0
        if not checkpoint.counts:
            self._shop.listener.progress(TRYING)
            trying = timed(lambda: self._trials([start], safe_text, notes["trials"]))

        def keep() -> None:
            checkpoint.save(notes)

        with self._shop.on_llama() as (scoring, space):

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
                scored = timed(lambda: score(start)), timed(lambda: score_all(start))
                checkpoint.counts = self._search_counts(role, objective, settings, trying, *scored)
                keep()
                go_on(self._shop.stop)
            settings = replace(settings, **checkpoint.counts)
            state = distill.DistillState.load(notes["search"]) if notes["search"] else distill.DistillState()
            total = settings.rounds + settings.steps
            clock = Clock(TITLES[checkpoint.stage], state.step, total, self._shop.listener.progress)

            def on_step(done: int, _total: int, newest: Candidate) -> None:
                note = f"objective {newest.objective:.3f}"
                clock.at(done, f"{note}; {measures(newest.scores)}" if newest.scores else note)

            def save(state: distill.DistillState) -> None:
                notes["search"] = state.dump()
                keep()

            distill.Distillation(
                objective,
                space,
                score,
                settings,
                state,
                seed=self._shop.request.seed,
                save=save,
                on_step=on_step,
                stop=self._shop.stop,
            ).run(start, pieces, _text_objective)
            # Few instructions chose these: all of them choose among the best.
            finals = distill.finalists(state.history, _text_objective)
            for c in finals:
                score_all(c.text)
                keep()
        self._trials([c.text for c in finals], safe_text, notes["trials"], keep)
        found = _best_of(finals, notes["scores"], notes["trials"])
        return found | {key: notes["search"][key] for key in ("history", "tried")}

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
        if self._shop.request.repeat is not None:  # what was timed has left the caches as it did then
            return self._shop.request.repeat.search(role)
        tokens = self._shop.job.texts.manual[role]
        return rounds_and_steps(
            self._shop.seconds[f"text-{role}"],
            timed(lambda: objective(tokens)),
            timed(lambda: objective.gradient(tokens)),
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
        manual = self._shop.manual["adversarial"]
        tried = {
            text: PromptPair("trial", text, AdversarialText(manual))
            if safe_text is None
            else PromptPair("trial", safe_text, AdversarialText(text))
            for text in texts
            if text not in known
        }
        if not tried:
            return
        clock = Clock("trying the best texts", 0, len(tried), self._shop.listener.progress)
        with self._shop.trial_engine(next(iter(tried.values()))) as engine:
            for number, (text, pair) in enumerate(tried.items(), start=1):
                found = trial.run(engine, pair, self._shop.groups, plain=safe_text is None, stop=self._shop.stop)
                known[text] = asdict(found)
                keep()
                clock.at(number)

    def _pairs(self, role: Role) -> dict[Term, list[Example]]:
        found = batches(self._sets.part(validation=False), self._shop.job.texts, role, TOKENS, REFUSAL_TOKENS)
        return {term: _short(mine) for term, mine in found.items()}


def _short(found: Sequence[Example]) -> list[Example]:
    """The half of shorter requests: texts are tried hundreds of times, and a long one would pad its whole minibatch."""
    return sorted(found, key=lambda e: len(e.prompt))[: -(-len(found) // 2)]


def _best_of(
    finals: Sequence[Candidate],
    scores: Mapping[str, Mapping[str, float]],
    trials: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """The result of a text's stage; `scores` and `trials` by text."""

    def rank(c: Candidate) -> tuple[float, float]:
        return round(Trial(**trials[c.text]).worth, 6), _text_objective(scores[c.text])

    best = max(finals, key=rank)
    manual = next((c for c in finals if c.origin == "manual"), best)
    if rank(best)[0] < rank(manual)[0] + MARGIN:
        best = manual
    return {
        "text": best.text,
        "kept": best.step,
        "origin": best.origin,
        "scores": scores[best.text],
        "trial": trials[best.text],
        "finals": [{"step": c.step, "origin": c.origin, "trial": trials[c.text], "chosen": c is best} for c in finals],
    }


def _text_objective(scores: Mapping[str, float]) -> float:
    return worth(*(scores[name] for name in GROUPS))
