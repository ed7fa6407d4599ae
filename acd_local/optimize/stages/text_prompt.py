"""Searches the text prompts that come closest to the soft ones, and tries the best of them in greedy answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from acd_local.optimize import anchor_sets, budget, text_search, trial
from acd_local.optimize.anchor_sets import AnchorSets
from acd_local.optimize.checkpoint import Checkpoint
from acd_local.optimize.context import ORDER, TRYING, Role, StageContext, in_words
from acd_local.optimize.examples import batches
from acd_local.optimize.losses import Term
from acd_local.optimize.scores import Scores
from acd_local.optimize.stages.soft_prompt import SoftPromptResult
from acd_local.optimize.text_objective import ObjectiveWeights, TextObjective
from acd_local.optimize.text_search import Candidate, SearchSettings, SearchState, TextSearch
from acd_local.optimize.trial import Trial
from acd_local.pairs import AdversarialText, PromptPair
from acd_local.progress import Clock, check_stop, seconds_of
from acd_local.tuning.scoring import RefusalRates

SIZES: dict[Term, int] = {"positive": 6, "negative": 2, "retain": 10}  # anchors of a minibatch
# Tokens of their answers: openings decide. Of some refusals all: a text that only brings their openings about loops.
TOKENS, REFUSAL_TOKENS = 4, anchor_sets.TOKENS
# So much better than the manual text a text has to be in its trial: 48 answers differ by less than this by chance.
MARGIN = 0.1
# Validation instructions of a kind that score every text on the way, and the best of them again. The best of these are
# tried in greedy answers.
SCORED, AGAIN = 4, 24
SHORTLIST, FINALISTS = 8, 4


@dataclass(frozen=True)
class TextPromptResult:
    """The chosen text.

    Attributes:
        kept, origin, scores, trial: its step, how it was made, its scores and what came of it in greedy answers.
        finals: the texts that were tried in greedy answers: {"step", "origin", "trial", "chosen"}.
        tried: all texts, see `Candidate`. accepted: places of those that the search went on from.
    """

    text: str
    kept: int
    origin: str
    scores: dict[str, float]
    trial: dict[str, float]
    finals: list[dict[str, Any]]
    tried: list[dict[str, Any]]
    accepted: list[int]


@dataclass(eq=False)
class TextPromptStage:
    """Searches the text of one role.

    Args:
        safe_text: the safeguarding text that an adversarial one is to stand beside; None: a safeguarding one is sought.
    """

    context: StageContext
    sets: AnchorSets
    role: Role
    soft: SoftPromptResult
    safe_text: str | None = None

    def __post_init__(self) -> None:
        self._pieces = text_search.parts(self.role)
        self._settings = SearchSettings(max_tokens=self.context.request.max_tokens)

    def run(self) -> TextPromptResult:
        context, role = self.context, self.role
        checkpoint = context.checkpoint(
            f"text-{role}",
            soft=self.soft.key,
            settings={k: v for k, v in asdict(self._settings).items() if k not in ("rounds", "steps")},
            objective=[SIZES, TOKENS, REFUSAL_TOKENS, asdict(ObjectiveWeights()), SCORED, AGAIN],
            pieces=self._pieces,
            safe=self.safe_text,
            trial=[trial.TOKENS, trial.COUNTS, SHORTLIST, FINALISTS, MARGIN],
            order=ORDER,
            **context.gated,
        )
        result = TextPromptResult(**context.result(checkpoint, self._search))
        context.counts[f"text_{role}_rounds"] = checkpoint.counts["rounds"]
        context.counts[f"text_{role}_steps"] = checkpoint.counts["rounds"] + checkpoint.counts["steps"]
        kept = "the manual text is the best" if result.origin == "manual" else f"best at step {result.kept}"
        counts = f"{len(result.tried)} texts tried, {len(result.accepted)} accepted"
        context.close(checkpoint, f"{counts}, {kept}: {in_words(result.scores)}")
        return result

    def _search(self, checkpoint: Checkpoint) -> dict[str, Any]:
        context, start = self.context, self.context.manual[self.role]
        progress = _Progress(checkpoint)
        objective = self._text_objective()
        trying = 0.0
        if not checkpoint.counts:
            context.listener.phase(TRYING)
            trying = seconds_of(lambda: self._try([start], progress))
        with context.scores(self.safe_text) as (score, space):
            if not checkpoint.counts:
                list(score([self._pieces[0]], AGAIN))  # what the safeguarding text does is kept from then on
                again = seconds_of(lambda: progress.score_again([start], score))
                once = seconds_of(lambda: list(score([self._pieces[0]], SCORED)))
                checkpoint.counts = self._plan(objective, trying, once, again)
                progress.keep()
                check_stop(context.stop)
            state = progress.search()
            total = checkpoint.counts["rounds"] + checkpoint.counts["steps"]
            clock = Clock(budget.STAGES[checkpoint.stage].title, state.step, total, context.listener)
            TextSearch(
                objective,
                space,
                lambda texts: score(texts, SCORED),
                replace(self._settings, **checkpoint.counts),
                state,
                seed=context.request.seed,
                save=progress.save,
                on_step=lambda done, new: clock.at(done, f"objective {new.objective:.3f}; {in_words(new.scores)}"),
                stop=context.stop,
            ).run(start, self._pieces)
            short = text_search.best(state.tried, _value, SHORTLIST)
            again_scored = progress.score_again([c.text for c in short], score)
            short = [replace(c, scores=scores) for c, scores in zip(short, again_scored, strict=True)]
        finals = text_search.best(short, _value, FINALISTS)
        self._try([c.text for c in finals], progress)
        whole = state.dump()
        return _best_of(finals, progress.trials) | {key: whole[key] for key in ("tried", "accepted")}

    def _text_objective(self) -> TextObjective:
        """Make the objective on the shorter half of requests: a long one would pad its minibatch, hundreds of times."""
        context, model = self.context, self.context.model
        sets = batches(self.sets.part(validation=False), context.job.tokens, self.role, TOKENS, REFUSAL_TOKENS)
        by_term = {term: sorted(e, key=lambda e: len(e.prompt))[: -(-len(e) // 2)] for term, e in sets.items()}
        teacher, weights = self.soft.z.to(model.device), ObjectiveWeights()
        seed, layout = context.request.seed, context.job.tokens.layout
        return TextObjective(model, layout, teacher, by_term, SIZES, weights, seed, context.micro)

    def _plan(self, objective: TextObjective, trying: float, scoring: float, scoring_again: float) -> dict[str, int]:
        """Plan rounds and steps; the others are seconds of one text's trial, and of its scores on the way and on the
        shortlist."""
        if self.context.request.repeat is not None:  # what was timed has left the caches as it did then
            return self.context.request.repeat.search(self.role)
        tokens = self.context.job.tokens.manual[self.role]
        return budget.rounds_and_steps(
            self.context.seconds[f"text-{self.role}"],
            seconds_of(lambda: objective(tokens)) + scoring,
            seconds_of(lambda: objective.gradient(tokens)),
            len(self._pieces),
            self._settings.rounds,
            self._settings.tries,
            finals=SHORTLIST * scoring_again + FINALISTS * trying,
        )

    def _try(self, texts: Sequence[str], progress: _Progress) -> None:
        """Note what comes of texts in greedy answers: of safeguarding ones alone, of adversarial ones contrasted."""
        tried = {text: self._pair(text) for text in texts if text not in progress.trials}
        if not tried:
            return
        context, plain = self.context, self.safe_text is None
        clock = Clock("trying the best texts", 0, len(tried), context.listener)
        with context.trial_engine(next(iter(tried.values()))) as engine:
            for number, (text, pair) in enumerate(tried.items(), start=1):
                found = trial.run(engine, pair, context.groups, plain=plain, stop=context.stop)
                progress.trials[text] = asdict(found)
                progress.keep()
                clock.at(number)

    def _pair(self, text: str) -> PromptPair:
        if self.safe_text is None:
            return PromptPair("trial", text, AdversarialText(self.context.manual["adversarial"]))
        return PromptPair("trial", self.safe_text, AdversarialText(text))


class _Progress:
    """A checkpoint's contents: where the search is, and what came of the best texts, by text.

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

    def save(self, state: SearchState) -> None:
        self._state["search"] = state.dump()
        self.keep()

    def search(self) -> SearchState:
        kept = self._state["search"]
        return SearchState.load(kept) if kept else SearchState()

    def score_again(self, texts: Sequence[str], score: Scores) -> list[dict[str, float]]:
        missing = [text for text in texts if text not in self.scores]
        for text, found in zip(missing, score(missing, AGAIN), strict=True):
            self.scores[text] = found
            self.keep()
        return [self.scores[text] for text in texts]


def _best_of(finals: Sequence[Candidate], trials: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return the chosen one, by the names of `TextPromptResult`; `trials` by text."""

    def rank(c: Candidate) -> tuple[float, float]:
        return round(Trial(**trials[c.text]).value, 6), _value(c.scores)

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


def _value(scores: Mapping[str, float]) -> float:
    return RefusalRates(**scores).objective
