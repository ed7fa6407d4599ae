"""The text prompts' stages: a search for the text that comes closest to the soft prompt, and trials of the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from acd_local import pairs
from acd_local.optimize import anchors, distill, trial
from acd_local.optimize.anchors import Anchors
from acd_local.optimize.distill import Candidate, DistillSettings, DistillState
from acd_local.optimize.job import TITLES, Clock, rounds_and_steps
from acd_local.optimize.losses import Term
from acd_local.optimize.objective import DistillWeights, TextObjective
from acd_local.optimize.scoring import GROUPS, OpeningScorer, worth
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
# Validation instructions of a kind that score every text on the way, and the best of them again. The best of these are
# tried in greedy answers.
SCORED, AGAIN = 4, 24
SHORTLIST, FINALISTS = 8, 4


class TextStage:
    """Searches one text after the other."""

    def __init__(self, shop: Workshop, sets: Anchors) -> None:
        self._shop = shop
        self._sets = sets

    def run(self, role: Role, soft: Mapping[str, Any], safe_text: str | None) -> dict[str, Any]:
        """{"text": the chosen one, "scores": its, "tried": all texts, "accepted": places of those it went on from}."""
        settings = DistillSettings(max_tokens=self._shop.request.max_tokens)
        checkpoint = self._shop.checkpoint(
            f"text-{role}",
            soft=soft["key"],
            settings={k: v for k, v in asdict(settings).items() if k not in ("rounds", "steps")},
            objective=[SIZES, TOKENS, REFUSAL_TOKENS, asdict(DistillWeights()), SCORED, AGAIN],
            pieces=distill.parts(role),
            safe=safe_text,
            trial=[trial.TOKENS, trial.COUNTS, SHORTLIST, FINALISTS, MARGIN],
            order=ORDER,
            **self._shop.gated,
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
        counts = f"{len(found['tried'])} texts tried, {len(found['accepted'])} accepted"
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
        shop, pieces, start = self._shop, distill.parts(role), self._shop.manual[role]
        model = shop.model
        objective = TextObjective(
            model,
            shop.job.texts.layout,
            soft["z"].to(model.device),
            self._pairs(role),
            SIZES,
            DistillWeights(),
            shop.request.seed,
            shop.micro,
        )
        notes = _Notes(checkpoint)
        trying = 0.0
        if not checkpoint.counts:
            shop.listener.progress(TRYING)
            trying = timed(lambda: self._trials([start], safe_text, notes))
        with shop.on_llama() as (scoring, space):
            score = partial(_score, scoring, safe_text)
            if not checkpoint.counts:
                score(pieces[0], AGAIN)  # what the safeguarding text does is kept from then on
                again = timed(lambda: notes.score_again(start, score))
                once = timed(lambda: score(pieces[0]))
                checkpoint.counts = self._search_counts(role, objective, settings, trying, once, again)
                notes.keep()
                go_on(shop.stop)
            state = notes.search()
            work = distill.Distillation(
                objective,
                space,
                score,
                replace(settings, **checkpoint.counts),
                state,
                seed=shop.request.seed,
                save=notes.save,
                on_step=self._on_step(checkpoint, state.step),
                stop=shop.stop,
            )
            work.run(start, pieces)
            short = distill.best(state.tried, _text_objective, SHORTLIST)
            short = [replace(c, scores=notes.score_again(c.text, score)) for c in short]
        finals = distill.best(short, _text_objective, FINALISTS)
        self._trials([c.text for c in finals], safe_text, notes)
        whole = state.dump()
        return _best_of(finals, notes.trials) | {key: whole[key] for key in ("tried", "accepted")}

    def _on_step(self, checkpoint: Checkpoint, done: int) -> Callable[[int, int, Candidate], None]:
        total = checkpoint.counts["rounds"] + checkpoint.counts["steps"]
        clock = Clock(TITLES[checkpoint.stage], done, total, self._shop.listener.progress)

        def on_step(done: int, _total: int, newest: Candidate) -> None:
            clock.at(done, f"objective {newest.objective:.3f}; {measures(newest.scores)}")

        return on_step

    def _search_counts(
        self,
        role: Role,
        objective: TextObjective,
        settings: DistillSettings,
        trying: float,
        scoring: float,
        scoring_again: float,
    ) -> dict[str, int]:
        """Rounds and steps; the others are seconds of one text's trial, and of its scores on the way and on the
        shortlist."""
        if self._shop.request.repeat is not None:  # what was timed has left the caches as it did then
            return self._shop.request.repeat.search(role)
        tokens = self._shop.job.texts.manual[role]
        return rounds_and_steps(
            self._shop.seconds[f"text-{role}"],
            timed(lambda: objective(tokens)) + scoring,
            timed(lambda: objective.gradient(tokens)),
            len(distill.parts(role)),
            settings.rounds,
            settings.tries,
            finals=SHORTLIST * scoring_again + FINALISTS * trying,
        )

    def _trials(self, texts: Sequence[str], safe_text: str | None, notes: _Notes) -> None:
        """Note what comes of texts in greedy answers, as safeguarding prompts, or as negative ones of `safe_text`."""
        manual = self._shop.manual["adversarial"]
        tried = {
            text: PromptPair("trial", text, AdversarialText(manual))
            if safe_text is None
            else PromptPair("trial", safe_text, AdversarialText(text))
            for text in texts
            if text not in notes.trials
        }
        if not tried:
            return
        clock = Clock("trying the best texts", 0, len(tried), self._shop.listener.progress)
        with self._shop.trial_engine(next(iter(tried.values()))) as engine:
            for number, (text, pair) in enumerate(tried.items(), start=1):
                found = trial.run(engine, pair, self._shop.groups, plain=safe_text is None, stop=self._shop.stop)
                notes.trials[text] = asdict(found)
                notes.keep()
                clock.at(number)

    def _pairs(self, role: Role) -> dict[Term, list[Example]]:
        found = batches(self._sets.part(validation=False), self._shop.job.texts, role, TOKENS, REFUSAL_TOKENS)
        return {term: _short(mine) for term, mine in found.items()}


class _Notes:
    """What a stage's checkpoint holds: where the search is, and what came of the best texts, by text.

    The manual one's is there first, and tells how long that takes.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._state: dict[str, Any] = checkpoint.state or {"search": None, "scores": {}, "trials": {}}
        self.scores: dict[str, dict[str, float]] = self._state["scores"]
        self.trials: dict[str, dict[str, float]] = self._state["trials"]

    def keep(self) -> None:
        if self._checkpoint.counts:  # what comes before is timed, to plan the steps, and so done again
            self._checkpoint.save(self._state)

    def save(self, state: DistillState) -> None:
        self._state["search"] = state.dump()
        self.keep()

    def search(self) -> DistillState:
        kept = self._state["search"]
        return DistillState.load(kept) if kept else DistillState()

    def score_again(self, text: str, score: Callable[[str, int], dict[str, float]]) -> dict[str, float]:
        if text not in self.scores:
            self.scores[text] = score(text, AGAIN)
            self.keep()
        return self.scores[text]


def _score(scoring: OpeningScorer, safe_text: str | None, text: str, most: int = SCORED) -> dict[str, float]:
    """The safeguarding text alone, the adversarial one by what its contrast does."""
    if safe_text is None:
        return scoring.alone(text, most)
    (row,) = scoring.contrasted(safe_text, text, [(pairs.DEFAULT_ALPHA, pairs.DEFAULT_BETA)], most)
    return {name: getattr(row, name) for name in GROUPS}


def _short(found: Sequence[Example]) -> list[Example]:
    """The half of shorter requests: texts are tried hundreds of times, and a long one would pad its whole minibatch."""
    return sorted(found, key=lambda e: len(e.prompt))[: -(-len(found) // 2)]


def _best_of(finals: Sequence[Candidate], trials: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The result of a text's stage; `trials` by text."""

    def rank(c: Candidate) -> tuple[float, float]:
        return round(Trial(**trials[c.text]).worth, 6), _text_objective(c.scores)

    best = max(finals, key=rank)
    manual = next((c for c in finals if c.origin == "manual"), best)
    if rank(best)[0] < rank(manual)[0] + MARGIN:
        best = manual
    return {
        "text": best.text,
        "kept": best.step,
        "origin": best.origin,
        "scores": dict(best.scores),
        "trial": trials[best.text],
        "finals": [{"step": c.step, "origin": c.origin, "trial": trials[c.text], "chosen": c is best} for c in finals],
    }


def _text_objective(scores: Mapping[str, float]) -> float:
    return worth(*(scores[name] for name in GROUPS))
